"""Tiny seeded models, prompts and tokenizers for the tests, and routers solved so that routes depend on the input.

B batch, L decoder layers, S sequence, D hidden.
"""

import copy
import functools

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from roe_llava import RoeLlavaConfig, RoeLlavaForConditionalGeneration

IMAGE, PAD, NUM_LAYERS, HIDDEN, VOCAB = 127, 0, 4, 32, 128
WINDOW = 6  # of the sliding layers; every prompt with an image is longer
TEXT_CONFIGS = {
    "llama": (LlamaConfig, {}),
    "mistral": (MistralConfig, {"sliding_window": WINDOW}),
    # Layers 0 and 1 see everything, 2 and 3 a window.
    "qwen2": (Qwen2Config, {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}),
}
FAMILIES = tuple(TEXT_CONFIGS)

_IMAGE = [IMAGE] * 4
PROMPTS = {
    "question": [1, 5, *_IMAGE, 9, 10, 11, 12, 13],
    "text_only": [1, 20, 21, 22, 23],  # without an image nothing is known to be context: it is empty
    "two_images": [1, *_IMAGE, 30, *_IMAGE, 31, 32],
    "empty_question": [1, 6, 7, *_IMAGE],
    "other_question": [1, 5, *_IMAGE, 40, 41, 42, 43, 44, 45, 46],
    "one_token": [50],
}
NAMES = tuple(PROMPTS)
# Columns: layers. Layer 0 has read nothing, so it decides alike for all; after it every layer is kept by some.
PATTERN = torch.tensor(
    [
        [1, 1, 0, 1],
        [1, 0, 1, 1],
        [1, 1, 1, 0],
        [1, 0, 0, 0],
        [1, 1, 0, 1],
        [1, 0, 1, 0],
    ],
    dtype=torch.bool,
)


def images_of(name):
    """(n, 3, 28, 28) pixel values of a prompt, n its number of images; seeded by the prompt's place."""
    number = PROMPTS[name].count(IMAGE) // 4
    return torch.randn(number, 3, 28, 28, generator=torch.Generator().manual_seed(NAMES.index(name)))


def batch(names=NAMES, side="left"):
    """The model's inputs for some prompts, padded on a side."""
    rows = [PROMPTS[name] for name in names]
    width = max(map(len, rows))
    pads = [[PAD] * (width - len(row)) for row in rows]
    pairs = list(zip(pads, rows, strict=True))
    ids = torch.tensor([pad + row if side == "left" else row + pad for pad, row in pairs])
    real = torch.tensor(
        [[0] * len(p) + [1] * len(r) if side == "left" else [1] * len(r) + [0] * len(p) for p, r in pairs]
    )
    inputs = {"input_ids": ids, "attention_mask": real}
    images = torch.cat([images_of(name) for name in names])
    return inputs | ({"pixel_values": images} if len(images) else {})


def alone(name):
    """The model's inputs for one prompt, without padding or mask."""
    inputs = {"input_ids": torch.tensor([PROMPTS[name]])}
    images = images_of(name)
    return inputs | ({"pixel_values": images} if len(images) else {})


def tiny_config(family="llama", num_layers=NUM_LAYERS, text=None, **kwargs):
    """Configuration of a tiny RoE-LLaVA."""
    text_class, own = TEXT_CONFIGS[family]
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        projection_dim=16,
    )
    defaults = {"adapter_size": 8, "image_token_index": IMAGE, "image_seq_length": 4}
    text_config = text_class(**{**sizes, **own, **(text or {})})
    return RoeLlavaConfig(text_config=text_config, vision_config=vision, **{**defaults, **kwargs})


def tiny_model(config=None, seed=0):
    """A tiny model in eval mode whose random weights are large enough for prompts to differ.

    Generation never ends early and never writes an image token, which no image would belong to.
    """
    torch.manual_seed(seed)
    model = RoeLlavaForConditionalGeneration(config or tiny_config()).eval()
    with torch.no_grad():
        for module in [*model.model.language_model.modules(), *model.model.multi_modal_projector.modules()]:
            if isinstance(module, nn.Linear):
                module.weight.normal_(0, module.in_features**-0.5)
        model.model.language_model.embed_tokens.weight.normal_()
        model.model.language_model.routing_tokens.weight.normal_()
        model.lm_head.weight.normal_(0, HIDDEN**-0.5)
    model.generation_config.eos_token_id = None
    model.generation_config.suppress_tokens = [IMAGE]
    return model


def router_inputs(model, layer, inputs):
    """(B, 2D) what one layer's router reads in a prefill: normalised image and text routing tokens."""
    seen = []
    router = model.model.language_model.layers[layer].router
    hook = router.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(1).double()))
    model(**inputs, use_cache=False)
    hook.remove()
    return seen[0]


@torch.no_grad()
def solve_routers(model, inputs, pattern, margin=2.0):
    """Router weights by least squares, layer by layer: row r of `inputs` keeps layer i where pattern[r, i] (B, L).

    Rows of `pattern` agree on layer 0. The margin between the logits is +-`margin` in exact arithmetic.
    """
    assert (pattern[:, 0] == pattern[0, 0]).all()
    for index, layer in enumerate(model.model.language_model.layers):
        states = router_inputs(model, index, inputs)
        wanted = torch.where(pattern[:, index], margin, -margin).double()
        difference = torch.linalg.pinv(states) @ wanted
        layer.router.weight.copy_(torch.stack([difference, -difference]) / 2)
    return model


@functools.cache
def _routed_model(family):
    return solve_routers(tiny_model(tiny_config(family)), batch(), PATTERN)


def routed_model(family="llama", implementation="sdpa"):
    """A fresh copy of the tiny model that gives `NAMES` the routes of `PATTERN`."""
    model = copy.deepcopy(_routed_model(family))
    model.set_attn_implementation(implementation)
    return model


def stock_of(model):
    """Stock LLaVA with a model's base weights, settings and attention implementation."""
    config = LlavaConfig.from_dict({**model.config.to_dict(), "model_type": "llava"})
    stock = LlavaForConditionalGeneration(config).eval()
    missing, _ = stock.load_state_dict(model.state_dict(), strict=False)
    assert not missing, missing
    stock.generation_config = copy.deepcopy(model.generation_config)
    stock.set_attn_implementation(model.config.text_config._attn_implementation)
    return stock


def layers_of(model):
    return model.model.language_model.layers


class Calls:
    """Counts what a module is given: `calls` times, `rows` and `tokens` (rows x sequence) in all."""

    def __init__(self, module):
        self.calls, self.rows, self.tokens = 0, 0, 0
        self.hook = module.register_forward_pre_hook(self.count)

    def count(self, module, args):
        self.calls += 1
        self.rows += args[0].shape[0]
        self.tokens += args[0].shape[0] * args[0].shape[1]


# ---------------------------------------- tokenizers, images

# llava-hf/llava-1.5's template, with Vicuna's end token after every answer.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ ' ' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
WORDS = "USER : ASSISTANT what colour is the circle ? red blue how many squares two and where left of it A helpful . 1"
SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


@functools.cache
def tokenizer(kind="words"):
    """A fast tokenizer of at most `VOCAB` ids: `"words"` splits at blanks, `"pieces"` is a byte-level BPE."""
    names = ["<pad>", "<s>", "</s>", "<unk>"]
    if kind == "words":
        words = list(dict.fromkeys(WORDS.split()))
        words += [f"filler{n}" for n in range(IMAGE - len(names) - len(words))]
        vocabulary = {word: index for index, word in enumerate([*names, *words, "<image>"])}
        core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        core.pre_tokenizer = pre_tokenizers.Whitespace()
    else:
        core = Tokenizer(models.BPE(unk_token="<unk>"))
        core.pre_tokenizer = pre_tokenizers.Metaspace()
        core.decoder = decoders.Metaspace()
        trainer = trainers.BpeTrainer(vocab_size=VOCAB - 1, special_tokens=names, show_progress=False)
        core.train_from_iterator([WORDS.replace(" :", ":").replace(" ?", "?")] * 4, trainer)
        core.add_special_tokens(["<image>"])
    core.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, extra_special_tokens={"image_token": "<image>"}, **SPECIAL)


def picture(seed=0):
    """An RGB image as (28, 28, 3) bytes."""
    return np.random.default_rng(seed).integers(0, 256, (28, 28, 3), dtype=np.uint8)


def said(role, text, images=0):
    """One message of a conversation."""
    content = [{"type": "image"}] * images + [{"type": "text", "text": text}]
    return {"role": role, "content": content}
