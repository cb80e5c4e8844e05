"""Routing arguments that cannot mean what they say: refused by name, never ignored."""

import math

import numpy as np
import pytest
import tiny
import torch
from tiny import NUM_LAYERS
from transformers import GenerationConfig

from roe_llava import RoeCache

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture(scope="module")
def model():
    return tiny.routed_model()


def ask(model, names=("question",), **arguments):
    return model.generate(**tiny.batch(names), max_new_tokens=2, **arguments)


@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_forward_takes_no_skip_ratio(model, ratio):
    with pytest.raises(ValueError, match="forward takes no skip_ratio: give it to generate"):
        model(**tiny.alone("question"), skip_ratio=ratio)


@pytest.mark.parametrize("name", ["skip_ratio", "route_bias", "routes"])
def test_a_generation_config_takes_no_routing_arguments(model, name):
    with pytest.raises(ValueError, match=f"{name} in the generation config is read by nobody"):
        ask(model, generation_config=GenerationConfig(max_new_tokens=2, **{name: 1.0}))


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_pinned_route_takes_no_bias(model, use_cache):
    with pytest.raises(ValueError, match="routes pins the route, so route_bias would do nothing"):
        ask(model, routes=[True] * NUM_LAYERS, route_bias=-5.0, use_cache=use_cache)
    with pytest.raises(ValueError, match="routes pins the route, so route_bias would do nothing"):
        model(**tiny.alone("question"), routes=[True] * NUM_LAYERS, route_bias=-5.0)


@pytest.mark.parametrize(("prompts", "rows", "num_beams"), [(1, 2, 1), (1, 3, 3), (4, 8, 2)])
@pytest.mark.parametrize(("name", "value"), [("route_bias", 0.0), ("routes", True)])
def test_arguments_for_other_rows_are_refused_in_terms_of_the_prompts(model, prompts, rows, num_beams, name, value):
    wanted = rf"\({prompts}, {NUM_LAYERS}\).*, got (shape )?\({rows}, {NUM_LAYERS}\)"
    with pytest.raises(ValueError, match=wanted):
        ask(model, ["question"] * prompts, num_beams=num_beams, **{name: torch.full((rows, NUM_LAYERS), value)})


@pytest.mark.parametrize("kind", [torch.tensor, np.array, list])
def test_a_bias_of_one_row_serves_all_beams_of_all_prompts(model, kind):
    bias = [[math.inf, -math.inf, math.inf, -math.inf]]
    ours = ask(model, ["question", "text_only"], route_bias=kind(bias), num_beams=2)
    assert torch.equal(ours, ask(model, ["question", "text_only"], routes=[True, False] * 2, num_beams=2))


@pytest.mark.parametrize("value", ["0.5", [[0.0] * 4, [0.0]], 1j, [None]])
@pytest.mark.parametrize("name", ["route_bias", "routes"])
def test_what_holds_no_numbers_is_refused(model, name, value):
    with pytest.raises(ValueError, match=rf"{name} must (hold|be)"):
        ask(model, **{name: value})


@pytest.mark.parametrize("ratio", ["0.2", True, [0.2], math.nan])
def test_a_skip_ratio_is_a_number(model, ratio):
    with pytest.raises(ValueError, match=r"skip_ratio(=nan| must be a number in \[0, 1\])"):
        ask(model, skip_ratio=ratio)


def test_a_skip_ratio_with_a_used_cache_is_refused_by_its_name(model):
    cache = RoeCache(model.config)
    model(**tiny.alone("question"), past_key_values=cache)
    with pytest.raises(ValueError, match="skip_ratio given with a cache that already has routes"):
        ask(model, past_key_values=cache, skip_ratio=0.0)


@pytest.mark.parametrize(("name", "value"), [("batch_size", 2.5), ("batch_size", "2"), ("pool_size", True)])
def test_sizes_of_groups_are_whole_numbers(model, name, value):
    with pytest.raises(ValueError, match=rf"{name} must be a whole number, got {value!r}"):
        model.group_by_route([tiny.alone("question")], **{name: value})


def test_prompts_are_something_to_iterate_over(model):
    with pytest.raises(ValueError, match="one processor output per prompt, got a NoneType"):
        model.group_by_route(None)
