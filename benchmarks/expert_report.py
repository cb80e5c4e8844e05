"""Prints what `expert_bench` found, and shows it on a card. Nothing is measured here."""

from collections.abc import Iterable

from rich.console import Console

from .report import markdown_table, megabytes, milliseconds, table, times
from .systems import BASE
from .timing import PARTS

COLUMNS = (
    *("batch", "system", "prefill", "base / it", "decode", "base / it"),
    *("experts used, prefill", "experts used, decode", "peak memory"),
)
SHORT = ("batch", "experts implementation", "prefill, base / it", "decode, base / it")


def rows_of(result: dict) -> Iterable[list[str]]:
    """The cells of every system at every batch size, in the order of `COLUMNS`."""
    for size, batch in result["batches"].items():
        for own in batch["systems"]:
            cells = [size, own["kind"]]
            for part in PARTS:
                cells += [milliseconds(own[part]["seconds"]), "1" if own["kind"] == BASE else times(own[part])]
            used = own["experts_used"] or dict.fromkeys(PARTS)
            cells += ["-" if used[part] is None else f"{used[part]:.1f}" for part in PARTS]
            yield [*cells, megabytes(own["peak_extra_bytes"])]


def parameters_text(sizes: dict) -> str:
    """Total and activated parameters beside the base's, in a line."""
    total, activated, base = (sizes[f"{name}_parameters"] for name in ("moe", "activated", "base"))
    layers = ", ".join(map(str, sizes["expert_layers"]))
    return (
        f"{sizes['experts']} experts in layers {layers} of {sizes['layers']}, {sizes['experts_per_token']} per token, "
        f"{sizes['router']} routers. Parameters: {total:,} in all ({total / base:.2f}x the base's {base:,}), of which "
        f"a token goes through {activated:,} ({activated / base:.2f}x). Weights: {megabytes(sizes['moe_bytes'])}, base "
        f"{megabytes(sizes['base_bytes'])}."
    )


def setup_text(result: dict) -> str:
    """What the numbers depend on, in a line."""
    setup = result["setup"]
    where = setup["gpu"] or f"{setup['processor']}, torch threads: {setup['threads']}"
    rounds = " / ".join(str(batch["rounds"]) for batch in result["batches"].values())
    routers = "as stored" if result["trained"] else "random"
    return (
        f"{setup['dtype']}, {setup['attention']}, {where}; torch {setup['torch']}, transformers "
        f"{setup['transformers']}; prompts of {' / '.join(map(str, result['prompts']))} tokens, {rounds} rounds, "
        f"{result['tokens']} decoding steps; routers {routers}"
    )


def left_out_text(result: dict) -> list[str]:
    """What was not measured, with the reason."""
    return [
        f"{name} at batch {size} is left out: {reason}"
        for size, batch in result["batches"].items()
        for name, reason in batch["left_out"].items()
    ]


def print_result(result: dict, to: Console | None = None) -> None:
    """All of a result."""
    to = to or Console(highlight=False)
    if not to.is_terminal:
        to = Console(file=to.file, highlight=False, width=180)
    to.print(table(f"{result['subject']}: {setup_text(result)}", COLUMNS, rows_of(result), 2))
    to.print(parameters_text(result["sizes"]), *left_out_text(result), sep="\n")


def card_text(result: dict, source: str) -> str:
    """Markdown for a card: the implementations beside the base, and parameters."""
    rows = [
        [size, own["kind"], *(f"{own[part]['ratio']:.2f}x" for part in PARTS)]
        for size, batch in result["batches"].items()
        for own in batch["systems"]
        if own["experts_used"]
    ]
    setup = result["setup"]
    device = setup["gpu"] or f"{setup['processor']}, {setup['threads']} thread(s)"
    about = (
        f"{result['subject']}, {setup['dtype']}, {device}; above 1x is faster than the dense base (`{source}`). "
        f"{parameters_text(result['sizes'])}"
    )
    return f"{markdown_table(SHORT, rows, 2)}\n\n{about}"


__all__ = ["card_text", "print_result"]
