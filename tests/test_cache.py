"""The cache: rows of kept layers only, routes along with them, and its own count of tokens."""

import copy

import pytest
import tiny
import torch
from tiny import NAMES, NUM_LAYERS, PATTERN

from roe_llava import RoeCache

pytestmark = pytest.mark.usefixtures("no_gradients")
# Matrix products of another batch size round differently; logits are of order 1.
CLOSE = {"rtol": 0, "atol": 1e-5}
NEXT = torch.tensor([[60], [61], [62], [63], [64], [65]])


@pytest.fixture(params=tiny.FAMILIES)
def filled(request):
    """A model, its inputs and the outputs of their prefill; every row of the batch is real to its end."""
    model, inputs = tiny.routed_model(request.param), tiny.batch()
    with torch.no_grad():
        return model, inputs, model(**inputs)


def step(model, inputs, cache, rows, tokens=NEXT):
    """Logits of one more token for some rows, given a cache that holds just these rows."""
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, tokens.shape[1]), value=1)
    return model(input_ids=tokens[rows], attention_mask=mask[rows], past_key_values=cache).logits


def held(cache):
    return [layer.keys.shape[0] if layer.is_initialized else 0 for layer in cache.layers]


def test_a_layers_entry_holds_the_rows_that_run_it(filled):
    cache = filled[2].past_key_values
    assert held(cache) == PATTERN.sum(0).tolist()
    assert torch.equal(cache.routes, PATTERN)
    assert [rows.keep for rows in cache.rows] == [tuple(keep) for keep in PATTERN.t().tolist()]


def test_skipped_layer_caches_nothing(family_model):
    routes = PATTERN.clone()
    routes[:, [0, 2]] = False
    cache = family_model(**tiny.batch(), routes=routes).past_key_values
    assert [layer.is_initialized for layer in cache.layers] == [False, True, False, True]


def test_routing_tokens_are_never_cached(filled):
    _, inputs, outputs = filled
    longest = inputs["input_ids"].shape[1]
    for layer in outputs.past_key_values.layers:
        # A sliding layer keeps the last window - 1 tokens.
        expected = longest if getattr(layer, "sliding_window", None) is None else tiny.WINDOW - 1
        assert layer.keys.shape[2] == expected


def test_cached_keys_equal_stock_llavas_where_all_is_kept(model):
    inputs = tiny.alone("question")
    ours = model(**inputs, route_bias=float("inf")).past_key_values
    stock = tiny.stock_of(model)(**inputs).past_key_values
    for own, base in zip(ours.layers, stock.layers, strict=True):
        torch.testing.assert_close(own.keys, base.keys, **CLOSE)
        torch.testing.assert_close(own.values, base.values, **CLOSE)


@pytest.mark.parametrize("route", [[True] * 4, [False, True, False, True], [False] * 4])
def test_tokens_seen_do_not_depend_on_what_is_skipped(model, route):
    inputs = tiny.batch()
    cache = model(**inputs, routes=route).past_key_values
    assert cache.get_seq_length() == cache.get_seq_length(3) == inputs["input_ids"].shape[1]
    step(model, inputs, cache, slice(None))
    assert cache.get_seq_length() == inputs["input_ids"].shape[1] + 1


def test_mask_sizes_are_those_of_a_layer_every_row_runs(mistral):
    stock = tiny.stock_of(mistral)
    ids = torch.arange(20, 30)[None]
    for length in (3, tiny.WINDOW - 1, tiny.WINDOW, 10):
        ours = mistral(input_ids=ids[:, :length], routes=[False, True, True, False]).past_key_values
        base = stock(input_ids=ids[:, :length]).past_key_values
        for queries in (1, 4):
            for layer in range(NUM_LAYERS):
                assert ours.get_mask_sizes(queries, layer) == base.get_mask_sizes(queries, layer)


def test_a_step_follows_the_routes_of_the_cache(filled):
    model, inputs, outputs = filled
    mlps = [tiny.Calls(layer.mlp) for layer in tiny.layers_of(model)]
    step(model, inputs, outputs.past_key_values, slice(None))
    assert [counted.tokens for counted in mlps] == PATTERN.sum(0).tolist()


def test_decoding_calls_no_router(filled):
    model, _, outputs = filled
    routers = [tiny.Calls(layer.router) for layer in tiny.layers_of(model)]
    after = model(input_ids=NEXT, past_key_values=outputs.past_key_values)
    assert sum(counted.calls for counted in routers) == 0
    assert after.router_logits is None and torch.equal(after.routes, PATTERN)


@pytest.mark.parametrize("source", [[5, 4, 3, 2, 1, 0], [2, 2, 0, 0, 4, 4], [3, 3, 3, 3, 3, 3]])
def test_reordering_moves_rows_and_routes_together(filled, source):
    model, inputs, outputs = filled
    cache, source = outputs.past_key_values, torch.tensor(source)
    expected = step(model, inputs, copy.deepcopy(cache), slice(None), NEXT[:1].expand(6, 1))
    cache.reorder_cache(source)
    assert torch.equal(cache.routes, PATTERN[source]) and held(cache) == PATTERN[source].sum(0).tolist()
    ours = step(model, {"attention_mask": inputs["attention_mask"][source]}, cache, slice(None), NEXT[:1].expand(6, 1))
    torch.testing.assert_close(ours, expected[source], **CLOSE)


@pytest.mark.parametrize("chosen", [torch.tensor([4, 1]), torch.tensor([0, 1, 0, 0, 1, 0]).bool(), torch.tensor([3])])
def test_selecting_keeps_some_rows(filled, chosen):
    model, inputs, outputs = filled
    cache = outputs.past_key_values
    expected = step(model, inputs, copy.deepcopy(cache), slice(None))[chosen]
    cache.batch_select_indices(chosen)
    assert torch.equal(cache.routes, PATTERN[chosen]) and held(cache) == PATTERN[chosen].sum(0).tolist()
    torch.testing.assert_close(step(model, inputs, cache, chosen), expected, **CLOSE)


def test_repeating_repeats_rows_and_routes(filled):
    model, inputs, outputs = filled
    cache = outputs.past_key_values
    expected = step(model, inputs, copy.deepcopy(cache), slice(None)).repeat_interleave(2, 0)
    cache.batch_repeat_interleave(2)
    assert torch.equal(cache.routes, PATTERN.repeat_interleave(2, 0))
    rows = torch.arange(6).repeat_interleave(2)
    torch.testing.assert_close(step(model, inputs, cache, rows), expected, **CLOSE)


def test_a_row_without_a_layer_survives_being_selected_alone_and_repeated(filled):
    model, inputs, outputs = filled
    cache, row = outputs.past_key_values, NAMES.index("empty_question")  # runs layer 0 only
    expected = step(model, inputs, copy.deepcopy(cache), slice(None))[[row] * 3]
    cache.batch_select_indices(torch.tensor([row]))
    cache.batch_repeat_interleave(3)
    assert held(cache) == [3, 0, 0, 0]
    torch.testing.assert_close(step(model, inputs, cache, [row] * 3), expected, **CLOSE)


def test_reorganising_an_empty_cache_does_nothing(model):
    cache = RoeCache(model.config)
    cache.reorder_cache(torch.tensor([0, 1]))
    cache.batch_select_indices(torch.tensor([0]))
    cache.batch_repeat_interleave(2)
    assert cache.routes is None and cache.get_seq_length() == 0


@pytest.mark.parametrize("route", [None, [False, True, False, True], [False] * 4])
def test_cropping_forgets_the_last_tokens_and_keeps_routes(model, route):
    inputs = tiny.batch()
    chosen = {} if route is None else {"routes": route}
    cache = model(**inputs, **chosen).past_key_values
    routes = cache.routes.clone()
    expected = step(model, inputs, copy.deepcopy(cache), slice(None))
    step(model, inputs, cache, slice(None), NEXT.repeat(1, 3) + 7)
    cache.crop(-3)
    assert cache.get_seq_length() == inputs["input_ids"].shape[1] and torch.equal(cache.routes, routes)
    torch.testing.assert_close(step(model, inputs, cache, slice(None)), expected, **CLOSE)


def test_cropping_a_sliding_cache_that_records_its_past_forgets_the_last_tokens(mistral):
    inputs = tiny.alone("question")
    cache = RoeCache(mistral.config)
    cache.activate_past_recording()
    mistral(**inputs, past_key_values=cache)
    expected = mistral(input_ids=NEXT[:1], past_key_values=copy.deepcopy(cache)).logits
    mistral(input_ids=torch.tensor([[70, 71, 72]]), past_key_values=cache)
    cache.crop(-3)
    torch.testing.assert_close(mistral(input_ids=NEXT[:1], past_key_values=cache).logits, expected, **CLOSE)


def test_cropping_to_a_length_is_refused(model):
    with pytest.raises(ValueError, match="crop takes minus the number of tokens to remove, got 5"):
        RoeCache(model.config).crop(5)


def test_a_reset_cache_decides_anew(model):
    cache = model(**tiny.alone("question"), routes=[False] * 4).past_key_values
    cache.reset()
    assert cache.routes is None and cache.get_seq_length() == 0
    outputs = model(**tiny.alone("question"), past_key_values=cache)
    assert torch.equal(outputs.routes, PATTERN[:1])


def test_a_cache_with_routes_names_what_it_cannot_take(model):
    cache = model(**tiny.alone("question")).past_key_values
    with pytest.raises(ValueError, match="routes and route_bias given with a cache that already has routes"):
        cache.leave_request({"routes": PATTERN, "route_bias": 1.0, "routing_segments": None})
    with pytest.raises(ValueError, match="route_bias given with a cache"):
        cache.take_request({"route_bias": 1.0})


def test_a_request_is_read_once(model):
    cache = RoeCache(model.config)
    cache.leave_request({"route_bias": 1.0})
    assert cache.take_request({"routes": None, "route_bias": None})["route_bias"] == 1.0
    assert cache.take_request({"routes": None, "route_bias": None})["route_bias"] is None


def test_two_generations_interleaved_step_by_step_do_not_disturb_each_other(family_model):
    first, second = tiny.alone("question"), tiny.batch(["text_only", "two_images"])
    other = {"routes": [False, True, True, False]}

    def steps(inputs, cache=None, **chosen):
        """Feeds the greedy token again and again; yields logits."""
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
        outputs = family_model(**inputs, **chosen, logits_to_keep=1)
        while True:
            yield outputs.logits[:, -1]
            token = outputs.logits[:, -1].argmax(-1, keepdim=True)
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            outputs = family_model(input_ids=token, attention_mask=mask, past_key_values=outputs.past_key_values)

    def run(generators, rounds=5):
        return [[next(generator) for generator in generators] for _ in range(rounds)]

    alone_first = run([steps(first)])
    alone_second = run([steps(second)])
    alone_third = run([steps(first, **other)])
    together = run([steps(first), steps(second), steps(first, **other)])
    for (a,), (b,), (c,), mixed in zip(alone_first, alone_second, alone_third, together, strict=True):
        assert torch.equal(a, mixed[0]) and torch.equal(b, mixed[1]) and torch.equal(c, mixed[2])


def test_two_prefills_before_any_step_do_not_disturb_each_other(model):
    first, second = tiny.alone("question"), tiny.alone("text_only")
    expected = model(input_ids=NEXT[:1], past_key_values=model(**first).past_key_values)
    one = model(**first).past_key_values
    two = model(**second).past_key_values
    ours = model(input_ids=NEXT[:1], past_key_values=one)
    assert torch.equal(ours.logits, expected.logits)
    assert torch.equal(two.routes, PATTERN[1:2])
