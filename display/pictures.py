"""`plot_routes`: which layers the inputs run, as a matplotlib figure."""

import textwrap
from collections.abc import Sequence
from io import BytesIO

from matplotlib.figure import Figure

from .drawing import FAINT, INK, bare, draw_boxes, draw_columns, draw_shares, legend_patches, number_layers
from .given import Route, checked_labels, common_first, counted, listed_routes, skip_ratio

MOST_STRIPS = 24
MOST_GROUPS = 12
LABEL_WIDTH = 56  # characters


class RouteFigure(Figure):
    """A figure that a notebook shows by itself; matplotlib's own do so only once pyplot was imported."""

    def _repr_png_(self) -> bytes:
        image = BytesIO()
        self.savefig(image, format="png")
        return image.getvalue()


def plot_routes(routes, labels: Sequence | None = None, *, title: str | None = None) -> RouteFigure:
    """Draw which layers run.

    Up to 24 inputs have a strip of boxes each, with their label beside it. More have a column each: equal labels stand
    together, equal routes within them, and bars show how often each layer runs.

    Args:
        routes: (B, L) bool, as `past_key_values.routes` of what `generate` returns; (L,) is one route.
        labels: B texts: questions, or the groups that inputs belong to, 12 of them at most beyond 24 inputs.
        title: a line above; by default the number of inputs and the share of layers skipped.
    Returns: a matplotlib figure, which a notebook shows and `savefig` writes.
    Raises: ValueError for routes of another shape, another number of labels, or too many groups.
    """
    listed = listed_routes(routes)
    labels = checked_labels(labels, len(listed))
    if title is None:
        title = f"{counted(len(listed), 'input')}, {skip_ratio(listed):.0%} of {len(listed[0])} layers skipped"
    if len(listed) <= MOST_STRIPS:
        return draw_strips(listed, labels, title)
    return draw_groups(grouped(listed, labels), title)


def draw_strips(routes: list[Route], labels: list[str] | None, title: str) -> RouteFigure:
    """A strip of boxes per input, from the top in the order given."""
    num_layers = len(routes[0])
    figure = new_figure(max(4.0, 0.32 * num_layers + 3.5), 0.9 + 0.32 * len(routes), title)
    axis = figure.subplots()
    for row, route in enumerate(routes):
        draw_boxes(axis, route, row)
    axis.set_ylim(len(routes) - 0.5, -0.5)
    bare(axis)
    names = labels or [str(row) for row in range(len(routes))]
    names = [textwrap.shorten(name, LABEL_WIDTH, placeholder=" …") for name in names]
    axis.set_yticks(range(len(routes)), labels=names)
    axis.tick_params(length=0, labelsize=9, labelcolor=INK)
    return figure


def grouped(routes: list[Route], labels: list[str] | None) -> dict[str, list[Route]]:
    """Routes by label, in the order of their first appearance; in a group, the most common route first.

    Raises: ValueError if there are more groups than can be read.
    """
    groups: dict[str, list[Route]] = {}
    for label, route in zip(labels or [""] * len(routes), routes, strict=True):
        groups.setdefault(label, []).append(route)
    if len(groups) > MOST_GROUPS:
        raise ValueError(
            f"labels name {len(groups)} groups for {len(routes)} routes, expected at most {MOST_GROUPS} of them beyond "
            f"{MOST_STRIPS} routes: give the kind of an input as its label, or fewer routes"
        )
    return {
        label: [route for route, count in common_first(group) for _ in range(count)] for label, group in groups.items()
    }


def draw_groups(groups: dict[str, list[Route]], title: str) -> RouteFigure:
    """A map with a column per input, group by group, and the bars of all behind it."""
    routes = [route for group in groups.values() for route in group]
    num_layers = len(routes[0])
    figure = new_figure(max(6.0, 2.4 + 1.2 * len(groups)), 1.4 + 0.28 * num_layers, title)
    axes = figure.subplots(1, len(groups) + 1, gridspec_kw={"width_ratios": [1.0] * len(groups) + [1.35]})
    for axis, (label, group) in zip(axes, groups.items(), strict=False):
        draw_columns(axis, group)
        axis.set_title(textwrap.shorten(label, 16, placeholder="…"), fontsize=11, fontweight="bold", color=INK, pad=6)
        axis.set_xlabel(f"{skip_ratio(group):.0%} skipped", fontsize=9, color=FAINT)
    number_layers(axes[0], num_layers)
    draw_shares(axes[-1], routes)
    axes[-1].set_title("all", loc="left", fontsize=11, fontweight="bold", color=INK, pad=6)
    return figure


def new_figure(width: float, height: float, title: str) -> RouteFigure:
    """A figure of that many inches with title and legend, in which nothing is cut off."""
    figure = RouteFigure(figsize=(width, height), facecolor="white", layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    figure.legend(handles=legend_patches(), loc="outside lower right", ncols=2, frameon=False)
    return figure
