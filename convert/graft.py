"""`roe-llava graft BASE ROE OUT`: trained routing parts onto a LLaVA checkpoint.

The base's weight files are copied byte for byte; what RoE adds goes into one file more. The result opens with
`trust_remote_code=True` and needs nothing installed but Transformers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .arguments import add_common_arguments, common_options
from .bases import routed_kind
from .completeness import check_complete
from .copying import copy_weights_file
from .fingerprint import TensorHasher, base_kinds, base_signatures, base_tensors, fingerprint
from .folder_files import (
    Companions,
    find_companions,
    grafted_config,
    open_tokenizer,
    read_base_config,
    write_code,
    write_companions,
)
from .output import check_apart, check_target, new_folder, write_json
from .routing_parts import RoutingParts, byte_progress, check_same_base, expected_base, open_routing_parts
from .source import Source, blamed_on, resolve_source
from .state_dict import RoutingSizes, check_fits, listed, split_routing_parts, text_prefix, to_disk_names
from .summary import Summary
from .weights import Checkpoint, StoredTensors, open_checkpoint

# Sorts behind the usual names of base files, so that a dtype read off the first file is the base's.
ROE_FILE = "model-roe.safetensors"


@dataclass
class Plan:
    """A graft that was checked as far as that goes without reading the base's weights.

    Attributes:
        base: where the base is.
        checkpoint: its weight files.
        config: content of its config.json.
        companions: its other files.
        parts: what is to be grafted.
        added: the parts as a file.
        expected: signatures of the base the parts were trained on; `None` to accept any.
    """

    base: Source
    checkpoint: Checkpoint
    config: dict
    companions: Companions
    parts: RoutingParts
    added: StoredTensors
    expected: dict[str, str] | None

    def check_base(self, signatures: dict[str, str]) -> None:
        check_same_base(signatures, self.expected, self.base.folder, self.parts)


def graft(
    base: str | Path,
    roe: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    check_base: bool = True,
    dry_run: bool = False,
    revision: str | None = None,
    roe_revision: str | None = None,
) -> Summary:
    """Put routing parts onto a base.

    Args:
        base: llava-hf checkpoint, a folder or a Hub id.
        roe: adapter folder, or a RoE checkpoint whose base weights are this base's; folder or Hub id.
        out: folder to write.
        overwrite: replace `out`, once the new folder is whole.
        check_base: refuse a base other than the one the parts were trained on.
        dry_run: read and check everything, write nothing.
        revision, roe_revision: of a base and of routing parts on the Hub.
    Returns: what was done.
    Raises: ValueError naming file, tensor, what was found and what was expected.
    """
    out = Path(out)
    check_target(out.absolute(), overwrite)
    base_source, roe_source = resolve_source(base, revision), resolve_source(roe, roe_revision)
    check_apart(out, base_source.folder, roe_source.folder)
    plan = plan_graft(base_source, roe_source, check_base)
    if dry_run:
        with byte_progress(total_bytes(plan.checkpoint.tensors), "checking") as progress:
            signatures = base_signatures(plan.checkpoint, progress)
        plan.check_base(signatures)
    else:
        with new_folder(out, overwrite) as folder:
            signatures = write_graft(plan, folder)
    lost = {"skip_calibration": "measured on another base, or one that was not checked; calibrate again"}
    has_lost = plan.parts.info.skip_calibration is not None and not keeps_table(plan, signatures)
    return Summary(
        kept=len(plan.checkpoint.tensors),
        kept_bytes=total_bytes(plan.checkpoint.tensors),
        added=len(plan.added.tensors),
        added_bytes=total_bytes(plan.added.tensors),
        dropped=plan.companions.dropped | (lost if has_lost else {}),
        fingerprint=fingerprint(signatures),
        out=out,
        written=not dry_run,
    )


def plan_graft(base: Source, roe: Source, check_base: bool) -> Plan:
    """Open everything and check what can be checked before the base is read.

    Raises: ValueError as `graft`.
    """
    config = read_base_config(base.folder)
    checkpoint = open_checkpoint(base.folder)
    prefix = checked_prefix(checkpoint)
    parts = open_routing_parts(roe)
    with blamed_on(base.folder / "config.json"):
        whole = routed_kind(config).open_config(config)
    check_fits(parts.info.sizes, RoutingSizes.of_config(whole), roe.folder, base.folder)
    expected = expected_base(parts, base.folder) if check_base else None
    plan = Plan(
        base,
        checkpoint,
        config,
        find_companions(base.folder, config, used=checkpoint.files),
        parts,
        StoredTensors(to_disk_names(parts.tensors, prefix)),
        expected,
    )
    check_names(checkpoint)
    check_complete(checkpoint.tensors, config, base.folder)
    plan.check_base(base_kinds(checkpoint))
    if plan.companions.processor is not None:
        check_image_token(base.folder, config, plan.companions.processor["image_token"])
    with blamed_on(roe.folder):
        grafted_config(config, parts.info.routing_fields, provenance(plan, ""))  # so that a dry run finds what is wrong
    return plan


def check_names(checkpoint: Checkpoint) -> None:
    """Raises: ValueError if two weight files would get one name in the result."""
    names = [*map(copied_name, checkpoint.files), ROE_FILE]
    if twice := [name for name in checkpoint.files if names.count(copied_name(name)) > 1]:
        raise ValueError(
            f"{twice[0]} in {checkpoint.folder} would be written as {copied_name(twice[0])}, as another file is: "
            "rename it"
        )


def check_image_token(folder: Path, config: dict, token: str) -> None:
    """Raises: ValueError if the base's tokenizer does not know the image token, or by another id than the model."""
    with blamed_on(folder / "tokenizer.json"):
        tokenizer = open_tokenizer(folder)
    found, expected = tokenizer.get_vocab().get(token), routed_kind(config).open_config(config).image_token_id
    if found != expected:
        raise ValueError(
            f"the tokenizer in {folder} has {'no ' if found is None else ''}image token {token!r}"
            f"{'' if found is None else f' with id {found}'}, the model expects id {expected} (image_token_index in "
            "config.json): do tokenizer and weights belong together?"
        )


def checked_prefix(checkpoint: Checkpoint) -> str:
    """What the names of a base's language model begin with.

    Raises: ValueError if it has routing parts, or no decoder layers under a known name.
    """
    base, parts = split_routing_parts(checkpoint.tensors)
    if parts:
        raise ValueError(
            f"{checkpoint.folder} already has routing parts ({listed(sorted(parts))}): graft onto the base it was made "
            "from"
        )
    prefix = text_prefix(base)
    if prefix is None:
        raise ValueError(
            f"{checkpoint.folder} has no tensor named language_model.model.layers.*, found {listed(sorted(base))}: is "
            "it a LLaVA checkpoint in llava-hf layout?"
        )
    return prefix


def write_graft(plan: Plan, folder: Path) -> dict[str, str]:
    """Fill a folder with the grafted model.

    Returns: the base's signatures, taken while copying.
    Raises: ValueError if they are not the expected ones.
    """
    num_bytes = sum(file.num_bytes for file in plan.checkpoint.files.values()) + plan.added.num_bytes
    with byte_progress(num_bytes, "copying") as progress:
        signatures = copy_weights(plan.checkpoint, plan.added, folder, progress)
    plan.check_base(signatures)
    fields = plan.parts.info.routing_fields | ({} if keeps_table(plan, signatures) else {"skip_calibration": None})
    config = grafted_config(plan.config, fields, provenance(plan, fingerprint(signatures)))
    write_json(folder / "config.json", config)
    write_companions(plan.companions, folder)
    write_code(folder, config)
    return signatures


def keeps_table(plan: Plan, signatures: dict[str, str]) -> bool:
    """Whether a calibration holds for this base: what routers read on another one, nobody has measured."""
    return plan.expected is not None or (plan.parts.info.base or {}).get("fingerprint") == fingerprint(signatures)


def provenance(plan: Plan, base_fingerprint: str) -> dict:
    """Where the weights of the grafted model come from, for its config."""
    known = plan.parts.info.base or {}
    is_known = known.get("fingerprint") == base_fingerprint  # its id says more than a local folder's name
    base_id, revision = (known.get("id"), known.get("revision")) if is_known else (plan.base.id, plan.base.revision)
    return {
        "base": {"id": base_id, "revision": revision, "fingerprint": base_fingerprint},
        "training": plan.parts.info.training,
    }


def copy_weights(
    checkpoint: Checkpoint, added: StoredTensors, folder: Path, progress: Callable[[int], object]
) -> dict[str, str]:
    """Copy a base's weight files and write the routing parts and the index beside them.

    Returns: signature of every base tensor by name in memory, taken while copying.
    """
    weight_map = {}
    with TensorHasher() as hasher:
        for name, file in checkpoint.files.items():
            new_name = copied_name(name)
            copy_weights_file(file, folder / new_name, hasher, progress)
            weight_map |= dict.fromkeys(file.tensors, new_name)
        copy_weights_file(added, folder / ROE_FILE, None, progress)
        signatures = {name: hasher.signature(tensor) for name, tensor in base_tensors(checkpoint).items()}
    weight_map |= dict.fromkeys(added.tensors, ROE_FILE)
    metadata = {"total_size": total_bytes(checkpoint.tensors) + total_bytes(added.tensors)}
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index)
    return signatures


def copied_name(name: str) -> str:
    """Name of a base's weight file in the result: its own, where Transformers does not read more into it."""
    if name in ("model.safetensors", "pytorch_model.bin"):  # taken for the whole model, index or not
        return "model-base.safetensors"
    if name.endswith(".bin"):
        return name.replace("pytorch_model", "model").removesuffix(".bin") + ".safetensors"
    return name


def total_bytes(tensors: dict) -> int:
    return sum(tensor.num_bytes for tensor in tensors.values())


def add_arguments(parser) -> None:
    """Arguments of the command."""
    parser.add_argument("base", metavar="BASE", help="llava-hf checkpoint: a folder or a Hub id")
    parser.add_argument("roe", metavar="ROE", help="adapter folder, or a RoE checkpoint made on the same base")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    add_common_arguments(parser, source="BASE")
    parser.add_argument("--roe-revision", help="revision of ROE on the Hub")
    parser.add_argument("--any-base", action="store_true", help="do not check that ROE was trained on BASE")


def run(args) -> None:
    """Run the command."""
    options = {"check_base": not args.any_base, "roe_revision": args.roe_revision, **common_options(args)}
    print(graft(args.base, args.roe, args.out, **options))
