"""Published MoE-LLaVA checkpoints to ours: every value where it belongs, and by name what cannot be imported."""

import json
import shutil

import pytest
import torch
from convert_helpers import bytes_of, change_json, weights_of
from golden_moe_helpers import FOLDER, SETS
from original_helpers import change_weights, llama_tokenizer, read_weights, write_weights
from transformers import AutoProcessor

from roe_llava import MoeLlavaForConditionalGeneration
from roe_llava.cli import main
from roe_llava.convert.import_moe_llava import import_moe_llava

DEEPSPEED = "model.layers.{}.mlp.deepspeed_moe."


@pytest.fixture
def published(tmp_path):
    """A copy of the recorded Llama checkpoint and its tower, to change."""
    shutil.copytree(FOLDER / "llama", tmp_path / "published")
    return tmp_path / "published" / "checkpoint"


def change_moe(folder, **entries):
    """Set entries of the block "moe" of a config.json."""
    content = json.loads((folder / "config.json").read_text())
    change_json(folder / "config.json", moe=content["moe"] | entries)


@pytest.mark.parametrize("decoder", SETS)
def test_every_expert_has_its_values(tmp_path, decoder):
    summary = import_moe_llava(FOLDER / decoder / "checkpoint", tmp_path / "moe")
    old, new = read_weights(FOLDER / decoder / "checkpoint"), weights_of(tmp_path / "moe")
    for layer in (0, 2):
        prefix, ours = DEEPSPEED.format(layer), f"language_model.model.layers.{layer}.mlp."
        assert bytes_of(new[f"{ours}router.weight"]) == bytes_of(old[f"{prefix}gate.wg.weight"])
        for number in range(4):
            theirs = f"{prefix}experts.deepspeed_experts.{number}."
            packed = {kind: tensor[number] for kind, tensor in new.items() if kind.startswith(f"{ours}experts.")}
            if decoder == "phi":
                names = {"fc1.weight": "up_proj", "fc1.bias": "up_proj_bias"}
                names |= {"fc2.weight": "down_proj", "fc2.bias": "down_proj_bias"}
                found = {name: packed[f"{ours}experts.{one}"] for name, one in names.items()}
            else:
                gate, up = packed[f"{ours}experts.gate_up_proj"].chunk(2)
                down = packed[f"{ours}experts.down_proj"]
                found = {"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": down}
            assert all(bytes_of(tensor) == bytes_of(old[theirs + name]) for name, tensor in found.items())
    assert summary.written and not summary.dropped
    assert "second_choice_noise='always' is the published code" in str(summary)


def test_the_config_holds_what_the_published_one_says(tmp_path, published):
    change_moe(published, capacity_factor=1.25, min_capacity=4, router_aux_loss_coef=0.02, top_k_experts=1)
    summary = import_moe_llava(published, tmp_path / "moe")
    config = MoeLlavaForConditionalGeneration.from_pretrained(tmp_path / "moe").config
    assert (config.num_experts, config.num_experts_per_tok, config.moe_layers) == (4, 1, [0, 2, 4])
    assert (config.expert_capacity_factor, config.min_expert_capacity, config.router_aux_loss_coef) == (1.25, 4, 0.02)
    assert config.original_layout["config"]["moe"]["eval_capacity_factor"] == 2.0
    assert "drops what is over eval_capacity_factor 2.0" in str(summary) and "noise" not in str(summary)


@pytest.mark.parametrize("files", ["sharded_bin", "safetensors", "one_safetensors"])
def test_every_form_of_weight_files_gives_the_same_tensors(tmp_path, published, files):
    import_moe_llava(published, tmp_path / "expected")
    weights = read_weights(published)
    (published / "pytorch_model.bin").unlink()
    write_weights(weights, published, files)
    import_moe_llava(published, tmp_path / "moe")
    ours, expected = weights_of(tmp_path / "moe"), weights_of(tmp_path / "expected")
    assert ours.keys() == expected.keys() and all(bytes_of(ours[name]) == bytes_of(expected[name]) for name in ours)


@torch.no_grad()
def test_qwen_1_5_is_a_qwen2_with_its_biases(tmp_path, published):
    def add_biases(weights):
        for layer in range(6):
            for part in "qkv":
                weights[f"model.layers.{layer}.self_attn.{part}_proj.bias"] = torch.zeros(64)

    import_moe_llava(published, tmp_path / "llama")
    change_weights(published, add_biases)
    change_json(published / "config.json", model_type="moe_llava_qwen1_5")
    import_moe_llava(published, tmp_path / "qwen")
    qwen, llama = (MoeLlavaForConditionalGeneration.from_pretrained(tmp_path / one) for one in ("qwen", "llama"))
    assert qwen.config.text_config.model_type == "qwen2"
    ids = torch.arange(3, 20)[None]
    torch.testing.assert_close(qwen.eval()(input_ids=ids).logits, llama.eval()(input_ids=ids).logits)


def test_buffers_are_left_behind(tmp_path, published):
    names = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "model.image_tower.image_tower.vision_model.embeddings.position_ids": torch.arange(5)[None],
    }
    change_weights(published, lambda weights: weights.update(names))
    assert import_moe_llava(published, tmp_path / "moe").dropped.keys() == names.keys()


def test_a_tokenizer_becomes_a_processor_with_vicunas_prompt(tmp_path, published):
    tokenizer = llama_tokenizer()
    tokenizer.save_pretrained(published)
    size = len(tokenizer)

    def widen(weights):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            weights[name] = torch.randn(size, 64)

    change_weights(published, widen)
    change_json(published / "config.json", vocab_size=size)
    import_moe_llava(published, tmp_path / "moe")
    processor = AutoProcessor.from_pretrained(tmp_path / "moe")
    content = [{"type": "image"}, {"type": "text", "text": "what is this"}]
    chat = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    assert text.startswith("A chat between a curious user") and text.endswith("what is this ASSISTANT:")
    config = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == config["image_token_index"]
    assert config["text_config"]["model_type"] == "llama"


def test_the_command_says_what_it_did(tmp_path, published, capsys):
    out = tmp_path / "moe"
    assert main(["import-moe-llava", str(published), str(out), "--dry-run"]) == 0
    assert not out.exists() and "dry run, nothing written" in capsys.readouterr().out
    assert main(["import-moe-llava", str(published), str(out)]) == 0
    assert "wrote" in capsys.readouterr().out and (out / "modeling_moe_llava.py").is_file()


# ---------------------------------------- what cannot be imported

CONFIG_ERRORS = [
    ({"model_type": "moe_llava_qwen"}, "model_type 'moe_llava_qwen', .*Qwen-1's decoder is not part of Transformers"),
    ({"model_type": "moe_llava_minicpm"}, "model_type 'moe_llava_minicpm', .*MiniCPM scales embeddings"),
    ({"model_type": "llava_next"}, "model_type 'llava_next', expected one of .*'moe_llava_stablelm'"),
    (
        {"model_type": "llava_llama", "mm_image_tower": None},
        "'llava_llama' and no mm_image_tower.*through import-llava",
    ),
    ({"model_type": "llava_llama"}, r"has experts in layers \[0, 2, 4\], its config.json says moe_layers_idx \[\]"),
    ({"image_projector_type": "linear"}, "image_projector_type 'linear', which cannot be imported: expected 'mlp2x_"),
    ({"mm_video_tower": "LanguageBind"}, "mm_video_tower 'LanguageBind', which cannot be imported: LLaVA takes no vid"),
    ({"num_hidden_layers": 5}, "num_hidden_layers 5, found tensors of 6 layers"),
]
MOE_ERRORS = [
    ({"moe_enable": False}, "expected an object with moe_enable true: did its training stop before"),
    ({"use_residual": True}, "moe.use_residual True, expected false"),
    ({"moe_layers_idx": "sparse"}, "moe.moe_layers_idx 'sparse', expected a list of layer numbers"),
    ({"moe_layers_idx": [0, 2]}, r"has experts in layers \[0, 2, 4\], its config.json says moe_layers_idx \[0, 2\]"),
    ({"num_experts": [4, 4, 2]}, r"moe.num_experts \[4, 4, 2\], expected one number for all layers"),
    ({"num_experts": [8, 8, 8]}, r"lacks model.layers.0.mlp.*deepspeed_experts.4.down_proj.weight.*expected 8 experts"),
    ({"num_experts": [2, 2, 2]}, r"has model.layers.0.mlp.*deepspeed_experts.2.down_proj.weight.*expected 2 experts"),
    ({"top_k_experts": 5}, "config.json does not hold .*num_experts_per_tok must not exceed num_experts 4, got 5"),
]


@pytest.mark.parametrize(("entries", "message"), CONFIG_ERRORS)
def test_a_config_that_cannot_be_imported_is_named(tmp_path, published, entries, message):
    change_json(published / "config.json", **entries)
    with pytest.raises(ValueError, match=message):
        import_moe_llava(published, tmp_path / "moe")
    assert not (tmp_path / "moe").exists()


@pytest.mark.parametrize(("entries", "message"), MOE_ERRORS)
def test_a_moe_block_that_cannot_be_imported_is_named(tmp_path, published, entries, message):
    change_moe(published, **entries)
    with pytest.raises(ValueError, match=message):
        import_moe_llava(published, tmp_path / "moe")
    assert not (tmp_path / "moe").exists()


def test_another_kind_of_tower_is_named(tmp_path, published):
    change_json(published.parent / "openai" / "tiny-clip-28" / "config.json", model_type="siglip_vision_model")
    with pytest.raises(ValueError, match="model_type 'siglip_vision_model', expected 'clip' or 'clip_vision_model'"):
        import_moe_llava(published, tmp_path / "moe")


EXPERT = DEEPSPEED.format(2) + "experts.deepspeed_experts.1.up_proj.weight"
TENSOR_ERRORS = [
    (lambda weights: weights.pop(EXPERT), rf"lacks {EXPERT}, expected 4 experts of 3 matrices: was a shard lost"),
    (lambda weights: weights.update({EXPERT: torch.ones(3, 64)}), r"deepspeed_experts\.1\.up_proj.* is F32 \[3, 64\]"),
    (lambda weights: weights.update({EXPERT: weights[EXPERT].half()}), r"is F16 \[72, 64\], .* is F32 \[72, 64\]"),
    (lambda weights: weights[EXPERT].fill_(torch.inf), "experts.gate_up_proj .* holds NaN or Inf"),
    (lambda weights: weights.pop(DEEPSPEED.format(0) + "gate.wg.weight"), "lacks .*layers.0.mlp.router.weight"),
    (lambda weights: weights.update({"model.vq.weight": torch.ones(2)}), "model.vq.weight in .* is no tensor of the"),
    (
        lambda weights: weights.update({"model.layers.0.mlp.coefficient.weight": torch.ones(2, 64)}),
        "coefficient.weight in .* belongs to a dense MLP beside the experts",
    ),
]


@pytest.mark.parametrize(("change", "message"), TENSOR_ERRORS)
def test_tensors_that_do_not_fit_are_named(tmp_path, published, change, message):
    change_weights(published, change)
    with pytest.raises(ValueError, match=message):
        import_moe_llava(published, tmp_path / "moe")
    assert not (tmp_path / "moe").exists()
