"""The end of training: the bias of the routers' decisions with which a model skips what was asked for.

Routers that imitate routes, or go on while everything around them learns, end up near the target and not on it. Which
bias brings them there is measured as `calibrate` does, on questions that are not learned from where there are any, and
stays in `config.route_bias`.

B batch, S sequence, L decoder layers.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from tqdm import tqdm
from transformers.utils import logging

from .calibration import calibrate

logger = logging.get_logger(__name__)

ENOUGH = 200  # questions below which the share found is a guess: one routes otherwise than another by some 10 points


@dataclass(frozen=True)
class Settled:
    """What was found.

    Attributes:
        questions: run to find it.
        route_bias: one for all layers that are shifted.
        skip_ratio: with the bias, on the questions that it was found with.
        held_out: the same on those that had no say in it; `None` if there were too few to hold some out.
    """

    questions: int
    route_bias: float
    skip_ratio: float
    held_out: float | None

    def to_dict(self) -> dict:
        return asdict(self)


def settle(model, batches: Sequence[dict], target_skip_ratio: float, quiet: bool = False) -> Settled | None:
    """Find `config.route_bias` with which questions skip the target in the mean, and set it.

    Args:
        model: in eval mode.
        batches: of conversations as training has them or of prompts, with routing_segments; labels are left aside.
        target_skip_ratio: wanted share of skipped (question, layer) pairs.
        quiet: show no progress.
    Returns: what was found; `None` if no bias comes within 2 points of the target, which is logged. The model then
        decides without one.
    """
    model.config.route_bias = None
    if not target_skip_ratio:
        return None
    asked = [one_question_each(batch, seed) for seed, batch in enumerate(batches)]
    with tqdm(desc="settling the skip ratio", unit="pass", leave=False, disable=quiet) as bar:
        try:
            table = calibrate(model, asked, [target_skip_ratio], progress=lambda bias, share: bar.update())
            biases = table.biases_for(target_skip_ratio)
        except ValueError as error:
            logger.warning(f"the skip ratio stays as the routers have it: {error}")
            return None
    model.config.route_bias = biases
    number = table.questions + table.held_out_questions
    if number < ENOUGH:
        logger.warning(f"the skip ratio was settled on {number} questions: others may differ by some points")
    place = table.skip_ratio.index(target_skip_ratio)
    held_out = None if table.held_out is None else table.held_out[place]
    return Settled(number, table.route_bias[place], table.realised[place], held_out)


def one_question_each(batch: dict, seed: int) -> dict:
    """A batch of conversations as prompts: of every row a turn, drawn at random, is the one that is asked.

    What stands behind its question stays where it is, read by no routing token; under causal attention it changes
    nothing before it.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    segments = inputs["routing_segments"]
    turns = segments.amax(dim=1, keepdim=True).clamp(min=1)
    drawn = torch.rand(turns.shape, generator=torch.Generator().manual_seed(seed)).to(segments.device)
    asked = 1 + (drawn * turns).long()
    return inputs | {"routing_segments": hide_later_turns(segments, asked)}


def hide_later_turns(segments: Tensor, asked: Tensor) -> Tensor:
    """(B, S) segments of which turns behind the one asked, (B, 1), are read by no routing token."""
    return segments.masked_fill(segments > asked, -1)


__all__ = ["Settled", "settle"]
