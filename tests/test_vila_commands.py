"""Routing parts on imported VILA: what every command makes of such a base, and prompts of several images."""

import json

import pytest
import torch
from convert_helpers import bytes_of, train, weights_of
from golden_vila_helpers import CHECKPOINTS, FOLDER, PROMPTS, about_prompt, picture
from test_golden_vila import inputs_of, processor_of
from train_helpers import words
from vila_helpers import give_tokenizer, llama3_tokenizer, vicuna_tokenizer, vila_source

from roe_llava import RoeLlavaForConditionalGeneration, RoeLlavaProcessor
from roe_llava.cli import main
from roe_llava.convert.adapter_file import save_adapter
from roe_llava.convert.export_reference import export_reference
from roe_llava.convert.extract import extract
from roe_llava.convert.graft import graft
from roe_llava.convert.import_vila import import_vila
from roe_llava.convert.verify import verify
from roe_llava.training import train as training
from roe_llava.training.chat_prompt import chat_prompt
from roe_llava.training.conversations import ConversationCollator, load_conversations
from roe_llava.training.options import parse

MODELS = sorted(CHECKPOINTS)
every_model = pytest.mark.parametrize("model", MODELS)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with every recorded base, an adapter for it, and the grafted model; and the models in memory."""
    parent = tmp_path_factory.mktemp("vila")
    routed = {}
    for name, folder in CHECKPOINTS.items():
        import_vila(FOLDER / folder, parent / name)
        routed[name] = train(parent / name)
        save_adapter(routed[name], routed[name].config, parent / f"{name}_adapter", base=parent / name)
        graft(parent / name, parent / f"{name}_adapter", parent / f"{name}_roe")
    return parent, routed


def batch_of(processor):
    """The recorded prompts, of one image, two and none, in one batch."""
    texts, images = zip(*(about_prompt("v15", prompt) for prompt in PROMPTS), strict=True)
    flat = [one for row in images for one in row]
    return processor(images=flat, text=list(texts), padding=True, return_tensors="pt")


@every_model
@torch.no_grad()
def test_a_grafted_folder_answers_as_the_model_the_parts_are_from(world, model):
    parent, routed = world
    grafted = RoeLlavaForConditionalGeneration.from_pretrained(parent / f"{model}_roe").eval()
    inputs = batch_of(RoeLlavaProcessor.from_pretrained(parent / f"{model}_roe"))
    outputs, wanted = grafted(**inputs), routed[model](**inputs)
    assert torch.equal(outputs.logits, wanted.logits) and torch.equal(outputs.routes, wanted.routes)
    assert not outputs.routes.all()


@every_model
def test_what_is_extracted_is_the_base_and_its_adapter(world, model, tmp_path):
    parent, _ = world
    extract(parent / f"{model}_roe", tmp_path / "out", full=True)
    for ours, theirs in (
        (tmp_path / "out" / "base", parent / model),
        (tmp_path / "out" / "adapter", parent / f"{model}_adapter"),
    ):
        found, wanted = ({name: bytes_of(one) for name, one in weights_of(folder).items()} for folder in (ours, theirs))
        assert found == wanted
    configs = [
        json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out" / "base", parent / model)
    ]
    names = ("model_type", "architectures", "auto_map", "projector_type", "image_seq_length", "vision_config")
    assert [configs[0].get(name) for name in names] == [configs[1].get(name) for name in names]
    prompt = about_prompt("v15", "p1")[0]
    ids = [
        processor_of(folder)(text=prompt, images=[picture("wide")] * 2)["input_ids"]
        for folder in (tmp_path / "out" / "base", parent / model)
    ]
    assert ids[0] == ids[1]


@every_model
def test_verify_passes_on_a_grafted_folder(world, model):
    parent, _ = world
    report = verify(parent / model, parent / f"{model}_roe")
    assert report.passed


@pytest.mark.parametrize("model", ["linear", "v15"])
def test_a_front_end_that_published_code_lacks_is_not_exported(world, model, tmp_path):
    match = (
        r"has projector_type 'linear', the published" if model == "linear" else r"'siglip_vision_model', the published"
    )
    with pytest.raises(ValueError, match=match):
        export_reference(world[0] / f"{model}_roe", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Questions about two pictures each, with answers."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("wide", "tall"):
        picture(name).save(folder / f"{name}.png")
    parts = [{"type": "image"}, {"type": "image"}]
    rows = [
        {
            "images": ["wide.png", "tall.png"],
            "messages": [
                {"role": "user", "content": [*parts, {"type": "text", "text": f"what {number}?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "a hat"}]},
            ],
        }
        for number in range(12)
    ]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "data.jsonl"


@every_model
@torch.no_grad()
def test_a_baked_route_answers_as_the_pinned_one(world, model, tmp_path):
    parent, routed = world
    bake_options = ["--route", "1,", "--drop-adapters", "never"]
    assert main(["bake", str(parent / f"{model}_roe"), str(tmp_path / "out"), *bake_options]) == 0
    baked = RoeLlavaForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    inputs = inputs_of(model, baked, "p1")
    routes = torch.ones(1, baked.config.text_config.num_hidden_layers, dtype=torch.bool)
    routes[0, 1] = False
    assert torch.equal(baked(**inputs).logits, routed[model](**inputs, routes=routes).logits)


@every_model
def test_a_base_is_calibrated_on_questions_with_two_images(world, model, data, tmp_path):
    assert main(["calibrate", str(world[0] / f"{model}_roe"), str(data), "--out", str(tmp_path / "out")]) == 0
    assert RoeLlavaForConditionalGeneration.from_pretrained(tmp_path / "out").config.skip_calibration


@every_model
def test_parts_are_trained_on_questions_with_two_images(world, model, data, tmp_path):
    parent, _ = world
    out = tmp_path / "run"
    training.train(
        training.prepare(parse(words("frozen", parent / model, data, out, max_steps=2, adapter_size=4, max_length=500)))
    )
    graft(parent / model, out / "adapter", tmp_path / "roe")
    trained = RoeLlavaForConditionalGeneration.from_pretrained(tmp_path / "roe").eval()
    assert trained(**inputs_of(model, trained, "p1")).logits.isfinite().all()


# ---------------------------------------- several images


@every_model
def test_beams_of_prompts_with_several_images_equal_each_alone(world, model):
    parent, routed = world
    processor = RoeLlavaProcessor.from_pretrained(parent / f"{model}_roe")
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": 3}
    together = routed[model].generate(**batch_of(processor), **options)[:, -4:]
    for row, prompt in enumerate(PROMPTS):
        text, images = about_prompt("v15", prompt)
        inputs = processor(images=images or None, text=text, return_tensors="pt")
        assert routed[model].generate(**inputs, **options)[0, -4:].tolist() == together[row].tolist()


@every_model
def test_prompts_with_several_images_are_grouped_by_route(world, model):
    parent, routed = world
    processor = RoeLlavaProcessor.from_pretrained(parent / f"{model}_roe")
    rows = [about_prompt("v15", prompt) for prompt in PROMPTS * 2]
    prompts = [processor(images=images or None, text=text, return_tensors="pt") for text, images in rows]
    options = {"max_new_tokens": 4, "do_sample": False}
    alone = [routed[model].generate(**inputs, **options)[0].tolist() for inputs in prompts]
    grouped = routed[model].group_by_route(prompts, batch_size=4, **options)
    assert [row.tolist() for row in grouped] == alone


@every_model
@torch.no_grad()
def test_the_order_of_images_matters(world, model):
    _, routed = world
    inputs = inputs_of(model, routed[model], "p1")
    swapped = inputs | {"pixel_values": inputs["pixel_values"].flip(0)}
    assert not torch.allclose(routed[model](**inputs).logits, routed[model](**swapped).logits, atol=1e-3)


@pytest.mark.parametrize("kind", ["vicuna", "llama3"])
def test_data_with_interleaved_images_becomes_batches(tmp_path, kind):
    source = vila_source(tmp_path, "v15")
    give_tokenizer(source, vicuna_tokenizer() if kind == "vicuna" else llama3_tokenizer())
    import_vila(source, tmp_path / "base")
    for name in ("wide", "tall"):
        picture(name).save(tmp_path / f"{name}.png")
    said = [
        {"from": "human", "value": "<image>\na cat. <image>\nwhat?"},
        {"from": "gpt", "value": "a hat"},
        {"from": "human", "value": "and <image> here?"},
        {"from": "gpt", "value": "a bat"},
    ]
    rows = [
        {"image": ["wide.png", "tall.png", "wide.png"], "conversations": said},
        {"conversations": [said[0] | {"value": "a cat?"}, said[1]]},
    ]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    processor = RoeLlavaProcessor.from_pretrained(tmp_path / "base")
    assert chat_prompt(processor).images_in_place
    data, bad = load_conversations(tmp_path / "data.json", processor=processor)
    assert not len(bad)
    batch = ConversationCollator(processor)([data[0], data[1]])
    is_image = batch["input_ids"] == processor.image_token_id
    assert is_image.sum(dim=1).tolist() == [3 * 196, 0] and len(batch["pixel_values"]) == 3
    assert (batch["routing_segments"][is_image] == 0).all() and batch["routing_segments"].max() == 2
    answers = [processor.tokenizer.decode(row[row != -100]).replace("\n", "") for row in batch["labels"]]
    assert answers[0].startswith("a hat") and "a bat" in answers[0] and answers[1].startswith("a hat")
    model = train(tmp_path / "base").train()
    assert model(**batch).loss.isfinite()
