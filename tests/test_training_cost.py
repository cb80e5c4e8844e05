"""docs/training_cost.md is what its function writes, and the activations it reckons with are those autograd saves."""

import pytest
import tiny
import torch

from roe_llava import RoutingPhase
from roe_llava.benchmarks import training_cost as cost
from roe_llava.training.trainer import group_of


def test_the_page_is_what_the_function_writes():
    assert cost.PAGE.read_text() == cost.page_text()


@pytest.fixture(scope="module")
def counts():
    return cost.counts_of("7B")


def test_parameters_are_those_of_the_model(counts):
    """DESIGN: 269 M new ones, an adapter 4.1 % of a layer; a router has 2 x 2 D weights, and there are two tokens."""
    hidden, ffn, layers, _ = cost.SIZES["7B"]
    assert counts.adapters == layers * 2 * hidden * 1024
    assert counts.new == counts.adapters + layers * 4 * hidden + 2 * hidden
    assert counts.layers == layers * (4 * hidden**2 + 3 * hidden * ffn + 2 * hidden)
    assert counts.lora == layers * cost.LORA_RANK * (4 * 2 * hidden + 3 * (hidden + ffn))
    assert cost.trained_parameters(counts, "full") == counts.total - counts.tower


def test_sharding_divides_weights_gradients_and_optimizer_state(counts):
    alone, shared = (cost.memory(counts, "full", setup, True) for setup in ("one GPU", "FSDP2"))
    for part in ("weights", "gradients", "optimizer"):
        assert alone[part] == pytest.approx(8 * shared[part])
    assert alone["activations"] == shared["activations"]
    assert sum(value for name, value in shared.items() if name != "total") == pytest.approx(shared["total"])


def test_training_the_base_costs_a_third_more_than_not(counts):
    """Forward, gradients of inputs, gradients of weights: 3 parts against 2, beside attention, adapters and tower."""
    ratio = cost.step_flops(counts, "full", False) / cost.step_flops(counts, "frozen", False)
    assert 1.35 < ratio < 1.5
    assert cost.hours(counts, "full", "FSDP2", False) == pytest.approx(cost.hours(counts, "full", "one GPU", False) / 8)


def saved_bytes(hidden: int, ffn: int, adapter: int, num_layers: int, frozen: bool, checkpointing: bool) -> float:
    """Bytes per token that autograd saves in a forward pass under bf16, weights and their copies left out."""
    text = {"hidden_size": hidden, "intermediate_size": ffn, "num_key_value_heads": 4}
    model = tiny.tiny_model(tiny.tiny_config(num_layers=num_layers, text=text, adapter_size=adapter)).train()
    model.model.routing_phase = RoutingPhase("soft")
    if frozen:
        model.requires_grad_(False).bfloat16()
        for name, parameter in model.named_parameters():
            if group_of(name) != "base":
                parameter.requires_grad_(True).data = parameter.data.float()
    if checkpointing:
        model.activation_checkpointing_enable()
    weights, seen = {parameter.numel() for parameter in model.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.nbytes() // tensor.element_size() not in weights:
            seen[storage.data_ptr()] = tensor  # kept, so that no other takes its place
        return tensor

    ids = torch.randint(3, 100, (1, 61))  # a prime number of tokens: no activation is as large as a weight
    segments = (torch.arange(61) > 30).long()[None]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        outputs = model(input_ids=ids, routing_segments=segments)
    assert outputs.logits.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in seen.values()) / 63


def per_layer(*widths: int, **settings) -> float:
    return (saved_bytes(*widths, 3, **settings) - saved_bytes(*widths, 1, **settings)) / 2


@pytest.mark.parametrize("kind", ["frozen", "trained"])
def test_activations_are_what_autograd_saves(kind):
    """By the slope over each width: what does not grow with a width is small in a large model."""
    settings = {"frozen": kind == "frozen", "checkpointing": False}
    small = per_layer(64, 96, 24, **settings)
    slopes = [
        (per_layer(128, 96, 24, **settings) - small) / 64,
        (per_layer(64, 160, 24, **settings) - small) / 64,
        (per_layer(64, 96, 56, **settings) - small) / 32,
    ]
    assert slopes == pytest.approx(cost.ACTIVATION_BYTES[kind], rel=0.05)
    settings["checkpointing"] = True
    growth = (per_layer(128, 96, 24, **settings) - per_layer(64, 96, 24, **settings)) / 64
    assert growth == pytest.approx(cost.CHECKPOINT_BYTES[kind], rel=0.05)
