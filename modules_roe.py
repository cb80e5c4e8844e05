"""The small modules RoE adds to a decoder layer: an adapter and a router.

B batch, T turns, D hidden, A adapter width.
"""

import torch
from torch import Tensor, nn


# A class of its own: quantisers replace exactly nn.Linear, and these small matrices decide too much to be rounded.
class RoeLinear(nn.Linear):
    """`nn.Linear` that quantisation leaves alone; computes in its own dtype and answers in its input's."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states.to(self.weight.dtype)).to(hidden_states.dtype)


class RoeUpProjection(RoeLinear):
    """Second half of an adapter; told apart because its first values are small."""


class RoeAdapter(nn.Module):
    """W_up ReLU(W_down u), the stand-in for a skipped layer (RoE, adapter-based skip connection)."""

    def __init__(self, hidden_size: int, adapter_size: int):
        super().__init__()
        self.down_proj = RoeLinear(hidden_size, adapter_size, bias=False)
        self.up_proj = RoeUpProjection(adapter_size, hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.up_proj(self.down_proj(hidden_states).relu())


class RoeRouter(RoeLinear):
    """W [u_image ; u_text]: logits to keep (row 0) and to skip (row 1) a layer."""

    def __init__(self, hidden_size: int):
        super().__init__(2 * hidden_size, 2, bias=False)

    def forward(self, routing_states: Tensor) -> Tensor:
        """(B, T, 2) logits from normalised routing tokens (B, 1 + T, D), one decision per turn."""
        image, text = routing_states[:, :1], routing_states[:, 1:]
        pair = torch.cat([image.expand_as(text), text], dim=-1).to(self.weight.dtype)
        with torch.autocast(pair.device.type, enabled=False):  # not rounded to what the rest is computed in
            return nn.functional.linear(pair, self.weight).float()


def check_routers(layers: nn.ModuleList) -> None:
    """Raises: ValueError if PEFT put matrices beside a router, which reads a pair of tokens and not one."""
    for index, layer in enumerate(layers):
        if hasattr(layer.router, "base_layer"):
            raise ValueError(
                f"the router of layer {index} is a PEFT {type(layer.router).__name__}: routers have no use for it "
                '(target_modules="all-linear"?). Pass exclude_modules=["router"], or train routers whole, with '
                'modules_to_save=["router", "adapter", "routing_tokens"]'
            )


__all__ = ["RoeAdapter", "RoeLinear", "RoeRouter", "RoeUpProjection", "check_routers"]
