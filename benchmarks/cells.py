"""Cells of a benchmark that takes hours: each is a file, so that it can be interrupted, and shared by processes."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol

from ..convert.output import replace_json
from .environment import git_commit


class Cell(Protocol):
    """One of the runs a benchmark consists of; `name` is its file's."""

    name: str


def do_cells(
    cells: Iterable[Cell], folder: Path, made_with: dict, make: Callable[[Cell], dict], about: Callable[[Cell], dict]
) -> Iterator[tuple[Cell, dict]]:
    """Every cell's result; those on disk are not made again.

    Args:
        folder: of the files.
        made_with: the settings that a result depends on, as JSON has them.
        make: makes what is missing.
        about: what tells a cell from others, for its file.
    Raises: ValueError if one on disk was made with other settings.
    """
    for cell in cells:
        path = folder / f"{cell.name}.json"
        if path.is_file():
            result = json.loads(path.read_text())
            if result["made_with"] != made_with:
                raise ValueError(f"{path} was made with {result['made_with']}, not {made_with}: take another --out")
        else:
            print(f"{cell.name} ...", flush=True)
            result = about(cell) | {"commit": git_commit(), "made_with": made_with} | make(cell)
            replace_json(path, result)
        yield cell, result


__all__ = ["do_cells"]
