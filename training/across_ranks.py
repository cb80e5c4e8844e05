"""What data-parallel training needs so that N processes do what one process does on all of their rows.

B rows of one rank, T turns, N values.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from ..modeling_roe_llava import RoutedModel


def mean_over_ranks(values: Tensor) -> Tensor:
    """Mean over the first dimension, and over the ranks if there are several, for a loss that is not a mean of rows.

    The gradient is scaled for data parallelism, which averages the gradients of the ranks: after that it is the
    gradient of the mean over all values. Every rank has to call it, in the same order; no rank waits in the backward.

    Args:
        values: (N, ...), of which N may differ between ranks but not be 0 on all.
    Returns: (...), the same number on every rank, with a gradient through this rank's values.
    """
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return values.mean(dim=0)
    own = values.sum(dim=0)
    count = values.new_full((1,), len(values), dtype=torch.float64)
    total = torch.cat([own.detach().double().flatten(), count])
    distributed.all_reduce(total)
    mean = (total[:-1] / total[-1]).view_as(own).to(own)
    gradient = own * (distributed.get_world_size() / total[-1]).to(own)
    return mean + (gradient - gradient.detach())


@dataclass(frozen=True)
class DrawsOfRank:
    """Random numbers for `RoutingPhase.draws` that give every row of the global batch its own, whatever the ranks.

    `Trainer` seeds all ranks alike, so with torch's global generator row i would be routed at random alike on every
    rank. Here N ranks of B rows draw what one process draws for the N * B rows in the order of the ranks.

    Attributes:
        seed: of the run.
        micro_batch: number of forward passes before this one; other numbers come with every one.
        rank, world_size: of this process.
    """

    seed: int
    micro_batch: int
    rank: int
    world_size: int

    def __call__(self, layer: int, like: Tensor) -> Tensor:
        """(B, T, 2) uniform in [0, 1), shaped like `like`; every rank is taken to have B rows."""
        rows, turns = like.shape[:2]
        # Only the lowest 32 bits of a seed count. Turns come first, so that ranks may have different numbers of them.
        mixed = (self.seed * 0x9E3779B1 + self.micro_batch * 0x85EBCA6B + layer * 0xC2B2AE35) & 0xFFFFFFFF
        generator = torch.Generator().manual_seed(mixed)
        drawn = [torch.rand(self.world_size * rows, 2, generator=generator) for _ in range(turns)]
        first = self.rank * rows
        return torch.stack(drawn, dim=1)[first : first + rows]


def look_at_every_batch(model) -> None:
    """Let the vision tower and the projector run on a blank picture in batches that have none.

    For weights sharded over ranks (FSDP, ZeRO-3): a rank whose batch is text alone would not take part when the others
    gather the tower's weights, and all would wait for ever, or mistake one tensor for another. The picture's features
    are added times 0.

    Raises: ValueError for a model that cuts pictures into tiles: a blank one would need sizes, too.
    """
    inner = next(module for module in model.modules() if isinstance(module, RoutedModel))
    if hasattr(inner, "image_newline"):
        raise ValueError(
            f"{type(model).__name__} cannot be trained with its weights sharded over ranks (FSDP, DeepSpeed ZeRO-3): "
            "batches without an image would leave its vision tower out. Train with every rank holding all of it"
        )
    inner.register_forward_pre_hook(add_blank_picture, with_kwargs=True)


def add_blank_picture(module: RoutedModel, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Forward pre-hook of `look_at_every_batch`."""
    ids = kwargs.get("input_ids")
    if kwargs.get("past_key_values") is not None or kwargs.get("pixel_values") is not None or ids is None:
        return args, kwargs
    if kwargs.get("routing_segments") is None and kwargs.get("routes") is None:
        segments = module.segments_of(ids, None, kwargs.get("attention_mask"))
        kwargs = kwargs | {"routing_segments": segments}
    embeddings = module.get_input_embeddings()(ids)  # before the tower, as in a batch with pictures
    size = module.config.vision_config.image_size
    blank = torch.zeros(1, 3, size, size, device=ids.device, dtype=module.dtype)
    features = module.get_image_features(pixel_values=blank, return_dict=True).pooler_output
    embeddings = embeddings + 0.0 * torch.cat(list(features)).sum().to(embeddings)
    return args, kwargs | {"input_ids": None, "inputs_embeds": embeddings}


__all__ = ["DrawsOfRank", "look_at_every_batch", "mean_over_ranks"]
