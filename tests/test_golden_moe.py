"""Agreement with numbers recorded from published MoE-LLaVA (`golden/moe_llava_reference`), decoder by decoder."""

import copy
import functools

import pytest
import torch
from golden_moe_helpers import (
    FOLDER,
    IMAGE,
    SETS,
    cases,
    inputs_of,
    published_gradient,
    published_model,
    recorded,
    settings,
    training_inputs,
)
from transformers import DynamicCache, LlavaForConditionalGeneration

from roe_llava import MoeLlavaForConditionalGeneration, choice_moe
from roe_llava.convert.import_moe_llava import import_moe_llava
from roe_llava.convert.upcycle import upcycle

# The recording's own rounding is 2e-5 on states and logits, 1e-6 on losses and 2e-6 on gradients.
CLOSE, CLOSE_WEIGHTS, CLOSE_LOSS = {"rtol": 0, "atol": 5e-5}, {"rtol": 0, "atol": 5e-6}, {"rtol": 2e-6, "atol": 5e-6}
TRAINED = [(decoder, run) for decoder in ("llama", "phi") for run in settings(decoder)]


@functools.cache
def loaded(decoder):
    return published_model(decoder)


@pytest.fixture
def reference(request):
    """A recorded checkpoint as a model of ours, whose options may be changed."""
    return copy.deepcopy(loaded(request.param))


def with_decoder(pairs):
    """Parametrises by (decoder's model, decoder, second part)."""
    rows = [pytest.param(decoder, decoder, second, id=f"{decoder}-{second}") for decoder, second in pairs]
    return pytest.mark.parametrize("reference,decoder,prompt", rows, indirect=["reference"])


def check_routing(outputs, given, prefix, places=slice(None)):
    """Router logits, chosen experts and weights of a pass are the recorded ones, (M, B, places, .)."""
    for ours, name, close in (
        (outputs.router_logits, "router_logits", CLOSE),
        (outputs.expert_weights, "weights", CLOSE_WEIGHTS),
    ):
        torch.testing.assert_close(torch.stack(ours)[:, :, places], given[prefix + name], **close)
    assert torch.equal(torch.stack(outputs.expert_indices)[:, :, places], given[f"{prefix}experts"])


@with_decoder(cases())
@torch.no_grad()
def test_a_prefill_agrees(reference, decoder, prompt):
    given = recorded(decoder)
    outputs = reference(**inputs_of(decoder, prompt), output_router_logits=True)
    check_routing(outputs, given, f"{prompt}/")
    torch.testing.assert_close(outputs.logits, given[f"{prompt}/logits"], **CLOSE)


@with_decoder([(decoder, "p00_short") for decoder in SETS])
@torch.no_grad()
def test_hidden_states_agree_in_prefill_and_decode(reference, decoder, prompt):
    given, inputs, states = recorded(decoder), inputs_of(decoder, prompt), []
    layers = reference.model.language_model.layers
    for layer in layers:  # before the final norm, which the model's own last entry is behind
        layer.register_forward_hook(lambda module, args, output: states.append(output))
    cache = DynamicCache(config=reference.config.text_config)
    reference(**inputs, past_key_values=cache)
    prefill, tokens = torch.stack(states), given[f"{prompt}/tokens"]
    torch.testing.assert_close(prefill, given[f"{prompt}/hidden"][1:], **CLOSE)
    for step, wanted in enumerate(given[f"{prompt}/decode_hidden"]):
        states.clear()
        reference(input_ids=tokens[:, step : step + 1], past_key_values=cache)
        torch.testing.assert_close(torch.stack(states)[:, :, 0], wanted[1:], **CLOSE)


@with_decoder(cases())
@torch.no_grad()
def test_decoding_agrees_step_by_step(reference, decoder, prompt):
    given = recorded(decoder)
    tokens, cache = given[f"{prompt}/tokens"], DynamicCache(config=reference.config.text_config)
    outputs = reference(**inputs_of(decoder, prompt), past_key_values=cache)
    logits = [outputs.logits[:, -1]]
    for step, position in enumerate(given[f"{prompt}/decode_position_ids"].tolist()):
        assert cache.get_seq_length() == position
        outputs = reference(input_ids=tokens[:, step : step + 1], past_key_values=cache, output_router_logits=True)
        names = ("router_logits", "experts", "weights")
        of_step = {name: given[f"{prompt}/decode_{name}"][step][:, :, None] for name in names}
        check_routing(outputs, of_step, "")
        logits.append(outputs.logits[:, -1])
    torch.testing.assert_close(torch.stack(logits, dim=1), given[f"{prompt}/step_logits"], **CLOSE)


@with_decoder(cases())
def test_six_greedy_tokens_agree(reference, decoder, prompt):
    written = reference.generate(**inputs_of(decoder, prompt), max_new_tokens=6, do_sample=False)
    assert written[:, -6:].tolist() == recorded(decoder)[f"{prompt}/tokens"].tolist()


@with_decoder(cases("top1/"))
@torch.no_grad()
def test_one_expert_per_token_agrees(reference, decoder, prompt):
    given, inputs = recorded(decoder), inputs_of(decoder, prompt)
    reference.config.num_experts_per_tok = 1
    outputs = reference(**inputs, output_router_logits=True)
    check_routing(outputs, given, f"{prompt}/top1/")
    torch.testing.assert_close(outputs.logits, given[f"{prompt}/top1/logits"], **CLOSE)
    written = reference.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert written[:, -6:].tolist() == given[f"{prompt}/top1/tokens"].tolist()


@with_decoder(cases("noisy/"))
@torch.no_grad()
def test_published_noise_agrees(reference, decoder, prompt, monkeypatch):
    given = recorded(decoder)
    draws = iter(given[f"{prompt}/noisy/gumbel"].flatten(1, 2))
    monkeypatch.setattr(choice_moe, "gumbel_noise", lambda logits: next(draws))
    reference.config.second_choice_noise = "always"
    outputs = reference(**inputs_of(decoder, prompt), output_router_logits=True)
    check_routing(outputs, given, f"{prompt}/noisy/")
    if (logits := given.get(f"{prompt}/noisy/logits")) is not None:
        torch.testing.assert_close(outputs.logits, logits, **CLOSE)
    assert torch.equal(outputs.logits[:, -1].argmax(-1), given[f"{prompt}/noisy/first_token"])


@pytest.mark.parametrize("reference", ["llama"], indirect=True)
@torch.no_grad()
def test_padding_counts_as_published_where_asked_for(reference):
    given, inputs = recorded("llama"), inputs_of("llama", "pad2")
    reference.config.count_padding = True
    outputs = reference(**inputs, output_router_logits=True)
    check_routing(outputs, given, "pad2/")
    torch.testing.assert_close(outputs.logits, given["pad2/logits"], **CLOSE)
    torch.testing.assert_close(outputs.aux_loss, given["pad2/l_aux"].sum(), **CLOSE_LOSS)
    torch.testing.assert_close(0.01 * outputs.aux_loss, given["pad2/moe_loss"], **CLOSE_LOSS)
    reference.config.count_padding = False
    without = reference(**inputs, output_router_logits=True)
    assert torch.equal(without.logits, outputs.logits)
    assert (without.aux_loss - outputs.aux_loss).abs() > 1e-3


@with_decoder(TRAINED)
def test_training_agrees(reference, decoder, prompt, monkeypatch):
    given, about, (batch, run) = recorded(decoder, "training"), settings(decoder)[prompt], prompt.split("/")
    if run.startswith("skew"):
        for layer in reference.config.expert_layers():
            router = reference.model.language_model.layers[layer].mlp.router
            router.weight.data = given[f"skew/model.layers.{layer}.mlp.deepspeed_moe.gate.wg.weight"].clone()
    reference.config.count_padding = True
    reference.config.num_experts_per_tok = about["top_k"]
    reference.config.expert_capacity_factor = about["capacity_factor"]
    reference.config.min_expert_capacity = about["min_capacity"]
    for ours, theirs in (("gumbel_noise", "gumbel"), ("uniform_draws", "rts_uniform")):
        draws = iter(given.get(f"{prompt}/{theirs}", torch.empty(0, 0, 0)).flatten(1, 2))
        monkeypatch.setattr(choice_moe, ours, lambda logits, draws=draws: next(draws))
    reference.config.second_choice_noise = "training" if f"{prompt}/gumbel" in given else "never"
    outputs = reference.train()(**training_inputs(decoder, batch), output_router_logits=True)
    check_routing(outputs, given, f"{prompt}/")
    assert torch.equal(torch.stack(outputs.expert_weights) > 0, given[f"{prompt}/kept"].bool())
    torch.testing.assert_close(outputs.aux_loss, given[f"{prompt}/l_aux"].sum(), **CLOSE_LOSS)
    torch.testing.assert_close(outputs.loss, given[f"{prompt}/total_loss"], **CLOSE_LOSS)
    outputs.loss.backward()
    names = [name for name in given if name.startswith(f"{prompt}/grad/")]
    assert names
    for name in names:
        ours = published_gradient(reference, name.removeprefix(f"{prompt}/grad/"))
        torch.testing.assert_close(ours, given[name], rtol=0, atol=5e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_recorded_settings_drop_first_choices_second_ones_and_both():
    kept = {run: recorded("llama", "training")[f"{run}/kept"].bool() for run in settings("llama")}
    assert kept["A/nodrop"].all() and kept["A/top1_nodrop"].all() and not kept["A/top1_cf1.0"].all()
    pairs = torch.cat([one.flatten(0, 2) for one in kept.values() if one.shape[-1] == 2])
    assert {tuple(pair) for pair in pairs.tolist()} == {(True, True), (True, False), (False, True), (False, False)}


def test_a_dense_checkpoint_and_its_conversion_agree(tmp_path):
    dense_folder = tmp_path / "dense"
    import_moe_llava(FOLDER / "llama" / "dense_checkpoint", dense_folder)
    assert not list(dense_folder.glob("*.py"))
    upcycle(dense_folder, tmp_path / "moe")
    dense = LlavaForConditionalGeneration.from_pretrained(dense_folder).eval()
    converted = MoeLlavaForConditionalGeneration.from_pretrained(tmp_path / "moe").eval()
    routers = recorded("llama", "converted_routers")
    assert len(routers) == len(converted.config.expert_layers()) == 3
    for layer in converted.config.expert_layers():
        router = converted.model.language_model.layers[layer].mlp.router
        router.weight.data = routers[f"model.layers.{layer}.mlp.deepspeed_moe.gate.wg.weight"]
    given = recorded("llama")
    names = [name.split("/")[0] for name in given if name.endswith("/converted_logits")]
    assert len(names) == 3
    for name in names:
        inputs = inputs_of("llama", name)
        for model, wanted in ((dense, "dense_logits"), (converted, "converted_logits")):
            model.config.image_token_index = IMAGE
            with torch.no_grad():
                logits = model(**inputs).logits[..., :128]
            torch.testing.assert_close(logits, given[f"{name}/{wanted}"], **CLOSE)
