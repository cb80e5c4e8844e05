"""What routing does while a model trains or is evaluated, summed up on the device and read when it is logged.

B batch, T turns, L decoder layers, S sequence, V vocabulary.
"""

import torch
from torch import Tensor, nn

TOKENS_AT_ONCE = 256  # whose logits are made float32


class RoutingMeter:
    """Sums over batches: losses per example and the decisions of every layer."""

    def __init__(self):
        self.sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, outputs, labels: Tensor, loss: Tensor) -> None:
        """Count one batch.

        Args:
            outputs: of the model, in training (soft, per turn) or evaluation (hard, per example).
            labels: (B, S), -100 where there is no target.
            loss: scalar that was optimized, a mean over the batch.
        """
        token_loss, examples = token_loss_sum(outputs.logits, labels)
        self._sum("token_loss", token_loss)
        self._sum("loss", loss.detach().float() * examples)
        self._sum("examples", examples)
        if outputs.turn_router_logits is not None:
            mask, logits = outputs.turn_mask, outputs.turn_router_logits
            self._sum("skips", hard_skips(logits)[mask].float().sum(dim=0))
            self._sum("skip_weights", outputs.turn_skip_weights[mask].float().sum(dim=0))
            self._sum("decisions", mask.sum().float())
        elif outputs.router_logits is not None:  # pinned routes are no decisions
            self._sum("skips", (~outputs.routes).float().sum(dim=0))
            self._sum("decisions", torch.tensor(float(len(outputs.routes)), device=outputs.routes.device))

    def _sum(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def take(self, accelerator) -> dict[str, float]:
        """Means since the last call, over all processes; every process has to call it.

        Returns: `token_loss` (cross entropy, mean over examples), `routing_loss` (all else in the loss),
            `hard_skip_ratio` (what inference would skip), `skip_weight` (mean weight of the skip path), `soft_hard_gap`
            (their difference) and `skip/layer_NN` (share of hard decisions to skip).
        """
        sums = {name: accelerator.reduce(value, "sum").cpu() for name, value in self.sums.items()}
        self.sums = {}
        if not sums:
            return {}
        examples = sums["examples"].clamp(min=1)
        token_loss = (sums["token_loss"] / examples).item()
        logs = {"token_loss": token_loss, "routing_loss": (sums["loss"] / examples).item() - token_loss}
        if "skips" in sums:
            shares = sums["skips"] / sums["decisions"]
            logs["hard_skip_ratio"] = shares.mean().item()
            if "skip_weights" in sums:
                logs["skip_weight"] = (sums["skip_weights"] / sums["decisions"]).mean().item()
                logs["soft_hard_gap"] = logs["skip_weight"] - logs["hard_skip_ratio"]
            logs |= {f"skip/layer_{layer:02d}": share for layer, share in enumerate(shares.tolist())}
        return {name: round(value, 6) for name, value in logs.items()}


def token_loss_sum(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over examples of the mean cross entropy of their labelled tokens, in nats, and the number of examples.

    Args: as in `labelled_losses`.
    """
    rows, _, losses = labelled_losses(logits, labels)
    counts = torch.bincount(rows, minlength=len(labels))
    return (losses / counts[rows]).sum(), (counts > 0).sum().float()


def labelled_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row, place and cross entropy in nats of every labelled token, (N,) each.

    Only labelled tokens are looked at, a few at a time: a second float32 copy of all logits would cost gigabytes.

    Args:
        logits: (B, S, V).
        labels: (B, S), -100 where there is no target.
    """
    labels = labels.to(logits.device)
    rows, places = (labels[:, 1:] != -100).nonzero(as_tuple=True)
    losses = [
        nn.functional.cross_entropy(logits[row, place].float(), labels[row, place + 1], reduction="none")
        for row, place in zip(rows.split(TOKENS_AT_ONCE), places.split(TOKENS_AT_ONCE), strict=True)
    ]
    return rows, places + 1, torch.cat(losses)


def hard_skips(router_logits: Tensor) -> Tensor:
    """(...) bool: what inference would skip, from raw router logits (..., 2)."""
    return router_logits[..., 1] >= router_logits[..., 0]


__all__ = ["RoutingMeter", "hard_skips", "labelled_losses", "token_loss_sum"]
