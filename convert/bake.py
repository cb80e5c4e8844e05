"""`roe-llava bake CHECKPOINT OUT`: one route for every input, frozen into a smaller checkpoint without routers.

Where the adapters of the skipped layers can be left out, the result is a stock LLaVA of fewer layers, which needs no
code of ours. Where they cannot, it is a RoE checkpoint whose skipped layers hold their norm and adapter alone.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path

from ..adapter_roe import ABOUT_NAME, listed
from ..baked_roe import refuse_baked
from ..configuration_roe import RoeLlavaConfig
from ..loading_roe import AUTO_MAP
from .arguments import add_common_arguments, common_options
from .bake_route import (
    MOST_COMMON,
    Measured,
    Questions,
    Route,
    Score,
    adapters_left_out,
    as_text,
    asked_route,
    choose_route,
    open_questions,
)
from .bases import refuse_other_bases
from .completeness import check_complete
from .folder_files import write_code
from .graft import total_bytes
from .made_tensors import numbered, stream_files
from .output import check_apart, check_target, new_folder
from .routing_parts import byte_progress, open_routing_parts
from .source import Source, read_json, resolve_source
from .stock_files import StockFiles, find_stock_files, stock_config
from .summary import Summary
from .weights import Checkpoint, StoredTensor, StoredTensors

DROP_ADAPTERS = ("auto", "always", "never")
LAYER = re.compile(r"((?:language_model\.model|model\.language_model)\.layers\.)(\d+)\.(.+)")
# What is left of a layer that a RoE checkpoint skips for good.
SKIP_PATH = ("input_layernorm.weight", "adapter.down_proj.weight", "adapter.up_proj.weight")


@dataclass
class Plan:
    """A checkpoint that was opened and checked, and the route to freeze.

    Attributes:
        where: the RoE checkpoint.
        checkpoint: its weight files.
        config: content of its config.json.
        route: L bools, True where the layer runs.
        drops_adapters: whether the result is a stock LLaVA.
        lines: what was measured, for the summary.
    """

    where: Source
    checkpoint: Checkpoint
    config: dict
    route: Route = ()
    drops_adapters: bool = False
    lines: dict[str, str] | None = None

    @property
    def skipped(self) -> list[int]:
        return [layer for layer, keep in enumerate(self.route) if not keep]


def bake(
    checkpoint: str | Path,
    out: str | Path,
    *,
    route: str | int | list[int] = MOST_COMMON,
    drop_adapters: str = "auto",
    questions: Questions | None = None,
    tolerance: float = 0.01,
    overwrite: bool = False,
    dry_run: bool = False,
    revision: str | None = None,
) -> Summary:
    """Freeze a route of a RoE checkpoint into a smaller one.

    Args:
        checkpoint: RoE checkpoint; a folder or a Hub id.
        out: folder to write.
        route: "most-common", the one that most questions take by the routers' decision; a number of layers to skip,
            chosen greedily by the loss on the questions; or the route itself, as `asked_route` reads it.
        drop_adapters: of skipped layers: "always"; "never"; "auto", where the questions show that they can be.
        questions: what to measure on; needed but for a route that is given, with "always" or "never".
        tolerance: adapters can be left out where that raises the loss by no more than this (nats), and the share of
            right answers does not fall by more than this.
        overwrite: replace `out`, once the new folder is whole.
        dry_run: read, measure and check everything, write nothing.
        revision: of a checkpoint on the Hub.
    Returns: what was done, and what was measured.
    Raises: ValueError if the checkpoint is incomplete, damaged or baked already, if the route skips nothing, everything
        or a layer without an adapter, or if questions are needed and missing.
    """
    out = Path(out)
    check_target(out.absolute(), overwrite)
    check_options(drop_adapters, tolerance)
    where = resolve_source(checkpoint, revision)
    check_apart(out, where.folder)
    plan = plan_bake(where)
    decide(plan, route, drop_adapters, questions, tolerance)
    tensors, dropped = baked_tensors(plan.checkpoint.tensors, plan.skipped, plan.drops_adapters)
    files = baked_files(plan, tensors)
    others = other_files(plan)
    check_complete(tensors, others.written["config.json"], where.folder)
    num_bytes = sum(file.num_bytes for file in files.values())
    with byte_progress(num_bytes, "checking" if dry_run else "baking") as progress:
        if dry_run:
            stream_files(files, None, progress)
        else:
            with new_folder(out, overwrite) as folder:
                stream_files(files, folder, progress)
                others.write(folder)
                if not plan.drops_adapters:
                    write_code(folder)
    return Summary(
        out,
        written=not dry_run,
        kept=len(tensors),
        kept_bytes=total_bytes(tensors),
        kept_what="tensors",
        renamed={tensor.name: name for name, tensor in tensors.items() if tensor.name != name},
        dropped=dropped | others.dropped,
        lines=plan.lines | sizes(plan.checkpoint.tensors, tensors),
    )


def check_options(drop_adapters: str, tolerance: float) -> None:
    """Raises: ValueError naming the option that is out of range."""
    if drop_adapters not in DROP_ADAPTERS:
        raise ValueError(f"drop_adapters must be one of {', '.join(DROP_ADAPTERS)}, got {drop_adapters!r}")
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance must be 0 or more, in nats and as a share of answers, got {tolerance}")


def plan_bake(where: Source) -> Plan:
    """Open a RoE checkpoint.

    Raises: ValueError if it is none, or incomplete, damaged or baked already.
    """
    if (where.folder / ABOUT_NAME).is_file():
        raise ValueError(
            f"{where.folder} is an adapter file, expected a RoE checkpoint: graft it onto its base first (roe-llava "
            "graft BASE ADAPTER OUT)"
        )
    path = where.folder / "config.json"
    config = read_json(path)
    refuse_other_bases(config.get("model_type"), path, "bake")
    if config.get("model_type") != RoeLlavaConfig.model_type:
        raise ValueError(
            f"{path} has model_type {config.get('model_type')!r}, expected {RoeLlavaConfig.model_type!r}: only a RoE "
            "checkpoint has routes to freeze"
        )
    refuse_baked(config.get("skipped_layers"), "there is no other route to freeze", where.folder)
    parts = open_routing_parts(where)
    check_complete(parts.checkpoint.tensors, config, where.folder)
    return Plan(where, parts.checkpoint, config)


def decide(plan: Plan, route, drop_adapters: str, questions: Questions | None, tolerance: float) -> None:
    """Fill in the route and the form of the result, and what was measured.

    Raises: ValueError as `bake`.
    """
    config = RoeLlavaConfig.from_dict(plan.config)
    num_layers = config.text_config.num_hidden_layers
    routed = list(range(num_layers)) if config.routed_layers is None else config.routed_layers
    asked = asked_route(route, num_layers)
    if drop_adapters == "auto" and questions is None:
        raise ValueError(
            "whether the adapters can be left out is measured on questions with answers: give them with --data, or say "
            "--drop-adapters always or never"
        )
    measured = None if questions is None else open_questions(plan.where, questions)
    plan.route, how = choose_route(asked, measured, routed, no_adapters=drop_adapters == "always")
    shown = listed(list(map(str, plan.skipped)), most=16)
    plan.lines = {
        "route": f"{as_text(plan.route)}, skips {len(plan.skipped)} of {num_layers} layers ({shown})",
        "chosen": how,
    }
    plan.drops_adapters = drop_adapters == "always"
    if measured is not None:
        with_adapters, without, lines = scores(measured, plan.route)
        plan.lines |= lines
        if drop_adapters == "auto":
            plan.drops_adapters = can_be_left_out(with_adapters, without, tolerance)
    reason = {"always": "as asked for", "never": "as asked for", "auto": f"tolerance {tolerance:g}"}[drop_adapters]
    form = "left out, a stock LLaVA" if plan.drops_adapters else "kept, a RoE checkpoint without routers"
    plan.lines["adapters"] = f"{form} ({reason}{'' if measured is not None else '; nothing was measured'})"


def scores(measured: Measured, route: Route) -> tuple[Score, Score, dict[str, str]]:
    """The questions along the route with and without adapters, and lines that say so beside what there was before."""
    whole, routed, with_adapters = (measured.score(one) for one in ((True,) * len(route), None, route))
    with adapters_left_out(measured.model):
        without = measured.score(route)
    return (
        with_adapters,
        without,
        {
            "measured": f"{measured.number} questions with answers",
            "with": f"{with_adapters}, along the route with its adapters",
            "without": f"{without}, along the route without adapters",
            "routed": f"{routed}, every question along its own route",
            "dense": f"{whole}, every layer kept",
        },
    )


def can_be_left_out(with_adapters: Score, without: Score, tolerance: float) -> bool:
    """Whether neither the loss nor the share of right answers is worse by more than the tolerance."""
    lost = max(without.loss - with_adapters.loss, with_adapters.right - without.right)
    return lost <= tolerance


def baked_tensors(
    tensors: dict[str, StoredTensor], skipped: list[int], drops_adapters: bool
) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """What is left of a checkpoint's tensors, by name in the new one, and what is not, name to reason.

    Args:
        tensors: of a RoE checkpoint, name on disk to tensor.
        skipped: layers that the route skips.
        drops_adapters: leave skipped layers out whole, and renumber the others.
    """
    kept, dropped = {}, {}
    for name, tensor in tensors.items():
        match = LAYER.fullmatch(name)
        if match is None:
            is_token = name.endswith(".routing_tokens.weight")
            (dropped if is_token else kept)[name] = "no router reads them" if is_token else tensor
            continue
        prefix, layer, part = match[1], int(match[2]), match[3]
        if part.startswith("router."):
            dropped[name] = "the route is frozen"
        elif layer not in skipped:
            number = layer - sum(other < layer for other in skipped) if drops_adapters else layer
            if part.startswith("adapter."):
                dropped[name] = "the layer always runs"
            else:
                kept[f"{prefix}{number}.{part}"] = tensor
        elif part in SKIP_PATH and not drops_adapters:
            kept[name] = tensor
        else:
            dropped[name] = "the layer is always skipped"
    return kept, dropped


def baked_files(plan: Plan, tensors: dict[str, StoredTensor]) -> dict[str, StoredTensors]:
    """The result's weight files, one for each of the checkpoint's that something is left of."""
    files = {}
    for name in plan.checkpoint.files:
        held = {new: tensor for new, tensor in tensors.items() if tensor.file.name == name}
        if held:
            files[name] = StoredTensors(held)
    return numbered(files)


def other_files(plan: Plan) -> StockFiles:
    """Config, processor and tokenizer of the result."""
    folder = plan.where.folder
    stock = find_stock_files(folder, plan.config, used=plan.checkpoint.files)
    dropped = {name: reason for name, reason in stock.dropped.items() if not name.endswith(".py")}
    if plan.drops_adapters:
        dropped |= {"*.py": "code of RoE, which stock LLaVA does without"} if dropped != stock.dropped else {}
        return StockFiles(folder, stock.copied, stock.written | {"config.json": shortened_config(plan)}, dropped)
    own = [folder / name for name in stock.written if name != "config.json"]
    return StockFiles(folder, sorted([*stock.copied, *own]), {"config.json": baked_config(plan)}, dropped)


def baked_config(plan: Plan) -> dict:
    """config.json of a RoE checkpoint whose route is frozen."""
    provenance = (plan.config.get("roe_provenance") or {}) | {
        "baked_from": {"id": plan.where.id, "revision": plan.where.revision}
    }
    return plan.config | {
        "skipped_layers": plan.skipped,
        "routed_layers": [],
        "route_bias": None,
        "skip_calibration": None,
        "auto_map": AUTO_MAP,
        "roe_provenance": provenance,
    }


def shortened_config(plan: Plan) -> dict:
    """config.json of a stock LLaVA that has the layers which run, and no others."""
    text = RoeLlavaConfig.from_dict(plan.config).text_config
    shortened = {"num_hidden_layers": sum(plan.route)}
    if getattr(text, "layer_types", None) is not None:  # which layers have a sliding window
        shortened["layer_types"] = [kind for kind, keep in zip(text.layer_types, plan.route, strict=True) if keep]
    config = stock_config(plan.config)
    return config | {"text_config": config["text_config"] | shortened}


def sizes(before: dict[str, StoredTensor], after: dict[str, StoredTensor]) -> dict[str, str]:
    """Bytes and parameters, as lines of a summary."""
    numbers = [sum(math.prod(tensor.shape) for tensor in tensors.values()) for tensors in (before, after)]
    weights = [total_bytes(tensors) for tensors in (before, after)]
    return {
        "size": f"{weights[0] / 1e6:,.1f} MB -> {weights[1] / 1e6:,.1f} MB ({weights[1] / weights[0]:.1%})",
        "numbers": f"{numbers[0]:,} -> {numbers[1]:,} parameters",
    }


# ------------------------------------------------------------------------------------------------------ command line


def add_arguments(parser) -> None:
    """Arguments of the command."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="RoE checkpoint: a folder or a Hub id")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument(
        "--route",
        default=MOST_COMMON,
        help="most-common, how many layers to skip, the skipped layers (3,7,12), or 1101... (%(default)s)",
    )
    parser.add_argument("--data", help="questions with answers: JSON or JSON lines of chats, or LLaVA's conversations")
    parser.add_argument("--images", metavar="FOLDER", help="where image paths begin (the folder of --data)")
    parser.add_argument(
        "--drop-adapters", choices=DROP_ADAPTERS, default="auto", help="of skipped layers (%(default)s)"
    )
    parser.add_argument(
        "--tolerance", type=float, default=0.01, help="loss (nats) and share of answers to lose to that (%(default)s)"
    )
    parser.add_argument("--questions", type=int, default=200, help="how many rows to take, at random (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which rows (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="conversations per batch (%(default)s)")
    parser.add_argument("--device", default="auto", help="torch device (%(default)s: an accelerator if there is one)")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="to measure in (%(default)s: as stored)",
    )
    add_common_arguments(parser, source="CHECKPOINT")


def run(args) -> None:
    """Run the command."""
    questions = None
    if args.data is not None:
        names = ("data", "images", "seed", "batch_size", "device", "dtype")
        questions = Questions(number=args.questions, **{name: getattr(args, name) for name in names})
    options = {"route": args.route, "drop_adapters": args.drop_adapters, "tolerance": args.tolerance}
    print(bake(args.checkpoint, args.out, questions=questions, **options, **common_options(args)))


__all__ = ["Questions", "bake"]
