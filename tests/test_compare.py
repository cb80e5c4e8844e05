"""The side by side in small: every system trains, what is counted is right, the page holds the JSON's figures.

Scores mean nothing after a handful of steps and are not looked at.
"""

import argparse
import json
from pathlib import Path

import pytest
import torch

from roe_llava.benchmarks import compare, compare_measure, compare_speed, compare_systems
from roe_llava.benchmarks.compare import Rating, all_runs, best_of
from roe_llava.benchmarks.compare_report import LABELS, page
from roe_llava.benchmarks.compare_speed import compared, fastest
from roe_llava.benchmarks.compare_summary import verdict
from roe_llava.benchmarks.compare_systems import CONTROLS, EXPERTS, METHODS, reopen, shares
from roe_llava.examples.tiny_world.train_roe import BASE
from roe_llava.training.expert_evolution import packed_parameters

ROOT = Path(__file__).parent.parent
SMALL = (
    "--steps 6 --batch-size 2 --per-family 1 --control-per-family 1 --searched-routes 24 --searched-examples 8 "
    "--rate-steps 2 --rate-per-family 1 --rounds 1 --seeds 0"
)


CONTROLS_RUN = ("dense_all", "dense_adapters")  # the others put together what these and the methods do


def options(out, *more):
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    return parser.parse_args(["--out", str(out), *SMALL.split(), *more])


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    settle = compare_systems.settle_on_held_out
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "RATED", {what: grid[:1] for what, grid in compare.RATED.items()})
        patch.setattr(compare, "CONTROLS", CONTROLS_RUN)
        patch.setattr(compare_systems, "settle_on_held_out", lambda *given: settle(*given, per_family=1))
        patch.setattr(compare_measure, "COUNTED_PER_FAMILY", 1)
        patch.setattr(compare_measure, "WATCHED_PER_FAMILY", 2)
        patch.setattr(compare_speed, "BATCH_SIZES", (1,))
        return folder, compare.run(options(folder, "--report", str(folder / "page" / "compare.md")))


@pytest.fixture(scope="module")
def by_method(done):
    return {run["method"]: run for run in done[1]["runs"]}


def reopened(done, method):
    return reopen(method, done[0] / "models" / f"{method}-seed0")


def test_every_system_learns_what_the_page_says(by_method):
    assert set(by_method) == {*METHODS, *CONTROLS_RUN}
    assert by_method["base"]["learned"] == {}
    adapters = by_method["static"]["learned"]["adapters"]
    assert adapters == by_method["dense_adapters"]["learned"]["adapters"] == 7 * 2 * 64 * 256
    assert list(by_method["roe"]["learned"].values()) == [adapters + 7 * 2 * 512 + 2 * 256]
    mlps = 4 * 3 * 256 * 512
    assert by_method["dense_mlps"]["learned"] == {"dense": mlps}
    assert by_method["moe_llava"]["learned"] == {"experts, routers": EXPERTS * mlps + 4 * EXPERTS * 256}
    evomoe = by_method["evomoe"]["learned"]
    assert evomoe["evolution"] == mlps and evomoe["warm-up"] == by_method["dense_all"]["learned"]["dense"] > mlps
    assert 0 < evomoe["routers"] < mlps
    routing = list(by_method["roe"]["learned"].values())
    assert list(by_method["roe_moe"]["learned"].values()) == [EXPERTS * mlps + 4 * EXPERTS * 256, *routing]


def test_only_what_learns_moves(done):
    base = reopened(done, "base").model.state_dict()
    for method, learns in (("dense_mlps", ".mlp."), ("moe_llava", ".mlp."), ("roe_moe", ".mlp."), ("dense_all", "")):
        found = reopened(done, method).model.state_dict()
        moved = [name for name in base if name in found and not torch.equal(base[name], found[name])]
        assert all(learns in name and "vision_tower" not in name for name in moved)
        assert moved or method in ("moe_llava", "roe_moe")  # whose learning MLPs have other names
    assert any("lm_head" in name for name in moved)


def test_every_method_reads_the_same_conversations_in_the_same_order(monkeypatch, tmp_path):
    read = {}

    class Watched(compare_systems.Conversations):
        def __getitem__(self, index):
            read[method].append(index)
            return super().__getitem__(index)

    monkeypatch.setattr(compare_systems, "Conversations", Watched)
    monkeypatch.setattr("roe_llava.examples.tiny_world.train_roe.Conversations", Watched)
    rates = {"dense_mlps": 1e-4, "dense_all": 1e-4, "moe_llava": 1e-4, "evomoe": 1e-2, "evomoe_ones": True}
    for method in ("dense_mlps", "dense_adapters", "evomoe", "roe_moe"):
        read[method] = []
        compare_systems.MAKERS[method](compare_systems.Task(method, 0, options(tmp_path), rates))
    assert read["dense_mlps"] == read["dense_adapters"] == read["evomoe"] == list(range(12))
    assert set(read["roe_moe"]) == set(range(12)) and read["roe_moe"][:4] == [0, 1, 2, 3]  # others are searched on, too


def test_counted_flops_of_decoding_are_those_of_the_formula(by_method):
    for run in by_method.values():
        assert run["flops"]["decode_per_token"] == run["flops"]["formula_per_token"] > 0
    flops = {method: run["flops"]["decode_per_token"] for method, run in by_method.items()}
    mlps = 4 * 2 * 3 * 256 * 512
    assert flops["moe_llava"] - flops["base"] == mlps + 4 * 2 * 256 * EXPERTS  # a second expert, and the routers
    assert flops["static"] < flops["base"] == flops["dense_mlps"] < flops["evomoe"] < flops["moe_llava"]


def test_activated_parameters_are_those_a_token_goes_through(done, by_method):
    sizes = {method: run["parameters"] for method, run in by_method.items()}
    base = sizes["base"]["total"]
    assert base == sum(one.numel() for one in reopened(done, "base").model.parameters())
    mlps, routers = 4 * 3 * 256 * 512, 4 * EXPERTS * 256
    assert sizes["moe_llava"] == {"total": base + 3 * mlps + routers, "activated": base + mlps + routers}
    model = reopened(done, "evomoe").model
    router = model.model.language_model.layers[0].mlp.router
    text, score = (sum(one.numel() for one in part.parameters()) for part in (router.text, router.score))
    assert sizes["evomoe"]["activated"] == base + 4 * (text + score)
    layer = 256 * 64 * (2 * 4 + 2 * 2) + 3 * 256 * 512 + 2 * 256  # matrices and both norms
    left = layer - 256 - 2 * 64 * 256  # the norm before it and the adapter stay
    assert sizes["static"]["activated"] == sizes["static"]["total"] == base - 2 * left
    routed = by_method["roe"]
    expected = base - routed["skip_ratio"] * 7 * left + 7 * 2 * 512 + 2 * 256
    assert routed["parameters"]["activated"] == pytest.approx(expected, rel=1e-6)
    both, small = by_method["roe_moe"], 7 * 2 * 512 + 2 * 256
    assert both["parameters"]["total"] == sizes["moe_llava"]["total"] + 7 * 2 * 64 * 256 + small
    least, most = (sizes["moe_llava"]["activated"] - both["skip_ratio"] * 7 * (left + more) for more in (mlps // 4, 0))
    assert least <= both["parameters"]["activated"] - small <= most


def test_experts_are_compared_and_routing_is_split_by_modality(by_method):
    for method in ("moe_llava", "evomoe"):
        found = by_method[method]["experts"]
        assert [layer["layer"] for layer in found["layers"]] == [0, 2, 4, 6]
        for layer in found["layers"]:
            assert sum(layer["image"]) == pytest.approx(1) == sum(layer["text"])
            assert 0 <= layer["apart"] <= 1 and 0 <= layer["differ"] <= 0.75 and 0 < layer["undecided"] <= 1.0001
            assert 0.99 < layer["weights"] < 1.0001  # after so few steps
        assert len(found["accuracy"]["single"]) == EXPERTS


def test_routers_are_looked_at_before_they_learned_too(done):
    found = done[1]["untrained_apart"]
    assert set(found) == {"moe_llava", "evomoe"} and all(0 < one < 1 for many in found.values() for one in many)


def test_usage_tells_modalities_apart():
    chosen = torch.tensor([[0], [0], [1], [2]])
    found = compare_measure.usage(torch.zeros(4, 4), chosen, torch.tensor([True, True, False, False]), 4)
    assert found["image"] == [1, 0, 0, 0] and found["text"] == [0, 0.5, 0.5, 0]
    assert found["apart"] == 1 and found["differ"] == pytest.approx(0.25) and found["undecided"] == pytest.approx(1)


def test_cosine_is_the_mean_over_pairs():
    assert compare_measure.cosine(torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]])) == pytest.approx(1 / 3)


def test_rotated_routers_choose_the_next_expert_and_are_put_back(done):
    trained = reopened(done, "moe_llava")
    prompt = compare_measure.requested(trained, compare_measure.counted_prompts(trained)[0])

    def first():
        with torch.inference_mode():
            return trained.model(**prompt, output_router_logits=True).expert_indices[0]

    plain = first()
    with compare_measure.rotated(trained.model):
        assert torch.equal(first(), (plain + 1) % EXPERTS)
    assert torch.equal(first(), plain)


def test_a_reopened_model_is_the_one_that_was_judged(done, by_method):
    for method in ("roe", "dense_adapters", "evomoe", "roe_moe"):
        trained = reopened(done, method)
        found = compare_measure.accuracy(method, trained, 1)
        assert found["accuracy_by_family"] == by_method[method]["accuracy_by_family"]
        assert compare_measure.has_adapters_beside(trained.model) == (method == "dense_adapters")
    layers = packed_parameters(reopened(done, "evomoe").model)
    assert all(not torch.equal(one[0], one[1]) for layer in layers for one in layer)  # they did evolve


def test_times_are_of_all_systems_and_their_ratio_is_to_the_base(done):
    rows = done[1]["speed"]["batches"]["1"]
    assert {row["method"] for row in rows} == {*METHODS, "dense_adapters"}
    assert sum(row["method"] == "moe_llava" for row in rows) == sum(row["method"] == "roe_moe" for row in rows) == 2
    base = next(row for row in rows if row["method"] == "base")
    assert base["prefill"]["ratio"] == base["decode"]["ratio"] == 1
    twice = [[{"prefill": 2.0}, {"prefill": 4.0}]] * 2
    once = [[{"prefill": 1.0}, {"prefill": 1.0}]] * 2
    found = compared(twice, once, "prefill", 8)
    assert found["seconds"] == 3 and found["per_second"] == 8 / 3 and found["ratio"] == 0.375


def test_the_fastest_implementation_counts():
    rows = [{"method": "m", "prefill": {"seconds": a}, "decode": {"seconds": b}} for a, b in ((1, 1), (2, 0.5))]
    assert fastest(rows, "m") is rows[1] and fastest(rows, "none") is None


def test_the_shares_of_evomoe_are_those_of_the_paper():
    assert [len(part) for part in shares(100)] == [20, 40, 40]
    assert [len(part) for part in shares(3)] == [1, 1, 1]


def test_the_largest_rate_that_is_as_good_is_taken():
    results = [(Rating("x", rate), {"validation_loss": loss}) for rate, loss in ((1, 0.2), (2, 0.2015), (3, 0.21))]
    assert best_of(results).rate == 2
    ones = Rating("evomoe", 0.01, ones=True)
    assert best_of([(Rating("evomoe", 0.01), {"validation_loss": 0.3}), (ones, {"validation_loss": 0.2})]) is ones
    assert ones.changes == {"evomoe": 0.01, "evomoe_ones": True}


@pytest.mark.parametrize(
    ("values", "sign", "expected"),
    [
        ([1.0, 1.1, 0.9], 1, "yes"),
        ([1.0, 1.1, 0.9], -1, "no"),
        ([1.0, -1.0, 0.1], 1, "not told apart"),
        ([0.0, 0.0], 1, "not told apart"),
        ([3.0], 1, "one seed"),
    ],
)
def test_a_claim_needs_differences_beyond_their_noise(values, sign, expected):
    assert verdict(values, sign) == expected
    assert verdict(values, sign, least=5.0) == ("one seed" if expected == "one seed" else "not told apart")


def test_controls_come_last_and_have_seeds_of_their_own():
    names = [run.name for run in all_runs([0, 1], [0])]
    assert names[:2] == ["base-seed0", "dense_mlps-seed0"] and names.index("roe-seed1") < names.index("static-seed1")
    assert names[-len(CONTROLS) :] == [f"{method}-seed0" for method in CONTROLS]


def test_the_page_and_pictures_are_made_from_the_result(done):
    folder, result = done
    assert result == json.loads((folder / "compare.json").read_text())
    text = (folder / "page" / "compare.md").read_text()
    assert text == page(result)
    for name in ("compare_accuracy.png", "compare_similarity.png", "compare_modality.png"):
        assert f"({name})" in text and (folder / "page" / name).stat().st_size > 1000
    for row in result["summary"]["methods"]:
        sizes = " | ".join(f"{row['parameters'][name] / 1e6:.2f}" for name in ("activated", "total"))
        assert f"| {LABELS[row['method']]} | 1 | {100 * row['accuracy']['mean']:.1f} | {sizes} |" in text


def test_what_is_done_is_not_done_again_and_not_mixed(done, monkeypatch):
    folder, result = done
    monkeypatch.setattr(compare, "MAKERS", None)
    monkeypatch.setattr(compare, "CONTROLS", CONTROLS_RUN)
    monkeypatch.setattr(compare, "RATED", {what: grid[:1] for what, grid in compare.RATED.items()})
    with pytest.raises(ValueError, match=r"compare.json"):
        compare.run(options(folder))
    again = compare.run(options(folder, "--overwrite"))
    assert again["runs"] == result["runs"] and again["speed"] == result["speed"]
    with pytest.raises(ValueError, match="was made with"):
        compare.run(options(folder, "--overwrite", "--steps", "7"))


def test_the_benchmark_is_about_the_shipped_base():
    assert options("x").base == BASE


# ------------------------------------------------------------------------------------------------ what is committed


def test_the_committed_page_says_what_was_measured():
    result = json.loads((ROOT / "benchmarks" / "results" / "compare.json").read_text())
    assert (ROOT / "docs" / "compare.md").read_text() == page(result)
    assert {run["method"] for run in result["runs"]} >= set(METHODS)
    assert "/tmp" not in result["command"] and "+" not in result["commit"]
    for name in ("compare_accuracy.png", "compare_similarity.png", "compare_modality.png"):
        assert (ROOT / "docs" / name).stat().st_size > 1000
