"""Writes the demo's results into the README: `python -m roe_llava.examples.tiny_world.readme_table --demo out/demo`.

Copies the demo's result file and pictures to docs/, then replaces what stands between two markers in README.md. Every
number of the README comes from here, and a test compares the file with what this module makes of the results.
"""

import argparse
import json
import shutil
from pathlib import Path

from .demo import EXAMPLES_PICTURE, RESULT, ROUTES_PICTURE, SCENE, SHIPPED, read_json
from .report import cell, comparison_rows, percent, shuffled_column

ROOT = Path(__file__).resolve().parents[2]
DOCS = "docs"
BEGIN, END = "<!-- results: begin (made by readme_table.py) -->", "<!-- results: end -->"
COLUMNS = ("questions", "most common answer", "shuffled images", "base", "RoE", "layers skipped")


def results_text(demo: dict, training: dict, of_base: dict) -> str:
    """Markdown with the accuracy table, the times and the comparisons.

    Args:
        demo: the demo's result file.
        training: training.json of the shipped parts; {} leaves its comparisons out.
        of_base: accuracy.json of the shipped base; {} leaves its column empty.
    """
    parts = [accuracy_table(demo["accuracy"], shuffled_column(of_base)), routes_sentence(demo), timing_table(demo)]
    parts += [comparison(training, "static_drop", "Static drop of as many layers"), comparison(training, "controls")]
    parts.append(
        f"Numbers: `{DOCS}/{RESULT}` (written by `make demo`), `examples/tiny_world/checkpoint/base/accuracy.json` and "
        "`examples/tiny_world/checkpoint/roe/training.json`."
    )
    return "\n\n".join(part for part in parts if part)


def accuracy_table(accuracy: dict, blind: dict[str, float]) -> str:
    """Share of answers that are right to the letter, per family."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" + "|---:" * (len(COLUMNS) - 1) + "|"]
    rows = [*accuracy["families"].items(), ("all", accuracy["overall"])]
    for name, scores in rows:
        shares = [scores["most_common_answer"], blind.get(name), scores["base"], scores["roe"], scores["skip_ratio"]]
        cells = [name, *map(percent, shares)]
        lines.append("| " + " | ".join(f"**{text}**" if name == "all" else text for text in cells) + " |")
    return "\n".join(lines)


def routes_sentence(demo: dict) -> str:
    """How many questions, what routing costs, how many routes."""
    overall, routes = demo["accuracy"]["overall"], demo["routes"]
    return (
        f"{overall['questions']} held-out questions, exact match. Lost against the base: {100 * overall['lost']:.1f} ± "
        f"{100 * overall['lost_standard_error']:.1f} points (standard error). {routes['distinct']} different routes, "
        f"{routes['common']} of them taken by {percent(routes['common_means_share'], 0)} of the questions or more; "
        "layer 0, whose decision cannot depend on the question, is not counted."
    )


def timing_table(demo: dict) -> str:
    """Times at batch 1, and the share of the possible gain that is reached."""
    timing, setup = demo["timing"], demo["setup"]
    lines = [
        "| batch 1 | base | RoE | base / RoE | ceiling | of the ceiling reached |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for part, unit in (("prefill", "ms"), ("decode", "ms per token")):
        row = timing[part]
        times = [f"{1000 * row[name]:.2f} {unit}" for name in ("base_seconds", "roe_seconds")]
        ratios = [f"{row['ratio']:.2f}x", f"{row['ceiling']:.2f}x", percent(row["share_of_ceiling"], 0)]
        lines.append("| " + " | ".join([part, *times, *ratios]) + " |")
    lines += [
        "",
        f"Both models by turns in one process, {timing['questions']} questions of all families, "
        f"{percent(timing['skip_ratio'])} of the layers skipped; {setup['dtype']}, {setup['attention']}, torch "
        f"threads: {setup['threads']}, {setup['processor']}. The ceiling charges a skipped layer what its adapter "
        f"costs ({percent(timing['adapter_cost'])} of a layer's parameters) and leaves everything outside the decoder "
        "layers as it is.",
    ]
    return "\n".join(lines)


def comparison(training: dict, section: str, title: str | None = None) -> str:
    """A section of training.json as a list, "" if it is not there."""
    rows = comparison_rows(training.get(section))
    if not rows:
        return ""
    lines = []
    for row in rows:
        name = row.get("name")
        values = [f"{key.replace('_', ' ')} {cell(key, value)}" for key, value in row.items() if key != "name"]
        lines.append("- " + ": ".join(part for part in (name, ", ".join(values)) if part))
    return "\n".join([f"{title or section.capitalize()}:", "", *lines])


def readme_with(text: str, readme: str) -> str:
    """The README with `text` between its markers.

    Raises: ValueError if the markers are not there once each, in order.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after or END in after:
        raise ValueError(f"README.md must hold {BEGIN!r} and, after it, {END!r}, once each")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def generated(root: Path = ROOT) -> str:
    """What README.md has to be, from the result files of a source tree.

    Raises: FileNotFoundError if the demo's results are not in docs/.
    """
    results = root / DOCS / RESULT
    if not results.is_file():
        raise FileNotFoundError(f"{results} is missing: run the demo, then readme_table with --demo")
    shipped = root / SHIPPED.relative_to(ROOT)
    training, of_base = read_json(shipped / "roe" / "training.json"), read_json(shipped / "base" / "accuracy.json")
    text = results_text(json.loads(results.read_text()), training, of_base)
    return readme_with(text, (root / "README.md").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--demo", type=Path, default=Path("out/demo"), help="the demo's output folder (%(default)s)")
    folder, docs = parser.parse_args().demo, ROOT / DOCS
    docs.mkdir(exist_ok=True)
    for name in (RESULT, ROUTES_PICTURE, EXAMPLES_PICTURE, SCENE):
        shutil.copy(folder / name, docs / name)
    (ROOT / "README.md").write_text(generated())
    print(f"README.md and {DOCS}/ now show the results of {folder}")


if __name__ == "__main__":
    main()
