"""The benchmark of LLaVA-HR's tower; the published code itself is not part of the tests."""

import json
from pathlib import Path

import pytest
import torch
from golden_hr_helpers import CASES, pixels_of, published_tower_as_ours

from roe_llava.benchmarks import hr_frontend
from roe_llava.configuration_hr_vision import LlavaHrVisionConfig

ROOT = Path(__file__).parents[1]
SMALL = {
    "fast_config": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
    | {"patch_size": 28},
    "slow_config": {"hidden_sizes": [4, 8, 8, 8], "depths": [1, 1, 1, 1], "layer_norm_eps": 1e-6},
    "image_size": 384,
}


def test_towers_are_timed_by_turns_and_compared():
    tower = published_tower_as_ours("x_equal")
    pixels = pixels_of(CASES["x_equal"]["images"])
    runs = {"ours": lambda one: tower(one).last_hidden_state, "other": lambda one: tower(one).last_hidden_state + 0.5}
    found = hr_frontend.measure(runs, pixels, repeats=3)
    assert len(found["ours"]["runs"]) == 3 and found["ours"]["seconds"] > 0 < found["other"]["processor_seconds"]
    assert found["ours"]["difference"] == 0 and found["other"]["difference"] == pytest.approx(0.5, abs=1e-4)


def test_no_part_of_the_random_tower_is_without_effect():
    tower = hr_frontend.random_tower(LlavaHrVisionConfig(**SMALL), seed=0)
    torch.manual_seed(0)
    pixels = torch.randn(1, 3, 384, 384)
    with torch.no_grad():
        before = tower(pixels).last_hidden_state
        for parameter in (tower.adapters[1].slow_proj.weight, tower.slow.stages[3].layers[0].layer_scale_parameter):
            kept = parameter.clone()
            parameter.zero_()
            assert (tower(pixels).last_hidden_state - before).abs().max() > 1e-4
            parameter.copy_(kept)


def test_a_folder_that_is_no_checkout_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"multipath_encoder_wapper.py, expected a checkout of the published LLaVA-HR"):
        hr_frontend.published_modules(tmp_path)


def test_the_speed_in_the_docs_is_that_of_the_result_file():
    text = (ROOT / "docs" / "llava_hr.md").read_text()
    text = text.partition("hr_frontend: begin -->\n")[2].partition("\n<!-- hr_frontend: end")[0]
    assert text == hr_frontend.speed_text(json.loads(hr_frontend.RESULT.read_text()))
