"""LoRA on the decoder's own linear layers, through PEFT; routers, adapters and routing tokens stay whole.

The matrices are put into the model in place, so it stays the same object with the same class; `merge` takes them out
again and adds them to the weights.
"""

# Never `all-linear`, which would wrap routers, adapters and the vision tower too.
TARGETS = r".*language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"


def add_lora(model, rank: int, alpha: float, dropout: float):
    """Put LoRA matrices beside every linear layer of attention and MLP.

    Returns: PEFT's wrapper, for `merge`; train the model itself.
    Raises: ValueError if PEFT is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ValueError("train_base lora needs the package peft: pip install 'roe-llava[train]'") from error
    return get_peft_model(
        model, LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=TARGETS, bias="none")
    )


def merge(wrapped):
    """The model, its LoRA matrices added to the weights.

    Raises: ValueError, by PEFT, if a merged weight is not finite.
    """
    return wrapped.merge_and_unload(safe_merge=True)


__all__ = ["add_lora", "merge"]
