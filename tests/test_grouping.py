"""`group_by_route`: what a prompt gives alone, in the caller's order, from batches that share their layers."""

import copy
import functools
import itertools

import pytest
import tiny
import torch
from tiny import NAMES, NUM_LAYERS, PATTERN, Calls, layers_of
from transformers import BatchFeature, DynamicCache, GenerationConfig, LogitsProcessorList, TextStreamer

from roe_llava import RoeCache
from roe_llava.grouping_roe import choose_batch, wasted_layers

NEW = 6
GREEDY = {"max_new_tokens": NEW, "do_sample": False}
WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "returned beams": {"num_beams": 3, "num_return_sequences": 2},
    "early stopping": {"num_beams": 2, "early_stopping": True},
}
# Images and none, routes twice and alone, lengths from 1 to 13.
MANY = ["question", "one_token", "two_images", "text_only", "question", "other_question", "empty_question", "one_token"]

pytestmark = pytest.mark.usefixtures("no_gradients")


def prompts(names=MANY):
    return [tiny.alone(name) for name in names]


def each_alone(model, given, **arguments):
    """What `generate` gives every prompt, as `group_by_route` returns it."""
    several = arguments.get("num_return_sequences", 1) > 1
    tokens = [model.generate(**prompt, **arguments) for prompt in given]
    return tokens if several else [sequence[0] for sequence in tokens]


@functools.cache
def _alone(family, arguments):
    return each_alone(tiny.routed_model(family), prompts(), **dict(arguments))


def many_alone(model, **arguments):
    """`each_alone` of `MANY`, for a model as it was made."""
    frozen = tuple((name, tuple(value) if isinstance(value, list) else value) for name, value in arguments.items())
    return _alone(model.config.text_config.model_type, frozen)


def assert_same(ours, expected):
    assert len(ours) == len(expected)
    for number, (own, alone) in enumerate(zip(ours, expected, strict=True)):
        assert torch.equal(own, alone), f"prompt {number}: {own.tolist()}, alone {alone.tolist()}"


# ---------------------------------------- what a prompt gives alone


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("batch_size", "pool_size"), [(1, 1), (3, 5), (8, 64)])
def test_every_prompt_gives_what_it_gives_alone(family_model, way, batch_size, pool_size):
    arguments = {**GREEDY, **WAYS[way]}
    ours = family_model.group_by_route(prompts(), batch_size, pool_size, **arguments)
    assert_same(ours, many_alone(family_model, **arguments))


def test_eager_attention_gives_the_same():
    for family in tiny.FAMILIES:
        model = tiny.routed_model(family, "eager")
        assert_same(model.group_by_route(prompts(), 4, **GREEDY), each_alone(model, prompts(), **GREEDY))


def test_answers_longer_than_a_sliding_window(family_model):
    arguments = {**GREEDY, "max_new_tokens": 2 * tiny.WINDOW + 3}
    ours = family_model.group_by_route(prompts(), 8, **arguments)
    assert_same(ours, many_alone(family_model, **arguments))


@pytest.mark.parametrize("longest", range(1, tiny.WINDOW + 3))
def test_prompts_of_every_length_around_the_window(family_model, longest):
    """In one batch, so that joined windows are full, not full, and both at once."""
    given = [{"input_ids": torch.arange(20, 20 + length)[None]} for length in range(1, longest + 1)]
    arguments = {**GREEDY, "routes": [True] * NUM_LAYERS}
    assert_same(family_model.group_by_route(given, 8, **arguments), each_alone(family_model, given, **arguments))


def end_tokens(model):
    """Tokens that end some prompts' answers at different steps, and others' not at all."""
    answers = [tokens[len(tiny.PROMPTS[name]) :] for tokens, name in zip(greedy(model), MANY, strict=True)]
    return [int(answers[0][1]), int(answers[1][3])]


def greedy(model):
    return many_alone(model, **GREEDY)


@pytest.mark.parametrize(("way", "pad"), [("greedy", 3), *((way, tiny.PAD) for way in WAYS)])
def test_rows_that_end_early_have_no_padding_behind_them(family_model, way, pad):
    ends = end_tokens(family_model)
    arguments = {**GREEDY, **WAYS[way], "max_new_tokens": 10, "eos_token_id": ends, "pad_token_id": pad}
    expected = many_alone(family_model, **arguments)
    lengths = {tokens.shape[-1] - len(tiny.PROMPTS[name]) for tokens, name in zip(expected, MANY, strict=True)}
    assert len(lengths) > 1, "the end tokens are meant to fire at different steps"
    assert_same(family_model.group_by_route(prompts(), 8, **arguments), expected)


def test_one_end_token_as_a_number(model):
    arguments = {**GREEDY, "eos_token_id": end_tokens(model)[0]}
    assert_same(model.group_by_route(prompts(), 8, **arguments), each_alone(model, prompts(), **arguments))


@pytest.mark.parametrize(
    "given",
    [
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 1},
        {"max_new_tokens": None, "max_length": 15},
        {"min_length": 14, "eos_token_id": list(range(64))},
        {"min_new_tokens": 3, "eos_token_id": list(range(64))},
        {"suppress_tokens": list(range(100))},
    ],
    ids=lambda given: list(given)[-1],
)
@pytest.mark.parametrize("way", ["greedy", "beams"])
def test_settings_that_read_or_count_the_prompt(model, way, given):
    arguments = {**GREEDY, **WAYS[way], "pad_token_id": 3, **given}
    expected = many_alone(model, **arguments)
    plain = many_alone(model, **{**GREEDY, **WAYS[way]})
    assert any(not torch.equal(*pair) for pair in zip(expected, plain, strict=True)), "the setting changes nothing"
    assert_same(model.group_by_route(prompts(), 8, **arguments), expected)


def test_settings_of_the_model_hold(model):
    model.generation_config.num_beams = 3
    model.generation_config.max_length = 15
    assert_same(model.group_by_route(prompts(), 8), each_alone(model, prompts()))


def test_a_generation_config_holds(model):
    config = GenerationConfig(max_new_tokens=4, num_beams=2, num_return_sequences=2)
    expected = [model.generate(**prompt, generation_config=copy.deepcopy(config)) for prompt in prompts()]
    assert_same(model.group_by_route(prompts(), 8, generation_config=config), expected)


def test_without_a_length_twenty_tokens_are_written(model):
    assert_same(model.group_by_route(prompts(), 8), each_alone(model, prompts()))


def test_a_logits_processor_sees_no_padding(model):
    seen = []
    processors = LogitsProcessorList([lambda ids, scores: (seen.append(ids), scores)[1]])
    ours = model.group_by_route(prompts(), 8, logits_processor=processors, **GREEDY)
    assert_same(ours, each_alone(model, prompts(), **GREEDY))
    assert all((ids != tiny.PAD).all() for ids in seen)


def test_rows_drawn_from_one_generator_are_still_of_their_prompts(model):
    arguments = {"max_new_tokens": NEW, "do_sample": True, "num_return_sequences": 3}
    ours = model.group_by_route(prompts(), 4, **arguments)
    for tokens, name in zip(ours, MANY, strict=True):
        assert tokens.shape == (3, len(tiny.PROMPTS[name]) + NEW)
        assert tokens[:, :-NEW].tolist() == [tiny.PROMPTS[name]] * 3


def test_sampling_in_batches_of_one_gives_what_generate_gives(model):
    torch.manual_seed(3)
    ours = model.group_by_route(prompts(["question"]), 1, max_new_tokens=NEW, do_sample=True)
    torch.manual_seed(3)
    assert_same(ours, each_alone(model, prompts(["question"]), max_new_tokens=NEW, do_sample=True))


def test_processor_outputs_are_taken_as_they_are(model, word_processor):
    texts = ["USER: <image> what colour is the circle ? ASSISTANT:", "USER: how many squares ? ASSISTANT:"]
    given = [
        word_processor(images=tiny.picture(), text=texts[0], return_tensors="pt"),
        word_processor(text=texts[1], return_tensors="pt"),
    ]
    assert isinstance(given[0], BatchFeature) and "routing_segments" in given[0] and "attention_mask" in given[0]
    assert_same(model.group_by_route(given, 2, **GREEDY), each_alone(model, given, **GREEDY))


# ---------------------------------------- routing arguments


@pytest.mark.parametrize("route", [[True] * 4, [False, True, False, True], [False] * 4])
def test_a_route_for_all_prompts(family_model, route):
    ours = family_model.group_by_route(prompts(), 4, routes=route, **GREEDY)
    assert_same(ours, many_alone(family_model, routes=route, **GREEDY))


@pytest.mark.parametrize("given", [{"route_bias": 1.5}, {"skip_ratio": 0.0}, {"route_bias": [2.0, -9.0, 0.0, 9.0]}])
def test_a_bias_for_all_prompts(model, given):
    ours = model.group_by_route(prompts(), 4, **given, **GREEDY)
    assert_same(ours, each_alone(model, prompts(), **given, **GREEDY))


def test_a_prompts_own_routing_replaces_the_calls(model):
    own = [{"routes": PATTERN[2]}, {"route_bias": torch.tensor([9.0, -9.0, -9.0, 9.0])}, {"skip_ratio": 0.0}, {}]
    given = [{**tiny.alone(name), **routing} for name, routing in zip(NAMES[:4], own, strict=True)]
    expected = each_alone(model, given[:3], **GREEDY) + each_alone(model, given[3:], routes=[False] * 4, **GREEDY)
    assert_same(model.group_by_route(given, 4, routes=[False] * 4, **GREEDY), expected)


# ---------------------------------------- pools, order, progress


def test_prompts_are_taken_from_a_generator_as_the_pool_empties(model):
    taken, finished = [], []

    def endless():
        for number, name in enumerate(itertools.cycle(MANY)):
            if number == 20:
                return
            taken.append(number)
            yield tiny.alone(name)

    generate = model.generate

    def counted(*args, **kwargs):
        if "custom_generate" not in kwargs:
            finished.append(len(taken))
        return generate(*args, **kwargs)

    model.generate = counted
    ours = model.group_by_route(endless(), batch_size=4, pool_size=8, **GREEDY)
    assert finished == [8, 12, 16, 20, 20]
    alone = many_alone(model, **GREEDY)
    assert_same(ours, [alone[number % len(MANY)] for number in range(20)])


def test_progress_wraps_the_prompts(model):
    seen = []

    def progress(given):
        for prompt in given:
            seen.append(prompt)
            yield prompt

    given = prompts()
    model.group_by_route(given, 4, progress=progress, **GREEDY)
    assert all(own is prompt for own, prompt in zip(seen, given, strict=True))


def test_nobody_is_warned_of_what_they_did_not_do(model, recwarn, caplog):
    model.group_by_route(prompts(), 4, **GREEDY)
    model.generation_config.max_length = 30
    model.group_by_route(prompts(), 4)
    assert [str(warning.message) for warning in recwarn] == [] and caplog.records == []


def test_no_prompts_give_no_results(model):
    assert model.group_by_route([], **GREEDY) == []


def test_prompts_and_arguments_are_left_as_they_were(model):
    given = prompts()
    before = copy.deepcopy(given)
    model.group_by_route(given, 4, **GREEDY)
    for prompt, old in zip(given, before, strict=True):
        assert prompt.keys() == old.keys() and all(torch.equal(prompt[name], old[name]) for name in old)


# ---------------------------------------- what is computed


def test_every_token_is_computed_once(model):
    mlps, routers = ([Calls(getattr(layer, name)) for layer in layers_of(model)] for name in ("mlp", "router"))
    images = Calls(model.model.multi_modal_projector)
    model.group_by_route(prompts(), 8, **GREEDY)
    kept = PATTERN[[NAMES.index(name) for name in MANY]]
    read = torch.tensor([len(tiny.PROMPTS[name]) + 2 for name in MANY])  # routing tokens too
    # The first new token needs no pass of its own.
    assert [counted.tokens for counted in mlps] == ((read[:, None] + NEW - 1) * kept).sum(0).tolist()
    assert [counted.rows for counted in routers] == [len(MANY)] * NUM_LAYERS
    assert images.rows == sum(len(tiny.images_of(name)) for name in MANY)


def test_rows_of_one_route_share_a_batch_that_skips_what_they_skip(model):
    """Routes 1101 and 1110 by turns; in batches in the caller's order every layer would run at every step."""
    names = ["question", "two_images", "other_question", "two_images"] * 2
    in_order = PATTERN[[NAMES.index(name) for name in names]]
    assert in_order.view(2, 4, NUM_LAYERS).any(1).all()
    steps = []
    for layer in layers_of(model):
        counted = []
        layer.mlp.register_forward_pre_hook(
            lambda _, args, counted=counted: counted.append(args[0].shape[0]) if args[0].shape[1] == 1 else None
        )
        steps.append(counted)
    model.group_by_route(prompts(names), batch_size=4, **GREEDY)
    # Two batches of 4, NEW - 1 steps each; a layer one route skips runs in the other's batch alone.
    assert steps == [[4] * count for count in (10, 10, 5, 5)]


def bits(text):
    return int(text, 2)


@pytest.mark.parametrize(
    ("routes", "batch_size", "expected"),
    [
        (["1111", "1000", "1111", "1000"], 2, [0, 2]),  # equal ones; the oldest first
        (["1110", "1000", "0111", "1000", "1000"], 3, [1, 3, 4]),
        (["1111", "1100", "1000", "0011"], 2, [1, 2]),  # nearest: one layer more, skipped by one row
        (["1100", "0011", "1110", "0111"], 2, [0, 2]),
        (["0000", "1111", "0000"], 2, [0, 2]),
        (["0001", "1000"], 8, [0, 1]),  # all that is left
        (["1010"], 1, [0]),
    ],
)
def test_the_batch_with_the_fewest_wasted_layers_leaves_first(routes, batch_size, expected):
    assert choose_batch([bits(route) for route in routes], [0] * len(routes), batch_size) == expected


def test_rows_of_different_lengths_stay_apart_where_they_must():
    assert choose_batch([1, 1, 1, 1, 1], [5, 6, 6, 5, 6], 4) == [1, 2, 4]


def test_grouping_leaves_no_more_waste_than_the_callers_order():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        routes = [bits("".join(map(str, row))) for row in torch.randint(2, (32, 6), generator=generator).tolist()]
        left, grouped = list(range(32)), 0
        while left:
            chosen = choose_batch([routes[place] for place in left], [0] * len(left), 8)
            grouped += wasted_layers([routes[left[place]] for place in chosen])
            left = [row for place, row in enumerate(left) if place not in chosen]
        in_order = sum(wasted_layers(routes[start : start + 8]) for start in range(0, 32, 8))
        assert grouped < 0.8 * in_order


# ---------------------------------------- joined caches


def test_joined_caches_equal_the_cache_of_a_padded_batch(family_model):
    names = [name for name in NAMES if name != "one_token"]
    joined = RoeCache.join([family_model(**tiny.alone(name)).past_key_values for name in names], family_model.config)
    inputs = tiny.batch(names)
    whole = family_model(**inputs).past_key_values
    assert torch.equal(joined.routes, whole.routes) and joined.get_seq_length() == whole.get_seq_length()
    assert [rows.keep for rows in joined.rows] == [rows.keep for rows in whole.rows]
    for index, (own, base) in enumerate(zip(joined.layers, whole.layers, strict=True)):
        assert own.keys.shape == base.keys.shape and own.get_mask_sizes(1) == base.get_mask_sizes(1)
        real = inputs["attention_mask"][whole.routes[:, index], -own.keys.shape[2] :].bool()[:, None, :, None]
        # Values alone: keys are turned by their positions, which `forward` counts from the padding on.
        torch.testing.assert_close(own.values * real, base.values * real, rtol=0, atol=1e-5)


def test_joining_leaves_the_caches_as_they_were(model):
    caches = [model(**tiny.alone(name)).past_key_values for name in ("question", "text_only")]
    before = copy.deepcopy(caches)
    joined = RoeCache.join(caches, model.config)
    model(input_ids=torch.tensor([[60], [61]]), past_key_values=joined)
    for cache, old in zip(caches, before, strict=True):
        assert torch.equal(cache.routes, old.routes) and cache.tokens_seen == old.tokens_seen
        for layer, old_layer in zip(cache.layers, old.layers, strict=True):
            assert layer.is_initialized == old_layer.is_initialized
            assert not layer.is_initialized or torch.equal(layer.keys, old_layer.keys)


def test_caches_that_cannot_be_joined_are_named(model):
    filled, other = (tiny_model(**tiny.alone("question")).past_key_values for tiny_model in (model, other_model()))
    join = lambda caches: RoeCache.join(caches, model.config)  # noqa: E731
    with pytest.raises(ValueError, match="no caches to join"):
        join([])
    with pytest.raises(ValueError, match="cache 1 of 2, a RoeCache, is no RoeCache with routes"):
        join([filled, RoeCache(model.config)])
    with pytest.raises(ValueError, match="cache 0 of 1, a DynamicCache, is no RoeCache"):
        join([DynamicCache()])
    with pytest.raises(ValueError, match="cache 1 of 2 has 3 layers, expected 4: is it of another model"):
        join([filled, other])


def other_model():
    return tiny.tiny_model(tiny.tiny_config(num_layers=3))


# ---------------------------------------- errors


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"past_key_values": RoeCache(tiny.tiny_config())}, "does not take past_key_values"),
        ({"streamer": TextStreamer(None)}, "does not take streamer: .* prompt by prompt"),
        ({"assistant_model": object()}, "does not take assistant_model: drafts are for one row"),
        ({"prompt_lookup_num_tokens": 3}, "does not do assisted_generation: call generate prompt by prompt"),
        ({"stopping_criteria": [lambda ids, scores: False]}, "does not take stopping_criteria"),
        ({"stop_strings": ["a"]}, r"does not take stop_strings=\['a'\]"),
        ({"max_time": 3.0}, "does not take max_time=3.0"),
        ({"prefix_allowed_tokens_fn": lambda row, ids: [1]}, "does not take prefix_allowed_tokens_fn"),
        ({"use_cache": False}, "use_cache=False makes none"),
        ({"cache_implementation": "static"}, "does not take cache_implementation='static'"),
        ({"return_dict_in_generate": True}, "pass return_dict_in_generate=False"),
        ({"prefill_chunk_size": 4}, "prefill_chunk_size is not supported"),
        ({"pixel_values": torch.zeros(1, 3, 28, 28)}, "pixel_values is given for all prompts"),
        ({"attention_mask": torch.ones(1, 3)}, "attention_mask is given for all prompts"),
        ({"rout_bias": 1.0}, "know no argument rout_bias: is it misspelt"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": 4, "pool_size": 3}, "pool_size must be at least batch_size=4, got 3"),
        ({"routes": PATTERN}, r"routes must have shape \(1, 4\)"),
        ({"skip_ratio": 0.3}, "needs a calibrated model"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_arguments_without_a_meaning_are_refused(model, given, message):
    with pytest.raises(ValueError, match=message):
        model.group_by_route(prompts(), **GREEDY, **given)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (tiny.batch(), r"input_ids of prompt 1 must have shape \(1, S\), got shape \(6, 13\)"),
        ({"input_ids": [[1, 2]]}, r"input_ids of prompt 1 .*, got a list: .*return_tensors"),
        ({"inputs_embeds": torch.zeros(1, 3, 32)}, "input_ids of prompt 1 .*, got a NoneType"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, r"shape \(1, 0\)"),
        ("question", "prompt 1 must be what a processor returns for it, got a str"),
        ({**tiny.alone("question"), "position_ids": torch.arange(11)[None]}, "prompt 1 holds position_ids"),
        ({**tiny.alone("question"), "max_new_tokens": 3}, "prompt 1 holds max_new_tokens"),
        ({"input_ids": torch.tensor([[5, 6, tiny.PAD]])}, "a prompt of 3 tokens has 1 of padding"),
        (
            {"input_ids": torch.tensor([[7, 5, 6]]), "attention_mask": torch.tensor([[0, 1, 1]])},
            "a prompt of 3 tokens has 1 of padding: process every prompt by itself",
        ),
    ],
)
def test_prompts_that_are_none_are_refused(model, prompt, message):
    with pytest.raises(ValueError, match=message):
        model.group_by_route([tiny.alone("text_only"), prompt], **GREEDY)


def test_an_error_of_a_prompt_says_which(model):
    given = [tiny.alone("text_only"), {**tiny.alone("question"), "pixel_values": torch.zeros(3, 3, 28, 28)}]
    with pytest.raises(ValueError, match="Image features and image tokens do not match") as caught:
        model.group_by_route(given, **GREEDY)
    assert caught.value.__notes__ == ["(prompt 1 of group_by_route)"]


@pytest.mark.parametrize("given", [tiny.batch(), "a question", torch.zeros(1, 3)])
def test_one_batch_instead_of_prompts_is_refused(model, given):
    with pytest.raises(ValueError, match="prompts must be a list or generator with one processor output per prompt"):
        model.group_by_route(given, **GREEDY)


def test_generating_as_usual_is_untouched_after_an_error(model):
    with pytest.raises(ValueError, match="prompt 1"):
        model.group_by_route([tiny.alone("text_only"), "question"], **GREEDY)
    assert_same(model.group_by_route(prompts(), 4, **GREEDY), each_alone(model, prompts(), **GREEDY))
