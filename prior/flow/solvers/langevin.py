"""Annealed Langevin dynamics for score models (Song and Ermon, 1907.05600, algorithm 1)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from smalti.errors import SmaltiError
from smalti.prior.flow.dynamics import Dynamics
from smalti.prior.flow.solvers.base import StepSolver, times_of
from smalti.randomness import NormalSource


@dataclass(frozen=True)
class Langevin(StepSolver):
    """At every next time several steps x + a score + sqrt(2 a) z, with a = step_size sigma^2,
    starting from the samples of the time before; where sigma is 0, the expected data.

    Made for the variance exploding path. The marginals are reached if neighbouring times differ
    little and the steps are many and small; the paper makes 100 steps of size 0.1.
    """

    steps_per_level: int = 10
    step_size: float = 0.1  # a / sigma^2; the variance comes out too large by half of it at most

    def __post_init__(self) -> None:
        if self.steps_per_level < 1 or not 0 < self.step_size < 1:
            raise SmaltiError(
                f"steps_per_level and step_size are {self.steps_per_level} and {self.step_size}; "
                "use at least 1 step, and a size in (0, 1)"
            )

    def step(
        self, dynamics: Dynamics, x: Tensor, start: float, stop: float, normal: NormalSource
    ) -> Tensor:
        time = torch.tensor(stop, dtype=torch.float64)
        alpha, sigma = dynamics.path.alpha(time).item(), dynamics.path.sigma(time).item()
        if sigma == 0:
            return alpha * dynamics.estimate(x, times_of(start, x)).data
        t = times_of(stop, x)
        for _ in range(self.steps_per_level):
            # a score = -step_size sigma noise
            noise = dynamics.estimate(x, t).noise
            kick = math.sqrt(2 * self.step_size) * sigma * normal(x)
            x = x - self.step_size * sigma * noise + kick
        return x
