"""`roe-llava bench` with experts: systems answer alike, numbers follow from the models. No time is asserted."""

import json
from pathlib import Path

import pytest
import torch

from roe_llava import MoeLlavaForConditionalGeneration
from roe_llava.benchmarks import expert_bench
from roe_llava.benchmarks.expert_bench import IMPLEMENTATIONS, ONE_EXPERT
from roe_llava.benchmarks.expert_report import card_text
from roe_llava.benchmarks.systems import BASE, CONTROL
from roe_llava.cli import main
from roe_llava.convert.upcycle import upcycle
from roe_llava.examples.tiny_world.demo import SHIPPED
from roe_llava.hub_card.card import make_card
from roe_llava.hub_card.folder import open_folder

BASE_FOLDER = SHIPPED / "base"


@pytest.fixture(scope="module")
def subject():
    return expert_bench.shape_subject("tiny", "cpu", "float32", 4, 2, "alternate", "linear")


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("moe") / "moe"
    upcycle(BASE_FOLDER, folder, experts=3, top_k=1, layers="0,3", router="token_aware")
    return folder


def test_the_committed_times_are_those_on_the_page():
    root = Path(__file__).parent.parent
    result = json.loads((root / "benchmarks" / "results" / "cpu-medium-experts.json").read_text())
    assert card_text(result, "benchmarks/results/cpu-medium-experts.json") in (root / "docs" / "moe.md").read_text()
    assert "/tmp" not in result["command"] and "+" not in result["setup"]["commit"]


def test_every_system_answers_as_the_base_does(subject):
    prompt = subject.prompts(2)[0]
    systems, left_out = expert_bench.systems_of(subject, 60)
    assert [system.kind for system in systems] == [BASE, CONTROL, *IMPLEMENTATIONS, ONE_EXPERT] and not left_out
    expected = systems[0](**prompt).logits
    for system in systems:
        found = system(**prompt).logits
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max(), system.kind
    for name, system in zip(IMPLEMENTATIONS, systems[2:], strict=False):
        assert system.model.model.language_model.config._experts_implementation == name


def test_systems_share_their_weights(subject):
    storages = {tensor.data_ptr() for tensor in [*subject.base.parameters(), *subject.moe.parameters()]}
    systems, _ = expert_bench.systems_of(subject, 60)
    assert all(one.data_ptr() in storages for system in systems for one in system.model.parameters())
    shared = {tensor.data_ptr() for tensor in subject.base.parameters()}
    own = [name for name, one in subject.moe.named_parameters() if one.data_ptr() not in shared]
    assert all(".mlp.experts." in name or ".mlp.router." in name for name in own)


def test_sizes_are_those_of_the_models(subject):
    sizes = expert_bench.sizes_of(subject)
    experts = sum(one.numel() for name, one in subject.moe.named_parameters() if ".experts." in name)
    assert sizes["moe_parameters"] == sum(one.numel() for one in subject.moe.parameters())
    assert sizes["activated_parameters"] == sizes["moe_parameters"] - experts // 2
    assert sizes["base_parameters"] == sum(one.numel() for one in subject.base.parameters())
    assert (sizes["expert_layers"], sizes["experts"], sizes["experts_per_token"]) == ([0, 2, 4, 6], 4, 2)


def test_experts_used_are_those_that_tokens_went_through(subject):
    systems, _ = expert_bench.systems_of(subject, 60)
    probed = expert_bench.probe(systems[2], subject.prompts(1)[0], num_tokens=1)
    outputs = subject.moe(**subject.prompts(1)[0], output_router_logits=True)
    assert probed["experts_used"]["prefill"] == sum(one.unique().numel() for one in outputs.expert_indices) / 4
    assert probed["experts_used"]["decode"] == 2  # one token
    of_base = expert_bench.probe(systems[0], subject.prompts(1)[0], num_tokens=1)
    assert of_base["experts_used"] is None and of_base["kv_bytes"] == probed["kv_bytes"]


def test_copies_that_would_not_fit_are_left_out_with_the_reason(subject):
    copied = expert_bench.copied_bytes(subject.moe, 1)
    block = subject.moe.model.language_model.layers[0].mlp
    assert copied == 2 * block.experts.gate_up_proj[0].numel() * 4
    systems, left_out = expert_bench.systems_of(subject, int(expert_bench.MOST_COPIED / copied) + 1)
    assert "batched_mm" not in [system.kind for system in systems] and "GB" in left_out["batched_mm"]


def test_a_checkpoint_beside_its_base_is_measured_and_shown_on_its_card(moe, tmp_path, capsys):
    out = tmp_path / "times.json"
    words = ["bench", "--moe", moe, "--base", BASE_FOLDER, "--quick", "--batch", 2, "--rounds", 1, "--out", out]
    assert main([*map(str, words)]) == 0
    result = json.loads(out.read_text())
    assert result["trained"] and result["sizes"]["experts_per_token"] == 1 and [*result["batches"]] == ["2"]
    systems = result["batches"]["2"]["systems"]
    assert all(len(one[part]["runs"]) == 1 for one in systems for part in ("prefill", "decode"))
    assert "of which a token goes through" in capsys.readouterr().out.replace("\n", " ")
    model = MoeLlavaForConditionalGeneration.from_pretrained(moe)
    assert result["sizes"]["moe_parameters"] == model.num_parameters()
    text = make_card(open_folder(moe), results=[out]).text
    assert "| batch | experts implementation | prefill, base / it | decode, base / it |" in text
    assert "| 2 | grouped_mm | " in text and "Speed was not measured" not in text
    assert main([*map(str, words)]) == 2  # nothing is overwritten unasked


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--moe", "MOE"], "--moe needs --base"),
        (["--base", "BASE", "--shape", "tiny"], "beside --shape tiny: a base's folder"),
        (["--base", "BASE", "--experts", "4"], "beside --experts 4: a base's folder"),
        (["--adapter", "ROE"], "--adapter ROE needs --base"),
        (
            ["--adapter", "ROE", "--base", "BASE", "--moe", "MOE"],
            "--adapter ROE needs --base, the base it was trained for, and no --moe",
        ),
        (["--moe", "MOE", "--base", "BASE", "--experts", "4"], "without --shape and --experts"),
        (["--experts", "4", "--skip", "0.5"], "--skip is for routes over layers"),
        (["--experts", "4", "--compile"], "--compile is for routes over layers"),
        (["--experts", "1"], "num_experts must be an integer of at least 2"),
        (["--experts", "4", "--layers", "some"], "layers must be one of"),
        (["--moe", "BASE", "--base", "BASE"], "expected one with experts"),
        (["--moe", "MOE", "--base", "MOE"], "has model_type 'moe_llava', expected 'llava'"),
        (["--moe", "MOE", "--base", "OTHER"], "differ in"),
    ],
)
def test_what_cannot_be_measured_is_named(moe, tmp_path, words, said, capsys):
    other = tmp_path / "other"
    if "OTHER" in words:
        from convert_helpers import make_base

        make_base(other)
    places = {"MOE": moe, "BASE": BASE_FOLDER, "OTHER": other}
    words = [str(places.get(word, word)) for word in words]
    assert main(["bench", *words, "--quick", "--out", str(tmp_path / "x.json")]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "x.json").exists()


def test_a_base_in_half_precision_keeps_routers_in_float32():
    subject = expert_bench.shape_subject("tiny", "cpu", "bfloat16", 2, 1, "all", "token_aware")
    dtypes = {name.rpartition(".mlp.")[2].partition(".")[0]: one.dtype for name, one in subject.moe.named_parameters()}
    assert dtypes["router"] == torch.float32 and dtypes["experts"] == torch.bfloat16
