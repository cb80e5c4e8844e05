"""Extracting: the adapter file back out of a RoE checkpoint, and base and adapter apart."""

import json
import shutil

import pytest
import torch
from convert_helpers import (
    NUM_LAYERS,
    bytes_of,
    change_json,
    change_tensors,
    make_base,
    tiny_config,
    tiny_inputs,
    train,
    weights_of,
)
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

from roe_llava import RoeLlavaForConditionalGeneration, RoeLlavaProcessor
from roe_llava.cli import main
from roe_llava.convert.adapter_file import save_adapter
from roe_llava.convert.extract import extract
from roe_llava.convert.graft import graft


def tied_config():
    config = tiny_config("qwen2", tie_word_embeddings=True)
    config.tie_word_embeddings = True
    return config


# What a base may look like, and what its adapter routes.
KINDS = {
    "plain": ({}, {}),
    "sharded": ({"max_shard_size": "20KB"}, {}),
    "bfloat16": ({"dtype": torch.bfloat16}, {}),
    "names in memory": ({"save_original_format": False}, {}),
    "mistral": ({"config": tiny_config("mistral")}, {"routing_positions": "first", "target_skip_ratio": 0.2}),
    "tied": ({"config": tied_config()}, {}),
    "some layers": ({}, {"routed_layers": [0, 2], "adapter_size": 6}),
}


@pytest.fixture(params=KINDS)
def pieces(request, tmp_path):
    """(base, adapter, grafted) folders."""
    save, fields = KINDS[request.param]
    base = make_base(tmp_path / "base", **save)
    model = train(base, **fields)
    adapter = save_adapter(model, model.config, tmp_path / "adapter", base=base, training={"steps": 3, "loss": [1.5]})
    graft(base, adapter, tmp_path / "grafted")
    return base, adapter, tmp_path / "grafted"


@pytest.fixture
def grafted(tmp_path, base, adapter):
    graft(base, adapter, tmp_path / "grafted")
    return tmp_path / "grafted"


def content_of(folder):
    """Path to bytes of every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same_tensors(one, two):
    return one.keys() == two.keys() and all(bytes_of(one[name]) == bytes_of(two[name]) for name in one)


def refuses(match, *args, **kwargs):
    out = args[1]
    with pytest.raises(ValueError, match=match):
        extract(*args, **kwargs)
    assert not out.exists() and not list(out.parent.glob(f".{out.name}*"))


# ---------------------------------------- adapter alone


def test_graft_then_extract_is_the_identity(tmp_path, pieces):
    _, adapter, grafted = pieces
    extract(grafted, tmp_path / "out")
    assert sorted(content_of(tmp_path / "out")) == ["roe_adapter.json", "roe_adapter.safetensors"]
    assert same_tensors(weights_of(tmp_path / "out"), weights_of(adapter))
    ours, theirs = (json.loads((folder / "roe_adapter.json").read_text()) for folder in (tmp_path / "out", adapter))
    assert ours == theirs and len(ours["base"]["tensors"]) > 70


def test_extract_then_graft_gives_the_same_folder(tmp_path, pieces):
    base, _, grafted = pieces
    extract(grafted, tmp_path / "out")
    graft(base, tmp_path / "out", tmp_path / "again")
    assert content_of(tmp_path / "again") == content_of(grafted)


def test_saved_model_needs_its_base_named(tmp_path, base, trained, adapter):
    trained.save_pretrained(tmp_path / "saved")
    refuses("does not say which base it was made from .* --base, or .* --full", tmp_path / "saved", tmp_path / "out")
    extract(tmp_path / "saved", tmp_path / "out", base=base)
    assert same_tensors(weights_of(tmp_path / "out"), weights_of(adapter))
    ours, theirs = (json.loads((f / "roe_adapter.json").read_text()) for f in (tmp_path / "out", adapter))
    assert ours == theirs | {"training": {}}


def test_a_grafted_model_saved_again_still_names_its_base(tmp_path, grafted, adapter):
    RoeLlavaForConditionalGeneration.from_pretrained(grafted).save_pretrained(tmp_path / "saved")
    extract(tmp_path / "saved", tmp_path / "out")
    assert (tmp_path / "out" / "roe_adapter.json").read_bytes() == (adapter / "roe_adapter.json").read_bytes()
    assert same_tensors(weights_of(tmp_path / "out"), weights_of(adapter))


def test_named_base_is_recorded_by_its_own_id_whatever_folder_it_is_compared_with(tmp_path, base_copy, grafted):
    change_json(grafted / "config.json", roe_provenance=renamed_base(grafted, "somebody/base", "abc"))
    extract(grafted, tmp_path / "out", base=base_copy)
    record = json.loads((tmp_path / "out" / "roe_adapter.json").read_text())["base"]
    assert (record["id"], record["revision"]) == ("somebody/base", "abc")


def renamed_base(folder, base_id, revision):
    known = json.loads((folder / "config.json").read_text())["roe_provenance"]
    return known | {"base": known["base"] | {"id": base_id, "revision": revision}}


def test_summary_counts_and_gives_reasons(tmp_path, pieces):
    base, _, grafted = pieces
    summary = extract(grafted, tmp_path / "out")
    stored, source = weights_of(tmp_path / "out"), weights_of(base)
    assert summary.kept == len(stored)
    assert summary.kept_bytes == sum(tensor.numel() * tensor.itemsize for tensor in stored.values())
    assert f"{len(source)} tensors of the base" in str(summary) and "graft puts them back" in str(summary)
    in_memory_names = any(name.startswith("model.language_model.") for name in source)
    assert len(summary.renamed) == (summary.kept if in_memory_names else 0)
    assert all(new in stored for new in summary.renamed.values())


def test_dry_run_checks_and_writes_nothing(tmp_path, grafted):
    summary = extract(grafted, tmp_path / "out", dry_run=True)
    assert not summary.written and "nothing written" in str(summary)
    summary = extract(grafted, tmp_path / "out", full=True, dry_run=True)
    assert not summary.written and not (tmp_path / "out").exists()
    change_tensors(grafted / "model-base.safetensors", lambda t: t["language_model.model.norm.weight"].add_(0.1))
    refuses("are not those of the base it names", grafted, tmp_path / "out", dry_run=True)


# ---------------------------------------- refusals


def test_tuned_base_is_refused_with_both_fingerprints(tmp_path, base, grafted):
    named = json.loads((grafted / "config.json").read_text())["roe_provenance"]["base"]["fingerprint"]
    change_tensors(grafted / "model-base.safetensors", lambda t: t["language_model.model.norm.weight"][3].add_(1e-3))
    refuses(
        rf"{base.name}: their fingerprint is \w{{64}}, the base's {named}; --base .* --full", grafted, tmp_path / "o"
    )
    message = r"1 of 73 tensors differ \(model.language_model.norm.weight has other values\).* tuned.* --full"
    refuses(message, grafted, tmp_path / "out", base=base)


def test_base_in_another_dtype_is_refused_before_it_is_read(tmp_path, grafted, monkeypatch):
    half = make_base(tmp_path / "half", dtype=torch.float16)
    monkeypatch.setattr("roe_llava.convert.extract.read_signatures", lambda *args: pytest.fail("weights were read"))
    refuses(r"lm_head.weight is F32 \[32, 16\], was F16", grafted, tmp_path / "out", base=half)


def test_what_is_no_roe_checkpoint_is_refused(tmp_path, base, adapter):
    refuses("model_type 'llava', expected 'roe_llava' or .*: only a RoE checkpoint", base, tmp_path / "out")
    refuses("is an adapter file already", adapter, tmp_path / "out")
    refuses("no config.json", tmp_path_with(tmp_path, "empty"), tmp_path / "out")
    refuses("no Hub id", tmp_path / "nowhere", tmp_path / "out")


def tmp_path_with(folder, name):
    (folder / name).mkdir()
    return folder / name


def test_incomplete_or_broken_parts_are_refused(tmp_path, grafted):
    name = "language_model.model.layers.1.router.weight"
    parts = grafted / "model-roe.safetensors"
    change_tensors(parts, lambda t: t[name].fill_(float("nan")))
    refuses("layers.1.router.weight .* holds 64 NaN", grafted, tmp_path / "out")
    refuses("layers.1.router.weight .* holds 64 NaN", grafted, tmp_path / "out", full=True)
    parts.write_bytes(parts.read_bytes()[:-1])
    refuses("cut, copy or download it again", grafted, tmp_path / "out")


def test_options_that_contradict_each_other_are_refused(tmp_path, base, grafted):
    refuses("given with full", grafted, tmp_path / "out", base=base, full=True)
    refuses("without a base", grafted, tmp_path / "out", base_revision="main")
    refuses("revision 'main' given with the folder", grafted, tmp_path / "out", revision="main")


def test_targets_are_not_overwritten_unasked(tmp_path, grafted):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "note").touch()
    for full in (False, True):
        with pytest.raises(ValueError, match="exists and is not empty"):
            extract(grafted, tmp_path / "out", full=full)
    extract(grafted, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "note").exists()
    with pytest.raises(ValueError, match="which is read: give another target"):
        extract(grafted, grafted, overwrite=True)


# ---------------------------------------- base and adapter


def test_full_extraction_grafts_back_tensor_for_tensor(tmp_path, pieces):
    base, adapter, grafted = pieces
    extract(grafted, tmp_path / "out", full=True)
    graft(tmp_path / "out" / "base", tmp_path / "out" / "adapter", tmp_path / "again")
    assert same_tensors(weights_of(tmp_path / "again"), weights_of(grafted))
    assert same_tensors(weights_of(tmp_path / "out" / "base"), weights_of(base))
    assert same_tensors(weights_of(tmp_path / "out" / "adapter"), weights_of(adapter))
    # The base was not tuned, so both say what the checkpoint says.
    configs = [json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "again", grafted)]
    assert configs[0] == configs[1]
    stock, original = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "out" / "base", base))
    assert stock == original


def test_full_extraction_of_a_tuned_model_gives_a_stock_llava(tmp_path, base):
    """Saved by `save_pretrained`: base and parts in the same file, processor and code of RoE."""
    model = train(base)
    with torch.no_grad():
        model.model.language_model.norm.weight += 0.5
    model.save_pretrained(tmp_path / "saved")
    RoeLlavaProcessor.from_pretrained(base).save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "README.md").write_text("the RoE model's card")
    assert (tmp_path / "saved" / "processing_roe.py").exists()
    summary = extract(tmp_path / "saved", tmp_path / "out", full=True)
    stock_folder = tmp_path / "out" / "base"
    assert not list(stock_folder.glob("*.py")) and "processing_roe.py" in summary.dropped
    assert "README.md" in summary.dropped and summary.kept == len(weights_of(tmp_path / "saved"))
    assert not [path for path in stock_folder.glob("*.json") if "roe" in path.read_text().lower()]

    processor = AutoProcessor.from_pretrained(stock_folder)
    assert type(processor).__name__ == "LlavaProcessor"
    stock, info = LlavaForConditionalGeneration.from_pretrained(stock_folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    inputs = tiny_inputs(processor)
    with torch.no_grad():
        kept = model(**inputs, routes=[True] * NUM_LAYERS).logits
        assert torch.equal(stock(**inputs).logits, kept)

    record = json.loads((tmp_path / "out" / "adapter" / "roe_adapter.json").read_text())["base"]
    assert record["id"] == "out/base" and record["revision"] is None
    graft(stock_folder, tmp_path / "out" / "adapter", tmp_path / "again")
    assert same_tensors(weights_of(tmp_path / "again"), weights_of(tmp_path / "saved"))
    again = RoeLlavaForConditionalGeneration.from_pretrained(tmp_path / "again")
    inputs = tiny_inputs(RoeLlavaProcessor.from_pretrained(tmp_path / "again"))
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_full_extraction_says_whether_the_base_was_tuned(tmp_path, grafted):
    assert "are those of" in str(extract(grafted, tmp_path / "out", full=True))
    change_tensors(grafted / "model-base.safetensors", lambda t: t["language_model.model.norm.weight"].add_(0.1))
    assert "are not those of" in str(extract(grafted, tmp_path / "out", full=True, overwrite=True))


def test_full_extraction_of_shards_that_mix_base_and_parts(tmp_path, trained):
    trained.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    files = [load_file(path).keys() for path in sorted((tmp_path / "saved").glob("*.safetensors"))]
    assert len(files) > 2 and any(
        any("router" in name for name in names) and any("router" not in name for name in names) for names in files
    )
    extract(tmp_path / "saved", tmp_path / "out", full=True)
    stock, info = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out" / "base", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    state = trained.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in stock.state_dict().items())
    graft(tmp_path / "out" / "base", tmp_path / "out" / "adapter", tmp_path / "again")
    assert same_tensors(weights_of(tmp_path / "again"), weights_of(tmp_path / "saved"))


def test_full_extraction_keeps_buffers_that_no_model_reads(tmp_path, grafted):
    name = "language_model.model.layers.0.self_attn.rotary_emb.inv_freq"
    path = grafted / "model-base.safetensors"
    save_file(load_file(path) | {name: torch.ones(4)}, path, metadata={"format": "pt"})
    index = json.loads((grafted / "model.safetensors.index.json").read_text())["weight_map"]
    change_json(grafted / "model.safetensors.index.json", weight_map=index | {name: path.name})
    extract(grafted, tmp_path / "one")
    extract(grafted, tmp_path / "out", full=True)
    assert name in weights_of(tmp_path / "out" / "base")


def test_bin_checkpoint(tmp_path, trained, base, adapter):
    trained.save_pretrained(tmp_path / "saved")
    tensors = load_file(tmp_path / "saved" / "model.safetensors")
    (tmp_path / "saved" / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "saved" / "pytorch_model.bin")
    extract(tmp_path / "saved", tmp_path / "one", base=base)
    assert same_tensors(weights_of(tmp_path / "one"), weights_of(adapter))
    extract(tmp_path / "saved", tmp_path / "two", full=True)
    assert same_tensors(weights_of(tmp_path / "two" / "base"), weights_of(base))


# ---------------------------------------- command line


def test_command_line(tmp_path, base, grafted, capsys):
    out = str(tmp_path / "out")
    assert main(["extract", str(grafted), out, "--dry-run"]) == 0 and not (tmp_path / "out").exists()
    assert main(["extract", str(grafted), out, "--base", str(base)]) == 0
    printed = capsys.readouterr().out
    assert "kept     10 routing tensors" in printed and "dropped  2" in printed
    assert main(["extract", str(grafted), out, "--full"]) == 2 and "not empty" in capsys.readouterr().err
    assert main(["extract", str(grafted), out, "--full", "--overwrite"]) == 0
    shutil.rmtree(grafted)
    assert main(["graft", f"{out}/base", f"{out}/adapter", str(grafted)]) == 0


def test_full_extraction_of_an_incomplete_checkpoint_is_refused(tmp_path, grafted):
    """Its fingerprint differs from the named base's, as a tuned one's does; stock LLaVA would fill it up at random."""
    name = "language_model.model.layers.1.self_attn.q_proj.weight"
    index = grafted / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    change_tensors(grafted / content["weight_map"].pop(name), lambda tensors: tensors.pop(name))
    index.write_text(json.dumps(content))
    for dry_run in (True, False):
        with pytest.raises(ValueError, match=r"lacks model.language_model.layers.1.self_attn.q_proj.weight"):
            extract(grafted, tmp_path / "out", full=True, dry_run=dry_run)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_is_not_compared_with_itself(tmp_path, grafted):
    with pytest.raises(ValueError, match="already has routing parts"):
        extract(grafted, tmp_path / "out", base=grafted)
