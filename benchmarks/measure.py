"""Measures what `systems` lists: seconds of prefill and decoding against the base, memory, calls of routers.

Measuring only; `bench` is the command, `report` prints. Every system runs once per round, in a fresh order, and is
compared with the base of the same round, which had the same prompt.
"""

import inspect
import random
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from statistics import mean, median, quantiles

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .shapes import Subject
from .systems import BASE, REMOVED, System, counts_of, removed_models, systems_of
from .timing import PARTS, adapter_cost, ceiling, decoder_shares, share_of_ceiling, time_once

STOCK_PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")  # what is compiled of a stock layer
SHARE_REPEATS = 3  # how often the time in decoder layers is taken, per prompt


def measure(
    subject: Subject,
    grid: dict[int, Sequence[float]],
    rounds: dict[int, int],
    num_tokens: int,
    seed: int = 0,
    compiled: bool = False,
    progress: Callable[[Iterable, str], Iterable] = lambda items, _: items,
) -> dict:
    """Everything of a shape.

    Args:
        grid: batch size to the skip shares to measure there.
        rounds: batch size to the runs of every system there; prompts take turns, a round has one.
        num_tokens: decoding steps behind every prefill.
        seed: of the order in which systems run.
        compiled: compile the parts of all models' layers first.
        progress: wraps rounds to show how far they are; it gets a description too.
    Returns: see `measure_batch` for {"batches": {batch size: ...}}, beside sizes and settings.
    Raises: ValueError for shares that cannot be skipped, and for a model that cannot compile its layers.
    """
    for shares in grid.values():
        counts_of(shares, len(layers_of(subject.base)))
    removed = removed_models(subject, [share for shares in grid.values() for share in shares])
    if compiled:
        compile_layers(subject.roe, [subject.base, *removed.values()])
    result = {"sizes": sizes_of(subject), "adapter_cost": adapter_cost(subject.roe), "trained": subject.trained}
    result |= {"tokens": num_tokens, "seed": seed, "compiled": compiled}
    result["prompts"] = [prompt["input_ids"].shape[1] for prompt in subject.prompts(1)]
    result["batches"] = {}
    draw = random.Random(seed)
    for batch_size, shares in grid.items():
        systems = systems_of(subject, removed, shares, batch_size)
        prompts = subject.prompts(batch_size)
        turns = progress(range(rounds[batch_size]), f"batch {batch_size}, {len(systems)} systems")
        measured = measure_batch(systems, prompts, turns, num_tokens, result["adapter_cost"], draw, compiled)
        result["batches"][str(batch_size)] = {"rounds": rounds[batch_size], **measured}
    return result


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    return model.model.language_model.layers


def compile_layers(roe: PreTrainedModel, stock: Iterable[PreTrainedModel]) -> None:
    """Compile norms, attention and MLP of every layer; the RoE model says itself what can be compiled of it.

    Raises: ValueError if it does not.
    """
    if not hasattr(roe, "compile_layers"):
        name = type(roe).__name__
        raise ValueError(f"--compile needs a model with compile_layers(), this {name} has none: leave it out")
    roe.compile_layers()
    settings = {"dynamic": True}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        settings["recompile_limit"] = 64  # kinds of inputs, of all models together; torch gives up at 8
    for model in stock:
        for index, layer in enumerate(layers_of(model)):
            layer.register_forward_pre_hook(partial(hand_on_own_cache, index), with_kwargs=True)
            for part in STOCK_PARTS:
                getattr(layer, part).compile(**settings)


def hand_on_own_cache(index: int, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Give a stock layer its own part of the cache, as a RoE layer does: a graph of all of it serves one layer only."""
    from ..compile_roe import cache_of_layer

    return args, kwargs | {"past_key_values": cache_of_layer(kwargs.get("past_key_values"), index)}


def sizes_of(subject: Subject) -> dict:
    """What the models are made of."""
    text = subject.base.config.text_config
    return {
        "layers": text.num_hidden_layers,
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "heads": text.num_attention_heads,
        "key_value_heads": text.num_key_value_heads,
        "adapter_size": subject.roe.config.adapter_size,
        "image_tokens": subject.base.config.image_seq_length,
        "base_parameters": subject.base.num_parameters(),
        "roe_parameters": subject.roe.num_parameters(),
    }


def measure_batch(
    systems: Sequence[System],
    prompts: Sequence[dict[str, Tensor]],
    rounds: Iterable[int],
    num_tokens: int,
    cost: float,
    draw: random.Random,
    compiled: bool = False,
) -> dict:
    """One batch size.

    Args:
        systems: what runs, the base among it.
        prompts: inputs of the RoE model, one batch per kind of prompt.
        rounds: the numbers 0, 1, ...
        cost: of an adapter, over that of a layer.
        draw: gives every round its order.
        compiled: whether shapes seen first cost time.
    Returns: {"decoder_share": {part: share}, "systems": [one dict each: what it is, `probe`, and per part `summary`]}.
    """
    on_gpu = systems[0].model.device.type == "cuda"
    for prompt in prompts if on_gpu or compiled else []:
        for system in systems:
            time_once(system.model, system.inputs(prompt), num_tokens)
    probes = {system.name: probe(system, prompts[-1], num_tokens) for system in systems}
    base = next(system for system in systems if system.kind == BASE)
    timed = [base.inputs(prompt) for prompt in prompts] * SHARE_REPEATS
    decoder_share = decoder_shares(base.model, timed, num_tokens)
    runs: dict[str, list[dict]] = {system.name: [] for system in systems}
    for number in rounds:
        for system in draw.sample(systems, len(systems)):
            inputs = system.inputs(prompts[number % len(prompts)])
            runs[system.name].append(without_routes(time_once(system.model, inputs, num_tokens)))
    rows = []
    for system in systems:
        own = describe(system, runs[system.name]) | compared_memory(probes[system.name], probes[base.name])
        charged = 0.0 if system.kind == REMOVED else cost
        for part in PARTS:
            own[part] = summary(runs[system.name], runs[base.name], part, len(prompts))
            own[part] |= against_ceiling(own[part]["ratio"], own["skip_ratio"], charged, decoder_share[part])
        rows.append(own)
    return {"decoder_share": decoder_share, "systems": rows}


def without_routes(run: dict) -> dict:
    """A run with its share of skipped layers in place of the route."""
    routes = run.pop("routes")
    return run | {"skip_ratio": None if routes is None else skipped_share(routes)}


def skipped_share(routes: Tensor) -> float:
    """Share of (row, layer) pairs that a route (B, L) skips."""
    return int((~routes).sum()) / routes.numel()


def describe(system: System, runs: Sequence[dict]) -> dict:
    """What a system is, and the share of (row, layer) pairs it skipped."""
    own = {"name": system.name, "kind": system.kind, "rows": system.rows, "asked": list(system.asked)}
    if system.is_routed:
        own["skip_ratio"] = mean(run["skip_ratio"] for run in runs)
    else:
        own["skip_ratio"] = 0.0 if system.routes is None else skipped_share(system.routes)
    if system.routes is not None:
        own["skipped_layers"] = [[i for i, keep in enumerate(row) if not keep] for row in system.routes.tolist()]
        own["distinct_routes"] = len(set(map(tuple, own["skipped_layers"])))
    return own


# ------------------------------------------------------------------------------------------------------------- numbers


def summary(runs: Sequence[dict], base: Sequence[dict], part: str, num_prompts: int) -> dict:
    """Times of one part.

    Args:
        runs, base: of the system and of the base, round by round; round i had prompt i modulo `num_prompts`.
    Returns: `seconds` and `minimum` (mean over prompts of the median and the least over rounds), `ratio` (median over
        rounds of base / system) with `quartiles`, `ratio_of_minima`, and all `runs`.
    """
    own, theirs = ([run[part] for run in some] for some in (runs, base))
    ratios = [of_base / of_own for of_base, of_own in zip(theirs, own, strict=True)]
    by_prompt = [[times[first::num_prompts] for first in range(min(num_prompts, len(own)))] for times in (own, theirs)]
    minima = [mean(map(min, times)) for times in by_prompt]
    return {
        "seconds": mean(map(median, by_prompt[0])),
        "minimum": minima[0],
        "ratio": median(ratios),
        "quartiles": quartiles(ratios),
        "ratio_of_minima": minima[1] / minima[0],
        "runs": own,
    }


def quartiles(values: Sequence[float]) -> list[float]:
    """First and third quartile."""
    if len(values) < 2:
        return [values[0], values[0]]
    first, _, third = quantiles(values, n=4, method="inclusive")
    return [first, third]


def against_ceiling(ratio: float, skip_ratio: float, cost: float, decoder_share: float) -> dict:
    """What the ratio could be at most, and how near it comes: ratio over ceiling, and gain over possible gain."""
    best = ceiling(skip_ratio, cost, min(decoder_share, 1.0))
    return {"ceiling": best, "ratio_over_ceiling": ratio / best, "share_of_gain": share_of_ceiling(ratio, best)}


# -------------------------------------------------------------------------------------------------------------- memory


class RouterCalls:
    """Counts how often routers are asked, while the block lasts; 0 for a model without any."""

    def __init__(self, model: PreTrainedModel):
        self.calls = 0
        routers = [getattr(layer, "router", None) for layer in layers_of(model)]
        self.handles = [router.register_forward_hook(self._count) for router in routers if router is not None]

    def _count(self, *_):
        self.calls += 1

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


@torch.inference_mode()
def probe(system: System, prompt: dict[str, Tensor], num_tokens: int) -> dict:
    """One run that is not timed.

    Returns: `kv_bytes` after prefill, `kept_pairs` and `pairs` (of rows and layers), calls of routers in prefill and in
        all decoding, and `peak_bytes`, with weights, and `peak_extra_bytes`, without (`None` where the device keeps no
        count: the peak of a process is not that of one system).
    """
    device, on_gpu = system.model.device, system.model.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if on_gpu else 0
    with RouterCalls(system.model) as routers:
        outputs = system.model(**system.inputs(prompt), use_cache=True, logits_to_keep=1)
        in_prefill, cache = routers.calls, outputs.past_key_values
        kv_bytes = cache_bytes(cache)
        for _ in range(num_tokens):
            system.model(input_ids=prompt["input_ids"][:, -1:], past_key_values=cache, use_cache=True, logits_to_keep=1)
        in_decoding = routers.calls - in_prefill
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else None
    return {
        "kv_bytes": kv_bytes,
        **kept_pairs(system, outputs, prompt["input_ids"].shape[0]),
        "router_calls": {"prefill": in_prefill, "decode": in_decoding},
        "peak_bytes": peak,
        "peak_extra_bytes": peak - before if on_gpu else None,
    }


def cache_bytes(cache) -> int:
    """Bytes of the keys and values that a cache holds."""
    held = [tensor for layer in cache.layers if layer.is_initialized for tensor in (layer.keys, layer.values)]
    return sum(tensor.numel() * tensor.element_size() for tensor in held)


def kept_pairs(system: System, outputs, batch_size: int) -> dict[str, int]:
    """Pairs of a row and a layer that ran, and all of them; what was removed counts as not run."""
    routes = outputs.routes if system.is_routed else system.routes
    if routes is None:
        pairs = batch_size * len(layers_of(system.model))
        return {"kept_pairs": pairs, "pairs": pairs}
    return {"kept_pairs": int(routes.sum()), "pairs": routes.numel()}


def compared_memory(own: dict, base: dict) -> dict:
    """A probe with its bytes of keys and values over the base's, and whether these are exactly the pairs kept."""
    exact = own["kv_bytes"] * own["pairs"] == base["kv_bytes"] * own["kept_pairs"]
    return own | {"kv_share": own["kv_bytes"] / base["kv_bytes"], "kv_is_exact": exact}


__all__ = ["measure", "measure_batch"]
