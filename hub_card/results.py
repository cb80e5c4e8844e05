"""What was measured, read from result files: tables for a page, and scores for its metadata. Nothing is measured here.

Read are: the summary of a training (`roe_adapter.json`, `config.json`), the tiny world's training.json, the result of
`roe-llava demo`, of `roe-llava bench`, and lmms-eval's results.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import EvalResult

from ..benchmarks.expert_report import card_text
from ..convert.source import read_json
from ..evaluation.comparison import ROUTING, experts_markdown
from ..examples.tiny_world.readme_table import accuracy_table, comparison, routes_sentence, timing_table
from ..examples.tiny_world.report import percent

TASK = "image-text-to-text"
UNCOUNTED = "not known"


@dataclass
class Results:
    """What result files say.

    Attributes:
        accuracy, speed, routes, experts: blocks of Markdown; the last one of models with experts.
        skips: (share of (input, layer) pairs that was skipped, on what).
        scores: for the model-index.
        shares: route to share of the inputs, for the map.
        picture: a map of routes that was drawn with the results.
        data: what it was trained on, where the form of a record tells.
    """

    accuracy: list[str] = field(default_factory=list)
    speed: list[str] = field(default_factory=list)
    routes: list[str] = field(default_factory=list)
    skips: list[tuple[float, str]] = field(default_factory=list)
    scores: list[EvalResult] = field(default_factory=list)
    shares: dict[str, float] = field(default_factory=dict)
    picture: Path | None = None
    data: str | None = None
    experts: list[str] = field(default_factory=list)


def collect(training: dict, source: str, paths: list[Path]) -> Results:
    """Everything that the summary of a training and result files hold.

    Args:
        training: the summary; {} for none.
        source: file that it stands in.
        paths: result files.
    Raises: ValueError if a file is no result that is known here.
    """
    results = Results()
    for reader in (add_training, add_tiny_training):
        reader(results, training, source)
    for path in paths:
        content = read_json(path)
        if content == training:
            continue
        readers = [reader for form, reader in READERS.items() if set(form.split()) <= content.keys()]
        if not readers:
            forms = "; ".join(READERS)
            raise ValueError(f"{path} is no result that a card can show; expected a file with the entries {forms}")
        readers[0](results, content, path.name)
        if readers[0] is add_demo and (picture := path.parent / "routes.png").is_file():
            results.picture = picture
    return results


def score(dataset: tuple[str, str], metric: str, name: str, value: float, source: str, split: str | None = None):
    """One entry of the model-index; values are rounded to what is shown."""
    kind, title = dataset
    return EvalResult(
        task_type=TASK,
        dataset_type=kind,
        dataset_name=title,
        dataset_config=title,  # entries of one type and split would be filed under one name
        dataset_split=split,
        metric_type=metric,
        metric_name=f"{name} ({source})",
        metric_value=round(value, 4),
    )


def add_training(results: Results, training: dict, source: str) -> None:
    """What `roe-llava train` measured on the way, or on held-out data at the end."""
    measured = training.get("measured") or {}
    where = {"eval_hard_skip_ratio": "the run's evaluation data", "hard_skip_ratio": "the last steps of training"}
    results.skips += [(measured[name], f"{text}, `{source}`") for name, text in where.items() if name in measured]
    shown = {name: measured[name] for name in ("eval_loss", "token_loss") if name in measured}
    names = {"eval_loss": "loss on the run's evaluation data, hard routes", "token_loss": "loss at the end of training"}
    results.accuracy += [f"- {names[name]}: {value:.4f} nats (`{source}`)" for name, value in shown.items()]


def add_tiny_training(results: Results, training: dict, source: str) -> None:
    """The tiny world's own training: both models on held-out questions, controls, static drop."""
    if not {"base", "roe", "questions_per_family"} <= training.keys():
        return
    base, roe = training["base"], training["roe"]
    number, split = training["questions_per_family"] * len(roe["accuracy_by_family"]), training["split"]
    dataset = ("tiny_world", f"tiny world, {number} questions")
    rows = [*base["accuracy_by_family"], "all"]
    lines = ["| questions | base | RoE | layers skipped |", "|---|---:|---:|---:|"]
    for family in rows:
        is_all = family == "all"
        cells = [one["accuracy"] if is_all else one["accuracy_by_family"][family] for one in (base, roe)]
        skipped = roe["skip_ratio"] if is_all else roe["skip_ratio_by_family"][family]
        lines.append(f"| {family} | " + " | ".join(map(percent, (*cells, skipped))) + " |")
    lines += ["", f"{number} questions of the {split} split, exact match, when the parts were trained (`{source}`)."]
    results.accuracy.append("\n".join(lines))
    compared = [comparison(training, "static_drop", "Static drop of as many layers"), comparison(training, "controls")]
    results.accuracy += [text for text in compared if text]
    results.skips.append((roe["skip_ratio"], f"{number} questions, `{source}`"))
    results.scores += [
        score(dataset, "accuracy", "exact match", roe["accuracy"], source, split),
        score(dataset, "skip_ratio", "share of layers skipped", roe["skip_ratio"], source, split),
    ]
    results.shares = dict(roe.get("routes") or {})
    results.data = (
        "Conversations of the tiny world (`examples/tiny_world` of roe-llava): drawn scenes with scikit-learn's "
        "handwritten digits, and questions about them that a program writes"
    )


def add_demo(results: Results, demo: dict, source: str) -> None:
    """`roe-llava demo`."""
    overall = demo["accuracy"]["overall"]
    results.accuracy.append(f"{accuracy_table(demo['accuracy'], {})}\n\n{routes_sentence(demo)} (`{source}`)")
    results.speed.append(f"{timing_table(demo)} (`{source}`)")
    results.skips.insert(0, (overall["skip_ratio"], f"{overall['questions']} questions, `{source}`"))
    dataset = ("tiny_world", f"tiny world, {overall['questions']} questions")
    results.scores += [
        score(dataset, "accuracy", "exact match", overall["roe"], source, "test"),
        score(dataset, "skip_ratio", "share of layers skipped", overall["skip_ratio"], source, "test"),
    ]


def add_bench(results: Results, bench: dict, source: str) -> None:
    """`roe-llava bench`: learned routes beside the base, at every batch size."""
    lines = [
        "| batch | layers skipped | prefill, base / RoE | decode, base / RoE |",
        "|---:|---:|---:|---:|",
    ]
    for size, batch in bench["batches"].items():
        for system in batch["systems"]:
            if system["kind"] == "learned":
                ratios = [f"{system[part]['ratio']:.2f}x" for part in ("prefill", "decode")]
                lines.append(f"| {size} | {percent(system['skip_ratio'])} | {' | '.join(ratios)} |")
    if len(lines) == 2:
        raise ValueError(f"{source} holds no times with learned routes: was the benchmark run on untrained parts?")
    setup = bench["setup"]
    device = setup.get("gpu") or f"{setup['processor']}, {setup['threads']} thread(s)"
    text = f"A shape of {bench['sizes']['layers']} layers ({bench['shape']}), {setup['dtype']}, {setup['attention']}"
    lines += ["", f"{text}; {device}; above 1x is faster than the base (`{source}`)."]
    results.speed.append("\n".join(lines))


def add_expert_bench(results: Results, bench: dict, source: str) -> None:
    """`roe-llava bench` of a model with experts."""
    results.speed.append(card_text(bench, source))


def add_lmms_eval(results: Results, content: dict, source: str) -> None:
    """lmms-eval's results file: a row per task and metric. A run that kept every layer is no score of this model."""
    how, is_dense = run_of(content)
    lines = ["| task | examples | metric | value | standard error |", "|---|---:|---|---:|---:|"]
    for task, values in content["results"].items():
        number, title = examples_of(content, task), values.get("alias", task).strip(" -")
        for name, value in values.items():
            metric, _, kind = name.partition(",")
            if not isinstance(value, int | float) or isinstance(value, bool) or "," not in name or "_stderr" in metric:
                continue
            error = values.get(f"{metric}_stderr,{kind}")
            error = f"{error:.4f}" if isinstance(error, int | float) else "-"
            lines.append(f"| {task} | {number or UNCOUNTED} | {metric} | {value:.4f} | {error} |")
            if is_dense or (kind == ROUTING and metric != "skip_ratio"):
                continue
            where = f"{title}, {number} examples" if number else title
            results.scores.append(score((task, where), metric, metric, value, source))
            if kind == ROUTING:
                results.skips.append((value, f"{where}, `{source}`"))
    results.accuracy.append("\n".join([*lines, "", f"lmms-eval, {how} (`{source}`)."]))
    routing = content.get(ROUTING)
    if isinstance(routing, dict) and (tables := experts_markdown(routing)):
        results.experts.append(f"{tables}\nCounted by `roe-llava evaluate` (`{source}`).")


def run_of(content: dict) -> tuple[str, bool]:
    """(model and how its routes were chosen, whether every layer was kept), as far as lmms-eval's file says it."""
    given = (content.get("config") or {}).get("model_args")
    given = given if isinstance(given, dict) else {}  # plain lmms-eval writes the words of its command line
    model = content.get("model_name") or content.get("model_name_sanitized") or given.get("pretrained")
    asked = [f"{name} {given[name]}" for name in ("skip_ratio", "route_bias") if given.get(name) is not None]
    if given.get("dense"):
        asked = ["every layer kept, for comparison"]
    name = Path(str(model)).name if model else "a model that the file does not name"
    return ", ".join([name, *asked]), bool(given.get("dense"))


def examples_of(content: dict, task: str) -> str | None:
    """How many examples of a task were asked, of how many: "9000", "20 of 800"; `None` if that is not known."""
    counts = (content.get("n-samples") or {}).get(task) or {}
    asked, all_of_them = counts.get("effective"), counts.get("original")
    if asked is None:
        return None
    return str(asked) if all_of_them in (None, asked) else f"{asked} of {all_of_them}"


# Entries that a file has to have, to what reads it; the first that fits does.
READERS: dict[str, Callable[[Results, dict, str], None]] = {
    "accuracy routes timing": add_demo,
    "benchmark batches sizes setup shape": add_bench,
    "benchmark batches sizes setup subject": add_expert_bench,
    "base roe questions_per_family": add_tiny_training,
    "results configs": add_lmms_eval,
}

__all__ = ["Results", "collect"]
