"""`verify` of an upcycled model: it is its base as long as nobody trains it, and what is not is named."""

import pytest
from convert_helpers import change_json, change_tensors, make_base, tiny_config
from test_verify import FEW, failed

from roe_llava.cli import main
from roe_llava.convert.upcycle import upcycle
from roe_llava.convert.verify import verify

CHECKS = 1 + 3 + 3 + 1  # copies, experts, implementations, batch


@pytest.fixture(scope="module")
def shared_moe(tmp_path_factory, base):
    folder = tmp_path_factory.mktemp("moe") / "moe"
    upcycle(base, folder, experts=3, router="token_aware")
    return folder


@pytest.fixture
def moe(tmp_path, base):
    """One to change."""
    upcycle(base, tmp_path / "moe", experts=3, top_k=1)
    return tmp_path / "moe"


def test_an_upcycled_model_passes_every_check_and_is_timed(base, shared_moe):
    report = verify(base, shared_moe, **FEW | {"repeats": 1})
    assert report.passed and len(report.verdicts) == CHECKS + 1
    assert {verdict.check.rpartition(", ")[2] for verdict in report.verdicts} >= {"eager", "batched_mm", "grouped_mm"}
    assert report.times["grouped_mm"]["prefill"]["seconds"] > 0


def test_one_expert_per_token_and_half_precision(base, moe):
    assert verify(base, moe, **FEW).passed
    assert verify(base, moe, **FEW, dtype="bfloat16").passed


def test_a_phi_passes(tmp_path):
    base = make_base(tmp_path / "base", config=tiny_config("phi"))
    upcycle(base, tmp_path / "moe", layers="all")
    assert verify(base, tmp_path / "moe", **FEW).passed


def shard_of(folder):
    return next(path for path in folder.glob("model-0*.safetensors"))


def test_one_changed_expert_is_found(base, moe):
    name = "language_model.model.layers.0.mlp.experts.down_proj"
    change_tensors(shard_of(moe), lambda tensors: tensors[name][2].add_(0.3))
    found = failed(verify(base, moe, **FEW))
    assert (
        "mlp.experts.down_proj has other values"
        in found["experts are copies of the base's MLPs, all else is the base's"]
    )
    assert "all tokens through expert 3 equals the stock model up to rounding" in found
    assert "all tokens through expert 1 equals the stock model up to rounding" not in found


def test_another_base_is_found(tmp_path, moe):
    assert len(failed(verify(make_base(tmp_path / "other", seed=5), moe, **FEW))) >= 5


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ({"upcycled": True, "training": [{"stage": "moe-stage3"}]}, r"was trained \(moe-stage3\)"),
        ({"base": {"id": "x"}}, "was not made by roe-llava upcycle"),
        (None, "was not made by roe-llava upcycle"),
    ],
)
def test_a_model_that_need_not_equal_its_base_is_refused(base, moe, about, said, capsys):
    change_json(moe / "config.json", moe_provenance=about)
    with pytest.raises(ValueError, match=said):
        verify(base, moe, **FEW)
    assert main(["verify", str(base), str(moe)]) == 2 and "evaluate --base" in capsys.readouterr().err


def test_a_base_of_another_depth_is_named(tmp_path, moe):
    base = make_base(tmp_path / "deeper", config=tiny_config("llama", num_hidden_layers=5))
    report = verify(base, moe, **FEW)
    assert not report.passed and "model.language_model.layers" in next(iter(failed(report).values()))
