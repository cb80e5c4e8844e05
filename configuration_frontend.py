"""Configuration of a LLaVA whose front-end stock LLaVA does not have: LLaVA-HR, VILA.

A front-end is what turns images into the language model's tokens: vision tower and projector. The config says which it
is: `vision_config.model_type` the tower, `projector_type` the projector. A front-end that stock LLaVA has (one of
Transformers' towers, two linear layers) is left to stock LLaVA.
"""

import re

from transformers import LlavaConfig, PreTrainedConfig
from transformers.utils.versions import require_version

from .configuration_hr_vision import LlavaHrVisionConfig

require_version("transformers>=5.19.0", "RoE-LLaVA needs it: pip install -U transformers")

# Towers of ours, by `model_type`; any other is looked up among Transformers' own.
VISION_CONFIGS: dict[str, type[PreTrainedConfig]] = {LlavaHrVisionConfig.model_type: LlavaHrVisionConfig}
STOCK_PROJECTOR = "mlp2x_gelu"
PROJECTOR_TYPE = re.compile(r"linear|identity|mlp_downsample|mlp[1-9]\d*x_gelu")
STOCK_TYPE = "llava"


class FrontendLlavaConfig(LlavaConfig):
    """Configuration of [`FrontendLlavaForConditionalGeneration`].

    Args:
        projector_type (`str`, defaults to `"mlp2x_gelu"`):
            What takes image features to the language model's width: `"linear"`, `"mlpNx_gelu"` (N linear layers),
            `"mlp_downsample"` (each 2 x 2 patches become one token) or `"identity"`. Read when the model is built.
    """

    model_type = "llava_frontend"

    projector_type: str = STOCK_PROJECTOR

    def __post_init__(self, **kwargs):
        self.vision_config = own_vision_config(self.vision_config)
        check_projector_type(self.projector_type)
        super().__post_init__(**kwargs)

    @classmethod
    def get_config_dict(cls, *args, **kwargs):
        """As in Transformers; a stock LLaVA's config is one that names no projector, and no mistake."""
        content, kwargs = super().get_config_dict(*args, **kwargs)
        is_stock = content.get("model_type") == STOCK_TYPE
        return (content | {"model_type": cls.model_type} if is_stock else content), kwargs


# What a base may be: what routing parts are grafted onto, and what is left when they are taken off.
BASE_TYPES = (STOCK_TYPE, FrontendLlavaConfig.model_type)


def own_vision_config(vision_config):
    """A tower's configuration as an object, if it is one of ours; else as it came."""
    if isinstance(vision_config, dict) and vision_config.get("model_type") in VISION_CONFIGS:
        return VISION_CONFIGS[vision_config["model_type"]](**vision_config)
    return vision_config


def check_projector_type(name) -> None:
    """Raises: ValueError if it is none that can be built."""
    if not isinstance(name, str) or not PROJECTOR_TYPE.fullmatch(name):
        raise ValueError(
            f"projector_type must be 'linear', 'identity', 'mlp_downsample' or 'mlpNx_gelu' with a number N >= 1, got "
            f"{name!r}"
        )


def base_type_of(config: dict) -> str:
    """Which of `BASE_TYPES` a config.json describes once routing is left out of it."""
    tower = (config.get("vision_config") or {}).get("model_type")
    is_stock = config.get("projector_type", STOCK_PROJECTOR) == STOCK_PROJECTOR and tower not in VISION_CONFIGS
    return STOCK_TYPE if is_stock else FrontendLlavaConfig.model_type


__all__ = ["BASE_TYPES", "FrontendLlavaConfig", "base_type_of", "check_projector_type", "own_vision_config"]
