"""Names of tensors: in memory, on disk, and which of them RoE adds.

Tables of full-match patterns; a name that no pattern matches is left to the caller, who has to say what it is.
"""

from ..adapter_roe import DISK_PREFIX, MEMORY_PREFIX, ROE_KEYS, UNREAD_BASE_KEYS, is_unread, renamed

# The base's tensors, as Transformers' own conversion of llava-hf checkpoints names them.
BASE_KEYS = {
    r"(?:language_model\.model|model\.language_model)\.(.+)": r"model.language_model.\1",
    r"(?:language_model\.)?lm_head\.(.+)": r"lm_head.\1",
    r"(?:model\.)?vision_tower\.(?:vision_model\.)?(.+)": r"model.vision_tower.\1",
    r"(?:model\.)?multi_modal_projector\.(.+)": r"model.multi_modal_projector.\1",
}

__all__ = ["BASE_KEYS", "DISK_PREFIX", "MEMORY_PREFIX", "ROE_KEYS", "UNREAD_BASE_KEYS", "is_unread", "renamed"]
