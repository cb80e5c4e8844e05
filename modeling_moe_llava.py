"""LLaVA with experts: MoE-LLaVA (arXiv 2401.15947) and EvoMoE (arXiv 2505.23830).

In chosen decoder layers the MLP is E experts and a router that sends every token through K of them. Routers are one
matrix (MoE-LLaVA) or know image from text tokens (EvoMoE). A token's experts depend on that token alone, so a row in
a batch gives what it gives alone; no cache and no mask is different from stock LLaVA's.

Top to bottom: outputs, the block of experts, the decoder layers, the language models, the multimodal model, the head;
what RoE on such a model (`modeling_roe_moe.py`) has in common with it stands in classes of its own.

B batch, L decoder layers, M layers with experts, S sequence, D hidden, E experts, K experts per token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoModel, Cache, LlavaForConditionalGeneration, PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel
from transformers.models.llava.modeling_llava import (
    LlavaCausalLMOutputWithPast,
    LlavaModel,
    LlavaMultiModalProjector,
    LlavaPreTrainedModel,
)
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer, MistralModel
from transformers.models.phi.modeling_phi import PhiDecoderLayer, PhiModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2Model
from transformers.models.stablelm.modeling_stablelm import StableLmDecoderLayer, StableLmModel
from transformers.utils import ModelOutput, logging
from transformers.utils.generic import can_return_tuple

from .checkpointing_roe import NonReentrantMixin
from .choice_moe import ExpertRouting, Tokens, current_routing, routing_of_layer
from .configuration_moe_llava import MoeLlavaConfig
from .experts_moe import PackedExperts, experts_class
from .loading_moe import MoeLoadingMixin, register_moe_names
from .routers_moe import ROUTERS

logger = logging.get_logger(__name__)


@dataclass
class MoeLlavaCausalLMOutputWithPast(LlavaCausalLMOutputWithPast):
    """Stock LLaVA's output and what routing did. Tuples have an entry per layer with experts.

    Args:
        aux_loss (`torch.Tensor` of shape `()`): load balancing loss, summed over layers, before its coefficient; with
            labels or `output_router_logits`.
        router_logits (`tuple[torch.Tensor]` of shape `(B, S, E)`): with `output_router_logits`, as the next two.
        expert_indices (`tuple[torch.Tensor]` of shape `(B, S, K)`): the chosen experts, best first.
        expert_weights (`tuple[torch.Tensor]` of shape `(B, S, K)`): their weights, 0 where capacity dropped a choice.
    """

    aux_loss: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None
    expert_indices: tuple[Tensor, ...] | None = None
    expert_weights: tuple[Tensor, ...] | None = None


class MoeBlock(nn.Module):
    """Experts and their router, in the place of an MLP."""

    def __init__(self, config: MoeLlavaConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.traced_routing: ExpertRouting | None = None  # set by the layer while it is compiled, and then alone
        self.router = ROUTERS[config.router_type](config)
        self.experts = experts_class(config.text_config)(config.text_config, config.num_experts)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, S, D) to (B, S, D)."""
        routing, tokens = self.traced_routing or current_routing(), hidden_states.flatten(0, 1)
        if routing.single_expert is not None:
            return self.experts.expert(routing.single_expert, hidden_states)
        logits = self.router(tokens, *routing.tokens.images(tokens.device))
        choice = routing.choose(logits, self.layer_idx)
        return self.experts(tokens, choice.experts, choice.weights).view_as(hidden_states)


class MoeDecoderLayer(GradientCheckpointingLayer):
    """Put in front of a stock decoder layer's class: its MLP may be a block of experts, which learns of the routing.

    `forward` takes one keyword more, `expert_routing`.
    """

    def __init__(self, config: PreTrainedConfig, layer_idx: int, block: MoeBlock | None = None):
        super().__init__(config, layer_idx)
        self.has_experts = block is not None
        if self.has_experts:
            self.mlp = block

    def forward(self, hidden_states: Tensor, *, expert_routing: ExpertRouting | None = None, **kwargs) -> Tensor:
        """(B, S, D) to (B, S, D)."""
        if not self.has_experts:
            return super().forward(hidden_states, **kwargs)
        if torch.compiler.is_compiling():
            # Dynamo does not know context variables. Threads share an attribute, but a graph is traced once.
            self.mlp.traced_routing = expert_routing
            hidden_states = super().forward(hidden_states, **kwargs)
            self.mlp.traced_routing = None
            return hidden_states
        with routing_of_layer(expert_routing):
            return super().forward(hidden_states, **kwargs)


class MoeLlamaDecoderLayer(MoeDecoderLayer, LlamaDecoderLayer):
    """A Llama layer that may have experts."""


class MoeMistralDecoderLayer(MoeDecoderLayer, MistralDecoderLayer):
    """A Mistral layer that may have experts."""


class MoeQwen2DecoderLayer(MoeDecoderLayer, Qwen2DecoderLayer):
    """A Qwen2 layer that may have experts."""


class MoePhiDecoderLayer(MoeDecoderLayer, PhiDecoderLayer):
    """A Phi layer that may have experts, beside its attention as its MLP is."""


class MoeStableLmDecoderLayer(MoeDecoderLayer, StableLmDecoderLayer):
    """A StableLM layer that may have experts."""


def block_of_layer(config: MoeLlavaConfig, layer: int) -> MoeBlock | None:
    """The block of experts that a layer has; `None` where it stays dense."""
    return MoeBlock(config, layer) if layer in config.expert_layers() else None


class SetsExpertsImplementation:
    """Put in front of a model's class: `experts_implementation` may be set.

    Transformers 5.23 looks for the experts' decorator in the file of the model's class; ours are in one of their own.
    """

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True


class HasExpertLayers(SetsExpertsImplementation):
    """Put in front of a language model's class some of whose layers have experts."""

    # Decisions are made in float32 whatever the model is loaded in.
    _keep_in_fp32_modules_strict = {"router"}

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, PackedExperts):
            module.reset_parameters(getattr(self.config, "initializer_range", 0.02))


class MoeLanguageModel(HasExpertLayers):
    """Put in front of a stock language model's class: layers that may have experts."""

    decoder_layer_class: type[MoeDecoderLayer]

    def __init__(self, config: MoeLlavaConfig):
        super().__init__(config.text_config)
        for layer in range(config.text_config.num_hidden_layers):
            self.layers[layer] = self.decoder_layer_class(config.text_config, layer, block_of_layer(config, layer))
        self.post_init()


class MoeLlamaModel(MoeLanguageModel, LlamaModel):
    """Llama with experts."""

    decoder_layer_class = MoeLlamaDecoderLayer
    _no_split_modules = ["MoeLlamaDecoderLayer"]


class MoeMistralModel(MoeLanguageModel, MistralModel):
    """Mistral with experts."""

    decoder_layer_class = MoeMistralDecoderLayer
    _no_split_modules = ["MoeMistralDecoderLayer"]


class MoeQwen2Model(MoeLanguageModel, Qwen2Model):
    """Qwen2 with experts."""

    decoder_layer_class = MoeQwen2DecoderLayer
    _no_split_modules = ["MoeQwen2DecoderLayer"]


class MoePhiModel(MoeLanguageModel, PhiModel):
    """Phi with experts."""

    decoder_layer_class = MoePhiDecoderLayer
    _no_split_modules = ["MoePhiDecoderLayer"]


class MoeStableLmModel(MoeLanguageModel, StableLmModel):
    """StableLM with experts."""

    decoder_layer_class = MoeStableLmDecoderLayer
    _no_split_modules = ["MoeStableLmDecoderLayer"]


# To support another decoder: two classes as above, a line here, and its kind of MLP in `experts_class`.
LANGUAGE_MODELS = {
    "llama": MoeLlamaModel,
    "mistral": MoeMistralModel,
    "qwen2": MoeQwen2Model,
    "phi": MoePhiModel,
    "stablelm": MoeStableLmModel,
}


def build_language_model(config: MoeLlavaConfig) -> MoeLanguageModel:
    """The language model of a MoE-LLaVA configuration.

    Raises: ValueError if its decoder is not one of `LANGUAGE_MODELS`.
    """
    model_type = config.text_config.model_type
    if model_type not in LANGUAGE_MODELS:
        raise ValueError(
            f"text_config.model_type {model_type!r} is not supported, decoders that may have experts are "
            f"{sorted(LANGUAGE_MODELS)}: the MLP of another one has another form"
        )
    return LANGUAGE_MODELS[model_type](config)


class MoeLlavaPreTrainedModel(NonReentrantMixin, SetsExpertsImplementation, LlavaPreTrainedModel):
    """What both MoE classes share."""

    config: MoeLlavaConfig
    _keep_in_fp32_modules_strict = {"router"}
    reentrant_loses = "the load balancing loss"


class ExpertsModel(MoeLlavaPreTrainedModel):
    """Put in front of a multimodal model's class whose layers may have experts: tells them what tokens stand for."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        mm_encoder_outputs: dict | None = None,
        mm_token_type_ids: Tensor | None = None,
        expert_routing: list | None = None,
        single_expert: int | None = None,
        **kwargs,
    ):
        """The stock forward with experts.

        Args: as in the head, and `expert_routing`: a list that gets the pass's `ExpertRouting`, for callers that read
            it.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(
                "exactly one of input_ids and inputs_embeds is needed, got "
                f"{'both' if input_ids is not None else 'neither'}"
            )
        has_images = pixel_values is not None or mm_encoder_outputs is not None
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        is_image = None
        if single_expert is None:
            is_image = self.image_tokens(input_ids, inputs_embeds, mm_token_type_ids, has_images)
        real = real_tokens(attention_mask, tokens.shape[1])
        if self.training and real is None and attention_mask is not None:
            logger.warning_once(
                "attention_mask is no (B, S) mask: what is padding is not known, all tokens enter the load balancing "
                "loss and take capacity"
            )
        known = Tokens(tuple(tokens.shape[:2]), real, is_image)
        routing = ExpertRouting(self.config, self.trains_experts(), known, single_expert)
        if expert_routing is not None:
            expert_routing.append(routing)
        return super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            expert_routing=routing,
            **kwargs,
        )

    def trains_experts(self) -> bool:
        """Whether what only training does is done: capacity, noise of that mode."""
        return self.training

    def image_tokens(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, token_types: Tensor | None, has_images: bool
    ) -> Tensor | None:
        """(B, S) bool: tokens that stand for parts of an image; `None` where no router asks. Padding counts as text.

        Raises: ValueError if embeddings do not tell.
        """
        if self.config.router_type != "token_aware":
            return None
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        if token_types is not None:
            if token_types.shape != inputs_embeds.shape[:2]:
                raise ValueError(
                    f"mm_token_type_ids must have the shape (B, S) = {tuple(inputs_embeds.shape[:2])} of "
                    f"inputs_embeds, got {tuple(token_types.shape)}"
                )
            return token_types.to(inputs_embeds.device) == 1
        if has_images:  # placeholders are known by their embedding, as in stock LLaVA
            image_token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
            return (inputs_embeds == self.get_input_embeddings()(image_token)).all(dim=-1)
        raise ValueError(
            "inputs_embeds without mm_token_type_ids: a token-aware router has to know image from text tokens, and "
            "image features may be merged in already. Pass mm_token_type_ids, (B, S), 1 for image tokens and 0 for text"
        )


def real_tokens(attention_mask: Tensor | None, num_tokens: int) -> Tensor | None:
    """(B, S) bool: the new tokens that are no padding; `None` if nothing says so."""
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2 and attention_mask.shape[1] >= num_tokens:
        return attention_mask[:, attention_mask.shape[1] - num_tokens :] != 0
    return None


def tower_config(config: MoeLlavaConfig) -> PreTrainedConfig:
    """The tower's configuration; it has no experts, and Transformers (5.23) takes "grouped_mm" for none of those."""
    config.vision_config._experts_implementation_internal = None
    return config.vision_config


class MoeLlavaModel(ExpertsModel, LlavaModel):
    """Vision tower, projector and language model with experts, without a head."""

    def __init__(self, config: MoeLlavaConfig):
        # Not LlavaModel.__init__, which would build a stock language model first.
        LlavaPreTrainedModel.__init__(self, config)
        self.vision_tower = AutoModel.from_config(tower_config(config))
        self.multi_modal_projector = LlavaMultiModalProjector(config)
        self.language_model = build_language_model(config)
        self.post_init()


class ExpertsForConditionalGeneration(MoeLlavaPreTrainedModel):
    """Put in front of a model's class with a head, on an `ExpertsModel`: the balancing loss, and what was chosen.

    Attributes:
        output_class: what `forward` returns.
        logits_field: its name for the logits of the experts' routers.
    """

    output_class: type[ModelOutput] = MoeLlavaCausalLMOutputWithPast
    logits_field = "router_logits"

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        image_sizes: Tensor | None = None,
        mm_encoder_outputs: dict | None = None,
        mm_token_type_ids: Tensor | None = None,
        output_router_logits: bool | None = None,
        single_expert: int | None = None,
        **kwargs,
    ) -> MoeLlavaCausalLMOutputWithPast:
        """Stock LLaVA's forward pass through experts.

        In training the loss is the token loss plus `router_aux_loss_coef` times the load balancing loss; in eval mode
        it is the token loss alone. With `num_items_in_batch`, as `Trainer` gives it under gradient accumulation, the
        balancing loss counts by this batch's share of the labelled tokens, as the token loss does.

        Args:
            mm_token_type_ids: (B, S), 1 for image tokens: read by token-aware routers where `inputs_embeds` come
                without `input_ids`.
            output_router_logits: whether to return logits, choices and weights; the config decides where it is `None`.
            single_expert: number in [0, E) of the expert that all tokens go through, with weight 1; routers do not
                run, the balancing loss is 0, and there are no logits, choices and weights. `None`: routers decide.
            Others: as in `LlavaForConditionalGeneration`.
        Raises: ValueError if `inputs_embeds` do not tell a token-aware router what is an image.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        found: list[ExpertRouting] = []
        outputs = super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            labels=labels,
            logits_to_keep=logits_to_keep,
            image_sizes=image_sizes,
            mm_encoder_outputs=mm_encoder_outputs,
            mm_token_type_ids=mm_token_type_ids,
            expert_routing=found,
            single_expert=single_expert,
            **kwargs,
        )
        device, loss, more = outputs.logits.device, outputs.loss, {}
        is_balanced = self.training and self.is_balanced(labels)
        if labels is not None or output_router_logits or is_balanced:
            more["aux_loss"] = found[0].aux_loss(device)
        if labels is not None and is_balanced:
            share = label_share(labels, kwargs.get("num_items_in_batch"))
            loss = loss + self.config.router_aux_loss_coef * share * more["aux_loss"].to(loss.device)
        if output_router_logits:
            more |= found[0].by_row(device)
            more[self.logits_field] = more.pop("router_logits")
        return self.output_class(**{**outputs, "loss": loss}, **more)

    def is_balanced(self, labels: Tensor | None) -> bool:
        """Whether a step that learns from these labels has the balancing loss."""
        return labels is not None


def label_share(labels: Tensor, num_items: Tensor | int | None) -> Tensor | float:
    """This batch's share of the labelled tokens of a step; 1 where nobody counted them.

    Args:
        labels: (B, S), -100 where there is none; the first of a row is predicted by nothing.
        num_items: labelled tokens of all batches of the step.
    """
    if num_items is None:
        return 1.0
    num_labels = (labels[:, 1:] != -100).sum()
    return num_labels / (num_items.to(labels.device) if isinstance(num_items, Tensor) else num_items)


class MoeLlavaForConditionalGeneration(MoeLoadingMixin, ExpertsForConditionalGeneration, LlavaForConditionalGeneration):
    """LLaVA whose chosen decoder layers send every token through K of E experts.

    Used like `LlavaForConditionalGeneration`.
    """

    def __init__(self, config: MoeLlavaConfig):
        # Not LlavaForConditionalGeneration.__init__, which would build a stock model first.
        LlavaPreTrainedModel.__init__(self, config)
        self.model = MoeLlavaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()


register_moe_names(MoeLlavaForConditionalGeneration, MoeLlavaModel)
MoeLlavaForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = ["MoeLlavaCausalLMOutputWithPast", "MoeLlavaForConditionalGeneration", "MoeLlavaModel"]
