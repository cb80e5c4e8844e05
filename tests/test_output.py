"""Folders appear whole or not at all, whatever happens on the way."""

import shutil

import pytest
from convert_helpers import make_base, train

from roe_llava.convert import graft as graft_module
from roe_llava.convert import output
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
    monkeypatch.setattr(graft_module, "write_code", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
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


@pytest.mark.parametrize("target", ["", ".", "..", "work"])
def test_the_folder_one_is_in_is_never_replaced(tmp_path, monkeypatch, target):
    (tmp_path / "work" / "inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work" / ("inner" if target == ".." else "."))
    target = tmp_path / "work" if target == "work" else target
    with pytest.raises(ValueError, match="is the folder you are in"), output.new_folder(target, overwrite=True):
        pass
    assert (tmp_path / "work" / "inner").is_dir()


def test_leftovers_of_other_targets_are_left_alone(tmp_path):
    (tmp_path / ".other.partial-x").mkdir()
    with output.new_folder(tmp_path / "*") as folder:
        (folder / "file").touch()
    assert (tmp_path / ".other.partial-x").is_dir() and (tmp_path / "*" / "file").exists()


def test_a_link_keeps_leading_to_the_new_folder(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "old").touch()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with output.new_folder(tmp_path / "link", overwrite=True) as folder:
        (folder / "new").touch()
    assert (tmp_path / "link").is_symlink() and [path.name for path in (tmp_path / "real").iterdir()] == ["new"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_an_old_folder_that_cannot_be_removed_is_named(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    messages = []
    monkeypatch.setattr(output.logger, "warning", messages.append)

    def refuse(path, *args, **kwargs):
        raise PermissionError(1, "Operation not permitted", str(path))

    with output.new_folder(tmp_path / "out", overwrite=True) as folder:
        (folder / "new").touch()
        monkeypatch.setattr(output.shutil, "rmtree", refuse)
    assert (tmp_path / "out" / "new").exists()
    assert "cannot be removed" in messages[0] and ".out.partial-" in messages[0]
