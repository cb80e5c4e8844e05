"""What a card says of a model that decides which layers run: RoE-LLaVA, whole or its routing parts alone."""

import math
from pathlib import Path

from ..configuration_moe_llava import MoeLlavaConfig
from ..convert.kinds import ROE_MOE
from ..convert.source import read_json
from .folder import ModelFolder
from .results import Results
from .telling import NOT_MEASURED, TIMES_LIMIT, UNKNOWN, base_text, licence_text, plain_table, unmeasured

INTRO = """\
A LLaVA that decides for every example which decoder layers to run
([Routing Experts](https://arxiv.org/abs/2407.14093), ICLR 2025)."""
DECISIONS = "Routes"
USAGE = """\
`output.past_key_values.routes` is (batch, layers), True where a layer ran; `generate(routes=...)` pins a route,
`generate(route_bias=...)` moves the routers."""


def summary(folder: ModelFolder) -> str:
    """What the repository holds, in a sentence or two."""
    if folder.is_adapter:
        return "This repository holds routers, adapters and routing tokens alone; the base is had from its own place."
    if is_base_tuned(folder):
        return "The base's weights were trained too, so with every layer kept it is not the LLaVA it was made from."
    if is_base_untouched(folder):
        base = "model with experts" if folder.kind is ROE_MOE else "LLaVA"
        return f"With every layer kept it is the {base} it was made from."
    return "Whether its base weights are those of a published LLaVA is not recorded."


def is_base_untouched(folder: ModelFolder) -> bool:
    """Whether the base weights are recorded to be those of the base; a tuned base has no fingerprint."""
    return bool(folder.base.get("fingerprint"))


def is_base_tuned(folder: ModelFolder) -> bool:
    return folder.training.get("train_base") in ("full", "lora")


def facts(folder: ModelFolder, found: Results, licence: str | None, where: str) -> list[tuple[str, str]]:
    """Rows of the table at the top."""
    info = folder.info
    routed = "all" if info.routed_layers is None else ", ".join(map(str, info.routed_layers)) or "none"
    added = sum(math.prod(tensor.shape) for tensor in folder.parts.values())
    total = base_parameters(folder)
    share = f", {added / total:.1%} of the base's {total:,}" if total else ""
    skips = [f"{share:.1%} ({on})" for share, on in found.skips]
    return [
        ("base", base_text(folder, base_state(folder))),
        ("licence", licence_text(licence, where)),
        ("decoder layers", f"{info.num_hidden_layers}, routed: {routed}"),
        *expert_facts(folder),
        ("adapter width", str(info.adapter_size)),
        ("parameters added", f"{added:,}{share}"),
        ("skip target", f"{info.target_skip_ratio:.1%} of (example, layer) pairs"),
        ("realised skip", "; ".join(skips) or NOT_MEASURED),
    ]


def expert_facts(folder: ModelFolder) -> list[tuple[str, str]]:
    """Rows on the experts of a base that has them; an adapter alone does not know."""
    config = None if folder.is_adapter else folder.model_config
    if not isinstance(config, MoeLlavaConfig):
        return []
    layers = ", ".join(map(str, config.expert_layers()))
    per_layer = f"{config.num_experts} per layer, {config.num_experts_per_tok} per token"
    return [("experts", f"{per_layer}, in layers {layers}; {config.router_type} routers")]


def base_state(folder: ModelFolder) -> str:
    """Whether the base's weights are untouched."""
    if is_base_tuned(folder):
        return f"its weights trained too ({folder.training['train_base']})"
    return "its weights as they are" if is_base_untouched(folder) else f"state of its weights {UNKNOWN}"


def base_parameters(folder: ModelFolder) -> int:
    """Parameters of the base; 0 if they are not known."""
    if folder.is_adapter:
        kinds = ((folder.info.base or {}).get("tensors") or {}).values()
        shapes = [[int(one) for one in kind.partition("[")[2].partition("]")[0].split(",") if one] for kind in kinds]
        return sum(map(math.prod, shapes))
    return sum(math.prod(tensor.shape) for tensor in folder.checkpoint.tensors.values()) - sum(
        math.prod(tensor.shape) for tensor in folder.parts.values()
    )


def usage(folder: ModelFolder) -> str:
    """What the model's output says of routes, and how they are moved."""
    return f"{USAGE} {budget(folder)}"


def budget(folder: ModelFolder) -> str:
    """Whether `skip_ratio` can be asked for."""
    table = folder.info.skip_calibration
    if not table:
        return "`generate(skip_ratio=...)` needs a calibration, which this model has not."
    ratios = table["skip_ratio"]
    return (
        f"`generate(skip_ratio=...)` takes a share from {min(ratios):.0%} to {max(ratios):.0%}, calibrated on "
        f"{table.get('questions', 'an unknown number of')} prompts; 0.0 keeps every layer."
    )


def data_text(folder: ModelFolder, known: str | None) -> str:
    """What it was trained on, from the summary, or, of one that does not name it, the record beside the folder."""
    training, record = folder.training, folder.path.parent / "run.json"
    data = (read_json(record).get("data") or {}) if record.is_file() else {}
    data = {"data": training["data"]} if isinstance(training.get("data"), str) else data
    number = training.get("examples")
    if number is None and {"steps", "batch_size"} <= training.keys():
        number = training["steps"] * training["batch_size"]
    count = f"{number:,} examples" if number else f"number of examples {UNKNOWN}"
    if known is not None:
        return f"{known}; {count}."
    if file := data.get("data"):
        return f"`{Path(file).name}`: {count}. Its licence is {UNKNOWN} to this card."
    return f"{count[0].upper()}{count[1:]}; the record that came with the weights does not name the data."


def recipe_text(folder: ModelFolder, source: str) -> str:
    """The summary of the training as a table of its plain entries, sections opened one level."""
    entries = []
    for name, value in folder.training.items():
        if name == "data":  # above the table
            continue
        if name in ("routing", "training", "versions", "learning_rates") and isinstance(value, dict):
            entries += [(f"{name}.{part}", one) for part, one in value.items()]
        else:
            entries.append((name, value))
    return plain_table(entries, source)


def decisions_text(folder: ModelFolder, found: Results, image, picture: str) -> str:
    """The routes that were taken, as far as that was recorded."""
    lines = [*found.routes]
    if image is not None:
        lines.append(f"![Which decoder layers run]({picture})")
    if found.shares:
        rows = [
            f"| `{route}` | {share:.1%} |" for route, share in sorted(found.shares.items(), key=lambda one: -one[1])
        ]
        lines.append("\n".join(["| route, layer 0 first | share of the questions |", "|---|---:|", *rows[:8]]))
    return "\n\n".join(lines) or f"Routes: {NOT_MEASURED}."


def limits(folder: ModelFolder, found: Results) -> list[str]:
    """What the model does not do, and what nobody has looked at."""
    unknown = [*unmeasured(found), *(["How much is skipped was not measured."] * (not found.skips))]
    return [
        *unknown,
        *([TIMES_LIMIT] * bool(found.speed)),
        "Layer 0 decides before its routing tokens have read anything, so its decision is the same for every input.",
        "Attention: eager, sdpa and flex attention; FlashAttention is refused.",
        "No chunked prefill, continuous batching, packed prompts or `guidance_scale`: a route is decided from the "
        "whole prompt, one per row.",
        "In a batch every row runs its own layers, but a layer's weights are read as soon as one row needs them.",
        "It answers as wrongly, and with the same biases, as its base does; skipping can add errors on inputs unlike "
        "those it was trained on.",
    ]
