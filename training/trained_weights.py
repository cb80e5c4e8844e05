"""The weights that learn, apart from the frozen rest: what a checkpoint has to hold to go on."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..adapter_roe import listed

FILE = "trained.safetensors"


def trained_names(model: torch.nn.Module) -> list[str]:
    """Names of the parameters that learn."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def save_trained(model: torch.nn.Module, folder: str | Path, state_dict: dict | None = None) -> Path:
    """Write the parameters that learn, under their names in memory.

    Args:
        state_dict: the model's, where gathering it takes all processes; `None` to ask the model.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    state = model.state_dict() if state_dict is None else state_dict
    # Cloned: safetensors refuses tensors that share memory.
    stored = {name: state[name].detach().cpu().contiguous().clone() for name in trained_names(model)}
    save_file(stored, Path(folder) / FILE, metadata={"format": "pt"})
    return Path(folder) / FILE


def load_trained(model: torch.nn.Module, folder: str | Path) -> None:
    """Put them back, all of them.

    Raises: ValueError if the file is missing or damaged, or holds other parameters than those that learn.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise ValueError(f"{folder} has no {FILE}: is it a checkpoint of a run that freezes the base, and complete?")
    try:
        stored = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read ({error}): take an earlier checkpoint") from error
    parameters = dict(model.named_parameters())
    names = trained_names(model)
    if odd := sorted(stored.keys() ^ set(names)):
        raise ValueError(
            f"{path} and this run differ in what learns: {listed(odd)}; was it trained with other options?"
        )
    for name in names:
        if stored[name].shape != parameters[name].shape:
            raise ValueError(
                f"{name} in {path} has shape {tuple(stored[name].shape)}, this model's {tuple(parameters[name].shape)}"
            )
    with torch.no_grad():
        for name in names:
            parameters[name].copy_(stored[name])


__all__ = ["load_trained", "save_trained", "trained_names"]
