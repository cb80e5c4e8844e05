"""The flat config.json of the original LLaVA layout, to a `LlavaConfig` and back.

V vocabulary, D hidden size, L decoder layers.
"""

import dataclasses
import json
from pathlib import Path

from transformers import CONFIG_MAPPING, CLIPVisionConfig, LlavaConfig, PreTrainedConfig

from .source import read_json
from .state_dict import listed
from .weights import StoredTensor

# Where a config of ours keeps what the original layout cannot be written without, and its format.
PROVENANCE = "original_layout"
FORMAT_VERSION = 1

TEXT_TYPES = {
    "llava_llama": "llama",
    "llava": "llama",
    "llava_mistral": "mistral",
    "llava_qwen": "qwen2",
    "llava_qwen2": "qwen2",
}
NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SELECT = {"patch": "default", "cls_patch": "full"}
SELECT_BACK = {ours: theirs for theirs, ours in SELECT.items()}
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Written by Transformers for every model; what of it matters is set apart.
GENERIC = {field.name for field in dataclasses.fields(PreTrainedConfig)}


def read_flat_config(folder: Path, allowed: tuple[str, ...] = ()) -> dict:
    """config.json of a checkpoint in the original layout.

    Args:
        allowed: entries that the caller checks itself, whatever stock LLaVA can do.
    Raises: ValueError naming the entry, what it says and what can be imported.
    """
    path = folder / "config.json"
    flat = read_json(path)
    kind = flat.get("model_type")
    if "text_config" in flat:
        raise ValueError(
            f"{path} has a text_config (model_type {kind!r}), expected the flat config of the original layout: it is "
            f"{'a RoE folder of ours' if kind == 'roe_llava' else 'in the layout of llava-hf'} already, use it as it is"
        )
    if not isinstance(kind, str) or kind not in TEXT_TYPES:
        raise ValueError(f"{path} has model_type {kind!r}, expected one of {sorted(TEXT_TYPES)}")
    if "llm_cfg" in flat or (folder / "llm" / "config.json").is_file():
        raise ValueError(
            f"{path} is that of a VILA-1.5 (llm_cfg, a folder for each part), which goes through import-vila"
        )
    if missing := [name for name in NEEDED if type(flat.get(name)) is not int or flat[name] < 1]:
        raise ValueError(
            f"{path} has no number for {listed(missing)}, expected positive integers: is it a LLaVA config?"
        )
    for name, reason in unsupported(flat).items():
        if name not in allowed:
            raise ValueError(f"{path} has {name} {flat[name]!r}, which cannot be imported: {reason}")
    return flat


def unsupported(flat: dict) -> dict[str, str]:
    """Entries of a flat config that stand for something stock LLaVA does not have, with the reason."""
    found = {
        "quantization_config": "weights have to be 16 or 32 bits wide; import those it was made from",
        "is_multipath_encoder": "it is a LLaVA-HR, which has two vision towers: use import-llava-hr",
        "vision_tower_slow": "it is a LLaVA-HR, which has two vision towers: use import-llava-hr",
        "s2": "its image features come from several scales",
        "mm_use_im_start_end": "llava-hf puts no tokens around an image",
        "mm_use_im_patch_token": "llava-hf has one image token of its own",
        "use_mm_rms_norm": "llava-hf's projector has no norm",
    }
    reasons = {name: reason for name, reason in found.items() if flat.get(name)}
    if flat.get("mm_projector_type", "linear") != "mlp2x_gelu":
        flat.setdefault("mm_projector_type", "linear")  # as the original reads it
        reasons["mm_projector_type"] = (
            "expected 'mlp2x_gelu', llava-hf's projector is two linear layers with GELU; other MLPs and a linear one, "
            "as VILA has, go through import-vila"
        )
    if flat.get("mm_vision_select_feature", "patch") not in list(SELECT):
        reasons["mm_vision_select_feature"] = f"expected one of {sorted(SELECT)}"
    if flat.get("image_aspect_ratio") not in (None, "pad", "square"):
        reasons["image_aspect_ratio"] = (
            "expected 'pad', or none: anything else cuts an image into tiles, as LLaVA-NeXT does and LLaVA-1.5 does "
            "not ('resize', as VILA has it, goes through import-vila)"
        )
    if flat.get("mm_patch_merge_type", "flat") != "flat":
        reasons["mm_patch_merge_type"] = "expected 'flat': others belong to images in tiles"
    return reasons


def text_config(flat: dict) -> PreTrainedConfig:
    """The language model's configuration in a flat config."""
    cls = CONFIG_MAPPING[TEXT_TYPES[flat["model_type"]]]
    known = {field.name for field in dataclasses.fields(cls)} - GENERIC
    known |= {"rope_theta", "rope_scaling", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"}
    config = cls.from_dict({name: value for name, value in flat.items() if name in known})
    theta = config.rope_parameters["rope_theta"]
    if type(theta) not in (int, float) or theta <= 0:
        raise ValueError(f"rope_theta is {theta!r}, expected a positive number")
    return config


def llava_config(
    flat: dict, vision: CLIPVisionConfig, tokens, dtype: str, provenance: dict, text: PreTrainedConfig | None = None
) -> dict:
    """config.json in llava-hf layout.

    Args:
        flat: content of the original config.json.
        vision: of its tower.
        tokens: `SpecialTokens`.
        dtype: of the weights, as PyTorch names it.
        provenance: kept under `PROVENANCE`.
        text: the language model's configuration; by default read from `flat`.
    Raises: ValueError, or what else Transformers makes of a wrong entry.
    """
    text = text_config(flat) if text is None else text
    text.vocab_size, text.pad_token_id = tokens.vocab_size, tokens.pad_id
    text.dtype = vision.dtype = None
    select = SELECT[flat.get("mm_vision_select_feature", "patch")]
    patches = (vision.image_size // vision.patch_size) ** 2
    layer, most = flat.get("mm_vision_select_layer", -2), vision.num_hidden_layers
    if not isinstance(layer, int) or not -most - 1 <= layer <= most:
        raise ValueError(f"mm_vision_select_layer is {layer!r}, expected a layer of a tower that has {most}")
    stored_as = flat.get("torch_dtype") or flat.get("dtype") or dtype
    if not isinstance(stored_as, str) or stored_as not in DTYPES.values():
        raise ValueError(f"torch_dtype is {stored_as!r}, expected one of {', '.join(DTYPES.values())}")
    config = LlavaConfig(
        text_config=text.to_dict(),
        vision_config=vision.to_dict(),
        image_token_index=tokens.image_id,
        image_seq_length=patches + (select == "full"),
        vision_feature_layer=layer,
        vision_feature_select_strategy=select,
        projector_hidden_act="gelu",
        tie_word_embeddings=text.tie_word_embeddings,
        architectures=["LlavaForConditionalGeneration"],
        dtype=stored_as,
        pad_token_id=tokens.pad_id,
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
    )
    return json.loads(config.to_json_string()) | {PROVENANCE: provenance}


def check_sizes(flat: dict, source: dict[str, StoredTensor], path: Path) -> None:
    """Check the sizes in a flat config against those of the tensors.

    Args:
        source: tensors by name in the original layout.
        path: of the config.
    Raises: ValueError naming the entry and the tensor.
    """
    layers = {int(name.split(".")[2]) for name in source if name.startswith("model.layers.")}
    if not layers:
        raise ValueError(f"{path.parent} has no tensor named model.layers.*, found {listed(sorted(source))}")
    if len(layers) != flat["num_hidden_layers"]:
        raise ValueError(
            f"{path} has num_hidden_layers {flat['num_hidden_layers']}, found tensors of {len(layers)} layers "
            f"(the last is {max(layers)}): do config and weights belong together?"
        )
    measured = {
        "vocab_size": [("model.embed_tokens.weight", 0), ("lm_head.weight", 0)],
        "hidden_size": [("model.embed_tokens.weight", 1), ("model.norm.weight", 0), ("model.mm_projector.2.weight", 0)],
        "intermediate_size": [("model.layers.0.mlp.gate_proj.weight", 0)],
        "mm_hidden_size": [("model.mm_projector.0.weight", 1)],
    }
    for entry, places in measured.items():
        for name, axis in places:
            if name not in source or entry not in flat:
                continue
            shape = source[name].shape
            if len(shape) <= axis or shape[axis] != flat[entry]:
                raise ValueError(
                    f"{path} has {entry} {flat[entry]}, but {name} in {source[name].file} has shape {list(shape)} "
                    f"(axis {axis}): do config and weights belong together?"
                )


def flat_config(config: dict, tower: str, pads_images: bool) -> dict:
    """The flat config.json of the published layout for a model of ours that did not come from there.

    Args:
        config: content of our config.json.
        tower: what to write as `mm_vision_tower`.
        pads_images: whether its processor pads images to squares.
    """
    full = LlavaConfig.from_dict({**config, "model_type": "llava"})
    text, vision = full.text_config, full.vision_config
    rope = text.rope_parameters
    names = (*NEEDED, "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range")
    names += ("rms_norm_eps", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id")
    scaling = {"type": rope["rope_type"], "factor": rope["factor"]} if rope["rope_type"] != "default" else None
    return {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        **{name: getattr(text, name) for name in names},
        "tie_word_embeddings": full.tie_word_embeddings,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": scaling,
        "torch_dtype": config.get("dtype") or config.get("torch_dtype") or "float32",
        **({"image_aspect_ratio": "pad"} if pads_images else {}),
        "mm_hidden_size": vision.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": SELECT_BACK[full.vision_feature_select_strategy],
        "mm_vision_select_layer": full.vision_feature_layer,
        "mm_vision_tower": tower,
        "use_mm_proj": True,
    }


def check_version(provenance: dict, path: Path) -> None:
    """Raises: ValueError if what a config says of its original layout is of another format, or not as it has to be."""
    if not isinstance(provenance, dict):
        raise ValueError(f"{PROVENANCE} in {path} is {provenance!r:.60}, expected an object: was it changed by hand?")
    version = provenance.get("format_version")
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise ValueError(
            f"{PROVENANCE} in {path} has format_version {version!r}, this program reads up to {FORMAT_VERSION}: update "
            "roe-llava"
        )
    needed = {"vocab_size": int, "padded_vocab_size": int, "vision_tower": str, "buffers": list, "config": dict}
    if wrong := [name for name, kind in needed.items() if not isinstance(provenance.get(name), kind)]:
        raise ValueError(f"{PROVENANCE} in {path} lacks {listed(wrong)}: was it written by roe-llava?")
    old, padded = provenance["vocab_size"], provenance["padded_vocab_size"]
    if type(old) is not int or type(padded) is not int or not 1 <= old <= padded:
        raise ValueError(
            f"{PROVENANCE} in {path} has vocab_size {old!r} and padded_vocab_size {padded!r}, expected positive "
            "integers, the second not below the first: was it changed by hand?"
        )
    recorded = provenance["config"]
    if recorded.get("vocab_size") != old or not isinstance(recorded.get("mm_vision_tower"), str | None):
        raise ValueError(
            f"{PROVENANCE} in {path} has vocab_size {old!r}, its config has vocab_size {recorded.get('vocab_size')!r} "
            f"and mm_vision_tower {recorded.get('mm_vision_tower')!r}, expected one size and a name: was it changed by "
            "hand?"
        )
    if provenance["vision_tower"] not in ("inside", "beside"):
        raise ValueError(
            f"{PROVENANCE} in {path} has vision_tower {provenance['vision_tower']!r}, expected 'inside' or 'beside': "
            "was it changed by hand?"
        )
