"""The identity of a base: signatures of its tensors, a fingerprint of them all, and what differs between two."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

# A tensor's signature is its dtype, its shape and the first 16 hex digits of a SHA-256 over the SHA-256 of its blocks.
# The fingerprint of a base is the SHA-256 of the sorted signatures under names in memory. Neither depends on sharding,
# file format, the name layout or the config file, and a single changed weight changes both.
BLOCK_SIZE = 16 * 2**20

# Names safetensors gives to dtypes; tensors of others cannot be stored.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def tensor_kind(tensor: Tensor) -> str:
    """Dtype and shape as text, "F16 [2, 4]"."""
    return f"{DTYPE_NAMES.get(tensor.dtype, tensor.dtype)} {list(tensor.shape)}"


def tensor_signature(tensor: Tensor) -> str:
    """ "F16 [2, 4] 0123456789abcdef" of a tensor on any device, of which a block at a time is copied to the host."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    starts = range(0, flat.numel(), BLOCK_SIZE)
    digests = [hashlib.sha256(flat[start : start + BLOCK_SIZE].cpu().numpy()).digest() for start in starts]
    return f"{tensor_kind(tensor)} {hashlib.sha256(b''.join(digests)).hexdigest()[:16]}"


def signatures_of(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Signature of every tensor, several tensors at a time."""
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        return dict(zip(tensors, pool.map(tensor_signature, tensors.values()), strict=True))


def fingerprint(signatures: dict[str, str]) -> str:
    """SHA-256 in hex over sorted names and signatures."""
    lines = "".join(f"{name} {signature}\n" for name, signature in sorted(signatures.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def base_record(signatures: dict[str, str], base_id: str | None, revision: str | None) -> dict:
    """What an adapter file says about its base."""
    return {
        "id": base_id,
        "revision": revision,
        "fingerprint": fingerprint(signatures),
        "tensors": dict(sorted(signatures.items())),
    }


def record_name(record: dict) -> str:
    """A recorded base in words: its id, and its revision where it has one."""
    revision = record.get("revision")
    return f"{record.get('id')} at revision {revision}" if revision else str(record.get("id"))


def difference(ours: dict[str, str], theirs: dict[str, str]) -> str | None:
    """What differs between two descriptions of tensors (name to signature), in words; `None` if nothing does.

    Args:
        ours: of the base at hand.
        theirs: of the base that was expected.
    """
    reasons = [f"{name} is not there" for name in sorted(theirs.keys() - ours.keys())]
    reasons += [f"{name} was not there" for name in sorted(ours.keys() - theirs.keys())]
    for name in sorted(ours.keys() & theirs.keys()):
        if ours[name] == theirs[name]:
            continue
        (our_type, our_bytes), (their_type, their_bytes) = split_signature(ours[name]), split_signature(theirs[name])
        if our_type != their_type:
            reasons.append(f"{name} is {our_type}, was {their_type}")
        elif our_bytes and their_bytes:
            reasons.append(f"{name} has other values")
    if not reasons:
        return None
    shown = "; ".join(reasons[:3]) + (f"; and {len(reasons) - 3} more" if len(reasons) > 3 else "")
    return f"{len(reasons)} of {len(ours.keys() | theirs.keys())} tensors differ ({shown})"


def split_signature(signature: str) -> tuple[str, str]:
    """("F32 [2, 4]", digest) of "F32 [2, 4] digest"; the digest may be missing."""
    kind, _, digest = signature.partition("] ")
    return f"{kind.removesuffix(']')}]", digest


__all__ = ["fingerprint", "signatures_of"]
