"""The other bases, LLaVA-NeXT, LLaVA-OneVision, ViP-LLaVA and MoE-LLaVA: what holds for LLaVA holds for each."""

import math

import family
import pytest
import torch
from family import KINDS, NAMES
from tiny import NUM_LAYERS, PATTERN, Calls, layers_of

from roe_llava import RoeLlavaForConditionalGeneration

CLOSE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(params=KINDS)
def name(request):
    return request.param


@pytest.fixture
def model(name):
    return family.routed_model(name)


# ---------------------------------------- equal to stock


def test_all_layers_pinned_equals_stock_to_the_bit(name, model, no_gradients):
    inputs = family.batch(name)
    ours = model(**inputs, routes=[True] * NUM_LAYERS)
    assert torch.equal(ours.logits, family.stock_of(model)(**inputs).logits)


@pytest.mark.parametrize("side", ["left", "right"])
def test_all_layers_kept_by_their_routers_equals_stock(name, model, side, no_gradients):
    inputs = family.batch(name, side=side)
    ours, real = model(**inputs, route_bias=math.inf), inputs["attention_mask"].bool()
    assert ours.routes.all()
    torch.testing.assert_close(ours.logits[real], family.stock_of(model)(**inputs).logits[real], **CLOSE)


def test_outputs_have_all_that_stock_ones_have(name, model, no_gradients):
    inputs = family.alone(name, "question")
    ours, stock = model(**inputs), family.stock_of(model)(**inputs)
    assert set(stock.keys()) < set(ours.keys())
    assert torch.equal(ours.image_hidden_states, stock.image_hidden_states)
    assert torch.equal(model(**inputs, return_dict=False)[0], ours.logits)


def test_arguments_are_stocks_in_stocks_order(name, model, no_gradients):
    inputs = family.alone(name, "question")
    by_place = [inputs["input_ids"], inputs["pixel_values"], *([] if name in family.PLAIN else [inputs["image_sizes"]])]
    assert torch.equal(model(*by_place).logits, model(**inputs).logits)
    with pytest.raises(TypeError, match="multiple values"):
        model(*by_place, pixel_values=inputs["pixel_values"])


# ---------------------------------------- routes


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_alone_equals_the_row_in_a_batch_of_mixed_routes(name, model, side, no_gradients):
    inputs = family.batch(name, side=side)
    together = model(**inputs)
    assert torch.equal(together.routes, PATTERN)
    for row, prompt in enumerate(NAMES):
        one = model(**family.alone(name, prompt))
        assert torch.equal(one.routes[0], together.routes[row])
        real = inputs["attention_mask"][row].bool()
        torch.testing.assert_close(one.logits[0], together.logits[row][real], **CLOSE)


def test_only_rows_that_keep_a_layer_are_computed_and_cached(name, model, no_gradients):
    mlps = [Calls(layer.mlp) for layer in layers_of(model)]
    adapters = [Calls(layer.adapter) for layer in layers_of(model)]
    cache = model(**family.batch(name)).past_key_values
    assert [counted.rows for counted in mlps] == PATTERN.sum(0).tolist()
    assert [counted.rows for counted in adapters] == (~PATTERN).sum(0).tolist()
    assert [layer.keys.shape[0] for layer in cache.layers] == PATTERN.sum(0).tolist()


def test_a_layer_kept_by_no_row_is_not_run(name, model, no_gradients):
    routes = PATTERN.clone()
    routes[:, 1] = False
    layer = layers_of(model)[1]
    mlp, attention = Calls(layer.mlp), Calls(layer.self_attn.q_proj)
    cache = model(**family.batch(name), routes=routes).past_key_values
    assert mlp.calls == attention.calls == 0
    assert cache.layers[1].keys is None or cache.layers[1].keys.shape[0] == 0


def test_the_context_ends_with_the_last_image_token(name, model):
    inputs = family.batch(name, ["question", "late_image", "text_only"])
    segments = model.model.segments_of(inputs["input_ids"], None, inputs["attention_mask"])
    assert [(row == 1).sum().item() for row in segments] == [5, 1, 5]
    assert [(row == 0).sum().item() for row in segments] == [
        2 + len(family.tokens_of(name, "wide")),
        3 + len(family.tokens_of(name, "tall")),
        0,
    ]


# ---------------------------------------- generation


def test_cached_equals_uncached(name, model):
    inputs = family.batch(name)
    cached = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    uncached = model.generate(**inputs, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(cached, uncached)


def test_a_cached_step_equals_one_pass(name, model, no_gradients):
    inputs = family.batch(name)
    segments = model.model.segments_of(inputs["input_ids"], None, inputs["attention_mask"])
    extra = torch.arange(60, 60 + len(NAMES))[:, None]
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(extra)], 1)
    cache = model(**inputs).past_key_values
    step = model(input_ids=extra, attention_mask=mask, past_key_values=cache)
    whole = inputs | {"input_ids": torch.cat([inputs["input_ids"], extra], 1), "attention_mask": mask}
    one_pass = model(**whole, routing_segments=segments)
    assert torch.equal(step.routes, one_pass.routes)
    torch.testing.assert_close(step.logits[:, -1], one_pass.logits[:, -1], **CLOSE)


def test_generate_follows_the_route(name, model):
    mlps = [Calls(layer.mlp) for layer in layers_of(model)]
    outputs = model.generate(**family.batch(name), max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(outputs.past_key_values.routes, PATTERN)
    assert [counted.rows for counted in mlps] == (4 * PATTERN.sum(0)).tolist()  # the prompt and three steps


def test_generate_for_a_row_equals_generate_for_the_row_alone(name, model):
    width = family.batch(name)["input_ids"].shape[1]
    together = model.generate(**family.batch(name), max_new_tokens=4, do_sample=False)[:, width:]
    for row, prompt in enumerate(NAMES):
        inputs = family.batch(name, [prompt])
        one = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert torch.equal(one, together[row]), prompt


def test_beams_take_their_prompts_route(name, model):
    inputs = family.batch(name)
    outputs = model.generate(**inputs, num_beams=2, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(outputs.past_key_values.routes, PATTERN.repeat_interleave(2, 0))


def test_group_by_route_equals_generate(name, model):
    prompts = [family.batch(name, [prompt]) for prompt in NAMES]
    written = model.group_by_route(prompts, batch_size=2, pool_size=6, max_new_tokens=3, do_sample=False)
    for inputs, tokens in zip(prompts, written, strict=True):
        assert torch.equal(tokens, model.generate(**inputs, max_new_tokens=3, do_sample=False)[0])


# ---------------------------------------- training


def test_a_training_step_reaches_routers_adapters_and_tokens(name, model):
    model.train()
    inputs = family.batch(name, ["question", "late_image"])
    labels = inputs["input_ids"].clone()
    labels[:, :-2] = -100
    outputs = model(**inputs, labels=labels)
    assert outputs.routes is None and outputs.turn_skip_weights.shape == (2, 1, NUM_LAYERS)
    outputs.loss.backward()
    for layer in layers_of(model):
        assert layer.router.weight.grad.abs().sum() > 0
        assert layer.adapter.down_proj.weight.grad.abs().sum() > 0
        assert layer.adapter.up_proj.weight.grad.abs().sum() > 0
    assert model.model.language_model.routing_tokens.weight.grad.abs().sum() > 0


# ---------------------------------------- videos (LLaVA-OneVision)


def video_inputs():
    ids = [1, 5, *family.tokens_of("llava_onevision", "wide"), 7, *family.tokens_of("llava_onevision", "video"), 9, 10]
    images = family.images_of("llava_onevision", ["wide"], seed=3)
    video = torch.randn(1, family.NUM_FRAMES, 3, 28, 28, generator=torch.Generator().manual_seed(4))
    return {"input_ids": torch.tensor([ids]), "pixel_values_videos": video, **images}


def test_a_video_equals_stock_and_is_context(no_gradients):
    model, inputs = family.routed_model("llava_onevision"), video_inputs()
    ours = model(**inputs, routes=[True] * NUM_LAYERS)
    stock = family.stock_of(model)(**inputs)
    assert torch.equal(ours.logits, stock.logits)
    assert torch.equal(ours.video_hidden_states, stock.video_hidden_states)
    segments = model.model.segments_of(inputs["input_ids"], None, None)
    assert segments[0].tolist() == [0] * (inputs["input_ids"].shape[1] - 2) + [1, 1]


def test_a_video_generates_alike_with_and_without_a_cache():
    model, inputs = family.routed_model("llava_onevision"), video_inputs()
    cached = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(cached, model.generate(**inputs, max_new_tokens=4, do_sample=False, use_cache=False))


# ---------------------------------------- errors


def test_an_unsupported_text_model_is_named(name):
    config = family.tiny_config(name)
    config.text_config.model_type = "gpt_neox"
    with pytest.raises(ValueError, match=r"text_config.model_type 'gpt_neox'.*llama.*mistral.*qwen2"):
        KINDS[name].head(config)


def test_a_wrong_routing_field_is_named(name):
    with pytest.raises(ValueError, match="adapter_size must be a positive integer, got 0"):
        family.tiny_config(name, adapter_size=0)


def test_flash_attention_is_refused(name, model):
    with pytest.raises(ValueError, match="FlashAttention packs the rows"):
        model.set_attn_implementation("flash_attention_2")


# ---------------------------------------- checkpoints


@pytest.fixture
def stock_folder(tmp_path, name, model):
    family.stock_of(model).save_pretrained(tmp_path / "stock")
    return tmp_path / "stock"


def test_a_stock_checkpoint_loads_and_equals_stock(name, model, stock_folder, no_gradients):
    loaded = KINDS[name].head.from_pretrained(stock_folder, adapter_size=8).eval()
    inputs = family.batch(name)
    assert loaded.config.model_type == f"roe_{name}"
    assert torch.equal(loaded(**inputs, routes=[True] * NUM_LAYERS).logits, family.stock_of(model)(**inputs).logits)


def test_a_saved_model_reloads_and_names_its_code(name, model, tmp_path, no_gradients):
    model.save_pretrained(tmp_path / "saved")
    loaded = KINDS[name].head.from_pretrained(tmp_path / "saved").eval()
    part = "moe" if name == "moe_llava" else "family"
    assert loaded.config.auto_map["AutoModel"] == f"modeling_roe_{part}.{KINDS[name].head.__name__}"
    assert {f"modeling_roe_{part}.py", f"configuration_roe_{part}.py", "decoder_roe.py"} <= {
        path.name for path in (tmp_path / "saved").glob("*.py")
    }
    inputs = family.batch(name)
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_names_on_disk_are_stocks(name, model, stock_folder, tmp_path):
    from convert_helpers import weights_of

    model.save_pretrained(tmp_path / "saved")
    ours, stock = weights_of(tmp_path / "saved"), weights_of(stock_folder)
    assert stock.keys() < ours.keys()
    assert all(any(part in key for part in ("router", "adapter", "routing_tokens")) for key in ours.keys() - stock)


def test_a_checkpoint_without_its_routing_parts_is_an_error_unless_asked_for(name, model, stock_folder, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    for path in stock_folder.glob("*.safetensors"):
        (tmp_path / "saved" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match=r"lacks 13 tensors of this model \(13 of its 13 routing tensors\)"):
        KINDS[name].head.from_pretrained(tmp_path / "saved")
    assert KINDS[name].head.from_pretrained(tmp_path / "saved", allow_untrained=True) is not None


def test_a_llava_checkpoint_is_no_base_of_the_others(name, tmp_path):
    from convert_helpers import make_base

    base = make_base(tmp_path / "base")
    with pytest.raises(ValueError, match=f"model_type 'llava', expected '{name}'"):
        KINDS[name].head._load_base(base, None, False, {}, None)


def test_the_model_of_llava_refuses_the_other_bases(name, model, stock_folder):
    with pytest.raises(ValueError, match=f"model_type '{name}', expected 'llava' or 'llava_frontend'"):
        RoeLlavaForConditionalGeneration._load_base(stock_folder, None, False, {}, None)


# ---------------------------------------- processors


@pytest.mark.parametrize("name", family.processor_names())
class TestProcessor:
    TEXTS = ("USER: <image>\nwhat colour ? ASSISTANT:", "USER: <image>\nhow many squares ? ASSISTANT:")

    def inputs(self, processor):
        pictures = [family.picture(family.WIDE), family.picture((50, 30), seed=1)]
        return processor(images=pictures, text=list(self.TEXTS), return_tensors="pt", padding=True)

    def test_adds_nothing_but_segments(self, name):
        ours, stock = self.inputs(family.processor_of(name)), self.inputs(family.processor_of(name, routed=False))
        assert ours.keys() == {*stock.keys(), "routing_segments"}
        for key in stock:
            torch.testing.assert_close(ours[key], stock[key], rtol=0, atol=0)

    def test_segments_equal_the_default_ones(self, name):
        inputs = self.inputs(family.processor_of(name))
        assert torch.equal(inputs["routing_segments"], default_segments(name, inputs))
        assert {-1, 0, 1} == set(inputs["routing_segments"].unique().tolist())

    def test_the_model_answers_what_it_makes(self, name, no_gradients):
        model, inputs = family.routed_model(name), self.inputs(family.processor_of(name))
        stock = family.stock_of(model)(**{key: value for key, value in inputs.items() if key != "routing_segments"})
        assert torch.equal(model(**inputs, routes=[True] * NUM_LAYERS).logits, stock.logits)
        assert torch.equal(model(**inputs).routes, model(**inputs | {"routing_segments": None}).routes)

    def test_labels_are_the_answers(self, name):
        processor = family.processor_of(name)
        text = "USER: <image>\nwhat colour ? ASSISTANT: red</s>"
        made = processor(images=family.picture(family.WIDE), text=text, return_labels=True, return_tensors="pt")
        answer = processor.tokenizer("red</s>", add_special_tokens=False)["input_ids"]
        assert made["labels"][made["labels"] != -100].tolist() == answer
        assert (made["routing_segments"][made["labels"] != -100] == -1).all()

    def test_reloads_from_a_saved_folder(self, name, tmp_path):
        processor = family.processor_of(name)
        processor.save_pretrained(tmp_path)
        again = type(processor).from_pretrained(tmp_path)
        for key, value in self.inputs(processor).items():
            assert torch.equal(self.inputs(again)[key], value), key


def default_segments(name, inputs):
    return family.routed_model(name).model.segments_of(inputs["input_ids"], None, inputs["attention_mask"])


@pytest.mark.skipif("llava_onevision" not in family.processor_names(), reason="video processors need torchvision")
def test_a_video_is_context_for_the_processor():
    processor = family.processor_of("llava_onevision")
    frames = torch.randint(0, 256, (1, family.NUM_FRAMES, 3, 28, 28), dtype=torch.uint8)
    inputs = processor(videos=frames, text="USER: <video>\nwhat colour ? ASSISTANT:", return_tensors="pt")
    assert (inputs["input_ids"] == family.VIDEO).sum() == family.NUM_VIDEO
    default = family.routed_model("llava_onevision").model.segments_of(inputs["input_ids"], None, None)
    assert torch.equal(inputs["routing_segments"], default)
