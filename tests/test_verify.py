"""`verify`: passes what is right, and fails, naming it, what is not."""

import json
import math
import re

import pytest
import torch
from convert_helpers import change_json, change_tensors, make_base, train
from safetensors.torch import load_file

from roe_llava import decoder_roe
from roe_llava.cli import main
from roe_llava.convert.adapter_file import save_adapter
from roe_llava.convert.graft import graft
from roe_llava.convert.verify import ROUNDING, largest, verify
from roe_llava.convert.verify_prompts import Answer, agreement

FEW = {"num_tokens": 3, "repeats": 0, "device": "cpu", "show": lambda verdict: None}
ALL_CHECKS = 6


def failed(report):
    return {verdict.check: verdict.detail for verdict in report.verdicts if not verdict.passed}


def test_adapter_on_its_base_passes_every_check(base, adapter):
    report = verify(base, adapter, **FEW)
    assert report.passed and len(report.verdicts) == ALL_CHECKS
    assert len(report.routes) == 5 and any("0" in route for route in report.routes.values())


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
    skip_path = decoder_roe.RoeDecoderLayer.skip_path

    def dense(self, tokens):
        self.self_attn.q_proj(tokens), self.mlp(tokens)
        return skip_path(self, tokens)

    monkeypatch.setattr(decoder_roe.RoeDecoderLayer, "skip_path", dense)
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


# ---------------------------------------- bad input


Q_PROJ = "language_model.model.layers.1.self_attn.q_proj.weight"
IN_MEMORY = "model.language_model.layers.1.self_attn.q_proj.weight"
BAD_WEIGHTS = [
    (lambda w: w.pop(Q_PROJ), rf"base lacks {IN_MEMORY}, expected 73 tensors for its config, found 72"),
    (lambda w: w.update({"foo.bar": torch.zeros(2)}), r"foo.bar in .*base.model.safetensors is no tensor of the model"),
    (lambda w: w.update({Q_PROJ: w[Q_PROJ].to(torch.int8)}), rf"{Q_PROJ} in .*base.model.safetensors is I8, expected"),
    (lambda w: w.update({Q_PROJ: w[Q_PROJ].to(torch.float8_e4m3fn)}), rf"{Q_PROJ} in .*is F8_E4M3, expected one of"),
    (lambda w: w.update({Q_PROJ: w[Q_PROJ][:3]}), rf"{Q_PROJ} in .*base.* has shape \[3, 16\], expected \[16, 16\]"),
    (lambda w: w.update({IN_MEMORY: torch.zeros(16, 16)}), rf"{Q_PROJ} in .* are two names of one tensor"),
    (lambda w: w[Q_PROJ].fill_(float("nan")), r"the stock model in .*base answers .* NaN or Inf, expected finite"),
]
BAD_IDS = ["missing", "unknown", "int8", "fp8", "shape", "twice", "nan"]


@pytest.mark.parametrize(("change", "message"), BAD_WEIGHTS, ids=BAD_IDS)
@pytest.mark.parametrize("with_adapter", [False, True])
def test_base_with_bad_weights_is_an_error_with_its_path(base_copy, adapter, capsys, with_adapter, change, message):
    change_tensors(base_copy / "model.safetensors", change)
    with pytest.raises(ValueError, match=message):
        verify(base_copy, *[adapter] * with_adapter, **FEW)
    assert main(["verify", str(base_copy), "--device", "cpu", "--tokens", "2", "--repeats", "0"]) == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize(("change", "message"), BAD_WEIGHTS[:5], ids=BAD_IDS[:5])
def test_roe_folder_with_bad_weights_is_an_error_with_its_path(tmp_path, base, adapter, change, message):
    graft(base, adapter, tmp_path / "roe")
    change_tensors(tmp_path / "roe" / "model-base.safetensors", change)
    index = tmp_path / "roe" / "model.safetensors.index.json"
    files = {path.name: load_file(path) for path in (tmp_path / "roe").glob("*.safetensors")}
    change_json(index, weight_map={name: file for file, tensors in files.items() for name in tensors})
    message = message.replace("base lacks", "roe lacks").replace("base.model", "model-base").replace("73", "83")
    with pytest.raises(ValueError, match=message.replace("found 72", "found 82")):
        verify(base, tmp_path / "roe", **FEW)


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_cut_weights_are_an_error_with_their_path(base_copy, length):
    path = base_copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"base.model.safetensors has \d+ bytes"):
        verify(base_copy, **FEW)


def test_git_lfs_pointer_is_an_error_with_its_path(base_copy):
    (base_copy / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\nsize 12345\n")
    with pytest.raises(ValueError, match=r"base.model.safetensors .*a Git LFS pointer"):
        verify(base_copy, **FEW)


def test_config_of_other_sizes_is_an_error(base_copy):
    content = json.loads((base_copy / "config.json").read_text())
    change_json(base_copy / "config.json", text_config=content["text_config"] | {"intermediate_size": 99})
    with pytest.raises(ValueError, match=r"layers.0.mlp.down_proj.weight in .*base.* \[16, 32\], expected \[16, 99\]"):
        verify(base_copy, **FEW)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "junk"], "device 'junk' cannot be used here"),
        (["--device", "meta"], "device 'meta' cannot be used here"),
        (["--dtype", "junk"], "dtype must be 'auto' or one of float64, float32, float16, bfloat16, got 'junk'"),
        (["--dtype", "int8"], "dtype must be 'auto' or one of .*, got 'int8'"),
        (["--tokens", "0"], "tokens to write must be 1 or more, got 0"),
        (["--repeats", "-1"], "repeats must be 0 .* or more, got -1"),
        (["--json", "/nowhere/report.json"], "/nowhere/report.json is a folder or in none"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_options_that_cannot_be_are_errors(base, capsys, options, message):
    assert main(["verify", str(base), *options]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_accelerator_that_is_not_there_is_an_error(base, capsys):
    assert main(["verify", str(base), "--device", "cuda"]) == 2
    assert "device 'cuda' cannot be used here" in capsys.readouterr().err


def test_answers_with_nan_do_not_agree():
    expected = an_answer([0, 0], (3.0, 2.0))
    assert agreement(expected, an_answer([0, 0], (float("nan"), 2.0)), 1e-2) == (False, "logits of token 1 hold NaN")


def test_a_token_that_one_answer_alone_suppresses_is_found():
    never = float("-inf")
    assert agreement(an_answer([0, 0], (3.0, never)), an_answer([0, 0], (3.0, never)), 1e-2)[0]
    assert not agreement(an_answer([0, 0], (3.0, 2.0)), an_answer([0, 0], (3.0, never)), 1e-2)[0]


def test_a_grafted_folder_with_nan_fails(tmp_path, base, adapter):
    graft(base, adapter, tmp_path / "roe")
    change_tensors(tmp_path / "roe" / "model-base.safetensors", lambda tensors: tensors[Q_PROJ].fill_(float("nan")))
    found = failed(verify(base, tmp_path / "roe", **FEW))
    assert "largest logit difference nan" in found["every layer kept by routes= equals the stock model"]
    assert "hold NaN" in found["routers at work, every layer kept, equals the stock model up to rounding"]


def test_largest_difference_does_not_pass_over_nan():
    assert largest([1.0, 3.0, 2.0]) == 3.0
    assert math.isnan(largest([0.0, float("nan"), 1.0])) and math.isnan(largest([float("nan"), 1.0]))


def test_tokenizer_of_another_base_is_an_error_with_its_path(base_copy):
    path = base_copy / "tokenizer.json"
    path.write_text(path.read_text().replace("<image>", "<imago>"))
    with pytest.raises(ValueError, match=r"base.* image_token_index 4|base has no processor that opens"):
        verify(base_copy, **FEW)


def test_broken_generation_settings_are_an_error_with_their_path(base_copy):
    (base_copy / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"base.generation_config.json is not readable JSON"):
        verify(base_copy, **FEW)
