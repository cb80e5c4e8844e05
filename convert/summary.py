"""What a command did to the tensors of a checkpoint, as numbers and as text."""

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Summary:
    """What a command did, or would do.

    Attributes:
        out: the folder.
        written: `False` after a dry run.
        kept, kept_bytes: tensors that came over byte for byte; `kept_what` says which those are.
        renamed: old name to new name, of tensors that came over under another name (they count as kept too).
        added, added_bytes: tensors that were put beside them; `added_what` says which those are.
        dropped: what was left behind, name to reason.
        fingerprint: of the base; `None` where there is none.
        lines: label to text, whatever else is worth a line.
    """

    out: Path
    written: bool
    kept: int = 0
    kept_bytes: int = 0
    kept_what: str = "tensors of the base"
    renamed: dict[str, str] = field(default_factory=dict)
    added: int = 0
    added_bytes: int = 0
    added_what: str = "routing tensors"
    dropped: dict[str, str] = field(default_factory=dict)
    fingerprint: str | None = None
    lines: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        rows = [("kept", f"{self.kept} {self.kept_what}, {self.kept_bytes / 1e6:,.1f} MB, byte for byte")]
        if self.renamed:
            rows += [("renamed", str(len(self.renamed)))]
            rows += [("", f"{old} -> {new}") for old, new in list(self.renamed.items())[:2]]
            rows += [("", "...")] * (len(self.renamed) > 2)
        rows += [("added", f"{self.added} {self.added_what}, {self.added_bytes / 1e6:,.1f} MB")] * bool(self.added)
        rows += [("dropped", str(len(self.dropped)))]
        rows += [("", f"{name}: {reason}") for name, reason in grouped(self.dropped).items()]
        rows += [("base", self.fingerprint)] if self.fingerprint else []
        rows += self.lines.items()
        head = f"{'wrote' if self.written else 'dry run, nothing written to'} {self.out}"
        return "\n".join([head, *(f"  {label:<8} {text}" for label, text in rows)])


def grouped(dropped: dict[str, str]) -> dict[str, str]:
    """Names that differ in numbers alone, and have one reason, as one: "model.layers.*.inv_freq (32)"."""
    patterns = {name: re.sub(r"\d+", "*", name) for name in dropped}
    counts = Counter((patterns[name], reason) for name, reason in dropped.items())
    return {
        name if counts[patterns[name], reason] == 1 else f"{patterns[name]} ({counts[patterns[name], reason]})": reason
        for name, reason in dropped.items()
    }
