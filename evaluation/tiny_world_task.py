"""The tiny world as a task of lmms-eval: a folder with a YAML file and a Parquet file, both made here.

The questions are those of `examples.tiny_world.evaluate.family_examples`, so the task's accuracy is what the example
measures itself. Nothing is downloaded.
"""

import io
from pathlib import Path

from ..convert.output import new_folder
from ..examples.tiny_world.evaluate import MAX_ANSWER_TOKENS, family_examples
from ..examples.tiny_world.world import FAMILIES

TASK = "tiny_world"
DATA = "questions.parquet"
HERE = __name__  # lmms-eval imports the functions below by this name

CONFIG = """\
task: {task}
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function {here}.doc_to_visual
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
process_results: !function {here}.process_results
generation_kwargs:
  max_new_tokens: {new_tokens}
  temperature: 0
  do_sample: false
metric_list:
  - metric: accuracy
    aggregation: mean
    higher_is_better: true
metadata:
  - version: 1.0
"""


def write_task(folder: str | Path, per_family: int = 100, seed: int = 0, overwrite: bool = False) -> Path:
    """Held-out questions as a task.

    Args:
        folder: to write; give it to lmms-eval as `--include_path`.
        per_family: questions of each of `FAMILIES`.
        seed: which scenes.
    Returns: the folder.
    """
    from datasets import Dataset, Features, Image, Value

    rows = [
        row_of(example, f"{family}-{number}")
        for family in FAMILIES
        for number, example in enumerate(family_examples(family, per_family, split="test", seed=seed))
    ]
    texts = {name: Value("string") for name in ("id", "family", "question", "answer")}
    with new_folder(folder, overwrite) as making:
        Dataset.from_list(rows, features=Features({**texts, "image": Image()})).to_parquet(making / DATA)
        data = (Path(folder).absolute() / DATA).as_posix()
        config = CONFIG.format(task=TASK, data=data, here=HERE, new_tokens=MAX_ANSWER_TOKENS)
        (making / f"{TASK}.yaml").write_text(config, encoding="utf-8")
    return Path(folder)


def row_of(example: dict, id: str) -> dict:
    """A one-turn example as a row; the picture as PNG, which loses nothing."""
    (question, answer, family), content = example["turns"][-1], io.BytesIO()
    example["image"].save(content, format="PNG")
    image = {"bytes": content.getvalue(), "path": None}
    return {"id": id, "family": family, "question": question, "answer": answer, "image": image}


def doc_to_visual(doc: dict) -> list:
    """The question's picture."""
    return [doc["image"].convert("RGB")]


def process_results(doc: dict, results: list[str]) -> dict:
    """1.0 for the right answer, word for word."""
    return {"accuracy": float(results[0].strip() == doc["answer"])}


__all__ = ["TASK", "write_task"]
