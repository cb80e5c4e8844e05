"""`roe-llava export-reference SRC OUT`: a RoE checkpoint of ours, to the layout of the published code.

What was imported comes back byte for byte: the vocabulary is cut to its old size, dropped buffers are written again.
What the published code cannot express is refused; what its inference does otherwise is said.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from transformers import CLIPImageProcessorPil

from ..baked_roe import refuse_baked
from ..configuration_frontend import STOCK_PROJECTOR
from ..configuration_roe import RoeLlavaConfig
from .arguments import add_common_arguments, common_options
from .bases import refuse_other_bases
from .completeness import check_complete
from .folder_files import check_opens
from .graft import check_apart, total_bytes
from .keys import BASE_KEYS, EXPORT_KEYS, PUBLISHED_TOKENS, ROE_KEYS, is_unread, renamed
from .made_tensors import numbered, rows, stream_files
from .original_config import PROVENANCE, check_sizes, check_version, flat_config, text_config
from .original_import import TOKENIZER_FOLDER
from .original_layout import check_tied, remade_buffers
from .original_processor import copy_licences, copy_tokenizer_files, read_generation_config
from .original_vision import INSIDE, TOWER_FOLDER
from .output import check_target, new_folder, write_json
from .routing_parts import byte_progress
from .source import Source, blamed_on, read_json, resolve_source
from .state_dict import RoutingSizes, check_routing_parts, listed, split_routing_parts
from .summary import Summary
from .weights import Checkpoint, StoredTensor, StoredTensors, open_checkpoint

PUBLISHED_WIDTH = 1024  # written into the published inference code
VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


@dataclass
class Plan:
    """An export that was checked as far as that goes without reading weights.

    Attributes:
        source: where the checkpoint is.
        config: content of its config.json.
        flat: content of the one to write.
        tower: "inside" or "beside".
        files: weight files of the checkpoint.
        tower_file: weights of the tower where they are beside; else `None`.
        renamed: old name to new name.
        dropped: old name to reason.
        cut: rows taken off the vocabulary.
        generation: content of the new generation_config.json.
        notes: what a caller should know, label to text.
    """

    source: Source
    config: dict
    flat: dict
    tower: str
    files: dict[str, StoredTensors]
    tower_file: StoredTensors | None
    renamed: dict[str, str]
    dropped: dict[str, str]
    cut: int
    generation: dict
    notes: dict[str, str]


def export_reference(
    source: str | Path,
    out: str | Path,
    *,
    vision_tower: str | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Summary:
    """Write a RoE checkpoint in the layout of the published code.

    Args:
        source: RoE checkpoint with Llama as its language model; folder or Hub id.
        out: folder to write.
        vision_tower: "inside" the weight files, or "beside" in a folder of its own; by default as it was imported,
            beside if it was not: the published code opens the folder that its config names.
        revision: of a source on the Hub.
        overwrite: replace `out`, once the new folder is whole.
        dry_run: read and check everything, write nothing.
    Returns: what was done.
    Raises: ValueError naming file, tensor, what was found and what was expected.
    """
    if vision_tower not in (None, "inside", "beside"):
        raise ValueError(f"vision_tower must be 'inside' or 'beside', got {vision_tower!r}")
    out = Path(out)
    check_target(out.absolute(), overwrite)
    where = resolve_source(source, revision)
    check_apart(out, where.folder)
    plan = plan_export(where, vision_tower)
    tower_files = {"model.safetensors": plan.tower_file} if plan.tower_file else {}
    num_bytes = sum(file.num_bytes for file in [*plan.files.values(), *tower_files.values()])
    if dry_run:
        with byte_progress(num_bytes, "checking") as progress:
            stream_files(plan.files, None, progress)
            stream_files(tower_files, None, progress)
    else:
        with new_folder(out, overwrite) as folder, byte_progress(num_bytes, "exporting") as progress:
            stream_files(plan.files, folder, progress)
            (folder / TOWER_FOLDER).mkdir()
            stream_files(tower_files, folder / TOWER_FOLDER, progress)
            write_companions(plan, folder)
    return summary_of(plan, out, not dry_run)


def plan_export(source: Source, vision_tower: str | None) -> Plan:
    """Open everything and check what can be checked before weights are read.

    Raises: ValueError as `export_reference`.
    """
    path = source.folder / "config.json"
    config = read_json(path)
    check_expressible(config, path)
    origin = config.get(PROVENANCE)
    if origin is not None:
        check_version(origin, path)
    checkpoint = open_checkpoint(source.folder)
    check_weights(checkpoint, config)
    tower = vision_tower or (origin or {}).get("vision_tower", "beside")
    files, names, dropped = rename_to_published(checkpoint)
    cut = cut_vocabulary(files, config, origin)
    pads = bool(image_settings(source.folder).get("do_pad"))
    with blamed_on(path):
        flat, notes = published_config(config, origin, pads, tower, cut)
    add_buffers(files, origin, tower, path)
    tensors = {name: tensor for file in files.values() for name, tensor in file.items()}
    check_sizes(flat, tensors, path)
    check_tied(tensors, flat.get("tie_word_embeddings", False), path)
    beside = take_tower(files) if tower == "beside" else {}
    kept = {name: StoredTensors(file) for name, file in files.items() if file}
    tower_file = StoredTensors(beside) if beside else None
    generation = generation_settings(source, config, flat)
    return Plan(source, config, flat, tower, numbered(kept), tower_file, names, dropped, cut, generation, notes)


def check_expressible(config: dict, path: Path) -> None:
    """Raises: ValueError naming what the published code cannot express."""
    refuse_other_bases(config.get("model_type"), path, "export-reference")
    if config.get("model_type") != RoeLlavaConfig.model_type:
        raise ValueError(
            f"{path} has model_type {config.get('model_type')!r}, expected {RoeLlavaConfig.model_type!r}: only a RoE "
            "checkpoint has something to export"
        )
    for name, kind in (("text_config", "language model"), ("vision_config", "vision tower")):
        if not isinstance(config.get(name), dict):
            raise ValueError(f"{path} has no {name}, expected the configuration of the {kind}: is the file whole?")
    check_opens(config, path)
    refuse_baked(config.get("skipped_layers"), "the published code could not run it", path.parent)
    full = RoeLlavaConfig.from_dict(config)
    text = full.text_config
    if text.model_type != "llama":
        raise ValueError(
            f"{path} has text_config.model_type {text.model_type!r}, the published code can express 'llama', it routes "
            "no other decoder"
        )
    rope, width = text.rope_parameters["rope_type"], text.hidden_size // text.num_attention_heads
    limits = {
        "text_config.head_dim": (text.head_dim, text.head_dim in (None, width), f"{width}"),
        "text_config.attention_bias": (text.attention_bias, not text.attention_bias, "False"),
        "text_config.mlp_bias": (text.mlp_bias, not text.mlp_bias, "False"),
        "vision_config.model_type": (
            full.vision_config.model_type,
            full.vision_config.model_type == "clip_vision_model",
            "'clip_vision_model'",
        ),
        "routed_layers": (
            full.routed_layers,
            full.routed_layers in (None, list(range(text.num_hidden_layers))),
            "none or all, it routes every layer",
        ),
        "vision_feature_layer": (full.vision_feature_layer, isinstance(full.vision_feature_layer, int), "one layer"),
        "projector_type": (full.projector_type, full.projector_type == STOCK_PROJECTOR, repr(STOCK_PROJECTOR)),
        "projector_hidden_act": (full.projector_hidden_act, full.projector_hidden_act == "gelu", "'gelu'"),
        "multimodal_projector_bias": (full.multimodal_projector_bias, full.multimodal_projector_bias, "True"),
        "quantization_config": (config.get("quantization_config"), not config.get("quantization_config"), "none"),
        "text_config.rope_parameters.rope_type": (
            rope,
            rope in ("default", "linear", "dynamic"),
            "'default', 'linear' or 'dynamic', as Transformers 4.31 knows them",
        ),
    }
    for name, (found, fits, expected) in limits.items():
        if not fits:
            raise ValueError(f"{path} has {name} {found!r}, the published code can express {expected}")


def check_weights(checkpoint: Checkpoint, config: dict) -> None:
    """Raises: ValueError naming a tensor that is missing, unknown or of another shape than the config's."""
    parts = split_routing_parts(checkpoint.tensors)[1]
    sizes = RoutingSizes.of_config(RoeLlavaConfig.from_dict(config))
    check_routing_parts({name: tensor.shape for name, tensor in parts.items()}, sizes, checkpoint.folder)
    read = {name: tensor for name, tensor in checkpoint.tensors.items() if not is_unread(name)}
    if unknown := [name for name in read if not renamed(name, ROE_KEYS) and not renamed(name, BASE_KEYS)]:
        raise ValueError(f"{listed(unknown)} in {read[unknown[0]].file} is no tensor of a RoE-LLaVA")
    check_complete(read, config, checkpoint.folder)


def rename_to_published(
    checkpoint: Checkpoint,
) -> tuple[dict[str, dict[str, StoredTensor]], dict[str, str], dict[str, str]]:
    """Give every tensor its published name.

    Returns: file to new name to tensor; old name to new name; old name to the reason why it was dropped.
    """
    files, names, dropped = {}, {}, {}
    for file_name, file in checkpoint.files.items():
        new_file = files.setdefault(file_name, {})
        for name in file.tensors:
            tensor = checkpoint.tensors[name]
            if is_unread(name):
                dropped[name] = "a buffer of the base that no model reads"
                continue
            memory = renamed(name, ROE_KEYS) or renamed(name, BASE_KEYS)
            if memory == "model.language_model.routing_tokens.weight":
                new_file |= {new: rows(new, tensor, row, row + 1) for row, new in enumerate(PUBLISHED_TOKENS)}
                names[name] = " and ".join(PUBLISHED_TOKENS)
                continue
            new = renamed(memory, EXPORT_KEYS)
            assert new is not None, f"{memory} passed check_complete and has no published name"
            new_file[new], names[name] = tensor, new
    return files, names, dropped


def cut_vocabulary(files: dict[str, dict[str, StoredTensor]], config: dict, origin: dict | None) -> int:
    """Take off the rows an import added, in place; a vocabulary that was changed since is left as it is.

    Returns: number of rows cut.
    """
    size = config["text_config"].get("vocab_size")
    if origin is None or origin["padded_vocab_size"] != size:
        return 0
    old = origin["vocab_size"]
    for file in files.values():
        for name in VOCABULARY:
            if name in file and old < file[name].shape[0]:
                file[name] = rows(name, file[name], 0, old)
    return size - old


def published_config(
    config: dict, origin: dict | None, pads: bool, tower: str, cut: int
) -> tuple[dict, dict[str, str]]:
    """The flat config to write, the imported one where the model is still the same, and what a caller should know."""
    notes = {}
    made = flat_config(config, TOWER_FOLDER, pads)
    flat = made
    if cut:
        made |= {"vocab_size": made["vocab_size"] - cut, "pad_token_id": origin["config"].get("pad_token_id")}
    if origin is not None:
        made["mm_vision_tower"] = origin["config"].get("mm_vision_tower", TOWER_FOLDER)
        if same_model(origin["config"], made):
            flat = dict(origin["config"])
            if "torch_dtype" in flat:  # it may have been trained and saved in another one
                flat["torch_dtype"] = made["torch_dtype"]
        else:
            notes["config"] = "made anew: the model's configuration was changed since it was imported"
    if tower == "beside":
        flat["mm_vision_tower"] = TOWER_FOLDER
    routing = RoeLlavaConfig.from_dict(config)
    if routing.adapter_size != PUBLISHED_WIDTH:
        notes["width"] = (
            f"adapters are {routing.adapter_size} wide; the published inference code has {PUBLISHED_WIDTH} written in, "
            "change it there"
        )
    if routing.routing_positions != "first":
        notes["positions"] = (
            f"routing_positions is {routing.routing_positions!r}; the published inference puts its tokens 'first', so "
            "it may route otherwise"
        )
    if routing.routing_question != "all_text":
        notes["question"] = (
            f"routing_question is {routing.routing_question!r}; the published inference reads all turns, so a "
            "conversation of several may route otherwise"
        )
    if routing.route_bias is not None:
        notes["bias"] = "route_bias is left out: the published code has none, so it skips another share of the layers"
    if routing.skip_calibration is not None:
        notes["table"] = "skip_calibration is left out: the published code has no route bias"
    return flat, notes


def same_model(recorded: dict, made: dict) -> bool:
    """Whether a recorded flat config describes the language model and features that ours does."""
    ignored = {"pad_token_id", "dtype"}
    ours, theirs = (
        {k: v for k, v in text_config(flat).to_dict().items() if k not in ignored} for flat in (made, recorded)
    )
    defaults = {"mm_vision_select_feature": "patch", "mm_vision_select_layer": -2}
    return ours == theirs and all(recorded.get(name, value) == made[name] for name, value in defaults.items())


def add_buffers(files: dict[str, dict[str, StoredTensor]], origin: dict | None, tower: str, path: Path) -> None:
    """Write the buffers again that an import left out, in place.

    Those of the tower go with it, under the name they have where it is written to.
    """
    first = next(iter(files.values()))
    for name, tensor in remade_buffers((origin or {}).get("buffers", []), path).items():
        is_towers, was_inside = "vision_model." in name, name.startswith(INSIDE)
        if is_towers and was_inside != (tower == "inside"):
            continue
        first[name if was_inside or not is_towers else INSIDE + name] = tensor


def take_tower(files: dict[str, dict[str, StoredTensor]]) -> dict[str, StoredTensor]:
    """Take the tower's tensors out of the files; they are returned under a tower's own names."""
    found = {}
    for file in files.values():
        for name in [name for name in file if name.startswith(INSIDE)]:
            found[name.removeprefix(INSIDE)] = file.pop(name)
    return found


def write_companions(plan: Plan, folder: Path) -> None:
    """Config, generation settings, tokenizer, and what the tower needs beside its weights."""
    write_json(folder / "config.json", plan.flat)
    write_json(folder / "generation_config.json", plan.generation)
    if (plan.source.folder / TOKENIZER_FOLDER).is_dir():
        copy_tokenizer_files(plan.source.folder / TOKENIZER_FOLDER, folder)
    copy_licences(plan.source.folder, folder)
    tower = folder / TOWER_FOLDER
    vision = RoeLlavaConfig.from_dict(plan.config).vision_config
    content = {"architectures": ["CLIPVisionModel"], "model_type": vision.model_type}
    write_json(tower / "config.json", json.loads(vision.to_json_string()) | content)
    write_json(tower / "preprocessor_config.json", preprocessor_config(plan.source.folder, vision.image_size))


def generation_settings(source: Source, config: dict, flat: dict) -> dict:
    """generation_config.json: ours without the tokens that the published vocabulary does not have.

    Args:
        config: content of our config.json.
        flat: content of the one to write.
    """
    content = read_generation_config(source.folder)
    size = flat["vocab_size"]
    placeholder = config.get("image_token_index")
    suppressed = [token for token in content.get("suppress_tokens") or [] if token < size and token != placeholder]
    content |= {name: flat.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    origin = config.get("original_layout") or {}
    content |= {
        "suppress_tokens": suppressed or None,
        "max_length": origin.get("max_length", content.get("max_length")),
    }
    return {name: value for name, value in content.items() if value is not None and name != "transformers_version"}


def image_settings(folder: Path) -> dict:
    """Settings of the image processor in a folder; empty if it has none.

    Raises: ValueError if they are no object.
    """
    for name in ("processor_config.json", "preprocessor_config.json"):
        content = read_json(folder / name) if (folder / name).is_file() else {}
        if found := content.get("image_processor", content if "image_mean" in content else None):
            if not isinstance(found, dict):
                raise ValueError(f"{folder / name} has image_processor {found!r:.60}, expected an object")
            return found
    return {}


def preprocessor_config(folder: Path, side: int) -> dict:
    """A tower's preprocessor_config.json: that of the model, or CLIP's usual one; padding is left to the config.

    Args:
        folder: of the model.
        side: of an image in pixels.
    """
    usual = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}).to_dict()
    own = ("do_pad", "processor_class", "auto_map")
    settings = {name: value for name, value in (image_settings(folder) or usual).items() if name not in own}
    return settings | {"image_processor_type": "CLIPImageProcessor"}


def summary_of(plan: Plan, out: Path, written: bool) -> Summary:
    """What was done."""
    files = [*plan.files.values(), *([plan.tower_file] if plan.tower_file else [])]
    tensors = [tensor for file in files for tensor in file.tensors.values()]
    lines = {
        "tower": f"{plan.tower} ({TOWER_FOLDER}/ has its config), mm_vision_tower {plan.flat['mm_vision_tower']!r}"
    }
    if plan.cut:
        lines["vocabulary"] = f"cut by the {plan.cut} rows that the import had added, to {plan.flat['vocab_size']}"
    if not (plan.source.folder / TOKENIZER_FOLDER).is_dir():
        lines["tokenizer"] = "none: take that of the checkpoint the base comes from"
    again = sum(len(entry["names"]) for entry in (plan.config.get(PROVENANCE) or {}).get("buffers", []))
    if again:
        lines["buffers"] = f"{again} that the import had left out are written again"
    return Summary(
        out=out,
        written=written,
        kept=len(plan.renamed),
        kept_bytes=total_bytes(dict(enumerate(tensors))),
        kept_what="tensors",
        renamed={old: new for old, new in plan.renamed.items() if old != new},
        dropped=plan.dropped,
        lines=lines | plan.notes,
    )


def add_arguments(parser) -> None:
    """Arguments of the command."""
    parser.add_argument("source", metavar="SRC", help="RoE checkpoint: a folder or a Hub id")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument(
        "--vision-tower",
        choices=("inside", "beside"),
        help="where its weights go: into the checkpoint's files, or into OUT/vision_tower; default: as it was imported",
    )
    add_common_arguments(parser, "SRC")


def run(args) -> None:
    """Run the command."""
    print(export_reference(args.source, args.out, vision_tower=args.vision_tower, **common_options(args)))
