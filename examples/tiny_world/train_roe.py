"""Trains the routing parts of the tiny world: `python -m roe_llava.examples.tiny_world.train_roe OUT`.

The base stays frozen, so the result is an adapter file that `roe-llava graft` puts onto it. Beside it stands what it
has to be held against: the base, and the layers that matter least dropped for good with adapters trained just as long.
"""

import argparse
import itertools
import json
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import TrainingArguments

from ...convert.adapter_file import save_adapter
from ...convert.fingerprint import describe_base
from ...convert.output import check_target, write_json
from ...modeling_roe_llava import RoeLlavaForConditionalGeneration
from ...processing_roe import RoeLlavaProcessor
from ...training.data import ChatCollator
from ...training.objective import Objective
from ...training.schedule import StageSchedule
from ...training.settle import Settled, settle
from ...training.teacher import RouteTeacher, TaughtObjective, TaughtSchedule, Teaching
from ...training.trainer import RoeTrainer
from .asking import ask
from .evaluate import family_examples, share_right
from .world import FAMILIES, TinyWorld, messages

BASE = Path(__file__).parent / "checkpoint" / "base"
RATES = {"adapter": 2e-3, "router": 1e-3, "routing_tokens": 1e-3}


class Conversations(Dataset):
    """Training conversations: every other one has a single turn, the rest up to three.

    A question asked alone moves its own context, as at inference; several turns share one.
    """

    def __init__(self, size: int, seed: int):
        self.single = TinyWorld("train", size, seed=seed, num_turns=1)
        self.several = TinyWorld("train", size, seed=seed + 1, num_turns=3)

    def __len__(self):
        return len(self.single)

    def __getitem__(self, index):
        return (self.single if index % 2 else self.several)[index]


@dataclass
class Recipe:
    """How a run routes and what it minimises."""

    schedule: StageSchedule | TaughtSchedule
    objective: Objective | TaughtObjective
    teacher: RouteTeacher | None = None


def recipe(target: float, seed: int) -> Recipe:
    """Taught routers, as the shipped parts were trained; benchmarks/quality.py holds it against others."""
    teaching = Teaching(searched_routes=64, searched_examples=120)
    return Recipe(TaughtSchedule(target, 0.35, 0.75), TaughtObjective(), RouteTeacher(target, teaching, seed))


def pinned() -> Recipe:
    """For a run along pinned routes: adapters learn, nothing is decided."""
    return Recipe(StageSchedule(warmup_end=1.0, soft_end=1.0), Objective(0.0))


def load(base: Path, adapter_size: int, seed: int):
    """The tiny base in float32 with untrained routing parts, and its processor."""
    torch.manual_seed(seed)
    model = RoeLlavaForConditionalGeneration.from_pretrained(base, adapter_size=adapter_size, dtype=torch.float32)
    return model, RoeLlavaProcessor.from_pretrained(base)


def training_arguments(args, folder: Path, **others) -> TrainingArguments:
    """What all runs over the tiny world share.

    Args:
        args: with `steps`, `batch_size` and `seed`.
        others: of `TrainingArguments`, beside these or in their place.
    """
    shared = {
        "output_dir": str(folder),
        "max_steps": args.steps,
        "per_device_train_batch_size": args.batch_size,
        "logging_steps": max(1, args.steps // 20),
        "save_strategy": "no",
        "report_to": [],
        "remove_unused_columns": False,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,  # of the run
        "dataloader_pin_memory": torch.cuda.is_available(),
        "seed": args.seed,
    }
    return TrainingArguments(**(shared | others))


def train(
    model,
    processor,
    how: Recipe,
    args,
    folder: Path,
    routes: torch.Tensor | None = None,
    data: Dataset | None = None,
    **others,
) -> list[dict]:
    """One run of the stock Trainer over the tiny world; `routes` pins a route instead of learning one.

    Args:
        args: with `steps`, `batch_size` and `seed`.
        data: conversations to read in place of `Conversations` of that size and seed.
        others: of `TrainingArguments`, see `training_arguments`.
    Returns: Trainer's log, its last entry with `train_runtime` in seconds.
    """
    collate = ChatCollator(processor, messages)
    settings = training_arguments(args, folder, **others)
    trainer = RoeTrainer(
        model,
        schedule=how.schedule,
        objective=how.objective,
        teacher=how.teacher,
        rates=RATES if routes is None else {"adapter": RATES["adapter"]},
        args=settings,
        train_dataset=Conversations(args.steps * args.batch_size, args.seed + 1) if data is None else data,
        data_collator=collate if routes is None else lambda examples: {**collate(examples), "routes": routes},
    )
    trainer.train()
    return trainer.state.log_history


def settle_on_held_out(model, processor, target: float, per_family: int = 100) -> Settled | None:
    """Bring the realised skip ratio to the target, on validation questions asked as a user asks them: one at a time."""
    collate = ChatCollator(processor, messages)
    batches = [collate(family_examples(family, per_family, "validation")) for family in FAMILIES]
    model.eval()
    return settle(model, batches, target)


def evaluate(model, processor, per_family: int, split: str, routes: dict | torch.Tensor | None = None) -> dict:
    """Accuracy, realised skip ratio and routes over all families.

    Args:
        per_family: questions per family.
        routes: pinned routes: (L,) for all questions (all True is the base itself), or per family (N, L).
    """
    accuracy, skipped, taken = {}, {}, {}
    model.eval()
    for family in tqdm(FAMILIES, desc=f"answering the {split} questions"):
        examples = family_examples(family, per_family, split)
        pinned = routes[family] if isinstance(routes, dict) else routes
        pinned = None if pinned is None else pinned.expand(per_family, -1)
        answers, taken[family] = ask(model, processor, examples, routes=pinned)
        accuracy[family] = share_right(answers, examples)
        skipped[family] = 1 - taken[family].float().mean().item()
    return {
        "accuracy": mean(accuracy),
        "skip_ratio": mean(skipped),
        "accuracy_by_family": accuracy,
        "skip_ratio_by_family": skipped,
        "taken": taken,
    }


def route_shares(taken: dict[str, torch.Tensor]) -> dict[str, float]:
    """Share of the questions per route, most common first; x for a layer that ran, - for one that did not."""
    routes = Counter("".join("x" if keep else "-" for keep in route) for route in torch.cat([*taken.values()]).tolist())
    return {route: number / routes.total() for route, number in routes.most_common()}


def controls(model, processor, args, base: dict, roe: dict) -> list[dict]:
    """What the routes are worth: the same model on other questions' routes, and on one route for all."""
    every = torch.cat([*roe["taken"].values()])
    mixed = every[torch.randperm(len(every), generator=torch.Generator().manual_seed(args.seed))]
    swapped = dict(zip(roe["taken"], mixed.split(args.per_family), strict=True))
    most_common = torch.tensor([mark == "x" for mark in next(iter(route_shares(roe["taken"])))])
    rows = {
        "base, every layer": base,
        "RoE, routes as decided": roe,
        "RoE, routes shuffled over the questions": evaluate(model, processor, args.per_family, "test", swapped),
        "RoE, its most common route for all": evaluate(model, processor, args.per_family, "test", most_common),
    }
    return [{"name": name, "accuracy": row["accuracy"], "skip_ratio": row["skip_ratio"]} for name, row in rows.items()]


def mean(by_family: dict[str, float]) -> float:
    return sum(by_family.values()) / len(by_family)


@torch.inference_mode()
def block_influence(model, processor, examples: list[dict]) -> list[float]:
    """How much each layer turns the hidden states: mean of 1 - cosine between its input and output (ShortGPT's BI)."""
    model.eval()
    batch = ChatCollator(processor, messages)(examples)
    batch.pop("labels")
    keep_all = torch.ones(model.config.text_config.num_hidden_layers, dtype=torch.bool)
    states = model(**batch, routes=keep_all, output_hidden_states=True).hidden_states
    real = batch["attention_mask"].bool()
    pairs = itertools.pairwise(states)
    return [1 - torch.cosine_similarity(x[real], y[real], dim=-1).mean().item() for x, y in pairs]


def least_influential(influence: list[float], number: int) -> list[int]:
    """The layers to drop first; the first layer, which reads the raw embeddings, is never among them."""
    return sorted(sorted(range(1, len(influence)), key=influence.__getitem__)[:number])


def static_drop(args, number: int, folder: Path) -> dict:
    """The same frozen base with the least influential layers dropped for every question, adapters trained as long."""
    model, processor = load(args.base, args.adapter_size, args.seed)
    influence = block_influence(model, processor, list(TinyWorld("validation", 128, seed=args.seed)))
    dropped = least_influential(influence, number)
    routes = torch.tensor([layer not in dropped for layer in range(len(influence))])
    untrained = evaluate_dropped(model, processor, args, dropped)
    minutes = train(model, processor, pinned(), args, folder, routes)[-1]["train_runtime"] / 60
    result = evaluate(model, processor, args.per_family, "test", routes)
    return {
        "name": f"layers {', '.join(map(str, dropped))} (least block influence) replaced for every question",
        "accuracy": result["accuracy"],
        "skip_ratio": result["skip_ratio"],
        "accuracy_without_training": untrained,
        "training_minutes": minutes,
        "accuracy_by_family": result["accuracy_by_family"],
    }


def evaluate_dropped(model, processor, args, dropped: list[int]) -> float:
    """Accuracy with layers dropped and nothing in their place."""
    ups = [model.model.language_model.layers[layer].adapter.up_proj for layer in dropped]
    saved = [up.weight.detach().clone() for up in ups]
    for up in ups:
        up.weight.data.zero_()
    routes = torch.tensor([i not in dropped for i in range(model.config.text_config.num_hidden_layers)])
    accuracy = evaluate(model, processor, args.per_family, "test", routes)["accuracy"]
    for up, weight in zip(ups, saved, strict=True):
        up.weight.data.copy_(weight)
    return accuracy


def summary(args, minutes: float, results: dict) -> dict:
    """What a reader needs to judge the run, for training.json."""
    return {
        "recipe": "frozen base; random warm-up, taught routes, the routers' own",
        "target_skip_ratio": args.target_skip_ratio,
        "steps": args.steps,
        "batch_size": args.batch_size,
        "learning_rates": RATES,
        "seed": args.seed,
        "minutes": minutes,
        "questions_per_family": args.per_family,
        "split": "test",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        **results,
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, help="adapter folder to write")
    parser.add_argument("--base", type=Path, default=BASE, help="base checkpoint (default: the shipped one)")
    parser.add_argument("--steps", type=int, default=500, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=24, help="conversations per step (default: %(default)s)")
    parser.add_argument("--target-skip-ratio", type=float, default=0.3, help="wanted share of layers skipped")
    parser.add_argument("--adapter-size", type=int, default=64, help="hidden width of the adapters")
    parser.add_argument("--per-family", type=int, default=250, help="held-out questions per family")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-static", action="store_true", help="leave out the comparison with dropped layers")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing adapter folder")


def run(args: argparse.Namespace) -> None:
    check_target(args.out.absolute(), args.overwrite)
    model, processor = load(args.base, args.adapter_size, args.seed)
    keep_all = torch.ones(model.config.text_config.num_hidden_layers, dtype=torch.bool)
    with tempfile.TemporaryDirectory() as folder:
        base = evaluate(model, processor, args.per_family, "test", keep_all)
        how = recipe(args.target_skip_ratio, args.seed)
        minutes = train(model, processor, how, args, Path(folder))[-1]["train_runtime"] / 60
        settled = settle_on_held_out(model, processor, args.target_skip_ratio)
        roe = evaluate(model, processor, args.per_family, "test")
        results = {"base": base, "roe": roe, "controls": controls(model, processor, args, base, roe), "static_drop": []}
        if not args.no_static:
            number = max(1, round(roe["skip_ratio"] * len(keep_all)))
            results["static_drop"].append(static_drop(args, number, Path(folder)))
    for one in (base, roe):
        one["routes"] = route_shares(one.pop("taken"))
    about = summary(args, minutes, results) | {"settled": None if settled is None else settled.to_dict()}
    known = describe_base(args.base, base_id="examples/tiny_world/checkpoint/base") if args.base == BASE else args.base
    save_adapter(model, model.config, args.out, base=known, training=about, overwrite=args.overwrite)
    write_json(args.out / "training.json", about)
    print(json.dumps(about, indent=2))
    print(f"wrote {args.out}")


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    run(parser.parse_args(arguments))


if __name__ == "__main__":
    main()
