"""Stochastic solvers: Euler-Maruyama for the SDE with any diffusion, and annealed Langevin
dynamics.

Time runs from 0, noise, to 1, data, so the SDE solved here is the reverse-time SDE of score-based
diffusion models.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from smalti.config import nearest
from smalti.errors import GenerationError
from smalti.prior.flow.path import TINY, GaussianPath
from smalti.prior.flow.prediction import Dynamics
from smalti.prior.flow.solvers.base import StepSolver, shared_time
from smalti.randomness import NormalSource

# -------------------------------------------------------------------------------------------------
# dx = (v + w score) dt + sqrt(2 w) dW (SiT, 2401.08740, eq. 6; Song et al., 2011.13456, appendix D)
#
# For every w(t) >= 0 its marginals are those of the ODE dx = v dt. w = g^2 / 2, "sbdm", is the
# reverse SDE of score-based diffusion models (2011.13456, eq. 6), whose v = f - g^2 score / 2 with
# time reversed.

Diffusion = Callable[[GaussianPath, Tensor], Tensor]  # path, times (N,) -> w (N,)

DIFFUSIONS: dict[str, Diffusion] = {
    "constant": lambda path, t: torch.ones_like(t),
    "sigma": lambda path, t: path.sigma(t),
    # alpha' / alpha sigma^2 - sigma sigma' = g^2 / 2; large but finite where alpha is 0
    "sbdm": lambda path, t: path.determinant(t) * path.sigma(t) / path.alpha(t).clamp_min(TINY),
    "linear": lambda path, t: 1 - t,
    "decreasing": lambda path, t: ((1 + torch.cos(math.pi * t)) / 2).square(),
    "increasing-decreasing": lambda path, t: torch.sin(math.pi * t).square(),
}


@dataclass(frozen=True)
class EulerMaruyama(StepSolver):
    """Euler's method for the SDE; a step to sigma = 0 returns the expected data, without noise.

    A step h that is too long for its w adds too much noise: the variance becomes sigma^2 /
    (1 - r / 2) or more, where r = w h / sigma^2 with sigma at the end of the step. As the marginals
    do not depend on w, it is limited so that r <= `largest_ratio`; None sets no limit.
    """

    diffusion: str = "sigma"  # a name in DIFFUSIONS: w(t)
    strength: float = 1.0  # factor of w; 0 is the ODE
    largest_ratio: float | None = 0.1  # largest r = w h / sigma^2

    def __post_init__(self) -> None:
        if self.diffusion not in DIFFUSIONS:
            raise GenerationError(
                f'no diffusion is called "{self.diffusion}"; {nearest(self.diffusion, DIFFUSIONS)}'
            )
        if not (self.strength >= 0 and math.isfinite(self.strength)):
            raise GenerationError(f"strength is {self.strength}; it must be finite, 0 or more")
        if self.largest_ratio is not None and not 0 < self.largest_ratio < 2:
            raise GenerationError(
                f"largest_ratio is {self.largest_ratio}; it must lie in (0, 2), because no step is "
                "stable from 2 on; None sets no limit"
            )

    def step(
        self, dynamics: Dynamics, x: Tensor, start: float, stop: float, normal: NormalSource
    ) -> Tensor:
        path, h = dynamics.path, stop - start
        if h < 0:
            raise GenerationError(
                f"times go from {start:.4g} down to {stop:.4g}; use an ODE solver to go to noise"
            )
        estimate = dynamics.estimate(x, shared_time(start))
        times = torch.tensor([start, stop], dtype=torch.float64)
        alpha_stop = path.alpha(times)[1].item()
        sigma_start, sigma_stop = path.sigma(times).tolist()
        if sigma_stop == 0:
            return alpha_stop * estimate.data
        w = self.strength * DIFFUSIONS[self.diffusion](path, times)[0].item()
        if self.largest_ratio is not None and w * h > self.largest_ratio * sigma_stop**2:
            w = self.largest_ratio * sigma_stop**2 / h
        # w score = -(w / sigma) noise, which is finite where the score is not
        mean = x + h * estimate.velocity - (h * w / sigma_start) * estimate.noise
        return mean + math.sqrt(2 * w * h) * normal(x)


# -------------------------------------------------------------------------------------------------
# Annealed Langevin dynamics (NCSN, Song and Ermon, 1907.05600, algorithm 1)


@dataclass(frozen=True)
class Langevin(StepSolver):
    """At every new time, several steps x + a score + sqrt(2 a) z, with a = step_size sigma^2, that
    start from the samples of the previous time. Where sigma is 0, the result is the expected data.

    For the variance exploding path. The samples have the marginals p_t if neighbouring times differ
    little and the steps are many and small; the paper makes 100 steps of size 0.1 per noise level.
    """

    steps_per_level: int = 10  # Langevin steps at each time
    step_size: float = 0.1  # a / sigma^2; the relative error of the variance is half of it

    def __post_init__(self) -> None:
        if self.steps_per_level < 1 or not 0 < self.step_size < 1:
            raise GenerationError(
                f"steps_per_level and step_size are {self.steps_per_level} and {self.step_size}; "
                "use at least 1 step, and a size in (0, 1)"
            )

    def step(
        self, dynamics: Dynamics, x: Tensor, start: float, stop: float, normal: NormalSource
    ) -> Tensor:
        time = torch.tensor(stop, dtype=torch.float64)
        alpha, sigma = dynamics.path.alpha(time).item(), dynamics.path.sigma(time).item()
        if sigma == 0:
            return alpha * dynamics.estimate(x, shared_time(start)).data
        t = shared_time(stop)
        for _ in range(self.steps_per_level):
            # a score = -step_size sigma noise, which is finite where the score is not
            noise = dynamics.estimate(x, t).noise
            added = math.sqrt(2 * self.step_size) * sigma * normal(x)
            x = x - self.step_size * sigma * noise + added
        return x
