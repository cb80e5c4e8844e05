"""Configurations of RoE on Transformers' other models of LLaVA's kind: LLaVA-NeXT, LLaVA-OneVision and ViP-LLaVA.

Each is the stock configuration with `RoutingConfig` in front; the fields are described there.
"""

from transformers import LlavaNextConfig, LlavaOnevisionConfig, VipLlavaConfig

from .configuration_roe import RoutingConfig


class RoeLlavaNextConfig(RoutingConfig, LlavaNextConfig):
    """Configuration of [`RoeLlavaNextForConditionalGeneration`]."""

    model_type = "roe_llava_next"
    base_types = ("llava_next",)


class RoeLlavaOnevisionConfig(RoutingConfig, LlavaOnevisionConfig):
    """Configuration of [`RoeLlavaOnevisionForConditionalGeneration`]."""

    model_type = "roe_llava_onevision"
    base_types = ("llava_onevision",)


class RoeVipLlavaConfig(RoutingConfig, VipLlavaConfig):
    """Configuration of [`RoeVipLlavaForConditionalGeneration`]."""

    model_type = "roe_vipllava"
    base_types = ("vipllava",)


__all__ = ["RoeLlavaNextConfig", "RoeLlavaOnevisionConfig", "RoeVipLlavaConfig"]
