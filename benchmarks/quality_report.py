"""The page of `benchmarks/quality.py`: tables in markdown and three pictures, all from its JSON."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from matplotlib.figure import Figure

from ..display.drawing import FAINT, INK, KEPT, WRONG

LABELS = {
    "base": "base, untrained",
    "dense": "base, every layer, adapters beside",
    "static": "the same layers dropped for all",
    "random": "random layers",
    "published": "published recipe",
    "gradient": "hard decisions by their gradient",
    "taught": "taught routers (ours)",
}
COLORS = {"static": WRONG, "random": FAINT, "published": "#CC79A7", "gradient": "#009E73", "taught": KEPT}
CURVE_NAMES = {"token_loss": "token loss (nats)", "hard_skip_ratio": "hard skip ratio", "skip_weight": "skip weight"}


def grouped(results: Sequence[dict]) -> dict[tuple[str, float], list[dict]]:
    """Runs that differ in the seed alone."""
    groups: dict[tuple[str, float], list[dict]] = {}
    for result in results:
        groups.setdefault((result["method"], result["target"]), []).append(result)
    return groups


def over_seeds(values: Sequence[float]) -> dict:
    """Mean, and standard deviation where there is more than one."""
    return {"mean": mean(values), "std": stdev(values) if len(values) > 1 else None, "values": list(values)}


def summarise(results: Sequence[dict], targets: Sequence[float], num_layers: int) -> dict:
    """Mean over seeds of every method, and whether the aims are met."""
    rows, headroom = [], []
    for (method, target), same in grouped(results).items():
        if method == "search":
            headroom = [mean_headroom(same, number) for number in range(len(targets))]
            continue
        row = {"method": method, "target": target, "seeds": [one["seed"] for one in same]}
        row |= {name: over_seeds([one[name] for one in same]) for name in ("accuracy", "skip_ratio", "minutes")}
        row |= {
            name: mean_by_key([one[name] for one in same]) for name in ("accuracy_by_family", "skip_ratio_by_family")
        }
        row["common_routes"] = mean(sum(share >= 0.05 for share in one["routes"].values()) for one in same)
        rows.append(row)
    return {"methods": rows, "headroom": headroom, "aims": aims(rows, targets, num_layers)}


def mean_by_key(dicts: Sequence[dict]) -> dict:
    return {key: mean(one[key] for one in dicts) for key in dicts[0]}


def mean_headroom(same: Sequence[dict], number: int) -> dict:
    return mean_by_key([one["headroom"][number] for one in same])


def row_of(rows: Sequence[dict], method: str, target: float) -> dict | None:
    return next((row for row in rows if row["method"] == method and abs(row["target"] - target) < 1e-9), None)


def aims(rows: Sequence[dict], targets: Sequence[float], num_layers: int) -> list[dict]:
    """What a router has to reach: dicts of `aim`, `measured` as text, and `met`."""
    found = []
    for target in targets:
        row = row_of(rows, "taught", target)
        worst = max((abs(value - target) for value in row["skip_ratio"]["values"]), default=0.0)
        text = ", ".join(f"{100 * value:.1f}" for value in row["skip_ratio"]["values"])
        aim = f"{100 * target:.0f} % asked for: within 2 points, every seed"
        found.append({"aim": aim, "measured": f"{text} %", "met": worst <= 0.02})
    compared = 0.3 if 0.3 in targets else targets[-1]
    taught, base = row_of(rows, "taught", compared), row_of(rows, "dense", 0.0)
    static = row_of(rows, "static", max(1, round(compared * num_layers)) / num_layers)
    lost = 100 * (base["accuracy"]["mean"] - taught["accuracy"]["mean"])
    ahead = 100 * (taught["accuracy"]["mean"] - static["accuracy"]["mean"])
    at = f"at {100 * compared:.0f} %"
    found.append(
        {
            "aim": f"{at}: at most 1 point below the base given the same training",
            "measured": f"{lost:+.1f} lost",
            "met": lost <= 1,
        }
    )
    text = f"{ahead:+.1f}, static at {100 * static['skip_ratio']['mean']:.1f} %"
    found.append({"aim": f"{at}: 2 points ahead of the best static drop", "measured": text, "met": ahead >= 2})
    easy, hard = easy_and_hard(base, taught)
    text = f"{100 * easy:.1f} % against {100 * hard:.1f} %; {taught['common_routes']:.1f} routes with 5 % or more"
    met = easy > hard and taught["common_routes"] > 1
    found.append(
        {"aim": f"{at}: routes differ, the easier half of the families skips more", "measured": text, "met": met}
    )
    return found


def easy_and_hard(base: dict, taught: dict) -> tuple[float, float]:
    """Mean skip ratio of the half of the families that the base answers best, and of the other half."""
    order = sorted(base["accuracy_by_family"], key=base["accuracy_by_family"].__getitem__, reverse=True)
    middle = len(order) // 2
    skipped = taught["skip_ratio_by_family"]
    return tuple(mean(skipped[family] for family in half) for half in (order[:middle], order[middle:]))


# -------------------------------------------------------------------------------------------------------------- tables


def percent(numbers: dict) -> str:
    spread = "" if numbers["std"] is None else f" ± {100 * numbers['std']:.1f}"
    return f"{100 * numbers['mean']:.1f}{spread}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


PAGE = """# Is the router worth its code?

Made by `{command}` ({minutes:.0f} minutes of training, {num_seeds} seeds, {threads} thread; {processor}, commit
{commit}, torch {torch}, Transformers {transformers}).

The tiny world's base of {num_layers} layers stays frozen; routers, routing tokens and adapters learn for {steps} steps
of {batch_size} conversations. Methods without search and measured routes get {extra_steps} steps more, as many as those
forward passes are worth. Accuracy is exact match on {per_family} held-out questions of each family, ± the standard
deviation over the seeds where there are several. The base given the same training runs every layer with its adapter
beside it. Routers of ours and those trained by their gradient have their skip ratio settled at the end, on {settled}
validation questions; the published recipe is left as it comes. Minutes are those that the runs took, whatever else
the machine did.

## What it has to reach

{aims}

## All methods

![Accuracy over skip ratio](quality_accuracy.png)

{methods}

The layers dropped for all are those whose absence costs least of all sets of that size that were measured, and their
adapters are trained for them alone from the first step.

## What there is to win

Token loss (nats) on held-out validation questions at equal skip ratio, adapters warmed up under random routes: the
best route for all, the best per family (chosen on one half, judged on the other), and per question as far as ridge
regression foresees it from words and picture.

{headroom}

## By family

Accuracy in percent, at {compared:.0f} % where there is a choice.

{families}

![Skipping by layer and family](quality_skipping.png)

## Training

![Training curves](quality_training.png)
"""


def page(result: dict) -> str:
    """The page in markdown; it expects the pictures beside it."""
    summary = result["summary"]
    compared = row_of_ours(summary["methods"])["target"]
    return PAGE.format(
        **{name: result[name] for name in ("command", "minutes", "threads", "processor", "commit", "torch")},
        **{name: result[name] for name in ("transformers", "num_layers")},
        **{name: result["settings"][name] for name in ("steps", "batch_size", "extra_steps", "per_family")},
        settled=next((run["settled"]["questions"] for run in result["runs"] if run.get("settled")), 0),
        num_seeds=len({run["seed"] for run in result["runs"]}),
        compared=100 * compared,
        aims=table(
            ["Aim", "Measured", "Met"],
            [[one["aim"], one["measured"], "yes" if one["met"] else "no"] for one in summary["aims"]],
        ),
        methods=table(
            ["Method", "Seeds", "Asked for, %", "Skipped, %", "Accuracy, %", "Routes with 5 % or more", "Minutes"],
            method_cells(summary["methods"]),
        ),
        headroom=table(
            ["Skipped, %", "No layer skipped", "One route for all", "One per family", "One per question"],
            headroom_cells(summary["headroom"]),
        ),
        families=table(["Method", *row_of_ours(summary["methods"])["skip_ratio_by_family"]], family_cells(summary)),
    )


def row_of_ours(rows: Sequence[dict]) -> dict:
    """The first one: runs are ordered by how close their target is to the compared one."""
    return next(row for row in rows if row["method"] == "taught")


def method_cells(rows: Sequence[dict]) -> list[list[str]]:
    names = list(LABELS)
    cells = []
    for row in sorted(rows, key=lambda row: (names.index(row["method"]), row["target"])):
        start = [
            LABELS[row["method"]],
            str(len(row["seeds"])),
            f"{100 * row['target']:.0f}",
            percent(row["skip_ratio"]),
        ]
        end = [percent(row["accuracy"]), f"{row['common_routes']:.1f}", f"{row['minutes']['mean']:.1f}"]
        cells.append(start + end)
    return cells


def headroom_cells(rows: Sequence[dict]) -> list[list[str]]:
    names = ("all_layers", "single", "family", "foreseen")
    return [[f"{100 * row['target']:.0f}", *(f"{row[name]:.3f}" for name in names)] for row in rows]


def family_cells(summary: dict) -> list[list[str]]:
    rows = summary["methods"]
    ours = row_of_ours(rows)
    shown = [row for row in rows if row["target"] in (0.0, ours["target"]) or row["method"] == "static"]
    skipped = ours["skip_ratio_by_family"]
    cells = []
    for row in shown:
        name = LABELS[row["method"]]
        name += f", {100 * row['skip_ratio']['mean']:.0f} % skipped" if row["method"] == "static" else ""
        cells.append([name, *(f"{100 * row['accuracy_by_family'][family]:.0f}" for family in skipped)])
    return [*cells, ["skipped by ours, %", *(f"{100 * share:.0f}" for share in skipped.values())]]


# ------------------------------------------------------------------------------------------------------------ pictures


def draw_all(result: dict, folder: Path) -> None:
    """quality_accuracy.png, quality_skipping.png and quality_training.png."""
    draw_accuracy(result, folder / "quality_accuracy.png")
    draw_skipping(result, folder / "quality_skipping.png")
    draw_training(result, folder / "quality_training.png")


def new_figure(width: float, height: float, title: str) -> Figure:
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white", layout="constrained")
    figure.suptitle(title, fontsize=12, fontweight="bold", color=INK)
    return figure


def draw_accuracy(result: dict, path: Path) -> None:
    """Accuracy over realised skip ratio: a dot per run, a line through the means."""
    figure = new_figure(8, 4.6, "Accuracy over the share of layers skipped")
    axis = figure.subplots()
    groups = grouped([run for run in result["runs"] if run["method"] != "search"])
    for method, style in (("base", ":"), ("dense", "--")):
        level = mean(run["accuracy"] for run in groups[method, 0.0])
        axis.axhline(100 * level, color=INK, linewidth=1, linestyle=style, label=LABELS[method])
    for method, color in COLORS.items():
        own = sorted((target, runs) for (name, target), runs in groups.items() if name == method)
        means = [
            (100 * mean(r["skip_ratio"] for r in runs), 100 * mean(r["accuracy"] for r in runs)) for _, runs in own
        ]
        every = [(100 * run["skip_ratio"], 100 * run["accuracy"]) for _, runs in own for run in runs]
        axis.scatter(*zip(*every, strict=True), color=color, s=14, alpha=0.5)
        axis.plot(*zip(*means, strict=True), color=color, marker="o", markersize=5, label=LABELS[method])
    axis.set_xlabel("layers skipped, %")
    axis.set_ylabel("exact match, %")
    axis.legend(frameon=False, fontsize=9)
    figure.savefig(path)


def draw_skipping(result: dict, path: Path) -> None:
    """How often taught routers skip each layer, by family, at every target; mean over seeds."""
    groups = {target: runs for (method, target), runs in sorted(grouped(result["runs"]).items()) if method == "taught"}
    figure = new_figure(3.2 * len(groups) + 0.8, 3.8, "Share of questions that skip a layer, taught routers")
    axes = figure.subplots(1, len(groups), squeeze=False, sharey=True)[0]
    for axis, (target, runs) in zip(axes, groups.items(), strict=True):
        families = list(runs[0]["skip_by_layer"])
        layers = range(result["num_layers"])
        shares = [[mean(run["skip_by_layer"][name][layer] for run in runs) for name in families] for layer in layers]
        image = axis.imshow(shares, vmin=0, vmax=1, cmap="Blues", aspect="auto", origin="lower")
        axis.set_xticks(range(len(families)), families, rotation=60, fontsize=8)
        axis.set_yticks(list(layers))
        axis.set_title(f"asked for {100 * target:.0f} %", fontsize=10)
    axes[0].set_ylabel("decoder layer")
    figure.colorbar(image, ax=list(axes), shrink=0.8)
    figure.savefig(path)


def draw_training(result: dict, path: Path) -> None:
    """Loss and skip ratios over the steps, first seed, methods at the compared target."""
    figure = new_figure(11, 3.6, "Training, first seed")
    first = min(run["seed"] for run in result["runs"])
    compared = next(run["target"] for run in result["runs"] if run["method"] == "taught")
    runs = {run["method"]: run for run in result["runs"] if run["seed"] == first and run["target"] == compared}
    for axis, (name, label) in zip(figure.subplots(1, 3), CURVE_NAMES.items(), strict=True):
        for method, color in COLORS.items():
            points = runs.get(method, {}).get("curves", {}).get(name)
            if points:
                axis.plot(*zip(*points, strict=True), color=color, label=LABELS[method])
        if name != "token_loss":
            axis.axhline(compared, color=INK, linewidth=1, linestyle=":")
        axis.set_title(label, fontsize=10)
        axis.set_xlabel("step")
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path)


__all__ = ["draw_all", "page", "summarise"]
