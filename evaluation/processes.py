"""Several processes that share out a benchmark's questions: `accelerate launch`, `torchrun`."""

import os

import torch


def join_processes(device: str | None):
    """An `Accelerator` that joins the processes started together, `None` for a process alone.

    Args:
        device: where models shall go; processes on the CPU have to be told so before they join.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    from accelerate import Accelerator

    return Accelerator(cpu=(device or default_device()) == "cpu")


def default_device() -> str:
    """The accelerator if there is one."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if found is None else found.type


__all__ = ["default_device", "join_processes"]
