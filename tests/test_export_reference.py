"""export-reference: there and back is the identity on every tensor; what cannot be expressed there is refused."""

import json
import shutil

import pytest
import torch
from convert_helpers import change_json, change_tensors, make_base, tiny_config, train
from original_helpers import (
    FORM_IDS,
    FORMS,
    GOLDEN,
    INSIDE,
    change_weights,
    golden_source,
    llama_tokenizer,
    make_original,
    read_weights,
)

from roe_llava import RoeLlavaForConditionalGeneration
from roe_llava.cli import main
from roe_llava.convert.adapter_file import save_adapter
from roe_llava.convert.export_reference import export_reference
from roe_llava.convert.graft import graft
from roe_llava.convert.import_llava import import_llava
from roe_llava.convert.import_reference import import_reference
from roe_llava.loading_roe import is_roe_parameter


def same(ours, theirs):
    """Whether names, shapes, dtypes and bytes are equal."""
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    return all(
        (ours[name].dtype, ours[name].shape) == (theirs[name].dtype, theirs[name].shape)
        and torch.equal(ours[name].contiguous().view(torch.uint8), theirs[name].contiguous().view(torch.uint8))
        if theirs[name].dim()
        else torch.equal(ours[name], theirs[name])
        for name in theirs
    )


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    parent = tmp_path_factory.mktemp("imported")
    import_reference(golden_source(parent), parent / "roe")
    return parent / "roe"


@pytest.fixture
def imported(tmp_path, shared):
    """A copy to change."""
    return shutil.copytree(shared, tmp_path / "roe")


@pytest.mark.parametrize("form", FORMS, ids=FORM_IDS)
def test_there_and_back_is_the_identity_on_every_tensor(tmp_path, form):
    source = golden_source(tmp_path, *form)
    import_reference(source, tmp_path / "roe")
    export_reference(tmp_path / "roe", tmp_path / "back")
    assert same(read_weights(tmp_path / "back"), read_weights(source))
    if form[1] == "beside":
        assert same(read_weights(tmp_path / "back" / "vision_tower"), read_weights(tmp_path / "vision_tower"))
    recorded = json.loads((source / "config.json").read_text())
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == recorded


def half(weights):
    """In half precision, as 7B checkpoints are, buffers included."""
    for name, tensor in weights.items():
        weights[name] = tensor.half()
    weights[f"{INSIDE}vision_model.embeddings.position_ids"] = torch.arange(5)[None]


def test_half_precision_and_both_kinds_of_buffers_come_back(tmp_path):
    source = golden_source(tmp_path)
    change_weights(source, half)
    summary = import_reference(source, tmp_path / "roe")
    assert "positions are counted" in summary.dropped[f"{INSIDE}vision_model.embeddings.position_ids"]
    export_reference(tmp_path / "roe", tmp_path / "back")
    assert same(read_weights(tmp_path / "back"), read_weights(source))


def test_buffers_of_a_tower_beside_come_back(tmp_path):
    source = golden_source(tmp_path, "bin", "beside")
    positions = {"vision_model.embeddings.position_ids": torch.arange(5)[None]}
    change_weights(tmp_path / "vision_tower", lambda weights: weights.update(positions))
    import_reference(source, tmp_path / "roe")
    export_reference(tmp_path / "roe", tmp_path / "back")
    assert same(read_weights(tmp_path / "back" / "vision_tower"), read_weights(tmp_path / "vision_tower"))


def test_rotary_buffers_that_were_rounded_otherwise_come_back_as_they_were(tmp_path):
    source = golden_source(tmp_path)
    change_weights(source, lambda w: w["model.layers.3.self_attn.rotary_emb.inv_freq"].mul_(1 + 2**-23))
    import_reference(source, tmp_path / "roe")
    export_reference(tmp_path / "roe", tmp_path / "back")
    assert same(read_weights(tmp_path / "back"), read_weights(source))


def test_an_export_imports_again(tmp_path, imported):
    for place in ("inside", "beside"):
        export_reference(imported, tmp_path / place, vision_tower=place)
        inside = [name for name in read_weights(tmp_path / place) if name.startswith(INSIDE)]
        assert bool(inside) == (place == "inside")
        import_reference(tmp_path / place, tmp_path / f"{place}_again")
        assert same(read_weights(tmp_path / f"{place}_again"), read_weights(imported))


def test_config_says_the_dtype_a_model_was_saved_in(tmp_path, imported):
    RoeLlavaForConditionalGeneration.from_pretrained(imported, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    export_reference(tmp_path / "half", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    weights = read_weights(tmp_path / "back")
    assert weights["lm_head.weight"].dtype == torch.bfloat16 and len(weights["lm_head.weight"]) == 128


def test_a_trained_and_saved_model_is_exported_with_its_weights(tmp_path, imported):
    model = RoeLlavaForConditionalGeneration.from_pretrained(imported)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if is_roe_parameter(name):
            parameter.data = torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "trained")
    export_reference(tmp_path / "trained", tmp_path / "back")
    back, old = read_weights(tmp_path / "back"), torch.load(GOLDEN / "pytorch_model.bin", weights_only=True)
    routing = {name for name in old if "adapter" in name}
    assert same({n: t for n, t in back.items() if n not in routing}, {n: t for n, t in old.items() if n not in routing})
    layers = model.model.language_model.layers
    assert torch.equal(back["model.layers.4.adapter_MHA_router.expert.0.weight"], layers[4].router.weight)
    assert torch.equal(back["model.layers.4.adapter_MHA.conv_A.weight"], layers[4].adapter.down_proj.weight)
    assert torch.equal(back["model.layers.4.adapter_MHA.conv_B.weight"], layers[4].adapter.up_proj.weight)
    tokens = model.model.language_model.routing_tokens.weight
    assert torch.equal(back["model.adapter_text_token.weight"], tokens[1:])


def test_a_grafted_model_is_exported_and_imported_with_the_same_logits(tmp_path):
    base = make_base(tmp_path / "base")
    model = train(base, routing_positions="first", routing_question="all_text")
    save_adapter(model, model.config, tmp_path / "adapter", base=base)
    graft(base, tmp_path / "adapter", tmp_path / "roe")
    summary = export_reference(tmp_path / "roe", tmp_path / "published")
    assert "vocabulary" not in summary.lines and "positions" not in summary.lines
    flat = json.loads((tmp_path / "published" / "config.json").read_text())
    assert flat["model_type"] == "llava_llama" and flat["vocab_size"] == 32 and flat["mm_hidden_size"] == 16
    import_reference(tmp_path / "published", tmp_path / "again")
    again = RoeLlavaForConditionalGeneration.from_pretrained(tmp_path / "again").eval()
    inputs = {"input_ids": torch.tensor([[1, 4, 4, 4, 4, 8, 9]]), "pixel_values": torch.randn(1, 3, 28, 28)}
    new = inputs | {"input_ids": inputs["input_ids"].where(inputs["input_ids"] != 4, 32)}
    with torch.no_grad():
        assert torch.equal(again(**new).logits[..., :32], model.eval()(**inputs).logits)


def test_a_model_grafted_onto_an_imported_base_loses_the_added_rows(tmp_path):
    source, _ = make_original(tmp_path)
    import_llava(source, tmp_path / "base")
    model = train(tmp_path / "base")
    save_adapter(model, model.config, tmp_path / "adapter", base=tmp_path / "base")
    graft(tmp_path / "base", tmp_path / "adapter", tmp_path / "roe")
    export_reference(tmp_path / "roe", tmp_path / "published")
    back = {name: t for name, t in read_weights(tmp_path / "published").items() if "adapter" not in name}
    assert same(back, read_weights(source))


def test_the_original_tokenizer_and_licence_come_back(tmp_path):
    source, tokenizer = golden_source(tmp_path), llama_tokenizer()

    def widen(weights):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            weights[name] = torch.randn(len(tokenizer), 64)

    change_weights(source, widen)
    change_json(source / "config.json", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(source)
    (source / "generation_config.json").write_text('{"max_length": 99, "pad_token_id": 0, "bos_token_id": 1}')
    (source / "LICENSE").write_text("Llama 2")
    import_reference(source, tmp_path / "roe")
    export_reference(tmp_path / "roe", tmp_path / "back")
    for name in ("tokenizer.json", "tokenizer_config.json", "LICENSE"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()
    settings = json.loads((tmp_path / "back" / "generation_config.json").read_text())
    assert settings == {"max_length": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    images = json.loads((tmp_path / "back" / "vision_tower" / "preprocessor_config.json").read_text())
    assert images["image_processor_type"] == "CLIPImageProcessor" and "do_pad" not in images
    assert images["crop_size"] == {"height": 28, "width": 28}


def test_a_changed_vocabulary_is_not_cut(tmp_path, imported):
    model = RoeLlavaForConditionalGeneration.from_pretrained(imported)
    model.resize_token_embeddings(200)
    model.save_pretrained(tmp_path / "wider")
    summary = export_reference(tmp_path / "wider", tmp_path / "back")
    assert read_weights(tmp_path / "back")["lm_head.weight"].shape[0] == 200
    assert json.loads((tmp_path / "back" / "config.json").read_text())["vocab_size"] == 200
    assert "made anew" in summary.lines["config"] and "vocabulary" not in summary.lines


def test_summary_names_what_published_inference_does_otherwise(tmp_path):
    model = train(make_base(tmp_path / "base"))
    model.save_pretrained(tmp_path / "roe")
    lines = export_reference(tmp_path / "roe", tmp_path / "back", dry_run=True).lines
    assert "has 1024 written in" in lines["width"] and "'preceding'" in lines["positions"]
    assert "'last_turn'" in lines["question"] and not (tmp_path / "back").exists()


def test_command_line(tmp_path, imported, capsys):
    arguments = ["export-reference", str(imported), str(tmp_path / "out"), "--vision-tower", "beside"]
    assert main([*arguments, "--dry-run"]) == 0 and not (tmp_path / "out").exists()
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "cut by the 64 rows" in printed and "6 that the import had left out are written again" in printed
    assert main(arguments) == 2 and "exists and is not empty" in capsys.readouterr().err


# ---------------------------------------- bad input


def refuses(match, source, **kwargs):
    out = source.parent / "out"
    with pytest.raises(ValueError, match=match):
        export_reference(source, out, **kwargs)
    assert not out.exists() and not list(source.parent.glob(".out*"))


def test_other_decoders_are_refused(tmp_path):
    base = make_base(tmp_path / "base", config=tiny_config("mistral"))
    train(base).save_pretrained(tmp_path / "roe")
    refuses(r"text_config.model_type 'mistral', the published code can express 'llama'", tmp_path / "roe")


def test_biases_that_the_published_decoder_does_not_have_are_refused(tmp_path):
    base = make_base(tmp_path / "base", config=tiny_config(attention_bias=True))
    train(base).save_pretrained(tmp_path / "roe")
    refuses(r"text_config.attention_bias True, the published code can express False", tmp_path / "roe")


def test_layers_without_a_router_are_refused(tmp_path):
    train(make_base(tmp_path / "base"), routed_layers=[1, 2]).save_pretrained(tmp_path / "roe")
    refuses(r"routed_layers \[1, 2\], the published code can express none or all", tmp_path / "roe")


@pytest.mark.parametrize(
    "entries, message",
    [
        ({"model_type": "llava"}, r"model_type 'llava', expected 'roe_llava'"),
        ({"text_config": None}, r"config.json has no text_config"),
        ({"vision_config": None}, r"config.json has no vision_config"),
        ({"vision_feature_layer": [-2, -3]}, r"vision_feature_layer \[-2, -3\]"),
        ({"projector_hidden_act": "relu"}, r"projector_hidden_act 'relu', the published code can express 'gelu'"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"quantization_config .*can express none"),
        ({"adapter_size": 8}, r"adapter.down_proj.weight in .* has shape \[16, 64\], expected \[8, 64\]"),
        ({"original_layout": {"format_version": 2}}, r"format_version 2, this program reads up to 1: update"),
        ({"original_layout": {}}, r"format_version None, this program reads up to 1"),
        (
            {"original_layout": {"format_version": 1}},
            r"original_layout in .*config.json lacks vocab_size, padded_vocab",
        ),
        ({"image_token_index": 9999}, r"config.json does not hold .*image_token_index is 9999, expected one of 192"),
        ({"adapter_size": 0}, r"config.json does not hold what .*adapter_size must be a positive integer, got 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_config_that_cannot_be_exported_is_refused(imported, entries, message):
    change_json(imported / "config.json", **entries)
    refuses(message, imported)


@pytest.mark.parametrize(
    "file, change, message",
    [
        ("roe", lambda w: w.pop("language_model.model.layers.2.router.weight"), r"lacks .*layers.2.router.weight"),
        (
            "00001-of-00001",
            lambda w: w.update(x=torch.ones(1)),
            r"x in .*00001.safetensors is no tensor of a RoE-LLaVA",
        ),
        (
            "00001-of-00001",
            lambda w: w["language_model.model.norm.weight"][:1].fill_(float("nan")),
            r"language_model.model.norm.weight in .*00001.safetensors .*holds NaN or Inf",
        ),
        (
            "00001-of-00001",
            lambda w: w.update({"language_model.model.layers.7.mlp.up_proj.weight": torch.ones(1)}),
            r"layers.7.mlp.up_proj.weight in .*00001.safetensors is no tensor of the model",
        ),
    ],
    ids=["router", "unknown", "nan", "layer"],
)
def test_bad_tensors_are_refused_by_name(imported, file, change, message):
    (imported / "model.safetensors.index.json").unlink()
    change_tensors(imported / f"model-{file}.safetensors", change)
    index = {n: p.name for p in imported.glob("*.safetensors") for n in read_names(p)}
    (imported / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    refuses(message, imported)


def read_names(path):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return list(file.keys())


def test_missing_shard_is_refused(imported):
    (imported / "model-roe.safetensors").unlink()
    refuses(r"lists model-roe.safetensors, which is not in", imported)


def test_place_of_the_tower_is_one_of_two(imported):
    refuses("vision_tower must be 'inside' or 'beside', got 'elsewhere'", imported, vision_tower="elsewhere")


def change_origin(folder, **entries):
    """Edit what an import kept in config.json for the way back."""
    origin = json.loads((folder / "config.json").read_text())["original_layout"]
    change_json(folder / "config.json", original_layout=origin | entries)


ROTARY = "model.layers.0.self_attn.rotary_emb.inv_freq"


@pytest.mark.parametrize(
    "entries, message",
    [
        ({"format_version": True}, "format_version True, this program reads up to 1"),
        ({"format_version": 0}, "format_version 0, this program reads up to 1"),
        ({"vocab_size": 0}, "vocab_size 0 and padded_vocab_size 192, expected positive integers"),
        ({"vocab_size": True}, "vocab_size True and padded_vocab_size 192, expected positive"),
        ({"vocab_size": -5}, "vocab_size -5 and padded_vocab_size 192, expected positive"),
        ({"vocab_size": 10}, "vocab_size 10, its config has vocab_size 128"),
        ({"vocab_size": 10**6}, "vocab_size 1000000 and padded_vocab_size 192, expected .*not below"),
        ({"vision_tower": "junk"}, "vision_tower 'junk', expected 'inside' or 'beside'"),
        ({"config": {}}, "its config has vocab_size None"),
        ({"config": {"vocab_size": 128, "mm_vision_tower": 3}}, "mm_vision_tower 3, expected one size and a name"),
        ({"config": {"vocab_size": 128}}, "KeyError: 'model_type'"),
        ({"config": {"vocab_size": 128, "model_type": "junk"}}, "KeyError: 'junk'"),
        (
            {"config": {"vocab_size": 128, "model_type": "llava_llama", "hidden_size": "a"}},
            "'hidden_size' expected int",
        ),
        ({"buffers": [1]}, "describes a buffer as 1, which cannot be made"),
        ({"buffers": [{}]}, "describes a buffer as {}, which cannot be made"),
        ({"buffers": [{"names": [ROTARY], "dtype": "X", "shape": [1], "values": None}]}, "which cannot be made"),
        ({"buffers": [{"names": [ROTARY], "dtype": "F32", "shape": [9], "values": "00" * 4}]}, "which cannot be made"),
        ({"buffers": [{"names": [ROTARY], "dtype": "F32", "shape": [1], "values": "zz"}]}, "which cannot be made"),
        ({"buffers": [{"names": [ROTARY], "dtype": "I64", "shape": [], "values": None}]}, "which cannot be made"),
        (
            {"buffers": [{"names": ["model.norm.weight"], "dtype": "F32", "shape": [1], "values": "00" * 4}]},
            "describes 'model.norm.weight' as a buffer, expected rotary",
        ),
        ({"buffers": [{"names": [3], "dtype": "F32", "shape": [1], "values": "00" * 4}]}, "describes 3 as a buffer"),
    ],
)
def test_edited_record_of_an_import_is_refused(imported, entries, message):
    change_origin(imported, **entries)
    refuses(rf"roe.config.json .*{message}", imported)


@pytest.mark.parametrize("value", ["x", [1]])
def test_record_of_an_import_that_is_no_object_is_refused(imported, value):
    change_json(imported / "config.json", original_layout=value)
    refuses(r"original_layout in .*config.json is .*, expected an object", imported)


def test_tied_embeddings_with_an_output_layer_of_its_own_are_refused(imported):
    change_json(imported / "config.json", tie_word_embeddings=True)
    refuses(r"config.json has tie_word_embeddings true, but .*lm_head.weight in .* is not .*embed_tokens", imported)


def test_companions_that_cannot_be_exported_are_refused_before_anything_is_written(tmp_path, imported):
    settings = imported / "generation_config.json"
    for text, message in (
        ('{"suppress_tokens": 5}', "has suppress_tokens 5, expected null or a list of token ids"),
        ('{"suppress_tokens": ["a"]}', r"has suppress_tokens \['a'\], expected"),
        ("{", "is not readable JSON"),
    ):
        settings.write_text(text)
        refuses(rf"generation_config.json {message}", imported)
        refuses(rf"generation_config.json {message}", imported, dry_run=True)
    settings.unlink()
    (imported / "processor_config.json").write_text('{"image_processor": "x"}')
    refuses("^[^ ]*processor_config.json has image_processor 'x', expected an object", imported)


def test_tensor_under_names_of_two_layouts_is_refused(imported):
    path = next(imported.glob("model-*-of-*.safetensors"))
    name = "model.language_model.norm.weight"
    change_tensors(path, lambda tensors: tensors.update({name: torch.zeros(64)}))
    weight_map = json.loads((imported / "model.safetensors.index.json").read_text())["weight_map"]
    change_json(imported / "model.safetensors.index.json", weight_map=weight_map | {name: path.name})
    refuses("norm.weight in .* and .*norm.weight in .* are two names of one tensor", imported)
