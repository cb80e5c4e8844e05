"""The map of routes of a card: a column per route, as wide as the share of inputs that take it, a row per layer."""

from io import BytesIO

from matplotlib.figure import Figure

from ..display.drawing import FAINT, INK, KEPT, SKIPPED, bare, legend_patches


def route_map(shares: dict[str, float]) -> bytes:
    """PNG of a map.

    Args:
        shares: route ("x" for a layer that runs, "-" for one that is skipped, layer 0 first) to share of the inputs.
    """
    num_layers = len(next(iter(shares)))
    figure = Figure(figsize=(9, 0.9 + 0.32 * num_layers), dpi=120, facecolor="white")
    axis = figure.subplots()
    left = 0.0
    for route, share in sorted(shares.items(), key=lambda item: -item[1]):
        for layer, mark in enumerate(route):
            color = KEPT if mark == "x" else SKIPPED
            axis.bar(left, 0.9, share, layer - 0.45, align="edge", color=color, edgecolor="white", linewidth=0.4)
        if share >= 0.05:
            axis.text(left + share / 2, num_layers - 0.2, f"{share:.0%}", ha="center", fontsize=9, color=INK)
        left += share
    axis.set(xlim=(0, left), ylim=(-0.5, num_layers + 0.3))
    bare(axis)
    axis.set_yticks(range(num_layers), labels=range(num_layers))
    axis.tick_params(length=0, labelsize=9, labelcolor=FAINT)
    axis.set_ylabel("decoder layer", color=INK)
    axis.set_title("Layers that run, by route; a column is as wide as its share of the inputs", loc="left", fontsize=11)
    figure.legend(handles=legend_patches(), loc="lower right", ncols=2, frameon=False, bbox_to_anchor=(0.95, -0.04))
    image = BytesIO()
    figure.savefig(image, format="png", bbox_inches="tight", metadata={"Software": None})
    return image.getvalue()


__all__ = ["route_map"]
