"""`roe-llava train-moe`: the stages from the command line, one after the other, resuming, refusals."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from train_helpers import Interrupt, write_conversations

from roe_llava import MoeLlavaForConditionalGeneration
from roe_llava.cli import main
from roe_llava.convert.upcycle import upcycle
from roe_llava.training.train_moe import parse, prepare, train


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_conversations(tmp_path_factory.mktemp("conversations") / "rows")


@pytest.fixture(scope="module")
def moe(tmp_path_factory, base):
    folder = tmp_path_factory.mktemp("moe") / "moe"
    upcycle(base, folder, top_k=1, router="token_aware")
    return folder


def words(stage, model, data, out, **options):
    settings = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": "1e-2",
        "save_strategy": "no",
        "use_cpu": "true",
        "disable_tqdm": "true",
        "report_to": "none",
        **options,
    }
    named = {"model": model, "data": data, "output_dir": out} | settings
    return [stage, *(f"--{name}={value}" for name, value in named.items())]


def tensors(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def changed(before, after):
    assert before.keys() == after.keys()
    return {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}


def test_a_dense_llava_becomes_evomoe(tmp_path, base, data, capsys):
    assert main(["train-moe", *words("evomoe-warmup", base, data, tmp_path / "1")]) == 0
    assert json.loads((tmp_path / "1" / "model" / "config.json").read_text())["model_type"] == "llava"
    assert not any("vision_tower" in name for name in changed(tensors(base), tensors(tmp_path / "1" / "model")))
    assert (
        main(["upcycle", str(tmp_path / "1" / "model"), str(tmp_path / "2"), "--top-k=1", "--router=token_aware"]) == 0
    )
    assert main(["train-moe", *words("evomoe-evolution", tmp_path / "2", data, tmp_path / "3")]) == 0
    moved = changed(tensors(tmp_path / "2"), tensors(tmp_path / "3" / "model"))
    assert moved and all(".mlp.experts." in name for name in moved)
    assert main(["train-moe", *words("evomoe-routers", tmp_path / "3" / "model", data, tmp_path / "4")]) == 0
    moved = changed(tensors(tmp_path / "3" / "model"), tensors(tmp_path / "4" / "model"))
    assert moved and all(".mlp.router." in name for name in moved)
    config = json.loads((tmp_path / "4" / "model" / "config.json").read_text())
    assert [made["stage"] for made in config["moe_provenance"]["training"]] == ["evomoe-evolution", "evomoe-routers"]
    assert (config["num_experts_per_tok"], config["router_aux_loss_coef"]) == (1, 0.001)
    assert (tmp_path / "4" / "model" / "modeling_moe_llava.py").is_file()
    MoeLlavaForConditionalGeneration.from_pretrained(tmp_path / "4" / "model")
    assert "wrote" in capsys.readouterr().out


def test_an_interrupted_run_goes_on_to_the_same_weights(tmp_path, moe, data):
    settings = {"save_strategy": "steps", "save_steps": 2, "mode": "update", "beta_per_layer": "true"}
    train(prepare(*parse(words("evomoe-evolution", moe, data, tmp_path / "whole", **settings))))
    run = prepare(*parse(words("evomoe-evolution", moe, data, tmp_path / "broken", **settings)))
    run.trainer.add_callback(Interrupt(3))
    with pytest.raises(KeyboardInterrupt):
        train(run)
    again = words("evomoe-evolution", moe, data, tmp_path / "broken", resume_from_checkpoint="last", **settings)
    assert main(["train-moe", *again]) == 0
    whole, resumed = (tensors(tmp_path / name / "model") for name in ("whole", "broken"))
    assert not changed(whole, resumed) and changed(tensors(moe), whole)
    other = words("evomoe-evolution", moe, data, tmp_path / "broken", resume_from_checkpoint="last", save_steps=2)
    with pytest.raises(ValueError, match="evolution was"):
        prepare(*parse([*other, "--overwrite"]))


def test_stage_three_learns_what_is_asked_for(tmp_path, moe, data):
    options = {"dense_mlps": "true", "projector": "true", "aux_loss_coef": 0.5, "eval_share": 0.25}
    run = prepare(*parse(words("moe-stage3", moe, data, tmp_path / "out", **options)))
    train(run)
    moved = changed(tensors(moe), tensors(tmp_path / "out" / "model"))
    assert all(".mlp." in name or "projector" in name for name in moved)
    assert any("layers.1.mlp." in name for name in moved) and any("projector" in name for name in moved)
    assert run.trainer.model.config.router_aux_loss_coef == 0.5
    assert any("eval_loss" in entry for entry in run.trainer.state.log_history)
    [made] = json.loads((tmp_path / "out" / "model" / "config.json").read_text())["moe_provenance"]["training"]
    assert made["data"] == Path(data).name and (made["stage"], made["steps"]) == ("moe-stage3", 4)
    assert made["measured"].keys() == {"train_loss", "eval_loss"}
    assert not (tmp_path / "out" / "report").exists()  # nothing was logged on the way


def test_the_report_shows_the_losses(tmp_path, moe, data, capsys):
    line = words("moe-stage3", moe, data, tmp_path / "out", logging_steps=1, eval_share=0.25)
    assert main(["train-moe", *line]) == 0
    report = (tmp_path / "out" / "report" / "report.md").read_text()
    log = json.loads((tmp_path / "out" / "checkpoints" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert f"| training loss | {losses[0]:.4f} to {losses[-1]:.4f} nats |" in report and "(even use: 2)" in report
    assert "| stage | moe-stage3 |" in report and "evaluation loss" in report
    for name in ("losses.png", "balance.png"):
        assert f"({name})" in report and (tmp_path / "out" / "report" / name).stat().st_size > 1000
    assert "report.md" in capsys.readouterr().out


def test_a_dry_run_writes_nothing(tmp_path, moe, data, capsys):
    assert main(["train-moe", *words("moe-stage3", moe, data, tmp_path / "out"), "--dry_run"]) == 0
    assert "nothing was written" in capsys.readouterr().out and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("stage", "options", "said"),
    [
        ("stage3", {}, "moe-stage3"),
        ("moe-stage3", {"mode": "update"}, "evolution"),
        ("evomoe-routers", {"projector": "true"}, "projector"),
        ("evomoe-evolution", {"beta_rangs": 1}, "beta_ranges"),
        ("evomoe-evolution", {"beta_ranges": 0.5}, "pairs"),
        ("evomoe-warmup", {}, "experts come after it"),
        ("evomoe-evolution", {"weight_decay": 0.1}, "weight_decay 0.1"),
        ("moe-stage3", {"eval_strategy": "steps"}, "eval_share"),
    ],
)
def test_what_cannot_be_is_named_and_nothing_written(tmp_path, moe, data, capsys, stage, options, said):
    assert main(["train-moe", *words(stage, moe, data, tmp_path / "out", **options)]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_dense_llava_has_no_experts_to_train(tmp_path, base, data, capsys):
    assert main(["train-moe", *words("moe-stage3", base, data, tmp_path / "out")]) == 2
    assert "upcycle" in capsys.readouterr().err


def test_a_finished_run_is_not_replaced_unasked(tmp_path, moe, data, capsys):
    line = words("evomoe-routers", moe, data, tmp_path / "out", max_steps=1)
    assert main(["train-moe", *line]) == 0
    assert main(["train-moe", *line]) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert main(["train-moe", *line, "--overwrite"]) == 0
