"""import-reference: published checkpoints in every form compute what was recorded from them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from convert_helpers import change_json
from hub_server import running_hub
from original_helpers import FORM_IDS, FORMS, GOLDEN, change_weights, golden_source, llama_tokenizer, read_weights
from PIL import Image
from safetensors.torch import load_file, save_file

from roe_llava import RoeLlavaForConditionalGeneration, RoeLlavaProcessor
from roe_llava.cli import main
from roe_llava.convert.adapter_file import save_adapter
from roe_llava.convert.graft import graft
from roe_llava.convert.import_llava import import_llava
from roe_llava.convert.import_reference import import_reference

RECORDED = load_file(GOLDEN / "inference.safetensors")
PROMPTS = ["p00_short", "p01_medium"]
VOCAB, IMAGE, PATCHES = 128, 128, 4
CLOSE = {"rtol": 0, "atol": 5e-5}  # the recording's own rounding is 1.5e-5 on logits and 1e-5 on router logits


def recorded(name):
    """Inputs of a recorded prompt with the imported placeholder for every patch."""
    given = RECORDED[f"{name}/input_ids"][0].tolist()
    ids = [token for one in given for token in ([IMAGE] * PATCHES if one < 0 else [one])]
    return {"input_ids": torch.tensor([ids]), "pixel_values": RECORDED[f"{name}/pixel_values"]}


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    parent = tmp_path_factory.mktemp("imported")
    import_reference(golden_source(parent), parent / "out")
    return parent / "out"


@pytest.mark.parametrize("form", FORMS, ids=FORM_IDS)
@torch.no_grad()
def test_every_form_computes_what_was_recorded(tmp_path, form):
    import_reference(golden_source(tmp_path, *form), tmp_path / "out")
    model, info = RoeLlavaForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name in PROMPTS:
        outputs = model.eval()(**recorded(name))
        torch.testing.assert_close(outputs.router_logits[0], RECORDED[f"{name}/router_logits"], **CLOSE)
        assert torch.equal(outputs.routes[0], RECORDED[f"{name}/keep"].bool())
        torch.testing.assert_close(outputs.logits[0, :, :VOCAB], RECORDED[f"{name}/logits"][2:], **CLOSE)
        model.generation_config.eos_token_id = None  # as in the recording
        tokens = model.generate(**recorded(name), max_new_tokens=8, do_sample=False)[0, -8:]
        assert tokens.tolist() == RECORDED[f"{name}/tokens"].tolist()


def test_every_form_gives_the_same_tensors(tmp_path, imported):
    first = read_weights(imported)
    for number, form in enumerate(FORMS):
        parent = tmp_path / str(number)
        parent.mkdir()
        import_reference(golden_source(parent, *form), parent / "out")
        weights = read_weights(parent / "out")
        assert weights.keys() == first.keys() and all(torch.equal(weights[name], first[name]) for name in first)


def test_sizes_and_routing_are_those_of_the_published_inference(imported):
    config = json.loads((imported / "config.json").read_text())
    assert (config["adapter_size"], config["routing_positions"], config["routing_question"]) == (
        16,
        "first",
        "all_text",
    )
    assert config["image_token_index"] == 128 and config["text_config"]["vocab_size"] == 192
    assert config["image_seq_length"] == PATCHES and config["vision_feature_layer"] == -2


def test_new_rows_are_the_mean_of_the_old_ones(imported):
    old = torch.load(GOLDEN / "pytorch_model.bin", weights_only=True)
    new = read_weights(imported)
    for ours, theirs in {
        "language_model.model.embed_tokens.weight": "model.embed_tokens.weight",
        "language_model.lm_head.weight": "lm_head.weight",
    }.items():
        assert torch.equal(new[ours][:VOCAB], old[theirs])
        assert torch.equal(new[ours][VOCAB:], old[theirs].double().mean(0).float().expand(64, -1))


def test_new_tokens_are_never_sampled(imported):
    model = RoeLlavaForConditionalGeneration.from_pretrained(imported).eval()
    model.generation_config.eos_token_id = None
    torch.nn.init.zeros_(model.lm_head.weight)  # every token as likely as any other: a third of them are new
    torch.manual_seed(0)
    inputs = recorded(PROMPTS[0])
    tokens = model.generate(**inputs, max_new_tokens=64, do_sample=True, top_k=0, use_cache=False)
    assert tokens[0, inputs["input_ids"].shape[1] :].max() < VOCAB


def test_routing_tokens_are_a_table_the_images_first(imported):
    old = torch.load(GOLDEN / "pytorch_model.bin", weights_only=True)
    table = read_weights(imported)["language_model.model.routing_tokens.weight"]
    assert torch.equal(table[:1], old["model.adapter_image_token.weight"])
    assert torch.equal(table[1:], old["model.adapter_text_token.weight"])


def test_tower_inside_wins_over_one_beside(tmp_path):
    source = golden_source(tmp_path)
    torch.save({"vision_model.post_layernorm.weight": torch.zeros(32)}, tmp_path / "vision_tower" / "pytorch_model.bin")
    summary = import_reference(source, tmp_path / "out")
    tuned = torch.load(source / "pytorch_model.bin", weights_only=True)
    name = "vision_model.post_layernorm.weight"
    found = read_weights(tmp_path / "out")[f"vision_tower.{name}"]
    assert torch.equal(found, tuned[f"model.vision_tower.vision_tower.{name}"])
    assert "inside the checkpoint (it may have been tuned)" in str(summary)


def test_vision_tower_option_names_a_whole_clip(tmp_path):
    source = golden_source(tmp_path, "safetensors", "beside")
    clip = (tmp_path / "vision_tower").rename(tmp_path / "clip")
    vision = json.loads((clip / "config.json").read_text())
    (clip / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": vision, "text_config": {}}))
    text = {"text_model.final_layer_norm.weight": torch.ones(4), "text_model.encoder.layers.0.x": torch.ones(4)}
    others = {"logit_scale": torch.ones(()), "visual_projection.weight": torch.ones(4, 4)}
    positions = {"vision_model.embeddings.position_ids": torch.arange(5)[None]}
    change_weights(clip, lambda weights: weights.update(text | others | positions))
    with pytest.raises(ValueError, match=r"vision tower .*mm_vision_tower 'vision_tower'.* cannot be .*--vision-tower"):
        import_reference(source, tmp_path / "out")
    summary = import_reference(source, tmp_path / "out", vision_tower=clip)
    assert {"logit_scale", "visual_projection.weight", "text_model.encoder.layers.0.x"} <= summary.dropped.keys()
    assert "CLIP's text half" in summary.dropped["text_model.final_layer_norm.weight"]
    assert RoeLlavaForConditionalGeneration.from_pretrained(tmp_path / "out")


def test_summary_counts_what_was_done(tmp_path):
    summary = import_reference(golden_source(tmp_path), tmp_path / "out")
    tensors = torch.load(GOLDEN / "pytorch_model.bin", weights_only=True)
    buffers = [name for name in tensors if name.endswith("inv_freq")]
    assert summary.kept == len(tensors) - len(buffers) and sorted(summary.dropped) == sorted(buffers)
    kept = [tensor for name, tensor in tensors.items() if name not in buffers]
    assert summary.kept_bytes == sum(tensor.numel() * 4 for tensor in kept)
    assert summary.added == 128 and summary.added_bytes == 128 * 64 * 4
    assert "128 -> 192 rows: <image> is 128, <pad> is 129" in str(summary)
    assert "model.layers.*.self_attn.rotary_emb.inv_freq (6): rotary" in str(summary)
    assert "processor none" in str(summary)


def test_dry_run_checks_and_writes_nothing(tmp_path):
    source = golden_source(tmp_path)
    summary = import_reference(source, tmp_path / "out", dry_run=True)
    assert not summary.written and not (tmp_path / "out").exists()
    change_weights(source, lambda weights: weights["model.norm.weight"].fill_(float("nan")))
    with pytest.raises(ValueError, match=r"model.norm.weight in .*pytorch_model.bin .*holds NaN or Inf"):
        import_reference(source, tmp_path / "out", dry_run=True)


def test_command_line(tmp_path, capsys):
    source, out = str(golden_source(tmp_path, "safetensors", "beside")), str(tmp_path / "out")
    tower = str((tmp_path / "vision_tower").rename(tmp_path / "tower"))
    assert main(["import-reference", source, out, "--vision-tower", tower, "--dry-run"]) == 0
    assert "dry run, nothing written" in capsys.readouterr().out and not Path(out).exists()
    assert main(["import-reference", source, out, "--vision-tower", tower]) == 0
    assert main(["import-reference", source, out, "--vision-tower", tower]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert main(["import-reference", source, out, "--vision-tower", tower, "--overwrite"]) == 0


def golden_with_tokenizer(parent):
    """The recorded checkpoint with an embedding that fits a tokenizer."""
    source, tokenizer = golden_source(parent), llama_tokenizer()

    def widen(weights):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            weights[name] = torch.randn(len(tokenizer), 64)

    change_weights(source, widen)
    change_json(source / "config.json", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(source)
    return source


def test_processor_and_code_come_along(tmp_path, capfd):
    import_reference(golden_with_tokenizer(tmp_path), tmp_path / "out")
    printed = "".join(capfd.readouterr())
    assert "custom code" not in printed and "of type" not in printed  # nothing of what is written is run
    assert "max_length" not in json.loads((tmp_path / "out" / "generation_config.json").read_text())
    code = (
        "import sys; from PIL import Image\n"
        "from transformers import AutoModelForImageTextToText as M, AutoProcessor as P\n"
        "p = P.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "m = M.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "c = [{'role': 'user', 'content': [{'type': 'image'}, {'type': 'text', 'text': 'what is this?'}]}]\n"
        "t = p.apply_chat_template(c, add_generation_prompt=True)\n"
        "i = p(images=Image.new('RGB', (40, 20)), text=t, return_tensors='pt')\n"
        "print(type(p).__name__, m.generate(**i, max_new_tokens=3, do_sample=False).shape[0])\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_MODULES_CACHE": str(tmp_path / "m")}
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "out"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.stdout.startswith("RoeLlavaProcessor 1"), done.stderr


def test_context_is_the_system_text_and_the_image(tmp_path):
    import_reference(golden_with_tokenizer(tmp_path), tmp_path / "out")
    processor = RoeLlavaProcessor.from_pretrained(tmp_path / "out")
    said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is this?"}]}]
    text = processor.apply_chat_template(said, add_generation_prompt=True)
    inputs = processor(images=Image.new("RGB", (40, 20)), text=text, return_tensors="pt")
    ids, segments = inputs["input_ids"][0], inputs["routing_segments"][0]
    last = int((ids == processor.image_token_id).nonzero().max())
    assert (segments[: last + 1] == 0).all() and (segments[last + 1 :] == 1).all()
    assert processor.decode(ids[:last], skip_special_tokens=True).startswith("A chat between a curious user")
    assert processor.turn_tags() == ("USER:", "ASSISTANT:")


def test_imported_model_gives_an_adapter_that_grafts_onto_its_base(tmp_path, imported):
    """A folder of import-llava is a base: what an imported RoE model holds beside it can be grafted onto it."""
    source = golden_source(tmp_path)
    change_weights(source, lambda w: [w.pop(name) for name in list(w) if "adapter" in name])
    import_llava(source, tmp_path / "base")
    model = RoeLlavaForConditionalGeneration.from_pretrained(imported).eval()
    save_adapter(model, model.config, tmp_path / "adapter", base=tmp_path / "base")
    graft(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    grafted = RoeLlavaForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.equal(grafted(**recorded(PROMPTS[0])).logits, model(**recorded(PROMPTS[0])).logits)


# ---------------------------------------- bad input


def refuses(match, source, **kwargs):
    """Nothing is written, not even in part."""
    out = source.parent / "out"
    with pytest.raises(ValueError, match=match):
        import_reference(source, out, **kwargs)
    assert not out.exists() and not list(source.parent.glob(".out*"))


def layer(number, part):
    return f"model.layers.{number}.{part}.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda w: w.pop(layer(3, "adapter_MHA_router.expert.0")),
            r"checkpoint lacks model.language_model.layers.3.router.weight, expected 19 routing tensors .* found 18",
        ),
        (
            lambda w: w.update({layer(2, "adapter_MHA.conv_A"): torch.ones(8, 64)}),
            r"layers.2.adapter.down_proj.weight in .*checkpoint has shape \[8, 64\], expected \[16, 64\]",
        ),
        (
            lambda w: w.update({"model.adapter_text_token.weight": torch.ones(1, 32)}),
            r"model.adapter_text_token.weight in .*bin is F32 \[1, 32\], .*image_token.weight is F32 \[1, 64\]",
        ),
        (lambda w: w.pop("model.adapter_image_token.weight"), r"checkpoint lacks model.adapter_image_token.weight"),
        (
            lambda w: w.update({"model.layers.0.adapter_MHA.bias": torch.ones(1)}),
            r"model.layers.0.adapter_MHA.bias in .*pytorch_model.bin is no tensor of the original LLaVA layout",
        ),
        (
            lambda w: w.pop(layer(4, "mlp.up_proj")),
            r"checkpoint lacks model.layers.4.mlp.up_proj.weight, expected 135 tensors for its config, found 134",
        ),
        (
            lambda w: w.update({layer(4, "mlp.up_proj"): torch.ones(64, 64)}),
            r"model.layers.4.mlp.up_proj.weight in .*bin has shape \[64, 64\], expected \[128, 64\]",
        ),
        (
            lambda w: w.update({layer(1, "mlp.up_proj"): torch.ones(128, 64, dtype=torch.int8)}),
            r"model.layers.1.mlp.up_proj.weight in .*bin is I8, expected one of F64, F32, F16, BF16: .*quantised",
        ),
        (
            lambda w: w.update({layer(1, "mlp.up_proj"): torch.ones(128, 64, dtype=torch.complex64)}),
            r"model.layers.1.mlp.up_proj.weight in .*bin is a .*complex64, which safetensors cannot hold",
        ),
        (
            lambda w: w[layer(5, "adapter_MHA.conv_B")][3, 4].fill_(float("inf")),
            r"layers.5.adapter_MHA.conv_B.weight in .*bin \(F32 \[64, 16\]\) holds NaN or Inf, 1 in",
        ),
        (
            lambda w: w["model.embed_tokens.weight"][0, 0].fill_(float("nan")),
            r"model.embed_tokens.weight in .*bin .* holds NaN or Inf",
        ),
        (
            lambda w: w["model.layers.2.self_attn.rotary_emb.inv_freq"].mul_(2),
            r"layers.2.self_attn.rotary_emb.inv_freq in .*bin .*8 rotary frequencies of rope_theta 10000.0",
        ),
        (
            lambda w: [w.pop(name) for name in list(w) if "adapter" in name],
            r"checkpoint has no routing parts .*: use import-llava",
        ),
        (
            lambda w: w.update({layer(0, "adapter_MHA.conv_A"): torch.ones(())}),
            r"layers.0.adapter_MHA.conv_A.weight in .*bin is F32 \[\], expected \[adapter width, hidden size\]",
        ),
        (lambda w: w.pop("model.embed_tokens.weight"), r"checkpoint lacks model.embed_tokens.weight"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_tensors_are_refused_by_name(tmp_path, change, message):
    source = golden_source(tmp_path)
    change_weights(source, change)
    refuses(message, source)


@pytest.mark.parametrize(
    "entries, message",
    [
        ({"hidden_size": 32}, r"hidden_size 32, but model.embed_tokens.weight in .*bin has shape \[128, 64\]"),
        ({"num_hidden_layers": 7}, r"num_hidden_layers 7, found tensors of 6 layers"),
        ({"vocab_size": 100}, r"vocab_size 100, but model.embed_tokens.weight .*\[128, 64\]"),
        ({"mm_hidden_size": 16}, r"mm_hidden_size 16, but model.mm_projector.0.weight .*\[64, 32\]"),
        ({"intermediate_size": 64}, r"intermediate_size 64, but model.layers.0.mlp.gate_proj.weight .*\[128, 64\]"),
        ({"num_key_value_heads": 2}, r"layers.\d.self_attn.k_proj.weight .* shape \[64, 64\], expected \[32, 64\]"),
        ({"rope_theta": 5000.0}, r"inv_freq .* rotary frequencies of rope_theta 5000.0"),
        ({"vocab_size": None}, r"config.json has no number for vocab_size"),
        ({"model_type": "llava_mpt"}, r"model_type 'llava_mpt', expected one of .*'llava_llama'"),
        ({"model_type": "llava", "text_config": {}}, r"has a text_config .*layout of llava-hf already"),
        ({"mm_projector_type": "linear"}, r"mm_projector_type 'linear'.*expected 'mlp2x_gelu'"),
        ({"mm_projector_type": None}, r"mm_projector_type 'linear'.*expected 'mlp2x_gelu'"),
        ({"image_aspect_ratio": "anyres"}, r"image_aspect_ratio 'anyres'.*tiles"),
        ({"mm_use_im_start_end": True}, r"mm_use_im_start_end True, which cannot be imported"),
        ({"quantization_config": {"load_in_4bit": True}}, r"quantization_config .*which cannot be imported"),
        ({"is_multipath_encoder": True}, r"is_multipath_encoder True.*LLaVA-HR"),
        ({"rms_norm_eps": "a"}, r"checkpoint.config.json does not hold .*'rms_norm_eps' expected float, got str"),
        (
            {"rope_scaling": {"type": "linear"}},
            r"checkpoint.config.json does not hold .*Missing required keys .*factor",
        ),
        ({"hidden_act": "unknown"}, r"checkpoint.config.json does not hold .*KeyError: 'unknown'"),
        ({"torch_dtype": "float13"}, r"checkpoint.config.json does not hold .*float13"),
        ({"torch_dtype": 3}, r"checkpoint.config.json does not hold .*torch_dtype is 3, expected one of float64"),
        ({"torch_dtype": "int8"}, r"checkpoint.config.json does not hold .*torch_dtype is 'int8', expected one of"),
        ({"rope_theta": "a"}, r"checkpoint.config.json does not hold .*rope_theta is 'a', expected a positive number"),
        ({"num_attention_heads": -4}, r"config.json has no number for num_attention_heads, expected positive"),
        ({"num_attention_heads": 0}, r"config.json has no number for num_attention_heads, expected positive"),
        ({"num_key_value_heads": -1}, r"checkpoint.config.json does not hold"),
        ({"model_type": ["llava"]}, r"config.json has model_type \['llava'\], expected one of"),
        ({"tie_word_embeddings": True}, r"config.json has tie_word_embeddings true, but lm_head.weight in .* is not"),
        ({"mm_vision_select_layer": -9}, r"config.json .*mm_vision_select_layer is -9, expected a layer of .* has 3"),
        ({"mm_vision_tower": "nowhere"}, r"mm_vision_tower 'nowhere'\) cannot be found: .*--vision-tower"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_config_that_does_not_fit_is_refused(tmp_path, entries, message):
    source = golden_source(tmp_path)
    change_json(source / "config.json", **entries)
    refuses(message, source)


def test_config_of_another_tower_is_refused(tmp_path):
    source = golden_source(tmp_path)
    config = tmp_path / "vision_tower" / "config.json"
    stored = config.read_text()
    change_json(config, num_hidden_layers=2)
    refuses(r"num_hidden_layers 2, found tensors of 3 layers in the vision tower", source)
    config.write_text(stored)
    change_json(config, image_size=42)
    refuses(r"position_embedding.weight in .*shape \[5, 32\], expected \[10, 32\]", source)
    config.write_text(stored)
    change_json(config, patch_size=0)
    refuses(r"vision_tower.config.json does not hold .*patch_size is 0", source)
    config.write_text(stored)
    change_json(config, model_type="siglip_vision_model")
    refuses(r"model_type 'siglip_vision_model', expected 'clip' or 'clip_vision_model'", source)


def test_unknown_tensor_of_a_tower_beside_is_refused(tmp_path):
    source = golden_source(tmp_path, "bin", "beside")
    change_weights(tmp_path / "vision_tower", lambda weights: weights.update({"head.weight": torch.ones(1)}))
    refuses(r"head.weight in .*vision_tower.pytorch_model.bin is no tensor of a CLIP vision tower", source)


def test_damaged_shards_are_refused(tmp_path):
    source = golden_source(tmp_path, "safetensors", "beside")
    shard, index = source / "model-00002-of-00002.safetensors", source / "model.safetensors.index.json"
    content, listed = shard.read_bytes(), index.read_text()
    shard.write_bytes(content[:-10])
    refuses(rf"{shard.name} has {len(content) - 10} bytes, its header asks for {len(content)}: .* cut", source)
    shard.unlink()
    refuses(rf"index.json lists {shard.name}, which is not in", source)
    shard.write_bytes(content)
    weight_map = json.loads(listed)["weight_map"]
    change_json(index, weight_map={name: file for name, file in weight_map.items() if file != shard.name})
    refuses(rf"{shard.name} in .* is missing from {index.name}", source)
    index.write_text(listed)
    other, name = load_file(source / "model-00001-of-00002.safetensors"), min(load_file(shard))
    save_file(other | {name: torch.zeros(1)}, source / "model-00001-of-00002.safetensors", {"format": "pt"})
    refuses(rf"{name} is in two shards .*model-00001-of-00002.safetensors and {shard.name}", source)


def test_cut_bin_file_is_refused(tmp_path):
    source = golden_source(tmp_path)
    content = (source / "pytorch_model.bin").read_bytes()
    (source / "pytorch_model.bin").write_bytes(content[: len(content) // 2])
    refuses(r"pytorch_model.bin cannot be read as tensors alone", source)


def test_targets_that_cannot_be_written_are_refused(tmp_path):
    source = golden_source(tmp_path)
    with pytest.raises(ValueError, match=r"no is not a folder: create it first"):
        import_reference(source, tmp_path / "no" / "out")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file is a file, expected a folder"):
        import_reference(source, tmp_path / "file")
    with pytest.raises(ValueError, match=r"holds .*checkpoint, which is read"):
        import_reference(source, tmp_path, overwrite=True)
    with pytest.raises(ValueError, match=r"holds .*vision_tower, which is read"):
        import_reference(source, tmp_path / "vision_tower", overwrite=True)
    with pytest.raises(OSError, match=r"/proc/\.out"):
        import_reference(source, "/proc/out")
    assert read_weights(source)


@pytest.mark.parametrize("place", ["inside", "beside"])
def test_source_and_tower_may_be_hub_ids(tmp_path, place, imported):
    source = golden_source(tmp_path, "sharded_bin", place)
    change_json(source / "config.json", mm_vision_tower="someone/tower")
    tower_weights = tmp_path / "vision_tower" / "pytorch_model.bin"
    with running_hub() as hub:
        commit = hub.add("someone/roe", source, "v1")
        if place == "inside":
            torch.save({"vision_model.post_layernorm.weight": torch.zeros(32)}, tower_weights)
        hub.add("someone/tower", tmp_path / "vision_tower")
        environment = os.environ | hub.environment(tmp_path / "cache")
        command = [sys.executable, "-m", "roe_llava", "import-reference", "someone/roe", "out", "--revision", "v1"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    origin = json.loads((tmp_path / "out" / "config.json").read_text())["original_layout"]
    assert (origin["id"], origin["revision"], origin["vision_tower"]) == ("someone/roe", commit, place)
    ours, first = read_weights(tmp_path / "out"), read_weights(imported)
    assert ours.keys() == first.keys() and all(torch.equal(ours[name], first[name]) for name in first)
    # Weights of a tower that has its own inside are not downloaded.
    tower = (tmp_path / "cache").rglob("models--someone--tower/snapshots/*/pytorch_model.bin")
    assert len(list(tower)) == (place == "beside")


def test_hub_id_that_cannot_be_had_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="nobody/nothing is no folder here and cannot be had from the Hub"):
        import_reference("nobody/nothing", tmp_path / "out")
    source = golden_source(tmp_path)
    refuses(r"revision 'main' given with the folder", source, revision="main")
    refuses(r"nobody/tower is no folder here and cannot be had", source, vision_tower="nobody/tower")
