"""How many parameters a model with experts has, and how many of them a token goes through."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from ..configuration_moe_llava import MoeLlavaConfig


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters.

    Attributes:
        total: all of the model.
        activated: those that one token goes through: of the experts K of E, of everything else all.
        experts, routers: all of these.
    """

    total: int
    activated: int
    experts: int
    routers: int


def parameter_counts(shapes: Mapping[str, Sequence[int]], config: MoeLlavaConfig) -> ParameterCounts:
    """The counts of a model.

    Args:
        shapes: name in memory or on disk to shape, of every tensor once.
        config: of the model.
    """
    sizes = {name: prod(shape) for name, shape in shapes.items()}
    experts = sum(size for name, size in sizes.items() if ".mlp.experts." in name)
    routers = sum(size for name, size in sizes.items() if ".mlp.router." in name)
    total = sum(sizes.values())
    idle = experts // config.num_experts * (config.num_experts - config.num_experts_per_tok)
    return ParameterCounts(total, total - idle, experts, routers)


__all__ = ["ParameterCounts", "parameter_counts"]
