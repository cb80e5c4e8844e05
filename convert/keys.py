"""Names of tensors: in memory, on disk, and which of them RoE adds.

Tables of full-match patterns; a name that no pattern matches is left to the caller, who has to say what it is.
"""

import re

# Where the language model's tensors begin: on disk as llava-hf writes them, and as the model holds them. Some
# checkpoints were saved with the names in memory; a routing part follows the base it is put onto.
DISK_PREFIX = "language_model.model."
MEMORY_PREFIX = "model.language_model."

# Tensors RoE adds, under either name, to their names in memory.
ROE_KEYS = {
    r"(?:language_model\.model|model\.language_model)\.layers\.(\d+)\.(router|adapter\.down_proj|adapter\.up_proj)"
    r"\.weight": r"model.language_model.layers.\1.\2.weight",
    r"(?:language_model\.model|model\.language_model)\.routing_tokens\.weight": (
        "model.language_model.routing_tokens.weight"
    ),
}

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


def renamed(name: str, table: dict[str, str]) -> str | None:
    """The new name by the one pattern that matches all of `name`; `None` if none does."""
    found = [re.sub(pattern, new, name) for pattern, new in table.items() if re.fullmatch(pattern, name)]
    assert len(found) <= 1, f"{name} is renamed twice: {found}"
    return found[0] if found else None


def is_unread(name: str) -> bool:
    """Whether a base tensor is one that no current model reads."""
    return any(re.fullmatch(pattern, name) for pattern in UNREAD_BASE_KEYS)
