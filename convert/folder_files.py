"""The files of a model folder that are not weights: config, processor, tokenizer, code."""

import logging
import math
import shutil
from collections.abc import Container
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer

from ..configuration_frontend import STOCK_TYPE, base_type_of
from ..decoder_roe import LANGUAGE_MODELS
from .bases import A_BASE, is_base, is_routed, routed_kind
from .code_files import copy_code
from .kinds import ROE
from .output import write_json
from .source import blamed_on, check_text_config, read_json

# What a folder needs to tokenize, to preprocess and to generate. Anything else of the base stays behind.
COMPANIONS = (
    "*.json",
    "*.jinja",
    "additional_chat_templates/*.jinja",
    "*.model",
    "merges.txt",
    "vocab.txt",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
    "original_tokenizer/*",  # kept by an import for the way back
)
OWN = ("config.json", "processor_config.json", "roe_adapter.json", "*.index.json")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf")


def read_base_config(folder: Path) -> dict:
    """A LLaVA base's config.json, as it is written.

    Raises: ValueError if it is none, has no language model, or one that cannot be routed.
    """
    path = folder / "config.json"
    config = read_json(path)
    model_type = config.get("model_type")
    if is_routed(model_type):
        raise ValueError(
            f"{path} has model_type {model_type!r}: this base already has routing parts; take its own base, or "
            "split it with extract --full"
        )
    if not is_base(model_type):
        hint = "an original LLaVA goes through import-llava first, a published RoE checkpoint through import-reference"
        raise ValueError(
            f"{path} has model_type {model_type!r}, expected {A_BASE}: RoE is grafted onto checkpoints in llava-hf's "
            f"layout ({hint})"
        )
    check_text_config(config, path)
    text_type = config["text_config"].get("model_type", routed_kind(config).config().text_config.model_type)
    if not isinstance(text_type, str) or text_type not in LANGUAGE_MODELS:
        raise ValueError(
            f"text_config.model_type {text_type!r} in {path} is not supported, routed decoders are "
            f"{sorted(LANGUAGE_MODELS)}"
        )
    check_opens(config, path)
    return config


def check_opens(config: dict, path: Path) -> None:
    """Check that a config.json opens, of a base as that of a RoE model on it.

    Raises: ValueError naming the file, whatever Transformers makes of a wrong entry.
    """
    with blamed_on(path):
        full = routed_kind(config).open_config(config)
        if (size := full.text_config.vocab_size) <= full.image_token_index or full.image_token_index < 0:
            raise ValueError(f"image_token_index is {full.image_token_index}, expected one of {size} token ids")


def grafted_config(base: dict, routing_fields: dict, provenance: dict) -> dict:
    """The base's config.json with what makes it a RoE model.

    Args:
        base: content of the base's config.json.
        routing_fields: of `RoutingConfig`.
        provenance: where weights come from: base and training.
    Raises: ValueError if the fields do not fit the base (range, layer numbers).
    """
    kind = routed_kind(base)
    config = base | {
        "model_type": kind.model_type,
        "architectures": [kind.model.__name__],
        "auto_map": kind.model.code_map,
        **routing_fields,
        "roe_provenance": provenance,
    }
    kind.open_config(config)
    return config


def processor_config(folder: Path, config: dict) -> tuple[dict | None, str | None]:
    """processor_config.json that opens as the routed processor.

    Args:
        folder: of the base.
        config: the base's config.json; gives what old processor files leave out.
    Returns: its content and `None`, or `None` and the reason why there is no such processor.
    """
    kind, path = routed_kind(config), folder / "processor_config.json"
    content = read_json(path) if path.is_file() else {}
    preprocessor = folder / "preprocessor_config.json"
    has_images = "image_processor" in content or preprocessor.is_file()
    if not has_images or not any((folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json")):
        return None, "the base has no complete processor"
    named = content.get("processor_class")
    if named is None and preprocessor.is_file():
        named = read_json(preprocessor).get("processor_class")
    ours, stock = kind.processor.__name__, kind.stock_processor
    if named not in (None, stock):
        return None, f"the base's {named} is kept: {ours} stands in for {stock} alone"
    content = {"processor_class": ours, "auto_map": kind.processor_map} | {
        name: value for name, value in content.items() if name not in ("processor_class", "auto_map")
    }
    content.setdefault("image_token", "<image>")
    for name, value in processor_defaults(config).items():
        if content.get(name) is None:
            content[name] = value
    return content, None


def processor_defaults(config: dict) -> dict:
    """What the processor has to know of the model to count image tokens."""
    full = routed_kind(config).open_config(config)
    if hasattr(full, "vision_aspect_ratio"):  # LLaVA-OneVision counts tokens, not patches
        return {
            "num_image_tokens": (full.vision_config.image_size // full.vision_config.patch_size) ** 2,
            "vision_feature_select_strategy": full.vision_feature_select_strategy,
            "vision_aspect_ratio": full.vision_aspect_ratio,
        }
    if base_type_of(config) != STOCK_TYPE:  # as our imports have it: as many patches of the image as there are tokens
        per_side = math.isqrt(full.image_seq_length)
        return {
            "patch_size": full.vision_config.image_size // per_side,
            "vision_feature_select_strategy": full.vision_feature_select_strategy,
            "num_additional_image_tokens": int(full.vision_feature_select_strategy == "default"),
        }
    has_class_token = full.vision_config.model_type == "clip_vision_model"
    return {
        "patch_size": full.vision_config.patch_size,
        # ViP-LLaVA has no such field and leaves the class token out.
        "vision_feature_select_strategy": getattr(full, "vision_feature_select_strategy", "default"),
        "num_additional_image_tokens": int(has_class_token),
    }


def tokenizer_config(folder: Path) -> dict | None:
    """A base's tokenizer_config.json that names the class its tokenizer is read with.

    Of a LLaVA, AutoTokenizer (5.23) reads tokenizer.json as it is, whatever class is named; of a type it does not know
    it takes the named one, and LlamaTokenizer splits the same text into other tokens.

    Returns: `None` if it names that class already, or there is no tokenizer.json.
    Raises: ValueError if the tokenizer does not load.
    """
    path = folder / "tokenizer_config.json"
    if not path.is_file() or not (folder / "tokenizer.json").is_file():
        return None
    content = read_json(path)
    if content.get("tokenizer_class") is None or "auto_map" in content:
        return None
    with blamed_on(folder / "tokenizer.json"):
        read_with = type(open_tokenizer(folder)).__name__
    return None if content["tokenizer_class"] == read_with else content | {"tokenizer_class": read_with}


@contextmanager
def no_warning_of_types():
    """Keep Transformers (5.23) from warning of a `model_type` of ours where it opens tokenizers and processors."""
    logger = logging.getLogger("transformers.configuration_utils")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def open_tokenizer(folder: Path):
    """A folder's tokenizer, without running its code."""
    with no_warning_of_types():
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


@dataclass
class Companions:
    """Files of a base that a grafted folder needs beside weights, config and code.

    Attributes:
        base: the base's folder.
        copied: files to copy.
        processor: processor_config.json to write; `None` to leave the base's.
        tokenizer: tokenizer_config.json to write; `None` to leave the base's.
        dropped: what is left behind, name to reason.
    """

    base: Path
    copied: list[Path]
    processor: dict | None
    tokenizer: dict | None
    dropped: dict[str, str]


def find_companions(base: Path, config: dict, used: Container[str]) -> Companions:
    """Processor, tokenizer, templates and generation settings of a base.

    Args:
        base: its folder.
        config: content of its config.json.
        used: names of its weight files that are copied elsewhere.
    """
    own = {path for pattern in OWN for path in base.glob(pattern)}
    copied = {path for pattern in COMPANIONS for path in base.glob(pattern) if path.is_file()} - own
    processor, reason = processor_config(base, config)
    if processor is None and (base / "processor_config.json").is_file():
        copied.add(base / "processor_config.json")
    dropped = {"processor": reason} if reason else {}
    kept_folders, code = {path.parent for path in copied}, code_files(config)
    for path in sorted(base.iterdir()):
        if path.is_dir() and path not in kept_folders and not path.name.startswith((".", "__")):
            dropped[f"{path.name}/"] = "a folder, which belongs to the base alone"
        if path.is_dir() or path.name.startswith(".") or path.name in used or path in own | copied:
            continue
        if path.name in code:  # written anew
            continue
        is_weights = path.name.endswith(WEIGHT_SUFFIXES)
        dropped[path.name] = "weights in a second format" if is_weights else "belongs to the base alone"
    return Companions(base, sorted(copied), processor, tokenizer_config(base), dropped)


def write_companions(companions: Companions, folder: Path) -> None:
    """Put them into a folder."""
    for path in companions.copied:
        copy = folder / path.relative_to(companions.base)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)
    if companions.processor is not None:
        write_json(folder / "processor_config.json", companions.processor)
    if companions.tokenizer is not None:
        write_json(folder / "tokenizer_config.json", companions.tokenizer)


def code_files(config: dict | None = None) -> dict[str, Path]:
    """Name to place of every file of the code that `trust_remote_code=True` loads.

    Args:
        config: config.json of the RoE model or its base; that of LLaVA if there is none.
    """
    return (routed_kind(config) if config else ROE).code_files()


def write_code(folder: Path, config: dict | None = None) -> list[str]:
    """Copy that code; names of the files."""
    return copy_code(code_files(config), folder)
