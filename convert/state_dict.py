"""Pure functions over dicts of tensors, shapes or whatever else is kept under a tensor's name.

Those that the model itself needs, to take an adapter file, are in `adapter_roe.py`.
"""

from collections.abc import Iterable

from ..adapter_roe import (
    RoutingSizes,
    check_fits,
    check_routing_parts,
    listed,
    once_each,
    routing_shapes,
    split_routing_parts,
)
from ..identity_roe import difference, split_signature
from .keys import BASE_KEYS, DISK_PREFIX, MEMORY_PREFIX, is_unread, renamed


def canonical_base(entries: dict) -> dict:
    """A base's entries under their names in memory, so that two layouts of one base compare equal.

    Buffers that no model reads are left out. A name no pattern knows stays as it is.

    Raises: ValueError if two names stand for one tensor.
    """
    return once_each(entries, {name: renamed(name, BASE_KEYS) or name for name in entries if not is_unread(name)})


def to_disk_names(parts: dict, prefix: str = DISK_PREFIX) -> dict:
    """Routing parts, named as in memory, under the names they have on disk beside a base of this prefix."""
    return {prefix + name.removeprefix(MEMORY_PREFIX): entry for name, entry in parts.items()}


def text_prefix(names: Iterable[str]) -> str | None:
    """`DISK_PREFIX` or `MEMORY_PREFIX`, whichever the layers of a base are stored under; `None` if it has no layer."""
    names = list(names)
    return next((p for p in (DISK_PREFIX, MEMORY_PREFIX) if any(n.startswith(f"{p}layers.") for n in names)), None)


__all__ = [
    "RoutingSizes",
    "canonical_base",
    "check_fits",
    "check_routing_parts",
    "difference",
    "listed",
    "routing_shapes",
    "split_routing_parts",
    "split_signature",
    "text_prefix",
    "to_disk_names",
]
