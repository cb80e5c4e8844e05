"""How a card says what is known, whatever kind of model it is of."""

from ..identity_roe import record_name
from .folder import ModelFolder
from .metadata import base_on_page
from .results import Results

UNKNOWN = "not known"
NOT_MEASURED = "not measured"


def base_text(folder: ModelFolder, state: str) -> str:
    """The base, where it is, and what became of its weights."""
    base = folder.base
    if base_id := base_on_page(folder):
        return f"[{base_id}](https://huggingface.co/{base_id}) at commit `{base['revision']}`, {state}"
    if not base.get("id"):
        return f"{UNKNOWN}, {state}"
    mark = f", fingerprint `{base['fingerprint'][:16]}`" if base.get("fingerprint") else ""
    return f"`{record_name(base)}`, no repository on the Hub{mark}; {state}"


def licence_text(licence: str | None, where: str) -> str:
    """The licence and where it is known from."""
    return f"{licence} ({where})" if licence else f"{UNKNOWN}: {where}; ask who made the base"


def plain_table(entries: list[tuple[str, object]], source: str) -> str:
    """Recorded values that fit into a cell, as a table; a sentence where there are none."""
    rows = [(name, f"{one:.6g}" if isinstance(one, float) else one) for name, one in entries if is_plain(one)]
    if not rows:
        return f"How it was trained is {UNKNOWN}: no summary came with the weights."
    lines = [f"As recorded in `{source}`:", "", "| | |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {str(value).replace('|', '/')} |" for name, value in rows)])


def is_plain(value) -> bool:
    """Whether a recorded value fits into a cell."""
    return isinstance(value, str | int | float) and value != ""


def unmeasured(found: Results) -> list[str]:
    """Limits that follow from what nobody has looked at, or from where it was."""
    return [
        *(["Accuracy was not measured: compare it with the base on your own task first."] * (not found.accuracy)),
        *(["Speed was not measured; `roe-llava bench` does that."] * (not found.speed)),
    ]


TIMES_LIMIT = "Times hold for the machine named beside them."

__all__ = ["NOT_MEASURED", "TIMES_LIMIT", "UNKNOWN", "base_text", "licence_text", "plain_table", "unmeasured"]
