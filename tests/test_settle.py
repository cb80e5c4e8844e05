"""The bias that a model carries: decisions with it, settling the skip ratio at the end of training, how it travels."""

import copy
import json
import math

import pytest
import tiny
import torch
from convert_helpers import change_json, make_base
from test_calibrate import random_batches, skipped_by

from roe_llava import RoeLlavaConfig, RoeLlavaForConditionalGeneration
from roe_llava.calibration_roe import router_fingerprint
from roe_llava.convert.adapter_file import save_adapter
from roe_llava.convert.export_reference import published_config
from roe_llava.convert.graft import graft
from roe_llava.phases_roe import RoutingPhase
from roe_llava.training.settle import one_question_each, settle


@pytest.fixture
def model():
    """Random routers, which decide in many ways, without a bias."""
    return tiny.tiny_model().eval()


def with_segments(batches):
    """Prompts as a collator has them: one question, read by the routers, and a label at the end."""
    for batch in batches:
        segments = torch.ones_like(batch["input_ids"])
        yield batch | {"routing_segments": segments, "labels": batch["input_ids"].clone()}


# ---------------------------------------- decisions


def test_the_models_own_bias_and_the_callers_add_up(model):
    batch = random_batches(0, number=1)[0]
    both = model(**batch, route_bias=[0.1, 0.25, -0.3, 0.5])
    model.config.route_bias = [0.0, 0.25, -0.3, 0.0]
    found = model(**batch, route_bias=[0.1, 0.0, 0.0, 0.5])
    assert torch.equal(found.routes, both.routes) and not found.routes.all()
    assert torch.equal(found.logits, both.logits) and torch.equal(found.router_logits, both.router_logits)
    assert not torch.equal(model(**batch).routes, found.routes)
    assert model(**batch, route_bias=math.inf).routes.all()


def test_generate_follows_the_models_own_bias(model):
    batch = random_batches(0, number=1, rows=32)[0]
    assert 0 < skipped_by(model, [batch]).mean() < 1
    model.config.route_bias = [1e6] * 4
    assert skipped_by(model, [batch]).max() == 0
    model.config.route_bias = [-1e6] * 4
    assert skipped_by(model, [batch]).min() == 1


def test_training_decides_with_it_too(model):
    batch = next(with_segments(random_batches(0, number=1, rows=16)))
    for bias in (None, [0.2, -0.2, 0.1, 0.3]):
        model.eval().config.route_bias = bias
        expected = model(**{name: value for name, value in batch.items() if name != "labels"}).routes
        model.train().model.routing_phase = RoutingPhase("decided")
        decided = model(**batch)
        assert torch.equal(decided.turn_skip_weights[:, 0] == 0, expected)
        raw = decided.turn_router_logits[:, 0]
        assert torch.equal(raw[..., 0] > raw[..., 1], expected) == (bias is None)  # what is learned is without it


@pytest.mark.parametrize("wrong", [[0.0], "0", [0.0, 0.0, 0.0, math.inf], [0.0, 0.0, 0.0, "1"], 0.5])
def test_a_bias_that_cannot_be_is_refused_by_name(wrong):
    with pytest.raises(ValueError, match="route_bias must be 4 finite numbers, one per decoder layer"):
        tiny.tiny_config(route_bias=wrong)


def test_a_bias_set_later_is_checked_when_it_is_used(model):
    model.config.route_bias = [0.0]
    with pytest.raises(ValueError, match=r"config\.route_bias must be 4 numbers, one per decoder layer, got 1"):
        model(**random_batches(0, number=1)[0])


def test_a_baked_configuration_has_none():
    with pytest.raises(ValueError, match="route_bias beside skipped_layers"):
        tiny.tiny_config(skipped_layers=[1], route_bias=[0.0] * 4)


# ---------------------------------------- settling


@pytest.mark.parametrize("target", [0.3, 0.45, 0.6])
def test_a_settled_model_skips_its_target_on_other_questions(model, target):
    """Both sets of a thousand prompts have a standard error of about 0.6 points."""
    found = settle(model, list(with_segments(random_batches(0))), target, quiet=True)
    assert found.questions == 1024 and abs(found.skip_ratio - target) < 0.006
    assert abs(found.held_out - target) < 0.04
    assert abs(skipped_by(model, random_batches(1)).mean() - target) < 0.02
    assert skipped_by(model, random_batches(1), skip_ratio=0.0).max() == 0


def test_settling_again_starts_from_the_routers(model):
    batches = list(with_segments(random_batches(0)))
    settle(model, batches, 0.4, quiet=True)
    first = model.config.route_bias
    model.config.route_bias = [3.0] * 4
    settle(model, batches, 0.4, quiet=True)
    assert model.config.route_bias == first


def test_what_no_bias_gives_is_said_and_leaves_none(caplog):
    model = tiny.tiny_model(tiny.tiny_config(routed_layers=[1, 3])).eval()
    model.config.route_bias = [0.1] * 4
    assert settle(model, list(with_segments(random_batches(0))), 0.7, quiet=True) is None
    assert "stays as the routers have it" in caplog.text and "cannot be had" in caplog.text
    assert model.config.route_bias is None


def test_few_questions_are_said(model, caplog):
    assert settle(model, list(with_segments(random_batches(0, number=1, rows=60))), 0.3, quiet=True) is not None
    assert "settled on 60 questions: others may differ" in caplog.text


def test_every_row_is_asked_one_of_its_turns():
    segments = torch.tensor([[0, 1, -1, 2, -1, 3, -1], [0, 1, 1, -1, -1, -1, -1]]).repeat(50, 1)
    asked = one_question_each({"routing_segments": segments, "labels": segments, "input_ids": segments}, seed=3)
    assert asked.keys() == {"routing_segments", "input_ids"}
    last = asked["routing_segments"].amax(dim=1)
    assert set(last[::2].tolist()) == {1, 2, 3} and set(last[1::2].tolist()) == {1}
    kept = asked["routing_segments"] == segments
    assert torch.equal(kept, segments <= last[:, None])


def test_a_turn_decides_as_if_nothing_came_after_it(model):
    """Cut behind its question, or with the later turns in place but not read: the same route and router logits."""
    ids = torch.randint(3, tiny.IMAGE, (16, 9), generator=torch.Generator().manual_seed(0))
    segments = torch.tensor([0, 0, 1, 1, -1, 2, 2, -1, -1]).expand(16, -1)
    whole = model(input_ids=ids, routing_segments=segments.masked_fill(segments > 1, -1))
    cut = model(input_ids=ids[:, :4], routing_segments=segments[:, :4])
    assert torch.equal(whole.routes, cut.routes)
    torch.testing.assert_close(whole.router_logits, cut.router_logits, atol=1e-5, rtol=1e-5)


# ---------------------------------------- how it travels


def test_it_travels_with_checkpoint_adapter_and_graft(tmp_path):
    base = make_base(tmp_path / "base")
    model = RoeLlavaForConditionalGeneration.from_pretrained(base, adapter_size=8, dtype=torch.float32)
    layers = model.config.text_config.num_hidden_layers
    bias = [0.0, *(0.25 * layer for layer in range(1, layers))]
    model.config.route_bias = bias
    save_adapter(model, model.config, tmp_path / "adapter", base=base)
    assert json.loads((tmp_path / "adapter" / "roe_adapter.json").read_text())["route_bias"] == bias
    graft(base, tmp_path / "adapter", tmp_path / "grafted")
    loaded = [
        RoeLlavaForConditionalGeneration.from_pretrained(tmp_path / "grafted"),
        RoeLlavaForConditionalGeneration.from_base(base, tmp_path / "adapter"),
    ]
    assert [one.config.route_bias for one in loaded] == [bias, bias]
    loaded[0].save_pretrained(tmp_path / "again")
    assert RoeLlavaConfig.from_pretrained(tmp_path / "again").route_bias == bias
    change_json(tmp_path / "adapter" / "roe_adapter.json", route_bias=[0.5])
    with pytest.raises(ValueError, match=r"roe_adapter.json has an entry that cannot be: route_bias must be"):
        RoeLlavaForConditionalGeneration.from_base(base, tmp_path / "adapter")


def test_an_older_adapter_file_has_none(tmp_path):
    model = tiny.tiny_model()
    model.config.route_bias = [0.5] * 4
    path = save_adapter(model, model.config, tmp_path / "adapter") / "roe_adapter.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "route_bias"}))
    model.load_routing(tmp_path / "adapter", check_base=False)
    assert model.config.route_bias is None


def test_a_table_holds_for_the_bias_it_was_measured_with(model):
    before = router_fingerprint(model)
    model.config.route_bias = [0.0] * 4
    assert router_fingerprint(model) != before
    model.config.route_bias = None
    assert router_fingerprint(model) == before


def test_the_published_form_leaves_it_out_and_says_so():
    config = copy.deepcopy(tiny.tiny_config(route_bias=[0.5] * 4)).to_dict()
    notes = published_config(config, None, False, "beside", 0)[1]
    assert "skips another share" in notes["bias"]
    assert "bias" not in published_config(config | {"route_bias": None}, None, False, "beside", 0)[1]
