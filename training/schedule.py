"""The three stages of RoE training as pure functions of progress, so that resuming cannot restart them.

Progress is the share of the run's optimizer steps done, in [0, 1).
"""

import math
from dataclasses import dataclass

from ..phases_roe import RoutingPhase


@dataclass(frozen=True)
class StageSchedule:
    """RoE's stages (DESIGN and the published code agree on the shares; `last_mode` is ours).

    Attributes:
        target_skip_ratio: r, the share the random warm-up skips, in [0, 0.5].
        warmup_end: end of the random warm-up, in which only adapters train.
        soft_end: end of the soft mixture with a falling keep bias, in which routers and routing tokens train too.
        last_mode: how the last stage routes: `"soft"` as published, `"hard"` to train what inference does.
        temperature_start, temperature_decay, temperature_floor: temperature of the routers, multiplied by the decay
            every `tick` of the run from `warmup_end` on, never below the floor.
        bias_decay: likewise for the keep bias, which starts at 1 - sqrt(2 r) and is 0 from `soft_end` on.
        tick: share of the run between two decays.
        gumbel_end: Gumbel noise is added to hard decisions up to this progress.
    """

    target_skip_ratio: float = 0.3
    warmup_end: float = 0.3
    soft_end: float = 0.5
    last_mode: str = "soft"
    temperature_start: float = 10.0
    temperature_decay: float = 0.95
    temperature_floor: float = 0.0
    bias_decay: float = 0.85
    tick: float = 0.005
    gumbel_end: float = 0.0

    counts_micro_batches = False  # the phase stays for all micro-batches of an optimizer step

    def __post_init__(self):
        if not 0.0 <= self.target_skip_ratio <= 0.5:
            raise ValueError(f"target_skip_ratio must lie in [0, 0.5], got {self.target_skip_ratio}")
        if not 0.0 <= self.warmup_end <= self.soft_end <= 1.0:
            raise ValueError(f"stages must be ordered: warmup_end {self.warmup_end}, soft_end {self.soft_end}")

    def stage(self, progress: float) -> int:
        """0 random warm-up, 1 soft mixture, 2 the rest."""
        return (progress >= self.warmup_end) + (progress >= self.soft_end)

    def phase(self, progress: float) -> RoutingPhase:
        """How routers decide at this progress."""
        bias = random_keep_bias(self.target_skip_ratio)
        stage = self.stage(progress)
        if stage == 0:
            return RoutingPhase("random", keep_bias=bias)
        ticks = int((progress - self.warmup_end) / self.tick)
        temperature = max(self.temperature_start * self.temperature_decay**ticks, self.temperature_floor, 1e-3)
        if stage == 1:
            return RoutingPhase("soft", temperature, bias * self.bias_decay**ticks)
        return RoutingPhase(self.last_mode, temperature, gumbel=self.last_mode == "hard" and progress < self.gumbel_end)

    def trains(self, group: str, progress: float) -> bool:
        """Whether a parameter group learns: adapters always, routers from stage 1, the base in stage 2."""
        first = {"adapter": 0, "router": 1, "routing_tokens": 1, "base": 2}[group]
        return self.stage(progress) >= first


def random_keep_bias(target_skip_ratio: float) -> float:
    """b such that draws skip a share r: for uniform u, P(u_skip > u_keep + b) = (1 - b)**2 / 2."""
    return 1.0 - math.sqrt(2.0 * target_skip_ratio)


__all__ = ["StageSchedule", "random_keep_bias"]
