"""`roe-llava import-vila SRC OUT`: a published VILA checkpoint, v1.0 or 1.5, to the layout of llava-hf.

A front-end that stock LLaVA has (two-layer projector) gives a stock LLaVA; any other a base with code of ours, which
opens with `trust_remote_code=True`. Routing parts are grafted onto either.
"""

from pathlib import Path

from .arguments import add_common_arguments, common_options
from .code_files import write_frontend_code
from .completeness import check_complete
from .made_tensors import numbered
from .original_config import DTYPES, check_sizes, text_config
from .original_import import (
    Plan,
    add_import_arguments,
    add_tower,
    carry_out,
    pad_vocabulary,
    provenance,
    write_companions,
)
from .original_layout import Layout, check_tied, describe_buffers
from .original_processor import add_special_tokens, generation_settings, open_tokenizer
from .original_vision import INSIDE, Tower, check_tower_sizes, find_tower
from .output import check_apart, check_target
from .source import Source, blamed_on, read_json, resolve_source
from .summary import Summary
from .vila_config import PARTS, TOWER_PART, VilaConfig, read_vila_config, vila_config
from .vila_layout import POSITIONS, published_name, resize_positions, single_layout, split_layout
from .vila_processor import end_ids, vila_images, vila_processor
from .weights import Checkpoint, StoredTensor, StoredTensors, open_checkpoint


def import_vila(
    source: str | Path,
    out: str | Path,
    *,
    vision_tower: str | Path | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Summary:
    """Turn a checkpoint in one of the published layouts into a base of ours.

    Args:
        source: folder or Hub id.
        out: folder to write.
        vision_tower: of a v1.0 checkpoint: folder or Hub id of the CLIP tower; by default what the config names.
        revision: of a source on the Hub.
        overwrite: replace `out`, once the new folder is whole.
        dry_run: read and check everything, write nothing.
    Returns: what was done.
    Raises: ValueError naming file, tensor, what was found and what was expected.
    """
    out = Path(out)
    check_target(out.absolute(), overwrite)
    where = resolve_source(source, revision)
    config = read_vila_config(where.folder)
    check_apart(out, where.folder, *(where.folder / part for part in PARTS if config.split))
    plan, lines = plan_import(where, config, vision_tower)

    def write_rest(folder: Path) -> None:
        write_companions(plan, folder, routed=False)
        if "auto_map" in plan.config:
            write_frontend_code(folder)

    summary = carry_out(plan, out, write_rest, overwrite=overwrite, dry_run=dry_run)
    summary.kept_bytes -= sum(plan.layout.all_tensors()[name].num_bytes for name in made_anew(config))
    summary.lines |= lines
    return summary


def plan_import(source: Source, config: VilaConfig, vision_tower: str | Path | None) -> tuple[Plan, dict[str, str]]:
    """Open everything and check what can be checked before weights are read.

    Returns: the plan, and what else is worth a line, label to text.
    Raises: ValueError as `import_vila`.
    """
    layout, tower, tensors = take_apart(source, config, vision_tower)
    check_sizes(config.flat, tensors, config.text_path)
    tokenizer = open_tokenizer(config.text_folder)
    tokens = add_special_tokens(tokenizer, config.flat["vocab_size"], config.text_folder)
    lines = resolution_line(layout, config)
    padded = pad_vocabulary(layout, tokens)
    dtype = DTYPES.get(max(tensors.values(), key=lambda tensor: tensor.num_bytes).dtype, "float32")
    with blamed_on(config.text_path):
        text = text_config(config.flat)
    check_tied(tensors, text.tie_word_embeddings, config.text_path)
    origin = provenance(source, config.top, tower, tokens, describe_buffers(layout.buffers, text))
    with blamed_on(config.path):
        made = vila_config(config, tower.config, tokens, dtype, origin)
    check_complete(layout.all_tensors(), made, source.folder, lambda name: published_name(name, config))
    processor = note = None
    if tokenizer is not None:
        resized = config.resolution is not None
        images = vila_images(tower.preprocessor, tower.config, config.aspect, tower.folder, resized)
        processor, note = vila_processor(tokenizer, images, made, config.text_folder)
    generation = answers_end(generation_settings(config.text_folder, made, tokens), end_ids(tokenizer))
    files = numbered({name: StoredTensors(found) for name, found in layout.files.items()})
    lines |= {"front-end": front_end_line(made, tower)}
    text_folder = config.text_folder if config.split else None
    plan = Plan(source, layout, tower, tokens, processor, note, made, generation, files, padded, text_folder)
    return plan, lines


def take_apart(
    source: Source, config: VilaConfig, vision_tower: str | Path | None
) -> tuple[Layout, Tower, dict[str, StoredTensor]]:
    """The tensors of a checkpoint and its tower, sizes of the tower checked.

    Returns: layout, tower, and the language model's tensors by published name (of v1.0, all that are in its files).
    Raises: ValueError if a tensor is unknown, or a tower is given to a checkpoint that has its own.
    """
    if not config.split:
        checkpoint = open_checkpoint(source.folder)
        layout = single_layout(checkpoint, config.projector_type)
        inside = any(name.startswith(INSIDE) for name in checkpoint.tensors)
        tower = find_tower(source, config.flat, vision_tower, inside)
        check_tower_sizes(tower.config, tower.folder, add_tower(layout, checkpoint, tower))
        return layout, tower, checkpoint.tensors
    if vision_tower is not None:
        raise ValueError(
            f"vision tower {str(vision_tower)!r} given, but {source.folder} is a VILA-1.5, which has its own in "
            f"{TOWER_PART}/: leave --vision-tower out"
        )
    layout, parts = split_layout(config)
    return layout, split_tower(source.folder / TOWER_PART, config, parts[TOWER_PART]), parts["llm"].tensors


def split_tower(folder: Path, config: VilaConfig, checkpoint: Checkpoint) -> Tower:
    """The tower of a 1.5 checkpoint."""
    path = folder / "preprocessor_config.json"
    preprocessor = read_json(path) if path.is_file() else None
    return Tower(False, folder, config.tower, preprocessor, checkpoint)


def made_anew(config: VilaConfig) -> list[str]:
    """New names of tensors that are written, but are not the source's own."""
    return [POSITIONS] if config.resolution is not None else []


def resolution_line(layout: Layout, config: VilaConfig) -> dict[str, str]:
    """Make the position table for another resolution where one is asked for; a line that says so."""
    if config.resolution is None:
        return {}
    old = config.tower.image_size
    zeros = resize_positions(layout, config)
    return {
        "positions": f"table made anew for vision_resolution {config.resolution} (stored for {old}) by the published "
        f"rule, which leaves {zeros} rows zero"
    }


def answers_end(generation: dict, ends: list[int]) -> dict:
    """Generation settings with further tokens that end an answer."""
    own = generation.get("eos_token_id")
    own = own if isinstance(own, list) else [] if own is None else [own]
    return generation | {"eos_token_id": list(dict.fromkeys([*own, *ends]))} if ends else generation


def front_end_line(config: dict, tower: Tower) -> str:
    """What the summary says of the front-end."""
    kind = config.get("projector_type", "mlp2x_gelu")
    opened = "stock LLaVA" if config["model_type"] == "llava" else "opens with trust_remote_code=True"
    return f"{tower.config.model_type}, {kind}, {config['image_seq_length']} tokens per image: {opened}"


def add_arguments(parser) -> None:
    """Arguments of the command."""
    add_import_arguments(parser, "VILA checkpoint, v1.0 or 1.5")
    add_common_arguments(parser, "SRC")


def run(args) -> None:
    """Run the command."""
    print(import_vila(args.source, args.out, vision_tower=args.vision_tower, **common_options(args)))
