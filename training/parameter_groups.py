"""Named groups of parameters: which learn, how fast, and which of them decay."""

import re

from torch import nn
from transformers.trainer_pt_utils import get_parameter_names

from ..loading_moe import is_moe_parameter

GROUPS = ("adapter", "router", "routing_tokens", "lora", "base")
NO_DECAY = "_no_decay"  # behind a group's name
# Those that Transformers' own Trainer leaves without decay, and the routing tokens, which are embeddings of two.
WITHOUT_DECAY = (
    r"bias",
    r"layernorm",
    r"rmsnorm",
    r"(?:^|\.)norm(?:$|\.)",
    r"_norm(?:$|\.)",
    r"(?:^|\.)routing_tokens\.",
)


def group_of(name: str) -> str:
    """Parameter group a parameter belongs to, by its name."""
    if ".lora_" in name:
        return "lora"
    if is_moe_parameter(name):  # the routers of experts are the base's
        return "base"
    return next((group for group in GROUPS[:3] if f".{group}." in name), "base")


def parameter_groups(model: nn.Module, rates: dict[str, float], weight_decay: float = 0.0) -> list[dict]:
    """One optimizer group per name in `rates`; groups left out, and the vision tower, are frozen.

    Args:
        model: a RoE-LLaVA; `requires_grad` of its parameters is set.
        rates: learning rate per group, e.g. {"adapter": 4e-4, "router": 4e-4, "routing_tokens": 4e-4}.
        weight_decay: of all parameters but norms, biases and routing tokens; those then have a group of their own,
            named with `NO_DECAY` behind.
    Raises: ValueError for an unknown group name.
    """
    choose_trained(model, rates)
    decaying = set(get_parameter_names(model, [nn.LayerNorm], list(WITHOUT_DECAY))) if weight_decay else set()
    members = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = not weight_decay or name in decaying
            members.setdefault((group_of(name), decays), []).append(parameter)
    return [
        {
            "name": group if decays else group + NO_DECAY,
            "params": members[group, decays],
            "lr": rates[group],
            "weight_decay": weight_decay if decays else 0.0,
        }
        for group in rates
        for decays in (True, False)
        if (group, decays) in members
    ]


def choose_trained(model: nn.Module, groups) -> None:
    """Let the parameters of some groups learn, the vision tower's never, and freeze the rest.

    Raises: ValueError for an unknown group name.
    """
    unknown = set(groups) - set(GROUPS)
    if unknown:
        raise ValueError(f"unknown parameter groups {sorted(unknown)}, expected some of {GROUPS}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(group_of(name) in groups and not re.search(r"(?:^|\.)vision_tower\.", name))


__all__ = ["GROUPS", "choose_trained", "group_of", "parameter_groups"]
