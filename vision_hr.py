"""LLaVA-HR's vision tower: a fast CLIP and a slow ConvNeXt joined (Mixture-of-Resolution Adaptation, arXiv 2403.03003).

The slow tower sees the whole image, the fast one a small copy. The slow tower's last map is mixed into the fast one's
layers by three adapters, each gated by one number per image, and once more into what comes out. There are as many image
tokens as the fast tower has patches, however large the image.

Top to bottom: tensor functions, the fast tower, the slow tower, adapter and fusion, the model.

B images, S side of the image, F side of the small image, G side of the fast tower's grid, C its width, Gs side of the
slow tower's last map, Cs its width, P positions of CLIP's table.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPEncoderLayer, CLIPPreTrainedModel
from transformers.models.convnext.modeling_convnext import (
    ConvNextEmbeddings,
    ConvNextLayerNorm,
    ConvNextStage,
)
from transformers.utils.generic import can_return_tuple

from .configuration_hr_vision import LlavaHrVisionConfig


def small_image(pixel_values: Tensor, side: int) -> Tensor:
    """(B, 3, S, S) to (B, 3, F, F), corners on corners; in single precision, as published."""
    return functional.interpolate(pixel_values.float(), (side, side), mode="bilinear", align_corners=True)


def resampled_table(table: Tensor, grid: int) -> Tensor:
    """(P, C) positions of a square grid to (G * G, C), as an image of C colours; unchanged where it fits."""
    side = round(table.shape[0] ** 0.5)
    if side == grid:
        return table
    image = table.float().view(1, side, side, -1).permute(0, 3, 1, 2)
    image = functional.interpolate(image, (grid, grid), mode="bicubic", antialias=True, align_corners=False)
    return image.permute(0, 2, 3, 1).reshape(grid * grid, -1).to(table.dtype)


def as_image(tokens: Tensor) -> Tensor:
    """(B, G * G, C) to (B, C, G, G), in memory still token by token."""
    side = round(tokens.shape[1] ** 0.5)
    return tokens.unflatten(1, (side, side)).permute(0, 3, 1, 2)


def as_tokens(image: Tensor) -> Tensor:
    """(B, C, G, G) to (B, G * G, C)."""
    return image.flatten(2).transpose(1, 2)


def aligned(tokens: Tensor, grid: int) -> Tensor:
    """(B, Gs * Gs, C) to (B, G * G, C): interpolated to a finer grid, averaged for a coarser one.

    Averaging is over whole cells: the coarser side divides the finer one, which the configuration has checked.
    """
    side = round(tokens.shape[1] ** 0.5)
    if side < grid:
        image = functional.interpolate(as_image(tokens).float(), (grid, grid), mode="bilinear", align_corners=True)
        return as_tokens(image).to(tokens.dtype)
    if side > grid:
        return as_tokens(functional.avg_pool2d(as_image(tokens), side // grid))
    return tokens


class FastEmbeddings(nn.Module):
    """CLIP's patches and positions, without its class token."""

    def __init__(self, config):
        super().__init__()
        self.patch_embedding = nn.Conv2d(
            config.num_channels, config.hidden_size, config.patch_size, stride=config.patch_size, bias=False
        )
        self.position_embedding = nn.Embedding((config.image_size // config.patch_size) ** 2, config.hidden_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, F, F) to (B, G * G, C)."""
        patches = self.patch_embedding(pixel_values)
        # Looked up, since the weight itself may be elsewhere (offloaded, or sharded by ZeRO-3) until it is called.
        table = self.position_embedding(torch.arange(self.position_embedding.num_embeddings, device=patches.device))
        return as_tokens(patches) + resampled_table(table, patches.shape[-1])


class LlavaHrFastTower(CLIPPreTrainedModel):
    """CLIP's layers and what precedes them; no class token, no norm at the end."""

    main_input_name = "pixel_values"
    _input_embed_layer = "patch_embedding"
    _no_split_modules = ["CLIPEncoderLayer", "FastEmbeddings"]

    def __init__(self, config):
        super().__init__(config)
        self.embeddings = FastEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList([CLIPEncoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.gradient_checkpointing = False
        self.post_init()

    def embed(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, F, F) to what enters the first layer, (B, G * G, C)."""
        return self.pre_layrnorm(self.embeddings(pixel_values))


class LlavaHrSlowTower(nn.Module):
    """ConvNeXt's stem and stages; no pooling and no norm at the end.

    Not a model of its own: Transformers would ask it for attention implementations, and ConvNeXt has no attention.
    """

    def __init__(self, config):
        super().__init__()
        self.embeddings = ConvNextEmbeddings(config)
        widths = [config.hidden_sizes[0], *config.hidden_sizes]
        self.stages = nn.ModuleList(
            ConvNextStage(config, widths[number], widths[number + 1], stride=2 if number else 1, depth=depth)
            for number, depth in enumerate(config.depths)
        )
        for module in self.modules():
            if isinstance(module, ConvNextLayerNorm):  # Transformers has 1e-6 in its code, ConvNeXt-XXL has 1e-5
                module.eps = config.layer_norm_eps

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, S, S) to (B, Gs * Gs, Cs)."""
        features = self.embeddings(pixel_values)
        for stage in self.stages:
            features = stage(features)
        return as_tokens(features)


class AdapterProjection(nn.Linear):
    """What an adapter adds goes through one: zero at first, so that a new adapter changes nothing, as published."""


class MixtureOfResolutionAdapter(nn.Module):
    """Mixes the slow tower's map into the fast tower's tokens (LLaVA-HR, eq. 2 to 4).

    The gate is one number per image, as in the published code; the paper writes a vector.
    """

    def __init__(self, width: int, slow_width: int):
        super().__init__()
        self.slow_conv = nn.Linear(slow_width, slow_width)
        self.slow_proj = AdapterProjection(slow_width, width)
        self.fast_conv = nn.Conv2d(width, width, kernel_size=7, padding=3, groups=width)
        self.fast_proj = AdapterProjection(width, width)
        self.gate_1 = nn.Linear(2 * width, width // 2)
        self.gate_2 = nn.Linear(width // 2, 1)

    def forward(self, tokens: Tensor, slow: Tensor) -> Tensor:
        """tokens (B, G * G, C) and slow (B, Gs * Gs, Cs) to (B, G * G, C)."""
        grid = round(tokens.shape[1] ** 0.5)
        tokens = tokens + self.fast_proj(functional.gelu(as_tokens(self.fast_conv(as_image(tokens)))))
        slow = aligned(self.slow_proj(functional.gelu(self.slow_conv(slow))), grid)
        return torch.addcmul(tokens, torch.tanh(self.gate(tokens, slow))[:, None], slow)

    def gate(self, tokens: Tensor, slow: Tensor) -> Tensor:
        """(B, 1) raw gate of every image, from the means over its tokens."""
        means = torch.cat([tokens.mean(1), slow.mean(1)], dim=-1)
        return self.gate_2(functional.gelu(self.gate_1(means)))


class ResolutionFusion(nn.Module):
    """The sum of both towers' features, each through a matrix of its own."""

    def __init__(self, width: int, slow_width: int):
        super().__init__()
        self.fast_proj = nn.Linear(width, width)
        self.slow_proj = nn.Linear(slow_width, width)

    def forward(self, tokens: Tensor, slow: Tensor) -> Tensor:
        """tokens (B, G * G, C) and slow (B, Gs * Gs, Cs) to (B, G * G, C)."""
        slow = aligned(slow, round(tokens.shape[1] ** 0.5))
        return self.fast_proj(tokens) + self.slow_proj(slow)


class LlavaHrVisionModel(PreTrainedModel):
    """Both towers, the adapters between them, and the fusion behind them."""

    config: LlavaHrVisionConfig
    config_class = LlavaHrVisionConfig
    base_model_prefix = "vision_tower"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["CLIPEncoderLayer", "FastEmbeddings", "ConvNextStage", "MixtureOfResolutionAdapter"]

    def __init__(self, config: LlavaHrVisionConfig):
        super().__init__(config)
        slow_width = config.slow_config.hidden_sizes[-1]
        self.fast = LlavaHrFastTower(config.fast_config)
        self.slow = LlavaHrSlowTower(config.slow_config)
        self.adapters = nn.ModuleList(
            MixtureOfResolutionAdapter(config.hidden_size, slow_width) for _ in config.adapter_layers
        )
        self.fusion = ResolutionFusion(config.hidden_size, slow_width)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, AdapterProjection):  # only leaves are visited
            init.zeros_(module.weight)

    def get_input_embeddings(self) -> nn.Module:
        return self.fast.embeddings.patch_embedding

    @can_return_tuple
    def forward(self, pixel_values: Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """The features of images.

        Args:
            pixel_values: (B, 3, S, S).
            kwargs: taken and left alone, for callers that ask any tower for its hidden states.
        Returns: `last_hidden_state` (B, G * G, C), and in `hidden_states` that alone: there is no other layer that
            LLaVA could select (`vision_feature_layer` is -1).
        Raises: ValueError for images of another size: the published settings differ in their training.
        """
        self.check_size(pixel_values)
        dtype = self.fast.embeddings.patch_embedding.weight.dtype
        slow = self.slow(pixel_values.to(dtype))
        tokens = self.fast.embed(small_image(pixel_values, self.config.fast_side).to(dtype))
        adapters = dict(zip(self.config.adapter_layers, self.adapters, strict=True))
        for number, layer in enumerate(self.fast.layers, start=1):
            tokens = layer(tokens, None)
            if number in adapters:
                tokens = adapters[number](tokens, slow)
        features = self.fusion(tokens, slow)
        return BaseModelOutputWithPooling(last_hidden_state=features, hidden_states=(features,))

    def check_size(self, pixel_values: Tensor) -> None:
        """Raises: ValueError if images are not of the configuration's size."""
        expected = (self.config.num_channels, self.config.image_size, self.config.image_size)
        if pixel_values.dim() != 4 or tuple(pixel_values.shape[1:]) != expected:
            shape = ", ".join(map(str, expected))
            raise ValueError(
                f"pixel_values have shape {list(pixel_values.shape)}, expected [images, {shape}]: were they made by "
                "the processor of this checkpoint?"
            )


__all__ = ["LlavaHrVisionModel"]
