"""Agreement with numbers recorded from published VILA (`golden/vila_reference`), through imported checkpoints."""

import json

import pytest
import torch
from golden_vila_helpers import (
    CHECKPOINTS,
    FOLDER,
    PLACEHOLDER,
    PROMPTS,
    VOCABULARY,
    about_prompt,
    manifest,
    of_prompt,
    picture,
    pixels_of,
    recorded,
    spliced,
)
from safetensors.torch import load_file
from transformers import AutoProcessor, LlavaForConditionalGeneration, set_seed

from roe_llava import RoeLlavaForConditionalGeneration
from roe_llava.convert.import_vila import import_vila
from roe_llava.convert.vila_config import read_vila_config
from roe_llava.convert.vila_layout import resized_positions
from roe_llava.convert.vila_processor import vila_images
from roe_llava.modeling_frontend import FrontendLlavaForConditionalGeneration

# The recording's own rounding is 3.3e-6 on logits, 3e-6 on features and projections.
CLOSE = {"rtol": 0, "atol": 1e-5}
MODELS = sorted(CHECKPOINTS)
PICTURES = ("wide", "tall")
STOCK = ("mlp2x",)


@pytest.fixture(scope="session")
def imported(tmp_path_factory):
    """Name to folder of every recorded checkpoint, imported."""
    parent = tmp_path_factory.mktemp("vila")
    for name, folder in CHECKPOINTS.items():
        import_vila(FOLDER / folder, parent / name)
    return {name: parent / name for name in CHECKPOINTS}


@pytest.fixture(scope="session")
def bases(imported):
    """Name to model."""
    classes = {name: LlavaForConditionalGeneration for name in STOCK}
    opened = {
        name: classes.get(name, FrontendLlavaForConditionalGeneration).from_pretrained(folder).eval()
        for name, folder in imported.items()
    }
    for base in opened.values():
        base.generation_config.eos_token_id = None  # as recorded
    return opened


@pytest.fixture(scope="session")
def routed(imported):
    """Name to the same with routing parts that were never trained."""
    set_seed(0)
    return {name: RoeLlavaForConditionalGeneration.from_pretrained(folder).eval() for name, folder in imported.items()}


def processor_of(folder):
    return AutoProcessor.from_pretrained(folder, trust_remote_code=True)


def inputs_of(model, base, prompt):
    """A recorded prompt as the model takes it."""
    ids = of_prompt(model, prompt)["input_ids"]
    about = manifest()["prompts"][model][prompt]
    image = base.config.image_token_index
    inputs = {"input_ids": spliced((ids, ids), image, base.config.image_seq_length)}
    if about["images"]:
        inputs["pixel_values"] = torch.stack([pixels_of(model, name) for name in about["images"]])
    return inputs


every_prompt = pytest.mark.parametrize("prompt", PROMPTS)
every_model = pytest.mark.parametrize("model", MODELS)


# ---------------------------------------- pictures


@every_model
@pytest.mark.parametrize("name", PICTURES)
def test_pixels_agree(imported, model, name):
    processor = processor_of(imported[model])
    found = processor.image_processor(picture(name), return_tensors="pt")["pixel_values"][0]
    # The 256 values are the same; the published code scales and normalises them in another order.
    torch.testing.assert_close(found, pixels_of(model, name), rtol=0, atol=5e-7)


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize("aspect", ["pad", "resize", None])
def test_every_way_to_a_square_agrees_for_siglip(name, aspect):
    config = read_vila_config(FOLDER / "checkpoint_v15")
    where = FOLDER / "checkpoint_v15" / "vision_tower"
    settings = json.loads((where / "preprocessor_config.json").read_text())
    images = vila_images(settings, config.tower, aspect, where, resized=False)
    wanted = recorded("vision_v15")[f"preprocess/{name}_{aspect or 'resize'}/pixel_values"]
    found = images(picture(name), return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(found, wanted, rtol=0, atol=5e-7)


# ---------------------------------------- front-ends


@torch.no_grad()
def test_hidden_states_of_siglip_agree(bases):
    given, pixels = recorded("vision_v15"), torch.stack([pixels_of("v15", name) for name in PICTURES])
    outputs = bases["v15"].model.vision_tower(pixels, output_hidden_states=True)
    torch.testing.assert_close(torch.stack(outputs.hidden_states)[:, 0], given["siglip/hidden_states"], **CLOSE)
    torch.testing.assert_close(outputs.hidden_states[-2], given["siglip/features"], **CLOSE)
    torch.testing.assert_close(outputs.last_hidden_state[0], given["siglip/last_hidden_state"], **CLOSE)


@torch.no_grad()
def test_tokens_of_siglip_and_downsampling_agree(bases):
    given, pixels = recorded("vision_v15"), torch.stack([pixels_of("v15", name) for name in PICTURES])
    found = torch.stack(bases["v15"].get_image_features(pixels).pooler_output)
    assert found.shape[1] == bases["v15"].config.image_seq_length == 196
    torch.testing.assert_close(found, given["siglip/projected"], **CLOSE)


@pytest.mark.parametrize("model", ["linear", "mlp2x"])
@torch.no_grad()
def test_tokens_of_clip_agree(bases, model):
    given, pixels = recorded("vision_v1"), torch.stack([pixels_of(model, name) for name in PICTURES])
    states = bases[model].model.vision_tower(pixels, output_hidden_states=True).hidden_states
    torch.testing.assert_close(torch.stack(states)[:, 0], given["clip/hidden_states"], **CLOSE)
    torch.testing.assert_close(states[-2][:, 1:], given["clip/features"], **CLOSE)
    found = torch.stack(bases[model].get_image_features(pixels).pooler_output)
    torch.testing.assert_close(found, given[f"clip/projected_{model}"], **CLOSE)


@pytest.mark.parametrize("resolution", sorted(manifest()["position_resize"]))
def test_position_tables_for_other_resolutions_agree(resolution):
    weights = load_file(FOLDER / "checkpoint_v15" / "vision_tower" / "model.safetensors")
    about, wanted = manifest()["position_resize"][resolution], recorded("vision_v15")[f"position_resize/{resolution}"]
    table = resized_positions(weights["vision_model.embeddings.position_embedding.weight"], about["rows"])
    torch.testing.assert_close(table, wanted, rtol=0, atol=1e-6)
    assert (table == 0).all(dim=1).nonzero()[:, 0].tolist() == about["zero_rows"]


# ---------------------------------------- whole models


def without_blanks_at(ids, image, blank):
    """Token ids, blanks beside an image left out."""
    ids = ids.tolist()
    beside = [place for place, one in enumerate(ids) if one == blank and image in ids[max(place - 1, 0) : place + 2]]
    return [one for place, one in enumerate(ids) if place not in beside]


@every_model
@every_prompt
def test_prompts_have_the_recorded_tokens(imported, model, prompt):
    processor = processor_of(imported[model])
    text, pictures = about_prompt(model, prompt)
    system, _, question = text.rpartition("USER: ")
    content = [{"type": "image"}] * len(pictures)
    content += [{"type": "text", "text": question.replace("<image>\n", "").removesuffix(" ASSISTANT:")}]
    talk = [{"role": "user", "content": content}]
    if not system:
        talk.insert(0, {"role": "system", "content": ""})
    written = processor.apply_chat_template(talk, add_generation_prompt=True)
    assert written.replace("<image> \n", "<image>\n") == text
    found = processor(images=pictures or None, text=written, return_tensors="pt")
    ids = of_prompt(model, prompt)["input_ids"]
    num_tokens = 196 if model == "v15" else 36
    wanted = spliced((ids, ids), processor.image_token_id, num_tokens)
    # The recorded toy tokenizer drops blanks at the ends of a text, which Transformers keeps; the import says so.
    blank = processor.tokenizer.convert_tokens_to_ids("▁")
    assert without_blanks_at(found["input_ids"][0], processor.image_token_id, blank) == without_blanks_at(
        wanted[0], processor.image_token_id, blank
    )


@every_model
@every_prompt
@torch.no_grad()
def test_logits_and_hidden_states_agree(bases, model, prompt):
    given, base = of_prompt(model, prompt), bases[model]
    outputs = base(**inputs_of(model, base, prompt), output_hidden_states=True)
    found = outputs.logits[0, given["positions"], :VOCABULARY]
    torch.testing.assert_close(found, given["logits"], **CLOSE)
    last = torch.stack([states[0, -1] for states in outputs.hidden_states])
    torch.testing.assert_close(last, given["last_hidden_by_layer"], **CLOSE)


@every_model
@every_prompt
def test_greedy_tokens_agree(bases, model, prompt):
    given, base = of_prompt(model, prompt), bases[model]
    options = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    made = base.generate(**inputs_of(model, base, prompt), **options)
    assert made.sequences[0, -8:].tolist() == given["tokens"].tolist()
    found = torch.stack([logits[0, :VOCABULARY] for logits in made.logits])
    torch.testing.assert_close(found, given["step_logits"], **CLOSE)


@pytest.mark.parametrize("model", ["linear", "mlp2x"])
@every_prompt
@torch.no_grad()
def test_losses_agree(bases, model, prompt):
    given, base = of_prompt(model, prompt), bases[model]
    labels = spliced((given["input_ids"], given["labels"]), None, base.config.image_seq_length, fill=-100)
    logits = base(**inputs_of(model, base, prompt)).logits[..., :VOCABULARY]  # of the rows that were there
    found = base.loss_function(logits=logits, labels=labels, vocab_size=VOCABULARY)
    torch.testing.assert_close(found, given["loss"], rtol=0, atol=5e-6)


def test_recorded_prompts_have_one_image_two_and_none():
    counts = [(of_prompt("v15", prompt)["input_ids"] == PLACEHOLDER).sum().item() for prompt in PROMPTS]
    assert counts == [1, 2, 0]


# ---------------------------------------- with routing parts


@every_model
@every_prompt
@torch.no_grad()
def test_all_layers_kept_equals_the_base(bases, routed, model, prompt):
    inputs = inputs_of(model, bases[model], prompt)
    kept = routed[model](**inputs, route_bias=float("inf"))
    assert kept.routes.all() and kept.router_logits is not None
    assert torch.equal(kept.logits, bases[model](**inputs).logits)


@every_model
@torch.no_grad()
def test_a_row_in_a_batch_of_one_image_two_and_none_equals_the_row_alone(imported, bases, routed, model):
    processor = processor_of(imported[model])
    texts, pictures = zip(*(about_prompt(model, prompt) for prompt in PROMPTS), strict=True)
    together = processor(images=[one for row in pictures for one in row], text=list(texts), padding=True)
    together = together.convert_to_tensors("pt")
    routes = torch.ones(3, bases[model].config.text_config.num_hidden_layers, dtype=torch.bool)
    routes[0, 0] = routes[1, 1] = False
    found = routed[model](**together, routes=routes)
    for row, (text, images) in enumerate(zip(texts, pictures, strict=True)):
        alone = processor(images=images or None, text=text, return_tensors="pt")
        wanted = routed[model](**alone, routes=routes[row : row + 1]).logits[0]
        torch.testing.assert_close(found.logits[row, -len(wanted) :], wanted, rtol=0, atol=2e-5)


@every_model
@every_prompt
def test_cached_decoding_equals_one_pass(bases, routed, model, prompt):
    inputs = inputs_of(model, bases[model], prompt)
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    made = routed[model].generate(**inputs, **options)
    with torch.no_grad():
        whole = routed[model](
            **inputs | {"input_ids": made.sequences}, routes=made.past_key_values.routes, use_cache=False
        )
    torch.testing.assert_close(whole.logits[0, -5:-1], torch.cat(made.logits), rtol=0, atol=2e-5)
