"""The code that a folder carries for `trust_remote_code=True`, found and copied."""

import shutil
from pathlib import Path
from types import ModuleType

from transformers.dynamic_module_utils import get_relative_import_files

from .. import configuration_frontend, modeling_frontend


def code_of(*modules: ModuleType) -> dict[str, Path]:
    """Name to place of every file that modules need.

    The list is what Transformers itself finds by following relative imports.
    """
    needed = {
        Path(file) for module in modules for file in [module.__file__, *get_relative_import_files(module.__file__)]
    }
    return {path.name: path for path in sorted(needed)}


def copy_code(files: dict[str, Path], folder: Path) -> list[str]:
    """Copy code into a folder; names of the files."""
    for name, path in files.items():
        shutil.copyfile(path, folder / name)
    return [*files]


def write_frontend_code(folder: Path) -> list[str]:
    """Copy the code of a base with a front-end of ours; names of the files."""
    return copy_code(code_of(configuration_frontend, modeling_frontend), folder)
