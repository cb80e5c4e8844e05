"""Compiling the parts of the layers: one graph serves all layers, all routes and every generated token.

A route decides which parts run and for which rows, so a model, or a layer, compiled whole would be compiled again for
every route. Attention, MLP and the rest are the same for all routes but for the number of rows.
"""

import inspect

import torch
from torch import Tensor, nn
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp", "adapter")
# Kinds of graphs a part may need: prefill, decoding, continued texts; one row, several; with and without padding;
# windows that are full or not yet; each kind of cache. Torch stops compiling a part at 8.
MOST_GRAPHS = 64
TRACED_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)


class RoeCompileMixin:
    """`compile_layers`."""

    def compile_layers(self, **compile_arguments) -> None:
        """Compile the norms, attention, MLP and adapter of every decoder layer, in place, with `Module.compile`.

        Routes, routers and caches stay as they are; so do parameters and their names. Graphs are made at the first
        calls: one for prefill and one for decoding, again when there are several rows instead of one, and for masks
        where there was no padding; not per layer, route, length or token.

        Compiled arithmetic rounds differently. Where two tokens, or the two logits of a router, are nearly equal, the
        other one may win.

        Limits: quantised and offloaded caches are updated between two graphs instead of inside one, and once hidden
        states or attentions were asked for, Transformers listens between graphs too; `fullgraph=True` then fails. A
        copy of the model, and a saved one, is not compiled. With CUDA graphs (`mode="reduce-overhead"`) results live in
        memory that the next step overwrites: not for a cache that grows. Where torch.compile has no `recompile_limit`,
        mixed batches may need more than `torch._dynamo.config.recompile_limit` graphs of attention, and what is beyond
        runs uncompiled: raise it.

        Args:
            compile_arguments: as of `torch.compile`. `dynamic=True` unless given, as lengths and rows vary, and where
                torch has it `recompile_limit`. Without a C++ compiler on a CPU, pass `backend="aot_eager"`.
        """
        defaults = {"dynamic": True}
        if "recompile_limit" in inspect.signature(torch.compile).parameters:
            defaults["recompile_limit"] = MOST_GRAPHS
        for layer in self.model.language_model.layers:
            for part in (getattr(layer, name) for name in PARTS):
                if part is not None:  # a layer that always runs has no adapter, one that is baked out nothing else
                    part.compile(**defaults | compile_arguments)


def is_compiled(module: nn.Module) -> bool:
    """Whether `Module.compile` was called."""
    return module._compiled_call_impl is not None


class LayerCache:
    """One layer of a cache where attention expects the whole cache.

    A graph that picked its layer out of the cache would be good for that layer alone.
    """

    def __init__(self, layer):
        self.layer = layer

    def update(self, keys: Tensor, values: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        return self.layer.update(keys, values)


class UntracedCache:
    """A cache whose update no graph can hold: compilation stops before it and starts again behind it."""

    def __init__(self, cache):
        self.cache = cache

    @torch.compiler.disable
    def update(self, keys: Tensor, values: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        return self.cache.update(keys, values, layer_idx)


def cache_of_layer(cache, layer_idx: int):
    """What stands for a cache (or `None`) in a compiled layer."""
    if cache is None:
        return None
    while cache.layer_class_to_replicate is not None and len(cache.layers) <= layer_idx:
        cache.layers.append(cache.layer_class_to_replicate())  # as its `update` does
    layer = cache.layers[layer_idx]
    return LayerCache(layer) if type(layer) in TRACED_LAYERS and not cache.offloading else UntracedCache(cache)


__all__ = ["RoeCompileMixin"]
