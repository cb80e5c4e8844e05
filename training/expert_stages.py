"""Stages of training a LLaVA with experts: what learns in each (MoE-LLaVA, arXiv 2401.15947; EvoMoE, 2505.23830)."""

import re
from dataclasses import asdict, dataclass, replace

from torch import nn
from transformers import LlavaForConditionalGeneration

from ..configuration_moe_llava import MoeLlavaConfig
from ..modeling_moe_llava import MoeLlavaForConditionalGeneration
from .expert_evolution import Evolution

# What learns in a stage, by names of parameters; the vision tower never does.
LEARNS = {
    "dense": r".*",
    "experts": r".*\.mlp\.(?:experts|router)\..*",
    "evolution": r".*\.mlp\.experts\..*",
    "routers": r".*\.mlp\.router\..*",
}
VISION_TOWER = r"(?:.*\.)?vision_tower\..*"
DENSE_MLPS = r".*language_model\..*\.mlp\.(?!experts\.|router\.).*"
CONFIG_FIELDS = ("num_experts_per_tok", "router_aux_loss_coef")
PROJECTOR = r".*multi_modal_projector\..*"


@dataclass(frozen=True)
class ExpertStage:
    """A stage of training; `STAGES` are those of the papers.

    Attributes:
        kind: `"dense"`: decoder and projector of a LLaVA without experts. `"experts"`: experts and routers.
            `"evolution"`: expert 1, which the others follow. `"routers"`: routers alone.
        dense_mlps: whether MLPs of layers without experts learn too, as in MoE-LLaVA's published code but not in its
            paper; only for `"experts"`, like the next one.
        projector: whether the projector learns too, as in MoE-LLaVA's published code but not in its paper.
        num_experts_per_tok: what the config's field is set to before training; `None`: it stays.
        router_aux_loss_coef: likewise.
        evolution: how experts follow expert 1; for `"evolution"` alone, `None` there for the defaults.
    Raises: ValueError for a field that the kind does not read.
    """

    kind: str
    dense_mlps: bool = False
    projector: bool = False
    num_experts_per_tok: int | None = None
    router_aux_loss_coef: float | None = None
    evolution: Evolution | None = None

    def __post_init__(self):
        if self.kind not in LEARNS:
            raise ValueError(f"kind must be one of {tuple(LEARNS)}, got {self.kind!r}")
        if self.kind == "evolution" and self.evolution is None:
            object.__setattr__(self, "evolution", Evolution())
        given = {name for name in ("dense_mlps", "projector") if getattr(self, name) and self.kind != "experts"}
        given |= {"evolution"} if self.evolution is not None and self.kind != "evolution" else set()
        given |= {name for name in CONFIG_FIELDS if getattr(self, name) is not None and self.kind == "dense"}
        if given:
            raise ValueError(f"a stage of kind {self.kind!r} does not read {', '.join(sorted(given))}: leave them out")

    @property
    def single_expert(self) -> int | None:
        """The expert that all tokens go through, or `None`."""
        return 0 if self.evolution is not None and self.evolution.tokens == "first" else None

    def learns(self, name: str) -> bool:
        """Whether a parameter learns, by its name in memory."""
        if re.fullmatch(VISION_TOWER, name):
            return False
        more = [pattern for pattern, given in ((DENSE_MLPS, self.dense_mlps), (PROJECTOR, self.projector)) if given]
        return any(re.fullmatch(pattern, name) for pattern in (LEARNS[self.kind], *more))

    def prepare(self, model: nn.Module) -> None:
        """Set a model's `requires_grad` and the config's fields.

        Raises: ValueError if it has no experts, or in the dense stage if it has some; and for fields that contradict
            the config's others.
        """
        wanted = LlavaForConditionalGeneration if self.kind == "dense" else MoeLlavaForConditionalGeneration
        if type(model).__name__ != wanted.__name__:  # the Hub's copy of a class is another one of the same name
            cause = "experts come after it" if self.kind == "dense" else "roe-llava upcycle gives a LLaVA experts"
            raise ValueError(
                f"a stage of kind {self.kind!r} needs a {wanted.__name__}, got a {type(model).__name__}: {cause}"
            )
        given = {name: getattr(self, name) for name in CONFIG_FIELDS if getattr(self, name) is not None}
        if given:
            MoeLlavaConfig.from_dict({**model.config.to_dict(), **given})  # raises where they contradict the others
        for name, value in given.items():
            setattr(model.config, name, value)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.learns(name))

    def to_dict(self) -> dict:
        """All fields, as JSON keeps them."""
        return asdict(self)


STAGES = {
    "moe-stage3": ExpertStage("experts", router_aux_loss_coef=0.01),
    "evomoe-warmup": ExpertStage("dense"),
    "evomoe-evolution": ExpertStage("evolution", num_experts_per_tok=1),
    "evomoe-routers": ExpertStage("routers", num_experts_per_tok=1, router_aux_loss_coef=0.001),
}


def expert_stage(name: str, **changes) -> ExpertStage:
    """A paper's stage by its name in `STAGES`, with some fields changed.

    Raises: ValueError for an unknown name.
    """
    if name not in STAGES:
        raise ValueError(f"there is no stage {name!r}, expected one of {', '.join(STAGES)}")
    return replace(STAGES[name], **changes)


__all__ = ["STAGES", "ExpertStage", "expert_stage"]
