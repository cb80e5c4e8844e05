"""import-vila: published VILA of either layout becomes a base with the same weights, prompts and pictures."""

import json
import shutil

import numpy as np
import pytest
import torch
from convert_helpers import bytes_of, change_json, weights_of
from golden_vila_helpers import CHECKPOINTS, FOLDER, PROMPTS, about_prompt, picture
from PIL import Image
from safetensors.torch import load_file, save_file
from test_golden_vila import inputs_of
from test_remote_code import run_fresh
from transformers import AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration, SiglipVisionModel
from vila_helpers import change_part, give_tokenizer, llama3_tokenizer, text_folder, vicuna_tokenizer, vila_source

from roe_llava import RoeLlavaProcessor
from roe_llava.cli import main
from roe_llava.convert.import_llava import import_llava
from roe_llava.convert.import_vila import import_vila
from roe_llava.convert.original_processor import VICUNA_SYSTEM
from roe_llava.convert.vila_layout import resized_positions
from roe_llava.convert.vila_processor import LLAMA3_SYSTEM, token_counting
from roe_llava.modeling_frontend import FrontendLlavaForConditionalGeneration

MODELS = sorted(CHECKPOINTS)
TABLE = "vision_model.embeddings.position_embedding.weight"


def opened(folder):
    config = json.loads((folder / "config.json").read_text())
    cls = LlavaForConditionalGeneration if config["model_type"] == "llava" else FrontendLlavaForConditionalGeneration
    model, info = cls.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def processor_of(folder):
    return AutoProcessor.from_pretrained(folder, trust_remote_code=True)


def said(role, *parts):
    return {
        "role": role,
        "content": [{"type": "image"} if one is None else {"type": "text", "text": one} for one in parts],
    }


# ---------------------------------------- what comes out


def test_what_a_base_becomes_is_said_by_its_front_end(tmp_path):
    kinds = {}
    for model in MODELS:
        import_vila(FOLDER / CHECKPOINTS[model], tmp_path / model)
        config = json.loads((tmp_path / model / "config.json").read_text())
        assert opened(tmp_path / model).config.image_seq_length == config["image_seq_length"]
        kinds[model] = (config["model_type"], config.get("projector_type"), config["image_seq_length"])
        assert bool(list((tmp_path / model).glob("*.py"))) == ("auto_map" in config)
    assert kinds == {
        "linear": ("llava_frontend", "linear", 36),
        "mlp2x": ("llava", None, 36),
        "v15": ("llava_frontend", "mlp_downsample", 196),
    }


def test_a_two_layer_projector_gives_what_import_llava_gives(tmp_path):
    import_vila(FOLDER / "checkpoint_v1_mlp2x", tmp_path / "vila")
    import_llava(FOLDER / "checkpoint_v1_mlp2x", tmp_path / "llava")
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("vila", "llava")]
    assert configs[0] == configs[1]
    ours, theirs = (weights_of(tmp_path / name) for name in ("vila", "llava"))
    assert {name: bytes_of(one) for name, one in ours.items()} == {name: bytes_of(one) for name, one in theirs.items()}


@pytest.mark.parametrize("model", MODELS)
def test_every_tensor_of_the_source_is_written_or_dropped_with_a_reason(tmp_path, model):
    summary = import_vila(FOLDER / CHECKPOINTS[model], tmp_path / "out")
    files = sorted((FOLDER / CHECKPOINTS[model]).rglob("*.safetensors"))
    source = {}
    for path in files:
        part = f"{path.parent.name}/" if model == "v15" else ""
        source |= {part + name: tensor for name, tensor in load_file(path).items()}
    assert source.keys() == summary.renamed.keys() | summary.dropped.keys()
    assert not summary.renamed.keys() & summary.dropped.keys() and all(summary.dropped.values())
    assert {name.split(".")[1] for name in summary.dropped} <= {"head"}
    written = weights_of(tmp_path / "out")
    assert sorted(summary.renamed.values()) == sorted(written)
    for old, new in summary.renamed.items():
        assert torch.equal(written[new][: len(source[old])], source[old]), old


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_parts_keep_their_dtypes(tmp_path, dtype):
    source = vila_source(tmp_path, "v15")
    change_part(source / "llm", lambda weights: weights.update({name: one.to(dtype) for name, one in weights.items()}))
    change_json(source / "llm" / "config.json", torch_dtype=str(dtype).removeprefix("torch."))
    import_vila(source, tmp_path / "out")
    new = weights_of(tmp_path / "out")
    assert new["language_model.lm_head.weight"].dtype == dtype
    assert new["multi_modal_projector.norm.weight"].dtype == torch.float32
    assert opened(tmp_path / "out").dtype == dtype


def test_shards_of_a_part_are_read(tmp_path):
    source = vila_source(tmp_path, "v15")
    weights = load_file(source / "llm" / "model.safetensors")
    names, files = sorted(weights), ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    halves = dict(zip(files, (names[:20], names[20:]), strict=True))
    for file, half in halves.items():
        save_file({name: weights[name] for name in half}, source / "llm" / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, half in halves.items() for name in half}}
    (source / "llm" / "model.safetensors.index.json").write_text(json.dumps(index))
    (source / "llm" / "model.safetensors").unlink()
    import_vila(FOLDER / "checkpoint_v15", tmp_path / "whole")
    import_vila(source, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 4
    ours, theirs = weights_of(tmp_path / "out"), weights_of(tmp_path / "whole")
    assert {name: bytes_of(one) for name, one in ours.items()} == {name: bytes_of(one) for name, one in theirs.items()}


@pytest.mark.parametrize("projector_type", ["mlp1x_gelu", "mlp3x_gelu", "identity", "mlp2x_gelu"])
@torch.no_grad()
def test_other_projectors_of_either_layout(tmp_path, projector_type):
    """Fresh weights; the numbers of every projector are those of test_projectors.py."""
    depth = 0 if projector_type == "identity" else int(projector_type[3])
    for model, prefix in (("linear", "model.mm_projector."), ("v15", "layers.")):
        source = vila_source(tmp_path / model, model)
        width = 32 if model == "linear" else 24
        if projector_type == "identity" and model == "v15":
            continue  # its tower is not as wide as its language model, nor is that of v1.0
        made = {}
        for number in range(depth):
            made[f"{prefix}{2 * number}.weight"] = torch.randn(64, width if number == 0 else 64)
            made[f"{prefix}{2 * number}.bias"] = torch.randn(64)

        def change(weights, made=made, prefix=prefix):
            for name in [name for name in weights if name.startswith(prefix)]:
                del weights[name]
            weights.update(made)

        change_part(source if model == "linear" else source / "mm_projector", change)
        entries = source / "config.json" if model == "linear" else source / "mm_projector" / "config.json"
        change_json(entries, mm_projector_type=projector_type)
        if model == "v15":
            change_json(source / "config.json", mm_projector_cfg=str(source / "mm_projector"))
        if projector_type == "identity":
            with pytest.raises(ValueError, match=r"features of 32 channels .* hidden size 64"):
                import_vila(source, tmp_path / "out")
            continue
        import_vila(source, tmp_path / model / "out")
        base = opened(tmp_path / model / "out")
        features = torch.randn(1, 5, width)
        states = features
        for number in range(depth):
            states = torch.nn.functional.gelu(states) if number else states
            states = states @ made[f"{prefix}{2 * number}.weight"].T + made[f"{prefix}{2 * number}.bias"]
        torch.testing.assert_close(base.model.multi_modal_projector(features), states, rtol=1e-5, atol=1e-4)
        assert base.config.model_type == ("llava" if projector_type == "mlp2x_gelu" else "llava_frontend")
        assert base.config.image_seq_length == (36 if model == "linear" else 729)


def test_a_tower_of_clip_in_the_layout_of_15(tmp_path):
    source = vila_source(tmp_path, "v15")
    shutil.rmtree(source / "vision_tower")
    shutil.copytree(FOLDER / "vision_tower_clip", source / "vision_tower")
    change_part(
        source / "mm_projector",
        lambda weights: weights.update(
            {
                "layers.1.weight": torch.ones(128),
                "layers.1.bias": torch.ones(128),
                "layers.2.weight": torch.ones(64, 128),
            }
        ),
    )
    change_json(source / "config.json", vision_tower_cfg="vision_tower", mm_vision_select_feature="patch")
    import_vila(source, tmp_path / "out")
    base, processor = opened(tmp_path / "out"), processor_of(tmp_path / "out")
    text = processor.apply_chat_template([said("user", None, "what?")])
    inputs = processor(images=picture("wide"), text=text, return_tensors="pt")
    assert (inputs["input_ids"] == base.config.image_token_index).sum() == base.config.image_seq_length == 9
    assert base(**inputs).logits.isfinite().all()


# ---------------------------------------- another resolution


@torch.no_grad()
def test_another_resolution_is_made_once_at_the_import(tmp_path):
    source = vila_source(tmp_path, "v15")
    change_json(source / "config.json", vision_resolution=72)
    summary = import_vila(source, tmp_path / "out")
    assert "for vision_resolution 72 (stored for 55)" in summary.lines["positions"]
    assert "leaves 5 rows zero" in summary.lines["positions"]
    assert summary.dropped[f"vision_tower/{TABLE}"] == "made anew for vision_resolution 72"
    sizes = {new: one.numel() * one.itemsize for new, one in weights_of(tmp_path / "out").items()}
    assert summary.kept_bytes == sum(sizes.values()) - sizes[f"vision_tower.{TABLE}"] - 2 * 32 * 64 * 4
    old = load_file(source / "vision_tower" / "model.safetensors")
    base, processor = opened(tmp_path / "out"), processor_of(tmp_path / "out")
    table = base.model.vision_tower.embeddings.position_embedding.weight
    assert torch.equal(table, resized_positions(old[TABLE], 36 * 36)) and not table[0].any() and not table[-1].any()
    inputs = processor(images=[picture("wide")], text="USER: <image>\nwhat?", return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 72, 72)
    assert (inputs["input_ids"] == base.config.image_token_index).sum() == base.config.image_seq_length == 18 * 18
    # As the published code does it: the stored tower, its table replaced in memory.
    config = base.config.vision_config
    tower = SiglipVisionModel(config).eval()
    weights = {name.removeprefix("vision_model."): one for name, one in old.items() if ".head." not in name}
    tower.load_state_dict(weights | {TABLE.removeprefix("vision_model."): table})
    wanted = tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2]
    found = base.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2]
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("resolution", [-1, 55, None])
def test_the_stored_resolution_changes_nothing(tmp_path, resolution):
    source = vila_source(tmp_path, "v15")
    content = json.loads((source / "config.json").read_text()) | {"vision_resolution": resolution}
    (source / "config.json").write_text(json.dumps(content))
    assert "positions" not in import_vila(source, tmp_path / "out").lines
    new = weights_of(tmp_path / "out")[f"vision_tower.{TABLE}"]
    assert torch.equal(new, load_file(source / "vision_tower" / "model.safetensors")[TABLE])


# ---------------------------------------- prompts and pictures


def pieces(tokenizer, text):
    """Token ids as the original makes them: every piece between images apart."""
    return [tokenizer.encode(piece, add_special_tokens=False) for piece in text.split("<image>")]


def joined(parts, image, num_tokens):
    ids = parts[0]
    for part in parts[1:]:
        ids = [*ids, *[image] * num_tokens, *part]
    return ids


@pytest.mark.parametrize("model", MODELS)
def test_vicunas_prompt_keeps_images_where_they_are(tmp_path, model):
    source = vila_source(tmp_path, model)
    give_tokenizer(source, vicuna_tokenizer())
    summary = import_vila(source, tmp_path / "out")
    assert "note" not in summary.lines
    processor = processor_of(tmp_path / "out")
    talk = [said("user", None, "a cat.", None, "what is this?"), said("assistant", "a hat"), said("user", "where?")]
    written = processor.apply_chat_template(talk, add_generation_prompt=True)
    wanted = f"{VICUNA_SYSTEM} USER: <image>\na cat.<image>\nwhat is this? ASSISTANT: a hat</s>USER: where? ASSISTANT:"
    assert written.replace("<image> \n", "<image>\n") == wanted
    found = processor(images=[picture("wide"), picture("tall")], text=written)["input_ids"][0]
    num_tokens = 196 if model == "v15" else 36
    parts = pieces(vicuna_tokenizer(), wanted)
    assert found == [1, *joined(parts, processor.image_token_id, num_tokens)]
    segments = [said("system", "Be brief."), talk[0]]
    assert processor.apply_chat_template(segments).startswith("Be brief. USER: <image>")


@pytest.mark.parametrize("adds_start", [True, False])
def test_llama3s_prompt_is_the_published_one(tmp_path, adds_start):
    source, tokenizer = vila_source(tmp_path, "v15"), llama3_tokenizer(adds_start)
    give_tokenizer(source, tokenizer)
    summary = import_vila(source, tmp_path / "out")
    assert "note" not in summary.lines
    processor = processor_of(tmp_path / "out")
    talk = [said("user", None, None, "what is this?"), said("assistant", "a hat"), said("user", "where?")]
    head = "<|start_header_id|>{}<|end_header_id|>\n\n"
    body = f"{head.format('system')}{LLAMA3_SYSTEM}<|eot_id|>"
    body += f"{head.format('user')}<image>\n<image>\nwhat is this?<|eot_id|>"
    body += f"{head.format('assistant')}a hat<|eot_id|>{head.format('user')}where?<|eot_id|>{head.format('assistant')}"
    written = processor.apply_chat_template(talk, add_generation_prompt=True)
    assert written == ("" if adds_start else "<|begin_of_text|>") + body
    images = [picture("wide"), picture("tall")]
    for image, part in zip(images, talk[0]["content"], strict=False):
        part["image"] = image
    found = processor(images=images, text=written)["input_ids"][0]
    start = tokenizer.convert_tokens_to_ids("<|begin_of_text|>")
    assert found == [start, *joined(pieces(tokenizer, body), processor.image_token_id, 196)]
    whole = processor.apply_chat_template(talk, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert whole["input_ids"][0] == found and len(whole["pixel_values"]) == 2
    assert processor.apply_chat_template(talk[:2]).endswith("a hat<|end_of_text|>")


def test_llama3s_answers_end_with_a_turn_or_the_text(tmp_path):
    source = vila_source(tmp_path, "v15")
    give_tokenizer(source, llama3_tokenizer())
    import_vila(source, tmp_path / "out")
    base, tokenizer = opened(tmp_path / "out"), processor_of(tmp_path / "out").tokenizer
    ends = tokenizer.convert_tokens_to_ids(["<|eot_id|>", "<|end_of_text|>"])
    assert set(ends) <= set(base.generation_config.eos_token_id) and tokenizer.eos_token == "<|eot_id|>"


def test_llama3s_labels_hold_the_end_of_an_answer(tmp_path):
    source = vila_source(tmp_path, "v15")
    give_tokenizer(source, llama3_tokenizer())
    import_vila(source, tmp_path / "out")
    processor = RoeLlavaProcessor.from_pretrained(tmp_path / "out")
    talk = [said("user", None, None, "what?"), said("assistant", "a hat"), said("user", "where?")]
    talk += [said("assistant", "here")]
    for part in talk[0]["content"][:2]:
        part["image"] = picture("wide")
    options = {"return_labels": True}
    data = processor.apply_chat_template([talk], tokenize=True, return_dict=True, processor_kwargs=options)
    labels = [one for one in data["labels"][0] if one != -100]
    assert processor.tokenizer.decode(labels).replace("\n", "") == "a hat<|eot_id|>here<|end_of_text|>"
    segments, ids = data["routing_segments"][0], data["input_ids"][0]
    image = processor.image_token_id
    assert {segment for segment, one in zip(segments, ids, strict=True) if one == image} == {0}
    questions = [[one for one, segment in zip(ids, segments, strict=True) if segment == turn] for turn in (1, 2)]
    assert "what?" in processor.tokenizer.decode(questions[0]) and "where?" in processor.tokenizer.decode(questions[1])


@pytest.mark.parametrize("model", MODELS)
def test_a_tokenizer_without_a_padding_side_pads_left(tmp_path, model):
    source = vila_source(tmp_path, model)
    change_json(text_folder(source) / "tokenizer_config.json", legacy=False)
    content = json.loads((text_folder(source) / "tokenizer_config.json").read_text())
    content.pop("padding_side", None)
    (text_folder(source) / "tokenizer_config.json").write_text(json.dumps(content))
    import_vila(source, tmp_path / "out")
    assert processor_of(tmp_path / "out").tokenizer.padding_side == "left"


def test_joined_blanks_of_a_tokenizer_are_said(tmp_path):
    summary = import_vila(FOLDER / "checkpoint_v15", tmp_path / "out")
    assert "tokenizer.model drops blanks at the ends of a text" in summary.lines["note"]


@pytest.mark.parametrize(
    "side, num_tokens, expected", [(384, 196, (27, 0)), (336, 576, (14, 0)), (336, 577, (14, 1)), (55, 196, (4, 27))]
)
def test_a_processor_counts_the_tokens_a_projector_makes(side, num_tokens, expected):
    assert token_counting(side, num_tokens) == expected


def test_pictures_are_cropped_or_squeezed_as_the_config_says(tmp_path):
    for aspect in (None, "resize"):
        source = vila_source(tmp_path / str(aspect), "linear")
        content = json.loads((source / "config.json").read_text()) | {"image_aspect_ratio": aspect}
        (source / "config.json").write_text(json.dumps(content))
        import_vila(source, tmp_path / str(aspect) / "out")
        found = processor_of(tmp_path / str(aspect) / "out").image_processor(picture("wide"), return_tensors="np")
        wide, (mean, std) = picture("wide"), ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
        if aspect == "resize":
            small = wide.resize((42, 42), Image.Resampling.BICUBIC)
        else:
            width = int(42 * wide.width / wide.height)
            small = wide.resize((width, 42), Image.Resampling.BICUBIC)
            left = (width - 42) // 2
            small = small.crop((left, 0, left + 42, 42))
        wanted = ((np.asarray(small, dtype=np.float64) / 255 - mean) / std).transpose(2, 0, 1)
        np.testing.assert_allclose(found["pixel_values"][0], wanted, atol=1e-5)


# ---------------------------------------- the folder


OPEN = """
    import torch
    from PIL import Image
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline

    trust = {"trust_remote_code": True}
    for folder in sys.argv[1:]:
        expected = load_file(f"{folder}.safetensors")
        logits = expected.pop("logits")
        assert AutoConfig.from_pretrained(folder, **trust).model_type == "llava_frontend"
        processor = AutoProcessor.from_pretrained(folder, **trust)
        assert type(processor).__name__ == "LlavaProcessor"
        for auto in (AutoModel, AutoModelForImageTextToText):
            model = auto.from_pretrained(folder, **trust).eval()
            assert type(model).__name__ == "FrontendLlavaForConditionalGeneration"
            with torch.no_grad():
                assert torch.equal(model(**expected).logits, logits)
        image = Image.new("RGB", (60, 40), "red")
        parts = [{"type": "image", "image": image}, {"type": "image", "image": image}, {"type": "text", "text": "what"}]
        ask = pipeline("image-text-to-text", model=folder, **trust)
        ask(text=[{"role": "user", "content": parts}], max_new_tokens=4, do_sample=False)
        model.save_pretrained(f"{folder}_again")
        processor.save_pretrained(f"{folder}_again")
        again = AutoModelForImageTextToText.from_pretrained(f"{folder}_again", **trust).eval()
        with torch.no_grad():
            assert torch.equal(again(**expected).logits, logits)
        assert len(processor(text="a b", images=None)["input_ids"][0]) > 0
    assert not [name for name in sys.modules if name.partition(".")[0] == "roe_llava"]
    print("opened")
"""


def test_folders_open_without_the_package(tmp_path):
    models = ("linear", "v15")
    for model in models:
        import_vila(FOLDER / CHECKPOINTS[model], tmp_path / model)
        base = opened(tmp_path / model)
        inputs = inputs_of(model, base, "p1")
        with torch.no_grad():
            logits = base(**inputs).logits
        save_file(inputs | {"logits": logits.contiguous()}, tmp_path / f"{model}.safetensors")
    done = run_fresh(tmp_path, OPEN, *models)
    assert done.stdout.endswith("opened\n"), done.stderr


def test_a_stock_folder_opens_with_stock_transformers(tmp_path):
    import_vila(FOLDER / "checkpoint_v1_mlp2x", tmp_path / "mlp2x")
    script = """
        from transformers import AutoModelForImageTextToText, AutoProcessor
        model = AutoModelForImageTextToText.from_pretrained("mlp2x")
        assert type(model).__name__ == "LlavaForConditionalGeneration"
        assert type(AutoProcessor.from_pretrained("mlp2x")).__name__ == "LlavaProcessor"
        print("opened")
    """
    done = run_fresh(tmp_path, script)
    assert done.stdout.endswith("opened\n"), done.stderr


@pytest.mark.parametrize("model", MODELS)
def test_the_tokenizer_reads_alike_from_both_classes(tmp_path, model):
    source = vila_source(tmp_path, model)
    give_tokenizer(source, vicuna_tokenizer())
    import_vila(source, tmp_path / "out")
    texts = ["USER: <image> \nwhat is this? ASSISTANT:", " a  b</s>USER: c"]
    whole = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    inner = processor_of(tmp_path / "out").tokenizer
    assert [whole.encode(text) for text in texts] == [inner.encode(text) for text in texts]
    assert (tmp_path / "out" / "original_tokenizer" / "tokenizer.json").is_file()


def test_a_dry_run_reads_everything_and_writes_nothing(tmp_path):
    source = vila_source(tmp_path, "v15")
    summary = import_vila(source, tmp_path / "out", dry_run=True)
    assert "dry run" in str(summary) and not (tmp_path / "out").exists()
    change_part(source / "mm_projector", lambda weights: weights["layers.2.bias"].fill_(float("nan")))
    with pytest.raises(ValueError, match=r"layers\.2\.bias in .*mm_projector.* holds NaN"):
        import_vila(source, tmp_path / "out", dry_run=True)


def test_nothing_is_overwritten_unasked(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(ValueError, match=r"exists and is not empty"):
        import_vila(FOLDER / "checkpoint_v15", tmp_path / "out")
    import_vila(FOLDER / "checkpoint_v15", tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "mine").exists()


def test_a_target_within_the_source_is_refused(tmp_path):
    source = vila_source(tmp_path, "v15")
    with pytest.raises(ValueError, match=r"holds .* which is read"):
        import_vila(source, source / "llm", overwrite=True)


def test_command_line(tmp_path, capsys):
    assert main(["import-vila", str(FOLDER / "checkpoint_v15"), str(tmp_path / "out")]) == 0
    assert "siglip_vision_model, mlp_downsample, 196 tokens per image" in capsys.readouterr().out


def test_prompts_without_an_image_use_none(tmp_path):
    import_vila(FOLDER / "checkpoint_v15", tmp_path / "out")
    base, processor = opened(tmp_path / "out"), processor_of(tmp_path / "out")
    texts, images = zip(*(about_prompt("v15", prompt) for prompt in PROMPTS), strict=True)
    inputs = processor(
        images=[one for row in images for one in row], text=list(texts), padding=True, return_tensors="pt"
    )
    per_row = (inputs["input_ids"] == processor.image_token_id).sum(dim=1).tolist()
    assert per_row == [196, 392, 0] and len(inputs["pixel_values"]) == 3
    assert base(**inputs).logits.isfinite().all()
