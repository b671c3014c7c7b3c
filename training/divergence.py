"""The recent level of a loss: to notice spikes, and checkpoints that were written after a run has
diverged.

The level is the running mean of the losses and of their absolute deviations from it. Both are
functions of the steps alone, and saved in every checkpoint, so that a resumed run continues them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

DECAY = 0.98  # of the running means, per step
SETTLED = 50  # steps after which the level is used
SPIKE = 10.0  # a loss this many deviations above the mean is a spike
RUINED = 5.0  # a mean this many deviations above that of a better level is ruined
SMALLEST = 0.1  # the least difference from the mean that counts as ruined, as a share of the mean


@dataclass
class LossLevel:
    """The running mean of a loss, and its mean absolute deviation."""

    mean: float = 0.0
    deviation: float = 0.0
    steps: int = 0

    @classmethod
    def read(cls, entry: Any) -> Self | None:
        """The level that a checkpoint stores; None if it stores none, or too few steps."""
        if not isinstance(entry, Mapping) or entry.keys() != {"mean", "deviation", "steps"}:
            return None
        level = cls(**entry)
        return level if level.steps >= SETTLED else None

    def is_spike(self, loss: float) -> bool:
        """Whether a loss is far above this level."""
        return self.steps >= SETTLED and loss > self.mean + SPIKE * self._unit

    def update(self, loss: float) -> None:
        """Include the finite loss of one step; a spike is included as the least spike."""
        if self.is_spike(loss):
            loss = self.mean + SPIKE * self._unit
        keep = min(DECAY, self.steps / (self.steps + 1))
        if self.steps:
            self.deviation = keep * self.deviation + (1 - keep) * abs(loss - self.mean)
        self.mean = keep * self.mean + (1 - keep) * loss
        self.steps += 1

    def is_ruined_beside(self, better: Self) -> bool:
        """Whether this level is far above another one."""
        return self.mean > better.mean + RUINED * better._unit

    @property
    def _unit(self) -> float:
        return max(self.deviation, SMALLEST * abs(self.mean) / RUINED)
