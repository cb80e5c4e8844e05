"""Projectors by `projector_type`: agreement with those recorded from published VILA, and what they refuse."""

import pytest
import torch
from golden_vila_helpers import manifest, recorded
from transformers import CLIPVisionConfig, LlamaConfig
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from roe_llava.configuration_frontend import FrontendLlavaConfig
from roe_llava.modeling_frontend import build_projector
from roe_llava.projectors_frontend import MlpProjector, cells, num_image_tokens, projector_class

CASES = sorted(manifest()["projectors"])
# The recording's own rounding is up to 1e-6.
CLOSE = {"rtol": 0, "atol": 5e-6}
# Names in the published code to ours.
NAMES = {
    "linear": {"layers": "linear"},
    "mlp2x_gelu": {"layers.0": "linear_1", "layers.2": "linear_2"},
    "mlp3x_gelu": {"layers.0": "linear_1", "layers.2": "linear_2", "layers.4": "linear_3"},
    "mlp_downsample": {"layers.1": "norm", "layers.2": "linear_1", "layers.4": "linear_2"},
    "identity": {},
}


def config_for(projector_type, width, hidden_size, **changes):
    return FrontendLlavaConfig(
        vision_config=CLIPVisionConfig(hidden_size=width, num_attention_heads=1),
        text_config=LlamaConfig(hidden_size=hidden_size, num_attention_heads=1),
        projector_type=projector_type,
        **changes,
    )


def published(case):
    """A recorded projector, with its weights."""
    about, tensors = manifest()["projectors"][case], recorded("vision_v15")
    projector = build_projector(config_for(about["type"], about["mm_hidden_size"], about["hidden_size"]))
    weights = {}
    for name in about["tensors"]:
        layer, _, kind = name.rpartition(".")
        weights[f"{NAMES[about['type']][layer]}.{kind}"] = tensors[f"projector/{case}/weights/{name}"]
    projector.load_state_dict(weights)
    return projector, tensors


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_a_projector_agrees(case):
    projector, tensors = published(case)
    given, wanted = tensors[f"projector/{case}/input"], tensors[f"projector/{case}/output"]
    torch.testing.assert_close(projector(given), wanted, **CLOSE)
    about = manifest()["projectors"][case]
    assert num_image_tokens(about["type"], about["tokens_in"]) == about["tokens_out"] == wanted.shape[1]


@pytest.mark.parametrize("case", [case for case in CASES if "downsample" in case])
def test_cells_agree_to_the_bit(case):
    tensors = recorded("vision_v15")
    assert torch.equal(cells(tensors[f"projector/{case}/input"]), tensors[f"projector/{case}/downsampled"])


@pytest.mark.parametrize("side", [3, 4, 27])
def test_every_quarter_of_a_token_comes_from_the_recorded_patch(side):
    patches = torch.arange(1, side * side + 1, dtype=torch.float32)[None, :, None]
    assert torch.equal(cells(patches)[0].long(), recorded("vision_v15")[f"downsample_index/{side}"])


def test_a_norm_of_another_eps_would_show():
    projector, tensors = published("mlp_downsample_tiny_input")
    projector.norm.eps = 1e-6
    found = projector(tensors["projector/mlp_downsample_tiny_input/input"])
    assert (found - tensors["projector/mlp_downsample_tiny_input/output"]).abs().max() > 0.01


def test_two_linear_layers_are_stock_llavas():
    torch.manual_seed(0)
    config = config_for("mlp2x_gelu", 6, 8)
    stock, ours = LlavaMultiModalProjector(config), MlpProjector(config)
    assert type(build_projector(config)) is LlavaMultiModalProjector
    ours.load_state_dict(stock.state_dict())
    features = torch.randn(2, 5, 6)
    assert torch.equal(ours(features), stock(features))


@pytest.mark.parametrize("projector_type", ["linear", "mlp1x_gelu", "mlp3x_gelu", "mlp_downsample"])
def test_width_bias_and_activation_come_from_the_config(projector_type):
    config = config_for(projector_type, 6, 8, vision_feature_layer=[-2, -3], multimodal_projector_bias=False)
    config.projector_hidden_act = "relu"
    projector = build_projector(config)
    first = projector.linear if projector_type == "linear" else projector.linear_1
    assert first.in_features == (48 if projector_type == "mlp_downsample" else 12)
    assert not [name for name, _ in projector.named_parameters() if name.startswith("linear") and "bias" in name]
    assert projector(torch.randn(1, 9, 12)).shape[-1] == 8
    assert projector_type == "linear" or type(projector.act).__name__ == "ReLU"


def test_features_that_fill_no_square_are_refused():
    projector = build_projector(config_for("mlp_downsample", 6, 8))
    with pytest.raises(ValueError, match=r"728 image features fill no square grid.*class token"):
        projector(torch.randn(1, 728, 6))
    with pytest.raises(ValueError, match="577 image features"):
        num_image_tokens("mlp_downsample", 577)


def test_an_identity_between_two_widths_is_refused():
    with pytest.raises(ValueError, match=r"features of 6 channels .* hidden size 8, expected the same width"):
        build_projector(config_for("identity", 6, 8))


@pytest.mark.parametrize("name", ["mlp0x_gelu", "mlp2x_relu", "mlp2x_gelu_x", "dsresampler", "MLP2x_gelu", ""])
def test_an_unknown_projector_is_refused_by_name(name):
    with pytest.raises(ValueError, match=rf"projector_type '{name}' is not supported, expected mlpNx_gelu"):
        projector_class(name)
