"""Writes the card of the shipped tiny model: `python -m roe_llava.hub_card.tiny_world`.

Made from the shipped weights and the result files of this repository, and kept beside this file; a test says when it
is out of date.
"""

import shutil
import tempfile
from pathlib import Path

from ..convert.graft import graft
from ..examples.tiny_world.demo import SHIPPED
from .card import make_card
from .folder import open_folder

ROOT = Path(__file__).resolve().parents[1]
OUT = Path(__file__).with_name("tiny_world.md")
RESULTS = ("docs/demo.json",)
PICTURE = "../docs/routes.png"  # beside its results, where the README shows it too


def card_text() -> str:
    """The card of the shipped parts, grafted onto the shipped base."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "roe-llava-tiny-world"
        graft(SHIPPED / "base", SHIPPED / "roe", folder)
        shutil.copyfile(ROOT / "LICENSE", folder / "LICENSE")
        results = [ROOT / name for name in RESULTS]
        return make_card(open_folder(folder), results=results, picture=PICTURE).text


if __name__ == "__main__":
    OUT.write_text(card_text(), encoding="utf-8")
    print(f"wrote {OUT}")
