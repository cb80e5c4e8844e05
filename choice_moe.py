"""From router logits to experts: who is chosen, with what weight, who is dropped, and the load balancing loss.

B batch, S sequence, N = B * S tokens, E experts, K experts per token, L decoder layers.
"""

import contextlib
import copy
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .configuration_moe_llava import MoeLlavaConfig


@dataclass
class Choice:
    """What was decided for N tokens.

    Attributes:
        experts: (N, K) int64, best first.
        weights: (N, K) float32, 0 for dropped choices.
        kept: (N, K) bool.
    """

    experts: Tensor
    weights: Tensor
    kept: Tensor


def top_experts(logits: Tensor, num_chosen: int, noise: Tensor | None = None) -> Tensor:
    """(N, K) experts of (N, E) logits, best first; `noise` (N, E) is added for all choices but the first."""
    if noise is None:
        return logits.topk(num_chosen, dim=-1).indices
    first = logits.argmax(dim=-1, keepdim=True)
    others = (logits + noise).scatter(1, first, -torch.inf)
    return torch.cat([first, others.topk(num_chosen - 1, dim=-1).indices], dim=1)


def expert_capacity(num_tokens: Tensor, num_experts: int, num_chosen: int, factor: float, least: int) -> Tensor:
    """() float64: tokens an expert takes, ceil(tokens / E * K * factor), not below `least`."""
    return (num_tokens.double() / num_experts * (num_chosen * factor)).ceil().clamp(min=least)


def kept_in_order(experts: Tensor, counted: Tensor, num_experts: int, capacity: Tensor) -> Tensor:
    """(N, K) bool: choices that find a place when all first ones are seated in token order, then all second ones.

    Args:
        experts: (N, K).
        counted: (N,) bool; others take no place and get none.
        capacity: (), places of an expert.
    """
    wanted = torch.nn.functional.one_hot(experts, num_experts) * counted[:, None, None]  # (N, K, E)
    wanted = wanted.transpose(0, 1).flatten(0, 1)  # all first choices, then all second ones
    places = (wanted.cumsum(0) * wanted).sum(-1)  # from 1; 0 for those that are not counted
    return ((places > 0) & (places <= capacity)).unflatten(0, experts.shape[::-1]).t()


def kept_by_draw(experts: Tensor, counted: Tensor, draws: Tensor, capacity: Tensor) -> Tensor:
    """(N, 1) bool: of the tokens that want an expert, those with the largest draws, as many as it has places.

    Args:
        experts: (N, 1).
        counted: (N,) bool; others take no place and get none.
        draws: (N, E), each in [0, 1).
        capacity: (), places of an expert.
    """
    wants = torch.nn.functional.one_hot(experts[:, 0], draws.shape[1]).bool() & counted[:, None]
    ranks = draws.masked_fill(~wants, -1.0).argsort(dim=0, descending=True, stable=True).argsort(dim=0)
    return ((ranks < capacity) & wants).any(dim=1, keepdim=True)


def expert_weights(logits: Tensor, experts: Tensor, kept: Tensor, normalize: bool) -> Tensor:
    """(N, K) float32: softmax probabilities of the kept choices, divided by their sum where asked for."""
    weights = logits.softmax(dim=-1).gather(1, experts) * kept
    if not normalize:
        return weights
    return weights / weights.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).eps)


def load_balancing_loss(logits: Tensor, first: Tensor, counted: Tensor) -> Tensor:
    """E * sum over experts of F_i G_i (MoE-LLaVA, eq. 7 to 11); 1 when both are even.

    Args:
        logits: (N, E).
        first: (N,) every token's first choice.
        counted: (N,) bool, the tokens that enter; with none of them the loss is 0.
    Returns: () with F_i the share of tokens whose first choice is i and G_i their mean probability of it.
    """
    num_experts, share = logits.shape[1], (counted / counted.sum().clamp(min=1))[:, None]
    chosen = torch.nn.functional.one_hot(first, num_experts).to(logits)
    # Sums and no products of matrices, which autocast would round.
    return num_experts * ((share * chosen).sum(0) * (share * logits.softmax(dim=-1)).sum(0)).sum()


def gumbel_noise(logits: Tensor) -> Tensor:
    """Standard Gumbel noise of a tensor's shape."""
    return -torch.empty_like(logits).exponential_().log()


def uniform_draws(logits: Tensor) -> Tensor:
    """Uniform draws in [0, 1) of a tensor's shape."""
    return torch.rand_like(logits)


class Tokens:
    """What is known of the tokens that a layer reads: N of them, in b rows of s.

    Args:
        shape: (b, s).
        real: (b, s) bool, tokens that are no padding; `None`: all of them, or padding counts.
        is_image: (b, s) bool, tokens that stand for parts of an image; `None` where no router asks.
        rows: (b,) int64, the rows of the batch that they are; `None` for all.
        num_added: tokens at the end of each row that the batch does not have. They are text, enter no loss, take no
            capacity, and nothing is told of them.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        real: Tensor | None,
        is_image: Tensor | None,
        rows: Tensor | None = None,
        num_added: int = 0,
    ):
        self.shape, self.real, self.is_image, self.rows, self.num_added = shape, real, is_image, rows, num_added
        self._flat, self._numbers = None if is_image is None else is_image.flatten(), (None, None)
        # Counted once. How many there are is not known to a compiled graph: there every token does both.
        if is_image is not None and not torch.compiler.is_compiling():
            self._numbers = self._flat.nonzero()[:, 0], (~self._flat).nonzero()[:, 0]

    def of_rows(self, rows: Tensor | None, num_added: int) -> "Tokens":
        """Those of some of the rows, on the device of `rows`, with others added behind."""

        def taken(known: Tensor | None) -> Tensor | None:
            if known is None:
                return None
            return nn.functional.pad(known if rows is None else known.to(rows.device)[rows], (0, num_added))

        size, length = self.shape if rows is None else (len(rows), self.shape[1])
        real = taken(self.real)
        if real is None and num_added:  # those that are added are to be told apart
            real = nn.functional.pad(torch.ones(size, length, dtype=torch.bool), (0, num_added))
        return Tokens((size, length + num_added), real, taken(self.is_image), rows, num_added)

    def counted(self, padding: bool) -> Tensor | None:
        """(N,) bool: tokens that count, where padding does or does not; `None` for all."""
        if self.real is None or (padding and not self.num_added):
            return None
        if not padding:
            return self.real.flatten()
        length = torch.arange(self.shape[1], device=self.real.device) < self.shape[1] - self.num_added
        return length.repeat(self.shape[0])

    def images(self, device: torch.device) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(N,) bool, image tokens; int64 numbers of these and of all others, if counted. On a layer's device."""
        return tuple(None if one is None else one.to(device) for one in (self._flat, *self._numbers))

    def of_batch(self, found: Tensor, batch_size: int, nothing: float) -> Tensor:
        """What was found (N, X) as (B, S, X), for the batch's tokens; `nothing` in rows that are not among these."""
        found = found.unflatten(0, self.shape)[:, : self.shape[1] - self.num_added]
        if self.rows is None:
            return found
        return found.new_full((batch_size, *found.shape[1:]), nothing).index_copy(0, self.rows.to(found.device), found)


class ExpertRouting:
    """What one forward pass knows of its tokens, and what its layers decided; handed to them as a keyword.

    A plain object and no dict, which accelerate would copy on its way.

    Args:
        config: of the model; read at every pass.
        training: whether the model is in training mode.
        tokens: of the batch.
        single_expert: the one that all tokens go through; `None`: routers decide.
    Raises: ValueError if there is no such expert.
    """

    def __init__(self, config: MoeLlavaConfig, training: bool, tokens: Tokens, single_expert: int | None = None):
        if single_expert is not None and (
            type(single_expert) is not int or not 0 <= single_expert < config.num_experts
        ):
            raise ValueError(
                f"single_expert must be an integer in [0, {config.num_experts}), or None for routers to decide, got "
                f"{single_expert!r}"
            )
        self.config, self.training, self.tokens, self.single_expert = config, training, tokens, single_expert
        # By layer, written and never appended: under gradient checkpointing a layer runs twice.
        self.logits: dict[int, Tensor] = {}
        self.choices: dict[int, Choice] = {}
        self.read: dict[int, Tokens] = {}

    def of_rows(self, rows: Tensor | None, num_added: int) -> "ExpertRouting":
        """The same pass for a layer that reads other tokens than the batch has; what it decides is written down here.

        Args: as in `Tokens`.
        """
        if rows is None and not num_added:
            return self
        part = copy.copy(self)
        part.tokens = self.tokens.of_rows(rows, num_added)
        return part

    def counted(self, logits: Tensor, tokens: Tokens) -> Tensor:
        """(N,) bool: tokens that enter the loss and take capacity."""
        counted = tokens.counted(padding=self.config.count_padding)
        return torch.ones_like(logits[:, 0], dtype=torch.bool) if counted is None else counted.to(logits.device)

    def choose(self, logits: Tensor, layer_idx: int) -> Choice:
        """The experts of a layer's tokens, written down under its number."""
        config = self.config
        is_noisy = config.second_choice_noise == "always" or (self.training and config.second_choice_noise != "never")
        noise = gumbel_noise(logits.detach()) if is_noisy else None
        experts = top_experts(logits.detach(), config.num_experts_per_tok, noise)
        kept = torch.ones_like(experts, dtype=torch.bool)
        if self.training and config.expert_capacity_factor is not None:
            kept = self.seated(logits.detach(), experts)
        weights = expert_weights(logits, experts, kept, config.normalizes_weights())
        self.logits[layer_idx], self.choices[layer_idx] = logits, Choice(experts, weights, kept)
        self.read[layer_idx] = self.tokens
        return self.choices[layer_idx]

    def seated(self, logits: Tensor, experts: Tensor) -> Tensor:
        """(N, K) bool: the choices that are within capacity."""
        config, (num_experts, num_chosen) = self.config, (logits.shape[1], experts.shape[1])
        counted = self.counted(logits, self.tokens)
        factor, least = config.expert_capacity_factor, config.min_expert_capacity
        capacity = expert_capacity(counted.sum(), num_experts, num_chosen, factor, least)
        if num_chosen == 1:
            return kept_by_draw(experts, counted, uniform_draws(logits), capacity)
        return kept_in_order(experts, counted, num_experts, capacity)

    def aux_loss(self, device: torch.device) -> Tensor:
        """() load balancing loss, summed over the layers that chose."""
        losses = [
            load_balancing_loss(one, self.choices[layer].experts[:, 0], self.counted(one, self.read[layer])).to(device)
            for layer, one in sorted(self.logits.items())
        ]
        return torch.stack(losses).sum() if losses else torch.zeros((), device=device)  # a single expert: no choice

    def by_row(self, device: torch.device) -> dict[str, tuple[Tensor, ...]]:
        """Logits (B, S, E), experts and weights (B, S, K) of every layer with experts, as the outputs name them.

        In rows that did not run a layer they are NaN, -1 and 0; `device` is for layers that no row ran.
        """
        if self.single_expert is not None:
            return {"router_logits": (), "expert_indices": (), "expert_weights": ()}
        config, choices = self.config, self.choices
        found = {
            "router_logits": (self.logits, config.num_experts, torch.nan),
            "expert_indices": ({layer: one.experts for layer, one in choices.items()}, config.num_experts_per_tok, -1),
            "expert_weights": ({layer: one.weights for layer, one in choices.items()}, config.num_experts_per_tok, 0.0),
        }

        def of_layer(layer: int, by_layer: dict[int, Tensor], width: int, nothing: float) -> Tensor:
            if layer in by_layer:
                return self.read[layer].of_batch(by_layer[layer], self.tokens.shape[0], nothing)
            return torch.full((*self.tokens.shape, width), nothing, device=device)

        return {name: tuple(of_layer(i, *one) for i in config.expert_layers()) for name, one in found.items()}


_CURRENT: ContextVar[ExpertRouting | None] = ContextVar("expert_routing", default=None)


@contextlib.contextmanager
def routing_of_layer(routing: ExpertRouting) -> Iterator[None]:
    """While a stock layer runs, what its MLP asks for: the stock forward has no argument to hand it on."""
    token = _CURRENT.set(routing)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def current_routing() -> ExpertRouting:
    """Raises: ValueError outside of a layer."""
    routing = _CURRENT.get()
    if routing is None:
        raise ValueError(
            "a block of experts needs `expert_routing`; call the whole model, MoeLlavaForConditionalGeneration or RoE's"
        )
    return routing


__all__ = [
    "Choice",
    "ExpertRouting",
    "Tokens",
    "current_routing",
    "load_balancing_loss",
    "routing_of_layer",
    "top_experts",
]
