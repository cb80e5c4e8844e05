"""Folders appear whole or not at all, whatever happens on the way."""

import os
import shutil
import signal
from pathlib import Path

import pytest
from convert_helpers import make_base, train

from roe_llava.convert import copying, fingerprint, output, weights
from roe_llava.convert import graft as graft_module
from roe_llava.convert.adapter_file import save_adapter
from roe_llava.convert.graft import graft


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"), max_shard_size="20KB")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, base):
    model = train(base)
    return save_adapter(model, model.config, tmp_path_factory.mktemp("adapter"), base=base)


def test_existing_target_is_refused_unless_overwritten(tmp_path, base, adapter):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not empty"):
        graft(base, adapter, out)
    assert (out / "mine.txt").read_text() == "mine"
    graft(base, adapter, out, overwrite=True)
    assert not (out / "mine.txt").exists() and (out / "config.json").exists()
    assert not list(tmp_path.glob(".out*"))


def test_failure_half_way_leaves_the_old_folder(tmp_path, base, adapter, monkeypatch):
    out = tmp_path / "out"
    graft(base, adapter, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setattr(graft_module, "write_code", lambda folder: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        graft(base, adapter, out, overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert not list(tmp_path.glob(".out*"))


def test_failed_rename_puts_the_old_folder_back(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").touch()
    flushed = output.flush_tree

    def flush_and_remove(folder):
        flushed(folder)
        shutil.rmtree(folder)

    monkeypatch.setattr(output, "flush_tree", flush_and_remove)
    with pytest.raises(OSError), output.new_folder(out, overwrite=True):
        pass
    assert (out / "old").exists() and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_next_run_clears_a_killed_runs_half_and_names_the_old_folder(tmp_path, base, adapter, caplog):
    (tmp_path / ".out.partial-x").mkdir()
    (tmp_path / ".out.previous-x").mkdir()
    (tmp_path / ".out.previous-x" / "config.json").touch()
    messages = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output.logger, "warning", messages.append)
        graft(base, adapter, tmp_path / "out")
    assert not (tmp_path / ".out.partial-x").exists() and (tmp_path / ".out.previous-x" / "config.json").exists()
    assert any("left by a run that was interrupted" in message for message in messages)
    assert any(".out.previous-x holds the complete folder" in message for message in messages)


def test_a_running_runs_half_is_left_alone(tmp_path):
    with output.new_folder(tmp_path / "out") as running:
        with output.new_folder(tmp_path / "out") as other:
            assert running.is_dir()
            (other / "other").touch()
        shutil.rmtree(tmp_path / "out")
        (running / "file").touch()
    assert (tmp_path / "out" / "file").exists()


class Steps:
    """Counts what a run does to the disk, and kills the process before the n-th step."""

    def __init__(self, monkeypatch, fatal=None):
        self.done, self.fatal = 0, fatal
        for owner, name in (
            (fingerprint, "open_copy"),
            (copying, "file_blocks"),
            (weights, "file_blocks"),
            (output, "flush"),
            (shutil, "copyfile"),
            (shutil, "rmtree"),
            (Path, "rename"),
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


def run_killed(fatal: int, *args) -> bool:
    """Graft over a folder in a process of its own that dies before step `fatal`; whether it died."""
    process = os.fork()
    if process == 0:
        with pytest.MonkeyPatch.context() as patch:
            Steps(patch, fatal)
            graft(*args, overwrite=True)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(process, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
@pytest.mark.parametrize("replaces", [False, True])
def test_killed_at_any_step_leaves_an_old_or_a_new_folder(tmp_path, base, adapter, monkeypatch, replaces):
    place, whole = tmp_path / "place", tmp_path / "whole"
    place.mkdir()
    out = place / "out"
    with monkeypatch.context() as patch:
        steps = Steps(patch)
        graft(base, adapter, whole)
        num_steps = steps.done
    new = {path.name for path in whole.iterdir()}
    states = set()
    # Every step of putting the folder in place, and some of the many before.
    for fatal in [*range(1, num_steps - 10, 11), *range(num_steps - 10, num_steps + 10)]:
        shutil.rmtree(place)
        place.mkdir()
        if replaces:
            out.mkdir()
            (out / "old").touch()
        died = run_killed(fatal, base, adapter, out)
        found = {path.name for path in out.iterdir()} if out.exists() else set()
        aside = [path for path in place.glob(".out.previous-*") if (path / "old").exists()]
        assert found in (({"old"}, new) if replaces else (set(), new)) or (not found and aside), (fatal, found)
        assert died or found == new
        states.add((died, found == new))
    assert states == {(True, False), (True, True), (False, True)}
