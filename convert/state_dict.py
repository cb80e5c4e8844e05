"""Pure functions over dicts of tensors, shapes or whatever else is kept under a tensor's name.

L decoder layers, D hidden, A adapter width.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from .keys import BASE_KEYS, DISK_PREFIX, MEMORY_PREFIX, ROE_KEYS, is_unread, renamed


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


def split_routing_parts(entries: dict) -> tuple[dict, dict]:
    """(base, routing parts): the first under the names given, the second under their names in memory."""
    names = {name: renamed(name, ROE_KEYS) for name in entries}
    base = {name: entry for name, entry in entries.items() if names[name] is None}
    return base, {names[name]: entry for name, entry in entries.items() if names[name] is not None}


def canonical_base(entries: dict) -> dict:
    """A base's entries under their names in memory, so that two layouts of one base compare equal.

    Buffers that no model reads are left out. A name no pattern knows stays as it is.
    """
    return {renamed(name, BASE_KEYS) or name: entry for name, entry in entries.items() if not is_unread(name)}


def to_disk_names(parts: dict, prefix: str = DISK_PREFIX) -> dict:
    """Routing parts, named as in memory, under the names they have on disk beside a base of this prefix."""
    return {prefix + name.removeprefix(MEMORY_PREFIX): entry for name, entry in parts.items()}


def text_prefix(names: Iterable[str]) -> str | None:
    """`DISK_PREFIX` or `MEMORY_PREFIX`, whichever the layers of a base are stored under; `None` if it has no layer."""
    names = list(names)
    return next((p for p in (DISK_PREFIX, MEMORY_PREFIX) if any(n.startswith(f"{p}layers.") for n in names)), None)


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
    for field, label in labels.items():
        found, expected = getattr(parts, field), getattr(base, field)
        if found != expected:
            raise ValueError(
                f"{roe} is for {label} {found!r} (text_config.{field}), the base {base_name} has {expected!r}: it was "
                "trained on another base"
            )


def difference(ours: dict[str, str], theirs: dict[str, str]) -> str | None:
    """What differs between two descriptions of tensors (name to signature), in words; `None` if nothing does.

    Args:
        ours: of the base at hand.
        theirs: of the base that was expected.
    """
    reasons = [f"{name} is not there" for name in sorted(theirs.keys() - ours.keys())]
    reasons += [f"{name} was not there" for name in sorted(ours.keys() - theirs.keys())]
    for name in sorted(ours.keys() & theirs.keys()):
        if ours[name] == theirs[name]:
            continue
        (our_type, our_bytes), (their_type, their_bytes) = split_signature(ours[name]), split_signature(theirs[name])
        if our_type != their_type:
            reasons.append(f"{name} is {our_type}, was {their_type}")
        elif our_bytes and their_bytes:
            reasons.append(f"{name} has other values")
    if not reasons:
        return None
    shown = "; ".join(reasons[:3]) + (f"; and {len(reasons) - 3} more" if len(reasons) > 3 else "")
    return f"{len(reasons)} of {len(theirs)} tensors differ ({shown})"


def split_signature(signature: str) -> tuple[str, str]:
    """("F32 [2, 4]", digest) of "F32 [2, 4] digest"; the digest may be missing."""
    kind, _, digest = signature.partition("] ")
    return f"{kind.removesuffix(']')}]", digest


def listed(names: list[str], most: int = 3) -> str:
    """The first few names, and how many more."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
