"""Adapter files: what they hold, and what is refused."""

import json

import pytest
import torch
from convert_helpers import NUM_LAYERS, change_json, change_tensors, make_base, tiny_config, train
from safetensors import safe_open
from safetensors.torch import load_file

from roe_llava.convert.adapter_file import FORMAT_VERSION, read_adapter, save_adapter
from roe_llava.convert.fingerprint import describe_base
from roe_llava.convert.state_dict import to_disk_names
from roe_llava.loading_roe import is_roe_parameter

ROUTER_1 = "language_model.model.layers.1.router.weight"
DOWN_1 = "language_model.model.layers.1.adapter.down_proj.weight"


@pytest.fixture
def model(trained):
    return trained


def test_adapter_holds_every_routing_tensor_and_nothing_else(adapter, model):
    stored = load_file(adapter / "roe_adapter.safetensors")
    own = {name: tensor for name, tensor in model.state_dict().items() if is_roe_parameter(name)}
    assert len(stored) == 3 * NUM_LAYERS + 1
    assert all(name.startswith("language_model.model.") for name in stored)
    assert all(torch.equal(stored[name], tensor) for name, tensor in to_disk_names(own).items())


def test_adapter_reads_back_what_was_saved(adapter, base, model):
    read = read_adapter(adapter)
    info = read.info
    assert (info.format_version, info.num_hidden_layers, info.hidden_size) == (FORMAT_VERSION, NUM_LAYERS, 16)
    assert info.adapter_size == 4 and info.routed_layers is None and info.training == {"steps": 3}
    assert info.base == describe_base(base) and info.base["id"] == base.name
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in read.tensors.items())
    assert not model.load_state_dict(read.tensors, strict=False).unexpected_keys


def test_adapter_of_some_layers_reads_back(tmp_path, base):
    model = train(base, routed_layers=[2])
    save_adapter(model, model.config, tmp_path / "adapter", base=base)
    assert len(read_adapter(tmp_path / "adapter").tensors) == 4


def test_adapter_keeps_dtypes(tmp_path, model):
    tensors = {name: tensor.bfloat16() for name, tensor in model.state_dict().items() if "adapter" in name}
    tensors |= {name: tensor for name, tensor in model.state_dict().items() if name not in tensors}
    save_adapter(tensors, model.config, tmp_path / "adapter")
    read = read_adapter(tmp_path / "adapter").tensors
    assert all(tensor.dtype == tensors[name].dtype for name, tensor in read.items())
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in read.items())


def test_adapter_file_is_plain_safetensors(adapter):
    with safe_open(adapter / "roe_adapter.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_fingerprint_depends_on_weights_alone(tmp_path, base):
    expected = describe_base(base)["fingerprint"]
    sharded = make_base(tmp_path / "sharded", processor=False, max_shard_size="10KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 1
    other_names = make_base(tmp_path / "names", processor=False, save_original_format=False)
    change_json(other_names / "config.json", image_seq_length=7)
    assert describe_base(sharded)["fingerprint"] == describe_base(other_names)["fingerprint"] == expected


def test_fingerprint_notices_one_changed_weight(tmp_path, base):
    tuned = make_base(tmp_path / "tuned", processor=False)
    change_tensors(tuned / "model.safetensors", lambda t: t["language_model.model.embed_tokens.weight"][7].add_(1e-6))
    assert describe_base(tuned)["fingerprint"] != describe_base(base)["fingerprint"]


def test_fingerprint_ignores_buffers_that_no_model_reads(tmp_path, base):
    old = make_base(tmp_path / "old", processor=False)
    name = "language_model.model.layers.0.self_attn.rotary_emb.inv_freq"
    change_tensors(old / "model.safetensors", lambda tensors: tensors.update({name: torch.ones(4)}))
    assert describe_base(old)["fingerprint"] == describe_base(base)["fingerprint"]


def test_fingerprint_of_a_roe_checkpoint_is_its_bases(tmp_path, base, model):
    model.save_pretrained(tmp_path / "roe")
    assert describe_base(tmp_path / "roe")["fingerprint"] == describe_base(base)["fingerprint"]


def test_existing_folder_is_overwritten_only_when_asked(adapter, model):
    with pytest.raises(ValueError, match="exists and is not empty"):
        save_adapter(model, model.config, adapter)
    save_adapter(model, model.config, adapter, training={"steps": 4}, overwrite=True)
    assert read_adapter(adapter).info.training == {"steps": 4}
    assert [path.name for path in adapter.parent.iterdir()] == ["adapter"]


def test_saving_incomplete_parts_names_them(tmp_path, model):
    tensors = {name: t for name, t in model.state_dict().items() if "layers.1.router" not in name}
    with pytest.raises(ValueError, match=r"layers\.1\.router\.weight"):
        save_adapter(tensors, model.config, tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


def test_training_summary_has_to_fit_into_json(tmp_path, model):
    with pytest.raises(ValueError, match="fit into JSON"):
        save_adapter(model, model.config, tmp_path / "adapter", training={"loss": torch.ones(1)})


def remove(name):
    return lambda tensors: tensors.pop(name)


def put(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    "change, message",
    [
        (remove(ROUTER_1), r"lacks model.language_model.layers.1.router.weight, expected 10 .* found 9"),
        (remove("language_model.model.routing_tokens.weight"), r"lacks model.language_model.routing_tokens.weight"),
        (put(DOWN_1, torch.zeros(8, 16)), r"layers.1.adapter.down_proj.weight .* shape \[8, 16\], expected \[4, 16\]"),
        (put(ROUTER_1, torch.zeros(2, 64)), r"router.weight .* shape \[2, 64\], expected \[2, 32\] for hidden size 16"),
        (put("lm_head.weight", torch.zeros(2)), r"holds lm_head.weight, expected routers, adapters and routing tokens"),
        (put("language_model.model.layers.3.router.weight", torch.zeros(2, 32)), r"layers.3.router.weight, which a"),
        (put(ROUTER_1, torch.full((2, 32), float("nan"))), r"layers.1.router.weight .* holds 64 NaN or Inf"),
        (put(ROUTER_1, torch.full((2, 32), float("inf"))), r"layers.1.router.weight .* holds 64 NaN or Inf"),
        (put(ROUTER_1, torch.zeros(2, 32, dtype=torch.int8)), r"is torch.int8, expected a floating dtype"),
    ],
)
def test_damaged_tensors_are_named(adapter, change, message):
    change_tensors(adapter / "roe_adapter.safetensors", change)
    with pytest.raises(ValueError, match=message):
        read_adapter(adapter)


def test_truncated_file_is_named(adapter):
    path = adapter / "roe_adapter.safetensors"
    content = path.read_bytes()
    for length in (len(content) - 4, 100, 4, 0):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=rf"roe_adapter.safetensors has {length} bytes"):
            read_adapter(adapter)


def test_newer_format_version_asks_for_an_update(adapter):
    change_json(adapter / "roe_adapter.json", format_version=FORMAT_VERSION + 1)
    with pytest.raises(ValueError, match="format_version 2, this program reads up to 1: update"):
        read_adapter(adapter)


def test_incomplete_json_is_named(adapter):
    change_json(adapter / "roe_adapter.json", hidden_size=None)
    with pytest.raises(ValueError, match=r"roe_adapter.json lacks hidden_size"):
        read_adapter(adapter)
    (adapter / "roe_adapter.json").write_text("{")
    with pytest.raises(ValueError, match=r"roe_adapter.json is not readable JSON"):
        read_adapter(adapter)


def test_missing_weights_are_named(adapter):
    (adapter / "roe_adapter.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no roe_adapter.safetensors"):
        read_adapter(adapter)


def test_json_needs_no_tensor_library(adapter):
    content = json.loads((adapter / "roe_adapter.json").read_text())
    assert content["routing_positions"] == "preceding" and content["base"]["revision"] is None


def test_the_base_is_never_overwritten_by_its_adapter(base_copy, trained):
    with pytest.raises(ValueError, match="which is read: give another target"):
        save_adapter(trained, trained.config, base_copy, base=base_copy, overwrite=True)
    assert (base_copy / "model.safetensors").is_file()


@pytest.mark.parametrize("record", [5, {"x": 1}, {"tensors": None}])
def test_what_is_no_record_of_a_base_is_refused(tmp_path, trained, record):
    with pytest.raises(ValueError, match="expected a folder, a Hub id, or the record"):
        save_adapter(trained, trained.config, tmp_path / "adapter", base=record)


def test_base_of_other_sizes_is_refused_when_saving(tmp_path, trained):
    other = make_base(tmp_path / "other", config=tiny_config(num_hidden_layers=2))
    with pytest.raises(ValueError, match=r"has 2 layers of hidden size \[16\], the config 3 of \[16\]"):
        save_adapter(trained, trained.config, tmp_path / "adapter", base=other)


def test_training_summary_with_nan_is_refused(tmp_path, trained):
    with pytest.raises(ValueError, match="fit into JSON"):
        save_adapter(trained, trained.config, tmp_path / "adapter", training={"loss": float("nan")})


@pytest.mark.parametrize(
    "name, value, expected",
    [
        ("num_hidden_layers", "3", "a positive integer"),
        ("num_hidden_layers", 3.0, "a positive integer"),
        ("num_hidden_layers", True, "a positive integer"),
        ("hidden_size", -16, "a positive integer"),
        ("adapter_size", 0, "a positive integer"),
        ("text_model_type", 3, "text"),
        ("routed_layers", 2, "null or a list of layer numbers"),
        ("routed_layers", ["0", 1], "null or a list of layer numbers"),
        ("routed_layers", [-1], "null or a list of layer numbers"),
        ("routing_positions", ["first"], "text"),
        ("target_skip_ratio", "0.3", "a number"),
        ("target_skip_ratio", True, "a number"),
        ("training", [3], "an object"),
        ("base", "llava", "null or an object"),
    ],
)
def test_json_entry_of_a_wrong_type_is_named(adapter, name, value, expected):
    change_json(adapter / "roe_adapter.json", **{name: value})
    with pytest.raises(ValueError, match=rf"roe_adapter.json has {name} .*, expected {expected}"):
        read_adapter(adapter)


def test_json_entry_that_is_null_is_named(adapter):
    content = json.loads((adapter / "roe_adapter.json").read_text())
    for name in ("num_hidden_layers", "hidden_size", "adapter_size", "routing_question", "target_skip_ratio"):
        (adapter / "roe_adapter.json").write_text(json.dumps(content | {name: None}))
        with pytest.raises(ValueError, match=rf"roe_adapter.json has {name} None, expected"):
            read_adapter(adapter)


@pytest.mark.parametrize(
    "entries, message",
    [
        ({"target_skip_ratio": 0.9}, r"target_skip_ratio must lie in \[0, 0.5\], got 0.9"),
        ({"target_skip_ratio": float("nan")}, r"target_skip_ratio must lie in \[0, 0.5\], got nan"),
        ({"routing_positions": "last"}, r"routing_positions must be one of .*got 'last'"),
        ({"routed_layers": [0, 0]}, r"routed_layers must be distinct .*got \[0, 0\]"),
        ({"routed_layers": [3]}, r"routed_layers must be distinct .*got \[3\]"),
    ],
)
def test_json_entry_out_of_range_is_named_with_the_file(adapter, entries, message):
    change_json(adapter / "roe_adapter.json", **entries)
    with pytest.raises(ValueError, match=rf"roe_adapter.json has an entry that cannot be: {message}"):
        read_adapter(adapter)


@pytest.mark.parametrize("version", [True, 0, -3, "1", 1.0])
def test_format_version_is_a_number_from_one_on(adapter, version):
    change_json(adapter / "roe_adapter.json", format_version=version)
    with pytest.raises(ValueError, match=rf"roe_adapter.json has format_version {version!r}, "):
        read_adapter(adapter)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda base: base.pop("id"), "lacks id in base"),
        (lambda base: base.pop("tensors"), "lacks tensors in base"),
        (lambda base: base.update(revision=3), "base.revision 3, expected null or text"),
        (
            lambda base: base.update(tensors=["lm_head.weight"]),
            r"base.tensors \['lm_head.weight'\], expected an object",
        ),
        (lambda base: base["tensors"].update({"lm_head.weight": 3}), "base.tensors .*expected an object of signatures"),
        # Without a digest, any base of those shapes would pass.
        (
            lambda base: base["tensors"].update({"lm_head.weight": "F32 [32, 16]"}),
            "base.tensors .*expected an object of signatures",
        ),
        (
            lambda base: base["tensors"].update({"lm_head.weight": "F32 [32, 16] 0123456789abcdef"}),
            "base.fingerprint '[0-9a-f]{64}', expected [0-9a-f]{64}, that of base.tensors",
        ),
        (lambda base: base.update(fingerprint="0" * 64), "base.fingerprint '0+', expected .*, that of base.tensors"),
    ],
)
def test_damaged_record_of_a_base_is_named(adapter, change, message):
    base = json.loads((adapter / "roe_adapter.json").read_text())["base"]
    change(base)
    change_json(adapter / "roe_adapter.json", base=base)
    with pytest.raises(ValueError, match=rf"roe_adapter.json (has )?{message}"):
        read_adapter(adapter)


def test_json_nested_too_deeply_is_named(adapter):
    (adapter / "roe_adapter.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"roe_adapter.json is not readable JSON: maximum recursion depth"):
        read_adapter(adapter)
