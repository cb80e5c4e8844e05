"""What RoE training minimises: the published loss, mended or as it was, and one that spends a budget over a batch.

B batch, T turns, L decoder layers, S sequence, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..phases_roe import roe_loss, sparsity_penalty, token_loss_per_example
from .across_ranks import mean_over_ranks


def routing_information(skip_probability: Tensor, turn_mask: Tensor) -> Tensor:
    """Mutual information between question and decision, in nats per layer: scalar in [0, log 2].

    Entropy of a layer's mean decision minus the mean entropy of its decisions, averaged over layers. 0 when every
    question takes the same route, however undecided it is.

    Args:
        skip_probability: (B, T, L) in [0, 1].
        turn_mask: (B, T) bool.
    """
    probability = skip_probability[turn_mask]
    single = mean_over_ranks(binary_entropy(probability))
    return (binary_entropy(mean_over_ranks(probability)) - single).mean()


def binary_entropy(probability: Tensor) -> Tensor:
    """Entropy of a yes-or-no decision, in nats."""
    probability = probability.clamp(1e-6, 1 - 1e-6)
    return -probability * probability.log() - (1 - probability) * (1 - probability).log()


@dataclass(frozen=True)
class Objective:
    """Loss of a training step, from the model's outputs.

    Attributes:
        target_skip_ratio: wanted share of skipped (question, layer) pairs.
        budget: `"example"`: the published penalty, on every example that skips too little, faded out where the token
            loss is high. `"batch"`: two-sided, on the mean over the batch, so that easy questions pay for hard ones.
            `"published"`: as `"example"` with the published code's means, see `published_loss`.
        budget_weight: nats per unit of share missed, `"batch"` only.
        information_weight: nats per nat of `routing_information`; pushes against one route for all.
    """

    target_skip_ratio: float
    budget: str = "example"
    budget_weight: float = 1.0
    information_weight: float = 0.0

    def __post_init__(self):
        if self.budget not in ("example", "batch", "published"):
            raise ValueError(f"budget must be 'example', 'batch' or 'published', got {self.budget!r}")

    def loss(self, outputs, labels: Tensor, stage: int) -> Tensor:
        """Scalar loss of a batch.

        Args:
            outputs: of the model in training mode.
            labels: (B, S), -100 where there is no target.
            stage: of the schedule; in stage 0 decisions are random and there is nothing to push.
        """
        weights, mask = outputs.turn_skip_weights, outputs.turn_mask
        if weights is None:  # pinned routes: nothing is decided
            return mean_over_labelled(token_loss_per_example(outputs.logits, labels), labels)
        if self.budget != "batch":
            loss = roe_loss if self.budget == "example" else published_loss
            return loss(outputs.logits, labels, skip_share(outputs), self.target_skip_ratio)
        loss = mean_over_labelled(token_loss_per_example(outputs.logits, labels), labels)
        if stage == 0:
            return loss
        loss = loss + self.budget_weight * (mean_over_ranks(weights[mask]).mean() - self.target_skip_ratio).abs()
        if self.information_weight:
            skip_probability = outputs.turn_router_logits.softmax(dim=-1)[..., 1]
            loss = loss - self.information_weight * routing_information(skip_probability, mask)
        return loss


def skip_share(outputs) -> Tensor:
    """(B,) mean skip weight over layers and an example's turns, from a training pass's outputs."""
    mask = outputs.turn_mask.to(outputs.turn_skip_weights)
    return (outputs.turn_skip_weights.mean(dim=-1) * mask).sum(dim=1) / mask.sum(dim=1)


def published_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """(B,) next-token cross entropy of a row over the number of its tokens whose loss is above 0, in nats.

    So a row without labels gives NaN, and tokens predicted with certainty do not count.

    Args:
        logits: (B, S, V).
        labels: (B, S), -100 where there is no target.
    """
    targets = labels[:, 1:].to(logits.device)
    losses = nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), targets, reduction="none")
    return losses.sum(dim=1) / (losses > 0).sum(dim=1)


def published_loss(logits: Tensor, labels: Tensor, skip_share: Tensor, target: float) -> Tensor:
    """`roe_loss` as the published code has it: a mean over all rows, NaN if one has no labels. Arguments: as there."""
    token_loss = published_token_loss(logits, labels)
    return (token_loss + torch.exp(-5 * token_loss).detach() * sparsity_penalty(skip_share, target)).mean()


def mean_over_labelled(losses: Tensor, labels: Tensor) -> Tensor:
    """Mean of (B,) losses over the examples that have a target."""
    labelled = (labels[:, 1:] != -100).any(dim=1).to(losses)
    return (losses * labelled).sum() / labelled.sum().clamp(min=1)


__all__ = ["Objective", "published_loss", "routing_information"]
