"""The recording of published LLaVA-HR (`golden/llava_hr_reference`), and its towers as ours.

Names are mapped here without the tables of the import, which are under test elsewhere.
"""

import functools
import json
import lzma
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load

from roe_llava.configuration_hr_vision import LlavaHrVisionConfig
from roe_llava.vision_hr import LlavaHrVisionModel

FOLDER = Path(__file__).parent / "golden" / "llava_hr_reference"
MANIFEST = json.loads((FOLDER / "manifest.json").read_text())
CASES = MANIFEST["tower_cases"]
PROMPTS = MANIFEST["prompts"]
TOWER = "model.vision_tower."
MEAN = [0.48145466, 0.4578275, 0.40821073]
STD = [0.26862954, 0.26130258, 0.27577711]
UNUSED = ("class_embedding", "post_layernorm", ".head.")
RENAMED = [
    ("fast_vision_tower.vision_tower.vision_model.encoder.", "fast."),
    ("fast_vision_tower.vision_tower.vision_model.", "fast."),
    ("slow_vision_tower.vision_tower.stem.0.", "slow.embeddings.patch_embeddings."),
    ("slow_vision_tower.vision_tower.stem.1.", "slow.embeddings.layernorm."),
    ("slow_vision_tower.vision_tower.", "slow."),
    (".downsample.", ".downsampling_layer."),
    (".conv_dw.", ".dwconv."),
    ("align_stages_latent.", "adapters."),
    ("align_stages.0.", "fusion."),
    ("gate.0.", "gate_1."),
    ("gate.2.", "gate_2."),
]
BLOCK = {"weight": "layer_scale_parameter", "norm.": "layernorm.", "mlp.fc1.": "pwconv1.", "mlp.fc2.": "pwconv2."}


@functools.cache
def recorded(file="tower"):
    """Tensors of a file that `reduce.py` packed."""
    found = load(lzma.decompress((FOLDER / f"{file}.safetensors.xz").read_bytes()))
    return {name: tensor if tensor.is_floating_point() else tensor.long() for name, tensor in found.items()}


def pixels_of(names):
    """(B, 3, S, S) of recorded pictures that have their final size."""
    made = []
    for name in names:
        levels = np.asarray(Image.open(FOLDER / name), dtype=np.float32) / 255
        made.append(((levels - np.float32(MEAN)) / np.float32(STD)).transpose(2, 0, 1))
    return torch.from_numpy(np.stack(made)).contiguous()


def published_tower(case):
    """Names and tensors of a case's tower, as published, without the prefix of a whole model."""
    if case.startswith("x"):
        return recorded("tower_x")
    weights = torch.load(FOLDER / "checkpoint" / "pytorch_model.bin", weights_only=True)
    found = {name.removeprefix(TOWER): tensor for name, tensor in weights.items() if name.startswith(TOWER)}
    return {n: t for n, t in found.items() if case != "frozen" or not n.startswith("align_stages_latent")}


def our_name(name):
    """A published name as ours."""
    for old, new in RENAMED:
        name = name.replace(old, new)
    if found := re.fullmatch(r"(slow\.stages\.\d+)\.blocks\.(\d+)\.(.+)", name):
        stage, block, rest = found.groups()
        new = next((rest.replace(old, new) for old, new in BLOCK.items() if rest.startswith(old)), rest)
        name = f"{stage}.layers.{block}.{new}"
    return name


def our_weights(published):
    """A published tower's tensors under our names and in our shapes."""
    made = {}
    for name, tensor in published.items():
        if any(part in name for part in UNUSED):
            continue
        if name.endswith("position_embedding.weight"):
            tensor = tensor[1:]
        if name.startswith("align_stages_latent") and tensor.shape[2:] == (1, 1):
            tensor = tensor.flatten(1)
        made[our_name(name)] = tensor
    return made


def tower_config(case, **changes):
    """Configuration of a case's tower."""
    x = "x_" if case.startswith("x") else ""
    fast, slow = MANIFEST["sizes"][f"{x}fast"], MANIFEST["sizes"][f"{x}slow"]
    settings = {
        "fast_config": dict(fast),
        "slow_config": {
            "hidden_sizes": slow["dims"],
            "depths": slow["depths"],
            "layer_norm_eps": slow["norm_eps"],
        },
        "image_size": CASES[case]["input_image_size"],
        "has_adapters": case != "frozen",
    }
    return LlavaHrVisionConfig(**settings | changes)


def published_tower_as_ours(case, **changes):
    """A case's tower with the published weights."""
    model = LlavaHrVisionModel(tower_config(case, **changes)).eval()
    model.load_state_dict(our_weights(published_tower(case)), strict=True)
    return model
