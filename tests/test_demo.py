"""The demo: measuring on a tiny random model, pictures and tables from what was measured, and one whole run."""

import argparse
import io
import json

import pytest
import torch
from PIL import Image
from rich.console import Console

from roe_llava import RoeLlavaConfig, RoeLlavaForConditionalGeneration, RoeLlavaProcessor
from roe_llava.benchmarks import timing
from roe_llava.examples.tiny_world import asking, demo, pictures, report
from roe_llava.examples.tiny_world.base_model import build_base
from roe_llava.examples.tiny_world.processor import build_processor
from roe_llava.examples.tiny_world.world import FAMILIES, TinyWorld

NUM_LAYERS = 4


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """An untrained base and the same with random routing parts, a (model, processor) pair each."""
    folder = tmp_path_factory.mktemp("base")
    processor = build_processor()
    base = build_base(processor, hidden_size=64, num_layers=NUM_LAYERS).eval()
    base.save_pretrained(folder)
    processor.save_pretrained(folder)
    config = RoeLlavaConfig.from_pretrained(folder, adapter_size=8)
    roe = RoeLlavaForConditionalGeneration.from_pretrained(folder, config=config).eval()
    return (base, processor), (roe, RoeLlavaProcessor.from_pretrained(folder))


@pytest.fixture
def answered():
    """Twelve questions of each family; every third skips layer 2, every fourth answer is wrong."""
    items = []
    for family in FAMILIES:
        for number, example in enumerate(TinyWorld("test", 12, num_turns=1, families=(family,))):
            truth = example["turns"][-1][1]
            route = torch.tensor([True, True, number % 3 != 0, True])
            items.append(asking.Answered(example, truth, truth if number % 4 else "nothing", route))
    return items


def printed(show, *measured) -> str:
    """What a printing function writes."""
    to = Console(file=io.StringIO(), width=140)
    show(to, *measured)
    return to.file.getvalue()


@pytest.mark.parametrize(
    ("skip_ratio", "cost", "decoder_share", "best"),
    [(0.0, 0.1, 1.0, 1.0), (0.5, 0.0, 1.0, 2.0), (0.5, 1.0, 1.0, 1.0), (0.25, 0.2, 0.5, 1 / 0.9), (0.5, 0.0, 0.0, 1.0)],
)
def test_ceiling_charges_adapters_and_the_rest(skip_ratio, cost, decoder_share, best):
    assert timing.ceiling(skip_ratio, cost, decoder_share) == pytest.approx(best)


def test_ceiling_names_the_share_that_is_wrong():
    with pytest.raises(ValueError, match="adapter_cost must not be negative"):
        timing.ceiling(0.2, -1.5)


def test_nothing_skipped_reaches_no_share_of_the_ceiling():
    assert timing.share_of_ceiling(1.01, 1.0) is None
    assert timing.share_of_ceiling(1.3, 1.5) == pytest.approx(0.6)


def test_adapter_cost_is_a_ratio_of_parameters(pairs):
    _, (roe, _) = pairs
    layer = roe.model.language_model.layers[0]
    skip = 2 * 64 * 8 + 64  # two matrices and the norm
    routing = sum(p.numel() for part in (layer.router, layer.adapter) for p in part.parameters())
    full = sum(p.numel() for p in layer.parameters()) - routing
    assert timing.adapter_cost(roe) == pytest.approx(skip / full)


def test_answers_do_not_depend_on_the_batch(pairs):
    examples = list(TinyWorld("test", 6, num_turns=1))
    for pair in pairs:
        alone, routes = asking.ask(*pair, examples, batch_size=1)
        together, batched_routes = asking.ask(*pair, examples, batch_size=4)
        assert alone == together
        assert routes is batched_routes is None or torch.equal(routes, batched_routes)


def test_base_has_no_routes_and_roe_has_one_per_question(pairs):
    base, roe = pairs
    items = asking.ask_both(base, roe, per_family=2, seed=0, families=("exist", "digit"))
    assert [item.family for item in items] == ["exist", "exist", "digit", "digit"]
    assert all(item.route.shape == (NUM_LAYERS,) for item in items)
    assert asking.ask(*base, [items[0].example])[1] is None


def test_summaries_count_what_was_answered_and_skipped(answered):
    accuracy = asking.accuracy_summary(answered)
    assert set(accuracy["families"]) == set(FAMILIES)
    for of in (accuracy["overall"], *accuracy["families"].values()):
        assert of["base"] == 1.0
        assert of["roe"] == pytest.approx(9 / 12)
        assert of["lost"] == pytest.approx(3 / 12)
        assert of["skip_ratio"] == pytest.approx(1 / 12)  # one layer of four, for a third of the questions
    guessed = [of["most_common_answer"] for of in accuracy["families"].values()]
    assert accuracy["overall"]["most_common_answer"] == pytest.approx(sum(guessed) / len(guessed))
    routes = asking.route_summary(answered)
    assert routes["distinct"] == routes["common"] == 2
    assert routes["most_common"][0]["route"] == "1111"
    assert routes["most_common"][0]["share"] == pytest.approx(2 / 3)
    assert routes["skipped_by_layer"] == pytest.approx([0, 0, 1 / 3, 0])


def test_routes_that_differ_in_layer_0_alone_count_once(answered):
    for number, item in enumerate(answered):
        item.route = torch.tensor([number % 2 == 0, True, True, True])
    assert asking.route_summary(answered)["distinct"] == 1


def test_times_compare_both_models_on_the_same_prompts(pairs):
    (base, processor), (roe, roe_processor) = pairs
    examples = list(TinyWorld("test", 2, num_turns=1))
    prompts = [(asking.prompts(processor, [x]), asking.prompts(roe_processor, [x])) for x in examples]
    result = timing.compare_times(base, roe, prompts, num_tokens=2, repeats=2)
    assert result["questions"] == 2
    assert 0 <= result["skip_ratio"] <= 1
    for part in timing.PARTS:
        row = result[part]
        assert row["ratio"] == pytest.approx(row["base_seconds"] / row["roe_seconds"])
        assert 0 < row["decoder_share"] < 1
        assert row["ceiling"] >= 1
    assert not base.model.language_model.layers[0]._forward_pre_hooks  # the clock is taken off again
    assert "prefill" in printed(report.print_timing, result)


def test_pictures_are_written(answered, tmp_path):
    pictures.draw_routes(answered, tmp_path / "routes.png")
    pictures.draw_examples(pictures.chosen(answered), tmp_path / "examples.png")
    for name in ("routes.png", "examples.png"):
        width, height = Image.open(tmp_path / name).size
        assert width > 800 and height > 400


def test_chosen_examples_come_from_different_families(answered):
    items = pictures.chosen(answered)
    assert len({item.family for item in items}) == len(items) == 8
    assert {answered[0].family, answered[-1].family} <= {item.family for item in items}


def test_tables_show_every_family(answered):
    accuracy = asking.accuracy_summary(answered)
    text = printed(report.print_accuracy, accuracy, {"families": {"digit": {"shuffled": 0.123}}})
    assert all(family in text for family in FAMILIES)
    assert "12.3 %" in text
    assert "2 different ones" in printed(report.print_routes, asking.route_summary(answered))


@pytest.mark.parametrize(
    "section",
    [
        [{"name": "drop 3, 7", "accuracy": 0.95, "layers": [3, 7], "families": {"exist": 1.0}}],
        {"drop 3, 7": {"accuracy": 0.95, "layers": [3, 7], "families": {"exist": 1.0}}},
        {"name": "drop 3, 7", "accuracy": 0.95, "layers": [3, 7]},
    ],
)
def test_comparisons_of_the_training_are_shown_however_they_are_written(section):
    text = printed(report.print_training, {"static_drop": section})
    assert "drop 3, 7" in text and "95.0 %" in text


@pytest.mark.parametrize(
    "of_base",
    [
        {"families": {"exist": {"accuracy": 1.0, "shuffled": 0.5}, "digit": {"accuracy": 0.9, "shuffled": 0.1}}},
        {"exist": {"shuffled_images": 0.5}, "digit": {"shuffled_images": 0.1}, "seed": 0},
        {"accuracy": {"exist": 1.0, "digit": 0.9}, "shuffled_images": {"exist": 0.5, "digit": 0.1}},
    ],
)
def test_column_of_shuffled_images_is_found(of_base):
    assert report.shuffled_column(of_base) == pytest.approx({"exist": 0.5, "digit": 0.1, "all": 0.3})
    assert report.shuffled_column({}) == {}


def test_training_without_comparisons_prints_nothing():
    assert printed(report.print_training, {}) == ""


def test_missing_parts_end_the_demo_with_their_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        demo.run(demo_arguments("--base", str(tmp_path), "--out", str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_counts_below_one_are_refused():
    with pytest.raises(ValueError, match="--per-family must be at least 1, got 0"):
        demo.run(demo_arguments("--per-family", "0"))


def test_demo_answers_times_and_draws(tmp_path):
    few = ("--per-family", "2", "--time-questions", "1", "--repeats", "1")
    demo.run(demo_arguments("--out", str(tmp_path), *few))
    result = json.loads((tmp_path / "demo.json").read_text())
    assert result["setup"]["code"].startswith("transformers_modules.")
    assert result["accuracy"]["overall"]["questions"] == 2 * len(FAMILIES)
    assert set(result["accuracy"]["families"]) == set(FAMILIES)
    assert result["timing"]["decode"]["ratio"] > 0
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 2 * len(FAMILIES)
    assert all((tmp_path / name).is_file() for name in ("routes.png", "examples.png", "scene.png"))


def demo_arguments(*given: str) -> argparse.Namespace:
    """The demo's options as the command line reads them."""
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return parser.parse_args(given)
