"""Routers: what gives a token its logits over the experts of a layer.

N tokens, E experts, D hidden; of a token-aware router H hidden width, r rank, W width of the made network's output.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from .configuration_moe_llava import MoeLlavaConfig


# A class of its own: quantisers replace exactly nn.Linear, and these small matrices decide too much to be rounded.
class RouterLinear(nn.Linear):
    """`nn.Linear` that quantisation leaves alone and that computes in float32, under autocast too."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        with torch.autocast(hidden_states.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return nn.functional.linear(hidden_states.float(), self.weight.float(), bias)


class LinearRouter(RouterLinear):
    """W x, the router of MoE-LLaVA (eq. 5)."""

    def __init__(self, config: MoeLlavaConfig):
        super().__init__(config.text_config.hidden_size, config.num_experts, bias=False)

    def forward(self, hidden_states: Tensor, *image_tokens: Tensor | None) -> Tensor:
        """(N, E) float32 logits of (N, D) tokens; what a token stands for is of no account."""
        return super().forward(hidden_states)


class Hypernetwork(nn.Module):
    """Makes a network of two layers for every token and runs it: W_up(z) SwiGLU(W_down(z) z) (EvoMoE, eq. 2 to 7).

    The paper makes all its weights at once, (w1 z + b1) w2 + b2. They are linear in a = w1 z + b1, so the product
    with z is a sum over a's entries, and b2 is the entry of a constant 1: the (2r, D) matrix of a token never exists.
    """

    def __init__(self, hidden_size: int, inner_size: int, rank: int, width: int):
        super().__init__()
        self.rank, self.width = rank, width
        self.encode = RouterLinear(hidden_size, inner_size)
        self.down = RouterLinear(hidden_size, 2 * rank * (inner_size + 1), bias=False)
        self.up = RouterLinear(rank, width * (inner_size + 1), bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(n, W) float32 of (n, D) tokens; n may be 0, so that every parameter takes part in every step."""
        code = self.encode(hidden_states)
        code = torch.cat([code, torch.ones_like(code[:, :1])], dim=1)[:, None]  # (n, 1, H + 1)
        gate, value = self._made(self.down, hidden_states, code, 2 * self.rank).chunk(2, dim=1)
        return self._made(self.up, silu(gate) * value, code, self.width)

    @staticmethod
    def _made(parts: RouterLinear, states: Tensor, code: Tensor, size: int) -> Tensor:
        """(n, size): the matrix that a token's code makes, times its state."""
        return (parts(states).unflatten(1, (size, code.shape[-1])) * code).sum(-1)


class TokenAwareRouter(nn.Module):
    """A hypernetwork for image tokens, one for text tokens, and a matrix to E logits (EvoMoE, eq. 8)."""

    def __init__(self, config: MoeLlavaConfig):
        super().__init__()
        sizes = config.text_config.hidden_size, config.router_hidden_size, config.router_rank, config.router_width
        self.image, self.text = Hypernetwork(*sizes), Hypernetwork(*sizes)
        self.score = RouterLinear(config.router_width, config.num_experts, bias=False)

    def forward(
        self, hidden_states: Tensor, is_image: Tensor, image_rows: Tensor | None, text_rows: Tensor | None
    ) -> Tensor:
        """(N, E) float32 logits of (N, D) tokens.

        Args:
            is_image: (N,) bool, tokens that stand for parts of images.
            image_rows, text_rows: int64, the numbers of these tokens, and of all others; `None` to run both
                hypernetworks for all tokens, where shapes may not depend on the input.
        """
        if image_rows is None:
            embedding = torch.where(is_image[:, None], self.image(hidden_states), self.text(hidden_states))
        else:
            parts = self.image(hidden_states[image_rows]), self.text(hidden_states[text_rows])
            embedding = torch.cat(parts)[torch.cat([image_rows, text_rows]).argsort()]
        return self.score(embedding)


ROUTERS = {"linear": LinearRouter, "token_aware": TokenAwareRouter}

__all__ = ["ROUTERS", "LinearRouter", "RouterLinear", "TokenAwareRouter"]
