"""The recorded LLaVA-HR checkpoint, as a source of imports in the published layout."""

import json
import shutil

import torch
from golden_hr_helpers import FOLDER, MANIFEST, TOWER, recorded
from original_helpers import llama_tokenizer, write_weights

VOCAB = len(llama_tokenizer())
X_ENTRIES = {"vision_tower_slow": "convnext_xxlarge.clip_laion2b_soup", "mm_hidden_size": 16}


def published(parent, files="bin", *, tokenizer=False, change=None, dtype=None, **entries):
    """A copy of the recorded checkpoint, `parent/checkpoint`, with its CLIP folder beside it.

    Args:
        files: a form of `write_weights`.
        tokenizer: give it a tokenizer as Vicuna's, and a vocabulary of that size.
        change: edits the dict of tensors in place.
        entries: of config.json; `None` takes one out.
    """
    folder = parent / "checkpoint"
    folder.mkdir()
    shutil.copytree(FOLDER / "vision_tower", parent / "vision_tower")
    weights = torch.load(FOLDER / "checkpoint" / "pytorch_model.bin", weights_only=True)
    flat = json.loads((FOLDER / "checkpoint" / "config.json").read_text())
    if tokenizer:
        llama_tokenizer().save_pretrained(folder)
        flat["vocab_size"] = VOCAB
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            weights[name] = torch.cat([weights[name], torch.randn(VOCAB - 128, 64) * 0.1])
    if change is not None:
        change(weights)
    if dtype is not None:
        weights = {n: t if "inv_freq" in n else t.to(dtype) for n, t in weights.items()}
    flat = {name: value for name, value in (flat | entries).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(flat))
    shutil.copy(FOLDER / "checkpoint" / "generation_config.json", folder)
    write_weights(weights, folder, files)
    return folder


def without_adapters(weights):
    """As training with `freeze_vision` leaves it."""
    for name in [name for name in weights if "align_stages_latent" in name]:
        del weights[name]


def with_tower_x(weights):
    """The recorded tower of the X flavour in the place of the other."""
    for name in [name for name in weights if name.startswith(TOWER)]:
        del weights[name]
    weights.update({TOWER + name: tensor for name, tensor in recorded("tower_x").items()})
    weights["model.mm_projector.0.weight"] = torch.randn(64, 16)


def published_x(parent, **options):
    """A checkpoint with the tower of the X flavour."""
    folder = published(parent, change=with_tower_x, **X_ENTRIES, **options)
    path = parent / "vision_tower" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | MANIFEST["sizes"]["x_fast"]))
    return folder
