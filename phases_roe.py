"""How training decides, and its loss: `RoutingPhase`, what it makes of router logits, and `roe_loss`.

B batch, L decoder layers, T turns, S sequence, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


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
        mode: `"random"` (hard decisions from uniform draws; routers get no gradient), `"soft"` (softmax mixture),
            `"hard"` (argmax forward, softmax gradient: straight-through), `"given"` (decisions of `routes`; routers
            answer, but nothing hangs on it) or `"decided"` (argmax; routers get no gradient).
        temperature: divides the logits, > 0; not read by `"random"`.
        keep_bias: added to the keep logit or draw. 1 - sqrt(2 r) makes `"random"` skip a share r.
        gumbel: add Gumbel noise to the logits of `"hard"`.
        draws: where `"random"` and `gumbel` get random numbers: called with a layer's index and its (B, T, 2) logits,
            returns that shape, uniform in [0, 1); e.g. `SeededDraws(0)`. Has to answer the same when gradient
            checkpointing asks again. `None`: torch's global generator.
        routes: of `"given"`: (B, T, L) bool, True where a turn runs the layer.
        at_least_one: every layer runs for one row or more: where its weights are sharded over processes, which wait for
            each other when it runs, and where they learn, so that Adam counts a step of them.
    """

    mode: str = "soft"
    temperature: float = 1.0
    keep_bias: float = 0.0
    gumbel: bool = False
    draws: Callable[[int, Tensor], Tensor] | None = None
    routes: Tensor | None = None
    at_least_one: bool = False

    def __post_init__(self):
        if self.mode not in ("random", "soft", "hard", "given", "decided"):
            raise ValueError(f"mode must be 'random', 'soft', 'hard', 'given' or 'decided', got {self.mode!r}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")

    @property
    def leaves_out(self) -> bool:
        """Whether no gradient needs the path that is not taken, so that rows without a token in a layer skip it."""
        return self.mode in ("random", "given", "decided")

    @property
    def teaches_routers(self) -> bool:
        """Whether a gradient reaches the routers, and the routing tokens through them."""
        return self.mode not in ("random", "decided")


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
    if phase.mode == "given":
        return given_weights(logits, turn_mask, phase, layer)
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
    if phase.mode not in ("hard", "decided"):
        return weights
    hard = nn.functional.one_hot((weights[..., 1] >= weights[..., 0]).long(), 2).to(weights.dtype)
    # The bracket is exactly 0: one-hot without rounding.
    return hard if phase.mode == "decided" else hard + (weights - weights.detach())


def given_weights(logits: Tensor, turn_mask: Tensor, phase: RoutingPhase, layer: int) -> Tensor:
    """`path_weights` of `phase.routes`; the context keeps the layer where at least half of the turns do.

    Raises: ValueError if there are no routes, or not one for every turn of the batch.
    """
    shape = None if phase.routes is None else tuple(phase.routes.shape)
    if shape is None or len(shape) != 3 or shape[:2] != tuple(logits.shape[:2]) or layer >= shape[2]:
        raise ValueError(
            f"mode 'given' needs routes of shape (B, T, L) = ({logits.shape[0]}, {logits.shape[1]}, more than {layer}),"
            f" got {shape}; were they made for another batch?"
        )
    keep, valid = phase.routes[..., layer].to(logits), turn_mask.to(logits)
    context = ((keep * valid).sum(dim=1, keepdim=True) >= valid.sum(dim=1, keepdim=True) / 2).to(keep)
    keep = torch.cat([context, keep], dim=1)
    return torch.stack([keep, 1 - keep], dim=-1)


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


__all__ = ["RoutingPhase", "SeededDraws", "roe_loss"]
