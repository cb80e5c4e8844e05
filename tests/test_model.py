"""One forward pass: equal to stock when all is kept, row by row the same in any batch, and only kept rows computed."""

import copy
import math

import pytest
import tiny
import torch
from tiny import NAMES, NUM_LAYERS, PATTERN, Calls, layers_of
from transformers import DynamicCache

from roe_llava import RoeCache
from roe_llava.routing_roe import Routing

pytestmark = pytest.mark.usefixtures("no_gradients")
# Matrix products round differently when rows or the two routing tokens come along; logits are of order 1.
CLOSE = {"rtol": 0, "atol": 1e-5}


def real_logits(outputs, inputs, row):
    return outputs.logits[row][inputs["attention_mask"][row].bool()]


# ---------------------------------------- equal to stock


@pytest.mark.parametrize("side", ["left", "right"])
def test_all_layers_kept_equals_stock_llava(any_model, side):
    inputs = tiny.batch(side=side)
    ours = any_model(**inputs, route_bias=math.inf)
    stock = tiny.stock_of(any_model)(**inputs)
    assert ours.routes.all()
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(ours.logits[real], stock.logits[real], **CLOSE)


@pytest.mark.parametrize("name", NAMES)
def test_all_layers_kept_equals_stock_llava_for_one_prompt(any_model, name):
    inputs = tiny.alone(name)
    stock = tiny.stock_of(any_model)
    torch.testing.assert_close(any_model(**inputs, route_bias=math.inf).logits, stock(**inputs).logits, **CLOSE)


def test_all_layers_pinned_equals_stock_llava_to_the_bit(any_model):
    # No routing token comes along, so the arithmetic is the same.
    inputs = tiny.batch()
    ours = any_model(**inputs, routes=[True] * NUM_LAYERS)
    assert torch.equal(ours.logits, tiny.stock_of(any_model)(**inputs).logits)


def test_hidden_states_of_kept_layers_equal_stock_llava(any_model):
    inputs = tiny.alone("question")
    ours = any_model(**inputs, route_bias=math.inf, output_hidden_states=True)
    stock = tiny.stock_of(any_model)(**inputs, output_hidden_states=True)
    assert len(ours.hidden_states) == len(stock.hidden_states) == NUM_LAYERS + 1
    torch.testing.assert_close(ours.hidden_states, stock.hidden_states, **CLOSE)


def test_image_hidden_states_equal_stock_llava(model):
    inputs = tiny.batch()
    assert torch.equal(model(**inputs).image_hidden_states, tiny.stock_of(model)(**inputs).image_hidden_states)


def test_loss_of_kept_layers_equals_stock_llava(model):
    inputs = tiny.alone("question")
    labels = inputs["input_ids"].where(inputs["input_ids"] >= 11, -100)
    ours = model(**inputs, labels=labels, route_bias=math.inf).loss
    torch.testing.assert_close(ours, tiny.stock_of(model)(**inputs, labels=labels).loss)


# ---------------------------------------- shapes


def test_outputs_have_the_base_models_shapes(any_model):
    inputs = tiny.batch()
    outputs = any_model(**inputs, output_hidden_states=True)
    shape = inputs["input_ids"].shape
    assert outputs.logits.shape == (*shape, tiny.VOCAB)
    assert [tuple(states.shape) for states in outputs.hidden_states] == [(*shape, tiny.HIDDEN)] * (NUM_LAYERS + 1)
    assert outputs.past_key_values.get_seq_length() == shape[1]
    assert outputs.routes.shape == (len(NAMES), NUM_LAYERS) and outputs.routes.dtype == torch.bool
    assert outputs.router_logits.shape == (len(NAMES), NUM_LAYERS, 2) and outputs.router_logits.dtype == torch.float32


def test_a_tuple_is_returned_when_asked_for(model):
    inputs = tiny.alone("question")
    assert torch.equal(model(**inputs, return_dict=False)[0], model(**inputs).logits)


def test_logits_to_keep_cuts_the_logits(model):
    inputs = tiny.batch()
    assert torch.equal(model(**inputs, logits_to_keep=1).logits, model(**inputs).logits[:, -1:])


def test_the_model_without_head_follows_the_same_routes(model):
    inputs, routing = tiny.batch(), Routing(NUM_LAYERS)
    outputs = model.model(**inputs, routing=routing)
    whole = model(**inputs)
    assert torch.equal(model.lm_head(outputs.last_hidden_state), whole.logits)
    assert torch.equal(outputs.past_key_values.routes, PATTERN)
    assert torch.equal(routing.router_logits(), whole.router_logits)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_attentions_are_zero_in_rows_that_skipped_and_none_where_none_ran(family):
    model = tiny.routed_model(family, "eager")
    routes = PATTERN.clone()
    routes[:, 2] = False
    inputs = tiny.batch()
    ours = model(**inputs, routes=routes, output_attentions=True).attentions
    assert len(ours) == NUM_LAYERS
    assert ours[2] is None
    for layer in (0, 1, 3):
        kept = routes[:, layer]
        assert ours[layer].shape == (len(NAMES), 4, *[inputs["input_ids"].shape[1]] * 2)
        assert (ours[layer][~kept] == 0).all()
        # Softmax over what a query sees; rows of padding may see nothing sensible, real ones sum to 1.
        real = inputs["attention_mask"].bool() & kept[:, None]
        torch.testing.assert_close(ours[layer].sum(-1).transpose(1, 2)[real], torch.ones(int(real.sum()), 4))


def test_attentions_of_kept_layers_equal_stock_llava():
    model = tiny.routed_model("llama", "eager")
    inputs = tiny.alone("question")
    ours = model(**inputs, route_bias=math.inf, output_attentions=True).attentions
    stock = tiny.stock_of(model)(**inputs, output_attentions=True).attentions
    torch.testing.assert_close(ours, stock, **CLOSE)


# ---------------------------------------- per-example routes


def test_one_batch_takes_a_route_per_row(any_model):
    routes = any_model(**tiny.batch()).routes
    assert torch.equal(routes, PATTERN)
    assert len({tuple(route) for route in routes.tolist()}) >= 3


@pytest.mark.parametrize("side", ["left", "right"])
def test_row_in_batch_equals_row_alone(any_model, side):
    inputs = tiny.batch(side=side)
    together = any_model(**inputs)
    for row, name in enumerate(NAMES):
        one = any_model(**tiny.alone(name))
        assert torch.equal(one.routes[0], together.routes[row])
        torch.testing.assert_close(one.router_logits[0], together.router_logits[row], **CLOSE)
        torch.testing.assert_close(one.logits[0], real_logits(together, inputs, row), **CLOSE)


def test_padding_side_does_not_change_logits(any_model):
    left, right = tiny.batch(side="left"), tiny.batch(side="right")
    ours, others = any_model(**left), any_model(**right)
    assert torch.equal(ours.routes, others.routes)
    for row in range(len(NAMES)):
        torch.testing.assert_close(real_logits(ours, left, row), real_logits(others, right, row), **CLOSE)


def test_a_boolean_attention_mask_means_the_same(model):
    inputs = tiny.batch()
    assert torch.equal(
        model(**inputs).logits, model(**inputs | {"attention_mask": inputs["attention_mask"].bool()}).logits
    )


@pytest.mark.parametrize("mode", ["preceding", "first", "spread"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_given_position_ids_do_not_change_a_row(model, mode, side):
    model.config.routing_positions = mode
    inputs = tiny.batch(side=side)
    plain = model(**inputs)
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    placed = model(**inputs, position_ids=positions)
    torch.testing.assert_close(placed.router_logits, plain.router_logits, **CLOSE)
    for row in range(len(NAMES)):
        torch.testing.assert_close(real_logits(placed, inputs, row), real_logits(plain, inputs, row), **CLOSE)


def test_shifted_positions_change_nothing(model):
    inputs = tiny.alone("question")
    positions = torch.arange(inputs["input_ids"].shape[1])[None]
    torch.testing.assert_close(
        model(**inputs, position_ids=positions + 9).router_logits, model(**inputs).router_logits, **CLOSE
    )


def test_permuting_a_batch_permutes_its_rows(model):
    order = [3, 0, 5, 1, 4, 2]
    ours = model(**tiny.batch([NAMES[row] for row in order]))
    base = model(**tiny.batch())
    assert torch.equal(ours.routes, base.routes[order])
    torch.testing.assert_close(ours.logits[:, -1], base.logits[order, -1], **CLOSE)


def test_a_mistral_row_longer_than_the_window_equals_the_row_alone(mistral):
    inputs = tiny.batch(["other_question", "one_token"])
    assert inputs["input_ids"].shape[1] > 2 * tiny.WINDOW
    together, one = mistral(**inputs), mistral(**tiny.alone("other_question"))
    torch.testing.assert_close(one.logits[0], together.logits[0], **CLOSE)
    assert torch.equal(one.routes[0], together.routes[0])


def test_a_route_is_the_same_when_pinned(any_model):
    inputs = tiny.batch()
    decided = any_model(**inputs)
    pinned = any_model(**inputs, routes=decided.routes)
    assert torch.equal(pinned.routes, decided.routes)
    torch.testing.assert_close(pinned.logits, decided.logits, **CLOSE)


def test_a_skipped_layer_is_its_adapter_on_the_normalised_input(any_model):
    inputs = tiny.batch()
    states = any_model(**inputs, routes=PATTERN, output_hidden_states=True).hidden_states
    for index in range(NUM_LAYERS - 1):  # the last entry is behind the final norm
        layer, skipped = layers_of(any_model)[index], ~PATTERN[:, index]
        before = states[index]
        expected = before + layer.adapter(layer.input_layernorm(before))
        torch.testing.assert_close(states[index + 1][skipped], expected[skipped], **CLOSE)


def test_a_different_question_takes_a_different_route(model):
    assert not torch.equal(model(**tiny.alone("question")).routes, model(**tiny.alone("text_only")).routes)


@pytest.mark.parametrize("route", [[False, True, True, False], [False] * 4, [False, False, True, True]])
def test_any_layer_may_be_skipped_by_all_rows(any_model, route):
    inputs = tiny.batch()
    outputs = any_model(**inputs, routes=route)
    assert outputs.routes.tolist() == [route] * len(NAMES)
    assert outputs.logits.isfinite().all()
    for row, name in enumerate(NAMES):
        torch.testing.assert_close(
            any_model(**tiny.alone(name), routes=route).logits[0], real_logits(outputs, inputs, row), **CLOSE
        )


def test_layer_0_skipped_by_its_router_decides_alike_for_all(family_model):
    pattern = PATTERN.clone()
    pattern[:, 0] = False
    # With layer 0 skipped routing tokens have read nothing yet at layer 1 either, so layer 1 is kept for all.
    pattern[:, 1] = True
    model = tiny.solve_routers(family_model, tiny.batch(), pattern)
    assert torch.equal(model(**tiny.batch()).routes, pattern)
    for row, name in enumerate(NAMES):
        assert torch.equal(model(**tiny.alone(name)).routes[0], pattern[row])


def test_decisions_before_the_first_kept_layer_do_not_depend_on_the_input(model):
    logits = model(**tiny.batch(), route_bias=-math.inf).router_logits
    torch.testing.assert_close(logits, logits[:1].expand_as(logits), **CLOSE)


# ---------------------------------------- what is really computed


def test_only_rows_that_keep_a_layer_are_computed_in_it(any_model):
    inputs = tiny.batch()
    mlps = [Calls(layer.mlp) for layer in layers_of(any_model)]
    adapters = [Calls(layer.adapter) for layer in layers_of(any_model)]
    any_model(**inputs)
    assert [counted.rows for counted in mlps] == PATTERN.sum(0).tolist()
    assert [counted.rows for counted in adapters] == (~PATTERN).sum(0).tolist()
    # The two routing tokens travel along: nothing else does.
    width = inputs["input_ids"].shape[1] + 2
    assert [counted.tokens for counted in mlps] == (PATTERN.sum(0) * width).tolist()


def test_attention_is_computed_only_for_rows_that_keep_a_layer(model):
    seen = []
    for layer in layers_of(model):
        layer.self_attn.q_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[0]))
    model(**tiny.batch())
    assert seen == PATTERN.sum(0).tolist()


def test_a_layer_kept_by_no_row_is_not_computed(model):
    routes = PATTERN.clone()
    routes[:, 1] = False
    mlp, attention = Calls(layers_of(model)[1].mlp), Calls(layers_of(model)[1].self_attn.q_proj)
    model(**tiny.batch(), routes=routes)
    assert mlp.calls == attention.calls == 0


def test_a_layer_kept_by_all_rows_runs_no_adapter(model):
    adapters = [Calls(layer.adapter) for layer in layers_of(model)]
    model(**tiny.batch(), route_bias=math.inf)
    assert [counted.calls for counted in adapters] == [0] * NUM_LAYERS


def test_pinned_routes_run_no_router_and_no_routing_token(model):
    routers = [Calls(layer.router) for layer in layers_of(model)]
    mlp, inputs = Calls(layers_of(model)[0].mlp), tiny.batch()
    outputs = model(**inputs, routes=PATTERN)
    assert outputs.router_logits is None
    assert sum(counted.calls for counted in routers) == 0
    assert mlp.tokens == inputs["input_ids"].numel()


@pytest.mark.parametrize(("bias", "kept"), [(math.inf, True), (-math.inf, False)])
def test_an_infinite_route_bias_runs_the_routers_and_forces_them(model, bias, kept):
    routers = [Calls(layer.router) for layer in layers_of(model)]
    outputs = model(**tiny.batch(), route_bias=bias)
    assert (outputs.routes == kept).all()
    assert [counted.calls for counted in routers] == [1] * NUM_LAYERS
    assert outputs.router_logits.isfinite().all()


def test_a_route_bias_per_layer_shifts_that_layer_only(model):
    base, shifted = model(**tiny.batch()), model(**tiny.batch(), route_bias=[0.0, 0.0, 0.0, math.inf])
    assert torch.equal(shifted.routes[:, :3], base.routes[:, :3])
    assert shifted.routes[:, 3].all() and not base.routes[:, 3].all()


def test_a_route_bias_above_the_margin_keeps_and_router_logits_stay_raw(model):
    base = model(**tiny.batch())
    # The routers were solved for a difference of +-2.
    assert torch.equal(model(**tiny.batch(), route_bias=1.9).routes, PATTERN)
    more = model(**tiny.batch(), route_bias=torch.tensor([0.0, 2.1, 0.0, 0.0]))
    assert more.routes[:, 1].all()
    torch.testing.assert_close(more.router_logits[:, :2], base.router_logits[:, :2])


def test_layers_without_a_router_always_run(model):
    config = copy.deepcopy(model.config)
    config.routed_layers = [1, 3]
    partly = tiny.tiny_model(config)
    assert [layer.router is None for layer in layers_of(partly)] == [True, False, True, False]
    outputs = partly(**tiny.batch(), route_bias=-math.inf)
    assert outputs.routes.tolist() == [[True, False, True, False]] * len(NAMES)
    unrouted = outputs.router_logits[:, [0, 2]]
    assert (unrouted[..., 0] == math.inf).all() and (unrouted[..., 1] == -math.inf).all()
    assert outputs.router_logits[:, [1, 3]].isfinite().all()


def test_no_routed_layer_at_all_equals_stock_llava():
    model = tiny.tiny_model(tiny.tiny_config(routed_layers=[]))
    outputs = model(**tiny.batch())
    assert outputs.router_logits is None and outputs.routes.all()
    real = tiny.batch()["attention_mask"].bool()
    assert torch.equal(outputs.logits[real], tiny.stock_of(model)(**tiny.batch()).logits[real])


# ---------------------------------------- what routing tokens may see


def test_ordinary_tokens_never_see_routing_tokens(any_model):
    inputs = tiny.batch()
    before = any_model(**inputs, route_bias=math.inf)
    any_model.model.language_model.routing_tokens.weight.mul_(-3)
    after = any_model(**inputs, route_bias=math.inf)
    assert torch.equal(before.logits, after.logits)
    assert not torch.allclose(before.router_logits, after.router_logits)


def test_the_image_token_reads_the_context_and_the_text_token_the_question(any_model):
    inputs = tiny.alone("question")
    segments = torch.tensor([[0] * 6 + [1] * 5])
    seen = tiny.router_inputs(any_model, 1, inputs | {"routing_segments": segments})
    question, context = copy.deepcopy(inputs), copy.deepcopy(inputs)
    question["input_ids"][0, -1] = 60
    context["input_ids"][0, 1] = 60
    image_part = slice(0, tiny.HIDDEN)
    text_part = slice(tiny.HIDDEN, None)
    asked = tiny.router_inputs(any_model, 1, question | {"routing_segments": segments})
    assert torch.equal(asked[:, image_part], seen[:, image_part])
    assert not torch.equal(asked[:, text_part], seen[:, text_part])
    told = tiny.router_inputs(any_model, 1, context | {"routing_segments": segments})
    assert not torch.equal(told[:, image_part], seen[:, image_part])
    # One attention layer: what the question's tokens read of the context has not reached the text token yet.
    assert torch.equal(told[:, text_part], seen[:, text_part])


def test_tokens_in_no_segment_do_not_decide(model):
    inputs = tiny.alone("question")
    segments = torch.tensor([[0] * 6 + [1, 1, 1, -1, -1]])
    changed = copy.deepcopy(inputs)
    changed["input_ids"][0, -2:] = 60
    ours, others = (model(**given, routing_segments=segments).router_logits for given in (inputs, changed))
    assert torch.equal(ours, others)


def test_an_empty_segment_leaves_its_token_to_itself(model):
    segments = torch.full((1, 11), -1)
    outputs = model(**tiny.alone("question"), routing_segments=segments)
    assert outputs.router_logits.isfinite().all()


def test_segments_shorter_than_the_input_cover_its_beginning(model):
    inputs = tiny.alone("question")
    segments = torch.tensor([[0] * 6 + [1] * 3])
    padded = torch.tensor([[0] * 6 + [1] * 3 + [-1] * 2])
    ours = model(**inputs, routing_segments=segments).router_logits
    assert torch.equal(ours, model(**inputs, routing_segments=padded).router_logits)


def test_the_last_turns_question_decides(model):
    inputs = tiny.alone("other_question")
    both = torch.tensor([[0] * 6 + [1, 1, -1, -1, 2, 2, 2]])
    last = torch.tensor([[0] * 6 + [-1, -1, -1, -1, 1, 1, 1]])
    ours = model(**inputs, routing_segments=both).router_logits
    assert torch.equal(ours, model(**inputs, routing_segments=last).router_logits)
    model.config.routing_question = "all_text"
    whole = torch.tensor([[0] * 6 + [1] * 7])
    ours = model(**inputs, routing_segments=both).router_logits
    assert torch.equal(ours, model(**inputs, routing_segments=whole).router_logits)


def test_routing_positions_are_read_from_the_config_when_used(model):
    inputs = tiny.alone("question")
    preceding = model(**inputs).router_logits
    model.config.routing_positions = "first"
    assert not torch.allclose(model(**inputs).router_logits, preceding)


def test_at_inference_spread_positions_are_the_preceding_ones(model):
    preceding = model(**tiny.batch()).router_logits
    model.config.routing_positions = "spread"
    assert torch.equal(model(**tiny.batch()).router_logits, preceding)


@pytest.mark.parametrize("mode", ["preceding", "first"])
def test_what_follows_the_prompt_does_not_change_its_route(model, mode):
    model.config.routing_positions = mode
    inputs = tiny.alone("question")
    segments = torch.tensor([[0] * 6 + [1] * 5])
    longer = inputs | {"input_ids": torch.cat([inputs["input_ids"], torch.tensor([[70, 71, 72]])], 1)}
    ours = model(**inputs, routing_segments=segments).router_logits
    torch.testing.assert_close(model(**longer, routing_segments=segments).router_logits, ours, **CLOSE)


def test_changing_the_attention_implementation_takes_effect(model):
    inputs = tiny.batch()
    sdpa = model(**inputs, output_attentions=True)
    model.set_attn_implementation("eager")
    eager = model(**inputs, output_attentions=True)
    assert not sdpa.attentions and len(eager.attentions) == NUM_LAYERS
    assert torch.equal(sdpa.routes, eager.routes)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(sdpa.logits[real], eager.logits[real], **CLOSE)


# ---------------------------------------- one pass


def test_use_cache_false_holds_no_cache(model):
    outputs = model(**tiny.batch(), use_cache=False)
    assert outputs.past_key_values is None
    torch.testing.assert_close(outputs.logits, model(**tiny.batch()).logits)


@pytest.mark.parametrize("side", ["left", "right"])
def test_cached_decoding_equals_one_pass(any_model, side):
    """Prompts of one length: the rest of each text is fed token by token."""
    names = ["question", "question", "two_images"]
    inputs = tiny.batch(names, side="left")
    extra = torch.tensor([[60, 61, 62, 63], [70, 71, 72, 73], [80, 81, 82, 83]])
    width = inputs["input_ids"].shape[1]
    segments = any_model.model.segments_of(inputs["input_ids"], None, inputs["attention_mask"])
    whole = inputs | {
        "input_ids": torch.cat([inputs["input_ids"], extra], 1),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(extra)], 1),
    }
    one_pass = any_model(**whole, routing_segments=segments)
    outputs = any_model(**inputs)
    steps = [outputs.logits[:, -1]]
    for step in range(extra.shape[1]):
        outputs = any_model(
            input_ids=extra[:, step : step + 1],
            attention_mask=whole["attention_mask"][:, : width + step + 1],
            past_key_values=outputs.past_key_values,
        )
        steps.append(outputs.logits[:, -1])
    torch.testing.assert_close(torch.stack(steps, 1), one_pass.logits[:, width - 1 :], **CLOSE)
    assert torch.equal(outputs.routes, one_pass.routes)


@pytest.mark.parametrize("route", [[False, True, True, False], [False] * 4, [True, False, False, True]])
def test_a_chunk_on_a_cache_equals_one_pass_whatever_is_skipped(family_model, route):
    ids = torch.arange(20, 40)[None]
    one_pass = family_model(input_ids=ids, routes=route).logits
    cache = family_model(input_ids=ids[:, :9], routes=route).past_key_values
    second = family_model(input_ids=ids[:, 9:16], past_key_values=cache)
    third = family_model(input_ids=ids[:, 16:], past_key_values=second.past_key_values)
    torch.testing.assert_close(torch.cat([second.logits, third.logits], 1), one_pass[:, 9:], **CLOSE)
    assert cache.get_seq_length() == 20


def test_inputs_embeds_with_segments_equal_input_ids(model):
    inputs = tiny.alone("question")
    features = model.model.get_image_features(inputs["pixel_values"]).pooler_output
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    embeds = embeds.masked_scatter((inputs["input_ids"] == tiny.IMAGE)[..., None], torch.cat(features))
    segments = torch.tensor([[0] * 6 + [1] * 5])
    ours = model(inputs_embeds=embeds, routing_segments=segments)
    base = model(**inputs)
    assert torch.equal(ours.routes, base.routes)
    torch.testing.assert_close(ours.logits, base.logits, **CLOSE)


def test_inputs_embeds_with_placeholders_equal_input_ids(model):
    inputs = tiny.batch()
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    ours, base = model(inputs_embeds=embeds, **inputs), model(**tiny.batch())
    assert torch.equal(ours.routes, base.routes)
    torch.testing.assert_close(ours.logits, base.logits, **CLOSE)


# ---------------------------------------- errors


def test_an_unsupported_text_model_is_named():
    config = tiny.tiny_config()
    config.text_config.model_type = "gpt_neox"
    with pytest.raises(ValueError, match=r"gpt_neox.*llama.*mistral.*qwen2"):
        tiny.RoeLlavaForConditionalGeneration(config)


def test_a_decoder_layer_without_routing_says_what_to_call(model):
    with pytest.raises(ValueError, match=r"routing.*RoeLlavaForConditionalGeneration"):
        layers_of(model)[0](torch.zeros(1, 2, tiny.HIDDEN))


def test_a_language_model_without_routing_says_what_to_call(model):
    with pytest.raises(ValueError, match=r"routing.*RoeLlavaForConditionalGeneration"):
        model.model.language_model(inputs_embeds=torch.zeros(1, 2, tiny.HIDDEN))


def test_a_4d_attention_mask_needs_a_pinned_route(model):
    inputs = tiny.alone("question")
    mask = torch.ones(1, 1, 11, 11).tril().bool()
    segments = torch.tensor([[0] * 6 + [1] * 5])
    with pytest.raises(ValueError, match=r"attention_mask.*\(1, 1, 11, 11\).*routes="):
        model(**inputs, attention_mask=mask, routing_segments=segments)
    with pytest.raises(ValueError, match=r"attention_mask.*\(1, 11\).*\(1, 1, 11, 11\)"):
        model(**inputs, attention_mask=mask)
    pinned = model(**inputs, attention_mask=mask, routes=PATTERN[0]).logits
    torch.testing.assert_close(pinned, model(**inputs, routes=PATTERN[0]).logits, **CLOSE)


def test_a_mask_longer_than_the_prompt_is_refused(model):
    with pytest.raises(ValueError, match=r"attention_mask.*\(1, 11\).*\(1, 12\).*routing_segments"):
        model(**tiny.alone("question"), attention_mask=torch.ones(1, 12, dtype=torch.long))


def test_a_cache_of_another_batch_size_is_refused(model):
    cache = model(**tiny.batch(["question", "text_only"])).past_key_values
    with pytest.raises(ValueError, match=r"past_key_values.*2 rows.*has 3"):
        model(input_ids=torch.ones(3, 1, dtype=torch.long), past_key_values=cache)


def test_routes_with_a_cache_that_has_routes_are_refused(model):
    cache = model(**tiny.alone("question")).past_key_values
    for given in ({"routes": PATTERN[:1]}, {"route_bias": 1.0}):
        with pytest.raises(ValueError, match=f"{next(iter(given))} given with a cache that already has routes"):
            model(input_ids=torch.tensor([[9]]), past_key_values=cache, **given)


def test_a_cache_that_holds_tokens_but_no_routes_is_refused(model):
    cache = tiny.stock_of(model)(**tiny.alone("question")).past_key_values
    with pytest.raises(ValueError, match=r"a DynamicCache, holds 11 tokens but no routes.*Start from an empty cache"):
        model(**tiny.alone("question"), past_key_values=cache)


def test_an_ordinary_cache_learns_the_routes(model):
    cache = DynamicCache()
    outputs = model(**tiny.batch(), past_key_values=cache)
    assert outputs.past_key_values is cache and torch.equal(cache.routes, PATTERN)
    assert cache.get_seq_length() == tiny.batch()["input_ids"].shape[1]


def test_a_given_empty_cache_is_filled(model):
    cache = RoeCache(model.config)
    outputs = model(**tiny.batch(), past_key_values=cache)
    assert outputs.past_key_values is cache
    assert torch.equal(cache.routes, PATTERN)


def test_padding_is_never_read_whatever_the_segments_say(model, no_gradients):
    inputs = tiny.batch(("question", "one_token"))
    segments = model.model.segments_of(inputs["input_ids"], None, inputs["attention_mask"])
    careless = segments.masked_fill(inputs["attention_mask"] == 0, 0)
    expected = model(**inputs, routing_segments=segments).router_logits
    assert torch.equal(model(**inputs, routing_segments=careless).router_logits, expected)


@pytest.mark.parametrize("option", ["routing_positions", "routing_question"])
def test_an_option_mistyped_at_run_time_is_named(model, option):
    setattr(model.config, option, "typo")
    with pytest.raises(ValueError, match=f"{option} must be .* got 'typo'"):
        model(**tiny.alone("question"))


def test_changing_returned_routes_does_not_change_the_cache(model, no_gradients):
    outputs = model(**tiny.alone("question"))
    kept = outputs.past_key_values.routes.clone()
    outputs.routes.fill_(False)
    assert torch.equal(outputs.past_key_values.routes, kept)
