"""What is compared: the base, RoE along given routes, and the base with layers removed for good.

B batch, L decoder layers.
"""

import copy
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import inf

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .shapes import Subject

BASE, CONTROL, ALL_KEPT, LEARNED = "base", "base again", "all kept", "learned"
FORCED, PINNED, REMOVED = "forced", "pinned", "removed"
SHARED, MIXED, OWN = "shared", "mixed", "own"
ROUTED_KINDS = (ALL_KEPT, FORCED, PINNED, LEARNED)
TRIES = 100  # to find a route that no row has yet


@dataclass(frozen=True)
class System:
    """One thing whose time is taken.

    Attributes:
        kind: `BASE` stock LLaVA; `CONTROL` the same once more, so that what differs is noise; `ALL_KEPT` routers
            compute and every layer is kept; `FORCED` routers compute, an infinite bias decides; `PINNED` the route is
            given, no router runs; `REMOVED` stock LLaVA without the layers; `LEARNED` routers decide.
        model: the model that runs.
        request: arguments of the prefill that decide the route.
        rows: `SHARED` if all rows take one route, `MIXED` if every row takes another one of the same share, `OWN` where
            every row decides; empty where there is nothing to decide.
        asked: the skip shares that were asked for; several may come to the same number of layers.
        routes: (B, L) bool that the request asks for, `None` where nothing was asked.
    """

    kind: str
    model: PreTrainedModel
    request: dict[str, Tensor | float] = field(default_factory=dict)
    rows: str = ""
    asked: tuple[float, ...] = ()
    routes: Tensor | None = None

    @property
    def name(self) -> str:
        """Tells it from the other systems of a batch size."""
        if self.routes is None:
            return self.kind
        num_layers, kept = self.routes.shape[1], int(self.routes[0].sum())
        return f"{self.kind} {num_layers - kept}/{num_layers}{' mixed' if self.rows == MIXED else ''}"

    @property
    def is_routed(self) -> bool:
        return self.kind in ROUTED_KINDS

    def inputs(self, prompt: dict[str, Tensor]) -> dict:
        """The arguments of its prefill; a stock model knows no routing segments."""
        if self.is_routed:
            return prompt | self.request
        return {name: value for name, value in prompt.items() if name != "routing_segments"}


# ------------------------------------------------------------------------------------------------------------- routes


def layers_to_skip(share: float, num_layers: int) -> int:
    """Number of layers that comes closest to a share.

    Raises: ValueError if layer 0, which is always kept, would have to be skipped too.
    """
    number = round(share * num_layers)
    if not 0 <= number < num_layers:
        raise ValueError(f"cannot skip a share of {share} of {num_layers} layers: layer 0 is kept; expected [0, 1)")
    return number


def counts_of(shares: Sequence[float], num_layers: int) -> dict[int, tuple[float, ...]]:
    """Numbers of layers to skip, each with the shares that come to it."""
    counts: dict[int, tuple[float, ...]] = {}
    for share in sorted(set(shares)):
        number = layers_to_skip(share, num_layers)
        counts[number] = (*counts.get(number, ()), share)
    return counts


def spread_layers(number: int, num_layers: int) -> list[int]:
    """So many of the layers after layer 0, evenly spread."""
    return [1 + (2 * step + 1) * (num_layers - 1) // (2 * number) for step in range(number)]


def shared_routes(number: int, num_layers: int, batch_size: int) -> Tensor:
    """(B, L) bool: all rows skip the same evenly spread layers."""
    routes = torch.ones(batch_size, num_layers, dtype=torch.bool)
    routes[:, spread_layers(number, num_layers)] = False
    return routes


def mixed_routes(number: int, num_layers: int, batch_size: int) -> Tensor:
    """(B, L) bool: every row skips so many layers, another set than the rows before where there is one left.

    Rows take the layers that were skipped least so far, drawn where they tie (seeded), so after any number of rows the
    layers after layer 0 differ by at most one in how many rows skip them.
    """
    draw, taken, skipped_by = random.Random(0), set(), [0] * num_layers
    routes = torch.ones(batch_size, num_layers, dtype=torch.bool)
    for row in range(batch_size):
        for _ in range(TRIES):
            order = sorted(range(1, num_layers), key=lambda layer: (skipped_by[layer], draw.random()))
            chosen = frozenset(order[:number])
            if chosen not in taken:
                break
        taken.add(chosen)
        for layer in chosen:
            skipped_by[layer] += 1
            routes[row, layer] = False
    return routes


def deciding_bias(routes: Tensor) -> Tensor:
    """`route_bias` with which routers compute and have no say: +inf where the route keeps a layer, else -inf."""
    return torch.where(routes, inf, -inf)


# ------------------------------------------------------------------------------------------------------------- systems


def without_layers(base: PreTrainedModel, skipped: Sequence[int]) -> PreTrainedModel:
    """A stock model that never had these layers, on the same tensors: what skipping can give at most."""
    tensors = {id(tensor): tensor for tensor in [*base.parameters(), *base.buffers()]}
    model = copy.deepcopy(base, tensors)  # what the second argument knows is not copied
    language_model = model.model.language_model
    kept = [layer for index, layer in enumerate(language_model.layers) if index not in set(skipped)]
    language_model.layers = torch.nn.ModuleList(kept)
    for index, layer in enumerate(kept):
        layer.self_attn.layer_idx = index  # its place in the cache
    for config in (language_model.config, model.config.text_config):
        config.num_hidden_layers = len(kept)
    return model


def removed_models(subject: Subject, shares: Sequence[float]) -> dict[int, PreTrainedModel]:
    """The static drops of some shares, by the number of layers they lack."""
    num_layers = len(subject.base.model.language_model.layers)
    counts = counts_of(shares, num_layers)
    return {number: without_layers(subject.base, spread_layers(number, num_layers)) for number in counts if number}


def systems_of(
    subject: Subject, removed: dict[int, PreTrainedModel], shares: Sequence[float], batch_size: int
) -> list[System]:
    """All that is compared at a batch size, the base first.

    A share of 0 is `ALL_KEPT` where routers run and `CONTROL` where layers are removed, so it adds only `PINNED`.
    """
    systems = [System(BASE, subject.base), System(CONTROL, subject.base)]
    systems += [System(ALL_KEPT, subject.roe, {"route_bias": inf}), System(LEARNED, subject.roe, rows=OWN)]
    num_layers = len(subject.base.model.language_model.layers)
    for number, asked in counts_of(shares, num_layers).items():
        routes = shared_routes(number, num_layers, batch_size)
        systems += routed_systems(subject.roe, routes, SHARED, asked)
        if number:
            systems.append(System(REMOVED, removed[number], {}, SHARED, asked, routes))
        if number and batch_size > 1:
            mixed = mixed_routes(number, num_layers, batch_size)
            systems += routed_systems(subject.roe, mixed, MIXED, asked)
    return systems


def routed_systems(roe: PreTrainedModel, routes: Tensor, rows: str, asked: tuple[float, ...]) -> Iterator[System]:
    """The RoE model along given routes, with its routers (unless every layer is kept) and without."""
    if not bool(routes.all()):
        # A row of biases where rows agree: it is read on the host, rows of their own on the device.
        bias = deciding_bias(routes).to(roe.device) if rows == MIXED else deciding_bias(routes[0])
        yield System(FORCED, roe, {"route_bias": bias}, rows, asked, routes)
    yield System(PINNED, roe, {"routes": routes}, rows, asked, routes)


__all__ = ["System", "mixed_routes", "removed_models", "shared_routes", "systems_of", "without_layers"]
