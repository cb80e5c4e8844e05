"""What RoE is put onto: which kind belongs to which base, for commands that take a base.

A new base is a kind in `kinds.py`, once its classes are there; see `docs/bases.md`.
"""

from pathlib import Path

from .kinds import KINDS, ROE, Kind

ROUTED = {model_type: kind for model_type, kind in KINDS.items() if kind.decides == "layers"}
BASES = {base_type: kind for kind in ROUTED.values() for base_type in kind.base_types}
# In errors.
A_BASE = " or ".join(map(repr, BASES))
A_ROUTED_MODEL = " or ".join(map(repr, ROUTED))


def is_base(model_type) -> bool:
    """Whether an entry of a config.json, which may be anything, is the type of a base."""
    return isinstance(model_type, str) and model_type in BASES


def is_routed(model_type) -> bool:
    """Whether it is the type of a RoE model."""
    return isinstance(model_type, str) and model_type in ROUTED


def routed_kind(content: dict) -> Kind:
    """The kind that a config.json belongs to, of a base as of a RoE model on it.

    Raises: KeyError if it is neither.
    """
    return (ROUTED | BASES)[content["model_type"]]


def refuse_other_bases(model_type, where, what: str) -> None:
    """Raises: ValueError for a base other than LLaVA, or RoE on it, where a command knows LLaVA alone.

    Args:
        model_type: of a config.json.
        where: it is, for messages.
        what: the command, or what it was asked for.
    """
    kind = (ROUTED | BASES).get(model_type) if isinstance(model_type, str) else None
    if kind is not None and kind is not ROE:
        known = " or ".join(map(repr, (*ROE.base_types, ROE.model_type)))
        raise ValueError(
            f"{where} has model_type {model_type!r}, and {what} does not support that base yet, only {known}: "
            "docs/bases.md says what each base can do"
        )


def code_of_adapter(base: dict | None) -> dict[str, Path]:
    """The code that goes with an adapter file, which knows of its base the names of its tensors.

    LLaVA-NeXT and LLaVA-OneVision have one mark, and the same code.

    Args:
        base: the record of the base; `None` if there is none.
    """
    names = (base or {}).get("tensors") or {}
    marked = (one for one in ROUTED.values() if one.mark and any(one.mark in name for name in names))
    return next(marked, ROE).code_files()


__all__ = [
    "A_BASE",
    "A_ROUTED_MODEL",
    "BASES",
    "ROUTED",
    "code_of_adapter",
    "is_base",
    "is_routed",
    "refuse_other_bases",
    "routed_kind",
]
