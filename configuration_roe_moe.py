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

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.skipped_layers is not None:
            raise ValueError(
                f"skipped_layers {self.skipped_layers}: no route can be frozen into a model with experts yet; pin it "
                "with routes="
            )


__all__ = ["RoeMoeLlavaConfig"]
