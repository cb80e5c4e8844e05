"""Segments, visibility, positions, decisions and their checks: the pure functions routes are made of."""

import copy
import math
import pickle

import pytest
import tiny
import torch
from tiny import NUM_LAYERS

from roe_llava import RoeLlavaConfig, RoutingPhase
from roe_llava.attention_roe import RoutedAttentionConfig, RoutingAttention, take_rows
from roe_llava.cache_roe import LayerRows
from roe_llava.phases_roe import SeededDraws, path_weights
from roe_llava.routing_roe import (
    checked_route_bias,
    checked_routes,
    default_segments,
    inference_visibility,
    pad_segments,
    routing_position_ids,
    training_visibility,
    turns_of_tokens,
    with_itself,
)

IMG = tiny.IMAGE


def segments_of(ids, labels=None):
    """Default segments of padded rows as lists."""
    ids = torch.tensor(ids)
    labels = None if labels is None else torch.tensor(labels)
    return default_segments(ids == IMG, ids != tiny.PAD, labels).tolist()


# ---------------------------------------- segments


def test_the_context_ends_with_the_last_image():
    assert segments_of([[1, 5, IMG, IMG, 9, 10]]) == [[0, 0, 0, 0, 1, 1]]
    assert segments_of([[1, IMG, 9, IMG, 10, 11]]) == [[0, 0, 0, 0, 1, 1]]


def test_without_an_image_all_is_the_question():
    assert segments_of([[1, 5, 9, 10]]) == [[1, 1, 1, 1]]
    assert default_segments(None, torch.ones(1, 3).bool()).tolist() == [[1, 1, 1]]


def test_a_prompt_that_ends_with_its_image_has_an_empty_question():
    assert segments_of([[1, 5, IMG, IMG]]) == [[0, 0, 0, 0]]


def test_padding_on_either_side_is_in_no_segment():
    assert segments_of([[0, 0, 1, IMG, 9], [1, IMG, 9, 0, 0]]) == [[-1, -1, 0, 0, 1], [0, 0, 1, -1, -1]]


def test_labels_split_turns_and_answers_are_read_by_none():
    #           context  q1      a1      q2  a2
    ids = [[1, IMG, 20, 21, 30, 31, 22, 32]]
    labels = [[-100, -100, -100, -100, 30, 31, -100, 32]]
    assert segments_of(ids, labels) == [[0, 0, 1, 1, -1, -1, 2, -1]]


def test_what_follows_the_last_answer_belongs_to_no_turn():
    labels = [[-100, -100, -100, 30, -100, -100]]
    assert segments_of([[1, IMG, 20, 30, 21, 22]], labels) == [[0, 0, 1, -1, -1, -1]]


def test_a_row_without_labels_is_one_turn():
    labels = [[-100] * 4, [-100, -100, 30, 31]]
    assert segments_of([[1, IMG, 20, 21], [1, 20, 30, 31]], labels) == [[0, 0, 1, 1], [1, 1, -1, -1]]


def test_an_answer_right_behind_an_answerless_turn_starts_turn_one():
    # The first token is an answer already: its turn has an empty question.
    assert segments_of([[20, 30, 21, 31]], [[20, -100, 21, -100]]) == [[-1, 2, -1, -1]]


def test_padding_segments_adds_tokens_of_no_segment():
    assert pad_segments(torch.tensor([[0, 1]]), 4).tolist() == [[0, 1, -1, -1]]


def test_more_segments_than_tokens_are_refused():
    with pytest.raises(ValueError, match="routing_segments cover 3 tokens, the input has 2"):
        pad_segments(torch.tensor([[0, 1, 1]]), 2)


def test_more_segments_than_tokens_are_refused_by_the_model(model):
    with pytest.raises(ValueError, match="routing_segments cover 3 tokens, the input has 1"):
        model(**tiny.alone("one_token"), routing_segments=torch.tensor([[0, 1, 1]]))


def test_a_token_belongs_to_the_latest_question_before_it():
    segments = torch.tensor([[-1, 0, 0, 1, -1, -1, 2, -1]])
    assert turns_of_tokens(segments).tolist() == [[0, 0, 0, 1, 1, 1, 2, 2]]


# ---------------------------------------- visibility


def test_at_inference_the_pair_reads_context_and_last_question():
    image, text = inference_visibility(torch.tensor([[-1, 0, 1, -1, 2, 2]]))[0].int().tolist()
    assert image == [0, 1, 0, 0, 0, 0]
    assert text == [0, 0, 0, 0, 1, 1]


def test_all_text_reads_from_the_first_question_to_the_last_without_images():
    segments = torch.tensor([[-1, 0, 1, -1, 0, 2, -1, -1]])
    text = inference_visibility(segments, "all_text")[0, 1].int().tolist()
    assert text == [0, 0, 1, 1, 0, 1, 0, 0]


def test_every_row_reads_its_own_last_turn():
    segments = torch.tensor([[0, 1, 2], [0, 1, -1], [0, 0, 0]])
    assert inference_visibility(segments)[:, 1].int().tolist() == [[0, 0, 1], [0, 1, 0], [0, 0, 0]]


def test_in_training_every_turn_has_its_text_token():
    visible = training_visibility(torch.tensor([[0, 1, -1, 2], [0, 1, -1, -1]]))
    assert visible.int().tolist() == [
        [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]],
        [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]],
    ]


def test_training_has_a_text_token_even_without_a_question():
    assert training_visibility(torch.tensor([[0, 0, -1]])).shape == (1, 2, 3)


# ---------------------------------------- positions


def test_preceding_positions_stand_before_the_first_real_token():
    positions, mask = torch.arange(5)[None].expand(2, -1), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    assert routing_position_ids(positions, mask, 4, "preceding").tolist() == [[0, 1, 1, 1], [-2, -1, -1, -1]]


def test_first_positions_are_one_behind_the_first_real_token():
    positions, mask = torch.arange(5)[None], torch.tensor([[0, 0, 1, 1, 1]])
    assert routing_position_ids(positions, mask, 2, "first").tolist() == [[3, 3]]


def test_spread_positions_give_every_routing_token_its_own_place():
    positions, mask = torch.arange(5)[None].expand(2, -1), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    assert routing_position_ids(positions, mask, 4, "spread").tolist() == [[-2, -1, 0, 1], [-4, -3, -2, -1]]


def test_for_one_turn_spread_positions_are_the_preceding_ones():
    positions, mask = torch.arange(5)[None], torch.tensor([[0, 0, 1, 1, 1]])
    spread, preceding = (routing_position_ids(positions, mask, 2, mode) for mode in ("spread", "preceding"))
    assert torch.equal(spread, preceding)


def test_without_a_mask_the_row_begins_with_its_first_token():
    assert routing_position_ids(torch.arange(7, 10)[None], None, 2, "preceding").tolist() == [[5, 6]]


# ---------------------------------------- routes and biases a user gives


def test_one_route_serves_the_whole_batch():
    assert checked_routes([1, 0, 1], 2, 3, []).tolist() == [[True, False, True]] * 2
    assert checked_routes(torch.tensor([[True, False]]), 2, 2, []).tolist() == [[True, False]] * 2


@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3), (2, 4, 1)])
def test_routes_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"routes must have shape \(2, 4\).*" + ", ".join(map(str, shape))):
        checked_routes(torch.ones(shape, dtype=torch.bool), 2, 4, [])


def test_routes_that_are_no_booleans_are_refused():
    with pytest.raises(ValueError, match=r"routes must be bool.*router logits"):
        checked_routes(torch.tensor([0.3, 1.0]), 1, 2, [])


def test_a_route_cannot_skip_a_layer_without_an_adapter():
    with pytest.raises(ValueError, match=r"routes skip layers \[1\].*config\.routed_layers"):
        checked_routes([True, False, False], 1, 3, [0, 1])


def test_a_route_bias_is_a_number_per_layer_or_per_row_and_layer():
    assert checked_route_bias(None, 3, 2) == [0.0, 0.0]
    assert checked_route_bias(1, 3, 2) == [1.0, 1.0]
    assert checked_route_bias(torch.tensor([0.5, -math.inf]), 3, 2) == [0.5, -math.inf]
    assert checked_route_bias([[0.5, 2.0]], 1, 2) == [0.5, 2.0]
    by_row = checked_route_bias([[1.0, 2.0], [3.0, 4.0], [5.0, math.inf]], 3, 2)
    assert [layer.tolist() for layer in by_row] == [[1.0, 3.0, 5.0], [2.0, 4.0, math.inf]]
    assert [layer.tolist() for layer in checked_route_bias([[1.0, 2.0]], 3, 2)] == [[1.0] * 3, [2.0] * 3]


@pytest.mark.parametrize("bias", [[1.0, 2.0, 3.0], [[1.0, 2.0]] * 2, [[1.0], [2.0], [3.0]], []])
def test_a_route_bias_of_another_shape_is_refused(bias):
    with pytest.raises(ValueError, match=r"one per decoder layer \(2\), or one per example and layer \(3, 2\), got"):
        checked_route_bias(bias, 3, 2)


def test_a_route_bias_of_nan_is_refused():
    with pytest.raises(ValueError, match="route_bias holds NaN"):
        checked_route_bias([0.0, math.nan], 3, 2)


@pytest.mark.parametrize("bias", [[0.0, -math.inf], [[0.0, 0.0], [0.0, -math.inf]]])
def test_a_route_bias_cannot_skip_a_layer_without_a_router(bias):
    with pytest.raises(ValueError, match=r"route_bias skips layers \[1\].*config\.routed_layers"):
        checked_route_bias(bias, 2, 2, [1])
    assert checked_route_bias(-math.inf, 2, 2, [1]) == [-math.inf] * 2  # every layer that can be skipped


def test_the_model_checks_routes_and_bias(model):
    with pytest.raises(ValueError, match=r"routes must have shape \(1, 4\).*\(5,\)"):
        model(**tiny.alone("question"), routes=[True] * 5)
    with pytest.raises(ValueError, match="route_bias must be one number"):
        model(**tiny.alone("question"), route_bias=[0.0] * 3)


# ---------------------------------------- training decisions

LOGITS = torch.tensor([[[2.0, 0.0], [0.0, 4.0]], [[1.0, 0.0], [9.0, -9.0]]])  # (B, T, 2)
TURNS = torch.tensor([[True, True], [True, False]])


def test_soft_weights_are_the_softmax_at_a_temperature():
    weights = path_weights(LOGITS, TURNS, RoutingPhase("soft", temperature=2.0, keep_bias=0.5))
    biased = LOGITS + torch.tensor([0.5, 0.0])
    torch.testing.assert_close(weights[:, 1:], torch.softmax(biased / 2.0, -1))
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3))


def test_the_context_takes_the_mean_over_the_turns_an_example_has():
    weights = path_weights(LOGITS, TURNS, RoutingPhase("soft"))
    torch.testing.assert_close(weights[0, 0], torch.softmax(torch.tensor([1.0, 2.0]), -1))
    torch.testing.assert_close(weights[1, 0], weights[1, 1])  # its second turn does not exist


def test_hard_weights_are_one_hot_with_the_softmax_gradient():
    logits = LOGITS.clone().requires_grad_()
    weights = path_weights(logits, TURNS, RoutingPhase("hard"))
    assert set(weights.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(weights[:, 1:].argmax(-1), torch.tensor([[0, 1], [0, 0]]))
    hard = torch.autograd.grad(weights[..., 0].sum(), logits)[0]
    soft = torch.autograd.grad(path_weights(logits, TURNS, RoutingPhase("soft"))[..., 0].sum(), logits)[0]
    torch.testing.assert_close(hard, soft)


def test_gumbel_noise_makes_hard_weights_random():
    logits, turns = torch.zeros(1, 2000, 2), torch.ones(1, 2000).bool()
    kept = path_weights(logits + torch.tensor([1.0, 0.0]), turns, RoutingPhase("hard", gumbel=True))[0, 1:, 0].mean()
    # Gumbel-max samples the softmax: 0.731 of 2000, standard error 0.01.
    assert abs(kept - torch.sigmoid(torch.tensor(1.0))) < 0.04


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.3, 0.5])
def test_the_random_phase_skips_the_wanted_share(ratio):
    shape = (1, 20000, 2)
    phase = RoutingPhase("random", keep_bias=1 - math.sqrt(2 * ratio))
    weights = path_weights(torch.randn(shape), torch.ones(shape[:2]).bool(), phase)[0, 1:]
    # Standard error of 20000 draws: at most 0.004.
    assert abs(weights[:, 1].mean() - ratio) < 0.015


def test_the_random_phase_does_not_read_the_logits():
    logits = torch.zeros(1, 2, 2, requires_grad=True)
    torch.manual_seed(1)
    ours = path_weights(logits, torch.ones(1, 2).bool(), RoutingPhase("random"))
    torch.manual_seed(1)
    others = path_weights(logits + 100, torch.ones(1, 2).bool(), RoutingPhase("random"))
    assert torch.equal(ours, others) and not ours.requires_grad


@pytest.mark.parametrize("phase", [{"mode": "random"}, {"mode": "hard", "gumbel": True}], ids=["random", "gumbel"])
def test_seeded_draws_repeat_per_seed_and_layer_whatever_else_was_drawn(phase):
    logits, turns = torch.zeros(4, 8, 2), torch.ones(4, 8).bool()

    def weights(seed, layer):
        torch.rand(1)
        return path_weights(logits, turns, RoutingPhase(**phase, draws=SeededDraws(seed)), layer)

    assert torch.equal(weights(5, 2), weights(5, 2))
    assert not torch.equal(weights(5, 2), weights(5, 3))
    assert not torch.equal(weights(5, 2), weights(6, 2))


def test_the_random_phase_follows_given_draws():
    draws = torch.tensor([[[0.9, 0.1], [0.1, 0.9]], [[0.3, 0.4], [0.4, 0.3]]])
    phase = RoutingPhase("random", keep_bias=0.2, draws=lambda layer, like: draws)
    assert path_weights(LOGITS, torch.ones(2, 2).bool(), phase)[:, 1:, 0].round().tolist() == [[1, 0], [1, 1]]


def test_given_draws_make_gumbel_noise():
    phase = RoutingPhase("hard", gumbel=True, draws=SeededDraws(1))
    logits, turns = torch.zeros(1, 2000, 2), torch.ones(1, 2000).bool()
    noise = -(-SeededDraws(1)(3, logits).log()).log()
    weights = path_weights(logits + torch.tensor([1.0, 0.0]), turns, phase, layer=3)[:, 1:]
    assert torch.equal(weights[..., 0] == 1, noise[..., 0] + 1 > noise[..., 1])


def test_draws_of_another_shape_are_refused():
    phase = RoutingPhase("random", draws=lambda layer, like: torch.rand(3, 2, 2))
    with pytest.raises(ValueError, match=r"shape \(3, 2, 2\) for layer 1, expected .* \(2, 2, 2\); .*another batch"):
        path_weights(LOGITS, TURNS, phase, layer=1)


def test_an_unknown_mode_is_named():
    with pytest.raises(ValueError, match=r"mode must be .*'random'.*got 'softly'"):
        RoutingPhase("softly")


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_has_to_be_positive(temperature):
    with pytest.raises(ValueError, match=f"temperature must be positive, got {temperature}"):
        RoutingPhase(temperature=temperature)


# ---------------------------------------- rows, attention


def test_rows_are_taken_of_batched_values_and_shared_ones_left():
    rows, shared, batched = torch.tensor([2, 0]), torch.ones(1, 3), torch.arange(6).reshape(3, 2)
    taken = take_rows((shared, batched, None), rows, 3)
    assert taken[0] is shared and taken[2] is None
    assert taken[1].tolist() == [[4, 5], [0, 1]]


def test_rows_of_something_unknown_are_refused():
    with pytest.raises(ValueError, match=r"rows of a mixed route out of a dict.*sdpa"):
        take_rows({}, torch.tensor([0]), 2)


def test_routing_tokens_attend_to_what_they_may_see_and_themselves():
    heads, width, tokens = 2, 4, 3
    keys, values = torch.randn(1, heads, tokens + 2, width), torch.randn(1, heads, tokens + 2, width)
    queries = torch.randn(1, heads, 2, width)
    visible = torch.tensor([[[True, False, True], [False, False, False]]])
    attention = RoutingAttention(None, with_itself(visible))
    ordinary_keys, ordinary_values = attention.update(keys, values, 0)
    assert torch.equal(ordinary_keys, keys[:, :, :tokens]) and torch.equal(ordinary_values, values[:, :, :tokens])
    out = attention.attend(queries, 0.5)
    # Token 0 reads tokens 0 and 2 and itself (3); token 1 only itself (4).
    scores = torch.softmax(queries[:, :, 0, None] @ keys[:, :, [0, 2, 3]].transpose(2, 3) * 0.5, -1)
    torch.testing.assert_close(out[:, 0], (scores @ values[:, :, [0, 2, 3]])[:, :, 0])
    torch.testing.assert_close(out[:, 1], values[:, :, 4])


def test_layer_rows_gather_nothing_where_all_agree():
    every, none, some = LayerRows([True, True]), LayerRows([False, False]), LayerRows([True, False, True])
    assert every.all_kept and every.kept is None and none.none_kept and none.skipped is None
    assert some.kept.tolist() == [0, 2] and some.skipped.tolist() == [1]


def test_an_attention_module_sees_the_models_config_through_copies_and_pickles(model):
    own, other = tiny.layers_of(model)[0].self_attn.config, copy.deepcopy(model)
    config = tiny.layers_of(other)[0].self_attn.config
    assert isinstance(config, RoutedAttentionConfig) and config.hidden_size == tiny.HIDDEN
    other.set_attn_implementation("eager")
    assert config.base_attn_implementation == "eager" and own.base_attn_implementation == "sdpa"
    assert pickle.loads(pickle.dumps(own)).hidden_size == tiny.HIDDEN


# ---------------------------------------- configuration


def test_the_configuration_says_what_it_is():
    config = tiny.tiny_config()
    assert config.model_type == "roe_llava" and config.image_token_id == tiny.IMAGE
    again = RoeLlavaConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()


def test_routed_layers_are_kept_in_order():
    assert tiny.tiny_config(routed_layers=[3, 1]).routed_layers == [1, 3]


@pytest.mark.parametrize("size", [0, -1, True])
def test_an_adapter_needs_a_positive_size(size):
    with pytest.raises(ValueError, match=f"adapter_size must be a positive integer, got {size}"):
        tiny.tiny_config(adapter_size=size)


@pytest.mark.parametrize("name", ["routing_positions", "routing_question"])
def test_an_unknown_routing_option_is_named(name):
    with pytest.raises(ValueError, match=f"{name} must be one of .* got 'sideways'"):
        tiny.tiny_config(**{name: "sideways"})


@pytest.mark.parametrize("ratio", [-0.1, 0.51])
def test_a_target_skip_ratio_outside_half_is_refused(ratio):
    with pytest.raises(ValueError, match=rf"target_skip_ratio must lie in \[0, 0.5\], got {ratio}"):
        tiny.tiny_config(target_skip_ratio=ratio)


@pytest.mark.parametrize("layers", [[0, 4], [-1], [1, 1]])
def test_routed_layers_that_do_not_exist_are_named(layers):
    with pytest.raises(ValueError, match=rf"routed_layers .*\[0, {NUM_LAYERS}\), got \[{layers[0]}.*has 4 layers"):
        tiny.tiny_config(routed_layers=layers)
