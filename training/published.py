"""RoE training as the published code does it: masks, schedule, loss and positions, in one recipe.

Our defaults mend what is wrong there (`docs/published_training.md` lists every difference). `published_recipe` switches
the published behaviour on, for comparing with published numbers:

    recipe = published_recipe(micro_batches=len(loader), accumulation=4)
    recipe.prepare(model)
    RoeTrainer(model, schedule=recipe.schedule, objective=recipe.objective, rates=recipe.rates,
               data_collator=recipe.collator(ChatCollator(...), model.config), args=..., train_dataset=...)

The rules were inferred from recorded runs (`tests/golden/roe_reference`), which they reproduce.

B batch, R routing tokens (1 image + turns), S sequence, P tokens per image.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.utils import logging

from ..phases_roe import RoutingPhase
from ..routing_roe import turns_of_tokens
from .objective import Objective

logger = logging.get_logger(__name__)

# A row without image counts this many tokens as its system text, however long that is.
TEXT_ONLY_CONTEXT = 34
# Keep bias per target skip ratio; other targets have none.
KEEP_BIAS = {0.0: 1.0, 0.1: 0.55279, 0.2: 0.36754, 0.3: 0.2254, 0.4: 0.10557}
# Optimizer groups of the published trainer and the first stage in which each has a learning rate. Without DeepSpeed,
# which drops the empty groups, projector biases start one stage early.
OPTIMIZER_GROUPS = {
    "base": 2,
    "base_biases": 2,
    "projector": 2,
    "projector_biases": 1,
    "router_biases": 0,
    "router": 0,
    "adapter_biases": 0,
    "adapter": 0,  # with the routing tokens
}


# --------------------------------------------------------------------------------------------------------------- masks


@dataclass(frozen=True)
class PublishedMasks:
    """Masks of a batch in the published layout: R routing tokens first, then the tokens.

    Attributes:
        question: (B, R, R + S) bool, what a routing token reads, itself included; row 0 is the image token.
        weight: (B, R, R + S) bool, which tokens move with a row's decision, the routing token itself included.
        labels: (B, R + S), -100 on routing tokens; `None` at generation.
    """

    question: Tensor
    weight: Tensor
    labels: Tensor | None = None

    @property
    def turn_share(self) -> Tensor:
        """(B, R, 1): 1 / (turns of the example) on rows that read or move a token, else 0."""
        tokens = self.question.shape[1]
        used = (self.question | self.weight)[..., tokens:].any(dim=-1, keepdim=True)
        return used / used[:, 1:].sum(dim=1, keepdim=True).clamp(min=1)


def scan_turns(labelled: Sequence[bool], boundary: int) -> tuple[list[range], list[range]]:
    """Tokens that are read by, and that move with, the image part (number 0) and every turn of one row.

    One pass over the row. A question ends before the first labelled token; a turn ends behind the last labelled one;
    the image part ends behind token `boundary`, wherever that falls. Questions and turns are counted apart and none is
    empty, so an answer close to the boundary gives odd parts: the start of an answer may be read as a question, the
    token behind an answer may be a turn of its own.

    Args:
        labelled: S flags, True where a token has a label.
        boundary: index of the last token of the image part.
    """
    questions, turns = [], []
    question_start = turn_start = 0
    for place, is_label in enumerate(labelled):
        was_label = place > 0 and labelled[place - 1]
        if is_label and not was_label:
            end = max(place, question_start + 1)
            questions.append(range(question_start, end))
            question_start = end
        elif was_label and not is_label:
            end = max(place, turn_start + 1)
            turns.append(range(turn_start, end))
            question_start = turn_start = end
        if place == boundary:
            questions.append(range(question_start, place + 1))
            turns.append(range(turn_start, place + 1))
            question_start = turn_start = place + 1
    if labelled and not labelled[-1] and question_start < len(labelled):
        questions.append(range(question_start, len(labelled)))
    if turn_start < len(labelled):
        turns.append(range(turn_start, len(labelled)))
    return questions, turns


def context_length(input_ids: Tensor, image_token_id: int, tokens_per_image: int) -> int:
    """Tokens of a row's image part at generation: up to the first image's end, however many images there are."""
    places = (input_ids == image_token_id).nonzero()
    return int(places[0]) + tokens_per_image if len(places) else TEXT_ONLY_CONTEXT


def published_masks(
    input_ids: Tensor,
    labels: Tensor | None,
    image_token_id: int,
    tokens_per_image: int,
    attention_mask: Tensor | None = None,
) -> PublishedMasks:
    """The published question and weight masks of a batch.

    Args:
        input_ids: (B, S), every image as P placeholder tokens.
        labels: (B, S), -100 where there is no target. `None`: the masks of generation, where two routing tokens split
            the prompt in two and every token moves with the text token.
        image_token_id: the placeholder.
        tokens_per_image: P.
        attention_mask: (B, S), 0 on padding, which belongs to no row.
    """
    real = torch.ones_like(input_ids).bool() if attention_mask is None else attention_mask.bool()
    parts, starts = [], []
    for row, is_real in enumerate(real):
        ids = input_ids[row][is_real]
        context = context_length(ids, image_token_id, tokens_per_image)
        if labels is None:
            split = min(context, len(ids))
            parts.append(([range(split), range(split, len(ids))], [range(0), range(len(ids))]))
        else:  # in training the image part has one token more
            parts.append(scan_turns((labels[row][is_real] != -100).tolist(), context))
        starts.append(int(is_real.long().argmax()))
    num_tokens = max(len(ranges) for row_parts in parts for ranges in row_parts)
    masks = [torch.zeros(*input_ids.shape[:1], num_tokens, input_ids.shape[1], dtype=torch.bool) for _ in range(2)]
    for row, (start, row_parts) in enumerate(zip(starts, parts, strict=True)):
        for mask, ranges in zip(masks, row_parts, strict=True):
            for number, part in enumerate(ranges):
                mask[row, number, start + part.start : start + part.stop] = True
    itself = torch.eye(num_tokens, dtype=torch.bool).expand(len(parts), -1, -1)
    question, weight = (torch.cat([itself, mask], dim=-1).to(input_ids.device) for mask in masks)
    padded = None if labels is None else torch.nn.functional.pad(labels, (num_tokens, 0), value=-100)
    return PublishedMasks(question, weight, padded)


def published_segments(
    input_ids: Tensor,
    labels: Tensor | None,
    image_token_id: int,
    tokens_per_image: int,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """(B, S) `routing_segments` that read what the published question mask reads. Arguments: see `published_masks`.

    The model moves a token with the latest question at or before it. The published weight mask does so too, except
    where an answer meets the end of the image part; rows that have such tokens are named in a warning.
    """
    masks = published_masks(input_ids, labels, image_token_id, tokens_per_image, attention_mask)
    num_tokens = masks.question.shape[1]
    read, moved = masks.question[..., num_tokens:], masks.weight[..., num_tokens:]
    segments = torch.where(read.any(dim=1), read.long().argmax(dim=1), -1)
    if labels is not None:
        differs = moved.any(dim=1) & (turns_of_tokens(segments) != moved.long().argmax(dim=1))
        if differs.any():
            rows = differs.any(dim=1).nonzero().flatten().tolist()
            logger.warning(
                f"rows {rows}: {int(differs.sum())} tokens move with another turn in the published weight mask than "
                "with the latest question, as the model has it; an answer meets the end of the image part there (in a "
                f"text-only row: of the first {TEXT_ONLY_CONTEXT} tokens)"
            )
    return segments


class PublishedCollator:
    """Puts published routing segments into the batches of another collator.

    Args:
        collate: examples -> batch with `input_ids`, `labels` and `attention_mask`.
        config: a `RoeLlavaConfig`, for the image placeholder and the tokens per image.
    """

    def __init__(self, collate: Callable[[Sequence], dict], config):
        self.collate, self.config = collate, config

    def __call__(self, examples: Sequence) -> dict:
        batch = self.collate(examples)
        segments = published_segments(
            batch["input_ids"],
            batch["labels"],
            self.config.image_token_id,
            self.config.image_seq_length,
            batch.get("attention_mask"),
        )
        return {**batch, "routing_segments": segments}


# ------------------------------------------------------------------------------------------------------------ schedule


@dataclass(frozen=True)
class PublishedSchedule:
    """Stages, temperature, keep bias and learning rates of every micro-batch of a published run.

    Stands in for `StageSchedule`. Everything but the learning rate is counted in micro-batches.

    Attributes:
        micro_batches: of the whole run: optimizer steps times `accumulation`.
        accumulation: micro-batches per optimizer step.
        target_skip_ratio: r, one of `KEEP_BIAS`.
        resumed_at: micro-batches done before the process was started again; the published counters forget them, so
            that a resumed run begins with stage 0, while its learning rates go on.
    Raises: ValueError where the published code divides by zero (under 200 micro-batches) or knows no bias.
    """

    micro_batches: int
    accumulation: int = 1
    target_skip_ratio: float = 0.3
    resumed_at: int = 0

    counts_micro_batches = True

    def __post_init__(self):
        if self.tick < 1:
            raise ValueError(
                f"the published schedule needs 200 micro-batches or more, got {self.micro_batches}: its decay "
                "interval, 0.5 % of them, would be 0; StageSchedule has no such limit"
            )
        if self.accumulation < 1 or self.micro_batches % self.accumulation:
            raise ValueError(
                f"micro_batches must be a multiple of accumulation, got {self.micro_batches} and {self.accumulation}"
            )
        if self.target_skip_ratio not in KEEP_BIAS:
            raise ValueError(
                f"the published schedule knows target_skip_ratio {sorted(KEEP_BIAS)}, got {self.target_skip_ratio}; "
                "StageSchedule takes any in [0, 0.5]"
            )

    @property
    def tick(self) -> int:
        """Micro-batches between two decays."""
        return int(0.005 * self.micro_batches)

    def stage_at(self, micro_batch: int) -> int:
        """0 random warm-up, 1 soft mixture, 2 the rest."""
        done = self.counted(micro_batch)
        return (done >= int(0.3 * self.micro_batches)) + (done >= int(0.5 * self.micro_batches))

    def counted(self, micro_batch: int) -> int:
        """What the published counter shows."""
        return micro_batch - self.resumed_at if micro_batch >= self.resumed_at else micro_batch

    def state_at(self, micro_batch: int) -> tuple[int, float, float]:
        """(stage, temperature, keep bias) in force during a micro-batch, counted from 0.

        Decays fall on multiples of `tick` from the beginning of stage 1 on (of the stage or of the run: the recorded
        runs cannot tell, as both begin there on a multiple).
        """
        stage, temperature, bias = self.stage_at(micro_batch), 10.0, KEEP_BIAS[self.target_skip_ratio]
        begin = int(0.3 * self.micro_batches)
        for _ in range(begin, self.counted(micro_batch) + 1, self.tick):
            temperature, bias = temperature * 0.95, bias * 0.85
        return stage, temperature, 0.0 if stage == 2 else bias

    def phase_at(self, micro_batch: int) -> RoutingPhase:
        """How routers decide during a micro-batch."""
        stage, temperature, bias = self.state_at(micro_batch)
        return RoutingPhase("random" if stage == 0 else "soft", temperature, bias)

    def rates_at(self, micro_batch: int, new_rate: float = 4e-4, base_rate: float = 2e-6) -> dict[str, float]:
        """Learning rate of every published optimizer group during a micro-batch.

        A rate is set between optimizer steps and, in a frozen group, overwritten with 0 during a micro-batch; so the
        stage that counts is that of a step's first micro-batch.

        Args:
            micro_batch: counted from 0.
            new_rate: peak for routers, adapters and routing tokens.
            base_rate: peak for the rest.
        """
        step, steps = micro_batch // self.accumulation, self.micro_batches // self.accumulation
        factor, stage = published_cosine(step, steps), self.stage_at(step * self.accumulation)
        rates = {name: new_rate if first == 0 else base_rate for name, first in OPTIMIZER_GROUPS.items()}
        return {name: rate * factor * (stage >= OPTIMIZER_GROUPS[name]) for name, rate in rates.items()}

    def micro_batch_of(self, progress: float) -> int:
        """The micro-batch that a share of the run in [0, 1) falls into."""
        return int(progress * self.micro_batches + 1e-6)  # a share k / N may have been rounded down

    def stage(self, progress: float) -> int:
        """As `StageSchedule.stage`."""
        return self.stage_at(self.micro_batch_of(progress))

    def phase(self, progress: float) -> RoutingPhase:
        """As `StageSchedule.phase`."""
        return self.phase_at(self.micro_batch_of(progress))

    def trains(self, group: str, progress: float) -> bool:
        """As `StageSchedule.trains`: the base in stage 2, the rest always (in stage 0 routers have no gradient)."""
        return group != "base" or self.stage(progress) == 2


def published_cosine(step: int, steps: int) -> float:
    """Learning rate multiplier: linear over ceil(5 %) of the optimizer steps, then half a cosine down to 0."""
    warmup = math.ceil(0.05 * steps)
    if step < warmup:
        return step / warmup
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((step - warmup) / max(1, steps - warmup)))))


# -------------------------------------------------------------------------------------------------------------- recipe


@dataclass(frozen=True)
class PublishedRecipe:
    """All of the published training: see `published_recipe`.

    Attributes:
        schedule, objective, rates: for `RoeTrainer`.
        options: fields of the model's configuration.
    """

    schedule: PublishedSchedule
    objective: Objective
    rates: dict[str, float]
    options: dict[str, object] = field(default_factory=dict)

    def prepare(self, model) -> None:
        """Set `options` in the model's configuration, and the phase a run begins with."""
        for name, value in self.options.items():
            setattr(model.config, name, value)
        model.model.routing_phase = self.schedule.phase_at(0)

    def collator(self, collate: Callable[[Sequence], dict], config) -> PublishedCollator:
        """A collator whose routing segments are the published ones."""
        return PublishedCollator(collate, config)


def published_recipe(micro_batches: int, accumulation: int = 1, target_skip_ratio: float = 0.3) -> PublishedRecipe:
    """Everything that makes a run a published one: masks, positions, loss, schedule and learning rates.

    Args:
        micro_batches: of the whole run, at least 200: optimizer steps times `accumulation`.
        accumulation: micro-batches per optimizer step.
        target_skip_ratio: 0, 0.1, 0.2, 0.3 or 0.4.
    Raises: ValueError for what the published code cannot run: see `PublishedSchedule`.
    """
    return PublishedRecipe(
        schedule=PublishedSchedule(micro_batches, accumulation, target_skip_ratio),
        objective=Objective(target_skip_ratio, budget="published"),
        rates={"adapter": 4e-4, "router": 4e-4, "routing_tokens": 4e-4, "base": 2e-6},
        options={
            "routing_positions": "spread",
            "routing_question": "all_text",
            "target_skip_ratio": target_skip_ratio,
        },
    )


__all__ = [
    "PublishedMasks",
    "PublishedRecipe",
    "PublishedSchedule",
    "published_masks",
    "published_recipe",
    "published_segments",
]
