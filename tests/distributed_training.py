"""What `test_distributed.py` starts, in one process or in several: short training runs of a tiny model.

    accelerate launch --config_file ... tests/distributed_training.py OUT [RUN ...]

Every run writes OUT/RUN.pt from the first rank: losses by step, weights at the end, and what the ranks decided. With
ACCELERATE_USE_FSDP in the environment, which `accelerate launch` sets from an FSDP config, weights are sharded.

W processes, B rows of one process, T turns, L decoder layers.
"""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import tiny
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import distributed
from transformers import TrainingArguments

from roe_llava.training.objective import Objective
from roe_llava.training.schedule import StageSchedule
from roe_llava.training.teacher import RouteTeacher, TaughtObjective, TaughtSchedule, Teaching
from roe_llava.training.trainer import RoeTrainer

GLOBAL_BATCH = 4
NEW_PARTS = {"adapter": 1e-2, "router": 1e-2, "routing_tokens": 1e-2}


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        rates: learning rate per parameter group.
        budget: of the objective.
        text_only: rows without a picture.
        settings: training arguments.
        resume: continue from checkpoint-4 of this run.
        is_taught: whether a teacher gives routes.
    """

    rates: dict
    budget: str = "example"
    text_only: tuple[int, ...] = ()
    settings: dict = field(default_factory=dict)
    resume: str | None = None
    is_taught: bool = False


FULL = NEW_PARTS | {"base": 1e-3}
SAVED = {"save_strategy": "steps", "save_steps": 4}
TEXT_ONLY = tuple(range(0, 40, 2))  # half of the rows: by chance, batches of two of them on one rank alone
RUNS = {
    "full": Run(FULL, text_only=TEXT_ONLY, settings=SAVED),
    "frozen": Run(NEW_PARTS),
    "batch-budget": Run(NEW_PARTS, budget="batch"),
    "checkpointed": Run(FULL, settings={"gradient_checkpointing": True, "gradient_accumulation_steps": 2}),
    "resumed": Run(FULL, text_only=TEXT_ONLY, resume="full"),
    "taught": Run(FULL, is_taught=True),
}


def rows(text_only: tuple[int, ...]) -> list[dict]:
    """40 examples of one or two turns, as long as each other."""
    generator = torch.Generator().manual_seed(0)
    data = []
    for index in range(40):
        words = torch.randint(3, 100, (11,), generator=generator)
        has_picture = index not in text_only
        before = torch.tensor([1, *[tiny.IMAGE if has_picture else 3] * 4])
        ids = torch.cat([before, words])
        segments = torch.tensor([0] * 5 + [1] * 3 + [-1] * 2 + ([2] * 4 + [-1] * 2 if index % 3 else [-1] * 6))
        labels = ids.masked_fill(segments >= 0, -100)
        pixels = torch.randn(3, 28, 28, generator=generator)
        example = {"input_ids": ids, "labels": labels, "routing_segments": segments}
        data.append(example | ({"pixel_values": pixels} if has_picture else {}))
    return data


def stack(examples: list[dict]) -> dict:
    """A batch of them; no picture at all where no example has one."""
    names = ("input_ids", "labels", "routing_segments")
    batch = {name: torch.stack([example[name] for example in examples]) for name in names}
    pixels = [example["pixel_values"] for example in examples if "pixel_values" in example]
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    return batch | ({"pixel_values": torch.stack(pixels)} if pixels else {})


class Watched(RoeTrainer):
    """Keeps the mode, the decisions, and whether there were pictures, of every batch of this rank."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.modes, self.decisions, self.pictures = [], [], []

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        self.pictures.append("pixel_values" in inputs)
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        self.modes.append(self.model.model.routing_phase.mode)
        self.decisions.append(outputs.turn_skip_weights.detach()[:, 0] > 0.5)
        return (loss, outputs) if return_outputs else loss


def how_to_train(run: Run):
    """(schedule, objective, teacher)."""
    if run.is_taught:
        teaching = Teaching(num_routes=4, searched_routes=10, searched_examples=8, refit_every=8)
        return TaughtSchedule(0.3, 0.25, 0.75), TaughtObjective(), RouteTeacher(0.3, teaching)
    weights = {"budget_weight": 2.0, "information_weight": 0.3} if run.budget == "batch" else {}
    schedule = StageSchedule(warmup_end=0.3, soft_end=0.6, last_mode="hard", gumbel_end=0.8)
    return schedule, Objective(0.3, budget=run.budget, **weights), None


def train(name: str, out: Path) -> None:
    """One run, and its record."""
    run = RUNS[name]
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    accumulation = run.settings.get("gradient_accumulation_steps", 1)
    settings = {"save_strategy": "no", **run.settings}
    arguments = TrainingArguments(
        output_dir=str(out / name),
        max_steps=8,
        learning_rate=1.0,  # not read: every group has its own
        logging_steps=1,
        report_to=[],
        remove_unused_columns=False,
        use_cpu=True,
        disable_tqdm=True,
        per_device_train_batch_size=GLOBAL_BATCH // world_size,
        **settings,
    )
    if os.environ.get("ACCELERATE_USE_FSDP") and arguments.world_size > 1:
        # accelerate 1.15 shards on accelerators alone; what it then does works on gloo and a processor as it is.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    model = tiny.tiny_model()
    schedule, objective, teacher = how_to_train(run)
    trainer = Watched(
        model,
        schedule=schedule,
        objective=objective,
        teacher=teacher,
        rates=run.rates,
        args=arguments,
        train_dataset=rows(run.text_only),
        data_collator=stack,
    )
    trainer.routing_callback.draws_by_row = True  # in one process too
    assert trainer._train_batch_size * world_size == GLOBAL_BATCH
    trainer.train(resume_from_checkpoint=str(out / run.resume / "checkpoint-4") if run.resume else None)
    record(trainer, out / f"{name}.pt", accumulation)


def record(trainer: Watched, target: Path, accumulation: int) -> None:
    """Write losses, weights and decisions; all ranks take part."""
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    decisions = of_all_ranks(torch.stack(trainer.decisions))
    pictures = of_all_ranks(torch.tensor(trainer.pictures))
    if trainer.args.process_index == 0:
        history = trainer.state.log_history
        kept = {
            "losses": [
                entry["loss"] for entry in history if "loss" in entry
            ],  # of a resumed run, from the first step on
            "modes": trainer.modes[::accumulation],
            "decisions": decisions,
            "pictures": pictures,
            "weights": {name.removeprefix("module."): tensor.clone() for name, tensor in weights.items()},
            "distributed": str(trainer.accelerator.distributed_type),
            "wrapped": type(trainer.model_wrapped).__name__,
        }
        torch.save(kept, target)


def of_all_ranks(own: torch.Tensor) -> torch.Tensor:
    """(steps, W, ...) from (steps, ...) of every rank."""
    if not distributed.is_initialized():
        return own[:, None]
    gathered = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
    distributed.all_gather(gathered, own)
    return torch.stack(gathered, dim=1)


if __name__ == "__main__":
    for chosen in sys.argv[2:] or RUNS:
        train(chosen, Path(sys.argv[1]))
    if distributed.is_initialized():
        # Everything is written. Taking gloo down races with its own threads now and then (torch 2.13: "terminate called
        # without an active exception"), which would fail a run that was right.
        distributed.barrier()
        sys.stdout.flush()
        os._exit(0)
