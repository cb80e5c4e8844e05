"""Eager, sdpa and flex attention agree; FlashAttention is refused by its name.

Flex attention runs uncompiled here, its masks and their rows as ever, except in the last test of its section.
"""

import math

import pytest
import tiny
import torch
from tiny import NAMES, NUM_LAYERS, PATTERN
from torch.nn.attention.flex_attention import create_block_mask
from transformers import DynamicCache

from roe_llava.attention_roe import take_rows

CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # other sums in another order
IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention")
GREEDY = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(autouse=True)
def flex_uncompiled():
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture
def flex_models(no_gradients):
    """Routed models of every family by implementation."""
    return {family: tiny.routed_model(family, "flex_attention") for family in tiny.FAMILIES}


def assert_same_on_real_tokens(ours, others, inputs):
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(ours[real], others[real], **CLOSE)


# ---------------------------------------- flex attention agrees with sdpa and with stock LLaVA


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_flex_gives_the_logits_and_routes_of_sdpa(flex_models, family, side):
    inputs = tiny.batch(side=side)
    ours, other = flex_models[family](**inputs), tiny.routed_model(family)(**inputs)
    assert torch.equal(ours.routes, PATTERN)
    torch.testing.assert_close(ours.router_logits, other.router_logits, **CLOSE)
    assert_same_on_real_tokens(ours.logits, other.logits, inputs)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_flex_with_all_layers_kept_equals_stock_flex(flex_models, family):
    model, inputs = flex_models[family], tiny.batch()
    stock = tiny.stock_of(model)
    assert stock.config.text_config._attn_implementation == "flex_attention"
    ours, other = model(**inputs, route_bias=math.inf).logits, stock(**inputs).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(ours[real], other[real], rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_row_of_a_flex_batch_equals_the_row_alone(flex_models, family):
    model = flex_models[family]
    together = model(**tiny.batch())
    for row, name in enumerate(NAMES):
        alone = model(**tiny.alone(name))
        assert torch.equal(alone.routes[0], PATTERN[row])
        length = alone.logits.shape[1]
        torch.testing.assert_close(together.logits[row, -length:], alone.logits[0], **CLOSE)


WAYS = [{}, {"num_beams": 3}, {"use_cache": False}, {"cache_implementation": "static"}]


# Qwen2 has layers with a window and layers without.
@pytest.mark.parametrize(("family", "way"), [("llama", {}), ("mistral", {}), *[("qwen2", way) for way in WAYS]])
def test_flex_generates_the_tokens_of_sdpa(flex_models, family, way):
    model, other = flex_models[family], tiny.routed_model(family)
    for inputs in (tiny.batch(), tiny.alone("question")):
        assert torch.equal(model.generate(**inputs, **GREEDY, **way), other.generate(**inputs, **GREEDY, **way))


def test_flex_generates_on_a_cache_of_all_rows(flex_models):
    expected = tiny.routed_model().generate(**tiny.batch(), **GREEDY)
    ours = flex_models["llama"].generate(**tiny.batch(), **GREEDY, past_key_values=DynamicCache())
    assert torch.equal(ours, expected)


def test_flex_has_no_gradients_on_a_cpu_and_says_so():
    model = tiny.routed_model("llama", "flex_attention")
    with pytest.raises(NotImplementedError, match="FlexAttention does not support backward on CPU"):
        model.train()(**tiny.batch(), labels=tiny.batch()["input_ids"])


def test_rows_of_a_block_mask_are_masked_as_before():
    lengths = torch.tensor([300, 130, 257])

    def shorter_rows(row, head, query, key):
        return (query >= key) & (key < lengths[row])

    mask = create_block_mask(shorter_rows, B=3, H=None, Q_LEN=300, KV_LEN=300, device="cpu")
    for rows in (torch.tensor([2, 0]), torch.tensor([1])):
        taken = take_rows(mask, rows, 3)
        again = take_rows(taken, torch.tensor([0]), len(rows)) if len(rows) > 1 else taken
        assert torch.equal(taken.to_dense(), mask.to_dense()[rows])
        places = torch.arange(300)
        for place, row in enumerate(rows.tolist()):
            seen = taken.mask_mod(torch.tensor(place), 0, places[:, None], places)
            assert torch.equal(seen, shorter_rows(row, 0, places[:, None], places))
        assert torch.equal(again.mask_mod(torch.tensor(0), 0, places, places), places < lengths[rows[0]])


def test_a_block_mask_of_one_row_is_shared_by_all():
    mask = create_block_mask(lambda row, head, query, key: query >= key, B=1, H=None, Q_LEN=8, KV_LEN=8, device="cpu")
    assert take_rows(mask, torch.tensor([0, 2]), 3) is mask


@pytest.mark.slow
def test_compiled_flex_equals_sdpa(no_gradients, needs_cpp_compiler):
    model, inputs = tiny.routed_model("mistral"), tiny.batch(["text_only", "one_token", "text_only"])
    pinned = torch.tensor([[True] * 4, [False] * 4, [True] * 4])  # one shape, so that little is compiled
    expected = model(**inputs, routes=pinned).logits
    model.set_attn_implementation("flex_attention")
    with torch.compiler.set_stance("default"):
        ours = model(**inputs, routes=pinned).logits
    assert_same_on_real_tokens(ours, expected, inputs)


# ---------------------------------------- tuples


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_hidden_states_have_a_state_per_layer_and_the_last(no_gradients, implementation):
    model, inputs = tiny.routed_model("llama", implementation), tiny.batch()
    states = model(**inputs, output_hidden_states=True).hidden_states
    assert len(states) == NUM_LAYERS + 1
    assert all(state.shape == (*inputs["input_ids"].shape, tiny.HIDDEN) for state in states)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_attentions_are_as_many_as_in_stock_llava(no_gradients, implementation):
    model, inputs = tiny.routed_model("llama", implementation), tiny.batch()
    ours = model(**inputs, output_attentions=True).attentions
    stock = tiny.stock_of(model)(**inputs, output_attentions=True).attentions
    # Sdpa makes no weights, and flex none on a CPU.
    assert len(ours) == len(stock) == (NUM_LAYERS if implementation == "eager" else 0)


# ---------------------------------------- FlashAttention


FLASH = ["flash_attention_2", "flash_attention_3", "kernels-community/flash-attn2", "paged|flash_attention_2"]


@pytest.mark.parametrize("name", FLASH)
def test_flash_attention_is_refused_where_a_model_is_made(name):
    with pytest.raises(ValueError, match=r"flash.* not supported by RoE-LLaVA: .*Use 'sdpa'"):
        tiny.RoeLlavaForConditionalGeneration._from_config(tiny.tiny_config(), attn_implementation=name)


def test_flash_attention_is_refused_where_a_model_is_loaded(tmp_path):
    tiny.tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"'flash_attention_2' is not supported by RoE-LLaVA: .*Use 'sdpa'"):
        tiny.RoeLlavaForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="flash_attention_2")


@pytest.mark.parametrize("given", [*FLASH, {"text_config": "flash_attention_2"}])
def test_flash_attention_is_refused_where_it_is_set(model, given):
    with pytest.raises(ValueError, match=r"flash.* not supported by RoE-LLaVA: .*Use 'sdpa'"):
        model.set_attn_implementation(given)
    assert model.config.text_config._attn_implementation == "sdpa"
