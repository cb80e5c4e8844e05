"""Adapter files: all that RoE adds to a base, apart from the base.

`roe_adapter.safetensors` holds the routers, adapters and routing tokens under the names they have beside an llava-hf
base; `roe_adapter.json` holds sizes, routing fields, a summary of the training and the identity of the base.
"""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from safetensors.torch import save_file

from .fingerprint import describe_base
from .keys import ROE_KEYS, renamed
from .output import new_folder, write_json
from .source import read_json
from .state_dict import RoutingSizes, check_routing_parts, listed, to_disk_names
from .weights import SafetensorsFile, StoredTensor

FORMAT_VERSION = 1
WEIGHTS_NAME = "roe_adapter.safetensors"
ABOUT_NAME = "roe_adapter.json"

# Fields of `RoeLlavaConfig` that an adapter brings along.
ROUTING_FIELDS = ("adapter_size", "routed_layers", "routing_positions", "routing_question", "target_skip_ratio")


@dataclass
class AdapterInfo:
    """What `roe_adapter.json` says.

    Attributes:
        text_model_type, num_hidden_layers, hidden_size: of the language model it was trained on.
        adapter_size, routed_layers, routing_positions, routing_question, target_skip_ratio: as in `RoeLlavaConfig`.
        training: summary of the training, free of form.
        base: `{"id", "revision", "fingerprint", "tensors"}` as `describe_base` makes it; `None` if it is not known.
        format_version: of the file.
    """

    text_model_type: str
    num_hidden_layers: int
    hidden_size: int
    adapter_size: int
    routed_layers: list[int] | None
    routing_positions: str
    routing_question: str
    target_skip_ratio: float
    training: dict = field(default_factory=dict)
    base: dict | None = None
    format_version: int = FORMAT_VERSION

    @classmethod
    def of_config(cls, config, training: dict | None = None, base: dict | None = None) -> "AdapterInfo":
        """From a `RoeLlavaConfig`."""
        text = config.text_config
        sizes = (text.model_type, text.num_hidden_layers, text.hidden_size)
        return cls(
            *sizes, **{name: getattr(config, name) for name in ROUTING_FIELDS}, training=training or {}, base=base
        )

    @property
    def sizes(self) -> RoutingSizes:
        names = [one.name for one in fields(RoutingSizes)]
        return RoutingSizes(**{name: getattr(self, name) for name in names})

    @property
    def routing_fields(self) -> dict:
        """What a config needs beside the base's fields."""
        return {name: getattr(self, name) for name in ROUTING_FIELDS}


@dataclass
class Adapter:
    """An adapter file in memory.

    Attributes:
        info: what it says.
        tensors: name in the model's memory to tensor; `model.load_state_dict(tensors, strict=False)` takes them.
    """

    info: AdapterInfo
    tensors: dict[str, torch.Tensor]


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
    Raises: ValueError if parts are missing, have other shapes than the config says, or hold NaN or Inf.
    """
    is_model = isinstance(model_or_tensors, torch.nn.Module)
    named = model_or_tensors.state_dict() if is_model else model_or_tensors
    parts = {renamed(name, ROE_KEYS): tensor.detach() for name, tensor in named.items() if renamed(name, ROE_KEYS)}
    base = describe_base(base) if isinstance(base, (str, Path)) else base
    info = AdapterInfo.of_config(config, training, base)
    source = type(model_or_tensors).__name__
    check_routing_parts({name: tuple(tensor.shape) for name, tensor in parts.items()}, info.sizes, source)
    for name, tensor in parts.items():
        check_finite(name, tensor, source)
    try:
        json.dumps(info.training)
    except TypeError as error:
        raise ValueError(f"training has to fit into JSON: {error}; convert tensors and arrays to numbers") from error
    with new_folder(folder, overwrite) as partial:
        # Cloned: safetensors refuses tensors that share memory, and a view would be written as its whole base.
        stored = {name: tensor.cpu().contiguous().clone() for name, tensor in to_disk_names(parts).items()}
        save_file(stored, partial / WEIGHTS_NAME, metadata={"format": "pt"})
        write_json(partial / ABOUT_NAME, asdict(info))
    return Path(folder)


def read_adapter(folder: str | Path) -> Adapter:
    """Read an adapter file.

    Raises: ValueError naming the file and the tensor if something is missing, damaged, unknown or not finite, or if the
        file is of a newer version.
    """
    info, tensors = open_adapter(Path(folder))
    return Adapter(info, {name: tensor.load() for name, tensor in tensors.items()})


def open_adapter(folder: Path) -> tuple[AdapterInfo, dict[str, StoredTensor]]:
    """Read and check an adapter file one tensor at a time.

    Returns: what it says, and name in memory to tensor on disk.
    Raises: as `read_adapter`.
    """
    info = read_info(folder / ABOUT_NAME)
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        raise ValueError(f"{folder} has {ABOUT_NAME} but no {WEIGHTS_NAME}: was the folder copied in full?")
    stored = SafetensorsFile(path).tensors
    if unknown := [name for name in stored if renamed(name, ROE_KEYS) is None]:
        raise ValueError(
            f"{path} holds {listed(unknown)}, expected routers, adapters and routing tokens alone: is it a whole "
            "checkpoint under an adapter's name?"
        )
    tensors = {renamed(name, ROE_KEYS): tensor for name, tensor in stored.items()}
    check_stored_parts(tensors, info.sizes, path)
    return info, tensors


def check_stored_parts(tensors: dict[str, StoredTensor], sizes: RoutingSizes, source) -> None:
    """Check names, shapes, dtypes and values of routing parts in a file, one in memory at a time.

    Raises: ValueError naming the tensor.
    """
    check_routing_parts({name: tensor.shape for name, tensor in tensors.items()}, sizes, source)
    for name, tensor in tensors.items():
        check_finite(name, tensor.load(), source)


def check_finite(name: str, tensor: torch.Tensor, source) -> None:
    """Raises: ValueError if a routing part is not of a floating dtype, or holds NaN or Inf."""
    if not tensor.is_floating_point() or tensor.itemsize < 2:
        raise ValueError(f"{name} in {source} is {tensor.dtype}, expected a floating dtype of 16 bits or more")
    # The extremes are NaN if anything is, and several times faster to find than every NaN.
    if tensor.numel() and not all(torch.isfinite(extreme) for extreme in torch.aminmax(tensor)):
        bad = int((~torch.isfinite(tensor)).sum())
        raise ValueError(
            f"{name} in {source} holds {bad} NaN or Inf among {tensor.numel()} values, expected finite weights: did "
            "the training diverge, or float16 overflow?"
        )


def read_info(path: Path) -> AdapterInfo:
    """What an adapter file says.

    Raises: ValueError if it is of a newer version or lacks an entry.
    """
    content = read_json(path)
    version = content.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {version!r}, this program reads up to {FORMAT_VERSION}: update roe-llava"
        )
    known = {one.name for one in fields(AdapterInfo)}
    required = known - {"training", "base", "format_version"}
    if missing := sorted(required - content.keys()):
        raise ValueError(f"{path} lacks {listed(missing)}: was it written by roe-llava?")
    return AdapterInfo(**{name: value for name, value in content.items() if name in known})
