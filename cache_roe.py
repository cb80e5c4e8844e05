"""`RoeCache`: a dynamic cache that also holds the routes its rows follow.

B batch, L decoder layers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig


class LayerRows:
    """Which rows of a batch run one layer: indices for gathering, made once per route and not once per token.

    Attributes:
        keep: one bool per row, on the host.
        kept: (n,) row numbers that run the layer, `None` if all do (nothing to gather) or none does.
        skipped: (B - n,) row numbers that take the adapter, likewise.
    """

    def __init__(self, keep: Sequence[bool], device: torch.device | str = "cpu"):
        self.keep = tuple(bool(k) for k in keep)
        self.all_kept, self.none_kept = all(self.keep), not any(self.keep)
        self.kept = self.skipped = None
        if not self.all_kept and not self.none_kept:
            self.kept = torch.tensor([row for row, k in enumerate(self.keep) if k], device=device)
            self.skipped = torch.tensor([row for row, k in enumerate(self.keep) if not k], device=device)


class RoeCache(DynamicCache):
    """Keys and values of the rows that run a layer, the routes that say which, and the number of tokens seen.

    A layer's entry has `routes[:, layer].sum()` rows and nothing for the others, so `get_seq_length` cannot be read off
    layer 0 as the parent does: layer 0 may be skipped by every row.

    Args:
        config: configuration of the model (or of its language model); gives the number of layers and sliding windows.

    Attributes:
        routes: (B, L) bool, True where the example runs the layer; `None` until the first forward pass decided it.
        rows: one `LayerRows` per layer, the same decision as host-side lists; `None` until decided.
        tokens_seen: ordinary tokens that went through the model with this cache; routing tokens are never cached.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config=config)
        self.routes: Tensor | None = None
        self.rows: list[LayerRows] | None = None
        self.tokens_seen = 0
        # What `generate` was asked about routing, read and cleared by the first forward pass.
        self.request: dict = {}

    def set_routes(self, routes: Tensor, rows: list[LayerRows] | None = None) -> None:
        """Fix the routes (B, L) of the rows; `rows` saves a copy to the host where the caller has the lists already."""
        self.routes = routes.clone()  # outputs carry the same tensor; what a caller does to it stays there
        if rows is None:
            rows = [LayerRows(keep, routes.device) for keep in routes.t().tolist()]
        self.rows = rows

    def routes_for(self, batch_size: int) -> tuple[Tensor, list[LayerRows]]:
        """Copies of routes and rows, for a forward pass over so many rows.

        Raises: ValueError if the cache holds another number of rows.
        """
        if self.routes.shape[0] != batch_size:
            raise ValueError(f"past_key_values holds routes of {self.routes.shape[0]} rows, the input has {batch_size}")
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

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.tokens_seen

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """(key length, key offset) of a layer as if every row had run it: the masks are shared by all layers."""
        window = getattr(self.layers[layer_idx], "sliding_window", None)
        if window is None:
            return self.tokens_seen + query_length, 0
        # A sliding layer keeps the last window - 1 tokens.
        offset = max(self.tokens_seen - window + 1, 0)
        return self.tokens_seen - offset + query_length, offset

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; routes stay.

        Args:
            tokens_to_remove: minus the number of tokens, as in the parent.
        Raises: ValueError if it is positive (older Transformers took a length to keep).
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to remove, got {tokens_to_remove}")
        for layer in self.layers:
            if layer.is_initialized:  # a layer no row runs holds nothing to crop
                layer.crop(tokens_to_remove)
        self.tokens_seen -= abs(tokens_to_remove)

    def reset(self) -> None:
        super().reset()
        self.routes, self.rows, self.tokens_seen, self.request = None, None, 0, {}

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
        """New row i becomes old row `source[i]`, in the routes and in every layer that the old row ran."""
        if self.routes is None:
            return
        for layer, rows in zip(self.layers, self.rows, strict=True):
            if not layer.is_initialized:
                continue
            kept = [row for row, keep in enumerate(rows.keep) if keep]
            place = {row: index for index, row in enumerate(kept)}
            index = [place[row] for row in source if row in place]
            layer.batch_select_indices(torch.tensor(index, dtype=torch.long, device=layer.keys.device))
        self.set_routes(self.routes[torch.tensor(source, device=self.routes.device)])


__all__ = ["LayerRows", "RoeCache"]
