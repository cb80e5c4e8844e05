"""Whether weights are those of the model that their config describes: none missing, unknown or of another shape."""

from collections.abc import Callable
from pathlib import Path

import torch

from ..modeling_frontend import base_class_of
from .bases import BASES
from .keys import EXPORT_KEYS, renamed
from .kinds import kind_of
from .made_tensors import check_dtype
from .source import blamed_on, check_text_config, read_json
from .state_dict import canonical_base, listed, split_routing_parts
from .weights import StoredTensor, open_checkpoint


def expected_shapes(config: dict) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """Every tensor of a model, by name in memory, with its shape, and which of them another one may stand for.

    Nothing is allocated.

    Args:
        config: content of its config.json.
    """
    kind = kind_of(config["model_type"])
    base = BASES.get(config["model_type"])
    cls = kind.model if kind is not None else base_class_of(config) if base is None else base.base_class(config)
    with torch.device("meta"):
        model = cls(cls.config_class.from_dict(config))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}, set(model.all_tied_weights_keys)


def check_files(folder: Path) -> None:
    """Check that a model folder's files are whole, before Transformers loads them: its errors name no file.

    Headers are read, no weights.

    Raises: ValueError naming the file.
    """
    config = read_json(folder / "config.json")
    if config.get("roe_adapter_only"):  # its base, and with it the weights, comes from the Hub
        return
    check_text_config(config, folder / "config.json")
    open_checkpoint(folder)


def original_name(name: str) -> str:
    """The published name of a tensor named as in memory."""
    return renamed(name, EXPORT_KEYS) or name


def check_complete(
    tensors: dict[str, StoredTensor], config: dict, folder: Path, source_name: Callable[[str], str] = original_name
) -> None:
    """Check that tensors are those of the model a config describes, no more and no less.

    Buffers that no model reads may be among them.

    Args:
        tensors: name on disk to tensor, as they are to be written, or as they are.
        config: content of the config.json to be written.
        folder: where they come from, for messages.
        source_name: gives the name there of a tensor named as in memory; by default the original LLaVA's.
    Raises: ValueError naming file, tensor, what was found and what was expected; or two names of one tensor.
    """
    check_not_quantised(config, folder)
    with blamed_on(folder / "config.json"):
        expected, tied = expected_shapes(config)
    base, parts = split_routing_parts(tensors)
    found = canonical_base(base) | parts
    if missing := expected.keys() - found.keys() - tied:
        is_renamed = any(name != tensor.name for name, tensor in tensors.items())
        names = sorted(map(source_name, missing) if is_renamed else missing)
        raise ValueError(
            f"{folder} lacks {listed(names)}, expected {len(expected)} tensors for its config, found {len(found)}: was "
            "a shard lost?"
        )
    for name, tensor in found.items():
        if name not in expected:
            raise ValueError(
                f"{tensor.name} in {tensor.file} is no tensor of the model that its config describes: do config and "
                "weights belong together?"
            )
        if tensor.shape != expected[name]:
            raise ValueError(
                f"{tensor.name} in {tensor.file} has shape {list(tensor.shape)}, expected {list(expected[name])} for "
                "its config: do config and weights belong together?"
            )
        check_dtype(tensor)


def check_not_quantised(config: dict, folder: Path) -> None:
    """Raises: ValueError if weights were quantised: what is stored then are not the model's own tensors."""
    quantised = config.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else quantised
        raise ValueError(
            f"{folder} holds quantised weights (quantization_config in config.json: {method}), expected 16 or 32 bits: "
            "give the checkpoint they were made from. To the Hub a quantised model goes with model.push_to_hub and "
            "processor.push_to_hub"
        )
