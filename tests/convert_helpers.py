"""Tiny checkpoints on disk for the tests of `convert`."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from roe_llava import RoeLlavaForConditionalGeneration
from roe_llava.loading_roe import is_roe_parameter

NUM_LAYERS = 3
WORDS = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "USER:", "ASSISTANT:", "what", "is", "this", "a", "red", "big"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}: "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} "
    "{% endif %}{% endfor %}{% if message['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
PROMPTS = ["USER: <image> what is this ASSISTANT:", "USER: <image> is this a big red ASSISTANT:"]


def tiny_processor() -> LlavaProcessor:
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        padding_side="left",
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return LlavaProcessor(
        images,
        fast,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    )


def tiny_config(text_type: str = "llama", **text) -> LlavaConfig:
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        projection_dim=16,
    )
    sizes = {"hidden_size": 16, "num_hidden_layers": NUM_LAYERS, "vocab_size": 32} | text
    language = AutoConfig.for_model(
        text_type,
        intermediate_size=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **sizes,
    )
    return LlavaConfig(
        vision_config=vision.to_dict(), text_config=language.to_dict(), image_token_index=4, image_seq_length=4
    )


def make_base(folder: Path, *, seed: int = 0, dtype=torch.float32, processor: bool = True, config=None, **save) -> Path:
    """A stock LLaVA folder in llava-hf layout with random weights."""
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config or tiny_config()).to(dtype)
    model.save_pretrained(folder, **save)
    if processor:
        tiny_processor().save_pretrained(folder)
    return folder


def train(base: Path, *, seed: int = 1, adapter_size: int = 4, **config) -> RoeLlavaForConditionalGeneration:
    """A RoE model on a base whose routing parts are random and large enough to matter."""
    model = RoeLlavaForConditionalGeneration.from_pretrained(base, adapter_size=adapter_size, **config).eval()
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if is_roe_parameter(name):
            parameter.data = torch.randn_like(parameter)
    return model


def tiny_inputs(processor, **kwargs) -> dict:
    from PIL import Image

    images = [Image.new("RGB", (28, 28), color) for color in ("red", "blue")]
    return processor(images=images, text=PROMPTS, return_tensors="pt", padding=True, **kwargs)


def weights_of(folder: Path) -> dict:
    """Every tensor in a folder's safetensors files by its name on disk."""
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


def bytes_of(tensor: torch.Tensor) -> tuple:
    """Dtype, shape and bytes: equal where two tensors are the same to the bit, NaN included."""
    return (tensor.dtype, tuple(tensor.shape), tensor.reshape(-1).view(torch.uint8).numpy().tobytes())


def change_tensors(path: Path, change) -> None:
    """Rewrite a safetensors file; `change` edits its dict of tensors in place."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def change_json(path: Path, **entries) -> None:
    """Set entries of a JSON file; an entry that is `None` and there is removed."""
    content = json.loads(path.read_text())
    for name, value in entries.items():
        if value is None:
            content.pop(name)
        else:
            content[name] = value
    path.write_text(json.dumps(content))
