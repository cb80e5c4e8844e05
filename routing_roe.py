"""What a route is made of: segments, positions and decisions.

Pure tensor functions first, then `Routing`: one forward pass's routing, the object that travels to the decoder layers
as a keyword. How training decides stands in `phases_roe.py`.

B batch, L decoder layers, R routing tokens (1 image + turns), T turns, S sequence, D hidden, P head size.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .cache_roe import LayerRows
from .phases_roe import RoutingPhase, path_weights

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


def check_segments_cover(segments: Tensor, length: int) -> None:
    """Check that segments (B, S') are those of a whole conversation of S tokens, answers included.

    TRL makes segments of left-padded prompts, then appends completions and moves rows to the left: the question of a
    short prompt would reach into its answer.

    Raises: ValueError if they are not.
    """
    if segments.shape[1] < length:
        raise ValueError(
            f"routing_segments cover {segments.shape[1]} of {length} tokens to learn from: were they made of the "
            "prompts alone (TRL with prompt/completion rows)? Give rows of `messages` (and assistant_only_loss=True)"
        )


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
    Raises: ValueError for another mode, or a mask of another shape.
    """
    if mode not in ("preceding", "first", "spread"):  # set after the configuration was checked
        raise ValueError(f"routing_positions must be 'preceding', 'first' or 'spread', got {mode!r}")
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask must be 2D (B, S) to find where rows begin, got shape {tuple(attention_mask.shape)}; with "
            "a custom 4D mask pin the route with routes="
        )
    first = torch.zeros_like(position_ids[:, :1])
    if attention_mask is not None:
        first = (attention_mask != 0).long().argmax(dim=1, keepdim=True).to(position_ids.device)
    start = position_ids.gather(1, first)
    number = torch.arange(num_tokens, device=position_ids.device)
    if mode == "first":
        return (start + 1).expand(-1, num_tokens)
    return start + (number.clamp(max=1) - 2 if mode == "preceding" else number - num_tokens)


# ----------------------------------------------------------------------------------------------- checked user options


def as_numbers(name: str, value, dtype: torch.dtype | None = None) -> Tensor:
    """A routing argument as a tensor on the host: every look at it on a device would be a copy.

    Raises: ValueError if it holds anything but numbers.
    """
    try:
        numbers = torch.as_tensor(value, dtype=dtype, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must hold numbers, in rows of one length, got {value!r:.80}") from error
    if numbers.is_complex():
        raise ValueError(f"{name} must hold real numbers, got {value!r:.80}")
    return numbers


def check_request(request: dict) -> None:
    """Raises: ValueError if a route is pinned and a decision shifted at once: no router would see the bias."""
    if request["routes"] is not None and request["route_bias"] is not None:
        raise ValueError("routes pins the route, so route_bias would do nothing: give one of them")


def checked_routes(routes, batch_size: int, num_layers: int, always_run: Sequence[int] = ()) -> Tensor:
    """`routes=` as a (B, L) bool tensor on the host; one row of L values serves the whole batch.

    Raises: ValueError for another shape, values other than 0 and 1, or a skipped layer that has no adapter.
    """
    routes = as_numbers("routes", routes)
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


def checked_route_bias(
    route_bias, batch_size: int, num_layers: int, always_run: Sequence[int] = (), device: torch.device | str = "cpu"
) -> list[float] | list[Tensor]:
    """`route_bias=` layer by layer, added to the keep logits; +inf keeps a layer, -inf skips it.

    Returns: L floats, or L tensors (B,) float32 on the device where rows have biases of their own.
    Raises: ValueError for another shape, NaN, or -inf for one of the layers that `always_run` (for all layers at once
        it means every layer that can be skipped).
    """
    if route_bias is None:
        return [0.0] * num_layers
    bias = as_numbers("route_bias", route_bias, torch.float32)
    if bias.shape not in ((), (num_layers,), (1, num_layers), (batch_size, num_layers)):
        raise ValueError(
            f"route_bias must be one number, one per decoder layer ({num_layers}), or one per example and layer "
            f"({batch_size}, {num_layers}), got shape {tuple(bias.shape)}"
        )
    if bias.isnan().any():
        raise ValueError("route_bias holds NaN")
    lost = [layer for layer in always_run if bias.dim() and bool((bias[..., layer] == -math.inf).any())]
    if lost:
        raise ValueError(f"route_bias skips layers {lost}, which have no router (config.routed_layers leaves them out)")
    if bias.dim() == 2 and batch_size > 1:
        return list(bias.expand(batch_size, -1).to(device, non_blocking=True).unbind(1))
    return bias.flatten().expand(num_layers).tolist()


# --------------------------------------------------------------------------------------- routing of one forward pass


class Routing:
    """Routing of one forward pass: what was asked, what the layers read, what they decided.

    A plain object that travels as a keyword to every decoder layer: FSDP2 copies dataclasses, and accelerate dicts, and
    what a layer writes into a copy is lost. Layers write by layer index and never append, so that recomputing a layer
    (gradient checkpointing) changes nothing.

    Attributes:
        rows: per layer, which rows run it (`None` until decided, or where training runs both paths for all rows; fixed
            beforehand when decoding or pinned).
        states: (B, R, D) routing tokens entering layer i at index i, the last layer's output at index L; `None` where
            no routing token runs (decoding, pinned routes).
        visible: (B, R, S + R) bool, the tokens a routing token reads, itself included.
        joined: ordinary and routing tokens (B, S + R, D) as the last layer left them, and its view of the former.
        position_embeddings: rotary (cos, sin) of ordinary and routing tokens, each (B, S + R, P).
        route_bias: per layer, what the caller adds to its keep logit, a float or a tensor (B,).
        own_bias: per layer, what the model adds (`config.route_bias`).
        routes: (B, L) bool where they are known as a tensor.
        logits: per layer, raw router logits: (B, 2) at inference, (B, T, 2) in training.
        phase, turns, turn_mask, weights: training only. `turns` (B, S + R) turn of every token, routing tokens last,
            `turn_mask` (B, T) which turns exist, `weights` per layer (B, 1 + T, 2).
    """

    def __init__(self, num_layers: int, own_bias: list[float] | None = None):
        self.num_layers = num_layers
        self.rows: list[LayerRows | None] = [None] * num_layers
        self.states: list[Tensor | None] = [None] * (num_layers + 1)
        self.joined: tuple[Tensor, Tensor] | None = None
        self.visible: Tensor | None = None
        self.position_embeddings: tuple[Tensor, Tensor] | None = None
        self.route_bias: list[float] | list[Tensor] = [0.0] * num_layers
        self.own_bias = own_bias or [0.0] * num_layers
        self.routes: Tensor | None = None
        self.logits: list[Tensor | None] = [None] * num_layers
        self.phase: RoutingPhase | None = None
        self.turns: Tensor | None = None
        self.turn_mask: Tensor | None = None
        self.weights: list[Tensor | None] = [None] * num_layers

    def decide_on(self, segments: Tensor, route_bias: list, question: str) -> None:
        """Inference: one pair of routing tokens reads these segments (B, S); routers decide, shifted by the bias."""
        self.route_bias = route_bias
        self.visible = with_itself(inference_visibility(segments, question))

    def train_on(self, segments: Tensor, phase: RoutingPhase) -> None:
        """Training: one text token per turn; both paths, weighted as the phase says."""
        self.phase = phase
        self.visible = with_itself(training_visibility(segments))
        # Routing token t moves with turn t; the image token, number 0, with the context.
        own = torch.arange(self.visible.shape[1], device=segments.device).expand(segments.shape[0], -1)
        self.turns = torch.cat([turns_of_tokens(segments), own], dim=1)
        num_turns = segments.amax(dim=1, keepdim=True).clamp(min=1)
        self.turn_mask = torch.arange(1, self.visible.shape[1], device=segments.device) <= num_turns

    def place(self, tokens: Tensor) -> None:
        """Routing tokens (B, R, D) that enter layer 0; detached where they do not learn, to save its backward pass."""
        is_learning = not self.is_soft or self.phase.teaches_routers
        self.states[0] = tokens if is_learning else tokens.detach()

    def weigh(self, logits: Tensor, layer: int) -> Tensor:
        """Training: a layer's path weights (B, 1 + T, 2) from its raw router logits (B, T, 2); keeps both."""
        shifted = logits + logits.new_tensor([self.own_bias[layer], 0.0])
        weights = path_weights(shifted, self.turn_mask.to(logits.device), self.phase, layer)
        self.logits[layer], self.weights[layer] = logits, weights
        if self.phase.leaves_out:
            self.rows[layer] = self.needed_rows(weights)
        return weights

    def needed_rows(self, weights: Tensor) -> LayerRows:
        """Training: the rows of which some token takes a layer's full path, from its path weights (B, 1 + T, 2)."""
        exists = nn.functional.pad(self.turn_mask.to(weights.device), (1, 0), value=True)
        needed = ((weights[..., 0] > 0) & exists).any(dim=1).tolist()
        if self.phase.at_least_one and not any(needed):
            needed[0] = True
        return LayerRows(needed, weights.device)

    def join(self, hidden_states: Tensor, layer: int) -> Tensor:
        """(B, S + R, D): the ordinary tokens that enter a layer, its routing tokens behind them."""
        if self.joined is not None and self.joined[1] is hidden_states:
            return self.joined[0]  # nothing came between the layers: no copy
        return torch.cat([hidden_states, self.states[layer].to(hidden_states)], dim=1)

    def split(self, tokens: Tensor, layer: int) -> Tensor:
        """(B, S, D): a layer's ordinary tokens; its routing tokens go to the next layer."""
        num_tokens = self.visible.shape[1]
        # One operation: the gradients of two cuts would be as large as the whole each, and added up.
        hidden_states, self.states[layer + 1] = tokens.split([tokens.shape[1] - num_tokens, num_tokens], dim=1)
        if not self.is_soft:  # in training a checkpointed layer runs again later, when this is another layer's
            self.joined = tokens, hidden_states
        return hidden_states

    @property
    def is_soft(self) -> bool:
        """Whether both paths are mixed (training)."""
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
        always = torch.full_like(known, math.inf)
        always[..., 1] = -math.inf
        return torch.stack([always if one is None else one.to(known.device) for one in logits], dim=-2)

    def decided_routes(self, device: torch.device) -> Tensor | None:
        """(B, L) bool routes the rows took; `None` in soft training, where no layer is left out."""
        if self.is_soft:
            return None
        if self.routes is None:
            self.routes = torch.tensor([rows.keep for rows in self.rows]).t().contiguous().to(device, non_blocking=True)
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


def new_routing(config) -> Routing:
    """For one forward pass of a model with this configuration.

    Raises: ValueError if its `route_bias`, set after it was checked, has not a number per layer.
    """
    num_layers, bias = config.text_config.num_hidden_layers, config.route_bias
    if bias is not None and len(bias) != num_layers:
        raise ValueError(f"config.route_bias must be {num_layers} numbers, one per decoder layer, got {len(bias)}")
    return Routing(num_layers, bias)


__all__ = ["Routing"]
