"""Names of tensors: in memory, on disk, and which of them RoE adds.

Tables of full-match patterns; a name that no pattern matches is left to the caller, who has to say what it is.
"""

import re

from ..adapter_roe import DISK_PREFIX, MEMORY_PREFIX, ROE_KEYS, renamed

# The base's tensors, as Transformers' own conversion of llava-hf checkpoints names them.
BASE_KEYS = {
    r"(?:language_model\.model|model\.language_model)\.(.+)": r"model.language_model.\1",
    r"(?:language_model\.)?lm_head\.(.+)": r"lm_head.\1",
    r"(?:model\.)?vision_tower\.(?:vision_model\.)?(.+)": r"model.vision_tower.\1",
    r"(?:model\.)?multi_modal_projector\.(.+)": r"model.multi_modal_projector.\1",
}

# Buffers that old checkpoints carry and no current model reads: copied with their shard, left out of comparisons.
UNREAD_BASE_KEYS = {
    r".*\.rotary_emb\.inv_freq": "rotary frequencies are computed from the config",
    r".*\.embeddings\.position_ids": "positions are counted, not stored",
}


def is_unread(name: str) -> bool:
    """Whether a base tensor is one that no current model reads."""
    return any(re.fullmatch(pattern, name) for pattern in UNREAD_BASE_KEYS)


__all__ = ["BASE_KEYS", "DISK_PREFIX", "MEMORY_PREFIX", "ROE_KEYS", "UNREAD_BASE_KEYS", "is_unread", "renamed"]
