"""Every cache with every way of decoding (`matrix.py`), and generations that run at the same time."""

import copy
import logging.handlers
import pickle
import threading
from pathlib import Path

import matrix
import pytest
import tiny
import torch
from matrix import CELLS, NEW
from tiny import PATTERN
from transformers import CompileConfig, DynamicCache, QuantizedCache, StaticCache

from roe_llava import RoeCache, cache_roe

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.mark.parametrize(("cache", "mode", "batch", "state"), CELLS, ids=["-".join(cell) for cell in CELLS])
def test_a_cell_equals_the_dynamic_cache_or_says_what_to_use(cache, mode, batch, state):
    refused = matrix.refusal(cache, mode, batch)
    if refused is not None:
        with pytest.raises(ValueError, match=refused[0]):
            matrix.run(cache, mode, batch, state)
        return
    tokens, held = matrix.run(cache, mode, batch, state)
    assert torch.equal(tokens, matrix.expected(cache, mode, batch, state))
    assert tokens.shape[1] == NEW
    if held is None:
        assert cache == "none"
    else:
        # Not dense in silence: the routes are the routers'.
        assert held.routes[:, 0].all() == (state == "kept") and not held.routes.all()


def test_the_page_is_made_of_these_cells():
    assert (Path(__file__).parent.parent / "docs" / "equivalence.md").read_text() == matrix.page()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="offloading needs a GPU")
@pytest.mark.parametrize("mode", matrix.MODES)
@pytest.mark.parametrize("handed_in", [False, True])
def test_an_offloaded_cache_equals_the_dynamic_one(mode, handed_in):
    batch = "one row" if mode in matrix.DRAFTING else "mixed routes"
    model = copy.deepcopy(matrix.model_with_layer_0("skipped")).cuda()
    inputs = {name: value.cuda() for name, value in matrix.prompts(batch, mode).items()}
    given = {"cache_implementation": "offloaded"}
    if handed_in:
        given = {"past_key_values": DynamicCache(offloading=True)}
    ours, held = matrix.decode(model, inputs, mode, "skipped", **given)
    assert held.offloading and torch.equal(ours, matrix.decode(model, inputs, mode, "skipped")[0])


# ---------------------------------------- what the cells leave out


def handed_in(model, name):
    """A caller's own empty cache."""
    return {
        "ordinary": lambda: DynamicCache(),
        "sliding": lambda: DynamicCache(config=model.config),
        "static": lambda: StaticCache(model.config, max_cache_len=64),
        "fp8": lambda: QuantizedCache("fp8", model.config),
        "routed": lambda: RoeCache(model.config),
    }[name]()


HANDED_IN = ["ordinary", "sliding", "static", "fp8", "routed"]
LOSSLESS = [name for name in HANDED_IN if name != "fp8"]
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True}


@pytest.mark.parametrize("name", ["ordinary", "sliding", "static"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("route", ["decided", "rows differ on layer 0", "one layer", "no layer"])
@pytest.mark.parametrize("way", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_any_route_and_decoder_gives_the_same_tokens_with_any_cache(family, name, route, way):
    model, inputs = tiny.routed_model(family), tiny.batch()
    routes = {
        "decided": None,
        "rows differ on layer 0": PATTERN.roll(1, 1),
        "one layer": torch.tensor([False, False, True, False]),
        "no layer": torch.zeros(4, dtype=torch.bool),
    }[route]
    ours = model.generate(**inputs, **GREEDY, **way, routes=routes, past_key_values=handed_in(model, name))
    assert torch.equal(ours.sequences, model.generate(**inputs, **GREEDY, **way, routes=routes).sequences)


@pytest.mark.parametrize("name", HANDED_IN)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_forward_without_a_mask_fills_any_cache(name, implementation):
    model, inputs = tiny.routed_model(implementation=implementation), tiny.alone("question")
    whole = torch.cat([inputs["input_ids"], torch.tensor([[60, 61, 62]])], 1)
    expected = model(**inputs | {"input_ids": whole}, routes=PATTERN[0], use_cache=False).logits[:, -3:]
    cache = handed_in(model, name)
    model(**inputs, past_key_values=cache)
    steps = [model(input_ids=whole[:, i : i + 1], past_key_values=cache).logits for i in (-3, -2)]
    steps.append(model(input_ids=whole[:, -1:], past_key_values=cache).logits)
    # fp8 keeps 3 bits of every key and value; logits are of order 1.
    close = {"rtol": 0, "atol": 0.5 if name == "fp8" else 1e-5}
    torch.testing.assert_close(torch.cat(steps, 1), expected, **close)


@pytest.mark.parametrize("name", HANDED_IN)
def test_rows_that_share_a_route_compute_nothing_in_vain(name):
    model = tiny.routed_model()
    mlps = [tiny.Calls(layer.mlp) for layer in tiny.layers_of(model)]
    model.generate(**tiny.batch(["question", "other_question"]), **GREEDY, past_key_values=handed_in(model, name))
    assert [counted.rows for counted in mlps] == [2 * NEW, 2 * NEW, 0, 2 * NEW]


@pytest.mark.parametrize("name", ["ordinary", "static", "fp8"])
def test_rows_of_different_routes_compute_what_any_of_them_keeps_and_say_so_once(name):
    model = tiny.routed_model()
    mlps = [tiny.Calls(layer.mlp) for layer in tiny.layers_of(model)]
    names = ["question", "other_question", "empty_question"]
    logging.Logger.warning_once.cache_clear()  # Transformers' own, said once per process
    heard = logging.handlers.BufferingHandler(100)
    cache_roe.logger.addHandler(heard)
    for _ in range(2):
        model.generate(**tiny.batch(names), **GREEDY, past_key_values=handed_in(model, name))
    cache_roe.logger.removeHandler(heard)
    assert [counted.rows for counted in mlps] == [6 * NEW, 6 * NEW, 0, 6 * NEW]
    said = [record.getMessage() for record in heard.buffer]
    assert len(said) == 1 and "rows that skip a layer compute it for nothing" in said[0]


@pytest.mark.parametrize("name", HANDED_IN)
def test_routing_tokens_stay_out_of_any_cache(name):
    model, inputs = tiny.routed_model(), tiny.batch()
    cache = handed_in(model, name)
    model(**inputs, past_key_values=cache)
    lengths = {int(layer.get_seq_length()) for layer in cache.layers if layer.is_initialized}
    assert lengths == {inputs["input_ids"].shape[1]} == {cache.get_seq_length()}


@pytest.mark.parametrize("name", LOSSLESS)
@pytest.mark.parametrize("source", [[5, 4, 3, 2, 1, 0], [2, 2, 0], [3] * 8])
def test_routes_move_with_the_rows_of_any_cache(name, source):
    model, inputs = tiny.routed_model(), tiny.batch()
    cache = handed_in(model, name)
    model(**inputs, past_key_values=cache)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    tokens = torch.arange(60, 66)[:, None]
    whole = inputs | {"input_ids": torch.cat([inputs["input_ids"], tokens], 1), "attention_mask": mask}
    expected = model(**whole, routes=PATTERN, use_cache=False).logits[source, -1:]
    cache.batch_select_indices(torch.tensor(source))
    assert torch.equal(cache.routes, PATTERN[source])
    ours = model(input_ids=tokens[source], attention_mask=mask[source], past_key_values=cache).logits
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", HANDED_IN)
def test_repeating_and_reordering_any_cache_agree_with_selecting(name):
    model, inputs = tiny.routed_model(), tiny.batch(["question", "text_only", "empty_question"])
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1).repeat_interleave(2, 0)
    answers = []
    for change in (
        lambda cache: cache.batch_repeat_interleave(2),
        lambda cache: cache.batch_select_indices(torch.tensor([0, 0, 1, 1, 2, 2])),
        lambda cache: cache.reorder_cache(torch.tensor([0, 0, 1, 1, 2, 2])),
    ):
        cache = handed_in(model, name)
        model(**inputs, past_key_values=cache)
        change(cache)
        answers.append(model(input_ids=torch.full((6, 1), 60), attention_mask=mask, past_key_values=cache).logits)
    assert torch.equal(answers[0], answers[1]) and torch.equal(answers[0], answers[2])


@pytest.mark.parametrize("name", HANDED_IN)
@pytest.mark.parametrize("way", ["beams", "returned sequences"])
def test_a_continued_cache_takes_beams_once_it_is_repeated(name, way):
    model, inputs = tiny.routed_model(), tiny.batch(["question", "empty_question", "two_images"])
    first = model.generate(**inputs, **GREEDY, past_key_values=handed_in(model, name))
    cache, more = first.past_key_values, torch.tensor([[40, 41]] * 3)
    text = torch.cat([first.sequences, more], 1)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, NEW + 2), value=1)
    routes = cache.routes
    cache.batch_repeat_interleave(3)
    given = {"input_ids": text, "attention_mask": mask, **matrix.MODES[way], "max_new_tokens": NEW}
    ours = model.generate(**given, past_key_values=cache)
    if name == "fp8":  # lossy: only that the repeated rows are what the routes say
        assert torch.equal(cache.routes, routes.repeat_interleave(3, 0)) and ours.shape[1] == text.shape[1] + NEW
    else:
        assert torch.equal(ours, model.generate(**given, pixel_values=inputs["pixel_values"], routes=routes))


@pytest.mark.parametrize("name", ["static", "ordinary"])
def test_a_continued_handed_in_cache_keeps_its_route(name):
    model, inputs = tiny.routed_model(), tiny.batch()
    cache = handed_in(model, name)
    first = model.generate(**inputs, **GREEDY, past_key_values=cache)
    assert first.past_key_values is cache
    text = torch.cat([first.sequences, torch.arange(40, 58).reshape(6, 3)], 1)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, NEW + 3), value=1)
    router = tiny.Calls(tiny.layers_of(model)[1].router)
    ours = model.generate(input_ids=text, attention_mask=mask, past_key_values=cache, **GREEDY).sequences
    assert router.calls == 0 and torch.equal(cache.routes, PATTERN)
    whole = {"input_ids": text, "attention_mask": mask, "pixel_values": inputs["pixel_values"]}
    assert torch.equal(ours, model.generate(**whole, **GREEDY, routes=PATTERN).sequences)


@pytest.mark.parametrize("name", HANDED_IN)
def test_a_reset_cache_of_any_kind_routes_anew(name):
    model, inputs = tiny.routed_model(), tiny.alone("question")
    expected = model.generate(**inputs, **GREEDY, past_key_values=handed_in(model, name)).sequences
    cache = handed_in(model, name)
    model.generate(**tiny.batch(["text_only"]), **GREEDY, past_key_values=cache, routes=[False, True, True, False])
    cache.reset()
    assert cache.routes is None and cache.get_seq_length() == 0
    assert torch.equal(model.generate(**inputs, **GREEDY, past_key_values=cache).sequences, expected)


@pytest.mark.parametrize("name", HANDED_IN)
def test_a_copy_of_any_cache_has_its_routes(name):
    model = tiny.routed_model()
    cache = handed_in(model, name)
    model(**tiny.batch(), past_key_values=cache)
    # Torch 2.13 cannot pickle fp8.
    again = copy.deepcopy(cache) if name == "fp8" else pickle.loads(pickle.dumps(cache))
    tokens = torch.arange(60, 66)[:, None]
    mask = torch.nn.functional.pad(tiny.batch()["attention_mask"], (0, 1), value=1)
    ours = model(input_ids=tokens, attention_mask=mask, past_key_values=again).logits
    assert torch.equal(ours, model(input_ids=tokens, attention_mask=mask, past_key_values=cache).logits)


@pytest.mark.parametrize("name", ["ordinary", "static"])
def test_attentions_of_skipped_rows_are_zero_with_any_cache(name):
    model, inputs = tiny.routed_model(implementation="eager"), tiny.batch()
    expected = model(**inputs, output_attentions=True).attentions
    ours = model(**inputs, output_attentions=True, past_key_values=handed_in(model, name)).attentions
    length, real = inputs["input_ids"].shape[1], inputs["attention_mask"].bool()[:, None, :, None]
    for own, other in zip(ours, expected, strict=True):
        own = own[..., :length].masked_fill(~real, 0)  # padding spreads over places a static cache leaves empty
        torch.testing.assert_close(own, other.masked_fill(~real, 0), rtol=0, atol=1e-5)


# ---------------------------------------- at the same time


def steps(model, inputs, cache, routes=None):
    """Feeds the greedy token again and again; yields logits."""
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    outputs = model(**inputs, past_key_values=cache, routes=routes, logits_to_keep=1)
    while True:
        yield outputs.logits[:, -1]
        token = outputs.logits[:, -1].argmax(-1, keepdim=True)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        outputs = model(input_ids=token, attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_generations_interleaved_token_by_token_are_those_alone(family):
    model = tiny.routed_model(family)
    names = HANDED_IN if family == "llama" else LOSSLESS
    prompts = [tiny.alone("question"), tiny.batch(["text_only", "two_images"]), tiny.batch()]
    jobs = [(inputs, name) for name in names for inputs in prompts]

    def generators():
        return [steps(model, inputs, handed_in(model, name)) for inputs, name in jobs]

    alone = [[next(one) for _ in range(4)] for one in generators()]
    together = generators()
    for place in range(4):
        for expected, one in zip(alone, together, strict=True):
            assert torch.equal(next(one), expected[place])


@pytest.mark.parametrize("way", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_threads_that_generate_at_once_get_what_they_get_alone(way):
    model = tiny.routed_model()
    jobs = [(tiny.alone("question"), name) for name in HANDED_IN] + [(tiny.batch(), name) for name in HANDED_IN]
    jobs += [(tiny.alone("text_only"), "static"), (tiny.alone("empty_question"), "ordinary")]

    def generate(inputs, name):
        with torch.no_grad():
            given = {**GREEDY, **way, "max_new_tokens": 10, "past_key_values": handed_in(model, name)}
            return model.generate(**inputs, **given).sequences

    alone = [generate(*job) for job in jobs]
    start = threading.Barrier(len(jobs))
    results = [None] * len(jobs)

    def run(place):
        start.wait(timeout=30)
        results[place] = generate(*jobs[place])

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ours, expected in zip(results, alone, strict=True):
        assert torch.equal(ours, expected)


# ---------------------------------------- refused, so that no answer changes in silence


@pytest.mark.parametrize("name", ["static", "fp8"])
def test_a_cache_that_cannot_forget_says_so(name):
    model = tiny.routed_model()
    cache = handed_in(model, name)
    model(**tiny.alone("question"), past_key_values=cache)
    with pytest.raises(ValueError, match=rf"a {type(cache).__bases__[1].__name__} cannot forget tokens: pass RoeCache"):
        cache.crop(-1)


@pytest.mark.parametrize("drafting", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": None}])
@pytest.mark.parametrize("name", ["static", "fp8"])
def test_drafts_on_a_handed_in_cache_that_cannot_crop_are_refused(name, drafting):
    model = tiny.routed_model()
    if "assistant_model" in drafting:
        drafting = {"assistant_model": matrix.assistant("kept")}
    cache = handed_in(model, name)
    with pytest.raises(ValueError, match=rf"{next(iter(drafting))} with {type(cache).__name__}: .*RoeCache"):
        model.generate(**tiny.alone("question"), **GREEDY, **drafting, past_key_values=cache)


def test_a_static_cache_that_is_too_short_says_so():
    model = tiny.routed_model()
    cache = StaticCache(model.config, max_cache_len=13)
    with pytest.raises(
        ValueError, match="a StaticCache of max_cache_len=13 holds 13 tokens and has no room for 1 more"
    ):
        model.generate(**tiny.alone("question"), **GREEDY, past_key_values=cache)


def test_a_cache_filled_by_another_model_is_refused():
    model = tiny.routed_model()
    for name in ("ordinary", "static", "fp8"):
        cache = handed_in(model, name)
        tiny.stock_of(model)(**tiny.alone("question"), past_key_values=cache)
        with pytest.raises(ValueError, match=r"holds 11 tokens but no routes.*Start from an empty cache"):
            model(input_ids=torch.tensor([[60]]), past_key_values=cache)


def test_guidance_and_early_exit_are_refused():
    model, inputs = tiny.routed_model(), tiny.alone("question")
    with pytest.raises(ValueError, match=r"guidance_scale=1\.5 is not supported.*Leave it unset"):
        model.generate(**inputs, **GREEDY, guidance_scale=1.5)
    with pytest.raises(ValueError, match=r"assistant_early_exit is not supported.*assistant_model"):
        model.generate(**inputs, **GREEDY, assistant_early_exit=2)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_prompts_packed_into_one_row_are_refused(mode):
    model, ids = getattr(tiny.routed_model(), mode)(), torch.tensor([[1, 20, 21, 1, 22, 23]])
    with pytest.raises(ValueError, match=r"position_ids that start anew: several prompts packed.*padded batch"):
        model(input_ids=ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))
    for name in ("cu_seq_lens_q", "read_index"):
        with pytest.raises(ValueError, match=rf"{name}: several prompts packed"):
            model(input_ids=ids, **{name: torch.tensor([0, 3, 6])})


def test_a_static_cache_is_not_compiled_on_any_device():
    model, inputs = tiny.routed_model(), tiny.alone("question")
    config = CompileConfig()
    config._compile_all_devices = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    ours = model.generate(**inputs, **GREEDY, cache_implementation="static", compile_config=config)
    assert torch.equal(ours.sequences, model.generate(**inputs, **GREEDY).sequences)
    assert not torch._dynamo.utils.counters["frames"]
