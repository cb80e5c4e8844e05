"""A tiny base and conversations with images, and runs of `roe-llava train` on them."""

import json
from pathlib import Path

import tiny
from PIL import Image
from safetensors.torch import load_file
from transformers import TrainerCallback

from roe_llava.training.options import parse
from roe_llava.training.train import prepare, train

QUESTIONS = ["what is this", "is this a big red", "what is a red", "is this big"]
ANSWERS = ["a red", "big", "this is a big red", "red red"]


def write_conversations(folder: Path, number: int = 12) -> Path:
    """A LLaVA JSON with images: every third row has two turns."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for index in range(number):
        Image.fromarray(tiny.picture(index)).save(folder / "images" / f"{index}.png")
        turns = 2 if index % 3 == 0 else 1
        said = []
        for turn in range(turns):
            question = QUESTIONS[(index + turn) % 4]
            said.append({"from": "human", "value": question if turn else f"<image>\n{question}"})
            said.append({"from": "gpt", "value": ANSWERS[(index * 3 + turn) % 4]})
        rows.append({"id": str(index), "image": f"images/{index}.png", "conversations": said})
    (folder / "data.json").write_text(json.dumps(rows))
    return folder / "data.json"


def words(recipe, base, data, out, **options) -> list[str]:
    """The command line of a short run."""
    settings = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "adapter_size": 8,
        "learning_rate": "1e-2",
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": "true",
        "disable_tqdm": "true",
        **options,
    }
    if recipe != "published" and settings.get("schedule", "taught") == "taught":
        settings = {"searched_routes": 12, "searched_examples": 4} | settings
    settings = {name: value for name, value in settings.items() if value is not None}
    named = {"model": base, "data": data, "output_dir": out} | settings
    return [str(recipe), *(f"--{name}={value}" for name, value in named.items())]


def run_of(*args, **options):
    """A prepared run."""
    return prepare(parse(words(*args, **options)))


class Interrupt(TrainerCallback):
    """Stops a run like Ctrl-C, behind the checkpoint of a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def interrupted(step: int, *args, **options):
    """Begin a run and break it off."""
    run = run_of(*args, **options)
    run.trainer.add_callback(Interrupt(step))
    try:
        train(run)
    except KeyboardInterrupt:
        return run
    raise AssertionError("the run was not interrupted")


def result_tensors(folder: Path) -> dict:
    """All tensors of a run's result."""
    result = folder / "adapter" if (folder / "adapter").is_dir() else folder / "model"
    files = sorted(result.glob("*.safetensors"))
    assert files, f"no result in {folder}"
    return {name: tensor for file in files for name, tensor in load_file(file).items()}
