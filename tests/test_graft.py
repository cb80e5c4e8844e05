"""Grafting: the folder it writes."""

import json
import os
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
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, normalizers
from transformers import AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration
from transformers.dynamic_module_utils import get_relative_import_files

from roe_llava import RoeLlavaConfig, RoeLlavaForConditionalGeneration, RoeLlavaProcessor
from roe_llava.convert.adapter_file import save_adapter
from roe_llava.convert.fingerprint import describe_base
from roe_llava.convert.graft import graft

SHARDS = {"max_shard_size": "20KB"}


def test_graft_then_load_gives_the_trained_models_logits(tmp_path, base, trained, adapter):
    graft(base, adapter, tmp_path / "out")
    loaded = RoeLlavaForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    inputs = tiny_inputs(RoeLlavaProcessor.from_pretrained(tmp_path / "out"))
    with torch.no_grad():
        ours, theirs = loaded(**inputs), trained(**inputs)
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.routes, theirs.routes) and not theirs.routes.all()
    assert torch.equal(ours.router_logits, theirs.router_logits)


@pytest.mark.parametrize("text_type", ["mistral", "qwen2"])
def test_other_language_models_and_tied_embeddings(tmp_path, text_type):
    config = tiny_config(text_type, tie_word_embeddings=text_type == "qwen2")
    config.tie_word_embeddings = config.text_config.tie_word_embeddings
    base = make_base(tmp_path / "base", config=config)
    model = train(base)
    model.save_pretrained(tmp_path / "roe")
    graft(base, tmp_path / "roe", tmp_path / "out")
    loaded = RoeLlavaForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    inputs = tiny_inputs(RoeLlavaProcessor.from_pretrained(tmp_path / "out"))
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_grafting_a_full_checkpoint_equals_grafting_its_adapter(tmp_path, base, trained, adapter):
    trained.save_pretrained(tmp_path / "roe")
    graft(base, adapter, tmp_path / "one")
    graft(base, tmp_path / "roe", tmp_path / "two")
    one, two = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_grafted_folder_serves_as_full_checkpoint(tmp_path, base, adapter):
    graft(base, adapter, tmp_path / "one")
    graft(base, tmp_path / "one", tmp_path / "two")
    one = json.loads((tmp_path / "one" / "config.json").read_text())
    two = json.loads((tmp_path / "two" / "config.json").read_text())
    assert one == two and one["roe_provenance"]["training"] == {"steps": 3}


def test_base_shards_are_copied_byte_for_byte(tmp_path, trained, adapter):
    base = make_base(tmp_path / "base", **SHARDS)
    summary = graft(base, adapter, tmp_path / "out")
    shards = sorted(path.name for path in base.glob("*.safetensors"))
    assert len(shards) > 2
    for name in shards:
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
        assert (tmp_path / "out" / name).stat().st_nlink == 1
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == [*shards, "model-roe.safetensors"]
    assert summary.kept == len(weights_of(base)) and summary.added == 3 * NUM_LAYERS + 1


def test_index_lists_every_tensor_where_it_is(tmp_path, base, adapter):
    graft(base, adapter, tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    for path in (tmp_path / "out").glob("*.safetensors"):
        assert all(index["weight_map"].pop(name) == path.name for name in load_file(path))
    assert not index["weight_map"]
    tensors = weights_of(tmp_path / "out").values()
    assert index["metadata"]["total_size"] == sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def test_half_precision_base_keeps_its_bytes_and_routers_stay_float32(tmp_path, adapter):
    base = make_base(tmp_path / "base", dtype=torch.bfloat16)
    graft(base, adapter, tmp_path / "out", check_base=False)
    source, result = weights_of(base), weights_of(tmp_path / "out")
    assert all(bytes_of(result[name]) == bytes_of(tensor) for name, tensor in source.items())
    assert {result[name].dtype for name in result.keys() - source.keys()} == {torch.float32}
    loaded = RoeLlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16 and loaded.model.language_model.layers[0].router.weight.dtype == torch.float32


def test_bin_base_becomes_safetensors_with_the_same_values(tmp_path, base, adapter):
    folder = tmp_path / "bin"
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    graft(folder, adapter, tmp_path / "out")
    result = weights_of(tmp_path / "out")
    assert all(bytes_of(result[name]) == bytes_of(tensor) for name, tensor in tensors.items())
    RoeLlavaForConditionalGeneration.from_pretrained(tmp_path / "out")


def test_sharded_bin_base(tmp_path, base, adapter):
    folder = tmp_path / "bin"
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, weight_map = sorted(tensors), {}
    for number, part in enumerate((names[:30], names[30:]), 1):
        file = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({name: tensors[name] for name in part}, folder / file, _use_new_zipfile_serialization=number == 1)
        weight_map |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    graft(folder, adapter, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").glob("model-0*")) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    RoeLlavaForConditionalGeneration.from_pretrained(tmp_path / "out")


def test_base_saved_with_names_in_memory(tmp_path, trained, adapter):
    base = make_base(tmp_path / "base", save_original_format=False)
    graft(base, adapter, tmp_path / "out")
    loaded = RoeLlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    state = trained.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())


def test_config_keeps_the_bases_fields_and_says_where_weights_come_from(tmp_path, base_copy, adapter):
    change_json(base_copy / "config.json", note="kept")
    graft(base_copy, adapter, tmp_path / "out")
    source = json.loads((base_copy / "config.json").read_text())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    changed = {name for name in source if config[name] != source[name]}
    assert changed == {"model_type", "architectures"} and config["note"] == "kept"
    assert (config["model_type"], config["adapter_size"]) == ("roe_llava", 4)
    assert config["roe_provenance"]["base"]["fingerprint"] == describe_base(base_copy)["fingerprint"]
    assert (
        config["roe_provenance"]["base"]["id"] == json.loads((adapter / "roe_adapter.json").read_text())["base"]["id"]
    )


def test_code_files_are_those_transformers_finds(tmp_path, base, adapter):
    out = tmp_path / "out"
    graft(base, adapter, out)
    code = {path.name for path in out.glob("*.py")}
    entries = [out / f"{name}.py" for name in ("configuration_roe", "modeling_roe_llava", "processing_roe")]
    needed = {os.path.basename(file) for entry in entries for file in get_relative_import_files(entry)}
    assert code == needed | {entry.name for entry in entries}


def test_other_files_are_copied_or_named_as_dropped(tmp_path, base_copy, adapter):
    (base_copy / "README.md").write_text("the base's card")
    (base_copy / "LICENSE.txt").write_text("terms")
    (base_copy / "pytorch_model.bin").write_text("a second format")
    (base_copy / "tokenizer.model").write_bytes(b"\0\1")
    summary = graft(base_copy, adapter, tmp_path / "out")
    assert summary.dropped.keys() == {"README.md", "pytorch_model.bin"}
    assert "README.md" in str(summary)
    for name in ("tokenizer.model", "LICENSE.txt", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (base_copy / name).read_bytes()


def test_old_processor_files_are_completed(tmp_path, base_copy, adapter):
    """Old llava-hf folders hold the image processor apart, and may leave out what counts image tokens."""
    content = json.loads((base_copy / "processor_config.json").read_text())
    (base_copy / "preprocessor_config.json").write_text(json.dumps(content["image_processor"]))
    (base_copy / "processor_config.json").unlink()
    graft(base_copy, adapter, tmp_path / "out")
    processor = RoeLlavaProcessor.from_pretrained(tmp_path / "out")
    assert (processor.patch_size, processor.vision_feature_select_strategy) == (14, "default")
    assert (tiny_inputs(processor)["input_ids"] == 4).sum() == 8


def put_llama_tokenizer(folder):
    """A tokenizer as llava-hf folders have it: `LlamaTokenizer` by name, with blanks as tokenizer.json sets them."""
    words = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "▁", "<0x0A>", *"USER:what"]
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, [], byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.add_special_tokens(words[:5])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"} | special))


def test_a_prompt_has_the_tokens_that_the_base_gives_it(tmp_path, base_copy, adapter):
    put_llama_tokenizer(base_copy)
    out = tmp_path / "out"
    graft(base_copy, adapter, out)
    prompt = "USER: <image>\nwhat"
    expected = AutoProcessor.from_pretrained(base_copy).tokenizer.tokenize(prompt)
    assert expected[-7:] == ["<image>", "▁", "<0x0A>", *"what"]  # LlamaTokenizer has no blank after the image
    assert AutoTokenizer.from_pretrained(out, config=RoeLlavaConfig()).tokenize(prompt) == expected
    shutil.copyfile(base_copy / "tokenizer_config.json", out / "tokenizer_config.json")  # as older versions did
    assert RoeLlavaProcessor.from_pretrained(out).tokenizer.tokenize(prompt) == expected


def test_our_processor_asks_nobody_to_trust_a_folders_code(tmp_path, base, adapter, monkeypatch):
    asked = []
    monkeypatch.setattr("builtins.input", lambda *_: asked.append(1) or "n")
    graft(base, adapter, tmp_path / "out")
    RoeLlavaProcessor.from_pretrained(tmp_path / "out")
    assert not asked


def test_base_without_a_processor_is_grafted_and_says_so(tmp_path, adapter):
    base = make_base(tmp_path / "base", processor=False)
    summary = graft(base, adapter, tmp_path / "out")
    assert "processor" in summary.dropped and not (tmp_path / "out" / "processor_config.json").exists()


def test_some_layers_routed(tmp_path, base):
    model = train(base, routed_layers=[1])
    save_adapter(model, model.config, tmp_path / "adapter", base=base)
    graft(base, tmp_path / "adapter", tmp_path / "out")
    loaded = RoeLlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert loaded.config.routed_layers == [1] and loaded.model.language_model.layers[0].router is None


def test_dry_run_checks_and_writes_nothing(tmp_path, base, base_copy, adapter):
    summary = graft(base, adapter, tmp_path / "out", dry_run=True)
    assert not summary.written and not (tmp_path / "out").exists()
    assert summary.fingerprint == describe_base(base)["fingerprint"] and "nothing written" in str(summary)
    change_tensors(base_copy / "model.safetensors", lambda t: t["language_model.lm_head.weight"][3].add_(1.0))
    with pytest.raises(ValueError, match="is not the base"):
        graft(base_copy, adapter, tmp_path / "out", dry_run=True)


def test_stock_llava_still_reads_the_base_inside(tmp_path, base, adapter):
    """The grafted weights are a superset of the base's, under the base's names."""
    graft(base, adapter, tmp_path / "out")
    config = LlavaForConditionalGeneration.from_pretrained(base).config
    stock = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", config=config)
    expected = LlavaForConditionalGeneration.from_pretrained(base).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in stock.state_dict().items())


def test_an_adapter_may_be_named_by_either_of_its_files(tmp_path, base, adapter):
    for name in ("roe_adapter.safetensors", "roe_adapter.json"):
        graft(base, adapter / name, tmp_path / name)
        RoeLlavaForConditionalGeneration.from_base(base, adapter / name)
    assert weights_of(tmp_path / "roe_adapter.json").keys() == weights_of(tmp_path / "roe_adapter.safetensors").keys()


def test_folders_are_copied_or_named_as_dropped(tmp_path, base_copy, adapter):
    (base_copy / "original_tokenizer").mkdir()
    (base_copy / "original_tokenizer" / "tokenizer.model").write_bytes(b"pieces")
    (base_copy / "onnx").mkdir()
    summary = graft(base_copy, adapter, tmp_path / "out")
    assert summary.dropped.keys() == {"onnx/"}
    assert (tmp_path / "out" / "original_tokenizer" / "tokenizer.model").read_bytes() == b"pieces"
