"""Opens what is to be evaluated: a checkpoint of one of our kinds, or another one where a dense run was asked for."""

from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedConfig

from ..convert.kinds import Kind, kind_of, listed_types


def checkpoint_type(pretrained: str, revision: str | None = None) -> str:
    """`model_type` of a folder or Hub id, read without running its code.

    Raises: ValueError if there is no config, or it names no type.
    """
    where = f"{pretrained} (revision {revision})" if revision else pretrained
    try:
        content, _ = PreTrainedConfig.get_config_dict(pretrained, revision=revision)
    except OSError as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{where} is no folder with a config.json, and cannot be had from the Hub: {reason}"
        ) from error
    if not content:  # of what is neither a folder nor owner/name
        raise ValueError(f"{where} is no folder with a config.json, and no Hub id (owner/name) either")
    if "model_type" not in content:
        raise ValueError(f"config.json of {pretrained} has no model_type: is it a Transformers checkpoint?")
    return content["model_type"]


def open_checkpoint(pretrained: str, *, revision=None, trust_remote_code=False, dense=False, **load_options):
    """Model in evaluation mode and processor.

    Args:
        trust_remote_code: run the code that lies with the checkpoint; otherwise the installed package's classes.
        dense: a model without routers is welcome, and one whose every token goes through experts is not.
        load_options: for `from_pretrained` (dtype, device_map, attn_implementation); `None` counts as not given.
    Raises: ValueError if the checkpoint is none of our kinds and no dense run was asked for, or has experts and one
        was; or it has no chat template.
    """
    load_options = {name: value for name, value in load_options.items() if value is not None}
    from ..convert.bases import is_routed, refuse_other_bases  # loads every class there is
    from ..convert.completeness import check_files

    found = checkpoint_type(pretrained, revision)
    kind = kind_of(found)
    if is_routed(found):  # any other model may run dense
        refuse_other_bases(found, pretrained, "evaluate")
    if kind is None and not dense:
        raise ValueError(
            f"{pretrained} is a {found!r} checkpoint, not {listed_types()}: it has no routers and would run dense. "
            "Graft routing parts onto it (roe-llava graft), give it experts (roe-llava upcycle), or ask for a dense "
            "run: dense=True (roe-llava evaluate --dense-only)"
        )
    if kind is not None and kind.decides == "experts" and dense:
        raise ValueError(no_dense_run(pretrained, kind))
    if kind is not None and Path(pretrained).is_dir():
        check_files(Path(pretrained))
    if kind is not None and not trust_remote_code:
        model = kind.model.from_pretrained(pretrained, revision=revision, **load_options)
        processor = kind.processor.from_pretrained(pretrained, revision=revision, trust_remote_code=False)
    else:
        # Whether to trust is for the caller to say; a checkpoint without code loads with either.
        options = {"revision": revision, "trust_remote_code": trust_remote_code}
        model = AutoModelForImageTextToText.from_pretrained(pretrained, **options, **load_options)
        processor = AutoProcessor.from_pretrained(pretrained, **options)
    if not getattr(processor, "chat_template", None):
        raise ValueError(f"the processor of {pretrained} has no chat template: how are questions put to it?")
    return model.eval(), processor


def no_dense_run(pretrained: str, kind: Kind) -> str:
    """Why a model with experts cannot be run dense."""
    return (
        f"{pretrained} is a {kind.name} checkpoint, whose tokens go through experts: there is no dense run of it. Its "
        "dense counterpart is the model it was made from: roe-llava evaluate --base BASE runs that beside it, "
        "roe-llava evaluate BASE --dense-only alone"
    )


def torch_dtype(name: str | torch.dtype | None):
    """A dtype by its name; "auto" and `None` stay.

    Raises: ValueError for a name that torch does not know.
    """
    if name in (None, "auto") or isinstance(name, torch.dtype):
        return name
    found = getattr(torch, str(name), None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype must be auto or a torch dtype like bfloat16, got {name!r}")
    return found


__all__ = ["checkpoint_type", "no_dense_run", "open_checkpoint", "torch_dtype"]
