"""What a measurement depends on: versions, hardware, commit and command."""

import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def describe_machine(packages: tuple[str, ...] = ("roe-llava", "torch", "transformers")) -> dict:
    """Commit, versions and hardware, for a results file."""
    return {
        "commit": git_commit(),
        "python": platform.python_version(),
        **{name: installed_version(name) for name in packages},
        "machine": platform.machine(),
        "processor": processor_name(),
        "cores": os.cpu_count(),
    }


def describe_run(model) -> dict:
    """Device, dtype, threads and attention that a model is measured with, for a results file."""
    import torch  # late: the command line answers --help without it

    device = model.device
    return {
        "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "attention": model.config._attn_implementation,
    }


def command_line(module: str) -> str:
    """The command this process was started with, for a results file: no path of the machine in front."""
    return shlex.join(["python", "-m", module, *sys.argv[1:]])


def installed_version(name: str) -> str | None:
    """Version of an installed distribution, `None` if it runs from a source tree."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def processor_name() -> str:
    """The processor's name where the system tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def git_commit() -> str | None:
    """Commit of the source tree this file belongs to, with "+changes" if it was edited; `None` outside a clone."""

    def git(*arguments):
        done = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        # An installed copy may sit inside somebody else's repository.
        if Path(git("rev-parse", "--show-toplevel")) != ROOT:
            return None
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
