"""A baked model: one route for every input, frozen when the checkpoint was written (`roe-llava bake`).

The layers it skips hold their norm and adapter alone, the others always run; there are no routers and no routing
tokens. What is asked of routing at run time has to be what is baked.

B batch, L decoder layers.
"""

import math

import torch
from torch import Tensor

from .routing_roe import as_numbers, checked_route_bias, checked_routes

REMEDY = "Ask the checkpoint it was baked from, or leave the argument out"


def is_baked(config) -> bool:
    """Whether a `RoeLlavaConfig` has a frozen route."""
    return getattr(config, "skipped_layers", None) is not None


def baked_route(config) -> Tensor:
    """(L,) bool, True where every input runs the layer."""
    route = torch.ones(config.text_config.num_hidden_layers, dtype=torch.bool)
    route[config.skipped_layers] = False
    return route


def as_pinned(request: dict, config, batch_size: int) -> dict:
    """A forward pass's `routing_segments`, `routes` and `route_bias`, made those that pin the baked route.

    Raises: ValueError if they ask for another one.
    """
    route = baked_route(config)
    if request["routes"] is not None:
        asked = checked_routes(request["routes"], batch_size, len(route))
        if not torch.equal(asked, route.expand_as(asked)):
            other = (asked != route).any(dim=0).nonzero()[:, 0].tolist()
            raise ValueError(
                f"routes differ from the baked route in layers {other}: this model skips layers {config.skipped_layers}"
                f" for every input and holds no others it could leave out, or put back. {REMEDY}"
            )
    if request["route_bias"] is not None:
        check_baked_bias(request["route_bias"], route, batch_size, config.skipped_layers)
    return {"routing_segments": None, "routes": route, "route_bias": None}


def check_baked_bias(route_bias, route: Tensor, batch_size: int, skipped_layers: list[int]) -> None:
    """Raises: ValueError for a bias that would shift a decision: no router is left that it could be added to."""
    checked_route_bias(route_bias, batch_size, len(route))
    bias = as_numbers("route_bias", route_bias, torch.float32)
    forced = torch.where(route, math.inf, -math.inf)
    if not bool(((bias == 0) | (bias == forced)).all()):
        raise ValueError(
            f"route_bias has nothing to shift: the route of this model is baked, it skips layers {skipped_layers} for "
            f"every input and has no routers. {REMEDY}"
        )


def check_baked_ratio(skip_ratio: float, config) -> None:
    """Raises: ValueError for a skip ratio of more or fewer layers than the baked route skips."""
    num_layers, skipped = config.text_config.num_hidden_layers, len(config.skipped_layers)
    if round(skip_ratio * num_layers) != skipped:
        raise ValueError(
            f"skip_ratio={skip_ratio} of a baked model: its route always skips {skipped} of {num_layers} layers, "
            f"{skipped / num_layers:.3g}. {REMEDY}"
        )


def refuse_baked(skipped_layers, what: str, source) -> None:
    """Raises: ValueError for a baked model, where routers and routing tokens are needed.

    Args:
        skipped_layers: of its config; `None` for a routed model.
        what: what cannot be, in words.
        source: the model, by name.
    """
    if skipped_layers is not None:
        raise ValueError(
            f"{source or 'the model'} is baked: its route is frozen (skipped_layers {skipped_layers}), routers and "
            f"routing tokens are gone, so {what}. Take the RoE checkpoint it was baked from"
        )


__all__ = ["as_pinned", "baked_route", "check_baked_ratio", "is_baked", "refuse_baked"]
