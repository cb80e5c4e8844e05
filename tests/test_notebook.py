"""The quickstart notebook runs as a reader runs it, and its cells show and leave what they say."""

import base64
import io
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pytest
from hub_server import running_hub
from ipykernel.kernelspec import write_kernel_spec
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from matplotlib.colors import to_rgb
from nbclient import NotebookClient
from PIL import Image
from safetensors.torch import load_file

import roe_llava
from roe_llava.display.drawing import KEPT, SKIPPED
from roe_llava.examples.tiny_world.demo import SHIPPED

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "notebooks" / "quickstart.ipynb"
REPO_ID = "me/quickstart"
UNNAMED = 'REPO_ID = ""'


@dataclass
class Ran:
    """A notebook that ran from its first cell to its last, and its last but one again as a reader would.

    Attributes:
        cells: id to cell, with its outputs.
        place: the folder it wrote to.
        beside: what it left in the folder it ran in.
        unsent: repositories of the Hub before a token and a name were given.
        without_token, pushed: what the pushing cell printed with a name alone, and with a token too.
        hub: where it went.
    """

    cells: dict
    place: Path
    beside: list
    unsent: dict
    without_token: str
    pushed: str
    hub: object

    def text(self, name: str) -> str:
        return printed(self.cells[name])

    def shown(self, name: str, kind: str) -> list:
        """What a cell displays of a MIME type."""
        shown = [output.data for output in self.cells[name].outputs if output.output_type != "stream"]
        return [data[kind] for data in shown if kind in data]


def printed(cell) -> str:
    streams = [output for output in cell.outputs if output.output_type == "stream" and output.name == "stdout"]
    return "".join(output.text for output in streams)


def environment(hub, place: Path) -> dict[str, str]:
    """Of the kernel: an empty cache, the Hub of this test, no token, and every temporary file in one place."""
    folders = {"TMPDIR": place, "IPYTHONDIR": place / "ipython", "JUPYTER_RUNTIME_DIR": place / "runtime"}
    search = [str(Path(roe_llava.__file__).resolve().parent.parent), os.environ.get("PYTHONPATH")]
    given = {name: str(folder) for name, folder in folders.items()} | hub.environment(place / "cache")
    given |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, search))}
    return {name: value for name, value in os.environ.items() if name != "HF_TOKEN"} | given


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    # The kernel of this Python, whichever ones are installed.
    specs, place, beside = (tmp_path_factory.mktemp(name) for name in ("specs", "place", "beside"))
    write_kernel_spec(specs / "here")
    manager = AsyncKernelManager(
        kernel_name="here",
        kernel_spec_manager=KernelSpecManager(kernel_dirs=[str(specs)]),
        connection_file=str(specs / "connection.json"),
    )
    assert manager.kernel_spec.argv[0] == sys.executable
    notebook = nbformat.read(QUICKSTART, as_version=4)
    client = NotebookClient(notebook, km=manager, timeout=300, resources={"metadata": {"path": str(beside)}})
    with running_hub() as hub, client.setup_kernel(env=environment(hub, place)):
        for index, cell in enumerate(notebook.cells):
            client.execute_cell(cell, index)

        def again(source: str) -> str:
            notebook.cells.append(nbformat.v4.new_code_cell(source))
            return printed(client.execute_cell(notebook.cells[-1], len(notebook.cells) - 1))

        cells = {cell.id: cell for cell in notebook.cells}
        named = cells["push"].source.replace(UNNAMED, f'REPO_ID = "{REPO_ID}"')
        without_token, unsent = again(named), {**hub.repos}
        again('import os\nos.environ["HF_TOKEN"] = "hf_test"')
        pushed = again(named)
        folder = Path(printed(cells["end"]).strip())
        left = sorted(beside.rglob("*"))
        yield Ran(cells, folder, left, unsent, without_token, pushed, hub)
        assert not hub.unknown


def pixels(image: str) -> set[tuple[int, ...]]:
    with Image.open(io.BytesIO(base64.b64decode(image))) as opened:
        return {color for _, color in opened.convert("RGB").getcolors(1 << 20)}


def rgb(color: str) -> tuple[int, ...]:
    return tuple(round(255 * part) for part in to_rgb(color))


def test_it_is_kept_without_outputs():
    notebook = nbformat.read(QUICKSTART, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not [cell.id for cell in code if cell.outputs or cell.execution_count is not None]
    assert QUICKSTART.stat().st_size < 30_000
    (push,) = [cell for cell in code if cell.id == "push"]
    assert push.source.count(UNNAMED) == 1  # a fresh copy sends nothing


def test_it_asks_and_shows_picture_and_route(ran):
    assert re.fullmatch(r"\d+", ran.text("ask").strip())
    (scene,), (route,) = ran.shown("ask", "image/png")[:1], ran.shown("ask", "text/html")
    assert len(pixels(scene)) > 4 and route.count("<span") == 7


def test_a_batch_has_a_route_per_question(ran):
    (table,) = ran.shown("batch", "text/html")
    assert table.count("<tr>") == 8 and "8 inputs" in table and "What " in table


def test_the_map_of_routes_is_a_picture(ran):
    (picture,) = ran.shown("map", "image/png")
    assert {rgb(KEPT), rgb(SKIPPED)} <= pixels(picture)


def test_the_budget_is_met_and_a_small_one_costs_little(ran):
    rows = [
        [float(number) for number in re.findall(r"([\d.]+)%", line)] for line in ran.text("budget").splitlines()[1:]
    ]
    assert [row[0] for row in rows] == [0, 10, 20, 30, 40, 50] and rows[0][1] == 0
    assert all(abs(asked - skipped) < 5 for asked, skipped, _ in rows)
    assert rows[0][2] - rows[1][2] < 5 and rows[0][2] > 80


def test_a_pinned_route_is_taken(ran):
    rows = {line[:12].strip(): re.findall(r"[\d.]+%", line) for line in ran.text("pin").splitlines()}
    assert set(rows) == {"learned", "every layer", "most common"}
    assert rows["every layer"] == ["0.0%", re.findall(r"[\d.]+%", ran.text("budget").splitlines()[1])[2]]
    assert float(rows["learned"][1][:-1]) > float(rows["most common"][1][:-1])


def test_both_models_are_timed(ran):
    assert re.search(r"^[\d.]+% of the layers skipped, torch threads: 1$", ran.text("measure"), flags=re.MULTILINE)
    times = re.findall(r"^(\w+): base ([\d.]+) ms.*, RoE ([\d.]+) ms.*, ([\d.]+)x$", ran.text("measure"), re.MULTILINE)
    assert [part for part, *_ in times] == ["prefill", "decode"]
    assert all(base / roe == pytest.approx(ratio, rel=0.05) for _, *n in times for base, roe, ratio in [map(float, n)])


def test_the_report_counts_every_prompt_of_the_notebook(ran):
    (report,) = ran.shown("report", "text/html")
    timed = 3 + 8 * 3  # warming up, and three runs of eight questions
    asked = 1 + 8 + 128 * (1 + 6 + 1 + 3) + timed  # one, a batch; then the map, budgets, learned routes, pinned ones
    assert f">{asked}<" in report.replace(",", "")


def test_the_adapter_is_the_shipped_one(ran):
    ours, shipped = (
        load_file(folder / "roe_adapter.safetensors") for folder in (ran.place / "adapter", SHIPPED / "roe")
    )
    assert ours.keys() == shipped.keys() and all(tensor.equal(shipped[name]) for name, tensor in ours.items())


def test_nothing_is_sent_without_a_name_and_a_token(ran):
    assert ran.text("push").endswith("dry run, nothing was sent: REPO_ID is empty\n")
    assert "modeling_roe_llava.py" in ran.text("push")
    assert ran.without_token.endswith("dry run, nothing was sent: there is no token (hf auth login)\n")
    assert ran.unsent == {}


def test_the_push_arrives_private_and_opens_again(ran):
    commit = re.search(rf"pushed to {REPO_ID}, commit (\w{{40}})", ran.pushed)[1]
    assert "every tensor equal: True" in ran.pushed
    assert ran.hub.names[REPO_ID]["main"] == commit and ran.hub.private == {REPO_ID}
    there = ran.hub.repos[REPO_ID][commit]
    sent = {path.name: path.read_bytes() for path in there.iterdir()}
    kept = {path.name: path.read_bytes() for path in (ran.place / "model").iterdir() if path.is_file()}
    assert {name for name in kept if sent.get(name) != kept[name]} == set()
    assert sent.keys() - kept.keys() == {"README.md", "routes.png", ".gitattributes"}


def test_everything_it_writes_is_in_its_place(ran):
    assert ran.beside == [] and {path.name for path in ran.place.iterdir()} == {"model", "adapter"}
