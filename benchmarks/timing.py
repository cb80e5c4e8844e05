"""Prefill and decoding time of a RoE-LLaVA against its base, in one process on the same inputs.

Measuring only: others print.
"""

import time
from collections.abc import Sequence
from statistics import median

import torch
from torch import nn
from transformers import BatchFeature, PreTrainedModel

PARTS = ("prefill", "decode")
WARM_UP = 3  # questions asked before the clock counts


def ceiling(skip_ratio: float, adapter_cost: float, decoder_share: float = 1.0) -> float:
    """Best possible speed-up: skipped layers cost what their adapters cost, everything else stays as it is.

    Args:
        skip_ratio: share s of (example, layer) pairs skipped, in [0, 1].
        adapter_cost: cost a of an adapter over the cost of a layer, 0 or more.
        decoder_share: share d of the base's time that is spent in decoder layers, in [0, 1].
    Returns: 1 / (1 - d s (1 - a)); the routers and routing tokens are not in it, they are ours to pay.
    Raises: ValueError if a share is outside [0, 1], or the cost negative.
    """
    for name, share in {"skip_ratio": skip_ratio, "decoder_share": decoder_share}.items():
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"{name} must lie in [0, 1], got {share}")
    if not adapter_cost >= 0.0:
        raise ValueError(f"adapter_cost must not be negative, got {adapter_cost}")
    saved = decoder_share * skip_ratio * (1 - adapter_cost)
    return 1 / (1 - saved) if saved < 1 else float("inf")


def share_of_ceiling(ratio: float, best: float) -> float | None:
    """(ratio - 1) / (ceiling - 1); `None` where nothing was skipped, so that there was nothing to gain."""
    return (ratio - 1) / (best - 1) if best > 1 else None


def adapter_cost(roe: PreTrainedModel) -> float:
    """Parameters of the skip path (adapter and norm) over those of the layer it replaces, from a routed layer."""
    layer = next(layer for layer in roe.model.language_model.layers if layer.router is not None)
    sizes = {name: parameter.numel() for name, parameter in layer.named_parameters()}
    full = sum(size for name, size in sizes.items() if not name.startswith(("adapter.", "router.")))
    skip = sum(size for name, size in sizes.items() if name.startswith(("adapter.", "input_layernorm.")))
    return skip / full


def now(device: torch.device) -> float:
    """Seconds, after the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


@torch.inference_mode()
def time_once(model: PreTrainedModel, inputs: BatchFeature, num_tokens: int) -> dict:
    """Seconds for one prompt: `prefill` is a forward pass over it, `decode` one generated token behind its cache.

    The tokens fed are the prompt's last one over and over, so that every model does the same steps.
    Returns: {"prefill", "decode", "routes"}, routes `None` for a model that has none.
    """
    token = inputs["input_ids"][:, -1:]
    start = now(model.device)
    outputs = model(**inputs, use_cache=True, logits_to_keep=1)
    prefilled = now(model.device)
    cache = outputs.past_key_values
    for _ in range(num_tokens):
        model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
    done = now(model.device)
    routes = getattr(outputs, "routes", None)
    return {"prefill": prefilled - start, "decode": (done - prefilled) / num_tokens, "routes": routes}


class LayerClock:
    """Seconds between entering a model's first decoder layer and leaving its last, added up over forward passes."""

    def __init__(self, layers: nn.ModuleList):
        self.seconds, self.device = 0.0, next(layers.parameters()).device
        self.handles = [
            layers[0].register_forward_pre_hook(self._enter),
            layers[-1].register_forward_hook(self._leave),
        ]

    def _enter(self, *_):
        self.seconds -= now(self.device)

    def _leave(self, *_):
        self.seconds += now(self.device)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


@torch.inference_mode()
def decoder_shares(model: PreTrainedModel, prompts: Sequence[BatchFeature], num_tokens: int) -> dict[str, float]:
    """Share of a stock model's time spent in its decoder layers, prefill and decoding apart (medians over prompts)."""
    shares = {part: [] for part in PARTS}
    with LayerClock(model.model.language_model.layers) as clock:
        for inputs in prompts:
            clock.seconds = 0.0
            start = now(model.device)
            cache = model(**inputs, use_cache=True, logits_to_keep=1).past_key_values
            shares["prefill"].append(clock.seconds / (now(model.device) - start))
            clock.seconds = 0.0
            start = now(model.device)
            for _ in range(num_tokens):
                token = inputs["input_ids"][:, -1:]
                model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
            shares["decode"].append(clock.seconds / (now(model.device) - start))
    return {part: median(values) for part, values in shares.items()}


def compare_times(
    base: PreTrainedModel,
    roe: PreTrainedModel,
    prompts: Sequence[tuple[BatchFeature, BatchFeature]],
    num_tokens: int = 16,
    repeats: int = 7,
    progress=iter,
) -> dict:
    """Batch-1 times of both models, interleaved, with learned routes.

    Args:
        base, roe: stock model and the same model with routing.
        prompts: the same questions as inputs of the one and of the other.
        num_tokens: decoding steps per prompt.
        repeats: runs of each model per prompt, the first of a pair by turns; the median counts.
        progress: wraps the list of prompts, to show how far it is.
    Returns: per part ("prefill", "decode"): seconds of both (mean over prompts), `ratio` base / RoE, `decoder_share`,
        `ceiling` and `share_of_ceiling`; and the sample's `skip_ratio`, `adapter_cost` and sizes.
    """
    for of_base, of_roe in prompts[:WARM_UP]:
        time_once(base, of_base, num_tokens)
        time_once(roe, of_roe, num_tokens)
    seconds = {(name, part): [] for name in ("base", "roe") for part in PARTS}
    skipped = []
    for of_base, of_roe in progress(prompts):
        runs = {"base": [], "roe": []}
        pair = [("base", base, of_base), ("roe", roe, of_roe)]
        for _ in range(repeats):
            for name, model, inputs in pair:
                runs[name].append(time_once(model, inputs, num_tokens))
            pair.reverse()
        for name, part in seconds:
            seconds[name, part].append(median(run[part] for run in runs[name]))
        skipped.append(1 - runs["roe"][0]["routes"].double().mean().item())
    shares = decoder_shares(base, [of_base for of_base, _ in prompts], num_tokens)
    skip_ratio, cost = sum(skipped) / len(skipped), adapter_cost(roe)
    result = {"questions": len(prompts), "repeats": repeats, "tokens": num_tokens, "batch_size": 1}
    result |= {"skip_ratio": skip_ratio, "adapter_cost": cost}
    for part in PARTS:
        result[part] = compared(seconds["base", part], seconds["roe", part], skip_ratio, cost, shares[part])
    return result


def compared(base: Sequence[float], roe: Sequence[float], skip_ratio: float, cost: float, decoder_share: float) -> dict:
    """Times of one part, their ratio, and what the ratio could be at most."""
    ratio, best = sum(base) / sum(roe), ceiling(skip_ratio, cost, decoder_share)
    return {
        "base_seconds": sum(base) / len(base),
        "roe_seconds": sum(roe) / len(roe),
        "ratio": ratio,
        "decoder_share": decoder_share,
        "ceiling": best,
        "share_of_ceiling": share_of_ceiling(ratio, best),
    }


__all__ = ["adapter_cost", "ceiling", "compare_times", "decoder_shares", "share_of_ceiling", "time_once"]
