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
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from ..convert.output import replace_json
from ..examples.tiny_world.train_roe import BASE
from .cells import do_cells
from .compare_measure import judged, modalities_apart, validation_loss
from .compare_report import draw_all, page
from .compare_speed import speeds
from .compare_summary import summarise
from .compare_systems import CONTROLS, GIVEN, MAKERS, METHODS, TARGET, Task, give_experts, save, shares
from .environment import ROOT, command_line, describe_machine, git_commit
from .quality import extra_steps
from .quality_report import row_of
from .report import check_out

# What is rated -> the rates tried: of a method, or of EvoMoE's last stage.
RATED = {
    "dense_mlps": (3e-5, 1e-4, 3e-4),
    "dense_all": (3e-5, 1e-4, 3e-4),
    "moe_llava": (3e-5, 1e-4, 3e-4),
    "evomoe": (1e-2,),
}
ONES_AT = 1e-2  # rate at which weights of 1 are tried, where routers learn of the balancing loss alone
AS_GOOD = 1.01  # a loss over the least that does not count as worse: of such rates the largest is taken
RATE_SEED = 100  # of the runs that choose rates, whose conversations no compared run reads
RATING_SETTINGS = ("batch_size", "rate_steps", "rate_per_family")
SETTINGS = (
    *("steps", "batch_size", "adapter_size", "per_family", "control_per_family"),
    *("searched_routes", "searched_examples"),
)


@dataclass(frozen=True)
class Rating:
    """A short run that tells how well a learning rate does.

    Attributes:
        what: the method.
        rate: of what learns; of EvoMoE's routers, whose other stages have the rates of dense methods.
        ones: whether the weight of EvoMoE's chosen expert is 1, instead of its probability; its paper does not say.
    """

    what: str
    rate: float
    ones: bool = False

    @property
    def name(self) -> str:
        return f"rate-{self.what}-{self.rate:g}{'-ones' if self.ones else ''}"

    @property
    def changes(self) -> dict:
        """What it tries, of a task's `rates`."""
        return {self.what: self.rate} | ({"evomoe_ones": self.ones} if self.what == "evomoe" else {})


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


def rate(args, rating: Rating, rates: dict) -> dict:
    """Train with one rate for fewer steps."""
    short = argparse.Namespace(**{**vars(args), "steps": rating_steps(args, rating.what)})
    trained = MAKERS[rating.what](Task(rating.what, RATE_SEED, short, rates | rating.changes))
    loss = validation_loss(trained, args.rate_per_family)
    return {"validation_loss": loss, "minutes": trained.seconds / 60, "cpu_minutes": trained.cpu_seconds / 60}


def rating_steps(args, what: str) -> int:
    """Optimizer steps of a rating; of EvoMoE's three stages the last one is rated, so that it gets more."""
    return round(1.5 * args.rate_steps) if what == "evomoe" else args.rate_steps


def chosen_rates(args, folder: Path, made_with: dict) -> tuple[dict, list[dict]]:
    """What did best, as a task's `rates`; and all that was tried."""
    rates, tried = {}, []
    for what, grid in RATED.items():
        ratings = [Rating(what, one) for one in grid]
        ratings += [Rating(what, ONES_AT, ones=True)] if what == "evomoe" else []
        results = list(do_cells(ratings, folder, made_with, partial(rate, args, rates=dict(rates)), vars))
        rates |= best_of(results).changes
        tried += [result for _, result in results]
    return rates, tried


def best_of(results: list[tuple[Rating, dict]]) -> Rating:
    """Of the ratings whose loss is hardly above the least, the one with the largest rate: experts have to move."""
    least = min(result["validation_loss"] for _, result in results)
    good = [rating for rating, result in results if result["validation_loss"] <= AS_GOOD * least]
    return max(good, key=lambda rating: (rating.rate, not rating.ones))


def do_runs(args, runs: list[Run], rates: dict, folder: Path, made_with: dict) -> Iterator[dict]:
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
    parser.add_argument("--steps", type=int, default=500, help="optimizer steps of a run (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=24, help="conversations per step")
    parser.add_argument("--adapter-size", type=int, default=64)
    parser.add_argument("--per-family", type=int, default=200, help="test questions per family")
    parser.add_argument("--control-per-family", type=int, default=40, help="test questions per family, for controls")
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
    rates, ratings = chosen_rates(args, folder, settings_of(args, RATING_SETTINGS))
    if args.part == "rates":
        return None
    wanted = all_runs(args.seeds, args.control_seeds)
    runs = list(do_runs(args, wanted, rates, folder, settings_of(args, SETTINGS) | {"rates": rates}))
    if args.part == "runs":
        return None
    speed = timed(args, folder / "speed.json")
    untrained_apart = apart_before(args, folder / "untrained_routers.json")
    config = json.loads((args.base / "config.json").read_text())["text_config"]
    result = {
        "benchmark": "compare",
        "command": command_line("roe_llava.benchmarks.compare"),
        **describe_machine(),
        "threads": torch.get_num_threads(),
        "num_layers": config["num_hidden_layers"],
        "mlp_share": mlp_share(config),
        "settings": settings_of(args, (*SETTINGS, *RATING_SETTINGS)),
        "extra_steps": extra_steps(args),
        "evomoe_steps": [len(part) for part in shares(args.steps)],
        "evomoe_rate_steps": rating_steps(args, "evomoe"),
        "rate_seed": RATE_SEED,
        "rates": rates,
        "ratings": ratings,
        "minutes": sum(one["minutes"] for one in runs),
        "cpu_minutes": sum(one["cpu_minutes"] for one in runs),
        "speed": speed,
        "untrained_apart": untrained_apart,
        "summary": summarise(runs, speed),
        "full_roe": full_roe(),
        "runs": [without_pool(one) for one in runs],
    }
    replace_json(args.out / "compare.json", result)
    draw_all(result, args.out)
    if args.report is not None:
        args.report.parent.mkdir(parents=True, exist_ok=True)
        draw_all(result, args.report.parent)
        args.report.write_text(page(result))
    print(f"wrote {args.out}")
    return result


def full_roe() -> dict | None:
    """RoE after its own number of steps, as `quality` measured it; `None` where its results are not at hand."""
    path = ROOT / "benchmarks" / "results" / "quality.json"
    if not path.is_file():
        return None
    measured = json.loads(path.read_text())
    row = row_of(measured["summary"]["methods"], "taught", TARGET)
    dense = row_of(measured["summary"]["methods"], "dense", 0.0)
    found = {name: row[name] for name in ("accuracy", "skip_ratio")}
    return found | {"steps": measured["settings"]["steps"], "dense_accuracy": dense["accuracy"]}


def without_pool(run: dict) -> dict:
    """A run without the routes that RoE's search measured, which the static drop has used."""
    return run | {"more": {name: value for name, value in run["more"].items() if name != "pool"}}


def timed(args, path: Path) -> dict:
    """Times of the first seed's models; those on disk are not taken again."""
    if not path.is_file():
        found = speeds(args.out / "models", args.seeds[0], args.rounds, lambda items, what: tqdm(items, desc=what))
        replace_json(path, {"commit": git_commit()} | found)
    return json.loads(path.read_text())


def apart_before(args, path: Path) -> dict[str, list[float]]:
    """How far routers part image from text tokens before they learned anything, by method and seed."""
    if not path.is_file():
        found: dict[str, list[float]] = {}
        for method, options in GIVEN.items():
            for seed in args.seeds:
                trained = MAKERS["base"](Task("base", seed, args, {}))
                give_experts(Task(method, seed, args, {}), trained, **options)
                found.setdefault(method, []).append(modalities_apart(trained))
        replace_json(path, found)
    return json.loads(path.read_text())


def mlp_share(text_config: dict) -> float:
    """Share of the matrices of a decoder layer that is its MLP's."""
    mlp = 3 * text_config["intermediate_size"]
    heads = 2 * text_config["num_attention_heads"] + 2 * text_config["num_key_value_heads"]
    return mlp / (mlp + heads * text_config["head_dim"])


def settings_of(args, names: tuple[str, ...]) -> dict:
    """What a result depends on."""
    return {name: vars(args)[name] for name in names} | {"base": Path(args.base).name}


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    run(parser.parse_args(arguments))


__all__ = ["all_runs", "run"]

if __name__ == "__main__":
    main()
