"""What the pages in docs/ say is so: tests and commands they name exist, figures are those of the result files."""

import ast
import json
import re
from pathlib import Path

import pytest

from roe_llava.benchmarks import graft_scale
from roe_llava.cli import COMMANDS

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
CHECKPOINTS = (ROOT / "docs" / "checkpoints.md").read_text()


def named_in(file: str) -> set[str]:
    tree = ast.parse((ROOT / "tests" / file).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_test_that_a_page_names_exists(page):
    named = re.findall(r"(test_\w+\.py)::(test_\w+)", page.read_text())
    assert not [name for name in named if name[1] not in named_in(name[0])]
    files = set(re.findall(r"test_\w+\.py", page.read_text()))
    assert all((ROOT / "tests" / file).is_file() for file in files)


def test_every_row_of_the_contract_names_a_test():
    rows = re.findall(r"^\| (?!what you do|-)(.*) \|$", (ROOT / "docs" / "contract.md").read_text(), flags=re.MULTILINE)
    assert len(rows) > 20 and not [row for row in rows if not re.search(r"`test_\w+\.py(::test_\w+)?`$", row)]


def test_every_cell_of_the_bases_has_a_test():
    text = (ROOT / "docs" / "bases.md").read_text()
    table = text.partition("## What each base can do")[2].partition("## Adding one")[0]
    listed = {int(number) for number in re.findall(r"^(\d+)\. `test_", table, flags=re.MULTILINE)}
    rows = re.findall(r"^\| (?!\|)(.*) \|$", table, flags=re.MULTILINE)
    cells = [cell for row in rows for cell in row.split(" | ")[1:]]
    odd = [cell for cell in cells if not re.fullmatch(r"(?:yes|no) \(\d+\)|no such input|not tried", cell)]
    assert len(cells) >= 80 and not odd
    assert {int(number) for number in re.findall(r" \((\d+)\) ", " ".join(rows) + " ")} | listed == listed


def test_every_footnote_of_the_roads_has_a_test():
    marks = {ord(mark) for mark in "¹²³⁴⁵⁶⁷⁸⁹"}
    roads = CHECKPOINTS.partition("\n\n| |")[0]
    used = {"¹²³⁴⁵⁶⁷⁸⁹".index(mark) + 1 for mark in roads if ord(mark) in marks} | {10, 11, 12}
    rows = re.findall(r"^\| (\d+) \|.*`test_\w+\.py::test_", CHECKPOINTS, flags=re.MULTILINE)
    assert {int(row) for row in rows} == used == set(range(1, 13))


def test_every_conversion_is_described_and_exists():
    described = set(re.findall(r"^\| `([\w-]+) [A-Z]", CHECKPOINTS, flags=re.MULTILINE))
    assert described == {name for name, (module, _) in COMMANDS.items() if module.startswith("convert.")}


def test_the_speed_of_grafting_is_that_of_the_result_file():
    text = CHECKPOINTS.partition("graft_scale: begin -->\n")[2].partition("\n<!-- graft_scale: end")[0]
    assert text == graft_scale.speed_text(json.loads(graft_scale.RESULT.read_text()))


def test_the_snippet_runs(monkeypatch):
    monkeypatch.chdir(ROOT)
    exec(CHECKPOINTS.partition("```python\n")[2].partition("```")[0], {})
