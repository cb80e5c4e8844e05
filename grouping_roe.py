"""`group_by_route`: many prompts, generated in batches whose rows take equal or near routes.

A step of decoding reads a layer's weights as soon as one row of the batch keeps it, so a batch of mixed routes pays for
nearly every layer, however much each row skips. Here prompts are prefilled one by one into a pool, which shows their
routes, and leave it in batches that share most layers. Nothing is fed twice: the caches of a batch's rows are joined,
and the logits of the prefills are what `generate` chooses the first tokens from.

B batch, L decoder layers, S sequence, V vocabulary.
"""

import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin
from transformers.generation import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast

from .cache_roe import RoeCache
from .generation_roe import RoeGenerationMixin, check_settings

# A prompt's own, which hold for it alone in place of the call's.
ROUTING_ARGUMENTS = ("routes", "route_bias", "skip_ratio")
BATCHED_MODES = (
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
)
# Settings that look at every token of a row, padding included: with them a batch's prompts are of one length.
WHOLE_TEXT_SETTINGS = {
    "repetition_penalty": (None, 1.0),
    "encoder_repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "watermarking_config": (None,),
}
OF_A_PROMPT = (
    "inputs",
    "input_ids",
    "attention_mask",
    "pixel_values",
    "pixel_values_videos",
    "image_sizes",
    "image_sizes_videos",
    "batch_num_images",
    "routing_segments",
)
UNSUPPORTED_INPUTS = ("past_key_values", "inputs_embeds", "position_ids", "mm_encoder_outputs", "labels")
UNSUPPORTED_ARGUMENTS = {
    **dict.fromkeys(UNSUPPORTED_INPUTS, "prompts are input_ids with their images, and make their own caches"),
    "streamer": "several rows are written at once. Call generate prompt by prompt",
    "assistant_model": "drafts are for one row. Call generate prompt by prompt",
    "stopping_criteria": "they end a row where its tokens do not show it. End rows with eos_token_id or max_new_tokens",
    "prefix_allowed_tokens_fn": "it is told a row's number in a batch, not the prompt's. Give a logits_processor",
    "negative_prompt_ids": "a second prompt would take a route of its own",
    "custom_generate": "it could not be told the routes",
}


@dataclass
class PooledPrompt:
    """A prompt that waits for its batch.

    Attributes:
        number: its place in the caller's order.
        input_ids: (1, S).
        logits: (1, 1, V) what follows the prompt.
        cache: all of the prompt, one row; `None` once it is joined with others.
    """

    number: int
    input_ids: Tensor
    logits: Tensor
    cache: RoeCache | None

    def __post_init__(self):
        # Bit i is set where layer i is kept. Read from the host's lists: no copy from the device.
        self.route = sum(rows.keep[0] << layer for layer, rows in enumerate(self.cache.rows))

    @property
    def length(self) -> int:
        return self.input_ids.shape[1]


class PrefilledCache(RoeCache):
    """A cache of whole prompts beside the logits that follow them, which `generate` reads before it feeds anything.

    Attributes:
        next_logits: (B, 1, V); `None` once they are read.
    """

    next_logits: Tensor | None = None


class RoeGroupingMixin(RoeGenerationMixin):
    """`group_by_route`, on top of `generate`."""

    @torch.no_grad()
    def group_by_route(
        self,
        prompts: Iterable[Mapping],
        batch_size: int = 8,
        pool_size: int = 64,
        progress: Callable[[Iterable], Iterable] = iter,
        **arguments,
    ) -> list[Tensor]:
        """Generate for many prompts, in batches of rows whose routes are equal or near.

        Without sampling every prompt gets what `generate` gives it alone, up to the rounding of another batch size.
        With sampling it does not: all rows of a batch draw from one generator.

        Args:
            prompts: what a processor makes of one prompt each: `input_ids` (1, S) and, as needed, `attention_mask`
                without padding, `pixel_values`, `routing_segments`. `routes`, `route_bias` (L,) or `skip_ratio` among
                them hold for that prompt in place of the call's. Any iterable; prompts are taken as the pool empties.
            batch_size: rows per batch, times beams or returned sequences.
            pool_size: prompts that are prefilled and wait, at least `batch_size`. More of them find nearer routes; the
                keys and values of all of them are in memory.
            progress: wraps `prompts`, to show how far it is, e.g. `tqdm`.
            arguments: for `generate`. With a penalty on repeated tokens, a `logits_processor`, `max_length` or
                `min_length`, which count padding, only prompts of one length share a batch.
        Returns: per prompt, in the caller's order, its tokens (S + new,), those of the prompt first; (n, S + new) with
            `num_return_sequences` n above 1.
        Raises: ValueError for a prompt that is padded or not one row, and for arguments that have no meaning in batches
            which the caller did not make; the message says what to do instead.
        """
        check_sizes(batch_size, pool_size)
        check_prompts(prompts)
        config = self.checked_settings(arguments)
        same_length = needs_same_length(config, arguments, self.generation_config)
        to_prefill = set(ROUTING_ARGUMENTS) | set(inspect.signature(self.forward).parameters)
        of_prefill = {name: value for name, value in arguments.items() if name in to_prefill}
        of_decoding = {name: value for name, value in arguments.items() if name not in to_prefill}
        waiting, pool, results = enumerate(progress(prompts)), [], {}
        while True:
            for number, prompt in itertools.islice(waiting, pool_size - len(pool)):
                pool.append(self.prefill_prompt(number, prompt, of_prefill))
            if not pool:
                return [results[number] for number in range(len(results))]
            lengths = [row.length if same_length else 0 for row in pool]
            chosen = choose_batch([row.route for row in pool], lengths, batch_size)
            batch = [pool[place] for place in chosen]
            pool = [row for place, row in enumerate(pool) if place not in chosen]
            written = self.continue_batch(batch, config, of_decoding)
            results |= {row.number: tokens for row, tokens in zip(batch, written, strict=True)}

    def checked_settings(self, arguments: dict) -> GenerationConfig:
        """What `generate` will make of the arguments and the model's defaults.

        Raises: ValueError for what `group_by_route` does not support, and for unknown names.
        """
        for name in OF_A_PROMPT:
            if arguments.get(name) is not None:
                raise ValueError(f"{name} is given for all prompts, and belongs to one: put it into each of `prompts`")
        for name, reason in UNSUPPORTED_ARGUMENTS.items():
            if arguments.get(name) is not None:
                raise ValueError(f"group_by_route does not take {name}: {reason}")
        config, others = self._prepare_generation_config(**{"generation_config": None, **arguments})
        known = {*inspect.signature(self.forward).parameters, *inspect.signature(GenerationMixin.generate).parameters}
        if unknown := sorted(set(others) - known - set(ROUTING_ARGUMENTS)):
            raise ValueError(f"group_by_route and generate know no argument {', '.join(unknown)}: is it misspelt?")
        check_settings(config, self.device)
        check_config(config)
        return config

    def prefill_prompt(self, number: int, prompt: Mapping, arguments: dict) -> PooledPrompt:
        """A prompt's cache and next logits, made as `generate` makes them when it is given the prompt alone."""
        check_prompt(number, prompt, inspect.signature(self.forward).parameters)
        if any(prompt.get(name) is not None for name in ROUTING_ARGUMENTS):
            arguments = {name: value for name, value in arguments.items() if name not in ROUTING_ARGUMENTS}
        # Whatever the model's own settings are. A length only so that nobody is warned that there is none.
        one_row = {"num_beams": 1, "num_return_sequences": 1, "max_new_tokens": 1, "max_length": None}
        one_row |= {"use_cache": True, "cache_implementation": None}
        try:
            outputs = self.generate(**{**arguments, **prompt}, **one_row, custom_generate=prefill_only)
        except ValueError as error:
            error.add_note(f"(prompt {number} of group_by_route)")
            raise
        return PooledPrompt(number, prompt["input_ids"], outputs.logits[:, -1:], outputs.past_key_values)

    def continue_batch(self, rows: Sequence[PooledPrompt], config: GenerationConfig, arguments: dict) -> list[Tensor]:
        """What `generate` gives each of some prefilled prompts; see `group_by_route`."""
        inputs = join_prompts(rows, self.config, max(config.num_beams, config.num_return_sequences))
        sequences = self.generate(**inputs, **arguments)
        texts = sequences.view(len(rows), config.num_return_sequences, -1)
        results = []
        for row, text in zip(rows, texts, strict=True):
            text = text[:, inputs["input_ids"].shape[1] - row.length :]
            text = text[:, : row.length + new_length(text[:, row.length :], config.eos_token_id)].clone()
            results.append(text if config.num_return_sequences > 1 else text[0])
        return results

    def _prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs):
        # What every way of decoding calls first, to have logits to choose from: a `PrefilledCache` brings them along.
        cache = model_kwargs.get("past_key_values")
        logits = getattr(cache, "next_logits", None)
        if logits is None:
            return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)
        cache.next_logits = None
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)


def prefill_only(model, input_ids, generation_config, logits_processor=None, stopping_criteria=None, **model_kwargs):
    """A way of decoding for `generate(custom_generate=)` that writes nothing: the outputs of the prefill.

    Raises: ValueError if the prompt is padded.
    """
    mask = model_kwargs.get("attention_mask")
    if mask is not None and not bool(mask.all()):
        raise ValueError(
            f"a prompt of {mask.shape[1]} tokens has {int((mask == 0).sum())} of padding: process every prompt by "
            "itself, without padding"
        )
    return model._prefill(input_ids, generation_config, model_kwargs)


def join_prompts(rows: Sequence[PooledPrompt], config, repeats: int) -> dict:
    """Arguments of `generate` that continue prefilled prompts: the shorter ones are padded on the left.

    Args:
        config: configuration of the model.
        repeats: rows of the cache per prompt.
    """
    width = max(row.length for row in rows)
    # Any token will do as padding, nobody reads it.
    ids = torch.cat([nn.functional.pad(row.input_ids, (width - row.length, 0)) for row in rows])
    mask = torch.cat([nn.functional.pad(torch.ones_like(row.input_ids), (width - row.length, 0)) for row in rows])
    cache = PrefilledCache.join([row.cache for row in rows], config)
    cache.next_logits = torch.cat([row.logits for row in rows])
    for row in rows:
        row.cache = None  # copied: the memory is free while the batch decodes
    if repeats > 1:
        cache.batch_repeat_interleave(repeats)
        cache.next_logits = cache.next_logits.repeat_interleave(repeats, dim=0)
    return {"input_ids": ids, "attention_mask": mask, "past_key_values": cache}


def new_length(tokens: Tensor, eos_token_id) -> int:
    """How many of the new tokens (n, new) of one prompt it would have alone: up to the last row's end token.

    Padding behind it is there because other prompts of the batch went on.
    """
    if eos_token_id is None:
        return tokens.shape[1]
    ended = torch.isin(tokens, torch.as_tensor(eos_token_id, device=tokens.device))
    lengths = torch.where(ended.any(dim=1), ended.long().argmax(dim=1) + 1, tokens.shape[1])
    return int(lengths.max())


# ------------------------------------------------------------------------------------------------- which rows together


def choose_batch(routes: Sequence[int], lengths: Sequence[int], batch_size: int) -> list[int]:
    """Places of the rows that make the next batch; the rest waits for more of its kind.

    From every route a batch is grown by the routes that add the fewest layers to it. Of the largest such batches, that
    one is taken which reads the fewest layers for rows that skip them; of equal ones the one with the oldest row.

    Args:
        routes: bit i is set where layer i is kept.
        lengths: rows of different lengths never share a batch.
    """
    alike: dict[int, dict[int, list[int]]] = {}  # length, route: places
    for place, (route, length) in enumerate(zip(routes, lengths, strict=True)):
        alike.setdefault(length, {}).setdefault(route, []).append(place)
    best = None
    for places in alike.values():
        for start in places:
            batch = grow_batch(start, places, batch_size)
            score = (-len(batch), wasted_layers([routes[place] for place in batch]), min(batch))
            if best is None or score < best[0]:
                best = score, batch
    return sorted(best[1])


def grow_batch(start: int, places: Mapping[int, Sequence[int]], batch_size: int) -> list[int]:
    """Up to `batch_size` places: those of a route, then of the routes nearest to what the batch runs already."""
    batch, union, left = list(places[start][:batch_size]), start, {route for route in places if route != start}
    while left and len(batch) < batch_size:
        # The fewest layers more; then the fewest it would have skipped; then the oldest.
        nearest = min(left, key=lambda r: ((r & ~union).bit_count(), (union & ~r).bit_count(), places[r][0]))
        left.remove(nearest)
        union |= nearest
        batch += places[nearest][: batch_size - len(batch)]
    return batch


def wasted_layers(routes: Sequence[int]) -> int:
    """(row, layer) pairs of a batch where the row skips a layer that another row keeps."""
    union = 0
    for route in routes:
        union |= route
    return sum((union & ~route).bit_count() for route in routes)


# --------------------------------------------------------------------------------------------------------------- checks


def needs_same_length(config: GenerationConfig, arguments: dict, defaults: GenerationConfig) -> bool:
    """Whether an argument looks at whole rows or counts from their beginning, so that padding would change its answer.

    Args:
        config: as resolved, where a maximal length stands even if nobody gave one.
        arguments: the caller's.
        defaults: the model's own settings.
    """
    given = arguments.get("generation_config")
    lengths = (arguments.get("max_length"), getattr(given, "max_length", None), defaults.max_length)
    counts_length = config.max_new_tokens is None and any(length is not None for length in lengths)
    counts_length |= config.min_new_tokens is None and bool(config.min_length)
    reads = any(getattr(config, name, None) not in unset for name, unset in WHOLE_TEXT_SETTINGS.items())
    return counts_length or reads or arguments.get("logits_processor") is not None


def check_config(config: GenerationConfig) -> None:
    """Raises: ValueError for settings of `generate` that need one row, another cache or another answer than tensors."""
    mode = config.get_generation_mode()
    if mode not in BATCHED_MODES:
        raise ValueError(f"group_by_route does not do {mode.value}: call generate prompt by prompt")
    for name in ("stop_strings", "max_time", "token_healing"):
        if getattr(config, name, None):
            raise ValueError(
                f"group_by_route does not take {name}={getattr(config, name)!r}: it changes rows where their tokens do "
                "not show it. End rows with eos_token_id or max_new_tokens"
            )
    if config.use_cache is False:
        raise ValueError("group_by_route joins caches, and use_cache=False makes none: leave it out")
    if config.cache_implementation not in (None, "dynamic"):
        raise ValueError(
            f"group_by_route does not take cache_implementation={config.cache_implementation!r}: only RoeCache can be "
            "joined. Leave it unset, or call generate"
        )
    if config.return_dict_in_generate:
        raise ValueError("group_by_route returns tokens alone: pass return_dict_in_generate=False, or call generate")


def check_sizes(batch_size: int, pool_size: int) -> None:
    """Raises: ValueError for a batch below 1, or a pool that holds no batch."""
    for name, size in {"batch_size": batch_size, "pool_size": pool_size}.items():
        if isinstance(size, bool) or not isinstance(size, int):
            raise ValueError(f"{name} must be a whole number, got {size!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if pool_size < batch_size:
        raise ValueError(f"pool_size must be at least batch_size={batch_size}, got {pool_size}: batches leave the pool")


def check_prompts(prompts) -> None:
    """Raises: ValueError if something else than prompts is about to be iterated over."""
    if isinstance(prompts, (Mapping, str, Tensor)) or not isinstance(prompts, Iterable):
        raise ValueError(
            f"prompts must be a list or generator with one processor output per prompt, got a {type(prompts).__name__}"
        )


def check_prompt(number: int, prompt, names) -> None:
    """Raises: ValueError if a prompt is not one row of token ids with what belongs to it; `names` are forward's."""
    if not isinstance(prompt, Mapping):
        raise ValueError(f"prompt {number} must be what a processor returns for it, got a {type(prompt).__name__}")
    ids = prompt.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] == 0:
        given = f"shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else f"a {type(ids).__name__}"
        raise ValueError(
            f"input_ids of prompt {number} must have shape (1, S), got {given}: process every prompt by itself, with "
            'return_tensors="pt"'
        )
    known = (set(names) | set(ROUTING_ARGUMENTS)) - set(UNSUPPORTED_INPUTS)
    if strange := sorted(name for name in prompt if name not in known and prompt[name] is not None):
        raise ValueError(
            f"prompt {number} holds {', '.join(strange)}, which group_by_route does not take from a prompt: arguments "
            "of generate are given for all prompts at once, and a prompt is its ids, images and routing"
        )


__all__ = ["RoeGroupingMixin"]
