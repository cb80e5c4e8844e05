"""Configuration of LLaVA-HR's two vision towers (Mixture-of-Resolution Adaptation, arXiv 2403.03003)."""

from transformers import CLIPVisionConfig, ConvNextConfig, PreTrainedConfig

NUM_ADAPTERS = 3
# The fast image's side is 14/32 of the image's, so that a CLIP patch of 14 pixels sees what a ConvNeXt cell of 32 sees,
# and never below CLIP's own 336. The published code has these numbers, whatever the towers' patches are.
FAST_SCALE, LEAST_FAST_SIDE = (14, 32), 336


class LlavaHrVisionConfig(PreTrainedConfig):
    """Configuration of [`LlavaHrVisionModel`]; the defaults are those of LLaVA-HR 7B and 13B at 1024 pixels.

    Args:
        fast_config (`CLIPVisionConfig` or `dict`, *optional*):
            Of the tower that sees the small image. Its `image_size` is that of its position table, which is resampled
            where the small image has another one; its layers are a multiple of 4. `None`: CLIP-L/14-336.
        slow_config (`ConvNextConfig` or `dict`, *optional*):
            Of the tower that sees the whole image. Its `layer_norm_eps` holds for every norm in it: 1e-6, in LLaVA-HR-X
            1e-5. `None`: ConvNeXt-L.
        image_size (`int`, defaults to 1024):
            Side S of the square image in pixels, a multiple of the slow tower's stride. Read by the tower and by what
            counts image tokens.
        has_adapters (`bool`, defaults to `True`):
            Whether the slow tower's map is also mixed into the fast tower's layers, by three adapters. False for the
            published `freeze_vision`, where the towers meet at the end alone. Read when layers are built.
        initializer_range (`float`, defaults to 0.02):
            Standard deviation of the first values of what joins the towers.
    """

    model_type = "llava_hr_vision"
    base_config_key = "vision_config"
    # A plain mapping and no `sub_configs_defaults`, which Transformers has only since 5.20.
    sub_configs = {"fast_config": CLIPVisionConfig, "slow_config": ConvNextConfig}

    fast_config: dict | PreTrainedConfig | None = None
    slow_config: dict | PreTrainedConfig | None = None
    image_size: int = 1024
    has_adapters: bool = True
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        # Before the parent's: it hands options such as the attention implementation on to them.
        self.fast_config = as_config(CLIPVisionConfig, self.fast_config, CLIP_L)
        self.slow_config = as_config(ConvNextConfig, self.slow_config, CONVNEXT_L)
        super().__post_init__(**kwargs)
        self._check()

    @property
    def hidden_size(self) -> int:
        """Width C of the features."""
        return self.fast_config.hidden_size

    @property
    def num_channels(self) -> int:
        """Colours of the image."""
        return self.fast_config.num_channels

    @property
    def num_hidden_layers(self) -> int:
        """Layers of the fast tower, which all run."""
        return self.fast_config.num_hidden_layers

    @property
    def num_attention_heads(self) -> int:
        """Heads of the fast tower."""
        return self.fast_config.num_attention_heads

    @property
    def adapter_layers(self) -> list[int]:
        """How many layers of the fast tower precede each adapter: n/4, n/2 and 3n/4; none without adapters."""
        quarter = self.num_hidden_layers // (NUM_ADAPTERS + 1)
        return [quarter * (k + 1) for k in range(NUM_ADAPTERS)] if self.has_adapters else []

    @property
    def fast_side(self) -> int:
        """Side F of the small image in pixels."""
        part, whole = FAST_SCALE
        return max(self.image_size * part // whole, LEAST_FAST_SIDE)

    @property
    def fast_grid(self) -> int:
        """Side G of the fast tower's grid; G * G is the number of tokens per image."""
        return self.fast_side // self.fast_config.patch_size

    @property
    def slow_stride(self) -> int:
        """Pixels per cell of the slow tower's last map."""
        return self.slow_config.patch_size * 2 ** (len(self.slow_config.depths) - 1)

    @property
    def slow_grid(self) -> int:
        """Side of the slow tower's last map."""
        return self.image_size // self.slow_stride

    @property
    def patch_size(self) -> int:
        """Pixels of the image per token and side: what a processor needs to count G * G tokens."""
        return self.image_size // self.fast_grid

    def _check(self) -> None:
        """Raises: ValueError naming the entry that does not fit the others."""
        for name, what in (("fast_config", self.fast_config), ("slow_config", self.slow_config)):
            if type(what.patch_size) is not int or what.patch_size < 1:
                raise ValueError(f"{name}.patch_size must be a positive integer, got {what.patch_size!r}")
        if type(self.image_size) is not int or self.image_size < 1 or self.image_size % self.slow_stride:
            raise ValueError(
                f"image_size must be a multiple of {self.slow_stride}, the slow tower's stride, got {self.image_size!r}"
            )
        if self.num_hidden_layers % (NUM_ADAPTERS + 1):
            raise ValueError(
                f"fast_config.num_hidden_layers must be a multiple of {NUM_ADAPTERS + 1}, since adapters sit at its "
                f"quarters, got {self.num_hidden_layers}"
            )
        grids = sorted((self.fast_grid, self.slow_grid))
        if not grids[0] or grids[1] % grids[0]:
            raise ValueError(
                f"an image_size of {self.image_size} gives the fast tower {self.fast_grid} x {self.fast_grid} tokens "
                f"and the slow one a map of {self.slow_grid} x {self.slow_grid}, expected that one side divides the "
                "other: the published settings are 384, 768 and 1024"
            )
        if self.image_size // self.patch_size != self.fast_grid:
            raise ValueError(
                f"an image_size of {self.image_size} gives {self.fast_grid} x {self.fast_grid} tokens, which no whole "
                "number of pixels per token does: a processor could not count them"
            )
        if self.fast_config.num_channels != self.slow_config.num_channels:
            raise ValueError(
                f"fast_config.num_channels is {self.fast_config.num_channels}, slow_config.num_channels "
                f"{self.slow_config.num_channels}, expected the same: both towers see one image"
            )


CLIP_L = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
CONVNEXT_L = {"hidden_sizes": [192, 384, 768, 1536], "depths": [3, 3, 27, 3], "layer_norm_eps": 1e-6}
# LLaVA-HR-X: 14B and its slow tower.
CONVNEXT_XXL = {"hidden_sizes": [384, 768, 1536, 3072], "depths": [3, 4, 30, 3], "layer_norm_eps": 1e-5}


def as_config(cls: type[PreTrainedConfig], given: dict | PreTrainedConfig | None, default: dict) -> PreTrainedConfig:
    """A sub-configuration, of whatever a caller or a file gave.

    Raises: ValueError if it is of another kind.
    """
    if isinstance(given, cls):
        return given
    if given is None:
        return cls(**default)
    if not isinstance(given, dict):
        raise ValueError(f"expected a {cls.__name__} or a dict of its entries, got {type(given).__name__}")
    if (kind := given.get("model_type", cls.model_type)) != cls.model_type:
        raise ValueError(f"a {cls.__name__} cannot have model_type {kind!r}, expected {cls.model_type!r}")
    return cls(**{name: value for name, value in given.items() if name != "model_type"})


__all__ = ["CONVNEXT_XXL", "LlavaHrVisionConfig"]
