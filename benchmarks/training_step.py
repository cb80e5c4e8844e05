"""A RoE training step against a dense one that trains the same parameters: seconds and memory.

    python -m roe_llava.benchmarks.training_step [--shape tiny cpu-small] [--rounds 15] [--out JSON] [--overwrite]

A step is forward, loss, backward, AdamW and clearing the gradients, on the same batch in one process; systems take
turns:

dense: the stock decoder with RoE's adapters kept on the residual path of every layer, `layer(x) + adapter(norm(x))`. It
    trains what RoE trains but for routers and routing tokens (under 0.2 %); the others are divided by it.
dense again: the same once more; what its ratio differs from 1 by is noise.
stock: stock LLaVA, where the base trains: without the adapters' 4 % of parameters and arithmetic.
random: adapters learn along random routes, 30 % skipped; rows that skip a layer do not run it.
soft, hard: both paths of every layer run; with the example budget, hard with Gumbel noise.
given: routes are given and routers imitate them, 30 % skipped.
taught: given, and the batch is run along one more route without gradients, as teaching does at every step.
decided: routers decide and learn no longer, about 30 % skipped.

A row `run` is the mean step of a run with taught routes: random, taught and decided in the recipes' shares, without the
search of routes between them.

Recipes: `full` trains base (all but the vision tower) and new parts, `frozen` the new parts alone.
"""

import argparse
import copy
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import CLIPVisionConfig, LlamaConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from ..configuration_roe import RoeLlavaConfig
from ..convert.output import replace_json
from ..convert.verify_prompts import stock_twin
from ..modeling_roe_llava import RoeLlavaForConditionalGeneration
from ..phases_roe import RoutingPhase, token_loss_per_example
from ..training.objective import Objective, mean_over_labelled
from ..training.teacher import TAUGHT, TaughtObjective, TaughtSchedule, measured
from ..training.trainer import group_of, parameter_groups
from .environment import command_line, describe_machine, describe_run
from .measure import quartiles
from .shapes import random_prompt
from .timing import now

RESULT = Path(__file__).parent / "results" / "training_step.json"
TARGET = 1.10  # a RoE step over a dense one, at most
PHASES = {
    "random": RoutingPhase("random", keep_bias=0.2254),
    "soft": RoutingPhase("soft", temperature=2.0),
    "hard": RoutingPhase("hard", temperature=2.0, gumbel=True),
    "decided": RoutingPhase("decided"),
}
RECIPES = {
    "full": ("adapter", "router", "routing_tokens", "base"),
    "frozen": ("adapter", "router", "routing_tokens"),
}
TAUGHT_SYSTEMS = ("given", "taught")
SCHEDULE = TaughtSchedule()  # what the recipes have, too
STAGES = {  # shares of a run
    "random": SCHEDULE.warmup_end,
    "taught": SCHEDULE.taught_end - SCHEDULE.warmup_end,
    "decided": 1 - SCHEDULE.taught_end,
}
SKIPPED = 0.3  # of the layers, by given and measured routes
SYSTEMS = ("dense", "dense again", "stock", *PHASES, *TAUGHT_SYSTEMS)
WARM_UP = 2  # steps of every system that do not count


# --------------------------------------------------------------------------------------------------- models and batches


@dataclass(frozen=True)
class Shape:
    """A model of random weights and a batch.

    Attributes:
        text: hidden size, FFN, layers, heads of a Llama.
        vision: hidden size, FFN, layers, heads, pixels of a CLIP tower of 14-pixel patches.
        vocabulary: tokens; small, so that embeddings take the few percent of all weights that they take in LLaVA-1.5.
        batch: rows and tokens of each, image included.
    """

    text: tuple[int, int, int, int]
    vision: tuple[int, int, int, int, int]
    vocabulary: int
    batch: tuple[int, int]


SHAPES = {
    "tiny": Shape((128, 344, 6, 4), (32, 64, 2, 2, 56), 512, (8, 64)),
    # An eighth of LLaVA-1.5-7B's width; its adapter costs 4.1 % of a layer, as there.
    "cpu-small": Shape((512, 1376, 8, 8), (128, 256, 2, 4, 112), 2048, (4, 192)),
}


def config_of(shape: Shape) -> RoeLlavaConfig:
    """Configuration of a shape, its adapter a quarter as wide as the model, as in LLaVA-1.5-7B."""
    hidden, ffn, layers, heads = shape.text
    text = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
    )
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size")
    vision = CLIPVisionConfig(patch_size=14, projection_dim=64, **dict(zip(names, shape.vision, strict=True)))
    return RoeLlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=shape.vocabulary - 1,
        image_seq_length=(vision.image_size // 14) ** 2,
        adapter_size=hidden // 4,
    )


class AdaptedLayer(LlamaDecoderLayer):
    """A stock layer with an adapter on its residual path: dense, and as many parameters to train as RoE has."""

    adapter: nn.Module

    def forward(self, hidden_states: Tensor, **kwargs) -> Tensor:
        return super().forward(hidden_states, **kwargs) + self.adapter(self.input_layernorm(hidden_states))


def with_adapters(stock: PreTrainedModel, roe: RoeLlavaForConditionalGeneration) -> PreTrainedModel:
    """The stock model with the RoE model's adapters in place."""
    for layer, routed in zip(stock.model.language_model.layers, roe.model.language_model.layers, strict=True):
        layer.__class__ = AdaptedLayer
        layer.adapter = copy.deepcopy(routed.adapter)
    return stock


def batch_of(shape: Shape, config: RoeLlavaConfig, device: torch.device) -> tuple[dict, Tensor, Tensor]:
    """Inputs of a stock model, routing segments and labels: one turn whose answer is the last quarter of the text."""
    rows, length = shape.batch
    inputs = random_prompt(config, length, rows, device, torch.float32)
    text = length - int((inputs["input_ids"][0] == config.image_token_id).sum())
    labels = inputs["input_ids"].clone()
    labels[:, : -(text // 4)] = -100
    segments = torch.zeros_like(labels)
    segments[:, length - text // 2 :] = 1
    segments[labels != -100] = -1
    return inputs, segments, labels


# ---------------------------------------------------------------------------------------------------------------- steps


class Step:
    """One system: a model, what of it trains, and a step.

    The learning rate is 0: the work is the same, and no system moves the weights that another shares.
    """

    def __init__(self, name: str, model: PreTrainedModel, batch: tuple, groups: Sequence[str]):
        self.name, self.model = name, model.train()
        inputs, segments, self.labels = batch
        self.is_routed = name in (*PHASES, *TAUGHT_SYSTEMS)
        self.inputs = inputs | ({"routing_segments": segments} if self.is_routed else {})
        kept = [name for name, _ in model.named_parameters()]
        present = [group for group in groups if any(group_of(name) == group for name in kept)]
        self.optimizer = torch.optim.AdamW(parameter_groups(model, dict.fromkeys(present, 0.0)), fused=False)
        self.trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.phase: RoutingPhase | None = None

    def phase_of_step(self) -> RoutingPhase:
        """How this system decides."""
        if self.name in TAUGHT_SYSTEMS:
            return RoutingPhase("given", routes=self.routes())
        return replace(PHASES[self.name], keep_bias=self.own_bias()) if self.name == "decided" else PHASES[self.name]

    @torch.no_grad()
    def own_bias(self) -> float:
        """The bias with which these routers, which are untrained, skip about the wanted share."""
        self.model.model.routing_phase = RoutingPhase("decided")
        logits = self.model(**self.inputs, use_cache=False).router_logits
        return torch.quantile((logits[..., 1] - logits[..., 0]).flatten(), 1 - SKIPPED).item()

    @torch.no_grad()
    def skipped(self) -> float:
        """Share of the layers that the batch skips in the phase that is set, 0 of a dense model."""
        if not self.is_routed:
            return 0.0
        return self.model(**self.inputs, use_cache=False).turn_skip_weights.mean().item()

    def __call__(self) -> None:
        if self.name == "taught":
            measured(self.model, self.inputs | {"labels": self.labels}, self.routes()[0, 0], max_loss=3.0)
        if self.is_routed:
            self.phase = self.phase or self.phase_of_step()
            self.model.model.routing_phase = self.phase
        outputs = self.model(**self.inputs, use_cache=False)
        if self.name in TAUGHT_SYSTEMS:
            loss = TaughtObjective().loss(outputs, self.labels, TAUGHT)
        elif self.is_routed:
            loss = Objective(0.3).loss(outputs, self.labels, stage=1)
        else:
            loss = mean_over_labelled(token_loss_per_example(outputs.logits, self.labels), self.labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def routes(self) -> Tensor:
        """(B, 1, L) bool: every row skips other layers."""
        rows, layers = len(self.labels), self.model.config.text_config.num_hidden_layers
        order = torch.rand(rows, 1, layers, generator=torch.Generator().manual_seed(0)).argsort(dim=-1)
        return order >= round(SKIPPED * layers)


def steps_of(shape: Shape, recipe: str, device: torch.device) -> list[Step]:
    """The systems of a recipe; each has a model and an optimizer of its own."""
    torch.manual_seed(0)
    config = config_of(shape)
    with device:
        roe = RoeLlavaForConditionalGeneration(config)
    batch = batch_of(shape, config, device)

    def system(name: str) -> Step:
        if name in (*PHASES, *TAUGHT_SYSTEMS):
            return Step(name, copy.deepcopy(roe), batch, RECIPES[recipe])
        stock = copy.deepcopy(stock_twin(roe))
        return Step(name, stock if name == "stock" else with_adapters(stock, roe), batch, RECIPES[recipe])

    chosen = [name for name in SYSTEMS if recipe == "full" or name != "stock"]  # frozen, stock trains nothing
    # The same model and optimizer under another name: what differs is the phase, or nothing.
    shared = {"dense again": "dense"} | dict.fromkeys(("soft", "hard", "decided", *TAUGHT_SYSTEMS), "random")
    again = {name: system(name) for name in chosen if name not in shared}
    return [again[name] if name in again else renamed(again[shared[name]], name) for name in chosen]


def renamed(step: Step, name: str) -> Step:
    twin = copy.copy(step)
    twin.name = name
    return twin


def peak_bytes(step: Step) -> int:
    """Most bytes that a step held at once beyond what was there before: activations, gradients, buffers."""
    device = step.model.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


# ------------------------------------------------------------------------------------------------------------ measuring


def measure(shape: Shape, recipe: str, rounds: int, seed: int, device: torch.device) -> dict:
    """All systems of a recipe, by turns in an order drawn anew every round.

    Returns: `setup`, `run` with the mean step's `ratio` and `ratio_of_processor_time`, and `systems`: per system
        `seconds` (median), `minimum`, `ratio` (median over rounds of its time over that of `dense` in the round) with
        `quartiles`, `ratio_of_minima`, `ratio_of_processor_time` (of this process: what other processes do lengthens it
        less), `skipped` (share of layers), `peak_bytes` with `memory_ratio`, `trained` and all `runs`.
    """
    steps, draw = steps_of(shape, recipe, device), random.Random(seed)
    for step in steps:
        for _ in range(WARM_UP):
            step()
    runs, cpu = ({step.name: [] for step in steps} for _ in range(2))
    for _ in range(rounds):
        for step in draw.sample(steps, len(steps)):
            start, start_cpu = now(device), time.process_time()
            step()
            runs[step.name].append(now(device) - start)
            cpu[step.name].append(time.process_time() - start_cpu)
    peaks, share = {}, {}
    for step in steps:
        peaks[step.name] = peak_bytes(step)
        share[step.name] = step.skipped()  # in the phase of the step just made
    dense, found = runs["dense"], {}
    for step in steps:
        own = runs[step.name]
        ratios = [mine / theirs for mine, theirs in zip(own, dense, strict=True)]
        found[step.name] = {
            "seconds": median(own),
            "minimum": min(own),
            "ratio": median(ratios),
            "quartiles": quartiles(ratios),
            "ratio_of_minima": min(own) / min(dense),
            "ratio_of_processor_time": median(cpu[step.name]) / median(cpu["dense"]),
            "skipped": share[step.name],
            "peak_bytes": peaks[step.name],
            "memory_ratio": peaks[step.name] / peaks["dense"],
            "trained": step.trained,
            "runs": own,
        }
    run = {
        ratio: sum(share * found[name][ratio] for name, share in STAGES.items())
        for ratio in ("ratio", "ratio_of_processor_time")
    }
    return {"setup": describe_run(steps[0].model), "run": run, "systems": found}


def table(result: dict) -> str:
    """What a reader sees: a row per system, of all shapes and recipes."""
    lines = ["| shape | recipe | system | skipped | ms | over dense | quartiles | of minima | peak, MB | over dense |"]
    lines.append("|---|---|---|---|---|---|---|---|---|---|")
    for shape, recipes in result["shapes"].items():
        for recipe, found in recipes.items():
            for name, own in found["systems"].items():
                low, high = own["quartiles"]
                lines.append(
                    f"| {shape} | {recipe} | {name} | {100 * own['skipped']:.0f} % | {1000 * own['seconds']:.1f} | "
                    f"{own['ratio']:.3f} | {low:.3f} to {high:.3f} | {own['ratio_of_minima']:.3f} | "
                    f"{own['peak_bytes'] / 1e6:.1f} | {own['memory_ratio']:.3f} |"
                )
            lines.append(f"| {shape} | {recipe} | run | | | {found['run']['ratio']:.3f} | | | | |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--recipe", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--rounds", type=int, default=15, help="steps of every system (%(default)s)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of torch (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of steps (%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON to write (%(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")
    if args.out.exists() and not args.overwrite:
        parser.error(f"{args.out} is there already: name another --out, or --overwrite")
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    result = {"command": command_line("roe_llava.benchmarks.training_step"), "machine": describe_machine()}
    result |= {"rounds": args.rounds, "seed": args.seed, "target": TARGET, "shapes": {}}
    for name in args.shape:
        result["shapes"][name] = {
            recipe: measure(SHAPES[name], recipe, args.rounds, args.seed, device) for recipe in args.recipe
        }
    replace_json(args.out, result)
    print(table(result))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
