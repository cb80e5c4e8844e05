"""The training library: stages as functions of progress, named groups, the objective, exact resume."""

import math
from dataclasses import replace

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainingArguments, get_cosine_schedule_with_warmup

from roe_llava import RoutingPhase
from roe_llava.phases_roe import token_loss_per_example
from roe_llava.training.objective import Objective, published_loss, routing_information, skip_share
from roe_llava.training.published import PublishedSchedule, published_recipe
from roe_llava.training.schedule import StageSchedule
from roe_llava.training.trainer import RoeTrainer, group_of, parameter_groups

RATES = {"adapter": 1e-2, "router": 1e-2, "routing_tokens": 1e-2}


# ------------------------------------------------------------------------------------------------------------ schedule


def test_stages_begin_at_their_share_of_the_run():
    schedule = StageSchedule()
    assert [schedule.stage(progress) for progress in (0.0, 0.299, 0.3, 0.499, 0.5, 0.99)] == [0, 0, 1, 1, 2, 2]


def test_phases_follow_from_progress_as_published():
    schedule = StageSchedule(target_skip_ratio=0.3)
    assert schedule.phase(0.1) == RoutingPhase("random", keep_bias=1 - math.sqrt(0.6))
    soft = schedule.phase(0.4001)  # 20 decays after 0.3
    assert soft.mode == "soft"
    assert soft.temperature == pytest.approx(10 * 0.95**20)
    assert soft.keep_bias == pytest.approx((1 - math.sqrt(0.6)) * 0.85**20)
    last = schedule.phase(0.6001)
    assert (last.mode, last.keep_bias) == ("soft", 0.0)
    assert last.temperature == pytest.approx(10 * 0.95**60)


def test_the_last_stage_can_route_hard_above_a_temperature_floor():
    schedule = StageSchedule(last_mode="hard", temperature_floor=0.5, gumbel_end=0.8)
    assert schedule.phase(0.7).mode == "hard" and schedule.phase(0.7).gumbel
    assert not schedule.phase(0.9).gumbel
    assert schedule.phase(0.999).temperature == 0.5


def test_groups_start_to_learn_stage_by_stage():
    schedule = StageSchedule()
    learns = {group: [schedule.trains(group, p) for p in (0.1, 0.4, 0.6)] for group in (*RATES, "base")}
    assert learns == {
        "adapter": [True, True, True],
        "router": [False, True, True],
        "routing_tokens": [False, True, True],
        "base": [False, False, True],
    }


@pytest.mark.parametrize(
    ("field", "value"), [("target_skip_ratio", 0.6), ("warmup_end", 0.7), ("last_mode", "fuzzy"), ("soft_end", 1.5)]
)
def test_a_wrong_schedule_is_refused(field, value):
    with pytest.raises(ValueError, match=str(value)):
        StageSchedule(**{field: value}).phase(0.99)


# -------------------------------------------------------------------------------------------------------------- groups


def test_parameters_are_grouped_by_name():
    assert group_of("model.language_model.layers.3.adapter.up_proj.weight") == "adapter"
    assert group_of("model.language_model.layers.3.router.weight") == "router"
    assert group_of("model.language_model.routing_tokens.weight") == "routing_tokens"
    assert group_of("model.language_model.layers.3.mlp.up_proj.weight") == "base"


def test_groups_left_out_and_the_vision_tower_are_frozen():
    model = tiny.tiny_model()
    parameter_groups(model, {**RATES, "base": 1e-3})
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen and all("vision_tower" in name for name in frozen)
    groups = parameter_groups(model, RATES)
    assert [group["name"] for group in groups] == list(RATES)
    assert not model.lm_head.weight.requires_grad


def test_an_unknown_group_is_named():
    with pytest.raises(ValueError, match="routers"):
        parameter_groups(tiny.tiny_model(), {"routers": 1e-3})


# ----------------------------------------------------------------------------------------------------------- objective


def test_one_route_for_all_carries_no_information():
    mask = torch.ones(6, 1, dtype=torch.bool)
    undecided = torch.full((6, 1, 3), 0.5)
    assert routing_information(undecided, mask) == pytest.approx(0.0, abs=1e-6)
    assert routing_information(torch.ones(6, 1, 3), mask) == pytest.approx(0.0, abs=1e-4)


def test_two_routes_carry_one_bit_per_layer():
    mask = torch.ones(6, 1, dtype=torch.bool)
    skips = torch.tensor([0.0, 1.0] * 3)[:, None, None].expand(6, 1, 3)
    assert routing_information(skips, mask) == pytest.approx(math.log(2), abs=1e-4)


def learner(mode="soft"):
    model = tiny.tiny_model().train()
    model.model.routing_phase = RoutingPhase(mode)
    return model


def test_the_example_budget_is_the_models_own_loss():
    model, inputs = learner(), tiny.batch()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, :-2] = -100
    own = model(**inputs, labels=labels)
    outputs = model(**inputs, routing_segments=segments(model, inputs, labels))
    objective = Objective(model.config.target_skip_ratio)
    torch.testing.assert_close(objective.loss(outputs, labels, stage=2), own.loss)


def segments(model, inputs, labels):
    return model.model.segments_of(inputs["input_ids"], None, inputs["attention_mask"], labels)


def test_the_batch_budget_pulls_both_ways():
    model, inputs = learner("hard"), tiny.batch()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    outputs = model(**inputs)
    share = outputs.turn_skip_weights.mean().item()
    losses = [Objective(target, budget="batch").loss(outputs, labels, stage=2).item() for target in (share, 0.0, 0.5)]
    plain = Objective(0.5, budget="batch").loss(outputs, labels, stage=0).item()
    assert losses[0] == pytest.approx(plain)
    assert losses[1] == pytest.approx(plain + share, abs=1e-5)
    assert losses[2] == pytest.approx(plain + abs(0.5 - share), abs=1e-5)


def test_the_published_budget_is_the_published_loss():
    model, inputs = learner(), tiny.batch()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    outputs = model(**inputs)
    expected = published_loss(outputs.logits, labels, skip_share(outputs), 0.5)
    assert torch.equal(Objective(0.5, budget="published").loss(outputs, labels, stage=0), expected)
    torch.testing.assert_close(expected, Objective(0.5).loss(outputs, labels, stage=0))  # every row has labels


def test_an_unknown_budget_is_refused():
    with pytest.raises(ValueError, match="layer"):
        Objective(0.3, budget="layer")


# -------------------------------------------------------------------------------------------------------------- trainer


def rows():
    """Eight single-question examples of one length, as the collator below stacks them."""
    generator = torch.Generator().manual_seed(0)
    data = []
    for _ in range(8):
        words = torch.randint(3, 100, (7,), generator=generator)
        ids = torch.cat([torch.tensor([1, *[tiny.IMAGE] * 4]), words])
        pixels = torch.randn(3, 28, 28, generator=generator)
        labels = torch.full_like(ids, -100)
        labels[-2:] = ids[-2:]
        data.append(
            {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "pixel_values": pixels}
        )
    return data


def stack(examples):
    batch = {name: torch.stack([example[name] for example in examples]) for name in examples[0]}
    segments = torch.tensor([0] * 5 + [1] * 5 + [-1] * 2).expand(len(examples), -1)
    return {**batch, "routing_segments": segments}


def trainer_for(
    model,
    folder,
    steps=8,
    schedule=None,
    objective=None,
    rates=RATES,
    collate=stack,
    trained_only=False,
    teacher=None,
    **settings,
):
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        learning_rate=1.0,  # of groups without a rate of their own
        logging_steps=2,
        report_to=[],
        remove_unused_columns=False,
        use_cpu=True,
        disable_tqdm=True,
        **{"save_strategy": "no", "per_device_train_batch_size": 2, **settings},
    )
    return RoeTrainer(
        model,
        schedule=schedule or StageSchedule(last_mode="hard"),
        objective=objective or Objective(0.3, budget="batch", information_weight=0.1),
        rates=rates,
        trained_only=trained_only,
        teacher=teacher,
        args=arguments,
        train_dataset=rows(),
        eval_dataset=rows(),
        data_collator=collate,
    )


def test_training_moves_the_routing_parts_and_nothing_else(tmp_path):
    model = tiny.tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer_for(model, tmp_path).train()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if group_of(name) != "base"}


def test_the_phase_follows_the_step(tmp_path):
    trainer, modes = trainer_for(tiny.tiny_model(), tmp_path, steps=10), []
    compute = trainer.compute_loss

    def watched(model, inputs, **kwargs):
        modes.append(model.model.routing_phase.mode)
        return compute(model, inputs, **kwargs)

    trainer.compute_loss = watched
    trainer.train()
    assert modes == ["random"] * 3 + ["soft"] * 2 + ["hard"] * 5


def test_routers_do_not_learn_in_the_warm_up(tmp_path):
    model = tiny.tiny_model()
    before = model.model.language_model.layers[1].router.weight.clone()
    trainer = trainer_for(model, tmp_path, steps=10)
    router, unmoved = model.model.language_model.layers[1].router, []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            unmoved.append(torch.equal(router.weight, before))

    trainer.add_callback(Watch())
    trainer.train()
    assert unmoved == [True] * 3 + [False] * 7


@pytest.mark.parametrize("base", [True, False])
def test_a_layer_that_learns_runs_in_every_step(tmp_path, base):
    model = tiny.tiny_model()
    groups = ("adapter", "router", "routing_tokens", *(["base"] if base else []))
    trainer = trainer_for(model, tmp_path, rates=dict.fromkeys(groups, 1e-3), steps=1, per_device_train_batch_size=1)
    trainer.schedule = trainer.routing_callback.schedule = SkipsAll()
    calls = tiny.Calls(tiny.layers_of(model)[2].mlp)
    trainer.train()
    assert calls.rows == base


class SkipsAll(StageSchedule):
    def phase(self, progress):
        return RoutingPhase("random", keep_bias=-2.0)


def test_logs_hold_the_skip_ratio_of_the_routers(tmp_path):
    trainer = trainer_for(tiny.tiny_model(), tmp_path)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "hard_skip_ratio" in entry]
    assert len(logged) == 4 and all(0 <= entry["hard_skip_ratio"] <= 1 for entry in logged)


def test_resuming_gives_the_weights_of_an_unbroken_run(tmp_path):
    whole, resumed = tiny.tiny_model(), tiny.tiny_model()
    trainer_for(whole, tmp_path / "whole", save_strategy="steps", save_steps=4).train()
    trainer_for(resumed, tmp_path / "again").train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_accumulated_steps_equal_one_large_batch(tmp_path):
    models = []
    for size, accumulate in ((4, 1), (2, 2)):
        model = tiny.tiny_model()
        trainer = trainer_for(
            model,
            tmp_path,
            steps=3,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulate,
            schedule=StageSchedule(warmup_end=0.0, soft_end=1.0),  # no draws, which would depend on the batch
            objective=Objective(0.3),  # a mean over examples
        )
        before = model.model.language_model.routing_tokens.weight.clone()
        trainer.train()
        assert not torch.equal(model.model.language_model.routing_tokens.weight, before)
        models.append(model)
    for name, tensor in models[0].state_dict().items():
        torch.testing.assert_close(tensor, models[1].state_dict()[name], rtol=1e-4, atol=1e-5, msg=name)


def budget_gradients(target, sizes, tmp_path):
    """Router gradients of eight rows, in accumulated micro-batches of a size, under the batch budget alone."""
    found = []
    for size in sizes:
        model = tiny.tiny_model().train()
        model.model.routing_phase = RoutingPhase("soft")
        trainer = trainer_for(model, tmp_path, objective=Objective(target, budget="batch", budget_weight=100.0))
        trainer.state.max_steps, trainer.state.global_step = 1, 0
        trainer.schedule = StageSchedule(warmup_end=0.0, soft_end=0.0)
        for start in range(0, 8, size):
            loss = trainer.compute_loss(model, stack(rows()[start : start + size]))
            (loss / (8 // size)).backward()
        found.append(torch.cat([layer.router.weight.grad.flatten() for layer in tiny.layers_of(model)]))
    return found


def test_the_batch_budget_of_accumulated_steps_is_that_of_a_large_batch_on_one_side_of_the_target(tmp_path):
    """|mean - target| is linear there; the next test shows the other case."""
    for target in (0.0, 0.99):
        one, four = budget_gradients(target, (8, 2), tmp_path)
        torch.testing.assert_close(four, one, rtol=1e-4, atol=1e-4)


def test_the_batch_budget_is_asked_of_every_micro_batch_where_shares_fall_on_both_sides(tmp_path):
    model = tiny.tiny_model().train()
    outputs = [model(**{k: v for k, v in stack(rows()[i : i + 2]).items() if k != "labels"}) for i in range(0, 8, 2)]
    target = float(sum(one.turn_skip_weights.mean().item() for one in outputs) / 4)
    one, four = budget_gradients(target + 1e-6, (8, 2), tmp_path)
    assert (one - four).abs().max() > 1e-3


def test_weight_decay_spares_norms_biases_and_routing_tokens(tmp_path):
    model = tiny.tiny_model()
    trainer = trainer_for(model, tmp_path, rates={**RATES, "base": 1e-3}, weight_decay=0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {group["name"]: group for group in trainer.create_optimizer().param_groups}
    assert {name for name, group in groups.items() if group["weight_decay"] == 0.1} == {"adapter", "router", "base"}
    spared = [names[id(p)] for name in ("routing_tokens_no_decay", "base_no_decay") for p in groups[name]["params"]]
    assert groups["base_no_decay"]["weight_decay"] == 0.0
    assert any("layernorm" in name for name in spared) and any(name.endswith("bias") for name in spared)
    assert all("norm" in name or name.endswith("bias") or "routing_tokens" in name for name in spared)
    assert sum(len(group["params"]) for group in groups.values()) == sum(p.requires_grad for p in model.parameters())


def test_the_learning_rate_is_trainers_scheduler_times_the_stage(tmp_path):
    rates = {"adapter": None, "router": 1e-2, "routing_tokens": None}
    settings = {"lr_scheduler_type": "cosine", "warmup_steps": 2}
    trainer = trainer_for(tiny.tiny_model(), tmp_path, steps=10, rates=rates, **settings)
    plain = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    factor = get_cosine_schedule_with_warmup(plain, 2, 10).lr_lambdas[0]
    optimizer = trainer.create_optimizer()
    trainer.create_scheduler(10)
    for step in range(10):
        found = {group["name"]: group["lr"] for group in optimizer.param_groups}
        expected = {"adapter": 1.0, "router": 1e-2 * (step >= 3), "routing_tokens": 1.0 * (step >= 3)}
        assert found == pytest.approx({name: rate * factor(step) for name, rate in expected.items()})
        optimizer.step()
        trainer.lr_scheduler.step()


@pytest.mark.parametrize(("name", "kind"), [("sgd", "SGD"), ("adafactor", "Adafactor"), ("adamw_torch", "AdamW")])
def test_the_optimizer_is_the_one_asked_for(tmp_path, name, kind):
    trainer = trainer_for(tiny.tiny_model(), tmp_path, optim=name)
    assert type(trainer.create_optimizer()).__name__ == kind
    assert [group["name"] for group in trainer.optimizer.param_groups] == list(RATES)


def test_a_scheduler_that_is_no_function_of_the_step_is_refused(tmp_path):
    settings = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"}
    with pytest.raises(ValueError, match="'reduce_lr_on_plateau' is not a function of the step"):
        trainer_for(tiny.tiny_model(), tmp_path, **settings)


def test_evaluation_routes_hard_and_says_how_much_is_skipped(tmp_path):
    model = tiny.tiny_model()
    trainer = trainer_for(model, tmp_path)
    metrics = trainer.evaluate(rows())
    batch = stack(rows())
    labels = batch.pop("labels")
    with torch.no_grad():
        outputs = model.eval()(**batch)
    losses = token_loss_per_example(outputs.logits, labels)
    assert metrics["eval_loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    assert metrics["eval_hard_skip_ratio"] == pytest.approx((~outputs.routes).float().mean().item(), abs=1e-6)
    assert metrics["eval_skip/layer_01"] == pytest.approx((~outputs.routes[:, 1]).float().mean().item(), abs=1e-6)


def test_the_parts_of_the_loss_add_up_and_layers_to_the_ratio(tmp_path):
    trainer = trainer_for(tiny.tiny_model(), tmp_path, steps=10)
    trainer.train()
    for entry in [entry for entry in trainer.state.log_history if "token_loss" in entry]:
        assert entry["token_loss"] + entry["routing_loss"] == pytest.approx(entry["loss"], abs=1e-3)
        shares = [value for name, value in entry.items() if name.startswith("skip/")]
        assert len(shares) == tiny.NUM_LAYERS
        assert sum(shares) / len(shares) == pytest.approx(entry["hard_skip_ratio"], abs=1e-4)
        assert entry["soft_hard_gap"] == pytest.approx(entry["skip_weight"] - entry["hard_skip_ratio"], abs=1e-4)


def test_checkpoints_of_what_learns_hold_no_base_and_resume_exactly(tmp_path):
    whole, resumed = tiny.tiny_model(), tiny.tiny_model()
    settings = {"save_strategy": "steps", "save_steps": 4, "trained_only": True}
    trainer_for(whole, tmp_path / "whole", **settings).train()
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    assert set(load_file(checkpoint / "trained.safetensors")) == {
        n for n in whole.state_dict() if group_of(n) != "base"
    }
    trainer_for(resumed, tmp_path / "again", trained_only=True).train(resume_from_checkpoint=str(checkpoint))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    wider = trainer_for(tiny.tiny_model(), tmp_path / "wider", trained_only=True, rates={**RATES, "base": 1e-3})
    with pytest.raises(ValueError, match=r"differ in what learns: .*lm_head.* other options"):
        wider._load_from_checkpoint(str(checkpoint))


def test_the_best_checkpoint_comes_back_whole(tmp_path):
    model = tiny.tiny_model()
    trainer = trainer_for(model, tmp_path, save_strategy="steps", save_steps=4)
    trainer.train()
    last = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer.state.best_model_checkpoint = str(tmp_path / "checkpoint-4")
    trainer._load_best_model()
    saved = type(model).from_pretrained(tmp_path / "checkpoint-4").state_dict()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())
    assert any(not torch.equal(tensor, last[name]) for name, tensor in saved.items())


# ----------------------------------------------------------------------------------------------------------- published


def test_the_published_recipe_runs_every_micro_batch_as_published(tmp_path):
    """200 micro-batches of accumulation 4: temperature and bias change within an optimizer step."""
    model, recipe = tiny.tiny_model(), published_recipe(200, accumulation=4)
    recipe.prepare(model)
    assert (model.config.routing_positions, model.config.routing_question) == ("spread", "all_text")
    trainer = trainer_for(
        model,
        tmp_path,
        steps=50,
        schedule=recipe.schedule,
        objective=recipe.objective,
        rates=recipe.rates,
        collate=recipe.collator(stack, model.config),
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
    )
    phases, rates, segments, compute = [], [], [], trainer.compute_loss

    def watched(model, inputs, **kwargs):
        phases.append(model.model.routing_phase)
        rates.append({group["name"]: group["lr"] for group in trainer.optimizer.param_groups})
        segments.append(inputs["routing_segments"][0].tolist())
        return compute(model, inputs, **kwargs)

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 28  # all three stages were seen

    trainer.add_callback(Stop())
    trainer.compute_loss = watched
    trainer.train()
    published = [recipe.schedule.phase_at(micro_batch) for micro_batch in range(112)]
    assert phases == [replace(phase, at_least_one=True) for phase in published]
    assert len({phase.temperature for phase in phases[60:64]}) == 4
    for micro_batch, ours in enumerate(rates):
        published = recipe.schedule.rates_at(micro_batch)
        expected = [published["adapter"]] * 3 + [published["base"]]
        assert list(ours.values()) == pytest.approx(expected, rel=1e-12), micro_batch
    assert segments[0] == [0] * 6 + [1] * 4 + [-1] * 2  # the token behind the image counts as image


def test_a_published_run_needs_whole_optimizer_steps():
    with pytest.raises(ValueError, match="multiple of accumulation, got 1001 and 4"):
        PublishedSchedule(1001, accumulation=4)
