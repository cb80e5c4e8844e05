"""`roe-llava evaluate` and the lmms-eval model: real routes, in batches, beside the scores; dense only when asked."""

import importlib.metadata
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("lmms_eval.evaluator", reason="pip install --no-deps lmms-eval==0.7.3 (make test does)")

import lmms_eval.tasks
from lmms_eval.api.instance import Instance
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import get_model
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import load_yaml_config

import roe_llava
from roe_llava import RoeLlavaForConditionalGeneration, RoeLlavaProcessor
from roe_llava.cli import main
from roe_llava.evaluation import suite
from roe_llava.evaluation.comparison import markdown, rows, scores_of
from roe_llava.evaluation.generation_settings import cut_at, generate_keywords, stop_words
from roe_llava.evaluation.harness_model import RoeLlavaHarness
from roe_llava.evaluation.route_log import RouteLog, TaskRoutes
from roe_llava.evaluation.tiny_world_task import TASK, write_task
from roe_llava.examples.tiny_world import asking
from roe_llava.examples.tiny_world.demo import SHIPPED
from roe_llava.examples.tiny_world.evaluate import family_examples, share_right
from roe_llava.examples.tiny_world.world import FAMILIES

PACKAGE_PARENT = Path(roe_llava.__file__).resolve().parent.parent
PER_FAMILY = 4
OPTIONS = {"dtype": "float32", "device": "cpu"}


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory):
    return write_task(tmp_path_factory.mktemp("tasks") / "tiny", per_family=PER_FAMILY)


@pytest.fixture(scope="module")
def manager(task_folder):
    return TaskManager(include_path=str(task_folder), include_defaults=False)


@pytest.fixture(scope="module")
def own_answers(shipped_roe):
    """What the tiny world's own evaluation gives on the task's questions: accuracy and routes (N, L)."""
    model = RoeLlavaForConditionalGeneration.from_pretrained(shipped_roe, dtype=torch.float32).eval()
    processor = RoeLlavaProcessor.from_pretrained(shipped_roe, trust_remote_code=False)
    examples = [example for family in FAMILIES for example in family_examples(family, PER_FAMILY)]
    answers, routes = asking.ask(model, processor, examples)
    return share_right(answers, examples), routes


@pytest.fixture(scope="module")
def compared(tmp_path_factory, shipped_roe, task_folder):
    """Output folder of the command, run routed and dense."""
    out = tmp_path_factory.mktemp("evaluated") / "out"
    words = ["--tasks", TASK, "--dense", "--batch-size", "5", "--output-dir", str(out), "--include-path", task_folder]
    assert main(["evaluate", str(shipped_roe), *map(str, words), "--dtype", "float32", "--device", "cpu"]) == 0
    return out


def read(path):
    return json.loads(Path(path).read_text())


# ------------------------------------------------------------------------------------------------- through lmms-eval


def test_score_and_routes_equal_the_examples_own(compared, own_answers):
    accuracy, routes = own_answers
    [row] = read(compared / "comparison.json")["rows"]
    assert row["routed"] == pytest.approx(accuracy, abs=1e-12)
    assert row["examples"] == len(routes) == PER_FAMILY * len(FAMILIES)
    assert row["skip_ratio"] == pytest.approx(1 - routes.double().mean().item(), abs=1e-12)
    assert row["skip_ratio"] > 0.2
    assert row["distinct_routes"] == len(routes.unique(dim=0)) > 1


def test_dense_run_keeps_every_layer(compared):
    dense = read(compared / "dense.json")["routing"][TASK]
    assert dense["skip_ratio"] == 0 and dense["distinct_routes"] == 1
    assert dense["most_common_routes"] == [{"route": "1" * 7, "share": 1.0}]


def test_routing_stands_beside_the_score_in_lmms_evals_results(compared):
    results = read(compared / "routed.json")
    [row] = read(compared / "comparison.json")["rows"]
    of_task = results["results"][TASK]
    assert of_task["accuracy,none"] == row["routed"]
    assert of_task["skip_ratio,routing"] == row["skip_ratio"]
    assert of_task["distinct_routes,routing"] == row["distinct_routes"]
    assert of_task["seconds,routing"] == row["routed_seconds"] > 0


def test_table_says_what_was_gained_and_lost(compared):
    [row] = read(compared / "comparison.json")["rows"]
    assert row["difference"] == row["routed"] - row["dense"]
    assert row["speedup"] == row["dense_seconds"] / row["routed_seconds"]
    header, _, line = (compared / "comparison.md").read_text().splitlines()
    assert header.split(" | ")[-1] == "speed-up |" and TASK in line and f"{row['skip_ratio']:.1%}" in line


def test_plain_lmms_eval_finds_the_model_and_logs_its_routes(shipped_roe, manager, own_answers):
    installed = importlib.metadata.entry_points(group="lmms_eval.models", name="roe_llava")
    if not installed:
        pytest.skip("roe-llava is not installed, only on the path")
    assert get_model("roe_llava") is RoeLlavaHarness
    model_args = f"pretrained={shipped_roe},dtype=float32"
    results = simple_evaluate(
        "roe_llava", model_args, tasks=[TASK], task_manager=manager, batch_size=3, device="cpu", bootstrap_iters=0
    )
    assert results["results"][TASK]["accuracy,none"] == pytest.approx(own_answers[0], abs=1e-12)
    logged = results["throughput"]
    assert logged[f"avg_{TASK}/skip_ratio"] == pytest.approx(1 - own_answers[1].double().mean().item(), abs=1e-12)
    assert logged[f"avg_{TASK}/distinct_routes"] == len(own_answers[1].unique(dim=0))


# ----------------------------------------------------------------------------------------------------- the model alone


def request(document, settings, index=0, **metadata):
    """A request as lmms-eval makes it."""
    metadata |= {"task": "t", "doc_id": index, "repeats": 1}
    arguments = (str(document), lambda chat: chat, dict(settings), index, "t", "test")
    return Instance("generate_until", arguments, idx=0, metadata=metadata)


def ask(model, documents, settings=None):
    """Answers of the model to chats, as lmms-eval hands them over."""
    model.task_dict = {"t": {"test": documents}}
    settings = settings or {"max_new_tokens": 4, "temperature": 0}
    requests = [request(document, settings, index) for index, document in enumerate(documents)]
    return [answer.text for answer in model.generate_until(requests)]


def chat(question, *pictures):
    content = [{"type": "image", "url": picture} for picture in pictures]
    return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]


def mixed_documents():
    """Chats with one picture, none, and two."""
    examples = family_examples("object", 6)
    pictures = [example["image"] for example in examples]
    questions = [example["turns"][0][0] for example in examples]
    return [
        chat(questions[0], pictures[0]),
        chat("What is the sum of the digits?"),
        chat("Are there more red objects than blue objects?", pictures[1], pictures[2]),
        chat(questions[3], pictures[3]),
        chat("Is there a cat?"),
    ]


def test_batches_of_pictures_and_text_answer_as_row_by_row(shipped_roe):
    documents = mixed_documents()
    together = RoeLlavaHarness(str(shipped_roe), batch_size=5, **OPTIONS)
    alone = RoeLlavaHarness(str(shipped_roe), batch_size=1, **OPTIONS)
    assert ask(together, documents) == ask(alone, documents)
    assert together.log.of("t").routes == alone.log.of("t").routes
    assert together.log.of("t").new_tokens == alone.log.of("t").new_tokens


def test_beams_count_a_prompts_route_once(shipped_roe):
    documents = [chat(example["turns"][0][0], example["image"]) for example in family_examples("add", 3)]
    greedy, beams = (RoeLlavaHarness(str(shipped_roe), batch_size=3, **OPTIONS) for _ in range(2))
    ask(greedy, documents)
    ask(beams, documents, {"max_new_tokens": 4, "num_beams": 3})
    assert beams.log.of("t").routes == greedy.log.of("t").routes
    assert beams.log.of("t").examples == 3


def test_a_wanted_skip_ratio_reaches_generate(shipped_roe):
    documents = [chat(e["turns"][0][0], e["image"]) for family in FAMILIES for e in family_examples(family, 3)]
    ratios = []
    for wanted in (0.15, 0.4):
        model = RoeLlavaHarness(str(shipped_roe), batch_size=8, skip_ratio=wanted, **OPTIONS)
        ask(model, documents)
        ratios.append(model.routing_summary["t"]["skip_ratio"])
    assert ratios[0] < 0.25 < 0.3 < ratios[1]


def test_padding_requests_of_other_processes_are_not_counted(shipped_roe):
    model = RoeLlavaHarness(str(shipped_roe), batch_size=2, **OPTIONS)
    model.task_dict = {"t": {"test": mixed_documents()}}
    real, padding = (request("", {"max_new_tokens": 2}, **of) for of in ({}, {"__padding_only__": True}))
    assert len(model.generate_until([real, padding])) == 2
    assert model.routing_summary["t"]["examples"] == 1


def test_sound_is_refused(shipped_roe):
    model = RoeLlavaHarness(str(shipped_roe), **OPTIONS)
    document = [{"role": "user", "content": [{"type": "audio", "url": "a.wav"}, {"type": "text", "text": "What?"}]}]
    with pytest.raises(ValueError, match="holds sound"):
        ask(model, [document])


# --------------------------------------------------------------------------------------------- never dense by accident


def test_a_stock_checkpoint_is_refused(capsys, tmp_path):
    with pytest.raises(ValueError, match=r"'llava' checkpoint, not 'roe_llava'.*dense=True"):
        RoeLlavaHarness(str(SHIPPED / "base"), **OPTIONS)
    words = ["--tasks", TASK, "--output-dir", str(tmp_path / "out")]
    assert main(["evaluate", str(SHIPPED / "base"), *words]) == 2
    assert "it has no routers and would run dense" in capsys.readouterr().err


def test_a_folder_that_is_not_there_is_named(capsys, tmp_path):
    assert main(["evaluate", "nowhere", "--tasks", TASK, "--output-dir", str(tmp_path / "out")]) == 2
    assert "nowhere is no folder with a config.json" in capsys.readouterr().err


def test_a_stock_checkpoint_runs_where_dense_is_asked_for(shipped_roe):
    documents = mixed_documents()
    base = RoeLlavaHarness(str(SHIPPED / "base"), dense=True, batch_size=2, **OPTIONS)
    kept = RoeLlavaHarness(str(shipped_roe), dense=True, batch_size=2, **OPTIONS)
    assert ask(base, documents) == ask(kept, documents)  # the shipped base is frozen
    assert base.routing_summary["t"]["skip_ratio"] == kept.routing_summary["t"]["skip_ratio"] == 0
    assert base.log.of("t").routes == kept.log.of("t").routes


@pytest.mark.parametrize("patience, answered", [(2, 2), (0, 5)])
def test_routers_that_keep_everything_are_an_error(shipped_roe, patience, answered):
    model = RoeLlavaHarness(str(shipped_roe), route_bias=1e9, patience=patience, **OPTIONS)
    with pytest.raises(ValueError, match=f"every layer was kept in all of {answered} examples"):
        ask(model, mixed_documents())


@pytest.mark.parametrize(
    "routing",
    [{"dense": True, "skip_ratio": 0.3}, {"skip_ratio": 0.3, "route_bias": 1}, {"dense": True, "route_bias": 1}],
)
def test_contradicting_routing_is_refused(shipped_roe, routing):
    with pytest.raises(ValueError, match="give one of dense, skip_ratio and route_bias"):
        RoeLlavaHarness(str(shipped_roe), **routing, **OPTIONS)


@pytest.mark.parametrize("routing", [{"skip_ratio": 0.0}, {"route_bias": math.inf}])
def test_keeping_everything_has_to_be_called_dense(shipped_roe, routing):
    with pytest.raises(ValueError, match="keeps every layer: say dense=True"):
        RoeLlavaHarness(str(shipped_roe), **routing, **OPTIONS)


@pytest.mark.parametrize("size", ["auto", 0, "2.5"])
def test_batch_sizes_are_whole_numbers(shipped_roe, size):
    with pytest.raises(ValueError, match="batch_size must be a whole number"):
        RoeLlavaHarness(str(shipped_roe), batch_size=size, **OPTIONS)


# ----------------------------------------------------------------------------------------------------- the benchmarks

TASKS = Path(lmms_eval.tasks.__file__).parent


@pytest.fixture(scope="module")
def task_files():
    """Task names of lmms-eval to their files, read from the folders of the ten benchmarks alone."""
    folders = ("gqa", "textvqa", "vqav2", "vizwiz_vqa", "scienceqa", "pope", "mme", "mmbench", "seedbench", "mmvet")
    files = {}
    for path in (path for folder in folders for path in (TASKS / folder).rglob("*.yaml")):
        name = load_yaml_config(str(path), mode="simple").get("task")
        if isinstance(name, str):
            files[name] = path
    return files


@pytest.mark.parametrize("name", suite.BENCHMARKS)
def test_lmms_eval_has_the_benchmark_and_its_scores(task_files, name, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")  # MM-Vet's module makes its judge when it is imported
    benchmark = suite.BENCHMARKS[name]
    config = load_yaml_config(str(task_files[benchmark.task]))  # imports the task's functions
    assert config["output_type"] == "generate_until"
    assert {entry["metric"] for entry in config["metric_list"]} >= set(benchmark.metrics)
    generate_keywords(config.get("generation_kwargs") or {}), stop_words(config.get("generation_kwargs") or {})


def test_the_page_names_every_benchmark_and_its_published_figure():
    page = (Path(__file__).parent.parent / "docs" / "evaluation.md").read_text()
    rows = {line.split(" | ")[0]: line for line in page.splitlines() if line.startswith("| `")}
    for name, benchmark in suite.BENCHMARKS.items():
        row = rows[f"| `{name}`"]
        assert all(f"`{word}`" in row for word in (benchmark.task, *benchmark.metrics))
    [published] = [line for line in page.splitlines() if line.startswith("| LLaVA-1.5-7B")]
    assert published.split("|")[2:-1] == [f" {one.published} " for one in suite.BENCHMARKS.values()]


def test_all_is_all_ten(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    assert len(suite.tasks_of(["all"])) == 10
    assert suite.tasks_of(["gqa,pope", "mine"]) == ["gqa", "pope", "mine"]


def test_a_judge_without_a_key_is_named(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("API_TYPE", "openai")
    with pytest.raises(ValueError, match=r"mmvet.*OPENAI_API_KEY is not set"):
        suite.tasks_of(["all"])


def test_an_unknown_task_is_named(shipped_roe, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lmms_eval.tasks.TaskManager.initialize_tasks", lambda *args, **kwargs: {})
    assert main(["evaluate", str(shipped_roe), "--tasks", "gqqa", "--output-dir", str(tmp_path / "out")]) == 2
    assert "no task gqqa in lmms-eval" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------- the command


def test_results_are_not_overwritten(compared, shipped_roe, capsys):
    before = (compared / "comparison.json").read_bytes()
    assert main(["evaluate", str(shipped_roe), "--tasks", TASK, "--output-dir", str(compared)]) == 2
    assert "holds results" in capsys.readouterr().err
    assert (compared / "comparison.json").read_bytes() == before


def test_an_earlier_dense_run_can_be_compared_with(compared, shipped_roe, task_folder, tmp_path):
    words = ["--dense-from", compared, "--output-dir", tmp_path / "out", "--include-path", task_folder]
    more = ["--tasks", TASK, "--dtype", "float32", "--device", "cpu", "--batch-size", "8"]
    assert main(["evaluate", str(shipped_roe), *map(str, words), *more]) == 0
    [row], [earlier] = (read(folder / "comparison.json")["rows"] for folder in (tmp_path / "out", compared))
    assert row["dense"] == earlier["dense"] and row["dense_seconds"] == earlier["dense_seconds"]
    assert row["routed"] == earlier["routed"]


@pytest.mark.parametrize(
    "words, text",
    [
        (["--dense-only", "--skip-ratio", "0.3"], "--dense-only keeps every layer"),
        (["--dense", "--dense-from", "x"], "give one"),
        (["--limit", "0"], "--limit must be at least 1"),
        (["--include-path", "nowhere"], "not a folder"),
        (["--dense-from", "nowhere"], "dense.json is missing"),
    ],
)
def test_wrong_options_end_with_status_2(words, text, tmp_path, capsys):
    assert main(["evaluate", "x", "--tasks", TASK, "--output-dir", str(tmp_path / "out"), *words]) == 2
    assert text in capsys.readouterr().err


def test_missing_lmms_eval_says_how_to_install_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["evaluate", "x", "--tasks", "gqa", "--output-dir", str(tmp_path / "out")]) == 2
    assert "pip install --no-deps lmms-eval==0.7.3" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------- small parts


def test_greedy_unless_the_task_samples():
    assert generate_keywords({"temperature": 0, "top_p": 1.0, "num_beams": 2, "until": ["x"]}) == {
        "max_new_tokens": 1024,
        "num_beams": 2,
        "do_sample": False,
        "temperature": None,
        "top_p": None,
        "top_k": None,
    }
    assert generate_keywords({"temperature": 0.2, "do_sample": False})["do_sample"] is False
    sampled = generate_keywords({"temperature": 0.2, "top_p": None, "max_new_tokens": 3})
    assert sampled == {"temperature": 0.2, "max_new_tokens": 3, "do_sample": True}


def test_answers_end_at_the_first_stop_word():
    assert cut_at("a cat USER: and ASSISTANT: no", stop_words({"until": ["ASSISTANT:", "USER:", ""]})) == "a cat"
    with pytest.raises(ValueError, match="until is 3"):
        stop_words({"until": 3})


def test_route_shares_are_over_examples_and_layers():
    record = TaskRoutes()
    record.add(torch.tensor([[True, False, True, True], [True, True, True, True]]))
    record.add(torch.tensor([[True, False, True, True]]))
    assert record.skip_ratio == pytest.approx(2 / 12)
    assert record.summary()["most_common_routes"][0] == {"route": "1011", "share": pytest.approx(2 / 3)}


def test_logs_of_processes_add_examples_and_take_the_longer_time():
    logs = [RouteLog(False, 0), RouteLog(False, 0)]
    for log, seconds in zip(logs, (2.0, 3.0), strict=True):
        log.of("t").add(torch.tensor([[True, False]]))
        log.of("t").seconds = seconds
    merged = RouteLog.merged(logs)
    assert merged.of("t").examples == 2 and merged.of("t").seconds == 3.0 and logs[0].of("t").examples == 1


def test_scores_leave_out_errors_and_routing():
    result = {
        "alias": "x",
        "exact_match,none": 0.5,
        "exact_match_stderr,none": 0.1,
        "exact_match_stderr_clt,none": 0.1,
        "submission,none": None,
        "skip_ratio,routing": 0.3,
    }
    assert scores_of("x", result) == {"exact_match": 0.5}
    assert scores_of("pope", {"pope_accuracy,none": 0.8, "pope_recall,none": 0.7}) == {"pope_accuracy": 0.8}


def test_runs_of_unequal_length_are_not_compared():
    one, other = ({"t": {"scores": {"a": 1.0}, "routing": {"examples": n, "seconds": 1.0}}} for n in (4, 5))
    with pytest.raises(ValueError, match="4 examples routed and 5 dense"):
        rows(one, other)


def test_columns_without_numbers_are_left_out():
    run = {"t": {"scores": {"a": 0.25}, "routing": {"examples": 4, "seconds": 1.0, "skip_ratio": 0.5}}}
    header = markdown(rows(run, None)).splitlines()[0]
    assert "routed" in header and "dense" not in header and "speed-up" not in header


@pytest.mark.slow
def test_processes_share_the_questions_out(shipped_roe, task_folder, tmp_path, own_answers):
    # One question fewer than all, so that one process is handed a question twice to keep step.
    limit = PER_FAMILY * len(FAMILIES) - 1
    words = ["--tasks", TASK, "--batch-size", "5", "--limit", limit, "--include-path", task_folder]
    words += ["--output-dir", tmp_path / "out", "--dtype", "float32", "--device", "cpu"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "roe_llava"]
    environment = os.environ | {"PYTHONPATH": str(PACKAGE_PARENT), "OMP_NUM_THREADS": "1"}
    command = [*launch, "evaluate", shipped_roe, *words]
    done = subprocess.run([*map(str, command)], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [row] = read(tmp_path / "out" / "comparison.json")["rows"]
    routes = own_answers[1][:limit]
    assert row["examples"] == limit
    assert row["skip_ratio"] == pytest.approx(1 - routes.double().mean().item(), abs=1e-12)
    assert row["distinct_routes"] == len(routes.unique(dim=0))
