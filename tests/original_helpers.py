"""Checkpoints in the original LLaVA layout for the tests of its imports, written without the tables under test."""

import json
import shutil
import string
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, CLIPVisionConfig, LlamaTokenizer, LlavaConfig, LlavaForConditionalGeneration

GOLDEN = Path(__file__).parent / "golden" / "roe_reference"
INSIDE = "model.vision_tower.vision_tower."
# (weight files, place of the vision tower)
FORMS = [
    ("bin", "inside"),
    ("bin", "beside"),
    ("sharded_bin", "inside"),
    ("sharded_bin", "beside"),
    ("safetensors", "inside"),
    ("safetensors", "beside"),
    ("one_safetensors", "inside"),
]
FORM_IDS = ["-".join(form) for form in FORMS]
SIDE, PATCH = 28, 14
MEAN = [0.48145466, 0.4578275, 0.40821073]


def write_weights(weights: dict, folder: Path, files: str) -> None:
    """Weight files of a form; shards have an index."""
    is_bin = files.endswith("bin")
    if files in ("bin", "one_safetensors"):
        parts = {"pytorch_model.bin" if is_bin else "model.safetensors": weights}
    else:
        names, middle = list(weights), len(weights) // 2
        stem, suffix = ("pytorch_model", "bin") if is_bin else ("model", "safetensors")
        halves = {f"{stem}-00001-of-00002.{suffix}": names[:middle], f"{stem}-00002-of-00002.{suffix}": names[middle:]}
        parts = {file: {name: weights[name] for name in part} for file, part in halves.items()}
        index = {"metadata": {}, "weight_map": {name: file for file, part in halves.items() for name in part}}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    for file, part in parts.items():
        if is_bin:
            torch.save(part, folder / file)
        else:
            save_file({name: tensor.clone() for name, tensor in part.items()}, folder / file, {"format": "pt"})


def read_weights(folder: Path) -> dict:
    """Every tensor of the weight files of a folder."""
    weights = {}
    for path in sorted(folder.glob("*.safetensors")):
        weights |= load_file(path)
    for path in sorted(folder.glob("*.bin")):
        weights |= torch.load(path, weights_only=True)
    return weights


def place_tower(weights: dict, vision: dict, parent: Path, place: str) -> dict:
    """Write `parent/vision_tower`: its config and preprocessor, and its weights too where they are beside.

    Returns: the weights that stay inside.
    """
    tower = parent / "vision_tower"
    tower.mkdir()
    (tower / "config.json").write_text(json.dumps(vision))
    # Sizes as plain numbers, as OpenAI's own file has them.
    images = {"feature_extractor_type": "CLIPFeatureExtractor", "size": SIDE, "crop_size": SIDE, "image_mean": MEAN}
    images |= {"image_std": [0.26862954, 0.26130258, 0.27577711], "resample": 3, "do_resize": True}
    (tower / "preprocessor_config.json").write_text(json.dumps(images | {"do_center_crop": True, "do_normalize": True}))
    if place == "inside":
        return weights
    own = {name.removeprefix(INSIDE): tensor for name, tensor in weights.items() if name.startswith(INSIDE)}
    torch.save(own, tower / "pytorch_model.bin")
    return {name: tensor for name, tensor in weights.items() if not name.startswith(INSIDE)}


def golden_source(parent: Path, files: str = "bin", place: str = "inside") -> Path:
    """The recorded checkpoint in one of `FORMS`; its tower is a sibling folder."""
    folder = parent / "checkpoint"
    folder.mkdir()
    shutil.copy(GOLDEN / "config.json", folder)
    weights = torch.load(GOLDEN / "pytorch_model.bin", weights_only=True)
    vision = json.loads((GOLDEN / "vision_config.json").read_text())
    write_weights(place_tower(weights, vision, parent, place), folder, files)
    return folder


def change_weights(folder: Path, change) -> None:
    """Rewrite pytorch_model.bin; `change` edits its dict of tensors in place."""
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    change(weights)
    torch.save(weights, folder / "pytorch_model.bin")


# ---------------------------------------- LLaVA without routing parts

FLAT_TYPES = {"llama": "llava_llama", "mistral": "llava_mistral", "qwen2": "llava_qwen2"}


def llama_tokenizer() -> LlamaTokenizer:
    """A tokenizer as Vicuna's is: bytes for what it has no piece for, a blank before every text."""
    names = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *string.ascii_letters,
        *":?.,'[]/",
    ]
    merges = [("▁", "U"), ("U", "S"), ("E", "R"), ("US", "ER"), ("▁", "w"), ("h", "a"), ("ha", "t")]
    names += ["".join(pair) for pair in merges]
    vocabulary = {name: index for index, name in enumerate(names)}
    return LlamaTokenizer(vocab=vocabulary, merges=merges, pad_token="<unk>", padding_side="right", add_bos_token=True)


def original_name(name: str) -> str:
    """A stock model's name in memory, in the original layout."""
    swaps = {
        "model.language_model.": "model.",
        "model.multi_modal_projector.linear_1": "model.mm_projector.0",
        "model.multi_modal_projector.linear_2": "model.mm_projector.2",
        "model.vision_tower.": f"{INSIDE}vision_model.",
    }
    return next((new + name.removeprefix(old) for old, new in swaps.items() if name.startswith(old)), name)


def make_original(
    parent: Path, text_type: str = "llama", *, place="inside", tokenizer=True, dtype=torch.float32, **flat
):
    """A random LLaVA in the original layout, its tower beside or inside.

    Returns: its folder, and the stock model with the same weights and the old vocabulary.
    """
    vocabulary = len(llama_tokenizer())
    sizes = {"vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5}
    sizes |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": SIDE, "patch_size": PATCH, "projection_dim": 16, "model_type": "clip_vision_model"}
    rope = {"rope_theta": 5000.0, "rope_type": "default"}
    text = AutoConfig.for_model(text_type, **sizes, rope_parameters=rope)
    torch.manual_seed(0)
    config = LlavaConfig(
        text_config=text,
        vision_config=CLIPVisionConfig(**{k: v for k, v in vision.items() if k != "model_type"}),
        image_token_index=vocabulary - 1,
        image_seq_length=4,
    )
    stock = LlavaForConditionalGeneration(config).eval().to(dtype)
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    folder = parent / "checkpoint"
    folder.mkdir(parents=True)
    weights = {original_name(name): tensor.clone() for name, tensor in stock.state_dict().items()}
    write_weights(place_tower(weights, vision, parent, place), folder, "bin")
    content = sizes | {"model_type": FLAT_TYPES[text_type], "rope_theta": 5000.0, "mm_vision_tower": "vision_tower"}
    content |= {"mm_projector_type": "mlp2x_gelu", "mm_hidden_size": 16, "mm_vision_select_layer": -2}
    content |= {"mm_vision_select_feature": "patch", "image_aspect_ratio": "pad", "tie_word_embeddings": False}
    content |= {"torch_dtype": str(dtype).removeprefix("torch."), "hidden_act": "silu"} | flat
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "generation_config.json").write_text(json.dumps({"max_length": 512, "pad_token_id": 0}))
    if tokenizer:
        llama_tokenizer().save_pretrained(folder)
    return folder, stock
