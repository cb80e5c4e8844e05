"""The README: its snippet runs, its numbers come from the result files, what it points to is there."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from roe_llava.convert.graft import graft
from roe_llava.examples.tiny_world import demo, readme_table

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def scores(**changed) -> dict:
    """Scores of a family, as the demo writes them."""
    shares = {"most_common_answer": 0.5, "base": 0.98, "roe": 0.97, "lost": 0.01, "lost_standard_error": 0.002}
    return {"questions": 100, **shares, "skip_ratio": 0.2, **changed}


@pytest.fixture
def results() -> dict:
    """A demo's result file in short."""
    part = {"base_seconds": 0.01, "roe_seconds": 0.008, "ratio": 1.25, "ceiling": 1.3, "share_of_ceiling": 0.83}
    return {
        "accuracy": {"families": {"exist": scores(), "digit": scores(roe=0.5)}, "overall": scores(questions=200)},
        "routes": {"distinct": 7, "common": 4, "common_means_share": 0.05},
        "timing": {"questions": 20, "skip_ratio": 0.21, "adapter_cost": 0.05, "prefill": part, "decode": part},
        "setup": {"threads": 2, "dtype": "float32", "attention": "sdpa", "processor": "a processor"},
    }


def test_snippet_runs_on_a_grafted_folder(tmp_path):
    out = tmp_path / "out" / "demo"
    out.mkdir(parents=True)
    graft(demo.SHIPPED / "base", demo.SHIPPED / "roe", out / "model")
    demo.save_scene(out / "scene.png", seed=0)
    (snippet,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    # In a process of its own and from another folder, as a reader would run it.
    done = subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer, routes = done.stdout.split("\n", 1)
    assert answer.strip()
    assert "tensor([[" in routes


def test_readme_equals_what_the_results_say():
    assert readme_table.generated() == README, "run: python -m roe_llava.examples.tiny_world.readme_table"


def test_pictures_of_the_readme_are_there():
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert pictures
    assert [name for name in pictures if not (ROOT / name).is_file()] == []


def test_table_holds_a_row_per_family_and_one_for_all(results):
    text = readme_table.results_text(results, {}, {"families": {"exist": {"shuffled": 0.51}}})
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert "| exist | 50.0 % | 51.0 % | 98.0 % | 97.0 % | 20.0 % |" in rows
    assert "| digit | 50.0 % | - | 98.0 % | 50.0 % | 20.0 % |" in rows
    assert sum("**all**" in row for row in rows) == 1
    assert "| prefill | 10.00 ms | 8.00 ms | 1.25x | 1.30x | 83 % |" in rows


def test_comparisons_of_the_training_are_listed(results):
    training = {"static_drop": {"layers 3 and 7": {"accuracy": 0.953, "skip_ratio": 0.2}}}
    assert "- layers 3 and 7: accuracy 95.3 %, skip ratio 20.0 %" in readme_table.results_text(results, training, {})


def test_readme_without_markers_is_an_error():
    with pytest.raises(ValueError, match="must hold"):
        readme_table.readme_with("text", "a README")


def test_text_between_the_markers_is_replaced():
    once = readme_table.readme_with("new", f"before {readme_table.BEGIN} old {readme_table.END} after")
    assert once == f"before {readme_table.BEGIN}\n\nnew\n\n{readme_table.END} after"
    assert readme_table.readme_with("new", once) == once


def test_makefile_names_every_command_the_documents_use():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    used = set()
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", ".ci/run"):
        used |= set(re.findall(r"`make ([a-z-]+)|^make ([a-z-]+)", (ROOT / name).read_text(), flags=re.MULTILINE))
    assert {target for pair in used for target in pair if target} <= targets


def test_missing_results_are_named(tmp_path):
    shutil.copy(ROOT / "README.md", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"demo\.json is missing"):
        readme_table.generated(tmp_path)
