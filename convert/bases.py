"""What RoE is put onto: one table of the RoE classes, and the bases, processor and code that belong to each.

A new base is a line here, once its classes are there; see `docs/bases.md`.
"""

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from .. import (
    configuration_roe,
    configuration_roe_family,
    modeling_roe_family,
    modeling_roe_llava,
    processing_roe,
    processing_roe_family,
)
from ..configuration_frontend import base_type_of
from ..loading_roe import stock_class
from ..modeling_frontend import base_class_of
from ..modeling_roe_family import (
    RoeLlavaNextForConditionalGeneration,
    RoeLlavaOnevisionForConditionalGeneration,
    RoeVipLlavaForConditionalGeneration,
)
from ..modeling_roe_llava import RoeLlavaForConditionalGeneration
from ..processing_roe import RoeLlavaProcessor
from ..processing_roe_family import RoeLlavaNextProcessor, RoeLlavaOnevisionProcessor
from .code_files import code_of


@dataclass(frozen=True)
class Kind:
    """A RoE class with what belongs to it.

    Attributes:
        head: the RoE class.
        processor: its processor's class.
        modules: whose code its folders carry.
        mark: part of the name of a tensor that its bases have and LLaVA has not.
    """

    head: type
    processor: type
    modules: tuple[ModuleType, ...]
    mark: str | None = None

    @property
    def config_class(self) -> type:
        return self.head.config_class

    @property
    def model_type(self) -> str:
        return self.config_class.model_type

    @property
    def base_types(self) -> tuple[str, ...]:
        return self.config_class.base_types

    @property
    def stock_processor(self) -> str:
        """Name of the stock processor's class."""
        return stock_class(self.processor).__name__

    @property
    def processor_map(self) -> dict[str, str]:
        """`auto_map` of its processor_config.json."""
        return {"AutoProcessor": f"{self.processor.__module__.rpartition('.')[2]}.{self.processor.__name__}"}

    def code_files(self) -> dict[str, Path]:
        """Name to place of every file of the code that `trust_remote_code=True` loads."""
        return code_of(*self.modules)

    def open_config(self, content: dict):
        """The RoE configuration of a config.json, which may be the base's."""
        return self.config_class.from_dict(content | {"model_type": self.model_type})

    def base_type(self, content: dict) -> str:
        """`model_type` of the base that a config.json describes once routing is left out of it."""
        return base_type_of(content) if self is KINDS[0] else self.base_types[0]

    def base_class(self, content: dict) -> type:
        """Its class."""
        return base_class_of(content) if self is KINDS[0] else stock_class(self.head)


FAMILY_CODE = (configuration_roe_family, modeling_roe_family, processing_roe_family)
KINDS = (
    Kind(RoeLlavaForConditionalGeneration, RoeLlavaProcessor, (configuration_roe, modeling_roe_llava, processing_roe)),
    Kind(RoeLlavaNextForConditionalGeneration, RoeLlavaNextProcessor, FAMILY_CODE, "image_newline"),
    Kind(RoeLlavaOnevisionForConditionalGeneration, RoeLlavaOnevisionProcessor, FAMILY_CODE, "image_newline"),
    Kind(RoeVipLlavaForConditionalGeneration, RoeLlavaProcessor, FAMILY_CODE, "projector_layernorm"),
)
ROUTED = {kind.model_type: kind for kind in KINDS}
BASES = {base_type: kind for kind in KINDS for base_type in kind.base_types}
# In errors.
A_BASE = " or ".join(map(repr, BASES))
A_ROUTED_MODEL = " or ".join(map(repr, ROUTED))


def is_base(model_type) -> bool:
    """Whether an entry of a config.json, which may be anything, is the type of a base."""
    return isinstance(model_type, str) and model_type in BASES


def is_routed(model_type) -> bool:
    """Whether it is the type of a RoE model."""
    return isinstance(model_type, str) and model_type in ROUTED


def kind_of(content: dict) -> Kind:
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
    if kind is not None and kind is not KINDS[0]:
        known = " or ".join(map(repr, (*KINDS[0].base_types, KINDS[0].model_type)))
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
    kind = next((one for one in KINDS if one.mark and any(one.mark in name for name in names)), KINDS[0])
    return kind.code_files()


__all__ = [
    "A_BASE",
    "A_ROUTED_MODEL",
    "BASES",
    "KINDS",
    "ROUTED",
    "Kind",
    "code_of_adapter",
    "is_base",
    "is_routed",
    "kind_of",
    "refuse_other_bases",
]
