"""Agreement with numbers recorded from the published inference (`golden/roe_reference`)."""

import pytest
import torch
from golden_helpers import IMAGE, PLACEHOLDER, recorded_prompts, reference_model, spliced

from roe_llava.routing_roe import default_segments

RECORDED = recorded_prompts()
PROMPTS = sorted({name.split("/")[0] for name in RECORDED if name.startswith("p")})
SKIPPED = sorted({name.split("/")[1] for name in RECORDED if name.startswith("layer0_skip/p")})
# The recording's own rounding is 1.5e-5 on logits and 1e-5 on router logits.
CLOSE = {"rtol": 0, "atol": 5e-5}


@pytest.fixture(scope="module")
def reference():
    """The recorded checkpoint as a model of ours."""
    return reference_model()


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
