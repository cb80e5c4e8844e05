"""What grafting refuses, and how it says so: nothing is written, and the message names what is wrong."""

import json
import shutil
import struct

import pytest
import torch
from convert_helpers import change_json, change_tensors, make_base
from safetensors.torch import load_file, save_file

from roe_llava.convert.adapter_file import read_adapter, save_adapter
from roe_llava.convert.graft import graft
from roe_llava.grafting_roe import fetch_adapter

SHARDS = {"max_shard_size": "20KB"}


def refuses(match, *args, **kwargs):
    out = args[2]
    with pytest.raises(ValueError, match=match):
        graft(*args, **kwargs)
    assert not out.exists() and not list(out.parent.glob(f".{out.name}*"))


def test_tuned_base_is_refused_with_what_differs(tmp_path, base_copy, adapter):
    change_tensors(base_copy / "model.safetensors", lambda t: t["language_model.lm_head.weight"][3].add_(1e-3))
    refuses(
        r"not the base .*1 of 73 tensors differ \(lm_head.weight has other values",
        base_copy,
        adapter,
        tmp_path / "o",
    )
    graft(base_copy, adapter, tmp_path / "out", check_base=False)


def test_base_in_another_dtype_is_refused_with_both(tmp_path, adapter):
    base = make_base(tmp_path / "base", dtype=torch.float16)
    refuses(r"lm_head.weight is F16 \[32, 16\], was F32 \[32, 16\]", base, adapter, tmp_path / "out")


def test_adapter_without_a_recorded_base_needs_any_base(tmp_path, base, trained):
    save_adapter(trained, trained.config, tmp_path / "adapter")
    refuses("does not say which base", base, tmp_path / "adapter", tmp_path / "out")
    graft(base, tmp_path / "adapter", tmp_path / "out", check_base=False)


def test_checkpoint_that_was_tuned_whole_is_refused(tmp_path, base, trained):
    trained.save_pretrained(tmp_path / "roe")
    change_tensors(tmp_path / "roe" / "model.safetensors", lambda t: t["language_model.model.norm.weight"].add_(0.1))
    message = r"model.language_model.norm.weight has other values\). That checkpoint was tuned whole .* use it as it is"
    refuses(message, base, tmp_path / "roe", tmp_path / "out")


def test_full_checkpoint_without_a_router_is_refused(tmp_path, base, trained):
    trained.save_pretrained(tmp_path / "roe")
    name = "language_model.model.layers.2.router.weight"
    change_tensors(tmp_path / "roe" / "model.safetensors", lambda t: t.pop(name))
    refuses(r"lacks model.language_model.layers.2.router.weight", base, tmp_path / "roe", tmp_path / "out")


def test_missing_router_and_damaged_adapter_are_refused(tmp_path, base, adapter):
    path = adapter / "roe_adapter.safetensors"
    change_tensors(path, lambda t: t.pop("language_model.model.layers.0.router.weight"))
    refuses(r"lacks model.language_model.layers.0.router.weight", base, adapter, tmp_path / "out")
    path.write_bytes(path.read_bytes()[:-1])
    refuses("cut, copy or download it again", base, adapter, tmp_path / "out")


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"hidden_size": 8}, r"expected \[2, 8\] for hidden size 8"),
        ({"num_hidden_layers": 2}, r"layers.2.adapter.down_proj.weight.*which a model with 2 layers"),
        ({"text_model_type": "mistral"}, r"type 'mistral' \(text_config.text_model_type\), .* has 'llama'"),
        ({"routed_layers": [0, 1]}, r"holds .*layers.2"),
    ],
)
def test_adapter_that_contradicts_its_own_sizes_is_refused(tmp_path, base, adapter, entry, message):
    change_json(adapter / "roe_adapter.json", **entry)
    refuses(message, base, adapter, tmp_path / "out")


@pytest.mark.parametrize(
    "text, message",
    [
        ({"hidden_size": 8}, r"is for the hidden size 16 .*has 8: it was trained on another base"),
        ({"num_hidden_layers": 5}, r"is for the layer count 3 .*has 5: it was trained on another base"),
        ({"model_type": ["llama"]}, r"text_config.model_type \['llama'\] in .*config.json is not supported"),
        ({"model_type": "gpt2"}, r"text_config.model_type 'gpt2' in .*config.json is not supported, .*llama"),
    ],
)
def test_base_of_other_sizes_is_refused(tmp_path, base_copy, adapter, text, message):
    content = json.loads((base_copy / "config.json").read_text())["text_config"] | text
    change_json(base_copy / "config.json", text_config=content)
    refuses(message, base_copy, adapter, tmp_path / "out", check_base=False)


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"text_config": None}, r"config.json has no text_config"),
        ({"model_type": "llava_next_video"}, r"model_type 'llava_next_video', expected 'llava'"),
        ({"model_type": "roe_llava"}, r"already has routing parts"),
    ],
)
def test_config_that_is_no_llava_base_is_refused(tmp_path, base_copy, adapter, entry, message):
    change_json(base_copy / "config.json", **entry)
    refuses(message, base_copy, adapter, tmp_path / "out")


def test_base_with_routing_tensors_is_refused(tmp_path, base, trained, adapter):
    trained.save_pretrained(tmp_path / "roe")
    refuses("already has routing parts", tmp_path / "roe", adapter, tmp_path / "out")
    shutil.copy(base / "config.json", tmp_path / "roe")
    refuses(r"already has routing parts \(model.language_model.layers.0", tmp_path / "roe", adapter, tmp_path / "out")


def test_base_whose_tensors_are_not_llavas_is_refused(tmp_path, base_copy, adapter):
    def rename(tensors):
        for name in list(tensors):
            tensors[f"wrapped.{name}"] = tensors.pop(name)

    change_tensors(base_copy / "model.safetensors", rename)
    refuses(r"no tensor named language_model.model.layers", base_copy, adapter, tmp_path / "out")


def test_damaged_base_files_are_refused(tmp_path, adapter):
    base = make_base(tmp_path / "base", **SHARDS)
    out, index_file = tmp_path / "out", base / "model.safetensors.index.json"
    shard = sorted(base.glob("*.safetensors"))[1]
    content, index = shard.read_bytes(), index_file.read_text()
    shard.write_bytes(content[:-10])
    refuses(
        rf"{shard.name} has {len(content) - 10} bytes, its header asks for {len(content)}: .* cut", base, adapter, out
    )
    shard.unlink()
    refuses(rf"lists {shard.name}, which is not in", base, adapter, out)
    shard.write_bytes(content)
    weight_map = json.loads(index)["weight_map"]
    listed = {name: file for name, file in weight_map.items() if file != shard.name}
    change_json(index_file, weight_map=listed)
    refuses(rf"{shard.name} in .* is missing from model.safetensors.index.json", base, adapter, out)
    name = max(name for name, file in weight_map.items() if file.startswith("model-00001"))
    change_json(index_file, weight_map=weight_map | {name: shard.name})
    refuses(rf"says {name} is in {shard.name}, found in model-00001", base, adapter, out)
    index_file.write_text("{}")
    refuses("no readable weight_map", base, adapter, out)


def test_tensor_in_two_shards_is_refused(tmp_path, adapter):
    base = make_base(tmp_path / "base", **SHARDS)
    one, two = sorted(base.glob("*.safetensors"))[:2]
    name = min(load_file(one))
    change_tensors(two, lambda tensors: tensors.update({name: torch.zeros(2)}))
    refuses(rf"{name} is in two shards .*{one.name} and {two.name}", base, adapter, tmp_path / "out")


def test_bin_file_with_code_in_it_is_refused(tmp_path, base_copy, adapter):
    (base_copy / "model.safetensors").unlink()
    torch.save({"lm_head.weight": print}, base_copy / "pytorch_model.bin")
    refuses("pytorch_model.bin cannot be read as tensors alone", base_copy, adapter, tmp_path / "out")
    torch.save({"step": 3}, base_copy / "pytorch_model.bin")
    refuses("step in .*pytorch_model.bin is a int, expected nothing but tensors", base_copy, adapter, tmp_path / "out")
    torch.save({"x": torch.zeros(2, dtype=torch.complex64)}, base_copy / "pytorch_model.bin")
    refuses("complex64, which safetensors cannot hold", base_copy, adapter, tmp_path / "out")


def test_what_is_no_checkpoint_is_refused(tmp_path, base, adapter):
    empty, out = tmp_path / "empty", tmp_path / "out"
    empty.mkdir()
    refuses("empty is not a checkpoint folder: it has no config.json", empty, adapter, out)
    shutil.copy(base / "config.json", empty)
    refuses("empty is not a checkpoint folder: expected model.safetensors", empty, adapter, out)
    refuses("model_type 'llava', expected 'roe_llava' or .*: are BASE and ROE swapped", base, base, out)
    (empty / "config.json").unlink()
    refuses("neither roe_adapter.json nor config.json", base, empty, out)
    refuses("nowhere is not a checkpoint folder, and no Hub id", tmp_path / "nowhere", adapter, out)
    refuses("revision 'main' given with the folder", base, adapter, out, revision="main")


def test_hub_id_that_cannot_be_had_is_refused(tmp_path, adapter, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refuses(
        "nobody/nothing is no folder here and cannot be had from the Hub", "nobody/nothing", adapter, tmp_path / "out"
    )


def test_impossible_targets_are_refused(tmp_path, base, adapter):
    with pytest.raises(ValueError, match="create it first"):
        graft(base, adapter, tmp_path / "no" / "out")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file, expected a folder"):
        graft(base, adapter, tmp_path / "file")
    with pytest.raises(ValueError, match="which is read: give another target"):
        graft(base, adapter, adapter, overwrite=True)
    assert read_adapter(adapter)


def test_two_names_of_one_tensor_are_refused(tmp_path, base_copy, adapter):
    """Transformers would load either of them; the fingerprint would be that of the other."""

    def add_stray(tensors):
        name = "language_model.model.layers.0.self_attn.q_proj.weight"
        tensors["model.language_model.layers.0.self_attn.q_proj.weight"] = torch.zeros_like(tensors[name])

    change_tensors(base_copy / "model.safetensors", add_stray)
    refuses("are two names of one tensor", base_copy, adapter, tmp_path / "out")


def test_two_names_of_one_routing_part_are_refused(tmp_path, base, adapter):
    def add_stray(tensors):
        name = "language_model.model.layers.0.router.weight"
        tensors["model.language_model.layers.0.router.weight"] = torch.zeros_like(tensors[name])

    change_tensors(adapter / "roe_adapter.safetensors", add_stray)
    refuses("are two names of one tensor", base, adapter, tmp_path / "out")
    with pytest.raises(ValueError, match="are two names of one tensor"):
        read_adapter(adapter)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("language_model.model.layers.1.self_attn.q_proj.weight"), "lacks .*layers.1.self_attn.q_proj"),
        (lambda t: t.update(stray=torch.zeros(2)), "stray in .*model.safetensors is no tensor of the model"),
        (lambda t: t.update({"language_model.model.norm.weight": torch.zeros(3)}), r"shape \[3\], expected \[16\]"),
        (
            lambda t: t.update({"language_model.model.norm.weight": torch.zeros(16).char()}),
            "is I8, expected one of F64",
        ),
    ],
)
def test_base_that_is_not_what_its_config_says_is_refused_even_unchecked(tmp_path, base_copy, adapter, change, message):
    change_tensors(base_copy / "model.safetensors", change)
    refuses(message, base_copy, adapter, tmp_path / "out", check_base=False)


def test_shard_that_would_be_overwritten_by_the_routing_parts_is_refused(tmp_path, base_copy, adapter):
    (base_copy / "model.safetensors").rename(base_copy / "model-roe.safetensors")
    names = load_file(base_copy / "model-roe.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-roe.safetensors")}
    (base_copy / "model.safetensors.index.json").write_text(json.dumps(index))
    refuses("would be written as model-roe.safetensors", base_copy, adapter, tmp_path / "out")


@pytest.mark.parametrize("token", ["<picture>", "USER:"])
def test_tokenizer_that_does_not_know_the_image_token_by_its_id_is_refused(tmp_path, base_copy, adapter, token):
    change_json(base_copy / "processor_config.json", image_token=token)
    refuses("image token .* the model expects id 4", base_copy, adapter, tmp_path / "out")


def test_damaged_tokenizer_is_refused(tmp_path, base_copy, adapter):
    (base_copy / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1")
    refuses("tokenizer.json", base_copy, adapter, tmp_path / "out")


def test_dry_run_refuses_what_the_run_would(tmp_path, base, adapter):
    change_json(adapter / "roe_adapter.json", routing_question="nobody")
    for dry_run in (True, False):
        refuses("routing_question", base, adapter, tmp_path / "out", dry_run=dry_run)


def test_base_whose_files_are_links_into_the_target_is_refused(tmp_path, base_copy, adapter):
    out, links = tmp_path / "out", tmp_path / "links"
    base_copy.rename(out)
    links.mkdir()
    for path in out.iterdir():
        (links / path.name).symlink_to(path)
    before = sorted(path.name for path in out.iterdir())
    with pytest.raises(ValueError, match="which is read: give another target"):
        graft(links, adapter, out, overwrite=True)
    assert sorted(path.name for path in out.iterdir()) == before


# ---------------------------------------- damaged files


def header_of(text):
    """A safetensors file that is nothing but its header."""
    return struct.pack("<Q", len(text)) + text.encode()


@pytest.mark.parametrize(
    "header, message",
    [
        ("[]", r"has a header that is \[\], expected an object"),
        ("[" * 100_000, "has no readable header"),
        ('{"a": null}', "None, expected dtype, shape and two data_offsets"),
        ('{"a": {"dtype": "F32", "shape": [1]}}', "expected dtype, shape and two data_offsets"),
        ('{"a": {"shape": [0], "data_offsets": [0, 0]}}', "expected dtype, shape and two data_offsets"),
        ('{"a": {"dtype": ["F32"], "shape": [0], "data_offsets": [0, 0]}}', "expected dtype, shape and two"),
        ('{"a": {"dtype": "F32", "shape": "x", "data_offsets": [0, 0]}}', "expected dtype, shape and two"),
        ('{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 0]}}', "expected dtype, shape and two"),
        ('{"a": {"dtype": "F32", "shape": [0], "data_offsets": [0]}}', "expected dtype, shape and two"),
        ('{"a": {"dtype": "F32", "shape": [0], "data_offsets": [4, 0]}}', "expected dtype, shape and two"),
    ],
)
def test_damaged_safetensors_header_is_refused(tmp_path, base_copy, adapter, header, message):
    (base_copy / "model.safetensors").write_bytes(header_of(header))
    refuses(rf"base.model.safetensors .*{message}", base_copy, adapter, tmp_path / "out")


@pytest.mark.parametrize(
    "index, message",
    [
        ([], "holds a list, expected an object"),
        ({"weight_map": None}, "has no readable weight_map, found None"),
        ({"weight_map": ["a"]}, r"has no readable weight_map, found \['a'\]"),
        ({"weight_map": {}}, "has no readable weight_map, found {}"),
        ({"weight_map": {"lm_head.weight": None}}, "says lm_head.weight is in None, expected the name of a file"),
        (
            {"weight_map": {"lm_head.weight": "../x.safetensors"}},
            "says lm_head.weight is in '../x.safetensors', expected",
        ),
    ],
)
def test_damaged_index_is_refused(tmp_path, base_copy, adapter, index, message):
    (base_copy / "model.safetensors").rename(base_copy / "model-00001-of-00001.safetensors")
    (base_copy / "model.safetensors.index.json").write_text(json.dumps(index))
    refuses(rf"model.safetensors.index.json {message}", base_copy, adapter, tmp_path / "out")


def test_weight_file_that_the_index_leaves_out_is_refused_whatever_its_number(tmp_path, base, adapter):
    graft(base, adapter, tmp_path / "roe")
    index = tmp_path / "roe" / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    change_json(index, weight_map={name: file for name, file in weight_map.items() if "base" not in file})
    message = r"model-base.safetensors in .*roe is missing from model.safetensors.index.json"
    refuses(message, base, tmp_path / "roe", tmp_path / "out")


def test_files_of_other_tools_beside_shards_are_no_shards(tmp_path, adapter):
    base = make_base(tmp_path / "base", **SHARDS)
    names = ["adapter_model", "consolidated", "model.fp16-00001-of-00001", "roe_adapter"]
    for name in names:
        save_file({"x": torch.zeros(1)}, base / f"{name}.safetensors")
    torch.save({}, base / "pytorch_model-00001-of-00002.bin")
    graft(base, adapter, tmp_path / "out")
    assert not any((tmp_path / "out" / f"{name}.safetensors").exists() for name in names)


@pytest.mark.parametrize(
    "content, message",
    [
        ([torch.zeros(2)], "holds a list, expected a dict of tensors"),
        (torch.zeros(2), "holds a Tensor, expected a dict of tensors"),
        (None, "holds a NoneType, expected a dict of tensors"),
        ({3: torch.zeros(2)}, "names a tensor 3, expected text"),
        ({("a", "b"): torch.zeros(2)}, r"names a tensor \('a', 'b'\), expected text"),
    ],
)
def test_bin_file_that_is_no_dict_of_tensors_is_refused(tmp_path, base_copy, adapter, content, message):
    (base_copy / "model.safetensors").unlink()
    torch.save(content, base_copy / "pytorch_model.bin")
    refuses(rf"base.pytorch_model.bin {message}", base_copy, adapter, tmp_path / "out")


@pytest.mark.parametrize("is_legacy", [False, True])
def test_bin_file_that_is_cut_anywhere_is_refused(tmp_path, base_copy, adapter, is_legacy):
    path = base_copy / "pytorch_model.bin"
    weights = load_file(base_copy / "model.safetensors")
    (base_copy / "model.safetensors").unlink()
    torch.save(weights, path, _use_new_zipfile_serialization=not is_legacy)
    content = path.read_bytes()
    lengths = {0, 1, 2, 10, 20, 60, 300, *range(1000, len(content) - 1, len(content) // 15), len(content) - 1}
    for length in sorted(lengths):
        path.write_bytes(content[:length])
        refuses(r"base.pytorch_model.bin cannot be read as tensors alone", base_copy, adapter, tmp_path / "out")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_bin_file_with_a_changed_pickle_is_refused(tmp_path, base_copy, adapter):
    path = base_copy / "pytorch_model.bin"
    (base_copy / "model.safetensors").unlink()
    torch.save({"x": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    for place in range(0, len(content) - 8, 3):
        path.write_bytes(content[:place] + b"\xff" + content[place + 1 :])
        with pytest.raises(ValueError, match=r"base|adapter"):  # always with a path, never a bare error of a library
            graft(base_copy, adapter, tmp_path / "out")


@pytest.mark.parametrize(
    "entries, message",
    [
        ({"text_config": {"hidden_size": None}}, "'hidden_size' expected int, got NoneType"),
        ({"text_config": {"hidden_size": "16"}}, "'hidden_size' expected int, got str"),
        ({"text_config": {"num_attention_heads": 0}}, "ZeroDivisionError"),
        ({"text_config": {"rope_parameters": "x"}}, "rope_parameters"),
        ({"vision_config": "x"}, "'vision_config' with value 'x'"),
        ({"vision_config": {"model_type": "nope"}}, "Unrecognized model type for subconfig: nope"),
        ({"quantization_config": "x"}, "AttributeError"),
        ({"image_token_index": "x"}, "'image_token_index' expected int, got str"),
        ({"image_token_index": 9999}, "image_token_index is 9999, expected one of 32 token ids"),
        ({"model_type": ["llava"]}, r"model_type \['llava'\], expected 'llava'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("part", ["base", "roe"])
def test_config_with_wrong_entries_is_refused_by_its_path(tmp_path, base, base_copy, adapter, part, entries, message):
    folder = base_copy
    if part == "roe":
        folder = tmp_path / "roe"
        graft(base, adapter, folder)
    content = json.loads((folder / "config.json").read_text())
    for name, value in entries.items():
        content[name] = content[name] | value if isinstance(value, dict) else value
    (folder / "config.json").write_text(json.dumps(content))
    if part == "roe":
        message = message.replace("expected 'llava'", "expected 'roe_llava'")
    pair = (folder, adapter) if part == "base" else (base, folder)
    refuses(rf"{folder}.config.json .*{message}", *pair, tmp_path / "out")


@pytest.mark.parametrize("value", ["x", ["x"], {"training": "x"}, {"base": [1]}, {"base": {"id": 3}}])
def test_provenance_of_a_wrong_type_is_refused(tmp_path, base, adapter, value):
    graft(base, adapter, tmp_path / "roe")
    change_json(tmp_path / "roe" / "config.json", roe_provenance=value)
    refuses(
        r"config.json has roe_provenance.*, expected (an object|null or text)", base, tmp_path / "roe", tmp_path / "out"
    )


def test_home_of_nobody_is_refused(tmp_path, adapter):
    message = "begins with the home of nobody known here"
    refuses(message, "~nosuchuser/base", adapter, tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        fetch_adapter("~nosuchuser/adapter", None)
