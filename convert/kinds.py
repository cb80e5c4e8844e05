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

from .. import loading_moe, loading_roe
from ..modeling_moe_llava import MoeLlavaForConditionalGeneration
from ..modeling_roe_llava import RoeLlavaForConditionalGeneration
from ..processing_roe import RoeLlavaProcessor
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
        auto_map: entry of config.json by which the Auto classes find the code.
        processor: of a whole checkpoint; one of ours comes with code, a stock one needs none.
        dense: class of the model that it was made from.
    """

    name: str
    title: str
    model: type[PreTrainedModel]
    decides: Literal["layers", "experts"]
    auto_map: dict[str, str]
    processor: type[ProcessorMixin] = LlavaProcessor
    dense: type[PreTrainedModel] = LlavaForConditionalGeneration

    @property
    def config(self) -> type[PreTrainedConfig]:
        return self.model.config_class

    @property
    def model_type(self) -> str:
        return self.config.model_type

    @property
    def provenance(self) -> str:
        """Entry of config.json that says where weights come from."""
        return {"layers": "roe_provenance", "experts": "moe_provenance"}[self.decides]

    @property
    def has_own_processor(self) -> bool:
        """Whether the processor is a class of this package, which a folder carries the code of."""
        return self.processor.__module__.partition(".")[0] != "transformers"

    def code_files(self) -> dict[str, Path]:
        """Name to place of every file of the code that `trust_remote_code=True` loads."""
        return code_of(self.config, self.model, *([self.processor] if self.has_own_processor else []))

    def write_code(self, folder: Path) -> list[str]:
        """Copy that code; names of the files."""
        return copy_code(self.code_files(), folder)


ROE = Kind("RoE", "RoE-LLaVA", RoeLlavaForConditionalGeneration, "layers", loading_roe.AUTO_MAP, RoeLlavaProcessor)
MOE = Kind("MoE-LLaVA", "MoE-LLaVA", MoeLlavaForConditionalGeneration, "experts", loading_moe.AUTO_MAP)

KINDS = {kind.model_type: kind for kind in (ROE, MOE)}


def kind_of(model_type) -> Kind | None:
    """The kind of a `model_type` as a config.json has it; `None` if it is none of ours."""
    return KINDS.get(model_type) if isinstance(model_type, str) else None


def listed_types(decides: str | None = None) -> str:
    """The types of all kinds, or of those that decide of "layers" or "experts", for a message."""
    return " or ".join(repr(name) for name, kind in KINDS.items() if decides in (None, kind.decides))


__all__ = ["KINDS", "MOE", "ROE", "Kind", "kind_of", "listed_types"]
