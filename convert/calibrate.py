"""`roe-llava calibrate CHECKPOINT DATA`: the table behind `generate(skip_ratio=...)`, stored with the routing parts.

Only the table is written: in place, one JSON file changes (config.json of a checkpoint, roe_adapter.json of an adapter
folder), and not before the new one is whole; with `--out`, a copy of the folder holds it.
"""

import json
import os
import random
import shutil
from pathlib import Path

import torch
from tqdm import tqdm

from ..adapter_roe import ABOUT_NAME, expanded
from ..baked_roe import refuse_baked
from ..calibration_roe import SkipCalibration
from ..training.bad_rows import RowError
from ..training.calibration import LARGEST_ERROR, RATIOS, calibrate, checked_ratios
from ..training.chat_prompt import chat_prompt, close_answers
from ..training.conversation_rows import chat_of_row
from ..training.prompts import prompts_from
from .bases import A_ROUTED_MODEL, is_routed, routed_kind
from .completeness import check_files
from .folder_files import read_base_config, write_code
from .output import check_apart, check_target, new_folder, replace_json, write_json
from .source import Source, blamed_on, read_json, resolve_source
from .verify import checked_device, default_device

FIELD, LLAVA = "skip_calibration", "conversations"


# ----------------------------------------------------------------------------------------------------- what is asked


def read_rows(path: str | Path) -> list[dict]:
    """Rows of chat messages, or of LLaVA's conversations, from a JSON file (a list) or a JSON lines file.

    Raises: ValueError naming the file, and the line of what is no JSON object.
    """
    path = expanded(path)
    if not path.is_file():
        raise ValueError(f"{path} is not a file, expected a JSON list or JSON lines of chats")
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable as {path.suffix or 'JSON'}: {error}") from error
    expected = 'expected rows like {"messages": [...], "images": [paths]}, or LLaVA\'s conversations'
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path} holds {'no rows' if rows == [] else f'a {type(rows).__name__}'}, {expected}")
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or not any(isinstance(row.get(name), list) for name in ("messages", LLAVA)):
            known = f"has {', '.join(row)} and no list of messages" if isinstance(row, dict) else f"is {row!r:.60}"
            raise ValueError(f"row {number} of {path} {known}, {expected}")
    return rows


def as_chats(rows: list[dict], names: list[str], processor, image_folder: Path) -> list[dict]:
    """Rows with LLaVA's conversations as rows of chat messages; the others as they are.

    Raises: ValueError naming a row that is not well formed.
    """
    if any(LLAVA in row for row in rows):
        close_answers(processor)
    chats = []
    for row, name in zip(rows, names, strict=True):
        try:
            chats.append(chat_of_row(row, chat_prompt(processor), image_folder) if LLAVA in row else row)
        except RowError as error:
            raise ValueError(f"{name}: {error}") from error
    return chats


def chosen(number_of_rows: int, wanted: int, seed: int) -> list[int]:
    """Numbers of so many rows, in random order so that held-out ones are like the others.

    Raises: ValueError if none are wanted.
    """
    if wanted < 1:
        raise ValueError(f"--questions must be at least 1, got {wanted}")
    return random.Random(seed).sample(range(number_of_rows), min(wanted, number_of_rows))


def load_model(where: Source, base: str | Path | None, base_revision: str | None, dtype: str, device: str):
    """(model, processor) of a RoE checkpoint, or of an adapter folder and its base.

    A table that is there is not looked at.

    Raises: ValueError if the base is missing, or given for a checkpoint that has one.
    """
    is_adapter = (where.folder / ABOUT_NAME).is_file()
    if is_adapter == (base is None):
        raise ValueError(
            f"{where.folder} is an adapter, which runs on a base: give it with --base"
            if is_adapter
            else f"base {base} given with {where.folder}, which is no adapter folder: a checkpoint has its own base"
        )
    if is_adapter:
        source = resolve_source(base, base_revision)
        kind = routed_kind(read_base_config(source.folder))
        model = kind.model.from_base(source.folder, where.folder, dtype="auto")
        model = model if dtype == "auto" else model.to(getattr(torch, dtype))
    else:
        source = where
        kind = routed_kind(read_json(where.folder / "config.json"))
        model = kind.model.from_pretrained(where.folder, dtype=dtype, **{FIELD: None})
    with blamed_on(source.folder):
        processor = kind.processor.from_pretrained(source.folder, trust_remote_code=False)
    return model.to(device).eval(), processor


# --------------------------------------------------------------------------------------------------- what is written


def table_file(where: Source) -> Path:
    """The JSON file of a checkpoint or an adapter folder that holds the table.

    Raises: ValueError if it is neither.
    """
    if (where.folder / ABOUT_NAME).is_file():
        return where.folder / ABOUT_NAME
    path = where.folder / "config.json"
    content = read_json(path)
    if not is_routed(content.get("model_type")):
        raise ValueError(
            f"{path} has model_type {content.get('model_type')!r}, expected {A_ROUTED_MODEL}: only a RoE "
            "checkpoint or an adapter folder has routers to calibrate"
        )
    refuse_baked(content.get("skipped_layers"), "there is nothing to calibrate", where.folder)
    check_files(where.folder)
    return path


def check_place(where: Source, out: str | Path | None, overwrite: bool) -> None:
    """Check before anything is measured that a table can be stored.

    Raises: ValueError if a table or a folder would be overwritten, or a file that is not the caller's own.
    """
    path = table_file(where)
    if out is not None:
        check_target(Path(out).absolute(), overwrite)
        check_apart(Path(out), where.folder)
    elif where.revision is not None or path.is_symlink():
        raise ValueError(f"{path} belongs to the Hub's cache, which is not written to: give --out")
    elif read_json(path).get(FIELD) is not None and not overwrite:
        raise ValueError(f"{path} has a table already ({FIELD}): replace it with --overwrite, or give --out")
    elif not os.access(path.parent, os.W_OK):
        raise ValueError(f"{path.parent} cannot be written to: give --out")


def store_table(where: Source, table: SkipCalibration, out: str | Path | None = None, overwrite: bool = False) -> Path:
    """Write a table into a checkpoint or an adapter folder, or into a copy of it.

    Args:
        where: the folder the table was measured on.
        out: the copy; `None` to write in place.
        overwrite: replace a table that is there, or the folder `out`.
    Returns: the file that holds the table.
    Raises: ValueError as `check_place`.
    """
    check_place(where, out, overwrite)
    path = table_file(where)
    content = read_json(path) | {FIELD: table.to_dict()}
    if out is None:
        replace_json(path, content)
        return path
    with new_folder(out, overwrite) as folder:
        hidden = shutil.ignore_patterns(".*", "__pycache__")
        shutil.copytree(where.folder, folder, ignore=hidden, copy_function=shutil.copyfile, dirs_exist_ok=True)
        write_json(folder / path.name, content)
        if path.name != ABOUT_NAME:
            write_code(folder, read_json(folder / "config.json"))  # an older folder's own code does not know the table
    return Path(out) / path.name


def has_old_code(path: Path) -> bool:
    """Whether a checkpoint carries code of its own that does not know the table."""
    return (path.parent / "configuration_roe.py").is_file() and not (path.parent / "calibration_roe.py").is_file()


def summary(table: SkipCalibration) -> str:
    """The table, one line per ratio."""
    head = f"{'ratio':>7}{'bias':>12}{'realised':>10}{'held out':>10}"
    held_out = table.held_out or [None] * len(table.skip_ratio)
    lines = [
        f"{ratio:7.1%}{bias:12.4f}{share:10.1%}" + ("" if held is None else f"{held:10.1%}")
        for ratio, bias, share, held in zip(table.skip_ratio, table.route_bias, table.realised, held_out, strict=True)
    ]
    unshifted = [layer for layer, scale in enumerate(table.layer_scale) if scale == 0]
    lines += [f"{table.questions} questions, {table.held_out_questions} held out; layers {unshifted} are not shifted"]
    if (worst := largest_miss(table)) is not None and worst > LARGEST_ERROR:
        lines += [f"held-out questions miss a ratio by up to {worst * 100:.1f} points: take more questions"]
    return "\n".join([head, *lines])


def largest_miss(table: SkipCalibration) -> float | None:
    """By how much a held-out share misses its ratio at most."""
    if table.held_out is None:
        return None
    return max(abs(share - ratio) for share, ratio in zip(table.held_out, table.skip_ratio, strict=True))


# ------------------------------------------------------------------------------------------------------ command line


def add_arguments(parser) -> None:
    """Arguments of the command."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="RoE checkpoint or adapter: a folder or a Hub id")
    parser.add_argument("data", metavar="DATA", help="JSON or JSON lines of chats, or LLaVA's conversations")
    parser.add_argument("--images", metavar="FOLDER", help="where image paths begin (the folder of DATA)")
    parser.add_argument("--base", help="base of an adapter: a folder or a Hub id")
    parser.add_argument("--ratios", type=float, nargs="+", default=list(RATIOS), help="skip ratios of the table")
    parser.add_argument("--questions", type=int, default=500, help="how many rows to take, at random (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which rows (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="prompts per batch (%(default)s)")
    parser.add_argument("--device", default="auto", help="torch device (%(default)s: an accelerator if there is one)")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="to compute in (%(default)s: as stored)",
    )
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--out", help="folder to write: a copy of CHECKPOINT with the table")
    place.add_argument("--in-place", action="store_true", help="write the table into CHECKPOINT's own JSON file")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT, or the table that is there")
    parser.add_argument("--revision", help="revision of CHECKPOINT on the Hub")
    parser.add_argument("--base-revision", help="revision of the base on the Hub")


def run(args) -> None:
    """Run the command."""
    where = resolve_source(args.checkpoint, args.revision)
    check_place(where, args.out, args.overwrite)
    if args.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {args.batch_size}")
    ratios, rows = checked_ratios(args.ratios), read_rows(args.data)
    numbers = chosen(len(rows), args.questions, args.seed)
    device = default_device() if args.device == "auto" else checked_device(args.device)
    model, processor = load_model(where, args.base, args.base_revision, args.dtype, device)
    names = [f"row {number} of {args.data}" for number in numbers]
    folder = Path(args.images or expanded(args.data).parent)
    chats = as_chats([rows[number] for number in numbers], names, processor, folder.absolute())
    batches = prompts_from(chats, processor, args.batch_size, folder, names)
    with tqdm(desc="passes", unit="pass", disable=None) as bar:

        def progress(bias: float, share: float) -> None:
            bar.set_postfix_str(f"bias {bias:.4g} skips {share:.1%}")
            bar.update()

        table = calibrate(model, batches, ratios, progress=progress)
    path = store_table(where, table, args.out, args.overwrite)
    print(summary(table))
    print(f"wrote {path}")
    if has_old_code(path):
        print(f"note: {path.parent} carries code of an older version, which does not know the table; --out renews it")


__all__ = ["read_rows", "store_table"]
