"""RoE on Transformers' other models of LLaVA's kind: LLaVA-NeXT, LLaVA-OneVision and ViP-LLaVA.

All that routing is stands in `modeling_roe_llava.py` and `decoder_roe.py`. A class here says what its front-end is made
of, and which stock class it is put in front of; how images and videos become tokens stays the stock class's.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import (
    LlavaNextForConditionalGeneration,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedConfig,
    VipLlavaForConditionalGeneration,
)
from transformers.models.llava_next.modeling_llava_next import (
    LlavaNextCausalLMOutputWithPast,
    LlavaNextModel,
    LlavaNextMultiModalProjector,
)
from transformers.models.llava_onevision.modeling_llava_onevision import (
    LlavaOnevisionCausalLMOutputWithPast,
    LlavaOnevisionModel,
    LlavaOnevisionMultiModalProjector,
)
from transformers.models.vipllava.modeling_vipllava import (
    VipLlavaCausalLMOutputWithPast,
    VipLlavaModel,
    VipLlavaMultiModalProjector,
)

from .configuration_roe_family import RoeLlavaNextConfig, RoeLlavaOnevisionConfig, RoeVipLlavaConfig
from .loading_roe import auto_map, register_names
from .modeling_roe_llava import RoutedForConditionalGeneration, RoutedModel, RoutedOutput, forward_like


class TilesModel(RoutedModel):
    """A `RoutedModel` whose images are cut into tiles, a learned vector ending each line of patches."""

    def build_front_end(self, config: PreTrainedConfig) -> None:
        super().build_front_end(config)
        self.vocab_size = config.text_config.vocab_size
        self.image_newline = nn.Parameter(torch.empty(config.text_config.hidden_size))  # set by _init_weights


# ---------------------------------------------------------------------------------------------------------- LLaVA-NeXT


@dataclass
class RoeLlavaNextCausalLMOutputWithPast(RoutedOutput, LlavaNextCausalLMOutputWithPast):
    """The stock output and what routing did."""


class RoeLlavaNextModel(TilesModel, LlavaNextModel):
    """LLaVA-NeXT with a routed language model, without a head."""

    config: RoeLlavaNextConfig
    new_projector = LlavaNextMultiModalProjector


class RoeLlavaNextForConditionalGeneration(RoutedForConditionalGeneration, LlavaNextForConditionalGeneration):
    """LLaVA-NeXT that decides per example which decoder layers to run."""

    config: RoeLlavaNextConfig
    model_class = RoeLlavaNextModel
    output_class = RoeLlavaNextCausalLMOutputWithPast
    code_map = auto_map(
        "configuration_roe_family.RoeLlavaNextConfig", "modeling_roe_family.RoeLlavaNextForConditionalGeneration"
    )
    forward = forward_like(LlavaNextForConditionalGeneration)


# ----------------------------------------------------------------------------------------------------- LLaVA-OneVision


@dataclass
class RoeLlavaOnevisionCausalLMOutputWithPast(RoutedOutput, LlavaOnevisionCausalLMOutputWithPast):
    """The stock output and what routing did."""


class RoeLlavaOnevisionModel(TilesModel, LlavaOnevisionModel):
    """LLaVA-OneVision with a routed language model, without a head."""

    config: RoeLlavaOnevisionConfig
    new_projector = LlavaOnevisionMultiModalProjector


class RoeLlavaOnevisionForConditionalGeneration(RoutedForConditionalGeneration, LlavaOnevisionForConditionalGeneration):
    """LLaVA-OneVision that decides per example which decoder layers to run."""

    config: RoeLlavaOnevisionConfig
    model_class = RoeLlavaOnevisionModel
    output_class = RoeLlavaOnevisionCausalLMOutputWithPast
    code_map = auto_map(
        "configuration_roe_family.RoeLlavaOnevisionConfig",
        "modeling_roe_family.RoeLlavaOnevisionForConditionalGeneration",
    )
    forward = forward_like(LlavaOnevisionForConditionalGeneration)


# ----------------------------------------------------------------------------------------------------------- ViP-LLaVA


@dataclass
class RoeVipLlavaCausalLMOutputWithPast(RoutedOutput, VipLlavaCausalLMOutputWithPast):
    """The stock output and what routing did."""


class RoeVipLlavaModel(RoutedModel, VipLlavaModel):
    """ViP-LLaVA with a routed language model, without a head."""

    config: RoeVipLlavaConfig
    new_projector = VipLlavaMultiModalProjector


class RoeVipLlavaForConditionalGeneration(RoutedForConditionalGeneration, VipLlavaForConditionalGeneration):
    """ViP-LLaVA that decides per example which decoder layers to run."""

    config: RoeVipLlavaConfig
    model_class = RoeVipLlavaModel
    output_class = RoeVipLlavaCausalLMOutputWithPast
    code_map = auto_map(
        "configuration_roe_family.RoeVipLlavaConfig", "modeling_roe_family.RoeVipLlavaForConditionalGeneration"
    )
    forward = forward_like(VipLlavaForConditionalGeneration)


FAMILY = (
    RoeLlavaNextForConditionalGeneration,
    RoeLlavaOnevisionForConditionalGeneration,
    RoeVipLlavaForConditionalGeneration,
)
for head in FAMILY:
    register_names(head, head.model_class)
    head.register_for_auto_class("AutoModelForImageTextToText")

__all__ = [
    "FAMILY",
    "RoeLlavaNextForConditionalGeneration",
    "RoeLlavaNextModel",
    "RoeLlavaOnevisionForConditionalGeneration",
    "RoeLlavaOnevisionModel",
    "RoeVipLlavaForConditionalGeneration",
    "RoeVipLlavaModel",
]
