"""`roe-llava bench`: how fast skipping layers is, beside what is physically possible.

Stock LLaVA, RoE with every layer kept, with given shares skipped and with its own routes, and stock LLaVA with layers
removed for good, all on the same weights, interleaved in one process; prefill and decoding apart, several batch sizes,
rows that share a route and rows that do not. Writes JSON and a plot, prints a table; in a clone, the tables of
benchmarks/README.md are made anew. With experts (`--experts`, `--moe`) it is `expert_bench` that measures.
"""

import argparse
import shlex
import sys
import time
from pathlib import Path

from .environment import ROOT, describe_machine, describe_run

RESULTS = ROOT / "benchmarks" / "results"
OUTSIDE = Path("out/bench")  # where an installed copy, which has no place for results, puts them
NAMES = ("tiny", "cpu-medium", "llava-1.5-7b", "llava-1.5-13b")
QUICK_GRID, QUICK_ROUNDS, QUICK_TOKENS = {1: (0.0, 0.25), 2: (0.0, 0.25)}, 2, 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `roe-llava bench`; defaults that are not told here are the shape's (`shapes.SHAPES`)."""
    several = {"nargs": "+", "metavar": "N"}
    parser.add_argument("--shape", choices=NAMES, help="model to measure (tiny)")
    parser.add_argument(
        "--base",
        help="folder or Hub id in place of a shape: the base to route; with --moe, the dense one of its experts",
    )
    parser.add_argument("--adapter", help="trained for --base; untrained parts of the same size stand in (none)")
    parser.add_argument("--skip", type=float, help="shares of layers to skip, 0.25 for a quarter", **several)
    parser.add_argument("--batch", type=int, help="batch sizes (1 2 4 8)", **several)
    parser.add_argument("--rounds", type=int, help="runs of every system")
    parser.add_argument("--tokens", type=int, help="decoding steps per run (16)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--compile", action="store_true", help="compile the parts of the layers of all models")
    parser.add_argument("--quick", action="store_true", help="two rounds, 0 and 25 %%, batches of 1 and 2")
    parser.add_argument("--seed", type=int, default=0, help="of the order of runs (%(default)s)")
    parser.add_argument("--out", type=Path, help="JSON to write (in a clone benchmarks/results/SHAPE.json)")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    add_expert_arguments(parser)
    parser.add_argument("--report", action="store_true", help="measure nothing: tables and plots from the JSON files")


def add_expert_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that measure experts in place of routes over layers."""
    experts = parser.add_argument_group("experts, beside the dense base and with every experts implementation")
    experts.add_argument("--experts", type=int, metavar="E", help="experts per layer: measure the shape with experts")
    experts.add_argument("--top-k", type=int, default=2, metavar="K", help="experts per token (%(default)s)")
    experts.add_argument("--layers", default="alternate", help="layers that get experts, as in upcycle (%(default)s)")
    experts.add_argument("--router", choices=("linear", "token_aware"), default="linear", help="(%(default)s)")
    experts.add_argument("--moe", help="a checkpoint with experts, folder or Hub id, in place of a shape")


def run(args: argparse.Namespace) -> None:
    """The whole command.

    Raises: ValueError for arguments that cannot be, and for a result that is there already.
    """
    from . import report  # late, as it loads what draws

    if args.report:
        if args.out:
            raise ValueError(f"--report reads {RESULTS} and writes there: leave --out out")
        report.report_all(RESULTS)
        return
    check_arguments(args)
    if args.moe or args.experts:
        from . import expert_bench

        expert_bench.run(args, (tuple(QUICK_GRID), QUICK_ROUNDS, QUICK_TOKENS))
        return
    args.shape = args.shape or (Path(args.base).name if args.base else "tiny")
    out = args.out or (OUTSIDE / f"{args.shape}.json" if args.base else default_out(args.shape, args.compile))
    report.check_out(out, args.overwrite)
    result = measured(args)
    report.save(result, out, args.overwrite)
    report.print_result(result)
    if out.resolve().parent == RESULTS:
        report.report_all(RESULTS)
    else:
        report.draw(result, out.with_suffix(".png"))
    print(f"wrote {out} and {out.with_suffix('.png').name}")


def default_out(shape: str, compiled: bool) -> Path:
    """Where results go unless told: into the clone, if there is one."""
    folder = RESULTS if (ROOT / ".git").exists() and RESULTS.is_dir() else OUTSIDE
    return folder / f"{shape}{'-compiled' if compiled else ''}.json"


def check_arguments(args: argparse.Namespace) -> None:
    """Raises: ValueError for a number below 1, a share that is none, or two models at once."""
    if args.base and not args.moe and (args.shape or args.experts):
        given = f"--shape {args.shape}" if args.shape else f"--experts {args.experts}"
        raise ValueError(f"--base {args.base} beside {given}: a base's folder is measured in place of a shape")
    if args.adapter and (args.moe or not args.base):
        raise ValueError(f"--adapter {args.adapter} needs --base, the base it was trained for, and no --moe")
    for name in ("rounds", "tokens", "threads", "batch"):
        given = getattr(args, name)
        for number in given if isinstance(given, list) else [given]:
            if number is not None and number < 1:
                raise ValueError(f"--{name} must be at least 1, got {number}")
    for share in args.skip or []:
        if not 0 <= share < 1:
            raise ValueError(f"--skip takes shares in [0, 1), got {share:g}; a quarter of the layers is 0.25")


def settings_of(args: argparse.Namespace, shape) -> tuple[dict, dict[int, int], int]:
    """Grid, rounds by batch size, and tokens: what was asked, else the quick ones with --quick, else the shape's.

    A batch size the grid does not have is measured like its largest.
    """
    grid = QUICK_GRID if args.quick else shape.grid
    if args.batch:
        fallback = grid[max(grid)]
        grid = {size: grid.get(size, fallback) for size in dict.fromkeys(args.batch)}
    if args.skip:
        grid = dict.fromkeys(grid, tuple(args.skip))
    usual = {} if args.quick else shape.rounds
    few = QUICK_ROUNDS if args.quick else shape.rounds[max(shape.rounds)]
    rounds = {size: args.rounds or usual.get(size, few) for size in grid}
    return grid, rounds, args.tokens or (QUICK_TOKENS if args.quick else 16)


def measured(args: argparse.Namespace) -> dict:
    """The result of a run, as it is written."""
    import torch
    from tqdm import tqdm

    from .measure import measure
    from .shapes import SHAPES, build_subject, folder_shape

    shape = folder_shape(args.base, args.adapter) if args.base else SHAPES[args.shape]
    start = time.perf_counter()
    threads, before = args.threads or shape.threads, torch.get_num_threads()
    grid, rounds, num_tokens = settings_of(args, shape)
    if threads:
        torch.set_num_threads(threads)
    try:
        subject = build_subject(args.shape, args.device, args.dtype, shape)

        def progress(items, description):
            return tqdm(items, desc=description, file=sys.stderr)

        found = measure(subject, grid, rounds, num_tokens, args.seed, args.compile, progress)
        setup = describe_machine() | describe_run(subject.base)
    finally:
        torch.set_num_threads(before)
    about = {"benchmark": "bench", "shape": args.shape, "quick": args.quick}
    about |= {"command": shlex.join(["roe-llava", *sys.argv[1:]]), "setup": setup}
    return about | {"total_seconds": time.perf_counter() - start} | found


__all__ = ["add_arguments", "run"]
