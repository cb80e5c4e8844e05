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
    r"(?:model\.)?image_newline": r"model.image_newline",
}

# The original LLaVA layout, to names on disk in llava-hf layout.
_TEXT = (
    r"((?:embed_tokens|norm)\.weight"
    r"|layers\.\d+\.(?:input_layernorm|post_attention_layernorm)\.weight"
    r"|layers\.\d+\.(?:self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)\.(?:weight|bias))"
)
ORIGINAL_KEYS = {
    rf"model\.{_TEXT}": r"language_model.model.\1",
    r"lm_head\.weight": r"language_model.lm_head.weight",
    r"model\.mm_projector\.0\.(weight|bias)": r"multi_modal_projector.linear_1.\1",
    r"model\.mm_projector\.2\.(weight|bias)": r"multi_modal_projector.linear_2.\1",
    r"model\.vision_tower\.vision_tower\.vision_model\.((?!.*\bposition_ids).+)": r"vision_tower.vision_model.\1",
}

# VILA 1.5: names within llm/, and within vision_tower/. A projector's names depend on its type (vila_layout.py).
VILA_TEXT_KEYS = {name: new for name, new in ORIGINAL_KEYS.items() if "language_model" in new}
VILA_TOWER_DROPPED = {r"vision_model\.head\..+": "SigLIP's pooling head, which image features do not go through"}

# What published RoE adds to it. The two routing tokens are tensors of one row each.
PUBLISHED_ROE_KEYS = {
    r"model\.layers\.(\d+)\.adapter_MHA_router\.expert\.0\.weight": r"language_model.model.layers.\1.router.weight",
    r"model\.layers\.(\d+)\.adapter_MHA\.conv_A\.weight": r"language_model.model.layers.\1.adapter.down_proj.weight",
    r"model\.layers\.(\d+)\.adapter_MHA\.conv_B\.weight": r"language_model.model.layers.\1.adapter.up_proj.weight",
}
PUBLISHED_TOKENS = ("model.adapter_image_token.weight", "model.adapter_text_token.weight")  # rows 0 and 1
ROUTING_TOKENS = "language_model.model.routing_tokens.weight"

# A CLIP folder beside such a checkpoint, to llava-hf layout.
TOWER_KEYS = {r"vision_model\.((?!.*\bposition_ids).+)": r"vision_tower.vision_model.\1"}
TOWER_DROPPED = {
    r"text_model\..+": "CLIP's text half, which LLaVA does not use",
    r"(?:text|visual)_projection\.weight": "CLIP's projections, which LLaVA does not use",
    r"logit_scale": "CLIP's temperature, which LLaVA does not use",
}

# Buffers of either, which can be computed.
ROTARY_BUFFERS = r"model\.(?:layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
POSITION_BUFFERS = r"(?:model\.vision_tower\.vision_tower\.)?vision_model\.embeddings\.position_ids"

# Names in memory to the published layout.
EXPORT_KEYS = {
    rf"model\.language_model\.{_TEXT}": r"model.\1",
    r"lm_head\.weight": r"lm_head.weight",
    r"model\.multi_modal_projector\.linear_1\.(weight|bias)": r"model.mm_projector.0.\1",
    r"model\.multi_modal_projector\.linear_2\.(weight|bias)": r"model.mm_projector.2.\1",
    r"model\.vision_tower\.(.+)": r"model.vision_tower.vision_tower.vision_model.\1",
    r"model\.language_model\.layers\.(\d+)\.router\.weight": r"model.layers.\1.adapter_MHA_router.expert.0.weight",
    r"model\.language_model\.layers\.(\d+)\.adapter\.down_proj\.weight": r"model.layers.\1.adapter_MHA.conv_A.weight",
    r"model\.language_model\.layers\.(\d+)\.adapter\.up_proj\.weight": r"model.layers.\1.adapter_MHA.conv_B.weight",
}

__all__ = ["BASE_KEYS", "DISK_PREFIX", "MEMORY_PREFIX", "ROE_KEYS", "UNREAD_BASE_KEYS", "is_unread", "renamed"]
