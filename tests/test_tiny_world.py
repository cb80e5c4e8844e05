"""The shipped world: seeded, honest about its splits, and trainable by its commands."""

import argparse
import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from roe_llava.benchmarks import quality
from roe_llava.convert.graft import graft
from roe_llava.examples.tiny_world import asking, base_model, evaluate, lessons, train_base, train_roe, vision, world
from roe_llava.examples.tiny_world.front_ends import FRONT_ENDS
from roe_llava.examples.tiny_world.processor import build_processor

SHIPPED = Path(world.__file__).parent / "checkpoint"


def test_the_same_index_gives_the_same_conversation():
    one, two = world.TinyWorld("test", 5, seed=3)[4], world.TinyWorld("test", 9, seed=3)[4]
    assert one["turns"] == two["turns"]
    assert one["image"].tobytes() == two["image"].tobytes()


def test_splits_share_no_digit_image():
    pools = [{image for images in world.digit_pool(split).values() for image in images} for split in world.SPLITS]
    assert not pools[0] & pools[1] and not pools[0] & pools[2] and not pools[1] & pools[2]


def test_splits_share_no_scene():
    scenes = [{world.TinyWorld(split, 300).scene(i)[0].cells for i in range(300)} for split in world.SPLITS]
    assert not scenes[0] & scenes[1] and not scenes[0] & scenes[2] and not scenes[1] & scenes[2]


def test_answers_follow_from_the_scene():
    cells = [None] * 16
    cells[0], cells[5] = world.Form("large", "red", "circle"), world.Form("small", "blue", "cross")
    cells[9], cells[14] = world.Digit(7, 0), world.Digit(4, 1)
    scene = world.Scene(tuple(cells))
    asked = {family: (q, a) for q, a, family in world.questions(scene, random.Random(0), tuple(world.PRACTICE))}
    assert asked["add"][1] == "11"
    assert asked["larger"][1] == "7"
    assert asked["digit"][1] == "7 4"
    question, answer = asked["where"]
    assert answer == ("a1" if "red" in question else "b2")
    question, answer = asked["color"]
    assert answer == ("red" if "circle" in question else "blue")


def test_an_unknown_split_is_named():
    with pytest.raises(ValueError, match="holdout"):
        world.TinyWorld("holdout", 3)


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_quick_batches_equal_the_processors(front_end):
    processor, examples = build_processor(front_end), [world.TinyWorld("train", 4)[i] for i in range(4)]
    quick = lessons.LessonCollator(processor)(examples)
    slow = processor.apply_chat_template(
        [world.messages(example) for example in examples],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "right"},
    )
    assert torch.equal(quick["input_ids"], slow["input_ids"])
    torch.testing.assert_close(quick["pixel_values"], slow["pixel_values"], atol=1e-5, rtol=0)


def test_labels_are_the_answers_and_their_end():
    processor, example = build_processor(), world.TinyWorld("train", 9)[8]
    batch = lessons.LessonCollator(processor)([example])
    labelled = batch["labels"][batch["labels"] != -100]
    expected = "".join(f"{answer}</s>" for _, answer, _ in example["turns"])
    assert processor.decode(labelled).replace(" ", "") == expected.replace(" ", "")


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_a_token_of_an_image_sees_its_own_cell_and_no_other(front_end, no_gradients):
    """A change in one cell changes the features of that cell alone, as far as a tower's patches are told apart."""
    processor = build_processor(front_end)
    model = base_model.build_base(processor, num_layers=1, hidden_size=128, front_end=front_end)
    projector = model.model.multi_modal_projector
    features = torch.randn(1, 16 * (4 if front_end == "vila" else 1), projector_width(projector))
    for cell in (0, 1, 7, 14):
        cells = vision.by_cell(features.clone())
        changed = features.clone()
        for patch in range(features.shape[1]):
            marked = torch.zeros_like(features)
            marked[:, patch] = 1
            if vision.by_cell(marked)[0, cell].any():
                changed[:, patch] += 1
        assert ((vision.by_cell(changed) != cells).any(-1)[0]).nonzero().tolist() == [[cell]]
        moved = vision.projected_cells(model, changed) != vision.projected_cells(model, features)
        assert moved.any(-1)[0].nonzero().tolist() == [[cell]]


def projector_width(projector) -> int:
    """Channels of the features that a projector is given."""
    return projector.linear_1.in_features // (4 if hasattr(projector, "norm") else 1)


# ------------------------------------------------------------------------------------------------- the shipped model


def shipped(name):
    return json.loads((SHIPPED / name).read_text())


def test_every_shipped_family_is_seen_and_reasoned_about():
    for family, row in shipped("base/accuracy.json")["families"].items():
        assert row["accuracy"] >= row["most_common_answer"] + 0.3, family
        assert row["shuffled_images"] <= row["most_common_answer"] + 0.1, family


def test_the_shipped_base_is_small():
    assert sum(path.stat().st_size for path in (SHIPPED / "base").iterdir()) < 15e6


def test_the_shipped_routes_skip_and_differ():
    record = shipped("roe/training.json")
    assert record["roe"]["skip_ratio"] >= 0.15
    assert record["roe"]["accuracy"] >= record["base"]["accuracy"] - 0.015
    without_layer_0: dict[str, float] = {}
    for route, share in record["roe"]["routes"].items():
        without_layer_0[route[1:]] = without_layer_0.get(route[1:], 0) + share
    assert sum(share >= 0.05 for share in without_layer_0.values()) >= 3


def test_the_shipped_model_answers_as_recorded(tmp_path):
    graft(SHIPPED / "base", SHIPPED / "roe", tmp_path / "model")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", trust_remote_code=True, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(tmp_path / "model", trust_remote_code=True)
    record = shipped("roe/training.json")["roe"]
    recorded = record["accuracy_by_family"]
    for family in list(recorded)[:3]:
        examples = evaluate.family_examples(family, 60)
        answers, routes = asking.ask(model, processor, examples)
        right = evaluate.share_right(answers, examples)
        # The base alone would answer as well: it is the skipping that has to be there, per family.
        skipped = 1 - routes.float().mean().item()
        assert abs(skipped - record["skip_ratio_by_family"][family]) <= 0.05, family
        # 60 of the recorded questions: three standard errors of their share.
        assert abs(right - recorded[family]) <= 3 * (0.25 / 60) ** 0.5, family


# ---------------------------------------------------------------------------------------------------------- training


def test_layers_are_cut_out_of_a_base():
    whole = train_base.LlavaForConditionalGeneration.from_pretrained(SHIPPED / "base", dtype=torch.float32)
    model, processor, seen = train_base.cut_base(SHIPPED / "base", [1, 3])
    kept = [layer for number, layer in enumerate(whole.model.language_model.layers) if number not in (1, 3)]
    layers = model.model.language_model.layers
    assert len(layers) == len(kept) == model.config.text_config.num_hidden_layers
    for number, (layer, original) in enumerate(zip(layers, kept, strict=True)):
        assert layer.self_attn.layer_idx == number
        assert torch.equal(layer.mlp.up_proj.weight, original.mlp.up_proj.weight)
    assert seen["kind"] > 0.9 and processor.chat_template
    examples = evaluate.family_examples("object", 2)
    assert len(evaluate.answer(model, processor, examples)) == 2  # caches fit
    assert not any(parameter.requires_grad for parameter in model.model.vision_tower.parameters())
    with pytest.raises(ValueError, match=r"--cut \[99\]: the base has layers 0 to"):
        train_base.cut_base(SHIPPED / "base", [99])


@pytest.mark.slow
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_a_base_trains_from_scratch_by_one_command_and_is_routed_like_the_shipped_one(tmp_path, capsys, front_end):
    words = f"{tmp_path / 'base'} --steps 6 --vision-steps 20 --projector-steps 10 --layers 3 --hidden-size 128"
    small = ["--per-family", "4", "--snapshot-steps", "3", "--batch-size", "4", "--front-end", front_end]
    train_base.main([*words.split(), *small])
    assert "overall" in capsys.readouterr().out
    report = json.loads((tmp_path / "base" / "accuracy.json").read_text())
    assert set(report["families"]) == set(world.FAMILIES)
    assert not (tmp_path / "base.partial").exists()
    if front_end == "stock":
        return
    base = ["--base", str(tmp_path / "base")]
    few = ["--steps", "6", "--batch-size", "4", "--per-family", "2"]
    train_roe.main([str(tmp_path / "roe"), *base, *few, "--no-static"])
    record = json.loads((tmp_path / "roe" / "training.json").read_text())
    assert {len(route) for route in record["roe"]["routes"]} == {3}
    parser = argparse.ArgumentParser()
    quality.add_arguments(parser)
    searched = ["--searched-routes", "12", "--searched-examples", "4", "--seeds", "0", "--targets", "0.3"]
    result = quality.run(parser.parse_args(["--out", str(tmp_path / "quality"), *base, *few, *searched]))
    assert result["num_layers"] == 3 and all(run["made_with"]["base"] == "base" for run in result["runs"])


@pytest.mark.slow
def test_routing_parts_train_and_graft_by_their_commands(tmp_path):
    command = [str(tmp_path / "roe"), "--steps", "10", "--batch-size", "4", "--per-family", "4"]
    train_roe.main(command)
    record = json.loads((tmp_path / "roe" / "training.json").read_text())
    assert {"base", "roe", "static_drop"} <= record.keys()
    graft(SHIPPED / "base", tmp_path / "roe", tmp_path / "model")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", trust_remote_code=True)
    assert model.model.language_model.layers[0].router is not None
    with pytest.raises(ValueError, match="exists"):
        train_roe.main(command)
