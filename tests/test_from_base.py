"""`from_base` and `load_routing`: routing parts onto a loaded base, and swapped."""

import copy
import json
import logging
import math
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
    tiny_processor,
    train,
    weights_of,
)
from safetensors.torch import load_file
from torch import nn
from transformers import GenerationConfig, LlavaForConditionalGeneration

from roe_llava import RoeCache, RoeLlavaForConditionalGeneration, RoeLlavaProcessor
from roe_llava.adapter_roe import read_adapter
from roe_llava.convert.adapter_file import save_adapter
from roe_llava.convert.extract import extract
from roe_llava.convert.fingerprint import describe_base
from roe_llava.convert.graft import graft
from roe_llava.grafting_roe import loaded_base_tensors, signatures_of
from roe_llava.identity_roe import BLOCK_SIZE, fingerprint, tensor_signature
from roe_llava.loading_roe import is_roe_parameter

pytestmark = pytest.mark.usefixtures("no_gradients")


def tied_config():
    config = tiny_config("qwen2", tie_word_embeddings=True)
    config.tie_word_embeddings = True
    return config


# What a base may look like, and what its adapter routes.
KINDS = {
    "plain": ({}, {}),
    "sharded": ({"max_shard_size": "20KB"}, {}),
    "bfloat16": ({"dtype": torch.bfloat16}, {}),
    "float16": ({"dtype": torch.float16}, {}),
    "names in memory": ({"save_original_format": False}, {}),
    "mistral": ({"config": tiny_config("mistral")}, {"routing_positions": "first", "routing_question": "all_text"}),
    "tied": ({"config": tied_config()}, {}),
    "some layers": ({}, {"routed_layers": [0, 2], "adapter_size": 6}),
}


@pytest.fixture(params=KINDS)
def pieces(request, tmp_path):
    """(base, adapter, grafted) folders."""
    save, fields = KINDS[request.param]
    base = make_base(tmp_path / "base", **save)
    model = train(base, **fields)
    adapter = save_adapter(model, model.config, tmp_path / "adapter", base=base, training={"steps": 3})
    graft(base, adapter, tmp_path / "grafted")
    return base, adapter, tmp_path / "grafted"


@pytest.fixture(scope="module")
def inputs(base):
    return tiny_inputs(RoeLlavaProcessor.from_pretrained(base))


@pytest.fixture
def stock(base):
    return LlavaForConditionalGeneration.from_pretrained(base)


@pytest.fixture
def other_adapter(tmp_path, base):
    """Another training on the same base, of another size and fewer layers."""
    model = train(base, seed=9, adapter_size=6, routed_layers=[0, 2], routing_positions="first", target_skip_ratio=0.1)
    return save_adapter(model, model.config, tmp_path / "other", base=base, training={"steps": 9})


def from_base(*args, **kwargs):
    return RoeLlavaForConditionalGeneration.from_base(*args, **kwargs)


def same_model(one, two, inputs):
    """Same parameters, buffers, answers and routing fields, all to the bit."""
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = dict(getattr(one, kind)()), dict(getattr(two, kind)())
        assert ours.keys() == theirs.keys()
        assert all(bytes_of(ours[name].cpu()) == bytes_of(theirs[name].cpu()) for name in ours), kind
    for bias in (None, -math.inf):  # as the routers say, and every routed layer skipped
        left, right = one(**inputs, route_bias=bias), two(**inputs, route_bias=bias)
        assert torch.equal(left.logits, right.logits) and torch.equal(left.routes, right.routes)
        assert torch.equal(left.router_logits, right.router_logits)
    assert not left.routes.all()
    asked = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(one.generate(**inputs, **asked), two.generate(**inputs, **asked))
    unlike = {"_name_or_path", "auto_map", "architectures"}  # the folder's name; what `save_pretrained` fills in
    ours, theirs = (
        {name: value for name, value in model.config.to_dict().items() if name not in unlike} for model in (one, two)
    )
    assert ours == theirs


def refuses(match, *args, **kwargs):
    with pytest.raises(ValueError, match=match):
        from_base(*args, **kwargs)


# ---------------------------------------- the same as a grafted folder


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_loaded_base_with_an_adapter_equals_the_grafted_folder(pieces, inputs, attention):
    base, adapter, grafted = pieces
    expected = RoeLlavaForConditionalGeneration.from_pretrained(grafted, attn_implementation=attention)
    stock = LlavaForConditionalGeneration.from_pretrained(base, attn_implementation=attention)
    model = from_base(stock, adapter)
    same_model(model, expected, inputs)
    assert not model.training and model.config.text_config._attn_implementation == attention
    assert model.model.vision_tower.config._attn_implementation == attention


def test_base_from_its_folder_with_an_adapter_equals_the_grafted_folder(pieces, inputs):
    base, adapter, grafted = pieces
    same_model(from_base(base, adapter), RoeLlavaForConditionalGeneration.from_pretrained(grafted), inputs)


def test_result_saves_reloads_and_gives_its_adapter_back(tmp_path, pieces, inputs):
    base, adapter, grafted = pieces
    for source in (base, LlavaForConditionalGeneration.from_pretrained(base)):
        from_base(source, adapter).save_pretrained(tmp_path / "saved")
        expected = RoeLlavaForConditionalGeneration.from_pretrained(grafted)
        same_model(RoeLlavaForConditionalGeneration.from_pretrained(tmp_path / "saved"), expected, inputs)
        extract(tmp_path / "saved", tmp_path / "again", overwrite=True)
        ours, theirs = weights_of(tmp_path / "again"), weights_of(adapter)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name].float(), theirs[name]) for name in ours)
        abouts = [(folder / "roe_adapter.json").read_text() for folder in (tmp_path / "again", adapter)]
        assert abouts[0] == abouts[1]
        shutil.rmtree(tmp_path / "saved")


def test_names_on_disk_are_those_of_the_loaded_base(tmp_path, base_copy, adapter):
    """llava-hf's own files say `vision_tower.vision_model`, which a model made from a config does not."""

    def as_published(tensors):
        for name in [name for name in tensors if name.startswith("vision_tower.")]:
            tensors[name.replace("vision_tower.", "vision_tower.vision_model.")] = tensors.pop(name)

    change_tensors(base_copy / "model.safetensors", as_published)
    stock = LlavaForConditionalGeneration.from_pretrained(base_copy)
    from_base(stock, adapter).save_pretrained(tmp_path / "saved")
    assert weights_of(base_copy).keys() < weights_of(tmp_path / "saved").keys()


# ---------------------------------------- a loaded base


def test_loaded_base_is_shared_and_not_copied(stock, adapter):
    model = from_base(stock, adapter)
    theirs = dict(stock.named_parameters())
    for name, parameter in model.named_parameters():
        if name in theirs:
            assert parameter.data_ptr() == theirs[name].data_ptr() and parameter is not theirs[name], name
    assert {name for name, _ in model.named_parameters()} - theirs.keys() == read_adapter(adapter).tensors.keys()


def test_loaded_base_stays_usable_whatever_becomes_of_the_result(stock, adapter, inputs):
    ordinary = {name: value for name, value in inputs.items() if name != "routing_segments"}
    before, config = stock(**ordinary).logits, copy.deepcopy(stock.config.to_dict())
    modules = {name: (type(module), id(module)) for name, module in stock.named_modules()}
    model = from_base(stock, adapter)
    model(**inputs)
    model.set_attn_implementation("eager")
    model.generation_config.max_new_tokens = 3
    model.to(torch.bfloat16).train()
    assert {name: (type(module), id(module)) for name, module in stock.named_modules()} == modules
    assert stock.config.to_dict() == config and stock.config.text_config._attn_implementation == "sdpa"
    assert stock.model.language_model.layers[0].self_attn.config is stock.config.text_config
    assert stock.dtype == torch.float32 and not stock.training and stock.generation_config.max_new_tokens != 3
    assert torch.equal(stock(**ordinary).logits, before)


def test_what_was_set_on_a_loaded_base_is_kept(stock, adapter):
    stock.generation_config = GenerationConfig(max_new_tokens=7, temperature=0.3, do_sample=True)
    stock.model.vision_tower.requires_grad_(False)
    stock.train()
    model = from_base(stock, adapter)
    assert model.generation_config.to_dict() == stock.generation_config.to_dict()
    assert model.training and model.model.language_model.layers[0].adapter.training
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if "vision_tower" in name}


def test_tied_embeddings_stay_tied(tmp_path):
    base = make_base(tmp_path / "base", config=tied_config())
    model = train(base)
    adapter = save_adapter(model, model.config, tmp_path / "adapter", base=base)
    for source in (base, LlavaForConditionalGeneration.from_pretrained(base)):
        model = from_base(source, adapter)
        assert model.lm_head.weight is model.get_input_embeddings().weight


def test_training_the_result_trains_base_and_parts(stock, adapter, inputs):
    model = from_base(stock, adapter).train()
    with torch.enable_grad():
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        model(**{n: v for n, v in inputs.items() if n != "routing_segments"}, labels=labels).loss.backward()
    for name, parameter in model.named_parameters():
        if is_roe_parameter(name) or ("q_proj" in name and "language_model" in name):
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert all(parameter.grad is None for parameter in stock.parameters())


# ---------------------------------------- a base from its path


def test_options_of_a_base_from_its_path_take_effect(base, adapter, inputs):
    model = from_base(str(base), str(adapter), device_map={"": "cpu"}, attn_implementation="eager")
    assert model.config.text_config._attn_implementation == "eager"
    half = from_base(base, adapter, dtype=torch.bfloat16, check_base=False)
    assert half.dtype == torch.bfloat16 and half.config.roe_provenance["base"]["fingerprint"] is None
    layer = half.model.language_model.layers[0]
    assert (layer.router.weight.dtype, layer.adapter.up_proj.weight.dtype) == (torch.float32, torch.bfloat16)
    assert half(**inputs).logits.isfinite().all()


def test_no_warning_says_that_parts_are_untrained(base, adapter, caplog, monkeypatch):
    from roe_llava import loading_roe

    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(loading_roe.logger, "warning", lambda text: pytest.fail(text))
    with caplog.at_level(logging.WARNING, logger="transformers"):
        from_base(base, adapter)
        assert not caplog.text
        # The same folder through from_pretrained is reported, so the silence above means something.
        monkeypatch.setattr(loading_roe.logger, "warning", lambda text: None)
        RoeLlavaForConditionalGeneration.from_pretrained(base, adapter_size=4)
        assert "LOAD REPORT" in caplog.text


def test_base_that_lacks_a_tensor_is_refused(base_copy, adapter):
    change_tensors(base_copy / "model.safetensors", lambda t: t.pop("language_model.model.layers.2.mlp.up_proj.weight"))
    refuses("lacks 11 tensors of this model", base_copy, adapter, check_base=False)


PLACES = [
    *("lm_head", "model.vision_tower", "model.multi_modal_projector"),
    *(f"model.language_model.{part}" for part in ("embed_tokens", "norm", "rotary_emb", "routing_tokens")),
    *(f"model.language_model.layers.{layer}" for layer in range(NUM_LAYERS)),
]


def test_offloaded_layers_are_refused(tmp_path, base, adapter):
    places = dict.fromkeys(PLACES, "cpu") | {"model.language_model.layers.1": "disk"}
    for check in (True, False):
        message = r"layer 1 is offloaded or sharded.*\(roe-llava graft"
        refuses(message, base, adapter, device_map=places, offload_folder=tmp_path / "off", check_base=check)


def test_offloaded_base_weights_cannot_be_compared(tmp_path, base, adapter):
    places = dict.fromkeys(PLACES, "cpu") | {"lm_head": "disk"}
    options = {"device_map": places, "offload_folder": tmp_path / "off"}
    refuses("lm_head.weight of the base is offloaded .* check_base=False", base, adapter, **options)
    model = from_base(base, adapter, **options, check_base=False)
    assert all(torch.equal(model.state_dict()[n], tensor) for n, tensor in read_adapter(adapter).tensors.items())


def test_quantised_base_needs_its_path_and_no_check(tmp_path, base, adapter, inputs):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True)
    refuses(
        "is quantised, so its weights cannot be compared.*check_base=False", base, adapter, quantization_config=config
    )
    loaded = LlavaForConditionalGeneration.from_pretrained(base, quantization_config=config)
    refuses("is quantised.* pass its folder or Hub id with the same options", loaded, adapter, check_base=False)
    model = from_base(base, adapter, quantization_config=config, check_base=False)
    assert all(torch.equal(model.state_dict()[n], tensor) for n, tensor in read_adapter(adapter).tensors.items())
    assert type(model.model.language_model.layers[0].mlp.up_proj.weight).__name__ == "Params4bit"
    graft(base, adapter, tmp_path / "grafted")
    grafted = RoeLlavaForConditionalGeneration.from_pretrained(tmp_path / "grafted", quantization_config=config)
    with torch.enable_grad():  # without gradients bitsandbytes takes CPU kernels that refuse layers as small as these
        assert torch.equal(model(**inputs).logits, grafted(**inputs).logits)
    with pytest.raises(ValueError, match="is quantised"):
        model.load_routing(adapter)
    model.load_routing(adapter, check_base=False)


# ---------------------------------------- identity of the base


def test_base_in_memory_has_the_fingerprint_of_its_files(pieces):
    base = pieces[0]
    recorded = describe_base(base)
    loaded = LlavaForConditionalGeneration.from_pretrained(base)
    assert fingerprint(signatures_of(loaded_base_tensors(loaded, recorded["tensors"]))) == recorded["fingerprint"]


def test_a_tensor_of_several_blocks_has_the_signature_of_its_file(tmp_path):
    from safetensors.torch import save_file

    tensor = torch.randn(BLOCK_SIZE // 4 + 1000)
    save_file({"lm_head.weight": tensor}, tmp_path / "model.safetensors")
    assert describe_base(tmp_path)["tensors"] == {"lm_head.weight": tensor_signature(tensor)}
    assert tensor_signature(tensor[:0]).startswith("F32 [0] ")
    assert tensor_signature(torch.stack([tensor, tensor], dim=1)[:, 0]) == tensor_signature(tensor)


def test_files_that_hold_a_tied_tensor_twice_are_the_same_base(tmp_path):
    """Old checkpoints hold the head beside the embeddings it is tied to."""
    base = make_base(tmp_path / "base", config=tied_config())
    path = base / "model.safetensors"
    names = load_file(path)
    embed = next(name for name in names if name.endswith("embed_tokens.weight"))
    assert not any("lm_head" in name for name in names)
    change_tensors(path, lambda t: t.update({"language_model.lm_head.weight": t[embed].clone()}))
    model = train(base)
    adapter = save_adapter(model, model.config, tmp_path / "adapter", base=base)
    assert "lm_head.weight" in read_adapter(adapter).info.base["tensors"]
    from_base(LlavaForConditionalGeneration.from_pretrained(base), adapter)


def test_buffers_that_no_model_reads_are_left_out_in_memory_too(stock, adapter):
    embeddings = stock.model.vision_tower.embeddings
    embeddings.register_buffer("position_ids", embeddings.position_ids, persistent=True)
    assert "model.vision_tower.embeddings.position_ids" in stock.state_dict()
    from_base(stock, adapter)


def test_base_with_one_changed_weight_is_refused_with_its_name(base, stock, adapter):
    stock.model.language_model.layers[1].mlp.up_proj.weight[3, 2] += 1e-4
    what = r"1 of 73 tensors differ \(model.language_model.layers.1.mlp.up_proj.weight has other values"
    refuses(rf"is not the one .*adapter was trained on \({base.name}, .*{what}", stock, adapter)
    model = from_base(stock, adapter, check_base=False)
    assert model.config.roe_provenance["base"]["fingerprint"] is None


def test_model_of_an_unchecked_base_does_not_pass_for_the_base_it_names(tmp_path, base, stock, adapter):
    from_base(stock, adapter, check_base=False).save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="does not say which base"):
        extract(tmp_path / "saved", tmp_path / "out")
    extract(tmp_path / "saved", tmp_path / "out", base=base)


def test_base_of_several_dtypes_is_not_called_another_base(tmp_path, base_copy):
    def halve_norms(tensors):
        tensors |= {name: tensor.half() for name, tensor in tensors.items() if "layernorm" in name}

    change_tensors(base_copy / "model.safetensors", halve_norms)
    model = train(base_copy)
    adapter = save_adapter(model, model.config, tmp_path / "adapter", base=base_copy)
    with pytest.raises(
        ValueError, match=r"loaded in F32, .* stored in F16 and F32: .*graft BASE ADAPTER OUT"
    ) as caught:
        from_base(base_copy, adapter)
    assert "Give that base" not in str(caught.value)
    graft(base_copy, adapter, tmp_path / "out")


def test_base_in_another_dtype_is_explained(base, adapter):
    message = r"lm_head.weight is F16 \[32, 16\], was F32 .* loaded in F16, they were trained on F32.*check_base=False"
    refuses(message, base, adapter, dtype=torch.float16)
    refuses(message, LlavaForConditionalGeneration.from_pretrained(base, dtype=torch.float16), adapter)


def test_adapter_without_a_recorded_base_is_refused(base, stock, adapter):
    change_json(adapter / "roe_adapter.json", base=None)
    for source in (base, stock):
        refuses("does not say which base it was trained on.*check_base=False", source, adapter)
    from_base(stock, adapter, check_base=False)


# ---------------------------------------- refusals


def test_base_of_other_sizes_is_refused(tmp_path, adapter):
    base = make_base(tmp_path / "base", config=tiny_config(num_hidden_layers=2))
    loaded = LlavaForConditionalGeneration.from_pretrained(base)
    for source in (base, loaded):
        refuses("is for the layer count 3 .* has 2: it was trained on another base", source, adapter, check_base=False)


def test_what_is_no_stock_llava_is_refused(tmp_path, base, trained, adapter):
    refuses(r"has routing parts already: swap them with its load_routing", trained, adapter)
    refuses("base is a Linear, expected a LlavaForConditionalGeneration", nn.Linear(2, 2), adapter)
    graft(base, adapter, tmp_path / "grafted")
    refuses("model_type 'roe_llava', expected 'llava'.*load_routing", tmp_path / "grafted", adapter)


def test_base_with_added_parameters_is_refused(stock, adapter):
    stock.model.language_model.layers[0].self_attn.lora = nn.Linear(2, 2)
    refuses(r"differs from a stock one in .*self_attn.lora.bias", stock, adapter, check_base=False)


def test_dispatched_base_is_refused(stock, adapter):
    accelerate = pytest.importorskip("accelerate")
    accelerate.dispatch_model(stock, {"model": "cpu", "lm_head": "cpu"}, main_device="cpu", force_hooks=True)
    refuses("spread over devices by a device_map.* pass its folder or Hub id", stock, adapter)


def test_base_without_its_weights_in_memory_is_refused(stock, adapter):
    refuses("no plain tensors in memory .*lm_head.weight|no plain tensors in memory", stock.to("meta"), adapter)


def test_options_that_do_not_belong_are_refused(base, stock, adapter):
    refuses("device_map given with a loaded base", stock, adapter, device_map="cpu")
    refuses("base_revision given with a loaded base", stock, adapter, base_revision="main")
    refuses("adapter_size, config given to from_base", base, adapter, adapter_size=3, config=stock.config)
    refuses("revision 'main' given with the folder", stock, adapter, revision="main")


def test_what_is_no_adapter_is_refused(tmp_path, base, stock, adapter, monkeypatch):
    refuses("has no roe_adapter.json: is it an adapter folder.*roe-llava extract", stock, base)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refuses("nobody/nothing is no folder here and cannot be had from the Hub", stock, "nobody/nothing")
    change_tensors(
        adapter / "roe_adapter.safetensors",
        lambda t: t["language_model.model.routing_tokens.weight"].fill_(float("inf")),
    )
    refuses("routing_tokens.weight .* holds 32 NaN or Inf", stock, adapter)
    (adapter / "roe_adapter.safetensors").write_bytes(b"cut")
    refuses("has 3 bytes and is not readable as safetensors", base, adapter)


def test_weights_that_do_not_fit_into_the_bases_dtype_are_refused(tmp_path):
    base = make_base(tmp_path / "base", dtype=torch.float16)
    model = train(base).float()
    model.model.language_model.layers[1].adapter.down_proj.weight[0, 0] = 1e6
    adapter = save_adapter(model, model.config, tmp_path / "adapter", base=base)
    refuses(r"layers.1.adapter.down_proj.weight in .*torch.float16 holds 1 NaN or Inf", base, adapter)


# ---------------------------------------- swapping


def test_swapped_parts_equal_the_other_adapter_put_onto_the_base(base, stock, adapter, other_adapter, inputs):
    model = from_base(stock, adapter)
    assert model.load_routing(other_adapter) is model
    expected = from_base(base, other_adapter)
    same_model(model, expected, inputs)
    assert [layer.router is not None for layer in model.model.language_model.layers] == [True, False, True]
    assert (model.config.adapter_size, model.config.routing_positions) == (6, "first")
    assert model.config.roe_provenance["training"] == {"steps": 9}
    model.load_routing(adapter)
    same_model(model, from_base(base, adapter), inputs)


def test_swapped_model_saves_and_reloads(tmp_path, base, adapter, other_adapter, inputs):
    graft(base, adapter, tmp_path / "one")
    graft(base, other_adapter, tmp_path / "two")
    model = RoeLlavaForConditionalGeneration.from_pretrained(tmp_path / "one")
    model.load_routing(other_adapter).save_pretrained(tmp_path / "saved")
    expected = RoeLlavaForConditionalGeneration.from_pretrained(tmp_path / "two")
    same_model(RoeLlavaForConditionalGeneration.from_pretrained(tmp_path / "saved"), expected, inputs)


def test_swapping_keeps_what_was_frozen_and_the_mode(stock, adapter, other_adapter):
    model = from_base(stock, adapter).train()
    for name, parameter in model.named_parameters():
        if is_roe_parameter(name):
            parameter.requires_grad_(False)
    model.load_routing(other_adapter)
    parts = {name: p for name, p in model.named_parameters() if is_roe_parameter(name)}
    assert len(parts) == 7 and not any(parameter.requires_grad for parameter in parts.values())
    assert all(module.training for module in model.modules())


def test_swapping_under_accelerates_hooks(stock, adapter, other_adapter, inputs):
    accelerate = pytest.importorskip("accelerate")
    model = from_base(stock, adapter)
    accelerate.dispatch_model(model, dict.fromkeys(PLACES, "cpu"), main_device="cpu", force_hooks=True)
    assert hasattr(model.model.language_model.layers[0].router, "_hf_hook")
    model.load_routing(other_adapter)
    assert torch.equal(model(**inputs).logits, from_base(stock, other_adapter)(**inputs).logits)


@pytest.mark.parametrize("damage", ["weights", "sizes", "field", "base", "missing"])
def test_a_refused_swap_changes_nothing(stock, adapter, other_adapter, inputs, damage):
    model = from_base(stock, adapter)
    about, weights = other_adapter / "roe_adapter.json", other_adapter / "roe_adapter.safetensors"
    if damage == "weights":
        change_tensors(weights, lambda t: t["language_model.model.layers.2.router.weight"].fill_(float("nan")))
    elif damage == "sizes":
        change_json(about, hidden_size=8)
    elif damage == "field":
        change_json(about, routing_positions="nowhere")
    elif damage == "base":
        recorded = json.loads(about.read_text())["base"]
        recorded["tensors"]["lm_head.weight"] = recorded["tensors"]["lm_head.weight"][:-1] + "x"
        change_json(about, base=recorded)
    else:
        weights.unlink()
    parameters, config = dict(model.named_parameters()), model.config.to_dict()
    before = model(**inputs).logits
    with pytest.raises(ValueError):
        model.load_routing(other_adapter)
    after = dict(model.named_parameters())
    assert after.keys() == parameters.keys() and all(after[name] is parameters[name] for name in after)
    assert model.config.to_dict() == config and torch.equal(model(**inputs).logits, before)


def test_running_out_of_memory_while_parts_are_placed_changes_nothing(stock, adapter, other_adapter, monkeypatch):
    model = from_base(stock, adapter)
    parameters, config = dict(model.named_parameters()), model.config.to_dict()
    put, calls = RoeLlavaForConditionalGeneration.load_routing.__globals__["put"], []

    def put_some(*args):
        calls.append(args)
        if len(calls) == 5:
            raise torch.OutOfMemoryError("no room")
        put(*args)

    monkeypatch.setattr("roe_llava.grafting_roe.put", put_some)
    with pytest.raises(torch.OutOfMemoryError):
        model.load_routing(other_adapter)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert model.config.to_dict() == config


def test_base_tuned_since_is_noticed_when_swapping(stock, adapter, other_adapter):
    model = from_base(stock, adapter)
    known = model.config.roe_provenance["base"]
    model.model.language_model.norm.weight += 0.5
    with pytest.raises(ValueError, match=r"norm.weight has other values"):
        model.load_routing(other_adapter)
    model.load_routing(other_adapter, check_base=False)
    assert model.config.roe_provenance == {"base": known, "training": {"steps": 9}}


def test_route_from_before_a_swap_that_skips_a_layer_without_an_adapter_is_an_error(stock, adapter, other_adapter):
    model = from_base(stock, adapter)
    ids = tiny_processor()(text="USER: what is this ASSISTANT:", return_tensors="pt")["input_ids"]
    cache = RoeCache(model.config)
    model(input_ids=ids, past_key_values=cache, routes=[True, False, True])
    model.load_routing(other_adapter)
    with pytest.raises(ValueError, match="layer 1 has no adapter, but a route from before load_routing skips it"):
        model(input_ids=ids[:, -1:], past_key_values=cache)
    model(input_ids=ids, past_key_values=RoeCache(model.config))
