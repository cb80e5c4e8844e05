"""What a run leaves behind: an adapter file where the base was frozen, else a whole checkpoint."""

from pathlib import Path

import torch

from ..adapter_roe import check_finite
from ..convert.adapter_file import save_adapter
from ..convert.output import new_folder, write_json
from ..convert.source import Source, read_json
from .options import ModelOptions

PARTS = "parts"


def write_adapter(folder: Path, model, processor, base: dict, about: dict, overwrite: bool, state=None) -> None:
    """The adapter file, with the processor whose chat template was trained with.

    Args:
        base: record of `describe_base`.
        about: summary of the training.
        state: the model's tensors, where they had to be gathered.
    """
    with new_folder(folder, overwrite) as partial:
        model.config.skip_calibration = None
        parts = save_adapter(state or model, model.config, partial / PARTS, base=base, training=about)
        processor.save_pretrained(partial)
        for file in parts.iterdir():
            file.rename(partial / file.name)
        parts.rmdir()


def write_checkpoint(
    folder: Path, model, processor, base: dict, about: dict, dtype: torch.dtype, overwrite: bool, state=None
) -> None:
    """A whole RoE checkpoint; its base weights were tuned, so they have no fingerprint.

    Args: as in `write_adapter`, and `dtype` of all but routers and routing tokens.
    Raises: ValueError if a weight is NaN or Inf.
    """
    model.config.roe_provenance = {
        "base": {"id": base["id"], "revision": base["revision"], "fingerprint": None},
        "training": about,
    }
    tensors = model.state_dict() if state is None else state
    exact = tuple(f".{name}." for name in model._keep_in_fp32_modules_strict)
    stored = {
        name: tensor if any(part in name for part in exact) or not tensor.is_floating_point() else tensor.to(dtype)
        for name, tensor in tensors.items()
    }
    for name, tensor in stored.items():
        check_finite(name, tensor, "the trained model")
    with new_folder(folder, overwrite) as partial:
        model.config.text_config.dtype = model.config.vision_config.dtype = dtype
        model.save_pretrained(partial, state_dict=stored)
        config = read_json(partial / "config.json")  # save_pretrained has put the dtype of training there
        write_json(partial / "config.json", config | {"dtype": str(dtype).removeprefix("torch.")})
        processor.save_pretrained(partial)


def result_dtype(options: ModelOptions, source: Source) -> torch.dtype:
    """Dtype of a whole checkpoint's weights: as asked for, or as those of the model it started from."""
    if options.result_dtype != "auto":
        return getattr(torch, options.result_dtype)
    config = read_json(source.folder / "config.json")
    for part in (config, config.get("text_config") or {}):
        name = part.get("dtype") or part.get("torch_dtype")
        if isinstance(name, str):
            return getattr(torch, name.removeprefix("torch."))
    return torch.float32


__all__ = ["result_dtype", "write_adapter", "write_checkpoint"]
