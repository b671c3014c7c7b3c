"""Exact steps between the marginals of two times, on any path: DDPM's ancestral sampling and DDIM.

With data and noise as the network expects them at time t, x at a later time s is Gaussian: the
coefficients are those of `transition`.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from smalti.errors import SmaltiError
from smalti.prior.flow.path import Transition, log_variance, transition
from smalti.prior.flow.prediction import Dynamics
from smalti.prior.flow.solvers.base import StepSolver, times_of
from smalti.randomness import NormalSource

Variance = Literal["auto", "small", "large", "learned"]


@dataclass(frozen=True)
class DDIM(StepSolver):
    """x_s = alpha_s data + sqrt(sigma_s^2 - c^2) noise + c z with c^2 = eta^2 beta~ (2010.02502,
    eq. 12 and 16). eta = 0 is deterministic, eta = 1 is DDPM with the small variance."""

    eta: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise SmaltiError(f"eta is {self.eta}; it must lie in [0, 1]")

    def step(
        self, dynamics: Dynamics, x: Tensor, start: float, stop: float, normal: NormalSource
    ) -> Tensor:
        to = transition(dynamics.path, start, stop)
        estimate = dynamics.estimate(x, times_of(start, x))
        variance = self.eta**2 * to.small
        kept = math.sqrt(max(to.sigma**2 - variance, 0.0))
        moved = to.alpha * estimate.data + kept * estimate.noise
        return moved + math.sqrt(variance) * normal(x) if variance > 0 else moved


@dataclass(frozen=True)
class DDPM(StepSolver):
    """Ancestral sampling: x_s ~ N(mean of q(x_s | x_t, data), variance), and no noise where sigma_s
    is 0.

    The variance is "small", beta~, exact for data that are one point; "large", beta, exact for
    Gaussian data (2006.11239, section 3.2); or "learned", between both on a log scale as the
    surplus channels of the network say (2102.09672, eq. 15): what published DiT weights have.
    "auto" is learned where the network has such channels, as DiT's own sampler, and else small.
    """

    variance: Variance = "auto"

    def __post_init__(self) -> None:
        if self.variance not in get_args(Variance):
            raise SmaltiError(
                f'variance is "{self.variance}"; choose one of {", ".join(get_args(Variance))}'
            )

    def check(self, predicts_variance: bool) -> None:
        if self.variance == "learned" and not predicts_variance:
            raise SmaltiError('this network predicts no variance: use variance "small" or "large"')

    def step(
        self, dynamics: Dynamics, x: Tensor, start: float, stop: float, normal: NormalSource
    ) -> Tensor:
        to = transition(dynamics.path, start, stop)
        estimate = dynamics.estimate(x, times_of(start, x))
        # The mean of the posterior, in terms of data and noise: DDIM's with eta = 1.
        mean = to.alpha * estimate.data + to.kept * estimate.noise
        if to.sigma == 0 or to.large == 0:
            return mean
        return mean + self._std(to, estimate.surplus, x) * normal(x)

    def _std(self, to: Transition[float], surplus: Tensor, x: Tensor) -> Tensor | float:
        if self.variance in ("small", "large"):
            return math.sqrt(to.small if self.variance == "small" else to.large)
        if self.variance == "auto" and surplus.shape != x.shape:
            return math.sqrt(to.small)
        self.check(surplus.shape == x.shape)
        return (0.5 * log_variance(surplus, math.log(to.small), math.log(to.large))).exp()
