"""Every command that writes a folder leaves the old one or the new one, killed or out of room, and says what it did."""

import os
import pickle
import resource
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from convert_helpers import make_base, train
from golden_moe_helpers import FOLDER as MOE_GOLDEN
from original_helpers import golden_source, make_original

from roe_llava.convert import copying, output, weights
from roe_llava.convert.adapter_file import save_adapter
from roe_llava.convert.bake import bake
from roe_llava.convert.export_reference import export_reference
from roe_llava.convert.extract import extract
from roe_llava.convert.graft import graft
from roe_llava.convert.import_llava import import_llava
from roe_llava.convert.import_moe_llava import import_moe_llava
from roe_llava.convert.import_reference import import_reference
from roe_llava.convert.upcycle import upcycle

COMMANDS = (
    "graft",
    "extract",
    "extract --full",
    "import-llava",
    "import-moe-llava",
    "import-reference",
    "export-reference",
    "bake",
    "bake to stock",
    "upcycle",
)

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that can be forked and killed")


@pytest.fixture(scope="module")
def conversions(tmp_path_factory):
    """Command to a function of target and `overwrite`."""
    folder = tmp_path_factory.mktemp("sources")
    base = make_base(folder / "base", max_shard_size="20KB")
    model = train(base)
    adapter = save_adapter(model, model.config, folder / "adapter", base=base)
    graft(base, adapter, folder / "roe")
    (folder / "published").mkdir()
    published = golden_source(folder / "published", "safetensors")
    import_reference(published, folder / "imported")
    original, _ = make_original(folder / "original")
    return {
        "graft": partial(graft, base, adapter),
        "extract": partial(extract, folder / "roe"),
        "extract --full": partial(extract, folder / "roe", full=True),
        "import-llava": partial(import_llava, original),
        "import-moe-llava": partial(import_moe_llava, MOE_GOLDEN / "phi" / "checkpoint"),
        "import-reference": partial(import_reference, published),
        "export-reference": partial(export_reference, folder / "imported"),
        "bake": partial(bake, folder / "roe", route="101", drop_adapters="never"),
        "bake to stock": partial(bake, folder / "roe", route="101", drop_adapters="always"),
        "upcycle": partial(upcycle, base),
    }


def content(folder: Path) -> dict:
    """Every file with its bytes; empty if there is no folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def in_child(function) -> tuple[int, str]:
    """Run a function in a process of its own: (status of `waitpid`, its error as text)."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # a fork has no worker threads
        try:
            function()
            os._exit(0)
        except BaseException as error:
            os.write(writing, pickle.dumps(f"{type(error).__name__}: {error}")[:4000])
            os._exit(1)
    os.close(writing)
    status = os.waitpid(child, 0)[1]
    with os.fdopen(reading, "rb") as pipe:
        text = pipe.read()
    return status, pickle.loads(text) if text else ""


class Steps:
    """Counts what a run does to the disk, and kills the process before the n-th step."""

    def __init__(self, monkeypatch, fatal=None):
        self.done, self.fatal = 0, fatal
        for owner, name in (
            (copying, "copy_range"),
            (weights, "file_blocks"),
            (output, "flush"),
            (shutil, "copyfile"),
            (shutil, "rmtree"),
            (Path, "rename"),
            (Path, "mkdir"),
            (Path, "write_text"),
            (os, "unlink"),
        ):
            monkeypatch.setattr(owner, name, self.counted(getattr(owner, name)))

    def counted(self, function):
        def step(*args, **kwargs):
            self.done += 1
            if self.done == self.fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return step


def killed_before(fatal: int, convert, out: Path) -> bool:
    """Convert over a folder in a process that dies before step `fatal`; whether it died."""

    def run():
        with pytest.MonkeyPatch.context() as patch:
            Steps(patch, fatal)
            convert(out, overwrite=True)

    return os.WIFSIGNALED(in_child(run)[0])


def is_old_or_new(place: Path, old: dict, new: dict) -> bool:
    """Whether the target holds the one or the other, whole; or nothing, with the old one set aside."""
    found = content(place / "out")
    aside = [content(path) for path in place.glob(".out.previous-*")]
    return found in (old, new) or (not found and old in aside)


def fresh_place(place: Path, replaces: bool) -> dict:
    """An empty folder, or one with an old target in it; the old target's content."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    if replaces:
        (place / "out").mkdir()
        (place / "out" / "old").write_text("old")
    return {"old": b"old"} if replaces else {}


@pytest.mark.parametrize("replaces", [False, True], ids=["new", "overwritten"])
@pytest.mark.parametrize("command", COMMANDS)
def test_killed_at_any_step_leaves_an_old_or_a_new_folder(tmp_path, conversions, monkeypatch, command, replaces):
    convert, place = conversions[command], tmp_path / "place"
    with monkeypatch.context() as patch:
        steps = Steps(patch)
        convert(tmp_path / "whole")
    new, states = content(tmp_path / "whole"), set()
    # Every step of putting the folder in place, and some of the many before.
    early = range(1, steps.done - 8, max(1, steps.done // 6))
    for fatal in [*early, *range(steps.done - 8, steps.done + 9)]:
        old = fresh_place(place, replaces)
        died = killed_before(fatal, convert, place / "out")
        assert is_old_or_new(place, old, new), f"step {fatal} of {steps.done}"
        is_new = content(place / "out") == new
        assert died or is_new
        states.add((died, is_new))
    assert {(True, False), (False, True)} <= states


@pytest.mark.parametrize("command", COMMANDS)
def test_killed_at_any_time_leaves_an_old_or_a_new_folder(tmp_path, conversions, command):
    convert, place = conversions[command], tmp_path / "place"
    start = time.perf_counter()
    convert(tmp_path / "whole")
    duration, new = time.perf_counter() - start, content(tmp_path / "whole")
    for share in (0.05, 0.2, 0.4, 0.6, 0.8, 0.95):
        old = fresh_place(place, replaces=True)
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            convert(place / "out", overwrite=True)
            os._exit(0)
        time.sleep(share * duration)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert is_old_or_new(place, old, new), f"killed after {share:.0%} of {duration:.2f} s"


@pytest.mark.parametrize("replaces", [False, True], ids=["new", "overwritten"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_write_that_fails_half_way_changes_nothing(tmp_path, conversions, command, replaces):
    """The system lets no file grow to the size of the largest one, as if the disk were full by then."""
    old = fresh_place(tmp_path / "place", replaces)
    conversions[command](tmp_path / "whole")
    limit = max(len(written) for written in content(tmp_path / "whole").values()) - 1

    def run():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        conversions[command](tmp_path / "place" / "out", overwrite=True)

    status, message = in_child(run)
    assert os.WEXITSTATUS(status) == 1
    assert "File too large while writing" in message and "place/out" in message and "are free there now" in message
    assert content(tmp_path / "place" / "out") == old
    assert [path.name for path in (tmp_path / "place").iterdir()] == ["out"] * replaces


@pytest.mark.parametrize("command", COMMANDS)
def test_an_existing_target_is_refused(tmp_path, conversions, command):
    old = fresh_place(tmp_path / "place", replaces=True)
    with pytest.raises(ValueError, match="exists and is not empty"):
        conversions[command](tmp_path / "place" / "out")
    assert content(tmp_path / "place" / "out") == old


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unwritable_target_is_named(conversions, command):
    with pytest.raises(OSError, match="/proc/"):
        conversions[command](Path("/proc/out"))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_dry_run_checks_and_writes_nothing(tmp_path, conversions, command):
    summary = conversions[command](tmp_path / "out", dry_run=True)
    assert not summary.written and not list(tmp_path.iterdir())
    assert conversions[command](tmp_path / "out").kept == summary.kept
