"""Configuration of a LLaVA with Routing Experts (RoE, ICLR 2025, arXiv 2407.14093).

`RoutingConfig`, put in front of a stock configuration, is what decides the shape and the use of the routing parts;
`RoeLlavaConfig` is `LlavaConfig` with it. Learning rates, stage boundaries and other training settings are arguments of
the training, not of the model.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from transformers import LlavaConfig
from transformers.utils.versions import require_version

from .calibration_roe import SkipCalibration
from .configuration_frontend import BASE_TYPES, STOCK_PROJECTOR, check_projector_type, own_vision_config

# Before the other files are imported, which use names that older versions lack.
require_version("transformers>=5.19.0", "RoE-LLaVA needs it: pip install -U transformers")

ROUTING_POSITIONS = ("preceding", "first", "spread")
ROUTING_QUESTIONS = ("last_turn", "all_text")
ROUTING_FIELDS = (
    "adapter_size",
    "routed_layers",
    "routing_positions",
    "routing_question",
    "target_skip_ratio",
    "route_bias",
    "skip_calibration",
)
BAKED_FIELDS = ("skipped_layers",)  # of a checkpoint whose route is frozen, so that nothing is left to route


@dataclass(init=False, repr=False, eq=False, kw_only=True)
class RoutingConfig:
    """Put in front of a stock multimodal configuration: what RoE adds to it.

    Args:
        adapter_size (`int`, defaults to 1024):
            Hidden width A of the adapter that stands in for a skipped layer, at least 1. Read when layers are built.
        routed_layers (`list[int]`, *optional*):
            Decoder layers that have a router and may be skipped; the others always run. `None` routes every layer.
            Read when layers are built.
        routing_positions (`"preceding"`, `"first"` or `"spread"`, defaults to `"preceding"`):
            Rotary positions of the routing tokens, p0 being the position of a row's first real token. `"preceding"`:
            image token p0 - 2, text tokens p0 - 1. `"first"`: all at p0 + 1, as published inference with an attention
            mask has it. `"spread"`: as published training has it, the image token at p0 - R and the text token of turn
            t at p0 - R + t, R being 1 + the turns of the batch's longest conversation, so that a row depends on the
            others; the same as `"preceding"` for one turn and at inference. Read at every prefill and training pass.
        routing_question (`"last_turn"` or `"all_text"`, defaults to `"last_turn"`):
            What the text routing token reads at inference: the question of the last turn, or everything from the first
            question to the last (earlier answers included, as in the published inference). Read at every prefill.
        target_skip_ratio (`float`, defaults to 0.3):
            Wanted share of skipped (example, layer) pairs, in [0, 0.5]. Read by the sparsity penalty and the random
            warm-up in training, never at inference.
        route_bias (`list[float]`, *optional*):
            One number per decoder layer, added to its keep logit in every decision; the end of training finds those
            with which held-out questions skip `target_skip_ratio`. What a caller gives as `route_bias=` comes on top.
            `None`: no shift. Read at every prefill and training pass.
        skip_calibration (`dict`, *optional*):
            Table from skip ratio to route bias, as `SkipCalibration` describes it; `roe-llava calibrate` measures it.
            It holds for the routers it was measured with. Read by `generate(skip_ratio=...)`.
        skipped_layers (`list[int]`, *optional*):
            Of a baked checkpoint (`roe-llava bake`): the layers that are skipped for every input, at least one and not
            all. They hold their norm and adapter alone, the others always run, and there are no routers and no routing
            tokens; `routed_layers` is then empty, `route_bias` and `skip_calibration` are `None`. `None`: routers
            decide. Read when layers are built, and at every prefill and training pass.

    Attributes:
        base_types: `model_type` of the bases whose checkpoints it opens too.
    """

    base_types: ClassVar[tuple[str, ...]]

    adapter_size: int = 1024
    routed_layers: list[int] | None = None
    routing_positions: str = "preceding"
    routing_question: str = "last_turn"
    target_skip_ratio: float = 0.3
    route_bias: list[float] | None = None
    skip_calibration: dict | None = None
    skipped_layers: list[int] | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if isinstance(self.adapter_size, bool) or not isinstance(self.adapter_size, int) or self.adapter_size < 1:
            raise ValueError(f"adapter_size must be a positive integer, got {self.adapter_size!r}")
        if self.routing_positions not in ROUTING_POSITIONS:
            raise ValueError(f"routing_positions must be one of {ROUTING_POSITIONS}, got {self.routing_positions!r}")
        if self.routing_question not in ROUTING_QUESTIONS:
            raise ValueError(f"routing_question must be one of {ROUTING_QUESTIONS}, got {self.routing_question!r}")
        if not 0.0 <= self.target_skip_ratio <= 0.5:
            raise ValueError(
                f"target_skip_ratio must lie in [0, 0.5], got {self.target_skip_ratio}: the random warm-up cannot skip "
                "more than half of the layers"
            )
        if self.routed_layers is not None:
            self.routed_layers = self._checked_layers("routed_layers", self.routed_layers)
        if self.skipped_layers is not None:
            self._check_baked()
        if self.route_bias is not None:
            self.route_bias = self._checked_bias()
        if self.skip_calibration is not None:
            SkipCalibration.of_dict(self.skip_calibration, self.text_config.num_hidden_layers)

    @classmethod
    def get_config_dict(cls, *args, **kwargs):
        """As in Transformers; a base's config is one that leaves the routing fields out, and no mistake."""
        content, kwargs = super().get_config_dict(*args, **kwargs)
        is_base = content.get("model_type") in cls.base_types
        return (content | {"model_type": cls.model_type} if is_base else content), kwargs

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        # Transformers 5.23 sets options given to `from_pretrained` after `__post_init__` has checked the stored ones.
        given = {name: kwargs.pop(name) for name in (*ROUTING_FIELDS, *BAKED_FIELDS) if name in kwargs}
        return super().from_dict({**config_dict, **given}, **kwargs)

    def _check_baked(self) -> None:
        """Bring what goes with a frozen route in order.

        Raises: ValueError if the route skips nothing or everything, or something is left to route.
        """
        self.skipped_layers = self._checked_layers("skipped_layers", self.skipped_layers)
        num_layers = self.text_config.num_hidden_layers
        if not 0 < len(self.skipped_layers) < num_layers:
            raise ValueError(
                f"skipped_layers must name at least one of the {num_layers} layers and not all of them, got "
                f"{self.skipped_layers}; leave it out (None) where routers decide"
            )
        if self.routed_layers:
            raise ValueError(
                f"skipped_layers {self.skipped_layers} beside routed_layers {self.routed_layers}: a baked model has no "
                "routers. Leave routed_layers out, or pin the route of a routed model with routes="
            )
        for name in ("route_bias", "skip_calibration"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name} beside skipped_layers: a baked model has no routers it could hold for")
        self.routed_layers = []

    def _checked_bias(self) -> list[float]:
        bias, num_layers = self.route_bias, self.text_config.num_hidden_layers
        is_right = isinstance(bias, list | tuple) and len(bias) == num_layers
        if not is_right or not all(type(one) in (int, float) and math.isfinite(one) for one in bias):
            raise ValueError(
                f"route_bias must be {num_layers} finite numbers, one per decoder layer, or None, got {bias!r:.80}; "
                "for one call give it to forward or generate"
            )
        return [float(one) for one in bias]

    def _checked_layers(self, name, layers):
        num_layers = self.text_config.num_hidden_layers
        is_list = isinstance(layers, list | tuple)
        wrong = [one for one in layers if type(one) is not int or not 0 <= one < num_layers] if is_list else [layers]
        if wrong or len(set(layers)) != len(layers):
            shown = list(layers) if is_list else layers
            raise ValueError(
                f"{name} must be distinct layer numbers in [0, {num_layers}), got {shown}; "
                f"the language model has {num_layers} layers"
            )
        return sorted(layers)


class RoeLlavaConfig(RoutingConfig, LlavaConfig):
    """Configuration of [`RoeLlavaForConditionalGeneration`]: that of LLaVA, [`RoutingConfig`], and the front-end.

    Args:
        projector_type (`str`, defaults to `"mlp2x_gelu"`):
            The base's projector, as in `FrontendLlavaConfig`. Read when the model is built.
    """

    model_type = "roe_llava"
    base_types = BASE_TYPES

    projector_type: str = STOCK_PROJECTOR

    def __post_init__(self, **kwargs):
        self.vision_config = own_vision_config(self.vision_config)
        check_projector_type(self.projector_type)
        super().__post_init__(**kwargs)


__all__ = ["RoeLlavaConfig", "RoutingConfig"]
