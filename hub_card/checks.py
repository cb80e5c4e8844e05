"""Whether a folder may go to the Hub as it is, and which of its files do."""

import json
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from transformers import AutoProcessor, ProcessorMixin

from ..adapter_roe import ABOUT_NAME, WEIGHTS_NAME, listed
from ..convert.bases import ROUTED
from ..convert.folder_files import COMPANIONS
from ..convert.source import blamed_on, read_json
from ..hub_roe import TEXT_SUFFIXES, check_text
from .folder import CARD, ModelFolder

# What a page shows beside the model.
PAGE = (CARD, "*.png", "*.jpg", "*.svg", ".eval_results/*.yaml")
# JSON files that match a pattern of what models need, but belong to a run.
OF_A_RUN = ("trainer_state.json", "run.json", "bad_rows.json", "bad_eval_rows.json", "all_results.json")
UPDATE_CODE = "--update-code sends the installed files instead"


def chosen_files(folder: ModelFolder, leave_out: Iterable[str] = ()) -> dict[str, Path]:
    """Name in the repository to place of every file of a folder, without those that match a pattern of `leave_out`.

    Raises: ValueError naming files that nothing needs which opens the model.
    """
    found = {path.relative_to(folder.path).as_posix(): path for path in sorted(folder.path.rglob("*"))}
    files = {name: path for name, path in found.items() if path.is_file() and not is_left_out(name, leave_out)}
    # An adapter may carry the code of any kind: its base says which.
    kinds = ROUTED.values() if folder.is_adapter else [folder.kind]
    wanted = [*COMPANIONS, *PAGE, *(name for kind in kinds for name in kind.code_files())]
    if folder.is_adapter:
        weights = {WEIGHTS_NAME, ABOUT_NAME}
    else:
        weights = {*folder.checkpoint.files, "model.safetensors.index.json"}
    strays = [
        name
        for name in files
        if name not in weights and (name in OF_A_RUN or not any(matches(name, pattern) for pattern in wanted))
    ]
    strays += [f"{name}/" for name, path in found.items() if path.is_symlink() and path.is_dir()]
    if strays:
        raise ValueError(
            f"{folder.path} holds {listed(strays)}, which nobody needs who opens the model (leftovers of training, "
            "caches, weights in a second format?): delete them, or leave them out with --leave-out PATTERN"
        )
    return files


def matches(name: str, pattern: str) -> bool:
    """Whether a file's name matches a pattern in which * stands for no slash."""
    return PurePosixPath(name).match(pattern) and name.count("/") == pattern.count("/")


def is_left_out(name: str, patterns: Iterable[str]) -> bool:
    """Whether a file, or a folder that it is in, matches a pattern."""
    places = [name, *map(str, PurePosixPath(name).parents)]
    return any(fnmatch(place, pattern.rstrip("/")) for place in places for pattern in patterns)


# --------------------------------------------------------------------------------------------------------------- code


def check_code(files: dict[str, Path], folder: Path, installed: dict[str, Path]) -> None:
    """Raises: ValueError naming a code file that is missing, or other than the installed one."""
    if missing := [name for name in installed if name not in files]:
        raise ValueError(
            f"{folder} lacks {listed(missing)}, which trust_remote_code=True runs: save model and processor again "
            f"(save_pretrained), or {UPDATE_CODE}"
        )
    if old := [name for name, path in installed.items() if files[name].read_bytes() != path.read_bytes()]:
        raise ValueError(
            f"{listed(old)} in {folder} is other than in the installed roe-llava: was the folder written by "
            f"another version, or the code changed? {UPDATE_CODE}"
        )


def check_auto_map(folder: ModelFolder) -> None:
    """Raises: ValueError if config.json or the processor names other code than the folder holds."""
    path = folder.path / "config.json"
    expected = folder.kind.auto_map
    if not folder.is_adapter and (found := folder.config.get("auto_map")) != expected:
        raise ValueError(f"{path} has auto_map {found}, expected {expected}: save the model again (save_pretrained)")
    path = folder.path / "processor_config.json"
    content = read_json(path) if path.is_file() else {}
    if not folder.kind.has_own_processor and (found := content.get("auto_map")):
        raise ValueError(
            f"{path} has auto_map {found}: the processor runs code, and a {folder.kind.name} checkpoint carries that "
            "of its model alone. Save a stock processor there (LlavaProcessor)"
        )
    expected = {kind.processor.__name__: kind.processor_map for kind in ROUTED.values()}.get(
        content.get("processor_class")
    )
    if expected is not None and content.get("auto_map") != expected:
        raise ValueError(f"{path} has auto_map {content.get('auto_map')}, expected {expected}: save it again")


# ---------------------------------------------------------------------------------------------------------- processor


def check_processor(folder: ModelFolder) -> ProcessorMixin | None:
    """Check that a folder's processor loads and knows the model's image token.

    Returns: the processor; `None` if there is none, since an adapter may do with its base's.
    Raises: ValueError if a whole model has none, or it does not load.
    """
    path = folder.path / "processor_config.json"
    is_old_form = not folder.kind.has_own_processor and (folder.path / "preprocessor_config.json").is_file()
    if not path.is_file() and not is_old_form:
        if folder.is_adapter:
            return None
        raise ValueError(
            f"{folder.path} has no processor_config.json, so nobody could ask the model anything: "
            "processor.save_pretrained into it first"
        )
    with blamed_on(path):
        ours = {kind.processor.__name__: kind.processor for kind in ROUTED.values()}
        named = read_json(path).get("processor_class") if path.is_file() else None
        cls = ours.get(named, AutoProcessor)
        processor = cls.from_pretrained(folder.path, trust_remote_code=False)  # the class at hand, not the folder's
    if folder.is_adapter:
        return processor
    found = processor.tokenizer.get_vocab().get(processor.image_token)
    expected = folder.model_config.image_token_id
    if found != expected:
        raise ValueError(
            f"the tokenizer in {folder.path} gives the image token {processor.image_token!r} the id {found}, the model "
            f"expects {expected} (image_token_index in config.json): do processor and weights belong together?"
        )
    return processor


# -------------------------------------------------------------------------------------------------------------- texts


def check_readable(files: dict[str, Path | bytes]) -> None:
    """Raises: ValueError naming a JSON file that was cut, or is none."""
    for name, source in files.items():
        if name.endswith(".json") and isinstance(source, Path):
            try:
                json.loads(source.read_text(encoding="utf-8"))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{source} is not readable JSON: {error}; was it cut?") from error


def check_private(files: dict[str, Path | bytes]) -> None:
    """Raises: ValueError naming file and entry if a text that is to be sent holds a local path or a token."""
    for name, source in files.items():
        if name.endswith(TEXT_SUFFIXES):
            content = source if isinstance(source, bytes) else source.read_bytes()
            check_text(name, content.decode("utf-8", errors="replace"))


__all__ = ["check_auto_map", "check_code", "check_private", "check_processor", "check_readable", "chosen_files"]
