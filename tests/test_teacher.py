"""Taught routers: the search, expected losses, the price that meets a budget, given routes, exact resume."""

import itertools

import pytest
import tiny
import torch
from test_trainer import RATES, rows, stack, trainer_for
from transformers import TrainingArguments

from roe_llava import RoutingPhase
from roe_llava.phases_roe import path_weights
from roe_llava.training.route_search import RoutePool, choose_routes, price_of, search_routes
from roe_llava.training.route_values import Reading, RouteValues, expected_losses, question_features
from roe_llava.training.schedule import StageSchedule
from roe_llava.training.teacher import (
    OWN,
    TAUGHT,
    RouteTeacher,
    TaughtObjective,
    TaughtSchedule,
    Teaching,
    first_layer_input,
    measured,
    turn_losses,
)
from roe_llava.training.trainer import RoeTrainer

# ------------------------------------------------------------------------------------------------------------ planted
# Two kinds of questions over six layers: kind 0 needs layers 1 and 2, kind 1 layers 3 and 4; nobody needs layer 5.

NEEDED = {0: (1, 2), 1: (3, 4)}
KINDS = torch.tensor([0, 1] * 60)


def planted_losses(route):
    """0.1 where nothing needed is missing, 1 more for each needed layer that is."""
    missing = torch.tensor([[float(not route[layer]) for layer in NEEDED[kind]] for kind in (0, 1)]).sum(dim=1)
    return 0.1 + missing[KINDS]


def planted_pool(size=200, noise=0.0):
    generator = torch.Generator().manual_seed(0)
    pool = search_routes(planted_losses, 6, range(1, 6), size, 3)
    return RoutePool(pool.routes, pool.losses + noise * torch.randn(pool.losses.shape, generator=generator))


def planted_reading():
    """Features (120, 8) that tell the kind in their first value, and noise beside it."""
    features = torch.randn(120, 8, generator=torch.Generator().manual_seed(1))
    features[:, 0] = 2.0 * KINDS - 1
    return features


def skipped(routes):
    return {frozenset(layer for layer, runs in enumerate(route) if not runs) for route in routes.tolist()}


# ------------------------------------------------------------------------------------------------------------- search


def test_the_search_tries_every_single_layer_and_no_route_twice():
    tried = []
    pool = search_routes(
        lambda route: tried.append(tuple(route.tolist())) or planted_losses(route), 6, range(1, 6), 18, 3
    )
    assert len(tried) == len(set(tried)) == len(pool.routes) == 18
    assert pool.routes[0].all()
    assert {frozenset(), *(frozenset([layer]) for layer in range(1, 6))} <= skipped(pool.routes)
    assert pool.losses.shape == (120, 18)


def test_the_search_leaves_alone_what_has_no_router_and_keeps_some_layers():
    pool = search_routes(planted_losses, 6, (1, 3, 5), 1000, 3)
    assert len(pool.routes) == 8  # all subsets: the search ends when there is nothing left to try
    pool = search_routes(planted_losses, 6, range(6), 1000, 3)
    assert pool.skip_ratio.max() == 0.5 and len(pool.routes) == sum(1 for n in range(4) for _ in _subsets(n))


def _subsets(number):
    return itertools.combinations(range(6), number)


def test_the_same_seed_searches_the_same_routes():
    first, again, other = (search_routes(planted_losses, 6, range(1, 6), 14, 3, seed).routes for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert skipped(first) != skipped(other)


@pytest.mark.parametrize(
    ("routed", "size", "message"),
    [(None, 9, "9 routes to search are too few for 6 layers"), ([0], 64, "1 of 6 layers have a router")],
)
def test_a_search_that_cannot_be_is_refused_before_the_first_step(tmp_path, routed, size, message):
    model = tiny.tiny_model(tiny.tiny_config(num_layers=6, routed_layers=routed))
    teacher = RouteTeacher(0.3, Teaching(searched_routes=size))
    with pytest.raises(ValueError, match=message):
        RoeTrainer(
            model,
            schedule=TaughtSchedule(0.3),
            objective=TaughtObjective(),
            teacher=teacher,
            rates=RATES,
            args=TrainingArguments(tmp_path, max_steps=2, report_to=[], use_cpu=True),
        )


def test_a_search_that_single_layers_use_up_is_refused():
    with pytest.raises(ValueError, match=r"11 routes to search are too few for 5 layers .* take 18 or more"):
        search_routes(planted_losses, 6, range(1, 6), 11, 3)


def test_the_search_of_a_deep_model_finds_routes_at_the_target():
    """32 layers of which a third is of no use, in another place for each of two kinds."""
    needed = torch.ones(2, 32, dtype=torch.bool)
    needed[0, 4:14] = needed[1, 18:28] = False

    def losses(route):
        return 0.1 + 0.3 * (needed & ~route).sum(dim=1)[KINDS].clamp(max=10)

    pool = search_routes(losses, 32, range(32), 96, 20)
    assert ((pool.skip_ratio > 0.2) & (pool.skip_ratio < 0.4)).sum() >= 15
    chosen = choose_routes(pool, pool.losses, 0.25, 8)
    number = [pool.routes.tolist().index(route) for route in chosen.tolist()]
    costs = pool.losses[:, number] - 2 * pool.skip_ratio[number]
    own = pool.losses[:, number].gather(1, costs.argmin(dim=1)[:, None])
    assert own.mean() < 0.5  # any route for all of this length costs 1 more


def test_chosen_routes_fit_the_kinds_and_meet_the_budget():
    pool = planted_pool()
    chosen = choose_routes(pool, pool.losses, 0.5, 3)
    assert skipped(chosen) == {frozenset(), frozenset({3, 4, 5}), frozenset({1, 2, 5})}


def test_one_route_is_chosen_where_more_would_not_help():
    pool = search_routes(lambda route: torch.full((120,), 0.1) + 10 * (~route[1:5]).sum(), 6, range(1, 6), 32, 5)
    assert skipped(choose_routes(pool, pool.losses, 0.1, 8)) == {frozenset(), frozenset({5})}


@pytest.mark.parametrize("target", [0.1, 0.25, 0.4])
def test_the_price_meets_the_target(target):
    saved = torch.linspace(-1, 1, 1001)  # what skipping everything would cost each
    price = price_of(lambda price: (saved < price).float().mean().item(), target)
    assert (saved < price).float().mean().item() == pytest.approx(target, abs=2e-3)


# ------------------------------------------------------------------------------------------------------------- values


def test_expected_losses_see_through_luck():
    pool, features = planted_pool(noise=0.5), planted_reading()
    read = Reading.of(features)(features)
    expected, _, explained = expected_losses(read, pool.losses)
    truth = planted_pool().losses
    assert (expected - truth).square().mean() < 0.2 * (pool.losses - truth).square().mean()
    assert 0.3 < explained < 1
    lucky, fair = (choose_routes(pool, losses, 0.5, 3) for losses in (pool.losses, expected))

    def true_loss(routes):
        number = [pool.routes.tolist().index(route) for route in routes.tolist()]
        return truth[:, number[1:]].min(dim=1).values.mean()  # the first one runs all layers

    assert true_loss(fair) < true_loss(lucky) - 0.1


def test_leaving_one_out_is_what_fitting_without_it_gives():
    generator = torch.Generator().manual_seed(0)
    features, losses = torch.randn(20, 4, generator=generator), torch.randn(20, 2, generator=generator)
    read = Reading.of(features)(features)
    expected, ridge, _ = expected_losses(read, losses)
    x, y = read[:, :-1], losses - losses.mean(dim=0)
    for left_out in (0, 7):
        rest = [i for i in range(20) if i != left_out]
        weights = torch.linalg.solve(x[rest].T @ x[rest] + ridge * torch.eye(4), x[rest].T @ y[rest])
        torch.testing.assert_close(expected[left_out], x[left_out] @ weights + losses.mean(dim=0), atol=1e-4, rtol=1e-4)


def test_values_learn_the_kinds_and_the_price_meets_the_budget():
    pool, features = planted_pool(), planted_reading()
    read = Reading.of(features)(features)
    routes = torch.tensor([[True] * 6, [True] * 3 + [False] * 3, [True, False, False, True, True, False]])
    number = [pool.routes.tolist().index(route) for route in routes.tolist()]
    values = RouteValues(routes, 0.5, read.shape[1], ridge=0.03)
    values.observe(read, pool.losses[:, number], torch.tensor([True] * 3))
    values.fit()
    torch.testing.assert_close(values.predict(read), pool.losses[:, number], atol=0.1, rtol=0)
    assert torch.equal(values.choose(read), 1 + KINDS)
    values.aimed = 0.25
    values.fit()
    chosen = values.choose(read)
    assert values.skip_ratio[chosen].mean().item() == pytest.approx(0.25, abs=0.02)
    assert set(chosen.tolist()) <= {0, 1, 2} and 0 in chosen


def test_routers_that_skip_too_much_are_shown_shorter_routes_less_often():
    values = RouteValues(torch.ones(2, 4, dtype=torch.bool), 0.3, 3, ridge=1.0)
    values.correct(torch.full((100,), 0.4))
    assert values.aimed == pytest.approx(0.3 - 100 * 0.001 * 0.1)
    values.correct(torch.zeros(5000))
    assert values.aimed == pytest.approx(0.6)


def test_a_route_that_was_not_measured_keeps_its_sums():
    values = RouteValues(torch.ones(2, 4, dtype=torch.bool), 0.3, 3, ridge=1.0)
    values.observe(torch.ones(5, 3), torch.ones(5, 2), torch.tensor([True, True]))
    values.observe(torch.ones(500, 3), torch.ones(500, 2), torch.tensor([True, False]))
    assert values.squares[0].allclose(torch.tensor(5 * 0.5**0.5 + 500)) and values.squares[1].eq(5).all()
    assert values.products.allclose(torch.tensor([[5 * 0.5**0.5 + 500] * 3, [5.0] * 3]))


def test_small_batches_forget_no_faster_than_large_ones():
    """What teaching knows depends on the questions it has seen, not on how many came at once."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2000, 8, generator=generator)
    truth = torch.stack([features[:, 0], -features[:, 0]], dim=1)
    read, losses = Reading.of(features)(features), truth + torch.randn(truth.shape, generator=generator)
    errors = []
    for size in (1, 50):
        values = RouteValues(torch.tensor([[True, True], [True, False]]), 0.3, read.shape[1], ridge=0.03)
        for number, start in enumerate(range(0, 2000, size)):
            rows = slice(start, start + size)
            values.observe(read[rows], losses[rows], torch.tensor([number % 2 == 0, number % 2 == 1]))
        values.fit()
        errors.append((values.predict(read) - truth).square().mean().item())
    assert max(errors) < 0.05 and errors[0] < 2 * errors[1]


def test_features_are_the_mean_context_and_the_mean_question_of_every_turn():
    states = torch.arange(12.0).reshape(1, 6, 2)
    features, exists = question_features(states, torch.tensor([[-1, 0, 0, 1, -1, 2]]))
    assert features.tolist() == [[[3.0, 4.0, 6.0, 7.0], [3.0, 4.0, 10.0, 11.0]]]
    assert exists.tolist() == [[True, True]]


def test_wide_features_are_projected_alike_everywhere():
    sample = torch.randn(30, 600)
    first, again = Reading.of(sample)(sample), Reading.of(sample)(sample)
    assert first.shape == (30, 257) and torch.equal(first, again)
    assert first[:, :-1].norm(dim=1).mean().item() == pytest.approx(1, abs=0.15)


# ---------------------------------------------------------------------------------------------------------- given mode


def test_given_routes_are_taken_and_routers_still_answer():
    model, inputs = tiny.routed_model(), tiny.batch(("question", "other_question"))
    routes = torch.tensor([[[1, 0, 1, 1]], [[1, 1, 0, 0]]], dtype=torch.bool)
    with torch.no_grad():
        expected = model(**inputs, routes=routes[:, 0], use_cache=False).logits
        model.train()
        model.model.routing_phase = RoutingPhase("given", routes=routes)
        outputs = model(**inputs)
    torch.testing.assert_close(outputs.logits, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(outputs.turn_skip_weights, (~routes).float())
    assert outputs.turn_router_logits.abs().sum() > 0


def test_the_context_keeps_a_layer_that_half_of_the_turns_keep():
    routes = torch.tensor([[[True], [False], [False]], [[True], [False], [True]]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    weights = path_weights(torch.zeros(2, 3, 2), mask, RoutingPhase("given", routes=routes), layer=0)
    assert weights[:, :, 0].tolist() == [[1, 1, 0, 0], [1, 1, 0, 1]]


@pytest.mark.parametrize("shape", [None, (2, 2, 4), (2, 1, 3), (2, 4)])
def test_routes_of_another_batch_are_refused(shape):
    model, inputs = tiny.routed_model().train(), tiny.batch(("question", "other_question"))
    routes = None if shape is None else torch.ones(shape, dtype=torch.bool)
    model.model.routing_phase = RoutingPhase("given", routes=routes)
    with pytest.raises(ValueError, match=r"'given' needs routes of shape \(B, T, L\) = \(2, 1, .* got"):
        model(**inputs)


# ------------------------------------------------------------------------------------------------------------- teacher


def labelled_batch():
    return stack(rows()[:4])


def test_measuring_equals_the_pinned_route_and_leaves_the_model_as_it_was():
    model = tiny.tiny_model().train()
    batch, route = labelled_batch(), torch.tensor([True, False, True, True])
    losses, features, exists = measured(model, batch, route, max_loss=100.0)
    assert model.training and "labels" in batch and exists.shape == (4, 1)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    model.eval()
    with torch.no_grad():
        logits = model(**inputs, routes=route, use_cache=False).logits
        embedded = model.get_input_embeddings()(batch["input_ids"])
    for row in range(4):
        by_hand = torch.nn.functional.cross_entropy(logits[row, -3:-1], batch["input_ids"][row, -2:])
        assert losses[row].item() == pytest.approx(by_hand.item(), rel=1e-4)
    torch.testing.assert_close(features[:, 32:], embedded[:, 5:10].mean(dim=1))
    assert measured(model, batch, route, max_loss=0.5)[0].max() <= 0.5


def test_losses_are_those_of_every_turns_answer():
    logits = torch.zeros(1, 8, 4)
    logits[0, 2, 3] = 5.0  # turn 1's answer is predicted, turn 2's is not
    segments = torch.tensor([[0, 1, 1, -1, 2, 2, -1, -1]])
    labels = torch.tensor([[-100, -100, -100, 3, -100, -100, 1, 2]])
    losses, is_answered = turn_losses(logits, labels, segments, 3)
    assert is_answered.tolist() == [[True, True, False]]
    assert losses[0, 0] < 0.05 and losses[0, 1].item() == pytest.approx(1.3863, abs=1e-3) and losses[0, 2] == 0


def test_a_turn_without_an_answer_to_learn_is_not_measured_and_runs_every_layer():
    model, batch = tiny.tiny_model().train(), labelled_batch()
    teacher = RouteTeacher(0.3, Teaching(searched_routes=24))
    teacher.search(model, [batch])
    batch["labels"][1] = -100
    losses, features, counted = measured(model, batch, torch.ones(4, dtype=torch.bool), max_loss=3.0)
    assert counted.flatten().tolist() == [True, False, True, True] and len(losses) == len(features) == 3
    before = teacher.questions
    assert teacher.teach(model, batch)[1].all() and teacher.questions == before + 3


def test_the_hook_is_gone_afterwards():
    model = tiny.tiny_model().eval()
    with first_layer_input(model) as seen:
        model(**tiny.batch(("question",)))
    model(**tiny.batch(("question",)))
    assert len(seen) == 1 and not model.model.language_model.layers[0]._forward_pre_hooks


def test_teaching_before_the_search_is_refused():
    with pytest.raises(RuntimeError, match="call search first"):
        RouteTeacher(0.3).teach(tiny.tiny_model(), labelled_batch())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_routes": 0}, "num_routes must be at least 1, got 0"),
        ({"measured_routes": 9}, "measured_routes 9 is more than num_routes 8"),
        ({"max_loss": 0.0}, "max_loss must be positive"),
        ({"searched_examples": 0}, "searched_examples must be at least 1"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Teaching(**options)


@pytest.mark.parametrize("options", [{"target_skip_ratio": 0.0}, {"warmup_end": 0.7}, {"taught_end": 1.1}])
def test_a_wrong_taught_schedule_is_refused(options):
    with pytest.raises(ValueError):
        TaughtSchedule(**options)


def test_stages_and_groups_of_a_taught_run():
    schedule = TaughtSchedule()
    assert [schedule.phase(progress).mode for progress in (0.0, 0.3, 0.7)] == ["random", "given", "decided"]
    learns = {group: [schedule.trains(group, p) for p in (0.1, 0.4, 0.8)] for group in (*RATES, "base")}
    assert learns == {
        "adapter": [True, True, True],
        "router": [False, True, False],
        "routing_tokens": [False, True, False],
        "base": [False, False, True],
    }


def test_a_target_that_no_route_skips_is_refused():
    model = tiny.tiny_model(tiny.tiny_config(routed_layers=[2]))
    with pytest.raises(ValueError, match="skip 25% of the layers at most, the target is 30%"):
        RouteTeacher(0.3).search(model, [labelled_batch()])


def test_routers_are_not_driven_away_from_what_is_shown():
    with pytest.raises(ValueError, match="imitation_weight must be positive, got -1"):
        TaughtObjective(-1)


def test_one_question_is_no_sample():
    with pytest.raises(ValueError, match="1 questions, expected 2 at least"):
        Reading.of(torch.ones(1, 4))


def test_the_objective_adds_the_imitation_of_given_routes_only_while_they_are_given():
    model, inputs = tiny.tiny_model().train(), labelled_batch()
    labels = inputs.pop("labels")
    routes = torch.rand(4, 1, 4) > 0.4
    model.model.routing_phase = RoutingPhase("given", routes=routes)
    outputs = model(**inputs)
    objective = TaughtObjective(imitation_weight=2.0)
    own, taught = objective.loss(outputs, labels, OWN), objective.loss(outputs, labels, TAUGHT)
    margin = outputs.turn_router_logits[..., 0] - outputs.turn_router_logits[..., 1]
    imitation = torch.nn.functional.binary_cross_entropy_with_logits(margin, routes.float())
    assert (taught - own).item() == pytest.approx(2 * imitation.item(), rel=1e-4)
    taught.backward()
    assert all(layer.router.weight.grad.abs().sum() > 0 for layer in model.model.language_model.layers)


# ------------------------------------------------------------------------------------------------------------- trainer

TEACHING = Teaching(num_routes=4, searched_routes=10, searched_examples=6, refit_every=4)


def taught_trainer(model, folder, schedule=None, teacher=True, **settings):
    return trainer_for(
        model,
        folder,
        schedule=schedule or TaughtSchedule(warmup_end=0.25, taught_end=0.75),
        objective=TaughtObjective(),
        teacher=RouteTeacher(0.3, TEACHING) if teacher else None,
        **settings,
    )


def test_a_run_is_random_then_given_then_its_own(tmp_path):
    model = tiny.tiny_model()
    trainer, modes = taught_trainer(model, tmp_path), []
    loss = trainer.objective.loss

    class Watched(TaughtObjective):
        def loss(self, outputs, labels, stage):
            modes.append(model.model.routing_phase.mode)
            return loss(outputs, labels, stage)

    trainer.objective = Watched()
    trainer.train()
    assert modes == ["random"] * 2 + ["given"] * 4 + ["decided"] * 2
    assert 1 <= len(trainer.teacher.routes) <= 4 and trainer.teacher.batches == 4
    logged = ["price" in entry for entry in trainer.state.log_history if "loss" in entry]
    assert logged == [False, True, True, True]


@pytest.mark.parametrize("saved_at", [2, 4, 6])
def test_resuming_before_within_and_after_teaching_gives_the_weights_of_an_unbroken_run(tmp_path, saved_at):
    whole, resumed = tiny.tiny_model(), tiny.tiny_model()
    taught_trainer(whole, tmp_path / "whole", save_strategy="steps", save_steps=2).train()
    again = taught_trainer(resumed, tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{saved_at}"))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_a_schedule_without_its_teacher_is_refused(tmp_path):
    with pytest.raises(ValueError, match="needs a teacher"):
        taught_trainer(tiny.tiny_model(), tmp_path, teacher=False)
    with pytest.raises(ValueError, match="needs a teacher"):
        taught_trainer(tiny.tiny_model(), tmp_path, schedule=StageSchedule())
