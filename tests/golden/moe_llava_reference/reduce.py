"""Reduce the full recording to what the golden tests read: `python reduce.py SOURCE TARGET`."""

import json
import lzma
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save

SETS = ("llama", "mistral", "phi", "stablelm")
TOWER = "openai/tiny-clip-28"
# Hidden states and outputs of blocks are the bulk: kept for these.
WITH_STATES = ("p00_short", "pad2")
INFERENCE = ("input_ids", "pixel_values", "router_logits", "experts", "weights", "logits", "tokens", "step_logits")
INFERENCE += ("decode_router_logits", "decode_experts", "decode_weights", "decode_position_ids", "position_ids")
INFERENCE += ("dense_logits", "converted_logits")
INFERENCE += ("gumbel", "attention_mask", "attention_mask_spliced", "l_aux", "moe_loss", "first_token")
STATES = ("hidden", "moe_out", "decode_hidden")
TRAINING = ("router_logits", "experts", "weights", "kept", "l_aux", "lm_loss", "moe_loss", "total_loss")
TRAINING += ("gumbel", "rts_uniform")
BATCH = ("input_ids", "attention_mask", "images", "attention_mask_spliced", "labels_spliced")
# Large results are kept as multiples of 2**-bits: an error of 8e-6 against a tolerance of 5e-5 on states and logits, of
# 5e-7 against 5e-6 on gradients. The test helpers undo it by the name's ending.
BITS = {"dense_logits": 16, "converted_logits": 16} | {
    "hidden": 16,
    "decode_hidden": 16,
    "moe_out": 16,
    "logits": 16,
    "step_logits": 16,
    "grad": 20,
}


def inference(tensors: dict) -> dict:
    """Prompts and what was recorded of them, hidden states of a few."""
    kept = {}
    for name, tensor in tensors.items():
        prompt, last = name.split("/")[0], name.split("/")[-1]
        if last in INFERENCE or (last in STATES and prompt in WITH_STATES):
            kept[name] = tensor
    return kept


def training(tensors: dict, manifest: dict) -> tuple[dict, dict]:
    """Batches, results of their settings, and the settings themselves."""
    kept, settings = {name: tensor for name, tensor in tensors.items() if name.startswith("skew/")}, {}
    for batch, found in manifest.items():
        kept |= {f"{batch}/{key}": tensors[f"{batch}/{key}"] for key in BATCH}
        for config, about in found["configs"].items():
            name = f"{batch}/{config}"
            known = ("top_k", "capacity_factor", "min_capacity", "noise", "capacity")
            settings[name] = {key: about[key] for key in known if key in about}
            kept |= {f"{name}/{key}": tensors[f"{name}/{key}"] for key in TRAINING if f"{name}/{key}" in tensors}
            kept |= {key: tensors[key] for key in tensors if key.startswith(f"{name}/grad/")}
    return kept, settings


def converted_routers(folder: Path) -> dict:
    """Routers of the conversion to experts; its experts are the dense MLPs."""
    tensors = torch.load(folder / "converted_checkpoint" / "pytorch_model.bin", weights_only=True)
    return {name: tensor for name, tensor in tensors.items() if name.endswith("gate.wg.weight")}


def packed(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    """A large result as integers, its precision in its name."""
    kind = "grad" if "/grad/" in name else name.split("/")[-1]
    if kind not in BITS or not tensor.is_floating_point():
        return name, tensor.to(torch.int16) if tensor.dtype == torch.int64 else tensor
    return f"{name}@{BITS[kind]}", (tensor.double() * 2 ** BITS[kind]).round().to(torch.int32)


def write(path: Path, tensors: dict) -> None:
    path.write_bytes(lzma.compress(save(dict(packed(name, one.clone()) for name, one in tensors.items())), preset=9))


def main(source: Path, target: Path) -> None:
    manifest = json.loads((source / "manifest.json").read_text())
    for name in SETS:
        (target / name / "checkpoint").mkdir(parents=True, exist_ok=True)
        (target / name / TOWER).mkdir(parents=True, exist_ok=True)
        for file in ("config.json", "pytorch_model.bin"):
            shutil.copyfile(source / name / "checkpoint" / file, target / name / "checkpoint" / file)
        if (dense := source / name / "dense_checkpoint").is_dir():
            shutil.copytree(dense, target / name / "dense_checkpoint", dirs_exist_ok=True)
            write(target / name / "converted_routers.safetensors.xz", converted_routers(source / name))
        for file in ("config.json", "preprocessor_config.json", "pytorch_model.bin"):
            shutil.copyfile(source / name / TOWER / file, target / name / TOWER / file)
        write(target / name / "inference.safetensors.xz", inference(load_file(source / name / "inference.safetensors")))
        if (recorded := source / name / "training.safetensors").is_file():
            kept, settings = training(load_file(recorded), manifest[name]["training"])
            write(target / name / "training.safetensors.xz", kept)
            (target / name / "training.json").write_text(json.dumps(settings, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
