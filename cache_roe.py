"""Caches that also hold the routes their rows follow: `RoeCache`, and Transformers' own once they are adopted.

`RoeCache` stores the rows that run a layer and nothing for the others. A static or quantised cache, or a `DynamicCache`
that the caller made, cannot: all rows of a batch run every layer that one of them keeps, and the rows that skip it take
the adapter's output instead. A layer that no row keeps is not run and nothing is stored for it in any cache.

B batch, L decoder layers.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, QuantizedCache, StaticCache
from transformers.cache_utils import DynamicLayer
from transformers.utils import logging

logger = logging.get_logger(__name__)


def to_device(numbers: Sequence[int], device: torch.device | str) -> Tensor:
    """(n,) whole numbers on a device, without waiting for what it is doing, as `torch.tensor(..., device=)` would."""
    return torch.tensor(numbers, dtype=torch.long).to(device, non_blocking=True)


class LayerRows:
    """Which rows of a batch run one layer: indices for gathering, made once per route and not once per token.

    Attributes:
        keep: one bool per row, on the host.
        kept: (n,) row numbers that run the layer, `None` if all do (nothing to gather) or none does.
        skipped: (B - n,) row numbers that take the adapter, likewise.
        num_skipped: B - n, whatever there is to gather.
    """

    def __init__(self, keep: Sequence[bool], device: torch.device | str = "cpu"):
        self.keep = tuple(bool(k) for k in keep)
        self.num_skipped = self.keep.count(False)
        self.all_kept, self.none_kept = self.num_skipped == 0, self.num_skipped == len(self.keep)
        self.kept = self.skipped = None
        if not self.all_kept and not self.none_kept:
            self.kept = to_device([row for row, k in enumerate(self.keep) if k], device)
            self.skipped = to_device([row for row, k in enumerate(self.keep) if not k], device)


class RouteKeeper:
    """Put in front of a cache's class: the routes of its rows, and a length that does not depend on any layer.

    Layer 0 may be skipped by every row and then holds nothing, so neither the length nor the sizes of masks can be
    read off it as the parents do.

    Attributes:
        holds_all_rows: whether a layer's entry has all B rows, or only those that keep the layer.
        routes: (B, L) bool, True where the example runs the layer; `None` until the first forward pass decided it.
        rows: one `LayerRows` per layer, the same decision as host-side lists; `None` until decided.
        tokens_seen: ordinary tokens that went through the model with this cache; routing tokens are never cached.
        tokens_counted: the most of them that `count_saved` has seen; drafts that were cropped are not counted again.
        rows_per_prompt: beams or returned sequences, as `generate` says.
        request: what `generate` was asked about routing, read and cleared by the first forward pass.
    """

    holds_all_rows = True

    @property
    def given_class(self) -> str:
        """The name under which a caller knows the cache."""
        return type(self).__name__.removeprefix("Routed")

    def forget_routes(self) -> None:
        """Be as before the first forward pass."""
        self.routes: Tensor | None = None
        self.rows: list[LayerRows] | None = None
        self.tokens_seen = self.tokens_counted = 0
        self.rows_per_prompt = 1
        self.request: dict = {}

    def set_routes(self, routes: Tensor, rows: list[LayerRows] | None = None) -> None:
        """Fix the routes (B, L) of the rows; `rows` saves a copy to the host where the caller has the lists already."""
        self.routes = routes.clone()  # outputs carry the same tensor; what a caller does to it stays there
        if rows is None:
            rows = [LayerRows(keep, routes.device) for keep in routes.t().tolist()]
        self.rows = rows
        if self.holds_all_rows and any(layer_rows.kept is not None for layer_rows in rows):
            logger.warning_once(
                f"a {self.given_class} holds all rows of a batch, so rows that skip a layer compute it for nothing "
                "where others keep it. A RoeCache does not; neither does a batch whose rows share one route"
            )

    def routes_for(self, batch_size: int) -> tuple[Tensor, list[LayerRows]]:
        """Copies of routes and rows, for a forward pass over so many rows.

        Raises: ValueError if the cache holds another number of rows.
        """
        held = self.routes.shape[0]
        if held != batch_size:
            repeats = batch_size // held
            advice = f"; for beams or several sequences per row call its batch_repeat_interleave({repeats}) before"
            raise ValueError(
                f"past_key_values holds routes of {held} rows, the input has {batch_size}"
                + (advice if repeats * held == batch_size else "")
            )
        return self.routes.clone(), list(self.rows)

    def leave_request(self, request: dict) -> None:
        """Leave `generate`'s routing arguments for the first forward pass.

        Raises: as `take_request`.
        """
        self.check_request(request)
        self.request = request

    def take_request(self, request: dict) -> dict:
        """Routing arguments of a forward pass: the caller's, else those `generate` left here for the first one.

        Raises: ValueError if a route is asked for although the cache has one: it decides for good.
        """
        stored, self.request = self.request, {}
        request = {name: stored.get(name) if value is None else value for name, value in request.items()}
        self.check_request(request)
        return request

    def check_request(self, request: dict) -> None:
        given = [name for name in ("routes", "route_bias") if request.get(name) is not None]
        if self.routes is not None and given:
            raise ValueError(
                f"{' and '.join(given)} given with a cache that already has routes: a cache keeps the routes of its "
                "prefill. Start from an empty cache to route anew"
            )

    def count_saved(self) -> int:
        """(row, layer, token) triples, since this was last asked, whose keys and values it does not hold.

        Against a cache of the same kind that every row fills in every layer: no more than a layer's sliding window.
        """
        before, self.tokens_counted = self.tokens_counted, max(self.tokens_counted, self.tokens_seen)
        if before == self.tokens_counted or self.rows is None:
            return 0
        saved, missing = 0, len(self.rows) - len(self.layers)  # the layers of a lazy cache end early
        for layer, rows in zip([*self.layers, *[None] * missing], self.rows, strict=True):
            if rows.none_kept or (rows.num_skipped and not self.holds_all_rows):
                most = most_held(layer)
                saved += rows.num_skipped * (min(self.tokens_counted, most) - min(before, most))
        return saved

    def check_room(self, num_tokens: int) -> None:
        """Raises: ValueError if a layer of fixed length has no room for so many tokens more."""
        for layer in self.layers:
            length = -1 if layer.is_sliding else layer.get_max_length()
            if 0 <= length < self.tokens_seen + num_tokens:
                raise ValueError(
                    f"a {self.given_class} of max_cache_len={length} holds {self.tokens_seen} tokens and has no "
                    f"room for {num_tokens} more: make it longer, or pass RoeCache(model.config)"
                )

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if self.offloading and layer_idx < len(self.layers):
            # Brought back to the accelerator while the layer before runs, which may have been skipped.
            self.layers[layer_idx].prefetch()
        return super().update(keys, values, layer_idx, *args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.tokens_seen

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """(key length, key offset) of a layer as if every row had run it: the masks are shared by all layers."""
        if self.rows is None or not self.rows[layer_idx].none_kept:
            return super().get_mask_sizes(query_length, layer_idx)
        kinds = self.is_sliding
        wanted = kinds[layer_idx] if layer_idx < len(kinds) else False
        for other, rows in enumerate(self.rows):
            if not rows.none_kept and kinds[other] == wanted:
                return super().get_mask_sizes(query_length, other)
        return self.tokens_seen + query_length, 0  # of a mask that no layer will read

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; routes stay.

        Args:
            tokens_to_remove: minus the number of tokens, as in the parent.
        Raises: ValueError if it is positive (older Transformers took a length to keep), or the layers cannot forget.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to remove, got {tokens_to_remove}")
        if not self.is_croppable:
            raise ValueError(f"a {self.given_class} cannot forget tokens: pass RoeCache(model.config) instead")
        for layer in self.layers:
            if layer.is_initialized:  # a layer no row runs holds nothing to crop
                layer.crop(tokens_to_remove)
        self.tokens_seen -= abs(tokens_to_remove)

    def reset(self) -> None:
        super().reset()
        self.forget_routes()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._take_rows(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        if indices.dtype == torch.bool:
            indices = indices.nonzero()[:, 0]
        self._take_rows(indices.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.routes is not None:
            self._take_rows([row for row in range(self.routes.shape[0]) for _ in range(repeats)])

    def _take_rows(self, source: list[int]) -> None:
        """New row i becomes old row `source[i]`, in the routes and in every layer."""
        if self.routes is None:
            return
        for layer, rows in zip(self.layers, self.rows, strict=False):  # the layers of a lazy cache end early
            if layer.is_initialized and not rows.none_kept:
                # The one way of all kinds of layers to take rows. Selecting and repeating are missing in static ones
                # and do nothing in quantised ones (Transformers 5.23).
                layer.reorder_cache(to_device(source, layer.device))
                if hasattr(layer, "batch_size"):
                    layer.batch_size = len(source)
        self._take_routes(source)

    def _take_routes(self, source: list[int]) -> None:
        """As `_take_rows`, of the routes alone; what the host knows is not asked of the device again."""
        routes = self.routes[to_device(source, self.routes.device)]
        keeps = [tuple(rows.keep[row] for row in source) for rows in self.rows]
        # Beams stay with their prompt, and so does its route: mostly nothing changes.
        pairs = zip(self.rows, keeps, strict=True)
        self.set_routes(routes, [rows if keep == rows.keep else LayerRows(keep, routes.device) for rows, keep in pairs])


class RoeCache(RouteKeeper, DynamicCache):
    """Keys and values of the rows that run a layer, the routes that say which, and the number of tokens seen.

    A layer's entry has `routes[:, layer].sum()` rows and nothing for the others. `RouteKeeper` lists the attributes.

    Args:
        config: configuration of the model (or of its language model); gives the number of layers and sliding windows.
        offloading: keep all layers but the one in use in the host's memory; needs a GPU.
    """

    holds_all_rows = False

    def __init__(self, config: PreTrainedConfig, offloading: bool = False):
        super().__init__(config=config, offloading=offloading)
        self.forget_routes()

    @classmethod
    def join(cls, caches: Sequence["RoeCache"], config: PreTrainedConfig) -> "RoeCache":
        """A new cache with the rows of several, in order; those of shorter ones are padded on the left.

        Places of padding hold zeros, so what goes on from there needs an `attention_mask` with 0 at them. All rows end
        at the same place, and with them the sliding windows.

        Args:
            caches: one or more, filled.
            config: as for the class.
        Raises: ValueError if there is none, or one holds no routes or another number of layers.
        """
        joined = cls(config)
        check_joinable(caches, len(joined.layers))
        joined.tokens_seen = joined.tokens_counted = max(cache.tokens_seen for cache in caches)
        for index, layer in enumerate(joined.layers):
            parts = [cache.layers[index] for cache in caches if cache.layers[index].is_initialized]
            if parts:  # else no row runs it
                fill_layer(layer, parts, joined.tokens_seen)
        routes = torch.cat([cache.routes for cache in caches])
        kept = zip(*([rows.keep for rows in cache.rows] for cache in caches), strict=True)
        joined.set_routes(routes, [LayerRows([k for part in layer for k in part], routes.device) for layer in kept])
        return joined

    def _take_rows(self, source: list[int]) -> None:
        """New row i becomes old row `source[i]`, in the routes and in every layer that the old row ran."""
        if self.routes is None:
            return
        for layer, rows in zip(self.layers, self.rows, strict=True):
            if not layer.is_initialized:
                continue
            kept = [row for row, keep in enumerate(rows.keep) if keep]
            place = {row: index for index, row in enumerate(kept)}
            index = [place[row] for row in source if row in place]
            layer.batch_select_indices(to_device(index, layer.keys.device))
        self._take_routes(source)


def most_held(layer) -> float:
    """How many tokens a cache's layer (or `None`, for one not made yet) holds at most: those of its window."""
    if layer is None or not layer.is_sliding:
        return math.inf
    # A growing layer leaves out the token that is about to come.
    return layer.sliding_window - 1 if isinstance(layer, DynamicLayer) else layer.max_cache_len


def check_joinable(caches: Sequence[RoeCache], num_layers: int) -> None:
    """Raises: ValueError if there is no cache, or one holds no routes or another number of layers."""
    if not caches:
        raise ValueError("there are no caches to join")
    for number, cache in enumerate(caches):
        if not isinstance(cache, RoeCache) or cache.routes is None:
            raise ValueError(f"cache {number} of {len(caches)}, a {type(cache).__name__}, is no RoeCache with routes")
        if len(cache.layers) != num_layers:
            raise ValueError(
                f"cache {number} of {len(caches)} has {len(cache.layers)} layers, expected {num_layers}: is it of "
                "another model?"
            )


def fill_layer(layer, parts: Sequence, length: int) -> None:
    """Put the rows (n, H, S, P) of other caches' layers into an empty one, all `length` tokens long."""
    held = min(length, layer.sliding_window - 1) if layer.is_sliding else length
    # Padding by a negative number cuts: a layer that records its past holds more than its window.
    keys, values = (
        torch.cat([nn.functional.pad(states, (0, 0, held - states.shape[2], 0)) for states in kind])
        for kind in ([part.keys for part in parts], [part.values for part in parts])
    )
    layer.update(keys, values)
    if layer.is_sliding:
        layer.cumulative_length = length


class RoutedDynamicCache(RouteKeeper, DynamicCache):
    """What a caller's `DynamicCache` becomes: all rows of every layer that a row keeps, and the routes."""


class RoutedStaticCache(RouteKeeper, StaticCache):
    """What a `StaticCache` becomes."""


class RoutedQuantizedCache(RouteKeeper, QuantizedCache):
    """What a `QuantizedCache` becomes."""

    is_croppable = False  # its layers say they are, but crop the empty tensors beside the quantised ones


ROUTED_CACHES = {
    DynamicCache: RoutedDynamicCache,
    StaticCache: RoutedStaticCache,
    QuantizedCache: RoutedQuantizedCache,
}


def adopt_cache(cache, num_tokens: int = 0) -> None:
    """Make a cache one that keeps routes, in place, so that the caller's own object has them when it comes back.

    Its class changes to the subclass in `ROUTED_CACHES`: whoever reorders, crops or resets the object, the routes
    follow. A wrapper would leave the object inside to be changed behind its back.

    Args:
        cache: an empty `DynamicCache`, `StaticCache` or `QuantizedCache`, or any cache that keeps routes already.
        num_tokens: how many tokens are about to be added.
    Raises: ValueError for another class, for a cache that holds tokens but no routes, and for one without room.
    """
    if not hasattr(cache, "take_request"):
        if type(cache) not in ROUTED_CACHES:
            raise ValueError(
                f"a {type(cache).__name__} cannot hold routes: leave past_key_values and cache_implementation unset, "
                "or pass RoeCache(model.config)"
            )
        check_empty(cache)
        cache.__class__ = ROUTED_CACHES[type(cache)]
        cache.forget_routes()
    elif cache.routes is None:
        check_empty(cache)
    cache.check_room(num_tokens)


def check_empty(cache) -> None:
    """Raises: ValueError if a cache without routes holds tokens."""
    lengths = [layer.get_seq_length() for layer in cache.layers if layer.is_initialized]
    counts = [length for length in lengths if isinstance(length, Tensor)]  # a static layer counts on its device
    if counts:
        lengths.append(int(torch.stack([count.to(counts[0].device) for count in counts]).max()))
    held = max((length for length in lengths if not isinstance(length, Tensor)), default=0)
    if held:
        raise ValueError(
            f"past_key_values, a {type(cache).__name__}, holds {held} tokens but no routes: another model filled it, "
            "or a forward pass that failed. Start from an empty cache"
        )


__all__ = ["LayerRows", "RoeCache"]
