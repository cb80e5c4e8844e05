"""The configs of VILA's two layouts, read and checked: v1.0 in one folder, 1.5 in llm/, vision_tower/, mm_projector/.

Both have model_type `llava_llama`; what tells them apart is `llm_cfg`, or the class named in `architectures`.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from transformers import CLIPVisionConfig, PreTrainedConfig, SiglipVisionConfig

from ..configuration_frontend import STOCK_TYPE, FrontendLlavaConfig, base_type_of
from ..loading_frontend import FRONTEND_AUTO_MAP
from ..modeling_frontend import FrontendLlavaForConditionalGeneration
from ..projectors_frontend import num_image_tokens, projector_class
from .original_config import NEEDED, PROVENANCE, SELECT, llava_config, read_flat_config, text_config
from .original_vision import vision_config
from .source import blamed_on, read_json
from .state_dict import listed

TEXT_PART, TOWER_PART, PROJECTOR_PART = PARTS = ("llm", "vision_tower", "mm_projector")
SPLIT_CLASS = "LlavaLlamaModel"
# Where the config.json of a stock or our layout keeps what a 1.5 checkpoint came with.
SPLIT_PROVENANCE = "vila_layout"
ASPECTS = {False: (None, "square", "pad", "resize"), True: (None, "pad", "resize")}
# What the top config.json repeats of the parts', and must not say otherwise.
REPEATED = {
    TEXT_PART: ("model_type", *NEEDED),
    TOWER_PART: ("model_type", "hidden_size", "num_hidden_layers", "patch_size"),
    PROJECTOR_PART: ("mm_projector_type",),
}
# Towers and language models that VILA has and we do not.
TOWER_REASONS = {
    "intern_vit_6b": "InternViT (of the 40B model) is not part of Transformers",
    "radio": "RADIO is not part of Transformers",
}
TEXT_REASON = "only LLaMA's decoder (VILA-7B and 13B, VILA1.5-3B, 8B and 13B) was compared with the published code"
UNSUPPORTED = {
    "s2": "its image features come from several scales",
    "dynamic_s2": "its image features come from several scales",
    "quantization_config": "weights have to be 16 or 32 bits wide; import those it was made from",
    "mm_use_im_start_end": "llava-hf puts no tokens around an image",
    "mm_use_im_patch_token": "llava-hf has one image token of its own",
}


@dataclass
class VilaConfig:
    """What the configs of a checkpoint say, in either layout.

    Attributes:
        path: of the top config.json.
        top: its content.
        split: whether the layout is that of 1.5.
        flat: sizes of the language model and the entries of the original LLaVA's config.json.
        text_folder: where language model, tokenizer and generation settings are.
        projector_type: of the projector.
        tower: of the vision tower, as stored; `None` for v1.0, whose tower is found as an original LLaVA's.
        resolution: side of the images that reach the tower, if it is to differ from what it was stored with.
    """

    path: Path
    top: dict
    split: bool
    flat: dict
    text_folder: Path
    projector_type: str
    tower: CLIPVisionConfig | SiglipVisionConfig | None = None
    resolution: int | None = None

    @property
    def aspect(self) -> str | None:
        """What becomes of images that are no squares."""
        return self.top.get("image_aspect_ratio")

    @property
    def text_path(self) -> Path:
        """The config.json of the language model."""
        return self.text_folder / "config.json"


def read_vila_config(folder: Path) -> VilaConfig:
    """The configs of a checkpoint.

    Raises: ValueError naming file and entry, what it says and what can be imported.
    """
    path = folder / "config.json"
    top = read_json(path)
    config = read_split(folder, path, top) if is_split(folder, top) else read_single(folder, path)
    check_entries(config)
    return config


def is_split(folder: Path, top: dict) -> bool:
    """Whether a top config.json is that of the layout of 1.5."""
    architectures = top.get("architectures")
    named = isinstance(architectures, list) and SPLIT_CLASS in architectures
    return "llm_cfg" in top or named or ("text_config" not in top and (folder / TEXT_PART / "config.json").is_file())


def read_single(folder: Path, path: Path) -> VilaConfig:
    """The config of a v1.0 checkpoint, which is that of an original LLaVA but for the projector."""
    flat = read_flat_config(folder, allowed=("mm_projector_type", "image_aspect_ratio"))
    if flat["model_type"] != "llava_llama":
        raise ValueError(f"{path} has model_type {flat['model_type']!r}, expected 'llava_llama': {TEXT_REASON}")
    projector_type = flat.get("mm_projector_type", "linear")  # as the original reads it
    if projector_type == "mlp_downsample":
        raise ValueError(f"{path} has mm_projector_type {projector_type!r}, expected one of v1.0's: linear, mlpNx_gelu")
    check_projector(projector_type, path)
    return VilaConfig(path, flat, False, flat, folder, projector_type)


def read_split(folder: Path, path: Path, top: dict) -> VilaConfig:
    """The four configs of a 1.5 checkpoint; those in the folders of the parts are what counts, as published."""
    if top.get("model_type") != "llava_llama":
        raise ValueError(f"{path} has model_type {top.get('model_type')!r}, expected 'llava_llama': {TEXT_REASON}")
    parts = {part: read_part(folder / part / "config.json", top) for part in PARTS}
    text, tower_path = parts[TEXT_PART], folder / TOWER_PART / "config.json"
    text_path = folder / TEXT_PART / "config.json"
    if text.get("model_type") != "llama":
        raise ValueError(f"{text_path} has model_type {text.get('model_type')!r}, expected 'llama': {TEXT_REASON}")
    if text.get("quantization_config"):
        raise ValueError(f"{text_path} has quantization_config, expected none: {UNSUPPORTED['quantization_config']}")
    if missing := [name for name in NEEDED if type(text.get(name)) is not int or text[name] < 1]:
        raise ValueError(f"{text_path} has no number for {listed(missing)}, expected positive integers")
    projector_type = parts[PROJECTOR_PART].get("mm_projector_type")
    check_projector(projector_type, folder / PROJECTOR_PART / "config.json")
    tower = tower_config(tower_path, parts[TOWER_PART])
    selected = ("mm_vision_select_layer", "mm_vision_select_feature", "image_aspect_ratio")
    flat = text | {name: top[name] for name in selected if name in top} | {"model_type": "llava_llama"}
    resolution = wanted_resolution(path, top, tower)
    return VilaConfig(path, top, True, flat, folder / TEXT_PART, projector_type, tower, resolution)


def read_part(path: Path, top: dict) -> dict:
    """config.json of a part.

    Raises: ValueError if it is missing, or the top config.json says otherwise.
    """
    if not path.is_file():
        raise ValueError(
            f"{path} is missing: a VILA-1.5 checkpoint has the folders {', '.join(PARTS)}, each with a config.json; is "
            "the download complete?"
        )
    content, part = read_json(path), path.parent.name
    repeated = top.get(f"{part}_cfg")
    if not isinstance(repeated, dict):  # a name to follow, or none: the folder beside it is what counts
        return content
    for name in REPEATED[part]:
        if name in repeated and name in content and repeated[name] != content[name]:
            raise ValueError(
                f"{path} has {name} {content[name]!r}, {part}_cfg in {path.parent.parent / 'config.json'} has "
                f"{repeated[name]!r}, expected the same: do the parts belong together?"
            )
    return content


def check_projector(projector_type, path: Path) -> None:
    """Raises: ValueError if a projector is none of ours."""
    if not isinstance(projector_type, str):
        raise ValueError(f"{path} has mm_projector_type {projector_type!r}, expected the name of a projector")
    with blamed_on(path):
        projector_class(projector_type)


def tower_config(path: Path, content: dict) -> CLIPVisionConfig | SiglipVisionConfig:
    """The configuration of a 1.5 checkpoint's tower: CLIP, or SigLIP without the head that nothing reads.

    Raises: ValueError if it is another one.
    """
    kind = content.get("model_type")
    if kind == "clip_vision_model":
        return vision_config(path.parent)
    if kind != "siglip_vision_model":
        reason = TOWER_REASONS.get(kind) if isinstance(kind, str) else None
        raise ValueError(
            f"{path} has model_type {kind!r}, expected 'siglip_vision_model' or 'clip_vision_model'"
            + (f": {reason}" if reason else "")
        )
    known = {field.name for field in dataclasses.fields(SiglipVisionConfig)}
    known -= {field.name for field in dataclasses.fields(PreTrainedConfig)}
    with blamed_on(path):
        config = SiglipVisionConfig(**{name: value for name, value in content.items() if name in known})
        config.vision_use_head = False
        if not 0 < config.patch_size <= config.image_size:
            raise ValueError(f"patch_size is {config.patch_size}, image_size {config.image_size}")
    return config


def wanted_resolution(path: Path, top: dict, tower) -> int | None:
    """The resolution a tower's position table has to be made anew for; `None` if it is what it was stored with.

    Raises: ValueError if that cannot be done.
    """
    resolution = top.get("vision_resolution", -1)
    if resolution in (None, -1, tower.image_size):
        return None
    if type(resolution) is not int or resolution < 2 * tower.patch_size:
        raise ValueError(
            f"{path} has vision_resolution {resolution!r}, expected -1 (as stored) or a side in pixels of at least two "
            f"patches of {tower.patch_size}"
        )
    if tower.model_type != "siglip_vision_model":
        raise ValueError(
            f"{path} has vision_resolution {resolution}, but its CLIP tower was stored with {tower.image_size}: the "
            "published code resizes position tables without a class token alone"
        )
    if top.get("interpolate_mode", "linear") != "linear":
        raise ValueError(f"{path} has interpolate_mode {top['interpolate_mode']!r}, expected 'linear'")
    return resolution


def check_entries(config: VilaConfig) -> None:
    """Raises: ValueError for entries that stand for something our models do not have."""
    top, path = config.top, config.path
    for name, reason in UNSUPPORTED.items():
        if top.get(name):
            raise ValueError(f"{path} has {name} {top[name]!r}, which cannot be imported: {reason}")
    allowed = ASPECTS[config.split]
    if config.aspect not in allowed:
        raise ValueError(
            f"{path} has image_aspect_ratio {config.aspect!r}, expected one of {', '.join(map(str, allowed))}: others "
            "cut an image into tiles"
        )
    select = top.get("mm_vision_select_feature", "patch")
    if select not in list(SELECT):
        raise ValueError(f"{path} has mm_vision_select_feature {select!r}, expected one of {sorted(SELECT)}")
    if config.tower is not None and config.tower.model_type == "siglip_vision_model" and select != "cls_patch":
        raise ValueError(
            f"{path} has mm_vision_select_feature {select!r} with a SigLIP tower, expected 'cls_patch': SigLIP has no "
            "class token to leave out"
        )


def vila_config(config: VilaConfig, tower, tokens, dtype: str, provenance: dict) -> dict:
    """config.json of the imported model: stock LLaVA's where that has such a front-end, else ours.

    Args:
        tower: configuration of the vision tower.
        tokens: `SpecialTokens`.
        dtype: of the weights.
        provenance: what is kept of the source.
    Raises: ValueError if the parts do not fit, or what else Transformers makes of a wrong entry.
    """
    made = llava_config(config.flat, tower, tokens, dtype, provenance, text_config(config.flat))
    if config.split:
        made[SPLIT_PROVENANCE] = made.pop(PROVENANCE)
    patches = (tower.image_size // tower.patch_size) ** 2
    has_class_token = tower.model_type == "clip_vision_model"
    patches += has_class_token and made["vision_feature_select_strategy"] == "full"
    made["image_seq_length"] = num_image_tokens(config.projector_type, patches)
    if base_type_of(made | {"projector_type": config.projector_type}) == STOCK_TYPE:
        return made
    made |= {
        "model_type": FrontendLlavaConfig.model_type,
        "architectures": [FrontendLlavaForConditionalGeneration.__name__],
        "auto_map": dict(FRONTEND_AUTO_MAP),
        "projector_type": config.projector_type,
    }
    FrontendLlavaConfig.from_dict(made)
    return made
