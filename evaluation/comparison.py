"""Scores of lmms-eval beside what routing did: rows, and a table of them."""

from .suite import benchmark_of

# Entries of lmms-eval's results that are no scores.
NOT_SCORES = ("alias", "samples", "submission")
ROUTING = "routing"  # where lmms-eval names a filter, in what is put beside its scores
# Of what a task's record says, those of RoE, of experts, and of all; a model has the one or the other.
EXPERTS = ("image_busiest_expert", "text_busiest_expert", "image_text_difference")
BESIDE_SCORES = ("skip_ratio", "distinct_routes", *EXPERTS, "seconds")


def scores_of(task: str, result: dict) -> dict[str, float]:
    """The numbers that a task's result in lmms-eval holds, errors left out; of ours those that count.

    Args:
        result: such as {"exact_match,none": 0.62, "exact_match_stderr,none": 0.01, "alias": "gqa"}.
    """
    found = {}
    for key, value in result.items():
        name, _, kind = key.partition(",")
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if is_number and name not in NOT_SCORES and "_stderr" not in name and kind not in ("", ROUTING):
            found[name if kind == "none" else f"{name} ({kind})"] = float(value)
    known = benchmark_of(task)
    chosen = {name: found[name] for name in known.metrics if name in found} if known else {}
    return chosen or found


def put_beside_scores(results: dict, routing: dict[str, dict]) -> None:
    """What was decided, and seconds, into lmms-eval's own results, task by task, in place."""
    results[ROUTING] = routing
    for task, summary in routing.items():
        found = {name: summary[name] for name in BESIDE_SCORES if summary.get(name) is not None}
        results["results"].setdefault(task, {}).update({f"{name},{ROUTING}": value for name, value in found.items()})


def summarize(results: dict, routing: dict[str, dict]) -> dict[str, dict]:
    """Per task its scores and what routing did, from one run.

    Args:
        results: what lmms-eval returns.
        routing: `RoeLlavaHarness.routing_summary`.
    """
    return {
        task: {"scores": scores_of(task, results["results"].get(task, {})), "routing": of_task}
        for task, of_task in routing.items()
    }


def rows(routed: dict | None, dense: dict | None) -> list[dict]:
    """One row per task and score; of two runs on equally many examples also what differs.

    Args:
        routed, dense: `summarize` of a run each, `None` for one that was not made.
    Raises: ValueError if the runs answered different numbers of examples of a task.
    """
    table = []
    for task in dict.fromkeys([*(routed or {}), *(dense or {})]):
        one, other = (routed or {}).get(task), (dense or {}).get(task)
        if one and other and one["routing"]["examples"] != other["routing"]["examples"]:
            counts = one["routing"]["examples"], other["routing"]["examples"]
            raise ValueError(
                f"{task}: {counts[0]} examples routed and {counts[1]} dense cannot be compared: same --limit?"
            )
        names = dict.fromkeys([*(one["scores"] if one else ()), *(other["scores"] if other else ())])
        table += [row_of(task, name, one, other) for name in names or [None]]
    return table


def row_of(task: str, score: str | None, routed: dict | None, dense: dict | None) -> dict:
    """A row; what a run did not give is `None`."""

    def of(run, *path):
        for key in path:
            run = None if run is None else run.get(key)
        return run

    scores = of(routed, "scores", score), of(dense, "scores", score)
    seconds = of(routed, "routing", "seconds"), of(dense, "routing", "seconds")
    both = None not in scores
    return {
        "task": task,
        "score": score,
        "examples": of(routed or dense, "routing", "examples"),
        "dense": scores[1],
        "routed": scores[0],
        "difference": scores[0] - scores[1] if both else None,
        "skip_ratio": of(routed, "routing", "skip_ratio"),
        "distinct_routes": of(routed, "routing", "distinct_routes"),
        **{name: of(routed, "routing", name) for name in EXPERTS},
        "dense_seconds": seconds[1],
        "routed_seconds": seconds[0],
        "speedup": seconds[1] / seconds[0] if None not in seconds and seconds[0] else None,
    }


COLUMNS = {
    "task": ("task", "{}"),
    "score": ("score", "{}"),
    "examples": ("examples", "{}"),
    "dense": ("dense", "{:.4g}"),
    "routed": ("routed", "{:.4g}"),
    "difference": ("difference", "{:+.4f}"),
    "skip_ratio": ("layers skipped", "{:.1%}"),
    "distinct_routes": ("routes", "{}"),
    "image_busiest_expert": ("busiest expert, image", "{:.1%}"),
    "text_busiest_expert": ("busiest expert, text", "{:.1%}"),
    "image_text_difference": ("image from text", "{:.1%}"),
    "dense_seconds": ("dense s", "{:.1f}"),
    "routed_seconds": ("routed s", "{:.1f}"),
    "speedup": ("speed-up", "{:.2f}x"),
}


def markdown(table: list[dict]) -> str:
    """The rows as a table; columns that no row fills are left out. Seconds are those in `generate`."""
    shown = {name: what for name, what in COLUMNS.items() if any(row[name] is not None for row in table)}
    lines = [[title for title, _ in shown.values()], ["---"] * len(shown)]
    lines += [
        ["" if row[name] is None else pattern.format(row[name]) for name, (_, pattern) in shown.items()]
        for row in table
    ]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def experts_markdown(routing: dict[str, dict]) -> str:
    """Share of image and text tokens through every expert, layer by layer, a table per task; "" without experts.

    Args:
        routing: task to the summary of its record.
    """
    parts = []
    for task, summary in routing.items():
        layers = summary.get("experts") or {}
        if not layers:
            continue
        count = max(len(one) for of_layer in layers.values() for one in of_layer.values() if one is not None)
        names = [f"{kind} {number}" for kind in ("image", "text") for number in range(1, count + 1)]
        lines = [["layer", *names], ["---:"] * (1 + len(names))]
        for layer, of_layer in layers.items():
            shares = [of_layer[kind] or [None] * count for kind in ("image", "text")]
            lines.append([layer, *("" if one is None else f"{one:.0%}" for shown in shares for one in shown)])
        table = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
        counts = f"{summary['image_tokens']:,} image and {summary['text_tokens']:,} text tokens"
        parts.append(f"{task}: share of {counts} that goes through each expert.\n\n{table}")
    return "\n".join(parts)


__all__ = ["experts_markdown", "markdown", "put_beside_scores", "rows", "scores_of", "summarize"]
