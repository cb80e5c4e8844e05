"""RoE-LLaVA: Routing Experts for LLaVA, a Hugging Face Transformers plug-in."""

import importlib

_WHERE = {
    "RoeLlavaConfig": "configuration_roe",
    "RoeCache": "cache_roe",
    "SkipCalibration": "calibration_roe",
    "RoutingPhase": "routing_roe",
    "RoeLlavaProcessor": "processing_roe",
    "RoeLlavaForConditionalGeneration": "modeling_roe_llava",
    "RoeLlavaModel": "modeling_roe_llava",
    "FrontendLlavaConfig": "configuration_frontend",
    "FrontendLlavaForConditionalGeneration": "modeling_frontend",
    "FrontendLlavaModel": "modeling_frontend",
    "LlavaHrVisionConfig": "configuration_hr_vision",
    "LlavaHrVisionModel": "vision_hr",
    "RoeLlavaNextConfig": "configuration_roe_family",
    "RoeLlavaOnevisionConfig": "configuration_roe_family",
    "RoeVipLlavaConfig": "configuration_roe_family",
    "RoeLlavaNextProcessor": "processing_roe_family",
    "RoeLlavaOnevisionProcessor": "processing_roe_family",
    "RoeLlavaNextForConditionalGeneration": "modeling_roe_family",
    "RoeLlavaNextModel": "modeling_roe_family",
    "RoeLlavaOnevisionForConditionalGeneration": "modeling_roe_family",
    "RoeLlavaOnevisionModel": "modeling_roe_family",
    "RoeVipLlavaForConditionalGeneration": "modeling_roe_family",
    "RoeVipLlavaModel": "modeling_roe_family",
    "MoeLlavaConfig": "configuration_moe_llava",
    "MoeLlavaForConditionalGeneration": "modeling_moe_llava",
    "MoeLlavaModel": "modeling_moe_llava",
    "RoeMoeLlavaConfig": "configuration_roe_moe",
    "RoeMoeLlavaForConditionalGeneration": "modeling_roe_moe",
    "RoeMoeLlavaModel": "modeling_roe_moe",
}


def __getattr__(name):
    # Imported on first use: the command line answers --help without loading torch.
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)


__all__ = sorted(_WHERE)
