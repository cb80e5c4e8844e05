"""`roe-llava evaluate`: benchmarks through lmms-eval, along the routes, beside the same model with every layer kept.

A model with experts has no dense run of its own: beside it stands the model it was made from (`--base`).

lmms-eval loads the tasks, asks and scores; `RoeLlavaHarness` answers. OUT gets lmms-eval's results of each run
(`routed.json`, `dense.json`), the comparison as `comparison.json` and `comparison.md`, and the submission files that
some tasks write.
"""

import argparse
import importlib.util
import json
import shlex
import sys
from pathlib import Path

from .suite import BENCHMARKS, tasks_of

INSTALL = 'pip install "roe-llava[eval]" && pip install --no-deps lmms-eval==0.7.3 (docs/evaluation.md says why so)'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `roe-llava evaluate`."""
    parser.add_argument("checkpoint", help="checkpoint of ours, folder or Hub id; with --dense-only any LLaVA")
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=["gqa"],
        metavar="TASK",
        help=f"{', '.join(BENCHMARKS)}, all, tiny_world (made here), or any task of lmms-eval (gqa)",
    )
    parser.add_argument("--dense", action="store_true", help="run with every layer kept too, and compare")
    parser.add_argument(
        "--base", help="dense LLaVA to run too, and compare with: the one a model with experts came from"
    )
    parser.add_argument("--base-revision", help="of that base on the Hub")
    parser.add_argument("--dense-only", action="store_true", help="run with every layer kept, and nothing else")
    parser.add_argument("--dense-from", type=Path, metavar="OUT", help="compare with the dense run of an earlier OUT")
    parser.add_argument("--skip-ratio", type=float, help="share to skip, of a calibrated model (the routers decide)")
    parser.add_argument("--route-bias", type=float, help="added to the keep logits: above 0 keeps more layers")
    parser.add_argument("--batch-size", type=int, default=1, help="questions per batch (%(default)s)")
    parser.add_argument("--limit", type=int, help="questions per task, for trying out (all)")
    parser.add_argument("--output-dir", type=Path, default=Path("out/evaluation"), metavar="OUT", help="(%(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace the results in OUT")
    parser.add_argument("--include-path", type=Path, help="folder with more task files for lmms-eval")
    parser.add_argument("--revision", help="of the checkpoint on the Hub; pin it for results to keep")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the checkpoint's code, not this package's"
    )
    parser.add_argument("--dtype", default="auto", help="of the weights (%(default)s)")
    parser.add_argument("--device", help="such as cuda:0 or cpu (a GPU if there is one)")
    parser.add_argument("--device-map", help="auto, to spread the model over devices")
    parser.add_argument("--attn-implementation", help="sdpa, eager, flash_attention_2, ...")


def run(args: argparse.Namespace) -> None:
    """Evaluate and compare.

    Raises: ValueError for arguments that cannot be, tasks that do not exist, or a model that skips nothing.
    """
    check_arguments(args)
    tasks = tasks_of(args.tasks)
    check_installed()
    from .comparison import experts_markdown, markdown, put_beside_scores, rows, summarize

    runs = {}
    if args.dense_from:
        runs["dense"] = read_run(args.dense_from)
    check_kind(args)
    kinds = ["dense"] * bool(args.dense or args.dense_only or args.base) + ["routed"] * (not args.dense_only)
    manager = task_manager(tasks, args)
    for kind in kinds:
        results, routing = evaluate(kind == "dense", tasks, manager, args)
        if results is None:  # not the first of several processes
            continue
        put_beside_scores(results, routing)
        runs[kind] = summarize(results, routing)
        write_json(args.output_dir / f"{kind}.json", results | {"summary": runs[kind]})
    if not runs:
        return
    table = rows(runs.get("routed"), runs.get("dense"))
    routing = {task: of_task["routing"] for task, of_task in runs.get("routed", {}).items()}
    text = "\n".join(part for part in (markdown(table), experts_markdown(routing)) if part)
    write_json(args.output_dir / "comparison.json", {"command": command(), "setup": setup(args), "rows": table, **runs})
    (args.output_dir / "comparison.md").write_text(text, encoding="utf-8")
    print(f"\n{text}\nwrote {args.output_dir}")


def check_arguments(args: argparse.Namespace) -> None:
    """Raises: ValueError for arguments that contradict each other, counts below 1, or results that would be lost."""
    if args.dense_only and (
        args.dense or args.dense_from or args.skip_ratio is not None or args.route_bias is not None
    ):
        raise ValueError("--dense-only keeps every layer: give it without --dense, --dense-from and routing options")
    if args.dense and args.dense_from:
        raise ValueError("--dense runs what --dense-from takes from an earlier run: give one")
    if args.base and (args.dense or args.dense_from or args.dense_only):
        raise ValueError(
            "--base names the dense model to compare with: give it without --dense, --dense-from, --dense-only"
        )
    if args.base_revision and not args.base:
        raise ValueError(f"--base-revision {args.base_revision} given without --base")
    for name in ("batch_size", "limit"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if (args.output_dir / "comparison.json").exists() and not args.overwrite:
        raise ValueError(f"{args.output_dir} holds results: give another --output-dir, or --overwrite")
    if args.include_path and not args.include_path.is_dir():
        raise ValueError(f"--include-path {args.include_path} is not a folder")
    args.output_dir.mkdir(parents=True, exist_ok=True)


def check_kind(args: argparse.Namespace) -> None:
    """Before a model is loaded and an hour of dense answers is had.

    Raises: ValueError for options that a model with experts has no use for.
    """
    from ..convert.kinds import kind_of
    from .loading import checkpoint_type, no_dense_run

    kind = kind_of(checkpoint_type(args.checkpoint, args.revision))
    if kind is None or kind.decides != "experts":
        return
    if args.dense or args.dense_only:
        raise ValueError(no_dense_run(args.checkpoint, kind))
    for name in ("skip_ratio", "route_bias"):
        if getattr(args, name) is not None:
            raise ValueError(
                f"--{name.replace('_', '-')}: {args.checkpoint} is a {kind.name} checkpoint, which skips no layers: "
                "its tokens go through experts"
            )


def check_installed() -> None:
    """Raises: ValueError if lmms-eval is missing, or lacks one of its own requirements that we need."""
    if importlib.util.find_spec("lmms_eval") is None:
        raise ValueError(f"lmms-eval is not installed: {INSTALL}")
    try:
        import lmms_eval.evaluator  # noqa: F401
    except ImportError as error:
        raise ValueError(f"lmms-eval cannot be imported ({error}): {INSTALL}") from error


def task_manager(tasks: list[str], args: argparse.Namespace):
    """lmms-eval's index of tasks; the tiny world's is made when it is asked for.

    Raises: ValueError naming tasks that nobody knows.
    """
    from lmms_eval.tasks import TaskManager

    from .processes import join_processes
    from .tiny_world_task import TASK, write_task

    paths = [str(args.include_path)] if args.include_path else []
    known = TaskManager(include_path=paths, include_defaults=False)
    if TASK in tasks and TASK not in known.all_tasks:
        paths.append(str(args.output_dir / "tiny_world_task"))
        accelerator = join_processes(args.device)
        if accelerator is None or accelerator.is_main_process:
            write_task(paths[-1], overwrite=True)
        if accelerator:
            accelerator.wait_for_everyone()
        known = TaskManager(include_path=paths, include_defaults=False)
    if not set(tasks) <= set(known.all_tasks):  # reading all of lmms-eval's takes a while
        known = TaskManager(include_path=paths)
    if unknown := [task for task in tasks if task not in known.all_tasks]:
        raise ValueError(
            f"no task {', '.join(unknown)} in lmms-eval{' or ' + str(args.include_path) if paths else ''}; "
            "lmms-eval tasks lists all"
        )
    return known


def evaluate(dense: bool, tasks: list[str], manager, args: argparse.Namespace) -> tuple[dict | None, dict]:
    """One run of lmms-eval.

    Returns: its results without samples, `None` in a process that is not the first, and the routing summary.
    """
    from lmms_eval.evaluator import simple_evaluate

    from .harness_model import RoeLlavaHarness

    is_base = dense and args.base is not None
    model_args = {
        "pretrained": args.base if is_base else args.checkpoint,
        "revision": args.base_revision if is_base else args.revision,
        "dtype": args.dtype,
        "device": args.device,
        "device_map": args.device_map,
        "batch_size": args.batch_size,
        "attn_implementation": args.attn_implementation,
        "trust_remote_code": args.trust_remote_code,
    }
    model_args |= {"dense": True} if dense else {"skip_ratio": args.skip_ratio, "route_bias": args.route_bias}
    model = RoeLlavaHarness(**model_args)
    kind = "dense" if dense else "routed"
    results = simple_evaluate(
        model=model,
        model_args={name: value for name, value in model_args.items() if value is not None},
        tasks=tasks,
        task_manager=manager,
        batch_size=args.batch_size,
        limit=args.limit,
        log_samples=False,
        bootstrap_iters=0,
        # Tasks write their submission files below output_path.
        cli_args=argparse.Namespace(output_path=str(args.output_dir / kind), process_with_media=False),
    )
    return results, model.routing_summary


def read_run(folder: Path) -> dict:
    """The dense run of an earlier output folder.

    Raises: ValueError if there is none.
    """
    path = folder / "dense.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing: was {folder} written with --dense or --dense-only?")
    return json.loads(path.read_text(encoding="utf-8"))["summary"]


def setup(args: argparse.Namespace) -> dict:
    """What the numbers depend on."""
    from importlib.metadata import version

    from ..benchmarks.environment import describe_machine

    asked = {name: getattr(args, name) for name in ("checkpoint", "revision", "base", "dtype", "batch_size", "limit")}
    return {**asked, **describe_machine(), "lmms_eval": version("lmms_eval")}


def command() -> str:
    return shlex.join(["roe-llava", *sys.argv[1:]])


def write_json(path: Path, content: dict) -> None:
    """Whole or not at all; what JSON does not know is written as text."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
    part.replace(path)


__all__ = ["add_arguments", "run"]
