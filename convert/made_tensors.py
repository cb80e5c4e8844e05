"""Tensors that are made of stored ones (rows cut, joined, appended), still as streams; files written from streams.

V rows, D columns.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from .copying import Flusher
from .output import write_json
from .weights import BLOCK_SIZE, DTYPE_NAMES, DTYPES, StoredTensor, StoredTensors, tensor_blocks

# What weights may be stored as, and the bits that are all set in NaN and Inf.
EXPONENTS = {
    "F64": (np.uint64, 0x7FF0000000000000),
    "F32": (np.uint32, 0x7F800000),
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
}


def in_memory(name: str, tensor: torch.Tensor, file: Path) -> StoredTensor:
    """A tensor in memory as a stored one.

    Args:
        file: what messages about it name.
    """
    num_bytes = tensor.numel() * tensor.itemsize
    return StoredTensor(
        name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), num_bytes, file, lambda: tensor_blocks(tensor)
    )


def rechunked(pieces: Iterable[bytes], size: int = BLOCK_SIZE) -> Iterator[bytes]:
    """The same bytes in blocks of one size, the last one shorter."""
    held = bytearray()
    for piece in pieces:
        held += piece
        while len(held) >= size:
            yield bytes(held[:size])
            del held[:size]
    if held:
        yield bytes(held)


def joined(name: str, tensors: list[StoredTensor]) -> StoredTensor:
    """Tensors of one dtype and width, one below the other.

    Raises: ValueError if they do not fit.
    """
    first = tensors[0]
    for tensor in tensors[1:]:
        if (tensor.dtype, tensor.shape[1:]) != (first.dtype, first.shape[1:]):
            raise ValueError(
                f"{tensor.name} in {tensor.file} is {tensor.kind}, {first.name} is {first.kind}: expected one dtype "
                "and width, since they become one tensor"
            )
    return StoredTensor(
        name,
        first.dtype,
        (sum(tensor.shape[0] for tensor in tensors), *first.shape[1:]),
        sum(tensor.num_bytes for tensor in tensors),
        first.file,
        lambda: rechunked(block for tensor in tensors for block in tensor.blocks()),
    )


def rows(name: str, tensor: StoredTensor, start: int, stop: int) -> StoredTensor:
    """Rows `start` to `stop` of a tensor."""
    row_bytes = math.prod(tensor.shape[1:]) * DTYPES[tensor.dtype].itemsize

    def pieces() -> Iterator[bytes]:
        done, begin, end = 0, start * row_bytes, stop * row_bytes
        for block in tensor.blocks():
            if piece := block[max(begin - done, 0) : max(end - done, 0)]:
                yield piece
            done += len(block)
            if done >= end:
                return

    shape = (stop - start, *tensor.shape[1:])
    return StoredTensor(name, tensor.dtype, shape, (stop - start) * row_bytes, tensor.file, lambda: rechunked(pieces()))


def padded_rows(tensor: StoredTensor, num_rows: int) -> StoredTensor:
    """A (V, D) tensor with copies of the mean of its rows below, up to `num_rows`.

    As rows of an output layer they give the mean of the other logits, which is never above all of them.
    """
    added = num_rows - tensor.shape[0]
    mean = StoredTensor(
        tensor.name,
        tensor.dtype,
        (added, *tensor.shape[1:]),
        tensor.num_bytes // tensor.shape[0] * added,
        tensor.file,
        lambda: tensor_blocks(mean_row(tensor).expand(added, -1)),
    )
    return joined(tensor.name, [tensor, mean])


def mean_row(tensor: StoredTensor) -> torch.Tensor:
    """(D,) mean over rows, summed in double precision, in the tensor's dtype; a few rows in memory at a time."""
    num_rows, width = tensor.shape
    dtype, row_bytes = DTYPES[tensor.dtype], tensor.num_bytes // num_rows
    total = torch.zeros(width, dtype=torch.float64)
    for block in rechunked(tensor.blocks(), max(1, BLOCK_SIZE // row_bytes) * row_bytes):
        total += torch.frombuffer(bytearray(block), dtype=dtype).reshape(-1, width).double().sum(0)
    return (total / num_rows).to(dtype)


def check_dtype(tensor: StoredTensor) -> None:
    """Raises: ValueError if it is not of a dtype that weights have."""
    if tensor.dtype not in EXPONENTS:
        raise ValueError(
            f"{tensor.name} in {tensor.file} is {tensor.dtype}, expected one of {', '.join(EXPONENTS)}: is the "
            "checkpoint quantised? Import the weights it was made from"
        )


def check_finite_block(tensor: StoredTensor, block: bytes) -> None:
    """Raises: ValueError if a block of a tensor of such a dtype holds NaN or Inf."""
    kind, mask = EXPONENTS[tensor.dtype]
    bits = np.frombuffer(block, dtype=kind) & kind(mask)
    if bad := int((bits == mask).sum()):
        raise ValueError(
            f"{tensor.name} in {tensor.file} ({tensor.kind}) holds NaN or Inf, {bad} in the first block that has any, "
            "expected finite weights: did the training diverge, or float16 overflow?"
        )


def stream_files(files: dict[str, StoredTensors], folder: Path | None, progress: Callable[[int], object]) -> None:
    """Write weight files, every value checked on the way, with an index where there are several.

    Args:
        files: name to content.
        folder: where to; `None` to read and check alone.
        progress: called with the number of bytes done since its last call.
    Raises: ValueError naming a tensor that holds NaN or Inf.
    """
    for name, file in files.items():
        if folder is None:
            for block in checked_blocks(file):
                progress(len(block))
        else:
            write_file(folder / name, file, progress)
    if folder is not None and files and list(files) != ["model.safetensors"]:
        weight_map = {name: file_name for file_name, file in files.items() for name in file.tensors}
        size = sum(tensor.num_bytes for file in files.values() for tensor in file.tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / "model.safetensors.index.json", index)


def checked_blocks(file: StoredTensors) -> Iterator[bytes]:
    for tensor, block in file.blocks():
        if tensor is not None and tensor.dtype in EXPONENTS:
            check_finite_block(tensor, block)
        yield block


def write_file(path: Path, file: StoredTensors, progress: Callable[[int], object]) -> None:
    """Write one file; see `stream_files`."""
    with open(path, "wb") as copy:
        flusher = Flusher(copy)
        try:
            for block in checked_blocks(file):
                copy.write(block)
                flusher.written(len(block))
                progress(len(block))
        finally:
            flusher.wait()


def numbered(
    files: dict[str, StoredTensors], extra: dict[str, StoredTensors] | None = None
) -> dict[str, StoredTensors]:
    """The standard names of weight files, in the given order, before files that have a name of their own."""
    files, extra = list(files.values()), extra or {}
    if len(files) == 1 and not extra:
        return {"model.safetensors": files[0]}
    names = [f"model-{number + 1:05d}-of-{len(files):05d}.safetensors" for number in range(len(files))]
    return dict(zip(names, files, strict=True)) | extra
