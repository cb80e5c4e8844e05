"""Routes and labels as they are handed in, checked."""

from collections import Counter
from collections.abc import Sequence

from ..routing_roe import as_numbers, checked_routes

Route = tuple[bool, ...]


def listed_routes(routes) -> list[Route]:
    """Routes as tuples, one per input.

    Args:
        routes: (B, L) bool (or 0 and 1), True where the layer ran; (L,) is one route.
    Raises: ValueError for another shape, none at all, or other values.
    """
    numbers = as_numbers("routes", routes)
    if numbers.dim() == 1:
        numbers = numbers[None]
    if numbers.dim() != 2 or not numbers.numel():
        raise ValueError(
            f"routes must have shape (inputs, layers), got {tuple(numbers.shape)}; `past_key_values.routes` of what "
            "generate returns has it"
        )
    return [tuple(route) for route in checked_routes(numbers, *numbers.shape).tolist()]


def checked_labels(labels: Sequence | None, num_routes: int) -> list[str] | None:
    """Labels as texts.

    Raises: ValueError unless there are as many as routes.
    """
    if labels is None:
        return None
    if isinstance(labels, str) or len(labels) != num_routes:
        given = repr(labels) if isinstance(labels, str) else f"{len(labels)} of them"
        raise ValueError(f"labels must be one text per route, {num_routes} of them, got {given}")
    return [str(label) for label in labels]


def common_first(routes: Sequence[Route]) -> list[tuple[Route, int]]:
    """Every different route and how many inputs take it, the most common first."""
    counts = Counter(routes)
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def skip_ratio(routes: Sequence[Route]) -> float:
    """Share of skipped (input, layer) pairs."""
    return 1 - sum(map(sum, routes)) / (len(routes) * len(routes[0]))


def counted(number: int, thing: str) -> str:
    """As in 1 input, 2 inputs."""
    return f"{number} {thing}{'' if number == 1 else 's'}"
