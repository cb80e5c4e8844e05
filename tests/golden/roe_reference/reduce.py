"""Reduce the full recording to what `tests/test_golden.py` reads: `python reduce.py SOURCE TARGET`."""

import json
import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

PREFILL = ("router_logits", "keep", "logits", "tokens")
TRAINING = (
    "router_logits_raw",
    "router_weights",
    "skip_per_layer",
    "skip_loss",
    "task_loss",
    "total_loss",
    "logits",
    "uniforms",
)
GRADIENTS = (
    "model.layers.0.adapter_MHA.conv_A.weight",
    "model.layers.2.adapter_MHA.conv_B.weight",
    "model.layers.0.adapter_MHA_router.expert.0.weight",
    "model.layers.3.adapter_MHA_router.expert.0.weight",
    "model.adapter_image_token.weight",
    "model.adapter_text_token.weight",
    "model.norm.weight",
)
# One configuration per stage and batch where that says something new.
CONFIGS = {"A": ("s0_b0.2254", "s1_t1_b0.2254", "s2_t1"), "B": ("s1_t10_b0.2254",)}


def prompts(tensors: dict, names: list[str]) -> dict:
    """Inputs and prefill results of the variant with an attention mask."""
    kept = {}
    for name in names:
        for key in ("input_ids", "pixel_values", "question_mask"):
            kept[f"{name}/{key}"] = tensors[f"{name}/{key}"]
        for key in PREFILL:
            kept[f"{name}/{key}"] = tensors[f"{name}/mask/{key}"]
    for key in tensors:
        if key.startswith("layer0_skip/") and "/none/" not in key:
            name = key.replace("/mask/", "/")
            if key.endswith("expert.0.weight") or name.rsplit("/", 1)[-1] in PREFILL:
                kept[name] = tensors[key]
    return kept


def training(tensors: dict, manifest: dict) -> tuple[dict, dict]:
    """Batches and results of some configurations, and their settings."""
    kept, settings = {}, {}
    for batch, configs in CONFIGS.items():
        for key in ("input_ids", "attention_mask", "images", "question_mask", "weight_mask", "labels_padded"):
            kept[f"{batch}/{key}"] = tensors[f"{batch}/{key}"]
        for config in configs:
            found = manifest["batches"][batch]["configs"][config]
            settings[f"{batch}/{config}"] = {key: found[key] for key in ("stage", "temp", "bias", "skip_ratio")}
            for key in TRAINING:
                if f"{batch}/{config}/{key}" in tensors:
                    kept[f"{batch}/{config}/{key}"] = tensors[f"{batch}/{config}/{key}"]
            for key in GRADIENTS:
                if f"{batch}/{config}/grad/{key}" in tensors:
                    kept[f"{batch}/{config}/grad/{key}"] = tensors[f"{batch}/{config}/grad/{key}"]
    return kept, settings


def main(source: Path, target: Path) -> None:
    """Write checkpoint, configurations, prompts, training batches and settings."""
    manifest = json.loads((source / "manifest.json").read_text())
    shutil.copyfile(source / "checkpoint" / "pytorch_model.bin", target / "pytorch_model.bin")
    shutil.copyfile(source / "checkpoint" / "config.json", target / "config.json")
    shutil.copyfile(source / "vision_tower" / "config.json", target / "vision_config.json")
    names = list(manifest["inference"]["prompts"])
    save_file(prompts(load_file(source / "inference.safetensors"), names), target / "inference.safetensors")
    kept, settings = training(load_file(source / "training.safetensors"), manifest["training"])
    save_file(kept, target / "training.safetensors")
    (target / "training.json").write_text(json.dumps(settings, indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
