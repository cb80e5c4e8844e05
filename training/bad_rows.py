"""Rows of training data that cannot be used: which, why, and how many of each kind."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..convert.output import replace_json

REASONS = {
    "not JSON": "a line of a .jsonl file that cannot be read",
    "wrong type": "a field is missing or has another type than the format says",
    "unknown role": "a message from somebody else than system, human and gpt (system, user and assistant in chats)",
    "roles out of order": "questions and answers do not take turns, or a system message does not come first",
    "no answer": "no answer at all, or none to the last question",
    "empty answer": "an answer without a visible character",
    "image count": "more or fewer image placeholders than images, or one outside of a question",
    "role tag in text": "a text that holds the chat template's own role tag, so that turns could not be told apart",
    "missing image": "an image file that is not there, or an address (nothing is fetched)",
    "broken image": "an image that cannot be decoded, a truncated one included",
    "too long": "more tokens than max_length once every image is written out as its tokens",
    "refused by the processor": "the processor raises an error for the row",
}


class RowError(ValueError):
    """A row that cannot be used.

    Args:
        reason: a key of `REASONS`.
        detail: what was found and what was expected.
        place: where the row stands, if that is known here.
    """

    def __init__(self, reason: str, detail: str, place: str = ""):
        assert reason in REASONS, reason
        super().__init__(f"{place}: {reason}: {detail}" if place else f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def place_text(file: str, index: int, id: str | None) -> str:
    """Where a row stands, for messages; rows are counted from 0."""
    return f"{file}, row {index}" + ("" if id is None else f" (id {id!r})")


@dataclass(frozen=True)
class BadRow:
    """One row that cannot be used.

    Attributes:
        file: the file or dataset that holds it.
        index: its place there, from 0; in a .jsonl file the line's number minus one.
        id: the row's own `id`, if it has one.
        reason: a key of `REASONS`.
        detail: what was found and what was expected.
    """

    file: str
    index: int
    id: str | None
    reason: str
    detail: str

    def __str__(self) -> str:
        return f"{place_text(self.file, self.index, self.id)}: {self.reason}: {self.detail}"


@dataclass
class BadRows:
    """Report on the rows of a source: `len()` is the number of bad ones.

    Attributes:
        total: rows read, good and bad.
        rows: the bad ones, by file and index.
    """

    total: int
    rows: list[BadRow] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def counts(self) -> dict[str, int]:
        """Bad rows by reason, most frequent first."""
        return dict(Counter(row.reason for row in self.rows).most_common())

    def summary(self, examples: int = 3) -> str:
        """Counts by reason, and the first rows of each."""
        lines = [f"{len(self)} of {self.total} rows cannot be used"]
        for reason, count in self.counts.items():
            lines.append(f"  {count} x {reason}")
            lines += [f"    {row}" for row in self.rows if row.reason == reason][:examples]
            lines += ["    ..."] if count > examples else []
        return "\n".join(lines)

    def check(self) -> None:
        """Raises: ValueError naming the first bad row and all counts, if there is one."""
        if self.rows:
            counts = ", ".join(f"{count} x {reason}" for reason, count in self.counts.items())
            raise ValueError(
                f"{self.rows[0]}. {len(self)} of {self.total} rows cannot be used ({counts}). Repair them, or leave "
                "them out with on_bad='skip', which reports every one"
            )

    def save(self, path: str | Path, overwrite: bool = False) -> Path:
        """Write the report as JSON: `rows`, `bad`, `counts` and `bad_rows`, all of them.

        Raises: ValueError if the file exists and is not to be overwritten.
        """
        path = Path(path)
        if path.exists() and not overwrite:
            raise ValueError(f"{path} exists: give another name, or overwrite it (overwrite=True)")
        content = {
            "rows": self.total,
            "bad": len(self),
            "counts": self.counts,
            "bad_rows": [asdict(row) for row in self.rows],
        }
        replace_json(path, content)
        return path


__all__ = ["REASONS", "BadRow", "BadRows", "RowError"]
