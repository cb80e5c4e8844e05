"""`show_routes`: routes as a table that a terminal prints and a notebook draws."""

import html
from collections.abc import Sequence
from dataclasses import dataclass

from .drawing import FAINT, KEPT, SKIPPED
from .given import Route, checked_labels, common_first, counted, listed_routes, skip_ratio

MOST_ROWS = 32
BOX = "display:inline-block;width:1.5em;margin:1px;text-align:center;font-size:80%"
BOX_RAN, BOX_SKIPPED = f"{BOX};background:{KEPT};color:white", f"{BOX};background:{SKIPPED};color:{FAINT}"


@dataclass(frozen=True, repr=False)
class RouteTable:
    """Routes to look at.

    Attributes:
        routes: one per input, True where the layer ran.
        labels: of the inputs, or `None`.
    """

    routes: list[Route]
    labels: list[str] | None = None

    @property
    def skip_ratio(self) -> float:
        """Share of skipped (input, layer) pairs."""
        return skip_ratio(self.routes)

    def __str__(self) -> str:
        rows = [f"  {''.join('x' if ran else '-' for ran in route)}  {text}".rstrip() for route, text in self._rows()]
        return "\n".join([self._title(), *rows, *self._rest()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """As a notebook shows it."""
        rows = "".join(
            f"<tr><td style='text-align:left;white-space:nowrap'>{boxes(route)}</td>"
            f"<td style='text-align:left'>{html.escape(text)}</td></tr>"
            for route, text in self._rows()
        )
        rest = "".join(f"<p>{html.escape(line.strip())}</p>" for line in self._rest())
        return f"<table><caption style='text-align:left'>{html.escape(self._title())}</caption>{rows}</table>{rest}"

    def _title(self) -> str:
        return (
            f"{counted(len(self.routes), 'input')}, {counted(len(set(self.routes)), 'different route')}, "
            f"{self.skip_ratio:.1%} of {len(self.routes[0])} layers skipped (x: runs, -: skipped, layer 0 first)"
        )

    def _rows(self) -> list[tuple[Route, str]]:
        """Route and text of every line: inputs in their order, or different routes where there are many inputs."""
        if len(self.routes) > MOST_ROWS:
            return [(route, counted(count, "input")) for route, count in common_first(self.routes)[:MOST_ROWS]]
        return [*zip(self.routes, self.labels or [""] * len(self.routes), strict=True)]

    def _rest(self) -> list[str]:
        """What the lines leave out."""
        left = common_first(self.routes)[MOST_ROWS:] if len(self.routes) > MOST_ROWS else []
        inputs = counted(sum(count for _, count in left), "input")
        return [f"  and {counted(len(left), 'more route')}, of {inputs}"] if left else []


def boxes(route: Route) -> str:
    """HTML of a box per layer, numbered, filled where it ran."""
    return "".join(f"<span style='{BOX_RAN if ran else BOX_SKIPPED}'>{layer}</span>" for layer, ran in enumerate(route))


def show_routes(routes, labels: Sequence | None = None) -> RouteTable:
    """Routes as a table, for `print` and as the last line of a notebook's cell.

    Args:
        routes: (B, L) bool, as `past_key_values.routes` of what `generate` returns; (L,) is one route.
        labels: B texts, questions for instance; shown for 32 inputs at most, beyond which equal routes are counted.
    Raises: ValueError for routes of another shape, or another number of labels.
    """
    listed = listed_routes(routes)
    return RouteTable(listed, checked_labels(labels, len(listed)))
