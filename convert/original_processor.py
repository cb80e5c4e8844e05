"""Tokenizer, image processor and prompt of a checkpoint in the original layout, as a processor.

V rows of the original embedding.
"""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import transformers
from PIL import Image
from tokenizers import AddedToken
from transformers import AutoTokenizer, CLIPVisionConfig, LlavaProcessor
from transformers.utils import is_torchvision_available

from ..configuration_roe import RoeLlavaConfig
from ..processing_roe import RoeLlavaProcessor
from .output import write_json
from .source import blamed_on, read_json

IMAGE_TOKEN, PAD_TOKEN = "<image>", "<pad>"
MULTIPLE = 64  # llava-hf's vocabularies have a multiple of it

TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)

LICENCES = ("LICENSE*", "NOTICE*", "USE_POLICY*")

# Prompts that LLaVA was trained on. Images come first, each on a line of its own. A system message of the caller takes
# the place of the usual one; an empty one leaves it out, which is llava-hf's own prompt for LLaVA-1.5.
_IMAGES = "{% for part in content if part['type'] == 'image' %}{{ '<image>{gap}\n' }}{% endfor %}"
_TEXTS = "{% for part in content if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
_CONTENT = (
    "{% set content = message['content'] %}"
    "{% if content is string %}{% set content = [{'type': 'text', 'text': content}] %}{% endif %}"
)
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
CHAT_TEMPLATES = {
    # Vicuna v1: "SYSTEM USER: <image>\nquestion ASSISTANT: answer</s>USER: ..."
    "llama": (
        f'{{% if messages[0]["role"] != "system" %}}{{{{ "{VICUNA_SYSTEM} " }}}}{{% endif %}}'
        "{% for message in messages %}" + _CONTENT + "{% if message['role'] == 'system' %}"
        "{% for part in content if part['text'] %}{{ part['text'] + ' ' }}{% endfor %}{% else %}"
        "{{ message['role'].upper() + ': ' }}" + _IMAGES + _TEXTS + "{{ eos_token if message['role'] == 'assistant' "
        "else ' ' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    ),
    # Mistral: "[INST] <image>\nquestion [/INST] answer</s>[INST] ..."
    "mistral": (
        "{% for message in messages %}" + _CONTENT + "{% if message['role'] == 'assistant' %}"
        "{{ ' ' }}" + _TEXTS + "{{ eos_token }}{% elif message['role'] == 'user' %}"
        "{{ '[INST] ' }}" + _IMAGES + _TEXTS + "{{ ' [/INST]' }}{% endif %}{% endfor %}"
    ),
    # Qwen: ChatML.
    "qwen2": (
        '{% if messages[0]["role"] != "system" %}'
        "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
        "{% for message in messages %}"
        + _CONTENT
        + "{{ '<|im_start|>' + message['role'] + '\n' }}"
        + _IMAGES
        + _TEXTS
        + "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
}


@dataclass
class SpecialTokens:
    """Token ids of the imported model.

    Attributes:
        image_id, pad_id: of `<image>` and `<pad>`.
        vocab_size: rows of the new embedding.
        old_size: V.
    """

    image_id: int
    pad_id: int
    vocab_size: int
    old_size: int

    @property
    def never_written(self) -> list[int]:
        """What generation leaves out: the placeholder, and every row the original does not have."""
        return sorted({self.image_id, *range(self.old_size, self.vocab_size)})


def open_tokenizer(folder: Path):
    """The tokenizer of a checkpoint as it is; `None` if it has none.

    Raises: ValueError if it cannot be read.
    """
    if not any((folder / name).is_file() for name in ("tokenizer.model", "tokenizer.json", "vocab.json")):
        return None
    with tempfile.TemporaryDirectory() as alone:  # config.json of the original layout says nothing to Transformers
        copy_tokenizer_files(folder, Path(alone))
        settings = tokenizer_settings(folder)
        write_json(Path(alone) / "tokenizer_config.json", settings)
        try:
            tokenizer = AutoTokenizer.from_pretrained(alone, trust_remote_code=False)
        except Exception as error:  # whatever the libraries below make of a damaged file
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"the tokenizer in {folder} cannot be read: {reason} (tokenizer.model needs the packages sentencepiece "
                "and protobuf: pip install 'roe-llava[import]')"
            ) from error
    if settings.get("add_bos_token") and tokenizer.is_fast:  # read from tokenizer.json alone where there is one
        tokenizer.add_bos_token = True
    return tokenizer


def tokenizer_settings(folder: Path) -> dict:
    """tokenizer_config.json with what Transformers 4.31 took for granted and 5.23 does not: Llama's start token."""
    path = folder / "tokenizer_config.json"
    settings = read_json(path) if path.is_file() else {}
    if (folder / "tokenizer.model").is_file():
        settings.setdefault("tokenizer_class", "LlamaTokenizer")
    if settings.get("tokenizer_class") in ("LlamaTokenizer", "LlamaTokenizerFast"):
        settings.setdefault("add_bos_token", True)
    return settings


def copy_tokenizer_files(source: Path, target: Path) -> list[str]:
    """Copy the files of a tokenizer; their names."""
    names = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    for name in names:
        shutil.copyfile(source / name, target / name)
    return names


def copy_licences(source: Path, target: Path) -> None:
    """Copy what has to go along with weights wherever they go."""
    for pattern in LICENCES:
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, target / path.name)


def add_special_tokens(tokenizer, old_size: int, folder: Path) -> SpecialTokens:
    """Give a tokenizer `<image>` and `<pad>`, as llava-hf's have them.

    Args:
        tokenizer: changed in place; `None` where there is none.
        old_size: V.
        folder: of the checkpoint, for messages.
    Returns: ids: those the tokenizer has or gives, the first free rows without a tokenizer.
    Raises: ValueError if the tokenizer does not fit the embedding.
    """
    if tokenizer is None:
        return SpecialTokens(old_size, old_size + 1, new_size(old_size, old_size + 2), old_size)
    largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if largest[1] >= old_size:
        raise ValueError(
            f"the tokenizer in {folder} gives {largest[0]!r} id {largest[1]}, but the embedding has {old_size} rows: "
            "is it the tokenizer of another checkpoint?"
        )
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    tokenizer.add_special_tokens({"pad_token": AddedToken(PAD_TOKEN, special=True, normalized=False)})
    ids = [tokenizer.get_vocab().get(token) for token in (IMAGE_TOKEN, PAD_TOKEN)]
    tokens = SpecialTokens(*ids, new_size(old_size, max(*ids, old_size - 1) + 1), old_size)
    check_tokens(tokenizer, tokens, folder)
    tokenizer.padding_side = "left"  # the original pads right, for training; generation needs the other
    tokenizer.init_kwargs["padding_side"] = "left"  # else it is saved only where the original's settings have it
    return tokens


def new_size(old_size: int, needed: int) -> int:
    """Rows of the new embedding: the old ones where they suffice, else a multiple of `MULTIPLE`."""
    return old_size if needed <= old_size else -(-needed // MULTIPLE) * MULTIPLE


def check_tokens(tokenizer, tokens: SpecialTokens, folder: Path) -> None:
    """Raises: ValueError if a tokenizer does not read `<image>` and `<pad>` as single tokens of the config's ids."""
    for token, wanted in ((IMAGE_TOKEN, tokens.image_id), (PAD_TOKEN, tokens.pad_id)):
        found = tokenizer.encode(token, add_special_tokens=False)
        if token not in tokenizer.get_vocab():
            raise ValueError(f"the tokenizer in {folder} has no token {token!r}, expected id {wanted} as in the config")
        if found != [wanted]:
            raise ValueError(
                f"the tokenizer in {folder} reads {token!r} as {found}, expected [{wanted}] as in the config"
            )


def chat_template(text_type: str, tokenizer) -> tuple[str, bool]:
    """The prompt a model was trained on, and whether the tokenizer gives it the tokens it was trained on.

    The original cuts a prompt at `<image>` and tokenizes the pieces apart, which puts a blank before the line break
    behind an image where the tokenizer starts every text with one. One tokenized as a whole may need that blank
    written out.
    """
    return fitted_template(CHAT_TEMPLATES[text_type], tokenizer)


def fitted_template(template: str, tokenizer) -> tuple[str, bool]:
    """A template of ours with the blank behind images that a tokenizer needs; see `chat_template`."""
    before, after = "USER: ", "\nwhat is this? ASSISTANT:"
    image = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    wanted = [
        *tokenizer.encode(before, add_special_tokens=False),
        image,
        *tokenizer.encode(after, add_special_tokens=False),
    ]
    for gap in ("", " "):
        if tokenizer.encode(f"{before}{IMAGE_TOKEN}{gap}{after}", add_special_tokens=False) == wanted:
            return template.replace("{gap}", gap), True
    return template.replace("{gap}", ""), False


def image_processor(preprocessor: dict | None, vision: CLIPVisionConfig, pads: bool, where: Path):
    """What makes pixels of an image: padded to a square with CLIP's mean colour first where the original does so.

    Args:
        preprocessor: content of the tower's preprocessor_config.json; `None` for CLIP's usual settings.
        vision: the tower's configuration.
        pads: whether images are padded.
        where: of the tower, for messages.
    Raises: ValueError if images would not have the size the tower takes.
    """
    side = vision.image_size
    settings = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    generic = ("image_processor_type", "feature_extractor_type", "processor_class")
    settings |= {name: value for name, value in (preprocessor or {}).items() if name not in generic}
    name = "LlavaImageProcessor" if pads else "CLIPImageProcessor"
    cls = getattr(transformers, name if is_torchvision_available() else f"{name}Pil")  # either is saved as the first
    with blamed_on(where / "preprocessor_config.json"):
        made = cls(**settings | ({"do_pad": True} if pads else {}))
        size = made.crop_size if made.do_center_crop else made.size
        made(Image.new("RGB", (side + 8, side)))  # wrong means or filters show here, not in the settings
    if (size["height"], size["width"]) != (side, side):
        raise ValueError(
            f"preprocessor_config.json in {where} makes images of {size['height']} x {size['width']}, its config.json "
            f"asks for {side} x {side}: do they belong together?"
        )
    return made


def make_processor(tokenizer, images, config: dict) -> tuple[LlavaProcessor, str | None]:
    """The processor of an imported model, and what a caller should know about its prompt.

    Args:
        tokenizer: with its new tokens.
        images: image processor.
        config: content of the new config.json; of a RoE model the processor is a `RoeLlavaProcessor`.
    """
    template, as_trained = chat_template(config["text_config"]["model_type"], tokenizer)
    cls = RoeLlavaProcessor if config["model_type"] == RoeLlavaConfig.model_type else LlavaProcessor
    processor = cls(
        images,
        tokenizer,
        patch_size=config["vision_config"]["patch_size"],
        vision_feature_select_strategy=config["vision_feature_select_strategy"],
        chat_template=template,
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=1,  # CLIP's class token
    )
    note = None if as_trained else "the text behind an image is tokenized otherwise than the original does"
    return processor, note


def read_generation_config(folder: Path) -> dict:
    """generation_config.json of a checkpoint; empty if it has none.

    Raises: ValueError if what has to be added to is not what Transformers writes.
    """
    path = folder / "generation_config.json"
    content = read_json(path) if path.is_file() else {}
    tokens = content.get("suppress_tokens")
    if tokens is not None and not (isinstance(tokens, list) and all(type(token) is int for token in tokens)):
        raise ValueError(f"{path} has suppress_tokens {tokens!r:.60}, expected null or a list of token ids")
    return content


def generation_settings(source: Path, config: dict, tokens: SpecialTokens) -> dict:
    """generation_config.json: the original's, with the new padding id and without tokens the original cannot write.

    Leaving those out gives greedy and sampled texts exactly the original's distribution; a written `<image>` would ask
    for a picture that is not there.
    """
    content = read_generation_config(source)
    content.pop("max_length", None)  # would draw a warning from every generate(max_new_tokens=...)
    for name in ("bos_token_id", "eos_token_id"):
        if content.get(name) is None and config.get(name) is not None:
            content[name] = config[name]
    suppressed = set(content.get("suppress_tokens") or []) | set(tokens.never_written)
    own = {"pad_token_id": tokens.pad_id, "suppress_tokens": sorted(suppressed)}
    return {name: value for name, value in content.items() if name != "transformers_version"} | own
