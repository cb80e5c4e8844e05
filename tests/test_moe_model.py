"""MoE-LLaVA as a model: equal to the dense base with equal experts, in batches, caches, beams and on disk."""

import pytest
import tiny
import torch
from tiny import alone, batch
from tiny_moe import (
    DECODERS,
    ROUTERS,
    blocks_of,
    choices,
    dense_of,
    equal_experts,
    expert_as_mlp,
    moe_config,
    moe_model,
)
from transformers import LlavaForConditionalGeneration, StaticCache, Trainer, TrainingArguments

from roe_llava import MoeLlavaConfig, MoeLlavaForConditionalGeneration
from roe_llava.configuration_moe_llava import MOE_FIELDS

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
CLOSE = {"rtol": 0, "atol": 2e-5}  # one sum in another order; logits are about 1
THREE = ("question", "text_only", "two_images")  # the number of rows that published code fails on
GREEDY = {"max_new_tokens": 5, "do_sample": False}


@pytest.fixture(params=DECODERS)
def model(request):
    return moe_model(request.param)


@pytest.fixture(params=ROUTERS)
def llama(request):
    """Llama with each kind of router."""
    return moe_model(router_type=request.param)


# ---------------------------------------- experts


@torch.no_grad()
def test_equal_experts_equal_the_dense_base(model):
    equal = equal_experts(model)
    dense, inputs = dense_of(equal), batch()
    torch.testing.assert_close(equal(**inputs).logits, dense(**inputs).logits, **CLOSE)
    assert torch.equal(equal.generate(**inputs, **GREEDY), dense.generate(**inputs, **GREEDY))
    assert (model(**inputs).logits - dense(**inputs).logits).abs().max() > 0.1, "the experts of the model do not differ"


@torch.no_grad()
def test_one_equal_expert_without_its_probability_equals_the_dense_base(model):
    equal = equal_experts(model)
    equal.config.num_experts_per_tok = 1
    dense, inputs = dense_of(equal), batch()
    assert (equal(**inputs).logits - dense(**inputs).logits).abs().max() > 0.1  # weighted by a probability below 1
    equal.config.normalize_expert_weights = True
    torch.testing.assert_close(equal(**inputs).logits, dense(**inputs).logits, **CLOSE)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("decoder", [*DECODERS, "llama with biases"])
def test_experts_implementations_agree(decoder, router):
    text = {"mlp_bias": True} if decoder.endswith("biases") else {}
    model = moe_model(decoder.split()[0], router_type=router, text=text).train()
    inputs, found = batch(), {}
    for name in IMPLEMENTATIONS:
        model.set_experts_implementation(name)
        assert model.model.language_model.config._experts_implementation == name
        model.zero_grad()
        outputs = model(**inputs, labels=inputs["input_ids"])
        outputs.loss.backward()
        found[name] = outputs.logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for name in IMPLEMENTATIONS[1:]:
        torch.testing.assert_close(found[name][0], found["eager"][0], **CLOSE)
        assert found[name][1].keys() == found["eager"][1].keys()
        for parameter, grad in found[name][1].items():
            torch.testing.assert_close(grad, found["eager"][1][parameter], rtol=1e-4, atol=1e-5)


def test_experts_implementation_is_taken_when_loading(tmp_path):
    moe_model().save_pretrained(tmp_path)
    for name, expected in ((None, "grouped_mm"), *((name, name) for name in IMPLEMENTATIONS)):
        options = {} if name is None else {"experts_implementation": name}
        loaded = MoeLlavaForConditionalGeneration.from_pretrained(tmp_path, **options)
        assert blocks_of(loaded)[0].experts.config._experts_implementation == expected


@torch.no_grad()
def test_a_block_is_the_weighted_sum_of_its_experts(model):
    layer, block = 2, blocks_of(model)[2]
    seen = {}
    block.register_forward_hook(lambda module, args, output: seen.update(input=args[0], output=output))
    outputs = model(**alone("question"), output_router_logits=True)
    index = model.config.expert_layers().index(layer)
    tokens, total = seen["input"], torch.zeros_like(seen["output"])
    stock = dense_of(model).model.language_model.layers[layer].mlp
    for number in range(model.config.num_experts):
        weight = (outputs.expert_weights[index] * (outputs.expert_indices[index] == number)).sum(-1, keepdim=True)
        total += weight * expert_as_mlp(block.experts, number, stock)(tokens)
    torch.testing.assert_close(seen["output"], total, **CLOSE)
    assert outputs.expert_indices[index].unique().numel() == model.config.num_experts, "some expert is never chosen"


# ---------------------------------------- batches, padding, caches, beams


@torch.no_grad()
def test_a_batch_of_three_equals_three_of_one(model):
    outputs = model(**batch(THREE))
    written = model.generate(**batch(THREE), **GREEDY)
    for row, name in enumerate(THREE):
        length = len(tiny.PROMPTS[name])
        torch.testing.assert_close(outputs.logits[row, -length:], model(**alone(name)).logits[0], **CLOSE)
        assert torch.equal(written[row, -5:], model.generate(**alone(name), **GREEDY)[0, -5:])


@torch.no_grad()
def test_a_padded_row_equals_the_row_alone_on_either_side(llama):
    for side in ("left", "right"):
        outputs = llama(**batch(side=side), output_router_logits=True)
        for row, name in enumerate(tiny.NAMES):
            length = len(tiny.PROMPTS[name])
            places = slice(-length, None) if side == "left" else slice(0, length)
            single = llama(**alone(name), output_router_logits=True)
            torch.testing.assert_close(outputs.logits[row, places], single.logits[0], **CLOSE)
            for ours, wanted in zip(outputs.expert_indices, single.expert_indices, strict=True):
                assert torch.equal(ours[row, places], wanted[0])


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_and_without_a_cache_agrees(model, beams):
    inputs = batch(THREE)
    cached = model.generate(**inputs, **GREEDY, num_beams=beams)
    assert torch.equal(cached, model.generate(**inputs, **GREEDY, num_beams=beams, use_cache=False))


@torch.no_grad()
def test_a_row_under_beams_equals_the_row_alone(llama):
    written = llama.generate(**batch(THREE), **GREEDY, num_beams=3)
    for row, name in enumerate(THREE):
        assert torch.equal(written[row, -5:], llama.generate(**alone(name), **GREEDY, num_beams=3)[0, -5:])


@torch.no_grad()
def test_cached_decoding_equals_one_pass(llama):
    inputs = alone("question")
    written = llama.generate(**inputs, **GREEDY)
    whole = llama(input_ids=written, pixel_values=inputs["pixel_values"], output_router_logits=True)
    length = inputs["input_ids"].shape[1]
    outputs = llama(**inputs)
    for step in range(length, written.shape[1]):
        outputs = llama(
            input_ids=written[:, step : step + 1], past_key_values=outputs.past_key_values, output_router_logits=True
        )
        torch.testing.assert_close(outputs.logits[:, 0], whole.logits[:, step], **CLOSE)
        for ours, wanted in zip(outputs.expert_indices, whole.expert_indices, strict=True):
            assert torch.equal(ours[:, 0], wanted[:, step])


@torch.no_grad()
def test_a_static_cache_gives_the_same_tokens(llama):
    inputs = batch(THREE)
    cache = StaticCache(config=llama.config.text_config, max_cache_len=32)
    ours = llama.generate(**inputs, **GREEDY, past_key_values=cache)
    assert torch.equal(ours, llama.generate(**inputs, **GREEDY))


@torch.no_grad()
def test_a_compiled_pass_is_one_graph_with_the_same_logits(llama):
    inputs = alone("text_only") | {"use_cache": False}  # counting images breaks the graph, in stock LLaVA, too
    compiled = torch.compile(llama, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**inputs).logits, llama(**inputs).logits, **CLOSE)
    torch._dynamo.reset()


# ---------------------------------------- training


def test_the_loss_in_training_adds_the_balancing_loss_and_in_eval_does_not(model):
    inputs = batch(THREE, side="right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    evaluated = model(**inputs, labels=labels)
    stock = LlavaForConditionalGeneration.forward(model, **inputs, labels=labels)
    assert torch.equal(evaluated.loss, stock.loss) and evaluated.aux_loss > 0
    trained = model.train()(**inputs, labels=labels)
    torch.testing.assert_close(trained.loss, evaluated.loss + 0.01 * evaluated.aux_loss)
    model.config.router_aux_loss_coef = 0.0
    torch.testing.assert_close(model(**inputs, labels=labels).loss, evaluated.loss)
    assert model(**inputs).aux_loss is None and model(**inputs).router_logits is None


def test_accumulated_batches_weigh_the_balancing_loss_by_their_labels(llama):
    llama.train()
    rows = [alone(name) for name in THREE]
    labels = [one["input_ids"] for one in rows]
    counts = [one.shape[1] - 1 for one in labels]  # nothing predicts a row's first token
    given = {"num_items_in_batch": torch.tensor(sum(counts))}
    ours = sum(llama(**one, labels=label, **given).loss for one, label in zip(rows, labels, strict=True))
    expected = 0.0
    for one, label, count in zip(rows, labels, counts, strict=True):
        outputs = llama(**one, labels=label)
        expected = expected + count / sum(counts) * outputs.loss  # cross entropy and balancing loss of the batch alone
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("noise", ["never", "training"])
def test_gradients_under_checkpointing_are_those_without(llama, noise):
    llama.config.second_choice_noise = noise
    llama.config.expert_capacity_factor = 0.6
    inputs, found = batch(), []
    llama.train()
    for is_checkpointing in (False, True):
        if is_checkpointing:
            llama.activation_checkpointing_enable()
        llama.zero_grad()
        torch.manual_seed(3)
        llama(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        found.append({name: p.grad.clone() for name, p in llama.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and any(".router." in name for name in found[0])
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-5, atol=1e-7)


def test_every_new_parameter_gets_a_gradient(llama):
    inputs = batch(("text_only", "one_token"))  # without a single image token
    llama.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    for block in blocks_of(llama).values():
        assert all(parameter.grad is not None for parameter in block.parameters())


def test_outputs_for_a_trainer_that_evaluates_are_the_stock_ones(llama):
    inputs = batch(THREE)
    outputs = llama(**inputs, labels=inputs["input_ids"])
    assert set(outputs.keys()) - set(llama.config.keys_to_ignore_at_inference) == {
        "loss",
        "logits",
        "image_hidden_states",
    }


class Rows(torch.utils.data.Dataset):
    """Prompts as their own labels, one row at a time."""

    def __len__(self):
        return len(THREE)

    def __getitem__(self, index):
        row = alone(THREE[index])
        return {name: row[name][0] for name in ("input_ids",)} | {"pixel_values": row.get("pixel_values")}


def collate(rows):
    """One row as a batch."""
    (row,) = rows
    made = {"input_ids": row["input_ids"][None], "labels": row["input_ids"][None]}
    return made | ({} if row["pixel_values"] is None else {"pixel_values": row["pixel_values"]})


@pytest.mark.parametrize("steps", [1, 3])
def test_the_stock_trainer_trains_and_evaluates(tmp_path, steps):
    model = moe_model()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    settings = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "max_steps": 1, "report_to": []}
    args = TrainingArguments(tmp_path, **settings, gradient_accumulation_steps=steps, use_cpu=True, save_strategy="no")
    trainer = Trainer(model, args, data_collator=collate, train_dataset=Rows(), eval_dataset=Rows())
    trainer.train()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert {"router", "experts"} <= {part for name in moved for part in name.split(".")}
    # The mean over rows of the token loss alone.
    model.eval()
    expected = sum(model(**collate([row])).loss for row in (Rows()[i] for i in range(len(THREE)))) / len(THREE)
    assert abs(trainer.evaluate()["eval_loss"] - expected.item()) < 1e-4


# ---------------------------------------- on disk, in other precisions, on other devices


@torch.no_grad()
def test_reloads_from_a_saved_folder(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    again, info = MoeLlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(getattr(again.config, name) == getattr(model.config, name) for name in MOE_FIELDS)
    assert again.config.model_type == "moe_llava" and again.config.architectures == [type(model).__name__]
    assert torch.equal(again.eval()(**batch()).logits, model(**batch()).logits)


@torch.no_grad()
def test_options_given_when_loading_take_effect(tmp_path):
    moe_model().save_pretrained(tmp_path)
    one = MoeLlavaForConditionalGeneration.from_pretrained(tmp_path, num_experts_per_tok=1).eval()
    assert choices(one, alone("question")).shape[-1] == 1
    with pytest.raises(ValueError, match="num_experts_per_tok must not exceed num_experts 4, got 5"):
        MoeLlavaForConditionalGeneration.from_pretrained(tmp_path, num_experts_per_tok=5)


def test_a_checkpoint_without_experts_is_never_completed(tmp_path):
    model = moe_model()
    model.save_pretrained(tmp_path / "whole")
    dense_of(model).save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match=r"dense \(model_type 'llava'\) lacks 6 tensors.*roe-llava upcycle"):
        MoeLlavaForConditionalGeneration.from_pretrained(tmp_path / "dense", config=model.config)
    kept = {name: tensor for name, tensor in model.state_dict().items() if ".router." not in name}
    model.save_pretrained(tmp_path / "cut", state_dict=kept)
    with pytest.raises(ValueError, match=r"lacks 2 tensors of this model: .*router\.weight"):
        MoeLlavaForConditionalGeneration.from_pretrained(tmp_path / "cut")
    loaded = MoeLlavaForConditionalGeneration.from_pretrained(tmp_path / "cut", allow_untrained=True)
    assert all(block.router.weight.isfinite().all() for block in blocks_of(loaded).values())
    with pytest.raises(ValueError, match="tp_plan='auto' is not supported"):
        MoeLlavaForConditionalGeneration.from_pretrained(tmp_path / "whole", tp_plan="auto")


@torch.no_grad()
def test_routers_stay_in_float32(llama, tmp_path):
    llama.save_pretrained(tmp_path)
    half = MoeLlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    block = blocks_of(half)[0]
    assert {parameter.dtype for parameter in block.router.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in block.experts.parameters()} == {torch.bfloat16}
    inputs = batch() | {"pixel_values": batch()["pixel_values"].bfloat16()}
    outputs = half(**inputs, output_router_logits=True)
    assert outputs.logits.dtype == torch.bfloat16 and outputs.router_logits[0].dtype == torch.float32
    found = []
    for name in IMPLEMENTATIONS:
        half.set_experts_implementation(name)
        found.append(half(**inputs).logits.float())
    assert max((one - found[0]).abs().max() for one in found) < 0.1  # 8 bits of mantissa; logits are about 1


@torch.no_grad()
def test_layers_on_the_disk_give_the_same_logits(llama, tmp_path):
    llama.save_pretrained(tmp_path / "model")
    device_map = {"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu", "lm_head": "cpu"}
    device_map |= {f"model.language_model.{name}": "cpu" for name in ("embed_tokens", "norm", "rotary_emb")}
    device_map |= {f"model.language_model.layers.{layer}": "disk" if layer else "cpu" for layer in range(4)}
    away = MoeLlavaForConditionalGeneration.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "off"
    ).eval()
    torch.testing.assert_close(away(**batch()).logits, llama(**batch()).logits, **CLOSE)
    assert torch.equal(away.generate(**batch(), **GREEDY), llama.generate(**batch(), **GREEDY))


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize("bits", [4, 8])
@torch.no_grad()
def test_a_quantised_model_answers_and_its_routers_and_experts_stay_whole(bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    text = {"hidden_size": 128, "intermediate_size": 128}
    exact = moe_model(text=text)
    exact.save_pretrained(tmp_path)
    skipped = ["lm_head", r"model\.vision_tower", r"model\.multi_modal_projector"]
    config = BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, llm_int8_skip_modules=skipped)
    model = MoeLlavaForConditionalGeneration.from_pretrained(
        tmp_path, quantization_config=config, device_map="cpu", dtype=torch.bfloat16
    ).eval()
    layers = model.model.language_model.layers
    kind = {4: "Linear4bit", 8: "Linear8bitLt"}[bits]
    assert type(layers[0].self_attn.q_proj).__name__ == type(layers[1].mlp.up_proj).__name__ == kind
    assert layers[0].mlp.router.weight.dtype == torch.float32
    assert layers[0].mlp.experts.gate_up_proj.dtype == torch.bfloat16
    inputs = batch() | {"pixel_values": batch()["pixel_values"].bfloat16()}
    whole = exact.bfloat16()(**inputs).logits.float()
    agreement = torch.cosine_similarity(model(**inputs).logits.float().flatten(), whole.flatten(), dim=0)
    assert agreement > 0.9, agreement
    assert model.generate(**inputs, **GREEDY).shape[1] == inputs["input_ids"].shape[1] + 5
    model.save_pretrained(tmp_path / "again")
    again = MoeLlavaForConditionalGeneration.from_pretrained(tmp_path / "again", dtype="auto").eval()
    assert type(again.model.language_model.layers[1].mlp.up_proj).__name__ == kind
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


# ---------------------------------------- named errors

WRONG = {
    "num_experts": (1, "num_experts must be an integer of at least 2, got 1"),
    "num_experts_per_tok": (5, "num_experts_per_tok must not exceed num_experts 4, got 5"),
    "moe_layers": ([0, 4], r"moe_layers must be distinct layer numbers in \[0, 4\), at least one, got \[0, 4\]"),
    "router_type": ("cosine", "router_type must be one of .*'linear', 'token_aware'.*, got 'cosine'"),
    "router_rank": (0, "router_rank must be an integer of at least 1, got 0"),
    "normalize_expert_weights": ("yes", "normalize_expert_weights must be one of .* got 'yes'"),
    "expert_capacity_factor": (0.0, "expert_capacity_factor must be a number above 0 or None, got 0.0"),
    "min_expert_capacity": (-1, "min_expert_capacity must be an integer of at least 0, got -1"),
    "second_choice_noise": ("sometimes", "second_choice_noise must be one of .* got 'sometimes'"),
    "count_padding": (None, "count_padding must be one of .* got None"),
    "router_aux_loss_coef": (-0.1, "router_aux_loss_coef must be a number of at least 0, got -0.1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_option_is_named(name):
    value, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        moe_config(**{name: value})


def test_no_layers_with_experts_are_refused():
    with pytest.raises(ValueError, match=r"at least one, got \[\]"):
        moe_config(moe_layers=[])


def test_noise_without_a_second_choice_is_refused():
    for number in (1, 3):
        with pytest.raises(ValueError, match=f"second_choice_noise 'always' needs num_experts_per_tok 2, got {number}"):
            moe_config(num_experts_per_tok=number, second_choice_noise="always")


def test_another_decoder_is_refused():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4, "vocab_size": 16}
    config = MoeLlavaConfig(text_config={"model_type": "gemma", **sizes})
    with pytest.raises(ValueError, match=r"text_config.model_type 'gemma' is not supported, .*'llama'.*'stablelm'"):
        MoeLlavaForConditionalGeneration(config)


def test_reentrant_checkpointing_is_refused():
    with pytest.raises(ValueError, match="use_reentrant=True loses the gradients of the load balancing loss"):
        moe_model().activation_checkpointing_enable({"use_reentrant": True})


def test_a_layer_alone_is_refused():
    layer = moe_model().model.language_model.layers[0]
    with pytest.raises(ValueError, match="a block of experts needs `expert_routing`"):
        layer.mlp(torch.zeros(1, 2, tiny.HIDDEN))


def test_both_ids_and_embeddings_are_refused():
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds is needed, got both"):
        moe_model()(input_ids=torch.ones(1, 2).long(), inputs_embeds=torch.ones(1, 2, tiny.HIDDEN))
