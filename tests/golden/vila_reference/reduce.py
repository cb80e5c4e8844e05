"""Reduce the full recording to what the golden tests read: `python reduce.py SOURCE TARGET`."""

import json
import lzma
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save

COPIED = ("checkpoint_v1_linear", "checkpoint_v1_mlp2x", "checkpoint_v15", "vision_tower_clip", "images")
RECORDED = ("vision_v1", "vision_v15", "prompts_v1", "prompts_v15")
# Results are kept as multiples of 2**-20 (an error of 5e-7); the test helpers undo it by the name's ending. Pictures,
# and weights, inputs and cells of single projectors, stay as they are.
BITS = 20
EXACT = ("input", "weights", "downsampled", "pixel_values")
LEFT_OUT = ("siglip/pixel_values",)  # two of the preprocessed pictures once more


def packed(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    """A result as integers, its precision in its name."""
    if not tensor.is_floating_point():
        return name, tensor.to(torch.int16)
    if any(part in EXACT for part in name.split("/")):
        return name, tensor
    return f"{name}@{BITS}", (tensor.double() * 2**BITS).round().to(torch.int32)


def manifest(source: Path) -> dict:
    """Prompts, projectors and zero rows, as the recording describes them."""
    old, new = (json.loads((source / f"manifest_{name}.json").read_text()) for name in ("v1", "v15"))
    prompts = {"linear": old["prompts_v1_linear"], "mlp2x": old["prompts_v1_mlp2x"], "v15": new["prompts_v15"]}
    return {"prompts": prompts, "projectors": new["projectors"], "position_resize": new["position_resize"]["to"]}


def main(source: Path, target: Path) -> None:
    for name in COPIED:
        shutil.copytree(source / name, target / name, dirs_exist_ok=True, copy_function=shutil.copyfile)
    for name in RECORDED:
        found = load_file(source / f"{name}.safetensors")
        tensors = dict(packed(key, one.clone()) for key, one in found.items() if key not in LEFT_OUT)
        (target / f"{name}.safetensors.xz").write_bytes(lzma.compress(save(tensors), preset=9))
    (target / "manifest.json").write_text(json.dumps(manifest(source), indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
