"""Writes the tiny world as LLaVA's conversation JSON.

    python -m roe_llava.examples.tiny_world.export OUT --number 200

OUT holds `train.json` (or the other split's name) and `images/`, so image paths are relative to OUT.
"""

import argparse
import json
from pathlib import Path

from tqdm import tqdm

from ...convert.output import new_folder
from .world import SPLITS, TinyWorld


def row_of(example: dict, id: str, image: str) -> dict:
    """An example of `TinyWorld` as a row of LLaVA's; the picture stands before the first question."""
    said = []
    for question, answer, _ in example["turns"]:
        said.append({"from": "human", "value": question if said else f"<image>\n{question}"})
        said.append({"from": "gpt", "value": answer})
    return {"id": id, "image": image, "conversations": said, "families": [family for *_, family in example["turns"]]}


def export(world: TinyWorld, out: str | Path, overwrite: bool = False) -> Path:
    """A world's examples in LLaVA's format, pictures as PNG.

    Args:
        out: folder to write; it appears when it is whole.
        overwrite: replace what is there.
    Returns: the JSON file.
    Raises: ValueError if the folder exists and is not to be overwritten.
    """
    name = f"{world.split}.json"
    with new_folder(out, overwrite) as folder:
        (folder / "images").mkdir()
        rows = []
        for index in tqdm(range(len(world)), desc=f"writing {out}"):
            example, id = world[index], f"{world.split}-{world.seed}-{index:06d}"
            example["image"].save(folder / "images" / f"{id}.png")
            rows.append(row_of(example, id, f"images/{id}.png"))
        (folder / name).write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return Path(out) / name


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--number", type=int, default=200, help="conversations")
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other scenes")
    parser.add_argument("--turns", type=int, default=3, help="most questions per conversation")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing folder")
    args = parser.parse_args(arguments)
    if args.number < 1 or args.turns < 1:
        parser.error(f"--number and --turns must be at least 1, got {args.number} and {args.turns}")
    world = TinyWorld(args.split, args.number, seed=args.seed, num_turns=args.turns)
    print(f"wrote {export(world, args.out, args.overwrite)}")


if __name__ == "__main__":
    main()
