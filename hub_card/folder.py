"""A folder that is to be shown on the Hub: a checkpoint of one of our kinds, or an adapter alone."""

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedConfig

from ..adapter_roe import ABOUT_NAME, AdapterInfo, check_finite, expanded
from ..convert.adapter_file import open_adapter
from ..convert.bases import code_of_adapter
from ..convert.completeness import check_complete
from ..convert.kinds import ROE, Kind, kind_of, listed_types
from ..convert.routing_parts import open_routing_parts
from ..convert.source import Source, read_json
from ..convert.weights import Checkpoint, StoredTensor, open_checkpoint

CARD = "README.md"


@dataclass
class ModelFolder:
    """A checkpoint or an adapter file, whose weights were found to be complete.

    Attributes:
        path: the folder.
        kind: of model.
        config: content of config.json; {} of an adapter file.
        parts: what decides: routing tensors of RoE by name in memory, routers of a model with experts by name on disk.
        checkpoint: the weight files; `None` of an adapter file.
        info: of RoE, sizes, routing fields, summary of the training; and the base, of which a whole checkpoint knows
            id, revision and fingerprint alone, if that.
    """

    path: Path
    kind: Kind
    config: dict
    parts: dict[str, StoredTensor]
    checkpoint: Checkpoint | None = None
    info: AdapterInfo | None = None

    @property
    def is_adapter(self) -> bool:
        return self.checkpoint is None

    @property
    def base(self) -> dict:
        """`{"id", "revision", "fingerprint"}` of the base, entries that nobody recorded are `None` or left out."""
        return (self.info and self.info.base) or self.provenance.get("base") or {}

    @property
    def provenance(self) -> dict:
        """What config.json says of where weights come from."""
        return self.config.get(self.kind.provenance) or {}

    @property
    def training(self) -> dict:
        """Summary of the training: of RoE free of form, of experts {"stages": [a dict each]}; {} if there is none."""
        if self.kind.decides == "layers":
            return self.info.training or {}
        made = self.provenance.get("training")
        return {"stages": made} if made else {}

    def code_files(self) -> dict[str, Path]:
        """Name to place of every file of the installed code that goes with it."""
        return code_of_adapter(self.info.base) if self.is_adapter else self.kind.code_files()

    @property
    def model_config(self) -> PreTrainedConfig:
        """The configuration of a whole checkpoint."""
        return self.kind.config.from_dict(self.config)


def open_folder(path: str | Path) -> ModelFolder:
    """Open a folder.

    Raises: ValueError if it is neither, or weights are missing, unknown, of other shapes, or NaN or Inf.
    """
    path = expanded(path)
    if not path.is_dir():
        raise ValueError(f"{path} is no folder: give the folder of a checkpoint or of an adapter file")
    if (path / ABOUT_NAME).is_file():
        info, parts = open_adapter(path)
        return ModelFolder(path, ROE, {}, parts, info=info)
    results = [name for name in ("adapter", "model") if (path / name).is_dir() and (path / "run.json").is_file()]
    if results:
        raise ValueError(f"{path} is the folder of a training run: give its result, {path / results[0]}")
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} has neither config.json nor {ABOUT_NAME}: is it a checkpoint or an adapter file?")
    config = read_json(path / "config.json")
    kind = kind_of(config.get("model_type"))
    if kind is None:
        raise ValueError(
            f"{path / 'config.json'} has model_type {config.get('model_type')!r}, expected {listed_types()}: only "
            "such folders are checked and get a card; any other goes to the Hub with `hf upload`"
        )
    return open_with_experts(path, kind, config) if kind.decides == "experts" else open_routed(path, kind, config)


def open_routed(path: Path, kind: Kind, config: dict) -> ModelFolder:
    """A checkpoint whose routers decide of layers.

    Raises: ValueError as `open_folder`, and for a baked one.
    """
    if config.get("skipped_layers") is not None:
        raise ValueError(
            f"{path} is baked (skipped_layers {config['skipped_layers']}): card and push know models that route. "
            "model.push_to_hub and processor.push_to_hub send it"
        )
    parts = open_routing_parts(Source(path, path.resolve().name))
    check_complete(parts.checkpoint.tensors, config, path)
    return ModelFolder(path, kind, config, parts.tensors, parts.checkpoint, parts.info)


def open_with_experts(path: Path, kind: Kind, config: dict) -> ModelFolder:
    """A checkpoint whose routers decide of experts.

    Raises: ValueError as `open_folder`.
    """
    check_provenance(config.get(kind.provenance), path / "config.json")
    checkpoint = open_checkpoint(path)
    check_complete(checkpoint.tensors, config, path)
    routers = {name: one for name, one in checkpoint.tensors.items() if ".mlp.router." in name}
    for name, router in routers.items():
        check_finite(name, router.load(), path)
    return ModelFolder(path, kind, config, routers, checkpoint)


def check_provenance(provenance, path: Path) -> None:
    """Raises: ValueError if what a config says of where its weights come from is not what our commands write."""
    wanted = {"base": dict, "training": list}
    if not isinstance(provenance, dict | None):
        raise ValueError(f"{path} has moe_provenance {provenance!r:.60}, expected an object: was it changed by hand?")
    for name, form in wanted.items():
        if not isinstance(value := (provenance or {}).get(name), form | None):
            raise ValueError(
                f"{path} has moe_provenance.{name} {value!r:.60}, expected "
                f"{'an object' if form is dict else 'a list'}: was it changed by hand?"
            )


__all__ = ["CARD", "ModelFolder", "open_folder"]
