"""The recording of published MoE-LLaVA (`golden/moe_llava_reference`) and its checkpoints as models of ours."""

import functools
import json
import lzma
import re
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load

from roe_llava import MoeLlavaForConditionalGeneration
from roe_llava.convert.import_moe_llava import import_moe_llava

FOLDER = Path(__file__).parent / "golden" / "moe_llava_reference"
SETS = ("llama", "mistral", "phi", "stablelm")
PLACEHOLDER, PATCHES, PAD = -200, 4, 0
IMAGE = 97  # a token that no recorded text holds


@functools.cache
def recorded(decoder, file="inference"):
    """Tensors of a file that `reduce.py` packed."""
    found = {}
    for key, tensor in load(lzma.decompress((FOLDER / decoder / f"{file}.safetensors.xz").read_bytes())).items():
        key, _, bits = key.partition("@")
        found[key] = tensor if tensor.is_floating_point() else tensor.long()
        if bits:
            found[key] = (tensor.double() / 2 ** int(bits)).float()
    return found


@functools.cache
def settings(decoder):
    """Batch and setting to what the training run was told."""
    return json.loads((FOLDER / decoder / "training.json").read_text())


def prompts(decoder, variant=""):
    """Names of the recorded prompts that have a variant (`""`, `"top1/"` or `"noisy/"`)."""
    return sorted({name.split("/")[0] for name in recorded(decoder) if name.endswith(f"/{variant}router_logits")})


def cases(variant=""):
    """(decoder, prompt) of every prompt that was recorded with logits and tokens."""
    found = [(decoder, prompt) for decoder in SETS for prompt in prompts(decoder, variant)]
    return [(decoder, prompt) for decoder, prompt in found if prompt != "pad2" and ("p0" in prompt or "b2" in prompt)]


def published_model(decoder):
    """A recorded checkpoint, imported, with the old vocabulary, a placeholder within it, end of sequence disabled."""
    with tempfile.TemporaryDirectory() as parent:
        import_moe_llava(FOLDER / decoder / "checkpoint", Path(parent) / "moe")
        model = MoeLlavaForConditionalGeneration.from_pretrained(Path(parent) / "moe").eval()
    model.resize_token_embeddings(128)  # losses were recorded over so many
    model.config.image_token_index = IMAGE
    model.generation_config.suppress_tokens = model.generation_config.eos_token_id = None
    with torch.no_grad():  # as published: padding embeds as zeros; no recorded text holds this token otherwise
        model.get_input_embeddings().weight[PAD] = 0
    return model


def spliced(rows, mask=None):
    """(B, N) token ids with every placeholder replaced by its patches, padded on the right.

    Args:
        rows: (B, n) recorded ids.
        mask: (B, n), 0 for padding among them.
    """
    mask = torch.ones_like(rows) if mask is None else mask
    made = []
    for row, real in zip(rows.tolist(), mask.tolist(), strict=True):
        kept = [token for token, is_real in zip(row, real, strict=True) if is_real]
        made.append([one for token in kept for one in ([IMAGE] * PATCHES if token == PLACEHOLDER else [token])])
    width = max(map(len, made))
    return torch.tensor([row + [PAD] * (width - len(row)) for row in made])


def images_of(rows, images):
    """The images that a placeholder stands for: published code needs a zero image for a row without any."""
    if images.shape[0] == (rows == PLACEHOLDER).sum():
        return images
    keep = (rows == PLACEHOLDER).any(dim=1)
    return images[keep] if keep.any() else None


def inputs_of(decoder, prompt):
    """The model's inputs for a recorded prompt."""
    given = recorded(decoder)
    ids, mask = given[f"{prompt}/input_ids"], given.get(f"{prompt}/attention_mask")
    inputs = {"input_ids": spliced(ids, mask)}
    if mask is not None:
        inputs["attention_mask"] = given[f"{prompt}/attention_mask_spliced"]
    images = images_of(ids, given[f"{prompt}/pixel_values"])
    return inputs | ({} if images is None else {"pixel_values": images})


def training_inputs(decoder, batch):
    """The model's inputs for a recorded training batch."""
    given = recorded(decoder, "training")
    ids = given[f"{batch}/input_ids"]
    return {
        "input_ids": spliced(ids, given[f"{batch}/attention_mask"]),
        "attention_mask": given[f"{batch}/attention_mask_spliced"],
        "labels": given[f"{batch}/labels_spliced"],
        "pixel_values": images_of(ids, given[f"{batch}/images"]),
    }


def published_gradient(model, name):
    """The gradient of what a published checkpoint calls `name`; written without the tables under test."""
    layers = model.model.language_model.layers
    if found := re.fullmatch(r"model\.layers\.(\d+)\.mlp\.deepspeed_moe\.gate\.wg\.weight", name):
        return layers[int(found[1])].mlp.router.weight.grad
    if found := re.fullmatch(r"model\.layers\.(\d+)\.mlp\.deepspeed_moe\..*\.(\d+)\.(\w+)\.(weight|bias)", name):
        experts, number, part = layers[int(found[1])].mlp.experts, int(found[2]), found[3]
        if part in ("gate_proj", "up_proj"):
            gate, up = experts.gate_up_proj.grad[number].chunk(2)
            return gate if part == "gate_proj" else up
        packed = {"down_proj": "down_proj", "fc1": "up_proj", "fc2": "down_proj"}[part]
        return getattr(experts, packed + ("_bias" if found[4] == "bias" else "")).grad[number]
    ours = {
        "model.mm_projector.image_spatial_proj.0.": "model.multi_modal_projector.linear_1.",
        "model.mm_projector.image_spatial_proj.2.": "model.multi_modal_projector.linear_2.",
        "lm_head.": "lm_head.",
        "model.": "model.language_model.",
    }
    old, new = next((old, new) for old, new in ours.items() if name.startswith(old))
    return model.get_parameter(new + name.removeprefix(old)).grad
