"""What routing did since somebody last asked: `model.routing_report()`, and a warning where it never does anything.

Only what the host knows already is counted: the rows of each layer, made when the routes were decided, and lengths. No
device is waited for.

B batch, L decoder layers.
"""

import html
import threading
from collections import Counter
from dataclasses import dataclass, field

import torch
from transformers.utils import logging

from .routing_roe import Routing

logger = logging.get_logger(__name__)

# Keyword of a forward pass without a cache, from `generate`: rows that belong to one prompt (beams), or 0 once it was
# counted, since every step runs all of the text again.
ROWS_PER_PROMPT = "rows_per_prompt"
# Rows that routers have to decide, all for every layer, before that is worth a warning.
ENOUGH_ROWS = 32
# Routes that are told apart, so that a server nobody asks for reports does not grow.
MOST_ROUTES = 65536
SHOWN_ROUTES = 8


@dataclass
class RoutingReport:
    """What routing did between two reports.

    Attributes:
        num_layers: L.
        prompts: that were prefilled; one counts once, whatever the number of its beams or returned sequences.
        rows: that were prefilled, beams counted apart.
        skipped: per layer, how many prompts skipped it.
        routes: "1101..." (1: the layer runs) to the number of prompts that took this route, the most common first.
        other_prompts: how many took a route that is not listed, beyond the first 65536.
        saved_kv_bytes: of keys and values that no cache had to hold, of prompts and of generated tokens, in the dtype
            that is computed in (a quantised cache would have held them smaller).
        baked_layers: that are skipped for every input, of a baked model; `None` for a routed one.
        keeps_everything: whether routers decided for enough rows, all of them for every layer, and nobody had asked for
            that.
    """

    num_layers: int
    prompts: int = 0
    rows: int = 0
    skipped: list[int] = field(default_factory=list)
    routes: dict[str, int] = field(default_factory=dict)
    other_prompts: int = 0
    saved_kv_bytes: int = 0
    baked_layers: list[int] | None = None
    keeps_everything: bool = False

    @property
    def skip_per_layer(self) -> list[float]:
        """L shares of the prompts that skipped a layer; 0 without prompts."""
        return [count / max(self.prompts, 1) for count in self.skipped]

    @property
    def skip_ratio(self) -> float:
        """Realised share of skipped (prompt, layer) pairs; 0 without prompts."""
        return sum(self.skip_per_layer) / self.num_layers

    def __str__(self) -> str:
        if not self.prompts:
            return "routing report: no prompt since the last one"
        width = max(map(len, (label for label, _ in self._lines())))
        return "\n".join(["routing report", *(f"  {label:<{width}}  {text}" for label, text in self._lines())])

    def _repr_html_(self) -> str:
        """As a notebook shows it."""
        if not self.prompts:
            return f"<p>{html.escape(str(self))}</p>"
        lines = "".join(
            f"<tr><th style='text-align:left'>{html.escape(label)}</th>"
            f"<td style='text-align:left;font-family:monospace'>{html.escape(text)}</td></tr>"
            for label, text in self._lines()
        )
        return f"<table><caption>routing report</caption>{lines}</table>"

    def _lines(self) -> list[tuple[str, str]]:
        """Label and text of every line."""
        beams = f" ({self.rows} rows, beams counted apart)" if self.rows != self.prompts else ""
        distinct = f"{len(self.routes)}{' or more' if self.other_prompts else ''}"
        shown = list(self.routes.items())[:SHOWN_ROUTES]
        left = self.prompts - sum(count for _, count in shown)
        lines = [
            ("prompts", f"{self.prompts}{beams}"),
            ("skip ratio", f"{self.skip_ratio:.1%} of {self.num_layers} layers"),
            ("per layer", "  ".join(f"{layer}: {s:.0%}" for layer, s in enumerate(self.skip_per_layer) if s) or "none"),
            ("distinct routes", distinct),
            *(("", f"{route}  {count}") for route, count in shown),
            *[("", f"others  {left}")] * bool(left),
            ("saved KV cache", f"{self.saved_kv_bytes / 1e6:,.2f} MB"),
        ]
        if self.baked_layers is not None:
            lines.append(("note", f"the route is baked: layers {self.baked_layers} are skipped for every input"))
        if self.keeps_everything:
            lines.append(("note", KEEPS_EVERYTHING))
        return lines


KEEPS_EVERYTHING = (
    "the routers keep every layer, so nothing is saved: calibrate and ask for a skip_ratio, lower route_bias, or train "
    "on"
)


class RoutingTally:
    """Counts for one model, from several threads; a copy of a model begins anew."""

    def __init__(self):
        self.lock = threading.Lock()
        self.has_warned, self.token_numbers = False, None
        self.forget_decisions()
        self.clear()

    def __reduce__(self):
        return (type(self), ())  # a lock has no copy

    def forget_decisions(self) -> None:
        """Know nothing of what the routers do, which were trained or replaced."""
        self.unasked_rows, self.ever_skipped = 0, False

    def clear(self) -> None:
        self.prompts = self.rows = self.other_prompts = self.saved_kv_bytes = 0
        self.skipped: list[int] = []
        self.routes: Counter[tuple[bool, ...]] = Counter()

    def add_prefill(self, routes: list[tuple[bool, ...]], repeats: int) -> None:
        """Count rows.

        Args:
            routes: B routes of L bools.
            repeats: rows that belong to one prompt (beams).
        """
        of_prompts = routes[::repeats]
        self.rows += len(routes)
        self.prompts += len(of_prompts)
        self.skipped = self.skipped or [0] * len(routes[0])
        for route, count in Counter(of_prompts).items():
            self.skipped = [total + count * (not keep) for total, keep in zip(self.skipped, route, strict=True)]
            if route in self.routes or len(self.routes) < MOST_ROUTES:
                self.routes[route] += count
            else:
                self.other_prompts += count

    def add_unasked(self, routes: list[tuple[bool, ...]]) -> bool:
        """Count rows that routers decided and nobody asked to keep every layer.

        Returns: whether a warning is due: enough rows, none of which skipped anything. Once.
        """
        self.unasked_rows += len(routes)
        self.ever_skipped |= not all(map(all, routes))
        is_due = self.keeps_everything and not self.has_warned
        self.has_warned |= is_due
        return is_due

    @property
    def keeps_everything(self) -> bool:
        return self.unasked_rows >= ENOUGH_ROWS and not self.ever_skipped


class RoeReportMixin:
    """`routing_report`, and what the forward pass tells it.

    Attributes:
        routing_tally: of the model, made by its `__init__`.
    """

    routing_tally: RoutingTally

    def routing_report(self) -> RoutingReport:
        """What routing did since this was last asked (or the model was made), and begin anew.

        Counted is every prefill: decided by routers, pinned, forced or baked; not the passes of training. Prompts of
        `generate`, its beams and batches, of `group_by_route` and of `forward` are counted alike.
        """
        tally, num_layers = self.routing_tally, self.config.text_config.num_hidden_layers
        with tally.lock:
            routes = {"".join("01"[keep] for keep in route): count for route, count in tally.routes.most_common()}
            report = RoutingReport(
                num_layers=num_layers,
                prompts=tally.prompts,
                rows=tally.rows,
                skipped=tally.skipped or [0] * num_layers,
                routes=routes,
                other_prompts=tally.other_prompts,
                saved_kv_bytes=tally.saved_kv_bytes,
                baked_layers=self.config.skipped_layers,
                keeps_everything=tally.keeps_everything,
            )
            tally.clear()
        return report

    @torch.compiler.disable
    def count_routing(self, routing: Routing, outputs, rows_per_prompt: int = 1) -> None:
        """Count a forward pass: its routes if it decided them, and the keys and values it did not have to store."""
        tally, cache = self.routing_tally, outputs.past_key_values
        if routing.is_soft:
            tally.forget_decisions()
            return
        is_due = False
        with tally.lock:
            if cache is None or not cache.tokens_counted:
                routes = list(zip(*(rows.keep for rows in routing.rows), strict=True))
                tally.add_prefill(routes, rows_per_prompt if cache is None else cache.rows_per_prompt)
                if routing.visible is not None and not asks_to_keep(routing.route_bias):
                    is_due = tally.add_unasked(routes)
            if cache is not None:
                if tally.token_numbers is None:
                    tally.token_numbers = kv_numbers(self.config.text_config)
                tally.saved_kv_bytes += cache.count_saved() * tally.token_numbers * outputs.logits.itemsize
        if is_due:
            name = self.config._name_or_path or "this model"
            logger.warning(
                f"{name}: {tally.unasked_rows} rows were routed and none skipped a layer: {KEEPS_EVERYTHING}"
            )


def kv_numbers(config) -> int:
    """Of a language model: how many numbers the keys and values of one token in one layer are."""
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * (config.num_key_value_heads or config.num_attention_heads) * head_size


def asks_to_keep(route_bias: list) -> bool:
    """Whether a bias may be what keeps layers; one per row, on a device, is not looked at and counts as that."""
    return any(isinstance(bias, torch.Tensor) or bias > 0 for bias in route_bias)


__all__ = ["RoeReportMixin", "RoutingReport", "RoutingTally"]
