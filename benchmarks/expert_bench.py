"""`roe-llava bench` of a model with experts beside its dense base: prefill, decoding, memory, parameters.

Every experts implementation runs on the same tensors, interleaved with the base in one process, on the same prompts.
Measuring and the command; `expert_report` prints.

B batch, S sequence, E experts, K experts per token.
"""

import argparse
import copy
import random
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedModel

from ..configuration_moe_llava import MoeLlavaConfig
from ..convert.bases import refuse_other_bases
from ..convert.completeness import check_files
from ..convert.expert_counts import parameter_counts
from ..convert.kinds import ROE_MOE, kind_of
from ..convert.source import read_json, resolve_source
from ..convert.upcycle import chosen_layers
from ..convert.verify_prompts import PROMPTS, encoded
from ..modeling_moe_llava import MoeLlavaForConditionalGeneration
from ..routers_moe import RouterLinear
from .environment import describe_machine, describe_run
from .measure import cache_bytes, summary
from .shapes import SHAPES, build_subject
from .systems import BASE, CONTROL
from .timing import PARTS, time_once

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
ONE_EXPERT = "one expert"
# batched_mm copies the weights of every choice: left out where that is more than a machine should give for a timing.
MOST_COPIED = 4e9
CHECKPOINT_BATCHES, CHECKPOINT_ROUNDS = (1, 2, 4, 8), 9


@dataclass(frozen=True)
class ExpertSubject:
    """What is measured.

    Attributes:
        name: of the shape, or of the checkpoint.
        base, moe: the dense model and the one with experts, in eval mode.
        prompts: gives, for a batch size, inputs of either model, one batch per kind of prompt; no row is padded.
        trained: whether routers and experts come from a checkpoint; else routers are random.
    """

    name: str
    base: PreTrainedModel
    moe: PreTrainedModel
    prompts: Callable[[int], list[dict[str, Tensor]]]
    trained: bool


@dataclass(frozen=True)
class ExpertSystem:
    """One thing whose time is taken.

    Attributes:
        kind: `BASE`, `CONTROL` (the base again), one of `IMPLEMENTATIONS`, or `ONE_EXPERT`: all tokens go through the
            first expert, no router runs, which costs what the base costs.
        request: arguments of every pass.
    """

    kind: str
    model: PreTrainedModel
    request: dict = field(default_factory=dict)

    def __call__(self, **inputs):
        return self.model(**inputs, **self.request)

    @property
    def device(self) -> torch.device:
        return self.model.device


# ------------------------------------------------------------------------------------------------------------- subjects


def checkpoint_subject(moe: str, base: str, device: str | None, dtype: str | None) -> ExpertSubject:
    """A checkpoint with experts and its dense base.

    Raises: ValueError if they are not, or are of different sizes.
    """
    sources = {"--moe": resolve_source(moe), "--base": resolve_source(base)}
    found = {name: read_json(source.folder / "config.json") for name, source in sources.items()}
    kind = kind_of(found["--moe"].get("model_type"))
    if kind is ROE_MOE:
        refuse_other_bases(kind.model_type, moe, "bench --moe")
    if kind is None or kind.decides != "experts":
        raise ValueError(f"--moe {moe} has model_type {found['--moe'].get('model_type')!r}, expected one with experts")
    if found["--base"].get("model_type") != kind.dense.config_class.model_type:
        wanted = kind.dense.config_class.model_type
        raise ValueError(f"--base {base} has model_type {found['--base'].get('model_type')!r}, expected {wanted!r}")
    for source in sources.values():
        check_files(source.folder)
    options = {"dtype": getattr(torch, dtype) if dtype else "auto"}
    where = torch.device(device or "cpu")
    model = kind.model.from_pretrained(sources["--moe"].folder, **options).to(where).eval()
    dense = kind.dense.from_pretrained(sources["--base"].folder, **options).to(where).eval()
    check_sizes(model, dense, moe, base)
    processor = LlavaProcessor.from_pretrained(sources["--base"].folder, trust_remote_code=False)
    return ExpertSubject(Path(moe).name, dense, model, lambda size: asked(processor, model, size), trained=True)


def check_sizes(model: PreTrainedModel, dense: PreTrainedModel, moe: str, base: str) -> None:
    """Raises: ValueError if the two decoders differ in what experts leave as it is."""
    names = ("model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size")
    one, other = ([getattr(of.config.text_config, name) for name in names] for of in (model, dense))
    if one != other:
        differing = [f"{name} {a} and {b}" for name, a, b in zip(names, one, other, strict=True) if a != b]
        raise ValueError(f"{moe} and {base} differ in {', '.join(differing)}: is that the base it was made from?")


def asked(processor, model, batch_size: int) -> list[dict[str, Tensor]]:
    """Questions about a drawn picture, each as a batch of equal rows."""
    questions = [question for question, has_image in PROMPTS.items() if has_image]
    prompts = [dict(encoded(processor, model, [question])) for question in questions]
    return [{name: one.repeat(batch_size, *[1] * (one.dim() - 1)) for name, one in of.items()} for of in prompts]


def shape_subject(
    shape: str, device: str | None, dtype: str | None, experts: int, top_k: int, layers: str, router: str
) -> ExpertSubject:
    """A shape of `roe-llava bench` as dense base, and the same with experts: copies of its MLPs, routers random.

    Raises: ValueError for experts that cannot be.
    """
    subject = build_subject(shape, device, dtype)
    chosen = chosen_layers(layers, subject.base.config.text_config.num_hidden_layers)
    fields = {"num_experts": experts, "num_experts_per_tok": top_k, "moe_layers": chosen, "router_type": router}
    moe = with_experts(subject.base, fields)

    def prompts(batch_size: int) -> list[dict[str, Tensor]]:
        of_roe = subject.prompts(batch_size)
        return [{name: one for name, one in prompt.items() if name != "routing_segments"} for prompt in of_roe]

    return ExpertSubject(shape, subject.base, moe, prompts, trained=False)


@torch.no_grad()
def with_experts(base: LlavaForConditionalGeneration, fields: dict) -> MoeLlavaForConditionalGeneration:
    """A Llama base with experts in memory: everything but MLPs on the same tensors."""
    content = {
        name: value for name, value in base.config.to_dict().items() if name not in ("auto_map", "architectures")
    }
    config = MoeLlavaConfig.from_dict(content | {"model_type": MoeLlavaConfig.model_type} | fields)
    with torch.device("meta"):
        attention = base.config._attn_implementation
        model = MoeLlavaForConditionalGeneration._from_config(config, dtype=base.dtype, attn_implementation=attention)
    torch.manual_seed(0)
    layers, dense_layers = model.model.language_model.layers, base.model.language_model.layers
    for layer in config.expert_layers():
        mlp, block = dense_layers[layer].mlp, layers[layer].mlp
        block.to_empty(device=base.device)
        gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
        block.experts.gate_up_proj.copy_(gate_up.expand_as(block.experts.gate_up_proj))
        block.experts.down_proj.copy_(mlp.down_proj.weight.expand_as(block.experts.down_proj))
        block.router.float()
        for module in block.router.modules():
            if isinstance(module, RouterLinear):
                module.weight.normal_(std=module.in_features**-0.5)
                if module.bias is not None:
                    module.bias.zero_()
    for part in ("vision_tower", "multi_modal_projector"):
        setattr(model.model, part, getattr(base.model, part))
    language_model, theirs = model.model.language_model, base.model.language_model
    for part in ("embed_tokens", "norm", "rotary_emb"):
        setattr(language_model, part, getattr(theirs, part))
    for layer, dense in zip(layers, dense_layers, strict=True):
        for part in (
            "self_attn",
            "input_layernorm",
            "post_attention_layernorm",
            *([] if layer.has_experts else ["mlp"]),
        ):
            setattr(layer, part, getattr(dense, part))
    model.lm_head = base.lm_head
    return model.eval()


# ------------------------------------------------------------------------------------------------------------ measuring


def systems_of(subject: ExpertSubject, num_tokens: int) -> tuple[list[ExpertSystem], dict[str, str]]:
    """What is compared, the base first, and what is left out, with the reason.

    Args:
        num_tokens: of the longest prompt, all rows together.
    """
    systems, left_out = [ExpertSystem(BASE, subject.base), ExpertSystem(CONTROL, subject.base)], {}
    for name in IMPLEMENTATIONS:
        copied = copied_bytes(subject.moe, num_tokens)
        if name == "batched_mm" and copied > MOST_COPIED:
            left_out[name] = f"a prefill would copy {copied / 1e9:.1f} GB of weights"
            continue
        systems.append(ExpertSystem(name, with_implementation(subject.moe, name)))
    systems.append(ExpertSystem(ONE_EXPERT, subject.moe, {"single_expert": 0}))
    return systems, left_out


def copied_bytes(moe: PreTrainedModel, num_tokens: int) -> int:
    """What batched_mm copies in a layer: the larger projection of every choice."""
    block = moe.model.language_model.layers[moe.config.expert_layers()[0]].mlp
    largest = max(one[0].numel() * one.element_size() for one in block.experts.parameters())
    return num_tokens * moe.config.num_experts_per_tok * largest


def with_implementation(moe: PreTrainedModel, name: str) -> PreTrainedModel:
    """The model once more, on the same tensors, with an experts implementation."""
    tensors = {id(tensor): tensor for tensor in [*moe.parameters(), *moe.buffers()]}
    model = copy.deepcopy(moe, tensors)  # what the second argument knows is not copied
    model.set_experts_implementation(name)
    return model


def measure(
    subject: ExpertSubject,
    rounds: dict[int, int],
    num_tokens: int,
    seed: int = 0,
    progress: Callable[[Iterable, str], Iterable] = lambda items, _: items,
) -> dict:
    """Everything of a subject.

    Args:
        rounds: batch size to the runs of every system there; prompts take turns, a round has one.
        num_tokens: decoding steps behind every prefill.
        seed: of the order in which systems run.
        progress: wraps rounds to show how far they are; it gets a description too.
    """
    result = {"sizes": sizes_of(subject), "trained": subject.trained, "tokens": num_tokens, "seed": seed}
    result["prompts"] = [prompt["input_ids"].shape[1] for prompt in subject.prompts(1)]
    result["batches"], draw = {}, random.Random(seed)
    for batch_size, number in rounds.items():
        prompts = subject.prompts(batch_size)
        systems, left_out = systems_of(subject, max(prompt["input_ids"].numel() for prompt in prompts))
        turns = progress(range(number), f"batch {batch_size}, {len(systems)} systems")
        measured = measure_batch(systems, prompts, turns, num_tokens, draw)
        result["batches"][str(batch_size)] = {"rounds": number, "left_out": left_out, "systems": measured}
    return result


def sizes_of(subject: ExpertSubject) -> dict:
    """What the models are made of; parameters of the weights themselves, tied ones once."""
    config, moe, base = subject.moe.config, dict(subject.moe.named_parameters()), subject.base
    counts = parameter_counts({name: one.shape for name, one in moe.items()}, config)
    return {
        "layers": config.text_config.num_hidden_layers,
        "hidden_size": config.text_config.hidden_size,
        "intermediate_size": config.text_config.intermediate_size,
        "expert_layers": config.expert_layers(),
        "experts": config.num_experts,
        "experts_per_token": config.num_experts_per_tok,
        "router": config.router_type,
        "base_parameters": sum(one.numel() for one in base.parameters()),
        "moe_parameters": counts.total,
        "activated_parameters": counts.activated,
        "base_bytes": sum(one.numel() * one.element_size() for one in base.parameters()),
        "moe_bytes": sum(one.numel() * one.element_size() for one in moe.values()),
    }


def measure_batch(
    systems: Sequence[ExpertSystem],
    prompts: Sequence[dict[str, Tensor]],
    rounds: Iterable[int],
    num_tokens: int,
    draw: random.Random,
) -> list[dict]:
    """One batch size: per system what it is, `probe`, and per part `summary`."""
    probes = {system.kind: probe(system, prompts[-1], num_tokens) for system in systems}  # and a first run
    runs: dict[str, list[dict]] = {system.kind: [] for system in systems}
    for number in rounds:
        for system in draw.sample(list(systems), len(systems)):
            runs[system.kind].append(time_once(system, prompts[number % len(prompts)], num_tokens))
    rows = []
    for system in systems:
        own = {"kind": system.kind} | probes[system.kind]
        own |= {part: summary(runs[system.kind], runs[BASE], part, len(prompts)) for part in PARTS}
        rows.append(own)
    return rows


@torch.inference_mode()
def probe(system: ExpertSystem, prompt: dict[str, Tensor], num_tokens: int) -> dict:
    """One run that is not timed.

    Returns: `kv_bytes` after prefill; `experts_used`, the mean number of a layer's experts that the tokens of the
        prefill and of one decoding step go through (`None` where no router decides); `peak_extra_bytes` beyond what was
        there before (`None` where the device keeps no count).
    """
    device, on_gpu = system.device, system.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if on_gpu else 0
    asks = {"output_router_logits": True} if system.kind in IMPLEMENTATIONS else {}
    outputs = system(**prompt, use_cache=True, logits_to_keep=1, **asks)
    cache, used = outputs.past_key_values, {"prefill": mean_used(outputs)}
    kv_bytes = cache_bytes(cache)
    for _ in range(num_tokens):
        outputs = system(input_ids=prompt["input_ids"][:, -1:], past_key_values=cache, use_cache=True, **asks)
    used["decode"] = mean_used(outputs)
    peak = torch.cuda.max_memory_allocated(device) - before if on_gpu else None
    return {"kv_bytes": kv_bytes, "experts_used": used if asks else None, "peak_extra_bytes": peak}


def mean_used(outputs) -> float | None:
    """Mean over layers of how many experts at least one token went through."""
    chosen = getattr(outputs, "expert_indices", None)
    return sum(one.unique().numel() for one in chosen) / len(chosen) if chosen else None


# -------------------------------------------------------------------------------------------------------------- command


def check_arguments(args: argparse.Namespace) -> None:
    """Raises: ValueError for options that contradict each other, or that experts have no use for."""
    if args.moe and not args.base:
        raise ValueError("--moe needs --base: the dense LLaVA it was made from, which it is timed against")
    if args.moe and (args.experts or args.shape):
        raise ValueError("--moe measures a checkpoint: give it without --shape and --experts")
    if args.skip or args.compile:
        name = "--skip" if args.skip else "--compile"
        raise ValueError(f"{name} is for routes over layers: leave it out with --experts and --moe")


def run(args: argparse.Namespace, quick: tuple[tuple[int, ...], int, int]) -> None:
    """The command, with experts.

    Args:
        quick: batch sizes, rounds and tokens with --quick.
    Raises: ValueError for arguments that cannot be, and for a result that is there already.
    """
    from . import expert_report, report

    check_arguments(args)
    name = Path(args.moe).name if args.moe else args.shape or "tiny"
    out = args.out or Path("out/bench") / f"{name}-experts.json"
    report.check_out(out, args.overwrite)
    result = measured(args, quick)
    report.save(result, out, args.overwrite)
    expert_report.print_result(result)
    print(f"wrote {out}")


def measured(args: argparse.Namespace, quick: tuple[tuple[int, ...], int, int]) -> dict:
    """The result of a run, as it is written."""
    from tqdm import tqdm

    start, before = time.perf_counter(), torch.get_num_threads()
    shape = None if args.moe else SHAPES[args.shape or "tiny"]
    threads = args.threads or (shape.threads if shape else None)
    rounds, num_tokens = settings_of(args, shape, quick)
    if threads:
        torch.set_num_threads(threads)
    try:
        if args.moe:
            subject = checkpoint_subject(args.moe, args.base, args.device, args.dtype)
        else:
            experts = (args.experts, args.top_k, args.layers, args.router)
            subject = shape_subject(args.shape or "tiny", args.device, args.dtype, *experts)
        found = measure(subject, rounds, num_tokens, args.seed, lambda items, what: tqdm(items, what, file=sys.stderr))
        setup = describe_machine() | describe_run(subject.base)
    finally:
        torch.set_num_threads(before)
    about = {"benchmark": "bench-experts", "subject": subject.name, "quick": args.quick}
    about |= {"command": shlex.join(["roe-llava", *sys.argv[1:]]), "setup": setup}
    return about | {"total_seconds": time.perf_counter() - start} | found


def settings_of(args: argparse.Namespace, shape, quick: tuple[tuple[int, ...], int, int]) -> tuple[dict[int, int], int]:
    """Rounds by batch size, and tokens: what was asked, else the quick ones with --quick, else the shape's."""
    sizes, few, tokens = quick if args.quick else ((), None, 16)
    usual = dict.fromkeys(CHECKPOINT_BATCHES, CHECKPOINT_ROUNDS) if shape is None else shape.rounds
    sizes = dict.fromkeys(args.batch or sizes or usual)
    rounds = {size: args.rounds or few or usual.get(size, usual[max(usual)]) for size in sizes}
    return rounds, args.tokens or tokens


__all__ = ["ExpertSubject", "checkpoint_subject", "measure", "shape_subject"]
