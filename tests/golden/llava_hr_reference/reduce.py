"""Reduce the full recording to what the golden tests read: `python reduce.py SOURCE TARGET`."""

import json
import lzma
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save

# Results of a tower case that are recorded for all tokens: every fourth is kept. Maps of the slow tower that are not
# recorded in part already: every second row and column.
TOKENS = ("features", "projected")
MAPS = ("slow_stage2", "slow_stage3")
# Of no use here: the pictures themselves give them exactly.
LEFT_OUT = ("pixel_values_sub",)
ABOUT = ("tower_cases", "preprocess", "module_cases", "prompts", "sizes")


def reduced(tensors: dict, cases: dict) -> dict:
    """The vision tower's recording, thinned; single modules and preprocessing as they are."""
    kept = {}
    for name, tensor in tensors.items():
        case, _, what = name.rpartition("/")
        if case in cases and what in LEFT_OUT:
            continue
        if case in cases and what in TOKENS and cases[case]["features_all_tokens"]:
            tensor = tensor[:, ::4]
        if case in cases and what in MAPS:
            tensor = tensor[:, :, ::2, ::2]
        kept[name] = tensor
    return kept


def write(path: Path, tensors: dict) -> None:
    small = {name: t.to(torch.int16) if t.dtype == torch.int64 else t for name, t in tensors.items()}
    packed = save({name: tensor.contiguous() for name, tensor in small.items()})
    path.write_bytes(lzma.compress(packed, preset=9))


def main(source: Path, target: Path) -> None:
    manifest = json.loads((source / "manifest.json").read_text())
    (target / "manifest.json").write_text(json.dumps({name: manifest[name] for name in ABOUT}, indent=1) + "\n")
    write(target / "tower.safetensors.xz", reduced(load_file(source / "tower.safetensors"), manifest["tower_cases"]))
    for name in ("tower_x", "prompts"):
        write(target / f"{name}.safetensors.xz", load_file(source / f"{name}.safetensors"))
    for folder, files in {
        "checkpoint": ("config.json", "generation_config.json", "pytorch_model.bin"),
        "vision_tower": ("config.json", "preprocessor_config.json"),
    }.items():
        (target / folder).mkdir(exist_ok=True)
        for file in files:
            shutil.copyfile(source / folder / file, target / folder / file)
    (target / "images").mkdir(exist_ok=True)
    for path in (source / "images").glob("*.png"):
        if not path.stem.endswith("_padded"):
            shutil.copyfile(path, target / "images" / path.name)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
