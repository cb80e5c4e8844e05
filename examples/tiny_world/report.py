"""Prints what the demo measured, as tables in the terminal. Nothing is measured here."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

KEPT, SKIPPED = "■", "·"


def console() -> Console:
    """The terminal; wide enough for every table where the output goes to a file."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=120)


def progress(to: Console, description: str) -> Callable[[Iterable], Iterable]:
    """Wraps a sequence in a progress bar."""
    return lambda items: track(items, description, console=to)


def percent(share: float | None, digits: int = 1) -> str:
    """0.1234 as "12.3 %"; "-" for what was not measured."""
    return "-" if share is None else f"{100 * share:.{digits}f} %"


def table(title: str, columns: Iterable[str], caption: str | None = None) -> Table:
    """An empty table: first column text, the others numbers."""
    made = Table(title=title, title_justify="left", title_style="bold", caption=caption, caption_justify="left")
    for number, column in enumerate(columns):
        made.add_column(column, justify="right" if number else "left")
    return made


def print_start(to: Console, grafted: Path, setup: dict) -> None:
    """Which code runs on what."""
    to.print(f"Grafted the shipped parts: [bold]{grafted}[/bold]")
    to.print(f"Opened with the folder's own code: {setup['code']}")
    to.print(
        f"torch {setup['torch']}, transformers {setup['transformers']}, {setup['dtype']}, {setup['attention']}, "
        f"torch threads: {setup['threads']}, on {setup['processor']} ({setup['cores']} cores)\n"
    )


def print_accuracy(to: Console, accuracy: dict, of_base: dict) -> None:
    """Accuracy of both models and skip ratio, per family.

    Args:
        accuracy: of `asking.accuracy_summary`.
        of_base: the base's accuracy.json; its column with shuffled images is shown where there is one.
    """
    overall, blind = accuracy["overall"], shuffled_column(of_base)
    made = table(
        f"Held-out questions answered exactly ({overall['questions']} questions)",
        ("family", "most common answer", "shuffled images", "base", "RoE", "lost", "skipped"),
        f"lost: {100 * overall['lost']:.1f} ± {100 * overall['lost_standard_error']:.1f} points (standard error); "
        f"both models gave the same answer to {percent(overall['same_answer'])}",
    )
    for name, scores in accuracy["families"].items():
        made.add_row(name, *accuracy_cells(scores, blind.get(name)))
    made.add_section()
    made.add_row("all", *accuracy_cells(overall, blind.get("all")), style="bold")
    to.print(made, "")


def accuracy_cells(scores: dict, blind: float | None) -> list[str]:
    """A row of the accuracy table."""
    lost = f"{100 * scores['lost']:+.1f}"
    shares = (scores["most_common_answer"], blind, scores["base"], scores["roe"])
    return [*map(percent, shares), lost, percent(scores["skip_ratio"])]


def shuffled_column(of_base: dict) -> dict[str, float]:
    """Accuracy per family with shuffled images, and their mean as "all", from the base's accuracy.json.

    Args:
        of_base: {"families": table} or the table itself: either {family: {..."shuffled"...: share}} or
            {..."shuffled"...: {family: share}}.
    Returns: shares in [0, 1]; {} if there are none.
    """
    column: dict[str, float] = {}
    for name, values in of_base.get("families", of_base).items():
        if not isinstance(values, Mapping):
            continue
        if "shuffled" in name:
            column |= values
        column.update((name, share) for key, share in values.items() if "shuffled" in key)
    column = {name: share for name, share in column.items() if name not in ("all", "overall")}
    return column | {"all": sum(column.values()) / len(column)} if column else {}


def print_routes(to: Console, routes: dict) -> None:
    """The most common routes, who takes them, and how often each layer is skipped."""
    made = table(
        f"Routes: {routes['distinct']} different ones, {routes['common']} of them with "
        f"{percent(routes['common_means_share'], 0)} of the questions or more (layer 0 aside)",
        ("route, layer 0 first", "questions", "families"),
    )
    made.columns[2].justify = "left"
    for entry in routes["most_common"]:
        largest = list(entry["families"].items())[:4]
        families = ", ".join(f"{family} {percent(share, 0)}" for family, share in largest)
        made.add_row(strip(entry["route"]), percent(entry["share"]), families)
    to.print(made)
    shares = "  ".join(f"{layer}: {percent(share, 0)}" for layer, share in enumerate(routes["skipped_by_layer"]))
    to.print(f"Skipped, by layer: {shares}\n")


def strip(route: str) -> str:
    """A route "1101" as a strip of boxes."""
    return "".join(KEPT if mark == "1" else SKIPPED for mark in route)


def print_training(to: Console, training: dict) -> None:
    """What training.json compares the trained model with: sections "static_drop" and "controls", if they are there."""
    for section, title in (("static_drop", "Static drop of as many layers"), ("controls", "Controls")):
        rows = comparison_rows(training.get(section))
        if not rows:
            continue
        columns = list(dict.fromkeys(name for row in rows for name in row))
        made = table(f"{title} (from the training of the shipped parts)", columns)
        for row in rows:
            made.add_row(*(cell(name, row.get(name)) for name in columns))
        to.print(made, "")


def comparison_rows(section) -> list[dict]:
    """Rows of a comparison, whether it is written as a list, as {name: row} or as one row; nested tables are left out.

    Returns: dicts of plain values, in the order of the file.
    """
    if not section:
        return []
    if isinstance(section, Mapping) and all(isinstance(value, Mapping) for value in section.values()):
        section = [{"name": name, **row} for name, row in section.items()]
    rows = [section] if isinstance(section, Mapping) else section
    return [{name: value for name, value in row.items() if is_plain(value)} for row in rows]


def is_plain(value) -> bool:
    """Whether a value fits a cell: a number, a text, or a few numbers."""
    if isinstance(value, list):
        return all(isinstance(item, int | float) for item in value)
    return isinstance(value, str | int | float)


def cell(name: str, value) -> str:
    """A value of a comparison; shares of one are shown in percent."""
    if isinstance(value, float) and any(word in name for word in ("accuracy", "ratio", "share")):
        return percent(value)
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def print_timing(to: Console, timing: dict) -> None:
    """Prefill and decoding of both models, and how much of what was possible is reached."""
    made = table(
        f"Time at batch 1, learned routes, {percent(timing['skip_ratio'])} of the layers skipped",
        ("part", "base", "RoE", "base / RoE", "time in decoder layers", "ceiling", "of the ceiling reached"),
        f"{timing['questions']} questions, median of {timing['repeats']} runs each, both models by turns; prefill: one "
        f"forward pass over image and prompt; decode: one token, over {timing['tokens']}. Ceiling: skipped layers cost "
        f"what their adapters cost ({percent(timing['adapter_cost'])} of a layer's parameters), the rest is unchanged.",
    )
    for part in ("prefill", "decode"):
        row = timing[part]
        made.add_row(
            part,
            f"{1000 * row['base_seconds']:.2f} ms",
            f"{1000 * row['roe_seconds']:.2f} ms",
            f"{row['ratio']:.2f}x",
            percent(row["decoder_share"], 0),
            f"{row['ceiling']:.2f}x",
            percent(row["share_of_ceiling"], 0),
        )
    to.print(made, "")


def print_end(to: Console, written: Iterable[Path], seconds: float) -> None:
    """Where everything went."""
    to.print(f"Done in {seconds:.0f} s. Written:")
    for path in written:
        to.print(f"  {path}")


__all__ = ["comparison_rows", "percent", "shuffled_column"]
