"""import-llava-hr: a published LLaVA-HR becomes a base of ours with the same weights, prompts and pictures."""

import re

import numpy as np
import pytest
import torch
from golden_hr_helpers import CASES, FOLDER, MANIFEST, MEAN, PROMPTS, STD, pixels_of, recorded
from hr_helpers import VOCAB, published, published_x, without_adapters
from original_helpers import llama_tokenizer, make_original, read_weights
from PIL import Image
from safetensors.torch import save_file
from test_remote_code import run_fresh
from transformers import AutoProcessor

from roe_llava import RoeLlavaForConditionalGeneration, RoeLlavaProcessor
from roe_llava.cli import main
from roe_llava.convert.adapter_file import save_adapter
from roe_llava.convert.extract import extract
from roe_llava.convert.graft import graft
from roe_llava.convert.import_llava import import_llava
from roe_llava.convert.import_llava_hr import import_llava_hr
from roe_llava.modeling_frontend import FrontendLlavaForConditionalGeneration

# Single precision is up to 1e-5 from double in the recording.
CLOSE = {"rtol": 0, "atol": 3e-5}
IMAGE = 127  # a token that no recorded text holds


def as_recorded(folder):
    """An imported checkpoint with the old vocabulary, a placeholder within it, end of sequence disabled."""
    model = FrontendLlavaForConditionalGeneration.from_pretrained(folder).eval()
    model.resize_token_embeddings(128)  # losses were recorded over so many
    model.config.image_token_index = IMAGE
    model.generation_config.suppress_tokens = model.generation_config.eos_token_id = None
    return model


def spliced(row, num_patches, fill=IMAGE):
    """(1, N) ids with every placeholder replaced by its patches."""
    return torch.tensor([[one for token in row for one in ([fill] * num_patches if token == -200 else [token])]])


def inputs_of(prompt):
    """The model's inputs for a recorded prompt, with labels."""
    given, about = recorded("prompts"), PROMPTS[prompt]
    ids, labels = given[f"{prompt}/input_ids"][0].tolist(), given[f"{prompt}/labels"][0].tolist()
    labels = [-200 if token == -200 else label for token, label in zip(ids, labels, strict=True)]
    patches = about["image_tokens_each"]
    inputs = {"input_ids": spliced(ids, patches), "labels": spliced(labels, patches, fill=-100)}
    return inputs | ({"pixel_values": pixels_of(about["images"])} if about["images"] else {})


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """The recorded checkpoint, imported."""
    parent = tmp_path_factory.mktemp("hr")
    import_llava_hr(published(parent), parent / "out")
    return parent / "out"


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """The recorded checkpoint with a tokenizer, imported."""
    parent = tmp_path_factory.mktemp("hr_spoken")
    import_llava_hr(published(parent, tokenizer=True), parent / "out")
    return parent / "out"


# ---------------------------------------- the recorded model


@pytest.mark.parametrize("prompt", PROMPTS)
def test_logits_loss_and_tokens_are_the_published_ones(imported, prompt):
    model, given, inputs = as_recorded(imported), recorded("prompts"), inputs_of(prompt)
    assert IMAGE not in given[f"{prompt}/input_ids"] and IMAGE not in given[f"{prompt}/tokens"]
    gates = []
    for adapter in model.model.vision_tower.adapters:
        adapter.gate_2.register_forward_hook(lambda module, inputs, output: gates.append(output.tanh()))
    with torch.no_grad():
        outputs = model(**inputs, output_hidden_states=True)
    assert outputs.logits.shape[1] == PROMPTS[prompt]["sequence_length"]
    torch.testing.assert_close(outputs.logits[0, given[f"{prompt}/positions"]], given[f"{prompt}/logits"], **CLOSE)
    torch.testing.assert_close(outputs.loss, given[f"{prompt}/loss"], **CLOSE)
    states = torch.stack([state[0, -1] for state in outputs.hidden_states])
    torch.testing.assert_close(states, given[f"{prompt}/last_hidden_by_layer"], **CLOSE)
    for number, gate in enumerate(gates):
        torch.testing.assert_close(gate, given[f"{prompt}/align{number}_gate"], rtol=0, atol=1e-6)
    assert len(gates) == (3 if "pixel_values" in inputs else 0)
    inputs.pop("labels")
    said = model.generate(**inputs, max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True)
    assert torch.equal(said.sequences[0, -8:], given[f"{prompt}/tokens"])
    torch.testing.assert_close(torch.cat(said.logits), given[f"{prompt}/step_logits"], **CLOSE)


def features_and_projected(folder, case):
    """(1, N, C) features and (1, N, D) image tokens of a case's pictures, every fourth."""
    model = FrontendLlavaForConditionalGeneration.from_pretrained(folder).eval()
    pixels = pixels_of(CASES[case]["images"])
    with torch.no_grad():
        outputs = model.get_image_features(pixels)
    return model, outputs.hidden_states[-1][:, ::4], torch.stack(list(outputs.pooler_output))[:, ::4]


@pytest.mark.parametrize("case", ["small", "full", "frozen"])
def test_projected_tokens_are_the_published_ones(tmp_path, case):
    frozen = {"change": without_adapters, "freeze_vision": True} if case == "frozen" else {}
    import_llava_hr(published(tmp_path, input_image_size=CASES[case]["input_image_size"], **frozen), tmp_path / "out")
    model, features, projected = features_and_projected(tmp_path / "out", case)
    torch.testing.assert_close(features, recorded()[f"{case}/features"], **CLOSE)
    torch.testing.assert_close(projected, recorded()[f"{case}/projected"], **CLOSE)
    assert model.config.image_seq_length == CASES[case]["fast_tokens"]
    assert (len(model.model.vision_tower.adapters) == 0) == (case == "frozen")


@pytest.mark.parametrize("case", ["x_equal", "x_pool"])
def test_tower_of_the_x_flavour_has_its_own_eps(tmp_path, case):
    import_llava_hr(published_x(tmp_path, input_image_size=CASES[case]["input_image_size"]), tmp_path / "out")
    model, features, _ = features_and_projected(tmp_path / "out", case)
    assert model.config.vision_config.slow_config.layer_norm_eps == 1e-5
    torch.testing.assert_close(features, recorded()[f"{case}/features"], **CLOSE)


@pytest.mark.parametrize("files", ["sharded_bin", "safetensors", "one_safetensors"])
def test_every_form_of_weight_files_gives_the_same_tensors(tmp_path, imported, files):
    import_llava_hr(published(tmp_path, files), tmp_path / "out")
    expected, found = read_weights(imported), read_weights(tmp_path / "out")
    assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tensors_keep_their_bytes_and_dtype(tmp_path, dtype):
    source = published(tmp_path, dtype=dtype, torch_dtype=str(dtype).removeprefix("torch."))
    old = read_weights(source)
    import_llava_hr(source, tmp_path / "out")
    new = read_weights(tmp_path / "out")
    assert all(tensor.dtype == dtype for tensor in new.values())
    tower = "model.vision_tower."
    pairs = {
        "adapters.1.slow_conv.weight": old[f"{tower}align_stages_latent.1.slow_conv.weight"][:, :, 0, 0],
        "adapters.2.gate_2.bias": old[f"{tower}align_stages_latent.2.gate.2.bias"],
        "slow.stages.1.layers.1.layer_scale_parameter": old[
            f"{tower}slow_vision_tower.vision_tower.stages.1.blocks.1.weight"
        ],
        "fast.embeddings.position_embedding.weight": old[
            f"{tower}fast_vision_tower.vision_tower.vision_model.embeddings.position_embedding.weight"
        ][1:],
    }
    for name, expected in pairs.items():
        assert torch.equal(new[f"vision_tower.{name}"], expected)
    assert FrontendLlavaForConditionalGeneration.from_pretrained(tmp_path / "out").dtype == dtype


def test_layer_scale_under_its_other_name_is_read(tmp_path, imported):
    def rename(weights):
        for name in [name for name in weights if re.search(r"blocks\.\d+\.weight$", name)]:
            weights[name.removesuffix("weight") + "gamma"] = weights.pop(name)

    import_llava_hr(published(tmp_path, change=rename), tmp_path / "out")
    expected, found = read_weights(imported), read_weights(tmp_path / "out")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_every_tensor_is_used_or_dropped_with_a_reason(tmp_path):
    source = published(tmp_path)
    summary = import_llava_hr(source, tmp_path / "out", dry_run=True)
    assert not (tmp_path / "out").exists()
    assert read_weights(source).keys() == summary.renamed.keys() | summary.dropped.keys()
    assert not summary.renamed.keys() & summary.dropped.keys() and all(summary.dropped.values())
    assert "384 pixels, 576 tokens each" in str(summary)


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention"])
def test_attention_can_be_chosen_by_name(imported, attention):
    options = {"attn_implementation": attention}
    model = FrontendLlavaForConditionalGeneration.from_pretrained(imported, **options).eval()
    assert model.model.vision_tower.fast.config._attn_implementation == attention
    with torch.no_grad():
        features = model.get_image_features(pixels_of(CASES["small"]["images"])).hidden_states[-1]
    torch.testing.assert_close(features[:, ::4], recorded()["small/features"], **CLOSE)


# ---------------------------------------- the folder


OPEN = """
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

    expected = load_file("expected.safetensors")
    for auto in (AutoModel, AutoModelForImageTextToText):
        model = auto.from_pretrained("out", trust_remote_code=True).eval()
        assert type(model).__name__ == "FrontendLlavaForConditionalGeneration"
        with torch.no_grad():
            logits = model(input_ids=expected["input_ids"], pixel_values=expected["pixel_values"]).logits
        assert torch.equal(logits, expected["logits"])
    processor = AutoProcessor.from_pretrained("out", trust_remote_code=True)
    assert torch.equal(processor(text="USER: what?", return_tensors="pt")["input_ids"], expected["words"])
    model.save_pretrained("again")
    again = AutoModelForImageTextToText.from_pretrained("again", trust_remote_code=True).eval()
    with torch.no_grad():
        logits = again(input_ids=expected["input_ids"], pixel_values=expected["pixel_values"]).logits
    assert torch.equal(logits, expected["logits"])
    assert not [name for name in sys.modules if name.partition(".")[0] == "roe_llava"]
    print("opened")
"""


def test_opens_in_a_process_without_the_package(spoken):
    model = FrontendLlavaForConditionalGeneration.from_pretrained(spoken).eval()
    ids = spliced([1, 20, -200, 30, 31, 32], 576, fill=model.config.image_token_index)
    pixels = pixels_of(["images/wide_pad_384.png"])
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=pixels).logits
    words = torch.tensor([llama_tokenizer().encode("USER: what?")])
    expected = {"input_ids": ids, "pixel_values": pixels.contiguous(), "logits": logits, "words": words}
    save_file(expected, spoken.parent / "expected.safetensors")
    done = run_fresh(spoken.parent, OPEN)
    assert "opened" in done.stdout, done.stderr


@pytest.mark.parametrize("case", MANIFEST["preprocess"]["cases"])
def test_pixels_are_the_published_ones_to_the_bit(tmp_path, case):
    about = MANIFEST["preprocess"]["cases"][case]
    import_llava_hr(
        published(tmp_path, tokenizer=True, image_aspect_ratio=about["image_aspect_ratio"]), tmp_path / "out"
    )
    processor = AutoProcessor.from_pretrained(tmp_path / "out", backend="pil", trust_remote_code=True)
    picture = Image.open(FOLDER / about["picture"])
    found = np.asarray(processor.image_processor(picture, return_tensors="np")["pixel_values"])
    expected = (np.asarray(Image.open(FOLDER / about["result"]), dtype=np.float32) / 255 - np.float32(MEAN)) / STD
    levels = ((found[0].transpose(1, 2, 0) * STD + MEAN) * 255).round()
    assert np.array_equal(levels, np.asarray(Image.open(FOLDER / about["result"])))
    np.testing.assert_allclose(found[0].transpose(1, 2, 0), expected, rtol=0, atol=1e-6)
    assert np.array_equal(found[..., ::16, ::16], recorded()[f"preprocess/{case}/pixel_values_sub"].numpy())


@pytest.mark.parametrize("size, tokens", [(384, 576), (768, 576), (1024, 1024)])
def test_processor_writes_as_many_tokens_as_the_tower_makes(tmp_path, size, tokens):
    import_llava_hr(published(tmp_path, tokenizer=True, input_image_size=size), tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True)
    model = FrontendLlavaForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is this?"}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(images=Image.open(FOLDER / "images" / "wide.png"), text=text, return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, size, size)
    assert (inputs["input_ids"] == model.config.image_token_index).sum() == tokens == model.config.image_seq_length
    with torch.no_grad():
        assert len(model(**inputs).image_hidden_states) == tokens


def test_prompt_has_the_tokens_of_pieces_tokenized_apart(spoken):
    """The published code cuts a prompt at <image> and tokenizes each piece alone."""
    processor, old = AutoProcessor.from_pretrained(spoken, trust_remote_code=True), llama_tokenizer()
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is this?"}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    picture = Image.open(FOLDER / "images" / "tall.png")
    found = processor(images=picture, text=text, return_tensors="pt")["input_ids"][0].tolist()
    before = text[: text.index("<image>")]
    pieces = [old.encode(piece, add_special_tokens=False) for piece in (before, "\nwhat is this? ASSISTANT:")]
    assert found == [1, *pieces[0], *[VOCAB] * 576, *pieces[1]]
    of_routed = RoeLlavaProcessor.from_pretrained(spoken)(images=picture, text=text, return_tensors="pt")
    assert found == of_routed["input_ids"][0].tolist()


# ---------------------------------------- routing on it


@pytest.fixture(scope="module")
def routed(spoken):
    """The imported base with untrained routing parts."""
    torch.manual_seed(0)
    config = RoeLlavaForConditionalGeneration.config_class.from_pretrained(spoken, adapter_size=8)
    base = FrontendLlavaForConditionalGeneration.from_pretrained(spoken)
    model = RoeLlavaForConditionalGeneration.from_pretrained(spoken, config=config, allow_untrained=True).eval()
    assert type(model.model.vision_tower).__name__ == "LlavaHrVisionModel"
    return base.eval(), model


def test_all_layers_kept_equals_the_base(routed):
    base, model = routed
    ids = spliced([1, 20, -200, 30, 31, 32], 576, fill=base.config.image_token_index)
    inputs = {"input_ids": ids, "pixel_values": pixels_of(["images/wide_pad_384.png"])}
    with torch.no_grad():
        assert torch.equal(model(**inputs, route_bias=float("inf")).logits, base(**inputs).logits)
        skipped = model(**inputs, routes=torch.tensor([[True, False, True, True]]))
    assert not torch.equal(skipped.logits, base(**inputs).logits)


def test_grafted_and_extracted_again(routed, spoken, tmp_path):
    _, model = routed
    save_adapter(model, model.config, tmp_path / "adapter", base=spoken)
    graft(spoken, tmp_path / "adapter", tmp_path / "roe")
    opened = RoeLlavaForConditionalGeneration.from_pretrained(tmp_path / "roe").eval()
    processor = RoeLlavaProcessor.from_pretrained(tmp_path / "roe")
    pictures = [Image.open(FOLDER / "images" / name) for name in ("wide.png", "tall.png")]
    text = [f"USER: <image> \n{question} ASSISTANT:" for question in ("what?", "where is it?")]
    inputs = processor(images=pictures, text=text, padding=True, return_tensors="pt")
    assert (inputs["routing_segments"] == 0).sum() >= 2 * 576
    together = opened.generate(**inputs, max_new_tokens=4, do_sample=False)
    for row, (picture, question) in enumerate(zip(pictures, text, strict=True)):
        alone = opened.generate(
            **processor(images=picture, text=question, return_tensors="pt"), max_new_tokens=4, do_sample=False
        )
        assert torch.equal(alone[0, -4:], together[row, -4:])
    extract(tmp_path / "roe", tmp_path / "taken")
    again = RoeLlavaForConditionalGeneration.from_base(spoken, tmp_path / "taken").eval()
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, opened(**inputs).logits)


def test_verify_holds_on_it_and_asks_nothing(spoken, capfd, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda prompt="": pytest.fail(f"asked: {prompt}"))
    assert main(["verify", str(spoken)]) == 0
    printed = capfd.readouterr().out
    assert "3 of 3 checks passed" in printed and "custom code" not in printed


# ---------------------------------------- commands and bad input


def test_command_line(tmp_path, capsys):
    source, out = published(tmp_path), tmp_path / "out"
    assert main(["import-llava-hr", str(source), str(out), "--dry-run"]) == 0 and not out.exists()
    assert main(["import-llava-hr", str(source), str(out)]) == 0
    assert "384 pixels, 576 tokens each" in capsys.readouterr().out
    assert main(["import-llava-hr", str(source), str(out)]) == 2 and "--overwrite" in capsys.readouterr().err
    assert main(["import-llava-hr", str(source), str(out), "--overwrite"]) == 0


def test_named_tower_wins_over_the_config(tmp_path):
    source = published(tmp_path, mm_vision_tower="somewhere/else")
    (tmp_path / "vision_tower").rename(tmp_path / "clip")
    import_llava_hr(source, tmp_path / "out", vision_tower=tmp_path / "clip")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_import_llava_names_the_right_command(tmp_path):
    with pytest.raises(ValueError, match=r"is_multipath_encoder True.*use import-llava-hr"):
        import_llava(published(tmp_path), tmp_path / "out")


def test_a_llava_with_one_tower_is_sent_to_the_right_command(tmp_path):
    source, _ = make_original(tmp_path)
    with pytest.raises(ValueError, match=r"is_multipath_encoder None, expected true.*goes through import-llava"):
        import_llava_hr(source, tmp_path / "out")


FIRST_BLOCK = "model.vision_tower.slow_vision_tower.vision_tower.stages.0.blocks.0"
PLACES = "model.vision_tower.fast_vision_tower.vision_tower.vision_model.embeddings.position_embedding.weight"
ADAPTER = "model.vision_tower.align_stages_latent.0"


def put(name, tensor):
    return lambda weights: weights.update({name: tensor})


def lose(name):
    return lambda weights: weights.pop(name)


@pytest.mark.parametrize(
    "change, message",
    [
        (put("model.vision_tower.extra.weight", torch.ones(2)), "vision_tower.extra.weight in .* is no tensor of the"),
        (put(f"{ADAPTER}.slow_conv.x", torch.ones(2)), rf"{ADAPTER}.slow_conv.x in .* is no tensor of the model"),
        (lose(f"{ADAPTER}.fast_conv.bias"), rf"lacks {ADAPTER}.fast_conv.bias, expected"),
        (lose(f"{FIRST_BLOCK}.weight"), rf"lacks {FIRST_BLOCK}.weight, expected"),
        (lose(f"{FIRST_BLOCK}.mlp.fc1.bias"), rf"lacks {FIRST_BLOCK}.mlp.fc1.bias, expected"),
        (lose(f"{FIRST_BLOCK}.conv_dw.weight"), rf"lacks {FIRST_BLOCK}.conv_dw.weight: was a shard lost"),
        (lose("model.vision_tower.align_stages.0.slow_proj.weight"), "lacks .*align_stages.0.slow_proj.weight"),
        (lose("model.mm_projector.2.bias"), "lacks model.mm_projector.2.bias"),
        (
            put(f"{ADAPTER}.gate.2.weight", torch.ones(2, 16)),
            r"gate.2.weight in .* has shape \[2, 16\], expected \[1, 16",
        ),
        (
            put(f"{ADAPTER}.slow_proj.weight", torch.ones(32, 48, 3, 3)),
            "slow_proj.weight in .*expected a convolution over",
        ),
        (put(PLACES, torch.ones(577)), "position_embedding.weight in .* is F32 .577., expected a row for the class"),
        (
            put(PLACES, torch.ones(26, 32)),
            r"position_embedding.weight in .* has shape \[26, 32\], expected \[577, 32\]",
        ),
        (put(f"{FIRST_BLOCK}.gamma", torch.ones(8)), "is there a second time under another name"),
        (without_adapters, "has freeze_vision False, but the weights hold no adapters"),
        (put(f"{ADAPTER}.gate.0.bias", torch.full((16,), float("nan"))), "gate.0.bias in .* holds NaN"),
        (
            put("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(8)),
            "inv_freq in .* does not hold the 8 rotary frequencies",
        ),
        (put(f"{ADAPTER}.gate.0.bias", torch.ones(16, dtype=torch.int8)), "is I8, expected one of F64"),
    ],
    ids=lambda value: re.sub(r"\W+", "_", value)[:50] if isinstance(value, str) else "",
)
def test_wrong_tensors_are_named(tmp_path, change, message):
    refuses(published(tmp_path, change=change), message)


@pytest.mark.parametrize(
    "entries, message",
    [
        ({"freeze_vision": True}, r"has freeze_vision True, but the weights hold adapters"),
        ({"freeze_vision": 3}, "has freeze_vision 3, expected true or false"),
        ({"input_image_size": None}, "has input_image_size None, expected the side of an image"),
        ({"input_image_size": 1000}, "image_size must be a multiple of 32"),
        ({"vision_tower_slow": None}, "has vision_tower_slow None, expected the name of a ConvNeXt"),
        ({"mm_projector_type": "linear"}, "has mm_projector_type 'linear'"),
        ({"model_type": "llava_mistral"}, "has model_type 'llava_mistral', expected 'llava'"),
        ({"model_type": "llava_hr"}, "has model_type 'llava_hr', expected one of"),
        ({"num_hidden_layers": 5}, "has num_hidden_layers 5, found tensors of 4 layers"),
        ({"image_aspect_ratio": "anyres"}, "has image_aspect_ratio 'anyres'"),
        ({"mm_vision_tower": None}, "vision tower of .* cannot be found"),
    ],
    ids=str,
)
def test_wrong_entries_are_named(tmp_path, entries, message):
    source = published(tmp_path, **entries)
    if "mm_vision_tower" in entries:
        (tmp_path / "vision_tower").rename(tmp_path / "away")
    refuses(source, message)


def test_config_of_another_tower_is_refused(tmp_path):
    source = published(tmp_path)
    path = tmp_path / "vision_tower" / "config.json"
    path.write_text(path.read_text().replace('"num_hidden_layers": 8', '"num_hidden_layers": 24'))
    refuses(source, "has num_hidden_layers 24, found tensors of 8 layers in the vision tower")


def refuses(source, message):
    """Refused by its name, in a dry run too, and nothing is left behind."""
    out = source.parent / "out"
    is_value = "holds NaN" in message
    for dry_run in (False,) if is_value else (False, True):
        with pytest.raises(ValueError, match=message):
            import_llava_hr(source, out, dry_run=dry_run)
    assert not out.exists() and not list(source.parent.glob(".out*"))
