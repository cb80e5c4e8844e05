"""What the runs of `compare` come to: means over seeds, and what the papers claim beside what was found."""

from collections.abc import Callable, Sequence
from math import sqrt
from statistics import mean, stdev

from .compare_speed import TOKENS, fastest
from .compare_systems import METHODS
from .quality_report import mean_by_key, over_seeds

LEAST_POINTS = 1.0  # of accuracy: less is noise of questions and seeds
EXPERT_NUMBERS = ("weights", "moved", "outputs", "apart", "differ", "undecided")


def summarise(runs: Sequence[dict], speed: dict) -> dict:
    """`methods`: a row per method; `claims`: see `claims`."""
    by_method: dict[str, list[dict]] = {}
    for run in runs:
        by_method.setdefault(run["method"], []).append(run)
    rows = [row_of(method, same) for method, same in by_method.items()]
    return {"methods": rows, "claims": claims(by_method, speed)}


def row_of(method: str, same: Sequence[dict]) -> dict:
    """Means over a method's seeds."""
    row = {"method": method, "seeds": [one["seed"] for one in same], "learned": same[0]["learned"]}
    row |= {name: over_seeds([one[name] for one in same]) for name in ("accuracy", "skip_ratio", "cpu_minutes")}
    for name in ("accuracy_by_family", "parameters", "flops"):
        row[name] = mean_by_key([one[name] for one in same])
    if "experts" in same[0]:
        row["experts"] = {name: over_seeds([mean_layer(one, name) for one in same]) for name in EXPERT_NUMBERS}
        scores = [one["experts"]["accuracy"] for one in same]
        row["experts"]["rotation_costs"] = over_seeds([one["routed"] - one["rotated"] for one in scores])
        row["experts"]["single"] = [mean(column) for column in zip(*(one["single"] for one in scores), strict=True)]
        row["experts"]["routed"] = mean(one["routed"] for one in scores)
    return row


def mean_layer(run: dict, name: str) -> float:
    return mean(layer[name] for layer in run["experts"]["layers"])


def differences(by_method: dict[str, list[dict]], a: str, b: str, number: Callable[[dict], float]) -> list[float]:
    """number(a) - number(b), seed by seed."""
    second = {run["seed"]: number(run) for run in by_method.get(b, [])}
    return [number(run) - second[run["seed"]] for run in by_method.get(a, []) if run["seed"] in second]


def verdict(values: Sequence[float], claimed_sign: int = 1, least: float = 0.0) -> str:
    """Whether differences have the claimed sign: "yes", "no", or "not told apart".

    Args:
        least: a mean that is not larger is not told from 0, as one within two standard errors.
    """
    if len(values) < 2:
        return "one seed"
    error = stdev(values) / sqrt(len(values))
    if abs(mean(values)) <= max(2 * error, least):
        return "not told apart"
    return "yes" if mean(values) * claimed_sign > 0 else "no"


def accuracy(run: dict) -> float:
    return 100 * run["accuracy"]


def answer_ratio(rows: Sequence[dict], method: str, other: str) -> float:
    """Time of another system over a method's, of a prompt and `TOKENS` decoded tokens."""
    pair = [fastest(rows, name) for name in (other, method)]
    times = [one["prefill"]["seconds"] + TOKENS * one["decode"]["seconds"] for one in pair]
    return times[0] / times[1]


def claims(by_method: dict[str, list[dict]], speed: dict) -> list[dict]:
    """Dicts of `claim`, `paper`, `here` (text) and `same`, whether the direction is the paper's."""
    found: list[dict] = []

    def points(a: str, b: str, claim: str, paper: str) -> None:
        values = differences(by_method, a, b, accuracy)
        if values:
            same = verdict(values, least=LEAST_POINTS)
            found.append({"claim": claim, "paper": paper, "here": spread(values, "points"), "same": same})

    def of_experts(a: str, b: str, name: str, sign: int, claim: str, paper: str) -> None:
        values = differences(by_method, a, b, lambda run: mean_layer(run, name))
        if values:
            here = spread(values, "", digits=3)
            found.append({"claim": claim, "paper": paper, "here": here, "same": verdict(values, sign)})

    points("roe", "moe_llava", "RoE answers better than MoE-LLaVA", "+3.3 % on average")
    ratio = answer_ratio(speed["batches"]["1"], "roe", "moe_llava")
    found.append(
        {
            "claim": "RoE is faster than MoE-LLaVA",
            "paper": "1.61x (abstract), 1.37x (samples/s in its text)",
            "here": f"{ratio:.2f}x for a question and {TOKENS} tokens, batch 1",
            "same": "yes" if ratio > 1 else "no",
        }
    )
    points("evomoe", "moe_llava", "EvoMoE answers better than MoE-LLaVA", "+0.9 to +1.4 on average")
    points("moe_llava", "dense_mlps", "experts answer better than the same MLPs dense", "small models yes, at 7B no")
    points("roe", "static", "RoE answers better than layers dropped for all", "no such row; a bare router loses")
    rotation = [
        100 * (run["experts"]["accuracy"]["routed"] - run["experts"]["accuracy"]["rotated"])
        for run in by_method.get("moe_llava", [])
    ]
    if rotation:
        found.append(
            {
                "claim": "MoE-LLaVA's experts are uniform: sending tokens to other experts hardly matters",
                "paper": "EvoMoE: routers shuffled, at most 0.3 points",
                "here": spread(rotation, "points lost"),
                "same": "yes" if abs(mean(rotation)) <= LEAST_POINTS else "no",
            }
        )
    of_experts("evomoe", "moe_llava", "outputs", -1, "evolved experts give less alike outputs", "what evolution is for")
    of_experts("evomoe", "moe_llava", "apart", 1, "a token-aware router parts image from text more", "what it is for")
    return found


def spread(values: Sequence[float], unit: str, digits: int = 1) -> str:
    """Differences as text: mean ± standard deviation."""
    text = f"{mean(values):+.{digits}f}"
    if len(values) > 1:
        text += f" ± {stdev(values):.{digits}f}"
    return f"{text} {unit}".strip()


def shown_methods(rows: Sequence[dict]) -> list[dict]:
    """Rows of what is compared, in the order of `METHODS`, then controls."""
    main = [row for name in METHODS for row in rows if row["method"] == name]
    return main + [row for row in rows if row["method"] not in METHODS]


__all__ = ["claims", "shown_methods", "summarise"]
