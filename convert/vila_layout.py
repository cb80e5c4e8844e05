"""Tensors of a VILA checkpoint, taken apart and renamed: v1.0 from one folder, 1.5 from three.

n new, m old rows of a position table, C width of the tower.
"""

import re

import torch
from torch import Tensor

from .keys import (
    EXPORT_KEYS,
    ORIGINAL_KEYS,
    TOWER_KEYS,
    VILA_TEXT_KEYS,
    VILA_TOWER_DROPPED,
    renamed,
)
from .made_tensors import check_dtype, in_memory
from .original_layout import Layout, buffer_reason
from .original_vision import check_tower_sizes
from .state_dict import listed
from .vila_config import PARTS, PROJECTOR_PART, TEXT_PART, TOWER_PART, VilaConfig
from .weights import Checkpoint, StoredTensor, open_checkpoint

PROJECTOR = "multi_modal_projector."
POSITIONS = "vision_tower.vision_model.embeddings.position_embedding.weight"
SINGLE_KEYS = {name: new for name, new in ORIGINAL_KEYS.items() if PROJECTOR not in new}


def projector_layers(projector_type: str, prefix: str) -> dict[str, str]:
    """A projector's layers, as published below `prefix`, to our names below `PROJECTOR`."""
    if projector_type == "linear":
        return {prefix: "linear"}
    if projector_type == "identity":
        return {}
    if projector_type == "mlp_downsample":
        return {f"{prefix}.1": "norm", f"{prefix}.2": "linear_1", f"{prefix}.4": "linear_2"}
    depth = int(re.fullmatch(r"mlp(\d+)x_gelu", projector_type)[1])
    return {f"{prefix}.{2 * number}": f"linear_{number + 1}" for number in range(depth)}


def projector_keys(projector_type: str, prefix: str) -> dict[str, str]:
    """Patterns of a projector's tensors, to names on disk in llava-hf's layout."""
    layers = projector_layers(projector_type, prefix)
    return {rf"{re.escape(old)}\.(weight|bias)": rf"{PROJECTOR}{new}.\1" for old, new in layers.items()}


def take(layout: Layout, checkpoint: Checkpoint, keys: dict, dropped: dict, part: str | None, what: str) -> None:
    """Put every tensor of a checkpoint into the layout, or list it as dropped.

    Args:
        keys: patterns of names to new names.
        dropped: patterns of names to reasons.
        part: folder of a 1.5 checkpoint, which its names are told with.
        what: which names there may be, for messages.
    Raises: ValueError naming a tensor that is neither.
    """
    start = f"{part}/" if part else ""
    for file_name, file in checkpoint.files.items():
        for name in file.tensors:
            tensor = checkpoint.tensors[name]
            reason = next((why for pattern, why in dropped.items() if re.fullmatch(pattern, name)), None)
            if reason is not None:
                layout.dropped[start + name] = reason
            elif new := renamed(name, keys):
                layout.files.setdefault(start + file_name, {})[new] = tensor
                layout.renamed[start + name] = new
            elif buffer_reason(name) is not None:
                layout.buffers[name] = tensor
                layout.dropped[start + name] = buffer_reason(name)
            else:
                raise ValueError(
                    f"{name} in {tensor.file} is no tensor of {what}: nothing is left out unseen, so it has to be "
                    "removed, or the checkpoint is of another kind"
                )


def single_layout(checkpoint: Checkpoint, projector_type: str) -> Layout:
    """The layout of a v1.0 checkpoint."""
    layout, prefix = Layout(), "model.mm_projector"
    layers = listed(sorted(projector_layers(projector_type, prefix))) or "no projector"
    what = f"VILA v1.0 with projector {projector_type} (model.layers.*, {layers}, model.vision_tower.*)"
    take(layout, checkpoint, SINGLE_KEYS | projector_keys(projector_type, prefix), {}, None, what)
    return layout


def split_layout(config: VilaConfig) -> tuple[Layout, dict[str, Checkpoint]]:
    """The layout of a 1.5 checkpoint, and the checkpoints of its parts.

    Raises: ValueError naming file and tensor, if one is unknown or a tower's sizes are not those of its config.
    """
    layout, folder = Layout(), config.path.parent
    stored = [path for pattern in ("*.safetensors", "*.bin") for path in (folder / PROJECTOR_PART).glob(pattern)]
    without = {PROJECTOR_PART} if config.projector_type == "identity" and not stored else set()
    parts = {part: open_checkpoint(folder / part) for part in PARTS if part not in without}
    layers = listed(sorted(projector_layers(config.projector_type, "layers")))
    tables = {
        TEXT_PART: (VILA_TEXT_KEYS, {}, "a LLaMA (model.layers.*, lm_head)"),
        TOWER_PART: (TOWER_KEYS, VILA_TOWER_DROPPED, "a vision tower (vision_model.*)"),
        PROJECTOR_PART: (projector_keys(config.projector_type, "layers"), {}, f"{config.projector_type} ({layers})"),
    }
    for part, checkpoint in parts.items():
        keys, dropped, what = tables[part]
        take(layout, checkpoint, keys, dropped, part, what)
    check_tower_sizes(config.tower, folder / TOWER_PART, parts[TOWER_PART].tensors)
    return layout, parts


def published_name(name: str, config: VilaConfig) -> str:
    """The published name of a tensor named as in memory, with its folder for 1.5."""
    prefix = "layers" if config.split else "model.mm_projector"
    layers = {new: old for old, new in projector_layers(config.projector_type, prefix).items()}
    layer, _, kind = name.removeprefix(f"model.{PROJECTOR}").rpartition(".")
    if name.startswith(f"model.{PROJECTOR}"):
        return f"{PROJECTOR_PART}/{layers[layer]}.{kind}" if config.split else f"{layers[layer]}.{kind}"
    old = renamed(name, EXPORT_KEYS) or name
    if not config.split:
        return old
    inside = "model.vision_tower.vision_tower."
    return f"{TOWER_PART}/{old.removeprefix(inside)}" if old.startswith(inside) else f"{TEXT_PART}/{old}"


# ---------------------------------------- positions


def resized_positions(table: Tensor, num_rows: int) -> Tensor:
    """A (m, C) position table for n patches, by the published rule over the flattened table: (n, C) float32.

    With x_i = i / (n - 1) * (m - 1): (x_i - floor x_i) old[ceil x_i] + (ceil x_i - x_i) old[floor x_i]. Where x_i is a
    whole number, both factors are 0 and so is the row; that holds for the first and the last row of any table. A model
    that was trained with such a table expects it, so it is not repaired.
    """
    old = table.float()
    places = torch.arange(num_rows, dtype=torch.float32) / (num_rows - 1) * (old.shape[0] - 1)
    below, above = places.floor(), places.ceil()
    return (places - below)[:, None] * old[above.long()] + (above - places)[:, None] * old[below.long()]


def resize_positions(layout: Layout, config: VilaConfig) -> int:
    """Put a position table for `config.resolution` into the layout, and the resolution into the tower's config.

    Returns: how many of its rows are zero.
    """
    file = next(file for file in layout.files.values() if POSITIONS in file)
    old: StoredTensor = file[POSITIONS]
    check_dtype(old)
    loaded = old.load()
    made = resized_positions(loaded, (config.resolution // config.tower.patch_size) ** 2).to(loaded.dtype)
    file[POSITIONS] = in_memory(old.name, made, old.file)
    layout.renamed = {name: new for name, new in layout.renamed.items() if new != POSITIONS}
    layout.dropped[f"{TOWER_PART}/{old.name}"] = f"made anew for vision_resolution {config.resolution}"
    config.tower.image_size = config.resolution
    return int((made == 0).all(dim=1).sum())
