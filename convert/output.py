"""Folders that are written whole or not at all.

A folder is built beside its place under a name of its own, flushed to the disk, and renamed. An old folder is set aside
by a rename first and deleted last, so that a complete copy exists at every moment.
"""

import errno
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.utils import logging

try:
    import fcntl
except ImportError:  # not POSIX: leftovers are reported and not removed
    fcntl = None

logger = logging.get_logger(__name__)

# A full disk, a full quota, a file larger than the system or a limit allows.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_target(target: Path, overwrite: bool) -> None:
    """Raises: ValueError if a target exists and is not to be overwritten, or it is not one that can be replaced."""
    if Path.cwd().is_relative_to(target.resolve()):
        raise ValueError(f"{target} is the folder you are in, or around it: name a folder of its own (was OUT empty?)")
    if not target.parent.is_dir():
        raise ValueError(f"{target.parent} is not a folder: create it first, or give another target than {target}")
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file, expected a folder to write or a free name")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise ValueError(f"{target} exists and is not empty: give another target, or overwrite it (--overwrite)")


def check_apart(out: Path, *sources: Path) -> None:
    """Raises: ValueError if a target is one of the sources, or around one or the files that its links lead to."""
    out = out.resolve()
    for source in sources:
        read = [source, *source.iterdir()] if source.is_dir() else [source]
        if inside := [path for path in read if path.resolve().is_relative_to(out)]:
            raise ValueError(f"{out} holds {inside[0]}, which is read: give another target")


@contextmanager
def new_folder(target: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill, which takes its place when the block ends without an error.

    Args:
        target: where it shall be; a missing or an empty folder, or any folder with `overwrite`.
        overwrite: replace what is there, once the new folder is whole.
    Raises: ValueError as `check_target`; OSError naming the target if there is no room for what is written.
    """
    target = Path(target).absolute()
    check_target(target, overwrite)
    if target.is_symlink():
        target = target.resolve()  # what the link leads to is replaced, not the link
    report_leftovers(target)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    lock = lock_folder(partial)
    try:
        yield partial
        partial.chmod(0o777 & ~current_umask())  # mkdtemp makes private folders
        flush_tree(partial)
        put_in_place(partial, target)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            raise no_room(error, target) from error
        raise
    finally:
        if lock is not None:
            os.close(lock)


def no_room(error: OSError, target: Path) -> OSError:
    """The error of a write for which there is no room, with what the system leaves out."""
    free = shutil.disk_usage(target.parent).free
    return OSError(
        error.errno,
        f"{os.strerror(error.errno)} while writing {target}: {free / 1e9:.2f} GB are free there now. What was written "
        "is removed again, and nothing else was changed",
    )


def put_in_place(partial: Path, target: Path) -> None:
    """Rename a whole folder to its place, an old one aside until then."""
    previous = None
    if target.is_dir() and any(target.iterdir()):
        previous = Path(tempfile.mkdtemp(prefix=f".{target.name}.previous-", dir=target.parent))
        try:
            target.rename(previous)  # onto an empty folder: nobody else can have taken the name
        except OSError as error:
            previous.rmdir()
            raise OSError(
                error.errno, f"{target} cannot be set aside ({error.strerror}): is it a mount point?"
            ) from error
    try:
        partial.rename(target)
    except OSError:
        if previous is not None:
            previous.rename(target)
        raise
    flush(target.parent)
    if previous is not None:  # renamed first: what is called previous is always complete
        discarded = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
        previous.rename(discarded)
        try:
            shutil.rmtree(discarded)
        except OSError as error:  # the new folder is in place, which is what was asked for
            logger.warning(f"{target} is written, but the old folder, now {discarded}, cannot be removed: {error}")


def report_leftovers(target: Path) -> None:
    """Remove what a killed run left half done, and say where it left the old folder."""
    for partial in target.parent.glob(f".{glob.escape(target.name)}.partial-*"):
        lock = lock_folder(partial)
        if lock is None:  # at work, or no way to tell
            continue
        logger.warning(f"removing {partial}, left by a run that was interrupted")
        shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)
    for previous in target.parent.glob(f".{glob.escape(target.name)}.previous-*"):
        if any(previous.iterdir()):
            logger.warning(f"{previous} holds the complete folder that an interrupted run was replacing")


def lock_folder(folder: Path) -> int | None:
    """A lock that ends with this process; `None` if another one holds it."""
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def flush(path: Path) -> None:
    """Have the system write a file or a folder's entries to the disk."""
    if os.name != "posix" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        flush(path)
    flush(folder)


def replace_json(path: Path, content: dict) -> None:
    """Write a JSON file anew, whole or not at all: until the new one is on the disk the old one is there.

    Raises: ValueError if the content holds NaN or infinity, which is no JSON.
    """
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o666 & ~current_umask())  # mkstemp makes private files
        flush(Path(name))
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    flush(path.parent)


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
