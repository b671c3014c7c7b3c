"""DDPM's ancestral sampling and DDIM: exact Gaussian transitions between two times, on any path.

Given the data and the noise that the network expects at time t, x_s at a later time s is Gaussian,
with the coefficients of `transition`. Time runs from 0, noise, to 1, data: s > t is the smaller
index of DDPM's chain.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from smalti.errors import GenerationError
from smalti.prior.flow.path import Transition, interpolated_log_variance, transition
from smalti.prior.flow.prediction import Dynamics
from smalti.prior.flow.solvers.base import StepSolver, shared_time
from smalti.randomness import NormalSource

Variance = Literal["auto", "small", "large", "learned"]


@dataclass(frozen=True)
class DDIM(StepSolver):
    """x_s = alpha_s data + sqrt(sigma_s^2 - c^2) noise + c z with c^2 = eta^2 beta_tilde
    (2010.02502, eq. 12 and 16). eta = 0 is deterministic; eta = 1 is DDPM with beta_tilde."""

    eta: float = 0.0  # in [0, 1]: factor of the standard deviation of the noise

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise GenerationError(f"eta is {self.eta}; it must lie in [0, 1]")

    def step(
        self, dynamics: Dynamics, x: Tensor, start: float, stop: float, normal: NormalSource
    ) -> Tensor:
        to = transition(dynamics.path, start, stop)
        estimate = dynamics.estimate(x, shared_time(start))
        variance = self.eta**2 * to.beta_tilde
        noise_weight = math.sqrt(max(to.sigma**2 - variance, 0.0))  # not below 0 by rounding
        mean = to.alpha * estimate.data + noise_weight * estimate.noise
        return mean + math.sqrt(variance) * normal(x) if variance > 0 else mean


@dataclass(frozen=True)
class DDPM(StepSolver):
    """Ancestral sampling (2006.11239, algorithm 2): x_s ~ N(mean of q(x_s | x_t, data), variance),
    without noise where sigma_s is 0.

    The variance is one of
        small    beta_tilde, exact for data that are a single point (section 3.2);
        large    beta, exact for Gaussian data of unit variance (section 3.2);
        learned  between the two on a log scale, as the network predicts (improved DDPM, 2102.09672,
                 eq. 15); published DiT weights have these channels;
        auto     learned where the network has such channels, as in DiT's sampler, else small.
    """

    variance: Variance = "auto"  # auto, small, large or learned, see above

    def __post_init__(self) -> None:
        if self.variance not in get_args(Variance):
            raise GenerationError(
                f'variance is "{self.variance}"; choose one of {", ".join(get_args(Variance))}'
            )

    def check(self, predicts_variance: bool) -> None:
        if self.variance == "learned" and not predicts_variance:
            raise GenerationError(
                'this network predicts no variance: use variance "small" or "large"'
            )

    def step(
        self, dynamics: Dynamics, x: Tensor, start: float, stop: float, normal: NormalSource
    ) -> Tensor:
        to = transition(dynamics.path, start, stop)
        estimate = dynamics.estimate(x, shared_time(start))
        # The posterior mean in terms of data and noise, equal to DDIM's with eta = 1.
        mean = to.alpha * estimate.data + to.noise_weight * estimate.noise
        if to.sigma == 0 or to.beta == 0:
            return mean
        return mean + self._std(to, estimate.variance_output, x) * normal(x)

    def _std(self, to: Transition[float], v: Tensor, x: Tensor) -> Tensor | float:
        """Standard deviation of the step; v is the variance output of the network."""
        if self.variance == "large":
            return math.sqrt(to.beta)
        if self.variance == "small" or (self.variance == "auto" and v.shape != x.shape):
            return math.sqrt(to.beta_tilde)
        self.check(v.shape == x.shape)
        return (
            0.5 * interpolated_log_variance(v, math.log(to.beta_tilde), math.log(to.beta))
        ).exp()
