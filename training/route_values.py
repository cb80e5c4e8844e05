"""What a question would lose along each of a few routes, predicted before any layer has run.

Which route is best for one example is mostly luck: an answer that happens to come out right. What a router can learn
is the loss to be expected from what it reads, so that is estimated first, by ridge regression, and routes are taught by
it. N questions (turns), M routes, F features, L layers.
"""

import torch
from torch import Tensor

from .route_search import price_of

RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
HALF_LIFE = 1000  # questions measured along a route after which older ones count half: adapters go on learning
CORRECTION = 0.001  # per question, of the distance between what routers skip and the target
NUM_FEATURES = 256  # wider states are projected at random, so that the sums stay small


def question_features(states: Tensor, segments: Tensor) -> tuple[Tensor, Tensor]:
    """Mean state of the context and of every turn's question, side by side.

    Args:
        states: (B, S, D) what enters the first layer.
        segments: (B, S) routing segments.
    Returns: features (B, T, 2 D) in float32, and which turns exist, (B, T) bool.
    """
    num_turns = max(1, int(segments.max()))
    own = segments[:, None, :] == torch.arange(num_turns + 1, device=segments.device)[None, :, None]
    weights = own.float() / own.sum(dim=-1, keepdim=True).clamp(min=1)
    means = weights @ states.float()
    context = means[:, :1].expand(-1, num_turns, -1)
    return torch.cat([context, means[:, 1:]], dim=-1), own[:, 1:].any(dim=-1)


class Reading:
    """Features on one scale, fewer if there are many: standardised by a sample, then projected by a seeded matrix."""

    def __init__(self, mean: Tensor, scale: Tensor):
        self.mean, self.scale = mean, scale
        size, generator = len(mean), torch.Generator().manual_seed(0)
        few = min(size, NUM_FEATURES)
        self.projection = torch.randn(size, few, generator=generator) / few**0.5 if few < size else torch.eye(size)

    @classmethod
    def of(cls, sample: Tensor) -> "Reading":
        """From features (N, 2 D) of some questions.

        Raises: ValueError if there is only one.
        """
        sample = sample.float().cpu()
        if len(sample) < 2:
            raise ValueError(f"routes are searched on {len(sample)} questions, expected 2 at least: give more examples")
        scale = sample.std(dim=0)
        # What hardly varies in the sample (pictures in text-only data) must not count for more than all the rest.
        return cls(sample.mean(dim=0), scale.clamp(min=0.1 * scale.mean().item() + 1e-6))

    def __call__(self, features: Tensor) -> Tensor:
        """(N, 2 D) to (N, F + 1), rows of length about 1 and a 1 at the end."""
        scaled = (features.float().cpu() - self.mean) / self.scale / len(self.mean) ** 0.5
        read = scaled @ self.projection
        return torch.cat([read, torch.ones(len(read), 1)], dim=1)


def expected_losses(read: Tensor, losses: Tensor) -> tuple[Tensor, float, float]:
    """What ridge regression on all other questions says of each question (leave one out, in closed form).

    Args:
        read: (N, F + 1).
        losses: (N, P).
    Returns: (N, P) losses, the ridge that predicts best, and the share of the losses' variance it explains.
    """
    mean = losses.mean(dim=0)
    centred, kernel = losses - mean, read[:, :-1] @ read[:, :-1].T
    best = None
    for ridge in RIDGES:
        hat = kernel @ torch.linalg.inv(kernel + ridge * torch.eye(len(kernel)))
        own = hat.diag()[:, None]
        guess = (hat @ centred - own * centred) / (1 - own)
        explained = (1 - (centred - guess).square().sum() / centred.square().sum().clamp(min=1e-9)).item()
        if best is None or explained > best[2]:
            best = guess + mean, ridge, explained
    return best


class RouteValues:
    """Ridge regression from a question to its loss along each of M routes, from running sums that processes can add.

    Args:
        routes: (M, L) bool.
        target_skip_ratio: wanted in the mean over questions.
        size: F + 1.
        ridge: of `expected_losses`.
    """

    NUM_RECENT = 1024

    def __init__(self, routes: Tensor, target_skip_ratio: float, size: int, ridge: float):
        self.skip_ratio = 1 - routes.float().mean(dim=1)
        self.target_skip_ratio, self.ridge = target_skip_ratio, ridge
        self.squares = torch.zeros(len(routes), size, size)
        self.products = torch.zeros(len(routes), size)
        self.recent = torch.zeros(0, size)  # questions that the price is found on
        self.aimed = target_skip_ratio  # moved until the routers themselves skip the target

    def observe(self, read: Tensor, losses: Tensor, measured: Tensor) -> None:
        """Remember losses (N, M) of questions (N, F + 1), those along routes `measured` (M,) bool; fit with `fit`."""
        left = 0.5 ** (len(read) / HALF_LIFE)
        self.squares[measured] = self.squares[measured] * left + read.T @ read
        self.products[measured] = self.products[measured] * left + losses.T[measured] @ read
        self.recent = torch.cat([self.recent, read])[-self.NUM_RECENT :]

    def correct(self, realised: Tensor) -> None:
        """Aim higher or lower where routers skip less or more than the target: they imitate, and not without errors.

        Args:
            realised: (N,) share of the layers that they skip for some questions.
        """
        step = CORRECTION * (self.target_skip_ratio - realised).sum().item()
        self.aimed = min(max(self.aimed + step, 0.0), 2 * self.target_skip_ratio)

    def fit(self) -> None:
        """Weights of the regression, and the price at which the questions seen last skip the target."""
        penalty = self.ridge * torch.eye(self.squares.shape[-1])
        penalty[-1, -1] = 1e-3  # the mean loss is no feature
        self.weights = torch.linalg.solve(self.squares + penalty, self.products)
        expected = self.predict(self.recent)
        self.price = price_of(lambda price: self.skip_ratio[self._best(expected, price)].mean().item(), self.aimed)

    def predict(self, read: Tensor) -> Tensor:
        """(N, M) expected losses."""
        return read @ self.weights.T

    def choose(self, read: Tensor) -> Tensor:
        """(N,) number of the best route at the present price."""
        return self._best(self.predict(read), self.price)

    def _best(self, expected: Tensor, price: float) -> Tensor:
        return (expected - price * self.skip_ratio).argmin(dim=1)


__all__ = ["Reading", "RouteValues", "expected_losses", "question_features"]
