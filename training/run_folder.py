"""The folder of a run: what is where, what may be replaced, and whether a checkpoint belongs to this run.

OUT/adapter or OUT/model   the result, which appears when it is whole
OUT/checkpoints            Trainer's, to go on from
OUT/report                 report.md and pictures
OUT/logs                   TensorBoard's, with --report_to tensorboard
OUT/run.json               what was run
OUT/bad_rows.json          rows that were left out
"""

import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from transformers import TrainerCallback

from ..convert.output import check_apart, check_target, replace_json
from .options import Options

RECORD = "run.json"
# Training arguments that decide which weights come out; a run that goes on has to have the same.
DECISIVE = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "optim",
    "optim_args",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "bf16",
    "fp16",
    "seed",
    "data_seed",
    "dataloader_drop_last",
    "world_size",
)
# Options of ours that do not.
INDECISIVE = {"model": ("model", "revision", "result_dtype"), "data": ("data", "image_folder", "eval_data", "on_bad")}
ALSO_INDECISIVE = ("check", "check_workers")


@dataclass
class RunFolder:
    """Paths of a run.

    Args:
        path: `--output_dir`.
        result_name: "adapter" or "model".
    """

    path: Path
    result_name: str

    @property
    def result(self) -> Path:
        return self.path / self.result_name

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def report(self) -> Path:
        return self.path / "report"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def check(self, overwrite: bool, resumes: bool, *sources: Path) -> None:
        """Check, before anything is loaded, that the run can be written.

        Args:
            sources: folders that are read.
        Raises: ValueError if something would be lost, or a folder is in the way.
        """
        check_target(self.path.absolute(), overwrite=True)
        check_apart(self.path, *sources)
        is_empty = not self.path.is_dir() or not any(self.path.iterdir())
        if is_empty:
            return
        if not (self.path / RECORD).is_file():
            raise ValueError(
                f"{self.path} is not empty and holds no run of roe-llava train ({RECORD}): give another output_dir"
            )
        if not resumes and not overwrite:
            raise ValueError(
                f"{self.path} holds a run already: go on with it (--resume_from_checkpoint last), replace it "
                "(--overwrite), or give another output_dir"
            )
        if self.result.exists() and any(self.result.iterdir()) and not overwrite:
            raise ValueError(
                f"{self.result} is there already, the result of a finished run: replace it (--overwrite), or give "
                "another output_dir"
            )

    def begin(self, record: dict, resumes: bool) -> None:
        """Make room for the run, and say what it is."""
        if not resumes:
            for old in (self.checkpoints, self.logs, self.report):
                shutil.rmtree(old, ignore_errors=True)
            (self.path / "bad_rows.json").unlink(missing_ok=True)
        self.path.mkdir(exist_ok=True)
        self.checkpoints.mkdir(exist_ok=True)
        replace_json(self.path / RECORD, record)


# -------------------------------------------------------------------------------------------------------------- record


def make_record(options: Options, steps: int, examples: int, base: dict) -> dict:
    """What was run: our options, the training arguments that matter, the base, versions."""
    training = {name: plain(getattr(options.training, name)) for name in DECISIVE}
    return {
        "recipe": options.recipe,
        "steps": steps,
        "examples": examples,
        "base": {name: base.get(name) for name in ("id", "revision", "fingerprint")},
        "model": asdict(options.model),
        "data": asdict(options.data),
        "routing": asdict(options.routing),
        "training": training,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def plain(value):
    """A training argument as JSON."""
    value = getattr(value, "value", value)
    return value if isinstance(value, int | float | str | dict | None) else str(value)


def differences(before: dict, now: dict) -> list[str]:
    """What decides about the weights and differs between two records."""
    found = []
    pairs = [(name, before.get(name), now.get(name)) for name in ("steps", "examples")]
    pairs.append(("base", (before.get("base") or {}).get("fingerprint"), now["base"]["fingerprint"]))
    for section in ("model", "data", "routing", "training"):
        skipped = INDECISIVE.get(section, ()) + ALSO_INDECISIVE
        old, new = before.get(section) or {}, now[section]
        pairs += [
            (name, old.get(name), new.get(name)) for name in sorted(old.keys() | new.keys()) if name not in skipped
        ]
    for name, old, new in pairs:
        if old != new:
            found.append(f"{name} was {old}, is {new}")
    return found


class RecordCallback(TrainerCallback):
    """Writes the record into every checkpoint, last of all: a checkpoint without one is not complete."""

    def __init__(self, record: dict):
        self.record = record

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero and not args.save_only_model:  # weights alone are no place to go on from
            replace_json(Path(args.output_dir) / f"checkpoint-{state.global_step}" / RECORD, self.record)


# -------------------------------------------------------------------------------------------------------------- resume


def checkpoint_to_resume(wanted: str | None, folder: RunFolder) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` asks for: "last" (or "true"), or a path.

    Raises: ValueError if there is none, or it is not complete.
    """
    if wanted is None or wanted.lower() == "false":
        return None
    if wanted.lower() in ("last", "true"):
        found = [path for path in folder.checkpoints.glob("checkpoint-*") if (path / RECORD).is_file()]
        numbered = [path for path in found if re.fullmatch(r"checkpoint-\d+", path.name)]
        if not numbered:
            raise ValueError(f"{folder.checkpoints} has no complete checkpoint to go on from: start anew (--overwrite)")
        return max(numbered, key=lambda path: int(path.name.split("-")[1]))
    path = Path(wanted).expanduser()
    if not path.is_dir():
        raise ValueError(f"the checkpoint {path} does not exist: give its folder, or 'last'")
    if not (path / RECORD).is_file():
        raise ValueError(
            f"{path} has no {RECORD}: it is no checkpoint of roe-llava train, was interrupted while it was written, or "
            "holds weights alone (save_only_model)"
        )
    return path


def check_same_run(checkpoint: Path, record: dict) -> None:
    """Raises: ValueError naming what differs, if a checkpoint belongs to another run."""
    try:
        before = json.loads((checkpoint / RECORD).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{checkpoint / RECORD} is damaged ({error}): take an earlier checkpoint") from error
    if found := differences(before, record):
        raise ValueError(f"{checkpoint} belongs to another run: {'; '.join(found)}. Give the same options to go on")


__all__ = ["RECORD", "RecordCallback", "RunFolder", "check_same_run", "checkpoint_to_resume", "make_record"]
