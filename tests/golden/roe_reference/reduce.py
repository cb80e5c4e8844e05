"""Reduce the full recording to what the golden tests read: `python reduce.py SOURCE TARGET`."""

import json
import lzma
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save, save_file

PREFILL = ("router_logits", "keep", "logits", "tokens")
TRAINING = (
    "router_logits_raw",
    "router_weights",
    "skip_per_layer",
    "skip_loss",
    "task_loss",
    "total_loss",
    "logits",
    "hidden",
    "uniforms",
)
BATCH = ("input_ids", "labels", "attention_mask", "images", "question_mask", "weight_mask", "labels_padded")
BATCH += ("question_mask_norm",)
# All configurations of A and B; of C one, without gradients, for its hidden states.
ONLY = {"C": ("s1_t1_b0.2254",)}
# Large results are kept as multiples of 2**-bits: an error of 8e-6 against a tolerance of 5e-5 on states and logits, of
# 5e-7 against 1e-5 on gradients. The test helpers undo it by the name's ending.
BITS = {"hidden": 16, "logits": 16, "grad": 20}


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
    """Batches and results of their configurations, and the settings of those."""
    kept, settings = {key: tensors[key] for key in tensors if key.startswith("keepskew/")}, {}
    for batch, found in manifest["batches"].items():
        kept |= {f"{batch}/{key}": tensors[f"{batch}/{key}"] for key in BATCH}
        for config in ONLY.get(batch, found["configs"]):
            about, name = found["configs"][config], f"{batch}/{config}"
            known = ("stage", "temp", "bias", "skip_ratio", "keepskew", "grads_none", "same_as")
            settings[name] = {key: about[key] for key in known if key in about}
            kept |= {f"{name}/{key}": tensors[f"{name}/{key}"] for key in TRAINING if f"{name}/{key}" in tensors}
            if batch not in ONLY:
                kept |= {key: tensors[key] for key in tensors if key.startswith(f"{name}/grad/")}
    return kept, settings


def packed(tensors: dict) -> dict:
    """Large results as integers (`NAME@BITS`), integers in the smallest type that holds them."""
    kept = {}
    for name, tensor in tensors.items():
        bits = next((BITS[part] for part in name.split("/")[2:3] if part in BITS), None)
        if bits is not None:
            kept[f"{name}@{bits}"] = (tensor.double() * 2**bits).round().int()
        elif not tensor.is_floating_point():
            smallest = next(t for t in (torch.uint8, torch.int16, torch.int32) if torch.equal(tensor.to(t), tensor))
            kept[name] = tensor.to(smallest)
        else:
            kept[name] = tensor
    return kept


def save_packed(tensors: dict, path: Path) -> None:
    """A safetensors file, packed and compressed."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "lp": 2, "pb": 2}]
    path.write_bytes(lzma.compress(save(packed(tensors)), filters=filters))


def main(source: Path, target: Path) -> None:
    """Write checkpoint, configurations, prompts, training batches, their settings, masks and schedules."""
    manifest = json.loads((source / "manifest.json").read_text())
    shutil.copyfile(source / "checkpoint" / "pytorch_model.bin", target / "pytorch_model.bin")
    shutil.copyfile(source / "checkpoint" / "config.json", target / "config.json")
    shutil.copyfile(source / "vision_tower" / "config.json", target / "vision_config.json")
    names = list(manifest["inference"]["prompts"])
    save_file(prompts(load_file(source / "inference.safetensors"), names), target / "inference.safetensors")
    kept, settings = training(load_file(source / "training.safetensors"), manifest["training"])
    save_packed(kept, target / "training.safetensors.xz")
    (target / "training.json").write_text(json.dumps(settings, indent=1) + "\n")
    for name in ("masks", "schedule"):
        save_packed(load_file(source / f"{name}.safetensors"), target / f"{name}.safetensors.xz")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
