"""What decoding leaves undone, and how often anything waits for the device: copies from it to the host.

On a CPU the copies are counted where a GPU would make them; the last tests ask CUDA itself, where there is one.
"""

import math
import warnings

import pytest
import tiny
import torch
from tiny import NAMES, NUM_LAYERS, PATTERN, Calls
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache

from roe_llava import RoeCache, attention_roe, cache_roe, decoder_roe, modeling_roe_llava

pytestmark = pytest.mark.usefixtures("no_gradients")

CACHES = {
    "routed": lambda model: RoeCache(model.config),
    "ordinary": lambda model: DynamicCache(),
    "static": lambda model: StaticCache(model.config, max_cache_len=64),
}
STOCK_CACHES = CACHES | {"routed": lambda model: DynamicCache(config=model.config)}


class ReadElements(TorchDispatchMode):
    """Counts what needs values on the host: single elements, and shapes that depend on values."""

    VALUES = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select)

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        index = args[1] if func.overloadpacket is torch.ops.aten.index else ()
        by_mask = any(one is not None and one.dtype == torch.bool for one in index)
        self.count += by_mask or func.overloadpacket in self.VALUES
        return func(*args, **(kwargs or {}))


class ReadTensors(TorchFunctionMode):
    """Counts whole tensors that go to the host, which no operator shows on a CPU."""

    WHOLE = (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__)

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in self.WHOLE:
            self.count += 1
            with torch._C.DisableTorchFunction(), torch.utils._python_dispatch._disable_current_modes():
                return func(*args, **(kwargs or {}))  # its elements are no copies more
        return func(*args, **(kwargs or {}))


def copies_of(call, *args, **kwargs) -> int:
    """How many copies from the device to the host a call would make."""
    with ReadTensors() as tensors, ReadElements() as elements:
        call(*args, **kwargs)
    return tensors.count + elements.count


def test_copies_are_counted():
    tensor, mask = torch.arange(3), torch.tensor([True, False, True])
    for one_copy in (
        lambda: tensor.tolist(),
        lambda: tensor.reshape(3, 1).tolist(),
        lambda: tensor[1].item(),
        lambda: int(tensor[0]),
        lambda: bool((tensor > 0).any()),
        lambda: 1 if mask.all() else 0,
        lambda: tensor[mask],
        lambda: mask.nonzero(),
        lambda: tensor.numpy(),
    ):
        assert copies_of(one_copy) == 1
    assert copies_of(lambda: tensor[[0, 2]] + tensor.sum() * 2) == 0


# ---------------------------------------- prefill


@pytest.mark.parametrize("cache", CACHES)
def test_prefill_copies_once_per_layer(family_model, cache):
    stock, inputs = tiny.stock_of(family_model), tiny.batch()
    theirs = copies_of(stock, **inputs, past_key_values=STOCK_CACHES[cache](stock))
    ours = copies_of(family_model, **inputs, past_key_values=CACHES[cache](family_model))
    assert ours - theirs == NUM_LAYERS


def test_prefill_copies_nothing_for_a_layer_without_a_router():
    model, inputs = tiny.tiny_model(tiny.tiny_config(routed_layers=[1, 3])), tiny.batch()
    assert copies_of(model, **inputs) - copies_of(tiny.stock_of(model), **inputs) == 2


def test_a_pinned_route_is_copied_once(model):
    inputs = tiny.batch()
    theirs = copies_of(tiny.stock_of(model), **inputs)
    for routes in (PATTERN, PATTERN.long(), PATTERN[0].tolist()):
        assert copies_of(model, **inputs, routes=routes) - theirs <= 2  # on a CPU looking for other values counts too


@pytest.mark.parametrize("bias", [math.inf, [0.1] * NUM_LAYERS, [[0.1] * NUM_LAYERS] * len(NAMES)])
def test_a_route_bias_is_copied_once(model, bias):
    inputs, given = tiny.batch(), torch.tensor(bias)
    more = copies_of(model, **inputs, route_bias=given) - copies_of(model, **inputs)
    assert more <= 2  # on a CPU looking for NaN counts too


def test_a_used_static_cache_is_asked_once_whether_it_is_empty(model):
    cache = StaticCache(model.config, max_cache_len=64)
    first = copies_of(model, **tiny.batch(), past_key_values=cache)
    cache.reset()
    assert copies_of(model, **tiny.batch(), past_key_values=cache) - first <= 1


# ---------------------------------------- decoding


def next_step(model, cache):
    """Arguments of a step behind the prompts `NAMES`, which fill a cache."""
    inputs = tiny.batch()
    model(**inputs, past_key_values=cache)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1).to(model.device)
    tokens = torch.arange(60, 60 + len(NAMES), device=model.device)[:, None]
    return {"input_ids": tokens, "attention_mask": mask, "past_key_values": cache}


@pytest.mark.parametrize("cache", CACHES)
def test_a_step_copies_no_more_than_stock_llava(family_model, cache):
    stock = tiny.stock_of(family_model)
    theirs = copies_of(stock, **next_step(stock, STOCK_CACHES[cache](stock)))
    assert copies_of(family_model, **next_step(family_model, CACHES[cache](family_model))) <= theirs


def copies_per_token(model, **how) -> float:
    """Copies that `generate` makes for a token more."""
    lengths = (4, 12)
    few, many = (
        copies_of(model.generate, **tiny.batch(), max_new_tokens=length, do_sample=False, **how) for length in lengths
    )
    return (many - few) / (lengths[1] - lengths[0])


def test_a_generated_token_copies_no_more_than_in_stock_llava(family_model):
    assert copies_per_token(family_model) <= copies_per_token(tiny.stock_of(family_model))


def test_a_step_of_beams_copies_once_which_beams_go_on(family_model):
    assert copies_per_token(family_model, num_beams=3) <= copies_per_token(tiny.stock_of(family_model), num_beams=3) + 1


@pytest.mark.parametrize("cache", CACHES)
def test_a_step_routes_nothing(model, monkeypatch, cache):
    language_model = model.model.language_model
    step = next_step(model, CACHES[cache](model))

    def never(*args, **kwargs):
        raise AssertionError("computed in decoding")

    # The route: routers, their question, what they read, the rows made of it.
    for layer in language_model.layers:
        layer.router.register_forward_pre_hook(never)
    language_model.routing_tokens.register_forward_pre_hook(never)
    monkeypatch.setattr(model.model, "segments_of", never)
    for name in ("checked_routes", "checked_route_bias", "default_segments"):
        monkeypatch.setattr(modeling_roe_llava, name, never)
    monkeypatch.setattr(decoder_roe, "routing_position_ids", never)
    monkeypatch.setattr(attention_roe.RoutingAttention, "__init__", never)
    monkeypatch.setattr(cache_roe.LayerRows, "__init__", never)
    # Nothing but one token per row, in attention and in rotary embeddings.
    positions = []
    language_model.rotary_emb.register_forward_pre_hook(
        lambda _, args, kwargs: positions.append(kwargs["position_ids"].shape[-1]), with_kwargs=True
    )
    mlps = [Calls(layer.mlp) for layer in language_model.layers]
    outputs = model(**step)
    assert outputs.router_logits is None and torch.equal(outputs.routes, PATTERN)
    assert positions == [1]
    kept = PATTERN.sum(0) if cache == "routed" else PATTERN.any(0) * len(NAMES)
    assert [mlp.tokens for mlp in mlps] == kept.tolist()


# ---------------------------------------- a GPU


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="asks CUDA what waits for it")


def waits_of(call, **kwargs) -> int:
    """How often a call waits for the GPU."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call(**kwargs)
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    return sum("synchronizing CUDA operation" in str(one.message) for one in heard)


def on_gpu(inputs):
    return {name: value.cuda() for name, value in inputs.items()}


@needs_cuda
def test_a_gpu_waits_once_per_layer_in_prefill(family_model):
    model, inputs = family_model.cuda(), on_gpu(tiny.batch())
    stock = tiny.stock_of(model).cuda()
    for one in (model, stock):
        one(**inputs)  # whatever is made only once
    assert waits_of(model, **inputs) - waits_of(stock, **inputs) <= NUM_LAYERS


@needs_cuda
def test_a_gpu_waits_no_more_for_a_step_than_in_stock_llava(family_model, monkeypatch):
    model, inputs = family_model.cuda(), tiny.batch()
    monkeypatch.setattr(tiny, "batch", lambda: on_gpu(inputs))
    stock = tiny.stock_of(model).cuda()
    theirs = waits_of(stock, **next_step(stock, DynamicCache(config=stock.config)))
    assert waits_of(model, **next_step(model, RoeCache(model.config))) <= theirs
