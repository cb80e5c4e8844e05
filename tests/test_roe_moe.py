"""RoE on models with experts: which tokens reach which experts, what is told of them, and how both kinds learn."""

import math

import family
import pytest
import torch
from convert_helpers import change_json
from family import NAMES
from tiny import NUM_LAYERS, PATTERN, Calls, layers_of
from tiny_moe import moe_config
from transformers import TrainingArguments

from roe_llava import RoeMoeLlavaConfig, RoeMoeLlavaForConditionalGeneration, RoutingPhase
from roe_llava.choice_moe import ExpertRouting, Tokens, load_balancing_loss
from roe_llava.training.objective import Objective
from roe_llava.training.schedule import StageSchedule
from roe_llava.training.trainer import RoeTrainer, group_of

NAME = "moe_llava"
CLOSE = {"rtol": 0, "atol": 1e-5}
RATES = {"adapter": 1e-2, "router": 1e-2, "routing_tokens": 1e-2}
EXPERT_LAYERS = [0, 1, 3]


@pytest.fixture
def model():
    """Routes of `PATTERN`; experts in layers 0, 1 and 3, which every row, four rows and two rows keep."""
    return family.routed_model(NAME)


@pytest.fixture
def inputs():
    return family.batch(NAME)


def labels_of(inputs):
    return inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)


def learn_experts(model):
    for layer in EXPERT_LAYERS:
        layers_of(model)[layer].mlp.router.requires_grad_(True)


# ---------------------------------------- decoders


@pytest.mark.parametrize("decoder", ["mistral", "qwen2"])
@pytest.mark.parametrize("router", ["linear", "token_aware"])
def test_other_decoders_with_either_router_keep_their_base(decoder, router, inputs, no_gradients):
    text = moe_config(decoder).text_config
    model = family.tiny_model(NAME, text_config=text, router_type=router)
    expected = family.stock_of(model)(**inputs, output_router_logits=True)
    ours = model(**inputs, routes=[True] * NUM_LAYERS, output_router_logits=True)
    assert torch.equal(ours.logits, expected.logits)
    for one, other in zip(ours.expert_router_logits, expected.router_logits, strict=True):
        assert torch.equal(one, other)


def test_a_decoder_that_only_experts_know_is_refused():
    with pytest.raises(
        ValueError, match=r"'phi' is not supported, routed decoders are \['llama', 'mistral', 'qwen2'\]"
    ):
        family.tiny_model(NAME, text_config=moe_config("phi").text_config)


# ---------------------------------------- tokens that reach experts


def test_experts_see_the_rows_that_keep_their_layer_and_their_routing_tokens(model, inputs, no_gradients):
    counted = {layer: Calls(layers_of(model)[layer].mlp) for layer in EXPERT_LAYERS}
    model(**inputs)
    length = inputs["input_ids"].shape[1]
    assert {layer: calls.tokens for layer, calls in counted.items()} == {
        layer: int(PATTERN[:, layer].sum()) * (length + 2) for layer in EXPERT_LAYERS
    }


def test_routing_tokens_are_text_to_a_token_aware_router(model, inputs, no_gradients):
    seen = {}
    for layer in EXPERT_LAYERS:
        router = layers_of(model)[layer].mlp.router
        for kind in ("image", "text"):
            hook = lambda module, args, key=(layer, kind): seen.update({key: args[0].shape[0]})  # noqa: E731
            getattr(router, kind).register_forward_pre_hook(hook)
    model(**inputs)
    images = (inputs["input_ids"] == model.config.image_token_id).sum(1)
    others = inputs["input_ids"].shape[1] - images + 2
    for layer in EXPERT_LAYERS:
        kept = PATTERN[:, layer]
        assert seen[layer, "image"] == images[kept].sum() and seen[layer, "text"] == others[kept].sum()


@pytest.mark.parametrize("name", ["batched_mm", "grouped_mm"])
def test_experts_implementations_agree_along_mixed_routes(model, inputs, name, no_gradients):
    model.set_experts_implementation("eager")
    expected = model(**inputs)
    model.set_experts_implementation(name)
    ours = model(**inputs)
    assert torch.equal(ours.routes, expected.routes)
    torch.testing.assert_close(ours.logits, expected.logits, rtol=0, atol=2e-5)


def test_a_single_expert_serves_all_rows_that_keep_a_layer(model, inputs, no_gradients):
    routers = [Calls(layers_of(model)[layer].mlp.router.score) for layer in EXPERT_LAYERS]
    outputs = model(**inputs, single_expert=1, output_router_logits=True)
    assert outputs.routes.any() and not outputs.routes.all()
    assert not any(counted.calls for counted in routers)
    assert outputs.expert_indices == () and outputs.aux_loss == 0
    with pytest.raises(ValueError, match=r"single_expert must be an integer in \[0, 3\)"):
        model(**inputs, single_expert=3)


# ---------------------------------------- what is told


def test_choices_of_rows_that_skip_a_layer_are_marked(model, inputs, no_gradients):
    outputs = model(**inputs, output_router_logits=True)
    length = inputs["input_ids"].shape[1]
    for place, layer in enumerate(EXPERT_LAYERS):
        kept = PATTERN[:, layer]
        logits, experts = outputs.expert_router_logits[place], outputs.expert_indices[place]
        weights = outputs.expert_weights[place]
        assert logits.shape == (len(NAMES), length, 3) and experts.shape == weights.shape == (len(NAMES), length, 2)
        assert logits[~kept].isnan().all() and (experts[~kept] == -1).all() and (weights[~kept] == 0).all()
        assert logits[kept].isfinite().all() and (experts[kept] >= 0).all()
        torch.testing.assert_close(weights[kept].sum(-1), torch.ones(int(kept.sum()), length))
    for row, prompt in enumerate(NAMES):
        one = model(**family.alone(NAME, prompt), output_router_logits=True)
        real = inputs["attention_mask"][row].bool()
        for whole, alone in zip(outputs.expert_router_logits, one.expert_router_logits, strict=True):
            torch.testing.assert_close(alone[0], whole[row][real], rtol=1e-4, atol=5e-5, equal_nan=True)


def test_a_layer_that_no_row_runs_is_told_of_as_skipped(model, inputs, no_gradients):
    routes = torch.ones(NUM_LAYERS, dtype=torch.bool).index_fill(0, torch.tensor([1]), False)
    outputs = model(**inputs, routes=routes, output_router_logits=True)
    size = inputs["input_ids"].shape
    assert outputs.expert_router_logits[1].shape == (*size, 3) and outputs.expert_router_logits[1].isnan().all()
    assert outputs.expert_indices[1].shape == (*size, 2) and (outputs.expert_indices[1] == -1).all()
    assert outputs.expert_indices[0].min() >= 0


def test_nothing_of_experts_is_returned_unless_asked_for(model, inputs, no_gradients):
    outputs = model(**inputs)
    assert outputs.aux_loss is None and outputs.expert_indices is None and outputs.router_logits.shape[-1] == 2


# ---------------------------------------- balancing loss, capacity


@pytest.mark.parametrize("count_padding", [False, True])
def test_routing_tokens_enter_no_balancing_loss(model, inputs, count_padding, no_gradients):
    model.config.count_padding = count_padding
    base = family.stock_of(model)
    base.config.count_padding = count_padding
    ours = model(**inputs, route_bias=math.inf, output_router_logits=True).aux_loss
    torch.testing.assert_close(ours, base(**inputs, output_router_logits=True).aux_loss, **CLOSE)


def test_the_balancing_loss_is_that_of_the_rows_that_ran(model, inputs, no_gradients):
    outputs, expected = model(**inputs, output_router_logits=True), 0.0
    for place, layer in enumerate(EXPERT_LAYERS):
        kept = PATTERN[:, layer]
        logits = outputs.expert_router_logits[place][kept].flatten(0, 1)
        real = inputs["attention_mask"][kept].bool().flatten()
        expected = expected + load_balancing_loss(logits, logits.argmax(-1), real)
    torch.testing.assert_close(outputs.aux_loss, expected)


def test_added_tokens_count_nowhere_by_hand():
    real = torch.tensor([[0, 1, 1], [1, 1, 1], [0, 0, 1]]).bool()
    image = torch.tensor([[0, 1, 0], [1, 0, 0], [0, 0, 0]]).bool()
    part = Tokens((3, 3), real, image).of_rows(torch.tensor([0, 2]), 2)
    assert part.shape == (2, 5)
    assert part.counted(padding=False).tolist() == [False, True, True, False, False, False, False, True, False, False]
    assert part.counted(padding=True).tolist() == [True, True, True, False, False] * 2
    assert part.images(real.device)[1].tolist() == [1]
    everyone = Tokens((3, 3), None, None)
    assert everyone.counted(padding=False) is None and everyone.of_rows(torch.tensor([1]), 0).real is None
    assert everyone.of_rows(None, 1).counted(padding=False).tolist() == [True, True, True, False] * 3


def test_added_tokens_take_no_capacity():
    config = moe_config(num_experts=2, num_experts_per_tok=2, expert_capacity_factor=1.0)
    routing = ExpertRouting(config, True, Tokens((1, 4), None, None)).of_rows(None, 2)
    choice = routing.choose(torch.tensor([[2.0, 1.0]] * 6), 0)
    # ceil(4 / 2 * 2) = 4 places each: all 4 tokens of the batch, none of those that were added.
    assert choice.kept.tolist() == [[True, True]] * 4 + [[False, False]] * 2


# ---------------------------------------- training


def test_routing_alone_leaves_the_balance_of_experts_out_of_its_loss(model, inputs):
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(group_of(name) in RATES)
    model.train().model.routing_phase = RoutingPhase("soft")
    frozen = model(**inputs, labels=labels_of(inputs))
    assert frozen.aux_loss is None
    learn_experts(model)
    both = model(**inputs, labels=labels_of(inputs))
    assert both.aux_loss > 0
    torch.testing.assert_close(both.loss, frozen.loss + model.config.router_aux_loss_coef * both.aux_loss)
    pinned = [True] * NUM_LAYERS  # the token loss of the base, and no balance where nothing can move it
    assert model(**inputs, labels=labels_of(inputs), routes=pinned).aux_loss > 0
    routed = model(**inputs, labels=labels_of(inputs), routes=pinned).loss
    for layer in EXPERT_LAYERS:
        layers_of(model)[layer].mlp.router.requires_grad_(False)
    assert model(**inputs, labels=labels_of(inputs), routes=pinned).loss < routed


@pytest.mark.parametrize("base_learns", [False, True])
def test_the_trainer_adds_the_balance_where_the_base_learns(model, inputs, base_learns, tmp_path):
    rates = RATES | ({"base": 1e-3} if base_learns else {})
    arguments = TrainingArguments(tmp_path, max_steps=4, report_to=[], use_cpu=True)
    trainer = RoeTrainer(model, schedule=StageSchedule(), objective=Objective(0.3), rates=rates, args=arguments)
    model.train().model.routing_phase = RoutingPhase("soft")
    trainer.state.max_steps = 4
    losses = []
    for coefficient in (0.0, 10.0):
        model.config.router_aux_loss_coef = coefficient
        losses.append(trainer.compute_loss(model, inputs | {"labels": labels_of(inputs)}))
    assert (losses[1] > losses[0] + 1) if base_learns else torch.equal(losses[1], losses[0])


def test_frozen_experts_drop_no_tokens_in_training(model, inputs, monkeypatch):
    seated = []
    monkeypatch.setattr(ExpertRouting, "seated", lambda self, logits, experts: seated.append(1) or experts >= 0)
    model.config.expert_capacity_factor = 0.3
    model.requires_grad_(False).train()
    model(**inputs, routes=[True] * NUM_LAYERS)
    assert not seated
    learn_experts(model)
    model(**inputs, routes=[True] * NUM_LAYERS)
    assert len(seated) == len(EXPERT_LAYERS)


def test_routers_of_experts_are_parameters_of_the_base(model):
    groups = {name: group_of(name) for name, _ in model.named_parameters() if "router" in name}
    experts = [name for name in groups if ".mlp.router." in name]
    assert len(experts) == len(EXPERT_LAYERS) * len([*layers_of(model)[0].mlp.router.parameters()])
    assert {groups.pop(name) for name in experts} == {"base"} and set(groups.values()) == {"router"}
    assert len(groups) == NUM_LAYERS


def test_gradients_under_checkpointing_are_those_without(model, inputs):
    found = []
    model.config.expert_capacity_factor = 0.6
    model.train().model.routing_phase = RoutingPhase("soft")
    for is_checkpointing in (False, True):
        if is_checkpointing:
            model.activation_checkpointing_enable()
        model.zero_grad()
        torch.manual_seed(3)
        model(**inputs, labels=labels_of(inputs), use_cache=False).loss.backward()
        found.append({name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None})
    assert found[0].keys() == found[1].keys() and any(".mlp.router." in name for name in found[0])
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-5, atol=1e-7)


# ---------------------------------------- on the disk, refusals


def test_both_kinds_of_routers_stay_in_float32(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = RoeMoeLlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    dtypes = {name: one.dtype for name, one in loaded.named_parameters()}
    exact = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert exact == {name for name in dtypes if ".router." in name or "routing_tokens" in name}
    assert loaded(**family.batch(NAME)).routes.shape == PATTERN.shape


def test_the_experts_implementation_of_a_loaded_base_is_kept(model, tmp_path):
    from roe_llava.convert.adapter_file import save_adapter

    base = family.stock_of(model)
    base.save_pretrained(tmp_path / "base")
    adapter = save_adapter(model, model.config, tmp_path / "adapter", base=tmp_path / "base")
    base.set_experts_implementation("batched_mm")
    made = RoeMoeLlavaForConditionalGeneration.from_base(base, adapter)
    assert layers_of(made)[0].mlp.experts.config._experts_implementation == "batched_mm"


@pytest.mark.parametrize("name", ["eager", "batched_mm", "grouped_mm"])
def test_an_experts_implementation_is_taken_when_loading(model, tmp_path, name):
    model.save_pretrained(tmp_path)
    loaded = RoeMoeLlavaForConditionalGeneration.from_pretrained(tmp_path, experts_implementation=name)
    assert layers_of(loaded)[0].mlp.experts.config._experts_implementation == name


def test_missing_experts_are_said_to_be_experts(model, tmp_path):
    model.config.moe_layers = [0, 1]
    model.save_pretrained(tmp_path)
    change_json(tmp_path / "config.json", moe_layers=[0, 1, 2])
    with pytest.raises(ValueError, match=r"mlp\.experts.* does moe_layers name other layers than were saved"):
        RoeMoeLlavaForConditionalGeneration.from_pretrained(tmp_path)


def test_a_frozen_route_is_refused():
    config = {"text_config": moe_config().text_config, "skipped_layers": [1]}
    with pytest.raises(ValueError, match="no route can be frozen into a model with experts yet"):
        RoeMoeLlavaConfig(**config)


@pytest.mark.parametrize("fields", [{"num_experts": 1}, {"routed_layers": [9]}, {"moe_layers": [9]}])
def test_fields_of_both_kinds_are_checked(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        RoeMoeLlavaConfig(**{"text_config": moe_config().text_config, **fields})


def test_what_splits_or_compiles_layers_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match="compile_layers is not supported for RoE on a model with experts"):
        model.compile_layers()
    model.save_pretrained(tmp_path)
    for load in (RoeMoeLlavaForConditionalGeneration.from_pretrained, RoeMoeLlavaForConditionalGeneration._load):
        with pytest.raises(ValueError, match="tp_plan='auto' is not supported"):
            load(tmp_path, tp_plan="auto")
