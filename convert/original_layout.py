"""Checkpoints in the original LLaVA layout, with or without published routing parts, taken apart and renamed.

V vocabulary, D hidden size, L decoder layers, A adapter width.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .keys import (
    ORIGINAL_KEYS,
    POSITION_BUFFERS,
    PUBLISHED_ROE_KEYS,
    PUBLISHED_TOKENS,
    ROTARY_BUFFERS,
    ROUTING_TOKENS,
    renamed,
)
from .made_tensors import check_dtype, in_memory, joined
from .state_dict import listed
from .weights import DTYPES, Checkpoint, StoredTensor

UNUSED_BUFFERS = {
    ROTARY_BUFFERS: "rotary frequencies are computed from the config",
    POSITION_BUFFERS: "positions are counted, not stored",
}


@dataclass
class Layout:
    """Tensors of a checkpoint by what becomes of them.

    Attributes:
        files: old file to new name to tensor, of the base.
        routing: new name to tensor, of the routing parts.
        buffers: old name to tensor.
        renamed: old name to new name.
        dropped: old name to reason, buffers included.
    """

    files: dict[str, dict[str, StoredTensor]] = field(default_factory=dict)
    routing: dict[str, StoredTensor] = field(default_factory=dict)
    buffers: dict[str, StoredTensor] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)

    def add(self, file: str, new: str, tensor: StoredTensor) -> None:
        """Take a tensor of the base over under a new name."""
        self.files.setdefault(file, {})[new] = tensor
        self.renamed[tensor.name] = new

    def drop_buffers(self, buffers: dict[str, StoredTensor]) -> None:
        """Leave buffers behind."""
        self.buffers |= buffers
        self.dropped |= {name: buffer_reason(name) for name in buffers}

    def all_tensors(self) -> dict[str, StoredTensor]:
        """New name to tensor, routing parts included."""
        return {new: tensor for file in self.files.values() for new, tensor in file.items()} | self.routing


def buffer_reason(name: str) -> str | None:
    """Why a tensor of this name is not taken over; `None` if it is no buffer."""
    return next((reason for pattern, reason in UNUSED_BUFFERS.items() if re.fullmatch(pattern, name)), None)


def rename_original(checkpoint: Checkpoint, routed: bool) -> Layout:
    """Take a checkpoint apart.

    Args:
        routed: whether it has published routing parts.
    Raises: ValueError naming a tensor that is unknown, or the command that is meant.
    """
    layout = Layout()
    routing = {name for name in checkpoint.tensors if renamed(name, PUBLISHED_ROE_KEYS) or name in PUBLISHED_TOKENS}
    check_command(checkpoint, routing, routed)
    for file_name, file in checkpoint.files.items():
        for name in file.tensors:
            tensor = checkpoint.tensors[name]
            if name in routing:
                if new := renamed(name, PUBLISHED_ROE_KEYS):
                    layout.routing[new] = tensor
                    layout.renamed[name] = new
            elif new := renamed(name, ORIGINAL_KEYS):
                layout.add(file_name, new, tensor)
            elif buffer_reason(name) is not None:
                layout.drop_buffers({name: tensor})
            else:
                raise ValueError(
                    f"{name} in {tensor.file} is no tensor of the original LLaVA layout (model.layers.*, "
                    "model.mm_projector.{0,2}, model.vision_tower.vision_tower.vision_model.*): nothing is left out "
                    "unseen, so it has to be removed, or the checkpoint is of another kind"
                )
    if routed:
        join_routing_tokens(checkpoint, layout)
    return layout


def check_command(checkpoint: Checkpoint, routing: set[str], routed: bool) -> None:
    """Raises: ValueError if routing parts are there and should not be, or the other way round."""
    if routing and not routed:
        raise ValueError(
            f"{checkpoint.folder} has routing parts ({listed(sorted(routing))}): use import-reference, import-llava "
            "would lose them"
        )
    if routed and not routing:
        raise ValueError(
            f"{checkpoint.folder} has no routing parts (model.layers.*.adapter_MHA_router.expert.0.weight and others): "
            "use import-llava for a LLaVA without them"
        )


def join_routing_tokens(checkpoint: Checkpoint, layout: Layout) -> None:
    """Put the two routing tokens into one table, the image's first."""
    for name in PUBLISHED_TOKENS:
        if name not in checkpoint.tensors:
            raise ValueError(f"{checkpoint.folder} lacks {name}: was a file cut, or saved before RoE was added?")
        layout.renamed[name] = ROUTING_TOKENS
    tokens = [checkpoint.tensors[name] for name in PUBLISHED_TOKENS]
    if wrong := [token for token in tokens if len(token.shape) != 2 or token.shape[0] != 1]:
        raise ValueError(
            f"{wrong[0].name} in {wrong[0].file} has shape {list(wrong[0].shape)}, expected one row of the hidden size"
        )
    layout.routing[ROUTING_TOKENS] = joined(ROUTING_TOKENS, tokens)


def adapter_size(layout: Layout) -> int:
    """Width A of the adapters, read off the first one.

    Raises: ValueError if there is none.
    """
    name = "language_model.model.layers.0.adapter.down_proj.weight"
    if name not in layout.routing:
        raise ValueError(
            f"{next(iter(layout.routing.values())).file.parent} lacks model.layers.0.adapter_MHA.conv_A.weight among "
            f"{len(layout.routing)} routing tensors: was a shard lost?"
        )
    tensor = layout.routing[name]
    if len(tensor.shape) != 2:
        raise ValueError(f"{tensor.name} in {tensor.file} is {tensor.kind}, expected [adapter width, hidden size]")
    return tensor.shape[0]


def check_tied(tensors: dict[str, StoredTensor], is_tied: bool, path: Path) -> None:
    """Check that an output layer which a config ties to the embedding holds the embedding's values.

    Args:
        tensors: by name in the original layout.
        is_tied: whether the config says so.
        path: of the config.
    Raises: ValueError if it holds others: readers of such a checkpoint differ in which of the two they take.
    """
    embedding, head = (tensors.get(name) for name in ("model.embed_tokens.weight", "lm_head.weight"))
    if not is_tied or embedding is None or head is None:
        return
    if embedding.kind != head.kind or any(
        one != other for one, other in zip(embedding.blocks(), head.blocks(), strict=True)
    ):
        raise ValueError(
            f"{path} has tie_word_embeddings true, but {head.name} in {head.file} is not {embedding.name}: do config "
            "and weights belong together?"
        )


# ---------------------------------------- buffers


def describe_buffers(buffers: dict[str, StoredTensor], text) -> list[dict]:
    """What has to be kept of buffers so that they can be written again, byte for byte.

    Rotary frequencies are kept as they are: computing them on another processor may round otherwise.

    Args:
        buffers: name to tensor.
        text: the language model's configuration.
    Returns: entries {"names", "dtype", "shape", "values"}; values in hex, `None` for positions.
    Raises: ValueError if a buffer is not what the config says.
    """
    entries: dict[tuple, dict] = {}
    for name, tensor in buffers.items():
        is_rotary = re.fullmatch(ROTARY_BUFFERS, name)
        (check_rotary if is_rotary else check_positions)(tensor, text)
        values = b"".join(tensor.blocks()).hex() if is_rotary else None
        about = {"dtype": tensor.dtype, "shape": list(tensor.shape), "values": values}
        entries.setdefault((tensor.kind, values), {"names": [], **about})["names"].append(name)
    return list(entries.values())


def check_rotary(tensor: StoredTensor, text) -> None:
    """Raises: ValueError if stored rotary frequencies are not those of the config."""
    check_dtype(tensor)
    theta = text.rope_parameters["rope_theta"]
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    expected = 1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    found = tensor.load()
    close = {"rtol": 4 * torch.finfo(found.dtype).eps, "atol": torch.finfo(found.dtype).tiny}
    if found.shape != expected.shape or not torch.allclose(found.double(), expected, **close):
        raise ValueError(
            f"{tensor.name} in {tensor.file} ({tensor.kind}) does not hold the {len(expected)} rotary frequencies of "
            f"rope_theta {theta} in the config: do config and weights belong together?"
        )


def check_positions(tensor: StoredTensor, text) -> None:
    """Raises: ValueError if stored positions are not 0, 1, 2, ..."""
    found = tensor.load()
    if not torch.equal(found.flatten(), torch.arange(found.numel(), dtype=found.dtype)):
        raise ValueError(f"{tensor.name} in {tensor.file} ({tensor.kind}) does not count 0, 1, 2, ...: is it damaged?")


def remade_buffers(entries: list[dict], path: Path) -> dict[str, StoredTensor]:
    """The buffers that `describe_buffers` described.

    Args:
        path: where the entries were read.
    Raises: ValueError if they are not what was described, or would take the place of weights.
    """
    made = {}
    for entry in entries:
        try:
            names, tensor = list(entry["names"]), remade_buffer(entry)
        except Exception as error:  # whatever a changed entry leads to
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{path} describes a buffer as {entry!r:.120}, which cannot be made ({reason})") from error
        if wrong := [name for name in names if not isinstance(name, str) or buffer_reason(name) is None]:
            raise ValueError(f"{path} describes {wrong[0]!r} as a buffer, expected rotary frequencies or positions")
        made |= {name: in_memory(name, tensor, path) for name in names}
    return made


def remade_buffer(entry: dict) -> torch.Tensor:
    dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
    if entry["values"] is None:
        return torch.arange(shape[-1], dtype=dtype).expand(shape).clone()
    return torch.frombuffer(bytearray.fromhex(entry["values"]), dtype=dtype).reshape(shape)
