"""Cards: what they say comes from files, what nobody measured is said to be unknown, the Hub takes their metadata."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from convert_helpers import change_json, train
from huggingface_hub import ModelCard

from roe_llava import RoeLlavaProcessor
from roe_llava.cli import main
from roe_llava.convert.adapter_file import save_adapter
from roe_llava.convert.kinds import ROE
from roe_llava.hub_card import tiny_world
from roe_llava.hub_card.card import make_card, write_card
from roe_llava.hub_card.folder import open_folder
from roe_llava.hub_card.metadata import check_card

ROOT = Path(__file__).parent.parent
COMMIT = "0123456789" * 4
SHARES = {"x-x": 0.75, "xx-": 0.25}
MEASURED = {"hard_skip_ratio": 0.21, "eval_hard_skip_ratio": 0.234, "eval_loss": 1.5}


@pytest.fixture(scope="module")
def saved(tmp_path_factory, base):
    """A model that nobody has trained or measured."""
    folder = tmp_path_factory.mktemp("card") / "saved"
    train(base).save_pretrained(folder)
    RoeLlavaProcessor.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.fixture
def run_folder(tmp_path, base, trained):
    """What `roe-llava train frozen` leaves behind, in short."""
    training = {"recipe": "frozen", "steps": 7, "examples": 1234, "train_base": "frozen", "measured": MEASURED}
    save_adapter(trained, trained.config, tmp_path / "adapter", base=base, training=training)
    (tmp_path / "run.json").write_text(json.dumps({"data": {"data": "/disk/of/mine/questions.json"}}))
    (tmp_path / "report").mkdir()
    shutil.copy(ROOT / "docs" / "routes.png", tmp_path / "report" / "layers_final.png")
    return tmp_path / "adapter"


def card_of(folder, **options):
    return make_card(open_folder(folder), **options)


def test_the_card_of_the_shipped_model_is_up_to_date():
    expected = tiny_world.OUT.read_text(encoding="utf-8")
    assert tiny_world.card_text() == expected, "run: python -m roe_llava.hub_card.tiny_world"
    assert (tiny_world.OUT.parent / tiny_world.PICTURE).is_file()


def test_what_nobody_measured_is_said_to_be_unknown(saved):
    card = card_of(saved)
    for text in ("Accuracy: not measured", "Speed: not measured", "Routes: not measured", "| realised skip | not "):
        assert text in card.text
    assert "number of examples not known" in card.text.lower() and "How it was trained is not known" in card.text
    assert "| licence | not known" in card.text and "is not recorded" in card.text
    data = ModelCard(card.text).data
    assert data.license is None and data.base_model is None and data.eval_results is None
    assert not card.pictures


def test_a_card_says_what_its_run_recorded(run_folder):
    text = card_of(run_folder, repo_id="me/adapter").text
    assert "`questions.json`: 1,234 examples" in text and "/disk/of/mine" not in text
    assert "23.4% (the run's evaluation data, `roe_adapter.json`); 21.0% (the last steps of training" in text
    assert "loss on the run's evaluation data, hard routes: 1.5000 nats" in text
    assert "| train_base | frozen |" in text and "its weights as they are" in text
    assert 'repo_id = "me/adapter"' in text and "![Which decoder layers run](routes.png)" in text


def test_a_summary_that_names_the_data_needs_no_record_beside_it(tmp_path, saved):
    folder = shutil.copytree(saved, tmp_path / "alone")
    base = {"id": "base", "revision": None, "fingerprint": None}
    provenance = {"base": base, "training": {"data": "chats.json", "examples": 12}}
    change_json(folder / "config.json", roe_provenance=provenance)
    text = card_of(folder).text
    assert "`chats.json`: 12 examples. Its licence is not known to this card." in text and "| data |" not in text


def test_a_tuned_base_is_said_to_be_tuned(tmp_path, saved):
    folder = shutil.copytree(saved, tmp_path / "tuned")
    provenance = {"base": {"id": "base", "revision": None, "fingerprint": None}, "training": {"train_base": "lora"}}
    change_json(folder / "config.json", roe_provenance=provenance)
    text = card_of(folder).text
    assert "its weights trained too (lora)" in text and "it is not the LLaVA it was made from" in text


def test_an_adapter_names_its_base_in_the_metadata(run_folder):
    content = json.loads((run_folder / "roe_adapter.json").read_text())
    content["base"] |= {"id": "someone/base", "revision": COMMIT}
    (run_folder / "roe_adapter.json").write_text(json.dumps(content))
    text = card_of(run_folder, licence="mit").text
    data = ModelCard(text).data
    assert (data.base_model, data.base_model_relation, data.license) == ("someone/base", "adapter", "mit")
    assert f'AutoProcessor.from_pretrained("someone/base", revision="{COMMIT}")' in text  # it has none of its own


def test_the_code_is_listed_with_its_hashes(saved):
    text = card_of(saved).text
    for name in ROE.code_files():
        assert f"| `{name}` | `{hashlib.sha256((saved / name).read_bytes()).hexdigest()[:16]}` |" in text


# ------------------------------------------------------------------------------------------------------------- results


def test_results_of_the_demo_become_tables_and_scores(saved):
    demo = json.loads((ROOT / "docs" / "demo.json").read_text())
    card = card_of(saved, results=[ROOT / "docs" / "demo.json"])
    scores = {score.metric_type: score.metric_value for score in ModelCard(card.text).data.eval_results}
    overall = demo["accuracy"]["overall"]
    assert scores == {"accuracy": round(overall["roe"], 4), "skip_ratio": round(overall["skip_ratio"], 4)}
    assert f"{1000 * demo['timing']['decode']['roe_seconds']:.2f} ms per token" in card.text
    assert card.pictures == {"routes.png": ROOT / "docs" / "routes.png"}


def test_results_of_the_benchmark_become_a_table(saved):
    path = ROOT / "benchmarks" / "results" / "tiny.json"
    system = next(one for one in json.loads(path.read_text())["batches"]["8"]["systems"] if one["kind"] == "learned")
    row = f"| 8 | {100 * system['skip_ratio']:.1f} % | {system['prefill']['ratio']:.2f}x | "
    assert row in card_of(saved, results=[path]).text


def test_results_of_lmms_eval_become_a_table_and_scores(tmp_path, saved):
    values = {"alias": "pope", "pope_accuracy,none": 0.8654, "pope_accuracy_stderr,none": 0.0123, "samples": 9000}
    content = {"results": {"pope": values}, "configs": {"pope": {}}, "model_name": "/home/me/out/model"}
    (tmp_path / "pope.json").write_text(json.dumps(content))
    text = card_of(saved, results=[tmp_path / "pope.json"]).text
    assert "| pope | not known | pope_accuracy | 0.8654 | 0.0123 |" in text and "/home/me" not in text
    (score,) = ModelCard(text).data.eval_results
    assert (score.dataset_name, score.metric_value) == ("pope", 0.8654)


def lmms_results(**model_args):
    """As `roe-llava evaluate --limit 20` writes them."""
    values = {"alias": "pope", "pope_accuracy,none": 0.9, "skip_ratio,routing": 0.25, "seconds,routing": 1.5}
    return {
        "results": {"pope": values},
        "configs": {"pope": {}},
        "n-samples": {"pope": {"original": 9000, "effective": 20}},
        "config": {"model_args": {"pretrained": "/home/me/out/model"} | model_args},
    }


def test_a_part_of_a_benchmark_is_not_shown_as_all_of_it(tmp_path, saved):
    (tmp_path / "routed.json").write_text(json.dumps(lmms_results(skip_ratio=0.3)))
    text = card_of(saved, results=[tmp_path / "routed.json"]).text
    assert "| pope | 20 of 9000 | pope_accuracy | 0.9000 | - |" in text and "lmms-eval, model, skip_ratio 0.3" in text
    assert "| realised skip | 25.0% (pope, 20 of 9000 examples, `routed.json`) |" in text
    scores = {score.metric_type: score.dataset_name for score in ModelCard(text).data.eval_results}
    assert scores == dict.fromkeys(("pope_accuracy", "skip_ratio"), "pope, 20 of 9000 examples")


def test_scores_with_every_layer_kept_are_not_the_models_own(tmp_path, saved):
    (tmp_path / "dense.json").write_text(json.dumps(lmms_results(dense=True)))
    text = card_of(saved, results=[tmp_path / "dense.json"]).text
    assert "lmms-eval, model, every layer kept, for comparison (`dense.json`)" in text
    assert not ModelCard(text).data.eval_results and "| realised skip | not measured |" in text


def test_a_file_that_holds_no_result_is_refused(saved):
    with pytest.raises(ValueError, match=r"config\.json is no result that a card can show"):
        card_of(saved, results=[saved / "config.json"])


def test_a_map_is_drawn_from_the_shares_of_the_routes(tmp_path, saved):
    folder = shutil.copytree(saved, tmp_path / "model")
    scores = {
        "accuracy": 0.5,
        "skip_ratio": 0.25,
        "accuracy_by_family": {"a": 0.5},
        "skip_ratio_by_family": {"a": 0.25},
    }
    training = {"base": scores, "roe": scores | {"routes": SHARES}, "questions_per_family": 4, "split": "test"}
    (folder / "training.json").write_text(json.dumps(training))
    card = card_of(folder)
    assert card.pictures["routes.png"].startswith(b"\x89PNG") and "| `x-x` | 75.0% |" in card.text


# ------------------------------------------------------------------------------------------------------------ the file


def test_the_command_writes_card_and_picture_and_overwrites_nothing_unasked(tmp_path, saved, capsys):
    folder = shutil.copytree(saved, tmp_path / "model")
    words = ["card", str(folder), "--results", str(ROOT / "docs" / "demo.json"), "--licence", "apache-2.0"]
    assert main(words) == 0
    card = (folder / "README.md").read_text()
    check_card(card, "README.md")
    assert ModelCard(card).data.license == "apache-2.0"
    assert (folder / "routes.png").read_bytes() == (ROOT / "docs" / "routes.png").read_bytes()
    (folder / "README.md").write_text("mine")
    assert main(words) == 2 and "README.md is there already" in capsys.readouterr().err
    assert (folder / "README.md").read_text() == "mine"
    assert main([*words, "--overwrite"]) == 0 and (folder / "README.md").read_text() == card


def test_a_card_that_cannot_be_written_leaves_nothing(tmp_path, saved):
    with pytest.raises(ValueError, match="is no folder"):
        write_card(saved, tmp_path / "nowhere" / "card.md")
    with pytest.raises(ValueError, match="is a folder, expected the file to write"):
        write_card(saved, tmp_path, overwrite=True)
    assert not [*tmp_path.iterdir()]
