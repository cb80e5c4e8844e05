"""The page about a finished run: curves, skipping by layer, soft beside hard, from Trainer's `trainer_state.json`."""

import itertools
import json
import re
from pathlib import Path

from ..convert.output import new_folder

LAYER = re.compile(r"(?:eval_)?skip/layer_(\d+)")


def write_report(
    state: str | Path, folder: str | Path, *, target: float | None = None, overwrite: bool = False
) -> Path:
    """Write report.md and its pictures.

    Args:
        state: a trainer_state.json of `RoeTrainer`.
        folder: where to write.
        target: wanted skip ratio, drawn as a line.
        overwrite: replace the folder.
    Returns: report.md.
    Raises: ValueError if the file is no such state, or nothing was logged.
    """
    try:
        content = json.loads(Path(state).read_text(encoding="utf-8"))
        history = content["log_history"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{state} is no trainer_state.json of a run: {error}") from error
    trained = [entry for entry in history if "token_loss" in entry]
    evaluated = [entry for entry in history if "eval_loss" in entry]
    if not trained:
        raise ValueError(f"{state} holds no logs of training: was logging_steps larger than the run?")
    with new_folder(folder, overwrite) as partial:
        pictures = draw(trained, evaluated, partial, target)
        (partial / "report.md").write_text(page(content, trained, evaluated, pictures, target), encoding="utf-8")
    return Path(folder) / "report.md"


# ------------------------------------------------------------------------------------------------------------ pictures


def draw(trained: list[dict], evaluated: list[dict], folder: Path, target: float | None) -> dict[str, str]:
    """Write the pictures; file name to caption."""
    from matplotlib.figure import Figure  # no pyplot: nothing global, no display

    captions = {}

    def save(figure, name: str, caption: str) -> None:
        figure.savefig(folder / name, dpi=120, bbox_inches="tight")
        captions[name] = caption

    figure = Figure(figsize=(7, 3.5))
    plot_losses(figure.subplots(), trained, evaluated)
    save(
        figure, "losses.png", "Cross entropy per answer, and everything else in the loss; stages change at dotted lines"
    )
    if any("hard_skip_ratio" in entry for entry in trained):
        figure = Figure(figsize=(7, 3.5))
        plot_ratios(figure.subplots(), trained, evaluated, target)
        save(figure, "soft_hard.png", "Mean weight of the skip path in training beside what inference would skip")
        figure = Figure(figsize=(7, 3.5))
        plot_layers(figure, trained)
        save(figure, "layers_over_time.png", "Share of hard decisions to skip, layer by layer")
        figure = Figure(figsize=(7, 3))
        plot_final(figure.subplots(), trained, evaluated)
        save(figure, "layers_final.png", "The same at the end of the run")
    return captions


def column(entries: list[dict], name: str) -> tuple[list, list]:
    """(steps, values) of the entries that have a value."""
    having = [entry for entry in entries if name in entry]
    return [entry["step"] for entry in having], [entry[name] for entry in having]


def mark_stages(axes, trained: list[dict]) -> None:
    for before, after in itertools.pairwise(trained):
        if before.get("stage") != after.get("stage"):
            axes.axvline(before["step"], color="grey", linestyle=":", linewidth=1)


def plot_losses(axes, trained: list[dict], evaluated: list[dict]) -> None:
    axes.plot(*column(trained, "token_loss"), label="training: cross entropy")
    axes.plot(*column(trained, "routing_loss"), label="training: rest of the loss")
    if evaluated:
        axes.plot(*column(evaluated, "eval_loss"), marker="o", label="evaluation, hard routing")
    mark_stages(axes, trained)
    axes.set(xlabel="step", ylabel="nats")
    axes.legend()


def plot_ratios(axes, trained: list[dict], evaluated: list[dict], target: float | None) -> None:
    axes.plot(*column(trained, "skip_weight"), label="soft: mean skip weight")
    axes.plot(*column(trained, "hard_skip_ratio"), label="hard: inference would skip")
    if any("eval_hard_skip_ratio" in entry for entry in evaluated):
        axes.plot(*column(evaluated, "eval_hard_skip_ratio"), marker="o", label="hard, evaluation")
    if target is not None:
        axes.axhline(target, color="black", linewidth=0.8, label=f"target {target:.0%}")
    mark_stages(axes, trained)
    axes.set(xlabel="step", ylabel="share of (question, layer) pairs", ylim=(-0.02, 1.02))
    axes.legend()


def layer_shares(entry: dict, prefix: str = "") -> list[float]:
    """Skip share by layer of one log entry, empty if it has none."""
    names = sorted(name for name in entry if LAYER.fullmatch(name) and name.startswith(prefix + "skip/"))
    return [entry[name] for name in sorted(names, key=lambda name: int(LAYER.fullmatch(name)[1]))]


def plot_layers(figure, trained: list[dict]) -> None:
    axes = figure.subplots()
    having = [entry for entry in trained if layer_shares(entry)]
    grid = list(zip(*(layer_shares(entry) for entry in having), strict=True))
    steps = [entry["step"] for entry in having]
    image = axes.pcolormesh(steps, range(len(grid)), grid, vmin=0, vmax=1, cmap="viridis", shading="nearest")
    axes.set(xlabel="step", ylabel="layer")
    axes.yaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=axes, label="share skipped")


def plot_final(axes, trained: list[dict], evaluated: list[dict]) -> None:
    shares = final_layers(trained, evaluated)
    axes.bar(range(len(shares)), shares)
    axes.set(xlabel="layer", ylabel="share skipped", ylim=(0, 1))
    axes.xaxis.get_major_locator().set_params(integer=True)


def final_layers(trained: list[dict], evaluated: list[dict]) -> list[float]:
    """Skip share by layer at the end, on the evaluation data if there are any."""
    if evaluated and layer_shares(evaluated[-1], "eval_"):
        return layer_shares(evaluated[-1], "eval_")
    return next((shares for entry in reversed(trained) if (shares := layer_shares(entry))), [])


# ---------------------------------------------------------------------------------------------------------------- page


def page(content: dict, trained: list[dict], evaluated: list[dict], pictures: dict[str, str], target) -> str:
    """report.md."""
    last = trained[-1]
    rows = [("steps", f"{content.get('global_step')} of {content.get('max_steps')}")]
    rows += [("target skip ratio", f"{target:.1%}")] if target is not None else []
    rows += figures(last, "training", "hard_skip_ratio", "skip_weight", "soft_hard_gap", "token_loss", "routing_loss")
    if evaluated:
        rows += figures(evaluated[-1], "evaluation", "eval_hard_skip_ratio", "eval_loss")
    best = content.get("best_model_checkpoint")
    rows += [("best checkpoint", Path(best).name)] if best else []
    lines = ["# Training run", "", "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows), ""]
    lines += ["Training figures are means since the log entry before; evaluation routes hard, as inference does.", ""]
    if shares := final_layers(trained, evaluated):
        lines += ["| layer | skipped |", "|---|---|", *(f"| {i} | {share:.0%} |" for i, share in enumerate(shares)), ""]
    for name, caption in pictures.items():
        lines += [f"![{caption}]({name})", "", f"{caption}.", ""]
    return "\n".join(lines)


def figures(entry: dict, what: str, *names: str) -> list[tuple[str, str]]:
    shown = []
    for name in names:
        if name in entry:
            is_share = "skip" in name or "gap" in name
            title = name.removeprefix("eval_").replace("_", " ")
            shown.append((f"{title} ({what})", f"{entry[name]:.1%}" if is_share else f"{entry[name]:.4f} nats"))
    return shown


__all__ = ["write_report"]
