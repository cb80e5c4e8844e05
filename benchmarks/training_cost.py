"""What training LLaVA-1.5 7B and 13B with RoE needs, computed: `python -m roe_llava.benchmarks.training_cost --write`.

Nothing here is measured but `ACTIVATION_BYTES`, which a test counts anew. It makes docs/training_cost.md.

D hidden, F FFN, A adapter width, L layers, S tokens of an example, V vocabulary.
"""

import argparse
import textwrap
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..configuration_roe import RoeLlavaConfig
from ..modeling_roe_llava import RoeLlavaForConditionalGeneration
from ..training.options import read_recipe
from ..training.parameter_groups import group_of
from .shapes import llava_15_config

PAGE = Path(__file__).parents[1] / "docs" / "training_cost.md"
SIZES = {"7B": (4096, 11008, 32, 32), "13B": (5120, 13824, 40, 40)}
GPUS = {"one GPU": 1, "DDP": 8, "FSDP2": 8, "ZeRO-3": 8}
SHARDED = ("FSDP2", "ZeRO-3")
RECIPES = ("frozen", "lora", "full", "published")
LORA_RANK = read_recipe("lora")["lora_rank"]  # of every linear layer of the decoder
EXAMPLES, TOKENS, ROWS = 665_000, 1024, 4  # LLaVA-1.5's instructions; tokens of one, image included; rows per GPU
PEAK, MFU = 312e12, 0.40  # bf16 of an A100 in FLOP/s, and the share of it that training is taken to reach
ROOM = 80e9  # bytes of a GPU

# Bytes per token and layer kept for the backward pass, as multiples of (D, F, A): bf16 autocast, SDPA without a matrix
# of scores. Where the base is frozen in bf16, and where it trains in float32.
ACTIVATION_BYTES = {"frozen": (26, 6, 4), "trained": (56, 8, 6)}
CHECKPOINT_BYTES = {"frozen": 2, "trained": 4}  # times D: the input of a layer is all that is kept of it
LOGIT_BYTES = 14  # per token and word: logits in bf16 and float32, their softmax and their gradient in float32


@dataclass(frozen=True)
class Counts:
    """Parameters of a model by part.

    Attributes:
        new: adapters, routers and routing tokens. adapters: of these, the adapters.
        tower: vision tower, which no recipe trains. layers: of the decoder, without new parts. head: the output matrix.
        total: all. lora: what LoRA would add. largest: a layer with its new parts.
    """

    config: RoeLlavaConfig
    new: int
    adapters: int
    tower: int
    layers: int
    head: int
    total: int
    lora: int
    largest: int


def counts_of(size: str) -> Counts:
    """Counted on a model on the meta device: its configuration says all."""
    config = llava_15_config(*SIZES[size])
    with torch.device("meta"):
        model = RoeLlavaForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}

    def total(chosen) -> int:
        return sum(number for name, number in sizes.items() if chosen(name))

    layers = model.model.language_model.layers
    linear = [module for module in layers.modules() if type(module) is nn.Linear]  # routers, adapters have own classes
    return Counts(
        config,
        new=total(lambda name: group_of(name) != "base"),
        adapters=total(lambda name: group_of(name) == "adapter"),
        tower=total(lambda name: "vision_tower" in name),
        layers=total(lambda name: ".layers." in name and "language_model" in name and group_of(name) == "base"),
        head=model.lm_head.weight.numel(),
        total=sum(sizes.values()),
        lora=sum(LORA_RANK * (module.in_features + module.out_features) for module in linear),
        largest=sum(parameter.numel() for parameter in layers[0].parameters()),
    )


def trained_parameters(counts: Counts, recipe: str) -> int:
    """`frozen` trains the new parts, `lora` also its matrices, `full` and `published` all but the vision tower."""
    if recipe == "frozen":
        return counts.new
    return counts.new + counts.lora if recipe == "lora" else counts.total - counts.tower


def memory(counts: Counts, recipe: str, setup: str, checkpointing: bool) -> dict[str, float]:
    """Bytes on each GPU by what they hold, and their sum as `total`."""
    trained = trained_parameters(counts, recipe)
    held = counts.total + (counts.lora if recipe == "lora" else 0)
    shards = GPUS[setup] if setup in SHARDED else 1
    text = counts.config.text_config
    kind = "trained" if recipe in ("full", "published") else "frozen"
    by_width = zip(
        ACTIVATION_BYTES[kind], (text.hidden_size, text.intermediate_size, counts.config.adapter_size), strict=True
    )
    of_layer = sum(factor * width for factor, width in by_width)
    kept = CHECKPOINT_BYTES[kind] * text.hidden_size
    per_token = text.num_hidden_layers * kept + of_layer if checkpointing else text.num_hidden_layers * of_layer
    found = {
        "weights": (2 * (held - trained) + 4 * trained) / shards,
        "gradients": 4 * trained / shards,
        "optimizer": 8 * trained / shards,
        # Autocast's bf16 copies and DDP's buckets; or the layer at work and the next one, gathered.
        "copies": 2 * 2 * counts.largest if shards > 1 else (2 + 4 * (setup == "DDP")) * trained,
        "activations": ROWS * TOKENS * (per_token + LOGIT_BYTES * text.vocab_size),
    }
    return found | {"total": sum(found.values())}


def step_flops(counts: Counts, recipe: str, checkpointing: bool) -> float:
    """Floating-point operations of a step on one example.

    A matrix costs 2 operations per weight and token forward, as many for the gradient of its input, and as many again
    for its own where it trains; attention 2 S D per token and layer forward (causal), twice that backward.
    """
    text, vision = counts.config.text_config, counts.config.vision_config
    base = 2 * (counts.layers + counts.head) * TOKENS
    added = 2 * (counts.adapters + (counts.lora if recipe == "lora" else 0)) * TOKENS
    attention = 2 * TOKENS * text.hidden_size * TOKENS * text.num_hidden_layers
    patches = (vision.image_size // vision.patch_size) ** 2 + 1
    backward = base * (2 if recipe in ("full", "published") else 1) + 2 * added + 2 * attention
    again = (base * counts.layers / (counts.layers + counts.head) + added + attention) if checkpointing else 0
    return base + added + attention + backward + again + 2 * counts.tower * patches


def hours(counts: Counts, recipe: str, setup: str, checkpointing: bool) -> float:
    """Of one pass over all examples."""
    return EXAMPLES * step_flops(counts, recipe, checkpointing) / (GPUS[setup] * PEAK * MFU) / 3600


# ------------------------------------------------------------------------------------------------------------- the page


def parameter_table(all_counts: dict[str, Counts]) -> list[str]:
    """Parameters in millions."""
    lines = ["| | all | vision tower | new parts | LoRA | trained: frozen | lora | full, published |", "|" + "---|" * 8]
    for size, counts in all_counts.items():
        numbers = [counts.total, counts.tower, counts.new, counts.lora]
        numbers += [trained_parameters(counts, recipe) for recipe in RECIPES[:3]]
        lines.append(f"| {size} | " + " | ".join(f"{number / 1e6:,.0f} M" for number in numbers) + " |")
    return lines


def cost_table(size: str, counts: Counts) -> list[str]:
    """GB and hours of every recipe on every setup."""
    lines = [
        f"| {size} | on | weights | gradients | optimizer | copies | activations | with checkpointing | "
        "sum, GB | with checkpointing | fits 80 GB | hours | with checkpointing |",
        "|" + "---|" * 13,
    ]
    for recipe in RECIPES:
        for setup in GPUS:
            plain, saved = (memory(counts, recipe, setup, checkpointing) for checkpointing in (False, True))
            fits = ["no", "with checkpointing", "yes"][(plain["total"] <= ROOM) + (saved["total"] <= ROOM)]
            parts = [plain[name] for name in ("weights", "gradients", "optimizer", "copies", "activations")]
            parts += [saved["activations"], plain["total"], saved["total"]]
            times = [hours(counts, recipe, setup, checkpointing) for checkpointing in (False, True)]
            cells = [f"{part / 1e9:.1f}" for part in parts] + [fits] + [f"{time:.0f}" for time in times]
            lines.append(
                f"| {recipe} | {GPUS[setup]} x {setup} | ".replace("1 x one", "one") + " | ".join(cells) + " |"
            )
    return lines


def wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def assumptions(widths: dict[str, str]) -> list[str]:
    """What the figures rest on."""
    frozen, trained = (f"{CHECKPOINT_BYTES[name]} D" for name in ("frozen", "trained"))
    return [
        "Weights: frozen ones 2 bytes (loaded in bf16), trained ones 4 (float32; products run in bf16). Gradients 4, "
        "AdamW 8 bytes per trained parameter. With ZeRO-3 the same 16 bytes are 2 + 2 + 12. FSDP2 and ZeRO-3 divide "
        "all of it by the number of GPUs.",
        "Copies: autocast's bf16 copies of trained weights (2 bytes), and DDP's buckets (4 bytes per trained "
        "parameter); sharded: two layers gathered in bf16.",
        "Activations per token and layer, D hidden, F FFN, A adapter width, both paths of a layer and their mixture: "
        f"{widths['frozen']} bytes with a frozen base (frozen, lora), {widths['trained']} where it trains. These are "
        "counted: what autograd saves of a small model (`test_training_cost.py`). LoRA's own are left out. With "
        f"checkpointing {frozen} or {trained}, and one whole layer at a time. Logits: {LOGIT_BYTES} bytes per token "
        "and word of the vocabulary.",
        "Operations: 2 per weight and token forward, 2 for the gradient of the input, 2 for that of a trained "
        "weight; attention 2 S D per token and layer forward, twice that backward; checkpointing adds one forward of "
        "the layers; the vision tower runs forward alone. Both paths of every layer are counted for "
        "every example: too much where routes are taught, since examples then leave out what they skip.",
        f"Hours: operations over {PEAK / 1e12:.0f} TFLOP/s (an A100's in bf16) times {MFU:.0%} of use, which is an "
        "assumption: the ranks' communication is in it, and one GPU may do better. Reading images is not.",
        "`full` moves the base in its last stage alone, but computes its gradients from the first step on. `published` "
        "is that recipe with other masks and means, at the same cost.",
        "The search for routes, and the forward passes that teaching measures them with, are not counted: "
        "`roe-llava train --dry_run` says what they are worth in steps.",
        "Fragmentation, the CUDA context and libraries take some GB more.",
        "ZeRO-3 has not been run: only accelerate's reading of its configuration is tested.",
    ]


def page_text() -> str:
    """docs/training_cost.md."""
    all_counts = {size: counts_of(size) for size in SIZES}
    widths = {
        name: " + ".join(f"{n} {w}" for n, w in zip(ACTIVATION_BYTES[name], "DFA", strict=True))
        for name in ACTIVATION_BYTES
    }
    lines = [
        "# What training costs",
        "",
        wrapped(
            "**Every figure on this page is computed, none is measured**: by `benchmarks/training_cost.py`, which also "
            "wrote the page (`python -m roe_llava.benchmarks.training_cost --write`). Parameters are counted on models "
            "on the meta device. No run of these sizes stands behind the hours."
        ),
        "",
        "## Parameters",
        "",
        *parameter_table(all_counts),
        "",
        f"LoRA: rank {LORA_RANK} on every linear layer of the decoder.",
        "",
        "## Memory of a GPU in GB, and hours for one pass",
        "",
        f"{ROWS} examples of {TOKENS} tokens (image included) per GPU and step; {EXAMPLES:,} examples; A100 80 GB.",
    ]
    for size, counts in all_counts.items():
        lines += ["", *cost_table(size, counts)]
    lines += ["", "## How", "", *(wrapped(f"- {text}", "  ") for text in assumptions(widths))]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name} in docs/ instead of printing it")
    args = parser.parse_args()
    text = page_text()
    if args.write:
        PAGE.write_text(text, encoding="utf-8")
        print(f"wrote {PAGE}")
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
