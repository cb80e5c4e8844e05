"""Training: soft and hard mixtures, gradients of every new part, the loss, and gradient checkpointing."""

import math
from contextlib import nullcontext

import pytest
import tiny
import torch
from tiny import NUM_LAYERS, layers_of
from torch import nn

from roe_llava import RoutingPhase
from roe_llava.checkpointing_roe import HAS_NEW_NAME
from roe_llava.phases_roe import SeededDraws, roe_loss, sparsity_penalty, token_loss_per_example

# Matrix products of another batch size round differently; logits are of order 1.
CLOSE = {"rtol": 0, "atol": 1e-5}
IMG = [tiny.IMAGE] * 4
# Rows of (tokens, which of them are answers): two turns, one turn, a text-only turn, nothing labelled.
ROWS = [
    ([1, *IMG, 20, 21, 30, 31, 22, 23, 32], [7, 8, 11]),
    ([1, *IMG, 24, 33, 34], [6, 7]),
    ([1, 25, 26, 35], [3]),
    ([1, *IMG, 27], []),
]


def conversations(rows=ROWS, side="right"):
    """Inputs with labels for some conversations, padded."""
    width = max(len(ids) for ids, _ in rows)
    ids, mask, labels = [], [], []
    for tokens, answers in rows:
        pad = width - len(tokens)
        label = [token if place in answers else -100 for place, token in enumerate(tokens)]
        real, none = [1] * len(tokens), [0] * pad
        ids.append(tokens + [0] * pad if side == "right" else [0] * pad + tokens)
        mask.append(real + none if side == "right" else none + real)
        labels.append(label + [-100] * pad if side == "right" else [-100] * pad + label)
    images = sum(row[0].count(tiny.IMAGE) // 4 for row in rows)
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    inputs = {name: torch.tensor(value) for name, value in inputs.items()}
    pixels = torch.randn(images, 3, 28, 28, generator=torch.Generator().manual_seed(3))
    return inputs | ({"pixel_values": pixels} if images else {})


@pytest.fixture(params=tiny.FAMILIES)
def trained(request):
    """A model of every family in training mode."""
    return tiny.routed_model(request.param).train()


@pytest.fixture
def learner(model):
    """A Llama model in training mode."""
    return model.train()


def gradients(model, inputs):
    model.zero_grad()
    outputs = model(**inputs)
    outputs.loss.backward()
    return outputs, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# ---------------------------------------- gradients


def test_gradients_reach_routers_adapters_and_routing_tokens(trained):
    trained.config.target_skip_ratio = 0.5
    _, found = gradients(trained, conversations())
    new = [name for name, _ in trained.named_parameters() if "router" in name or "adapter" in name]
    assert len(new) == 3 * NUM_LAYERS
    for name in [*new, "model.language_model.routing_tokens.weight"]:
        assert found[name].isfinite().all() and found[name].abs().max() > 0, name


def test_gradients_reach_both_routing_tokens(learner):
    _, found = gradients(learner, conversations())
    assert (found["model.language_model.routing_tokens.weight"].abs().amax(dim=1) > 0).all()


def test_gradients_reach_the_base(learner):
    _, found = gradients(learner, conversations())
    for part in ("layers.0.self_attn.q_proj", "layers.3.mlp.down_proj", "multi_modal_projector.linear_1", "lm_head"):
        assert any(part in name and grad.abs().max() > 0 for name, grad in found.items()), part


def test_the_random_phase_gives_routers_and_routing_tokens_nothing_to_learn(learner):
    learner.model.routing_phase = RoutingPhase("random", keep_bias=1 - math.sqrt(0.6))
    _, found = gradients(learner, conversations())
    assert not [name for name in found if "router" in name]
    assert not found.get("model.language_model.routing_tokens.weight", torch.zeros(1)).any()
    assert any("adapter" in name and grad.abs().max() > 0 for name, grad in found.items())


def test_the_hard_phase_gives_routers_gradients(learner):
    learner.model.routing_phase = RoutingPhase("hard")
    outputs, found = gradients(learner, conversations())
    assert set(outputs.turn_skip_weights.unique().tolist()) <= {0.0, 1.0}
    assert any("router" in name and grad.abs().max() > 0 for name, grad in found.items())


# ---------------------------------------- rows that need no full path do not run it

# Per row and turn: the first row needs layers 0 and 2, the second 0, 1 and 2, the others none but 0; nobody needs 3.
GIVEN = torch.tensor(
    [[[1, 0, 0, 0], [1, 0, 1, 0]], [[1, 1, 1, 0], [0, 0, 0, 1]], [[1, 0, 0, 0]] * 2, [[1, 0, 0, 0]] * 2]
).bool()
LEAVING = [
    RoutingPhase("random", keep_bias=-0.3, draws=SeededDraws(0)),
    RoutingPhase("given", routes=GIVEN),
    RoutingPhase("decided"),
]


def mlp_calls(model):
    return [tiny.Calls(layer.mlp) for layer in layers_of(model)]


def test_a_layer_runs_the_rows_of_which_a_turn_keeps_it(learner):
    learner.model.routing_phase = RoutingPhase("given", routes=GIVEN)
    calls = mlp_calls(learner)
    outputs = learner(**conversations())
    assert outputs.turn_mask.tolist() == [[True, True], [True, False], [True, False], [True, False]]
    assert [call.rows for call in calls] == [4, 1, 2, 0]


@pytest.mark.parametrize("phase", LEAVING, ids=lambda phase: phase.mode)
def test_leaving_rows_out_changes_neither_loss_nor_gradients(trained, phase, monkeypatch):
    trained.model.routing_phase = phase
    calls = mlp_calls(trained)
    outputs, found = gradients(trained, conversations())
    assert sum(call.rows for call in calls) < 4 * NUM_LAYERS
    monkeypatch.setattr(RoutingPhase, "leaves_out", False)
    before = sum(call.rows for call in calls)
    whole, expected = gradients(trained, conversations())
    assert sum(call.rows for call in calls) - before == 4 * NUM_LAYERS
    assert torch.equal(whole.turn_skip_weights, outputs.turn_skip_weights)
    torch.testing.assert_close(outputs.loss, whole.loss, **CLOSE)
    torch.testing.assert_close(outputs.logits, whole.logits, **CLOSE)
    for name, grad in expected.items():
        torch.testing.assert_close(found.get(name, torch.zeros_like(grad)), grad, **CLOSE, msg=name)


def test_every_layer_runs_a_row_where_processes_wait_for_each_other(learner):
    learner.model.routing_phase = RoutingPhase("given", routes=torch.zeros_like(GIVEN), at_least_one=True)
    calls = mlp_calls(learner)
    outputs, found = gradients(learner, conversations())
    assert [call.rows for call in calls] == [1] * NUM_LAYERS
    assert (outputs.turn_skip_weights == 1).all()
    assert not found["model.language_model.layers.3.mlp.up_proj.weight"].any()


def test_decided_routes_are_those_of_inference_and_teach_routers_nothing(trained):
    inputs = tiny.batch(("question", "other_question"))
    trained.model.routing_phase = RoutingPhase("decided")
    outputs = trained(**inputs)
    outputs.logits.sum().backward()
    learned = [name for name, parameter in trained.named_parameters() if parameter.grad is not None]
    assert learned and not [name for name in learned if "router" in name or "routing_tokens" in name]
    with torch.no_grad():
        expected = trained.eval()(**inputs, use_cache=False)
    assert torch.equal(outputs.turn_skip_weights[:, 0] == 0, expected.routes) and not expected.routes.all()
    torch.testing.assert_close(outputs.logits, expected.logits, **CLOSE)


def test_attentions_have_all_rows_where_some_were_left_out(learner):
    learner.set_attn_implementation("eager")
    learner.model.routing_phase = RoutingPhase("given", routes=GIVEN)
    attentions = learner(**conversations(), output_attentions=True).attentions
    assert attentions[3] is None and {len(one) for one in attentions[:3]} == {4}


# ---------------------------------------- gradient checkpointing


@pytest.mark.parametrize("mode", ["soft", "hard", "random", "decided"])
@pytest.mark.parametrize("kwargs", [None, {"use_reentrant": False}, {"determinism_check": "default"}])
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(trained, mode, kwargs):
    trained.model.routing_phase = RoutingPhase(mode, keep_bias=0.1)
    torch.manual_seed(5)
    outputs, expected = gradients(trained, conversations())
    trained.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
    assert layers_of(trained)[0].gradient_checkpointing
    torch.manual_seed(5)
    again, found = gradients(trained, conversations())
    assert torch.equal(again.loss, outputs.loss)
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, msg=name)


@pytest.mark.parametrize("phase", [{"mode": "random"}, {"mode": "hard", "gumbel": True}], ids=["random", "gumbel"])
def test_gradient_checkpointing_repeats_seeded_draws(learner, phase):
    learner.model.routing_phase = RoutingPhase(**phase, draws=SeededDraws(3))
    outputs, expected = gradients(learner, conversations())
    torch.rand(7)  # the global generator plays no part
    learner.activation_checkpointing_enable(activation_checkpointing_kwargs={"preserve_rng_state": False})
    again, found = gradients(learner, conversations())
    assert torch.equal(again.loss, outputs.loss)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, msg=name)


def test_layers_draw_their_own_numbers(learner):
    learner.model.routing_phase = RoutingPhase("random", draws=SeededDraws(0))
    weights = learner(**conversations()).turn_skip_weights.round()
    assert not torch.equal(weights[..., 0], weights[..., 1])


def test_gradient_checkpointing_really_recomputes_layers(learner):
    learner.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    mlp = tiny.Calls(layers_of(learner)[1].mlp)
    gradients(learner, conversations())
    assert mlp.calls == 2


def test_reentrant_checkpointing_is_refused(learner):
    # Routing tokens reach a layer through an object, which reentrant checkpointing does not differentiate.
    with pytest.raises(ValueError, match="use_reentrant=True loses the gradients of routing tokens"):
        learner.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    is_deprecated = pytest.warns(FutureWarning) if HAS_NEW_NAME else nullcontext()
    with is_deprecated, pytest.raises(ValueError, match="use_reentrant=True"):
        learner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})


# ---------------------------------------- mixtures


def test_a_huge_keep_bias_trains_the_base_alone(learner):
    inputs = conversations()
    learner.model.routing_phase = RoutingPhase("soft", keep_bias=1e4)
    outputs = learner(**inputs)
    stock = tiny.stock_of(learner)(**{name: inputs[name] for name in inputs if name != "labels"}).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(outputs.logits[real], stock[real], **CLOSE)
    assert not outputs.turn_skip_weights.any()


def test_a_huge_negative_keep_bias_equals_skipping_all(learner):
    inputs = conversations()
    learner.model.routing_phase = RoutingPhase("soft", keep_bias=-1e4)
    ours = learner(**inputs).logits
    base = learner.eval()(**inputs, routes=[False] * NUM_LAYERS).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(ours[real], base[real], **CLOSE)


def test_one_hard_turn_equals_the_route_taken_at_inference(trained):
    """One turn, image first: hard training weights and hard inference are the same arithmetic."""
    inputs = conversations(ROWS[1:3])
    trained.model.routing_phase = RoutingPhase("hard")
    soft = trained(**inputs)
    hard = trained.eval()(**inputs)
    assert torch.equal(soft.turn_skip_weights[:, 0] == 0, hard.routes)
    torch.testing.assert_close(soft.router_logits, hard.router_logits, **CLOSE)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(soft.logits[real], hard.logits[real], **CLOSE)


def test_tokens_move_with_their_turn_and_the_context_with_the_mean(learner):
    """A layer mixes each token's two paths by its turn's weights, the context's by the mean of the turns' logits."""
    inputs = conversations(ROWS[:1])
    learner.model.routing_phase = RoutingPhase("soft", temperature=0.7, keep_bias=0.3)
    layer, caught = layers_of(learner)[1], {}
    layer.router.register_forward_hook(lambda module, args, out: caught.update(logits=out))
    layer.register_forward_hook(lambda module, args, out: caught.update(before=args[0], after=out))
    learner(**inputs)
    states, after = caught["before"].detach(), caught["after"].detach()
    skip = states + layer.adapter(layer.input_layernorm(states))
    full = {}
    layer.mlp.register_forward_hook(lambda module, args, out: full.update(mlp=out))
    layer.self_attn.register_forward_hook(lambda module, args, out: full.update(attention=out[0]))
    learner(**inputs)
    full = (states + full["attention"][:, :-3] + full["mlp"][:, :-3]).detach()  # 3 routing tokens ride at the end
    biased = caught["logits"][0].detach() + torch.tensor([0.3, 0.0])
    weights = torch.softmax(torch.cat([biased.mean(0, keepdim=True), biased]) / 0.7, -1)
    turns = [0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2]
    expected = weights[turns][None, :, :1] * full + weights[turns][None, :, 1:] * skip
    torch.testing.assert_close(after, expected.detach(), **CLOSE)


def test_routing_tokens_of_turns_never_see_each_other(learner):
    """The first turn's logits are those of a conversation whose second turn is another."""
    ours = conversations(ROWS[:1])
    others = conversations([([1, *IMG, 20, 21, 30, 31, 40, 41, 42], [7, 8, 11])])
    caught = []
    layers_of(learner)[0].router.register_forward_hook(lambda module, args, out: caught.append(out))
    layers_of(learner)[1].router.register_forward_hook(lambda module, args, out: caught.append(out))
    learner(**ours)
    learner(**others)
    # Layer 1: what turn 1's token has read through layer 0, which mixes by this turn's own weights.
    torch.testing.assert_close(caught[1][0, 0], caught[3][0, 0], **CLOSE)
    assert not torch.allclose(caught[1][0, 1], caught[3][0, 1])


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_in_a_training_batch_equals_the_row_alone(trained, side):
    inputs = conversations(side=side)
    together = trained(**inputs)
    for row, conversation in enumerate(ROWS):
        images = [c[0].count(tiny.IMAGE) // 4 for c in ROWS]
        first = sum(images[:row])
        one = conversations([conversation])
        one.pop("pixel_values", None)
        if images[row]:
            one["pixel_values"] = inputs["pixel_values"][first : first + 1]
        alone = trained(**one)
        real = inputs["attention_mask"][row].bool()
        torch.testing.assert_close(alone.logits[0], together.logits[row][real], **CLOSE)
        turns = alone.turn_skip_weights.shape[1]
        torch.testing.assert_close(alone.turn_skip_weights[0], together.turn_skip_weights[row, :turns], **CLOSE)


def test_turns_that_an_example_lacks_are_masked(learner):
    outputs = learner(**conversations())
    assert outputs.turn_mask.tolist() == [[True, True], [True, False], [True, False], [True, False]]
    assert outputs.turn_skip_weights.shape == (4, 2, NUM_LAYERS)
    assert outputs.routes is None


def test_router_logits_are_those_of_the_last_turn(learner):
    caught = []
    for layer in layers_of(learner):
        layer.router.register_forward_hook(lambda module, args, out: caught.append(out))
    outputs = learner(**conversations())
    expected = torch.stack([torch.cat([logits[:1, 1], logits[1:, 0]]) for logits in caught], 1)
    assert torch.equal(outputs.router_logits, expected)


def test_layers_without_a_router_weigh_nothing_to_skip():
    model = tiny.tiny_model(tiny.tiny_config(routed_layers=[1])).train()
    weights = model(**conversations()).turn_skip_weights
    assert not weights[..., [0, 2, 3]].any() and weights[..., 1].all()


def test_training_holds_no_cache(learner):
    assert learner(**conversations()).past_key_values is None


# ---------------------------------------- loss


def test_the_sparsity_penalty_is_what_is_missing_to_the_target():
    shares = torch.tensor([0.0, 0.1, 0.3, 0.9])
    torch.testing.assert_close(sparsity_penalty(shares, 0.3), torch.tensor([0.3, 0.2, 0.0, 0.0]))
    assert not sparsity_penalty(shares, 0.0).any()


def test_the_token_loss_is_the_mean_over_an_examples_labels():
    logits, labels = torch.randn(2, 4, 5), torch.tensor([[-100, 1, -100, 3], [0, -100, -100, -100]])
    logs = logits.log_softmax(-1)
    expected = -(logs[0, 0, 1] + logs[0, 2, 3]) / 2
    torch.testing.assert_close(token_loss_per_example(logits, labels), torch.stack([expected, torch.tensor(0.0)]))


def test_the_loss_is_cross_entropy_plus_the_weighted_penalty(learner):
    inputs = conversations()
    learner.config.target_skip_ratio = 0.5
    learner.model.routing_phase = RoutingPhase("soft", keep_bias=2.0)
    outputs = learner(**inputs)
    expected = []
    for row, turns in enumerate([2, 1, 1]):
        labels = inputs["labels"][row, 1:]
        task = nn.functional.cross_entropy(outputs.logits[row, :-1], labels)
        share = outputs.turn_skip_weights[row, :turns].mean()
        expected.append(task + torch.exp(-5 * task) * (0.5 - share).clamp(min=0))
    torch.testing.assert_close(outputs.loss, torch.stack(expected).mean())


def test_the_factor_of_the_penalty_is_a_constant_in_the_backward_pass():
    logits = torch.randn(1, 3, 4, requires_grad=True)
    share = torch.tensor([0.1], requires_grad=True)
    labels = torch.tensor([[-100, 1, 2]])
    loss = roe_loss(logits, labels, share, 0.3)
    task = token_loss_per_example(logits, labels)[0]
    by_logits, by_share = torch.autograd.grad(loss, (logits, share))
    torch.testing.assert_close(by_logits, torch.autograd.grad(task, logits)[0])
    torch.testing.assert_close(by_share, -torch.exp(-5 * task).detach()[None])


def test_a_row_without_labels_leaves_the_loss_finite_and_alone(learner):
    with_row, without = conversations(), conversations(ROWS[:3])
    loss = learner(**with_row).loss
    assert loss.isfinite()
    without["pixel_values"] = with_row["pixel_values"][:2]
    torch.testing.assert_close(loss, learner(**without).loss)


def test_a_batch_without_any_label_has_a_finite_loss_and_gradients(learner):
    outputs, found = gradients(learner, conversations(ROWS[3:]))
    assert outputs.loss == 0
    assert all(grad.isfinite().all() for grad in found.values())


def test_in_eval_mode_the_loss_is_the_cross_entropy_alone(model):
    model.config.target_skip_ratio = 0.5
    inputs = conversations()
    outputs = model(**inputs)
    labels = nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
    expected = nn.functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(outputs.loss, expected)
    assert outputs.routes.dtype == torch.bool and outputs.turn_skip_weights is None and outputs.turn_mask is None


def test_in_eval_mode_labels_do_not_reveal_the_answer_to_the_router(model):
    inputs = conversations(ROWS[1:2])
    prompt = {"input_ids": inputs["input_ids"][:, :6], "pixel_values": inputs["pixel_values"]}
    torch.testing.assert_close(model(**inputs).router_logits, model(**prompt).router_logits, **CLOSE)


def test_in_training_with_pinned_routes_the_loss_is_the_cross_entropy_alone(learner):
    inputs = conversations()
    pinned = learner(**inputs, routes=[True] * NUM_LAYERS)
    expected = learner.eval()(**inputs, routes=[True] * NUM_LAYERS)
    torch.testing.assert_close(pinned.loss, expected.loss)
    assert pinned.router_logits is None and pinned.routes.all()


def test_given_segments_equal_those_the_labels_tell(learner):
    inputs = conversations()
    segments = learner.model.segments_of(inputs["input_ids"], None, inputs["attention_mask"], inputs["labels"])
    assert torch.equal(learner(**inputs, routing_segments=segments).loss, learner(**inputs).loss)


def test_a_few_steps_learn_the_answers(learner):
    inputs = conversations()
    optimizer = torch.optim.AdamW(learner.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        loss = learner(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_the_loss_is_a_mean_that_trainer_divides_by_its_accumulation_steps(learner):
    assert learner.accepts_loss_kwargs is False


def test_a_route_bias_in_training_is_refused(learner):
    with pytest.raises(ValueError, match=r"route_bias.*model\.model\.routing_phase"):
        learner(**conversations(), route_bias=1.0)
