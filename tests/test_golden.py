"""Agreement with numbers recorded from the published implementation (`golden/roe_reference`)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, LlamaConfig

from roe_llava import RoeLlavaConfig, RoeLlavaForConditionalGeneration, RoutingPhase, modeling_roe_llava
from roe_llava.routing_roe import default_segments, path_weights, roe_loss, token_loss_per_example, turns_of_tokens

FOLDER = Path(__file__).parent / "golden" / "roe_reference"
RECORDED = load_file(FOLDER / "inference.safetensors")
PROMPTS = sorted({name.split("/")[0] for name in RECORDED if name.startswith("p")})
SKIPPED = sorted({name.split("/")[1] for name in RECORDED if name.startswith("layer0_skip/p")})
TRAINED = load_file(FOLDER / "training.safetensors")
SETTINGS = json.loads((FOLDER / "training.json").read_text())
PLACEHOLDER, PATCHES = -200, 4
# A token that no recorded text holds can stand for an image.
USED = [tensor for found in (RECORDED, TRAINED) for name, tensor in found.items() if name.endswith("/input_ids")]
IMAGE = max(set(range(128)) - {token for tensor in USED for token in tensor.flatten().tolist()})
# The recording's own rounding is 1.5e-5 on logits and 1e-5 on router logits.
CLOSE = {"rtol": 0, "atol": 5e-5}


def renamed(weights):
    """Published names to ours; the two routing tokens become one table."""
    found = {}
    for name, tensor in weights.items():
        if "inv_freq" in name or "position_ids" in name:
            continue  # buffers
        if name.startswith("model.vision_tower."):
            name = name.replace("model.vision_tower.vision_tower.vision_model.", "model.vision_tower.")
        elif name.startswith("model.mm_projector."):
            name = name.replace("model.mm_projector.0", "model.multi_modal_projector.linear_1")
            name = name.replace("model.mm_projector.2", "model.multi_modal_projector.linear_2")
        elif name != "lm_head.weight":
            name = name.replace("model.", "model.language_model.", 1)
            name = name.replace("adapter_MHA.conv_A", "adapter.down_proj")
            name = name.replace("adapter_MHA.conv_B", "adapter.up_proj")
            name = name.replace("adapter_MHA_router.expert.0", "router")
        found[name] = tensor
    tokens = [found.pop(f"model.language_model.adapter_{kind}_token.weight") for kind in ("image", "text")]
    return found | {"model.language_model.routing_tokens.weight": torch.cat(tokens)}


@pytest.fixture(scope="module")
def reference():
    """The recorded checkpoint as a model of ours, positions as in published inference, end of sequence disabled."""
    stored = json.loads((FOLDER / "config.json").read_text())
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "pad_token_id", "bos_token_id")
    text = LlamaConfig(**{name: stored[name] for name in names}, eos_token_id=stored["eos_token_id"])
    vision = json.loads((FOLDER / "vision_config.json").read_text())
    vision = {name: vision[name] for name in vision if name not in ("architectures", "model_type", "torch_dtype")}
    config = RoeLlavaConfig(
        text_config=text,
        vision_config=CLIPVisionConfig(**vision),
        image_token_index=IMAGE,
        image_seq_length=PATCHES,
        adapter_size=16,
        routing_positions="first",
    )
    model = RoeLlavaForConditionalGeneration(config).eval()
    model.load_state_dict(renamed(torch.load(FOLDER / "pytorch_model.bin", weights_only=True)))
    model.generation_config.eos_token_id = None
    return model


def spliced(ids):
    """Token ids with every placeholder replaced by its patches."""
    return [token for given in ids for token in ([IMAGE] * PATCHES if given == PLACEHOLDER else [given])]


def recorded(name):
    """Inputs of a prompt, and the routing segments its recorded masks amount to (routing tokens come first there)."""
    given = RECORDED[f"{name}/input_ids"][0].tolist()
    inputs = {"input_ids": torch.tensor([spliced(given)])}
    if PLACEHOLDER in given:
        inputs["pixel_values"] = RECORDED[f"{name}/pixel_values"]
    image, text = RECORDED[f"{name}/question_mask"][0, :, 2:].bool()
    segments = torch.full_like(inputs["input_ids"], -1)
    segments[:, image], segments[:, text] = 0, 1
    return inputs, segments


def segments_needed(name, segments):
    """Segments are given where the published split is not ours: text only, and several images."""
    return {"routing_segments": segments} if "text_only" in name or "two_images" in name else {}


@pytest.mark.parametrize("name", PROMPTS)
@torch.no_grad()
def test_router_logits_decisions_and_logits_agree(reference, name):
    inputs, segments = recorded(name)
    outputs = reference(**inputs, **segments_needed(name, segments))
    torch.testing.assert_close(outputs.router_logits[0], RECORDED[f"{name}/router_logits"], **CLOSE)
    assert torch.equal(outputs.routes[0], RECORDED[f"{name}/keep"].bool())
    torch.testing.assert_close(outputs.logits[0], RECORDED[f"{name}/logits"][2:], **CLOSE)


@pytest.mark.parametrize("name", PROMPTS)
def test_eight_greedy_tokens_agree(reference, name):
    inputs, segments = recorded(name)
    tokens = reference.generate(**inputs, **segments_needed(name, segments), max_new_tokens=8, do_sample=False)
    assert tokens[0, -8:].tolist() == RECORDED[f"{name}/tokens"].tolist()


@pytest.mark.parametrize("name", [name for name in PROMPTS if not segments_needed(name, None)])
def test_the_default_split_is_the_recorded_one(name):
    inputs, segments = recorded(name)
    ids = inputs["input_ids"]
    ours = default_segments(ids == IMAGE, torch.ones_like(ids).bool())
    assert torch.equal(ours, segments)


def test_a_left_padded_batch_of_all_prompts_writes_the_recorded_tokens(reference):
    rows = [recorded(name) for name in PROMPTS]
    width = max(inputs["input_ids"].shape[1] for inputs, _ in rows)

    def padded(tensor, value):
        return torch.nn.functional.pad(tensor, (width - tensor.shape[1], 0), value=value)

    ids = torch.cat([padded(inputs["input_ids"], 0) for inputs, _ in rows])
    mask = torch.cat([padded(torch.ones_like(inputs["input_ids"]), 0) for inputs, _ in rows])
    segments = torch.cat([padded(segments, -1) for _, segments in rows])
    images = torch.cat([inputs["pixel_values"] for inputs, _ in rows if "pixel_values" in inputs])
    outputs = reference.generate(
        input_ids=ids,
        attention_mask=mask,
        pixel_values=images,
        routing_segments=segments,
        max_new_tokens=8,
        do_sample=False,
        return_dict_in_generate=True,
    )
    assert outputs.sequences[:, -8:].tolist() == [RECORDED[f"{name}/tokens"].tolist() for name in PROMPTS]
    keep = torch.stack([RECORDED[f"{name}/keep"].bool() for name in PROMPTS])
    assert torch.equal(outputs.past_key_values.routes, keep)


@pytest.mark.parametrize("name", SKIPPED)
@torch.no_grad()
def test_a_skipped_layer_0_agrees(reference, name, monkeypatch):
    weight = reference.model.language_model.layers[0].router.weight
    swapped = RECORDED["layer0_skip/model.layers.0.adapter_MHA_router.expert.0.weight"]
    assert not torch.equal(weight, swapped)
    monkeypatch.setattr(weight, "data", swapped)
    inputs, segments = recorded(name)
    given = segments_needed(name, segments)
    outputs = reference(**inputs, **given)
    assert not outputs.routes[0, 0]
    assert torch.equal(outputs.routes[0], RECORDED[f"layer0_skip/{name}/keep"].bool())
    torch.testing.assert_close(outputs.router_logits[0], RECORDED[f"layer0_skip/{name}/router_logits"], **CLOSE)
    torch.testing.assert_close(outputs.logits[0], RECORDED[f"layer0_skip/{name}/logits"][2:], **CLOSE)
    token = reference.generate(**inputs, **given, max_new_tokens=2, do_sample=False)[0, -2]
    assert token == RECORDED[f"layer0_skip/{name}/tokens"][0]


# ---------------------------------------- training


def phase_of(settings):
    """The recorded stage as a phase."""
    bias = 0.0 if settings["stage"] == 2 else settings["bias"]
    mode = "random" if settings["stage"] == 0 else "soft"
    return RoutingPhase(mode, temperature=settings["temp"], keep_bias=bias)


def training_batch(batch):
    """Inputs, labels and segments of a recorded batch, without the routing tokens that come first there."""
    questions, labels = TRAINED[f"{batch}/question_mask"], TRAINED[f"{batch}/labels_padded"]
    tokens = questions.shape[1]
    rows = [
        spliced(ids[mask.bool()].tolist())
        for ids, mask in zip(TRAINED[f"{batch}/input_ids"], TRAINED[f"{batch}/attention_mask"], strict=True)
    ]
    width = labels.shape[1] - tokens
    questions = questions[:, :, tokens:].bool()
    return {
        "input_ids": torch.tensor([row + [0] * (width - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
        "pixel_values": torch.stack([TRAINED[f"{batch}/images"][n] for n, row in enumerate(rows) if IMAGE in row]),
        "labels": labels[:, tokens:],
        "routing_segments": torch.where(questions.any(1), questions.long().argmax(1), -1),
    }


def turns_that_exist(batch):
    """(B, T) the turns every conversation has: those that weigh an ordinary token."""
    weights = TRAINED[f"{batch}/weight_mask"]
    turns = weights[:, 1:, weights.shape[1] :].any(-1)
    assert turns[:, 0].all()
    return turns


@pytest.fixture
def trainee(reference, monkeypatch):
    """The recorded model in training mode; routing tokens where published training puts them, before the row."""

    def published(position_ids, attention_mask, num_tokens, mode):
        return position_ids[:, :1] + torch.arange(-num_tokens, 0)

    monkeypatch.setattr(modeling_roe_llava, "routing_position_ids", published)
    reference.zero_grad()
    yield reference.train()
    reference.eval()
    reference.zero_grad()


def trained_on(model, name, monkeypatch):
    """Outputs of a recorded configuration; its uniform draws replace ours."""
    settings = SETTINGS[name]
    model.model.routing_phase = phase_of(settings)
    monkeypatch.setattr(model.config, "target_skip_ratio", settings["skip_ratio"])
    if settings["stage"] == 0:
        draws = iter(TRAINED[f"{name}/uniforms"])
        monkeypatch.setattr(torch, "rand_like", lambda _: next(draws))
    return model(**training_batch(name.split("/")[0]))


@pytest.mark.parametrize("batch", ["A", "B"])
def test_a_token_belongs_to_the_recorded_turn(batch):
    inputs = training_batch(batch)
    real = inputs["attention_mask"].bool()
    weights = TRAINED[f"{batch}/weight_mask"]
    turns = weights[:, :, weights.shape[1] :].argmax(1)
    assert torch.equal(turns_of_tokens(inputs["routing_segments"])[real], turns[real])


@pytest.mark.parametrize("name", SETTINGS)
def test_path_weights_agree(name, monkeypatch):
    turns = turns_that_exist(name.split("/")[0])
    for layer, logits in enumerate(TRAINED[f"{name}/router_logits_raw"]):
        if SETTINGS[name]["stage"] == 0:
            draws = TRAINED[f"{name}/uniforms"][layer]
            monkeypatch.setattr(torch, "rand_like", lambda _, draws=draws: draws)
        ours, theirs = path_weights(logits, turns, phase_of(SETTINGS[name])), TRAINED[f"{name}/router_weights"][layer]
        torch.testing.assert_close(ours[:, 0], theirs[:, 0], rtol=0, atol=1e-5)
        torch.testing.assert_close(ours[:, 1:][turns], theirs[:, 1:][turns], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SETTINGS)
def test_losses_agree(name):
    batch = name.split("/")[0]
    logits, labels = TRAINED[f"{name}/logits"], TRAINED[f"{batch}/labels_padded"]
    torch.testing.assert_close(token_loss_per_example(logits, labels), TRAINED[f"{name}/task_loss"])
    share = TRAINED[f"{name}/skip_per_layer"].mean(0)
    loss = roe_loss(logits, labels, share, SETTINGS[name]["skip_ratio"])
    torch.testing.assert_close(loss, TRAINED[f"{name}/total_loss"])


@pytest.mark.parametrize("name", SETTINGS)
def test_a_training_pass_agrees(trainee, name, monkeypatch):
    with torch.no_grad():
        outputs = trained_on(trainee, name, monkeypatch)
    batch = name.split("/")[0]
    turns, tokens = turns_that_exist(batch), TRAINED[f"{batch}/question_mask"].shape[1]
    assert torch.equal(outputs.turn_mask, turns)
    theirs = TRAINED[f"{name}/router_weights"].permute(1, 2, 0, 3)[:, 1:, :, 1]
    torch.testing.assert_close(outputs.turn_skip_weights[turns], theirs[turns], rtol=0, atol=2e-5)
    real = training_batch(batch)["attention_mask"].bool()
    torch.testing.assert_close(outputs.logits[real], TRAINED[f"{name}/logits"][:, tokens:][real], **CLOSE)
    torch.testing.assert_close(outputs.loss, TRAINED[f"{name}/total_loss"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SETTINGS)
def test_gradients_agree(trainee, name, monkeypatch):
    trained_on(trainee, name, monkeypatch).loss.backward()
    prefix = f"{name}/grad/"
    theirs = {key.removeprefix(prefix): grad for key, grad in TRAINED.items() if key.startswith(prefix)}
    assert len(theirs) >= 5
    ours = dict(trainee.named_parameters())
    tokens = ours["model.language_model.routing_tokens.weight"].grad
    for key, grad in theirs.items():
        if key.startswith("model.adapter_"):
            found = None if tokens is None else tokens[:1] if "image" in key else tokens[1:]
            found = torch.zeros_like(grad) if found is None else found
        else:
            found = ours[next(iter(renamed_one(key)))].grad
        # The recording's own rounding is 1e-6.
        torch.testing.assert_close(found, grad, rtol=1e-4, atol=5e-6, msg=lambda text, key=key: f"{key}: {text}")


def renamed_one(name):
    """Our name of one published parameter, as a dict with one key."""
    dummies = {f"model.adapter_{kind}_token.weight": torch.zeros(1, 1) for kind in ("image", "text")}
    found = renamed({name: torch.zeros(1, 1), **dummies})
    found.pop("model.language_model.routing_tokens.weight")
    return found
