"""What a card says of a model that decides which experts a token goes through: MoE-LLaVA and EvoMoE."""

from ..convert.expert_counts import parameter_counts
from ..convert.original_config import PROVENANCE as IMPORTED
from .folder import ModelFolder
from .results import Results
from .telling import NOT_MEASURED, TIMES_LIMIT, UNKNOWN, base_text, licence_text, plain_table, unmeasured

INTRO = """\
A LLaVA whose chosen decoder layers send every token through some of their experts
([MoE-LLaVA](https://arxiv.org/abs/2401.15947), [EvoMoE](https://arxiv.org/abs/2505.23830))."""
DECISIONS = "Experts"
ROUTERS = {
    "linear": "linear, one matrix (MoE-LLaVA)",
    "token_aware": "token-aware, a hypernetwork for image and one for text tokens (EvoMoE)",
}
USAGE = """\
`model(**inputs, output_router_logits=True)` also returns logits, choices and weights of every layer with experts;
`experts_implementation="eager"`, `"batched_mm"` or `"grouped_mm"` in `from_pretrained` chooses what multiplies."""


def summary(folder: ModelFolder) -> str:
    """What became of the model it was made from, in a sentence."""
    if names := [str(stage.get("stage")) for stage in stages(folder)]:
        return f"It was trained with experts: {', '.join(names)}."
    if is_imported(folder):
        return "It was imported from the published layout, with the values it has there."
    if (folder.config.get("moe_provenance") or {}).get("upcycled"):
        config = folder.model_config
        same = "it answers as the dense model does" if config.normalizes_weights() else "it has yet to be trained"
        return f"Its experts are copies of the dense model's MLPs, and its routers are untrained: {same}."
    return "How it was made is not recorded."


def stages(folder: ModelFolder) -> list[dict]:
    """The recorded stages of training, first to last."""
    found = folder.training.get("stages") or []
    return [one for one in found if isinstance(one, dict)]


def is_imported(folder: ModelFolder) -> bool:
    return isinstance(folder.config.get(IMPORTED), dict)


def facts(folder: ModelFolder, found: Results, licence: str | None, where: str) -> list[tuple[str, str]]:
    """Rows of the table at the top."""
    config = folder.model_config
    counts = parameter_counts({name: one.shape for name, one in folder.checkpoint.tensors.items()}, config)
    layers = ", ".join(map(str, config.expert_layers()))
    weighed = "weights sum to 1" if config.normalizes_weights() else "weighted by their probabilities as they are"
    return [
        ("base", source_text(folder)),
        ("licence", licence_text(licence, where)),
        ("decoder layers", f"{config.text_config.num_hidden_layers}, with experts: {layers}"),
        ("experts", f"{config.num_experts} per layer, {config.num_experts_per_tok} per token; {weighed}"),
        ("router", ROUTERS[config.router_type]),
        ("parameters", f"{counts.total:,}, of which a token goes through {counts.activated:,}"),
        ("in experts, in routers", f"{counts.experts:,}, {counts.routers:,}"),
    ]


def source_text(folder: ModelFolder) -> str:
    """The dense model it was made from, or where it was imported from."""
    if is_imported(folder):
        origin = folder.config[IMPORTED]
        at = f" at commit `{origin['revision']}`" if origin.get("revision") else ""
        return f"{UNKNOWN}; imported from `{origin.get('id')}`{at}"
    upcycled = (folder.config.get("moe_provenance") or {}).get("upcycled")
    return base_text(folder, "each expert began as its layer's MLP" if upcycled else f"what was done with it {UNKNOWN}")


def usage(folder: ModelFolder) -> str:
    """What the model's output says of experts, and what multiplies."""
    return USAGE


def data_text(folder: ModelFolder, known: str | None) -> str:
    """What the stages were trained on, as far as they record it."""
    lines = [data_of(stage) for stage in stages(folder)]
    if known is not None:
        lines.insert(0, f"{known}.")
    return "\n".join(lines) or f"Number of examples {UNKNOWN}; the record that came with the weights names no data."


def data_of(stage: dict) -> str:
    """The data of a stage, in a line."""
    number, data = stage.get("examples"), stage.get("data")
    count = f"{number:,} examples" if isinstance(number, int) else f"number of examples {UNKNOWN}"
    source = f"`{data}`, its licence {UNKNOWN} to this card" if isinstance(data, str) else f"data {UNKNOWN}"
    return f"- {stage.get('stage')}: {count}; {source}"


def recipe_text(folder: ModelFolder, source: str) -> str:
    """The stages as a table of their plain entries."""
    entries = []
    for number, stage in enumerate(stages(folder), start=1):
        entries += [(f"stage {number}: {name}", value) for name, value in stage.items() if name != "data"]
        measured = stage.get("measured")
        if isinstance(measured, dict):
            entries += [(f"stage {number}: {name}", value) for name, value in measured.items()]
    return plain_table(entries, source)


def decisions_text(folder: ModelFolder, found: Results, image, picture: str) -> str:
    """Which experts tokens went through, as far as that was measured."""
    return "\n\n".join(found.experts) or f"Which experts image and text tokens go through: {NOT_MEASURED}."


def limits(folder: ModelFolder, found: Results) -> list[str]:
    """What the model does not do, and what nobody has looked at."""
    uncounted = "Which experts tokens go through was not measured; `roe-llava evaluate` counts them."
    return [
        *unmeasured(found),
        *([uncounted] * (not found.experts)),
        *([TIMES_LIMIT] * bool(found.speed)),
        "All experts are in memory, whichever a token goes through; bitsandbytes leaves them as they are.",
        "A batch reads an expert's weights as soon as one of its tokens needs them.",
        "Tensor parallelism (`tp_plan`) is refused.",
        "It answers as wrongly, and with the same biases, as the model it was made from does.",
    ]
