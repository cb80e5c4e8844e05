"""Tiny seeded MoE-LLaVAs whose routers send tokens to different experts, and the dense models that they equal."""

import copy

import tiny
import torch
from torch import nn
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, PhiConfig, StableLmConfig

from roe_llava import MoeLlavaConfig, MoeLlavaForConditionalGeneration
from roe_llava.experts_moe import PackedExperts
from roe_llava.routers_moe import RouterLinear

TEXT_CONFIGS = {**tiny.TEXT_CONFIGS, "phi": (PhiConfig, {}), "stablelm": (StableLmConfig, {"use_qkv_bias": True})}
DECODERS = tuple(TEXT_CONFIGS)
ROUTERS = ("linear", "token_aware")
NUM_EXPERTS = 4
# Names of a stock MLP: the packed parameter and which part of its rows.
PARTS = {
    "gate_proj": ("gate_up_proj", 0, 2),
    "up_proj": ("gate_up_proj", 1, 2),
    "down_proj": ("down_proj", 0, 1),
    "fc1": ("up_proj", 0, 1),
    "fc2": ("down_proj", 0, 1),
}


def moe_config(decoder="llama", text=None, **kwargs):
    """Configuration of a tiny MoE-LLaVA: experts in layers 0 and 2 of 4."""
    text_class, own = TEXT_CONFIGS[decoder]
    sizes = {
        "vocab_size": tiny.VOCAB,
        "hidden_size": tiny.HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": tiny.NUM_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": tiny.PAD,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        projection_dim=16,
    )
    defaults = {"image_token_index": tiny.IMAGE, "image_seq_length": 4, "num_experts": NUM_EXPERTS}
    text_config = text_class(**{**sizes, **own, **(text or {})})
    return MoeLlavaConfig(text_config=text_config, vision_config=vision, **{**defaults, **kwargs})


@torch.no_grad()
def moe_model(decoder="llama", seed=0, **kwargs):
    """A tiny model in eval mode whose random weights are large enough for prompts, experts and choices to differ.

    Generation never ends early and never writes an image token, which no image would belong to.
    """
    torch.manual_seed(seed)
    model = MoeLlavaForConditionalGeneration(moe_config(decoder, **kwargs)).eval()
    for module in [*model.model.language_model.modules(), *model.model.multi_modal_projector.modules()]:
        if isinstance(module, nn.Linear):
            module.weight.normal_(0, module.in_features**-0.5)
            if isinstance(module, RouterLinear):
                module.weight.mul_(3)
        if isinstance(module, PackedExperts):
            for name, parameter in module.named_parameters():
                parameter.normal_(0, 0.3 if name.endswith("bias") else parameter.shape[-1] ** -0.5)
    model.model.language_model.embed_tokens.weight.normal_()
    model.lm_head.weight.normal_(0, tiny.HIDDEN**-0.5)
    model.generation_config.eos_token_id = None
    model.generation_config.suppress_tokens = [tiny.IMAGE]
    return model


def blocks_of(model):
    """Layer number to block of experts."""
    layers = model.model.language_model.layers
    return {layer: layers[layer].mlp for layer in model.config.expert_layers()}


def expert_as_mlp(experts, number, mlp):
    """A stock MLP with the weights of an expert."""
    for name, parameter in mlp.named_parameters():
        part, kind = name.split(".")
        packed, place, parts = PARTS[part]
        rows = getattr(experts, packed + ("_bias" if kind == "bias" else ""))[number]
        parameter.data = rows.chunk(parts)[place].clone()
    return mlp


@torch.no_grad()
def equal_experts(model):
    """A copy of a model whose experts are all the first one."""
    model = copy.deepcopy(model)
    for block in blocks_of(model).values():
        for parameter in block.experts.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter))
    return model


@torch.no_grad()
def dense_of(model):
    """Stock LLaVA with a model's weights, and in layers with experts those of the first one."""
    given = {**model.config.to_dict(), "model_type": "llava"}
    dense = LlavaForConditionalGeneration(LlavaConfig.from_dict(given)).eval()
    missing, _ = dense.load_state_dict(model.state_dict(), strict=False)
    assert missing and all(".mlp." in name for name in missing), missing
    for layer, block in blocks_of(model).items():
        expert_as_mlp(block.experts, 0, dense.model.language_model.layers[layer].mlp)
    dense.generation_config = copy.deepcopy(model.generation_config)
    return dense


def choices(model, inputs, **kwargs):
    """(M, B, S, K) experts that a prefill chooses."""
    return torch.stack(model(**inputs, output_router_logits=True, **kwargs).expert_indices)
