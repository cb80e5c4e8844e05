"""Is the router worth its code? RoE beside what it has to beat, on the tiny world, over several seeds.

    python -m roe_llava.benchmarks.quality --out out/quality

Every run is a file in OUT/runs, so an interrupted benchmark goes on where it stopped, and several processes can share
the work (`--seeds 0`, `--seeds 1 2`, then once without). When all runs are there, OUT/quality.json is written and
pictures beside it; `--report` writes the page.

The base is frozen everywhere and adapters are what learns. "dense" is the base given the same training: every layer
runs, with its adapter beside it. Runs without a search and measured routes get as many steps more as those cost.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ..convert.output import replace_json
from ..examples.tiny_world.evaluate import family_examples
from ..examples.tiny_world.train_roe import (
    BASE,
    Recipe,
    evaluate,
    load,
    pinned,
    recipe,
    route_shares,
    settle_on_held_out,
    train,
)
from ..examples.tiny_world.world import FAMILIES, messages
from ..training.data import ChatCollator
from ..training.objective import Objective
from ..training.route_search import RoutePool, price_of
from ..training.route_values import Reading, expected_losses
from ..training.schedule import StageSchedule
from ..training.teacher import RouteTeacher, Teaching
from .cells import do_cells
from .environment import command_line, describe_machine
from .quality_report import draw_all, page, summarise
from .report import check_out

TARGETS = (0.1, 0.2, 0.3, 0.4)
COMPARED = 0.3  # the target at which methods other than ours are run
SETTLED = ("taught", "gradient")  # methods whose skip ratio is settled at the end, on validation questions
CURVES = ("token_loss", "hard_skip_ratio", "skip_weight", "stage")


@dataclass(frozen=True)
class Run:
    """One cell: a method at a target skip ratio with a seed."""

    method: str
    target: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}-{self.target:g}-seed{self.seed}"


def all_runs(seeds: list[int], targets: tuple[float, ...], num_layers: int) -> list[Run]:
    """In an order in which each finds what it needs: the search comes first.

    Seed 0 runs everything; the others what is compared most closely: the base, ours, the static drop and the published
    recipe at one target.
    """
    compared = COMPARED if COMPARED in targets else targets[-1]
    runs = []
    for seed in seeds:
        own = sorted(targets, key=lambda target: abs(target - compared)) if seed == 0 else [compared]
        dropped = sorted({max(1, round(target * num_layers)) for target in own})
        runs += [Run("base", 0.0, seed), Run("dense", 0.0, seed), Run("search", compared, seed)]
        runs += [Run("taught", target, seed) for target in own]
        runs += [Run("static", number / num_layers, seed) for number in dropped]
        others = ("published", "gradient", "random") if seed == 0 else ("published",)
        runs += [Run(method, compared, seed) for method in others]
    return runs


# ------------------------------------------------------------------------------------------------------------- methods


def published_stages(target: float) -> Recipe:
    """The published objective and stages (docs/published_training.md), on the frozen base."""
    return Recipe(StageSchedule(target), Objective(target))


def gradient_stages(target: float) -> Recipe:
    """Hard decisions with noise, learned by their gradient under a budget for the batch."""
    schedule = StageSchedule(
        target,
        warmup_end=0.3,
        soft_end=0.35,
        last_mode="hard",
        temperature_start=1.0,
        temperature_decay=0.97,
        temperature_floor=0.3,
        gumbel_end=0.8,
    )
    return Recipe(schedule, Objective(target, budget="batch", information_weight=0.3))


def random_stages(target: float) -> Recipe:
    """Random routes to the end."""
    return Recipe(StageSchedule(target, warmup_end=1.0, soft_end=1.0), Objective(target))


def search(args, run: Run) -> dict:
    """Every candidate route measured on held-out questions, adapters warmed up: what is there to be won?"""
    model, processor = load(args.base, args.adapter_size, run.seed)
    settings = argparse.Namespace(steps=warmup_steps(args), batch_size=args.batch_size, seed=run.seed)
    with tempfile.TemporaryDirectory() as folder:
        log = train(model, processor, random_stages(run.target), settings, Path(folder))
    number = max(2, args.searched_examples // len(FAMILIES))
    examples = {family: family_examples(family, number, "validation", seed=run.seed) for family in FAMILIES}
    collate = ChatCollator(processor, messages)
    batches = [collate(part) for part in examples.values()]
    teacher = RouteTeacher(run.target, Teaching(searched_routes=args.searched_routes), run.seed)
    teacher.search(model, batches)
    groups = torch.arange(len(FAMILIES)).repeat_interleave(number)
    return {
        "minutes": log[-1]["train_runtime"] / 60,
        "explained": teacher.explained,
        "routes": teacher.pool.routes.int().tolist(),
        "mean_losses": teacher.pool.losses.mean(dim=0).tolist(),
        "headroom": [headroom(teacher.pool, teacher.features, groups, target) for target in args.targets],
    }


def headroom(pool: RoutePool, features: torch.Tensor, groups: torch.Tensor, target: float) -> dict:
    """Mean loss at one skip ratio of the best route for all, per family, and per question as far as it is foreseeable.

    Routes are chosen on every other question and judged on the rest, and the other way round.

    Args:
        pool: routes measured on N questions.
        features: (N, 2 D) of `question_features`.
        groups: (N,) number of the family.
    """
    num_layers = pool.routes.shape[1]
    skip, half = pool.skip_ratio, torch.arange(len(groups)) % 2 == 0
    single = (skip * num_layers).round() == round(target * num_layers)
    sums = {"single": 0.0, "family": 0.0, "family_skip": 0.0}
    for chosen_on, judged_on in ((half, ~half), (~half, half)):
        losses = pool.losses[chosen_on]
        best = single.nonzero().flatten()[losses[:, single].mean(dim=0).argmin()]
        by_family = torch.stack([losses[groups[chosen_on] == family].mean(dim=0) for family in groups.unique()])
        share = torch.bincount(groups[judged_on]) / judged_on.sum()

        def routes_at(price, by_family=by_family):
            return (by_family - price * skip).argmin(dim=1)

        price = price_of(lambda price, share=share, at=routes_at: (share * skip[at(price)]).sum().item(), target)
        own = routes_at(price)[groups[judged_on]]
        sums["single"] += pool.losses[judged_on, best].sum().item()
        sums["family"] += pool.losses[judged_on].gather(1, own[:, None]).sum().item()
        sums["family_skip"] += skip[own].sum().item()
    expected, _, _ = expected_losses(Reading.of(features)(features), pool.losses)
    price = price_of(lambda price: skip[(expected - price * skip).argmin(dim=1)].mean().item(), target)
    foreseen = (expected - price * skip).argmin(dim=1)
    return {
        "target": target,
        "all_layers": pool.losses[:, 0].mean().item(),
        **{name: value / len(groups) for name, value in sums.items()},
        "foreseen": pool.losses.gather(1, foreseen[:, None]).mean().item(),
        "foreseen_skip": skip[foreseen].mean().item(),
    }


def best_single_route(found: dict, number: int) -> torch.Tensor:
    """Of the searched routes that skip this many layers, the one with the least mean loss: (L,) bool."""
    pairs = zip(found["routes"], found["mean_losses"], strict=True)
    fitting = [(loss, route) for route, loss in pairs if route.count(0) == number]
    return torch.tensor(min(fitting)[1], dtype=torch.bool)


def trained(args, run: Run, runs: Path) -> dict:
    """Train a method and judge it on the test questions."""
    model, processor = load(args.base, args.adapter_size, run.seed)
    num_layers = model.config.text_config.num_hidden_layers
    routes, log = None, []
    if run.method in ("base", "dense"):
        routes = torch.ones(num_layers, dtype=torch.bool)
    if run.method == "dense":
        put_adapters_beside(model)
    if run.method != "base":
        how = methods()[run.method](run.target)
        if run.method == "taught":
            how.teacher = RouteTeacher(run.target, teaching_of(args), run.seed)
        if run.method == "static":
            found = json.loads((runs / f"{Run('search', compared_target(args), run.seed).name}.json").read_text())
            routes = best_single_route(found, round(run.target * num_layers))
        steps = args.steps if run.method == "taught" else args.steps + extra_steps(args)
        settings = argparse.Namespace(steps=steps, batch_size=args.batch_size, seed=run.seed)
        with tempfile.TemporaryDirectory() as folder:
            log = train(model, processor, how, settings, Path(folder), routes)
    settled = settle_on_held_out(model, processor, run.target) if run.method in SETTLED else None
    pins = random_routes(run, num_layers, args.per_family) if run.method == "random" else routes
    result = evaluate(model, processor, args.per_family, "test", pins)
    taken = result.pop("taken")
    return {
        **result,
        "settled": None if settled is None else settled.to_dict(),
        "routes": route_shares(taken),
        "skip_by_layer": {family: (~taken[family]).float().mean(dim=0).tolist() for family in taken},
        "steps": log[-1]["step"] if log else 0,
        "minutes": log[-1]["train_runtime"] / 60 if log else 0.0,
        "curves": {name: [[entry["step"], entry[name]] for entry in log if name in entry] for name in CURVES},
    }


def put_adapters_beside(model) -> None:
    """Every layer's adapter is added to what the layer gives: layer(x) + adapter(norm(x))."""

    def add(layer, args, output):
        return output + layer.adapter(layer.input_layernorm(args[0]))

    for layer in model.model.language_model.layers:
        layer.register_forward_hook(add)


def methods() -> dict[str, Callable[[float], Recipe]]:
    return {
        "static": lambda target: pinned(),
        "dense": lambda target: pinned(),
        "random": random_stages,
        "published": published_stages,
        "gradient": gradient_stages,
        "taught": lambda target: recipe(target, 0),
    }


def random_routes(run: Run, num_layers: int, per_family: int) -> dict[str, torch.Tensor]:
    """As many layers as the target says, drawn anew for every question; never layer 0, which nobody skips."""
    generator = torch.Generator().manual_seed(run.seed)
    number = round(run.target * num_layers)
    routes = {}
    for family in FAMILIES:
        order = torch.rand(per_family, num_layers - 1, generator=generator).argsort(dim=1) + 1
        routes[family] = torch.ones(per_family, num_layers, dtype=torch.bool).scatter(1, order[:, :number], False)
    return routes


# -------------------------------------------------------------------------------------------------------------- budget


def teaching_of(args) -> Teaching:
    return Teaching(searched_routes=args.searched_routes, searched_examples=args.searched_examples)


def warmup_steps(args) -> int:
    return max(1, round(recipe(COMPARED, 0).schedule.warmup_end * args.steps))


def extra_steps(args) -> int:
    """Optimizer steps worth the forward passes of search and teaching, a step counted as three forward passes.

    Skipped layers are counted as if they ran, in favour of the other methods.
    """
    schedule, teaching = recipe(COMPARED, 0).schedule, teaching_of(args)
    taught = sum(schedule.stage(step / args.steps) == 1 for step in range(args.steps))
    searched = teaching.searched_routes * teaching.searched_examples / args.batch_size
    return round((searched + taught * teaching.measured_routes) / 3)


def compared_target(args) -> float:
    return COMPARED if COMPARED in args.targets else args.targets[-1]


# ----------------------------------------------------------------------------------------------------------------- run


def do_runs(args, runs: list[Run], folder: Path) -> Iterator[tuple[Run, dict]]:
    """Every run's result; those on disk are not run again.

    Raises: ValueError if one on disk was made with other settings.
    """
    made_with = {name: vars(args)[name] for name in SETTINGS} | {"base": Path(args.base).name}
    made_with["targets"] = list(args.targets)

    def make(run: Run) -> dict:
        return search(args, run) if run.method == "search" else trained(args, run, folder)

    def about(run: Run) -> dict:
        return {"method": run.method, "target": run.target, "seed": run.seed}

    return do_cells(runs, folder, made_with, make, about)


SETTINGS = ("steps", "batch_size", "adapter_size", "per_family", "searched_routes", "searched_examples")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs, quality.json and pictures")
    parser.add_argument("--base", type=Path, default=BASE, help="base checkpoint (default: the shipped one)")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="0 has all methods, others those of the aims"
    )
    parser.add_argument("--targets", type=float, nargs="+", default=TARGETS)
    parser.add_argument("--steps", type=int, default=500, help="optimizer steps of a taught run (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=24)
    parser.add_argument("--adapter-size", type=int, default=64)
    parser.add_argument("--per-family", type=int, default=250, help="test questions per family")
    parser.add_argument("--searched-routes", type=int, default=64)
    parser.add_argument("--searched-examples", type=int, default=120)
    parser.add_argument("--methods", nargs="+", help="only these; nothing is summed up")
    parser.add_argument("--report", type=Path, help="write the page here, pictures beside it")
    parser.add_argument("--overwrite", action="store_true", help="replace quality.json, pictures and page")


def run(args: argparse.Namespace) -> dict | None:
    """Do what is missing, then sum up.

    Returns: the result, or `None` if only some methods were run.
    """
    check_out(args.out / "quality.json", args.overwrite)
    if args.report is not None and args.report.exists() and not args.overwrite:
        raise ValueError(f"{args.report} exists: give another --report, or replace it (--overwrite)")
    folder = args.out / "runs"
    folder.mkdir(parents=True, exist_ok=True)
    args.targets = tuple(args.targets)
    num_layers = json.loads((args.base / "config.json").read_text())["text_config"]["num_hidden_layers"]
    wanted = all_runs(args.seeds, args.targets, num_layers)
    if args.methods:
        wanted = [one for one in wanted if one.method in args.methods]
    results = [result for _, result in do_runs(args, wanted, folder)]
    if args.methods:
        return None
    result = {
        "benchmark": "quality",
        "command": command_line("roe_llava.benchmarks.quality"),
        **describe_machine(),
        "threads": torch.get_num_threads(),
        "num_layers": num_layers,
        "targets": list(args.targets),
        "settings": {name: vars(args)[name] for name in SETTINGS} | {"extra_steps": extra_steps(args)},
        "minutes": sum(one["minutes"] for one in results),
        "summary": summarise(results, args.targets, num_layers),
        "runs": results,
    }
    replace_json(args.out / "quality.json", result)
    draw_all(result, args.out)
    if args.report is not None:
        args.report.parent.mkdir(parents=True, exist_ok=True)
        draw_all(result, args.report.parent)
        args.report.write_text(page(result))
    print(f"wrote {args.out}")
    return result


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    run(parser.parse_args(arguments))


__all__ = ["all_runs", "headroom", "run"]

if __name__ == "__main__":
    main()
