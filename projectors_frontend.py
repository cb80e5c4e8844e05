"""Projectors: what turns image features into tokens of the language model, one class per `projector_type`.

`linear`, `mlpNx_gelu` (N linear layers, GELU between them; with two it is stock LLaVA's), `mlp_downsample` (VILA-1.5:
2x2 cells of patches become one token) and `identity`. VILA: arXiv 2312.07533.

B batch, G side of the patch grid, N patches, C width of the image features, D hidden size.
"""

import math
import re

from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import LlavaConfig
from transformers.activations import ACT2FN

MLP_TYPE = r"mlp([1-9]\d*)x_gelu"
CELL = 2  # side of the square of patches that becomes one token


class LinearProjector(nn.Module):
    """One linear layer."""

    def __init__(self, config: LlavaConfig):
        super().__init__()
        sizes = feature_size(config), config.text_config.hidden_size
        self.linear = nn.Linear(*sizes, bias=config.multimodal_projector_bias)

    def forward(self, image_features: Tensor) -> Tensor:
        """(B, N, C) to (B, N, D)."""
        return self.linear(image_features)


class MlpProjector(nn.Module):
    """Linear layers `linear_1` to `linear_N` with activations between them; N is read from `mlpNx_gelu`."""

    def __init__(self, config: LlavaConfig):
        super().__init__()
        self.act = ACT2FN[config.projector_hidden_act]
        self.depth, hidden_size = mlp_depth(config.projector_type), config.text_config.hidden_size
        width = feature_size(config)
        for number in range(1, self.depth + 1):
            layer = nn.Linear(width, hidden_size, bias=config.multimodal_projector_bias)
            self.add_module(f"linear_{number}", layer)
            width = hidden_size

    def forward(self, image_features: Tensor) -> Tensor:
        """(B, N, C) to (B, N, D)."""
        hidden_states = self.linear_1(image_features)
        for number in range(2, self.depth + 1):
            hidden_states = self.get_submodule(f"linear_{number}")(self.act(hidden_states))
        return hidden_states


class DownsampleProjector(nn.Module):
    """Cells of 2x2 patches, a norm over their channels, two linear layers (VILA-1.5)."""

    def __init__(self, config: LlavaConfig):
        super().__init__()
        width, hidden_size = CELL**2 * feature_size(config), config.text_config.hidden_size
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.linear_1 = nn.Linear(width, hidden_size, bias=config.multimodal_projector_bias)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(hidden_size, hidden_size, bias=config.multimodal_projector_bias)

    def forward(self, image_features: Tensor) -> Tensor:
        """(B, G * G, C) to (B, ceil(G / 2) ** 2, D)."""
        return self.linear_2(self.act(self.linear_1(self.norm(cells(image_features)))))


class IdentityProjector(nn.Module):
    """Image features as they are.

    Raises: ValueError if they are not as wide as the language model.
    """

    def __init__(self, config: LlavaConfig):
        super().__init__()
        if feature_size(config) != config.text_config.hidden_size:
            raise ValueError(
                f"projector_type 'identity' hands image features of {feature_size(config)} channels to a language "
                f"model of hidden size {config.text_config.hidden_size}, expected the same width: is another "
                "projector meant?"
            )

    def forward(self, image_features: Tensor) -> Tensor:
        """(B, N, C), unchanged."""
        return image_features


def feature_size(config: LlavaConfig) -> int:
    """Width C of what a tower hands over: its hidden size, times the number of layers that are read."""
    layers = config.vision_feature_layer
    return config.vision_config.hidden_size * (1 if isinstance(layers, int) else len(layers))


def mlp_depth(projector_type: str) -> int:
    """N of `mlpNx_gelu`.

    Raises: ValueError if it is no such name.
    """
    found = re.fullmatch(MLP_TYPE, projector_type)
    if found is None:
        raise ValueError(f"projector_type {projector_type!r} is no MLP, expected mlpNx_gelu with N from 1 on")
    return int(found[1])


def grid_side(num_patches: int) -> int:
    """G of a square grid.

    Raises: ValueError if the patches fill none.
    """
    side = math.isqrt(num_patches)
    if side * side != num_patches:
        raise ValueError(
            f"{num_patches} image features fill no square grid, which mlp_downsample needs: does "
            "vision_feature_select_strategy leave out a class token that is not there, or keep one that is?"
        )
    return side


def cells(image_features: Tensor) -> Tensor:
    """(B, G * G, C), row by row, to (B, g * g, 4 * C), g = ceil(G / 2), **column by column**: as VILA was trained.

    A cell's channels are those of its top left patch, top right, bottom left, bottom right. An odd grid gets a row of
    zeros at the bottom and a column of zeros at the right.
    """
    batch_size, num_patches, width = image_features.shape
    side = grid_side(num_patches)
    missing = -side % CELL
    grid = pad(image_features.reshape(batch_size, side, side, width), (0, 0, 0, missing, 0, missing))
    half = (side + missing) // CELL
    parts = grid.reshape(batch_size, half, CELL, half, CELL, width)  # row, row within, column, column within
    return parts.permute(0, 3, 1, 2, 4, 5).reshape(batch_size, half * half, CELL**2 * width)


def num_image_tokens(projector_type: str, num_patches: int) -> int:
    """Tokens a projector makes of the features of one image.

    Raises: ValueError if they fill no grid where one is needed.
    """
    return math.ceil(grid_side(num_patches) / CELL) ** 2 if projector_type == "mlp_downsample" else num_patches


SINGLE_PROJECTORS = {"linear": LinearProjector, "mlp_downsample": DownsampleProjector, "identity": IdentityProjector}


def projector_class(projector_type: str) -> type[nn.Module]:
    """The class of a `projector_type`; made of the whole LLaVA configuration.

    Raises: ValueError for a type that is not known.
    """
    if projector_type in SINGLE_PROJECTORS:
        return SINGLE_PROJECTORS[projector_type]
    if re.fullmatch(MLP_TYPE, projector_type):
        return MlpProjector
    raise ValueError(
        f"projector_type {projector_type!r} is not supported, expected mlpNx_gelu (N from 1 on) or one of "
        f"{sorted(SINGLE_PROJECTORS)}"
    )


__all__ = [
    "DownsampleProjector",
    "IdentityProjector",
    "LinearProjector",
    "MlpProjector",
    "num_image_tokens",
    "projector_class",
]
