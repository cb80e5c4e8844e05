"""`generate`: one route per row, decided in prefill and followed, in every mode of decoding."""

import copy
import math
import threading

import pytest
import tiny
import torch
from tiny import NAMES, NUM_LAYERS, PATTERN, Calls, layers_of
from transformers import DynamicCache, EncoderDecoderCache, TextIteratorStreamer, TextStreamer

from roe_llava import RoeCache

NEW = 6
GREEDY = {"max_new_tokens": NEW, "do_sample": False}
WAYS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 3, "do_sample": False},
    "returned beams": {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
    "returned samples": {"do_sample": True, "num_return_sequences": 3},
    "sampling beams": {"do_sample": True, "num_beams": 2},
}


pytestmark = pytest.mark.usefixtures("no_gradients")


def written(model, inputs, **kwargs):
    """The new tokens (rows, NEW)."""
    torch.manual_seed(7)
    tokens = model.generate(**inputs, **{"max_new_tokens": NEW, "do_sample": False, **kwargs})
    width = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
    return tokens[:, width:]


def details(model, inputs, **kwargs):
    return model.generate(**inputs, **GREEDY, return_dict_in_generate=True, **kwargs)


def by_hand(model, inputs, routes):
    """Greedy tokens of one prompt by one pass over the whole text per token, the route pinned."""
    ids = inputs["input_ids"]
    for _ in range(NEW):
        logits = model(**inputs | {"input_ids": ids}, routes=routes, use_cache=False).logits[:, -1]
        logits[:, tiny.IMAGE] = -math.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids[:, -NEW:]


# ---------------------------------------- routes are decided once


def test_routes_are_decided_in_prefill_and_kept_by_the_cache(any_model):
    outputs = details(any_model, tiny.batch())
    assert torch.equal(outputs.past_key_values.routes, PATTERN)
    held = [layer.keys.shape[0] for layer in outputs.past_key_values.layers]
    assert held == PATTERN.sum(0).tolist()


def test_a_router_is_called_once_per_generation(model):
    routers = [Calls(layer.router) for layer in layers_of(model)]
    written(model, tiny.batch())
    assert [counted.calls for counted in routers] == [1] * NUM_LAYERS


def test_decoding_computes_only_the_rows_that_keep_a_layer(model):
    mlps = [Calls(layer.mlp) for layer in layers_of(model)]
    written(model, tiny.batch())
    # One prefill and NEW - 1 steps.
    assert [counted.rows for counted in mlps] == (PATTERN.sum(0) * NEW).tolist()


def test_the_prompt_is_encoded_once_and_fed_token_by_token(model):
    inputs, mlp = tiny.batch(), Calls(layers_of(model)[0].mlp)
    written(model, inputs)
    assert mlp.tokens == len(NAMES) * (inputs["input_ids"].shape[1] + 2 + NEW - 1)


def test_generated_ids_begin_with_the_prompt(model):
    inputs = tiny.batch()
    tokens = model.generate(**inputs, **GREEDY)
    assert tokens.shape == (len(NAMES), inputs["input_ids"].shape[1] + NEW)
    assert torch.equal(tokens[:, :-NEW], inputs["input_ids"])


def test_the_cache_counts_ordinary_tokens_only(model):
    inputs = tiny.batch()
    # The last token written has not been fed.
    assert details(model, inputs).past_key_values.get_seq_length() == inputs["input_ids"].shape[1] + NEW - 1


# ---------------------------------------- equalities


@pytest.mark.parametrize("way", WAYS)
def test_cached_equals_uncached(family_model, way):
    inputs = tiny.batch(["question", "text_only", "two_images", "empty_question"])
    cached = written(family_model, inputs, **WAYS[way])
    assert torch.equal(cached, written(family_model, inputs, **WAYS[way], use_cache=False))


def test_cached_equals_uncached_with_eager_attention():
    for family in tiny.FAMILIES:
        model = tiny.routed_model(family, "eager")
        assert torch.equal(written(model, tiny.batch()), written(model, tiny.batch(), use_cache=False))


@pytest.mark.parametrize("name", ["question", "text_only", "two_images", "empty_question"])
def test_generation_equals_one_pass_per_token_along_the_route(family_model, name):
    inputs = tiny.alone(name)
    route = PATTERN[NAMES.index(name)]
    assert torch.equal(written(family_model, inputs), by_hand(family_model, inputs, route))


@pytest.mark.parametrize("side", ["left", "right"])
def test_row_in_batch_equals_row_alone(family_model, side):
    together = written(family_model, tiny.batch(side=side))
    for row, name in enumerate(NAMES):
        assert torch.equal(written(family_model, tiny.alone(name))[0], together[row])


def test_right_padded_prompts_keep_their_routes(model):
    assert torch.equal(details(model, tiny.batch(side="right")).past_key_values.routes, PATTERN)


def test_right_padded_segments_move_with_their_prompts(model):
    names = ["question", "text_only", "empty_question"]
    left, right = tiny.batch(names, "left"), tiny.batch(names, "right")
    cut = {}
    for side, inputs in (("left", left), ("right", right)):
        segments = model.model.segments_of(inputs["input_ids"], None, inputs["attention_mask"])
        cut[side] = segments.masked_fill((inputs["input_ids"] == 13) | (inputs["input_ids"] == 20), -1)
    ours = details(model, right, routing_segments=cut["right"])
    base = details(model, left, routing_segments=cut["left"])
    assert torch.equal(ours.past_key_values.routes, base.past_key_values.routes)
    assert torch.equal(ours.sequences[:, -NEW:], base.sequences[:, -NEW:])


def test_right_padded_prompts_with_a_given_empty_cache_equal_left_padded_ones(model):
    ours = written(model, tiny.batch(side="right"), past_key_values=RoeCache(model.config))
    assert torch.equal(ours, written(model, tiny.batch(side="left")))


def test_right_padded_new_text_on_a_cache_is_refused(model):
    first = details(model, tiny.batch())
    text = torch.cat([first.sequences, torch.tensor([[40]] * 5 + [[tiny.PAD]])], 1)
    mask = torch.nn.functional.pad(tiny.batch()["attention_mask"], (0, NEW + 1), value=1)
    mask[-1, -1] = 0
    with pytest.raises(ValueError, match="right-padded prompts cannot continue past_key_values: pad on the left"):
        model.generate(input_ids=text, attention_mask=mask, past_key_values=first.past_key_values, **GREEDY)


def test_left_padding_without_a_mask_is_known_by_its_token(model):
    inputs = tiny.batch()
    expected = written(model, inputs)
    inputs.pop("attention_mask")
    assert torch.equal(written(model, inputs), expected)


def test_right_padded_embeddings_equal_left_padded_ones(model):
    outputs = []
    for side in ("left", "right"):
        inputs = tiny.batch(side=side)
        inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
        outputs.append(model.generate(**inputs, **GREEDY))
    assert torch.equal(*outputs)


def test_a_mistral_prompt_longer_than_its_window_is_continued_past_it(mistral):
    inputs = tiny.batch(["other_question", "text_only"])
    together = written(mistral, inputs, max_new_tokens=2 * tiny.WINDOW)
    uncached = written(mistral, inputs, max_new_tokens=2 * tiny.WINDOW, use_cache=False)
    one = written(mistral, tiny.alone("other_question"), max_new_tokens=2 * tiny.WINDOW)
    assert torch.equal(together, uncached) and torch.equal(together[0], one[0])


@pytest.mark.parametrize("way", ["greedy", "beams", "returned beams"])
def test_skip_ratio_zero_equals_stock_llava(family_model, way):
    inputs = tiny.batch()
    stock = tiny.stock_of(family_model)
    assert torch.equal(written(family_model, inputs, **WAYS[way], skip_ratio=0.0), written(stock, inputs, **WAYS[way]))


@pytest.mark.parametrize("route", [[False] * 4, [False, True, True, False], [True, False, False, False]])
@pytest.mark.parametrize("way", ["greedy", "beams"])
def test_any_layer_may_be_skipped(family_model, route, way):
    inputs = tiny.batch()
    cached = written(family_model, inputs, **WAYS[way], routes=route)
    assert torch.equal(cached, written(family_model, inputs, **WAYS[way], routes=route, use_cache=False))


def test_a_pinned_route_gives_the_tokens_it_gives_when_decided(family_model):
    inputs = tiny.batch()
    routers = [Calls(layer.router) for layer in layers_of(family_model)]
    pinned = written(family_model, inputs, routes=PATTERN)
    assert sum(counted.calls for counted in routers) == 0
    assert torch.equal(pinned, written(family_model, inputs))


@pytest.mark.parametrize("form", [lambda r: r, lambda r: r.tolist(), lambda r: r.int()], ids=["bool", "list", "int"])
def test_routes_may_be_given_in_several_forms(model, form):
    assert torch.equal(details(model, tiny.batch(), routes=form(PATTERN)).past_key_values.routes, PATTERN)


@pytest.mark.parametrize("shape", [(4,), (1, 4)])
@pytest.mark.parametrize("way", ["greedy", "returned beams"])
def test_one_route_serves_a_whole_batch(model, shape, way):
    route = torch.tensor([True, False, True, True]).reshape(shape)
    inputs = tiny.batch(["question", "text_only"])
    ours = written(model, inputs, **WAYS[way], routes=route)
    assert torch.equal(ours, written(model, inputs, **WAYS[way], routes=route.expand(2, 4)))


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("way", ["greedy", "beams"])
def test_a_route_bias_per_layer_forces_the_routes(model, use_cache, way):
    bias = torch.tensor([math.inf, -math.inf, math.inf, -math.inf])
    inputs = tiny.batch()
    ours = written(model, inputs, **WAYS[way], route_bias=bias, use_cache=use_cache)
    assert torch.equal(ours, written(model, inputs, **WAYS[way], routes=[True, False, True, False]))


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("way", ["greedy", "beams", "returned beams"])
def test_a_route_bias_per_row_forces_other_routes_than_the_routers(model, use_cache, way):
    inputs, routes = tiny.batch(), PATTERN.flip(0)
    bias = torch.where(routes, math.inf, -math.inf)
    ours = written(model, inputs, **WAYS[way], route_bias=bias, use_cache=use_cache)
    assert torch.equal(ours, written(model, inputs, **WAYS[way], routes=routes))
    assert not torch.equal(ours, written(model, inputs, **WAYS[way]))


@pytest.mark.parametrize("way", WAYS)
def test_routes_follow_beams_and_returned_sequences(model, way):
    torch.manual_seed(7)
    names = ["question", "text_only", "empty_question"]
    arguments = {"max_new_tokens": NEW, "return_dict_in_generate": True, **WAYS[way]}
    outputs = model.generate(**tiny.batch(names), **arguments)
    rows = outputs.past_key_values.routes.shape[0] // len(names)
    expected = PATTERN[[NAMES.index(name) for name in names]].repeat_interleave(rows, 0)
    assert rows == max(WAYS[way].get("num_beams", 1), WAYS[way].get("num_return_sequences", 1))
    assert torch.equal(outputs.past_key_values.routes, expected)


@pytest.mark.parametrize("way", ["beams", "returned beams"])
def test_beams_of_a_row_in_a_batch_equal_those_of_the_row_alone(family_model, way):
    together = written(family_model, tiny.batch(), **WAYS[way])
    count = WAYS[way].get("num_return_sequences", 1)
    for row, name in enumerate(NAMES):
        alone = written(family_model, tiny.alone(name), **WAYS[way])
        assert torch.equal(alone, together[row * count : (row + 1) * count])


# ---------------------------------------- embeddings, drafts, streams


@pytest.mark.parametrize("way", ["greedy", "returned beams"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_embeddings_with_placeholders_equal_ids(family_model, way, use_cache):
    inputs = tiny.batch()
    expected = written(family_model, inputs, **WAYS[way])
    inputs["inputs_embeds"] = family_model.get_input_embeddings()(inputs.pop("input_ids"))
    assert torch.equal(written(family_model, inputs, **WAYS[way], use_cache=use_cache), expected)


@pytest.mark.parametrize("way", ["greedy", "returned beams"])
def test_embeddings_with_merged_images_and_segments_equal_ids(model, way):
    inputs = tiny.batch()
    features = torch.cat(model.model.get_image_features(inputs["pixel_values"]).pooler_output)
    ids = inputs["input_ids"]
    embeds = model.get_input_embeddings()(ids).masked_scatter((ids == tiny.IMAGE)[..., None], features)
    segments = model.model.segments_of(ids, None, inputs["attention_mask"])
    given = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"], "routing_segments": segments}
    assert torch.equal(written(model, given, **WAYS[way]), written(model, inputs, **WAYS[way]))


@pytest.mark.parametrize("name", ["question", "text_only", "two_images"])
def test_prompt_lookup_writes_the_same_tokens(family_model, name):
    inputs = tiny.alone(name)
    # Repeated prompt tokens give the look-up something to propose.
    inputs["input_ids"] = torch.cat([inputs["input_ids"], inputs["input_ids"][:, -2:]], 1)
    router = Calls(layers_of(family_model)[0].router)
    plain = written(family_model, inputs, max_new_tokens=12)
    assert torch.equal(written(family_model, inputs, max_new_tokens=12, prompt_lookup_num_tokens=3), plain)
    assert router.calls == 2


@pytest.mark.parametrize("drafting", ["prompt lookup", "assistant"])
def test_drafts_in_the_first_pass_do_not_decide(model, drafting):
    inputs = tiny.alone("question")
    inputs["input_ids"] = torch.cat([inputs["input_ids"], inputs["input_ids"][:, -2:]], 1)
    lengths, logits = [], []
    arguments = {"prompt_lookup_num_tokens": 3}
    if drafting == "assistant":
        arguments = {"assistant_model": tiny.tiny_model(model.config, seed=5)}
    layers_of(model)[0].mlp.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    for layer in layers_of(model):
        layer.router.register_forward_hook(lambda module, args, out: logits.append(out[:, 0]))
    written(model, inputs, **arguments)
    assert lengths[0] > inputs["input_ids"].shape[1] + 2  # drafts came along
    expected = model(**inputs).router_logits
    torch.testing.assert_close(torch.stack(logits[:NUM_LAYERS], 1), expected, rtol=0, atol=1e-5)


def test_prompt_lookup_with_skipped_layer_0_writes_the_same_tokens(family_model):
    inputs = tiny.alone("question")
    inputs["input_ids"] = torch.cat([inputs["input_ids"], inputs["input_ids"][:, -2:]], 1)
    for route in ([False, True, True, False], [False] * 4):
        plain = written(family_model, inputs, max_new_tokens=12, routes=route)
        assert torch.equal(
            written(family_model, inputs, max_new_tokens=12, routes=route, prompt_lookup_num_tokens=3), plain
        )


@pytest.mark.parametrize("name", ["question", "text_only"])
@pytest.mark.parametrize("assistant", ["itself", "another", "stock"])
def test_assisted_decoding_writes_the_same_tokens(family_model, assistant, name):
    other = {
        "itself": lambda: family_model,
        "another": lambda: tiny.tiny_model(family_model.config, seed=5),
        "stock": lambda: tiny.stock_of(family_model),
    }[assistant]()
    plain = written(family_model, tiny.alone(name), max_new_tokens=10)
    assert torch.equal(written(family_model, tiny.alone(name), max_new_tokens=10, assistant_model=other), plain)


def test_assisted_decoding_follows_a_pinned_route(model):
    route = [False, True, False, True]
    plain = written(model, tiny.alone("question"), routes=route)
    assert torch.equal(written(model, tiny.alone("question"), routes=route, assistant_model=model), plain)


def test_a_text_streamer_prints_the_tokens(model, capsys):
    tokenizer, inputs = tiny.tokenizer(), tiny.alone("question")
    model.generate(**inputs, **GREEDY, streamer=TextStreamer(tokenizer, skip_prompt=True))
    expected = tokenizer.decode(written(model, inputs)[0])
    assert capsys.readouterr().out.split() == expected.split()


def test_a_text_iterator_streamer_hands_out_the_tokens(model):
    tokenizer, inputs = tiny.tokenizer(), tiny.alone("question")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=30)
    thread = threading.Thread(target=model.generate, kwargs={**inputs, **GREEDY, "streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces).split() == tokenizer.decode(written(model, inputs)[0]).split()


# ---------------------------------------- continuing from a cache


@pytest.mark.parametrize("name", ["question", "text_only", "two_images"])
def test_continuing_from_a_returned_cache_keeps_its_route(family_model, name):
    inputs, more = tiny.alone(name), torch.tensor([[40, 41, 42, 43, 44, 45, 46]])
    first = details(family_model, inputs)
    text = torch.cat([first.sequences, more], 1)
    routers = Calls(layers_of(family_model)[1].router)
    second = family_model.generate(
        input_ids=text, past_key_values=first.past_key_values, **GREEDY, return_dict_in_generate=True
    )
    route = PATTERN[NAMES.index(name)][None]
    assert routers.calls == 0
    assert torch.equal(second.past_key_values.routes, route)
    recomputed = written(family_model, inputs | {"input_ids": text}, routes=route)
    assert torch.equal(second.sequences[:, -NEW:], recomputed)


def test_continuing_a_batch_from_a_returned_cache_keeps_its_routes(family_model):
    inputs, more = tiny.batch(), torch.arange(40, 58).reshape(6, 3)
    first = details(family_model, inputs)
    text = torch.cat([first.sequences, more], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(6, NEW + 3, dtype=torch.long)], 1)
    ours = family_model.generate(input_ids=text, attention_mask=mask, past_key_values=first.past_key_values, **GREEDY)
    recomputed = written(family_model, inputs | {"input_ids": text, "attention_mask": mask}, routes=PATTERN)
    assert torch.equal(ours[:, -NEW:], recomputed)


def test_a_processors_segments_do_not_disturb_a_cache_that_has_routes(model):
    inputs = tiny.alone("question")
    first = details(model, inputs)
    text = torch.cat([first.sequences, torch.tensor([[40, 41]])], 1)
    plain = model.generate(input_ids=text, past_key_values=copy.deepcopy(first.past_key_values), **GREEDY)
    segments = torch.zeros_like(text)
    ours = model.generate(input_ids=text, past_key_values=first.past_key_values, routing_segments=segments, **GREEDY)
    assert torch.equal(ours, plain)


def test_continuing_with_another_image_equals_one_pass_along_the_route(model):
    inputs, route = tiny.alone("question"), PATTERN[:1]
    first = details(model, inputs)
    image = torch.randn(1, 3, 28, 28)
    text = torch.cat([first.sequences, torch.tensor([[*[tiny.IMAGE] * 4, 40, 41]])], 1)
    ours = model.generate(input_ids=text, pixel_values=image, past_key_values=first.past_key_values, **GREEDY)
    whole = {"input_ids": text, "pixel_values": torch.cat([inputs["pixel_values"], image])}
    assert torch.equal(ours[:, -NEW:], written(model, whole, routes=route))


def test_a_given_empty_cache_is_filled(model):
    cache = RoeCache(model.config)
    outputs = details(model, tiny.batch(), past_key_values=cache)
    assert outputs.past_key_values is cache and torch.equal(cache.routes, PATTERN)
    assert torch.equal(outputs.sequences, model.generate(**tiny.batch(), **GREEDY))


@pytest.mark.parametrize("given", [{"routes": PATTERN[:1]}, {"route_bias": 1.0}, {"skip_ratio": 0.0}])
def test_a_cache_with_routes_takes_no_new_ones(model, given):
    first = details(model, tiny.alone("question"))
    name = next(iter(given))
    with pytest.raises(ValueError, match=f"{name} given with a cache that already has routes"):
        model.generate(input_ids=first.sequences, past_key_values=first.past_key_values, **GREEDY, **given)


def test_generating_again_decides_again(model):
    first = written(model, tiny.alone("question"))
    written(model, tiny.alone("text_only"), routes=[False] * 4)
    assert torch.equal(written(model, tiny.alone("question")), first)


def test_two_threads_generate_with_one_model(model):
    expected = [written(model, tiny.alone(name), max_new_tokens=20) for name in NAMES]
    results = [None] * len(NAMES)

    def run(row):
        with torch.no_grad():
            results[row] = model.generate(**tiny.alone(NAMES[row]), max_new_tokens=20, do_sample=False)[:, -20:]

    threads = [threading.Thread(target=run, args=(row,)) for row in range(len(NAMES))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ours, alone in zip(results, expected, strict=True):
        assert torch.equal(ours, alone)


def test_generating_in_training_mode_routes_hard(model):
    expected = written(model, tiny.batch())
    assert torch.equal(written(model.train(), tiny.batch()), expected)


# ---------------------------------------- errors


def test_continuous_batching_is_refused(model):
    for call in (model.generate_batch, model.init_continuous_batching):
        with pytest.raises(ValueError, match=r"continuous batching is not supported.*generate\(\)"):
            call([[1, 2]])
    with pytest.raises(ValueError, match="continuous batching"):
        model.continuous_batching_context_manager()


def test_chunked_prefill_is_refused(model):
    with pytest.raises(ValueError, match="prefill_chunk_size is not supported"):
        written(model, tiny.alone("question"), prefill_chunk_size=4)


def test_uncached_generation_in_training_mode_is_refused(model):
    with pytest.raises(ValueError, match=r"use_cache=False.*model\.eval\(\)"):
        written(model.train(), tiny.alone("question"), use_cache=False)


def test_an_uncalibrated_skip_ratio_is_refused(model):
    with pytest.raises(ValueError, match=r"skip_ratio=0\.3 needs a calibrated model.*route_bias"):
        written(model, tiny.alone("question"), skip_ratio=0.3)


@pytest.mark.parametrize("given", [{"routes": PATTERN[:1]}, {"route_bias": 0.0}])
def test_a_skip_ratio_comes_alone(model, given):
    with pytest.raises(ValueError, match=r"skip_ratio sets the route bias itself.*routes and route_bias"):
        written(model, tiny.alone("question"), skip_ratio=0.0, **given)


def test_a_cache_of_a_class_nobody_checked_is_refused(model):
    class OtherCache(DynamicCache):
        pass

    for cache in (OtherCache(), EncoderDecoderCache(DynamicCache(), DynamicCache())):
        with pytest.raises(ValueError, match=rf"a {type(cache).__name__} cannot hold routes.*RoeCache"):
            written(model, tiny.alone("question"), past_key_values=cache)


@pytest.mark.parametrize("name", ["offloaded", "offloaded_static"])
def test_offloading_from_a_cpu_is_refused(model, name):
    with pytest.raises(ValueError, match=rf"cache_implementation='{name}' .* the model is on the CPU"):
        written(model, tiny.alone("question"), cache_implementation=name)


def test_right_padding_with_position_ids_is_refused(model):
    inputs = tiny.batch(side="right")
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with pytest.raises(ValueError, match="position_ids with right-padded prompts: pad on the left"):
        model.generate(**inputs, position_ids=positions, **GREEDY)


@pytest.mark.parametrize("use_cache", [True, False])
def test_routes_of_another_shape_are_refused(model, use_cache):
    with pytest.raises(ValueError, match=r"routes must have shape \(6, 4\).*\(5, 4\)"):
        written(model, tiny.batch(), routes=PATTERN[:5], use_cache=use_cache)


def test_an_unknown_argument_is_refused(model):
    with pytest.raises(ValueError, match="rout_bias"):
        written(model, tiny.alone("question"), rout_bias=1.0)


def test_a_failed_generation_leaves_nothing_behind_in_a_given_cache(model):
    cache = RoeCache(model.config)
    with pytest.raises(ValueError, match="routes must have shape"):
        written(model, tiny.alone("question"), routes=[True] * 5, past_key_values=cache)
    details(model, tiny.alone("question"), past_key_values=cache)
    assert torch.equal(cache.routes, PATTERN[:1])


def test_generating_while_training_with_gradient_checkpointing_is_refused(model):
    model.train()
    model.activation_checkpointing_enable()
    with pytest.raises(ValueError, match=r"gradient checkpointing .* model.eval\(\)"):
        model.generate(**tiny.alone("question"), max_new_tokens=2)
