"""import-llava: an original LLaVA-1.5 becomes a stock LLaVA with the same weights, prompts and pictures."""

import json
import shutil

import numpy as np
import pytest
import torch
from convert_helpers import change_json
from original_helpers import (
    INSIDE,
    MEAN,
    SIDE,
    change_weights,
    golden_source,
    llama_tokenizer,
    make_original,
    read_weights,
)
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration, PreTrainedTokenizerFast

from roe_llava.cli import main
from roe_llava.convert.import_llava import import_llava
from roe_llava.convert.original_processor import (
    SpecialTokens,
    add_special_tokens,
    chat_template,
    check_tokens,
    open_tokenizer,
)

VOCAB = len(llama_tokenizer())
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. "
)


def said(role, text, images=0):
    return {"role": role, "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}


def drawn(width, height):
    """A picture without any symmetry."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """(folder, stock model with the same weights)."""
    parent = tmp_path_factory.mktemp("llava")
    source, stock = make_original(parent)
    import_llava(source, parent / "out")
    return parent / "out", stock


@pytest.mark.parametrize("place", ["inside", "beside"])
@pytest.mark.parametrize("text_type", ["llama", "mistral", "qwen2"])
@torch.no_grad()
def test_logits_are_those_of_stock_llava_with_the_same_weights(tmp_path, text_type, place):
    source, stock = make_original(tmp_path, text_type, place=place)
    import_llava(source, tmp_path / "out")
    model, info = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.tensor([[1, 20, *[stock.config.image_token_index] * 4, 30, 31, 32]])
    pixels = torch.randn(1, 3, SIDE, SIDE)
    expected = stock(input_ids=ids, pixel_values=pixels).logits
    ids[ids == stock.config.image_token_index] = VOCAB
    found = model.eval()(input_ids=ids, pixel_values=pixels).logits
    assert model.config.text_config.model_type == text_type and found.shape[-1] == 384
    assert torch.equal(found[..., :VOCAB], expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tensors_keep_their_bytes_and_dtype(tmp_path, dtype):
    source, _ = make_original(tmp_path, dtype=dtype)
    old = read_weights(source)
    import_llava(source, tmp_path / "out")
    new = read_weights(tmp_path / "out")
    assert all(tensor.dtype == dtype for tensor in new.values())
    kept = new["language_model.model.embed_tokens.weight"][:VOCAB]
    assert torch.equal(kept, old["model.embed_tokens.weight"])
    assert torch.equal(new["multi_modal_projector.linear_2.bias"], old["model.mm_projector.2.bias"])
    assert LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").dtype == dtype


def open_folder_alone(source, folder):
    """A copy of a tokenizer without the config.json beside it."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, folder)
    return folder


def test_dtype_is_that_of_the_weights_where_the_config_has_none(tmp_path):
    source, _ = make_original(tmp_path, dtype=torch.float16)
    change_json(source / "config.json", torch_dtype=None)
    frequencies = 1 / 5000.0 ** (torch.arange(0, 8, 2) / 8)
    change_weights(source, lambda weights: weights.update({"model.rotary_emb.inv_freq": frequencies}))
    import_llava(source, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"


def test_special_tokens_are_those_of_llava_hf(imported):
    tokenizer = AutoTokenizer.from_pretrained(imported[0])
    config = json.loads((imported[0] / "config.json").read_text())
    assert tokenizer.convert_tokens_to_ids(["<image>", "<pad>"]) == [VOCAB, VOCAB + 1]
    assert tokenizer.pad_token == "<pad>" and tokenizer.padding_side == "left"
    assert config["image_token_index"] == VOCAB and config["text_config"]["vocab_size"] == 384
    assert config["model_type"] == "llava" and config["architectures"] == ["LlavaForConditionalGeneration"]
    assert config["text_config"]["rope_parameters"]["rope_theta"] == 5000.0


def test_generation_settings_are_kept_without_new_tokens(imported):
    settings = LlavaForConditionalGeneration.from_pretrained(imported[0]).generation_config
    assert settings.max_length is None and settings.pad_token_id == VOCAB + 1  # 512 would draw warnings
    assert settings.suppress_tokens == list(range(VOCAB, 384))


def test_pictures_are_padded_to_squares_with_clips_mean(imported):
    processor = AutoProcessor.from_pretrained(imported[0])
    for size in ((50, 20), (20, 50), (33, 33)):
        picture = drawn(*size)
        square = Image.new("RGB", (max(size), max(size)), tuple(int(part * 255) for part in MEAN))
        square.paste(picture, ((max(size) - size[0]) // 2, (max(size) - size[1]) // 2))
        pixels = np.asarray(square.resize((SIDE, SIDE), Image.Resampling.BICUBIC), dtype=np.float64) / 255
        expected = (pixels - MEAN) / [0.26862954, 0.26130258, 0.27577711]
        found = processor.image_processor(picture, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_pictures_are_cropped_where_the_config_does_not_pad(tmp_path):
    source, _ = make_original(tmp_path, image_aspect_ratio=None)
    import_llava(source, tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    picture = drawn(56, SIDE)
    pixels = np.asarray(picture.crop((14, 0, 42, SIDE)), dtype=np.float64) / 255
    expected = (pixels - MEAN) / [0.26862954, 0.26130258, 0.27577711]
    found = processor.image_processor(picture, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_prompt_is_the_one_llava_was_trained_on(imported):
    processor = AutoProcessor.from_pretrained(imported[0])
    talk = [said("user", "what is this?", images=1), said("assistant", "a cat"), said("user", "where?")]
    text = processor.apply_chat_template(talk, add_generation_prompt=True)
    blank = text.replace("<image> \n", "<image>\n")
    assert blank == f"{SYSTEM}USER: <image>\nwhat is this? ASSISTANT: a cat</s>USER: where? ASSISTANT:"
    given = [said("system", "Be brief."), *talk[:1]]
    assert processor.apply_chat_template(given).startswith("Be brief. USER: <image>")
    empty = [said("system", ""), {"role": "user", "content": "hello"}]
    assert processor.apply_chat_template(empty, add_generation_prompt=True) == "USER: hello ASSISTANT:"


def test_prompt_has_the_tokens_of_pieces_tokenized_apart(imported):
    """The original cuts a prompt at <image> and tokenizes each piece alone."""
    processor, old = AutoProcessor.from_pretrained(imported[0]), llama_tokenizer()
    text = processor.apply_chat_template([said("user", "what is this?", images=1)], add_generation_prompt=True)
    found = processor(images=drawn(40, 20), text=text, return_tensors="pt")["input_ids"][0].tolist()
    before, after = f"{SYSTEM}USER: ", "\nwhat is this? ASSISTANT:"
    pieces = [old.encode(piece, add_special_tokens=False) for piece in (before, after)]
    assert found == [1, *pieces[0], *[VOCAB] * 4, *pieces[1]]


def test_picture_and_prompt_go_through_the_model(imported):
    processor = AutoProcessor.from_pretrained(imported[0])
    model = LlavaForConditionalGeneration.from_pretrained(imported[0])
    text = processor.apply_chat_template([said("user", "what?", images=1)], add_generation_prompt=True)
    inputs = processor(images=[drawn(40, 20)] * 2, text=[text, text + " a"], padding=True, return_tensors="pt")
    assert (inputs["input_ids"][0] == VOCAB + 1).sum() > 0
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).max() <= VOCAB + 1


@pytest.mark.parametrize(
    "text_type, expected",
    [
        ("mistral", "[INST] <image>\nwhat? [/INST] a cat</s>[INST] where? [/INST]"),
        (
            "qwen2",
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\nwhat?<|im_end|>\n"
            "<|im_start|>assistant\na cat<|im_end|>\n<|im_start|>user\nwhere?<|im_end|>\n<|im_start|>assistant\n",
        ),
    ],
)
def test_prompts_of_other_language_models(tmp_path, text_type, expected):
    source, _ = make_original(tmp_path, text_type)
    import_llava(source, tmp_path / "out")
    talk = [said("user", "what?", images=1), said("assistant", "a cat"), said("user", "where?")]
    text = AutoProcessor.from_pretrained(tmp_path / "out").apply_chat_template(talk, add_generation_prompt=True)
    assert text.replace("<image> \n", "<image>\n") == expected


def test_tokenizer_that_starts_every_piece_with_a_blank_needs_none_written(tmp_path):
    words = ["<unk>", "<s>", "</s>", "▁USER:", "▁", "▁\nwhat", "▁is", "▁this?", "▁ASSISTANT:"]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    core.decoder = decoders.Metaspace()
    fast = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(tmp_path)
    tokenizer = open_tokenizer(tmp_path)
    add_special_tokens(tokenizer, len(words), tmp_path)
    template, as_trained = chat_template("llama", tokenizer)
    assert as_trained and "<image>\n" in template


def test_tokenizer_model_of_sentencepiece_is_read(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "text").write_text("USER: what is this? ASSISTANT: a cat\n" * 20)
    source, _ = make_original(tmp_path, tokenizer=False)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(source / "tokenizer"),
        vocab_size=VOCAB,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        hard_vocab_limit=False,
        pad_id=-1,
        minloglevel=2,
    )
    about = {"tokenizer_class": "LlamaTokenizer", "pad_token": "<unk>", "legacy": False}
    (source / "tokenizer_config.json").write_text(json.dumps(about))
    size = len(open_tokenizer(source))

    def fit(weights):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            weights[name] = weights[name][:size].clone()

    change_weights(source, fit)
    change_json(source / "config.json", vocab_size=size)
    assert "otherwise" not in str(import_llava(source, tmp_path / "out"))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").convert_tokens_to_ids("<image>") == size


def test_texts_start_with_the_start_token_where_no_file_says_so(tmp_path):
    """Transformers 4.31 took it for granted with Llama's tokenizer."""
    source, _ = make_original(tmp_path)
    assert "add_bos_token" not in json.loads((source / "tokenizer_config.json").read_text())
    change_json(source / "tokenizer.json", post_processor=None)
    assert AutoTokenizer.from_pretrained(open_folder_alone(source, tmp_path / "alone")).encode("what")[0] != 1
    import_llava(source, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").encode("what")[0] == 1


def test_tokens_a_tokenizer_already_has_are_used(tmp_path):
    source, _ = make_original(tmp_path)
    tokenizer = llama_tokenizer()
    tokenizer.add_tokens(["<image>", "<pad>"], special_tokens=True)
    tokenizer.save_pretrained(source)

    def widen(weights):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            weights[name] = torch.cat([weights[name], torch.ones(9, 32)])

    change_weights(source, widen)
    change_json(source / "config.json", vocab_size=VOCAB + 9)
    summary = import_llava(source, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["image_token_index"] == VOCAB and config["text_config"]["vocab_size"] == VOCAB + 9
    assert summary.added == 0
    new = read_weights(tmp_path / "out")["language_model.lm_head.weight"]
    assert torch.equal(new, read_weights(source)["lm_head.weight"])


def test_without_a_tokenizer_no_processor_is_written(tmp_path):
    source, _ = make_original(tmp_path, tokenizer=False)
    summary = import_llava(source, tmp_path / "out")
    assert "has no tokenizer" in summary.lines["processor"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]


def test_tied_embeddings_may_lack_an_output_layer(tmp_path):
    source, _ = make_original(tmp_path, tie_word_embeddings=True)
    change_weights(source, lambda weights: weights.pop("lm_head.weight"))
    import_llava(source, tmp_path / "out")
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight


def test_linear_rope_scaling_is_taken_over(tmp_path):
    source, _ = make_original(tmp_path, rope_scaling={"type": "linear", "factor": 2.0})
    import_llava(source, tmp_path / "out")
    text = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").config.text_config
    assert text.rope_parameters["rope_type"] == "linear" and text.rope_parameters["factor"] == 2.0
    assert text.rope_parameters["rope_theta"] == 5000.0


def test_command_line(tmp_path, capsys):
    source, _ = make_original(tmp_path)
    assert main(["import-llava", str(source), str(tmp_path / "out")]) == 0
    expected = f"{VOCAB} -> 384 rows: <image> is {VOCAB}, <pad> is {VOCAB + 1}"
    assert expected in capsys.readouterr().out


# ---------------------------------------- bad input


def refuses(match, source):
    out = source.parent / "out"
    with pytest.raises(ValueError, match=match):
        import_llava(source, out)
    assert not out.exists() and not list(source.parent.glob(".out*"))


def test_published_routing_parts_are_not_lost(tmp_path):
    refuses(r"has routing parts \(model.adapter_image_token.weight.*use import-reference", golden_source(tmp_path))


def test_tokenizer_of_another_checkpoint_is_refused(tmp_path):
    source, _ = make_original(tmp_path)
    tokenizer = llama_tokenizer()
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(source)
    refuses(rf"tokenizer in .*checkpoint gives '<more>' id {VOCAB}, but the embedding has {VOCAB} rows", source)


def test_damaged_tokenizer_is_refused(tmp_path):
    source, _ = make_original(tmp_path)
    (source / "tokenizer.json").write_text("{")
    refuses(r"the tokenizer in .*checkpoint cannot be read", source)


def test_tokenizer_model_that_cannot_be_read_is_refused_with_the_packages_it_needs(tmp_path):
    source, _ = make_original(tmp_path)
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>")
    refuses(r"the tokenizer in .*checkpoint cannot be read: .*sentencepiece and protobuf", source)


def test_tokenizer_without_the_image_token_is_refused(tmp_path):
    tokens = SpecialTokens(image_id=VOCAB, pad_id=VOCAB + 1, vocab_size=384, old_size=VOCAB)
    with pytest.raises(ValueError, match=rf"has no token '<image>', expected id {VOCAB} as in the config"):
        check_tokens(llama_tokenizer(), tokens, tmp_path)
    tokenizer = llama_tokenizer()
    tokenizer.add_tokens(["<other>", "<image>", "<pad>"], special_tokens=True)
    with pytest.raises(ValueError, match=rf"reads '<image>' as \[{VOCAB + 1}\], expected \[{VOCAB}\] as in the config"):
        check_tokens(tokenizer, tokens, tmp_path)


def test_preprocessor_of_another_size_is_refused(tmp_path):
    source, _ = make_original(tmp_path)
    change_json(tmp_path / "vision_tower" / "preprocessor_config.json", crop_size=56)
    refuses(r"preprocessor_config.json in .*vision_tower makes images of 56 x 56, its config.json asks for 28", source)


@pytest.mark.parametrize(
    "entries", [{"image_mean": "a"}, {"image_std": [0.5]}, {"resample": 99}, {"crop_size": "x"}], ids=str
)
def test_preprocessor_that_makes_no_pixels_is_refused(tmp_path, entries):
    source, _ = make_original(tmp_path)
    change_json(tmp_path / "vision_tower" / "preprocessor_config.json", **entries)
    refuses(r"vision_tower.preprocessor_config.json does not hold what Transformers needs", source)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "is not readable JSON"),
        ("[]", "holds a list, expected an object"),
        ('{"suppress_tokens": 5}', "has suppress_tokens 5, expected null or a list of token ids"),
        ('{"suppress_tokens": ["a"]}', r"has suppress_tokens \['a'\], expected null or a list"),
    ],
)
def test_broken_generation_settings_are_refused_in_a_dry_run_too(tmp_path, text, message):
    source, _ = make_original(tmp_path)
    (source / "generation_config.json").write_text(text)
    refuses(rf"generation_config.json {message}", source)
    with pytest.raises(ValueError, match=rf"generation_config.json {message}"):
        import_llava(source, tmp_path / "out", dry_run=True)


@pytest.mark.parametrize("place", ["inside", "beside"])
def test_tower_layer_without_a_number_is_refused_by_name(tmp_path, place):
    source, _ = make_original(tmp_path, place=place)
    name = "vision_model.encoder.layers.foo.x"
    where = source if place == "inside" else tmp_path / "vision_tower"
    prefix = INSIDE if place == "inside" else ""
    change_weights(where, lambda weights: weights.update({prefix + name: torch.ones(1)}))
    refuses(rf"{name} in .*pytorch_model.bin is no tensor of the model", source)


def test_rope_theta_that_is_null_is_refused(tmp_path):
    source, _ = make_original(tmp_path, rope_theta=None)
    refuses(r"checkpoint.config.json does not hold .*rope_theta is None, expected a positive number", source)
