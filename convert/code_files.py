"""The code that a folder carries for `trust_remote_code=True`, found and copied."""

import inspect
import shutil
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

from ..modeling_frontend import FrontendLlavaForConditionalGeneration


def code_of(*classes: type) -> dict[str, Path]:
    """Name to place of every file that classes need.

    The list is what Transformers itself finds by following relative imports.
    """
    entries = [inspect.getfile(cls) for cls in classes]
    needed = {Path(file) for entry in entries for file in [entry, *get_relative_import_files(entry)]}
    return {path.name: path for path in sorted(needed)}


def copy_code(files: dict[str, Path], folder: Path) -> list[str]:
    """Copy code into a folder; names of the files."""
    for name, path in files.items():
        shutil.copyfile(path, folder / name)
    return [*files]


def frontend_code() -> dict[str, Path]:
    """As `code_of`, for a base with a front-end of ours."""
    cls = FrontendLlavaForConditionalGeneration
    return code_of(cls.config_class, cls)


def write_frontend_code(folder: Path) -> list[str]:
    """Copy the code of a base with a front-end of ours; names of the files."""
    return copy_code(frontend_code(), folder)
