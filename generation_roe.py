"""How `generate` carries routes: its routing arguments go to the cache, and the cache to every step.

B batch, L decoder layers, S sequence.
"""

import math

import torch
from torch import Tensor
from transformers import DynamicCache, QuantizedCache
from transformers.generation import GenerationMode
from transformers.utils import logging

from .baked_roe import check_baked_ratio, is_baked
from .cache_roe import RoeCache, adopt_cache
from .calibration_roe import calibrated_bias
from .report_roe import ROWS_PER_PROMPT
from .routing_roe import as_numbers, checked_route_bias, checked_routes

logger = logging.get_logger(__name__)

ROUTING_ARGUMENTS = ("routing_segments", "routes", "route_bias")


class RoeGenerationMixin:
    """`generate` for a model whose route is decided once, in prefill, and kept by its cache."""

    def generate(self, inputs=None, *args, routes=None, route_bias=None, skip_ratio=None, **kwargs):
        """`GenerationMixin.generate` along routes.

        Right-padded prompts are moved to the right end first; stock LLaVA would continue behind the padding.

        Args:
            routes: (B, L) or (L,) bool, pins the route; no router runs.
            route_bias: number, (L,) or (B, L), added to the keep logits; +inf keeps a layer, -inf skips it.
            skip_ratio: wanted share of skipped layers, on average over questions like those the model was calibrated
                with (`config.skip_calibration`); 0.0 keeps every layer, calibrated or not. `forward` does not take it.
            Others: as in Transformers. `past_key_values` may be a `RoeCache`, or an empty `DynamicCache`, `StaticCache`
                or `QuantizedCache`, which learns the routes and can be continued; as with `cache_implementation=
                "static"` or `"quantized"`, rows that skip a layer other rows keep compute it for nothing.
        Raises: ValueError for what would change the answer in silence; the message says what to do instead.
        """
        if skip_ratio is not None:
            if getattr(kwargs.get("past_key_values"), "routes", None) is not None:
                raise ValueError("skip_ratio given with a cache that already has routes. Start from an empty cache")
            route_bias = bias_for_skip_ratio(self, skip_ratio, routes, route_bias)
        if routes is not None:
            kwargs["routes"] = as_numbers("routes", routes)
        if route_bias is not None:
            route_bias = as_numbers("route_bias", route_bias)
            # A tensor is repeated per beam, as if its first size were the batch.
            kwargs["route_bias"] = route_bias if route_bias.dim() == 2 else route_bias.tolist()
        inputs = pad_on_the_left(inputs, kwargs)
        return super().generate(inputs, *args, **kwargs)

    def generate_batch(self, *args, **kwargs):
        """Not available: continuous batching packs several requests into one row, which has one route."""
        raise ValueError(
            "continuous batching is not supported: it packs several requests into one row, and a row has one route. "
            "Call generate() with a padded batch; every row keeps its own route"
        )

    init_continuous_batching = continuous_batching_context_manager = generate_batch

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        # The one place that sees the whole prompt and nothing but the prompt: drafts and beams come later.
        cache = model_kwargs.get("past_key_values")
        num_rows = (input_ids if input_ids is not None else model_kwargs["inputs_embeds"]).shape[0]
        num_layers, bias = self.config.text_config.num_hidden_layers, model_kwargs.get("route_bias")
        if bias is not None:
            checked_route_bias(bias, num_rows, num_layers)
        if isinstance(bias, Tensor):
            model_kwargs["route_bias"] = bias.expand(num_rows, -1)
        if cache is not None and getattr(cache, "routes", None) is not None:
            model_kwargs.pop("routing_segments", None)  # a processor always sends them; this cache has its routes
        elif (routes := model_kwargs.get("routes")) is not None:
            model_kwargs["routes"] = checked_routes(routes, num_rows, num_layers)
        elif model_kwargs.get("routing_segments") is None and not is_baked(self.config):
            inputs_embeds, attention_mask = model_kwargs.get("inputs_embeds"), model_kwargs.get("attention_mask")
            model_kwargs["routing_segments"] = self.model.segments_of(input_ids, inputs_embeds, attention_mask)
        return super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **model_kwargs)

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, *args, **kwargs
    ):
        check_settings(generation_config, self.device)
        # Not as one graph, which Transformers would do with a static cache on a GPU: every route has its own layers.
        generation_config.disable_compile = True
        if generation_mode == GenerationMode.ASSISTED_GENERATION:
            check_drafting(generation_config, model_kwargs, batch_size)
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, *args, **kwargs
        )
        cache = model_kwargs.get("past_key_values")
        rows_per_prompt = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        if self.training and any(getattr(module, "gradient_checkpointing", False) for module in self.modules()):
            raise ValueError(
                "generate in training mode with gradient checkpointing would run without its cache: call model.eval()"
            )
        if cache is None:
            if self.training:
                raise ValueError(
                    "generate(use_cache=False) in training mode would mix both paths of every layer: call model.eval()"
                )
            model_kwargs[ROWS_PER_PROMPT] = rows_per_prompt
            return
        if type(cache) is DynamicCache and not getattr(cache, "_is_user_defined", False):
            cache = model_kwargs["past_key_values"] = RoeCache(self.config, offloading=cache.offloading)
            if generation_config.is_assistant:
                cache.activate_past_recording()
        adopt_cache(cache)
        cache.rows_per_prompt = rows_per_prompt
        # On the cache and not among the model's arguments: the first forward pass reads them there, later ones and an
        # assistant model never see them.
        cache.leave_request({name: model_kwargs.pop(name) for name in ROUTING_ARGUMENTS if name in model_kwargs})

    @staticmethod
    def create_masks_for_generate(*, attention_mask, **kwargs):
        """What `generate` calls for a static cache: the mask (B, S) as it is, for routing to see where rows begin.

        The language model makes the same 4D masks of it afterwards.
        """
        return attention_mask

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, **kwargs):
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        if model_kwargs.get("past_key_values") is None:  # use_cache=False: every step runs the whole text again
            model_kwargs |= {"routes": outputs.routes, ROWS_PER_PROMPT: 0}
            model_kwargs.pop("routing_segments", None)
            model_kwargs.pop("route_bias", None)
        return model_kwargs


def bias_for_skip_ratio(model, skip_ratio: float, routes, route_bias) -> float | list[float] | None:
    """Route bias that gives a wanted skip ratio: +inf for 0.0, else one number per layer from the model's table.

    Returns: `None` for a baked model that skips so much anyway.
    Raises: ValueError if another routing argument is given too, the model is not calibrated for this ratio, or its
        baked route skips another one.
    """
    if routes is not None or route_bias is not None:
        raise ValueError("skip_ratio sets the route bias itself: give it without routes and route_bias")
    if isinstance(skip_ratio, bool) or not isinstance(skip_ratio, (int, float)):
        raise ValueError(f"skip_ratio must be a number in [0, 1], got {skip_ratio!r}")
    if is_baked(model.config):
        return check_baked_ratio(skip_ratio, model.config)
    return math.inf if skip_ratio == 0.0 else calibrated_bias(model, float(skip_ratio))


def check_settings(generation_config, device: torch.device) -> None:
    """Raises: ValueError for settings of `generate` that would change the answer in silence, or fail far from here."""
    for name in (*ROUTING_ARGUMENTS, "skip_ratio"):
        if getattr(generation_config, name, None) is not None:  # a GenerationConfig takes any name
            raise ValueError(f"{name} in the generation config is read by nobody: give it to generate itself")
    if generation_config.prefill_chunk_size is not None:
        raise ValueError(
            "prefill_chunk_size is not supported: the route would be decided from the first chunk of the prompt. "
            "Leave it unset"
        )
    if generation_config.guidance_scale not in (None, 1):
        raise ValueError(
            f"guidance_scale={generation_config.guidance_scale} is not supported: its second, unconditional prompt "
            "would take a route of its own, which no routing argument reaches. Leave it unset"
        )
    name = generation_config.cache_implementation
    if name is not None and name.startswith("offloaded") and device.type == "cpu":
        raise ValueError(f"cache_implementation={name!r} moves keys off a GPU and the model is on the CPU: unset it")


def check_keywords(kwargs: dict) -> None:
    """What a forward pass would ignore in silence, or take for one prompt: several packed into a row of one route.

    Args:
        kwargs: keywords of the language model, `position_ids` as the caller gave them.
    Raises: ValueError if they hold `skip_ratio`, or such packing (paged attention, flattened batches).
    """
    if kwargs.get("skip_ratio") is not None:
        raise ValueError(
            "forward takes no skip_ratio: give it to generate, or calibrated_bias(model, ratio) as route_bias"
        )
    names = ("cache", "read_index", "write_index", "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx", "block_table")
    packed = [name for name in names if kwargs.get(name) is not None]
    positions = kwargs.get("position_ids")
    if not packed and positions is not None and kwargs.get("attention_mask") is None and positions.dim() == 2:
        packed = ["position_ids that start anew"] if bool((positions.diff(dim=-1) < 0).any()) else []
    if packed:
        raise ValueError(
            f"{', '.join(packed)}: several prompts packed into one row, and a row has one route. Pass a padded batch "
            "with its attention_mask"
        )


def check_drafting(generation_config, model_kwargs: dict, batch_size: int) -> None:
    """Raises: ValueError if drafts (prompt lookup, an assistant) meet a batch or a cache they do not work with."""
    if generation_config.assistant_early_exit is not None:
        raise ValueError("assistant_early_exit is not supported: a route is for all layers. Pass an assistant_model")
    way = "prompt_lookup_num_tokens" if generation_config.prompt_lookup_num_tokens else "assistant_model"
    cache, name = model_kwargs.get("past_key_values"), generation_config.cache_implementation
    if batch_size > 1:
        raise ValueError(
            f"{way} with a batch of {batch_size}: drafts are for one row. Leave it out, or call row by row"
        )
    if generation_config.use_cache is False:
        raise ValueError(f"{way} with use_cache=False: drafts need a cache. Leave use_cache out")
    if cache is not None and (held := int(cache.get_seq_length())) > 0:
        # Transformers 5.23 feeds the cached part again, stock LLaVA's too, and goes on from the wrong text.
        raise ValueError(
            f"{way} with past_key_values that hold {held} tokens: they would be read twice. Leave it out, or start "
            "from an empty cache, with routes=past_key_values.routes to keep the route"
        )
    # cache_implementation first: it makes a cache only later, and "offloaded" a croppable one.
    refused = f"cache_implementation={name!r}" if name not in (None, "dynamic", "offloaded") else None
    if cache is not None and (isinstance(cache, QuantizedCache) or not cache.is_croppable):
        refused = type(cache).__name__.removeprefix("Routed")
    if refused is not None:
        raise ValueError(
            f"{way} with {refused}: refused drafts are cropped, which this cache cannot do. Leave "
            "past_key_values and cache_implementation unset, or pass RoeCache(model.config)"
        )


def pad_on_the_left(inputs: Tensor | None, kwargs: dict) -> Tensor | None:
    """Move right padding to the left, in place in `kwargs`: prompt tensors (B, S, ...) whose mask ends with 0.

    Returns: `inputs`, moved likewise.
    Raises: ValueError if the padding is behind new tokens of a cache in use, where it cannot be moved, or if
        `position_ids` are given.
    """
    mask = kwargs.get("attention_mask")
    if mask is None or mask.dim() != 2 or bool(mask[:, -1].all()):
        return inputs
    cache = kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise ValueError("right-padded prompts cannot continue past_key_values: pad on the left")
    length = mask.shape[1]
    after = mask.flip(1).long().argmax(dim=1, keepdim=True)  # padding behind a row's last token
    order = (torch.arange(length, device=mask.device) - after) % length
    logger.warning_once("right-padded prompts are moved to the right end of the batch before generating")

    def moved(tensor):
        index = order.to(tensor.device)
        if tensor.dim() == 3:
            index = index[..., None].expand(-1, -1, tensor.shape[2])
        return tensor.gather(1, index)

    for name in ("attention_mask", "input_ids", "inputs_embeds", "routing_segments"):
        if kwargs.get(name) is not None:
            kwargs[name] = moved(kwargs[name])
    if kwargs.get("position_ids") is not None:
        raise ValueError("position_ids with right-padded prompts: pad on the left, or leave position_ids out")
    return inputs if inputs is None else moved(inputs)


__all__ = ["RoeGenerationMixin"]
