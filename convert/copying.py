"""Writing weight files at the speed of the disk: bytes are moved and hashed in one go, and flushed meanwhile."""

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from .fingerprint import TensorHasher
from .weights import BLOCK_SIZE, BinFile, SafetensorsFile, StoredTensors

# How much may wait to reach the disk before it is asked to start: a copy is flushed while it is made, not after.
FLUSH_EVERY = 64 * 2**20


class Flusher:
    """Has a growing file written to the disk in the background."""

    def __init__(self, file):
        self._descriptor, self._waiting, self._thread = file.fileno(), 0, None
        self._error: OSError | None = None

    def written(self, num_bytes: int) -> None:
        """Say that so many bytes were written; starts a flush when enough are waiting and none is at work."""
        self._waiting += num_bytes
        if self._waiting >= FLUSH_EVERY and (self._thread is None or not self._thread.is_alive()):
            self._waiting = 0
            self._thread = threading.Thread(target=self._flush)
            self._thread.start()

    def _flush(self) -> None:
        try:
            os.fsync(self._descriptor)
        except OSError as error:  # the system reports it once, and not to who flushes the file later
            self._error = error

    def wait(self) -> None:
        """Until no flush is at work, so that the file may be closed.

        Raises: OSError if one of them failed.
        """
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error


def copy_weights_file(
    file: SafetensorsFile | BinFile | StoredTensors,
    target: Path,
    hasher: TensorHasher | None,
    progress: Callable[[int], object],
) -> None:
    """Write a weight file to a new place.

    Args:
        file: what to write; a safetensors file keeps every byte, header included.
        target: a free name.
        hasher: gets every tensor; `None` to hash nothing.
        progress: called with the number of bytes done since its last call.
    Raises: ValueError if the file changes while it is read; OSError if it cannot be written.
    """
    with open(target, "wb") as copy:
        flusher = Flusher(copy)
        try:
            if isinstance(file, SafetensorsFile) and hasher is not None:
                copy_file(file, copy, flusher, hasher, progress)
            else:
                write_blocks(file, copy, flusher, hasher, progress)
        finally:
            flusher.wait()


def copy_file(file: SafetensorsFile, copy, flusher: Flusher, hasher: TensorHasher, progress) -> None:
    """A file on this disk: this thread has it copied, the hasher's threads read the same bytes apart."""
    with open(file.path, "rb") as source:
        copy_range(source, copy, 0, file.data_start)
        for tensor in file.tensors.values():
            for start, num_bytes in tensor.ranges():
                hasher.add_range(tensor, start, num_bytes)
                copy_range(source, copy, start, num_bytes)
                flusher.written(num_bytes)
                progress(num_bytes)


def copy_range(source, target, start: int, num_bytes: int) -> None:
    """Append a part of one open file to another, inside the system where it can do that.

    Raises: ValueError if the source ends before.
    """
    while num_bytes > 0:
        if sys.platform == "linux":
            done = os.sendfile(target.fileno(), source.fileno(), start, num_bytes)
        else:
            source.seek(start)
            done = target.write(source.read(min(num_bytes, BLOCK_SIZE)))
        if not done:
            raise ValueError(f"{source.name} ended while it was read: is another process writing it?")
        start, num_bytes = start + done, num_bytes - done


def write_blocks(file, copy, flusher: Flusher, hasher: TensorHasher | None, progress) -> None:
    """Tensors that are not on a disk as they are to be written."""
    for tensor, block in file.blocks():
        copy.write(block)
        if hasher is not None and tensor is not None:
            hasher.add(tensor, block)
        flusher.written(len(block))
        progress(len(block))
