"""The identity of a base: a hash over every byte of every tensor, taken while the tensors stream by.

A tensor's signature is its dtype, its shape and the first 16 hex digits of a SHA-256 over the SHA-256 of its blocks of
16 MiB; blocks are independent, so several threads hash one tensor. The fingerprint is the SHA-256 of the sorted
signatures under names in memory. It does not depend on sharding, tensor order, file format, the name layout or the
config file, and a single changed weight changes it.
"""

import hashlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

from ..identity_roe import base_record, fingerprint
from .source import resolve_source
from .state_dict import canonical_base, split_routing_parts
from .weights import Checkpoint, StoredTensor, open_checkpoint

PIECE_SIZE = 2**20


class TensorHasher:
    """Hashes tensors block by block in the background.

    Args:
        num_threads: how many blocks to hash at once; two more than cores, since some will wait for the disk.
    """

    def __init__(self, num_threads: int | None = None):
        num_threads = num_threads or min(8, (os.cpu_count() or 1) + 2)
        self._pool = ThreadPoolExecutor(num_threads)
        # Blocks in memory are few; blocks that are read when their turn comes may be many, so that hashing goes on
        # while the disk keeps the caller waiting.
        self._room, self._room_on_disk = threading.Semaphore(2 * num_threads), threading.Semaphore(32)
        self._digests: dict[StoredTensor, list[Future]] = {}
        self._buffers = threading.local()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._pool.shutdown(cancel_futures=True)

    def add(self, tensor: StoredTensor, block: bytes) -> None:
        """Hash the next block of a tensor; waits while too many are in hand."""
        self._submit(tensor, self._room, lambda: hashlib.sha256(block).digest())

    def add_range(self, tensor: StoredTensor, start: int, num_bytes: int) -> None:
        """Read and hash the next block of a tensor: so many bytes of its file from `start` on."""
        self._submit(tensor, self._room_on_disk, partial(self._hash_range, tensor.file, start, num_bytes))

    def add_all(self, tensor: StoredTensor, progress: Callable[[int], object]) -> None:
        """All blocks of a tensor, read where it is stored if that is known."""
        if tensor.start is None:
            for block in tensor.blocks():
                self.add(tensor, block)
                progress(len(block))
            return
        for start, num_bytes in tensor.ranges():
            self.add_range(tensor, start, num_bytes)
            progress(num_bytes)

    def _submit(self, tensor: StoredTensor, room: threading.Semaphore, digest: Callable[[], bytes]) -> None:
        def run() -> bytes:
            try:
                return digest()
            finally:
                room.release()

        room.acquire()
        self._digests.setdefault(tensor, []).append(self._pool.submit(run))

    def _hash_range(self, path: Path, start: int, num_bytes: int) -> bytes:
        # A small buffer that is used again stays in the processor's cache.
        if not hasattr(self._buffers, "view"):
            self._buffers.view = memoryview(bytearray(PIECE_SIZE))
        digest = hashlib.sha256()
        with open(path, "rb", buffering=0) as file:
            file.seek(start)
            while num_bytes > 0:
                piece = self._buffers.view[: min(num_bytes, PIECE_SIZE)]
                piece = piece[: file.readinto(piece)]
                if not piece:
                    raise ValueError(f"{path} ended while it was read: is another process writing it?")
                digest.update(piece)
                num_bytes -= len(piece)
        return digest.digest()

    def signature(self, tensor: StoredTensor) -> str:
        """ "F16 [2, 4] 0123456789abcdef" of a tensor whose blocks were all added."""
        blocks = self._digests.get(tensor, [])
        return f"{tensor.kind} {hashlib.sha256(b''.join(block.result() for block in blocks)).hexdigest()[:16]}"


def base_tensors(checkpoint: Checkpoint) -> dict[str, StoredTensor]:
    """The base's tensors of a checkpoint, its own or a RoE one, by name in memory."""
    return canonical_base(split_routing_parts(checkpoint.tensors)[0])


def base_kinds(checkpoint: Checkpoint) -> dict[str, str]:
    """Dtype and shape of every base tensor: what can be compared without reading weights."""
    return {name: tensor.kind for name, tensor in base_tensors(checkpoint).items()}


def base_signatures(checkpoint: Checkpoint, progress: Callable[[int], object] = lambda num_bytes: None) -> dict:
    """Signature of every base tensor by name in memory; reads the whole base, a few blocks at a time.

    Args:
        progress: called with the number of bytes done since its last call.
    """
    with TensorHasher() as hasher:
        tensors = base_tensors(checkpoint)
        for tensor in tensors.values():
            hasher.add_all(tensor, progress)
        return {name: hasher.signature(tensor) for name, tensor in tensors.items()}


def describe_base(source: str | Path, revision: str | None = None, base_id: str | None = None) -> dict:
    """The record of a base: id, revision, fingerprint, and a signature per tensor.

    Args:
        source: folder or Hub id.
        revision: of a Hub id; a branch is resolved to its commit.
        base_id: name to record; defaults to the Hub id or the folder's name.
    Raises: ValueError if the base cannot be read.
    """
    where = resolve_source(source, revision)
    return base_record(base_signatures(open_checkpoint(where.folder)), base_id or where.id, where.revision)


__all__ = [
    "TensorHasher",
    "base_kinds",
    "base_record",
    "base_signatures",
    "base_tensors",
    "describe_base",
    "fingerprint",
]
