"""Finds routes worth teaching: measures many on some examples and picks a few that serve them best under a budget.

N examples (or turns), P measured routes, M chosen ones, L decoder layers. Losses are in nats.
"""

import itertools
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BISECTIONS = 40
MOST_PRICE = 10.0  # nats; a negative price holds back routes that are better although they skip


@dataclass(frozen=True)
class RoutePool:
    """Routes that were measured.

    Attributes:
        routes: (P, L) bool, True where the layer runs; the first one runs all.
        losses: (N, P) loss of every example along every route.
    """

    routes: Tensor
    losses: Tensor

    @property
    def skip_ratio(self) -> Tensor:
        """(P,) share of the layers a route skips."""
        return 1 - self.routes.float().mean(dim=1)


def check_size(routed_layers: Sequence[int], size: int, most: int) -> None:
    """Raises: ValueError if `size` routes, each skipping at most `most` layers, are used up by single layers."""
    single = len(routed_layers) + 1
    every = sum(math.comb(len(routed_layers), number) for number in range(min(most, len(routed_layers)) + 1))
    if every > size and size < 2 * single:
        raise ValueError(
            f"{size} routes to search are too few for {len(routed_layers)} layers with a router: the first {single} "
            f"leave out one layer each; take {3 * single} or more"
        )


def search_routes(
    measure: Callable[[Tensor], Tensor],
    num_layers: int,
    routed_layers: Sequence[int],
    size: int,
    most_skipped: int,
    seed: int = 0,
) -> RoutePool:
    """Measures every layer's absence, then routes that single layers promise, and those near what is best so far.

    All routes are measured if there are no more than `size`. Which are tried follows from the losses and the seed
    alone, so all processes of a run try the same ones.

    Args:
        measure: route (L,) bool to losses (N,); bounded, or one lost example outweighs all others.
        routed_layers: layers that may be skipped.
        size: routes to measure.
        most_skipped: layers that a route skips at most.
    Raises: ValueError if `size` is used up by single layers.
    """
    rng = random.Random(seed)
    most = min(most_skipped, len(routed_layers))
    found: dict[tuple[bool, ...], Tensor] = {}

    def try_route(skipped: Iterable[int]) -> bool:
        route = tuple(layer not in skipped for layer in range(num_layers))
        if route in found or route.count(False) > most:
            return False
        found[route] = measure(torch.tensor(route)).float().cpu()
        return True

    possible = [math.comb(len(routed_layers), number) for number in range(most + 1)]
    if sum(possible) <= size:
        for number in range(len(possible)):
            for skipped in itertools.combinations(routed_layers, number):
                try_route(skipped)
        return pool_of(found)
    check_size(routed_layers, size, most)
    try_route(())
    for layer in routed_layers:
        try_route((layer,))
    cost = torch.stack([*found.values()], dim=1)
    cost = cost[:, 1:] - cost[:, :1]  # (N, layers): what each example loses without one layer
    while len(found) < size:
        if rng.random() < 0.5:
            near = cheapest_layers(cost, routed_layers, rng.randint(2, most) if most > 1 else 1, rng)
        else:
            route = promising_route(pool_of(found), rng)
            changed = rng.choices(routed_layers, k=rng.choice((1, 1, 2)))
            near = {layer for layer in range(num_layers) if not route[layer]}.symmetric_difference(changed)
        if not try_route(near):  # known: look further away
            try_route(rng.sample(routed_layers, rng.randint(1, most)))
    return pool_of(found)


def cheapest_layers(cost: Tensor, routed_layers: Sequence[int], number: int, rng: random.Random) -> list[int]:
    """The layers without which one example and a few beside it lose least, if losses added up."""
    count = len(cost)
    one, beside = rng.randrange(count), rng.sample(range(count), min(8, count))
    order = ((cost[one] + cost[beside].mean(dim=0)) / 2).argsort()
    return [routed_layers[place] for place in order[:number].tolist()]


def pool_of(found: dict[tuple[bool, ...], Tensor]) -> RoutePool:
    return RoutePool(torch.tensor([*found]), torch.stack([*found.values()], dim=1))


def promising_route(pool: RoutePool, rng: random.Random) -> list[bool]:
    """The best measured route for one example and a few beside it, at a price drawn at random."""
    number = len(pool.losses)
    price = 10 ** rng.uniform(-1.5, 1.0)
    one, beside = rng.randrange(number), rng.sample(range(number), min(8, number))
    losses = (pool.losses[one] + pool.losses[beside].mean(dim=0)) / 2
    return pool.routes[(losses - price * pool.skip_ratio).argmin()].tolist()


def choose_routes(pool: RoutePool, expected: Tensor, target_skip_ratio: float, number: int) -> Tensor:
    """The routes (M, L) that together serve the examples best: the one that runs all, and greedily the next best.

    Args:
        expected: (N, P) loss to be expected, not the one measured: the best of many measured losses is best by luck.
        target_skip_ratio: share to skip in the mean over the examples, each on its best route.
        number: M, at most P.
    """
    skip = pool.skip_ratio

    def chosen_at(price: float) -> tuple[list[int], float]:
        costs = expected - price * skip
        chosen, best = [0], costs[:, 0]
        while len(chosen) < min(number, costs.shape[1]):
            gains = (best[:, None] - costs).clamp(min=0).mean(dim=0)
            if gains.max() <= 0:
                break
            chosen.append(int(gains.argmax()))
            best = torch.minimum(best, costs[:, chosen[-1]])
        return chosen, skip[chosen][costs[:, chosen].argmin(dim=1)].mean().item()

    # Just behind the edge, where the last digits of a loss decide nothing.
    price = bisect(lambda price: chosen_at(price)[1] < target_skip_ratio, -MOST_PRICE, MOST_PRICE) + 1e-4
    return pool.routes[chosen_at(price)[0]]


def price_of(skip_at: Callable[[float], float], target_skip_ratio: float) -> float:
    """The reward in nats for skipping everything at which just the target is skipped; `skip_at` grows with it.

    It grows in steps, one per question that changes its route, so the price lies in the middle of a step: at its edge
    the last digit of a loss would decide.
    """
    edge = bisect(lambda price: skip_at(price) < target_skip_ratio, -MOST_PRICE, MOST_PRICE)
    reached = skip_at(edge)
    return (edge + bisect(lambda price: skip_at(price) <= reached, edge, MOST_PRICE)) / 2


def bisect(is_below: Callable[[float], bool], low: float, high: float) -> float:
    """The least number that is not below, up to rounding; `high` if all are."""
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if is_below(middle) else (low, middle)
    return high


__all__ = ["RoutePool", "check_size", "choose_routes", "price_of", "search_routes"]
