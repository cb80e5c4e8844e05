"""What is to be grafted: the routing parts of an adapter file or a full RoE checkpoint, and the base they belong to."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ..baked_roe import refuse_baked
from .adapter_file import ABOUT_NAME, AdapterInfo, check_stored_parts, open_adapter
from .bases import A_ROUTED_MODEL, is_routed, routed_kind
from .fingerprint import base_signatures, base_tensors
from .folder_files import check_opens
from .source import Source, check_text_config, read_json
from .state_dict import difference, split_routing_parts
from .weights import Checkpoint, StoredTensor, open_checkpoint


@dataclass
class RoutingParts:
    """Routing parts, opened and checked, not in memory.

    Attributes:
        where: the adapter or RoE checkpoint.
        info: sizes, routing fields, training and base.
        tensors: name in memory to tensor.
        checkpoint: the full RoE checkpoint they came in; `None` for an adapter file.
    """

    where: Source
    info: AdapterInfo
    tensors: dict[str, StoredTensor]
    checkpoint: Checkpoint | None = None


def open_routing_parts(where: Source) -> RoutingParts:
    """Routing parts of an adapter file or of a full RoE checkpoint, checked.

    Raises: ValueError if it is neither, or damaged or incomplete.
    """
    folder = where.folder
    if (folder / ABOUT_NAME).is_file():
        return RoutingParts(where, *open_adapter(folder))
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has neither {ABOUT_NAME} nor config.json: it is no adapter and no RoE checkpoint")
    content = read_json(folder / "config.json")
    if not is_routed(content.get("model_type")):
        raise ValueError(
            f"{folder / 'config.json'} has model_type {content.get('model_type')!r}, expected "
            f"{A_ROUTED_MODEL}: are BASE and ROE swapped?"
        )
    check_text_config(content, folder / "config.json")
    check_opens(content, folder / "config.json")
    refuse_baked(content.get("skipped_layers"), "it has no routing parts to take", folder)
    config = routed_kind(content).open_config(content)
    info = AdapterInfo.of_config(config, recorded_training(content, folder / "config.json"))
    checkpoint = open_checkpoint(folder)
    tensors = split_routing_parts(checkpoint.tensors)[1]
    check_stored_parts(tensors, info.sizes, folder)
    return RoutingParts(where, info, tensors, checkpoint)


def recorded_training(config: dict, path: Path) -> dict | None:
    """The summary of the training in a RoE checkpoint's config.json.

    Args:
        config: its content.
        path: of the file, for messages.
    Raises: ValueError if what it says of the weights' provenance is not what a graft writes.
    """
    provenance = config.get("roe_provenance")
    if not isinstance(provenance, dict | None):
        raise ValueError(f"{path} has roe_provenance {provenance!r:.60}, expected an object: was it changed by hand?")
    for name in ("training", "base"):
        if not isinstance(value := (provenance or {}).get(name), dict | None):
            raise ValueError(
                f"{path} has roe_provenance.{name} {value!r:.60}, expected an object: was it changed by hand?"
            )
    base = (provenance or {}).get("base") or {}
    if wrong := [name for name in ("id", "revision", "fingerprint") if not isinstance(base.get(name), str | None)]:
        raise ValueError(
            f"{path} has roe_provenance.base.{wrong[0]} {base[wrong[0]]!r:.60}, expected null or text: was it changed "
            "by hand?"
        )
    return (provenance or {}).get("training")


def expected_base(parts: RoutingParts, base: str | Path) -> dict[str, str]:
    """Signatures of the base that the parts were trained on: recorded in an adapter file, else read now.

    Raises: ValueError if that is not known.
    """
    if parts.checkpoint is not None:
        num_bytes = sum(tensor.num_bytes for tensor in base_tensors(parts.checkpoint).values())
        with byte_progress(num_bytes, f"reading {parts.where.id}") as progress:
            return base_signatures(parts.checkpoint, progress)
    if not (parts.info.base or {}).get("tensors"):
        raise ValueError(
            f"{parts.where.folder / ABOUT_NAME} does not say which base it was trained on, so it cannot be checked "
            f"that it is {base}: graft with --any-base if you know it is"
        )
    return parts.info.base["tensors"]


def check_same_base(
    found: dict[str, str], expected: dict[str, str] | None, base: str | Path, parts: RoutingParts
) -> None:
    """Check signatures of a base, or dtypes and shapes alone, against those that are expected.

    Args:
        found: of the base, by name in memory.
        expected: likewise; `None` to accept any base.
        base: as the caller named it.
        parts: what is to be grafted onto it.
    Raises: ValueError saying what differs and what to do.
    """
    reason = difference(found, expected) if expected is not None else None
    if reason is None:
        return
    if parts.checkpoint is not None:
        raise ValueError(
            f"the base weights in {parts.where.folder} are not those of {base}: {reason}. That checkpoint was tuned "
            "whole (or made from another base); use it as it is, or graft its routing parts alone with --any-base"
        )
    known = parts.info.base
    name = f"{known.get('id')} at revision {known['revision']}" if known.get("revision") else known.get("id")
    raise ValueError(
        f"{base} is not the base {parts.where.folder} was trained on ({name}, fingerprint "
        f"{known.get('fingerprint')}): {reason}. Give that base, or graft all the same with --any-base"
    )


@contextmanager
def byte_progress(total: int, what: str) -> Iterator[Callable[[int], object]]:
    """A progress bar over bytes, as a function to call with how many were done; silent where nobody looks."""
    with tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=None) as bar:
        yield bar.update
