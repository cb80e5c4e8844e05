"""A folder that is to be shown on the Hub: a RoE checkpoint, or an adapter alone."""

from dataclasses import dataclass
from pathlib import Path

from ..adapter_roe import ABOUT_NAME, AdapterInfo, expanded
from ..convert.adapter_file import open_adapter
from ..convert.bases import A_ROUTED_MODEL, is_routed
from ..convert.completeness import check_complete
from ..convert.routing_parts import open_routing_parts
from ..convert.source import Source, read_json
from ..convert.weights import Checkpoint, StoredTensor

CARD = "README.md"


@dataclass
class ModelFolder:
    """A checkpoint or an adapter file, whose weights were found to be complete.

    Attributes:
        path: the folder.
        config: content of config.json; {} of an adapter file.
        info: sizes, routing fields, summary of the training; and the base, of which a whole checkpoint knows id,
            revision and fingerprint alone, if that.
        parts: routing tensors by name in memory.
        checkpoint: the weight files; `None` of an adapter file.
    """

    path: Path
    config: dict
    info: AdapterInfo
    parts: dict[str, StoredTensor]
    checkpoint: Checkpoint | None

    @property
    def is_adapter(self) -> bool:
        return self.checkpoint is None

    @property
    def base(self) -> dict:
        """`{"id", "revision", "fingerprint"}` of the base, entries that nobody recorded are `None` or left out."""
        return self.info.base or (self.config.get("roe_provenance") or {}).get("base") or {}


def open_folder(path: str | Path) -> ModelFolder:
    """Open a folder.

    Raises: ValueError if it is neither, or weights are missing, unknown, of other shapes, or NaN or Inf.
    """
    path = expanded(path)
    if not path.is_dir():
        raise ValueError(f"{path} is no folder: give the folder of a RoE checkpoint or of an adapter file")
    if (path / ABOUT_NAME).is_file():
        return ModelFolder(path, {}, *open_adapter(path), None)
    results = [name for name in ("adapter", "model") if (path / name).is_dir() and (path / "run.json").is_file()]
    if results:
        raise ValueError(f"{path} is the folder of a training run: give its result, {path / results[0]}")
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} has neither config.json nor {ABOUT_NAME}: is it a RoE checkpoint or an adapter file?")
    config = read_json(path / "config.json")
    if not is_routed(config.get("model_type")):
        raise ValueError(
            f"{path / 'config.json'} has model_type {config.get('model_type')!r}, expected "
            f"{A_ROUTED_MODEL}: only RoE folders are checked and get a card; any other goes to the Hub "
            "with `hf upload`"
        )
    if config.get("skipped_layers") is not None:
        raise ValueError(
            f"{path} is baked (skipped_layers {config['skipped_layers']}): card and push know models that route. "
            "model.push_to_hub and processor.push_to_hub send it"
        )
    parts = open_routing_parts(Source(path, path.resolve().name))
    check_complete(parts.checkpoint.tensors, config, path)
    return ModelFolder(path, config, parts.info, parts.tensors, parts.checkpoint)


__all__ = ["CARD", "ModelFolder", "open_folder"]
