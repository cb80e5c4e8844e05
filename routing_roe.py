"""What a route is made of: segments, positions, the attention of routing tokens, decisions and their training.

Pure tensor functions first, then `RoutingPhase` (how training decides), `Routing` (one forward pass's routing, the
object that travels to the decoder layers as a keyword) and `RoutingAttention` (routing tokens attend apart from the
others).

B batch, L decoder layers, R routing tokens (1 image + turns), T turns, S sequence, D hidden, H heads, P head size.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from .cache_roe import LayerRows

# ------------------------------------------------------------------------------------------------ segments and turns


def default_segments(image_mask: Tensor | None, attention_mask: Tensor, labels: Tensor | None = None) -> Tensor:
    """Routing segments when the caller gives none: context up to the last image token, the rest is the question.

    Args:
        image_mask: (B, S) bool, True on image tokens; `None` if there is no image.
        attention_mask: (B, S) bool, False on padding.
        labels: (B, S), -100 where there is no target. With labels, labelled tokens are answers (segment -1) and each
            stretch between answers is the question of one more turn; what follows the last answer belongs to no turn.
    Returns: (B, S) int64: 0 context, t >= 1 question of turn t, -1 read by no routing token.
    """
    places = torch.arange(1, attention_mask.shape[1] + 1, device=attention_mask.device)
    context_length = 0 if image_mask is None else (image_mask * places).amax(dim=1, keepdim=True)
    question = (places > context_length) & attention_mask
    segments = question.long().masked_fill(~attention_mask, -1)
    if labels is None:
        return segments
    answer = (labels != -100) & question
    answer_ends = answer & ~nn.functional.pad(answer, (0, 1))[:, 1:]
    turns = 1 + nn.functional.pad(answer_ends.cumsum(dim=1), (1, 0))[:, :-1]
    num_turns = answer_ends.sum(dim=1, keepdim=True).clamp(min=1)
    unread = answer | (question & (turns > num_turns))
    return torch.where(question, turns, segments).masked_fill(unread, -1)


def pad_segments(segments: Tensor, length: int) -> Tensor:
    """Segments (B, S') for S >= S' tokens: tokens behind the prompt (drafts, generated ones) are in no segment.

    Raises: ValueError if there are more segments than tokens.
    """
    missing = length - segments.shape[1]
    if missing < 0:
        raise ValueError(
            f"routing_segments cover {segments.shape[1]} tokens, the input has {length}; were they made for this input?"
        )
    return nn.functional.pad(segments, (0, missing), value=-1)


def inference_visibility(segments: Tensor, question: str = "last_turn") -> Tensor:
    """What the pair of routing tokens reads at inference, besides itself: (B, 2, S) bool (image token, text token).

    Args:
        segments: (B, S) routing segments.
        question: `"last_turn"`: the last turn's question. `"all_text"`: everything from the first question token to
            the last, padding excluded.
    """
    if question not in ("last_turn", "all_text"):  # set after the configuration was checked
        raise ValueError(f"routing_question must be 'last_turn' or 'all_text', got {question!r}")
    if question == "last_turn":
        last_turn = segments.amax(dim=1, keepdim=True).clamp(min=1)
        text = segments == last_turn
    else:
        asked = segments >= 1
        seen_before, seen_after = asked.cumsum(dim=1) > 0, asked.flip(1).cumsum(dim=1).flip(1) > 0
        text = seen_before & seen_after & (segments != 0)
    return torch.stack([segments == 0, text], dim=1)


def training_visibility(segments: Tensor) -> Tensor:
    """As `inference_visibility`, with one text token per turn: (B, 1 + T, S) bool, T = max(1, turns in the batch)."""
    num_turns = max(1, int(segments.max()))
    return segments[:, None, :] == torch.arange(num_turns + 1, device=segments.device)[None, :, None]


def with_itself(visible: Tensor) -> Tensor:
    """(B, R, S + R): a routing token reads itself beside the ordinary tokens in `visible` (B, R, S), no other one."""
    itself = torch.eye(visible.shape[1], dtype=torch.bool, device=visible.device)
    return torch.cat([visible, itself.expand(visible.shape[0], -1, -1)], dim=-1)


def turns_of_tokens(segments: Tensor) -> Tensor:
    """(B, S) turn whose decision moves a token: the latest question at or before it, 0 in the context."""
    return segments.clamp(min=0).cummax(dim=1).values


def routing_position_ids(position_ids: Tensor, attention_mask: Tensor | None, num_tokens: int, mode: str) -> Tensor:
    """(B, R) positions of the routing tokens, relative to each row's first real token, so padding does not move them.

    Args:
        position_ids: (B, S) positions of the ordinary tokens.
        attention_mask: (B, S), 0 on padding, or `None`.
        num_tokens: R.
        mode: `config.routing_positions`.
    """
    if mode not in ("preceding", "first", "spread"):  # set after the configuration was checked
        raise ValueError(f"routing_positions must be 'preceding', 'first' or 'spread', got {mode!r}")
    first = torch.zeros_like(position_ids[:, :1])
    if attention_mask is not None:
        first = (attention_mask != 0).long().argmax(dim=1, keepdim=True).to(position_ids.device)
    start = position_ids.gather(1, first)
    offsets = {
        "preceding": [-2] + [-1] * (num_tokens - 1),
        "first": [1] * num_tokens,
        "spread": list(range(-num_tokens, 0)),
    }[mode]
    return start + torch.tensor(offsets, device=position_ids.device)


# ----------------------------------------------------------------------------------------------- checked user options


def checked_routes(routes, batch_size: int, num_layers: int, always_run: Sequence[int], device) -> Tensor:
    """`routes=` as a (B, L) bool tensor; one row of L values serves the whole batch.

    Raises: ValueError for another shape, values other than 0 and 1, or a skipped layer that has no adapter.
    """
    routes = torch.as_tensor(routes, device=device)
    if routes.dtype != torch.bool:
        if not bool(((routes == 0) | (routes == 1)).all()):
            raise ValueError("routes must be bool (or 0 and 1): True where the layer runs; did you pass router logits?")
        routes = routes.bool()
    if routes.shape not in ((num_layers,), (1, num_layers), (batch_size, num_layers)):
        raise ValueError(
            f"routes must have shape ({batch_size}, {num_layers}), one row per example and one column per decoder "
            f"layer, got {tuple(routes.shape)}"
        )
    routes = routes.expand(batch_size, num_layers).clone()
    lost = [layer for layer in always_run if not bool(routes[:, layer].all())]
    if lost:
        raise ValueError(f"routes skip layers {lost}, which have no adapter (config.routed_layers leaves them out)")
    return routes


def checked_route_bias(route_bias, num_layers: int) -> list[float]:
    """`route_bias=` as one float per layer, added to the keep logit; +inf keeps the layer, -inf skips it.

    Raises: ValueError for another number of values or NaN.
    """
    values = torch.as_tensor(0.0 if route_bias is None else route_bias, dtype=torch.float64).tolist()
    values = [values] * num_layers if isinstance(values, float) else values
    if len(values) != num_layers or not all(isinstance(value, float) for value in values):
        raise ValueError(f"route_bias must be one number or one per decoder layer ({num_layers}), got {route_bias!r}")
    if any(math.isnan(value) for value in values):
        raise ValueError("route_bias holds NaN")
    return values


# --------------------------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class SeededDraws:
    """Random numbers for `RoutingPhase.draws` that depend on seed, layer and shape alone, not on global state.

    Every pass gets the same ones, on every device and when gradient checkpointing runs a layer again; so losses of two
    models can be compared under the same random decisions. In training, take another seed for every batch.
    """

    seed: int

    def __call__(self, layer: int, like: Tensor) -> Tensor:
        """Uniform in [0, 1), shaped like `like`."""
        generator = torch.Generator().manual_seed(self.seed * 4096 + layer)  # only the lowest 32 bits count
        return torch.rand(like.shape, generator=generator)


@dataclass(frozen=True)
class RoutingPhase:
    """How layers are chosen while training; a schedule replaces it as the run advances.

    Attributes:
        mode: `"random"` (hard decisions from uniform draws; routers get no gradient), `"soft"` (softmax mixture) or
            `"hard"` (argmax forward, softmax gradient: straight-through).
        temperature: divides the logits, > 0; not read by `"random"`.
        keep_bias: added to the keep logit or draw. 1 - sqrt(2 r) makes `"random"` skip a share r.
        gumbel: add Gumbel noise to the logits of `"hard"`.
        draws: where `"random"` and `gumbel` get random numbers: called with a layer's index and its (B, T, 2) logits,
            returns that shape, uniform in [0, 1); e.g. `SeededDraws(0)`. Has to answer the same when gradient
            checkpointing asks again. `None`: torch's global generator.
    """

    mode: str = "soft"
    temperature: float = 1.0
    keep_bias: float = 0.0
    gumbel: bool = False
    draws: Callable[[int, Tensor], Tensor] | None = None

    def __post_init__(self):
        if self.mode not in ("random", "soft", "hard"):
            raise ValueError(f"mode must be 'random', 'soft' or 'hard', got {self.mode!r}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")


def uniform_draws(layer: int, like: Tensor, phase: RoutingPhase) -> Tensor:
    """Uniform random numbers in [0, 1) shaped like `like`, from `phase.draws` or torch's global generator.

    Raises: ValueError if `phase.draws` answers with another shape.
    """
    if phase.draws is None:
        return torch.rand_like(like)
    draws = phase.draws(layer, like)
    if draws.shape != like.shape:
        raise ValueError(
            f"draws returned shape {tuple(draws.shape)} for layer {layer}, expected (B, T, 2) = {tuple(like.shape)}; "
            "were they made for another batch?"
        )
    return draws.to(like)


def path_weights(logits: Tensor, turn_mask: Tensor, phase: RoutingPhase, layer: int = 0) -> Tensor:
    """Weights of the full and the skip path for the context and every turn (RoE, section 3; stages as in `phase`).

    The context has no router input of its own: it takes the mean of the turns' (biased) logits or draws.

    Args:
        logits: (B, T, 2) raw router logits, keep first.
        turn_mask: (B, T) bool, the turns an example really has.
        phase: how to turn them into weights.
        layer: index of the layer, for `phase.draws`.
    Returns: (B, 1 + T, 2) weights that sum to 1; row 0 is the context.
    """
    scores = uniform_draws(layer, logits, phase) if phase.mode == "random" else logits
    if phase.mode == "hard" and phase.gumbel:
        # -log of a uniform number is exponential; torch's own never is 0.
        drawn = -uniform_draws(layer, logits, phase).log() if phase.draws else torch.empty_like(scores).exponential_()
        scores = scores - drawn.clamp(min=1e-30).log()
    scores = scores + scores.new_tensor([phase.keep_bias, 0.0])
    valid = turn_mask[..., None].to(scores.dtype)
    context = (scores * valid).sum(dim=1, keepdim=True) / valid.sum(dim=1, keepdim=True)
    scores = torch.cat([context, scores], dim=1)
    # 1000 makes the draws' softmax hard, as in the published warm-up.
    weights = torch.softmax(scores * 1000.0 if phase.mode == "random" else scores / phase.temperature, dim=-1)
    if phase.mode != "hard":
        return weights
    hard = nn.functional.one_hot((weights[..., 1] >= weights[..., 0]).long(), 2).to(weights.dtype)
    return hard + (weights - weights.detach())  # the bracket is exactly 0: one-hot without rounding


def token_loss_per_example(logits: Tensor, labels: Tensor) -> Tensor:
    """(B,) mean next-token cross entropy over an example's labelled tokens, in nats; 0 where it has none.

    Args:
        logits: (B, S, V).
        labels: (B, S), -100 where there is no target.
    """
    targets = labels[:, 1:].to(logits.device)
    losses = nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), targets, reduction="none")
    return losses.sum(dim=1) / (targets != -100).sum(dim=1).clamp(min=1)


def sparsity_penalty(skip_share: Tensor, target: float) -> Tensor:
    """(B,) penalty max(0, target - share) for skipping too little (RoE, structure sparsity regularisation).

    Args:
        skip_share: (B,) mean skip weight over layers and turns, in [0, 1].
        target: wanted share in [0, 1]; 0 turns the penalty off.
    """
    return (target - skip_share).clamp(min=0)


def roe_loss(logits: Tensor, labels: Tensor, skip_share: Tensor, target: float) -> Tensor:
    """Training loss of RoE: mean over labelled examples of CE + stopgrad(exp(-5 CE)) * max(0, target - skip share).

    Args:
        logits: (B, S, V).
        labels: (B, S), -100 where there is no target; a row without any is left out of the mean.
        skip_share: (B,) mean skip weight over layers and turns.
        target: wanted skip share.
    Returns: scalar.
    """
    token_loss = token_loss_per_example(logits, labels)
    losses = token_loss + torch.exp(-5 * token_loss).detach() * sparsity_penalty(skip_share, target)
    labelled = (labels[:, 1:] != -100).any(dim=1).to(losses)
    return (losses * labelled).sum() / labelled.sum().clamp(min=1)


# --------------------------------------------------------------------------------------- routing of one forward pass


@dataclass
class Routing:
    """Routing of one forward pass: what was asked, what the layers read, what they decided.

    A plain object that travels as a keyword to every decoder layer. Layers write by layer index and never append, so
    that recomputing a layer (gradient checkpointing) changes nothing.

    Attributes:
        rows: per layer, which rows run it (`None` until decided; fixed beforehand when decoding or pinned).
        states: (B, R, D) routing tokens entering layer i at index i, the last layer's output at index L; `None` where
            no routing token runs (decoding, pinned routes).
        visible: (B, R, S + R) bool, the tokens a routing token reads, itself included.
        position_embeddings: rotary (cos, sin) of ordinary and routing tokens, each (B, S + R, P).
        route_bias: one float per layer.
        logits: per layer, raw router logits: (B, 2) at inference, (B, T, 2) in training.
        phase, turns, turn_mask, weights: training only. `turns` (B, S) turn of every ordinary token, `turn_mask`
            (B, T) which turns exist, `weights` per layer (B, 1 + T, 2).
    """

    num_layers: int
    rows: list[LayerRows | None] = field(default_factory=list)
    states: list[Tensor | None] = field(default_factory=list)
    visible: Tensor | None = None
    position_embeddings: tuple[Tensor, Tensor] | None = None
    route_bias: list[float] = field(default_factory=list)
    routes: Tensor | None = None
    logits: list[Tensor | None] = field(default_factory=list)
    phase: RoutingPhase | None = None
    turns: Tensor | None = None
    turn_mask: Tensor | None = None
    weights: list[Tensor | None] = field(default_factory=list)

    def __post_init__(self):
        self.rows = self.rows or [None] * self.num_layers
        self.states = [None] * (self.num_layers + 1)
        self.logits = [None] * self.num_layers
        self.weights = [None] * self.num_layers
        self.route_bias = self.route_bias or [0.0] * self.num_layers

    def decide_on(self, segments: Tensor, route_bias, question: str) -> None:
        """Inference: one pair of routing tokens reads these segments (B, S); routers decide, shifted by the bias."""
        self.route_bias = checked_route_bias(route_bias, self.num_layers)
        self.visible = with_itself(inference_visibility(segments, question))

    def train_on(self, segments: Tensor, phase: RoutingPhase) -> None:
        """Training: one text token per turn; both paths run, weighted as the phase says."""
        self.phase = phase
        self.visible, self.turns = with_itself(training_visibility(segments)), turns_of_tokens(segments)
        num_turns = segments.amax(dim=1, keepdim=True).clamp(min=1)
        self.turn_mask = torch.arange(1, self.visible.shape[1], device=segments.device) <= num_turns

    @property
    def is_soft(self) -> bool:
        """Whether both paths run and are mixed (training)."""
        return self.phase is not None

    def router_logits(self) -> Tensor | None:
        """Raw logits of the deciding (last) turn: (B, L, 2), or `None` if no router ran.

        A layer without a router has +inf to keep and -inf to skip.
        """
        if not self.is_soft:
            return self._of_all_layers(self.logits)
        logits = self.turn_router_logits()
        if logits is None:
            return None
        last = self.turn_mask.sum(dim=1).to(logits.device) - 1
        return logits[torch.arange(logits.shape[0], device=logits.device), last]

    def turn_router_logits(self) -> Tensor | None:
        """Training: raw logits of every turn, (B, T, L, 2); layers without a router as above."""
        return self._of_all_layers(self.logits) if self.is_soft else None

    def _of_all_layers(self, logits: list[Tensor | None]) -> Tensor | None:
        known = next((one for one in logits if one is not None), None)
        if known is None:
            return None
        always = known.new_tensor([math.inf, -math.inf]).expand_as(known)
        return torch.stack([always if one is None else one.to(known.device) for one in logits], dim=-2)

    def decided_routes(self, device: torch.device) -> Tensor | None:
        """(B, L) bool routes the rows took; `None` in soft training, where no layer is left out."""
        if self.is_soft:
            return None
        if self.routes is None:
            self.routes = torch.tensor([rows.keep for rows in self.rows], device=device).t().contiguous()
        return self.routes

    def turn_skip_weights(self) -> Tensor | None:
        """Training: (B, T, L) weight of the skip path per turn; 0 for layers without a router."""
        known = next((weights for weights in self.weights if weights is not None), None)
        if known is None:
            return None
        zero = torch.zeros_like(known[:, 1:, 1])
        return torch.stack([zero if one is None else one[:, 1:, 1].to(known.device) for one in self.weights], dim=-1)

    def skip_share(self) -> Tensor:
        """Training: (B,) mean skip weight over layers and the example's turns (RoE, the s of the sparsity penalty)."""
        weights = self.turn_skip_weights()
        mask = self.turn_mask.to(weights)
        return (weights.mean(dim=-1) * mask).sum(dim=1) / mask.sum(dim=1)


# ------------------------------------------------------------------------------------------ attention of routing tokens


def take_rows(value, rows: Tensor | None, batch_size: int):
    """Rows (`None`: all) of whatever a decoder layer is given: tensors of the batch's size, tuples of them, `None`."""
    if rows is None:
        return value
    if isinstance(value, tuple):
        return tuple(take_rows(item, rows, batch_size) for item in value)
    if value is None or (isinstance(value, Tensor) and value.shape[0] == 1 < batch_size):
        return value  # shared by all rows
    if not isinstance(value, Tensor):
        raise ValueError(
            f"cannot take the rows of a mixed route out of a {type(value).__name__}; "
            "use attn_implementation='sdpa' or 'eager'"
        )
    return value.index_select(0, rows.to(value.device))


def attentions_of_all_rows(attentions: tuple[Tensor, ...], rows: list[LayerRows]) -> tuple[Tensor | None, ...]:
    """L entries: `None` where no row ran the layer, zeros in rows that skipped it."""
    computed, complete = iter(attentions), []
    for layer_rows in rows:
        weights = None if layer_rows is not None and layer_rows.none_kept else next(computed)
        if layer_rows is not None and layer_rows.kept is not None:
            kept = layer_rows.kept.to(weights.device)
            if weights.shape[0] == len(layer_rows.keep):  # a cache that holds all rows had all of them computed
                weights = weights[kept]
            full = weights.new_zeros(len(layer_rows.keep), *weights.shape[1:])
            weights = full.index_copy(0, kept, weights)
        complete.append(weights)
    return tuple(complete)


class RoutingAttention:
    """One layer's attention for the R routing tokens that ride at the end of the sequence.

    Stands where the attention module expects a cache: it keeps the routing tokens' keys and values to itself and hands
    the ordinary ones on, to the real cache if there is one. So ordinary tokens run the base model's kernel on the base
    model's mask and routing tokens leave nothing behind.

    Args:
        cache: the real cache, or `None`.
        visible: (B, R, S + R) bool, tokens a routing token reads: ordinary ones and itself.
    """

    def __init__(self, cache, visible: Tensor):
        self.cache, self.visible, self.num_tokens = cache, visible, visible.shape[1]
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def update(self, keys: Tensor, values: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Take (B, H, S + R, P) keys and values, keep them, return the ordinary ones as the cache does."""
        self.keys, self.values = keys, values
        keys, values = keys[:, :, : -self.num_tokens], values[:, :, : -self.num_tokens]
        return (keys, values) if self.cache is None else self.cache.update(keys, values, layer_idx)

    def attend(self, queries: Tensor, scaling: float) -> Tensor:
        """(B, R, H, P) attention of the routing queries (B, H, R, P) over what they may read and themselves.

        Over the keys as they were given: a static cache answers with its whole length, empty places included.
        """
        mask = self.visible.to(queries.device)[:, None]
        is_grouped = queries.shape[1] != self.keys.shape[1]
        attended = nn.functional.scaled_dot_product_attention(
            queries, self.keys, self.values, attn_mask=mask, scale=scaling, enable_gqa=is_grouped
        )
        return attended.transpose(1, 2)


def attend_apart(module, query, key, value, attention_mask, routing_attention=None, **kwargs):
    """Attention function: the base model's own for ordinary queries, `RoutingAttention` for the last R, if any."""
    name = module.config.base_attn_implementation
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
    if routing_attention is None:
        return attend(module, query, key, value, attention_mask, **kwargs)
    split = query.shape[2] - routing_attention.num_tokens
    ordinary, weights = attend(module, query[:, :, :split], key, value, attention_mask, **kwargs)
    routed = routing_attention.attend(query[:, :, split:], kwargs["scaling"])
    return torch.cat([ordinary, routed.to(ordinary.dtype)], dim=1), weights


AttentionInterface.register("roe_apart", attend_apart)


class RoutedAttentionConfig:
    """What an attention module sees of the language model's config: all of it, but `attend_apart` as its function.

    Reads through to the config, so that `set_attn_implementation` keeps working.
    """

    _attn_implementation = "roe_apart"

    def __init__(self, config):
        self.base_config = config

    @property
    def base_attn_implementation(self) -> str:
        return self.base_config._attn_implementation

    def __getattr__(self, name):
        if name == "base_config":  # not set yet: a copy or a pickle is being made
            raise AttributeError(name)
        return getattr(self.base_config, name)


__all__ = ["Routing", "RoutingAttention", "RoutingPhase", "SeededDraws", "roe_loss"]
