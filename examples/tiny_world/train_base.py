"""Trains the base of the tiny world from nothing, with one command:

    python -m roe_llava.examples.tiny_world.train_base OUT

Three stages: the vision tower alone, then frozen (`vision.train_vision`); the projector (`vision.align_projector`); the
decoder with the stock `Trainer` on `lessons.Lessons`. OUT appears when all is done; until then the latest state is a
loadable model in OUT.partial.

Such a base has layers that it hardly uses, which anyone could leave out for good. The shipped one has none left: they
were cut out of a trained base, which then learned on, by

    python -m roe_llava.examples.tiny_world.train_base OUT --start BASE --cut 5 6 7 --steps 800 --learning-rate 6e-4 \\
        --families object where color digit larger count compare add
"""

import argparse
import contextlib
import json
import os
import platform
import shutil
import time
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ...modeling_frontend import base_class_of
from .base_model import build_base
from .evaluate import accuracy_by_family, family_examples, most_common_share
from .front_ends import FRONT_ENDS
from .lessons import LESSONS, LESSONS_AFTER, TOURS_FIRST, LessonCollator, Lessons
from .processor import build_processor
from .vision import align_projector, train_vision
from .world import FAMILIES, PRACTICE

FLOAT32_ATTENTION = "sdpa_float32"


def sdpa_in_float32(module, query, key, value, attention_mask, **kwargs):
    """Attention in float32 under autocast: the backward pass of bfloat16 attention is slow on CPUs."""
    with torch.autocast(query.device.type, enabled=False):
        return sdpa_attention_forward(module, query.float(), key.float(), value.float(), attention_mask, **kwargs)


def save_base(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> None:
    """Writes model and processor in the layout of the llava-hf checkpoints, weights in bfloat16."""
    raw = folder / "raw"
    model.save_pretrained(raw)
    if type(model) is LlavaForConditionalGeneration:
        name_as_on_the_hub(raw)
    type(model).from_pretrained(raw, dtype=torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)
    shutil.rmtree(raw)


def name_as_on_the_hub(raw: Path) -> None:
    """Put the keys of a saved model right.

    One that was not loaded is saved without "vision_model." in them (Transformers 5.23); loaded again, it keeps them.
    """
    tower, weights = "vision_tower.", load_file(raw / "model.safetensors")
    hub = f"{tower}vision_model."  # there already if the model was loaded
    renamed = {
        hub + key.removeprefix(hub).removeprefix(tower) if key.startswith(tower) else key: value
        for key, value in weights.items()
    }
    save_file(renamed, raw / "model.safetensors", metadata={"format": "pt"})


def load_base(folder: Path) -> LlavaForConditionalGeneration:
    """A saved base in float32, whatever its front-end is."""
    cls = base_class_of(json.loads((folder / "config.json").read_text()))
    return cls.from_pretrained(folder, dtype=torch.float32)


class Snapshots(TrainerCallback):
    """Every so many steps, saves the model and prints how it does on a few validation questions."""

    def __init__(self, processor: LlavaProcessor, folder: Path, every: int, families: tuple[str, ...]):
        self.processor, self.folder, self.every, self.families = processor, folder, every, families

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every:
            return
        save_base(model, self.processor, self.folder)
        saved = load_base(self.folder)
        right = accuracy_by_family(saved, self.processor, 40, self.families, split="validation")
        shown = " ".join(f"{family} {100 * share:.0f}" for family, share in right.items())
        print(f"\nstep {state.global_step}: {shown} | {100 * sum(right.values()) / len(right):.1f}", flush=True)


def train_decoder(model, processor, options: argparse.Namespace, partial: Path) -> None:
    """The decoder and the projector on `Lessons`: one run of the stock `Trainer` per number of steps."""
    AttentionInterface.register(FLOAT32_ATTENTION, sdpa_in_float32)
    AttentionMaskInterface.register(FLOAT32_ATTENTION, sdpa_mask)
    model.set_attn_implementation({"text_config": FLOAT32_ATTENTION})
    if options.compile:
        for layer in model.model.language_model.layers:
            layer.compile(dynamic=True)
    for run, steps in enumerate(options.steps):
        train_once(model, processor, options, partial, run, steps)


def train_once(model, processor, options: argparse.Namespace, partial: Path, run: int, steps: int) -> None:
    """One run: the rate rises, stays and falls; every run has lessons of its own, the first begins with tours alone."""
    size, seed = steps * options.batch_size, options.seed + run
    is_first = run == 0 and options.start is None
    kinds = LESSONS if options.start is None else LESSONS_AFTER
    lessons = Lessons(size, options.batch_size, seed, options.families, TOURS_FIRST if is_first else 0, kinds)
    arguments = TrainingArguments(
        output_dir=str(partial),
        max_steps=steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        warmup_steps=min(100, steps // 10),
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": int(options.decay * steps), "decay_type": "linear"},
        optim="adamw_torch_fused",
        adam_beta2=0.98,
        weight_decay=0.05,
        max_grad_norm=1.0,
        use_cpu=not torch.cuda.is_available(),
        bf16=True,
        train_sampling_strategy="sequential",  # the lessons come in the order in which they are to be read
        logging_steps=100,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        seed=seed,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=lessons,
        data_collator=LessonCollator(processor),
        callbacks=[Snapshots(processor, partial, options.snapshot_steps, options.families)],
    )
    trainer.train()


def measure(folder: Path, families: tuple[str, ...], per_family: int) -> dict[str, dict[str, float]]:
    """Accuracy of the saved folder in float32: by family, with shuffled images, and of the most common answer."""
    processor = transformers.AutoProcessor.from_pretrained(folder)
    model = load_base(folder)
    right = accuracy_by_family(model, processor, per_family, families)
    blind = accuracy_by_family(model, processor, per_family, families, shuffle_images=True)
    return {
        family: {
            "accuracy": right[family],
            "shuffled_images": blind[family],
            "most_common_answer": most_common_share(family_examples(family, per_family)),
        }
        for family in families
    }


def table(by_family: dict[str, dict[str, float]]) -> str:
    """The accuracies in percent as a Markdown table."""
    lines = ["| family | accuracy | images shuffled | most common answer |", "|---|---|---|---|"]
    for family, row in by_family.items():
        lines.append(f"| {family} | " + " | ".join(f"{100 * share:.1f}" for share in row.values()) + " |")
    return "\n".join(lines)


def new_base(options: argparse.Namespace):
    """(model, processor, what its vision tower tells apart): everything but the decoder's training done."""
    processor = build_processor(options.front_end)
    sizes = {"hidden_size": options.hidden_size, "num_layers": options.layers, "front_end": options.front_end}
    model = build_base(processor, options.seed, **sizes)
    seen = train_vision(model, processor, options.vision_steps, options.seed)
    print("held-out cells named right:", " ".join(f"{name} {100 * share:.1f}" for name, share in seen.items()))
    align_projector(model, processor, options.projector_steps, options.seed)
    return model, processor, seen


def cut_base(start: Path, cut: list[int]):
    """(model, processor, what its vision tower tells apart) of a trained base without some of its decoder layers.

    Raises: ValueError for a layer that it does not have.
    """
    processor = LlavaProcessor.from_pretrained(start)
    model = load_base(start)
    model.model.vision_tower.requires_grad_(False)
    decoder, text = model.model.language_model, model.config.text_config
    wrong = sorted(set(cut) - set(range(text.num_hidden_layers)))
    if wrong or len(set(cut)) == text.num_hidden_layers:
        raise ValueError(f"--cut {cut}: the base has layers 0 to {text.num_hidden_layers - 1}, and has to keep one")
    decoder.layers = torch.nn.ModuleList(layer for number, layer in enumerate(decoder.layers) if number not in cut)
    for number, layer in enumerate(decoder.layers):
        layer.self_attn.layer_idx = number
    text.num_hidden_layers = len(decoder.layers)
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[: len(decoder.layers)]
    return model, processor, json.loads((start / "accuracy.json").read_text())["vision"]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the tiny world's base model from scratch.")
    parser.add_argument("out", type=Path, help="folder to write; must not exist")
    parser.add_argument("--start", type=Path, help="train this base on instead of a new one")
    parser.add_argument("--cut", type=int, nargs="+", default=[], help="layers to cut out of --start first")
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[2200, 900], help="optimizer steps of the decoder stage, run by run"
    )
    parser.add_argument("--batch-size", type=int, default=24, help="conversations per step")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--decay", type=float, default=0.4, help="share of the steps, at the end, with a falling rate")
    parser.add_argument("--vision-steps", type=int, default=800)
    parser.add_argument("--projector-steps", type=int, default=400)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--front-end", choices=tuple(FRONT_ENDS), default="stock", help="what a new base sees with")
    parser.add_argument("--families", nargs="+", choices=tuple(PRACTICE), default=tuple(PRACTICE))
    parser.add_argument("--per-family", type=int, default=250, help="held-out questions per family at the end")
    parser.add_argument("--snapshot-steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="compile the decoder layers; needs a C++ compiler")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Runs the three stages and the final evaluation, then puts the folder in place."""
    options = parse_arguments(arguments)
    if options.out.exists():
        raise SystemExit(f"{options.out} exists already; choose another folder or remove it")
    partial = options.out.with_name(options.out.name + ".partial")
    partial.mkdir(parents=True)
    torch.set_num_threads(options.threads)
    options.families = tuple(options.families)
    if options.start is not None and options.front_end != "stock":
        raise SystemExit(f"--front-end {options.front_end} is for a new base; that of --start stays as it is")
    if options.cut and options.start is None:
        raise SystemExit("--cut takes layers out of a trained base: name it with --start")
    start = time.perf_counter()

    model, processor, seen = new_base(options) if options.start is None else cut_base(options.start, options.cut)
    train_decoder(model, processor, options, partial)
    minutes = (time.perf_counter() - start) / 60

    save_base(model, processor, partial)
    by_family = measure(partial, options.families, options.per_family)
    kept = {family: row for family, row in by_family.items() if family in FAMILIES}
    report = {
        "families": kept,
        "not_kept": {family: row for family, row in by_family.items() if family not in FAMILIES},
        "overall": sum(row["accuracy"] for row in kept.values()) / max(1, len(kept)),
        "questions_per_family": options.per_family,
        "vision": seen,
        "arguments": {name: value for name, value in vars(options).items() if name not in ("out", "start")},
        "training_minutes": round(minutes, 1),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    (partial / "accuracy.json").write_text(json.dumps(report, indent=2) + "\n")
    os.rename(partial, options.out)
    print(table(by_family), f"\noverall {100 * report['overall']:.1f}, {minutes:.1f} minutes of training")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
