"""The command line: help, errors, exit status."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from convert_helpers import make_base, train

import roe_llava
from roe_llava.cli import COMMANDS, main
from roe_llava.convert.adapter_file import save_adapter

PACKAGE_PARENT = Path(roe_llava.__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """(base, adapter) folders."""
    folder = tmp_path_factory.mktemp("parts")
    base = make_base(folder / "base")
    model = train(base)
    return str(base), str(save_adapter(model, model.config, folder / "adapter", base=base))


def run_python(*arguments, cwd):
    environment = os.environ | {"PYTHONPATH": str(PACKAGE_PARENT)}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)


def test_help_names_every_command_and_loads_no_torch(tmp_path):
    code = (
        "import sys\nfrom roe_llava.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = run_python("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout and text in " ".join(done.stdout.split()) for name, (_, text) in COMMANDS.items())


def test_package_runs_as_a_module(tmp_path, parts):
    done = run_python("-m", "roe_llava", "graft", *parts, "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "wrote out" in done.stdout and "added    10 routing tensors" in done.stdout


@pytest.mark.parametrize("arguments", [[], ["graft"], ["nothing"], ["graft", "a", "b", "c", "--none"]])
def test_wrong_arguments_end_with_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and "usage: roe-llava" in capsys.readouterr().err


def test_error_is_one_line(tmp_path, parts, capsys):
    assert main(["graft", str(tmp_path / "nowhere"), parts[1], str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1 and not printed.out


def test_debug_shows_the_traceback(tmp_path, parts):
    with pytest.raises(ValueError, match="nowhere"):
        main(["graft", "--debug", str(tmp_path / "nowhere"), parts[1], str(tmp_path / "out")])


def test_interruption_is_not_a_traceback(parts, capsys, monkeypatch):
    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("roe_llava.convert.graft.run", interrupt)
    assert main(["graft", *parts, "out"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_graft_options_reach_the_function(tmp_path, parts, capsys):
    out = tmp_path / "out"
    assert main(["graft", *parts, str(out), "--dry-run"]) == 0 and not out.exists()
    other = str(make_base(tmp_path / "other", seed=5))
    assert main(["graft", other, parts[1], str(out)]) == 2 and not out.exists()
    assert main(["graft", other, parts[1], str(out), "--any-base"]) == 0
    assert "is not the base" in capsys.readouterr().err
    assert main(["graft", *parts, str(out)]) == 2 and "exists and is not empty" in capsys.readouterr().err
    assert main(["graft", *parts, str(out), "--overwrite"]) == 0


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_can_be_asked_for_help(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0 and f"usage: roe-llava {name}" in capsys.readouterr().out
