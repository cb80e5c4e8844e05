"""What `compare` trains: ways to go on from one base with the same conversations, in the same order and number.

Measuring is elsewhere. A method is a function of (`Task`) that returns a `Trained`.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset
from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedModel, Trainer

from ..convert.output import new_folder
from ..convert.upcycle import chosen_layers, upcycle
from ..examples.tiny_world.train_roe import (
    Conversations,
    load,
    pinned,
    recipe,
    settle_on_held_out,
    train,
    training_arguments,
)
from ..examples.tiny_world.world import messages
from ..modeling_moe_llava import MoeLlavaForConditionalGeneration
from ..modeling_roe_llava import RoeLlavaForConditionalGeneration
from ..modeling_roe_moe import RoeMoeLlavaForConditionalGeneration
from ..processing_roe import RoeLlavaProcessor
from ..training.data import ChatCollator
from ..training.expert_evolution import Evolution, packed_parameters
from ..training.expert_stages import STAGES, ExpertStage, expert_stage
from ..training.expert_trainer import ExpertTrainer
from ..training.teacher import RouteTeacher
from ..training.train_moe import WithoutSegments
from .quality import best_single_route, put_adapters_beside, teaching_of

TARGET = 0.3  # share of the layers that RoE is to skip
EXPERTS, LAYERS = 4, "alternate"
GIVEN = {"moe_llava": {"top_k": 2}, "evomoe": {"top_k": 1, "router": "token_aware"}}  # beside both: of `upcycle`
IN_ORDER = {"train_sampling_strategy": "sequential"}  # every method reads the same conversations at the same step
# Steps of EvoMoE's three stages in its paper (table 7).
EVOMOE_STEPS = (5200, 10395, 10395)
# Runs that answer "was that fair?", of fewer seeds: see docs/compare.md.
METHODS = ("base", "dense_mlps", "roe", "static", "moe_llava", "evomoe", "roe_moe")
CONTROLS = ("dense_all", "dense_adapters", "moe_warmed", "evomoe_other")
WITH_EXPERTS = ("moe_llava", "evomoe", "moe_warmed", "evomoe_other", "roe_moe")
ROUTED = ("dense_adapters", "roe", "static", "roe_moe")  # models that route over layers


@dataclass(frozen=True)
class Task:
    """A run: a method with a seed.

    Attributes:
        args: `steps`, `batch_size`, `adapter_size`, `base`, and what `teaching_of` reads.
        rates: learning rates by method; of `evomoe` that of its routers, and `evomoe_ones`, whether the weight of its
            chosen expert is 1.
        earlier: gives what another method with this seed found, its `more`.
    """

    method: str
    seed: int
    args: argparse.Namespace
    rates: dict
    earlier: Callable[[str], dict] | None = None

    @property
    def settings(self) -> argparse.Namespace:
        """What `train` and `training_arguments` read of a run over all steps."""
        return self.of_steps(self.args.steps)

    def of_steps(self, steps: int) -> argparse.Namespace:
        return argparse.Namespace(steps=steps, batch_size=self.args.batch_size, seed=self.seed)

    @property
    def conversations(self) -> Dataset:
        """All that a run reads, in order; the ones `train` takes."""
        return Conversations(self.args.steps * self.args.batch_size, self.seed + 1)

    def read_in(self, steps: range) -> Dataset:
        """What some of its steps read, in order."""
        size = self.args.batch_size
        return Subset(self.conversations, range(steps.start * size, steps.stop * size))


@dataclass
class Trained:
    """A model after its training, and what that was.

    Attributes:
        model, processor: to ask.
        writer: the processor that writes conversations with labels.
        learned: parameters that learned, by stage.
        log: Trainer's, of all stages; steps count on.
        seconds, cpu_seconds: of training; the second is the process's own.
        routes: (L,) bool that all questions take, `None` where routers decide or there are none.
        started: packed parameters of the experts before they learned, a list per layer with experts.
        more: what else is worth a record.
    """

    model: PreTrainedModel
    processor: LlavaProcessor
    writer: RoeLlavaProcessor
    learned: dict[str, int] = field(default_factory=dict)
    log: list[dict] = field(default_factory=list)
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    routes: Tensor | None = None
    started: list[list[Tensor]] | None = None
    more: dict = field(default_factory=dict)

    def trains(self, stage: str, run: Callable[[], list[dict]]) -> None:
        """Run a stage and note down what it took; `run` returns Trainer's log."""
        done = next((entry["step"] for entry in reversed(self.log)), 0)
        wall, cpu = time.perf_counter(), time.process_time()
        log = run()
        self.seconds += time.perf_counter() - wall
        self.cpu_seconds += time.process_time() - cpu
        self.log += [entry | {"step": entry["step"] + done, "stage_name": stage} for entry in log]
        self.learned[stage] = sum(one.numel() for one in self.model.parameters() if one.requires_grad)


# ------------------------------------------------------------------------------------------------------------- dense


def load_dense(folder: Path) -> PreTrainedModel:
    return LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)


def untrained(task: Task) -> Trained:
    """The base as it is."""
    return Trained(load_dense(task.args.base), *processors(task.args.base))


def processors(folder: Path) -> tuple[LlavaProcessor, RoeLlavaProcessor]:
    """A checkpoint's processor, as stock models are asked with, and one that writes labels too."""
    return LlavaProcessor.from_pretrained(folder), RoeLlavaProcessor.from_pretrained(folder)


def learn(task: Task, trained: Trained, steps: range, rate: float, name: str, stage: ExpertStage | None = None) -> None:
    """Train on the conversations of some of the steps, with stock Trainer or in a stage of experts."""
    data = task.read_in(steps)
    collate = WithoutSegments(ChatCollator(trained.writer, messages))

    def run() -> list[dict]:
        with tempfile.TemporaryDirectory() as folder:
            settings = training_arguments(task.of_steps(len(steps)), Path(folder), learning_rate=rate, **IN_ORDER)
            given = {"args": settings, "train_dataset": data, "data_collator": collate}
            if stage is None:
                trainer = Trainer(model=trained.model, **given)
            else:
                trainer = ExpertTrainer(trained.model, stage=stage, **given)
            trainer.train()
        return trainer.state.log_history

    trained.trains(name, run)


def dense_mlps(task: Task) -> Trained:
    """The MLPs learn that MoE-LLaVA makes experts of."""
    trained = untrained(task)
    layers = trained.model.model.language_model.layers
    trained.model.requires_grad_(False)
    for number in chosen_layers(LAYERS, len(layers)):
        layers[number].mlp.requires_grad_(True)
    learn(task, trained, range(task.args.steps), task.rates["dense_mlps"], "dense")
    return trained


def dense_all(task: Task) -> Trained:
    """All learns but the vision tower, as in EvoMoE's first stage."""
    trained = untrained(task)
    learn(task, trained, range(task.args.steps), task.rates["dense_all"], "dense", STAGES["evomoe-warmup"])
    return trained


# --------------------------------------------------------------------------------------------------------------- RoE


def with_adapters(task: Task) -> Trained:
    model, processor = load(task.args.base, task.args.adapter_size, task.seed)
    return Trained(model, processor, processor)


def along(task: Task, trained: Trained, routes: Tensor) -> Trained:
    """Train the adapters along one route."""
    trained.routes = routes
    with tempfile.TemporaryDirectory() as folder:
        trained.trains(
            "adapters",
            lambda: train(trained.model, trained.processor, pinned(), task.settings, Path(folder), routes, **IN_ORDER),
        )
    return trained


def dense_adapters(task: Task) -> Trained:
    """Every layer runs, with an adapter beside it that learns."""
    trained = with_adapters(task)
    put_adapters_beside(trained.model)
    return along(task, trained, torch.ones(num_layers(trained.model), dtype=torch.bool))


def roe(task: Task) -> Trained:
    """Taught routers as shipped: adapters, routers and routing tokens learn; the skip ratio is settled at the end."""
    return taught(task, with_adapters(task), range(task.args.steps))


def taught(task: Task, trained: Trained, steps: range) -> Trained:
    """Train routing over layers on the conversations of some of the steps."""
    how = recipe(TARGET, task.seed)
    how.teacher = RouteTeacher(TARGET, teaching_of(task.args), task.seed)
    given = how, task.of_steps(len(steps))
    with tempfile.TemporaryDirectory() as folder:
        trained.trains(
            "adapters, routers",
            lambda: train(trained.model, trained.processor, *given, Path(folder), data=task.read_in(steps), **IN_ORDER),
        )
    settled = settle_on_held_out(trained.model, trained.processor, TARGET)
    pool = how.teacher.pool
    trained.more = {
        "settled": None if settled is None else settled.to_dict(),
        "pool": {"routes": pool.routes.int().tolist(), "mean_losses": pool.losses.mean(dim=0).tolist()},
    }
    return trained


def static(task: Task) -> Trained:
    """The set of layers dropped for all whose absence cost least when RoE of the same seed searched its routes."""
    trained = with_adapters(task)
    number = round(TARGET * num_layers(trained.model))
    return along(task, trained, best_single_route(task.earlier("roe")["pool"], number))


# --------------------------------------------------------------------------------------------------------- experts


def give_experts(task: Task, trained: Trained, **options) -> None:
    """Put experts into a dense model; the base's other files serve it."""
    with tempfile.TemporaryDirectory() as folder:
        dense = Path(folder) / "dense"
        trained.model.save_pretrained(dense)
        trained.processor.save_pretrained(dense)
        upcycle(dense, Path(folder) / "experts", experts=EXPERTS, layers=LAYERS, seed=task.seed, **options)
        trained.model = MoeLlavaForConditionalGeneration.from_pretrained(Path(folder) / "experts", dtype=torch.float32)
    trained.started = [[one.detach().clone() for one in layer] for layer in packed_parameters(trained.model)]


def shares(steps: int) -> tuple[range, range, range]:
    """The steps of EvoMoE's stages: those of the paper, brought to a number."""
    first = max(1, round(steps * EVOMOE_STEPS[0] / sum(EVOMOE_STEPS)))
    second = max(first + 1, round(steps * sum(EVOMOE_STEPS[:2]) / sum(EVOMOE_STEPS)))
    return range(first), range(first, second), range(second, steps)


def moe_llava(task: Task) -> Trained:
    """Stage III of MoE-LLaVA: experts and routers learn."""
    trained = untrained(task)
    give_experts(task, trained, **GIVEN["moe_llava"])
    learn(task, trained, range(task.args.steps), task.rates["moe_llava"], "experts, routers", STAGES["moe-stage3"])
    return trained


def moe_warmed(task: Task) -> Trained:
    """EvoMoE's first stage, then MoE-LLaVA's third for the rest."""
    trained, (first, _, last) = untrained(task), shares(task.args.steps)
    learn(task, trained, first, task.rates["dense_all"], "warm-up", STAGES["evomoe-warmup"])
    give_experts(task, trained, **GIVEN["moe_llava"])
    rest = range(first.stop, last.stop)
    learn(task, trained, rest, task.rates["moe_llava"], "experts, routers", STAGES["moe-stage3"])
    return trained


def evomoe(task: Task) -> Trained:
    """Warm-up, evolution of the experts, token-aware routers alone."""
    trained, (first, second, third) = untrained(task), shares(task.args.steps)
    learn(task, trained, first, task.rates["dense_all"], "warm-up", STAGES["evomoe-warmup"])
    give_experts(task, trained, **GIVEN["evomoe"])
    trained.model.config.normalize_expert_weights = task.rates["evomoe_ones"]
    evolve = expert_stage("evomoe-evolution", evolution=Evolution(seed=task.seed))
    learn(task, trained, second, task.rates["dense_mlps"], "evolution", evolve)
    # Of each packed parameter the first expert alone gets a gradient.
    trained.learned["evolution"] //= EXPERTS
    learn(task, trained, third, task.rates["evomoe"], "routers", STAGES["evomoe-routers"])
    return trained


def evomoe_other(task: Task) -> Trained:
    """EvoMoE with the other weight of the chosen expert."""
    return evomoe(replace(task, rates=task.rates | {"evomoe_ones": not task.rates["evomoe_ones"]}))


def roe_moe(task: Task) -> Trained:
    """MoE-LLaVA's third stage for a third of the steps, then RoE on that model, which stays as it is."""
    trained, first = untrained(task), round(task.args.steps / 3)
    give_experts(task, trained, **GIVEN["moe_llava"])
    learn(task, trained, range(first), task.rates["moe_llava"], "experts, routers", STAGES["moe-stage3"])
    with tempfile.TemporaryDirectory() as folder:
        trained.model.save_pretrained(folder)
        torch.manual_seed(task.seed)
        trained.model = RoeMoeLlavaForConditionalGeneration.from_pretrained(
            folder, adapter_size=task.args.adapter_size, dtype=torch.float32
        )
    trained.processor, trained.started = trained.writer, None
    return taught(task, trained, range(first, task.args.steps))


MAKERS: dict[str, Callable[[Task], Trained]] = {
    "base": untrained,
    "dense_adapters": dense_adapters,
    "dense_mlps": dense_mlps,
    "dense_all": dense_all,
    "roe": roe,
    "static": static,
    "moe_llava": moe_llava,
    "evomoe": evomoe,
    "roe_moe": roe_moe,
    "moe_warmed": moe_warmed,
    "evomoe_other": evomoe_other,
}


def num_layers(model: nn.Module) -> int:
    return model.config.text_config.num_hidden_layers


# ------------------------------------------------------------------------------------------------------ on the disk


def save(trained: Trained, folder: Path) -> None:
    """Keep a trained model, for what is measured later."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(folder, overwrite=True) as partial:
        trained.model.save_pretrained(partial)
        trained.processor.save_pretrained(partial)
        routes = None if trained.routes is None else trained.routes.tolist()
        (partial / "routes.json").write_text(json.dumps(routes) + "\n")


def reopen(method: str, folder: Path) -> Trained:
    """What `save` kept of a method."""
    kinds = dict.fromkeys(WITH_EXPERTS, MoeLlavaForConditionalGeneration)
    kinds |= dict.fromkeys(ROUTED, RoeLlavaForConditionalGeneration)
    kinds["roe_moe"] = RoeMoeLlavaForConditionalGeneration
    model = kinds.get(method, LlavaForConditionalGeneration).from_pretrained(folder, dtype=torch.float32)
    if method == "dense_adapters":
        put_adapters_beside(model)
    routes = json.loads((folder / "routes.json").read_text())
    plain, writer = processors(folder)
    routes = None if routes is None else torch.tensor(routes, dtype=torch.bool)
    return Trained(model.eval(), writer if method in ROUTED else plain, writer, routes=routes)


__all__ = ["CONTROLS", "MAKERS", "METHODS", "Task", "Trained", "reopen", "save"]
