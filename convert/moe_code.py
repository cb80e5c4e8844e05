"""The code that a folder with experts carries, for `trust_remote_code=True`."""

import shutil
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

from .. import configuration_moe_llava, modeling_moe_llava


def moe_code_files() -> dict[str, Path]:
    """Name to place of every file of it, as Transformers itself finds them by following relative imports."""
    entries = [module.__file__ for module in (configuration_moe_llava, modeling_moe_llava)]
    needed = {Path(file) for entry in entries for file in [entry, *get_relative_import_files(entry)]}
    return {path.name: path for path in sorted(needed)}


def write_moe_code(folder: Path) -> list[str]:
    """Copy that code; names of the files."""
    needed = moe_code_files()
    for name, path in needed.items():
        shutil.copyfile(path, folder / name)
    return [*needed]
