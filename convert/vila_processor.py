"""Image processor and prompt of a VILA checkpoint, as a stock `LlavaProcessor`."""

import math
from pathlib import Path

import transformers
from PIL import Image
from transformers import LlavaProcessor
from transformers.utils import is_torchvision_available

from .original_processor import _CONTENT, IMAGE_TOKEN, VICUNA_SYSTEM, fitted_template
from .source import blamed_on

BICUBIC = 3  # Pillow's number for it

# Images stay where they are among the texts, each with a line break behind it. As in LLaVA's prompts, a system message
# of the caller takes the place of the usual one.
_PARTS = (
    "{% for part in content %}{% if part['type'] == 'image' %}{{ '<image>{gap}\n' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
)
# "SYSTEM USER: <image>\nquestion ASSISTANT: answer</s>USER: ..."; an empty system message leaves it out.
VICUNA = (
    f'{{% if messages[0]["role"] != "system" %}}{{{{ "{VICUNA_SYSTEM} " }}}}{{% endif %}}'
    "{% for message in messages %}" + _CONTENT + "{% if message['role'] == 'system' %}"
    "{% for part in content if part['text'] %}{{ part['text'] + ' ' }}{% endfor %}{% else %}"
    "{{ message['role'].upper() + ': ' }}" + _PARTS + "{{ eos_token if message['role'] == 'assistant' else ' ' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
LLAMA3_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
LLAMA3_END, LLAMA3_TEXT_END = "<|eot_id|>", "<|end_of_text|>"
LLAMA3 = (
    "{start}{% if messages[0]['role'] != 'system' %}{{ '<|start_header_id|>system<|end_header_id|>\n\n"
    + LLAMA3_SYSTEM
    + LLAMA3_END
    + "' }}{% endif %}{% for message in messages %}"
    + _CONTENT
    + "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    + _PARTS
    # What ends the last answer ends the text.
    + f"{{{{ '{LLAMA3_TEXT_END}' if loop.last and message['role'] == 'assistant' else '{LLAMA3_END}' }}}}{{% endfor %}}"
    + "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def speaks_llama3(tokenizer) -> bool:
    """Whether a tokenizer has the tokens of Llama-3's prompt. The published code goes by the model's name."""
    return {"<|start_header_id|>", "<|end_header_id|>", LLAMA3_END} <= tokenizer.get_vocab().keys()


def prompt_template(tokenizer) -> tuple[str, bool]:
    """The prompt a model was trained on, and whether the tokenizer gives it the tokens it was trained on.

    A Llama-3 tokenizer is told that a turn's end ends a text, so that an answer's labels hold it.
    """
    if not speaks_llama3(tokenizer):
        return fitted_template(VICUNA, tokenizer)
    tokenizer.eos_token = LLAMA3_END
    adds_start = tokenizer.bos_token_id in tokenizer.encode("a")
    return fitted_template(LLAMA3.replace("{start}", "" if adds_start else "{{ bos_token }}"), tokenizer)


def drops_blanks(folder: Path) -> bool:
    """Whether a sentencepiece model drops blanks at the ends of a text and joins several to one.

    Transformers (5.23) does not read that. Llama's and Vicuna's own tokenizers keep every blank.
    """
    path = folder / "tokenizer.model"
    if not path.is_file() or (folder / "tokenizer.json").is_file():
        return False
    from sentencepiece import sentencepiece_model_pb2  # of the extra that reads tokenizer.model at all

    return sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes()).normalizer_spec.remove_extra_whitespaces


def end_ids(tokenizer) -> list[int]:
    """Ids that end an answer in Llama-3's prompt; none for others, where the config's own is right."""
    if tokenizer is None or not speaks_llama3(tokenizer):
        return []
    ids = [tokenizer.get_vocab().get(token) for token in (LLAMA3_END, LLAMA3_TEXT_END)]
    return [one for one in ids if one is not None]


def vila_images(preprocessor: dict | None, tower, aspect: str | None, where: Path, resized: bool):
    """What makes pixels of an image, on this machine's backend (torchvision, or Pillow without it).

    Args:
        preprocessor: content of the tower's preprocessor_config.json; `None` for its kind's usual settings.
        tower: configuration of the tower, with the resolution it is to have.
        aspect: `"pad"` pads to a square with the mean colour, `"resize"` squeezes to a square; `None` does what the
            tower's own processor does (SigLIP's squeezes, CLIP's crops).
        where: folder of the tower, for messages.
        resized: whether the tower's resolution is another than it was stored with, so that the preprocessor's is old.
    Raises: ValueError if images would not have the size the tower takes.
    """
    side, is_clip = tower.image_size, tower.model_type == "clip_vision_model"
    square = {"height": side, "width": side}
    settings = {"size": {"shortest_edge": side} if is_clip else square, "resample": BICUBIC}
    settings |= {"crop_size": square} if is_clip else {}
    generic = ("image_processor_type", "feature_extractor_type", "processor_class")
    settings |= {name: value for name, value in (preprocessor or {}).items() if name not in generic}
    if aspect == "resize":
        name, settings = "SiglipImageProcessor", settings | {"size": settings.get("crop_size", settings["size"])}
        settings = {key: value for key, value in settings.items() if "crop" not in key} | {"resample": BICUBIC}
    elif aspect == "pad":
        name, settings = "LlavaImageProcessor", settings | {"do_pad": True, "do_center_crop": is_clip}
    else:
        name = "CLIPImageProcessor" if is_clip else "SiglipImageProcessor"
    settings |= {"size": square} if resized else {}
    cls = getattr(transformers, name if is_torchvision_available() else f"{name}Pil")  # either is saved as the first
    with blamed_on(where / "preprocessor_config.json"):
        made = cls(**settings)
        height, width = made(Image.new("RGB", (side + 8, side)))["pixel_values"][0].shape[-2:]
    if (height, width) != (side, side):
        raise ValueError(
            f"preprocessor_config.json in {where} makes images of {height} x {width}, its config.json asks for {side} "
            f"x {side}: do they belong together?"
        )
    return made


def token_counting(side: int, num_tokens: int) -> tuple[int, int]:
    """(patch size, additional tokens) with which a `LlavaProcessor` counts the tokens of an image.

    It counts (side // patch size) ** 2 + additional tokens, in a base of which a projector may have made one token of
    several patches.
    """
    patch = side // math.isqrt(num_tokens)
    while (side // patch) ** 2 > num_tokens:
        patch += 1
    return patch, num_tokens - (side // patch) ** 2


def vila_processor(tokenizer, images, config: dict, folder: Path) -> tuple[LlavaProcessor, str | None]:
    """The processor of an imported model, and what a caller should know about its prompt.

    Args:
        folder: where the tokenizer is from.
        tokenizer: with its new tokens.
        images: image processor.
        config: content of the new config.json.
    """
    template, as_trained = prompt_template(tokenizer)
    strategy = config["vision_feature_select_strategy"]
    patch, additional = token_counting(config["vision_config"]["image_size"], config["image_seq_length"])
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=patch,
        vision_feature_select_strategy=strategy,
        chat_template=template,
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=additional + (strategy == "default"),  # one is taken off again
    )
    if drops_blanks(folder):
        return processor, (
            "tokenizer.model drops blanks at the ends of a text, which Transformers keeps: tokens beside an image may "
            "differ from the original's by a blank"
        )
    note = None if as_trained else "the text behind an image is tokenized otherwise than the original does"
    return processor, note
