"""LLaVA-HR's towers against numbers recorded from the published code."""

import pytest
import torch
from golden_hr_helpers import CASES, FOLDER, MANIFEST, pixels_of, published_tower_as_ours, recorded
from PIL import Image
from torch.nn import functional
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaModel

from roe_llava.configuration_hr_vision import CONVNEXT_XXL, LlavaHrVisionConfig
from roe_llava.vision_hr import (
    LlavaHrVisionModel,
    MixtureOfResolutionAdapter,
    ResolutionFusion,
    aligned,
    as_tokens,
    small_image,
)

# Single precision is up to 1e-5 from double in the recording (`fp32_rounding`), on numbers of a few units.
CLOSE = {"rtol": 0, "atol": 3e-5}
CLOSE_GATE = {"rtol": 0, "atol": 1e-6}
CLOSE_SLOW = {"rtol": 0, "atol": 1e-5}
THINNED = {"slow_stage2": 2, "slow_stage3": 2}
MODULES = MANIFEST["module_cases"]


@torch.no_grad()
def stages_of(model, case):
    """Every stage of a pass over a case's pictures, by recorded name."""
    found, about = {}, CASES[case]
    tokens = slice(None, None, about["token_step"])

    def keep(module, name, of_input=False):
        def hook(module, inputs, output):
            found[name] = inputs[0] if of_input else output

        return module.register_forward_hook(hook)

    hooks = [keep(model.fast.pre_layrnorm, "fast_in"), keep(model.fusion, "fusion_in", of_input=True)]
    hooks += [keep(model.slow.embeddings, "slow_stem")]
    hooks += [keep(stage, f"slow_stage{n}") for n, stage in enumerate(model.slow.stages)]
    for number, adapter in enumerate(model.adapters):
        hooks += [keep(adapter, f"align{number}_in", of_input=True), keep(adapter, f"align{number}_out")]
        hooks += [keep(adapter.gate_2, f"align{number}_gate_raw")]
    pixels = pixels_of(about["images"])
    features = model(pixels).hidden_states[-1]
    for hook in hooks:
        hook.remove()
    found = {name: one if name.startswith("slow") or "gate" in name else one[:, tokens] for name, one in found.items()}
    found |= {name.removesuffix("_raw"): one.tanh() for name, one in found.items() if name.endswith("_raw")}
    found["fast_input_sub"] = small_image(pixels, model.config.fast_side)[:, :, ::8, ::8]
    return found | {"features": features[:, ::4]}


@pytest.mark.parametrize("case", CASES)
def test_every_stage_agrees(case):
    model = published_tower_as_ours(case)
    assert (model.config.fast_side, model.config.fast_grid**2, model.config.slow_grid) == (
        CASES[case]["fast_image_size"],
        CASES[case]["fast_tokens"],
        CASES[case]["slow_grid"],
    )
    found, compared = stages_of(model, case), 0
    for name, expected in recorded().items():
        if not name.startswith(f"{case}/") or name.endswith("/projected"):
            continue
        what = name.removeprefix(f"{case}/")
        step = THINNED.get(what, 8 if what.endswith("_sub") else 1)
        stage = found.get(what, found.get(what.removesuffix("_sub")))
        if what.startswith("slow"):
            stage = stage[:, :, ::step, ::step]
        close = CLOSE_GATE if "gate" in what else CLOSE_SLOW if what.startswith("slow") else CLOSE
        torch.testing.assert_close(stage, expected, **close, msg=lambda text, name=name: f"{name}: {text}")
        compared += 1
    assert compared == {"frozen": 4, "x_pool": 17}.get(case, 21)


def test_norms_of_the_slow_tower_have_the_configured_eps():
    """The recording says by how much the other eps moves features."""
    for case, moved in (("small", "eps_effect_on_small_features"), ("x_equal", "eps_effect_on_x_features")):
        config = published_tower_as_ours(case).config
        other = 1e-6 if config.slow_config.layer_norm_eps == 1e-5 else 1e-5
        wrong = published_tower_as_ours(case, slow_config=config.slow_config.to_dict() | {"layer_norm_eps": other})
        difference = stages_of(wrong, case)["features"] - recorded()[f"{case}/features"]
        assert difference.abs().max() > 0.005, moved


@pytest.mark.parametrize("case", MODULES)
@torch.no_grad()
def test_single_modules_agree(case):
    given = {n.removeprefix(f"module/{case}/"): t for n, t in recorded().items() if n.startswith(f"module/{case}/")}
    adapter, fusion = MixtureOfResolutionAdapter(12, 20), ResolutionFusion(12, 20)
    weights = {n.removeprefix("align."): t for n, t in given.items() if n.startswith("align.")}
    weights = {n.replace("gate.0", "gate_1").replace("gate.2", "gate_2"): t for n, t in weights.items()}
    adapter.load_state_dict(
        {n: t if n == "fast_conv.weight" or t.dim() < 3 else t[..., 0, 0] for n, t in weights.items()}
    )
    fusion.load_state_dict({n.removeprefix("fusion."): t for n, t in given.items() if n.startswith("fusion.")})
    fast, slow, grid = given["fast"], as_tokens(given["slow"]), MODULES[case]["fast_grid"]
    of_adapter = aligned(adapter.slow_proj(functional.gelu(adapter.slow_conv(slow))), grid)
    torch.testing.assert_close(of_adapter, given["slow_aligned"], **CLOSE_SLOW)
    torch.testing.assert_close(adapter(fast, slow), given["align_out"], **CLOSE_SLOW)
    torch.testing.assert_close(fusion(fast, slow), given["fusion_out"], **CLOSE_SLOW)


@torch.no_grad()
def test_attention_implementations_agree():
    model = published_tower_as_ours("x_equal")
    assert model.fast.config._attn_implementation == "sdpa"
    pixels = pixels_of(CASES["x_equal"]["images"])
    expected = model(pixels).last_hidden_state
    model.set_attn_implementation("eager")
    assert model.fast.config._attn_implementation == "eager"
    torch.testing.assert_close(model(pixels).last_hidden_state, expected, **CLOSE)


@torch.no_grad()
def test_an_image_alone_equals_the_image_in_a_batch():
    model = published_tower_as_ours("x_equal")
    pixels = pixels_of(CASES["x_equal"]["images"])
    together = model(pixels).last_hidden_state
    alone = torch.cat([model(one[None]).last_hidden_state for one in pixels])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-5)


def test_features_go_through_stock_llava_unchanged():
    """`get_image_features` selects among hidden states by number, whatever the tower."""
    tower = published_tower_as_ours("x_equal")
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = LlavaConfig(
        text_config=small | {"model_type": "llama", "vocab_size": 32},
        vision_config=small | {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14},
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    stock = LlavaForConditionalGeneration(config).eval()
    stock.model.vision_tower = tower
    pixels = pixels_of(CASES["x_equal"]["images"])
    with torch.no_grad():
        found = stock.get_image_features(pixels).pooler_output
        expected = stock.model.multi_modal_projector(tower(pixels).last_hidden_state)
    assert isinstance(stock.model, LlavaModel) and torch.equal(torch.stack(list(found)), expected)


def test_saved_tower_reloads(tmp_path):
    model = published_tower_as_ours("x_equal")
    model.save_pretrained(tmp_path)
    again, info = LlavaHrVisionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert again.config.slow_config.layer_norm_eps == 1e-5
    pixels = pixels_of(CASES["x_equal"]["images"])
    with torch.no_grad():
        assert torch.equal(again.eval()(pixels).last_hidden_state, model(pixels).last_hidden_state)


def test_new_adapters_change_nothing():
    torch.manual_seed(0)
    adapter = published_tower_as_ours("x_equal").adapters[0]
    model = LlavaHrVisionModel(published_tower_as_ours("x_equal").config)
    new, tokens, slow = model.adapters[0], torch.randn(1, 144, 16), torch.randn(1, 144, 40)
    assert torch.equal(new(tokens, slow), tokens) and not torch.equal(adapter(tokens, slow), tokens)


def test_published_sizes():
    """Parameters of the published towers, and tokens of the published settings, by hand."""
    config = LlavaHrVisionConfig()
    assert (config.fast_side, config.fast_grid, config.slow_grid, config.patch_size) == (448, 32, 32, 32)
    assert config.adapter_layers == [6, 12, 18]
    middle = LlavaHrVisionConfig(image_size=768)
    assert (middle.fast_side, middle.fast_grid, middle.slow_grid, middle.patch_size) == (336, 24, 24, 32)
    first = LlavaHrVisionConfig(image_size=384)
    assert (first.fast_side, first.fast_grid, first.slow_grid, first.patch_size) == (336, 24, 12, 16)
    with torch.device("meta"):
        large, xxl = LlavaHrVisionModel(config), LlavaHrVisionModel(LlavaHrVisionConfig(slow_config=CONVNEXT_XXL))
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in large.named_children()}
    # CLIP-L/14 without class token and last norm; ConvNeXt-L without its classifier; 2 * (matrices of an adapter)
    assert sizes["fast"] == 303_507_456 - 1024 - 1024 - 2 * 1024
    assert sizes["slow"] == 197_767_336 - (1536 * 1000 + 1000) - 2 * 1536
    adapter = (1536**2 + 1536) + (1536 * 1024 + 1024) + (49 * 1024 + 1024) + (1024**2 + 1024) + (2048 * 512 + 512) + 513
    assert sizes["adapters"] == 3 * adapter
    assert sizes["fusion"] == 1024**2 + 1024 + 1536 * 1024 + 1024
    assert xxl.slow.stages[2].layers[0].layernorm.eps == 1e-5
    assert xxl.adapters[0].slow_conv.weight.shape == (3072, 3072)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"image_size": 1000}, "image_size must be a multiple of 32, the slow tower's stride, got 1000"),
        ({"image_size": "1024"}, "image_size must be a multiple of 32, the slow tower's stride, got '1024'"),
        ({"image_size": 512}, "24 x 24 tokens and the slow one a map of 16 x 16, expected that one side divides"),
        ({"fast_config": {"num_hidden_layers": 6}}, r"num_hidden_layers must be a multiple of 4.*got 6"),
        ({"fast_config": {"patch_size": 0}}, "fast_config.patch_size must be a positive integer, got 0"),
        ({"fast_config": {"model_type": "siglip_vision_model"}}, "cannot have model_type 'siglip_vision_model'"),
        ({"slow_config": 3}, "expected a ConvNextConfig or a dict of its entries, got int"),
        ({"slow_config": {"num_channels": 4}}, "fast_config.num_channels is 3, slow_config.num_channels 4"),
    ],
    ids=str,
)
def test_wrong_configurations_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        LlavaHrVisionConfig(**changes)


def test_images_of_another_size_are_refused():
    model = published_tower_as_ours("x_equal")
    with pytest.raises(
        ValueError, match=r"pixel_values have shape \[1, 3, 336, 336\], expected \[images, 3, 384, 384\]"
    ):
        model(torch.zeros(1, 3, 336, 336))


def test_recorded_pictures_have_their_final_size():
    for about in CASES.values():
        assert all(Image.open(FOLDER / name).size == (about["input_image_size"],) * 2 for name in about["images"])
