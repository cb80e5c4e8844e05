"""`roe-llava demo`: the shipped tiny LLaVA answers held-out questions, with and without layers skipped. No training.

Grafts the shipped RoE parts onto the shipped base, opens the result as anybody would (`trust_remote_code`), asks both
models the same questions, times both, prints tables and writes OUT/demo.json, OUT/answers.jsonl and two pictures.
"""

import argparse
import json
import random
import shlex
import sys
import time
from pathlib import Path

from ...benchmarks.environment import describe_machine

SHIPPED = Path(__file__).resolve().parent / "checkpoint"
RESULT, ANSWERS, ROUTES_PICTURE, EXAMPLES_PICTURE = "demo.json", "answers.jsonl", "routes.png", "examples.png"
SCENE, SCENE_FAMILY = "scene.png", "add"  # the picture the README asks about


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `roe-llava demo`."""
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder to write to (%(default)s)")
    parser.add_argument("--per-family", type=int, default=100, help="questions per family (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which held-out scenes (%(default)s)")
    parser.add_argument("--base", type=Path, default=SHIPPED / "base", help="base checkpoint (the shipped one)")
    parser.add_argument("--roe", type=Path, default=SHIPPED / "roe", help="folder with trained parts (the shipped one)")
    parser.add_argument("--batch-size", type=int, default=50, help="questions per batch (%(default)s)")
    # Matrices this small gain little from a second thread, and threads that wait for each other lose a lot as soon as
    # another process wants a core.
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (%(default)s)")
    parser.add_argument("--only-time", action="store_true", help="measure times only, answer nothing")
    parser.add_argument("--time-questions", type=int, default=2, help="timed questions per family (%(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="timed runs per question and model (%(default)s)")


def run(args: argparse.Namespace) -> None:
    """The whole demo.

    Raises: FileNotFoundError if the parts to graft are missing, ValueError for an argument that cannot be.
    """
    check_parts(args.base, args.roe)
    check_counts(args)
    # Late, so that the command line answers --help without loading torch.
    import torch

    from . import asking, pictures, report
    from .world import FAMILIES

    start = time.perf_counter()
    console = report.console()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    base, roe, code = load(args.base, args.roe, args.out / "model")
    training = read_json(args.roe / "training.json")
    result = {"command": shlex.join(["roe-llava", *sys.argv[1:]]), "setup": setup(roe[0], code), "seed": args.seed}
    report.print_start(console, args.out / "model", result["setup"])
    save_scene(args.out / SCENE, args.seed)
    written = [args.out / "model", args.out / SCENE]
    if not args.only_time:
        track = report.progress(console, "Asking both models")
        answered = asking.ask_both(base, roe, args.per_family, args.seed, tuple(FAMILIES), args.batch_size, track)
        result["accuracy"] = asking.accuracy_summary(answered)
        result["routes"] = asking.route_summary(answered)
        records = [json.dumps(item.record()) for item in answered]
        (args.out / ANSWERS).write_text("\n".join(records) + "\n")
        pictures.draw_routes(answered, args.out / ROUTES_PICTURE)
        pictures.draw_examples(pictures.chosen(answered), args.out / EXAMPLES_PICTURE)
        written += [args.out / name for name in (ANSWERS, ROUTES_PICTURE, EXAMPLES_PICTURE)]
        report.print_accuracy(console, result["accuracy"], read_json(args.base / "accuracy.json"))
        report.print_routes(console, result["routes"])
        report.print_training(console, training)
    result["timing"] = measure_times(base, roe, args, report.progress(console, "Timing both models"))
    report.print_timing(console, result["timing"])
    result["total_seconds"] = time.perf_counter() - start
    name = "timing.json" if args.only_time else RESULT
    (args.out / name).write_text(json.dumps(result, indent=2) + "\n")
    report.print_end(console, [args.out / name, *written], result["total_seconds"])


def check_parts(base: Path, roe: Path) -> None:
    """Raises: FileNotFoundError naming the first file that is missing of a base and of trained parts."""
    wanted = {
        base: ("config.json", "processor_config.json"),
        roe: ("roe_adapter.json", "roe_adapter.safetensors"),
    }
    for folder, names in wanted.items():
        for name in names:
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"{folder / name} is missing. The trained parts ship with the repository under "
                    "examples/tiny_world/checkpoint: was the clone or the installation incomplete? Other parts can be "
                    "given with --base and --roe"
                )


def check_counts(args: argparse.Namespace) -> None:
    """Raises: ValueError for a number of questions, runs or threads below 1."""
    for name in ("per_family", "batch_size", "threads", "time_questions", "repeats"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")


def load(base: Path, roe: Path, grafted: Path) -> tuple[tuple, tuple, str]:
    """Stock base and grafted model in float32, a (model, processor) pair each, and the module the latter comes from.

    Raises: RuntimeError if the grafted folder was not opened with its own code.
    """
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration
    from transformers.utils import logging

    from ...convert.graft import graft

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    graft(base, roe, grafted, overwrite=True)
    options = {"dtype": torch.float32}
    stock = LlavaForConditionalGeneration.from_pretrained(base, **options).eval(), AutoProcessor.from_pretrained(base)
    options["trust_remote_code"] = True
    routed = AutoModelForImageTextToText.from_pretrained(grafted, **options).eval()
    code = type(routed).__module__
    if not code.startswith("transformers_modules."):
        raise RuntimeError(f"{grafted} was opened with {code}, expected its own code; was roe_llava registered before?")
    return stock, (routed, AutoProcessor.from_pretrained(grafted, trust_remote_code=True)), code


def measure_times(base: tuple, roe: tuple, args: argparse.Namespace, progress) -> dict:
    """Batch-1 times of both models over a few questions of every family, in random order."""
    from ...benchmarks import timing
    from . import asking
    from .evaluate import family_examples
    from .world import FAMILIES

    examples = [
        example
        for family in FAMILIES
        for example in family_examples(family, args.time_questions, split="test", seed=args.seed)
    ]
    random.Random(args.seed).shuffle(examples)  # so that a slow minute does not fall on one family
    prompts = [tuple(asking.prompts(processor, [example]) for _, processor in (base, roe)) for example in examples]
    return timing.compare_times(base[0], roe[0], prompts, repeats=args.repeats, progress=progress)


def save_scene(path: Path, seed: int) -> None:
    """One held-out picture, for asking by hand."""
    from .evaluate import family_examples

    family_examples(SCENE_FAMILY, 1, split="test", seed=seed)[0]["image"].save(path)


def setup(model, code: str) -> dict:
    """What the numbers depend on: versions, hardware, threads, dtype, attention, commit."""
    import torch

    return {
        "code": code,
        **describe_machine(),
        "threads": torch.get_num_threads(),
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.config._attn_implementation,
        "adapter_size": model.config.adapter_size,
    }


def read_json(path: Path) -> dict:
    """A results file, {} if there is none."""
    return json.loads(path.read_text()) if path.is_file() else {}


__all__ = ["add_arguments", "check_parts", "run"]
