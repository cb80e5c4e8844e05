"""The quality benchmark in small: every method runs, what is done is not done again, the page holds the JSON's figures.

Scores mean nothing after a handful of steps and are not looked at.
"""

import argparse
import json
from pathlib import Path

import pytest
import tiny
import torch

from roe_llava.benchmarks import quality
from roe_llava.benchmarks.quality import Run, all_runs, best_single_route, headroom
from roe_llava.benchmarks.quality_report import aims, page
from roe_llava.examples.tiny_world.train_roe import BASE
from roe_llava.training.route_search import RoutePool

ROOT = Path(__file__).parent.parent
SMALL = "--steps 8 --batch-size 2 --per-family 2 --searched-routes 24 --searched-examples 8 --seeds 0 --targets 0.1 0.3"


def options(out, *more):
    parser = argparse.ArgumentParser()
    quality.add_arguments(parser)
    return parser.parse_args(["--out", str(out), *SMALL.split(), *more])


settled_targets = []  # in the order in which runs were settled


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quality")
    stock = quality.settle_on_held_out

    def settle_and_tell(model, processor, target):
        settled_targets.append(target)
        return stock(model, processor, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality, "settle_on_held_out", settle_and_tell)
        return folder, quality.run(options(folder, "--report", str(folder / "page" / "quality.md")))


def test_every_method_runs_and_decides_as_it_should(done):
    folder, result = done
    by_name = {Run(run["method"], run["target"], run["seed"]).name: run for run in result["runs"]}
    assert set(by_name) == {run.name for run in all_runs([0], (0.1, 0.3), result["num_layers"])}
    assert result == json.loads((folder / "quality.json").read_text())
    assert all(run["commit"] for run in result["runs"])
    dropped = round(0.3 * result["num_layers"])
    static = by_name[Run("static", dropped / result["num_layers"], 0).name]
    assert list(static["routes"].values()) == [1.0] and static["skip_ratio"] == pytest.approx(
        dropped / result["num_layers"]
    )
    assert by_name["base-0-seed0"]["skip_ratio"] == by_name["dense-0-seed0"]["skip_ratio"] == 0
    assert by_name["dense-0-seed0"]["steps"] > by_name["base-0-seed0"]["steps"] == 0
    assert by_name["random-0.3-seed0"]["skip_ratio"] == pytest.approx(dropped / result["num_layers"])
    stages = [stage for _, stage in by_name["taught-0.3-seed0"]["curves"]["stage"]]
    assert stages == sorted(stages) and set(stages) == {0, 1, 2}
    assert by_name["taught-0.3-seed0"]["steps"] == 8
    assert by_name["published-0.3-seed0"]["steps"] == 8 + result["settings"]["extra_steps"] > 8


def test_routers_of_ours_are_settled_and_the_published_are_not(done):
    """Whether a bias meets the target after so few steps is another matter."""
    assert sorted(settled_targets) == [0.1, 0.3, 0.3]  # two taught runs, and one of gradient
    assert all(run["settled"] is None for run in done[1]["runs"] if run["method"] in ("published", "static", "base"))


def test_other_seeds_run_what_the_aims_compare():
    names = [run.name for run in all_runs([0, 1], (0.1, 0.3), 7) if run.seed == 1]
    methods = ("base-0", "dense-0", "search-0.3", "taught-0.3", "static-0.285714", "published-0.3")
    assert names == [f"{method}-seed1" for method in methods]


def test_the_page_and_pictures_are_made_from_the_result(done):
    folder, result = done
    text = (folder / "page" / "quality.md").read_text()
    assert text == page(result)
    for name in ("quality_accuracy.png", "quality_skipping.png", "quality_training.png"):
        assert f"({name})" in text and (folder / "page" / name).stat().st_size > 1000
    taught = next(row for row in result["summary"]["methods"] if row["method"] == "taught")
    assert f"| taught routers (ours) | 1 | 30 | {100 * taught['skip_ratio']['mean']:.1f} |" in text


def test_what_is_done_is_not_done_again_and_not_mixed(done, monkeypatch):
    folder, result = done
    monkeypatch.setattr(quality, "train", None)
    with pytest.raises(ValueError, match=r"quality.json"):
        quality.run(options(folder))
    again = quality.run(options(folder, "--overwrite"))
    assert again["runs"] == result["runs"]
    with pytest.raises(ValueError, match="was made with"):
        quality.run(options(folder, "--overwrite", "--steps", "9"))


def test_an_interrupted_benchmark_goes_on_with_what_is_missing(done, tmp_path, monkeypatch):
    folder, _ = done
    (tmp_path / "runs").mkdir()
    name = "base-0-seed0.json"
    (tmp_path / "runs" / name).write_text((folder / "runs" / name).read_text())
    begun = []

    def stop(args, run, runs=None):
        begun.append(run.name)
        raise KeyboardInterrupt

    monkeypatch.setattr(quality, "search", stop)
    with pytest.raises(KeyboardInterrupt):
        quality.run(options(tmp_path))
    assert begun == ["search-0.3-seed0"] and not (tmp_path / "quality.json").exists()


def test_headroom_sees_that_kinds_need_different_layers():
    routes = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 1, 1], [1, 1, 0, 1]], dtype=torch.bool)
    groups = torch.tensor([0, 0, 1, 1] * 10)
    losses = torch.full((40, 4), 0.1)
    losses[:, 3] = 2.0
    losses[groups == 0, 1] = 1.0  # kind 0 needs layer 3, kind 1 layer 1
    losses[groups == 1, 2] = 1.0
    features = torch.stack([groups.float(), torch.zeros(40)], dim=1)
    found = headroom(RoutePool(routes, losses), features, groups, 0.25)
    assert found["all_layers"] == pytest.approx(0.1)
    assert found["single"] == pytest.approx(0.55)
    assert found["family"] == pytest.approx(0.1) and found["family_skip"] == pytest.approx(0.25)
    assert found["foreseen"] == pytest.approx(0.1, abs=0.01)


def test_adapters_beside_the_layers_add_to_them_and_learn():
    model, inputs = tiny.tiny_model(), tiny.batch(("question",))
    every = torch.ones(4, dtype=torch.bool)
    ups = [layer.adapter.up_proj.weight for layer in model.model.language_model.layers]
    with torch.no_grad():
        plain = model(**inputs, routes=every).logits
        quality.put_adapters_beside(model)
        for up in ups:
            up.zero_()
        assert torch.equal(model(**inputs, routes=every).logits, plain)
    for up in ups:
        torch.nn.init.normal_(up)
    logits = model.train()(**inputs, routes=every).logits
    assert not torch.allclose(logits, plain, atol=1e-2)
    logits.sum().backward()
    assert all(up.grad.abs().sum() > 0 for up in ups)


def test_the_dropped_layers_are_the_best_measured_set():
    found = {"routes": [[1, 1, 1], [1, 0, 1], [1, 1, 0], [1, 0, 0]], "mean_losses": [0.1, 0.5, 0.3, 0.9]}
    assert best_single_route(found, 1).tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("accuracy", "skipped", "met"), [(0.84, 0.31, [True] * 4), (0.8, 0.33, [False, False, False, True])]
)
def test_aims_are_met_or_not(accuracy, skipped, met):
    def row(method, target, accuracy, skipped, easy=0.4, hard=0.2):
        numbers = {
            name: {"mean": value, "std": None, "values": [value]}
            for name, value in (("accuracy", accuracy), ("skip_ratio", skipped))
        }
        families = {"accuracy_by_family": {"a": 0.9, "b": 0.7}, "skip_ratio_by_family": {"a": easy, "b": hard}}
        return {"method": method, "target": target, "common_routes": 3.0, **numbers, **families}

    rows = [row("dense", 0.0, 0.845, 0.0), row("static", 0.3, 0.79, 0.3), row("taught", 0.3, accuracy, skipped)]
    assert [one["met"] for one in aims(rows, (0.3,), 10)] == met


def test_the_benchmark_is_about_the_shipped_base():
    assert options("x").base == BASE


# ------------------------------------------------------------------------------------------------ what is committed


def test_the_committed_page_and_the_readme_say_what_was_measured():
    result = json.loads((ROOT / "benchmarks" / "results" / "quality.json").read_text())
    assert (ROOT / "docs" / "quality.md").read_text() == page(result)
    rows = {(row["method"], round(row["target"], 2)): row for row in result["summary"]["methods"]}
    share = {key: {name: 100 * row[name]["mean"] for name in ("accuracy", "skip_ratio")} for key, row in rows.items()}
    ours, static, published = share["taught", 0.3], share["static", 0.29], share["published", 0.3]
    lost = share["dense", 0.0]["accuracy"] - ours["accuracy"]
    text = " ".join((ROOT / "README.md").read_text().split())
    assert f"at 30 % have {ours['accuracy']:.1f} % where that drop has {static['accuracy']:.1f} %" in text
    assert f"but {lost:.1f} points less than the base given the same training" in text
    assert f"published recipe: {published['accuracy']:.1f} % at {published['skip_ratio']:.1f} % skipped" in text
