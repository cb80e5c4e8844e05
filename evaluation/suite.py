"""The ten benchmarks of the RoE paper: their tasks in lmms-eval 0.7.3, their scores, and what they ask of the user."""

import os
from dataclasses import dataclass

JUDGE_KEYS = {"openai": "OPENAI_API_KEY", "azure": "AZURE_API_KEY"}


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        task: its name in lmms-eval.
        metrics: the scores that count, first the one usually quoted.
        published: what is published for LLaVA-1.5-7B, in percent (MME: points), as VILA and MoE-LLaVA quote it; not
            always on the same split or prompt, see docs/evaluation.md.
        judged: answers are judged by a model behind an API.
    """

    task: str
    metrics: tuple[str, ...]
    published: float
    judged: bool = False


BENCHMARKS = {
    "vqav2": Benchmark("vqav2_val", ("exact_match",), 78.5),
    "gqa": Benchmark("gqa", ("exact_match",), 62.0),
    "vizwiz": Benchmark("vizwiz_vqa_val", ("exact_match",), 50.0),
    "scienceqa": Benchmark("scienceqa_img", ("exact_match",), 66.8),
    "textvqa": Benchmark("textvqa_val", ("exact_match",), 58.2),
    "pope": Benchmark("pope", ("pope_f1_score", "pope_accuracy"), 85.9),
    "mme": Benchmark("mme", ("mme_perception_score", "mme_cognition_score"), 1510.7),
    "mmbench": Benchmark("mmbench_en_dev_static", ("gpt_eval_score",), 64.3),
    "seedbench": Benchmark("seedbench", ("seed_all", "seed_image", "seed_video"), 58.6),
    "mmvet": Benchmark("mmvet", ("gpt_eval_score",), 30.5, judged=True),
}
ALL = "all"


def tasks_of(names: list[str]) -> list[str]:
    """lmms-eval's task names for our benchmarks' and for tasks that go by lmms-eval's own name; "all" is all ten.

    Raises: ValueError if none are named, or a judge is needed and no key for one is set.
    """
    names = [part for name in names for part in name.split(",") if part]
    names = [one for name in names for one in (BENCHMARKS if name == ALL else [name])]
    if not names:
        raise ValueError(f"no tasks named: give {', '.join(BENCHMARKS)}, all, or a task of lmms-eval")
    tasks = list(dict.fromkeys(BENCHMARKS[name].task if name in BENCHMARKS else name for name in names))
    check_judge([task for task in tasks if (of := benchmark_of(task)) and of.judged])
    return tasks


def benchmark_of(task: str) -> Benchmark | None:
    """Our entry for a task of lmms-eval, if there is one."""
    return next((one for one in BENCHMARKS.values() if one.task == task), None)


def check_judge(tasks: list[str]) -> None:
    """Raises: ValueError if tasks need a judge whose key is not set; lmms-eval would score every answer 0."""
    kind = os.environ.get("API_TYPE", "openai")
    key = JUDGE_KEYS.get(kind)
    if tasks and key and not os.environ.get(key):
        raise ValueError(
            f"{', '.join(tasks)}: answers are judged by a model behind an API (API_TYPE={kind}), and {key} is not set. "
            "Set it, or leave the task out; see docs/evaluation.md"
        )


__all__ = ["ALL", "BENCHMARKS", "Benchmark", "benchmark_of", "tasks_of"]
