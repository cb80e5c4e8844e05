"""The shipped world: seeded, honest about its splits, and trainable by its commands."""

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from roe_llava.convert.graft import graft
from roe_llava.examples.tiny_world import asking, evaluate, lessons, train_base, train_roe, world
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


def test_quick_batches_equal_the_processors():
    processor, examples = build_processor(), [world.TinyWorld("train", 4)[i] for i in range(4)]
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
def test_the_base_trains_from_scratch_by_one_command(tmp_path, capsys):
    words = f"{tmp_path / 'base'} --steps 6 --vision-steps 20 --projector-steps 10 --layers 2 --hidden-size 128"
    train_base.main([*words.split(), "--per-family", "4", "--snapshot-steps", "3", "--batch-size", "4"])
    assert "overall" in capsys.readouterr().out
    report = json.loads((tmp_path / "base" / "accuracy.json").read_text())
    assert set(report["families"]) == set(world.FAMILIES)
    assert not (tmp_path / "base.partial").exists()


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
