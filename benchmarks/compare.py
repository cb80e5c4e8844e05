"""RoE, MoE-LLaVA and EvoMoE side by side on the tiny world: one base, the same conversations, several seeds.

    python -m roe_llava.benchmarks.compare --out out/compare --report docs/compare.md

Every run is a file in OUT/runs and a model in OUT/models, so an interrupted benchmark goes on where it stopped, and
several processes can share the work (`--seeds 0`, `--seeds 1`, then once without). When all are there, times are taken
of all systems in this one process, OUT/compare.json is written, and pictures beside it; `--report` writes the page.

Learning rates of what learns base weights are chosen first, by the token loss on validation questions after shorter
runs with a seed of their own. Adapters and routers of RoE have those of the shipped recipe.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from ..convert.output import replace_json
from ..examples.tiny_world.train_roe import BASE, RATES
from .cells import do_cells
from .compare_measure import judged, validation_loss
from .compare_systems import CONTROLS, MAKERS, METHODS, TARGET, Task, save
from .environment import command_line, describe_machine
from .quality import extra_steps
from .report import check_out

# What is rated -> the rates tried; each is a learning rate of a method, or of its last stage.
RATED = {
    "dense_mlps": (1e-4, 3e-4, 1e-3),
    "dense_all": (1e-4, 3e-4, 1e-3),
    "moe_llava": (1e-4, 3e-4, 1e-3),
    "evomoe_routers": (1e-3, 3e-3, 1e-2),
}
RATE_SEED = 100  # of the runs that choose rates, whose conversations no compared run reads
SETTINGS = (
    *("steps", "batch_size", "adapter_size", "per_family", "control_per_family"),
    *("searched_routes", "searched_examples", "rate_steps", "rate_per_family"),
)


@dataclass(frozen=True)
class Rating:
    """A short run that tells how well a learning rate does."""

    what: str
    rate: float

    @property
    def name(self) -> str:
        return f"rate-{self.what}-{self.rate:g}"


@dataclass(frozen=True)
class Run:
    """A method with a seed."""

    method: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}-seed{self.seed}"


def all_runs(seeds: list[int], control_seeds: list[int]) -> list[Run]:
    """In an order in which each finds what it needs; controls come last."""
    methods = [method for method in METHODS if method not in CONTROLS]
    return [Run(method, seed) for seed in seeds for method in methods] + [
        Run(method, seed) for seed in control_seeds for method in CONTROLS
    ]


# ------------------------------------------------------------------------------------------------------------- cells


def rate(args, rating: Rating, rates: dict[str, float]) -> dict:
    """Train with one rate for fewer steps."""
    method, steps = rating.what, args.rate_steps
    if rating.what == "evomoe_routers":
        method, steps = "evomoe", round(2.5 * steps)  # so that routers get as many
    short = argparse.Namespace(**{**vars(args), "steps": steps})
    task = Task(method, RATE_SEED, short, rates | {rating.what: rating.rate}, no_earlier)
    trained = MAKERS[method](task)
    loss = validation_loss(trained, args.rate_per_family)
    return {"validation_loss": loss, "minutes": trained.seconds / 60, "cpu_minutes": trained.cpu_seconds / 60}


def no_earlier(method: str) -> dict:
    raise AssertionError(f"a rating asked for the result of {method}")


def chosen_rates(args, folder: Path, made_with: dict) -> tuple[dict[str, float], list[dict]]:
    """The rates that did best, and all that were tried."""
    rates, tried = {}, []
    for what, grid in RATED.items():
        ratings = [Rating(what, one) for one in grid]
        results = list(
            do_cells(
                ratings,
                folder,
                made_with,
                lambda rating, rates=dict(rates): rate(args, rating, rates),
                lambda rating: {"what": rating.what, "rate": rating.rate},
            )
        )
        rates[what] = min((result["validation_loss"], rating.rate) for rating, result in results)[1]
        tried += [result for _, result in results]
    return rates, tried


def do_runs(args, runs: list[Run], rates: dict[str, float], folder: Path, made_with: dict) -> Iterator[dict]:
    """Every run's result; its model is kept beside."""

    def make(run: Run) -> dict:
        def earlier(method: str) -> dict:
            return json.loads((folder / f"{Run(method, run.seed).name}.json").read_text())["more"]

        trained = MAKERS[run.method](Task(run.method, run.seed, args, rates, earlier))
        save(trained, args.out / "models" / run.name)
        return judged(run.method, trained, args.per_family, args.control_per_family)

    def about(run: Run) -> dict:
        return {"method": run.method, "seed": run.seed}

    for _, result in tqdm(do_cells(runs, folder, made_with, make, about), total=len(runs), desc="runs"):
        yield result


# ------------------------------------------------------------------------------------------------------------- run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="folder of runs, models, compare.json and pictures")
    parser.add_argument("--base", type=Path, default=BASE, help="base checkpoint (default: the shipped one)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--control-seeds", type=int, nargs="*", default=[0], help="seeds with controls")
    parser.add_argument("--steps", type=int, default=160, help="optimizer steps of a run (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=24, help="conversations per step")
    parser.add_argument("--adapter-size", type=int, default=64)
    parser.add_argument("--per-family", type=int, default=250, help="test questions per family")
    parser.add_argument("--control-per-family", type=int, default=60, help="test questions per family, for controls")
    parser.add_argument("--searched-routes", type=int, default=64)
    parser.add_argument("--searched-examples", type=int, default=120)
    parser.add_argument("--rate-steps", type=int, default=40, help="optimizer steps of a run that rates a rate")
    parser.add_argument("--rate-per-family", type=int, default=50, help="validation questions per family, for rates")
    parser.add_argument("--rounds", type=int, default=5, help="how often every system is timed on every prompt")
    parser.add_argument("--part", choices=("rates", "runs"), help="do no more than that; nothing is summed up")
    parser.add_argument("--report", type=Path, help="write the page here, pictures beside it")
    parser.add_argument("--overwrite", action="store_true", help="replace compare.json, pictures and page")


def run(args: argparse.Namespace) -> dict | None:
    """Do what is missing, then sum up.

    Returns: the result, or `None` if only a part was done.
    """
    check_out(args.out / "compare.json", args.overwrite)
    if args.report is not None and args.report.exists() and not args.overwrite:
        raise ValueError(f"{args.report} exists: give another --report, or replace it (--overwrite)")
    folder = args.out / "runs"
    folder.mkdir(parents=True, exist_ok=True)
    made_with = {name: vars(args)[name] for name in SETTINGS} | {"base": Path(args.base).name}
    rates, tried = chosen_rates(args, folder, made_with)
    if args.part == "rates":
        return None
    runs = list(do_runs(args, all_runs(args.seeds, args.control_seeds), rates, folder, made_with))
    if args.part == "runs":
        return None
    raise NotImplementedError


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    run(parser.parse_args(arguments))


__all__ = ["all_runs", "run"]

if __name__ == "__main__":
    main()
