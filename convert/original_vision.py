"""The vision tower of a checkpoint in the original layout: inside its weight files, or a CLIP folder beside it."""

import re
from dataclasses import dataclass
from pathlib import Path

from transformers import CLIPVisionConfig

from .keys import POSITION_BUFFERS, TOWER_DROPPED, TOWER_KEYS, renamed
from .source import Source, blamed_on, expanded, read_json, resolve_source
from .state_dict import listed
from .weights import Checkpoint, StoredTensor, open_checkpoint

# Where our own exports put the tower (or its config alone, when the weights are inside).
TOWER_FOLDER = "vision_tower"
INSIDE = "model.vision_tower.vision_tower."


@dataclass
class Tower:
    """A vision tower.

    Attributes:
        inside: whether its weights are those of the checkpoint itself.
        folder: of its config.
        config: its `CLIPVisionConfig`.
        preprocessor: content of its preprocessor_config.json; `None` if it has none.
        checkpoint: its weight files where they are not inside.
    """

    inside: bool
    folder: Path
    config: CLIPVisionConfig
    preprocessor: dict | None
    checkpoint: Checkpoint | None


def find_tower(source: Source, flat: dict, given: str | Path | None, inside: bool) -> Tower:
    """The vision tower of a checkpoint.

    Args:
        source: the checkpoint.
        flat: its config.json.
        given: folder or Hub id that the caller names; wins over the config.
        inside: whether the checkpoint has the weights.
    Raises: ValueError if it cannot be found.
    """
    folder = tower_folder(source, flat, given, weights=not inside)
    config = vision_config(folder)
    path = folder / "preprocessor_config.json"
    preprocessor = read_json(path) if path.is_file() else None
    return Tower(inside, folder, config, preprocessor, None if inside else open_checkpoint(folder))


def tower_folder(source: Source, flat: dict, given: str | Path | None, weights: bool) -> Path:
    """Where the tower is: as given, else in the checkpoint, else beside it, else on the Hub."""
    if given is not None:
        return fetched(given, weights)
    name = flat.get("mm_vision_tower") or flat.get("vision_tower")
    name = name if isinstance(name, str) else None
    places = [source.folder / TOWER_FOLDER]
    if name:
        places += [source.folder / name, source.folder.resolve().parent / name]
    if found := [place for place in places if (place / "config.json").is_file()]:
        return found[0]
    try:
        if not name:
            raise ValueError("config.json names none")
        return fetched(name, weights)
    except ValueError as error:
        raise ValueError(
            f"the vision tower of {source.folder} (mm_vision_tower {name!r}) cannot be found: {error}. Its "
            f"{'weights and config are' if weights else 'config is'} needed: name its folder or Hub id with "
            "--vision-tower"
        ) from error


def fetched(tower: str | Path, weights: bool) -> Path:
    """A folder as it is; a Hub id with or without its weights.

    Raises: ValueError if it is neither, or cannot be had.
    """
    is_folder = expanded(tower).is_dir()
    return resolve_source(tower).folder if weights or is_folder else download_configs(str(tower))


def download_configs(repo_id: str) -> Path:
    """config.json and preprocessor_config.json of a Hub repository, without weights.

    Raises: ValueError if they cannot be had.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    names = ["config.json", "preprocessor_config.json"]
    try:
        folder = Path(snapshot_download(repo_id, allow_patterns=names))
    except (OSError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{repo_id} is no folder here and cannot be had from the Hub: {reason}") from error
    return folder


def vision_config(folder: Path) -> CLIPVisionConfig:
    """The vision configuration in a CLIP folder, that of a tower alone or of a whole CLIP.

    Raises: ValueError if it is of another kind.
    """
    path = folder / "config.json"
    content = read_json(path)
    kind = content.get("model_type")
    if kind == "clip":
        with blamed_on(path):
            content = (content.get("vision_config_dict") or {}) | (content.get("vision_config") or {})
    elif kind != "clip_vision_model":
        raise ValueError(f"{path} has model_type {kind!r}, expected 'clip' or 'clip_vision_model' for a vision tower")
    # What Transformers stores with every model is not the tower's own.
    generic = ("architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "_name_or_path")
    with blamed_on(path):
        config = CLIPVisionConfig(**{name: value for name, value in content.items() if name not in generic})
        if not 0 < config.patch_size <= config.image_size:
            raise ValueError(f"patch_size is {config.patch_size}, image_size {config.image_size}")
    return config


def tower_names(checkpoint: Checkpoint) -> tuple[dict[str, str], dict[str, StoredTensor], dict[str, str]]:
    """What becomes of the tensors of a CLIP folder.

    Returns: old name to new name; buffers; dropped ones with the reason.
    Raises: ValueError naming a tensor that is neither.
    """
    new = {name: renamed(name, TOWER_KEYS) for name in checkpoint.tensors}
    buffers = {n: tensor for n, tensor in checkpoint.tensors.items() if re.fullmatch(POSITION_BUFFERS, n)}
    dropped = {}
    for pattern, reason in TOWER_DROPPED.items():
        dropped |= {name: reason for name in new if re.fullmatch(pattern, name)}
    if unknown := [name for name in new if new[name] is None and name not in buffers and name not in dropped]:
        raise ValueError(
            f"{listed(unknown)} in {checkpoint.tensors[unknown[0]].file} is no tensor of a CLIP vision tower: is "
            f"{checkpoint.folder} one?"
        )
    return {name: to for name, to in new.items() if to is not None}, buffers, dropped


def check_tower_sizes(config: CLIPVisionConfig, folder: Path, tensors: dict[str, StoredTensor]) -> None:
    """Check the sizes in a tower's config against its tensors.

    Args:
        folder: of the config.
        tensors: by name without any prefix, "vision_model....".
    Raises: ValueError naming the entry and the tensor.
    """
    numbers = (re.match(r"vision_model\.encoder\.layers\.(\d+)\.", name) for name in tensors)
    layers = {int(number[1]) for number in numbers if number}
    path = folder / "config.json"
    if len(layers) != config.num_hidden_layers:
        raise ValueError(
            f"{path} has num_hidden_layers {config.num_hidden_layers}, found tensors of {len(layers)} layers in the "
            "vision tower: is it the config of another one? Name the right one with --vision-tower"
        )
    patches, class_tokens = config.image_size // config.patch_size, int(config.model_type == "clip_vision_model")
    expected = {
        "vision_model.embeddings.patch_embedding.weight": (
            config.hidden_size,
            config.num_channels,
            config.patch_size,
            config.patch_size,
        ),
        "vision_model.embeddings.position_embedding.weight": (patches**2 + class_tokens, config.hidden_size),
    }
    for name, shape in expected.items():
        if name in tensors and tensors[name].shape != shape:
            raise ValueError(
                f"{name} in {tensors[name].file} has shape {list(tensors[name].shape)}, expected {list(shape)} from "
                f"{path} (hidden_size {config.hidden_size}, image_size {config.image_size}, patch_size "
                f"{config.patch_size}): is it the config of another tower? Name the right one with --vision-tower"
            )
