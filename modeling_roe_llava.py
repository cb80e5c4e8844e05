"""LLaVA with Routing Experts (RoE, ICLR 2025, arXiv 2407.14093): whole decoder layers are skipped per example.

Every decoder layer gets a router and a small adapter. Two learned routing tokens per example (one reads the context
with the images, one the question) ride at the end of the sequence during prefill; a layer's router reads the pair and
keeps the layer or replaces it by `x + adapter(norm(x))`. The route is decided once, lives in the cache, and decoding
follows it. Ordinary tokens never see a routing token, so with every layer kept the model is stock LLaVA.

Top to bottom: outputs, the decoder layer, the language models, the multimodal model, the head.

B batch, L decoder layers, R routing tokens (1 image + turns), T turns, S sequence, D hidden, A adapter width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Cache, LlavaForConditionalGeneration, PreTrainedConfig
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel
from transformers.models.llava.modeling_llava import (
    LlavaCausalLMOutputWithPast,
    LlavaModel,
    LlavaPreTrainedModel,
)
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer, MistralModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2Model
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from .attention_roe import RoutedAttentionConfig, RoutingAttention, attentions_of_all_rows, take_rows
from .baked_roe import as_pinned, is_baked
from .cache_roe import LayerRows, RoeCache, adopt_cache
from .checkpointing_roe import NonReentrantMixin
from .compile_roe import RoeCompileMixin, cache_of_layer, is_compiled
from .configuration_roe import RoeLlavaConfig
from .generation_roe import check_keywords
from .grafting_roe import RoeGraftingMixin
from .grouping_roe import RoeGroupingMixin
from .loading_roe import RefusesFlashAttention, register_names
from .modeling_frontend import build_projector, build_vision_tower
from .modules_roe import RoeAdapter, RoeLinear, RoeRouter, RoeUpProjection, check_routers
from .phases_roe import RoutingPhase, roe_loss
from .report_roe import ROWS_PER_PROMPT, RoeReportMixin, RoutingTally
from .routing_roe import (
    Routing,
    check_request,
    check_segments_cover,
    checked_route_bias,
    checked_routes,
    default_segments,
    new_routing,
    pad_segments,
    routing_position_ids,
)

logger = logging.get_logger(__name__)
BATCHED = ("attention_mask", "position_ids", "position_embeddings")  # keywords with a row per example


@dataclass
class RoeLlavaCausalLMOutputWithPast(LlavaCausalLMOutputWithPast):
    """Stock LLaVA's output and what routing did.

    Args:
        routes (`torch.BoolTensor` of shape `(B, L)`): True where the example ran the layer; `None` in soft training.
        router_logits (`torch.Tensor` of shape `(B, L, 2)`): raw logits (keep, skip) of the deciding turn; `None` where
            no router ran (decoding, pinned routes). Layers without a router have (inf, -inf).
        turn_skip_weights (`torch.Tensor` of shape `(B, T, L)`): training only, weight of the skip path per turn.
        turn_router_logits (`torch.Tensor` of shape `(B, T, L, 2)`): training only, raw logits per turn.
        turn_mask (`torch.BoolTensor` of shape `(B, T)`): training only, the turns an example has.
    """

    routes: Tensor | None = None
    router_logits: Tensor | None = None
    turn_skip_weights: Tensor | None = None
    turn_router_logits: Tensor | None = None
    turn_mask: Tensor | None = None


class RoeDecoderLayer(GradientCheckpointingLayer):
    """Put in front of a stock decoder layer's class: adds a router and an adapter, and runs the layer where it is kept.

    Equals the stock layer while every row keeps it. `forward` takes one keyword more, `routing`. A layer that a baked
    model skips (`is_skipped`) has nothing but the norm and the adapter.
    """

    def __init__(
        self, config: PreTrainedConfig, layer_idx: int, adapter_size: int, is_routed: bool, is_skipped: bool = False
    ):
        super().__init__(config, layer_idx)
        self.layer_idx = layer_idx
        self.self_attn.config = RoutedAttentionConfig(config)
        self.router = RoeRouter(config.hidden_size) if is_routed else None
        self.adapter = RoeAdapter(config.hidden_size, adapter_size) if is_routed or is_skipped else None
        if is_skipped:
            self.self_attn = self.post_attention_layernorm = self.mlp = None

    def forward(self, hidden_states: Tensor, *, routing: Routing | None = None, **kwargs) -> Tensor:
        """(B, S, D) to (B, S, D), moving `routing.states[layer_idx]` (B, R, D) along."""
        if routing is None:
            raise ValueError("a RoE decoder layer needs `routing`; call RoeLlavaForConditionalGeneration instead")
        has_states = routing.states[self.layer_idx] is not None
        tokens = routing.join(hidden_states, self.layer_idx) if has_states else hidden_states
        if routing.is_soft:
            tokens = self.mixed(tokens, routing, kwargs)
        else:
            states = tokens[:, hidden_states.shape[1] :] if has_states else None
            tokens = self.routed(tokens, self.decide(states, routing), routing, kwargs)
        return routing.split(tokens, self.layer_idx) if has_states else tokens

    def decide(self, states: Tensor | None, routing: Routing) -> LayerRows:
        """Which rows keep the layer: what the route says, or the router's answer where there is none yet."""
        rows = routing.rows[self.layer_idx]
        if rows is None and self.router is None:
            rows = LayerRows([True] * states.shape[0])
        elif rows is None:
            logits = self.router(self.input_layernorm(states))[:, 0]
            bias = routing.route_bias[self.layer_idx]
            bias = bias.to(logits.device) if isinstance(bias, Tensor) else bias
            keep = logits[:, 0] + routing.own_bias[self.layer_idx] + bias > logits[:, 1]
            routing.logits[self.layer_idx] = logits
            rows = LayerRows(keep.tolist(), states.device)
        routing.rows[self.layer_idx] = rows
        return rows

    def routed(self, tokens: Tensor, rows: LayerRows, routing: Routing, kwargs: dict) -> Tensor:
        """Rows that keep the layer run it, the others take the adapter: (B, S + R, D)."""
        if rows.all_kept:
            return self.full_path(tokens, routing, kwargs)
        if rows.none_kept:
            return self.skip_path(tokens)
        kept, skipped = rows.kept.to(tokens.device), rows.skipped.to(tokens.device)
        if getattr(kwargs.get("past_key_values"), "holds_all_rows", False):
            return self.full_path(tokens, routing, kwargs).index_copy(0, skipped, self.skip_path(tokens[skipped]))
        out = torch.empty_like(tokens)
        out.index_copy_(0, kept, self.full_path(tokens, routing, kwargs, kept))
        return out.index_copy_(0, skipped, self.skip_path(tokens[skipped]))

    def full_path(self, tokens: Tensor, routing: Routing, kwargs: dict, kept: Tensor | None = None) -> Tensor:
        """The stock layer over all tokens of all or n `kept` rows: (n, S + R, D). Routing tokens attend apart."""
        batch_size = tokens.shape[0]
        tokens = take_rows(tokens, kept, batch_size)
        kwargs = kwargs | {name: take_rows(kwargs[name], kept, batch_size) for name in BATCHED if name in kwargs}
        if is_compiled(self.self_attn):
            kwargs = kwargs | {"past_key_values": cache_of_layer(kwargs.get("past_key_values"), self.layer_idx)}
        if routing.states[self.layer_idx] is None:
            return super().forward(tokens, **kwargs)
        visible, positions = take_rows((routing.visible, routing.position_embeddings), kept, batch_size)
        attention = RoutingAttention(kwargs.get("past_key_values"), visible)
        kwargs = kwargs | {
            "past_key_values": attention,
            "routing_attention": attention,
            "position_embeddings": tuple(part.to(tokens.device) for part in positions),
        }
        return super().forward(tokens, **kwargs)

    def skip_path(self, tokens: Tensor) -> Tensor:
        """S(x) = x + adapter(norm(x))."""
        if self.adapter is None:
            raise ValueError(f"layer {self.layer_idx} has no adapter, but a route from before load_routing skips it")
        return tokens + self.adapter(self.input_layernorm(tokens))

    def mixed(self, tokens: Tensor, routing: Routing, kwargs: dict) -> Tensor:
        """Training: both paths, every token weighted by its turn's decision; the full one for rows that need it."""
        if self.router is None:
            return self.full_path(tokens, routing, kwargs)
        # The routing tokens as they came, not cut out of `tokens`: the gradient of a cut is as large as the whole.
        states = routing.states[self.layer_idx].to(tokens)
        weights = routing.weigh(self.router(self.input_layernorm(states)), self.layer_idx)
        rows, skip = routing.rows[self.layer_idx], self.skip_path(tokens)
        if rows is None or rows.all_kept:
            full = self.full_path(tokens, routing, kwargs)
        elif rows.none_kept:
            return skip
        else:
            kept = rows.kept.to(tokens.device)
            full = torch.zeros_like(tokens).index_copy(0, kept, self.full_path(tokens, routing, kwargs, kept))
        keep = weights[..., :1].gather(1, routing.turns.to(tokens.device)[..., None]).to(tokens.dtype)
        return skip.lerp(full, keep)  # the weights' sum is 1


class RoeLlamaDecoderLayer(RoeDecoderLayer, LlamaDecoderLayer):
    """A Llama layer with a router and an adapter."""


class RoeMistralDecoderLayer(RoeDecoderLayer, MistralDecoderLayer):
    """A Mistral layer with a router and an adapter."""


class RoeQwen2DecoderLayer(RoeDecoderLayer, Qwen2DecoderLayer):
    """A Qwen2 layer with a router and an adapter."""


class RoeLanguageModel(RefusesFlashAttention):
    """Put in front of a stock language model's class: RoE layers, routing tokens, and their place in a forward pass."""

    decoder_layer_class: type[RoeDecoderLayer]

    def __init__(
        self,
        config: PreTrainedConfig,
        adapter_size: int,
        routed_layers: list[int] | None = None,
        skipped_layers: list[int] | None = None,
    ):
        super().__init__(config)
        skipped = skipped_layers or []
        for layer in range(config.num_hidden_layers):
            is_routed = routed_layers is None or layer in routed_layers
            self.layers[layer] = self.decoder_layer_class(config, layer, adapter_size, is_routed, layer in skipped)
        # A module, so that device maps and PEFT see it; no router of a baked model reads them.
        self.routing_tokens = nn.Embedding(2, config.hidden_size) if skipped_layers is None else None
        self.post_init()

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        # Only leaves are visited. A fresh adapter starts close to the identity, where gradients still reach both parts.
        if isinstance(module, RoeLinear) and not isinstance(module, RoeRouter):
            init.xavier_uniform_(module.weight, gain=0.01 if isinstance(module, RoeUpProjection) else 1.0)

    def forward(
        self, *, inputs_embeds: Tensor, routing: Routing | None = None, routing_positions: str = "preceding", **kwargs
    ):
        """The stock forward, with the routing tokens' states and positions put where the layers find them."""
        if routing is None:
            raise ValueError("a RoE language model needs `routing`; call RoeLlavaForConditionalGeneration instead")
        check_keywords(kwargs if routing.visible is not None else {**kwargs, "position_ids": None})
        cache, attention_mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        if kwargs.get("position_ids") is None:  # the stock default, which the routing tokens' positions build on
            seen = cache.get_seq_length() if cache is not None else 0
            kwargs["position_ids"] = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None] + seen
        if routing.visible is not None:
            self.place_routing_tokens(inputs_embeds, kwargs["position_ids"], attention_mask, routing, routing_positions)
        outputs = super().forward(inputs_embeds=inputs_embeds, routing=routing, **kwargs)
        if cache is not None:
            if cache.routes is None:
                cache.set_routes(routing.decided_routes(inputs_embeds.device), routing.rows)
            cache.tokens_seen += inputs_embeds.shape[1]
        if outputs.attentions:
            outputs.attentions = attentions_of_all_rows(outputs.attentions, routing.rows)
        return outputs

    def place_routing_tokens(self, inputs_embeds, position_ids, attention_mask, routing: Routing, mode: str) -> None:
        """States (B, R, D) that enter layer 0, and rotary embeddings of all tokens, ordinary ones first."""
        batch_size, num_tokens = routing.visible.shape[:2]
        which = torch.arange(num_tokens, device=inputs_embeds.device).clamp(max=1)
        routing.place(self.routing_tokens(which).expand(batch_size, -1, -1).to(inputs_embeds))
        position_ids = position_ids.expand(batch_size, -1)
        routed = routing_position_ids(position_ids, attention_mask, num_tokens, mode)
        # Rotary embeddings of all positions together: scaled variants look at the largest one.
        routing.position_embeddings = self.rotary_emb(inputs_embeds, torch.cat([position_ids, routed], dim=1))


class RoeLlamaModel(RoeLanguageModel, LlamaModel):
    """Llama with routed layers."""

    decoder_layer_class = RoeLlamaDecoderLayer
    _no_split_modules = ["RoeLlamaDecoderLayer"]


class RoeMistralModel(RoeLanguageModel, MistralModel):
    """Mistral with routed layers."""

    decoder_layer_class = RoeMistralDecoderLayer
    _no_split_modules = ["RoeMistralDecoderLayer"]


class RoeQwen2Model(RoeLanguageModel, Qwen2Model):
    """Qwen2 with routed layers."""

    decoder_layer_class = RoeQwen2DecoderLayer
    _no_split_modules = ["RoeQwen2DecoderLayer"]


# To support another decoder: two classes as above and a line here.
LANGUAGE_MODELS = {"llama": RoeLlamaModel, "mistral": RoeMistralModel, "qwen2": RoeQwen2Model}


def build_language_model(config: PreTrainedConfig) -> RoeLanguageModel:
    """The routed language model of a RoE-LLaVA configuration.

    Raises: ValueError if its decoder is not one of `LANGUAGE_MODELS`.
    """
    model_type = config.text_config.model_type
    if model_type not in LANGUAGE_MODELS:
        raise ValueError(
            f"text_config.model_type {model_type!r} is not supported, routed decoders are {sorted(LANGUAGE_MODELS)}"
        )
    return LANGUAGE_MODELS[model_type](
        config.text_config, config.adapter_size, config.routed_layers, config.skipped_layers
    )


class RoeLlavaPreTrainedModel(NonReentrantMixin, RefusesFlashAttention, LlavaPreTrainedModel):
    """What both RoE classes share."""

    config: RoeLlavaConfig
    reentrant_loses = "routing tokens"
    # Decisions are made in float32 whatever the model is loaded in.
    _keep_in_fp32_modules_strict = {"router", "routing_tokens"}


class RoeLlavaModel(RoeLlavaPreTrainedModel, LlavaModel):
    """Vision tower, projector and routed language model, without a head."""

    def __init__(self, config: RoeLlavaConfig):
        # Not LlavaModel.__init__, which would build a stock language model first.
        LlavaPreTrainedModel.__init__(self, config)
        self.vision_tower = build_vision_tower(config)
        self.multi_modal_projector = build_projector(config)
        self.language_model = build_language_model(config)
        self.routing_phase = RoutingPhase()
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        routing_segments: Tensor | None = None,
        routes: Tensor | None = None,
        route_bias: float | Tensor | None = None,
        routing: Routing | None = None,
        **kwargs,
    ):
        """`LlavaModel.forward` with a route per row.

        Args: as in the head, and `routing`: a fresh `Routing` to be filled in, for callers that want to read it.
        """
        use_cache = self.config.text_config.use_cache if use_cache is None else use_cache
        if past_key_values is None and use_cache and not self.training:
            past_key_values = RoeCache(self.config)
        routing = new_routing(self.config) if routing is None else routing
        request = {"routing_segments": routing_segments, "routes": routes, "route_bias": route_bias}
        if past_key_values is not None:
            adopt_cache(past_key_values, (input_ids if inputs_embeds is None else inputs_embeds).shape[1])
            request = past_key_values.take_request(request)
        self.start_routing(routing, request, input_ids, inputs_embeds, attention_mask, past_key_values)
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=past_key_values is not None,
            routing=routing,
            routing_positions=self.config.routing_positions,
            **kwargs,
        )

    def start_routing(self, routing: Routing, request: dict, input_ids, inputs_embeds, attention_mask, cache) -> None:
        """Fix the routes where they are known (cache, `routes=`), else say what the routing tokens read."""
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        if cache is not None and cache.routes is not None:
            routing.routes, routing.rows = cache.routes_for(tokens.shape[0])
            return
        check_request(request)
        if is_baked(self.config):
            request = as_pinned(request, self.config, tokens.shape[0])
        always_run = [i for i, layer in enumerate(self.language_model.layers) if layer.adapter is None]
        if request["routes"] is not None:
            routes = checked_routes(request["routes"], tokens.shape[0], routing.num_layers, always_run)
            routing.routes = routes.to(tokens.device, non_blocking=True)
            routing.rows = [LayerRows(keep, tokens.device) for keep in routes.t().tolist()]
            return
        check_routers(self.language_model.layers)
        segments = request["routing_segments"]
        if segments is None:
            if self.training and cache is None:  # the head makes them of its labels
                logger.warning_once("training without routing_segments or labels: routers read answers, too")
            segments = self.segments_of(input_ids, inputs_embeds, attention_mask)
        elif self.training and cache is None:
            check_segments_cover(segments, tokens.shape[1])
        segments = pad_segments(segments.to(tokens.device), tokens.shape[1])
        if attention_mask is not None and attention_mask.shape == segments.shape:
            segments = segments.masked_fill(attention_mask.to(segments.device) == 0, -1)  # padding is never read
        if self.training and cache is None:
            if request["route_bias"] is not None:
                raise ValueError("route_bias shifts decisions at inference; in training set model.model.routing_phase")
            routing.train_on(segments, self.routing_phase)
        else:
            sizes = tokens.shape[0], routing.num_layers
            bias = checked_route_bias(request["route_bias"], *sizes, always_run, tokens.device)
            routing.decide_on(segments, bias, self.config.routing_question)

    def segments_of(self, input_ids, inputs_embeds, attention_mask, labels: Tensor | None = None) -> Tensor:
        """(B, S) routing segments of a prompt that came without: see `default_segments`."""
        if input_ids is not None and input_ids.shape[1] > 0:
            image_mask = input_ids == self.config.image_token_id
        else:  # placeholders are known by their embedding, as in stock LLaVA
            image_token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
            image_mask = (inputs_embeds == self.get_input_embeddings()(image_token)).all(dim=-1)
            logger.warning_once(
                "inputs_embeds without routing_segments: the context ends with the last image placeholder found in "
                "them; where image features are merged in already, everything counts as the question."
            )
        real = torch.ones_like(image_mask) if attention_mask is None else attention_mask.to(image_mask.device) != 0
        if real.shape != image_mask.shape:
            raise ValueError(
                f"attention_mask must have the shape (B, S) = {tuple(image_mask.shape)} of the prompt to split it into "
                f"context and question, got {tuple(real.shape)}; pass routing_segments= or routes="
            )
        return default_segments(image_mask, real, labels)


class RoeLlavaForConditionalGeneration(
    RoeReportMixin,
    RoeGroupingMixin,
    RoeGraftingMixin,
    RoeCompileMixin,
    RoeLlavaPreTrainedModel,
    LlavaForConditionalGeneration,
):
    """LLaVA that decides per example which decoder layers to run.

    Used like `LlavaForConditionalGeneration`; `forward` and `generate` take three arguments more. Routing parts go
    onto a base with `from_base`, and are replaced with `load_routing`.
    """

    # The loss is a mean over examples, so accumulation steps have to be divided by, as Trainer does when told so.
    accepts_loss_kwargs = False

    def __init__(self, config: RoeLlavaConfig):
        # Not LlavaForConditionalGeneration.__init__, which would build a stock model first.
        LlavaPreTrainedModel.__init__(self, config)
        self.model = RoeLlavaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.routing_tally = RoutingTally()
        self.post_init()

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
        routing_segments: Tensor | None = None,
        routes: Tensor | None = None,
        route_bias: float | Tensor | None = None,
        **kwargs,
    ) -> RoeLlavaCausalLMOutputWithPast:
        """Stock LLaVA's forward pass along a route per row.

        In eval mode routing is hard and the loss is the cross entropy alone. In training mode, unless a cache or
        `routes` is given, both paths are mixed as `model.model.routing_phase` says, and the loss is `roe_loss`.

        Args:
            routing_segments: (B, S) int: 0 context, t >= 1 question of turn t, -1 neither. `RoeLlavaProcessor` makes
                it; without it the context ends with the last image and the rest is the question.
            routes: (B, L) or (L,) bool: the route itself; no router runs and no routing token exists.
            route_bias: number, (L,) or (B, L): added to the keep logits; +inf keeps a layer, -inf skips it.
            Others: as in `LlavaForConditionalGeneration`.
        Raises: ValueError if `routes` or `route_bias` come with a cache that has routes, and for wrong shapes.
        """
        routing, pinned = (
            new_routing(self.config),
            routes is not None or is_baked(self.config),
        )
        rows_per_prompt = kwargs.pop(ROWS_PER_PROMPT, 1)
        if labels is not None and routing_segments is not None:
            check_segments_cover(routing_segments, labels.shape[1])
        elif labels is not None and not pinned:
            routing_segments = self.model.segments_of(input_ids, inputs_embeds, attention_mask, labels)
        outputs = super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            labels=labels if not self.training or pinned else None,
            logits_to_keep=logits_to_keep,
            image_sizes=image_sizes,
            mm_encoder_outputs=mm_encoder_outputs,
            routing_segments=routing_segments,
            routes=routes,
            route_bias=route_bias,
            routing=routing,
            **kwargs,
        )
        loss = outputs.loss
        if labels is not None and routing.is_soft:
            loss = roe_loss(outputs.logits, labels, routing.skip_share(), self.config.target_skip_ratio)
        if rows_per_prompt:
            self.count_routing(routing, outputs, rows_per_prompt)
        return RoeLlavaCausalLMOutputWithPast(
            **{**outputs, "loss": loss},
            routes=routing.decided_routes(outputs.logits.device),
            router_logits=routing.router_logits(),
            turn_skip_weights=routing.turn_skip_weights(),
            turn_router_logits=routing.turn_router_logits(),
            turn_mask=routing.turn_mask,
        )


register_names(RoeLlavaForConditionalGeneration, RoeLlavaModel)
RoeLlavaForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = ["RoeLlavaCausalLMOutputWithPast", "RoeLlavaForConditionalGeneration", "RoeLlavaModel"]
