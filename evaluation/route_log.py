"""Which routes a benchmark's examples took, and how long that was: counted per task, summed over processes.

B batch, L decoder layers.
"""

from collections import Counter
from dataclasses import dataclass, field

from torch import Tensor

SHOWN_ROUTES = 8


@dataclass
class TaskRecord:
    """What was measured of one task, whatever the model decides.

    Attributes:
        seconds: time in `generate`, the device's work included.
        total_seconds: the same with reading, picture processing and decoding to text.
        new_tokens: generated tokens, padding left out.
    """

    seconds: float = 0.0
    total_seconds: float = 0.0
    new_tokens: int = 0

    def merge(self, other: "TaskRecord") -> None:
        """Take in what another process did at the same time: of two times the longer counts."""
        self.new_tokens += other.new_tokens
        self.seconds = max(self.seconds, other.seconds)
        self.total_seconds = max(self.total_seconds, other.total_seconds)

    def times(self) -> dict:
        """For a results file."""
        return {"seconds": self.seconds, "total_seconds": self.total_seconds, "new_tokens": self.new_tokens}


@dataclass
class TaskRoutes(TaskRecord):
    """The routes of one task's examples.

    Attributes:
        routes: how many examples took each route, written "1101": 1 for a layer that ran, layer 0 first.
    """

    routes: Counter = field(default_factory=Counter)

    @property
    def examples(self) -> int:
        return self.routes.total()

    @property
    def skip_ratio(self) -> float:
        """Share of (example, layer) pairs that were skipped, in [0, 1]."""
        pairs = sum(len(route) * number for route, number in self.routes.items())
        skipped = sum(route.count("0") * number for route, number in self.routes.items())
        return skipped / pairs if pairs else 0.0

    def add(self, routes: Tensor) -> None:
        """Count the routes (B, L) of a batch's examples."""
        self.routes.update("".join("1" if keep else "0" for keep in row) for row in routes.tolist())

    def merge(self, other: "TaskRoutes") -> None:
        """Take in what another process did at the same time."""
        super().merge(other)
        self.routes += other.routes

    def told(self) -> str:
        """In a line."""
        return f"{self.skip_ratio:.1%} of layers skipped, {len(self.routes)} routes"

    def summary(self) -> dict:
        """For a results file; shares in [0, 1]."""
        common = self.routes.most_common(SHOWN_ROUTES)
        return {
            "examples": self.examples,
            "skip_ratio": self.skip_ratio,
            "distinct_routes": len(self.routes),
            **self.times(),
            "most_common_routes": [{"route": route, "share": count / self.examples} for route, count in common],
        }


class RouteLog:
    """The record of every task, and the refusal to go on when nothing was skipped that should have been."""

    def __init__(self, may_be_dense: bool, patience: int, record: type[TaskRecord] = TaskRoutes):
        """
        Args:
            may_be_dense: examples that keep every layer are what was asked for.
            patience: after how many examples without a skipped layer to stop; 0 to look at the end only.
            record: what is kept of a task.
        """
        self.tasks: dict[str, TaskRecord] = {}
        self.may_be_dense, self.patience, self.record = may_be_dense, patience, record

    def of(self, task: str) -> TaskRecord:
        """The record of a task."""
        return self.tasks.setdefault(task, self.record())

    def check_so_far(self) -> None:
        """Raises: ValueError if none of `patience` examples or more skipped a layer."""
        if self.patience and sum(one.examples for one in self.tasks.values()) >= self.patience:
            self.check()

    def check(self) -> None:
        """Raises: ValueError if no example at all skipped a layer."""
        examples = sum(one.examples for one in self.tasks.values())
        if self.may_be_dense or not examples or any(one.skip_ratio for one in self.tasks.values()):
            return
        raise ValueError(
            f"every layer was kept in all of {examples} examples: scores and times would be those of a dense model. "
            "Were the routers trained, or is route_bias so high that nothing is skipped? generate(skip_ratio=...) of a "
            "calibrated model skips a wanted share (skip_ratio here). For a dense run ask for one: dense=True "
            "(roe-llava evaluate --dense-only)"
        )

    @classmethod
    def merged(cls, logs: list["RouteLog"]) -> "RouteLog":
        """What several processes logged side by side; the first says what is allowed."""
        whole = cls(logs[0].may_be_dense, logs[0].patience, logs[0].record)
        for log in logs:
            for task, routes in log.tasks.items():
                whole.of(task).merge(routes)
        return whole

    def summary(self) -> dict[str, dict]:
        """The summary of every task's record."""
        return {task: record.summary() for task, record in self.tasks.items()}


__all__ = ["RouteLog", "TaskRecord", "TaskRoutes"]
