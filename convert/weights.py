"""Weight files of a checkpoint, read as streams: never more than a block in memory.

Every file, `.bin` included, presents itself as the safetensors file it is or becomes: a sequence of blocks, each with
the tensor it belongs to. Copying, hashing and renaming are loops over blocks.
"""

import json
import math
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ..adapter_roe import listed, read_json
from ..identity_roe import BLOCK_SIZE, DTYPE_NAMES, DTYPES


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        name: as the file has it.
        dtype: as safetensors names it ("F16").
        shape: of the tensor.
        num_bytes: of its values.
        file: where it is.
        blocks: makes an iterator over its bytes; every block but the last has `BLOCK_SIZE` bytes.
        start: where its bytes begin in the file; `None` if they are not in it as they are.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    file: Path
    blocks: Callable[[], Iterator[bytes]]
    start: int | None = None

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Where each block is in the file: its first byte and its length. Only where `start` is known."""
        for done in range(0, self.num_bytes, BLOCK_SIZE):
            yield self.start + done, min(BLOCK_SIZE, self.num_bytes - done)

    @property
    def kind(self) -> str:
        """Dtype and shape as text, "F16 [2, 4]"."""
        return f"{self.dtype} {list(self.shape)}"

    def load(self) -> torch.Tensor:
        """The tensor in memory.

        Raises: ValueError for a dtype PyTorch does not read.
        """
        if self.dtype not in DTYPES:
            raise ValueError(f"{self.name} in {self.file} has dtype {self.dtype}, expected one of {sorted(DTYPES)}")
        if self.start is None:
            values = bytearray().join(self.blocks())
        else:
            values = read_range(self.file, self.start, self.num_bytes)
        if not values:
            return torch.empty(self.shape, dtype=DTYPES[self.dtype])
        return torch.frombuffer(values, dtype=DTYPES[self.dtype]).reshape(self.shape)


# A file as a stream: the tensor a block belongs to (`None` for the header), and its bytes.
Blocks = Iterator[tuple[StoredTensor | None, bytes]]


def file_blocks(path: Path, start: int, num_bytes: int) -> Iterator[bytes]:
    """A part of a file in blocks of `BLOCK_SIZE`."""
    with open(path, "rb") as file:
        file.seek(start)
        while num_bytes > 0:
            block = file.read(min(BLOCK_SIZE, num_bytes))
            if not block:
                raise ValueError(f"{path} ended while it was read: is another process writing it?")
            num_bytes -= len(block)
            yield block


def read_range(path: Path, start: int, num_bytes: int) -> bytearray:
    """A part of a file in one piece."""
    values = bytearray(num_bytes)
    with open(path, "rb") as file:
        file.seek(start)
        if file.readinto(values) < num_bytes:
            raise ValueError(f"{path} ended while it was read: is another process writing it?")
    return values


def tensor_blocks(tensor: torch.Tensor) -> Iterator[bytes]:
    """The bytes of a tensor in blocks of `BLOCK_SIZE`."""
    flat = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    for start in range(0, flat.size, BLOCK_SIZE):
        yield flat[start : start + BLOCK_SIZE].tobytes()


class SafetensorsFile:
    """A safetensors file; copied as it is, header included.

    Raises: ValueError if it is cut or no safetensors file.
    """

    def __init__(self, path: Path):
        self.path = path
        self.num_bytes = path.stat().st_size
        header, self.data_start = self._header()
        self.metadata = header.pop("__metadata__", {})
        for name, about in header.items():
            self._check_entry(name, about)
        items = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        self.tensors = {name: self._tensor(name, about) for name, about in items}
        ends = [0] + [about["data_offsets"][1] for _, about in items]
        if gap := [name for (name, about), end in zip(items, ends, strict=False) if about["data_offsets"][0] != end]:
            raise ValueError(f"{gap[0]} in {path} does not begin where the one before it ends: a damaged header")
        if (end := self.data_start + ends[-1]) != self.num_bytes:
            raise ValueError(
                f"{path} has {self.num_bytes} bytes, its header asks for {end}: the file is "
                f"{'cut, copy or download it again' if self.num_bytes < end else 'longer than what it holds'}"
            )

    def _header(self) -> tuple[dict, int]:
        with open(self.path, "rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else self.num_bytes
            if 8 + length > self.num_bytes:
                raise ValueError(
                    f"{self.path} has {self.num_bytes} bytes, too few for its own header: it is cut, or no "
                    "safetensors file (a Git LFS pointer?)"
                )
            try:
                header = json.loads(file.read(length))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{self.path} has no readable header ({error}): is it safetensors?") from error
        if not isinstance(header, dict):
            raise ValueError(f"{self.path} has a header that is {header!r:.60}, expected an object: is it safetensors?")
        return header, 8 + length

    def _check_entry(self, name: str, about) -> None:
        entry = about if isinstance(about, dict) else {}
        dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
        fits = isinstance(dtype, str) and are_counts(shape) and are_counts(offsets) and len(offsets) == 2
        if not fits or offsets[0] > offsets[1]:
            raise ValueError(
                f"{name} in {self.path} is described by {about!r:.120}, expected dtype, shape and two data_offsets: "
                "the header is damaged"
            )

    def _tensor(self, name: str, about: dict) -> StoredTensor:
        begin, end = about["data_offsets"]
        shape = tuple(about["shape"])
        if (dtype := DTYPES.get(about["dtype"])) is not None and math.prod(shape) * dtype.itemsize != end - begin:
            raise ValueError(
                f"{name} in {self.path} takes {end - begin} bytes, expected {math.prod(shape) * dtype.itemsize} for "
                f"{about['dtype']} {list(shape)}: the header is damaged"
            )
        start = self.data_start + begin
        blocks = partial(file_blocks, self.path, start, end - begin)
        return StoredTensor(name, about["dtype"], shape, end - begin, self.path, blocks, start)

    def blocks(self) -> Blocks:
        for block in file_blocks(self.path, 0, self.data_start):
            yield None, block
        for tensor in self.tensors.values():
            for block in tensor.blocks():
                yield tensor, block


def are_counts(values) -> bool:
    """Whether a JSON value is a list of numbers from 0 on."""
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


class StoredTensors:
    """Tensors from anywhere as one new safetensors file.

    Args:
        tensors: name in the new file to tensor.
    """

    def __init__(self, tensors: dict[str, StoredTensor]):
        # Widest dtype first, as the safetensors library does: every tensor is aligned.
        self.tensors = dict(sorted(tensors.items(), key=lambda item: (-self._width(item[1]), item[0])))
        header, offset = {"__metadata__": {"format": "pt"}}, 0
        for name, tensor in self.tensors.items():
            end = offset + tensor.num_bytes
            header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.header = struct.pack("<Q", len(text)) + text
        self.num_bytes = len(self.header) + offset

    @staticmethod
    def _width(tensor: StoredTensor) -> int:
        return DTYPES[tensor.dtype].itemsize if tensor.dtype in DTYPES else 1

    def blocks(self) -> Blocks:
        yield None, self.header
        for tensor in self.tensors.values():
            for block in tensor.blocks():
                yield tensor, block


class BinFile(StoredTensors):
    """A `.bin` file of PyTorch as the safetensors file it becomes; values keep their bytes.

    Raises: ValueError if it holds anything but tensors, or a tensor safetensors cannot hold.
    """

    def __init__(self, path: Path):
        self.path = path
        tensors = {}
        for name, tensor in load_bin(path).items():
            if not isinstance(name, str):
                raise ValueError(f"{path} names a tensor {name!r}, expected text: is it a model's weights?")
            if not isinstance(tensor, torch.Tensor):
                raise ValueError(f"{name} in {path} is a {type(tensor).__name__}, expected nothing but tensors")
            if tensor.dtype not in DTYPE_NAMES or tensor.layout != torch.strided:
                raise ValueError(f"{name} in {path} is a {tensor.layout} {tensor.dtype}, which safetensors cannot hold")
            tensors[name] = StoredTensor(
                name,
                DTYPE_NAMES[tensor.dtype],
                tuple(tensor.shape),
                tensor.numel() * tensor.itemsize,
                path,
                lambda tensor=tensor: tensor_blocks(tensor),
            )
        super().__init__(tensors)


def load_bin(path: Path) -> dict:
    """The dict in a `.bin` file; nothing in it is executed.

    Raises: ValueError if it holds more than tensors, is no dict, or is damaged.
    """
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # written before PyTorch 1.6: cannot be mapped
            content = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # a cut or changed pickle fails in any way
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} cannot be read as tensors alone: {reason} (cut, or no checkpoint?)") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a dict of tensors by name")
    return content


@dataclass(frozen=True)
class Checkpoint:
    """Weight files of a folder.

    Attributes:
        folder: where they are.
        files: file name to file, in the order of names.
        tensors: name on disk to tensor.
    """

    folder: Path
    files: dict[str, SafetensorsFile | BinFile]
    tensors: dict[str, StoredTensor]


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open the weight files Transformers would load, without reading weights.

    Raises: ValueError if there are none, or files, index and tensors do not agree.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return read_files(folder, [name])
        if (index := folder / f"{name}.index.json").is_file():
            return read_indexed(folder, index)
    raise ValueError(
        f"{folder} is not a checkpoint folder: expected model.safetensors, pytorch_model.bin or an index of shards"
    )


def read_files(folder: Path, names: list[str]) -> Checkpoint:
    """Open weight files.

    Raises: ValueError if a tensor is in two of them, or a file is damaged.
    """
    files, tensors = {}, {}
    for name in sorted(names):
        files[name] = BinFile(folder / name) if name.endswith(".bin") else SafetensorsFile(folder / name)
        for tensor_name, tensor in files[name].tensors.items():
            if tensor_name in tensors:
                raise ValueError(
                    f"{tensor_name} is in two shards of {folder}, {tensors[tensor_name].file.name} and {name}: were "
                    "two checkpoints saved into one folder?"
                )
            tensors[tensor_name] = tensor
    return Checkpoint(folder, files, tensors)


def read_indexed(folder: Path, index: Path) -> Checkpoint:
    """Open the shards an index lists.

    Raises: ValueError if the index and the shards do not hold the same tensors.
    """
    weight_map = read_weight_map(index)
    names = sorted(set(weight_map.values()))
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise ValueError(f"{index} lists {listed(absent)}, which is not in {folder}: is the download complete?")
    if extra := unlisted_files(folder, names):
        raise ValueError(f"{listed(extra)} in {folder} is missing from {index.name}: was a shard added or renamed?")
    checkpoint = read_files(folder, names)
    placed = {name: tensor.file.name for name, tensor in checkpoint.tensors.items()}
    if placed != weight_map:
        name = min(name for name in placed.keys() | weight_map.keys() if placed.get(name) != weight_map.get(name))
        raise ValueError(
            f"{index} says {name} is in {weight_map.get(name, 'no shard')}, found in {placed.get(name, 'no shard')}: "
            "do the shards belong to this index?"
        )
    return checkpoint


def read_weight_map(index: Path) -> dict[str, str]:
    """Tensor name to file name, as an index has them.

    Raises: ValueError if it is not such a map.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no readable weight_map, found {weight_map!r:.60}: is it an index of shards?")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(f"{index} says {name} is in {file!r}, expected the name of a file beside it")
    return weight_map


def unlisted_files(folder: Path, names: list[str]) -> list[str]:
    """Weight files that an index leaves out.

    Those have names as listed ones have but for numbers, or begin as Transformers names shards ("model-base"). Others
    (an adapter file, consolidated.safetensors, mm_projector.bin, model.fp16-...) are of other tools or variants.

    Args:
        names: of the listed files.
    """
    patterns = {re.sub(r"\d+", r"\\d+", re.escape(name)) for name in names}
    patterns |= {rf"(pytorch_)?model[-_].*{re.escape(Path(name).suffix)}" for name in names}
    found = {path.name for path in folder.iterdir() if any(re.fullmatch(one, path.name) for one in patterns)}
    return sorted(found - set(names))
