"""Attention in a routed layer: the base model's own for ordinary tokens, apart from it that of the routing tokens.

Also what mixed routes do with attention's arguments and results: `take_rows`, `attentions_of_all_rows`.

B batch, R routing tokens, S sequence, H heads, P head size.
"""

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from .cache_roe import LayerRows


def take_rows(value, rows: Tensor | None, batch_size: int):
    """Rows (`None`: all) of whatever a decoder layer is given.

    Args:
        value: tensor of the batch's size, flex attention's `BlockMask`, tuples of them, or `None`.
        rows: (n,) row numbers.
        batch_size: B; what has one row is shared by all.
    Raises: ValueError for anything else, which another kind of attention needs.
    """
    if rows is None or value is None:
        return value
    if isinstance(value, tuple):
        return tuple(take_rows(item, rows, batch_size) for item in value)
    if not isinstance(value, Tensor | BlockMask):
        raise ValueError(
            f"cannot take the rows of a mixed route out of a {type(value).__name__}; "
            "use attn_implementation='sdpa', 'eager' or 'flex_attention'"
        )
    if value.shape[0] == 1 < batch_size:
        return value
    if isinstance(value, BlockMask):
        return rows_of_block_mask(value, rows.to(value.kv_indices.device))
    return value.index_select(0, rows.to(value.device))


def rows_of_block_mask(mask: BlockMask, rows: Tensor) -> BlockMask:
    """The mask of some rows: their blocks, and the function inside a block asked about the row it was made for."""
    taken = mask[rows]  # has no function: torch cannot know what an index means to it

    def mask_mod(row, head, query, key):
        return mask.mask_mod(rows[row], head, query, key)

    taken.mask_mod = mask_mod
    return taken


def attentions_of_all_rows(attentions: tuple[Tensor, ...], rows: list[LayerRows]) -> tuple[Tensor | None, ...]:
    """L entries: `None` where no row ran the layer, zeros in rows that skipped it."""
    computed, complete = iter(attentions), []
    for layer_rows in rows:
        weights = None if layer_rows is not None and layer_rows.none_kept else next(computed)
        if layer_rows is not None and layer_rows.kept is not None:
            kept = layer_rows.kept.to(weights.device)
            if weights.shape[0] == len(layer_rows.keep):  # a cache that holds all rows had all of them computed
                weights = weights[kept]
            full = weights.new_zeros(len(layer_rows.keep), *weights.shape[1:])
            weights = full.index_copy(0, kept, weights)
        complete.append(weights)
    return tuple(complete)


class RoutingAttention:
    """One layer's attention for the R routing tokens that ride at the end of the sequence.

    Stands where the attention module expects a cache: it keeps the routing tokens' keys and values to itself and hands
    the ordinary ones on, to the real cache if there is one. So ordinary tokens run the base model's kernel on the base
    model's mask and routing tokens leave nothing behind.

    Args:
        cache: the real cache, or `None`.
        visible: (B, R, S + R) bool, tokens a routing token reads: ordinary ones and itself.
    """

    def __init__(self, cache, visible: Tensor):
        self.cache, self.visible, self.num_tokens = cache, visible, visible.shape[1]
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def update(self, keys: Tensor, values: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Take (B, H, S + R, P) keys and values, keep them, return the ordinary ones as the cache does."""
        self.keys, self.values = keys, values
        keys, values = keys[:, :, : -self.num_tokens], values[:, :, : -self.num_tokens]
        return (keys, values) if self.cache is None else self.cache.update(keys, values, layer_idx)

    def attend(self, queries: Tensor, scaling: float) -> Tensor:
        """(B, R, H, P) attention of the routing queries (B, H, R, P) over what they may read and themselves.

        Over the keys as they were given: a static cache answers with its whole length, empty places included.
        """
        mask = self.visible.to(queries.device)[:, None]
        is_grouped = queries.shape[1] != self.keys.shape[1]
        attended = nn.functional.scaled_dot_product_attention(
            queries, self.keys, self.values, attn_mask=mask, scale=scaling, enable_gqa=is_grouped
        )
        return attended.transpose(1, 2)


def attend_apart(module, query, key, value, attention_mask, routing_attention=None, **kwargs):
    """Attention function: the base model's own for ordinary queries, `RoutingAttention` for the last R, if any."""
    name = module.config.base_attn_implementation
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
    if routing_attention is None:
        return attend(module, query, key, value, attention_mask, **kwargs)
    split = query.shape[2] - routing_attention.num_tokens
    if split == 1:  # a number where lengths are symbols: compiled, SDPA has to know whether there are several queries
        split = 1
    ordinary, weights = attend(module, query[:, :, :split], key, value, attention_mask, **kwargs)
    routed = routing_attention.attend(query[:, :, split:], kwargs["scaling"])
    return torch.cat([ordinary, routed.to(ordinary.dtype)], dim=1), weights


AttentionInterface.register("roe_apart", attend_apart)


class RoutedAttentionConfig:
    """What an attention module sees of the language model's config: all of it, but `attend_apart` as its function.

    Reads through to the config, so that `set_attn_implementation` keeps working.
    """

    _attn_implementation = "roe_apart"

    def __init__(self, config):
        self.base_config = config

    @property
    def base_attn_implementation(self) -> str:
        return self.base_config._attn_implementation

    def __getattr__(self, name):
        if name == "base_config":  # not set yet: a copy or a pickle is being made
            raise AttributeError(name)
        return getattr(self.base_config, name)


__all__ = ["RoutingAttention"]
