"""Prints, draws and files what `measure` found. Nothing is measured here."""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from ..convert.output import replace_json
from . import grouping
from .environment import ROOT
from .systems import ALL_KEPT, BASE, CONTROL, FORCED, LEARNED, MIXED, PINNED, REMOVED, ROUTED_KINDS, SHARED
from .timing import PARTS, ceiling

README, GROUPINGS = "README.md", "grouping*.json"
BEGIN, END = "<!-- bench: begin (made by report.py) -->", "<!-- bench: end -->"
COLUMNS = (
    *("batch", "system", "routes", "skipped"),
    *(
        "prefill",
        "base / it",
        "of the ceiling",
        "decode",
        "base / it",
        "of the ceiling",
        "keys and values",
        "peak memory",
    ),
)
STYLES = {
    (FORCED, SHARED): ("tab:blue", "o"),
    (FORCED, MIXED): ("tab:orange", "D"),
    (PINNED, SHARED): ("tab:cyan", "s"),
    (PINNED, MIXED): ("tab:olive", "^"),
    (REMOVED, SHARED): ("tab:green", "x"),
    (LEARNED, None): ("tab:red", "*"),
}
TARGET_SHAPES = ("cpu-medium", "llava-1.5-7b", "llava-1.5-13b")
TARGET_COLUMNS = ("figure", "target", "measured", "base against itself", "met")


# --------------------------------------------------------------------------------------------------------------- files


def check_out(out: Path, overwrite: bool) -> None:
    """Raises: ValueError if a result is there and is not to be overwritten, or if it cannot be written there."""
    if out.suffix != ".json":
        raise ValueError(f"--out names the JSON file to write, got {out}; its plot is put beside it")
    if out.is_dir():
        raise ValueError(f"{out} is a folder, expected a file to write: name a file in it")
    if out.exists() and not overwrite:
        raise ValueError(f"{out} exists: give another --out, or replace it (--overwrite)")


def save(result: dict, out: Path, overwrite: bool = False) -> None:
    """Write a result whole or not at all.

    Raises: as `check_out`.
    """
    check_out(out, overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_json(out, result)


def results_in(folder: Path) -> dict[Path, dict]:
    """All results of this benchmark in a folder; other files there are somebody else's."""
    found = {path: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    return {path: result for path, result in found.items() if result.get("benchmark") == "bench"}


def report_all(folder: Path, readme: Path = ROOT / "benchmarks" / README) -> None:
    """Draw every result in a folder, and put the tables of all of them into a README between its markers."""
    results = results_in(folder)
    if not results:
        raise ValueError(f"{folder} holds no result of `roe-llava bench`: run it first")
    for path, result in results.items():
        draw(result, path.with_suffix(".png"))
    readme.write_text(readme_with(text_of_all(folder, readme.parent), readme.read_text()))
    print(f"wrote {readme} and {len(results)} plots in {folder}")


# --------------------------------------------------------------------------------------------------------------- cells


def percent(share: float | None, digits: int = 1) -> str:
    return "-" if share is None else f"{100 * share:.{digits}f} %"


def milliseconds(seconds: float) -> str:
    """With three digits that count."""
    return f"{1000 * seconds:.{2 if seconds < 0.1 else 0}f} ms"


def megabytes(number: int | None) -> str:
    return "-" if number is None else f"{number / 1e6:.1f} MB"


def times(numbers: dict) -> str:
    """A ratio with its quartiles."""
    low, high = numbers["quartiles"]
    return f"{numbers['ratio']:.3f} ({low:.3f} to {high:.3f})"


def rows_of(result: dict) -> Iterable[list[str]]:
    """The cells of every system at every batch size, in the order of `COLUMNS`."""
    for batch_size, batch in result["batches"].items():
        for own in batch["systems"]:
            cells = [batch_size, own["kind"], own["rows"] if int(batch_size) > 1 else "", percent(own["skip_ratio"])]
            for part in PARTS:
                has_ratio = own["kind"] != BASE
                cells.append(milliseconds(own[part]["seconds"]))
                cells.append(times(own[part]) if has_ratio else "1")
                cells.append(percent(own[part]["ratio_over_ceiling"]) if has_ratio else "-")
            yield [*cells, percent(own["kv_share"]), megabytes(own["peak_extra_bytes"])]


def find(result: dict, batch_size: int, kind: str, rows: str | None = None, asked: float | None = None) -> dict | None:
    """A system of a result; `None` if it was not measured."""
    for own in result["batches"].get(str(batch_size), {"systems": []})["systems"]:
        if own["kind"] == kind and rows in (None, own["rows"]) and (asked is None or asked in own["asked"]):
            return own
    return None


# ------------------------------------------------------------------------------------------------------------- targets


def targets(result: dict) -> list[dict]:
    """The figures to reach, as far as a result holds them.

    Returns: dicts of `figure`, `target`, `measured` and `noise` as text, and `met`.
    """
    found = [cost_of_routers(result, part, most) for part, most in (("prefill", 0.015), ("decode", 0.005))]
    for batch_size, rows, part, least in ((1, SHARED, "prefill", 0.98), (1, SHARED, "decode", 0.99)):
        found.append(of_the_ceiling(result, batch_size, rows, part, least))
    found.append(of_the_ceiling(result, 8, MIXED, "prefill", 0.95))
    return [one for one in [*found, exact_memory(result)] if one]


def cost_of_routers(result: dict, part: str, most: float) -> dict | None:
    """Time that RoE takes beyond the base's with every layer kept."""
    own = find(result, 1, ALL_KEPT)
    if own is None:
        return None
    cost = 1 / own[part]["ratio"] - 1
    figure = f"all kept, batch 1, {part}: costs"
    return target(result, 1, part, figure, f"at most {percent(most)}", percent(cost, 2), cost <= most)


def of_the_ceiling(result: dict, batch_size: int, rows: str, part: str, least: float) -> dict | None:
    """Ratio over ceiling of the forced quarter."""
    own = find(result, batch_size, FORCED, rows, 0.25)
    if own is None:
        return None
    reached = own[part]["ratio_over_ceiling"]
    figure = f"25 % skipped, {rows + ', ' if batch_size > 1 else ''}batch {batch_size}, {part}: of the ceiling"
    aim = f"at least {percent(least, 0)}"
    return target(result, batch_size, part, figure, aim, percent(reached, 2), reached >= least)


def target(result: dict, batch_size: int, part: str, figure: str, aim: str, measured: str, met: bool) -> dict:
    """A figure beside the ratio of the base to itself, which would be 1 on a quiet machine."""
    noise = times(find(result, batch_size, CONTROL)[part])
    return {"figure": figure, "target": aim, "measured": measured, "noise": noise, "met": met}


def exact_memory(result: dict) -> dict:
    """Whether the cache of every RoE system holds the kept (row, layer) pairs and nothing else."""
    systems = [own for batch in result["batches"].values() for own in batch["systems"] if own["kind"] in ROUTED_KINDS]
    exact = sum(own["kv_is_exact"] for own in systems)
    return {
        "figure": "bytes of keys and values over the base's: 1 - share skipped",
        "target": "exactly, always",
        "measured": f"exactly in {exact} of {len(systems)}",
        "noise": "-",
        "met": exact == len(systems),
    }


def target_cells(one: dict) -> list[str]:
    """In the order of `TARGET_COLUMNS`."""
    return [one["figure"], one["target"], one["measured"], one["noise"], "yes" if one["met"] else "no"]


# ------------------------------------------------------------------------------------------------------------ terminal


def print_result(result: dict, to: Console | None = None) -> None:
    """All tables of a result."""
    to = to or Console(highlight=False)
    if not to.is_terminal:
        to = Console(file=to.file, highlight=False, width=180)
    to.print(table(f"{result['shape']}: {setup_text(result)}", COLUMNS, rows_of(result), 4))
    to.print(ceiling_text(result), "")
    if result["shape"] in TARGET_SHAPES:
        to.print(table("Figures to reach", TARGET_COLUMNS, map(target_cells, targets(result)), 1))


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], num_text: int) -> Table:
    """A table whose first columns are text and whose others are numbers; a line where the first column changes."""
    made = Table(title=title, title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        made.add_column(column, justify="right" if number >= num_text else "left")
    last = None
    for row in rows:
        if num_text > 1 and last not in (None, row[0]):
            made.add_section()
        made.add_row(*row)
        last = row[0]
    return made


def setup_text(result: dict) -> str:
    """What the numbers depend on, in a line."""
    setup = result["setup"]
    where = setup["gpu"] or f"{setup['processor']}, torch threads: {setup['threads']}"
    compiled = ", layer parts compiled" if result["compiled"] else ""
    rounds = " / ".join(str(batch["rounds"]) for batch in result["batches"].values())
    return (
        f"{setup['dtype']}, {setup['attention']}{compiled}, {where}; torch {setup['torch']}, transformers "
        f"{setup['transformers']}; prompts of {' / '.join(map(str, result['prompts']))} tokens, "
        f"{rounds} rounds, {result['tokens']} decoding steps"
    )


def ceiling_text(result: dict) -> str:
    """What the ceilings are made of, and what the routes of `learned` are worth."""
    shares = "; ".join(
        f"batch {size} {percent(batch['decoder_share']['prefill'])} and {percent(batch['decoder_share']['decode'])}"
        for size, batch in result["batches"].items()
    )
    routes = "trained" if result["trained"] else "random, so its routes are whatever comes out"
    return (
        f"An adapter costs {percent(result['adapter_cost'])} of a layer. The base's time in decoder layers, prefill "
        f"and decode: {shares}. The routers of `{LEARNED}` are {routes}."
    )


# -------------------------------------------------------------------------------------------------------------- README


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]], num_text: int) -> str:
    marks = ["---" if number < num_text else "---:" for number in range(len(columns))]
    lines = [columns, marks, *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def readme_text(results: dict[Path, dict], folder: Path) -> str:
    """Markdown with a section per result.

    Args:
        results: by file.
        folder: the README's, for links.
    """
    parts = [] if results else ["No results yet."]
    for path, result in results.items():
        name = link(path, folder)
        parts.append(f"### {result['shape']}{', compiled' if result['compiled'] else ''}")
        parts.append(f"{setup_text(result)}. `{result['command']}`, numbers: [`{name}`]({name}).")
        if result["shape"] in TARGET_SHAPES:
            parts.append(markdown_table(TARGET_COLUMNS, map(target_cells, targets(result)), 1))
        picture = link(path.with_suffix(".png"), folder)
        parts.append(f"![Speed-up over the share of layers skipped, {result['shape']}]({picture})")
        parts.append(ceiling_text(result))
        parts.append(markdown_table(COLUMNS, rows_of(result), 4))
    return "\n\n".join(parts)


def text_of_all(results: Path, folder: Path) -> str:
    """Markdown of every result in a folder; `folder` is the README's, for links."""
    grouped = [grouping_text(path, folder) for path in sorted(results.glob(GROUPINGS))]
    return "\n\n".join([readme_text(results_in(results), folder), *(["### Many prompts"] if grouped else []), *grouped])


def grouping_text(path: Path, folder: Path) -> str:
    """Markdown of the result of `benchmarks/grouping.py`; `folder` is the README's, for links."""
    result, name = json.loads(path.read_text()), link(path, folder)
    about = f"{result['processor']}, torch threads: {result['threads']}, {result['dtype']}. `{result['command']}`"
    tables = [grouping.table(shape, own) for shape, own in result["shapes"].items()]
    return "\n\n".join([f"{about}, numbers: [`{name}`]({name}).", *tables])


def link(path: Path, folder: Path) -> str:
    """A path as a file in a folder names it."""
    return Path(os.path.relpath(path, folder)).as_posix()


def readme_with(text: str, readme: str) -> str:
    """A README with `text` between its markers.

    Raises: ValueError if the markers are not there once each, in order.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after or END in after:
        raise ValueError(f"the README must hold {BEGIN!r} and, after it, {END!r}, once each")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


# ---------------------------------------------------------------------------------------------------------------- plot


def draw(result: dict, path: Path) -> None:
    """Speed-up over the share of skipped layers: a panel per batch size and part, the ceiling as a line."""
    sizes = list(result["batches"])
    figure = Figure(figsize=(4.2 * len(sizes), 7), layout="constrained", dpi=110)
    panels = figure.subplots(len(PARTS), len(sizes), squeeze=False, sharex=True)
    for column, size in enumerate(sizes):
        for row, part in enumerate(PARTS):
            panel = panels[row][column]
            draw_panel(panel, result, size, part)
            panel.set_title(f"{part}, batch {size}", fontsize=10)
            if column == 0:
                panel.set_ylabel("base / system, times")
            if row == len(PARTS) - 1:
                panel.set_xlabel("share of layers skipped, %")
    panels[0][-1].legend(fontsize=8, frameon=False)
    figure.suptitle(f"{result['shape']}, {result['setup']['gpu'] or result['setup']['processor']}", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def draw_panel(panel, result: dict, size: str, part: str) -> None:
    """One batch size and part: medians with quartiles."""
    batch = result["batches"][size]
    most = max(0.5, *(own["skip_ratio"] for own in batch["systems"]))
    shares = [step * most / 50 for step in range(51)]
    best = [ceiling(share, result["adapter_cost"], batch["decoder_share"][part]) for share in shares]
    panel.plot([100 * share for share in shares], best, color="0.4", linewidth=1, label="ceiling")
    for (kind, rows), style in STYLES.items():
        found = [own for own in batch["systems"] if own["kind"] == kind and rows in (None, own["rows"])]
        if kind == FORCED and rows == SHARED:  # which is what `all kept` is at a share of 0
            found += [own for own in batch["systems"] if own["kind"] == ALL_KEPT]
        found.sort(key=lambda own: own["skip_ratio"])
        if found:
            draw_points(panel, found, part, f"{kind}, {rows}" if rows and int(size) > 1 else kind, style)
    panel.grid(alpha=0.3)


def draw_points(panel, systems: Sequence[dict], part: str, label: str, style: tuple[str, str]) -> None:
    """Systems of one kind; the style is a colour and a mark."""
    ratios = [own[part]["ratio"] for own in systems]
    low = [max(0.0, own[part]["ratio"] - own[part]["quartiles"][0]) for own in systems]
    high = [max(0.0, own[part]["quartiles"][1] - own[part]["ratio"]) for own in systems]
    shares = [100 * own["skip_ratio"] for own in systems]
    looks = {"color": style[0], "marker": style[1], "markersize": 5, "capsize": 2, "linewidth": 0.8, "linestyle": "--"}
    panel.errorbar(shares, ratios, yerr=[low, high], label=label, **looks)


__all__ = ["check_out", "draw", "print_result", "readme_text", "readme_with", "report_all", "save", "targets"]
