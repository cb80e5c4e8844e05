"""Many prompts three ways: batches in the caller's order, batches grouped by route, and one by one.

    python -m roe_llava.benchmarks.grouping [--shape tiny cpu-medium] [--out JSON]

Shapes: `tiny` is the shipped tiny model with held-out questions of its tiny world and the routes it has learned;
`cpu-medium` is the benchmark's model of that name (random weights) with routes forced by an infinite `route_bias`, some
prompts to each of a few routes that skip the same number of layers. The three ways take turns in one process; every
prompt writes the same number of tokens, and every way has to give every prompt the same ones.
"""

import argparse
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from ..convert.output import replace_json
from ..examples.tiny_world.demo import SHIPPED
from ..modeling_roe_llava import RoeLlavaForConditionalGeneration
from ..processing_roe import RoeLlavaProcessor
from .environment import command_line, describe_machine
from .shapes import cpu_medium_config
from .timing import now

RESULT = Path(__file__).parent / "results" / "grouping.json"
WAYS = {"mixed": "batches in the caller's order", "grouped": "`group_by_route`", "alone": "one by one"}


# --------------------------------------------------------------------------------------------------- models and prompts


def tiny_shape(args: argparse.Namespace) -> tuple[RoeLlavaForConditionalGeneration, list[dict]]:
    """The shipped tiny model in float32 and held-out questions, families in random order."""
    from ..examples.tiny_world.asking import prompts
    from ..examples.tiny_world.evaluate import family_examples
    from ..examples.tiny_world.world import FAMILIES

    model = RoeLlavaForConditionalGeneration.from_base(SHIPPED / "base", SHIPPED / "roe").float().eval()
    processor = RoeLlavaProcessor.from_pretrained(SHIPPED / "base")
    number = math.ceil(args.prompts / len(FAMILIES))
    examples = [example for family in FAMILIES for example in family_examples(family, number, seed=args.seed)]
    random.Random(args.seed).shuffle(examples)
    return model, [dict(prompts(processor, [example])) for example in examples[: args.prompts]]


def medium_shape(args: argparse.Namespace) -> tuple[RoeLlavaForConditionalGeneration, list[dict]]:
    """A model of random weights and prompts of random text, each with the `route_bias` that forces its route."""
    torch.manual_seed(args.seed)
    model = RoeLlavaForConditionalGeneration(cpu_medium_config()).eval()
    rng = random.Random(args.seed)
    shortest, longest = args.prompt_length
    # Layer 0 is kept: it cannot decide by the prompt.
    skipped = [rng.sample(range(1, 12), round(12 * args.skip_ratio)) for _ in range(args.routes)]
    prompts = []
    for _ in range(args.prompts):
        bias = torch.full((12,), math.inf)
        bias[rng.choice(skipped)] = -math.inf
        ids = torch.tensor([[rng.randrange(3, 32000) for _ in range(rng.randint(shortest, longest))]])
        prompts.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "route_bias": bias})
    return model, prompts


SHAPES = {"tiny": tiny_shape, "cpu-medium": medium_shape}


def padded(prompts: Sequence[dict]) -> dict:
    """One batch of some prompts, padded on the left."""
    width = max(prompt["input_ids"].shape[1] for prompt in prompts)
    padding = {"input_ids": 0, "attention_mask": 0, "routing_segments": -1}

    def row(name, prompt):
        return torch.nn.functional.pad(prompt[name], (width - prompt[name].shape[1], 0), value=padding[name])

    batch = {name: torch.cat([row(name, prompt) for prompt in prompts]) for name in padding if name in prompts[0]}
    if "pixel_values" in prompts[0]:
        batch["pixel_values"] = torch.cat([prompt["pixel_values"] for prompt in prompts])
    if "route_bias" in prompts[0]:
        batch["route_bias"] = torch.stack([prompt["route_bias"] for prompt in prompts])
    return batch


# ------------------------------------------------------------------------------------------------------------ measuring


def ways_of(
    model, prompts: Sequence[dict], batch_size: int, pool_size: int
) -> dict[str, Callable[[int], list[Tensor]]]:
    """For every way, what writes so many tokens per prompt and returns the new ones of each prompt."""

    def settings(number: int) -> dict:
        return {"max_new_tokens": number, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def in_batches(size: int, number: int) -> list[Tensor]:
        batches = [padded(prompts[start : start + size]) for start in range(0, len(prompts), size)]
        return [row[-number:] for batch in batches for row in model.generate(**batch, **settings(number))]

    def grouped(number: int) -> list[Tensor]:
        return [row[-number:] for row in model.group_by_route(prompts, batch_size, pool_size, **settings(number))]

    return {"mixed": lambda n: in_batches(batch_size, n), "grouped": grouped, "alone": lambda n: in_batches(1, n)}


class LayersRead:
    """Counts decoding steps, and the layers they run, the whole batch together."""

    def __init__(self, model):
        language_model = model.model.language_model
        self.steps = self.runs = 0
        self.num_layers = len(language_model.layers)
        self.handles = [language_model.register_forward_pre_hook(self._step, with_kwargs=True)]
        self.handles += [layer.mlp.register_forward_pre_hook(self._run) for layer in language_model.layers]

    def _step(self, module, args, kwargs):
        self.steps += kwargs["inputs_embeds"].shape[1] == 1

    def _run(self, module, args):
        self.runs += args[0].shape[1] == 1

    def share(self) -> float:
        """Layers run per step, over all layers; takes the hooks off."""
        for handle in self.handles:
            handle.remove()
        return self.runs / (self.steps * self.num_layers)


def measure(model, prompts: Sequence[dict], args: argparse.Namespace) -> dict:
    """All three ways by turns, whole and up to the first new token.

    Returns: per way medians over the rounds, ratios to `mixed`, and the share of the layers a step of decoding reads.
    """
    ways = ways_of(model, prompts, args.batch_size, args.pool_size)
    shares, written = {}, {}
    for name, run in ways.items():  # warms up, too
        layers = LayersRead(model)
        written[name] = run(args.new_tokens)
        shares[name] = layers.share()
    seconds = {(name, number): [] for name in ways for number in (1, args.new_tokens)}
    turns = list(ways.items())
    for _ in range(args.rounds):
        for name, run in turns:
            for number in (1, args.new_tokens):
                start = now(model.device)
                run(number)
                seconds[name, number].append(now(model.device) - start)
        turns.reverse()
    routes = routes_of(model, prompts)
    result = {
        "prompts": len(prompts),
        "prompt_tokens": [min(lengths := [p["input_ids"].shape[1] for p in prompts]), max(lengths)],
        "new_tokens": args.new_tokens,
        "batch_size": args.batch_size,
        "pool_size": args.pool_size,
        "layers": routes.shape[1],
        "distinct_routes": len(routes.unique(dim=0)),
        "skip_ratio": 1 - routes.double().mean().item(),
        "ways": {},
    }
    for name in ways:
        whole, prefill = (median(seconds[name, number]) for number in (args.new_tokens, 1))
        result["ways"][name] = {
            "seconds": whole,
            "prefill_seconds": prefill,
            "tokens_per_second": len(prompts) * args.new_tokens / whole,
            "ratio_to_mixed": median(seconds["mixed", args.new_tokens]) / whole,
            "decode_ratio_to_mixed": decode_ratio(seconds, name, args.new_tokens),
            "layers_read_per_step": shares[name],
            "same_tokens_as_alone": same_share(written[name], written["alone"]),
            "rounds": seconds[name, args.new_tokens],
        }
    return result


def decode_ratio(seconds: dict, name: str, number: int) -> float:
    """Time between the first token and the last, of `mixed` over that of a way."""
    mixed, own = (median(seconds[way, number]) - median(seconds[way, 1]) for way in ("mixed", name))
    return mixed / own


def same_share(ours: Sequence[Tensor], alone: Sequence[Tensor]) -> float:
    """Share of the prompts that got the same tokens; rounding can turn a tie between two tokens of random weights."""
    return sum(torch.equal(*pair) for pair in zip(ours, alone, strict=True)) / len(alone)


@torch.inference_mode()
def routes_of(model, prompts: Sequence[dict]) -> Tensor:
    """(N, L) bool."""
    return torch.cat([model(**prompt, logits_to_keep=1).routes for prompt in prompts])


# ------------------------------------------------------------------------------------------------------------- printing


def table(shape: str, result: dict) -> str:
    """What a reader sees of one shape's result."""
    lines = [
        f"| {shape}: {result['prompts']} prompts of {result['prompt_tokens'][0]} to {result['prompt_tokens'][1]} "
        f"tokens, {result['distinct_routes']} routes, {100 * result['skip_ratio']:.0f} % skipped "
        "| seconds | of these prefill | tokens/s | speed | of decoding alone | layers read per step |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, way in result["ways"].items():
        size = f", {result['batch_size']} rows each" if name != "alone" else ""
        lines.append(
            f"| {WAYS[name]}{size} | {way['seconds']:.2f} | {way['prefill_seconds']:.2f} | "
            f"{way['tokens_per_second']:.0f} | {way['ratio_to_mixed']:.2f}x | {way['decode_ratio_to_mixed']:.2f}x | "
            f"{100 * way['layers_read_per_step']:.0f} % |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES), help="what to run (both)")
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON to write")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    parser.add_argument("--prompts", type=int, default=64, help="number of prompts (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="rows per batch (%(default)s)")
    parser.add_argument("--pool-size", type=int, default=64, help="prompts routed ahead (%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens every prompt writes (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of every way (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which prompts (%(default)s)")
    medium = parser.add_argument_group("cpu-medium")
    medium.add_argument(
        "--prompt-length", type=int, nargs=2, default=(320, 640), help="shortest, longest (%(default)s)"
    )
    medium.add_argument("--routes", type=int, default=6, help="different routes (%(default)s)")
    medium.add_argument("--skip-ratio", type=float, default=0.25, help="share of layers skipped (%(default)s)")
    args = parser.parse_args()
    if args.new_tokens < 2:
        parser.error(f"--new-tokens must be at least 2, got {args.new_tokens}: the first token belongs to the prefill")
    if args.out.exists() and not args.overwrite:
        parser.error(f"{args.out} exists: give another --out, or replace it (--overwrite)")
    torch.set_num_threads(args.threads)
    result = {"shapes": {}}
    for shape in args.shape:
        model, prompts = SHAPES[shape](args)
        result["shapes"][shape] = measure(model, prompts, args)
        print(table(shape, result["shapes"][shape]), end="\n\n", flush=True)
    result |= describe_machine() | {"threads": args.threads, "dtype": "float32", "seed": args.seed}
    result["command"] = command_line("roe_llava.benchmarks.grouping")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    replace_json(args.out, result)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
