"""The flat config.json of the published MoE-LLaVA layout, to ours."""

import dataclasses
from pathlib import Path

from transformers import CONFIG_MAPPING, PreTrainedConfig

from ..loading_moe import AUTO_MAP
from .original_config import GENERIC, NEEDED, unsupported
from .source import read_json
from .state_dict import listed

TEXT_TYPES = {
    "moe_llava_llama": "llama",
    "moe_llava_mistral": "mistral",
    "moe_llava_phi": "phi",
    "moe_llava_qwen1_5": "qwen2",
    "moe_llava_stablelm": "stablelm",
}
# Of stages I and II, before there are experts.
DENSE_TYPES = {name.removeprefix("moe_"): text for name, text in TEXT_TYPES.items()}
WITHOUT_DECODER = {
    "moe_llava_qwen": "Qwen-1's decoder is not part of Transformers",
    "moe_llava_minicpm": "MiniCPM scales embeddings and residuals, which none of our decoders does",
}
# Entries under other names than Transformers has today.
RENAMED = {"norm_eps": "layer_norm_eps", "rope_pct": "partial_rotary_factor"}
ROPE = ("rope_theta", "rope_scaling", "partial_rotary_factor")


def read_published_config(folder: Path) -> dict:
    """config.json of a checkpoint in the published layout, with the names of the original LLaVA where those differ.

    Raises: ValueError naming the entry, what it says and what can be imported.
    """
    path = folder / "config.json"
    flat = read_json(path)
    kind = flat.get("model_type")
    if not isinstance(kind, str) or kind not in TEXT_TYPES | DENSE_TYPES:
        reason = WITHOUT_DECODER.get(kind) if isinstance(kind, str) else None
        raise ValueError(
            f"{path} has model_type {kind!r}, expected one of {sorted(TEXT_TYPES | DENSE_TYPES)}"
            + (f": {reason}" if reason else "")
        )
    if kind in DENSE_TYPES and "mm_image_tower" not in flat:
        raise ValueError(
            f"{path} has model_type {kind!r} and no mm_image_tower, which MoE-LLaVA's code writes: is it an original "
            "LLaVA? That goes through import-llava"
        )
    if missing := [name for name in NEEDED if type(flat.get(name)) is not int or flat[name] < 1]:
        raise ValueError(f"{path} has no number for {listed(missing)}, expected positive integers: is the file whole?")
    for name, reason in unsupported_entries(flat).items():
        raise ValueError(f"{path} has {name} {flat.get(name)!r}, which cannot be imported: {reason}")
    if not is_dense(flat):
        check_moe(flat.get("moe"), path)
    return flat | {"mm_vision_tower": flat.get("mm_image_tower"), "mm_projector_type": flat["image_projector_type"]}


def is_dense(flat: dict) -> bool:
    """Whether a config is that of a model without experts, of stage I or II."""
    return flat["model_type"] in DENSE_TYPES


def unsupported_entries(flat: dict) -> dict[str, str]:
    """Entries that stand for something our models do not have, with the reason."""
    reasons = unsupported(flat | {"mm_projector_type": "mlp2x_gelu"})
    if flat.get("image_projector_type", "linear") != "mlp2x_gelu":
        reasons["image_projector_type"] = "expected 'mlp2x_gelu', llava-hf's projector is two linear layers with GELU"
    if flat.get("mm_video_tower"):
        reasons["mm_video_tower"] = "LLaVA takes no videos"
    return reasons


def check_moe(moe, path: Path) -> None:
    """Raises: ValueError if the block "moe" of a config is not that of a trained MoE-LLaVA."""
    if not isinstance(moe, dict) or moe.get("moe_enable") is not True:
        raise ValueError(
            f"{path} has moe {moe!r:.80}, expected an object with moe_enable true: did its training stop before "
            "it had experts? A dense checkpoint has model_type llava_*"
        )
    if moe.get("use_residual"):
        raise ValueError(
            f"{path} has moe.use_residual {moe['use_residual']!r}, expected false: no released MoE-LLaVA has a dense "
            "MLP beside its experts"
        )
    layers, numbers = moe.get("moe_layers_idx"), moe.get("num_experts")
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers) or not layers:
        raise ValueError(f"{path} has moe.moe_layers_idx {layers!r:.80}, expected a list of layer numbers")
    numbers = numbers if isinstance(numbers, list) else [numbers]
    if not all(type(number) is int for number in numbers) or len(set(numbers)) != 1:
        raise ValueError(
            f"{path} has moe.num_experts {numbers!r:.80}, expected one number for all layers: layers of different "
            "numbers of experts are not supported"
        )


def moe_fields(flat: dict) -> dict:
    """What `MoeLlavaConfig` adds. Noise and padding are left at our defaults, which differ from the published code."""
    moe = flat["moe"]
    numbers = moe["num_experts"]
    return {
        "num_experts": numbers[0] if isinstance(numbers, list) else numbers,
        "num_experts_per_tok": moe.get("top_k_experts", 2),
        "moe_layers": moe["moe_layers_idx"],
        "expert_capacity_factor": moe.get("capacity_factor"),
        "min_expert_capacity": moe.get("min_capacity", 0),
        "router_aux_loss_coef": moe.get("router_aux_loss_coef", 0.01),
    }


def notes(flat: dict) -> dict[str, str]:
    """Where the imported model differs from the published code on purpose, label to text."""
    if is_dense(flat):
        return {"experts": "none: a stock LLaVA, which upcycle gives experts"}
    moe, fields = flat["moe"], moe_fields(flat)
    chosen, experts = fields["num_experts_per_tok"], fields["num_experts"]
    lines = {}
    if chosen == 2:
        lines["noise"] = "second experts are chosen without noise; second_choice_noise='always' is the published code"
    if chosen * moe.get("eval_capacity_factor", experts) < experts:
        lines["capacity"] = (
            f"nothing is dropped at inference; the published code drops what is over eval_capacity_factor "
            f"{moe['eval_capacity_factor']}"
        )
    return lines


def published_text_config(flat: dict) -> PreTrainedConfig:
    """The language model's configuration in a flat config."""
    cls = CONFIG_MAPPING[(TEXT_TYPES | DENSE_TYPES)[flat["model_type"]]]
    flat = {RENAMED.get(name, name): value for name, value in flat.items()}
    known = {field.name for field in dataclasses.fields(cls)} - GENERIC
    known |= {*ROPE, "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"}
    config = cls.from_dict({name: value for name, value in flat.items() if name in known})
    theta = config.rope_parameters["rope_theta"]
    if type(theta) not in (int, float) or theta <= 0:
        raise ValueError(f"rope_theta is {theta!r}, expected a positive number")
    return config


def moe_llava_config(llava: dict, fields: dict) -> dict:
    """A llava-hf config.json with experts.

    Args:
        llava: content of the dense one.
        fields: of `MoeLlavaConfig`.
    """
    return llava | {
        "model_type": "moe_llava",
        "architectures": ["MoeLlavaForConditionalGeneration"],
        "auto_map": dict(AUTO_MAP),
        **fields,
    }
