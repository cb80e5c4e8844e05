"""Tiny models, prompts and processors of the other bases: LLaVA-NeXT, LLaVA-OneVision, ViP-LLaVA and MoE-LLaVA.

B batch, L decoder layers.
"""

import copy
import functools
from dataclasses import dataclass

import numpy as np
import tiny
import torch
from PIL import Image
from tiny import IMAGE, PAD
from tokenizers import Tokenizer
from transformers import CLIPImageProcessorPil, LlavaNextImageProcessorPil, PreTrainedTokenizerFast, SiglipVisionConfig
from transformers.utils import is_torchvision_available

from roe_llava import (
    RoeLlavaNextConfig,
    RoeLlavaNextForConditionalGeneration,
    RoeLlavaNextProcessor,
    RoeLlavaOnevisionConfig,
    RoeLlavaOnevisionForConditionalGeneration,
    RoeLlavaOnevisionProcessor,
    RoeLlavaProcessor,
    RoeMoeLlavaConfig,
    RoeMoeLlavaForConditionalGeneration,
    RoeVipLlavaConfig,
    RoeVipLlavaForConditionalGeneration,
)
from roe_llava.configuration_roe import BAKED_FIELDS, ROUTING_FIELDS
from roe_llava.loading_roe import base_class, stock_class

VIDEO = 126
GRID = [[28, 56], [56, 28], [56, 56]]
# Of an image of this height and width, of which 2 x 2 patches make a tile: tokens of all of it, and of the tiles with
# their line ends.
WIDE, TALL = (28, 56), (56, 28)
NUM_WIDE, NUM_TALL = 4 + 2 * (4 + 1), 4 + 4 * (2 + 1)
NUM_FRAMES = 3
NUM_VIDEO = NUM_FRAMES * 1 + 1  # 2 x 2 patches of a frame become one; one line end


@dataclass(frozen=True)
class Kind:
    """A base under test.

    Attributes:
        head, config: its RoE classes.
        text: of its language model, a name in `tiny.TEXT_CONFIGS`.
    """

    head: type
    config: type
    text: str

    @property
    def stock(self) -> type:
        """The class of the base: a stock one, or ours with experts."""
        return base_class(self.head)


# Whose images are one picture each, as LLaVA's; the others cut them into tiles.
PLAIN = ("vipllava", "moe_llava")
KINDS = {
    "llava_next": Kind(RoeLlavaNextForConditionalGeneration, RoeLlavaNextConfig, "mistral"),
    "llava_onevision": Kind(RoeLlavaOnevisionForConditionalGeneration, RoeLlavaOnevisionConfig, "qwen2"),
    "vipllava": Kind(RoeVipLlavaForConditionalGeneration, RoeVipLlavaConfig, "llama"),
    "moe_llava": Kind(RoeMoeLlavaForConditionalGeneration, RoeMoeLlavaConfig, "llama"),
}

# Prompts as lists of ids and of images; "wide", "tall" and "video" stand for all tokens of one.
PROMPTS = {
    "question": [1, 5, "wide", 9, 10, 11, 12, 13],
    "text_only": [1, 20, 21, 22, 23],
    "other_image": [1, "tall", 31, 32, 33],
    "empty_question": [1, 6, 7, "wide"],
    "other_question": [1, 5, "wide", 40, 41, 42, 43, 44, 45, 46],
    "late_image": [1, 50, 51, "tall", 9],
}
NAMES = tuple(PROMPTS)


def tiny_config(name, **kwargs):
    """Configuration of a tiny RoE model on a base."""
    kind, llava = KINDS[name], tiny.tiny_config(KINDS[name].text)
    own = {} if name in PLAIN else {"image_grid_pinpoints": GRID}
    if name == "vipllava":
        # Transformers 5.19 has the plural.
        layers = "vision_feature_layer"
        own = {layers if hasattr(kind.config, layers) else f"{layers}s": [-1, -2]}
    if name == "moe_llava":
        own = {"num_experts": 3, "router_type": "token_aware", "moe_layers": [0, 1, 3], "image_seq_length": 4}
    if name == "llava_onevision":
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        vision = SiglipVisionConfig(**sizes, image_size=28, patch_size=14, vision_use_head=False)
        own |= {"vision_config": vision, "video_token_index": VIDEO, "vision_aspect_ratio": "anyres_max_9"}
    defaults = {"vision_config": llava.vision_config, "text_config": llava.text_config}
    defaults |= {"adapter_size": 8, "image_token_index": IMAGE, **own}
    return kind.config(**{**defaults, **kwargs})


def tiny_model(name, seed=0, **kwargs):
    """A tiny model in eval mode whose random weights are large enough for prompts to differ."""
    torch.manual_seed(seed)
    model = KINDS[name].head(tiny_config(name, **kwargs)).eval()
    with torch.no_grad():
        for module in [*model.model.language_model.modules(), *model.model.multi_modal_projector.modules()]:
            if isinstance(module, torch.nn.Linear):
                module.weight.normal_(0, module.in_features**-0.5)
        model.model.language_model.embed_tokens.weight.normal_()
        model.model.language_model.routing_tokens.weight.normal_()
        model.lm_head.weight.normal_(0, tiny.HIDDEN**-0.5)
    model.generation_config.eos_token_id = None
    model.generation_config.suppress_tokens = [IMAGE, VIDEO]
    return model


def tokens_of(name, part):
    """Ids of a prompt's part."""
    if isinstance(part, int):
        return [part]
    if part == "video":
        return [VIDEO] * NUM_VIDEO
    number = {"wide": NUM_WIDE, "tall": NUM_TALL}[part] if name not in PLAIN else 4
    return [IMAGE] * number


def images_of(name, parts, seed):
    """Pixel values and sizes of a prompt's images: tiles with the whole image first, or one picture (ViP-LLaVA)."""
    found = [part for part in parts if part in ("wide", "tall")]
    if not found:
        return {}
    generator = torch.Generator().manual_seed(seed)
    shape = (len(found), 3, 28, 28) if name in PLAIN else (len(found), 3, 3, 28, 28)
    pixels = {"pixel_values": torch.randn(shape, generator=generator)}
    sizes = torch.tensor([{"wide": WIDE, "tall": TALL}[part] for part in found])
    return pixels | ({} if name in PLAIN else {"image_sizes": sizes})


def batch(name, prompts=NAMES, side="left"):
    """The model's inputs for some prompts, padded on a side."""
    rows = [[token for part in PROMPTS[prompt] for token in tokens_of(name, part)] for prompt in prompts]
    width = max(map(len, rows))
    pads = [[PAD] * (width - len(row)) for row in rows]
    pairs = list(zip(pads, rows, strict=True))
    ids = [pad + row if side == "left" else row + pad for pad, row in pairs]
    real = [[0] * len(p) + [1] * len(r) if side == "left" else [1] * len(r) + [0] * len(p) for p, r in pairs]
    images = [images_of(name, PROMPTS[prompt], NAMES.index(prompt)) for prompt in prompts]
    names = {key for one in images for key in one}
    joined = {key: torch.cat([one[key] for one in images if key in one]) for key in sorted(names)}
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(real)} | joined


def alone(name, prompt):
    """The model's inputs for one prompt, without padding or mask."""
    inputs = batch(name, [prompt])
    del inputs["attention_mask"]
    return inputs


@functools.cache
def _routed_model(name):
    return tiny.solve_routers(tiny_model(name), batch(name), tiny.PATTERN)


def routed_model(name):
    """A fresh copy of the tiny model that gives `NAMES` the routes of `tiny.PATTERN`."""
    return copy.deepcopy(_routed_model(name))


def stock_of(model):
    """The stock model with a model's base weights and settings."""
    cls = base_class(type(model))
    own = (*ROUTING_FIELDS, *BAKED_FIELDS, "auto_map", "architectures")
    content = {name: value for name, value in model.config.to_dict().items() if name not in own}
    content["model_type"] = cls.config_class.model_type
    stock = cls(cls.config_class.from_dict(content)).eval()
    missing, _ = stock.load_state_dict(model.state_dict(), strict=False)
    assert not missing, missing
    stock.generation_config = copy.deepcopy(model.generation_config)
    return stock


# ---------------------------------------- processors


@functools.cache
def tokenizer():
    """The words of `tiny.tokenizer`, of which one is the video token."""
    content = tiny.tokenizer().backend_tokenizer.to_str().replace(f'"filler{filler_at(VIDEO)}"', '"<video>"')
    extra = {"image_token": "<image>", "video_token": "<video>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(content), extra_special_tokens=extra, **tiny.SPECIAL
    )


def filler_at(index):
    """Number of the filler word with an id."""
    word = tiny.tokenizer().convert_ids_to_tokens(index)
    assert word.startswith("filler"), word
    return int(word.removeprefix("filler"))


def processor_of(name, *, routed=True):
    """A base's processor, or the stock one."""
    crop = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    settings = {"chat_template": tiny.CHAT_TEMPLATE}
    counts = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    if name in PLAIN:
        cls, images = RoeLlavaProcessor, CLIPImageProcessorPil(**crop)
    elif name == "llava_next":
        cls, images = RoeLlavaNextProcessor, LlavaNextImageProcessorPil(**crop, image_grid_pinpoints=GRID)
    else:
        from transformers import LlavaOnevisionImageProcessorPil, LlavaOnevisionVideoProcessor

        size = {"height": 28, "width": 28}
        cls, images = RoeLlavaOnevisionProcessor, LlavaOnevisionImageProcessorPil(size=size, image_grid_pinpoints=GRID)
        settings |= {"video_processor": LlavaOnevisionVideoProcessor(size=size)}
        counts = {"num_image_tokens": 4, "vision_feature_select_strategy": "full"}
    cls = cls if routed else stock_class(cls)
    return cls(image_processor=images, tokenizer=tokenizer(), **settings, **counts)


def processor_names():
    """Bases whose processor can be made here: LLaVA-OneVision's needs torchvision."""
    return [name for name in KINDS if name != "llava_onevision" or is_torchvision_available()]


def picture(size, seed=0):
    """An RGB image of (height, width)."""
    values = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(values)
