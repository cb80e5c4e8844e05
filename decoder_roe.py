"""A stock decoder with Routing Experts: every layer may be skipped per example, routing tokens ride along.

Top to bottom: the decoder layer, one class per stock layer, the language model, one class per stock model, the table of
them. No forward pass of a stock class is copied; what is multimodal stands in `modeling_roe_llava.py`.

B batch, L decoder layers, R routing tokens (1 image + turns), T turns, S sequence, D hidden, A adapter width.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer, MistralModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2Model

from .attention_roe import RoutedAttentionConfig, RoutingAttention, attentions_of_all_rows, take_rows
from .cache_roe import LayerRows
from .compile_roe import cache_of_layer, is_compiled
from .generation_roe import check_keywords
from .loading_roe import RefusesFlashAttention
from .modules_roe import RoeAdapter, RoeLinear, RoeRouter, RoeUpProjection
from .routing_roe import Routing, routing_position_ids

BATCHED = ("attention_mask", "position_ids", "position_embeddings")  # keywords with a row per example


class RoeDecoderLayer(GradientCheckpointingLayer):
    """Put in front of a stock decoder layer's class: adds a router and an adapter, and runs the layer where it is kept.

    Equals the stock layer while every row keeps it. `forward` takes one keyword more, `routing`. A layer that a baked
    model skips (`is_skipped`) has nothing but the norm and the adapter. `others` are for the class behind.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        layer_idx: int,
        *,
        adapter_size: int,
        is_routed: bool,
        is_skipped: bool = False,
        **others,
    ):
        super().__init__(config, layer_idx, **others)
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

    def __init__(self, config: PreTrainedConfig):
        """`config` is that of the whole model."""
        super().__init__(config.text_config)
        for layer in range(config.text_config.num_hidden_layers):
            options = self.layer_options(config, layer)
            self.layers[layer] = self.decoder_layer_class(config.text_config, layer, **options)
        # A module, so that device maps and PEFT see it; no router of a baked model reads them.
        is_baked = config.skipped_layers is not None
        self.routing_tokens = None if is_baked else nn.Embedding(2, config.text_config.hidden_size)
        self.post_init()

    @staticmethod
    def layer_options(config: PreTrainedConfig, layer: int) -> dict:
        """What a layer is made with, beside its number."""
        is_routed = config.routed_layers is None or layer in config.routed_layers
        is_skipped = layer in (config.skipped_layers or [])
        return {"adapter_size": config.adapter_size, "is_routed": is_routed, "is_skipped": is_skipped}

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


def build_language_model(config: PreTrainedConfig, classes: dict[str, type[RoeLanguageModel]]) -> RoeLanguageModel:
    """The routed language model of a configuration.

    Args:
        classes: by the decoder's `model_type`.
    Raises: ValueError if its decoder is not one of them.
    """
    model_type = config.text_config.model_type
    if model_type not in classes:
        raise ValueError(
            f"text_config.model_type {model_type!r} is not supported, routed decoders are {sorted(classes)}"
        )
    return classes[model_type](config)


__all__ = ["LANGUAGE_MODELS", "RoeDecoderLayer", "RoeLanguageModel", "build_language_model"]
