"""`roe-llava import-llava-hr SRC OUT`: a published LLaVA-HR checkpoint becomes a base of ours.

The result opens with `trust_remote_code=True` and needs neither the published code, nor timm, nor this package; routing
parts are grafted onto it as onto any base.
"""

from pathlib import Path

from ..configuration_frontend import STOCK_PROJECTOR, FrontendLlavaConfig
from ..configuration_hr_vision import LlavaHrVisionConfig
from ..loading_frontend import FRONTEND_AUTO_MAP
from ..modeling_frontend import FrontendLlavaForConditionalGeneration
from .arguments import add_common_arguments, common_options
from .code_files import write_frontend_code
from .completeness import check_complete
from .hr_layout import FAST, check_adapters, published_name, rename_hr, vision_config
from .made_tensors import numbered
from .original_config import DTYPES, check_sizes, llava_config, read_flat_config, text_config
from .original_import import (
    Plan,
    add_import_arguments,
    carry_out,
    pad_vocabulary,
    provenance,
    write_companions,
)
from .original_layout import check_tied
from .original_processor import (
    add_special_tokens,
    generation_settings,
    image_processor,
    make_processor,
    open_tokenizer,
)
from .original_vision import Tower, check_tower_sizes, find_tower
from .output import check_apart, check_target
from .source import Source, blamed_on, resolve_source
from .summary import Summary
from .weights import StoredTensors, open_checkpoint

# Entries that import-llava refuses, since they make a LLaVA-HR.
OWN_ENTRIES = ("is_multipath_encoder", "vision_tower_slow")


def import_llava_hr(
    source: str | Path,
    out: str | Path,
    *,
    vision_tower: str | Path | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Summary:
    """Turn a checkpoint in the published layout into a folder of ours.

    Args:
        source: folder or Hub id.
        out: folder to write.
        vision_tower: folder or Hub id of the CLIP tower, of which the config alone is read; by default what the
            published config names. Weights are those in the checkpoint, which were tuned.
        revision: of a source on the Hub.
        overwrite: replace `out`, once the new folder is whole.
        dry_run: read and check everything, write nothing.
    Returns: what was done.
    Raises: ValueError naming file, tensor, what was found and what was expected.
    """
    out = Path(out)
    check_target(out.absolute(), overwrite)
    where = resolve_source(source, revision)
    check_apart(out, where.folder)
    plan = plan_import(where, vision_tower)

    def write_rest(folder: Path) -> None:
        write_companions(plan, folder, routed=False)
        write_frontend_code(folder)

    summary = carry_out(plan, out, write_rest, overwrite=overwrite, dry_run=dry_run)
    vision = FrontendLlavaConfig.from_dict(plan.config).vision_config
    summary.lines |= {
        "images": f"{vision.image_size} pixels, {vision.fast_grid**2} tokens each",
        "cut": "the class token's row of CLIP's position table",
    }
    return summary


def plan_import(source: Source, vision_tower: str | Path | None) -> Plan:
    """Open everything and check what can be checked before weights are read.

    Raises: ValueError as `import_llava_hr`.
    """
    path = source.folder / "config.json"
    flat = read_hr_config(source.folder)
    checkpoint = open_checkpoint(source.folder)
    check_sizes(flat, checkpoint.tensors, path)
    with blamed_on(path):
        text = text_config(flat)
    layout = rename_hr(checkpoint, text)
    check_adapters(flat, checkpoint)
    tower = find_tower(source, flat, vision_tower, inside=True)
    fast = {name.removeprefix(FAST): one for name, one in checkpoint.tensors.items() if name.startswith(FAST)}
    check_tower_sizes(tower.config, tower.folder, fast)
    with blamed_on(path):
        vision = vision_config(flat, checkpoint, tower.config)
    tokenizer = open_tokenizer(source.folder)
    tokens = add_special_tokens(tokenizer, flat["vocab_size"], source.folder)
    padded = pad_vocabulary(layout, tokens)
    dtype = DTYPES.get(max(checkpoint.tensors.values(), key=lambda tensor: tensor.num_bytes).dtype, "float32")
    check_tied(checkpoint.tensors, text.tie_word_embeddings, path)
    origin = provenance(source, flat, tower, tokens, [])
    with blamed_on(path):
        config = hr_config(llava_config(stock_entries(flat), tower.config, tokens, dtype, origin, text), vision)
    check_complete(layout.all_tensors(), config, source.folder, published_name)
    files = {name: StoredTensors(tensors) for name, tensors in layout.files.items()}
    processor, note = hr_processor(tokenizer, tower, vision, config, flat.get("image_aspect_ratio") == "pad")
    generation = generation_settings(source.folder, config, tokens)
    return Plan(source, layout, tower, tokens, processor, note, config, generation, numbered(files), padded)


def read_hr_config(folder: Path) -> dict:
    """config.json of a published LLaVA-HR.

    Raises: ValueError naming the entry, what it says and what can be imported.
    """
    flat = read_flat_config(folder, allowed=OWN_ENTRIES)
    path = folder / "config.json"
    if flat.get("is_multipath_encoder") is not True:
        raise ValueError(
            f"{path} has is_multipath_encoder {flat.get('is_multipath_encoder')!r}, expected true, which makes a "
            "LLaVA-HR: a LLaVA with one vision tower goes through import-llava"
        )
    if flat["model_type"] not in ("llava", "llava_llama"):
        raise ValueError(f"{path} has model_type {flat['model_type']!r}, expected 'llava': LLaVA-HR is made on Llama")
    if not isinstance(flat.get("vision_tower_slow"), str):
        raise ValueError(
            f"{path} has vision_tower_slow {flat.get('vision_tower_slow')!r}, expected the name of a ConvNeXt, which "
            "says what eps its norms have"
        )
    size = flat.get("input_image_size")
    if type(size) is not int or size < 1:
        raise ValueError(f"{path} has input_image_size {size!r}, expected the side of an image in pixels, like 1024")
    if not isinstance(flat.get("freeze_vision", False), bool):
        raise ValueError(f"{path} has freeze_vision {flat['freeze_vision']!r}, expected true or false")
    return flat


def stock_entries(flat: dict) -> dict:
    """The entries as `llava_config` reads them. Which layer is selected has no effect in LLaVA-HR."""
    return flat | {"mm_vision_select_layer": -1, "mm_vision_select_feature": "cls_patch"}


def hr_config(llava: dict, vision: LlavaHrVisionConfig) -> dict:
    """A llava-hf config.json with LLaVA-HR's tower.

    Args:
        llava: content of the one with the CLIP tower.
        vision: of both towers.
    """
    vision.dtype = None
    full = FrontendLlavaConfig.from_dict(
        llava | {"vision_config": vision.to_dict(), "model_type": FrontendLlavaConfig.model_type}
    )
    return llava | {
        "model_type": full.model_type,
        "architectures": [FrontendLlavaForConditionalGeneration.__name__],
        "auto_map": dict(FRONTEND_AUTO_MAP),
        "projector_type": STOCK_PROJECTOR,
        "vision_config": full.vision_config.to_dict(),
        "image_seq_length": full.vision_config.fast_grid**2,
    }


def hr_processor(tokenizer, tower: Tower, vision: LlavaHrVisionConfig, config: dict, pads: bool):
    """The processor, and what a caller should know about its prompt; neither without a tokenizer."""
    if tokenizer is None:
        return None, None
    images = image_processor(None, vision, pads, tower.folder)  # CLIP's usual settings, which are written into the code
    processor, note = make_processor(tokenizer, images, config | {"vision_config": {"patch_size": vision.patch_size}})
    processor.num_additional_image_tokens = 0  # no class token
    return processor, note


def add_arguments(parser) -> None:
    """Arguments of the command."""
    add_import_arguments(parser, "LLaVA-HR checkpoint in the published layout")
    add_common_arguments(parser, "SRC")


def run(args) -> None:
    """Run the command."""
    print(import_llava_hr(args.source, args.out, vision_tower=args.vision_tower, **common_options(args)))
