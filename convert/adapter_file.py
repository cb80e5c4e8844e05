"""Adapter files: all that RoE adds to a base, apart from the base.

`roe_adapter.safetensors` holds the routers, adapters and routing tokens under the names they have beside an llava-hf
base; `roe_adapter.json` holds sizes, routing fields, a summary of the training and the identity of the base.
"""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..adapter_roe import (
    ABOUT_NAME,
    FORMAT_VERSION,
    WEIGHTS_NAME,
    Adapter,
    AdapterInfo,
    RoutingSizes,
    check_finite,
    check_routing_parts,
    named_parts,
    read_adapter,
    read_info,
)
from .fingerprint import describe_base
from .keys import MEMORY_PREFIX
from .output import check_apart, new_folder, write_json
from .source import resolve_source
from .state_dict import split_routing_parts, split_signature, to_disk_names
from .weights import SafetensorsFile, StoredTensor


def save_adapter(
    model_or_tensors, config, folder: str | Path, *, base=None, training: dict | None = None, overwrite: bool = False
) -> Path:
    """Write the routing parts of a model as an adapter file.

    Args:
        model_or_tensors: the model, or a dict of tensors named as in memory or on disk; base tensors are left out.
        config: its `RoeLlavaConfig`.
        folder: where to write; a missing or empty folder unless `overwrite`.
        base: what it was trained on: a folder, a Hub id, or the record of `describe_base`. An adapter without one can
            only be grafted unchecked.
        training: summary to store; has to fit into JSON.
        overwrite: replace the folder.
    Returns: the folder.
    Raises: ValueError if parts are missing, have other shapes than the config says, or hold NaN or Inf; if the base is
        of other sizes than the config; or if the folder holds the base.
    """
    is_model = isinstance(model_or_tensors, torch.nn.Module)
    named = model_or_tensors.state_dict() if is_model else model_or_tensors
    parts = {name: tensor.detach() for name, tensor in split_routing_parts(named)[1].items()}
    if isinstance(base, str | Path):
        base_source = resolve_source(base)
        check_apart(Path(folder), base_source.folder)
        base = describe_base(base)
    info = AdapterInfo.of_config(config, training, base)
    source = type(model_or_tensors).__name__
    check_record_fits(base, info.sizes)
    check_routing_parts({name: tuple(tensor.shape) for name, tensor in parts.items()}, info.sizes, source)
    for name, tensor in parts.items():
        check_finite(name, tensor, source)
    try:
        json.dumps(info.training, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"training has to fit into JSON: {error}; convert tensors and arrays to numbers") from error
    with new_folder(folder, overwrite) as partial:
        # Cloned: safetensors refuses tensors that share memory, and a view would be written as its whole base.
        stored = {name: tensor.cpu().contiguous().clone() for name, tensor in to_disk_names(parts).items()}
        save_file(stored, partial / WEIGHTS_NAME, metadata={"format": "pt"})
        write_json(partial / ABOUT_NAME, asdict(info))
    return Path(folder)


def check_record_fits(base: dict | None, sizes: RoutingSizes) -> None:
    """Check that the record of a base is one, and of a base of these sizes.

    Raises: ValueError naming what differs.
    """
    if base is None:
        return
    if not isinstance(base, dict) or not isinstance(base.get("tensors"), dict):
        raise ValueError(f"base is {base!r:.80}, expected a folder, a Hub id, or the record that describe_base makes")
    norms = {f"{MEMORY_PREFIX}layers.{layer}.input_layernorm.weight" for layer in range(sizes.num_hidden_layers)}
    found = {name for name in base["tensors"] if name.endswith(".input_layernorm.weight") and MEMORY_PREFIX in name}
    shapes = {split_signature(base["tensors"][name])[0].partition(" ")[2] for name in found}
    if found != norms or shapes != {f"[{sizes.hidden_size}]"}:
        raise ValueError(
            f"base {base.get('id')!r} has {len(found)} layers of hidden size {', '.join(sorted(shapes)) or 'none'}, "
            f"the config {sizes.num_hidden_layers} of [{sizes.hidden_size}]: was the adapter trained on another base?"
        )


def open_adapter(folder: Path) -> tuple[AdapterInfo, dict[str, StoredTensor]]:
    """Read and check an adapter file one tensor at a time.

    Returns: what it says, and name in memory to tensor on disk.
    Raises: as `read_adapter`.
    """
    info = read_info(folder / ABOUT_NAME)
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        raise ValueError(f"{folder} has {ABOUT_NAME} but no {WEIGHTS_NAME}: was the folder copied in full?")
    tensors = named_parts(SafetensorsFile(path).tensors, path)
    check_stored_parts(tensors, info.sizes, path)
    return info, tensors


def check_stored_parts(tensors: dict[str, StoredTensor], sizes: RoutingSizes, source) -> None:
    """Check names, shapes, dtypes and values of routing parts in a file, one in memory at a time.

    Raises: ValueError naming the tensor.
    """
    check_routing_parts({name: tensor.shape for name, tensor in tensors.items()}, sizes, source)
    for name, tensor in tensors.items():
        check_finite(name, tensor.load(), source)


__all__ = [
    "ABOUT_NAME",
    "FORMAT_VERSION",
    "WEIGHTS_NAME",
    "Adapter",
    "AdapterInfo",
    "check_stored_parts",
    "open_adapter",
    "read_adapter",
    "read_info",
    "save_adapter",
]
