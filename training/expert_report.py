"""The page about a finished stage with experts: curves of its losses, from Trainer's `trainer_state.json`."""

import json
from pathlib import Path

from ..convert.output import new_folder

LOSSES = {"loss": "training", "aux_loss": "balancing, before its coefficient", "eval_loss": "evaluation"}


def write_report(
    state: str | Path, folder: str | Path, stage: str, layers: int = 0, *, overwrite: bool = False
) -> Path:
    """Write report.md and its pictures.

    Args:
        state: a trainer_state.json of `ExpertTrainer`.
        folder: where to write.
        stage: its name.
        layers: with experts; the balancing loss of a layer is 1 where its experts are used evenly.
        overwrite: replace the folder.
    Returns: report.md.
    Raises: ValueError if the file is no such state, or nothing was logged.
    """
    try:
        content = json.loads(Path(state).read_text(encoding="utf-8"))
        history = content["log_history"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{state} is no trainer_state.json of a run: {error}") from error
    if not any("loss" in entry for entry in history):
        raise ValueError(f"{state} holds no logs of training: was logging_steps larger than the run?")
    with new_folder(folder, overwrite) as partial:
        pictures = draw(history, partial, layers)
        (partial / "report.md").write_text(page(content, stage, pictures, layers), encoding="utf-8")
    return Path(folder) / "report.md"


def column(history: list[dict], name: str) -> tuple[list, list]:
    """(steps, values) of the entries that have a value."""
    having = [entry for entry in history if name in entry]
    return [entry["step"] for entry in having], [entry[name] for entry in having]


def draw(history: list[dict], folder: Path, layers: int) -> dict[str, str]:
    """Write the pictures; file name to caption."""
    from matplotlib.figure import Figure  # no pyplot: nothing global, no display

    captions = {"losses.png": "Loss as it was optimized, and on the evaluation data"}
    figure = Figure(figsize=(7, 3.5))
    axes = figure.subplots()
    for name in ("loss", "eval_loss"):
        steps, values = column(history, name)
        if steps:
            axes.plot(steps, values, marker="o" if name == "eval_loss" else None, label=LOSSES[name])
    axes.set(xlabel="step", ylabel="nats")
    axes.legend()
    figure.savefig(folder / "losses.png", dpi=120, bbox_inches="tight")
    steps, values = column(history, "aux_loss")
    if steps:
        captions["balance.png"] = f"Load balancing loss, before its coefficient; {layers} is even use of all experts"
        figure = Figure(figsize=(7, 3))
        axes = figure.subplots()
        axes.plot(steps, values)
        axes.axhline(layers, color="black", linewidth=0.8)
        axes.set(xlabel="step", ylabel=f"sum over {layers} layers")
        figure.savefig(folder / "balance.png", dpi=120, bbox_inches="tight")
    return captions


def page(content: dict, stage: str, pictures: dict[str, str], layers: int) -> str:
    """report.md."""
    history = content["log_history"]
    rows = [("stage", stage), ("steps", f"{content.get('global_step')} of {content.get('max_steps')}")]
    for name, title in LOSSES.items():
        if values := column(history, name)[1]:
            even = f" (even use: {layers})" if name == "aux_loss" else " nats"
            rows.append(
                (f"{title} loss" if name != "aux_loss" else title, f"{values[0]:.4f} to {values[-1]:.4f}{even}")
            )
    best = content.get("best_model_checkpoint")
    rows += [("best checkpoint", Path(best).name)] if best else []
    lines = [
        "# Training with experts",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows),
        "",
    ]
    lines += ["First and last entry of the log; figures of training are means since the entry before.", ""]
    for name, caption in pictures.items():
        lines += [f"![{caption}]({name})", "", f"{caption}.", ""]
    return "\n".join(lines)


__all__ = ["write_report"]
