"""What never goes to the Hub: a local path, a token, weights that are not all there, or not those that would be read.

`model.push_to_hub` is checked here, as far as Transformers lets a model look at what is sent; `roe-llava push` checks
the same and more.
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors import safe_open
from transformers.utils.hub import has_file

from .listing_roe import listed

# User tokens and those of organisations; real ones are longer, names like hf_hub_download hold further underscores.
TOKEN = re.compile(r"\b(?:hf|api_org|hf_oauth)_[A-Za-z0-9]{20,}\b")
ROOTS = (
    "home|Users|root|tmp|var|mnt|media|data|scratch|opt|srv|usr|private|work|workspace|content|kaggle|gpfs|lustre|nfs"
)
# In text, only what begins like a path of some machine: prose and links hold slashes, too.
LOCAL_PATH = re.compile(
    rf"(?:^|(?<=[\s\"'`(=,:\[]))(?:file://|~/|[A-Za-z]:\\|/(?:{ROOTS})/)[^\s\"'`)\],;]+", flags=re.MULTILINE
)
# A value of a JSON file that is a path as a whole, whatever it begins with.
WHOLE_PATH = re.compile(r"/[\w.+@-]+(?:/[\w.+@ -]+)+/?")
TEXT_SUFFIXES = (".json", ".jinja", ".txt", ".md", ".py", ".yaml", ".yml")
# Their words are the tokenizer's vocabulary, which may hold any path.
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json")


class HubMixin:
    """`push_to_hub` that sends nothing which would open elsewhere as another model, or not at all."""

    def push_to_hub(self, *args, **kwargs):
        """As in Transformers: weights, config and code in one commit; the processor has a `push_to_hub` of its own.

        Raises: ValueError if the config holds a local path or a token, if a tensor is missing, or if the repository
            holds weights that would be read in place of these.
        """
        check_text("config.json", self.config.to_json_string())  # before a repository is made
        return super().push_to_hub(*args, **kwargs)

    def lacking_parts(self, names: Iterable[str]) -> set[str]:
        """What decides in this model (routers and what belongs to them) and is not among the names on disk.

        Each class says it: a lost one of these is worse than a tensor more or less, which are counted.
        """
        raise NotImplementedError

    def _upload_modified_files(self, working_dir, repo_id, *args, **kwargs):
        """Called by Transformers with the saved files, before anything is sent."""
        folder = Path(working_dir)
        check_texts(folder)
        if getattr(self, "_hf_peft_config_loaded", False):  # LoRA matrices alone are saved then
            return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)
        names = tensor_names(folder)
        lost = len(self.state_dict()) - len(self.all_tied_weights_keys or {}) - len(names)
        if lost > 0:
            raise ValueError(
                f"{lost} of the model's tensors would not be in {repo_id}: was it saved with a part of its state_dict?"
            )
        if absent := sorted(self.lacking_parts(names)):
            raise ValueError(f"{listed(absent)} would not be in {repo_id}: was it saved with a part of its state_dict?")
        if not (folder / "model.safetensors").is_file():
            check_not_hidden(repo_id, kwargs.get("revision"), kwargs.get("token"))
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)


def tensor_names(folder: Path) -> dict[str, str]:
    """Name on disk to file of every tensor in a folder's safetensors files, of which headers alone are read."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= dict.fromkeys(file.keys(), path.name)
    return found


def check_not_hidden(repo_id: str, revision: str | None, token) -> None:
    """Raises: ValueError if a repository holds weights in one file, which are read where shards are there, too."""
    try:
        is_there = has_file(repo_id, "model.safetensors", revision=revision, token=token)
    except OSError:  # a new branch, which begins as the main one
        is_there = has_file(repo_id, "model.safetensors", token=token)
    if is_there:
        raise ValueError(
            f"{repo_id} holds model.safetensors, which would be read in place of the shards that are sent: delete it "
            "there, or save into a folder and use roe-llava push, which replaces weights as a whole"
        )


# ------------------------------------------------------------------------------------------------------ paths, tokens


def check_texts(folder: Path) -> None:
    """Raises: ValueError naming file and value if a text in a folder, or below, holds a local path or a token."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix in TEXT_SUFFIXES:
            check_text(path.relative_to(folder).as_posix(), path.read_text(encoding="utf-8", errors="replace"))


def check_text(name: str, text: str) -> None:
    """Check one text that is to be published.

    Raises: ValueError if it holds what looks like a token (not shown), or a path of this machine.
    """
    if found := TOKEN.search(text):
        line = text.count("\n", 0, found.start()) + 1
        raise ValueError(
            f"{name} holds what looks like an access token in line {line} ({found[0][:5]}...): "
            "take it out, and revoke it if others have seen the file"
        )
    paths = local_paths(name, text)
    if paths:
        raise ValueError(
            f"{name} holds local paths, which nobody else has: {listed(paths)}. Put a Hub id or a plain name there"
        )


def local_paths(name: str, text: str) -> list[str]:
    """Paths of some machine in a text, with the JSON entry they stand in."""
    if name.rpartition("/")[2] in VOCABULARIES or name.endswith(".py"):  # code is compared as a whole
        return []
    if name.endswith(".json"):
        try:
            entries = [*strings_of(json.loads(text))]
        except (ValueError, RecursionError):
            pass  # read as any text
        else:
            return [f"{where} {value!r:.120}" for where, value in entries if is_local_path(value)]
    return [found[0] for found in LOCAL_PATH.finditer(text)]


def is_local_path(value: str) -> bool:
    return WHOLE_PATH.fullmatch(value) is not None or LOCAL_PATH.search(value) is not None


def strings_of(content, where: str = "") -> Iterator[tuple[str, str]]:
    """("training.data", value) of every text in a JSON value."""
    if isinstance(content, str):
        yield where, content
    elif isinstance(content, dict):
        for name, value in content.items():
            yield from strings_of(value, f"{where}.{name}" if where else name)
    elif isinstance(content, list):
        for index, value in enumerate(content):
            yield from strings_of(value, f"{where}[{index}]")


__all__ = ["HubMixin", "check_text", "check_texts"]
