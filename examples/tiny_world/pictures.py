"""Two pictures of what the demo measured: the map of routes, and a few questions with the layers used."""

import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...display.drawing import (
    FAINT,
    INK,
    KEPT,
    WRONG,
    bare,
    draw_boxes,
    draw_columns,
    draw_shares,
    legend_patches,
    number_layers,
)
from .asking import Answered, route_text, scores
from .world import CELL_PIXELS, GRID, ROWS

NUM_EXAMPLES = 8
COLUMNS = 4


# ------------------------------------------------------------------------------------------------ the map of routes


def draw_routes(answered: Sequence[Answered], path: Path) -> None:
    """The map of routes: a column per question, a row per layer, grouped by family; filled where the layer ran."""
    groups = by_family(answered)
    num_layers = len(answered[0].route)
    figure = Figure(figsize=(13.5, 4.4), dpi=150, facecolor="white")
    layout = {"width_ratios": [1.0] * len(groups) + [1.35], "wspace": 0.12}
    axes = figure.subplots(1, len(groups) + 1, squeeze=False, gridspec_kw=layout)[0]
    figure.subplots_adjust(left=0.072, right=0.99, top=0.76, bottom=0.145)
    for axis, (family, items) in zip(axes, groups.items(), strict=False):
        draw_family(axis, family, items)
    label_layers(axes[0], num_layers)
    draw_skips_by_layer(axes[-1], answered)
    title = f"{len(answered)} held-out questions, one column each, equal routes together"
    figure.text(0.072, 0.94, "Which decoder layers a question runs", fontsize=14, fontweight="bold", color=INK)
    figure.text(0.072, 0.885, title, fontsize=10.5, color=FAINT)
    figure.legend(handles=legend_patches(), loc="upper right", bbox_to_anchor=(0.99, 0.99), ncols=2, frameon=False)
    figure.savefig(path)


def by_family(answered: Sequence[Answered]) -> dict[str, list[Answered]]:
    """Questions per family; in a family, the most common route first, so that equal columns stand together."""
    groups: dict[str, list[Answered]] = {}
    for item in answered:
        groups.setdefault(item.family, []).append(item)
    for items in groups.values():
        counts = Counter(route_text(item.route) for item in items)
        items.sort(key=lambda item: (-counts[route_text(item.route)], route_text(item.route)))
    return groups


def draw_family(axis: Axes, family: str, items: Sequence[Answered]) -> None:
    """One family's part of the map, layer 0 at the bottom."""
    draw_columns(axis, [item.route for item in items])
    axis.set_title(family, fontsize=11, fontweight="bold", color=INK, pad=6)
    write_scores(axis, 0.5, items)


def write_scores(axis: Axes, center: float, items: Sequence[Answered]) -> None:
    """Below a part of the map: how much was skipped, and the accuracy of the base and with routing."""
    of = scores(items)
    lines = (f"{100 * of['skip_ratio']:.0f} %", f"{100 * of['base']:.0f} → {100 * of['roe']:.0f} %")
    for line, height in zip(lines, (-0.07, -0.145), strict=True):
        axis.text(center, height, line, transform=axis.transAxes, fontsize=9, color=INK, ha="center", va="center")


def label_layers(axis: Axes, num_layers: int) -> None:
    """Numbers of the layers, and what the lines below the map are, left of its first part."""
    number_layers(axis, num_layers)
    for line, height in (("skipped", -0.07), ("correct", -0.145)):
        axis.text(-0.07, height, line, transform=axis.transAxes, fontsize=9, color=FAINT, ha="right", va="center")


def draw_skips_by_layer(axis: Axes, answered: Sequence[Answered]) -> None:
    """How often each layer runs over all questions, with the skipped share written behind the bar."""
    draw_shares(axis, [item.route for item in answered])
    middle = 0.5 / 1.45
    axis.text(middle, 1.02, "all", transform=axis.transAxes, fontsize=11, fontweight="bold", color=INK, ha="center")
    write_scores(axis, middle, answered)


# --------------------------------------------------------------------------------------------------- a few questions


def chosen(answered: Sequence[Answered], number: int = NUM_EXAMPLES) -> list[Answered]:
    """One question each of families spread evenly over the list; nobody picked them, wrong answers included.

    The first question of the first family, the second of the next and so on: families share their scenes.
    """
    groups: dict[str, list[Answered]] = {}
    for item in answered:
        groups.setdefault(item.family, []).append(item)
    families = list(groups.values())
    number = min(number, len(families))
    picked = [families[round(index * (len(families) - 1) / max(number - 1, 1))] for index in range(number)]
    return [items[index % len(items)] for index, items in enumerate(picked)]


def draw_examples(answered: Sequence[Answered], path: Path) -> None:
    """Images with question, answer, truth and the layers used."""
    rows = -(-len(answered) // COLUMNS)
    height = 4.9 * rows + 0.75
    figure = Figure(figsize=(13.5, height), dpi=110, facecolor="white")
    title = "What the model answers, and the decoder layers it runs for it (filled)"
    figure.text(0.028, 1 - 0.3 / height, title, fontsize=14, fontweight="bold", color=INK, va="center")
    cells = figure.add_gridspec(
        rows, COLUMNS, wspace=0.13, hspace=0.13, left=0.028, right=0.985, top=1 - 0.75 / height, bottom=0.015
    )
    for cell, item in zip(cells, answered, strict=False):
        parts = cell.subgridspec(3, 1, height_ratios=[3.1, 1.3, 0.38], hspace=0.05)
        image, words, strip = (figure.add_subplot(part) for part in parts)
        draw_scene(image, item)
        draw_words(words, item)
        draw_strip(strip, item)
    figure.savefig(path)


def draw_scene(axis: Axes, item: Answered) -> None:
    """The picture asked about, with the names of its rows and columns."""
    axis.imshow(item.example["image"], interpolation="nearest", aspect="auto")
    bare(axis)
    middles = [CELL_PIXELS * (index + 0.5) - 0.5 for index in range(GRID)]
    axis.set_yticks(middles, labels=list(ROWS))
    axis.set_xticks(middles, labels=range(1, GRID + 1))
    axis.tick_params(length=0, labelsize=9, labelcolor=FAINT, labeltop=True, labelbottom=False, pad=3)


def draw_words(axis: Axes, item: Answered) -> None:
    """Question, answer and truth; a wrong answer is marked by colour and by a cross."""
    bare(axis)
    is_right = item.roe == item.truth
    mark, color = ("✓", KEPT) if is_right else ("✗", WRONG)
    answer = textwrap.shorten(item.roe or "(nothing)", 80, placeholder=" …")
    lines = [(line, INK, "bold") for line in textwrap.wrap(item.question, 34)]
    lines += [(line, color, "normal") for line in textwrap.wrap(f"{mark} {answer}", 38)]
    if not is_right:
        truth = textwrap.shorten(item.truth, 80, placeholder=" …")
        lines += [(line, FAINT, "normal") for line in textwrap.wrap(f"truth: {truth}", 38)]
    for number, (line, color, weight) in enumerate(lines):
        style = {"fontsize": 11.5 if weight == "bold" else 11, "color": color, "fontweight": weight}
        axis.text(0.0, 0.96 - 0.168 * number, line, transform=axis.transAxes, va="top", **style)


def draw_strip(axis: Axes, item: Answered) -> None:
    """A box per decoder layer, numbered, filled where it ran."""
    bare(axis)
    draw_boxes(axis, item.route.tolist())
    axis.set_ylim(-0.45, 0.45)


__all__ = ["chosen", "draw_examples", "draw_routes"]
