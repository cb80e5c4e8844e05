"""`plot_routes` and `show_routes`: what is drawn and written are the routes that were given."""

import io
from html.parser import HTMLParser
from itertools import pairwise

import pytest
import torch
from matplotlib.colors import to_hex
from PIL import Image

from roe_llava.display import plot_routes, show_routes
from roe_llava.display.drawing import KEPT, SKIPPED

ROUTES = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 1], [1, 1, 0, 1]], dtype=torch.bool)
QUESTIONS = ["What is red?", "Is a < b & c?", "How many?"]


def many(number: int) -> torch.Tensor:
    """Routes of which every third skips layer 1, and every fourth layer 2."""
    place = torch.arange(number)
    ran = torch.ones(number, dtype=torch.bool)
    return torch.stack([ran, place % 3 != 0, place % 4 != 0, ran], dim=1)


class Cells(HTMLParser):
    """Text of every cell, and the colour of every box."""

    def __init__(self, page: str):
        super().__init__()
        self.cells, self.colors = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        if tag == "td":
            self.cells.append("")
        if tag == "span":
            self.colors.append(KEPT if KEPT in dict(attributes)["style"] else SKIPPED)

    def handle_data(self, data):
        if self.cells:
            self.cells[-1] += data


def test_a_table_prints_a_line_per_input_with_its_label():
    table = show_routes(ROUTES, QUESTIONS)
    assert repr(table) == str(table)
    assert str(table).splitlines() == [
        "3 inputs, 2 different routes, 33.3% of 4 layers skipped (x: runs, -: skipped, layer 0 first)",
        "  xx-x  What is red?",
        "  x--x  Is a < b & c?",
        "  xx-x  How many?",
    ]
    assert str(show_routes([1, 0])).splitlines()[0].startswith("1 input, 1 different route, 50.0% of 2 layers")


def test_a_notebook_shows_a_box_per_layer_and_labels_as_they_are():
    shown = Cells(show_routes(ROUTES, QUESTIONS)._repr_html_())
    assert shown.cells[1::2] == QUESTIONS and shown.cells[::2] == ["0123"] * 3
    assert shown.colors == [KEPT if ran else SKIPPED for ran in ROUTES.flatten().tolist()]


def test_many_inputs_are_counted_by_route():
    lines = str(show_routes(many(48), range(48))).splitlines()
    assert lines[1:] == ["  xxxx  24 inputs", "  x-xx  12 inputs", "  xx-x  8 inputs", "  x--x  4 inputs"]


def test_routes_that_have_no_line_are_counted_too():
    bits = torch.arange(64)[:, None] >> torch.arange(6) & 1
    lines = str(show_routes(bits)).splitlines()
    assert len(lines) == 34 and lines[-1] == "  and 32 more routes, of 32 inputs"
    assert "and 32 more routes" in show_routes(bits)._repr_html_()


def test_few_inputs_have_a_strip_each_in_their_order():
    figure = plot_routes(ROUTES, QUESTIONS, title="Three questions")
    (axis,) = figure.axes
    assert [text.get_text() for text in axis.get_yticklabels()] == QUESTIONS and axis.yaxis_inverted()
    assert [to_hex(box.get_facecolor()).upper() for box in axis.patches] == [
        (KEPT if ran else SKIPPED).upper() for ran in ROUTES.flatten().tolist()
    ]
    assert figure.get_suptitle() == "Three questions"


def test_many_inputs_have_a_column_each_grouped_by_label_equal_routes_together():
    routes, labels = many(48), ["digit", "add"] * 24
    figure = plot_routes(routes, labels)
    *maps, bars = figure.axes
    assert [axis.get_title() for axis in maps] == ["digit", "add"]
    for axis, group in zip(maps, (routes[::2], routes[1::2]), strict=True):
        drawn = torch.tensor(axis.images[0].get_array()).T.bool()
        rows = [*map(tuple, drawn.tolist())]
        assert sorted(rows) == sorted(map(tuple, group.tolist()))
        counts = [rows.count(row) for row in rows]
        assert counts == sorted(counts, reverse=True)
        assert sum(a != b for a, b in pairwise(rows)) == len(set(rows)) - 1
    assert [text.get_text() for text in bars.texts if "%" in text.get_text()] == ["0 %", "33 %", "25 %", "0 %"]


@pytest.mark.parametrize("number", [3, 48])
def test_a_notebook_shows_the_figure_by_itself(number):
    with Image.open(io.BytesIO(plot_routes(many(number))._repr_png_())) as image:
        colors = {to_hex([part / 255 for part in color[:3]]).upper() for _, color in image.getcolors(1 << 20)}
    assert {KEPT.upper(), SKIPPED.upper()} <= colors


@pytest.mark.parametrize("show", [plot_routes, show_routes])
@pytest.mark.parametrize(
    ("routes", "labels", "message"),
    [
        (torch.ones(2, 3, 4), None, r"routes must have shape \(inputs, layers\), got \(2, 3, 4\)"),
        (torch.ones(0, 4), None, r"got \(0, 4\)"),
        (None, None, "routes must hold numbers"),
        (torch.full((2, 4), 0.3), None, "did you pass router logits"),
        (ROUTES, ["a", "b"], "one text per route, 3 of them, got 2 of them"),
        (ROUTES, "abc", "got 'abc'"),
    ],
)
def test_what_is_no_route_or_no_label_is_named(show, routes, labels, message):
    with pytest.raises(ValueError, match=message):
        show(routes, labels)


def test_more_groups_than_can_be_read_are_refused():
    with pytest.raises(ValueError, match="labels name 30 groups for 30 routes, expected at most 12"):
        plot_routes(many(30), range(30))
