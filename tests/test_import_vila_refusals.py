"""import-vila: what it refuses, by name, and what it leaves behind with a reason."""

import json
import shutil

import pytest
import torch
from convert_helpers import bytes_of, change_json, weights_of
from golden_vila_helpers import CHECKPOINTS, FOLDER
from vila_helpers import change_part, vila_source

from roe_llava.convert.import_llava import import_llava
from roe_llava.convert.import_vila import import_vila


def refuses(match, source, **options):
    out = source.parent / "out"
    with pytest.raises(ValueError, match=match):
        import_vila(source, out, **options)
    assert not out.exists() and not list(source.parent.glob(".out*"))


@pytest.mark.parametrize("model", ["linear", "v15"])
def test_import_llava_names_the_command_that_is_meant(tmp_path, model):
    with pytest.raises(ValueError, match="import-vila"):
        import_llava(FOLDER / CHECKPOINTS[model], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "entries, match",
    [
        ({"s2": True}, r"config.json has s2 True, .*several scales"),
        ({"mm_use_im_start_end": True}, r"has mm_use_im_start_end True"),
        ({"image_aspect_ratio": "dynamic"}, r"has image_aspect_ratio 'dynamic', expected one of None, pad, resize"),
        ({"mm_vision_select_feature": "patch"}, r"'patch' with a SigLIP tower, expected 'cls_patch'"),
        ({"mm_vision_select_feature": "all"}, r"has mm_vision_select_feature 'all', expected one of"),
        ({"mm_vision_select_layer": -7}, r"mm_vision_select_layer is -7, expected a layer of a tower that has 4"),
        ({"vision_resolution": 3}, r"has vision_resolution 3, expected -1"),
        ({"vision_resolution": "big"}, r"has vision_resolution 'big', expected -1"),
        ({"vision_resolution": 72, "interpolate_mode": "bicubic"}, r"interpolate_mode 'bicubic', expected 'linear'"),
        ({"model_type": "llava_mistral"}, r"model_type 'llava_mistral', expected 'llava_llama': only LLaMA"),
        ({"quantization_config": {"bits": 4}}, r"has quantization_config .* 16 or 32 bits"),
    ],
    ids=str,
)
def test_entries_that_cannot_be_imported_are_named(tmp_path, entries, match):
    source = vila_source(tmp_path, "v15")
    content = json.loads((source / "config.json").read_text()) | entries
    (source / "config.json").write_text(json.dumps(content))
    refuses(match, source)


@pytest.mark.parametrize(
    "part, entries, match",
    [
        ("llm", {"model_type": "mistral"}, r"llm/config.json has model_type 'mistral', expected 'llama'"),
        ("llm", {"model_type": "gemma"}, r"llm/config.json has model_type 'gemma', expected 'llama'"),
        ("llm", {"hidden_size": "wide"}, r"llm/config.json has no number for hidden_size"),
        ("llm", {"vocab_size": 161}, r"llm/config.json has vocab_size 161, but model.embed_tokens.weight"),
        ("llm", {"num_hidden_layers": 3}, r"llm/config.json has num_hidden_layers 3, found tensors of 4 layers"),
        ("vision_tower", {"model_type": "intern_vit_6b"}, r"model_type 'intern_vit_6b', .*InternViT"),
        ("vision_tower", {"model_type": "radio"}, r"model_type 'radio', .*RADIO"),
        (
            "vision_tower",
            {"image_size": 57},
            r"position_embedding.weight in .* has shape \[729, 24\], expected \[784, 24\]",
        ),
        ("vision_tower", {"num_hidden_layers": 3}, r"has num_hidden_layers 3, found tensors of 4 layers"),
        ("vision_tower", {"patch_size": 0}, r"vision_tower/config.json does not hold"),
        ("mm_projector", {"mm_projector_type": "resampler"}, r"projector_type 'resampler' is not supported"),
        ("mm_projector", {"mm_projector_type": None}, r"has mm_projector_type None, expected the name"),
        ("mm_projector", {"mm_projector_type": "linear"}, r"layers.1.bias in .*mm_projector.* is no tensor of linear"),
        ("mm_projector", {"mm_projector_type": "identity"}, r"layers.1.bias in .* is no tensor of identity"),
    ],
    ids=str,
)
def test_parts_that_cannot_be_imported_are_named(tmp_path, part, entries, match):
    source = vila_source(tmp_path, "v15")
    content = json.loads((source / part / "config.json").read_text()) | entries
    (source / part / "config.json").write_text(json.dumps(content))
    change_json(source / "config.json", **{f"{part}_cfg": part})
    refuses(match, source)


def test_configs_that_contradict_each_other_are_refused(tmp_path):
    source = vila_source(tmp_path, "v15")
    change_json(source / "mm_projector" / "config.json", mm_projector_type="linear")
    refuses(r"mm_projector/config.json has mm_projector_type 'linear', mm_projector_cfg in .* 'mlp_downsample'", source)


@pytest.mark.parametrize("part", ["llm", "vision_tower", "mm_projector"])
def test_a_missing_part_is_named(tmp_path, part):
    source = vila_source(tmp_path, "v15")
    shutil.rmtree(source / part)
    refuses(rf"{part}/config.json is missing: a VILA-1.5 checkpoint has the folders llm, vision_tower, mm_proj", source)


@pytest.mark.parametrize("part", ["llm", "vision_tower", "mm_projector"])
def test_missing_weights_of_a_part_are_named(tmp_path, part):
    source = vila_source(tmp_path, "v15")
    (source / part / "model.safetensors").unlink()
    refuses(rf"{part} is not a checkpoint folder", source)


@pytest.mark.parametrize(
    "part, lost, match",
    [
        ("llm", "model.layers.2.mlp.up_proj.weight", r"lacks llm/model.layers.2.mlp.up_proj.weight"),
        ("vision_tower", "vision_model.post_layernorm.bias", r"lacks vision_tower/vision_model.post_layernorm.bias"),
        ("mm_projector", "layers.4.weight", r"lacks mm_projector/layers.4.weight"),
    ],
)
def test_a_lost_tensor_is_named_as_published(tmp_path, part, lost, match):
    source = vila_source(tmp_path, "v15")
    change_part(source / part, lambda weights: weights.pop(lost))
    refuses(match, source)


def test_a_lost_tensor_of_v1_is_named_as_published(tmp_path):
    source = vila_source(tmp_path, "linear")
    change_part(source, lambda weights: weights.pop("model.mm_projector.weight"))
    refuses(r"lacks model.mm_projector.weight", source)


@pytest.mark.parametrize(
    "part, name, match",
    [
        ("llm", "model.layers.0.self_attn.q_norm.weight", r"is no tensor of a LLaMA"),
        ("vision_tower", "vision_model.embeddings.cls.weight", r"is no tensor of the model"),
        (
            "vision_tower",
            "text_model.embeddings.weight",
            r"text_model.embeddings.weight in .* is no tensor of a vision",
        ),
        ("mm_projector", "layers.3.weight", r"layers.3.weight in .* is no tensor of mlp_downsample"),
    ],
)
def test_an_unknown_tensor_is_named(tmp_path, part, name, match):
    source = vila_source(tmp_path, "v15")
    change_part(source / part, lambda weights: weights.update({name: torch.ones(2)}))
    refuses(match, source)


def test_a_tensor_of_another_shape_is_named(tmp_path):
    source = vila_source(tmp_path, "v15")
    change_part(source / "mm_projector", lambda weights: weights.update({"layers.1.weight": torch.ones(95)}))
    refuses(r"layers.1.weight in .* has shape \[95\], expected \[96\]", source)


def test_rotary_frequencies_of_another_base_are_refused(tmp_path):
    source = vila_source(tmp_path, "v15")
    wrong = {"model.layers.0.self_attn.rotary_emb.inv_freq": 1 / 500.0 ** (torch.arange(0, 16, 2) / 16)}
    change_part(source / "llm", lambda weights: weights.update(wrong))
    refuses(r"inv_freq in .* does not hold the 8 rotary frequencies of rope_theta 10000", source)


def test_buffers_are_dropped_with_a_reason(tmp_path):
    source = vila_source(tmp_path, "v15")
    right = {"model.layers.0.self_attn.rotary_emb.inv_freq": 1 / 10000.0 ** (torch.arange(0, 16, 2) / 16)}
    change_part(source / "llm", lambda weights: weights.update(right))
    positions = {"vision_model.embeddings.position_ids": torch.arange(729)[None]}
    change_part(source / "vision_tower", lambda weights: weights.update(positions))
    dropped = import_vila(source, tmp_path / "out").dropped
    assert (
        dropped["llm/model.layers.0.self_attn.rotary_emb.inv_freq"] == "rotary frequencies are computed from the config"
    )
    assert "positions are counted" in dropped["vision_tower/vision_model.embeddings.position_ids"]


def test_a_tower_given_to_15_is_refused(tmp_path):
    source = vila_source(tmp_path, "v15")
    refuses(r"which has its own in vision_tower/: leave --vision-tower out", source, vision_tower="x")


def test_a_given_tower_of_v1_is_taken(tmp_path):
    source = vila_source(tmp_path, "linear")
    (tmp_path / "vision_tower_clip").rename(tmp_path / "elsewhere")
    refuses(r"vision tower of .* cannot be found.*--vision-tower", source)
    import_vila(source, tmp_path / "out", vision_tower=tmp_path / "elsewhere")
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    assert content["vision_config"]["image_size"] == 42


def test_a_tower_beside_v1_is_taken(tmp_path):
    source = vila_source(tmp_path, "linear")
    inside = "model.vision_tower."

    def cut(weights):
        for name in [name for name in weights if name.startswith(inside)]:
            del weights[name]

    change_part(source, cut)
    import_vila(source, tmp_path / "out")
    import_vila(FOLDER / "checkpoint_v1_linear", tmp_path / "whole")
    ours, theirs = weights_of(tmp_path / "out"), weights_of(tmp_path / "whole")
    assert {name: bytes_of(one) for name, one in ours.items()} == {name: bytes_of(one) for name, one in theirs.items()}


def test_other_folders_are_refused(tmp_path):
    import_vila(FOLDER / "checkpoint_v1_mlp2x", tmp_path / "stock")
    with pytest.raises(ValueError, match=r"has a text_config .* in the layout of llava-hf already"):
        import_vila(tmp_path / "stock", tmp_path / "out")
    import_vila(FOLDER / "checkpoint_v15", tmp_path / "ours")
    with pytest.raises(ValueError, match=r"has a text_config .*already"):
        import_vila(tmp_path / "ours", tmp_path / "out")
    with pytest.raises(ValueError, match=r"is not a checkpoint folder, and no Hub id"):
        import_vila(tmp_path / "nothing" / "here" / "at", tmp_path / "out")
