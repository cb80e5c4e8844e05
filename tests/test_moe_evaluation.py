"""`roe-llava evaluate` with experts: scores beside the base's, and which experts image and text tokens went through."""

import json

import pytest
import torch

pytest.importorskip("lmms_eval.evaluator", reason="pip install --no-deps lmms-eval==0.7.3 (make test does)")

from test_evaluation import OPTIONS, PER_FAMILY, ask, chat, manager, mixed_documents, read, task_folder  # noqa: F401

from roe_llava import MoeLlavaForConditionalGeneration
from roe_llava.cli import main
from roe_llava.convert.upcycle import upcycle
from roe_llava.evaluation.expert_log import TaskExperts
from roe_llava.evaluation.harness_model import RoeLlavaHarness
from roe_llava.evaluation.route_log import RouteLog
from roe_llava.evaluation.tiny_world_task import TASK
from roe_llava.examples.tiny_world.demo import SHIPPED
from roe_llava.examples.tiny_world.world import FAMILIES
from roe_llava.hub_card.card import make_card
from roe_llava.hub_card.folder import open_folder

BASE = SHIPPED / "base"


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    """The shipped base with experts: answers are its own, choices of experts depend on the token."""
    folder = tmp_path_factory.mktemp("moe") / "moe"
    upcycle(BASE, folder, experts=3, router="token_aware")
    return folder


@pytest.fixture(scope="module")
def compared(tmp_path_factory, moe, task_folder):  # noqa: F811
    """Output folder of the command, with the base beside."""
    out = tmp_path_factory.mktemp("evaluated") / "out"
    words = ["--tasks", TASK, "--base", BASE, "--batch-size", "5", "--output-dir", out, "--include-path", task_folder]
    assert main(["evaluate", str(moe), *map(str, words), "--dtype", "float32", "--device", "cpu"]) == 0
    return out


def test_an_upcycled_model_scores_as_its_base_and_no_layer_is_said_to_be_skipped(compared):
    [row] = read(compared / "comparison.json")["rows"]
    assert row["routed"] == row["dense"] > 0.5 and row["examples"] == PER_FAMILY * len(FAMILIES)
    assert row["skip_ratio"] is None and row["distinct_routes"] is None
    assert 2 / 3 <= row["image_busiest_expert"] <= 1 and 2 / 3 <= row["text_busiest_expert"] <= 1
    assert 0 < row["image_text_difference"] <= 1 and row["speedup"] > 0
    table = (compared / "comparison.md").read_text()
    assert "busiest expert, image" in table and "skipped" not in table and "| layer | image 1 | image 2 |" in table


def test_experts_stand_beside_the_score_in_lmms_evals_results_and_on_the_card(compared, moe):
    results = read(compared / "routed.json")
    of_layers = results["routing"][TASK]["experts"]
    assert [*of_layers] == ["0", "2", "4", "6"]
    for of_layer in of_layers.values():
        assert sum(of_layer["image"]) == pytest.approx(2) and sum(of_layer["text"]) == pytest.approx(2)
    assert results["results"][TASK]["image_busiest_expert,routing"] == results["routing"][TASK]["image_busiest_expert"]
    text = make_card(open_folder(moe), results=[compared / "routed.json"]).text
    assert "| layer | image 1 | image 2 | image 3 | text 1 |" in text and "Counted by `roe-llava evaluate`" in text
    assert f"| {TASK} | {PER_FAMILY * len(FAMILIES)} | accuracy |" in text


def test_counts_are_those_of_the_routers_own_choices(moe):
    harness = RoeLlavaHarness(str(moe), batch_size=2, **OPTIONS)
    documents = mixed_documents()
    ask(harness, documents, {"max_new_tokens": 1})
    model = MoeLlavaForConditionalGeneration.from_pretrained(moe, dtype=torch.float32).eval()
    expected = torch.zeros(2, 4, 3, dtype=torch.int64)
    for document in documents:
        harness.task_dict = {"t": {"test": [document]}}
        inputs = harness.inputs([("", lambda chat: chat, {}, 0, "t", "test", False)])
        chosen = model(**inputs, output_router_logits=True).expert_indices
        is_image = inputs["input_ids"][0] == model.config.image_token_id
        for layer, of_layer in enumerate(chosen):
            for kind, mask in enumerate((is_image, ~is_image)):
                expected[kind, layer] += of_layer[0][mask].flatten().bincount(minlength=3)
    record = harness.log.of("t")
    assert torch.equal(record.counts, expected) and record.counts.sum(-1).eq(2 * record.tokens[:, None]).all()
    assert record.layers == (0, 2, 4, 6) and record.examples == len(documents)


def test_padding_and_rows_that_have_ended_are_not_counted(moe):
    documents = mixed_documents()
    together, alone = (RoeLlavaHarness(str(moe), batch_size=size, **OPTIONS) for size in (5, 1))
    assert ask(together, documents) == ask(alone, documents)
    one, other = (harness.log.of("t") for harness in (together, alone))
    assert torch.equal(one.tokens, other.tokens) and torch.equal(one.counts, other.counts)
    prompts = 0
    for document in documents:
        alone.task_dict = {"t": {"test": [document]}}
        prompts += alone.inputs([("", lambda chat: chat, {}, 0, "t", "test", False)])["input_ids"].shape[1]
    assert one.tokens.sum() == prompts + one.new_tokens - len(documents)  # the last written token is read by nothing


def test_beams_and_a_question_without_a_picture(moe):
    harness = RoeLlavaHarness(str(moe), batch_size=2, **OPTIONS)
    ask(harness, [chat("Is there a cat?"), chat("Is there a dog?")], {"max_new_tokens": 1, "num_beams": 3})
    summary = harness.routing_summary["t"]
    assert summary["image_tokens"] == 0 and summary["image_busiest_expert"] is None
    assert summary["experts"]["0"]["image"] is None and sum(summary["experts"]["0"]["text"]) == pytest.approx(2)
    assert json.dumps(summary)


def test_logs_of_processes_are_added():
    logs = [RouteLog(True, 0, TaskExperts) for _ in range(3)]
    for log, seconds in zip(logs[:2], (2.0, 3.0), strict=True):
        record = log.of("t")
        record.begin(1, 2)
        record.add([4], torch.tensor([[[0], [1], [1]]]), torch.tensor([True, False, False]))
        record.seconds, record.answered = seconds, 1
    logs[2].of("t")  # a process that had none of the questions
    merged = RouteLog.merged(logs).of("t")
    assert merged.examples == 2 and merged.seconds == 3.0 and merged.tokens.tolist() == [2, 4]
    assert merged.counts.tolist() == [[[2, 0]], [[0, 4]]] and merged.summary()["image_text_difference"] == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--dense"], "there is no dense run of it"),
        (["--dense-only"], "evaluate BASE --dense-only"),
        (["--skip-ratio", "0.3"], "which skips no layers"),
        (["--route-bias", "1"], "which skips no layers"),
        (["--base", "x", "--dense-from", "y"], "--base names the dense model"),
        (["--base-revision", "x"], "given without --base"),
    ],
)
def test_what_makes_no_sense_with_experts_is_refused(moe, words, said, tmp_path, capsys):
    assert main(["evaluate", str(moe), "--tasks", TASK, "--output-dir", str(tmp_path / "out"), *words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "said"), [({"dense": True}, "no dense run"), ({"skip_ratio": 0.3}, "skips no layers")]
)
def test_the_harness_refuses_it_too(moe, given, said):
    with pytest.raises(ValueError, match=said):
        RoeLlavaHarness(str(moe), **given, **OPTIONS)
