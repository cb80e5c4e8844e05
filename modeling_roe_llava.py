"""LLaVA with Routing Experts (RoE, ICLR 2025, arXiv 2407.14093): whole decoder layers are skipped per example.

Every decoder layer gets a router and a small adapter. Two learned routing tokens per example (one reads the context
with the images, one the question) ride at the end of the sequence during prefill; a layer's router reads the pair and
keeps the layer or replaces it by `x + adapter(norm(x))`. The route is decided once, lives in the cache, and decoding
follows it. Ordinary tokens never see a routing token, so with every layer kept the model is stock LLaVA.

Top to bottom: outputs, the multimodal model and the head for any base of LLaVA's kind (`RoutedModel` and
`RoutedForConditionalGeneration`, put in front of stock classes), then LLaVA's own. The layers and language models stand
in `decoder_roe.py`, other bases in `modeling_roe_family.py`.

B batch, L decoder layers, R routing tokens (1 image + turns), T turns, S sequence, D hidden.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Cache, LlavaForConditionalGeneration, PreTrainedConfig, PreTrainedModel
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast, LlavaModel
from transformers.utils import ModelOutput, logging
from transformers.utils.generic import can_return_tuple

from .baked_roe import as_pinned, is_baked
from .cache_roe import LayerRows, RoeCache, adopt_cache
from .checkpointing_roe import NonReentrantMixin
from .compile_roe import RoeCompileMixin
from .configuration_roe import RoeLlavaConfig
from .decoder_roe import LANGUAGE_MODELS, RoeLanguageModel, build_language_model
from .generation_roe import ROUTING_ARGUMENTS
from .grafting_roe import RoeGraftingMixin
from .grouping_roe import RoeGroupingMixin
from .loading_roe import AUTO_MAP, RefusesFlashAttention, register_names
from .modeling_frontend import build_projector, build_vision_tower
from .modules_roe import check_routers
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
)

logger = logging.get_logger(__name__)
PLACEHOLDERS = ("image_token_id", "video_token_id")  # of the config: what stands for context in a prompt


# ------------------------------------------------------------------------------------------- any base of LLaVA's kind


@dataclass
class RoutedOutput:
    """Put in front of a stock output's class: what routing did.

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


class RoutedPreTrainedModel(NonReentrantMixin, RefusesFlashAttention):
    """What the model and the head share."""

    reentrant_loses = "routing tokens"
    # Decisions are made in float32 whatever the model is loaded in.
    _keep_in_fp32_modules_strict = {"router", "routing_tokens"}


class RoutedModel(RoutedPreTrainedModel):
    """Put in front of a stock multimodal model's class: its language model is routed. Nothing else is another.

    Attributes:
        new_projector: makes the projector of a configuration.
        language_models: classes by the decoder's `model_type`.
    """

    new_projector: Callable[[PreTrainedConfig], nn.Module]
    language_models: dict[str, type[RoeLanguageModel]] = LANGUAGE_MODELS

    def __init__(self, config: PreTrainedConfig):
        # Not the stock class's __init__, which would build a stock language model first.
        PreTrainedModel.__init__(self, config)
        self.build_front_end(config)
        self.language_model = build_language_model(config, self.language_models)
        self.routing_phase = RoutingPhase()
        self.post_init()

    def build_front_end(self, config: PreTrainedConfig) -> None:
        """What comes before the language model, under the stock class's names."""
        self.vision_tower = build_vision_tower(config)
        self.multi_modal_projector = self.new_projector(config)

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
        """The stock forward with a route per row.

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
        tokens = [getattr(self.config, name, None) for name in PLACEHOLDERS]
        tokens = [token for token in tokens if token is not None]
        if input_ids is not None and input_ids.shape[1] > 0:
            found = [input_ids == token for token in tokens]
        else:  # placeholders are known by their embedding, as in stock LLaVA
            table = self.get_input_embeddings()
            vectors = [table(torch.tensor(token, device=inputs_embeds.device)) for token in tokens]
            found = [(inputs_embeds == vector).all(dim=-1) for vector in vectors]
            logger.warning_once(
                "inputs_embeds without routing_segments: the context ends with the last image placeholder found in "
                "them; where image features are merged in already, everything counts as the question."
            )
        image_mask = functools.reduce(torch.logical_or, found)
        real = torch.ones_like(image_mask) if attention_mask is None else attention_mask.to(image_mask.device) != 0
        if real.shape != image_mask.shape:
            raise ValueError(
                f"attention_mask must have the shape (B, S) = {tuple(image_mask.shape)} of the prompt to split it into "
                f"context and question, got {tuple(real.shape)}; pass routing_segments= or routes="
            )
        return default_segments(image_mask, real, labels)


class RoutedForConditionalGeneration(
    RoeReportMixin,
    RoeGroupingMixin,
    RoeGraftingMixin,
    RoeCompileMixin,
    RoutedPreTrainedModel,
):
    """Put in front of a stock multimodal model with a head: decides per example which decoder layers to run.

    Used like the stock class; `forward` and `generate` take three arguments more. Routing parts go onto a base with
    `from_base`, and are replaced with `load_routing`.

    Attributes:
        model_class: the `RoutedModel` it has.
        output_class: what `forward` returns, a `RoutedOutput` in front of the stock output.
    """

    model_class: type[RoutedModel]
    output_class: type[RoutedOutput]
    # The loss is a mean over examples, so accumulation steps have to be divided by, as Trainer does when told so.
    accepts_loss_kwargs = False

    def __init__(self, config: PreTrainedConfig):
        # Not the stock class's __init__, which would build a stock model first.
        PreTrainedModel.__init__(self, config)
        self.model = self.model_class(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.routing_tally = RoutingTally()
        self.post_init()

    def routed_forward(
        self,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        routing_segments: Tensor | None = None,
        routes: Tensor | None = None,
        route_bias: float | Tensor | None = None,
        **kwargs,
    ) -> RoutedOutput:
        """The stock forward pass along a route per row.

        In eval mode routing is hard and the loss is the cross entropy alone. In training mode, unless a cache or
        `routes` is given, both paths are mixed as `model.model.routing_phase` says, and the loss is `roe_loss`.

        Args:
            routing_segments: (B, S) int: 0 context, t >= 1 question of turn t, -1 neither. The processor makes it;
                without it the context ends with the last image (or video) and the rest is the question.
            routes: (B, L) or (L,) bool: the route itself; no router runs and no routing token exists.
            route_bias: number, (L,) or (B, L): added to the keep logits; +inf keeps a layer, -inf skips it.
            Others: as in the stock class.
        Raises: ValueError if `routes` or `route_bias` come with a cache that has routes, and for wrong shapes.
        """
        routing, pinned = new_routing(self.config), routes is not None or is_baked(self.config)
        rows_per_prompt = kwargs.pop(ROWS_PER_PROMPT, 1)
        if labels is not None and routing_segments is not None:
            check_segments_cover(routing_segments, labels.shape[1])
        elif labels is not None and not pinned:
            routing_segments = self.model.segments_of(input_ids, inputs_embeds, attention_mask, labels)
        outputs = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            labels=labels if not self.training or pinned else None,
            routing_segments=routing_segments,
            routes=routes,
            route_bias=route_bias,
            routing=routing,
            **kwargs,
        )
        loss = outputs.loss
        if labels is not None and routing.is_soft:
            loss = roe_loss(outputs.logits, labels, routing.skip_share(), self.config.target_skip_ratio)
            loss = loss + self.loss_of_base(outputs)
        if rows_per_prompt:
            self.count_routing(routing, outputs, rows_per_prompt)
        return self.output_class(
            **{**outputs, "loss": loss},
            routes=routing.decided_routes(outputs.logits.device),
            router_logits=routing.router_logits(),
            turn_skip_weights=routing.turn_skip_weights(),
            turn_router_logits=routing.turn_router_logits(),
            turn_mask=routing.turn_mask,
        )

    def loss_of_base(self, outputs: ModelOutput) -> Tensor | float:
        """What the base's own training adds to the token loss where soft routing trains: nothing."""
        return 0.0


def forward_like(stock: type[PreTrainedModel]) -> Callable:
    """`routed_forward` for a class in front of `stock`: its arguments in its order, those of routing behind them.

    `Trainer`, PEFT and `generate` find out by inspection what a model takes, so it has to name them all.
    """
    shown = inspect.signature(stock.forward)
    by_place = [one for one in shown.parameters.values() if one.kind is one.POSITIONAL_OR_KEYWORD]
    by_place += [inspect.Parameter(name, by_place[0].kind, default=None) for name in ROUTING_ARGUMENTS]
    others = [one for one in shown.parameters.values() if one.kind is one.VAR_KEYWORD]
    signature = inspect.Signature([*by_place, *others])

    def forward(self, *args, **kwargs):
        if args:
            given = signature.bind(self, *args, **kwargs).arguments
            kwargs = {name: given[name] for name in given if name not in ("self", "kwargs")} | given.get("kwargs", {})
        return self.routed_forward(**kwargs)

    forward.__doc__ = RoutedForConditionalGeneration.routed_forward.__doc__
    forward = can_return_tuple(forward)
    forward.__signature__ = signature
    return forward


# --------------------------------------------------------------------------------------------------------------- LLaVA


@dataclass
class RoeLlavaCausalLMOutputWithPast(RoutedOutput, LlavaCausalLMOutputWithPast):
    """Stock LLaVA's output and what routing did."""


class RoeLlavaModel(RoutedModel, LlavaModel):
    """LLaVA's front-end, or one of ours, and a routed language model, without a head."""

    config: RoeLlavaConfig
    new_projector = staticmethod(build_projector)


class RoeLlavaForConditionalGeneration(RoutedForConditionalGeneration, LlavaForConditionalGeneration):
    """LLaVA that decides per example which decoder layers to run."""

    config: RoeLlavaConfig
    model_class = RoeLlavaModel
    output_class = RoeLlavaCausalLMOutputWithPast
    code_map = AUTO_MAP
    forward = forward_like(LlavaForConditionalGeneration)


register_names(RoeLlavaForConditionalGeneration, RoeLlavaModel)
RoeLlavaForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = ["RoeLlavaCausalLMOutputWithPast", "RoeLlavaForConditionalGeneration", "RoeLlavaModel"]
