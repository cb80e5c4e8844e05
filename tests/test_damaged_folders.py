"""Model folders that are damaged: every command that loads one names the file before Transformers stumbles."""

import json
import shutil

import pytest
import torch
from convert_helpers import change_tensors, make_base, train
from train_helpers import words, write_conversations

from roe_llava.benchmarks.shapes import check_trained_on
from roe_llava.cli import main
from roe_llava.convert.adapter_file import save_adapter
from roe_llava.convert.source import read_json
from roe_llava.convert.upcycle import upcycle
from roe_llava.evaluation.loading import open_checkpoint
from roe_llava.serving.serve import check_base


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base, RoE on it, experts made of it, and conversations."""
    folder = tmp_path_factory.mktemp("world")
    base = make_base(folder / "base")
    model = train(base)
    shutil.copytree(base, folder / "roe", ignore=shutil.ignore_patterns("*.safetensors"))
    model.save_pretrained(folder / "roe")
    save_adapter(model, model.config, folder / "adapter", base=base)
    upcycle(base, folder / "moe")
    write_conversations(folder / "data")
    return folder


def cut(folder):
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    return rf"{file.name} has \d+ bytes, its header asks for \d+: the file is cut"


def without_text_config(folder):
    content = read_json(folder / "config.json")
    del content["text_config"]
    (folder / "config.json").write_text(json.dumps(content))
    return "config.json has no text_config, expected the language model's configuration"


def commands(world, kind, folder, out):
    """The commands that load a folder of a kind."""
    data = world / "data" / "data.json"
    stage = ["--model", str(folder), "--data", str(data), "--output_dir", str(out)]
    if kind == "moe":
        moe = ["--moe", str(folder), "--base", str(world / "base"), "--out", str(out / "bench.json")]
        return [["train-moe", "moe-stage3", *stage], ["bench", *moe]]
    if kind == "base":
        return [
            ["train", *words("frozen", folder, data, out)],
            ["bench", "--base", str(folder), "--out", str(out / "bench.json")],
        ]
    return [
        ["train", *words("frozen", folder, data, out)],
        ["calibrate", str(folder), str(data), "--images", str(data.parent), "--out", str(out)],
        ["verify", str(world / "base"), str(folder)],
    ]


@pytest.mark.parametrize("damage", [cut, without_text_config])
@pytest.mark.parametrize("kind", ["roe", "moe", "base"])
def test_commands_name_the_file(world, tmp_path, capsys, kind, damage):
    folder = shutil.copytree(world / kind, tmp_path / "folder")
    expected = damage(folder)
    for command in commands(world, kind, folder, tmp_path / "out"):
        assert main(command) == 2, command
        said = capsys.readouterr().err
        with pytest.raises(ValueError, match=expected):
            raise ValueError(said)
    if kind != "base":
        for opened in (lambda: open_checkpoint(str(folder)), lambda: check_base([str(folder)])):
            with pytest.raises(ValueError, match=expected):
                opened()
    assert not (tmp_path / "out" / "adapter").exists()


def test_bench_refuses_a_base_that_the_adapter_was_not_trained_on(world, tmp_path, capsys):
    check_trained_on(world / "base", str(world / "adapter"))
    other = shutil.copytree(world / "base", tmp_path / "other")
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    change_tensors(other / "model.safetensors", lambda tensors: tensors[name].mul_(2))
    command = ["bench", "--base", str(other), "--adapter", str(world / "adapter"), "--out", str(tmp_path / "out.json")]
    assert main(command) == 2
    assert "is not the base that --adapter" in (said := capsys.readouterr().err) and "layers.1.mlp.up_proj" in said
    assert not (tmp_path / "out.json").exists()


def test_an_adapter_that_recorded_no_base_is_measured_on_any(world, tmp_path):
    model = train(world / "base")
    adapter = save_adapter(model, model.config, tmp_path / "adapter")
    check_trained_on(world / "base", str(adapter))


def test_abbreviated_options_are_errors(world, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["verify", str(world / "base"), "--roe", str(world / "roe")])
    assert stopped.value.code == 2 and "unrecognized arguments: --roe" in capsys.readouterr().err
    assert main(["verify", str(world / "base"), "--roe-revision", "main"]) == 2
    assert "roe_revision 'main' without routing parts" in capsys.readouterr().err


def test_an_adapter_s_own_folder_brings_its_base(world, tmp_path):
    folder = shutil.copytree(world / "adapter", tmp_path / "adapter")
    content = read_json(world / "roe" / "config.json") | {"roe_adapter_only": True}
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="expected the id of a repository on the Hub and a commit"):
        open_checkpoint(str(folder))  # gets as far as asking for the base, which here is a folder


def test_weights_are_looked_at_only_by_their_headers(world, tmp_path, monkeypatch):
    from roe_llava.convert.completeness import check_files

    monkeypatch.setattr("roe_llava.convert.weights.read_range", None)  # reads values
    monkeypatch.setattr(torch, "load", None)
    check_files(world / "roe")
