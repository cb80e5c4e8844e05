"""Saving and loading: stock checkpoints whole, routed ones complete or not at all."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tiny import NUM_LAYERS, PATTERN, layers_of

from roe_llava import RoeLlavaConfig, RoeLlavaForConditionalGeneration, RoeLlavaModel

NEW = [
    f"model.language_model.layers.{layer}.{part}.weight"
    for layer in range(NUM_LAYERS)
    for part in ("router", "adapter.down_proj", "adapter.up_proj")
] + ["model.language_model.routing_tokens.weight"]


pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture(scope="module")
def stock_folder(tmp_path_factory):
    """A stock LLaVA as `save_pretrained` of Transformers writes it, and the model."""
    folder = tmp_path_factory.mktemp("stock")
    stock = tiny.stock_of(tiny.routed_model())
    stock.save_pretrained(folder)
    return folder, stock


@pytest.fixture(scope="module")
def roe_folder(tmp_path_factory):
    """A saved routed model."""
    folder = tmp_path_factory.mktemp("roe")
    tiny.routed_model().save_pretrained(folder)
    return folder


def without(folder, target, names):
    """A copy of a saved folder that lacks some tensors."""
    tensors = load_file(folder / "model.safetensors")
    lacking = {name: tensor for name, tensor in tensors.items() if name not in names}
    assert len(lacking) == len(tensors) - len(names)
    save_file(lacking, target / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "generation_config.json"):
        (target / name).write_text((folder / name).read_text())
    return target


# ---------------------------------------- stock checkpoints


def test_a_stock_checkpoint_loads_whole(stock_folder):
    folder, stock = stock_folder
    model, info = RoeLlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    base = stock.state_dict()
    ours = model.state_dict()
    assert sorted(info["missing_keys"]) == sorted(NEW) == sorted(set(ours) - set(base))
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    for name, tensor in base.items():
        assert torch.equal(ours[name], tensor), name


def test_a_checkpoint_under_llava_hfs_old_names_loads_whole(stock_folder, tmp_path):
    folder, stock = stock_folder
    old = {"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head."}
    tensors = {}
    for name, tensor in stock.state_dict().items():
        for new_name, old_name in {**old, "model.": ""}.items():
            if name.startswith(new_name):
                name = old_name + name[len(new_name) :]
                break
        tensors[name] = tensor.contiguous().clone()
    assert any(name.startswith("language_model.model.layers.0.") for name in tensors)
    assert any(name.startswith("multi_modal_projector.") for name in tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    model, info = RoeLlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert sorted(info["missing_keys"]) == sorted(NEW)
    for name, tensor in stock.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_a_stock_checkpoint_with_every_layer_kept_equals_stock_llava(stock_folder):
    folder, stock = stock_folder
    model = RoeLlavaForConditionalGeneration.from_pretrained(folder)
    inputs = tiny.batch()
    ours = model(**inputs, routes=[True] * NUM_LAYERS)
    assert torch.equal(ours.logits, stock(**inputs).logits)
    assert model.config.model_type == "roe_llava"


def test_a_stock_checkpoint_warns_that_routing_is_untrained(stock_folder, monkeypatch):
    from roe_llava import loading_roe

    said = []
    monkeypatch.setattr(loading_roe.logger, "warning", said.append)
    RoeLlavaForConditionalGeneration.from_pretrained(stock_folder[0])
    assert "13 of the 13 routing tensors" in said[0] and "untrained" in said[0]


def test_fresh_routing_parts_are_finite_and_close_to_the_identity(stock_folder):
    model = RoeLlavaForConditionalGeneration.from_pretrained(stock_folder[0])
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        if name in NEW:
            assert parameter.any(), name
    hidden = torch.randn(1, 5, tiny.HIDDEN)
    assert layers_of(model)[0].adapter(hidden).abs().max() < 0.1


def test_options_given_with_a_stock_checkpoint_take_effect(stock_folder):
    model = RoeLlavaForConditionalGeneration.from_pretrained(
        stock_folder[0], adapter_size=5, routed_layers=[1, 2], routing_positions="first"
    )
    assert [layer.router is not None for layer in layers_of(model)] == [False, True, True, False]
    assert layers_of(model)[1].adapter.down_proj.weight.shape == (5, tiny.HIDDEN)
    assert model.config.routing_positions == "first"


def test_a_stock_checkpoint_that_lacks_a_base_tensor_is_an_error(stock_folder, tmp_path):
    names = load_file(stock_folder[0] / "model.safetensors")
    name = next(key for key in names if key.endswith("layers.2.mlp.up_proj.weight"))
    folder = without(stock_folder[0], tmp_path, [name])
    with pytest.raises(ValueError, match=r"lacks 14 tensors.*13 of its 13 routing tensors"):
        RoeLlavaForConditionalGeneration.from_pretrained(folder)


def test_a_converted_stock_checkpoint_saves_and_reloads(stock_folder, tmp_path):
    model = RoeLlavaForConditionalGeneration.from_pretrained(stock_folder[0], adapter_size=8)
    model.save_pretrained(tmp_path)
    again, info = RoeLlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


# ---------------------------------------- routed checkpoints


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_saved_model_reloads_to_the_bit(family, tmp_path):
    model = tiny.routed_model(family)
    model.save_pretrained(tmp_path)
    again = RoeLlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert not again.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    inputs = tiny.batch()
    ours, base = again(**inputs), model(**inputs)
    assert torch.equal(ours.logits, base.logits) and torch.equal(ours.routes, PATTERN)


def test_a_model_saved_in_shards_reloads(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    again = RoeLlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(again(**tiny.batch()).logits, model(**tiny.batch()).logits)


def test_base_tensors_keep_llava_hfs_names_on_disk(roe_folder, stock_folder):
    ours, stock = (set(load_file(folder / "model.safetensors")) for folder in (roe_folder, stock_folder[0]))
    assert stock < ours
    assert all("router" in name or "adapter" in name or "routing_tokens" in name for name in ours - stock)
    assert len(ours - stock) == len(NEW)


def test_a_saved_configuration_says_how_to_open_the_folder(roe_folder):
    config = json.loads((roe_folder / "config.json").read_text())
    assert config["model_type"] == "roe_llava"
    assert set(config["auto_map"]) >= {"AutoConfig", "AutoModel", "AutoModelForImageTextToText"}
    assert RoeLlavaConfig.from_pretrained(roe_folder).adapter_size == 8


@pytest.mark.parametrize("part", ["layers.2.router", "layers.1.adapter.up_proj", "routing_tokens"])
def test_a_routed_checkpoint_that_lacks_a_tensor_is_an_error_that_names_it(roe_folder, tmp_path, part):
    name = next(key for key in load_file(roe_folder / "model.safetensors") if f"{part}.weight" in key)
    folder = without(roe_folder, tmp_path, [name])
    with pytest.raises(ValueError, match=rf"lacks 1 tensors.*1 of its 13 routing tensors.*{part}\.weight"):
        RoeLlavaForConditionalGeneration.from_pretrained(folder)


def test_a_routed_checkpoint_that_lacks_all_routing_parts_is_an_error(roe_folder, tmp_path):
    names = [name for name in load_file(roe_folder / "model.safetensors") if "rout" in name or "adapter" in name]
    folder = without(roe_folder, tmp_path, names)
    with pytest.raises(ValueError, match=r"lacks 13 tensors.* and 8 more.*shard lost.*stock"):
        RoeLlavaForConditionalGeneration.from_pretrained(folder)


def test_a_routed_checkpoint_that_lacks_a_base_tensor_is_an_error_even_if_untrained_is_allowed(roe_folder, tmp_path):
    names = load_file(roe_folder / "model.safetensors")
    name = next(key for key in names if key.endswith("layers.2.mlp.up_proj.weight"))
    folder = without(roe_folder, tmp_path, [name])
    for allowed in (False, True):
        with pytest.raises(ValueError, match=r"layers\.2\.mlp\.up_proj\.weight"):
            RoeLlavaForConditionalGeneration.from_pretrained(folder, allow_untrained=allowed)


def test_missing_routing_parts_are_initialised_where_that_is_asked_for(roe_folder, tmp_path):
    names = [name for name in load_file(roe_folder / "model.safetensors") if "layers.2.router" in name]
    folder = without(roe_folder, tmp_path, names)
    model, info = RoeLlavaForConditionalGeneration.from_pretrained(
        folder, allow_untrained=True, output_loading_info=True
    )
    assert info["missing_keys"] == {NEW[6]}
    router = layers_of(model)[2].router.weight
    assert router.isfinite().all() and router.any()


def test_a_routing_option_given_when_loading_takes_effect(roe_folder):
    model = RoeLlavaForConditionalGeneration.from_pretrained(roe_folder, routing_positions="first")
    preceding = tiny.routed_model()
    expected = copy.deepcopy(preceding)
    expected.config.routing_positions = "first"
    inputs = tiny.alone("question")
    logits = model(**inputs).router_logits
    assert torch.equal(logits, expected(**inputs).router_logits)
    assert not torch.allclose(logits, preceding(**inputs).router_logits)


WRONG = [{"routing_positions": "last"}, {"routing_question": "first"}, {"routed_layers": [9]}, {"adapter_size": 0}]


@pytest.mark.parametrize("option", WRONG)
def test_a_wrong_routing_option_given_when_loading_is_an_error(roe_folder, option):
    ((name, value),) = option.items()
    value = "9" if value == [9] else value
    for source in (RoeLlavaForConditionalGeneration, RoeLlavaConfig):
        with pytest.raises(ValueError, match=rf"{name} must be .* got .*{value}"):
            source.from_pretrained(roe_folder, **option)


def test_in_bfloat16_decisions_stay_in_float32(roe_folder):
    model = RoeLlavaForConditionalGeneration.from_pretrained(roe_folder, dtype=torch.bfloat16)
    layer = layers_of(model)[1]
    assert layer.router.weight.dtype == model.model.language_model.routing_tokens.weight.dtype == torch.float32
    assert layer.mlp.up_proj.weight.dtype == layer.adapter.up_proj.weight.dtype == torch.bfloat16
    inputs = tiny.batch()
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    outputs = model(**inputs)
    assert outputs.logits.dtype == torch.bfloat16 and outputs.router_logits.dtype == torch.float32
    # The routers were solved with a margin of 2, far above bfloat16's rounding.
    assert torch.equal(outputs.routes, PATTERN)
    tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert tokens.shape[1] == inputs["input_ids"].shape[1] + 3


def test_a_model_cast_to_bfloat16_routes_alike(model):
    inputs = tiny.batch()
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    assert torch.equal(model.bfloat16()(**inputs).routes, PATTERN)


def test_adapters_may_be_kept_in_float32_in_a_bfloat16_model(model):
    model.bfloat16()
    for layer in layers_of(model):
        layer.adapter.float()
    inputs = tiny.batch()
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    outputs = model(**inputs)
    assert outputs.logits.dtype == torch.bfloat16 and torch.equal(outputs.routes, PATTERN)


def test_tied_embeddings_survive_saving(tmp_path):
    config = tiny.tiny_config(text={"tie_word_embeddings": True}, tie_word_embeddings=True)
    model = RoeLlavaForConditionalGeneration(config).eval()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    again = RoeLlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.get_input_embeddings().weight
    assert torch.equal(again(**tiny.batch()).logits, model(**tiny.batch()).logits)


def test_the_generation_configuration_is_saved(roe_folder):
    model = RoeLlavaForConditionalGeneration.from_pretrained(roe_folder)
    assert model.generation_config.suppress_tokens == [tiny.IMAGE]


def test_the_model_without_head_loads_from_the_same_folder(roe_folder):
    model = RoeLlavaModel.from_pretrained(roe_folder)
    base = tiny.routed_model()
    outputs = model(**tiny.batch())
    assert torch.equal(outputs.last_hidden_state, base.model(**tiny.batch()).last_hidden_state)


def test_new_parameters_get_their_first_values_from_the_seed():
    first, second = (tiny.tiny_model(seed=3).state_dict() for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name])
    torch.manual_seed(4)
    fresh = RoeLlavaForConditionalGeneration(tiny.tiny_config())
    for layer in layers_of(fresh):
        for weight in (layer.router.weight, layer.adapter.down_proj.weight, layer.adapter.up_proj.weight):
            assert weight.isfinite().all() and weight.any()


def test_the_vocabulary_can_grow(model):
    before = model(**tiny.batch()).logits
    model.resize_token_embeddings(tiny.VOCAB + 8)
    after = model(**tiny.batch())
    assert after.logits.shape[-1] == tiny.VOCAB + 8 and torch.equal(after.routes, PATTERN)
    torch.testing.assert_close(after.logits[..., : tiny.VOCAB], before)


def test_fresh_adapters_start_small_whatever_their_width():
    model = RoeLlavaForConditionalGeneration(tiny.tiny_config(adapter_size=tiny.HIDDEN))
    adapter = layers_of(model)[0].adapter
    assert adapter.down_proj.weight.abs().max() > 10 * adapter.up_proj.weight.abs().max() > 0


OLDER = """
import importlib.metadata, transformers
importlib.metadata.version = lambda name: "5.18.0"
import roe_llava.configuration_roe
"""


def test_an_older_transformers_is_refused_with_what_to_do():
    done = subprocess.run([sys.executable, "-c", OLDER], capture_output=True, text=True)
    assert done.returncode and "transformers>=5.19.0 is required" in done.stderr and "pip install -U" in done.stderr
    assert "transformers>=5.19,<6" in (Path(__file__).parent.parent / "setup.cfg").read_text()
