"""Agreement with numbers recorded from the published training (`golden/roe_reference`), through `published_recipe`.

Where the published code is wrong the last part shows both: what it does, and what our defaults do instead.
`docs/published_training.md` lists the differences.
"""

import copy
import json
import re
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from golden_helpers import (
    FOLDER,
    IMAGE,
    NUM_LAYERS,
    PATCHES,
    gradients_by_published_name,
    published_router,
    reference_model,
    spliced,
    spliced_labels,
    unpacked,
)

from roe_llava import RoutingPhase
from roe_llava.phases_roe import roe_loss, sparsity_penalty
from roe_llava.routing_roe import Routing, default_segments, turns_of_tokens
from roe_llava.training.objective import Objective, published_loss, published_token_loss, skip_share
from roe_llava.training.published import (
    PublishedSchedule,
    published_masks,
    published_recipe,
    published_segments,
)
from roe_llava.training.schedule import StageSchedule

RECORDED, MASKS, SCHEDULE = (unpacked(f"{name}.safetensors.xz") for name in ("training", "masks", "schedule"))
ABOUT = json.loads((FOLDER / "training.json").read_text())
# Where a run equals another one bit for bit, large results were recorded once.
SETTINGS = {name: about for name, about in ABOUT.items() if name[0] in "AB"}
CASES = sorted({name.split("/")[0] for name in MASKS})
STATES = {"rtol": 0, "atol": 5e-5}
CLOSE = {"rtol": 0, "atol": 1e-5}


# --------------------------------------------------------------------------------------------------- recorded runs


def padded(rows, value):
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def recorded_batch(batch):
    """A recorded batch as a collator of ours would make it, without routing segments."""
    found = {key: RECORDED[f"{batch}/{key}"] for key in ("input_ids", "labels", "attention_mask", "images")}
    real = [mask.bool() for mask in found["attention_mask"]]
    given = [ids[kept].tolist() for ids, kept in zip(found["input_ids"], real, strict=True)]
    answers = [labels[kept].tolist() for labels, kept in zip(found["labels"], real, strict=True)]
    rows = [spliced(ids) for ids in given]
    return {
        "input_ids": padded(rows, 0),
        "attention_mask": padded([[1] * len(row) for row in rows], 0),
        "labels": padded([spliced_labels(*pair) for pair in zip(given, answers, strict=True)], -100),
        "pixel_values": torch.stack([image for image, row in zip(found["images"], rows, strict=True) if IMAGE in row]),
    }


@cache
def reference():
    """The recorded checkpoint; tests take copies."""
    return reference_model()


def trainee(name):
    """The recorded model in training mode, prepared by the published recipe, in the recorded state of the schedule."""
    settings, recipe = ABOUT[name], published_recipe(1000, target_skip_ratio=ABOUT[name]["skip_ratio"])
    model = copy.deepcopy(reference()).train()
    recipe.prepare(model)
    draws = RECORDED.get(f"{name}/uniforms")
    model.model.routing_phase = RoutingPhase(
        "random" if settings["stage"] == 0 else "soft",
        temperature=settings["temp"],
        keep_bias=0.0 if settings["stage"] == 2 else settings["bias"],
        draws=None if draws is None else lambda layer, like: draws[layer],
    )
    if settings["keepskew"]:
        skewed = {key.removeprefix("keepskew/"): RECORDED[key] for key in RECORDED if key.startswith("keepskew/")}
        assert len(skewed) == NUM_LAYERS
        for index, layer in enumerate(model.model.language_model.layers):
            layer.router.weight.data.copy_(skewed[published_router(index)])
    return model, recipe


@dataclass
class Run:
    """What a forward and backward pass gave: `hidden` (L + 1, B, R + S, D), routing tokens first, as recorded."""

    outputs: object
    routing: Routing
    hidden: torch.Tensor
    batch: dict
    loss: torch.Tensor
    gradients: dict


@cache
def run(name):
    """A recorded configuration, run with the published recipe."""
    model, recipe = trainee(name)
    batch = recipe.collator(recorded_batch, model.config)(name.split("/")[0])
    labels, caught = batch["labels"], []

    def keep(layer, args, kwargs, output):
        caught.append((args[0].detach(), output.detach(), kwargs["routing"]))

    for layer in model.model.language_model.layers:
        layer.register_forward_hook(keep, with_kwargs=True)
    outputs = model(**{key: value for key, value in batch.items() if key != "labels"})
    loss = recipe.objective.loss(outputs, labels, ABOUT[name]["stage"])
    loss.backward()
    routing = caught[0][2]
    hidden = [caught[0][0], *(after for _, after, _ in caught)]
    hidden = [torch.cat([routed.detach(), own], 1) for routed, own in zip(routing.states, hidden, strict=True)]
    return Run(outputs, routing, torch.stack(hidden), batch, loss.detach(), gradients_by_published_name(model))


def recorded(name, key):
    """A recorded result, from the configuration that holds it."""
    full = f"{name}/{key}"
    return RECORDED[full if full in RECORDED else f"{name[0]}/{ABOUT[name]['same_as']}/{key}"]


def real_tokens(name):
    """(B, R + S) bool: routing tokens of turns that exist, and tokens that are no padding."""
    batch = name.split("/")[0]
    return RECORDED[f"{batch}/weight_mask"].bool().any(1) & torch.cat(
        [turns(batch, with_image=True), recorded_batch(batch)["attention_mask"].bool()], dim=1
    )


def turns(batch, with_image=False):
    """(B, T) the turns a conversation has, by the share the published routers are given."""
    shares = RECORDED[f"{batch}/question_mask_norm"][..., 0] > 0
    return shares if with_image else shares[:, 1:]


@pytest.mark.parametrize("name", SETTINGS)
def test_mixed_hidden_states_of_every_layer_agree(name):
    real = real_tokens(name)
    ours, theirs = run(name).hidden, recorded(name, "hidden")
    assert ours.shape == theirs.shape and len(ours) == NUM_LAYERS + 1
    torch.testing.assert_close(ours[:, real], theirs[:, real], **STATES)


@pytest.mark.parametrize("name", SETTINGS)
def test_logits_agree(name):
    batch = name.split("/")[0]
    num_tokens = RECORDED[f"{batch}/question_mask"].shape[1]
    real = recorded_batch(batch)["attention_mask"].bool()
    theirs = recorded(name, "logits")[:, num_tokens:]
    torch.testing.assert_close(run(name).outputs.logits[real], theirs[real], **STATES)


@pytest.mark.parametrize("name", SETTINGS)
def test_router_logits_and_path_weights_agree(name):
    has = turns(name.split("/")[0])
    assert torch.equal(run(name).outputs.turn_mask, has)
    raw = recorded(name, "router_logits_raw").permute(1, 2, 0, 3)
    torch.testing.assert_close(run(name).outputs.turn_router_logits[has], raw[has], **CLOSE)
    for layer, weights in enumerate(run(name).routing.weights):
        theirs = recorded(name, "router_weights")[layer]
        torch.testing.assert_close(weights[:, 0], theirs[:, 0], **CLOSE)
        torch.testing.assert_close(weights[:, 1:][has], theirs[:, 1:][has], **CLOSE)


@pytest.mark.parametrize("name", SETTINGS)
def test_skip_task_and_total_loss_agree(name):
    share = skip_share(run(name).outputs)
    torch.testing.assert_close(share, recorded(name, "skip_per_layer").mean(0), **CLOSE)
    penalty = sparsity_penalty(share, SETTINGS[name]["skip_ratio"])
    torch.testing.assert_close(penalty, recorded(name, "skip_loss"), **CLOSE)
    task = published_token_loss(run(name).outputs.logits, run(name).batch["labels"])
    torch.testing.assert_close(task, recorded(name, "task_loss"), **CLOSE)
    torch.testing.assert_close(run(name).loss, recorded(name, "total_loss"), **CLOSE)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_recorded_gradient_agrees(name):
    source = name if "same_as" not in SETTINGS[name] else f"{name[0]}/{SETTINGS[name]['same_as']}"
    prefix = f"{source}/grad/"
    theirs = {key.removeprefix(prefix): value for key, value in RECORDED.items() if key.startswith(prefix)}
    assert len(theirs) + len(SETTINGS[name]["grads_none"]) == 3 * NUM_LAYERS + 5
    for key, gradient in theirs.items():
        ours = run(name).gradients[key]
        ours = torch.zeros_like(gradient) if ours is None else ours
        torch.testing.assert_close(ours, gradient, **CLOSE, msg=lambda text, key=key: f"{key}: {text}")
    for key in SETTINGS[name]["grads_none"]:
        assert run(name).gradients[key] is None, key


def test_all_three_stages_and_both_batches_were_compared():
    compared = {(name[0], about["stage"]) for name, about in SETTINGS.items()}
    assert compared == {(batch, stage) for batch in "AB" for stage in range(3)}
    assert len([name for name, about in SETTINGS.items() if "same_as" not in about]) == 14


# ----------------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("batch", "ABC")
def test_masks_of_a_batch_are_the_recorded_ones(batch):
    found = recorded_batch(batch)
    masks = published_masks(found["input_ids"], found["labels"], IMAGE, PATCHES, found["attention_mask"])
    for key, ours in (
        ("question_mask", masks.question),
        ("weight_mask", masks.weight),
        ("labels_padded", masks.labels),
    ):
        assert torch.equal(ours.long(), RECORDED[f"{batch}/{key}"]), key
    assert torch.equal(masks.turn_share, RECORDED[f"{batch}/question_mask_norm"])


def mask_case(case):
    """Token ids and labels of a recorded case."""
    ids, labels = (MASKS[f"{case}/{key}"][0].tolist() for key in ("input_ids", "labels"))
    return torch.tensor([spliced(ids)]), torch.tensor([spliced_labels(ids, labels)])


@pytest.mark.parametrize("case", CASES)
def test_masks_of_a_case_are_the_recorded_ones(case):
    ids, labels = mask_case(case)
    training, generation = (published_masks(ids, given, IMAGE, PATCHES) for given in (labels, None))
    assert torch.equal(training.labels, MASKS[f"{case}/train/labels_padded"])
    for part, masks in (("train", training), ("eval", generation)):
        assert torch.equal(masks.question.long(), MASKS[f"{case}/{part}/question_mask"]), part
        assert torch.equal(masks.weight.long(), MASKS[f"{case}/{part}/weight_mask"]), part


def test_there_are_24_cases():
    assert len(CASES) == 24


@pytest.mark.parametrize("batch", "AB")
def test_published_segments_move_every_token_as_the_weight_mask_does(batch):
    found = recorded_batch(batch)
    segments = published_segments(found["input_ids"], found["labels"], IMAGE, PATCHES, found["attention_mask"])
    num_tokens = RECORDED[f"{batch}/weight_mask"].shape[1]
    weights, real = RECORDED[f"{batch}/weight_mask"][..., num_tokens:], found["attention_mask"].bool()
    assert torch.equal(turns_of_tokens(segments)[real], weights.argmax(1)[real])


def test_padding_on_the_left_gives_the_same_masks():
    """The published code knows padding on the right only."""
    found, shift = recorded_batch("A"), 5
    left = {key: found[key].clone() for key in ("input_ids", "labels", "attention_mask")}
    for key, fill in (("input_ids", 0), ("labels", -100), ("attention_mask", 0)):
        left[key] = torch.nn.functional.pad(found[key], (shift, 0), value=fill)
    ours = published_masks(left["input_ids"], left["labels"], IMAGE, PATCHES, left["attention_mask"])
    num_tokens = ours.question.shape[1]
    assert not ours.question[..., num_tokens : num_tokens + shift].any()
    expected = RECORDED["A/question_mask"][..., num_tokens:].bool()
    assert torch.equal(ours.question[..., num_tokens + shift :], expected)


# -------------------------------------------------------------------------------------------------------- schedule


@pytest.mark.parametrize(("name", "micro_batches", "accumulation"), [("acc1", 1000, 1), ("acc4", 800, 4)])
def test_the_schedule_is_the_recorded_one_to_the_bit(name, micro_batches, accumulation):
    schedule = PublishedSchedule(micro_batches, accumulation)
    states = [schedule.state_at(micro_batch) for micro_batch in range(micro_batches)]
    for column, key in enumerate(("stage", "temp", "bias")):
        recorded_state = SCHEDULE[f"{name}/{key}"]
        assert torch.equal(torch.tensor([s[column] for s in states], dtype=recorded_state.dtype), recorded_state), key
    rates = [list(schedule.rates_at(micro_batch).values()) for micro_batch in range(micro_batches)]
    assert torch.equal(torch.tensor(rates, dtype=torch.float64), SCHEDULE[f"{name}/lr"])


@pytest.mark.parametrize("micro_batches", [1000, 800])
def test_the_schedule_as_a_function_of_progress_is_the_same(micro_batches):
    schedule = PublishedSchedule(micro_batches, 4)
    for micro_batch in range(micro_batches):
        stage, temperature, bias = schedule.state_at(micro_batch)
        progress = (micro_batch // 4 + (micro_batch % 4) / 4) / (micro_batches // 4)
        mode = "random" if stage == 0 else "soft"
        assert schedule.phase(progress) == RoutingPhase(mode, temperature, bias), micro_batch
        assert schedule.stage(progress) == stage


def test_our_schedule_decays_at_the_same_points():
    """In the recorded runs, 0.5 % of the run is a whole number of micro-batches; the published one decays at once."""
    ours, theirs = StageSchedule(), PublishedSchedule(1000)
    for micro_batch in range(1000):
        progress = (micro_batch + 0.5) / 1000
        assert ours.stage(progress) == theirs.stage_at(micro_batch)
        if ours.stage(progress) > 0:
            published = theirs.phase_at(micro_batch)
            assert published.temperature == pytest.approx(ours.phase(progress).temperature * 0.95)
            assert published.keep_bias == pytest.approx(ours.phase(progress).keep_bias * 0.85, abs=1e-5)


# --------------------------------------------------------------------- where the published code is wrong: both sides


def row_losses(model, batch):
    """Outputs and (B,) token losses of a batch."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        outputs = model(**inputs)
    return outputs, published_token_loss(outputs.logits, batch["labels"])


def test_a_row_without_labels_is_nan_in_the_published_loss_and_left_out_of_ours():
    model, recipe = trainee("A/s1_t1_b0.2254")
    batch = recipe.collator(recorded_batch, model.config)("A")
    batch["labels"][0] = -100
    outputs = model(**{key: value for key, value in batch.items() if key != "labels"})
    assert recipe.objective.loss(outputs, batch["labels"], stage=1).isnan()
    ours = Objective(0.3).loss(outputs, batch["labels"], stage=1)
    rest = published_loss(outputs.logits[1:], batch["labels"][1:], skip_share(outputs)[1:], 0.3)
    torch.testing.assert_close(ours, rest)
    ours.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


def test_a_token_predicted_with_certainty_counts_in_our_mean_and_not_in_the_published_one():
    labels, logits = torch.tensor([[-100, 1, 0]]), torch.zeros(1, 3, 2)
    logits[0, 1, 0] = 1000.0  # the second target, for certain: its loss is exactly 0
    share = torch.ones(1)  # no penalty
    assert published_loss(logits, labels, share, 0.3).item() == pytest.approx(torch.log(torch.tensor(2.0)).item())
    assert roe_loss(logits, labels, share, 0.3).item() == pytest.approx(torch.log(torch.tensor(2.0)).item() / 2)


@pytest.mark.parametrize(("positions", "depends"), [("spread", True), ("preceding", False)])
def test_a_row_depends_on_the_batch_with_published_positions_and_not_with_ours(positions, depends):
    model, recipe = trainee("A/s1_t1_b0.2254")
    model.config.routing_positions = positions
    batch = recipe.collator(recorded_batch, model.config)("A")
    together, losses = row_losses(model, batch)
    # Rows 0 and 1 without row 2, which has the most turns.
    without = {key: value[:2] for key, value in batch.items()}
    alone, fewer = row_losses(model, without)
    logits = together.turn_router_logits[:2, :2][alone.turn_mask], alone.turn_router_logits[alone.turn_mask]
    if depends:
        assert (losses[:2] - fewer).abs().max() > 1e-4 and (logits[0] - logits[1]).abs().max() > 1e-3
    else:
        torch.testing.assert_close(fewer, losses[:2], **CLOSE)
        torch.testing.assert_close(logits[0], logits[1], **STATES)


def test_published_segments_read_the_token_behind_the_image_as_image_and_ours_as_question():
    ids, labels = mask_case("case07")
    ours = default_segments(ids == IMAGE, torch.ones_like(ids).bool(), labels)
    theirs = published_segments(ids, labels, IMAGE, PATCHES)
    image_end = int((ids == IMAGE).nonzero()[-1, 1])
    assert torch.equal(ours == 0, torch.arange(ids.shape[1])[None] <= image_end)
    assert torch.equal(theirs == 0, torch.arange(ids.shape[1])[None] <= image_end + 1)
    # At generation the published masks have it as ours.
    generation = published_segments(ids, None, IMAGE, PATCHES)
    assert torch.equal(generation == 0, ours == 0)


def test_an_answer_at_the_image_part_gives_odd_published_parts_and_whole_turns_with_ours():
    """An answer that begins right behind the image: published, its first token is read and counted twice."""
    ids, labels = mask_case("case15")
    labelled = labels[0] != -100
    first, last = int(labelled.nonzero()[0]), 13
    masks = published_masks(ids, labels, IMAGE, PATCHES)
    num_tokens = masks.question.shape[1]
    read, moved = masks.question[0, :, num_tokens:], masks.weight[0, :, num_tokens:]
    assert read[1].nonzero().flatten().tolist() == [first]  # turn 1 reads the start of its own answer
    assert moved[0, first] and moved[1, first + 1 : last + 1].all() and not moved[1, first]
    ours = default_segments(ids == IMAGE, torch.ones_like(ids).bool(), labels)[0]
    assert not (ours == 1).any()  # there is no question to read
    assert (ours[labelled] == -1).all()
    assert (ours[last + 1 : last + 6] == 2).all()


def test_trailing_ignored_tokens_are_a_turn_of_the_published_masks_and_of_no_turn_with_ours():
    ids, labels = mask_case("case06")
    theirs = published_segments(ids, labels, IMAGE, PATCHES)[0]
    ours = default_segments(ids == IMAGE, torch.ones_like(ids).bool(), labels)[0]
    assert theirs[-3:].tolist() == [3, 3, 3] and theirs.max() == 3
    assert ours[-3:].tolist() == [-1, -1, -1] and ours.max() == 2


def test_odd_rows_are_named_and_all_others_agree(caplog):
    """Batch C: row 0 answers across the 34 tokens of a text-only row's context, rows 1 and 2 can be reproduced."""
    name = "C/s1_t1_b0.2254"
    with caplog.at_level("WARNING", logger="roe_llava.training.published"):
        ours = run(name)
    assert "rows [0]: 10 tokens move with another turn" in caplog.text
    real, theirs = real_tokens(name), recorded(name, "hidden")
    for row, differs in ((0, True), (1, False), (2, False)):
        mine, published = (states[:, row][:, real[row]] for states in (ours.hidden, theirs))
        if differs:
            assert (mine[0] - published[0]).abs().max() < 5e-5 and (mine[-1] - published[-1]).abs().max() > 1e-2
        else:
            torch.testing.assert_close(mine, published, **STATES)
    # With our segments, row 0 has its three turns, each moved by its own question.
    found = recorded_batch("C")
    segments = default_segments(found["input_ids"] == IMAGE, found["attention_mask"].bool(), found["labels"])[0]
    labelled = found["labels"][0] != -100
    assert segments[~labelled].unique().tolist() == [1, 2, 3] and (segments[labelled] == -1).all()


def test_a_text_only_row_counts_34_tokens_as_context_when_published_and_none_by_default():
    ids = torch.arange(3, 43)[None]
    assert (published_segments(ids, None, IMAGE, PATCHES) == 0).sum() == 34
    assert not (default_segments(None, torch.ones_like(ids).bool()) == 0).any()


def test_a_second_image_is_question_when_published_and_context_by_default():
    ids = torch.tensor([spliced([1, -200, 5, -200, 6, 7])])
    theirs = published_segments(ids, None, IMAGE, PATCHES)
    ours = default_segments(ids == IMAGE, torch.ones_like(ids).bool())
    assert theirs[0].tolist() == [0] * 5 + [1] * 7
    assert ours[0].tolist() == [0] * 10 + [1] * 2


def test_a_short_run_is_refused_by_the_published_schedule_and_runs_with_ours():
    assert int(0.005 * 199) == 0  # the published interval, which it divides by
    with pytest.raises(ValueError, match="needs 200 micro-batches or more, got 199"):
        PublishedSchedule(199)
    assert [StageSchedule().stage(step / 10) for step in range(10)] == [0] * 3 + [1] * 2 + [2] * 5


def test_a_resumed_run_starts_over_with_the_published_counters_and_goes_on_with_ours():
    whole, resumed = PublishedSchedule(1000), PublishedSchedule(1000, resumed_at=600)
    assert whole.state_at(600)[0] == 2 and resumed.state_at(600) == whole.state_at(0)
    assert resumed.rates_at(600)["adapter"] == whole.rates_at(600)["adapter"] > 0 == resumed.rates_at(600)["base"]
    assert resumed.state_at(599) == whole.state_at(599)
    ours = StageSchedule()
    assert ours.phase(600 / 1000).mode == "soft" and ours.stage(600 / 1000) == 2


@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_a_ratio_outside_the_published_table_is_refused_there_and_has_a_bias_with_ours(ratio):
    with pytest.raises(ValueError, match=f"knows target_skip_ratio .* got {ratio}"):
        PublishedSchedule(1000, target_skip_ratio=ratio)
    bias = StageSchedule(target_skip_ratio=ratio).phase(0.0).keep_bias
    assert (1 - bias) ** 2 / 2 == pytest.approx(ratio)


def test_projector_biases_learn_one_stage_early_when_published_and_with_the_base_in_ours():
    rates = PublishedSchedule(1000).rates_at(400)
    assert rates["projector_biases"] > 0 == rates["projector"] == rates["base"]
    assert not StageSchedule().trains("base", 0.4)


def test_every_test_that_the_table_of_differences_names_exists():
    folder = FOLDER.parent.parent
    named = set(re.findall(r"`(test_\w+)`", (folder.parent / "docs" / "published_training.md").read_text()))
    exist = {name for path in folder.glob("test_*.py") for name in re.findall(r"def (test_\w+)", path.read_text())}
    assert len(named) >= 15 and named <= exist, named - exist
