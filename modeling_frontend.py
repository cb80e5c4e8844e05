"""LLaVA with a front-end that stock LLaVA does not have: a tower or a projector of ours, chosen by the config.

`build_vision_tower` and `build_projector` serve the base here and the routed model on it alike. All that follows the
front-end is stock LLaVA: image features take the place of their tokens, however many there are.
"""

from torch import nn
from transformers import AutoModel, LlavaForConditionalGeneration, PreTrainedModel
from transformers.models.llava.modeling_llava import LlavaModel, LlavaMultiModalProjector, LlavaPreTrainedModel

from .configuration_frontend import STOCK_PROJECTOR, STOCK_TYPE, FrontendLlavaConfig, base_type_of
from .loading_frontend import FrontendLoadingMixin, register_frontend_names

# Towers of ours, by the `model_type` of their config; any other is Transformers' own.
VISION_TOWERS: dict[str, type[PreTrainedModel]] = {}
# Projectors, by `projector_type`; each is built from the whole configuration.
PROJECTORS: dict[str, type[nn.Module]] = {STOCK_PROJECTOR: LlavaMultiModalProjector}


def build_vision_tower(config) -> PreTrainedModel:
    """The tower that `config.vision_config` describes.

    Its output's `hidden_states` hold what `config.vision_feature_layer` selects.
    """
    kind = config.vision_config.model_type
    if kind in VISION_TOWERS:
        return VISION_TOWERS[kind]._from_config(config.vision_config)
    return AutoModel.from_config(config.vision_config)


def build_projector(config) -> nn.Module:
    """The projector that `config.projector_type` names, (images, patches, C) to (images, tokens, D).

    Raises: ValueError if it is none of `PROJECTORS`.
    """
    kind = getattr(config, "projector_type", STOCK_PROJECTOR)
    if kind not in PROJECTORS:
        raise ValueError(f"projector_type {kind!r} is not supported, known are {sorted(PROJECTORS)}")
    return PROJECTORS[kind](config)


class FrontendLlavaPreTrainedModel(LlavaPreTrainedModel):
    """What both classes share."""

    config: FrontendLlavaConfig


class FrontendLlavaModel(FrontendLlavaPreTrainedModel, LlavaModel):
    """Vision tower, projector and language model, without a head."""

    def __init__(self, config: FrontendLlavaConfig):
        # Not LlavaModel.__init__, which would build a stock projector first.
        LlavaPreTrainedModel.__init__(self, config)
        self.vision_tower = build_vision_tower(config)
        self.multi_modal_projector = build_projector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()


class FrontendLlavaForConditionalGeneration(
    FrontendLoadingMixin, FrontendLlavaPreTrainedModel, LlavaForConditionalGeneration
):
    """A LLaVA base with a front-end of ours.

    Used like `LlavaForConditionalGeneration`.
    """

    def __init__(self, config: FrontendLlavaConfig):
        # Not LlavaForConditionalGeneration.__init__, which would build a stock model first.
        LlavaPreTrainedModel.__init__(self, config)
        self.model = FrontendLlavaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()


def base_class_of(config: dict) -> type[LlavaForConditionalGeneration]:
    """The class of the base that a config.json describes once routing is left out of it."""
    return (
        LlavaForConditionalGeneration if base_type_of(config) == STOCK_TYPE else FrontendLlavaForConditionalGeneration
    )


register_frontend_names(FrontendLlavaForConditionalGeneration, FrontendLlavaModel)
FrontendLlavaForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = [
    "FrontendLlavaForConditionalGeneration",
    "FrontendLlavaModel",
    "base_class_of",
    "build_projector",
    "build_vision_tower",
]
