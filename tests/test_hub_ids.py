"""Commands take Hub ids and revisions for every checkpoint they read."""

import json
import os
import subprocess
import sys

import pytest
from convert_helpers import bytes_of, make_base, weights_of
from golden_vila_helpers import FOLDER as VILA
from hub_server import running_hub

from roe_llava.convert.graft import graft

RUN = "import sys; from roe_llava.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture(scope="module")
def hub(tmp_path_factory, base, shared_adapter):
    """A Hub with a base in two revisions, its adapter, and the grafted model."""
    folder = tmp_path_factory.mktemp("hub")
    other = make_base(folder / "other", seed=5)
    graft(base, shared_adapter, folder / "roe")
    with running_hub() as hub:
        hub.add("someone/base", base, "v1")
        hub.add("someone/base", other, "main")
        hub.add("someone/adapter", shared_adapter)
        hub.add("someone/roe", folder / "roe")
        hub.add("someone/vila15", VILA / "checkpoint_v15", "v1")
        hub.add("someone/vila", VILA / "checkpoint_v1_linear")
        hub.add("someone/clip", VILA / "vision_tower_clip")
        yield hub
    assert not hub.unknown


@pytest.fixture
def run(hub, tmp_path):
    """Runs a command in a process of its own with an empty cache."""

    def run(*arguments, **environment):
        env = os.environ | hub.environment(tmp_path / "cache") | environment
        command = [sys.executable, "-c", RUN, *map(str, arguments)]
        return subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)

    return run


def test_graft_takes_hub_ids_and_records_the_commit(run, hub, tmp_path, base):
    done = run("graft", "someone/base", "someone/adapter", "out", "--revision", "v1")
    assert done.returncode == 0, done.stderr
    result = weights_of(tmp_path / "out")
    assert all(bytes_of(result[name]) == bytes_of(tensor) for name, tensor in weights_of(base).items())
    # Found in the cache where there is no network any more.
    assert (
        run("graft", "someone/base", "someone/adapter", "two", "--revision", "v1", HF_HUB_OFFLINE="1").returncode == 0
    )


def test_another_revision_of_the_base_is_refused(run, tmp_path):
    done = run("graft", "someone/base", "someone/adapter", "out")
    assert done.returncode == 2 and "is not the base" in done.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("someone/nothing", "someone/adapter"),
            "someone/nothing is no folder here and cannot be had from the Hub: there is no such repository",
        ),
        (
            ("someone/base", "someone/adapter", "--revision", "v9"),
            "someone/base (revision v9) is no folder here and cannot be had from the Hub: the repository has no such",
        ),
    ],
)
def test_missing_repositories_and_revisions_are_named(run, arguments, message):
    base, adapter, *options = arguments
    done = run("graft", base, adapter, "out", *options)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_extract_gives_the_adapter_of_a_model_on_the_hub(run, tmp_path, shared_adapter):
    done = run("extract", "someone/roe", "out")
    assert done.returncode == 0, done.stderr
    ours, theirs = (weights_of(folder) for folder in (tmp_path / "out", shared_adapter))
    assert ours.keys() == theirs.keys() and all(bytes_of(ours[name]) == bytes_of(theirs[name]) for name in ours)


def test_bake_takes_a_hub_id_and_records_the_commit(run, tmp_path):
    done = run("bake", "someone/roe", "out", "--route", "1,", "--drop-adapters", "never", "--revision", "main")
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    found = config["roe_provenance"]["baked_from"]
    assert found["id"] == "someone/roe" and len(found["revision"]) == 40 and config["skipped_layers"] == [1]


def test_verify_takes_hub_ids(run, tmp_path):
    options = ["--revision", "v1", "--tokens", "2", "--repeats", "0", "--device", "cpu", "--json", "report.json"]
    done = run("verify", "someone/base", "someone/roe", *options)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "report.json").read_text())["passed"]


def test_import_vila_takes_hub_ids_in_either_layout(run, tmp_path):
    done = run("import-vila", "someone/vila15", "new", "--revision", "v1")
    assert done.returncode == 0, done.stderr
    done = run("import-vila", "someone/vila", "old", "--vision-tower", "someone/clip")
    assert done.returncode == 0, done.stderr
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("new", "old")]
    assert configs[0]["vila_layout"]["id"] == "someone/vila15" and len(configs[0]["vila_layout"]["revision"]) == 40
    assert [config["image_seq_length"] for config in configs] == [196, 36]
