"""Every cache with every way of decoding: what is expected of each cell, how it is run, and the page made of it.

`python tests/matrix.py > docs/equivalence.md` with the package's parent on PYTHONPATH writes the page.
"""

import functools
import itertools

import tiny
import torch
from tiny import NAMES, PATTERN
from torch import nn
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

NEW = 6
CACHES = {
    "dynamic": "nothing asked for: `RoeCache`",
    "static": '`cache_implementation="static"`',
    "fp8": '`cache_implementation="quantized", cache_config={"backend": "fp8"}`',
    "offloaded": '`cache_implementation="offloaded"`, model on a CPU',
    "none": "`use_cache=False`",
    "handed in": "an empty `DynamicCache()` in `past_key_values`",
    "continued": "the `RoeCache` of an earlier turn in `past_key_values`, with the whole text",
    "continued, handed in": "likewise, the caller's own `DynamicCache()`",
}
MODES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "assisted": {},  # the assistant is made by `arguments_of`
    "returned sequences": {"num_beams": 3, "num_return_sequences": 2},
    "streaming": {},
    "embeddings": {},
}
BATCHES = {
    "one row": ["question"],
    "mixed routes": ["question", "two_images", "empty_question", "other_question"],
    "with and without images": ["text_only", "question", "one_token"],
}
LAYER_0 = ("kept", "skipped")
CELLS = list(itertools.product(CACHES, MODES, BATCHES, LAYER_0))
DRAFTING = {"prompt lookup": "prompt_lookup_num_tokens", "assisted": "assistant_model"}
CANNOT_CROP = {"static": "'static'", "fp8": "'quantized'"}


def refusal(cache: str, mode: str, batch: str) -> tuple[str, str] | None:
    """`None` where a cell equals the dynamic cache, else (pattern of the ValueError, what to use instead)."""
    if cache == "offloaded":
        return r"cache_implementation='offloaded' .* on the CPU: unset it", "use a GPU, or leave it unset"
    if mode in DRAFTING:
        way, rows = DRAFTING[mode], len(BATCHES[batch])
        if rows > 1:
            return rf"{way} with a batch of {rows}: .* call row by row", "use it row by row"
        if cache == "none":
            return rf"{way} with use_cache=False: .* Leave use_cache out", "use a cache"
        if cache in CANNOT_CROP:
            return rf"{way} with cache_implementation={CANNOT_CROP[cache]}: .*RoeCache", "use the dynamic cache"
        if cache.startswith("continued"):
            return rf"{way} with past_key_values that hold \d+ tokens: .* empty cache", "use an empty one and `routes=`"
    if cache.startswith("continued") and mode in ("beams", "returned sequences"):
        return r"holds routes of .*batch_repeat_interleave\(3\) before", "use its `batch_repeat_interleave(3)` before"
    return None


# ---------------------------------------- models and inputs


@functools.cache
def model_with_layer_0(state: str):
    """A tiny model whose routers keep, or skip, layer 0 for all `NAMES`, and follow `PATTERN` after it."""
    if state == "kept":
        return tiny.routed_model()
    return tiny.solve_routers(tiny.tiny_model(seed=3), tiny.batch(), routes_with_layer_0("skipped"))


def routes_with_layer_0(state: str):
    """(6, 4) bool."""
    return torch.cat([torch.full((len(NAMES), 1), state == "kept"), PATTERN[:, 1:]], dim=1)


@functools.cache
def assistant(state: str):
    return tiny.tiny_model(model_with_layer_0(state).config, seed=5)


def prompts(batch: str, mode: str) -> dict:
    """The model's inputs; for look-up with a text that repeats itself, so that there are drafts."""
    inputs = tiny.batch(BATCHES[batch])
    if mode == "prompt lookup" and batch == "one row":
        for name in ("input_ids", "attention_mask"):
            inputs[name] = torch.cat([inputs[name], inputs[name][:, -2:]], 1)
    return inputs


class Heard(BaseStreamer):
    """Keeps the tokens a streamer is given, (rows, tokens)."""

    def __init__(self):
        self.pieces = []

    def put(self, value):
        self.pieces.append(value if value.dim() == 2 else value[:, None])

    def end(self):
        self.tokens = torch.cat(self.pieces, 1)


def decode(model, inputs: dict, mode: str, state: str, **cache) -> tuple[torch.Tensor, object]:
    """New tokens (rows, NEW) of a way of decoding, and the cache it leaves; what is streamed is checked on the way."""
    inputs, arguments = dict(inputs), dict(MODES[mode])
    width = inputs["input_ids"].shape[1]
    if mode == "assisted":
        arguments["assistant_model"] = assistant(state)
    if mode == "streaming":
        arguments["streamer"] = Heard()
    if mode == "embeddings":
        inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
        width = 0
    outputs = model.generate(
        **inputs, **arguments, **cache, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True
    )
    if mode == "streaming":
        assert torch.equal(arguments["streamer"].tokens, outputs.sequences)
    return outputs.sequences[:, width:], getattr(outputs, "past_key_values", None)


CACHE_ARGUMENTS = {
    "dynamic": lambda: {},
    "static": lambda: {"cache_implementation": "static"},
    "fp8": lambda: {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}},
    "offloaded": lambda: {"cache_implementation": "offloaded"},
    "none": lambda: {"use_cache": False},
    "handed in": lambda: {"past_key_values": DynamicCache()},
}


# ---------------------------------------- one cell, and what it has to equal


def run(cache: str, mode: str, batch: str, state: str):
    """New tokens of a cell and its cache."""
    model, inputs = model_with_layer_0(state), prompts(batch, mode)
    if not cache.startswith("continued"):
        return decode(model, inputs, mode, state, **CACHE_ARGUMENTS[cache]())
    given = CACHE_ARGUMENTS["dynamic" if cache == "continued" else "handed in"]()
    whole, held = second_turn(model, inputs, state, given)
    whole.pop("pixel_values", None)  # the cache has them
    return decode(model, whole, mode, state, past_key_values=held)


def second_turn(model, inputs: dict, state: str, given: dict):
    """Inputs of a second turn after a greedy first one, and the cache the first one left."""
    answer, held = decode(model, inputs, "greedy", state, **given)
    more = torch.arange(40, 43).expand(answer.shape[0], -1)
    text = torch.cat([inputs["input_ids"], answer, more], 1)
    mask = nn.functional.pad(inputs["attention_mask"], (0, NEW + 3), value=1)
    return {**inputs, "input_ids": text, "attention_mask": mask}, held


@functools.cache
def expected(cache: str, mode: str, batch: str, state: str):
    """Tokens a cell has to give: the same way of decoding on the dynamic cache; see `ComputeAndSelect` for the others.

    Continued texts are computed anew along the routes of their first turn.
    """
    model, inputs = model_with_layer_0(state), prompts(batch, mode)
    if cache.startswith("continued"):
        whole, held = second_turn(model, inputs, state, {})
        return decode(model, whole, mode, state, routes=held.routes)[0]
    tokens, held = decode(model, inputs, mode, state)
    if cache in ("dynamic", "fp8"):
        count = MODES[mode].get("num_beams", 1)
        reference = computes_and_selects(model, held.routes[::count])
        return decode(reference, inputs, mode, state, **CACHE_ARGUMENTS[cache]())[0]
    return tokens


class ComputeAndSelect(nn.Module):
    """A stock decoder layer that all rows run, whatever their route; rows that skip it take the adapter after all.

    The plain computation that ours has to equal: no gathering, no routing tokens, every layer in the cache.
    """

    def __init__(self, stock, routed, keep):
        super().__init__()
        self.stock, self.adapter, self.norm, self.keep = stock, routed.adapter, routed.input_layernorm, keep

    def forward(self, hidden_states, **kwargs):
        full = self.stock(hidden_states, **kwargs)
        skip = hidden_states + self.adapter(self.norm(hidden_states))
        keep = self.keep.repeat_interleave(hidden_states.shape[0] // self.keep.shape[0])
        return torch.where(keep[:, None, None], full, skip)


def computes_and_selects(model, routes):
    """Stock LLaVA whose layers are those above, along routes (B, L)."""
    stock = tiny.stock_of(model)
    layers = stock.model.language_model.layers
    for index, routed in enumerate(tiny.layers_of(model)):
        layers[index] = ComputeAndSelect(layers[index], routed, routes[:, index])
    return stock


# ---------------------------------------- the page


def page() -> str:
    """docs/equivalence.md."""
    refused = {cell: refusal(*cell[:3]) for cell in CELLS}
    equal = sum(answer is None for answer in refused.values())
    lines = [
        "# Which caches go with which decoding",
        "",
        "Made by `tests/matrix.py` from the data that `tests/test_matrix.py` runs; do not edit.",
        "",
        f"{len(CELLS)} cells: {equal} equal, {len(CELLS) - equal} refused. *Equal*: token for token what the same way",
        "of decoding gives on the dynamic cache. The dynamic cache itself is compared with a stock LLaVA that computes",
        "every layer for every row and selects afterwards, and so is fp8, which rounds, on a cache that rounds alike.",
        "Every cell was run twice, with a layer 0 that all rows keep and with one that all rows skip; both agree.",
        "*Refused*: a `ValueError` that names the combination and what to use instead.",
        "",
        "Rows of a batch follow their own routes. `RoeCache` stores and computes a layer for the rows that keep it and",
        "no others. Static, quantised and handed-in caches cannot: **all rows compute a layer that any row keeps**,",
        "and rows that skip it throw the result away. A warning says so once. With any cache a layer that no row keeps",
        "is left out, so with one row, or rows that share a route, nothing is computed in vain. With fp8 the scale of",
        "a layer is taken from all rows of the first pass, so an answer may depend on its batch, as in stock LLaVA.",
        "`generate` does not compile with a static cache, as it would for stock LLaVA on a GPU.",
        "",
        "Attention is sdpa here. Eager and flex attention give the same (`test_attention_kernels.py`), compiled",
        "layers too (`test_compile.py`), and the batches that `group_by_route` makes (`test_grouping.py`).",
        "",
        "On a GPU an offloaded cache is a `RoeCache` too;",
        "`test_matrix.py::test_an_offloaded_cache_equals_the_dynamic_one` runs where there is one.",
    ]
    for cache, meaning in CACHES.items():
        lines += ["", f"## {cache.capitalize()}", "", f"{meaning[0].upper()}{meaning[1:]}.", ""]
        lines += [f"| | {' | '.join(BATCHES)} |", "|---|" + "---|" * len(BATCHES)]
        for mode in MODES:
            answers = [refused[cache, mode, batch, LAYER_0[0]] for batch in BATCHES]
            texts = ["equal" if answer is None else f"refused: {answer[1]}" for answer in answers]
            lines.append(f"| {mode} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
