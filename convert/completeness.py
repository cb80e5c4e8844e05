"""Whether weights are those of the model that their config describes: none missing, unknown or of another shape."""

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from .made_tensors import check_dtype
from .source import blamed_on
from .state_dict import canonical_base, listed, split_routing_parts
from .weights import Checkpoint


def check_base_complete(checkpoint: Checkpoint, config: dict) -> None:
    """Check the base weights of a checkpoint, its own or a RoE one, in llava-hf layout.

    Args:
        checkpoint: its weight files; routing parts in them are left alone.
        config: content of the stock model's config.json.
    Raises: ValueError naming file, tensor, what was found and what was expected.
    """
    folder = checkpoint.folder
    with blamed_on(folder / "config.json"), torch.device("meta"):
        model = LlavaForConditionalGeneration(LlavaConfig.from_dict(config))
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = canonical_base(split_routing_parts(checkpoint.tensors)[0])
    tied = set(model.all_tied_weights_keys)  # one of two names is enough
    if missing := sorted(expected.keys() - found.keys() - tied):
        raise ValueError(
            f"{folder} lacks {listed(missing)}, expected {len(expected)} tensors of the base for its config, found "
            f"{len(found)}: was a shard lost?"
        )
    for name, tensor in found.items():
        if name not in expected:
            raise ValueError(
                f"{tensor.name} in {tensor.file} is no tensor of the model that {folder / 'config.json'} describes: do "
                "config and weights belong together?"
            )
        if tensor.shape != expected[name]:
            raise ValueError(
                f"{tensor.name} in {tensor.file} has shape {list(tensor.shape)}, expected {list(expected[name])} for "
                f"{folder / 'config.json'}: do config and weights belong together?"
            )
        check_dtype(tensor)
