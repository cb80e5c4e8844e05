"""What import-llava and import-reference share: the original LLaVA layout becomes a folder in llava-hf layout."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import LlavaProcessor

from ..configuration_roe import RoeLlavaConfig
from .completeness import check_complete
from .folder_files import grafted_config, write_code
from .graft import ROE_FILE, total_bytes
from .made_tensors import numbered, padded_rows, stream_files
from .original_config import DTYPES, FORMAT_VERSION, check_sizes, llava_config, read_flat_config, text_config
from .original_layout import Layout, adapter_size, check_tied, describe_buffers, rename_original
from .original_processor import (
    SpecialTokens,
    add_special_tokens,
    check_tokens,
    copy_licences,
    copy_tokenizer_files,
    generation_settings,
    image_processor,
    make_processor,
    open_tokenizer,
    read_generation_config,
)
from .original_vision import INSIDE, Tower, check_tower_sizes, find_tower, tower_names
from .output import check_apart, check_target, new_folder, write_json
from .routing_parts import byte_progress
from .source import Source, blamed_on, read_json, resolve_source
from .state_dict import RoutingSizes, check_routing_parts, split_routing_parts
from .summary import Summary
from .weights import Checkpoint, StoredTensor, StoredTensors, open_checkpoint

# The original tokenizer, so that an export can give it back untouched.
TOKENIZER_FOLDER = "original_tokenizer"
VOCABULARY = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")
# What the published inference does; its config does not say it.
PUBLISHED_ROUTING = {"routing_positions": "first", "routing_question": "all_text"}


@dataclass
class Plan:
    """An import that was checked as far as that goes without reading weights.

    Attributes:
        source: where the original is.
        layout: its tensors.
        tower: its vision tower.
        tokens: ids of the new tokens.
        processor: with them; `None` if there is no tokenizer.
        note: what a caller should know about the processor's prompt.
        config: content of the new config.json.
        generation: content of the new generation_config.json.
        files: the new weight files.
        padded: what was added to tensors, name to number of rows.
        text_folder: where its tokenizer is, if not in the source's own folder.
    """

    source: Source
    layout: Layout
    tower: Tower
    tokens: SpecialTokens
    processor: LlavaProcessor | None
    note: str | None
    config: dict
    generation: dict
    files: dict[str, StoredTensors]
    padded: dict[str, int]
    text_folder: Path | None = None


def import_original(
    source: str | Path,
    out: str | Path,
    *,
    routed: bool,
    vision_tower: str | Path | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Summary:
    """Turn a checkpoint in the original layout into a folder in llava-hf layout.

    Args:
        source: folder or Hub id.
        out: folder to write.
        routed: whether it is a published RoE checkpoint, and the result one of ours.
        vision_tower: folder or Hub id of the vision tower; by default what the config names.
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
    plan = plan_import(where, routed, vision_tower)

    def write_rest(folder: Path) -> None:
        write_companions(plan, folder, routed)

    return carry_out(plan, out, write_rest, overwrite=overwrite, dry_run=dry_run)


def carry_out(plan: Plan, out: Path, write_rest: Callable[[Path], None], *, overwrite: bool, dry_run: bool) -> Summary:
    """Write the folder of a plan, whole or not at all: weights as a stream, then what `write_rest` puts beside them.

    Args:
        dry_run: read all weights and write nothing.
    """
    check_apart(out, plan.tower.folder)
    num_bytes = sum(file.num_bytes for file in plan.files.values())
    if dry_run:
        with byte_progress(num_bytes, "checking") as progress:
            stream_files(plan.files, None, progress)
    else:
        with new_folder(out, overwrite) as folder, byte_progress(num_bytes, "importing") as progress:
            stream_files(plan.files, folder, progress)
            write_rest(folder)
    return summary_of(plan, out, not dry_run)


def plan_import(source: Source, routed: bool, vision_tower: str | Path | None) -> Plan:
    """Open everything and check what can be checked before weights are read.

    Raises: ValueError as `import_original`.
    """
    flat = read_flat_config(source.folder)
    checkpoint = open_checkpoint(source.folder)
    layout = rename_original(checkpoint, routed)
    path = source.folder / "config.json"
    check_sizes(flat, checkpoint.tensors, path)
    tower = find_tower(source, flat, vision_tower, any(name.startswith(INSIDE) for name in checkpoint.tensors))
    check_tower_sizes(tower.config, tower.folder, add_tower(layout, checkpoint, tower))
    tokenizer = open_tokenizer(source.folder)
    tokens = add_special_tokens(tokenizer, flat["vocab_size"], source.folder)
    padded = pad_vocabulary(layout, tokens)
    dtype = DTYPES.get(max(checkpoint.tensors.values(), key=lambda tensor: tensor.num_bytes).dtype, "float32")
    with blamed_on(path):
        text = text_config(flat)
    check_tied(checkpoint.tensors, text.tie_word_embeddings, path)
    origin = provenance(source, flat, tower, tokens, describe_buffers(layout.buffers, text))
    with blamed_on(path):
        config = llava_config(flat, tower.config, tokens, dtype, origin)
    if routed:
        config = routed_config(config, layout, source)
    check_complete(layout.all_tensors(), config, source.folder)
    files = {name: StoredTensors(tensors) for name, tensors in layout.files.items()}
    extra = {ROE_FILE: StoredTensors(layout.routing)} if routed else {}
    processor, note = plan_processor(tokenizer, tower, config, flat.get("image_aspect_ratio") == "pad")
    generation = generation_settings(source.folder, config, tokens)
    return Plan(source, layout, tower, tokens, processor, note, config, generation, numbered(files, extra), padded)


def plan_processor(tokenizer, tower: Tower, config: dict, pads: bool) -> tuple[LlavaProcessor | None, str | None]:
    """The processor, and what a caller should know about its prompt; neither without a tokenizer."""
    if tokenizer is None:
        return None, None
    images = image_processor(tower.preprocessor, tower.config, pads, tower.folder)
    return make_processor(tokenizer, images, config)


def add_tower(layout: Layout, checkpoint: Checkpoint, tower: Tower) -> dict[str, StoredTensor]:
    """Put a tower that is beside its checkpoint into the layout.

    Returns: the tower's tensors, wherever they are, by name without any prefix.
    """
    if tower.inside:
        inside = {name: tensor for name, tensor in checkpoint.tensors.items() if name.startswith(INSIDE)}
        return {name.removeprefix(INSIDE): tensor for name, tensor in inside.items()}
    names, buffers, dropped = tower_names(tower.checkpoint)
    for name, new in names.items():
        tensor = tower.checkpoint.tensors[name]
        layout.add(f"tower/{tensor.file.name}", new, tensor)
    layout.drop_buffers(buffers)
    layout.dropped |= dropped
    return {name: tower.checkpoint.tensors[name] for name in names}


def pad_vocabulary(layout: Layout, tokens: SpecialTokens) -> dict[str, int]:
    """Give the embedding and the output layer rows for the new tokens, in place.

    Returns: name to number of new rows.
    """
    padded = {}
    for file in layout.files.values():
        for name in VOCABULARY:
            if name in file and tokens.vocab_size > file[name].shape[0]:
                padded[name] = tokens.vocab_size - file[name].shape[0]
                file[name] = padded_rows(file[name], tokens.vocab_size)
    return padded


def provenance(source: Source, flat: dict, tower: Tower, tokens: SpecialTokens, buffers: list[dict]) -> dict:
    """What the way back needs to know: kept in config.json."""
    return {
        "format_version": FORMAT_VERSION,
        "id": source.id,
        "revision": source.revision,
        "vocab_size": tokens.old_size,
        "padded_vocab_size": tokens.vocab_size,
        "vision_tower": "inside" if tower.inside else "beside",
        "buffers": buffers,
        "config": flat,
        "max_length": read_generation_config(source.folder).get("max_length"),
    }


def routed_config(config: dict, layout: Layout, source: Source) -> dict:
    """The config of a RoE model, its routing parts checked.

    Raises: ValueError if they are not complete, or of other sizes.
    """
    routing_fields = {"adapter_size": adapter_size(layout), "routed_layers": None, **PUBLISHED_ROUTING}
    training = {"imported_from": source.id, "revision": source.revision}
    config = grafted_config(config, routing_fields, {"base": None, "training": training})
    parts = split_routing_parts(layout.routing)[1]
    sizes = RoutingSizes.of_config(RoeLlavaConfig.from_dict(config))
    check_routing_parts({name: tensor.shape for name, tensor in parts.items()}, sizes, source.folder)
    return config


def write_companions(plan: Plan, folder: Path, routed: bool) -> None:
    """Config, generation settings, processor, tokenizer and code."""
    write_json(folder / "config.json", plan.config)
    write_json(folder / "generation_config.json", plan.generation)
    if plan.processor is not None:
        plan.processor.save_pretrained(folder)
        if "auto_map" in plan.config:
            read_tokenizer_as_it_is(folder)
        check_tokens(open_tokenizer(folder), plan.tokens, folder)  # apart from config.json, which names our code
        (folder / TOKENIZER_FOLDER).mkdir()
        copy_tokenizer_files(plan.text_folder or plan.source.folder, folder / TOKENIZER_FOLDER)
    copy_licences(plan.source.folder, folder)
    if routed:
        write_code(folder)


def read_tokenizer_as_it_is(folder: Path) -> None:
    """Have tokenizer.json read as it is, as AutoTokenizer (5.23) does for a stock LLaVA.

    Of a type that it does not know, it would build the named class, and LlamaTokenizer brings blanks of its own.
    """
    path = folder / "tokenizer_config.json"
    write_json(path, read_json(path) | {"tokenizer_class": "TokenizersBackend"})


def summary_of(plan: Plan, out: Path, written: bool) -> Summary:
    """What was done."""
    tensors = plan.layout.all_tensors()
    place = "inside the checkpoint (it may have been tuned)" if plan.tower.inside else f"from {plan.tower.folder}"
    lines = {"tower": f"{place}, its config from {plan.tower.folder}"}
    if plan.padded:
        old, new = plan.tokens.old_size, plan.tokens.vocab_size
        lines["vocabulary"] = (
            f"{old} -> {new} rows: <image> is {plan.tokens.image_id}, <pad> is {plan.tokens.pad_id}; new rows of "
            f"{len(plan.padded)} tensors hold the mean of the old ones"
        )
    if plan.processor is None:
        lines["processor"] = f"none: {plan.text_folder or plan.source.folder} has no tokenizer"
    if plan.note:
        lines["note"] = plan.note
    added_bytes = sum(rows * tensors[n].num_bytes // tensors[n].shape[0] for n, rows in plan.padded.items())
    return Summary(
        out=out,
        written=written,
        kept=len(plan.layout.renamed),
        kept_bytes=total_bytes(tensors) - added_bytes,
        kept_what="tensors",
        renamed={old: new for old, new in plan.layout.renamed.items() if old != new},
        added=sum(plan.padded.values()),
        added_bytes=added_bytes,
        added_what="rows for new tokens",
        dropped=plan.layout.dropped,
        lines=lines,
    )


def add_import_arguments(parser, what: str) -> None:
    """Arguments both imports have beside the common ones."""
    parser.add_argument("source", metavar="SRC", help=f"{what}: a folder or a Hub id")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument(
        "--vision-tower", metavar="DIR", help="CLIP folder or Hub id, where it is not the one the config names"
    )
