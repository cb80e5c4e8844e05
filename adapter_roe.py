"""The adapter file: all that RoE adds to a base, apart from the base.

`roe_adapter.safetensors` holds the routers, adapters and routing tokens under the names they have beside an llava-hf
base; `roe_adapter.json` holds sizes, routing fields, a summary of the training and the record of the base.

Top to bottom: names, sizes and checks of routing parts; what the file says; reading it. How a base is known from its
tensors stands in `identity_roe.py`. L decoder layers, D hidden, A adapter width.
"""

import json
import re
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .baked_roe import refuse_baked
from .configuration_roe import ROUTING_FIELDS, RoeLlavaConfig
from .identity_roe import fingerprint
from .listing_roe import listed

FORMAT_VERSION = 1
WEIGHTS_NAME = "roe_adapter.safetensors"
ABOUT_NAME = "roe_adapter.json"

# ------------------------------------------------------------------------------------------------------------- names

# Where the language model's tensors begin: on disk as llava-hf writes them, and as the model holds them. Some
# checkpoints were saved with the names in memory; a routing part follows the base it is put onto.
DISK_PREFIX = "language_model.model."
MEMORY_PREFIX = "model.language_model."

# Tensors RoE adds, under either name, to their names in memory.
ROE_KEYS = {
    r"(?:language_model\.model|model\.language_model)\.layers\.(\d+)\.(router|adapter\.down_proj|adapter\.up_proj)"
    r"\.weight": r"model.language_model.layers.\1.\2.weight",
    r"(?:language_model\.model|model\.language_model)\.routing_tokens\.weight": (
        "model.language_model.routing_tokens.weight"
    ),
}

# Buffers that old checkpoints carry and no current model reads: copied with their shard, left out of comparisons.
UNREAD_BASE_KEYS = {
    r".*\.rotary_emb\.inv_freq": "rotary frequencies are computed from the config",
    r".*\.embeddings\.position_ids": "positions are counted, not stored",
}


def renamed(name: str, table: dict[str, str]) -> str | None:
    """The new name by the one pattern that matches all of `name`; `None` if none does."""
    found = [re.sub(pattern, new, name) for pattern, new in table.items() if re.fullmatch(pattern, name)]
    assert len(found) <= 1, f"{name} is renamed twice: {found}"
    return found[0] if found else None


def is_unread(name: str) -> bool:
    """Whether a base tensor is one that no current model reads."""
    return any(re.fullmatch(pattern, name) for pattern in UNREAD_BASE_KEYS)


def split_routing_parts(entries: dict) -> tuple[dict, dict]:
    """(base, routing parts): the first under the names given, the second under their names in memory.

    Raises: ValueError if two names stand for one routing part.
    """
    names = {name: renamed(name, ROE_KEYS) for name in entries}
    base = {name: entry for name, entry in entries.items() if names[name] is None}
    return base, once_each(entries, {old: new for old, new in names.items() if new is not None})


def once_each(entries: dict, names: dict[str, str]) -> dict:
    """Entries under new names.

    Args:
        entries: old name to anything.
        names: old name to new name, of the entries wanted.
    Raises: ValueError if two entries get one name: only one of them would be read, and nobody can say which.
    """
    found, old_names = {}, {}
    for old, new in names.items():
        if new in found:
            one, other = (
                f"{name} in {entries[name].file}" if hasattr(entries[name], "file") else name
                for name in (old, old_names[new])
            )
            raise ValueError(
                f"{one} and {other} are two names of one tensor, {new}: was a checkpoint saved over "
                "one with other names? Remove the one that is not meant"
            )
        found[new], old_names[new] = entries[old], old
    return found


# --------------------------------------------------------------------------------------------------- sizes and checks


@dataclass(frozen=True)
class RoutingSizes:
    """What decides the names and shapes of the routing parts.

    Attributes:
        text_model_type: `model_type` of the language model.
        num_hidden_layers: L.
        hidden_size: D.
        adapter_size: A.
        routed_layers: layers that have a router and an adapter; `None` for all.
    """

    text_model_type: str
    num_hidden_layers: int
    hidden_size: int
    adapter_size: int
    routed_layers: list[int] | None = None

    @classmethod
    def of_config(cls, config) -> "RoutingSizes":
        """Sizes of a `RoeLlavaConfig`."""
        text = config.text_config
        return cls(text.model_type, text.num_hidden_layers, text.hidden_size, config.adapter_size, config.routed_layers)

    def routed(self) -> list[int]:
        return list(range(self.num_hidden_layers)) if self.routed_layers is None else sorted(self.routed_layers)


def routing_shapes(sizes: RoutingSizes) -> dict[str, tuple[int, ...]]:
    """Every tensor RoE adds to a model of these sizes, by name in memory, with its shape."""
    hidden, width = sizes.hidden_size, sizes.adapter_size
    shapes = {f"{MEMORY_PREFIX}routing_tokens.weight": (2, hidden)}
    for layer in sizes.routed():
        shapes[f"{MEMORY_PREFIX}layers.{layer}.router.weight"] = (2, 2 * hidden)
        shapes[f"{MEMORY_PREFIX}layers.{layer}.adapter.down_proj.weight"] = (width, hidden)
        shapes[f"{MEMORY_PREFIX}layers.{layer}.adapter.up_proj.weight"] = (hidden, width)
    return shapes


def check_routing_parts(shapes: dict[str, tuple[int, ...]], sizes: RoutingSizes, source) -> None:
    """Check that routing parts are complete, of the right shapes, and nothing else.

    Args:
        shapes: name in memory to shape.
        sizes: what the file or config that came with them says.
        source: where they come from, for the message.
    Raises: ValueError naming the tensor, what was expected and what was found.
    """
    expected = routing_shapes(sizes)
    if missing := sorted(expected.keys() - shapes.keys()):
        raise ValueError(
            f"{source} lacks {listed(missing)}, expected {len(expected)} routing tensors for "
            f"{sizes.num_hidden_layers} layers (routed: {sizes.routed_layers or 'all'}), found {len(shapes)}: was a "
            "file cut, or saved by a model with other routed_layers?"
        )
    if unknown := sorted(shapes.keys() - expected.keys()):
        raise ValueError(
            f"{source} holds {listed(unknown)}, which a model with {sizes.num_hidden_layers} layers (routed: "
            f"{sizes.routed_layers or 'all'}) does not have: do sizes and weights come from the same run?"
        )
    for name, shape in expected.items():
        if tuple(shapes[name]) != shape:
            raise ValueError(
                f"{name} in {source} has shape {list(shapes[name])}, expected {list(shape)} for hidden size "
                f"{sizes.hidden_size} and adapter size {sizes.adapter_size}: is it from another model or run?"
            )


def check_fits(parts: RoutingSizes, base: RoutingSizes, roe, base_name) -> None:
    """Check that routing parts of these sizes can stand on this base.

    Raises: ValueError naming the size that differs.
    """
    labels = {
        "text_model_type": "a language model of type",
        "num_hidden_layers": "the layer count",
        "hidden_size": "the hidden size",
    }
    for name, label in labels.items():
        found, expected = getattr(parts, name), getattr(base, name)
        if found != expected:
            raise ValueError(
                f"{roe} is for {label} {found!r} (text_config.{name}), the base {base_name} has {expected!r}: it was "
                "trained on another base"
            )


def check_finite(name: str, tensor: Tensor, source) -> None:
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


# ------------------------------------------------------------------------------------------------- what the file says


@dataclass
class AdapterInfo:
    """What `roe_adapter.json` says.

    Attributes:
        text_model_type, num_hidden_layers, hidden_size: of the language model it was trained on.
        adapter_size, routed_layers, routing_positions, routing_question, target_skip_ratio, route_bias,
            skip_calibration: as in `RoeLlavaConfig`.
        training: summary of the training, free of form.
        base: `{"id", "revision", "fingerprint", "tensors"}` as `base_record` makes it; `None` if it is not known.
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
    route_bias: list[float] | None = None
    skip_calibration: dict | None = None
    training: dict = field(default_factory=dict)
    base: dict | None = None
    format_version: int = FORMAT_VERSION

    @classmethod
    def of_config(cls, config, training: dict | None = None, base: dict | None = None) -> "AdapterInfo":
        """From a `RoeLlavaConfig`.

        Raises: ValueError if it is that of a baked model.
        """
        refuse_baked(config.skipped_layers, "there is no adapter file to be had of it", config._name_or_path)
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
    tensors: dict[str, Tensor]


def read_json(path: Path) -> dict:
    """A JSON object from a file.

    Raises: ValueError if it is not there or not an object.
    """
    if not path.is_file():
        raise ValueError(f"{path.parent} is not a checkpoint folder: it has no {path.name}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected an object")
    return content


def expanded(path) -> Path:
    """A path with `~` replaced by a home.

    Raises: ValueError if nobody has that home.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{path} begins with the home of nobody known here: is the path right?") from error


def read_info(path: Path) -> AdapterInfo:
    """What an adapter file says.

    Raises: ValueError if it is of another version, lacks an entry, or has one of a wrong type or out of range.
    """
    content = read_json(path)
    version = content.get("format_version")
    if type(version) is not int or version > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {version!r}, this program reads up to {FORMAT_VERSION}: update roe-llava"
        )
    if version < 1:
        raise ValueError(f"{path} has format_version {version!r}, expected 1 or more: was it written by roe-llava?")
    known = {one.name for one in fields(AdapterInfo)}
    required = known - {"route_bias", "skip_calibration", "training", "base", "format_version"}
    if missing := sorted(required - content.keys()):
        raise ValueError(f"{path} lacks {listed(missing)}: was it written by roe-llava?")
    check_entries(content, INFO_ENTRIES, path)
    check_base_entries(content.get("base"), path)
    info = AdapterInfo(**{name: value for name, value in content.items() if name in known})
    try:  # ranges are the configuration's to know
        RoeLlavaConfig(text_config={"num_hidden_layers": info.num_hidden_layers}, **info.routing_fields)
    except ValueError as error:
        raise ValueError(f"{path} has an entry that cannot be: {error}") from error
    return info


def is_count(value) -> bool:
    return type(value) is int and value > 0


def is_text_or_none(value) -> bool:
    return value is None or isinstance(value, str)


def are_layers(value) -> bool:
    return value is None or (isinstance(value, list) and all(type(layer) is int and layer >= 0 for layer in value))


def are_signatures(value) -> bool:
    """Whether a JSON value maps names to signatures, digests included; without those any base would pass."""
    form = r"\w+ \[[\d, ]*\] [0-9a-f]{16}"
    return isinstance(value, dict) and all(isinstance(one, str) and re.fullmatch(form, one) for one in value.values())


# Entries of `roe_adapter.json`, and of its record of the base, to what they have to be.
INFO_ENTRIES = {
    "text_model_type": (lambda value: isinstance(value, str), "text"),
    "num_hidden_layers": (is_count, "a positive integer"),
    "hidden_size": (is_count, "a positive integer"),
    "adapter_size": (is_count, "a positive integer"),
    "routed_layers": (are_layers, "null or a list of layer numbers"),
    "routing_positions": (lambda value: isinstance(value, str), "text"),
    "routing_question": (lambda value: isinstance(value, str), "text"),
    "target_skip_ratio": (lambda value: type(value) in (int, float), "a number"),
    "route_bias": (lambda value: value is None or isinstance(value, list), "null or a list of numbers"),
    "skip_calibration": (lambda value: value is None or isinstance(value, dict), "null or an object"),
    "training": (lambda value: isinstance(value, dict), "an object"),
    "base": (lambda value: value is None or isinstance(value, dict), "null or an object"),
}
BASE_ENTRIES = {
    "id": (is_text_or_none, "null or text"),
    "revision": (is_text_or_none, "null or text"),
    "fingerprint": (lambda value: isinstance(value, str), "text"),
    "tensors": (are_signatures, 'an object of signatures like "F16 [2, 4] 0123456789abcdef" by tensor name'),
}


def check_entries(content: dict, entries: dict, path: Path, owner: str = "") -> None:
    """Raises: ValueError naming an entry that is not of its type."""
    for name, (is_right, expected) in entries.items():
        if name in content and not is_right(content[name]):
            raise ValueError(
                f"{path} has {owner}{name} {content[name]!r:.80}, expected {expected}: was the file changed by hand?"
            )


def check_base_entries(base: dict | None, path: Path) -> None:
    """Check the record of a base, which may be left out but not be half there.

    Raises: ValueError naming the entry, or if the fingerprint is not that of the recorded tensors.
    """
    if not base:
        return
    if missing := sorted(BASE_ENTRIES.keys() - base.keys()):
        raise ValueError(f"{path} lacks {listed(missing)} in base: was it written by roe-llava?")
    check_entries(base, BASE_ENTRIES, path, "base.")
    if (found := fingerprint(base["tensors"])) != base["fingerprint"]:
        raise ValueError(
            f"{path} has base.fingerprint {base['fingerprint']!r}, expected {found}, that of base.tensors: was the "
            "file changed by hand?"
        )


def read_adapter(folder: str | Path) -> Adapter:
    """Read and check an adapter file.

    Raises: ValueError naming the file and the tensor if something is missing, damaged, unknown or not finite, or if the
        file is of a newer version.
    """
    folder = Path(folder)
    info = read_info(folder / ABOUT_NAME)
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        raise ValueError(f"{folder} has {ABOUT_NAME} but no {WEIGHTS_NAME}: was the folder copied in full?")
    try:
        stored = load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{path} has {path.stat().st_size} bytes and is not readable as safetensors ({error}): is it cut, or a "
            "Git LFS pointer?"
        ) from error
    tensors = named_parts(stored, path)
    check_routing_parts({name: tuple(tensor.shape) for name, tensor in tensors.items()}, info.sizes, path)
    for name, tensor in tensors.items():
        check_finite(name, tensor, path)
    return Adapter(info, tensors)


def named_parts(stored: dict, path: Path) -> dict:
    """The entries of an adapter file under their names in memory.

    Raises: ValueError if some are no routing parts.
    """
    base, parts = split_routing_parts(stored)
    if base:
        raise ValueError(
            f"{path} holds {listed(list(base))}, expected routers, adapters and routing tokens alone: is it a whole "
            "checkpoint under an adapter's name?"
        )
    return parts


__all__ = ["Adapter", "AdapterInfo", "RoutingSizes", "read_adapter"]
