"""`roe-llava extract CHECKPOINT OUT`: the adapter file back out of a RoE checkpoint.

An adapter file stands for the checkpoint only where the base weights are those of a base that can be had: they are read
and compared with the base the checkpoint names, or with `--base`. `--full` takes a checkpoint apart whose base was
tuned too: into a folder of the base and an adapter file that belongs to it.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ..adapter_roe import ABOUT_NAME, WEIGHTS_NAME
from ..identity_roe import base_record, difference, fingerprint, record_name
from .arguments import add_common_arguments, common_options
from .bases import A_ROUTED_MODEL, is_routed, routed_kind
from .completeness import check_complete
from .copying import copy_weights_file
from .fingerprint import TensorHasher, base_kinds, base_signatures, base_tensors
from .folder_files import read_base_config
from .graft import total_bytes
from .output import check_apart, check_target, new_folder, write_json
from .routing_parts import RoutingParts, byte_progress, open_routing_parts
from .source import Source, read_json, resolve_source
from .state_dict import split_routing_parts, to_disk_names
from .stock_files import StockFiles, find_stock_files
from .summary import Summary
from .weights import BinFile, Checkpoint, SafetensorsFile, StoredTensors, open_checkpoint


@dataclass
class Plan:
    """An extraction that was checked as far as that goes without reading the base's weights.

    Attributes:
        where: the RoE checkpoint.
        checkpoint: its weight files.
        config: content of its config.json.
        parts: its routing parts.
        adapter: those parts as the file of an adapter.
    """

    where: Source
    checkpoint: Checkpoint
    config: dict
    parts: RoutingParts
    adapter: StoredTensors

    @property
    def named_base(self) -> dict:
        """Id, revision and fingerprint of the base that the checkpoint names; empty if it names none."""
        return (self.config.get("roe_provenance") or {}).get("base") or {}

    def renamed(self) -> dict[str, str]:
        """Names of routing parts in the checkpoint to their names in an adapter file, where the two differ."""
        by_tensor = {tensor: name for name, tensor in self.adapter.tensors.items()}
        names = {name: by_tensor[tensor] for name, tensor in self.checkpoint.tensors.items() if tensor in by_tensor}
        return {old: new for old, new in names.items() if old != new}


def extract(
    checkpoint: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    base_revision: str | None = None,
    full: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    revision: str | None = None,
) -> Summary:
    """Take the adapter file out of a RoE checkpoint.

    Args:
        checkpoint: grafted or saved RoE checkpoint; a folder or a Hub id.
        out: folder to write: the adapter file, or with `full` the folders `base` and `adapter`.
        base: the base it was trained on, a folder or a Hub id; by default the one that its config names, of which the
            fingerprint is enough.
        base_revision: of that base on the Hub.
        full: write the base weights too, whatever they are, as a folder of the base's class.
        overwrite: replace `out`, once the new folder is whole.
        dry_run: read and check everything, write nothing.
        revision: of a checkpoint on the Hub.
    Returns: what was done.
    Raises: ValueError if the base weights are not those of the base, naming what differs; if no base is known; or if
        the checkpoint is incomplete or damaged.
    """
    out = Path(out)
    check_target(out.absolute(), overwrite)
    if full and base is not None:
        raise ValueError(f"base {base} given with full: base and adapter are written as they are, nothing is compared")
    if base is None and base_revision is not None:
        raise ValueError(f"base revision {base_revision!r} given without a base: give its Hub id with --base")
    where = resolve_source(checkpoint, revision)
    base_source = None if base is None else resolve_source(base, base_revision)
    check_apart(out, where.folder, *([] if base_source is None else [base_source.folder]))
    plan = plan_extract(where)
    if full:
        return extract_full(plan, out, overwrite, dry_run)
    return extract_adapter(plan, base_source, out, overwrite, dry_run)


def plan_extract(where: Source) -> Plan:
    """Open a RoE checkpoint.

    Raises: ValueError if it is none, or incomplete or damaged.
    """
    if (where.folder / ABOUT_NAME).is_file():
        raise ValueError(f"{where.folder} is an adapter file already ({ABOUT_NAME}), expected a RoE checkpoint")
    config = read_json(where.folder / "config.json")
    if not is_routed(config.get("model_type")):
        raise ValueError(
            f"{where.folder / 'config.json'} has model_type {config.get('model_type')!r}, expected "
            f"{A_ROUTED_MODEL}: only a RoE checkpoint has routing parts to take out"
        )
    parts = open_routing_parts(where)
    return Plan(where, parts.checkpoint, config, parts, StoredTensors(to_disk_names(parts.tensors)))


# ---------------------------------------------------------------------------------------------------- adapter alone


def extract_adapter(plan: Plan, base: Source | None, out: Path, overwrite: bool, dry_run: bool) -> Summary:
    """Write the adapter file, if the base weights are those of the base."""
    record = checked_record(plan, base)
    if not dry_run:
        with new_folder(out, overwrite) as folder:
            write_adapter(plan, record, folder)
    tensors = split_routing_parts(plan.checkpoint.tensors)[0]
    return Summary(
        out,
        written=not dry_run,
        kept=len(plan.adapter.tensors),
        kept_bytes=total_bytes(plan.adapter.tensors),
        kept_what="routing tensors",
        renamed=plan.renamed(),
        dropped={
            f"{len(tensors)} tensors of the base, {total_bytes(tensors) / 1e6:,.1f} MB": (
                f"those of {record_name(record)}; graft puts them back"
            ),
            "config, processor, code": "graft writes them anew",
        },
        fingerprint=record["fingerprint"],
    )


def checked_record(plan: Plan, base: Source | None) -> dict:
    """The record of the base that a checkpoint's base weights are.

    Raises: ValueError if they are not those of `base`, or of the base that the checkpoint names.
    """
    named, folder = plan.named_base, plan.where.folder
    if base is None and not named.get("fingerprint"):
        raise ValueError(
            f"{folder} does not say which base it was made from (config.json has no roe_provenance.base.fingerprint): "
            "give the base with --base, or write base and adapter with --full"
        )
    expected = None if base is None else signatures_of_base(plan, base)
    signatures = read_signatures(plan.checkpoint, f"reading {plan.where.id}")
    found = fingerprint(signatures)
    if expected is not None and (reason := difference(signatures, expected)):
        raise ValueError(differs_message(folder, base.folder, reason))
    if expected is None and found != named["fingerprint"]:
        reason = f"their fingerprint is {found}, the base's {named['fingerprint']}; --base shows which tensors differ"
        raise ValueError(differs_message(folder, f"the base it names, {record_name(named)}", reason))
    if named.get("fingerprint") == found:  # its id says more than a local folder's name
        return base_record(signatures, named.get("id"), named.get("revision"))
    return base_record(signatures, base.id, base.revision)


def signatures_of_base(plan: Plan, base: Source) -> dict[str, str]:
    """Signatures of the base given, after a comparison of dtypes and shapes, which costs nothing.

    Raises: ValueError if those differ.
    """
    read_base_config(base.folder)  # a RoE checkpoint would be compared with itself
    checkpoint = open_checkpoint(base.folder)
    if reason := difference(base_kinds(plan.checkpoint), base_kinds(checkpoint)):
        raise ValueError(differs_message(plan.where.folder, base.folder, reason))
    return read_signatures(checkpoint, f"reading {base.id}")


def read_signatures(checkpoint: Checkpoint, what: str) -> dict[str, str]:
    """Signatures of a checkpoint's base tensors, with a progress bar."""
    with byte_progress(total_bytes(base_tensors(checkpoint)), what) as progress:
        return base_signatures(checkpoint, progress)


def differs_message(folder: Path, base, reason: str) -> str:
    return (
        f"the base weights in {folder} are not those of {base}: {reason}. Were they tuned, or saved in another dtype? "
        "An adapter file alone would lose them; write base and adapter with --full"
    )


def write_adapter(plan: Plan, record: dict, folder: Path) -> None:
    """Fill a folder with the adapter file."""
    with open(folder / WEIGHTS_NAME, "wb") as copy:
        for _, block in plan.adapter.blocks():
            copy.write(block)
    write_json(folder / ABOUT_NAME, asdict(replace(plan.parts.info, base=record)))


# -------------------------------------------------------------------------------------------------- base and adapter


def extract_full(plan: Plan, out: Path, overwrite: bool, dry_run: bool) -> Summary:
    """Write the base weights as a stock folder, and the adapter file that belongs to them."""
    stock = find_stock_files(plan.where.folder, plan.config, used=plan.checkpoint.files)
    check_complete(plan.checkpoint.tensors, plan.config, plan.where.folder)
    if dry_run:
        signatures = read_signatures(plan.checkpoint, "checking")
    else:
        with new_folder(out, overwrite) as folder:
            signatures = write_full(plan, stock, folder, out.name)
    tensors = split_routing_parts(plan.checkpoint.tensors)[0]
    found, named = fingerprint(signatures), plan.named_base
    base_class = routed_kind(plan.config).base_class(plan.config).__name__
    lines = {"folders": f"base (of {base_class}) and adapter (the file that belongs to it)"}
    if named.get("fingerprint"):
        is_tuned = found != named["fingerprint"]
        lines["note"] = f"the base weights are {'not ' if is_tuned else ''}those of {record_name(named)}"
    return Summary(
        out,
        written=not dry_run,
        kept=len(plan.checkpoint.tensors),
        kept_bytes=total_bytes(plan.checkpoint.tensors),
        kept_what=f"tensors, {len(tensors)} of the base and {len(plan.adapter.tensors)} routing tensors",
        renamed=plan.renamed(),
        dropped=stock.dropped,
        fingerprint=found,
        lines=lines,
    )


def write_full(plan: Plan, stock: StockFiles, folder: Path, name: str) -> dict[str, str]:
    """Fill a folder with `base` and `adapter`.

    Returns: the base's signatures, taken while copying.
    """
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    adapter.mkdir()
    signatures = write_base_weights(plan.checkpoint, base)
    stock.write(base)
    named = plan.named_base
    is_named = named.get("fingerprint") == fingerprint(signatures)
    base_id, revision = (named.get("id"), named.get("revision")) if is_named else (f"{name}/base", None)
    write_adapter(plan, base_record(signatures, base_id, revision), adapter)
    return signatures


def write_base_weights(checkpoint: Checkpoint, folder: Path) -> dict[str, str]:
    """Copy the base's tensors; a file without routing parts is copied as it is.

    Returns: signature of every base tensor by name in memory.
    """
    files = base_files(checkpoint)
    num_bytes = sum(file.num_bytes for file in files.values())
    with TensorHasher() as hasher, byte_progress(num_bytes, "copying") as progress:
        for name, file in files.items():
            copy_weights_file(file, folder / name, hasher, progress)
        signatures = {name: hasher.signature(tensor) for name, tensor in base_tensors(checkpoint).items()}
    if len(files) > 1:
        weight_map = {tensor: name for name, file in files.items() for tensor in file.tensors}
        total = sum(total_bytes(file.tensors) for file in files.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / "model.safetensors.index.json", index)
    return signatures


def base_files(checkpoint: Checkpoint) -> dict[str, SafetensorsFile | BinFile | StoredTensors]:
    """The weight files of the base alone, under the names Transformers gives to so many shards."""
    files = []
    for file in checkpoint.files.values():
        kept = split_routing_parts(file.tensors)[0]
        if kept:
            files.append(file if len(kept) == len(file.tensors) else StoredTensors(kept))
    if len(files) == 1:
        return {"model.safetensors": files[0]}
    return {f"model-{number:05d}-of-{len(files):05d}.safetensors": file for number, file in enumerate(files, 1)}


# ------------------------------------------------------------------------------------------------------ command line


def add_arguments(parser) -> None:
    """Arguments of the command."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="RoE checkpoint: a folder or a Hub id")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument(
        "--base",
        help="the base it was trained on; shows what differs, needed if none is named",
    )
    parser.add_argument("--base-revision", help="revision of that base on the Hub")
    parser.add_argument("--full", action="store_true", help="write OUT/base (the base alone) and OUT/adapter")
    add_common_arguments(parser, source="CHECKPOINT")


def run(args) -> None:
    """Run the command."""
    options = {"base": args.base, "base_revision": args.base_revision, "full": args.full, **common_options(args)}
    print(extract(args.checkpoint, args.out, **options))
