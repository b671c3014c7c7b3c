"""The reverse-time SDE with any diffusion: dx = (v + w score) dt + sqrt(2 w) dW.

For every w(t) >= 0 its marginals are those of the ODE (Song et al., 2011.13456, appendix D; SiT,
2401.08740, eq. 6). w = 0 is the ODE; w = g^2 / 2, "sbdm", is the reverse SDE of score-based
diffusion models, in whose notation v = f - g^2 score / 2 (time reversed).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from smalti.config import nearest
from smalti.errors import SmaltiError
from smalti.prior.flow.path import TINY, GaussianPath
from smalti.prior.flow.prediction import Dynamics
from smalti.prior.flow.solvers.base import StepSolver, times_of
from smalti.randomness import NormalSource

# -------------------------------------------------------------------------------------------------
# Annealed Langevin dynamics for score models (Song and Ermon, 1907.05600, algorithm 1).


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


# -------------------------------------------------------------------------------------------------
# The reverse-time SDE with any diffusion: dx = (v + w score) dt + sqrt(2 w) dW.

Diffusion = Callable[[GaussianPath, Tensor], Tensor]  # path, times (N,) -> w (N,)


def _sbdm(path: GaussianPath, t: Tensor) -> Tensor:
    """alpha' / alpha sigma^2 - sigma sigma'; very large where alpha is 0."""
    return path.determinant(t) * path.sigma(t) / path.alpha(t).clamp_min(TINY)


DIFFUSIONS: dict[str, Diffusion] = {
    "constant": lambda path, t: torch.ones_like(t),
    "sigma": lambda path, t: path.sigma(t),
    "sbdm": _sbdm,
    "linear": lambda path, t: 1 - t,
    "decreasing": lambda path, t: ((1 + torch.cos(math.pi * t)) / 2).square(),
    "increasing-decreasing": lambda path, t: torch.sin(math.pi * t).square(),
}


@dataclass(frozen=True)
class EulerMaruyama(StepSolver):
    """Euler's method for the SDE; the step to where sigma is 0 is the expected data, without
    noise.

    A step that is long for its w leaves too much noise: more than sigma^2 / (1 - r / 2), where
    r = w h / sigma^2 with the sigma that it leads to. Since the marginals are the same for any w,
    a w beyond `largest_ratio` is held there; None takes w as it is.
    """

    diffusion: str = "sigma"  # a name in DIFFUSIONS: w(t)
    strength: float = 1.0  # w is multiplied by it; 0 is the ODE
    largest_ratio: float | None = 0.1  # of w h to sigma^2

    def __post_init__(self) -> None:
        if self.diffusion not in DIFFUSIONS:
            raise SmaltiError(
                f'no diffusion is called "{self.diffusion}"; {nearest(self.diffusion, DIFFUSIONS)}'
            )
        if not (self.strength >= 0 and math.isfinite(self.strength)):
            raise SmaltiError(f"strength is {self.strength}; it must be 0 or more")
        if self.largest_ratio is not None and not 0 < self.largest_ratio < 2:
            raise SmaltiError(
                f"largest_ratio is {self.largest_ratio}; from 2 on no step is stable: use less, or "
                "None to take w as it is"
            )

    def step(
        self, dynamics: Dynamics, x: Tensor, start: float, stop: float, normal: NormalSource
    ) -> Tensor:
        path, h = dynamics.path, stop - start
        if h < 0:
            raise SmaltiError(
                f"times go from {start:.4g} down to {stop:.4g}; use an ODE solver to go back"
            )
        estimate = dynamics.estimate(x, times_of(start, x))
        times = torch.tensor([start, stop], dtype=torch.float64)
        alpha, (sigma, last) = path.alpha(times)[1].item(), path.sigma(times).tolist()
        if last == 0:
            return alpha * estimate.data
        w = self.strength * DIFFUSIONS[self.diffusion](path, times)[0].item()
        if self.largest_ratio is not None and w * h > self.largest_ratio * last**2:
            w = self.largest_ratio * last**2 / h
        # w score = -(w / sigma) noise, which is finite where the score is not
        moved = x + h * estimate.velocity - (h * w / sigma) * estimate.noise
        return moved + math.sqrt(2 * w * h) * normal(x)
