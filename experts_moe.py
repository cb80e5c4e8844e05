"""The experts of a layer as packed parameters, on Transformers' experts interface.

`config._experts_implementation` decides what multiplies: `"eager"` is the loop here, `"batched_mm"` and `"grouped_mm"`
(the default) are Transformers' own. All give the same results.

N tokens, K experts per token, E experts, D hidden, I width of an expert.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation


class PackedExperts(nn.Module):
    """E MLPs of one shape: rows of parameters, named as the experts interface expects them.

    Args:
        config: of the language model.
        num_experts: E.
    """

    in_proj = "gate_up_proj"  # of the first projection: with a gate both halves, the gate's first
    in_projections = 2
    with_bias = False

    def __init__(self, config: PreTrainedConfig, num_experts: int):
        super().__init__()
        self.num_experts = num_experts
        self.hidden_dim, self.intermediate_dim = config.hidden_size, config.intermediate_size
        self.act_fn = ACT2FN[config.hidden_act]
        width = self.in_projections * self.intermediate_dim
        self.register_parameter(self.in_proj, nn.Parameter(torch.empty(num_experts, width, self.hidden_dim)))
        self.down_proj = nn.Parameter(torch.empty(num_experts, self.hidden_dim, self.intermediate_dim))
        if self.with_bias:
            self.register_parameter(f"{self.in_proj}_bias", nn.Parameter(torch.empty(num_experts, width)))
            self.down_proj_bias = nn.Parameter(torch.empty(num_experts, self.hidden_dim))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(N, D) sum over a token's experts, each with its weight.

        Args:
            hidden_states: (N, D).
            top_k_index: (N, K) int64, which experts.
            top_k_weights: (N, K) float32; 0 where a choice was dropped.
        """
        total = torch.zeros_like(hidden_states, dtype=top_k_weights.dtype)
        for expert in top_k_index.unique().tolist():
            rows, places = (top_k_index == expert).nonzero(as_tuple=True)
            output = self.expert(expert, hidden_states[rows])
            total.index_add_(0, rows, output * top_k_weights[rows, places, None])
        return total.to(hidden_states.dtype)

    def expert(self, index: int, tokens: Tensor) -> Tensor:
        """One expert over (n, D) tokens."""
        inner = self._project(self.in_proj, index, tokens)
        inner = self._apply_gate(inner) if self.in_projections == 2 else self.act_fn(inner)
        return self._project("down_proj", index, inner)

    def _project(self, name: str, index: int, tokens: Tensor) -> Tensor:
        bias = getattr(self, f"{name}_bias")[index] if self.with_bias else None
        return nn.functional.linear(tokens, getattr(self, name)[index], bias)

    def reset_parameters(self, std: float) -> None:
        """First values: normal matrices, no bias."""
        for name, parameter in self.named_parameters(recurse=False):
            init.zeros_(parameter) if name.endswith("_bias") else init.normal_(parameter, mean=0.0, std=std)


@use_experts_implementation
class GatedExperts(PackedExperts):
    """act(W_gate x) * W_up x, then W_down: Llama, Mistral, Qwen2, StableLM."""


@use_experts_implementation(has_bias=True)
class GatedBiasExperts(PackedExperts):
    """The same with biases: a Llama with `mlp_bias`."""

    with_bias = True


@use_experts_implementation(has_bias=True, has_gate=False)
class PlainExperts(PackedExperts):
    """W_down act(W_up x), with biases: Phi, whose names are fc1 and fc2."""

    in_proj, in_projections, with_bias = "up_proj", 1, True


def experts_class(config: PreTrainedConfig) -> type[PackedExperts]:
    """What the experts of a language model are made of."""
    if config.model_type == "phi":
        return PlainExperts
    return GatedBiasExperts if getattr(config, "mlp_bias", False) else GatedExperts


__all__ = ["PackedExperts", "experts_class"]
