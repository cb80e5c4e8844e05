"""The recording of published VILA (`golden/vila_reference`) and its checkpoints as models of ours."""

import functools
import json
import lzma
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load

FOLDER = Path(__file__).parent / "golden" / "vila_reference"
PLACEHOLDER = -200
CHECKPOINTS = {"linear": "checkpoint_v1_linear", "mlp2x": "checkpoint_v1_mlp2x", "v15": "checkpoint_v15"}
PROMPTS = ("p0", "p1", "p2")  # one image, two images, none
VOCABULARY = 160


@functools.cache
def manifest():
    """Prompts, projectors and position tables, as the recording describes them."""
    return json.loads((FOLDER / "manifest.json").read_text())


@functools.cache
def recorded(file):
    """Tensors of a file that `reduce.py` packed."""
    found = {}
    for key, tensor in load(lzma.decompress((FOLDER / f"{file}.safetensors.xz").read_bytes())).items():
        key, _, bits = key.partition("@")
        found[key] = tensor if tensor.is_floating_point() else tensor.long()
        if bits:
            found[key] = (tensor.double() / 2 ** int(bits)).float()
    return found


def of_prompt(model, prompt):
    """What was recorded of a prompt through a model."""
    tensors, prefix = (recorded("prompts_v15"), "") if model == "v15" else (recorded("prompts_v1"), f"{model}/")
    start = f"{prefix}{prompt}/"
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def about_prompt(model, prompt):
    """Its text and its pictures."""
    about = manifest()["prompts"][model][prompt]
    return about["prompt"], [picture(name) for name in about["images"] or []]


def picture(name):
    return Image.open(FOLDER / "images" / f"{name}.png").convert("RGB")


def pixels_of(model, name):
    """(3, s, s) as the published code made them of a picture."""
    if model == "v15":
        return recorded("vision_v15")[f"preprocess/{name}_resize/pixel_values"]
    return recorded("vision_v1")[f"preprocess_v1/{name}_pad/pixel_values"]


def spliced(ids, image, num_tokens, fill=None):
    """(1, n) recorded ids, or labels of theirs, with every placeholder replaced by its image tokens: (1, N).

    Args:
        image: id of the image token in the ids that placeholders are looked up in.
        fill: what stands for an image token in the answer; the image token itself by default.
    """
    places, values = ids
    fill = image if fill is None else fill
    made = []
    for place, value in zip(places[0].tolist(), values[0].tolist(), strict=True):
        made += [fill] * num_tokens if place == PLACEHOLDER else [value]
    return torch.tensor([made])
