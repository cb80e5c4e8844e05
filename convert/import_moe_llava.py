"""`roe-llava import-moe-llava SRC OUT`: a published MoE-LLaVA checkpoint (DeepSpeed's layout) becomes one of ours.

Every expert keeps its values, packed with the others of its layer. The result opens with `trust_remote_code=True`
and needs neither DeepSpeed nor this package. A checkpoint of stage I or II, still dense, becomes a stock LLaVA.
"""

from pathlib import Path

from ..configuration_moe_llava import MoeLlavaConfig
from .arguments import add_common_arguments, common_options
from .completeness import check_complete
from .kinds import MOE
from .made_tensors import numbered
from .moe_config import is_dense, moe_fields, moe_llava_config, notes, published_text_config, read_published_config
from .moe_layout import INSIDE, rename_published
from .original_config import DTYPES, check_sizes, llava_config
from .original_import import (
    Plan,
    add_import_arguments,
    carry_out,
    pad_vocabulary,
    plan_processor,
    provenance,
    write_companions,
)
from .original_layout import Layout, check_tied
from .original_processor import add_special_tokens, generation_settings, open_tokenizer
from .original_vision import Tower, check_tower_sizes, find_tower, tower_names
from .output import check_apart, check_target
from .source import Source, blamed_on, resolve_source
from .summary import Summary
from .weights import Checkpoint, StoredTensors, open_checkpoint


def import_moe_llava(
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
    flat = read_published_config(where.folder)
    plan = plan_import(where, flat, vision_tower)

    def write_rest(folder: Path) -> None:
        write_companions(plan, folder, routed=False)
        if not is_dense(flat):
            MOE.write_code(folder)

    summary = carry_out(plan, out, write_rest, overwrite=overwrite, dry_run=dry_run)
    summary.lines |= notes(flat)
    return summary


def plan_import(source: Source, flat: dict, vision_tower: str | Path | None) -> Plan:
    """Open everything and check what can be checked before weights are read.

    Args:
        flat: as `read_published_config` gives it.
    Raises: ValueError as `import_moe_llava`.
    """
    path = source.folder / "config.json"
    checkpoint = open_checkpoint(source.folder)
    check_sizes(flat, checkpoint.tensors, path)
    with blamed_on(path):
        text = published_text_config(flat)
        fields = {} if is_dense(flat) else moe_fields(flat)
        shape = MoeLlavaConfig.from_dict({"text_config": text.to_dict(), **fields})
    layout = rename_published(checkpoint, [] if is_dense(flat) else shape.expert_layers(), shape.num_experts)
    tower = find_tower(source, flat, vision_tower, any(name.startswith(INSIDE) for name in checkpoint.tensors))
    add_tower(layout, checkpoint, tower)
    tokenizer = open_tokenizer(source.folder)
    tokens = add_special_tokens(tokenizer, flat["vocab_size"], source.folder)
    padded = pad_vocabulary(layout, tokens)
    dtype = DTYPES.get(max(checkpoint.tensors.values(), key=lambda tensor: tensor.num_bytes).dtype, "float32")
    check_tied(checkpoint.tensors, text.tie_word_embeddings, path)
    origin = provenance(source, flat, tower, tokens, [])
    with blamed_on(path):
        config = llava_config(flat, tower.config, tokens, dtype, origin, text)
        if not is_dense(flat):
            config = moe_llava_config(config, fields)
            MoeLlavaConfig.from_dict(config)
    check_complete(layout.all_tensors(), config, source.folder)
    files = {name: StoredTensors(tensors) for name, tensors in layout.files.items()}
    # All published ones were trained on Vicuna's prompt, whatever their decoder, each with its own end token.
    prompt = config | {"text_config": {"model_type": "llama"}}
    processor, note = plan_processor(tokenizer, tower, prompt, flat.get("image_aspect_ratio") == "pad")
    generation = generation_settings(source.folder, config, tokens)
    return Plan(source, layout, tower, tokens, processor, note, config, generation, numbered(files), padded)


def add_tower(layout: Layout, checkpoint: Checkpoint, tower: Tower) -> None:
    """Put a tower that is beside its checkpoint into the layout, and check its sizes wherever it is.

    Raises: ValueError if its config is that of another one.
    """
    if tower.inside:
        inside = {name: tensor for name, tensor in checkpoint.tensors.items() if name.startswith(INSIDE)}
        found = {name.removeprefix(INSIDE): tensor for name, tensor in inside.items()}
    else:
        names, buffers, dropped = tower_names(tower.checkpoint)
        found = {name: tower.checkpoint.tensors[name] for name in names}
        for name, new in names.items():
            layout.add(f"tower/{found[name].file.name}", new, found[name])
        layout.drop_buffers(buffers)
        layout.dropped |= dropped
    check_tower_sizes(tower.config, tower.folder, found)


def add_arguments(parser) -> None:
    """Arguments of the command."""
    add_import_arguments(parser, "MoE-LLaVA checkpoint in the published layout")
    add_common_arguments(parser, "SRC")


def run(args) -> None:
    """Run the command."""
    print(import_moe_llava(args.source, args.out, vision_tower=args.vision_tower, **common_options(args)))
