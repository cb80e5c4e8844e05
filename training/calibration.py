"""Measures which route bias skips which share of the layers, by running a model over prompts.

One pass tells every router's margin, but not what a bias would do: a layer that is skipped changes what the routers
behind it read. So every share is that of a real forward pass, and the bias for a ratio is found between two passes
that skip less and more.

N questions, L decoder layers.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from transformers.utils import logging

from ..baked_roe import refuse_baked
from ..calibration_roe import SkipCalibration, router_fingerprint

logger = logging.get_logger(__name__)

RATIOS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5)
HELD_OUT_EVERY = 5
LARGEST_ERROR = 0.02  # a ratio that is missed by more than this is said to be out of reach


def calibrate(
    model,
    batches: Iterable[dict],
    ratios: Sequence[float] = RATIOS,
    *,
    layer_scale: Sequence[float] | None = None,
    tolerance: float = 0.005,
    progress: Callable[[float, float], object] = lambda bias, share: None,
) -> SkipCalibration:
    """The table from skip ratio to route bias of a model, for questions like those given.

    One bias is added to all keep logits, but for those of the first layers, up to the first one that is kept: they have
    read nothing yet and decide alike for all inputs, so a bias would flip them for all questions at once. Every fifth
    question is held out: it is run with the others, and decides nothing.

    Args:
        model: in eval mode.
        batches: of prompts as a processor makes them (input_ids, attention_mask, pixel_values, routing_segments),
            without answers. Run about 30 times, so an iterator is read into a list.
        ratios: wanted shares of skipped (question, layer) pairs, in (0, 1].
        layer_scale: L factors of the bias, from 0 on, for another way to share it out than one bias for all.
        tolerance: how far a realised share may be from the wanted one before the search ends.
        progress: called after every pass with its bias and the share it skipped.
    Returns: the table. Ratios that no bias comes within 2 points of are left out: they lie below or above what the
        routers can do, or in one of the table's gaps.
    Raises: ValueError if there is nothing to run, the model is in training mode, or no ratio can be reached.
    """
    if model.training:
        raise ValueError("the model is in training mode, which mixes both paths of every layer: call model.eval()")
    refuse_baked(model.config.skipped_layers, "there is nothing to calibrate", model.config._name_or_path)
    ratios = checked_ratios(ratios)
    if iter(batches) is batches:
        batches = list(batches)
    fingerprint = router_fingerprint(model)
    if fingerprint is None:
        raise ValueError("the routers are offloaded or sharded, expected them in memory: load the model on one device")
    curve = start_curve(model, batches, layer_scale, progress)
    while any(curve.refine(ratio, tolerance) for ratio in ratios):  # a new point may change what an old one is next to
        pass
    return table_of(curve, ratios, fingerprint)


def checked_ratios(ratios: Sequence[float]) -> list[float]:
    """Wanted ratios in order.

    Raises: ValueError if there are none, or one is no share above 0.
    """
    wrong = [ratio for ratio in ratios if not 0 < ratio <= 1]
    if wrong or not ratios:
        raise ValueError(f"ratios must be shares in (0, 1], got {wrong or list(ratios)}; 0 needs no calibration")
    return sorted({float(ratio) for ratio in ratios})


@torch.inference_mode()
def decisions(model, batches: Iterable[dict], route_bias: list[float]) -> tuple[Tensor, Tensor]:
    """Routes and margins (keep logit minus skip logit, without the bias) of every prompt: (N, L) each.

    Raises: ValueError if there are no prompts, or if they come with labels.
    """
    routes, margins = [], []
    for batch in batches:
        if "labels" in batch:
            raise ValueError(
                "a batch has labels: calibrate with prompts alone, answers must not be read by the routers"
            )
        inputs = {name: on_model(value, model) for name, value in batch.items()}
        outputs = model(**inputs, route_bias=route_bias, use_cache=False, logits_to_keep=1)
        routes.append(outputs.routes.cpu())
        margins.append((outputs.router_logits[..., 0] - outputs.router_logits[..., 1]).float().cpu())
    if not routes:
        raise ValueError("there are no prompts to calibrate with: is the data empty, or an iterator that was read up?")
    return torch.cat(routes), torch.cat(margins)


def on_model(value, model):
    """A tensor on the model's device, and in its dtype where it is not of integers; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    return value.to(model.device, model.dtype) if value.is_floating_point() else value.to(model.device)


def input_independent(routes: Tensor) -> list[int]:
    """The layers that decide before a routing token can have read anything: up to the first that all rows keep.

    Args:
        routes: (N, L) bool.
    """
    first_kept = routes.any(dim=0).int().argmax().item()  # 0 if none is kept: then nothing was read by any of them
    return list(range(first_kept + 1))


# --------------------------------------------------------------------------------------------------- biases to shares


@dataclass
class Point:
    """What a bias skipped: the share of the questions the table is made from, and of those held out, if any are."""

    share: float
    held_out: float | None = None


@dataclass
class SkipCurve:
    """Which bias skips which share, as far as it was measured.

    Attributes:
        measure: runs the model with a bias.
        points: bias to what it skipped. What +inf and -inf skip is known without a pass.
        margins: (M,) of the layers that are shifted, divided by their scale and sorted, as they are without a bias:
            where to look first.
        layer_scale: L factors of the bias.
        questions, held_out_questions: how many there are.
    """

    measure: Callable[[float], Point]
    points: dict[float, Point]
    margins: Tensor
    layer_scale: list[float]
    questions: int
    held_out_questions: int

    def around(self, ratio: float) -> tuple[float, float] | None:
        """The biases next to a wanted ratio: from +inf down, the last that skips less, and the one that does not.

        Returns: `None` if no bias can skip so little, or so much.
        """
        for above, below in pairwise(sorted(self.points, reverse=True)):
            if self.points[above].share < ratio <= self.points[below].share:
                return above, below
        return None

    def nearest(self, ratio: float) -> tuple[float, float]:
        """The measured one of the biases around a ratio that comes nearest to it, and by how much it misses it."""
        misses = {bias: abs(self.points[bias].share - ratio) for bias in self.around(ratio) if math.isfinite(bias)}
        return min(misses.items(), key=lambda item: item[1])

    @property
    def spread(self) -> float:
        """How far apart the margins are: the scale of biases."""
        return max((self.margins[-1] - self.margins[0]).item(), 1e-3)

    def off_the_edge(self, bias: float, step: int) -> float:
        """A bias measured a little way off a jump, on whose edge rounding would decide; `step` +1 is up, -1 down."""
        moved = rounded(bias + step * 0.01 * self.spread)
        if moved not in self.points:
            self.points[moved] = self.measure(moved)
        return moved

    def refine(self, ratio: float, tolerance: float) -> bool:
        """Measure biases until one gives a ratio, or two that miss it are as good as the same.

        Returns: whether anything was measured.
        """
        before = len(self.points)
        while (ends := self.around(ratio)) is not None:
            if self.nearest(ratio)[1] <= tolerance or ends[0] - ends[1] <= 1e-4 * self.spread:
                break
            # Every other guess halves the interval, however the share jumps in it.
            bias = self.guess(ratio, *ends, halve=(len(self.points) - before) % 2 == 1)
            if bias in self.points:
                break
            self.points[bias] = self.measure(bias)
        return len(self.points) > before

    def guess(self, ratio: float, above: float, below: float, halve: bool) -> float:
        """A bias between two others, in the digits that are stored: what is measured is what will be used."""
        less, more = self.points[above].share, self.points[below].share
        if math.isfinite(above) and math.isfinite(below):
            part = 0.5 if halve else min(max((ratio - less) / (more - less), 0.05), 0.95)
            return rounded(above + part * (below - above))
        lowest, highest = self.points[math.inf].share, self.points[-math.inf].share
        place = int((ratio - lowest) / (highest - lowest) * len(self.margins))
        expected = -self.margins[min(place, len(self.margins) - 1)].item()  # if no decision touched another
        if above > expected > below and not halve:
            return rounded(expected)
        step = max(abs(expected), self.spread / 8)
        known = below if math.isfinite(below) else above
        return rounded(known + max(abs(known), step) * (1 if math.isfinite(below) else -1))


def rounded(number: float) -> float:
    return float(f"{number:.6g}")


def start_curve(model, batches: Iterable[dict], layer_scale: Sequence[float] | None, progress: Callable) -> SkipCurve:
    """The curve after its first pass, without a bias.

    Raises: ValueError as `calibrate`.
    """
    num_layers = model.config.text_config.num_hidden_layers
    routes, margins = decisions(model, batches, [0.0] * num_layers)
    held_out = torch.arange(len(routes)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    varies = margins.std(dim=0, correction=0)
    for layer in input_independent(routes):
        varies[layer] = 0.0
    is_shifted = varies.isfinite() & (varies > 0)  # a layer without a router has infinite margins
    if not is_shifted.any():
        raise ValueError(
            f"no router decides otherwise for one question than for another among {len(routes)}: are they all the "
            "same, or were the routers never trained?"
        )
    scale = [float(shifted) for shifted in is_shifted] if layer_scale is None else list(map(float, layer_scale))
    if len(scale) != num_layers or not all(0 <= one < math.inf for one in scale) or not any(scale):
        raise ValueError(f"layer_scale must be {num_layers} factors from 0 on, not all 0, got {layer_scale}")
    is_shifted = torch.tensor([one > 0 for one in scale]) & margins.isfinite().all(dim=0)

    def point(routes: Tensor) -> Point:
        skipped = 1 - routes.float().mean(dim=1)
        return Point(skipped[~held_out].mean().item(), skipped[held_out].mean().item() if held_out.any() else None)

    def measure(bias: float) -> Point:
        found = point(decisions(model, batches, [bias * one for one in scale])[0])
        progress(bias, found.share)
        return found

    ends = {}
    for bias, keeps in ((math.inf, True), (-math.inf, False)):
        ends[bias] = routes[:1].clone()
        ends[bias][:, is_shifted] = keeps
    points = {bias: Point(1 - route.float().mean().item()) for bias, route in ends.items()}
    points[0.0] = point(routes)
    progress(0.0, points[0.0].share)
    number = int(held_out.sum())
    margins = (margins[~held_out][:, is_shifted] / torch.tensor(scale)[is_shifted]).flatten().sort().values
    return SkipCurve(measure, points, margins, scale, len(routes) - number, number)


def table_of(curve: SkipCurve, ratios: list[float], fingerprint: str) -> SkipCalibration:
    """The table of what was measured; logs which ratios are left out.

    Raises: ValueError if that is all of them.
    """
    entries, gaps = {}, {}
    for ratio in ratios:
        ends = curve.around(ratio)
        if ends is None:
            continue
        bias, miss = curve.nearest(ratio)
        if miss <= LARGEST_ERROR:
            entries[ratio] = bias
        else:
            ends = curve.off_the_edge(ends[0], +1), curve.off_the_edge(ends[1], -1)
            gaps[ends] = [round(curve.points[end].share, 4) for end in ends]
    for (above, below), (low, high) in gaps.items():
        entries = {r: bias for r, bias in entries.items() if not (low < r < high or above > bias > below)}
        entries |= {share: end for share, end in ((low, above), (high, below)) if share > 0}
    gaps = sorted(gaps.values())
    if lost := [ratio for ratio in ratios if ratio not in entries]:
        lowest, highest = (curve.points[bias].share for bias in (math.inf, -math.inf))
        reason = f"skip ratios {lost} cannot be had: the routers can skip from {lowest:.3g} to {highest:.3g}" + (
            f", and no bias gives a share between {' or between '.join(f'{a} and {b}' for a, b in gaps)}"
            if gaps
            else ""
        )
        if not entries:
            raise ValueError(reason)
        logger.warning(reason)
    ordered = sorted(entries.items())
    points = [curve.points[bias] for _, bias in ordered]
    table = SkipCalibration(
        skip_ratio=[ratio for ratio, _ in ordered],
        route_bias=[bias for _, bias in ordered],
        realised=[round(point.share, 6) for point in points],
        held_out=[round(point.held_out, 6) for point in points] if curve.held_out_questions else None,
        layer_scale=curve.layer_scale,
        gaps=gaps,
        questions=curve.questions,
        held_out_questions=curve.held_out_questions,
        routers=fingerprint,
    )
    return SkipCalibration.of_dict(table.to_dict(), len(curve.layer_scale))


__all__ = ["calibrate"]
