"""How EvoMoE makes different experts out of one (arXiv 2505.23830, eq. 1): experts 2 to E follow expert 1.

theta_n <- beta * theta_1 + (1 - beta) * gradient(theta_1), with a beta drawn for every step and expert. Taken literally
that is no average of weights, which its text describes; `Evolution.mode` is the choice, `"ema"` by default.

E experts, M layers with experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ..experts_moe import PackedExperts

MODES = ("ema", "update", "literal")
PASSES = ("first", "routed")
PAPER_RANGES = ((0.90, 0.99), (0.80, 0.89), (0.70, 0.79))


@dataclass(frozen=True)
class Evolution:
    """How experts 2 to E follow expert 1, in a training where it alone learns.

    Attributes:
        mode: what they become after every optimizer step, see `evolved`. `"ema"` (default) is what the paper's text
            describes, `"literal"` its equation, `"update"` lies between.
        beta_ranges: E - 1 pairs (lowest, highest), each in [0, 1], of experts 2, 3, ...; default: the paper's, for 4.
        beta_per_layer: whether every layer has its own draws; the paper does not say. Default: one draw for all.
        tokens: what tokens go through meanwhile; the paper does not say. `"first"` (default): expert 1 alone with
            weight 1, as if the model were dense. `"routed"`: the experts that the frozen routers choose. Read by
            `ExpertTrainer`.
        seed: of the draws, which depend on it and on the number of the step alone.
    Raises: ValueError for a field that is none of these.
    """

    mode: str = "ema"
    beta_ranges: tuple[tuple[float, float], ...] = PAPER_RANGES
    beta_per_layer: bool = False
    tokens: str = "first"
    seed: int = 0

    def __post_init__(self):
        for name, allowed in (("mode", MODES), ("tokens", PASSES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        ranges = tuple(tuple(pair) for pair in self.beta_ranges)
        wrong = [pair for pair in ranges if len(pair) != 2 or not 0 <= pair[0] <= pair[1] <= 1]
        if wrong or not ranges:
            raise ValueError(
                f"beta_ranges must be pairs (lowest, highest) in [0, 1], one per expert but the first, got {ranges}"
            )
        object.__setattr__(self, "beta_ranges", ranges)  # a list, as JSON has it, would not compare equal

    def betas(self, step: int, num_layers: int) -> Tensor:
        """(M, E - 1) float64 of a step, on the CPU.

        Args:
            step: number of the optimizer step, from 0.
            num_layers: M.
        """
        # Only the lowest 32 bits of a seed count.
        mixed = (self.seed * 0x9E3779B1 + step * 0x85EBCA6B + 0xC2B2AE35) & 0xFFFFFFFF
        generator = torch.Generator().manual_seed(mixed)
        ranges = torch.tensor(self.beta_ranges, dtype=torch.float64)
        drawn = torch.rand(
            num_layers if self.beta_per_layer else 1, len(ranges), generator=generator, dtype=torch.float64
        )
        return (ranges[:, 0] + drawn * (ranges[:, 1] - ranges[:, 0])).expand(num_layers, -1)


def evolved(
    experts: Tensor, betas: Tensor, mode: str, before: Tensor | None = None, gradient: Tensor | None = None
) -> Tensor:
    """What experts 2 to E become after an optimizer step that moved expert 1 from theta_1' to theta_1.

    `"ema"`: beta * theta_n + (1 - beta) * theta_1. `"update"`: beta * theta_1' + (1 - beta) * theta_1.
    `"literal"`: beta * theta_1' + (1 - beta) * gradient(theta_1').

    Args:
        experts: (E, ...) packed parameters, expert 1 at place 0.
        betas: (E - 1,).
        before: (...) theta_1', for `"update"` and `"literal"`.
        gradient: (...) of the loss at theta_1', for `"literal"`.
    Returns: (E - 1, ...), of the experts' dtype.
    """
    betas = betas.to(experts).view(-1, *[1] * (experts.dim() - 1))
    old = experts[1:] if mode == "ema" else before
    new = gradient if mode == "literal" else experts[0]
    return betas * old + (1 - betas) * new


class ExpertEvolutionCallback(TrainerCallback):
    """Evolves the experts of a model after every optimizer step; resuming needs no state.

    Of the packed parameters only expert 1 gets a gradient while training lasts. The gradient in mode `"literal"` is
    the optimizer's: of all accumulated micro-batches, and clipped where `max_grad_norm` says so.

    Args:
        evolution: how.
    """

    def __init__(self, evolution: Evolution):
        self.evolution = evolution
        self._before: list[list[Tensor]] = []
        self._hooks: list = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        check_evolution(self.evolution, args, model)
        self._drop_hooks()
        parameters = [parameter for layer in packed_parameters(model) for parameter in layer]
        self._hooks = [one.register_hook(gradient_of_first) for one in parameters if one.requires_grad]

    def on_train_end(self, args, state, control, **kwargs):
        self._drop_hooks()

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.evolution.mode != "ema":
            self._before = [[one.detach()[0].clone() for one in layer] for layer in packed_parameters(model)]

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        # With float16's scaler a step whose gradients overflowed is none.
        if not getattr(optimizer, "step_was_skipped", False):
            layers = packed_parameters(model)
            betas = self.evolution.betas(state.global_step, len(layers))
            for number, layer in enumerate(layers):
                for place, parameter in enumerate(layer):
                    parameter[1:] = self._evolved(parameter, betas[number], number, place)
        self._before = []

    def _evolved(self, parameter: Tensor, betas: Tensor, number: int, place: int) -> Tensor:
        mode = self.evolution.mode
        if mode == "ema":
            return evolved(parameter, betas, mode)
        gradient = torch.zeros_like(parameter[0]) if parameter.grad is None else parameter.grad[0]
        return evolved(parameter, betas, mode, self._before[number][place], gradient)

    def _drop_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def packed_parameters(model: nn.Module) -> list[list[nn.Parameter]]:
    """The experts' parameters, a list per layer that has them."""
    # By name: in a model opened with trust_remote_code the class is a copy of ours.
    packed = (one for one in model.modules() if PackedExperts.__name__ in [base.__name__ for base in type(one).__mro__])
    return [list(module.parameters()) for module in packed]


def gradient_of_first(gradient: Tensor) -> Tensor:
    """A packed parameter's gradient with that of experts 2 to E set to 0."""
    return torch.cat([gradient[:1], torch.zeros_like(gradient[1:])])


def check_evolution(evolution: Evolution, args, model: nn.Module) -> None:
    """Raises: ValueError for a model whose experts cannot evolve so, or arguments under which they would not."""
    layers = packed_parameters(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no experts that could evolve: roe-llava upcycle gives a LLaVA some"
        )
    found, wanted = len(layers[0][0]), len(evolution.beta_ranges) + 1
    if found != wanted:
        raise ValueError(
            f"beta_ranges are for {wanted} experts, got a model with {found}: give a range per expert but the first"
        )
    low = {one.dtype for layer in layers for one in layer if torch.finfo(one.dtype).bits < 32}
    if low:
        raise ValueError(
            f"experts are {', '.join(map(str, low))}, expected float32: small moves vanish when weights are rounded. "
            "Load the model with dtype=torch.float32, and compute with bf16=True"
        )
    if args.weight_decay:
        raise ValueError(
            f"weight_decay {args.weight_decay} would shrink experts 2 to {found}, which follow expert 1: leave it 0"
        )


__all__ = ["Evolution", "ExpertEvolutionCallback", "evolved"]
