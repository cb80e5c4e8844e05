"""Where a checkpoint comes from: a folder, or the Hub through huggingface_hub."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..adapter_roe import ABOUT_NAME, WEIGHTS_NAME, expanded, read_json

# What is taken from the Hub beside weights; a base's code is not run here.
COMPANIONS = ["*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "NOTICE*", "USE_POLICY*"]


@dataclass(frozen=True)
class Source:
    """A checkpoint on this disk.

    Attributes:
        folder: where it is.
        id: Hub id, or the folder's name.
        revision: commit of a Hub id, else `None`.
    """

    folder: Path
    id: str
    revision: str | None = None


def resolve_source(source: str | Path, revision: str | None = None) -> Source:
    """A folder as it is; a Hub id is downloaded into the Hub's cache (or found there).

    Raises: ValueError if it is neither, or a revision is given for a folder; OSError if the download fails.
    """
    folder = expanded(source)
    if folder.name in (ABOUT_NAME, WEIGHTS_NAME) and folder.is_file():
        folder = folder.parent  # an adapter is both files
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"revision {revision!r} given with the folder {folder}: only a Hub id has revisions")
        return Source(folder, folder.resolve().name)
    if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) or str(source).startswith((".", "/")):
        raise ValueError(f"{source} is not a checkpoint folder, and no Hub id (owner/name) either: is the path right?")
    return download(str(source), revision)


def download(repo_id: str, revision: str | None) -> Source:
    """Snapshot of a Hub repository; found in the cache where there is no network."""
    from huggingface_hub import snapshot_download

    try:
        # Every failure of the network ends as an OSError here; other calls of the Hub client let its own errors out.
        folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=[*COMPANIONS, "*.safetensors"]))
        if not any(
            [*folder.glob("*.safetensors"), *folder.glob("llm/*.safetensors")]
        ):  # never both formats: one is as large as the other
            folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=[*COMPANIONS, "*.bin"]))
    except OSError as error:
        where = f"{repo_id} (revision {revision})" if revision else repo_id
        raise ValueError(f"{where} is no folder here and cannot be had from the Hub: {reason_of(error)}") from error
    return Source(folder, repo_id, folder.name)


def reason_of(error: OSError) -> str:
    """Why a download failed, in a line."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    kinds = {  # a gated repository is one that was not found, to huggingface_hub
        GatedRepoError: "it is gated; ask for access on its page, and log in (hf auth login)",
        RepositoryNotFoundError: "there is no such repository, or the token at hand may not read it",
        RevisionNotFoundError: "the repository has no such branch, tag or commit",
    }
    known = next((reason for kind, reason in kinds.items() if isinstance(error, kind)), None)
    return known or (str(error).strip().splitlines() or [type(error).__name__])[0]


def check_text_config(config: dict, path: Path) -> None:
    """Check that a config.json has a language model, which would be filled up with the sizes of a 7B Llama.

    Raises: ValueError naming the file.
    """
    if not isinstance(config.get("text_config"), dict):
        raise ValueError(f"{path} has no text_config, expected the language model's configuration: is the file whole?")


@contextmanager
def blamed_on(path: Path) -> Iterator[None]:
    """Has errors of the libraries name the file they come from.

    Raises: ValueError with the reason, whatever kind of error it was; one that names the file already stays as it is.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError | OSError) and str(path) in str(error):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} does not hold what Transformers needs: {type(error).__name__}: {reason}") from error


__all__ = ["Source", "blamed_on", "check_text_config", "expanded", "read_json", "resolve_source"]
