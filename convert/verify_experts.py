"""What `verify` checks of a model with experts: until it is trained, it answers as the dense model it is made of.

E experts.
"""

import random
from pathlib import Path

import torch

from ..benchmarks.expert_bench import IMPLEMENTATIONS, MOST_COPIED, ExpertSystem, copied_bytes, measure_batch
from ..benchmarks.systems import BASE
from ..configuration_moe_llava import MoeLlavaConfig
from .completeness import check_complete
from .fingerprint import TensorHasher, fingerprint
from .kinds import Kind
from .original_config import PROVENANCE as IMPORTED
from .original_layout import Layout
from .routing_parts import byte_progress
from .source import Source, read_json
from .state_dict import canonical_base, difference, text_prefix
from .upcycle import take_apart
from .verify_prompts import agreement, answer
from .weights import StoredTensor, open_checkpoint


def check_untrained(moe: Source, base: Source, kind: Kind) -> dict:
    """Check that a model with experts is one that has to answer as its base does.

    Returns: content of its config.json.
    Raises: ValueError if it was trained or imported, or its decoder is not of the base's size.
    """
    config = read_json(moe.folder / "config.json")
    about = config.get(kind.provenance) or {}
    instead = "roe-llava evaluate --base compares what the two answer, roe-llava bench --moe --base how fast"
    if about.get("training"):
        names = ", ".join(str(stage.get("stage")) for stage in about["training"])
        raise ValueError(f"{moe.folder} was trained ({names}), so it does not answer as {base.folder} does: {instead}")
    if IMPORTED in config or not about.get("upcycled"):
        raise ValueError(
            f"{moe.folder} was not made by roe-llava upcycle from a dense model ({kind.provenance} {about or None}), "
            f"so there is none that it has to answer as: {instead}"
        )
    return config


def expected_tensors(base: Source, config: dict) -> dict[str, StoredTensor]:
    """What upcycling makes of a base, routers left out, by name in memory; a stream still.

    Args:
        config: content of the upcycled model's config.json.
    Raises: ValueError if the base has not the layers that are to have experts.
    """
    checkpoint, layout = open_checkpoint(base.folder), Layout()
    take_apart(layout, checkpoint, text_prefix(checkpoint.tensors), MoeLlavaConfig.from_dict(config))
    return canonical_base(layout.all_tensors())


def signatures(tensors: dict[str, StoredTensor], what: str) -> dict[str, str]:
    """Name to signature."""
    with byte_progress(sum(one.num_bytes for one in tensors.values()), what) as progress, TensorHasher() as hasher:
        for tensor in tensors.values():
            hasher.add_all(tensor, progress)
        return {name: hasher.signature(tensor) for name, tensor in tensors.items()}


def check_copies(report, base: Source, moe: Source, config: dict, show) -> None:
    """Whether every weight but the routers is the base's, to the byte, experts being copies of its MLPs."""
    checkpoint = open_checkpoint(moe.folder)
    check_complete(checkpoint.tensors, config, moe.folder)
    theirs = {name: one for name, one in checkpoint.tensors.items() if ".mlp.router." not in name}
    expected = signatures(expected_tensors(base, config), "base")
    found = signatures(canonical_base(theirs), "with experts")
    reason = difference(found, expected)
    detail = f"{len(found)} tensors, fingerprint {fingerprint(found)[:16]}" if reason is None else reason
    report.add("experts are copies of the base's MLPs, all else is the base's", reason is None, detail, show)


def load(moe: Source, kind: Kind, dtype: str, device: str):
    """The model with experts, weights of a token's experts summing to 1, as with two and more they do."""
    model = kind.model.from_pretrained(moe.folder, dtype=dtype).to(device).eval()
    model.config.normalize_expert_weights, model.config.output_router_logits = True, False
    return model


def check_answers(report, model, prompts: dict, expected: dict, num_tokens: int, rounding: float, show) -> None:
    """Whether it answers as the stock model, through each expert alone and by its routers."""
    for expert in range(model.config.num_experts):
        found = {name: answer(model, inputs, num_tokens, single_expert=expert) for name, inputs in prompts.items()}
        name = f"all tokens through expert {expert + 1} equals the stock model up to rounding"
        compare(report, name, found, expected, rounding, show)
    name = "routers at work equals the stock model up to rounding"
    for implementation in IMPLEMENTATIONS:
        copied = copied_bytes(model, max(inputs["input_ids"].numel() for inputs in prompts.values()))
        if implementation == "batched_mm" and copied > MOST_COPIED:
            text = f"left out, a prefill would copy {copied / 1e9:.1f} GB of weights"
            report.add(f"{name}, {implementation}", True, text, show)
            continue
        model.set_experts_implementation(implementation)
        found = {name: answer(model, inputs, num_tokens) for name, inputs in prompts.items()}
        compare(report, f"{name}, {implementation}", found, expected, rounding, show)


def compare(report, name: str, found: dict, expected: dict, rounding: float, show) -> None:
    """A verdict on answers that have to be the same."""
    verdicts = [agreement(expected[prompt], found[prompt], rounding) for prompt in expected]
    worst = torch.tensor([expected[prompt].relative_difference(found[prompt]) for prompt in expected]).max().item()
    same = sum(passed for passed, _ in verdicts)
    detail = f"largest logit difference {worst:.2g} of the largest logit, allowed {rounding:.0g}"
    report.add(name, same == len(verdicts), f"{detail}; {same} of {len(verdicts)} answers are the same", show)


def time_both(report, model, stock, prompts: dict, num_tokens: int, repeats: int, show) -> None:
    """Time with experts against the stock model: a measurement, which nothing can fail."""
    systems = [ExpertSystem(BASE, stock), ExpertSystem(IMPLEMENTATIONS[-1], model)]
    asked = [dict(inputs) for inputs in prompts.values()]
    rows = measure_batch(systems, asked, range(repeats * len(asked)), num_tokens, random.Random(0))
    report.times = {row["kind"]: row for row in rows}
    own = rows[1]
    parts = ", ".join(
        f"{part} {own[part]['seconds'] * 1e3:.1f} ms ({own[part]['ratio']:.2f}x of the base's speed)"
        for part in ("prefill", "decode")
    )
    report.add(f"time against the base, batch 1, {own['kind']}", True, parts, show)


def kind_at(folder: Path):
    """The `model_type` that a folder's config.json has; `None` where it has none."""
    path = folder / "config.json"
    return read_json(path).get("model_type") if path.is_file() else None


__all__ = ["check_answers", "check_copies", "check_untrained", "kind_at", "load", "time_both"]
