"""The report of a run, from the trainer's state alone."""

import json

import pytest
from PIL import Image

from roe_llava.training.run_report import final_layers, write_report


def state_file(folder, history):
    content = {"global_step": 20, "max_steps": 20, "best_model_checkpoint": "x/checkpoint-10", "log_history": history}
    (folder / "trainer_state.json").write_text(json.dumps(content))
    return folder / "trainer_state.json"


def entry(step, share=None, **more):
    routing = {} if share is None else {"hard_skip_ratio": share, "skip_weight": 0.3, "soft_hard_gap": 0.3 - share}
    layers = {} if share is None else {f"skip/layer_{layer:02d}": share * layer for layer in (0, 1, 2)}
    return {"step": step, "token_loss": 1.0, "routing_loss": 0.1, "stage": step // 10, **routing, **layers, **more}


def test_the_page_holds_figures_layers_and_pictures(tmp_path):
    evaluated = {"step": 20, "eval_loss": 0.5, "eval_hard_skip_ratio": 0.25, "eval_skip/layer_00": 0.0}
    evaluated |= {"eval_skip/layer_01": 0.5, "eval_skip/layer_02": 1.0}
    history = [entry(10, 0.1), entry(20, 0.2), evaluated, {"step": 20, "train_runtime": 3.0}]
    page = write_report(state_file(tmp_path, history), tmp_path / "report", target=0.3).read_text()
    assert "| hard skip ratio (training) | 20.0% |" in page and "| hard skip ratio (evaluation) | 25.0% |" in page
    assert "| target skip ratio | 30.0% |" in page and "| best checkpoint | checkpoint-10 |" in page
    assert "| 1 | 50% |" in page  # of the evaluation, which comes last
    for name in ("losses", "soft_hard", "layers_over_time", "layers_final"):
        assert f"({name}.png)" in page and Image.open(tmp_path / "report" / f"{name}.png").width > 300


def test_layers_of_training_serve_where_nothing_was_evaluated():
    assert final_layers([entry(10, 0.1), entry(20, 0.2), entry(30)], []) == [0.0, 0.2, 0.4]


def test_a_run_with_a_pinned_route_has_losses_alone(tmp_path):
    write_report(state_file(tmp_path, [entry(10), entry(20)]), tmp_path / "report")
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"losses.png", "report.md"}


@pytest.mark.parametrize(("text", "expected"), [("{}", "no trainer_state.json"), ("[1", "no trainer_state.json")])
def test_another_file_is_refused(tmp_path, text, expected):
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(ValueError, match=expected):
        write_report(tmp_path / "state.json", tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_a_run_without_logs_is_refused_and_an_old_report_is_kept(tmp_path):
    with pytest.raises(ValueError, match="no logs of training"):
        write_report(state_file(tmp_path, []), tmp_path / "report")
    write_report(state_file(tmp_path, [entry(10)]), tmp_path / "report")
    with pytest.raises(ValueError, match="overwrite"):
        write_report(state_file(tmp_path, [entry(10)]), tmp_path / "report")
