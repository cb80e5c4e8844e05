"""The code that a folder with experts carries, for `trust_remote_code=True`."""

from pathlib import Path

from .. import configuration_moe_llava, modeling_moe_llava
from .code_files import code_of, copy_code


def moe_code_files() -> dict[str, Path]:
    """Name to place of every file of it."""
    return code_of(configuration_moe_llava, modeling_moe_llava)


def write_moe_code(folder: Path) -> list[str]:
    """Copy that code; names of the files."""
    return copy_code(moe_code_files(), folder)
