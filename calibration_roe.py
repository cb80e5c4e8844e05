"""From a wanted skip ratio to a route bias: the table that `roe-llava calibrate` stores with the routing parts.

Skipping a layer changes what later routers read, so which bias skips how much is measured by running the model, and
holds for the routers it was measured with. `SkipCalibration` is the table; `calibrated_bias` is what `generate` asks.

L decoder layers, D hidden, N entries of a table.
"""

import hashlib
import math
from dataclasses import asdict, dataclass, fields
from itertools import pairwise

import torch
from torch import nn
from transformers.utils import logging

from .baked_roe import refuse_baked

logger = logging.get_logger(__name__)

HOW_TO = "make one with roe-llava calibrate CHECKPOINT DATA (training.calibration.calibrate in Python)"


@dataclass(frozen=True)
class SkipCalibration:
    """What was measured, as plain JSON values: `skip_calibration` of a config and of an adapter file.

    Attributes:
        skip_ratio: N wanted shares of skipped (example, layer) pairs, rising, in (0, 1].
        route_bias: N biases that give them, never rising.
        realised: N shares that these biases skipped on the questions the table was made from.
        held_out: N shares on the questions that were held out; `None` if there were too few to hold some out.
        layer_scale: L factors of the bias, layer by layer; 0 for layers that are not shifted.
        gaps: pairs of shares between which no bias lies, since all decisions change at once.
        questions, held_out_questions: how many there were.
        routers: `router_fingerprint` of the model it was measured on.
    """

    skip_ratio: list[float]
    route_bias: list[float]
    realised: list[float]
    held_out: list[float] | None
    layer_scale: list[float]
    gaps: list[list[float]]
    questions: int
    held_out_questions: int
    routers: str

    @classmethod
    def of_dict(cls, content, num_layers: int) -> "SkipCalibration":
        """Read and check what a file says.

        Args:
            content: `skip_calibration` of a config.
            num_layers: L.
        Raises: ValueError naming the entry that is missing or cannot be.
        """
        if not isinstance(content, dict):
            raise ValueError(f"skip_calibration is a {type(content).__name__}, expected an object or null. {REMEDY}")
        names = [one.name for one in fields(cls)]
        if missing := [name for name in names if name not in content]:
            raise ValueError(f"skip_calibration lacks {', '.join(missing)}. {REMEDY}")
        for name, (is_right, expected) in ENTRIES.items():
            if not is_right(content[name]):
                raise ValueError(f"skip_calibration.{name} is {content[name]!r:.80}, expected {expected}. {REMEDY}")
        table = cls(**{name: content[name] for name in names})
        table.check_columns(num_layers)
        return table

    def check_columns(self, num_layers: int) -> None:
        """Raises: ValueError if columns differ in length, or are not in order."""
        columns = {name: getattr(self, name) for name in ("skip_ratio", "route_bias", "realised", "held_out")}
        lengths = {name: len(column) for name, column in columns.items() if column is not None}
        if len(set(lengths.values())) > 1 or not self.skip_ratio:
            raise ValueError(f"skip_calibration has columns of {lengths} entries, expected as many in each. {REMEDY}")
        if not rises(self.skip_ratio):
            raise ValueError(f"skip_calibration.skip_ratio is {self.skip_ratio}, expected rising shares. {REMEDY}")
        if any(after > before for before, after in pairwise(self.route_bias)):
            raise ValueError(
                f"skip_calibration.route_bias is {self.route_bias}, expected biases that never rise: more is skipped "
                f"with a smaller one. {REMEDY}"
            )
        if len(self.layer_scale) != num_layers:
            raise ValueError(
                f"skip_calibration.layer_scale has {len(self.layer_scale)} factors, the model {num_layers} layers. "
                f"{REMEDY}"
            )

    def to_dict(self) -> dict:
        """As a config holds it."""
        return asdict(self)

    def bias_for(self, skip_ratio: float) -> float:
        """Bias for a wanted skip ratio, on straight lines between the entries.

        Raises: ValueError outside of the table's range, and in its gaps.
        """
        lowest, highest = self.skip_ratio[0], self.skip_ratio[-1]
        if not lowest <= skip_ratio <= highest:
            raise ValueError(
                f"skip_ratio={skip_ratio} is outside of what this model is calibrated for, [{lowest}, {highest}] and "
                "0.0 (every layer kept). roe-llava calibrate --ratios makes a table of another range"
            )
        for low, high in self.gaps:
            if low < skip_ratio < high:
                raise ValueError(
                    f"skip_ratio={skip_ratio} cannot be had: no bias of these routers skips a share between {low} and "
                    f"{high}, where all decisions change at once. Ask for one of these two"
                )
        after = next(index for index, ratio in enumerate(self.skip_ratio) if ratio >= skip_ratio)
        if self.skip_ratio[after] == skip_ratio:
            return self.route_bias[after]
        share = (skip_ratio - self.skip_ratio[after - 1]) / (self.skip_ratio[after] - self.skip_ratio[after - 1])
        return (1 - share) * self.route_bias[after - 1] + share * self.route_bias[after]

    def biases_for(self, skip_ratio: float) -> list[float]:
        """The same layer by layer, as `route_bias=` takes it: L numbers."""
        bias = self.bias_for(skip_ratio)
        return [bias * scale for scale in self.layer_scale]


def rises(numbers: list) -> bool:
    """Whether every number is larger than the one before it."""
    return all(before < after for before, after in pairwise(numbers))


def is_number(value) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def are_numbers(value) -> bool:
    return isinstance(value, list) and all(map(is_number, value))


def are_shares(value) -> bool:
    return are_numbers(value) and all(0 <= share <= 1 for share in value)


def are_gaps(value) -> bool:
    return isinstance(value, list) and all(are_shares(gap) and len(gap) == 2 and rises(gap) for gap in value)


def is_count(value) -> bool:
    return type(value) is int and value >= 0


# Entries to what they have to be; what they have to be together is checked afterwards.
ENTRIES = {
    "skip_ratio": (lambda value: are_shares(value) and all(value), "a list of shares in (0, 1]"),
    "route_bias": (are_numbers, "a list of finite numbers"),
    "realised": (are_shares, "a list of shares in [0, 1]"),
    "held_out": (lambda value: value is None or are_shares(value), "null or a list of shares in [0, 1]"),
    "layer_scale": (
        lambda value: are_numbers(value) and any(value) and min(value) >= 0,
        "a list of numbers from 0 on, not all 0",
    ),
    "gaps": (are_gaps, "a list of pairs of rising shares"),
    "questions": (is_count, "a count"),
    "held_out_questions": (is_count, "a count"),
    "routers": (lambda value: isinstance(value, str) and len(value) == 64, "a SHA-256 in hex"),
}
REMEDY = "Was the file changed by hand? Take the entry out and " + HOW_TO


def router_fingerprint(model) -> str | None:
    """SHA-256 of what decides: routers and routing tokens (as float32, which they compute in), and how they read.

    Returns: `None` where their values are not in memory (offloaded or sharded).
    """
    reads = f"{model.config.routing_positions} {model.config.routing_question}"
    own_bias = model.config.route_bias  # left out where there is none, as tables have it that are older than it
    digest = hashlib.sha256(f"{reads}{'' if own_bias is None else f' {own_bias}'}\n".encode())
    for name, parameter in deciding_parameters(model):
        if type(parameter) is not nn.Parameter or parameter.is_meta or hasattr(parameter, "ds_id"):
            return None
        values = parameter.detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name} {list(values.shape)}\n".encode() + values.numpy().tobytes())
    return digest.hexdigest()


def deciding_parameters(model):
    """(name, parameter) of the routing tokens and of every router, in order."""
    language_model = model.model.language_model
    yield "routing_tokens", language_model.routing_tokens.weight
    for index, layer in enumerate(language_model.layers):
        if layer.router is not None:
            yield f"layers.{index}.router", layer.router.weight


def calibrated_bias(model, skip_ratio: float) -> list[float]:
    """What `generate(skip_ratio=...)` asks: L biases for a ratio above 0.

    Raises: ValueError if the model has no table, a damaged one, one made with other routers, or none for this ratio.
    """
    refuse_baked(model.config.skipped_layers, "no bias changes its skip ratio", model.config._name_or_path)
    content, num_layers = getattr(model.config, "skip_calibration", None), model.config.text_config.num_hidden_layers
    if content is None:
        raise ValueError(
            f"skip_ratio={skip_ratio} needs a calibrated model, and this one holds no calibration: {HOW_TO}. Or give "
            "route_bias (> 0 keeps more layers), or skip_ratio=0.0 to keep every layer"
        )
    table = SkipCalibration.of_dict(content, num_layers)
    check_routers(model, table)
    return table.biases_for(skip_ratio)


def check_routers(model, table: SkipCalibration) -> None:
    """Check that a table was made with these routers: once, and again when they or the table were changed.

    Raises: ValueError if it was not.
    """
    # The counter of a tensor's changes goes up with every step of an optimizer.
    parameters = [parameter for _, parameter in deciding_parameters(model)]
    state = [(id(one), None if one.is_inference() else one._version) for one in parameters]
    config = model.config
    asked = (table.routers, config.routing_positions, config.routing_question, config.route_bias, state)
    if getattr(model, "_routers_calibrated", None) == asked:
        return
    found = router_fingerprint(model)
    if found is None:
        logger.warning_once("routers are offloaded or sharded: it is not checked that skip_calibration is theirs")
    elif found != table.routers:
        kinds = {one.dtype for one in parameters} - {torch.float32}
        rounded = (
            f" They are in {kinds.pop()}: routers stay exact with from_pretrained(dtype=...), not with .to()."
            if kinds
            else ""
        )
        raise ValueError(
            f"skip_calibration was made with routers of fingerprint {table.routers[:16]}, this model's have "
            f"{found[:16]}: they were trained or replaced since, or routing_positions, routing_question or "
            f"route_bias was changed."
            f"{rounded} Calibrate again: {HOW_TO}"
        )
    model._routers_calibrated = asked


__all__ = ["SkipCalibration", "calibrated_bias", "router_fingerprint"]
