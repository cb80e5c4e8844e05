"""Grafting at the scale of LLaVA-1.5-7B: time against `cp` of the same files, and peak memory.

    python -m roe_llava.benchmarks.graft_scale WORK [--out JSON]

WORK is a folder on the disk to measure, with room for three times the base. The base is made there of random numbers,
13.5 GB in three shards, and removed in the end. `cp` and `graft` take turns, each in a process of its own; a round of
either ends when its files have reached the disk. `cp` is also given without the wait for the disk.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ..configuration_roe import RoeLlavaConfig
from ..convert.adapter_file import save_adapter
from ..convert.copying import copy_weights_file
from ..convert.fingerprint import describe_base
from ..convert.output import flush_tree, write_json
from ..convert.state_dict import RoutingSizes, routing_shapes
from ..convert.weights import BLOCK_SIZE, StoredTensor, StoredTensors
from ..loading_roe import is_roe_parameter
from ..modeling_roe_llava import RoeLlavaForConditionalGeneration
from .environment import command_line, describe_machine
from .shapes import llava_15_config

RESULT = Path(__file__).parent / "results" / "graft_scale.json"


def config_7b(layers: int = 32) -> RoeLlavaConfig:
    """LLaVA-1.5-7B's shapes."""
    return llava_15_config(4096, 11008, layers, heads=32)


def base_shapes(config: RoeLlavaConfig) -> dict[str, tuple[int, ...]]:
    """Name in memory to shape, of every tensor of the base."""
    with torch.device("meta"):
        model = RoeLlavaForConditionalGeneration(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if not is_roe_parameter(name)}


def random_blocks(num_bytes: int, rng: np.random.Generator) -> Iterator[bytes]:
    """Random float16 numbers below 2, all finite."""
    for start in range(0, num_bytes, BLOCK_SIZE):
        words = np.frombuffer(rng.bytes(min(BLOCK_SIZE, num_bytes - start)), dtype=np.uint16)
        yield (words & 0xBFFF).tobytes()


def make_base(folder: Path, config: RoeLlavaConfig, num_shards: int = 3) -> int:
    """Write a base of random numbers; its size in bytes."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    tensors = {}
    for name, shape in base_shapes(config).items():
        num_bytes = 2 * int(np.prod(shape, dtype=np.int64))
        tensors[name] = StoredTensor(name, "F16", shape, num_bytes, folder, partial(random_blocks, num_bytes, rng))
    total = sum(tensor.num_bytes for tensor in tensors.values())
    shards, filled = [{} for _ in range(num_shards)], 0
    for name, tensor in tensors.items():
        shards[min(filled * num_shards // total, num_shards - 1)][name] = tensor
        filled += tensor.num_bytes
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{num_shards:05d}.safetensors"
        copy_weights_file(StoredTensors(shard), folder / file, None, lambda num_bytes: None)
        weight_map |= dict.fromkeys(shard, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_json(folder / "config.json", config.to_dict() | {"model_type": "llava", "dtype": "float16"})
    flush_tree(folder)
    return total


def make_adapter(folder: Path, base: Path, config: RoeLlavaConfig) -> None:
    """Untrained parts of the published sizes, made for that base."""
    generator = torch.Generator().manual_seed(0)
    parts = {
        name: (torch.randn(shape, generator=generator) * 0.02).half()
        for name, shape in routing_shapes(RoutingSizes.of_config(config)).items()
    }
    save_adapter(parts, config, folder, base=describe_base(base, base_id="random-7b"), training={"steps": 0})


def timed(command: list[str], folder: Path) -> tuple[float, float]:
    """Seconds a command takes, and seconds more until what it wrote to `folder` has reached the disk."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    done = time.perf_counter()
    flush_tree(folder)
    return done - start, time.perf_counter() - done


def copied(base: Path, folder: Path) -> dict:
    """One round of `cp`."""
    seconds, flush_seconds = timed(["cp", "-r", str(base), str(folder)], folder)
    shutil.rmtree(folder)
    return {"seconds": seconds, "to_disk_seconds": seconds + flush_seconds}


def grafted(base: Path, adapter: Path, folder: Path) -> dict:
    """One round of `graft`, in a process that reports its own peak memory."""
    program = (
        "import json, sys, time; from roe_llava.convert.graft import graft; start = time.perf_counter(); "
        "graft(*sys.argv[1:]); seconds = time.perf_counter() - start; status = open('/proc/self/status').read(); "
        # Not ru_maxrss, which a process inherits from the one that started it.
        "print(json.dumps([seconds, int(status.partition('VmHWM:')[2].split()[0]) * 1024]))"
    )
    start = time.perf_counter()
    command = [sys.executable, "-c", program, str(base), str(adapter), str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    whole = time.perf_counter() - start
    seconds, peak = json.loads(done.stdout.splitlines()[-1])
    written = sum(path.stat().st_size for path in folder.rglob("*"))
    shutil.rmtree(folder)
    return {"seconds": seconds, "process_seconds": whole, "peak_memory_bytes": peak, "written_bytes": written}


def measure(work: Path, rounds: int, layers: int) -> dict:
    """Make a base, measure, clean up.

    Returns: medians over the rounds, ratios, and the rounds themselves.
    """
    config = config_7b(layers)
    base, adapter, out = work / "base", work / "adapter", work / "out"
    print(f"making a base in {base}", flush=True)
    try:
        num_bytes = make_base(base, config)
        make_adapter(adapter, base, config)
        found = {"cp": [], "graft": []}
        turns = [("cp", partial(copied, base, out)), ("graft", partial(grafted, base, adapter, out))]
        for number in range(rounds):
            for name, run in turns:
                found[name].append(run())
            turns.reverse()  # what is in memory of the base's files favours neither
            print(f"round {number + 1}: {found['cp'][-1]} {found['graft'][-1]}", flush=True)
    finally:
        for folder in (base, adapter, out):
            shutil.rmtree(folder, ignore_errors=True)
    return {"base_bytes": num_bytes, "layers": layers, **summary(found, num_bytes), "rounds": found}


def summary(found: dict, num_bytes: int) -> dict:
    """Medians, and the graft's speed as a share of `cp`'s: bytes it writes per second, over bytes `cp` copies."""

    def median(what, name):
        return statistics.median(one[name] for one in found[what])

    cp, cp_to_disk, graft = median("cp", "seconds"), median("cp", "to_disk_seconds"), median("graft", "seconds")
    return {
        "cp_seconds": cp,
        "cp_to_disk_seconds": cp_to_disk,
        "graft_seconds": graft,
        "graft_process_seconds": median("graft", "process_seconds"),
        "peak_memory_bytes": max(one["peak_memory_bytes"] for one in found["graft"]),
        # Of the base's bytes alone: what the graft adds is not credited to it. It ends when its folder is on the disk,
        # so the second share is the fair one.
        "share_of_cp_not_on_disk_yet": cp / graft,
        "share_of_cp": cp_to_disk / graft,
        "base_bytes_per_second": num_bytes / graft,
    }


def speed_text(result: dict) -> str:
    """What `docs/checkpoints.md` says of a result."""
    return (
        f"| {result['base_bytes'] / 1e9:.1f} GB, {result['layers']} layers | seconds | speed |\n|---|---:|---:|\n"
        f"| `cp -r`, until it is on the disk | {result['cp_to_disk_seconds']:.1f} | 100 % |\n"
        f"| `graft`, until it is on the disk | {result['graft_seconds']:.1f} | {100 * result['share_of_cp']:.0f} % |\n"
        f"| `cp -r` that does not wait for the disk | {result['cp_seconds']:.1f} | |\n\n"
        f"Medians of {len(result['rounds']['cp'])} rounds by turns. The graft also hashes every byte, which takes most "
        f"of its time where cores are few ({result['cores']} here, {result['processor']}), and adds 0.5 GB of routing "
        f"parts; it holds at most {result['peak_memory_bytes'] / 1e9:.2f} GB in memory. Against the `cp` that does not "
        f"wait it has {100 * result['share_of_cp_not_on_disk_yet']:.0f} % of the speed. Numbers: "
        "`benchmarks/results/graft_scale.json`."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", metavar="WORK", type=Path, help="empty folder to work in")
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON to write")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=32, help="fewer for a quick look")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if any(args.work.iterdir()):
        parser.error(f"{args.work} is not empty: give a folder whose content may be deleted")
    result = measure(args.work, args.rounds, args.layers)
    result |= describe_machine() | {"command": command_line("roe_llava.benchmarks.graft_scale")}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, result)
    print(f"{speed_text(result)}\nwrote {args.out}")


if __name__ == "__main__":
    main()
