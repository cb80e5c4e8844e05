"""Checkpoints in the published LLaVA-HR layout, taken apart and renamed; the sizes of its slow tower, read off them.

C width of the fast tower, Cs of the slow one.
"""

import dataclasses
import re

from transformers import CLIPVisionConfig

from ..configuration_hr_vision import LlavaHrVisionConfig
from .completeness import original_name
from .keys import ORIGINAL_KEYS, ROTARY_BUFFERS, renamed
from .made_tensors import rows
from .original_layout import UNUSED_BUFFERS, Layout, check_rotary
from .state_dict import listed
from .weights import Checkpoint, StoredTensor

TOWER = "model.vision_tower."
FAST = f"{TOWER}fast_vision_tower.vision_tower."
SLOW = f"{TOWER}slow_vision_tower.vision_tower."
OURS = "vision_tower."
POSITIONS = f"{FAST}vision_model.embeddings.position_embedding.weight"
# Published name, name on disk in our layout. A number is the same in both.
TOWER_NAMES = (
    ("fast_vision_tower.vision_tower.vision_model.embeddings.patch_embedding", "fast.embeddings.patch_embedding"),
    ("fast_vision_tower.vision_tower.vision_model.embeddings.position_embedding", "fast.embeddings.position_embedding"),
    ("fast_vision_tower.vision_tower.vision_model.pre_layrnorm", "fast.pre_layrnorm"),
    ("fast_vision_tower.vision_tower.vision_model.encoder.layers", "fast.layers"),
    ("slow_vision_tower.vision_tower.stem.0", "slow.embeddings.patch_embeddings"),
    ("slow_vision_tower.vision_tower.stem.1", "slow.embeddings.layernorm"),
    ("slow_vision_tower.vision_tower.stages.#.downsample", "slow.stages.#.downsampling_layer"),
    ("slow_vision_tower.vision_tower.stages.#.blocks.#.conv_dw", "slow.stages.#.layers.#.dwconv"),
    ("slow_vision_tower.vision_tower.stages.#.blocks.#.norm", "slow.stages.#.layers.#.layernorm"),
    ("slow_vision_tower.vision_tower.stages.#.blocks.#.mlp.fc1", "slow.stages.#.layers.#.pwconv1"),
    ("slow_vision_tower.vision_tower.stages.#.blocks.#.mlp.fc2", "slow.stages.#.layers.#.pwconv2"),
    ("align_stages_latent.#.slow_conv", "adapters.#.slow_conv"),
    ("align_stages_latent.#.slow_proj", "adapters.#.slow_proj"),
    ("align_stages_latent.#.fast_conv", "adapters.#.fast_conv"),
    ("align_stages_latent.#.fast_proj", "adapters.#.fast_proj"),
    ("align_stages_latent.#.gate.0", "adapters.#.gate_1"),
    ("align_stages_latent.#.gate.2", "adapters.#.gate_2"),
    ("align_stages.0.fast_proj", "fusion.fast_proj"),
    ("align_stages.0.slow_proj", "fusion.slow_proj"),
)
# Layer scale: published as a block's own weight, since Transformers 4 renames what ConvNeXt calls gamma; both are read.
SCALE_NAMES = tuple(
    (f"slow_vision_tower.vision_tower.stages.#.blocks.#.{name}", "slow.stages.#.layers.#.layer_scale_parameter")
    for name in ("gamma", "weight")
)
# Convolutions over single pixels, which are matrices to us.
AS_MATRICES = rf"{re.escape(TOWER)}align_stages_latent\.\d+\.(?:slow_conv|slow_proj|fast_proj)\.weight"
DROPPED = {
    ROTARY_BUFFERS: UNUSED_BUFFERS[ROTARY_BUFFERS],
    rf"{re.escape(FAST)}vision_model\.embeddings\.position_ids": "positions are counted, not stored",
    rf"{re.escape(FAST)}vision_model\.embeddings\.class_embedding": "CLIP's class token, which LLaVA-HR leaves out",
    rf"{re.escape(FAST)}vision_model\.post_layernorm\.(?:weight|bias)": "CLIP's last norm, which LLaVA-HR leaves out",
    rf"{re.escape(SLOW)}head\..+": "ConvNeXt's classifier, which LLaVA-HR leaves out",
}


def patterns(swapped: bool) -> dict[str, str]:
    """Full-match pattern to new name, of the vision tower.

    Args:
        swapped: from our names in memory to the published ones, instead of from those to ours on disk.
    """
    found = {}
    for published, ours in TOWER_NAMES:
        found |= pattern(published, ours, r"\.(.+)", r".{}", swapped)
    for published, ours in SCALE_NAMES:
        found |= pattern(published, ours, "", "", swapped)
    return found


def pattern(published: str, ours: str, rest: str, rest_of_new: str, swapped: bool) -> dict[str, str]:
    """One entry of `patterns`: each # is a number that both names share, `rest` what may follow."""
    old, new = (f"model.{OURS}{ours}", TOWER + published) if swapped else (TOWER + published, OURS + ours)
    number = 0
    while "#" in new:
        number += 1
        new = new.replace("#", rf"\{number}", 1)
    new += rest_of_new.format(rf"\{number + 1}")
    return {re.escape(old).replace(r"\#", r"(\d+)") + rest: new}


HR_KEYS = {key: new for key, new in ORIGINAL_KEYS.items() if "vision_tower" not in key} | patterns(swapped=False)
PUBLISHED_NAMES = patterns(swapped=True)


def published_name(name: str) -> str:
    """The published name of a tensor named as in memory."""
    return renamed(name, PUBLISHED_NAMES) or original_name(name)


def rename_hr(checkpoint: Checkpoint, text) -> Layout:
    """Take a checkpoint apart: every tensor is renamed, or dropped with a reason.

    Args:
        text: the language model's configuration, which stored rotary frequencies have to fit.
    Raises: ValueError naming a tensor that is unknown, or not of the shape its name promises.
    """
    layout = Layout()
    for file_name, file in checkpoint.files.items():
        for name in file.tensors:
            tensor = checkpoint.tensors[name]
            reason = next((why for pattern, why in DROPPED.items() if re.fullmatch(pattern, name)), None)
            if reason is not None:
                if re.fullmatch(ROTARY_BUFFERS, name):
                    check_rotary(tensor, text)
                layout.dropped[name] = reason
            elif new := renamed(name, HR_KEYS):
                if new in layout.renamed.values():
                    raise ValueError(f"{name} in {tensor.file} is there a second time under another name: take one out")
                layout.add(file_name, new, taken_over(tensor))
            else:
                raise ValueError(
                    f"{name} in {tensor.file} is no tensor of the published LLaVA-HR layout (model.layers.*, "
                    "model.mm_projector.{0,2}, model.vision_tower.{fast_vision_tower,slow_vision_tower,"
                    "align_stages_latent,align_stages}.*): nothing is left out unseen, so it has to be removed, or the "
                    "checkpoint is of another kind"
                )
    return layout


def taken_over(tensor: StoredTensor) -> StoredTensor:
    """A tensor in our shape, still a stream: matrices without the single pixel, positions without the class token's.

    Raises: ValueError if it is not of the shape its name promises.
    """
    if tensor.name == POSITIONS:
        if len(tensor.shape) != 2 or tensor.shape[0] < 2:
            raise ValueError(
                f"{tensor.name} in {tensor.file} is {tensor.kind}, expected a row for the class token, then patches"
            )
        return rows(tensor.name, tensor, 1, tensor.shape[0])
    if re.fullmatch(AS_MATRICES, tensor.name):
        if len(tensor.shape) != 4 or tensor.shape[2:] != (1, 1):
            raise ValueError(
                f"{tensor.name} in {tensor.file} is {tensor.kind}, expected a convolution over 1 x 1 pixels"
            )
        return dataclasses.replace(tensor, shape=tensor.shape[:2])
    return tensor


def vision_config(flat: dict, checkpoint: Checkpoint, fast: CLIPVisionConfig) -> LlavaHrVisionConfig:
    """The configuration of both towers: sizes of the slow one are not in any config, but in its tensors.

    Args:
        flat: content of the published config.json.
        fast: of the CLIP tower.
    Raises: ValueError if the slow tower lacks what sizes are read from, or does not fit.
    """
    stages = {}
    for name in checkpoint.tensors:
        if found := re.fullmatch(rf"{re.escape(SLOW)}stages\.(\d+)\.blocks\.(\d+)\..+", name):
            stages.setdefault(int(found[1]), set()).add(int(found[2]))
    if sorted(stages) != [*range(len(stages))] or not stages:
        raise ValueError(
            f"{checkpoint.folder} has stages {sorted(stages)} of a slow vision tower ({SLOW}stages.*), expected 0, 1, "
            "2, 3: was a shard lost, or is it a projector alone?"
        )
    stem = needed(checkpoint, f"{SLOW}stem.0.weight", 4)
    widths = [needed(checkpoint, f"{SLOW}stages.{stage}.blocks.0.conv_dw.weight", 4)[0] for stage in sorted(stages)]
    eps = 1e-5 if "xxlarge" in str(flat["vision_tower_slow"]) else 1e-6
    return LlavaHrVisionConfig(
        fast_config=fast,
        slow_config={
            "num_channels": stem[1],
            "patch_size": stem[2],
            "hidden_sizes": widths,
            "depths": [max(blocks) + 1 for _, blocks in sorted(stages.items())],
            "num_stages": len(stages),
            "layer_norm_eps": eps,
        },
        image_size=flat["input_image_size"],
        has_adapters=not flat.get("freeze_vision", False),
    )


def needed(checkpoint: Checkpoint, name: str, num_axes: int) -> tuple[int, ...]:
    """Shape of a tensor that sizes are read from.

    Raises: ValueError if it is not there, or of other axes.
    """
    tensor = checkpoint.tensors.get(name)
    if tensor is None:
        raise ValueError(f"{checkpoint.folder} lacks {name}: was a shard lost?")
    if len(tensor.shape) != num_axes:
        raise ValueError(f"{name} in {tensor.file} is {tensor.kind}, expected {num_axes} axes")
    return tensor.shape


def check_adapters(flat: dict, checkpoint: Checkpoint) -> None:
    """Raises: ValueError if `freeze_vision` says that there are no adapters, and there are, or the other way round."""
    found = sorted(name for name in checkpoint.tensors if name.startswith(f"{TOWER}align_stages_latent."))
    if bool(found) == bool(flat.get("freeze_vision", False)):
        raise ValueError(
            f"{checkpoint.folder / 'config.json'} has freeze_vision {flat.get('freeze_vision')!r}, but the weights "
            f"{f'hold adapters ({listed(found)})' if found else 'hold no adapters (align_stages_latent)'}: do config "
            "and weights belong together?"
        )
