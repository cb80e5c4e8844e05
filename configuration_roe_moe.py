"""Configuration of RoE on a model with experts: a layer may be skipped by example, and where it runs, tokens choose.

It is that of MoE-LLaVA with `RoutingConfig` in front; the fields are described there.
"""

from .configuration_moe_llava import MoeLlavaConfig
from .configuration_roe import RoutingConfig


class RoeMoeLlavaConfig(RoutingConfig, MoeLlavaConfig):
    """Configuration of [`RoeMoeLlavaForConditionalGeneration`]."""

    model_type = "roe_moe_llava"
    base_types = ("moe_llava",)
    keys_to_ignore_at_inference = [
        *("past_key_values", "aux_loss", "expert_router_logits", "expert_indices", "expert_weights"),
    ]


__all__ = ["RoeMoeLlavaConfig"]
