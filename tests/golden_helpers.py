"""The recording of the published implementation (`golden/roe_reference`) and its checkpoint as a model of ours."""

import json
import lzma
from pathlib import Path

import torch
from safetensors.torch import load, load_file
from transformers import CLIPVisionConfig, LlamaConfig

from roe_llava import RoeLlavaConfig, RoeLlavaForConditionalGeneration

FOLDER = Path(__file__).parent / "golden" / "roe_reference"
PLACEHOLDER, PATCHES, NUM_LAYERS = -200, 4, 6
IMAGE = 74  # a token that no recorded text holds


def unpacked(name):
    """Tensors of a file that `reduce.py` packed."""
    tensors = load(lzma.decompress((FOLDER / name).read_bytes()))
    found = {}
    for key, tensor in tensors.items():
        key, _, bits = key.partition("@")
        found[key] = tensor if tensor.is_floating_point() else tensor.long()
        if bits:
            found[key] = (tensor.double() / 2 ** int(bits)).float()
    return found


def recorded_prompts():
    """Prompts and what the published inference made of them."""
    return load_file(FOLDER / "inference.safetensors")


def spliced(ids):
    """Token ids with every placeholder replaced by its patches."""
    return [token for given in ids for token in ([IMAGE] * PATCHES if given == PLACEHOLDER else [given])]


def spliced_labels(ids, labels):
    """Labels of spliced token ids: patches have none."""
    pairs = zip(ids, labels, strict=True)
    return [kept for given, label in pairs for kept in ([-100] * PATCHES if given == PLACEHOLDER else [label])]


def renamed(weights):
    """Published names to ours; the two routing tokens become one table."""
    found = {}
    for name, tensor in weights.items():
        if "inv_freq" in name or "position_ids" in name:
            continue  # buffers
        if name.startswith("model.vision_tower."):
            name = name.replace("model.vision_tower.vision_tower.vision_model.", "model.vision_tower.")
        elif name.startswith("model.mm_projector."):
            name = name.replace("model.mm_projector.0", "model.multi_modal_projector.linear_1")
            name = name.replace("model.mm_projector.2", "model.multi_modal_projector.linear_2")
        elif name != "lm_head.weight":
            name = name.replace("model.", "model.language_model.", 1)
            name = name.replace("adapter_MHA.conv_A", "adapter.down_proj")
            name = name.replace("adapter_MHA.conv_B", "adapter.up_proj")
            name = name.replace("adapter_MHA_router.expert.0", "router")
        found[name] = tensor
    tokens = [found.pop(f"model.language_model.adapter_{kind}_token.weight") for kind in ("image", "text")]
    return found | {"model.language_model.routing_tokens.weight": torch.cat(tokens)}


def reference_model():
    """The recorded checkpoint as a model of ours, positions as in published inference, end of sequence disabled."""
    stored = json.loads((FOLDER / "config.json").read_text())
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "pad_token_id", "bos_token_id")
    text = LlamaConfig(**{name: stored[name] for name in names}, eos_token_id=stored["eos_token_id"])
    vision = json.loads((FOLDER / "vision_config.json").read_text())
    vision = {name: vision[name] for name in vision if name not in ("architectures", "model_type", "torch_dtype")}
    config = RoeLlavaConfig(
        text_config=text,
        vision_config=CLIPVisionConfig(**vision),
        image_token_index=IMAGE,
        image_seq_length=PATCHES,
        adapter_size=16,
        routing_positions="first",
    )
    model = RoeLlavaForConditionalGeneration(config).eval()
    model.load_state_dict(renamed(torch.load(FOLDER / "pytorch_model.bin", weights_only=True)))
    model.generation_config.eos_token_id = None
    return model


def gradients_by_published_name(model):
    """Gradients under the names of the published checkpoint; `None` where there is none."""
    weights = torch.load(FOLDER / "pytorch_model.bin", weights_only=True)
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    tokens = ours.pop("model.language_model.routing_tokens.weight")
    kinds = {f"model.adapter_{kind}_token.weight": row for row, kind in enumerate(("image", "text"))}
    found = {name: None if tokens is None else tokens[row : row + 1] for name, row in kinds.items()}
    dummies = {name: torch.zeros(1, 1) for name in kinds}
    for name in weights.keys() - kinds.keys():
        for known in renamed({name: torch.zeros(1, 1), **dummies}).keys() & ours.keys():
            found[name] = ours[known]
    return found
