"""RoE on MoE-LLaVA and EvoMoE: a layer is run or skipped by example, and where it runs, its tokens choose experts.

What routing over layers is stands in `modeling_roe_llava.py` and `decoder_roe.py`, what experts are in
`modeling_moe_llava.py`; the classes here are both. Rows that skip a layer do not reach its experts. Routing tokens go
through experts as text does, and count in no balancing loss and no capacity.

B batch, L decoder layers, M layers with experts, S sequence, E experts, K experts per token, R routing tokens.
"""

from dataclasses import dataclass

from torch import Tensor
from transformers import LlavaForConditionalGeneration, PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel
from transformers.models.llava.modeling_llava import (
    LlavaCausalLMOutputWithPast,
    LlavaModel,
    LlavaMultiModalProjector,
)
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer, MistralModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2Model
from transformers.utils import ModelOutput

from .configuration_roe_moe import RoeMoeLlavaConfig
from .decoder_roe import RoeDecoderLayer, RoeLanguageModel
from .loading_moe import refuse_parallel
from .loading_roe import auto_map, register_names
from .modeling_moe_llava import (
    ExpertsForConditionalGeneration,
    ExpertsModel,
    HasExpertLayers,
    MoeDecoderLayer,
    MoeLlavaForConditionalGeneration,
    block_of_layer,
    tower_config,
)
from .modeling_roe_llava import RoutedForConditionalGeneration, RoutedModel, RoutedOutput, forward_like
from .routing_roe import Routing


@dataclass
class RoeMoeLlavaCausalLMOutputWithPast(RoutedOutput, LlavaCausalLMOutputWithPast):
    """Stock LLaVA's output, what routing did, and what experts were chosen; of these, an entry per layer with experts.

    Args:
        aux_loss (`torch.Tensor` of shape `()`): load balancing loss, before its coefficient, over the rows that a layer
            computed (a static cache computes all); with labels, `output_router_logits`, or while experts learn.
        expert_router_logits (`tuple[torch.Tensor]` of shape `(B, S, E)`): with `output_router_logits`, as the next two;
            NaN in rows that skip the layer.
        expert_indices (`tuple[torch.Tensor]` of shape `(B, S, K)`): the chosen experts, best first; -1 in such rows.
        expert_weights (`tuple[torch.Tensor]` of shape `(B, S, K)`): their weights; 0 in such rows.
    """

    aux_loss: Tensor | None = None
    expert_router_logits: tuple[Tensor, ...] | None = None
    expert_indices: tuple[Tensor, ...] | None = None
    expert_weights: tuple[Tensor, ...] | None = None


class RoeMoeDecoderLayer(RoeDecoderLayer, MoeDecoderLayer):
    """Put in front of a stock decoder layer's class: routed, and with experts where it has a block of them."""

    def full_path(self, tokens: Tensor, routing: Routing, kwargs: dict, kept: Tensor | None = None) -> Tensor:
        """The layer over the rows that keep it; its experts are told which tokens those are."""
        if self.has_experts:
            states = routing.states[self.layer_idx]
            num_added = 0 if states is None else states.shape[1]
            kwargs = kwargs | {"expert_routing": kwargs["expert_routing"].of_rows(kept, num_added)}
        return super().full_path(tokens, routing, kwargs, kept)


class RoeMoeLlamaDecoderLayer(RoeMoeDecoderLayer, LlamaDecoderLayer):
    """A Llama layer with a router, an adapter, and maybe experts."""


class RoeMoeMistralDecoderLayer(RoeMoeDecoderLayer, MistralDecoderLayer):
    """A Mistral layer with a router, an adapter, and maybe experts."""


class RoeMoeQwen2DecoderLayer(RoeMoeDecoderLayer, Qwen2DecoderLayer):
    """A Qwen2 layer with a router, an adapter, and maybe experts."""


class RoeMoeLanguageModel(HasExpertLayers, RoeLanguageModel):
    """Put in front of a stock language model's class: routed layers, of which some have experts."""

    @staticmethod
    def layer_options(config: PreTrainedConfig, layer: int) -> dict:
        return RoeLanguageModel.layer_options(config, layer) | {"block": block_of_layer(config, layer)}


class RoeMoeLlamaModel(RoeMoeLanguageModel, LlamaModel):
    """Llama with routed layers and experts."""

    decoder_layer_class = RoeMoeLlamaDecoderLayer
    _no_split_modules = ["RoeMoeLlamaDecoderLayer"]


class RoeMoeMistralModel(RoeMoeLanguageModel, MistralModel):
    """Mistral with routed layers and experts."""

    decoder_layer_class = RoeMoeMistralDecoderLayer
    _no_split_modules = ["RoeMoeMistralDecoderLayer"]


class RoeMoeQwen2Model(RoeMoeLanguageModel, Qwen2Model):
    """Qwen2 with routed layers and experts."""

    decoder_layer_class = RoeMoeQwen2DecoderLayer
    _no_split_modules = ["RoeMoeQwen2DecoderLayer"]


# To support another decoder: two classes as above and a line here, once RoE and experts each know it.
LANGUAGE_MODELS = {"llama": RoeMoeLlamaModel, "mistral": RoeMoeMistralModel, "qwen2": RoeMoeQwen2Model}


class RoeMoeLlavaModel(RoutedModel, ExpertsModel, LlavaModel):
    """LLaVA's front-end and a routed language model with experts, without a head."""

    config: RoeMoeLlavaConfig
    new_projector = LlavaMultiModalProjector
    language_models = LANGUAGE_MODELS

    def build_front_end(self, config: PreTrainedConfig) -> None:
        tower_config(config)
        super().build_front_end(config)

    def trains_experts(self) -> bool:
        """Whether experts or their routers learn: RoE's own training leaves them, as the base, as they are.

        Routing has to be learned beside the base that will run, which drops no token and adds no noise.
        """
        blocks = [layer.mlp for layer in self.language_model.layers if layer.has_experts]
        return self.training and any(one.requires_grad for block in blocks for one in block.parameters())


class RoeMoeLlavaForConditionalGeneration(
    RoutedForConditionalGeneration, ExpertsForConditionalGeneration, LlavaForConditionalGeneration
):
    """LLaVA with experts that decides per example which decoder layers to run.

    Used like `RoeLlavaForConditionalGeneration`; `forward` takes the arguments of `MoeLlavaForConditionalGeneration`
    too.
    """

    config: RoeMoeLlavaConfig
    model_class = RoeMoeLlavaModel
    output_class = RoeMoeLlavaCausalLMOutputWithPast
    class_of_base = MoeLlavaForConditionalGeneration
    logits_field = "expert_router_logits"
    code_map = auto_map(
        "configuration_roe_moe.RoeMoeLlavaConfig", "modeling_roe_moe.RoeMoeLlavaForConditionalGeneration"
    )
    forward = forward_like(ExpertsForConditionalGeneration)

    @classmethod
    def _load(cls, source, *args, **kwargs):
        """As of RoE on other bases; what splits a layer is refused."""
        refuse_parallel(kwargs)
        return super()._load(source, *args, **kwargs)

    def compile_layers(self, **compile_arguments) -> None:
        """Raises: ValueError: the block of experts learns of its tokens outside of what a graph sees."""
        raise ValueError("compile_layers is not supported for RoE on a model with experts; run it as it is")

    def is_balanced(self, labels: Tensor | None) -> bool:
        """Whether experts learn, of which the balancing loss is."""
        return self.model.trains_experts()

    def loss_of_base(self, outputs: ModelOutput) -> Tensor | float:
        """The balancing loss times its coefficient, where experts or their routers learn."""
        if outputs.aux_loss is None or not self.is_balanced(None):
            return 0.0
        return self.config.router_aux_loss_coef * outputs.aux_loss


register_names(RoeMoeLlavaForConditionalGeneration, RoeMoeLlavaModel)
RoeMoeLlavaForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = ["RoeMoeLlavaCausalLMOutputWithPast", "RoeMoeLlavaForConditionalGeneration", "RoeMoeLlavaModel"]
