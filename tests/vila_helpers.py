"""Copies of the recorded VILA checkpoints to change, and tokenizers as real ones have."""

import shutil
from pathlib import Path

import torch
from convert_helpers import change_json
from golden_vila_helpers import CHECKPOINTS, FOLDER
from original_helpers import llama_tokenizer
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

TOKENIZER_FILES = ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")


def vila_source(parent: Path, model: str) -> Path:
    """A copy of a recorded checkpoint; the tower of v1.0 is beside it."""
    folder = shutil.copytree(FOLDER / CHECKPOINTS[model], parent / "checkpoint")
    shutil.copytree(FOLDER / "vision_tower_clip", parent / "vision_tower_clip", dirs_exist_ok=True)
    return folder


def text_folder(source: Path) -> Path:
    """Where the language model of a checkpoint is."""
    return source / "llm" if (source / "llm").is_dir() else source


def change_part(folder: Path, change) -> None:
    """Rewrite model.safetensors; `change` edits its dict of tensors in place."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def give_tokenizer(source: Path, tokenizer) -> None:
    """Put a tokenizer in the place of the recorded one, and as many rows as it has tokens into the weights."""
    folder, size = text_folder(source), len(tokenizer)
    for name in TOKENIZER_FILES:
        (folder / name).unlink()
    tokenizer.save_pretrained(folder)

    def widen(weights):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            weights[name] = torch.cat([weights[name]] * 3)[:size].contiguous()

    change_part(folder, widen)
    change_json(folder / "config.json", vocab_size=size, bos_token_id=1, eos_token_id=2)
    if folder != source:
        change_json(source / "config.json", llm_cfg=str(folder))


def vicuna_tokenizer():
    """Bytes for what it has no piece for, a blank before every text."""
    return llama_tokenizer()


def llama3_tokenizer(adds_start: bool = True) -> PreTrainedTokenizerFast:
    """Bytes alone, with the special tokens of Llama-3's prompt."""
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    vocabulary = {name: number for number, name in enumerate(["!pad", *special, *bytes_as_letters()])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if adds_start:
        pair = [("<|begin_of_text|>", vocabulary["<|begin_of_text|>"])]
        core.post_processor = processors.TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=pair)
    names = {"bos_token": special[0], "eos_token": special[1], "additional_special_tokens": special[2:]}
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


def bytes_as_letters() -> list[str]:
    return sorted(pre_tokenizers.ByteLevel.alphabet())
