"""Configuration of a LLaVA whose layers hold experts (MoE-LLaVA, arXiv 2401.15947; EvoMoE, arXiv 2505.23830).

`MoeLlavaConfig` is `LlavaConfig` plus what decides the shape and the use of experts and routers. How experts evolve,
learning rates and stages are arguments of the training, not of the model.
"""

import math

from transformers import LlavaConfig
from transformers.utils.versions import require_version

# Before the other files are imported, which use names that older versions lack.
require_version("transformers>=5.19.0", "MoE-LLaVA needs it: pip install -U transformers")

ROUTER_TYPES = ("linear", "token_aware")
NOISE_MODES = ("never", "training", "always")
MOE_FIELDS = (
    "num_experts",
    "num_experts_per_tok",
    "moe_layers",
    "router_type",
    "router_hidden_size",
    "router_rank",
    "router_width",
    "normalize_expert_weights",
    "expert_capacity_factor",
    "min_expert_capacity",
    "second_choice_noise",
    "count_padding",
    "router_aux_loss_coef",
    "output_router_logits",
)


class MoeLlavaConfig(LlavaConfig):
    """Configuration of [`MoeLlavaForConditionalGeneration`].

    Args:
        num_experts (`int`, defaults to 4):
            Experts E of a layer that has them, at least 2. Read when layers are built.
        num_experts_per_tok (`int`, defaults to 2):
            Experts K that every token goes through, in [1, E]: 2 in MoE-LLaVA, 1 in EvoMoE. Read at every pass.
        moe_layers (`list[int]`, *optional*):
            Decoder layers whose MLP is E experts and a router; the others stay dense. `None`: every other layer,
            beginning with layer 0, as in both papers. Read when layers are built.
        router_type (`"linear"` or `"token_aware"`, defaults to `"linear"`):
            `"linear"`: one matrix without bias (MoE-LLaVA). `"token_aware"`: image and text tokens each have a
            hypernetwork that makes a small network for every token (EvoMoE, eq. 2 to 8). Read when layers are built.
        router_hidden_size (`int`, defaults to 16):
            Hidden width of a token-aware router's hypernetworks; the paper does not state it. Read when layers are
            built, like the next two, by token-aware routers alone.
        router_rank (`int`, defaults to 4):
            Width behind SwiGLU of the network that is made for a token; the paper does not state it.
        router_width (`int`, defaults to 16):
            Width of that network's output, which a last matrix turns into E logits; the paper does not state it.
        normalize_expert_weights (`bool`, *optional*):
            Whether the weights of a token's K experts are divided by their sum. `None`: for K of 2 and more, as the
            published code does (the MoE-LLaVA paper does not); not for K = 1, where the weight would be 1 whatever
            the router says, and the token loss would teach it nothing. Read at every pass.
        expert_capacity_factor (`float`, *optional*):
            In training an expert takes at most ceil(tokens / E * K * factor) tokens of a batch; what is over is
            dropped, so that the layer adds less for these tokens, or nothing. Above 0; 1.5 in published training.
            With K = 1 those to drop are drawn, else the last ones in the batch are dropped, second choices before
            first ones (the paper says by priority; the published code does this). `None`: nothing is dropped. Never
            read at inference: a row would depend on its batch.
        min_expert_capacity (`int`, defaults to 0):
            Lower bound of that number of tokens.
        second_choice_noise (`"never"`, `"training"` or `"always"`, defaults to `"never"`):
            When Gumbel noise is added to the logits that choose the second expert; the weights never have it.
            Published code: always, at inference too, where answers then differ from call to call. Only for K = 2.
        count_padding (`bool`, defaults to `False`):
            Whether padding enters the load balancing loss and takes capacity, as in the published code.
        router_aux_loss_coef (`float`, defaults to 0.01):
            Weight of the load balancing loss, summed over layers, beside the token loss in nats; at least 0; 0.01 in
            MoE-LLaVA, 0.001 in EvoMoE. Read in training.
        output_router_logits (`bool`, defaults to `False`):
            Whether outputs hold logits, choices and weights of every layer with experts.
    """

    model_type = "moe_llava"
    keys_to_ignore_at_inference = ["past_key_values", "aux_loss", "router_logits", "expert_indices", "expert_weights"]

    num_experts: int = 4
    num_experts_per_tok: int = 2
    moe_layers: list[int] | None = None
    router_type: str = "linear"
    router_hidden_size: int = 16
    router_rank: int = 4
    router_width: int = 16
    normalize_expert_weights: bool | None = None
    expert_capacity_factor: float | None = None
    min_expert_capacity: int = 0
    second_choice_noise: str = "never"
    count_padding: bool = False
    router_aux_loss_coef: float = 0.01
    output_router_logits: bool = False

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self._check_integers()
        self._check_choices()
        if self.moe_layers is not None:
            self.moe_layers = self._checked_expert_layers()
        factor = self.expert_capacity_factor
        if factor is not None and not (type(factor) in (int, float) and math.isfinite(factor) and factor > 0):
            raise ValueError(f"expert_capacity_factor must be a number above 0 or None, got {factor!r}")
        coefficient = self.router_aux_loss_coef
        if type(coefficient) not in (int, float) or not 0 <= coefficient < math.inf:
            raise ValueError(f"router_aux_loss_coef must be a number of at least 0, got {coefficient!r}")

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        # Transformers 5.23 sets options given to `from_pretrained` after `__post_init__` has checked the stored ones.
        given = {name: kwargs.pop(name) for name in MOE_FIELDS if name in kwargs}
        return super().from_dict({**config_dict, **given}, **kwargs)

    def expert_layers(self) -> list[int]:
        """The layers that have experts."""
        return list(range(0, self.text_config.num_hidden_layers, 2)) if self.moe_layers is None else self.moe_layers

    def normalizes_weights(self) -> bool:
        """Whether the weights of a token's experts sum to 1."""
        return self.num_experts_per_tok > 1 if self.normalize_expert_weights is None else self.normalize_expert_weights

    def _check_integers(self) -> None:
        least = {"num_experts": 2, "num_experts_per_tok": 1, "min_expert_capacity": 0}
        least |= {"router_hidden_size": 1, "router_rank": 1, "router_width": 1}
        for name, smallest in least.items():
            if type(getattr(self, name)) is not int or getattr(self, name) < smallest:
                raise ValueError(f"{name} must be an integer of at least {smallest}, got {getattr(self, name)!r}")
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok must not exceed num_experts {self.num_experts}, got {self.num_experts_per_tok}: "
                "a token goes through an expert once"
            )

    def _check_choices(self) -> None:
        if self.router_type not in ROUTER_TYPES:
            raise ValueError(f"router_type must be one of {ROUTER_TYPES}, got {self.router_type!r}")
        if self.second_choice_noise not in NOISE_MODES:
            raise ValueError(f"second_choice_noise must be one of {NOISE_MODES}, got {self.second_choice_noise!r}")
        if self.second_choice_noise != "never" and self.num_experts_per_tok != 2:
            raise ValueError(
                f"second_choice_noise {self.second_choice_noise!r} needs num_experts_per_tok 2, got "
                f"{self.num_experts_per_tok}: published code has noise on the second of two choices alone"
            )
        for name in ("normalize_expert_weights", "count_padding", "output_router_logits"):
            allowed = (True, False, None) if name == "normalize_expert_weights" else (True, False)
            if not any(getattr(self, name) is value for value in allowed):
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")

    def _checked_expert_layers(self) -> list[int]:
        layers, num_layers = self.moe_layers, self.text_config.num_hidden_layers
        is_list = isinstance(layers, list | tuple) and len(layers) > 0
        wrong = [one for one in layers if type(one) is not int or not 0 <= one < num_layers] if is_list else [layers]
        if wrong or len(set(layers)) != len(layers):
            raise ValueError(
                f"moe_layers must be distinct layer numbers in [0, {num_layers}), at least one, got {layers!r:.120}; "
                f"the language model has {num_layers} layers"
            )
        return sorted(layers)


__all__ = ["MoeLlavaConfig"]
