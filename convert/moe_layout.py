"""Checkpoints in the published MoE-LLaVA layout (DeepSpeed's experts), taken apart, renamed and packed.

E experts, D hidden size, I width of an expert.
"""

import dataclasses
import re

from .keys import ROTARY_BUFFERS, renamed
from .made_tensors import joined
from .original_layout import UNUSED_BUFFERS, Layout
from .state_dict import listed
from .weights import Checkpoint, StoredTensor

_TEXT = (
    r"((?:embed_tokens\.weight|(?:norm|final_layernorm)\.(?:weight|bias))"
    r"|layers\.\d+\.(?:input_layernorm|post_attention_layernorm)\.(?:weight|bias)"
    r"|layers\.\d+\.self_attn\.(?:[qkvo]_proj|dense|[qk]_layernorm(?:\.norms\.\d+)?)\.(?:weight|bias)"
    r"|layers\.\d+\.mlp\.(?:gate_proj|up_proj|down_proj|fc1|fc2)\.(?:weight|bias))"
)
INSIDE = "model.image_tower.image_tower."
MOE_LLAVA_KEYS = {
    rf"model\.{_TEXT}": r"language_model.model.\1",
    r"lm_head\.weight": r"language_model.lm_head.weight",
    r"model\.layers\.(\d+)\.mlp\.deepspeed_moe\.gate\.wg\.weight": r"language_model.model.layers.\1.mlp.router.weight",
    r"model\.mm_projector\.image_spatial_proj\.0\.(weight|bias)": r"multi_modal_projector.linear_1.\1",
    r"model\.mm_projector\.image_spatial_proj\.2\.(weight|bias)": r"multi_modal_projector.linear_2.\1",
    rf"{re.escape(INSIDE)}vision_model\.((?!.*\bposition_ids).+)": r"vision_tower.vision_model.\1",
}
EXPERT = (
    r"model\.layers\.(\d+)\.mlp\.deepspeed_moe\.experts\.deepspeed_experts\.(\d+)"
    r"\.(gate_proj|up_proj|down_proj|fc1|fc2)\.(weight|bias)"
)
# What becomes of an expert's matrices: the packed parameter, and which of them its rows are.
PACKED = {
    ("gate_proj", "up_proj", "down_proj"): {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)},
    ("fc1", "fc2"): {"up_proj": ("fc1",), "down_proj": ("fc2",)},
}
BUFFERS = {
    ROTARY_BUFFERS: UNUSED_BUFFERS[ROTARY_BUFFERS],
    rf"{re.escape(INSIDE)}vision_model\.embeddings\.position_ids": "positions are counted, not stored",
}
RESIDUAL = r"model\.layers\.\d+\.mlp\.(?:mlp\..+|coefficient\..+)"


def rename_published(checkpoint: Checkpoint, layers: list[int], num_experts: int) -> Layout:
    """Take a checkpoint apart: every tensor is renamed, packed with others, or dropped with a reason.

    Args:
        layers: that have experts; none in a dense checkpoint.
        num_experts: E.
    Raises: ValueError naming a tensor that is unknown, missing or of another shape than its like.
    """
    layout, experts = Layout(), {}
    for file_name, file in checkpoint.files.items():
        for name in file.tensors:
            tensor = checkpoint.tensors[name]
            reason = next((why for pattern, why in BUFFERS.items() if re.fullmatch(pattern, name)), None)
            if found := re.fullmatch(EXPERT, name):
                layer, expert, part, kind = found.groups()
                experts.setdefault(int(layer), {})[int(expert), part, kind] = (file_name, tensor)
            elif reason is not None:
                layout.dropped[name] = reason
            elif new := renamed(name, MOE_LLAVA_KEYS):
                layout.add(file_name, new, tensor)
            else:
                raise ValueError(f"{name} in {tensor.file} {unknown(name)}")
    if sorted(experts) != sorted(layers):
        raise ValueError(
            f"{checkpoint.folder} has experts in layers {sorted(experts)}, its config.json says moe_layers_idx "
            f"{sorted(layers)}: do config and weights belong together?"
        )
    for layer, parts in sorted(experts.items()):
        check_parts(checkpoint, layer, parts, num_experts)
        pack_layer(layout, f"language_model.model.layers.{layer}.mlp.experts.", parts, num_experts)
    return layout


def unknown(name: str) -> str:
    """Why a tensor is not taken over."""
    if re.fullmatch(RESIDUAL, name):
        return "belongs to a dense MLP beside the experts (use_residual), which no released MoE-LLaVA has"
    return (
        "is no tensor of the published MoE-LLaVA layout (model.layers.*, model.mm_projector.image_spatial_proj.*, "
        "model.image_tower.*): nothing is left out unseen, so it has to be removed, or the checkpoint is of another "
        "kind"
    )


def form_of(parts: dict) -> tuple[str, ...]:
    """Names of the matrices that an expert's tensors are of; empty if they are of no MLP we know, or of two."""
    found = {part for _, part, _ in parts}
    forms = [form for form in PACKED if found & set(form)]
    return forms[0] if len(forms) == 1 else ()


def check_parts(checkpoint: Checkpoint, layer: int, parts: dict, num_experts: int) -> None:
    """Check that the experts of a layer are all there, and no others.

    Args:
        parts: (expert, part, "weight" or "bias") to (file name, tensor).
    Raises: ValueError naming what is missing or does not fit.
    """
    form = form_of(parts)
    if not form:
        found = sorted({part for _, part, _ in parts})
        raise ValueError(
            f"experts of layer {layer} in {checkpoint.folder} are made of {found}, expected one of {list(PACKED)}: "
            "were two checkpoints saved into one folder?"
        )
    kinds = {kind for _, _, kind in parts}
    wanted = {(expert, part, kind) for expert in range(num_experts) for part in form for kind in kinds}
    if wanted != parts.keys():
        prefix = f"model.layers.{layer}.mlp.deepspeed_moe.experts.deepspeed_experts"
        names = [f"{prefix}.{expert}.{part}.{kind}" for expert, part, kind in sorted(wanted ^ parts.keys())]
        raise ValueError(
            f"{checkpoint.folder} {'lacks' if wanted - parts.keys() else 'has'} {listed(names)}, expected "
            f"{num_experts} experts of {len(form)} matrices: was a shard lost, or does num_experts belong to another "
            "checkpoint?"
        )


def pack_layer(layout: Layout, prefix: str, parts: dict, num_experts: int) -> None:
    """Pack the experts of a layer, and put the packed tensors where the first of them was.

    Args:
        prefix: of the new names.
        parts: (expert, part, "weight" or "bias") to (file name, tensor), all there.
    Raises: ValueError if the experts differ in dtype or shape.
    """
    kinds = {kind for _, _, kind in parts}
    for packed, rows in PACKED[form_of(parts)].items():
        for kind in sorted(kinds, reverse=True):
            new = f"{prefix}{packed}{'_bias' if kind == 'bias' else ''}"
            places = [parts[expert, part, kind] for expert in range(num_experts) for part in rows]
            layout.files.setdefault(places[0][0], {})[new] = packed_experts(new, [t for _, t in places], num_experts)
            layout.renamed |= {tensor.name: new for _, tensor in places}


def packed_experts(name: str, tensors: list[StoredTensor], num_experts: int) -> StoredTensor:
    """(E, rows, ...) of every expert's tensors one below the other, expert by expert; still a stream.

    Raises: ValueError if they are not of one dtype, or those of two experts not of one shape.
    """
    per_expert = len(tensors) // num_experts
    for number, tensor in enumerate(tensors):
        first = tensors[number % per_expert]
        if tensor.kind != first.kind:
            raise ValueError(
                f"{tensor.name} in {tensor.file} is {tensor.kind}, {first.name} is {first.kind}: expected one dtype "
                "and shape, since they become one tensor"
            )
    whole = joined(name, tensors)
    return dataclasses.replace(whole, shape=(num_experts, whole.shape[0] // num_experts, *whole.shape[1:]))
