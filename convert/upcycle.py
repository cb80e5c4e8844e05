"""`roe-llava upcycle BASE OUT`: a dense LLaVA becomes one with experts, each a copy of the layer's MLP.

Where a token's weights sum to 1 (two experts and more, by default) the result answers as the base does until it is
trained. Weights are streamed; routers are new, and the only tensors that are made.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from ..configuration_frontend import FrontendLlavaConfig
from ..configuration_moe_llava import ROUTER_TYPES, MoeLlavaConfig
from ..modeling_moe_llava import LANGUAGE_MODELS
from ..routers_moe import ROUTERS, RouterLinear
from .arguments import add_common_arguments, common_options
from .bases import refuse_other_bases
from .completeness import check_complete
from .folder_files import Companions, find_companions, write_companions
from .kinds import MOE, ROE, ROE_MOE
from .made_tensors import in_memory, numbered, stream_files
from .moe_config import moe_llava_config
from .moe_layout import pack_layer
from .original_layout import Layout
from .output import check_apart, check_target, new_folder, write_json
from .routing_parts import byte_progress
from .source import Source, blamed_on, check_text_config, read_json, resolve_source
from .state_dict import listed, text_prefix
from .summary import Summary
from .weights import Checkpoint, StoredTensor, StoredTensors, open_checkpoint

# Sorts behind the usual names of base files, so that a dtype read off the first file is the base's.
ROUTER_FILE = "model-routers.safetensors"
LAYERS = ("alternate", "first_half", "second_half", "all")
MLP = r"(?:gate_proj|up_proj|down_proj|fc1|fc2)"


@dataclass
class Plan:
    """An upcycling that was checked as far as that goes without reading weights.

    Attributes:
        base: where the base is.
        checkpoint: its weight files.
        companions: its other files.
        config: content of the new config.json.
        layout: what becomes of the base's tensors.
        routers: name to tensor.
        files: the new weight files.
    """

    base: Source
    checkpoint: Checkpoint
    companions: Companions
    config: dict
    layout: Layout
    routers: dict[str, StoredTensor]
    files: dict[str, StoredTensors]


def upcycle(
    base: str | Path,
    out: str | Path,
    *,
    experts: int = 4,
    top_k: int = 2,
    layers: str | list[int] = "alternate",
    router: str = "linear",
    seed: int = 0,
    revision: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Summary:
    """Give a dense LLaVA experts.

    Args:
        base: llava-hf checkpoint, a folder or a Hub id.
        out: folder to write.
        experts: E, copies of each MLP.
        top_k: experts per token.
        layers: which get experts: one of `LAYERS`, or their numbers.
        router: kind of the routers, "linear" or "token_aware".
        seed: of the routers' first values.
        revision: of a base on the Hub.
        overwrite: replace `out`, once the new folder is whole.
        dry_run: read and check everything, write nothing.
    Returns: what was done.
    Raises: ValueError naming file, tensor or option, what was found and what was expected.
    """
    out = Path(out)
    check_target(out.absolute(), overwrite)
    where = resolve_source(base, revision)
    check_apart(out, where.folder)
    fields = {"num_experts": experts, "num_experts_per_tok": top_k, "router_type": router}
    plan = plan_upcycle(where, fields, layers, seed)
    num_bytes = sum(file.num_bytes for file in plan.files.values())
    if dry_run:
        with byte_progress(num_bytes, "checking") as progress:
            stream_files(plan.files, None, progress)
    else:
        with new_folder(out, overwrite) as folder, byte_progress(num_bytes, "upcycling") as progress:
            stream_files(plan.files, folder, progress)
            write_json(folder / "config.json", plan.config)
            write_companions(plan.companions, folder)
            MOE.write_code(folder)
    return summary_of(plan, out, written=not dry_run)


def plan_upcycle(base: Source, fields: dict, layers: str | list[int], seed: int) -> Plan:
    """Open everything and check what can be checked before weights are read.

    Args:
        fields: of `MoeLlavaConfig`.
    Raises: ValueError as `upcycle`.
    """
    dense = read_dense_config(base.folder)
    with blamed_on(base.folder / "config.json"):
        num_layers = MoeLlavaConfig.from_dict(dense | {"model_type": "moe_llava"}).text_config.num_hidden_layers
    fields = fields | {"moe_layers": chosen_layers(layers, num_layers)}
    config = moe_llava_config(dense, fields)
    config["moe_provenance"] = {"base": {"id": base.id, "revision": base.revision}, "upcycled": True, "seed": seed}
    shape = MoeLlavaConfig.from_dict(config)  # a wrong option is no fault of the base's config
    checkpoint = open_checkpoint(base.folder)
    check_complete(checkpoint.tensors, dense, base.folder)
    layout, prefix = Layout(), text_prefix(checkpoint.tensors)
    take_apart(layout, checkpoint, prefix, shape)
    routers = new_routers(shape, prefix, seed, base.folder)
    check_complete(layout.all_tensors() | routers, config, base.folder)
    files = {name: StoredTensors(tensors) for name, tensors in layout.files.items()}
    files = numbered(files, {ROUTER_FILE: StoredTensors(routers)})
    return Plan(base, checkpoint, dense_companions(base.folder, dense, checkpoint), config, layout, routers, files)


def read_dense_config(folder: Path) -> dict:
    """A dense LLaVA's config.json, as it is written.

    Raises: ValueError if it is none, or its decoder is none that may have experts.
    """
    path = folder / "config.json"
    config = read_json(path)
    kind = config.get("model_type")
    reasons = {
        MOE.model_type: "this model has experts already",
        ROE_MOE.model_type: "this model has experts already, and routing beside them",
        FrontendLlavaConfig.model_type: "experts stand behind stock LLaVA's tower and projector alone, so far",
        ROE.model_type: "routing parts belong to the dense layers; take its base, or split it with extract --full",
    }
    if kind not in reasons:
        refuse_other_bases(kind, path, "upcycle")
    if kind != "llava":
        reason = reasons.get(kind, "an original LLaVA goes through import-llava first")
        raise ValueError(f"{path} has model_type {kind!r}, expected 'llava': {reason}")
    check_text_config(config, path)
    text_type = config["text_config"].get("model_type", "llama")  # LLaVA's own default
    if not isinstance(text_type, str) or text_type not in LANGUAGE_MODELS:
        raise ValueError(
            f"text_config.model_type {text_type!r} in {path} is not supported, decoders that may have experts are "
            f"{sorted(LANGUAGE_MODELS)}"
        )
    return config


def chosen_layers(layers: str | list[int], num_layers: int) -> list[int]:
    """Numbers of the layers that get experts.

    Raises: ValueError for a word that is not in `LAYERS`; numbers are checked by the config.
    """
    if not isinstance(layers, str):
        return list(layers)
    half = num_layers // 2
    named = dict(
        zip(LAYERS, (range(0, num_layers, 2), range(half), range(half, num_layers), range(num_layers)), strict=True)
    )
    if layers in named:
        return list(named[layers])
    if not re.fullmatch(r"\d+(,\d+)*", layers):
        raise ValueError(f"layers must be one of {LAYERS} or numbers like 0,2,5, got {layers!r}")
    return [int(number) for number in layers.split(",")]


def take_apart(layout: Layout, checkpoint: Checkpoint, prefix: str, config: MoeLlavaConfig) -> None:
    """Put every tensor of a base into a layout: as it is, or as the experts of its layer.

    Args:
        prefix: what names of the language model begin with.
    """
    pattern = rf"{re.escape(prefix)}layers\.(\d+)\.mlp\.({MLP})\.(weight|bias)"
    parts = {layer: {} for layer in config.expert_layers()}
    for file_name, file in checkpoint.files.items():
        for name in file.tensors:
            tensor = checkpoint.tensors[name]
            found = re.fullmatch(pattern, name)
            if found and int(found[1]) in parts:
                copies = {(number, found[2], found[3]): (file_name, tensor) for number in range(config.num_experts)}
                parts[int(found[1])] |= copies
            else:
                layout.add(file_name, name, tensor)
    for layer, found in parts.items():
        pack_layer(layout, f"{prefix}layers.{layer}.mlp.experts.", found, config.num_experts)


def new_routers(config: MoeLlavaConfig, prefix: str, seed: int, folder: Path) -> dict[str, StoredTensor]:
    """Name on disk to tensor of untrained routers, as the model itself would initialise them; float32.

    Args:
        folder: of the base, for messages.
    """
    std = getattr(config.text_config, "initializer_range", 0.02)
    generator, made = torch.Generator().manual_seed(seed), {}
    for layer in config.expert_layers():
        router = ROUTERS[config.router_type](config)
        for module in router.modules():
            if isinstance(module, RouterLinear):
                torch.nn.init.normal_(module.weight, std=std, generator=generator)
                if module.bias is not None:
                    torch.nn.init.zeros_(module.bias)
        for name, parameter in router.named_parameters():
            name = f"{prefix}layers.{layer}.mlp.router.{name}"
            made[name] = in_memory(name, parameter.detach(), folder)
    return made


def dense_companions(folder: Path, config: dict, checkpoint: Checkpoint) -> Companions:
    """Processor, tokenizer and settings of a base, which its model with experts uses as they are."""
    companions = find_companions(folder, config, used=checkpoint.files)
    companions.processor = None
    companions.dropped.pop("processor", None)
    if (path := folder / "processor_config.json").is_file() and path not in companions.copied:
        companions.copied.append(path)
    return companions


def summary_of(plan: Plan, out: Path, written: bool) -> Summary:
    """What was done."""
    tensors, shape = plan.checkpoint.tensors, MoeLlavaConfig.from_dict(plan.config)
    old, new = (sum(tensor.num_bytes for tensor in of.values()) for of in (tensors, plan.layout.all_tensors()))
    per_token = "which answer as the base does until they are trained"
    if not shape.normalizes_weights():
        per_token = "weighted by a probability below 1: it does not answer as the base does until it is trained"
    layers = listed([*map(str, shape.expert_layers())])
    lines = {
        "experts": f"{shape.num_experts} in layers {layers}: {(new - old) / 1e6:,.1f} MB more",
        "weights": f"{shape.num_experts_per_tok} of them per token, {per_token}",
    }
    return Summary(
        out=out,
        written=written,
        kept=len(tensors),
        kept_bytes=old,
        renamed={name: to for name, to in plan.layout.renamed.items() if name != to},
        added=len(plan.routers),
        added_bytes=sum(tensor.num_bytes for tensor in plan.routers.values()),
        added_what="untrained router tensors",
        dropped=plan.companions.dropped,
        lines=lines,
    )


def add_arguments(parser) -> None:
    """Arguments of the command."""
    parser.add_argument("base", metavar="BASE", help="llava-hf checkpoint: a folder or a Hub id")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument("--experts", type=int, default=4, metavar="E", help="experts per layer (default: 4)")
    parser.add_argument("--top-k", type=int, default=2, metavar="K", help="experts per token (default: 2; EvoMoE: 1)")
    parser.add_argument(
        "--layers",
        default="alternate",
        help=f"layers that get experts: {', '.join(LAYERS)}, or numbers like 0,2,5 (default: alternate)",
    )
    parser.add_argument(
        "--router", choices=ROUTER_TYPES, default="linear", help="linear as MoE-LLaVA's (default), or EvoMoE's"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the routers' first values (default: 0)")
    add_common_arguments(parser, source="BASE")


def run(args) -> None:
    """Run the command."""
    options = {name: getattr(args, name) for name in ("experts", "top_k", "layers", "router", "seed")}
    print(upcycle(args.base, args.out, **options, **common_options(args)))
