"""`verify`: passes what is right, and fails, naming it, what is not."""

import json

import pytest
import torch
from convert_helpers import change_tensors, make_base, train

from roe_llava import modeling_roe_llava
from roe_llava.cli import main
from roe_llava.convert.adapter_file import save_adapter
from roe_llava.convert.graft import graft
from roe_llava.convert.verify import ROUNDING, verify
from roe_llava.convert.verify_prompts import Answer, agreement

FEW = {"num_tokens": 3, "repeats": 0, "device": "cpu", "show": lambda verdict: None}
ALL_CHECKS = 6


def failed(report):
    return {verdict.check: verdict.detail for verdict in report.verdicts if not verdict.passed}


def test_adapter_on_its_base_passes_every_check(base, adapter):
    report = verify(base, adapter, **FEW)
    assert report.passed and len(report.verdicts) == ALL_CHECKS
    assert len(report.routes) == 4 and any("0" in route for route in report.routes.values())


def test_grafted_folder_passes_every_check_and_is_timed(tmp_path, base, adapter):
    graft(base, adapter, tmp_path / "roe")
    report = verify(base, tmp_path / "roe", **FEW | {"repeats": 1})
    assert report.passed and len(report.verdicts) == ALL_CHECKS + 1
    assert report.times["prefill"]["base_seconds"] > 0 and 0 < report.times["skip_ratio"] < 1


def test_a_base_alone_is_checked_with_untrained_parts(base):
    report = verify(base, **FEW | {"repeats": 1})
    assert report.passed and len(report.verdicts) == 3 and report.times["skip_ratio"] == 0


def test_half_precision(tmp_path, base, adapter):
    assert verify(base, adapter, **FEW, dtype="bfloat16").passed


def test_one_changed_weight_in_a_grafted_folder_is_found(tmp_path, base, adapter):
    graft(base, adapter, tmp_path / "roe")
    shard = tmp_path / "roe" / "model-base.safetensors"
    change_tensors(shard, lambda tensors: tensors["language_model.lm_head.weight"][3].add_(1e-3))
    found = failed(verify(base, tmp_path / "roe", **FEW))
    assert "lm_head.weight has other values" in found["the graft left the base's bytes alone"]
    assert "every layer kept by routes= equals the stock model" in found


def test_another_base_is_found(tmp_path, base, adapter):
    other = make_base(tmp_path / "other", seed=5)
    assert "has other values" in failed(verify(other, adapter, **FEW))["the adapter was trained on this base"]


def test_an_adapter_that_names_no_base_fails(tmp_path, base, trained):
    save_adapter(trained, trained.config, tmp_path / "adapter")
    assert "does not say" in failed(verify(base, tmp_path / "adapter", **FEW))["the adapter was trained on this base"]


def test_parts_that_never_skip_fail(tmp_path, base):
    model = train(base)
    with torch.no_grad():
        model.model.language_model.routing_tokens.weight.fill_(1e4)  # no layer turns it round
        for layer in model.model.language_model.layers:
            layer.router.weight[0], layer.router.weight[1] = 1.0, -1.0
    report = verify(base, save_adapter(model, model.config, tmp_path / "adapter", base=base), **FEW)
    assert set(report.routes.values()) == {"111"}
    assert "nothing is saved" in failed(report)["layers are skipped"] and len(failed(report)) == 1


def test_a_layer_that_runs_although_it_is_skipped_is_found(base, adapter, monkeypatch):
    skip_path = modeling_roe_llava.RoeDecoderLayer.skip_path

    def dense(self, tokens):
        self.self_attn.q_proj(tokens), self.mlp(tokens)
        return skip_path(self, tokens)

    monkeypatch.setattr(modeling_roe_llava.RoeDecoderLayer, "skip_path", dense)
    with pytest.raises(ValueError, match="ran by half"):
        verify(base, adapter, **FEW)


def test_the_command_says_one_line_per_check_and_its_exit_status(tmp_path, base, adapter, capsys):
    options = ["--tokens", "2", "--repeats", "0", "--device", "cpu"]
    assert main(["verify", str(base), str(adapter), *options, "--json", str(tmp_path / "report.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("ok  ") for line in lines) == ALL_CHECKS and lines[-1] == "6 of 6 checks passed"
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["passed"] and len(written["verdicts"]) == ALL_CHECKS and written["setup"]["device"] == "cpu"
    other = make_base(tmp_path / "other", seed=5)
    assert main(["verify", str(other), str(adapter), *options]) == 1
    assert "FAIL  the adapter was trained on this base" in capsys.readouterr().out


def test_base_without_a_processor_says_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="no processor"):
        verify(make_base(tmp_path / "base", processor=False), **FEW)


def an_answer(tokens, best, routes=None, margins=None):
    """Two steps over four ids; `best` are the logits of the ids 0 and 1 at the second."""
    steps = torch.tensor([[[4.0, 0.0, 0.0, 0.0], [*best, 0.0, 0.0]]])
    return Answer(steps, steps, [tokens], routes, margins)


def test_answers_may_part_at_a_near_tie_alone():
    expected = an_answer([0, 0], (3.0, 2.99))
    assert agreement(expected, an_answer([0, 0], (3.0, 2.99)), 1e-2) == (True, "same tokens")
    assert agreement(expected, an_answer([0, 1], (2.99, 3.0)), 1e-2)[0]
    assert not agreement(an_answer([0, 0], (3.0, 2.0)), an_answer([0, 1], (2.99, 2.0)), 1e-2)[0]
    assert not agreement(expected, an_answer([0, 0], (3.5, 2.99)), 1e-2)[0]


@pytest.mark.parametrize(("margin", "passes"), [(1e-5, True), (0.5, False)])
def test_routes_may_part_at_a_near_tie_alone(margin, passes):
    one = an_answer([0, 0], (3.0, 2.0), torch.tensor([[True, True]]), torch.tensor([[3.0, margin]]))
    other = an_answer([0, 0], (3.0, 2.0), torch.tensor([[True, False]]), torch.tensor([[3.0, margin]]))
    assert agreement(one, other, ROUNDING[torch.float32])[0] is passes
