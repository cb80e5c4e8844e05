"""Dense LLaVA to one with experts: the same answers, the same bytes, whatever files the base is in."""

import json

import pytest
import torch
from convert_helpers import (
    bytes_of,
    change_json,
    change_tensors,
    make_base,
    tiny_config,
    tiny_inputs,
    train,
    weights_of,
)
from transformers import AutoProcessor, LlavaForConditionalGeneration

from roe_llava import MoeLlavaForConditionalGeneration
from roe_llava.cli import main
from roe_llava.convert.graft import graft
from roe_llava.convert.upcycle import chosen_layers, upcycle

GREEDY = {"max_new_tokens": 4, "do_sample": False}
DECODERS = {"llama": {}, "mistral": {}, "qwen2": {}, "phi": {}, "stablelm": {"use_qkv_bias": True}}


def open_moe(folder):
    return MoeLlavaForConditionalGeneration.from_pretrained(folder).eval()


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("router", ["linear", "token_aware"])
@torch.no_grad()
def test_an_upcycled_model_answers_as_its_base(tmp_path, decoder, router):
    base = make_base(tmp_path / "base", config=tiny_config(decoder, **DECODERS[decoder]))
    upcycle(base, tmp_path / "moe", router=router)
    dense, moe = LlavaForConditionalGeneration.from_pretrained(base).eval(), open_moe(tmp_path / "moe")
    assert moe.config.expert_layers() == [0, 2] and moe.config.router_type == router
    inputs = tiny_inputs(AutoProcessor.from_pretrained(tmp_path / "moe"))
    assert inputs.keys() == tiny_inputs(AutoProcessor.from_pretrained(base)).keys()
    torch.testing.assert_close(moe(**inputs).logits, dense(**inputs).logits, rtol=0, atol=2e-6)
    assert torch.equal(moe.generate(**inputs, **GREEDY), dense.generate(**inputs, **GREEDY))


def test_experts_are_the_bases_bytes_and_all_else_is_untouched(tmp_path):
    base = make_base(tmp_path / "base", dtype=torch.bfloat16)
    summary = upcycle(base, tmp_path / "moe", experts=3, layers=[1])
    old, new = weights_of(base), weights_of(tmp_path / "moe")
    mlp = "language_model.model.layers.1.mlp."
    for number in range(3):
        gate, up = new[f"{mlp}experts.gate_up_proj"][number].chunk(2)
        down = new[f"{mlp}experts.down_proj"][number]
        found = {"gate_proj": gate, "up_proj": up, "down_proj": down}
        assert all(bytes_of(one) == bytes_of(old[f"{mlp}{part}.weight"]) for part, one in found.items())
    added = {f"{mlp}experts.gate_up_proj", f"{mlp}experts.down_proj", f"{mlp}router.weight"}
    assert new.keys() - old.keys() == added and all(name.startswith(mlp) for name in old.keys() - new.keys())
    assert all(bytes_of(new[name]) == bytes_of(old[name]) for name in old.keys() & new.keys())
    assert new[f"{mlp}router.weight"].dtype == torch.float32
    assert (summary.kept, summary.added) == (len(old), 1)
    assert "3 in layers 1: " in str(summary) and "answer as the base does" in str(summary)


@pytest.mark.parametrize("form", ["sharded", "bin", "names in memory"])
@torch.no_grad()
def test_every_form_of_a_base_gives_the_same_model(tmp_path, form):
    base = make_base(tmp_path / "base")
    upcycle(base, tmp_path / "expected")
    if form == "sharded":
        other = make_base(tmp_path / "other", max_shard_size="20KB")
        assert len(list(other.glob("*.safetensors"))) > 2
    elif form == "bin":
        other = make_base(tmp_path / "other")
        torch.save(weights_of(other), other / "pytorch_model.bin")
        (other / "model.safetensors").unlink()
    else:
        other = make_base(tmp_path / "other", save_original_format=False)
        assert "model.language_model.layers.0.mlp.up_proj.weight" in weights_of(other)
    upcycle(other, tmp_path / "moe")
    ours, expected = open_moe(tmp_path / "moe").state_dict(), open_moe(tmp_path / "expected").state_dict()
    assert ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in ours)


def test_the_seed_decides_the_routers(tmp_path):
    base = make_base(tmp_path / "base")
    name = "language_model.model.layers.2.mlp.router.weight"
    found = []
    for number, seed in enumerate((0, 0, 1)):
        upcycle(base, tmp_path / str(number), seed=seed)
        found.append(weights_of(tmp_path / str(number))[name])
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert 0.01 < found[0].std() < 0.03  # initializer_range


@torch.no_grad()
def test_one_expert_per_token_is_said_not_to_answer_as_its_base(tmp_path):
    base = make_base(tmp_path / "base")
    assert "does not answer as the base does" in str(upcycle(base, tmp_path / "moe", top_k=1))
    moe = open_moe(tmp_path / "moe")
    inputs = tiny_inputs(AutoProcessor.from_pretrained(base))
    logits = LlavaForConditionalGeneration.from_pretrained(base).eval()(**inputs).logits
    assert not torch.allclose(moe(**inputs).logits, logits, atol=1e-5)
    moe.config.normalize_expert_weights = True
    torch.testing.assert_close(moe(**inputs).logits, logits, rtol=0, atol=2e-6)


def test_layers_have_names_and_numbers():
    found = {name: chosen_layers(name, 5) for name in ("alternate", "first_half", "second_half", "all", "0,3")}
    assert found == {
        "alternate": [0, 2, 4],
        "first_half": [0, 1],
        "second_half": [2, 3, 4],
        "all": [0, 1, 2, 3, 4],
        "0,3": [0, 3],
    }


def test_the_command_writes_what_it_is_asked_for(tmp_path, capsys):
    base = make_base(tmp_path / "base")
    options = ["--experts", "2", "--top-k", "1", "--layers", "0,1", "--router", "token_aware", "--seed", "3"]
    assert main(["upcycle", str(base), str(tmp_path / "moe"), *options]) == 0
    config = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert (config["num_experts"], config["num_experts_per_tok"], config["moe_layers"]) == (2, 1, [0, 1])
    assert config["router_type"] == "token_aware" and config["moe_provenance"]["seed"] == 3
    assert config["moe_provenance"]["base"] == {"id": "base", "revision": None}
    assert "added    18 untrained router tensors" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 1}, "num_experts must be an integer of at least 2, got 1"),
        ({"top_k": 5}, "num_experts_per_tok must not exceed num_experts 4, got 5"),
        ({"layers": "odd"}, r"layers must be one of \('alternate', .* or numbers like 0,2,5, got 'odd'"),
        ({"layers": "0,3"}, r"moe_layers must be distinct layer numbers in \[0, 3\), at least one, got \[0, 3\]"),
        ({"router": "cosine"}, "router_type must be one of .*, got 'cosine'"),
    ],
)
def test_a_wrong_option_is_named_and_nothing_written(tmp_path, options, message):
    base = make_base(tmp_path / "base")
    with pytest.raises(ValueError, match=message):
        upcycle(base, tmp_path / "moe", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_what_is_no_dense_llava_is_refused(tmp_path):
    base = make_base(tmp_path / "base")
    upcycle(base, tmp_path / "moe")
    train(base).save_pretrained(tmp_path / "roe")
    with pytest.raises(ValueError, match="model_type 'moe_llava', expected 'llava': this model has experts already"):
        upcycle(tmp_path / "moe", tmp_path / "again")
    with pytest.raises(ValueError, match="model_type 'roe_llava', expected 'llava': routing parts belong to the dense"):
        upcycle(tmp_path / "roe", tmp_path / "again")
    with pytest.raises(ValueError, match=r"the base weights in .*roe are not those of .*moe"):
        graft(tmp_path / "moe", tmp_path / "roe", tmp_path / "again")
    config = json.loads((base / "config.json").read_text())
    change_json(base / "config.json", text_config=config["text_config"] | {"model_type": "gemma"})
    with pytest.raises(ValueError, match=r"text_config.model_type 'gemma' in .* is not supported, .*'stablelm'"):
        upcycle(base, tmp_path / "again")


def test_a_damaged_base_is_named(tmp_path):
    base = make_base(tmp_path / "base")
    name = "language_model.model.layers.2.mlp.up_proj.weight"
    change_tensors(base / "model.safetensors", lambda tensors: tensors[name].fill_(float("nan")))
    with pytest.raises(ValueError, match=rf"{name} in .* holds NaN or Inf|experts.gate_up_proj .* holds NaN or Inf"):
        upcycle(base, tmp_path / "moe")
    change_tensors(base / "model.safetensors", lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=r"lacks .*layers\.2\.mlp\.up_proj\.weight"):
        upcycle(base, tmp_path / "moe")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
