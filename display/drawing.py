"""Colours and marks of every picture that shows which layers run."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

# Okabe and Ito's blue and vermilion are told apart by any eye; kept and skipped differ in lightness, too.
KEPT, SKIPPED, WRONG, INK, FAINT = "#0072B2", "#E3E9EE", "#D55E00", "#22303A", "#6B7780"


def draw_columns(axis: Axes, routes: Sequence[Sequence[bool]]) -> None:
    """A column per route, layer 0 at the bottom."""
    num_layers = len(routes[0])
    kept = [[int(route[layer]) for route in routes] for layer in range(num_layers)]
    colors = ListedColormap([SKIPPED, KEPT])
    axis.imshow(kept, cmap=colors, vmin=0, vmax=1, aspect="auto", interpolation="nearest", origin="lower")
    axis.hlines([layer + 0.5 for layer in range(num_layers - 1)], -0.5, len(routes) - 0.5, color="white", linewidth=1.6)
    bare(axis)


def draw_shares(axis: Axes, routes: Sequence[Sequence[bool]]) -> None:
    """A bar per layer, as long as the share of the routes that run it, with the skipped share written behind it."""
    num_layers = len(routes[0])
    ran = [sum(int(route[layer]) for route in routes) / len(routes) for layer in range(num_layers)]
    axis.barh(range(num_layers), [1.0] * num_layers, color=SKIPPED, height=0.88)
    axis.barh(range(num_layers), ran, color=KEPT, height=0.88)
    for layer, share in enumerate(ran):
        axis.text(1.42, layer, f"{100 * (1 - share):.0f} %", va="center", ha="right", fontsize=9, color=INK)
    axis.set_xlim(0, 1.45)
    axis.set_ylim(-0.5, num_layers - 0.5)
    bare(axis)
    axis.text(1.0, 1.02, "skipped", transform=axis.transAxes, fontsize=9, color=FAINT, ha="right")


def draw_boxes(axis: Axes, route: Sequence[bool], row: float = 0) -> None:
    """A box per layer, numbered, filled where it ran."""
    for layer, keep in enumerate(route):
        axis.barh(row, 0.92, left=layer + 0.04, color=KEPT if keep else SKIPPED, height=0.8)
        axis.text(layer + 0.5, row, str(layer), ha="center", va="center", fontsize=9, color="white" if keep else FAINT)
    axis.set_xlim(0, len(route))


def number_layers(axis: Axes, num_layers: int) -> None:
    """Numbers of the layers, left of their rows."""
    axis.set_yticks(range(num_layers), labels=range(num_layers))
    axis.tick_params(length=0, labelsize=9, labelcolor=FAINT)
    axis.set_ylabel("decoder layer", color=INK, labelpad=8)


def legend_patches() -> list[Patch]:
    """What the two colours of a route mean."""
    return [Patch(facecolor=KEPT, label="layer runs"), Patch(facecolor=SKIPPED, label="layer skipped")]


def bare(axis: Axes) -> None:
    """No frame and no ticks."""
    for spine in axis.spines.values():
        spine.set_visible(False)
    axis.set_xticks([])
    axis.set_yticks([])
