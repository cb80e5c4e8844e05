"""The kinds of models that this package makes and serves, in one place.

Whatever tells kinds apart (completeness, code, card, push, evaluate, serve, verify) looks here. Another kind is an
entry in `KINDS`; where its models decide as those of an entry do (of layers, or of experts), that is all.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers import (
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from .. import loading_moe
from ..configuration_frontend import base_type_of
from ..loading_roe import base_class, stock_class
from ..modeling_frontend import base_class_of
from ..modeling_moe_llava import MoeLlavaForConditionalGeneration
from ..modeling_roe_family import (
    RoeLlavaNextForConditionalGeneration,
    RoeLlavaOnevisionForConditionalGeneration,
    RoeVipLlavaForConditionalGeneration,
)
from ..modeling_roe_llava import RoeLlavaForConditionalGeneration
from ..modeling_roe_moe import RoeMoeLlavaForConditionalGeneration
from ..processing_roe import RoeLlavaProcessor
from ..processing_roe_family import RoeLlavaNextProcessor, RoeLlavaOnevisionProcessor
from .code_files import code_of, copy_code


@dataclass(frozen=True)
class Kind:
    """One kind of model.

    Attributes:
        name: as a text says it; a folder of it is "a {name} checkpoint".
        title: of the model, for a commit.
        model: the class that generates; it knows its config class, which knows the `model_type`.
        decides: what a forward pass decides: which decoder "layers" run, of an example, or which "experts", of a token.
            Cards, tables of benchmarks and checks go by it.
        processor: of a whole checkpoint; one of ours comes with code, a stock one needs none.
        mark: part of the name of a tensor that its bases have and LLaVA has not.
    """

    name: str
    title: str
    model: type[PreTrainedModel]
    decides: Literal["layers", "experts"]
    processor: type[ProcessorMixin] = LlavaProcessor
    mark: str | None = None

    @property
    def config(self) -> type[PreTrainedConfig]:
        return self.model.config_class

    @property
    def model_type(self) -> str:
        return self.config.model_type

    @property
    def auto_map(self) -> dict[str, str]:
        """Entry of config.json by which the Auto classes find the code."""
        return loading_moe.AUTO_MAP if self.decides == "experts" else self.model.code_map

    @property
    def provenance(self) -> str:
        """Entry of config.json that says where weights come from."""
        return {"layers": "roe_provenance", "experts": "moe_provenance"}[self.decides]

    def open_config(self, content: dict) -> PreTrainedConfig:
        """The configuration of a config.json, which may be the base's."""
        return self.config.from_dict(content | {"model_type": self.model_type})

    # ------------------------------------------------------------------------------------ what it was made from

    @property
    def base_types(self) -> tuple[str, ...]:
        """Every `model_type` of a model that it can be made from."""
        return (LlavaForConditionalGeneration.config_class.model_type,) if self is MOE else self.config.base_types

    def base_type(self, content: dict) -> str:
        """`model_type` of the base that a config.json describes once routing is left out of it."""
        return base_type_of(content) if self is ROE else self.base_types[0]

    def base_class(self, content: dict) -> type[PreTrainedModel]:
        """Its class."""
        return base_class_of(content) if self is ROE else base_class(self.model)

    @property
    def dense(self) -> type[PreTrainedModel]:
        """Class of the dense model that experts were made from."""
        return LlavaForConditionalGeneration

    # ----------------------------------------------------------------------------------------- processor, code

    @property
    def has_own_processor(self) -> bool:
        """Whether the processor is a class of this package, which a folder carries the code of."""
        return self.processor.__module__.partition(".")[0] != "transformers"

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
        return code_of(self.config, self.model, *([self.processor] if self.has_own_processor else []))

    def write_code(self, folder: Path) -> list[str]:
        """Copy that code; names of the files."""
        return copy_code(self.code_files(), folder)


ROE = Kind("RoE", "RoE-LLaVA", RoeLlavaForConditionalGeneration, "layers", RoeLlavaProcessor)
NEXT = Kind(
    "RoE", "RoE on LLaVA-NeXT", RoeLlavaNextForConditionalGeneration, "layers", RoeLlavaNextProcessor, "image_newline"
)
ONEVISION = Kind(
    "RoE",
    "RoE on LLaVA-OneVision",
    RoeLlavaOnevisionForConditionalGeneration,
    "layers",
    RoeLlavaOnevisionProcessor,
    "image_newline",
)
VIP = Kind(
    "RoE",
    "RoE on ViP-LLaVA",
    RoeVipLlavaForConditionalGeneration,
    "layers",
    RoeLlavaProcessor,
    "projector_layernorm",
)
ROE_MOE = Kind(
    "RoE", "RoE on MoE-LLaVA", RoeMoeLlavaForConditionalGeneration, "layers", RoeLlavaProcessor, ".mlp.experts."
)
MOE = Kind("MoE-LLaVA", "MoE-LLaVA", MoeLlavaForConditionalGeneration, "experts")

KINDS = {kind.model_type: kind for kind in (ROE, NEXT, ONEVISION, VIP, ROE_MOE, MOE)}


def kind_of(model_type) -> Kind | None:
    """The kind of a `model_type` as a config.json has it; `None` if it is none of ours."""
    return KINDS.get(model_type) if isinstance(model_type, str) else None


def listed_types(decides: str | None = None) -> str:
    """The types of all kinds, or of those that decide of "layers" or "experts", for a message."""
    return " or ".join(repr(name) for name, kind in KINDS.items() if decides in (None, kind.decides))


__all__ = ["KINDS", "MOE", "NEXT", "ONEVISION", "ROE", "ROE_MOE", "VIP", "Kind", "kind_of", "listed_types"]
