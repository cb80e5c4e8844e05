"""Times of all systems of `compare` in one process, in turn, on the same questions."""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, quantiles

import torch
from transformers import BatchFeature

from ..examples.tiny_world.asking import prompts
from ..examples.tiny_world.evaluate import family_examples
from ..examples.tiny_world.world import FAMILIES
from .compare_measure import counted_prompts, requested
from .compare_systems import WITH_EXPERTS, Trained, reopen
from .timing import PARTS, time_once

TIMED = ("base", "dense_mlps", "dense_adapters", "static", "roe", "moe_llava", "evomoe", "roe_moe")
IMPLEMENTATIONS = ("eager", "grouped_mm")  # batched_mm copies experts for every token: far too slow on a processor
BATCH_SIZES = (1, 8)
TOKENS = 8  # decoding steps behind every prefill
BASE = "base"


@dataclass(frozen=True)
class Timed:
    """A system whose time is taken.

    Attributes:
        implementation: what multiplies experts; `None` for a model without any.
    """

    method: str
    trained: Trained
    implementation: str | None = None

    @property
    def name(self) -> str:
        return self.method if self.implementation is None else f"{self.method} {self.implementation}"

    def run(self, prompt: BatchFeature) -> dict:
        if self.implementation is not None:
            self.trained.model.set_experts_implementation(self.implementation)
        times = time_once(self.trained.model, requested(self.trained, prompt), TOKENS)
        return {part: times[part] for part in PARTS}


def timed_systems(models: Path, seed: int) -> list[Timed]:
    """Those whose models are there."""
    found = []
    for method in TIMED:
        folder = models / f"{method}-seed{seed}"
        if folder.is_dir():
            trained = reopen(method, folder)
            own = IMPLEMENTATIONS if method in WITH_EXPERTS else (None,)
            found += [Timed(method, trained, one) for one in own]
    return found


def speeds(
    models: Path, seed: int, rounds: int, progress: Callable[[Iterable, str], Iterable] = lambda items, _: items
) -> dict:
    """Seconds of prefill and of one decoded token, medians, and ratios to the base in the same round.

    Args:
        models: folder of the models.
        rounds: how often every system runs every prompt.
        progress: wraps rounds; it gets a description too.
    """
    systems = timed_systems(models, seed)
    result = {"rounds": rounds, "tokens": TOKENS, "seed": seed, "threads": torch.get_num_threads(), "batches": {}}
    for batch_size in BATCH_SIZES:
        described = progress(range(rounds), f"times, batch {batch_size}")
        result["batches"][str(batch_size)] = time_batch(systems, batch_size, described, random.Random(seed))
    return result


def asked(trained: Trained, batch_size: int) -> list[BatchFeature]:
    """Prompts: single questions, or as many batches of one family as there are families."""
    if batch_size == 1:
        return counted_prompts(trained)
    return [prompts(trained.processor, family_examples(family, batch_size)) for family in FAMILIES]


def time_batch(systems: Sequence[Timed], batch_size: int, rounds: Iterable[int], draw: random.Random) -> list[dict]:
    """One dict per system: what it is, and per part `seconds`, `per_second`, `ratio` and `quartiles` of the ratios."""
    inputs = {system.name: asked(system.trained, batch_size) for system in systems}
    for system in systems:
        system.run(inputs[system.name][0])  # what is slow the first time
    runs: dict[str, list[list[dict]]] = {system.name: [] for system in systems}
    for _ in rounds:
        for own in runs.values():
            own.append([])
        for number in range(len(inputs[systems[0].name])):
            for system in draw.sample(systems, len(systems)):
                runs[system.name][-1].append(system.run(inputs[system.name][number]))
    rows = []
    for system in systems:
        row = {"method": system.method, "implementation": system.implementation}
        rows.append(row | {part: compared(runs[system.name], runs[BASE], part, batch_size) for part in PARTS})
    return rows


def compared(own: list[list[dict]], base: list[list[dict]], part: str, batch_size: int) -> dict:
    """One part of a system's times; both lists are rounds of prompts."""
    by_prompt = [median(one[part] for one in runs) for runs in zip(*own, strict=True)]
    ratios = [
        b[part] / a[part] for mine, theirs in zip(own, base, strict=True) for a, b in zip(mine, theirs, strict=True)
    ]
    low, _, high = quantiles(ratios, n=4)
    seconds = mean(by_prompt)
    return {
        "seconds": seconds,
        "per_second": batch_size / seconds,
        "ratio": median(ratios),
        "quartiles": [low, high],
    }


def fastest(rows: Sequence[dict], method: str) -> dict | None:
    """A method's row with the experts' implementation that needs least for a prompt and an answer of `TOKENS`."""
    own = [row for row in rows if row["method"] == method]
    return min(own, key=lambda row: row["prefill"]["seconds"] + TOKENS * row["decode"]["seconds"], default=None)


__all__ = ["fastest", "speeds"]
