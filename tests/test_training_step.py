"""The benchmark of training steps: what is compared trains the same, in the stage named. No time is asserted."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from roe_llava.benchmarks import training_step as bench

SHAPE = bench.Shape((32, 48, 2, 2), (16, 32, 2, 2, 28), 64, (2, 24))


@pytest.fixture(scope="module", params=bench.RECIPES)
def steps(request):
    return {step.name: step for step in bench.steps_of(SHAPE, request.param, torch.device("cpu"))}


def trained(step):
    return {name for name, parameter in step.model.named_parameters() if parameter.requires_grad}


def test_dense_trains_what_roe_trains_but_for_routing(steps):
    routing = {name for name in trained(steps["soft"]) if ".router." in name or "routing_tokens" in name}
    assert trained(steps["dense"]) == trained(steps["soft"]) - routing
    assert len(routing) == 3 and steps["soft"].trained - steps["dense"].trained == 2 * 4 * 32 + 2 * 32


def test_every_step_has_gradients_and_moves_nothing(steps):
    for step in steps.values():
        before = {name: value.clone() for name, value in step.model.state_dict().items()}
        seen, clear = set(), step.optimizer.zero_grad

        def watch(set_to_none, step=step, seen=seen, clear=clear):
            seen.update(name for name, one in step.model.named_parameters() if one.grad is not None)
            clear(set_to_none=set_to_none)

        step.optimizer.zero_grad = watch
        step()
        del step.optimizer.zero_grad
        routing = {name for name in trained(step) if ".router." in name or "routing_tokens" in name}
        adapters = {name for name in trained(step) if ".adapter." in name}
        expected = trained(step) - (routing if step.name in ("random", "decided") else set())
        # A layer that no row of the batch needs has no gradients.
        assert (adapters <= seen <= expected) if step.is_routed and step.phase.leaves_out else (seen == expected), (
            step.name
        )
        assert all(torch.equal(value, before[name]) for name, value in step.model.state_dict().items())
        if step.name in bench.PHASES:
            assert replace(step.model.model.routing_phase, keep_bias=0) == replace(bench.PHASES[step.name], keep_bias=0)
        elif step.is_routed:
            given = step.model.model.routing_phase.routes
            assert torch.equal(given, step.routes()) and not given.all()


def test_the_dense_layer_adds_its_adapter(steps):
    dense, inputs = steps["dense"].model, steps["dense"].inputs
    with torch.no_grad():
        whole = dense(**inputs).logits
        for layer in dense.model.language_model.layers:
            layer.adapter.up_proj.weight.zero_()
        assert not torch.equal(dense(**inputs).logits, whole)


def test_a_result_has_every_system():
    found = bench.measure(SHAPE, "full", rounds=2, seed=0, device=torch.device("cpu"))
    assert tuple(found["systems"]) == bench.SYSTEMS
    own = found["systems"]["soft"]
    assert own["peak_bytes"] > 0 and own["ratio"] > 0 and len(own["runs"]) == 2
    assert own["memory_ratio"] == own["peak_bytes"] / found["systems"]["dense"]["peak_bytes"]
    rows = bench.table({"shapes": {"tiny": {"full": found}}}).splitlines()
    assert len(rows) == 2 + len(bench.SYSTEMS) + 1
    assert 0.2 < found["systems"]["decided"]["skipped"] < 0.8 and found["systems"]["taught"]["skipped"] == 0.5
    shares = (("random", 0.3), ("taught", 0.4), ("decided", 0.3))
    assert found["run"]["ratio"] == pytest.approx(sum(w * found["systems"][name]["ratio"] for name, w in shares))


def test_the_page_says_what_was_measured():
    root = Path(__file__).parent.parent
    result = json.loads((root / "benchmarks" / "results" / "training_step.json").read_text())
    page = (root / "docs" / "training.md").read_text()
    for shape, recipes in result["shapes"].items():
        for recipe, found in recipes.items():
            ratios = [found["systems"][name]["ratio"] for name in ("random", "given", "taught", "decided")]
            cells = " | ".join(f"{ratio:.2f}" for ratio in [*ratios, found["run"]["ratio"]])
            assert f"| {shape} | `{recipe}` | {cells} |" in page
