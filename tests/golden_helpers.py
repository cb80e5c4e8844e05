"""The recording of the published implementation (`golden/roe_reference`) and its checkpoint as a model of ours."""

import lzma
import tempfile
from pathlib import Path

from original_helpers import golden_source
from safetensors.torch import load, load_file

from roe_llava import RoeLlavaForConditionalGeneration
from roe_llava.convert.import_reference import import_reference
from roe_llava.convert.keys import EXPORT_KEYS, PUBLISHED_TOKENS, renamed

FOLDER = Path(__file__).parent / "golden" / "roe_reference"
PLACEHOLDER, PATCHES, NUM_LAYERS = -200, 4, 6
IMAGE = 74  # a token that no recorded text holds


def unpacked(name):
    """Tensors of a file that `reduce.py` packed."""
    tensors = load(lzma.decompress((FOLDER / name).read_bytes()))
    found = {}
    for key, tensor in tensors.items():
        key, _, bits = key.partition("@")
        found[key] = tensor if tensor.is_floating_point() else tensor.long()
        if bits:
            found[key] = (tensor.double() / 2 ** int(bits)).float()
    return found


def recorded_prompts():
    """Prompts and what the published inference made of them."""
    return load_file(FOLDER / "inference.safetensors")


def spliced(ids):
    """Token ids with every placeholder replaced by its patches."""
    return [token for given in ids for token in ([IMAGE] * PATCHES if given == PLACEHOLDER else [given])]


def spliced_labels(ids, labels):
    """Labels of spliced token ids: patches have none."""
    pairs = zip(ids, labels, strict=True)
    return [kept for given, label in pairs for kept in ([-100] * PATCHES if given == PLACEHOLDER else [label])]


def reference_model():
    """The recorded checkpoint, imported, with the old vocabulary, a placeholder within it, end of sequence disabled."""
    with tempfile.TemporaryDirectory() as parent:
        import_reference(golden_source(Path(parent)), Path(parent) / "roe")
        model = RoeLlavaForConditionalGeneration.from_pretrained(Path(parent) / "roe").eval()
    model.resize_token_embeddings(128)  # losses were recorded over so many
    model.config.image_token_index = IMAGE
    model.generation_config.suppress_tokens = model.generation_config.eos_token_id = None
    return model


def published_router(layer):
    """The published name of a layer's router."""
    return renamed(f"model.language_model.layers.{layer}.router.weight", EXPORT_KEYS)


def gradients_by_published_name(model):
    """Gradients under the names of the published checkpoint; `None` where there is none."""
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    tokens = ours.pop("model.language_model.routing_tokens.weight")
    rows = {name: None if tokens is None else tokens[row : row + 1] for row, name in enumerate(PUBLISHED_TOKENS)}
    return {renamed(name, EXPORT_KEYS): grad for name, grad in ours.items()} | rows
