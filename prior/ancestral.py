"""Exact steps between the marginals of two times: DDPM's ancestral sampling and DDIM.

With data and noise as the network expects them at time t, x at a later time s is Gaussian. Written
for any path (Kingma et al., 2107.00630, appendix A), where r = alpha_t / alpha_s:

    q(x_t | x_s) = N(r x_s, beta),  beta = sigma_t^2 - r^2 sigma_s^2
    q(x_s | x_t, x_1) has variance  beta~ = beta sigma_s^2 / sigma_t^2

On the discrete chain these are DDPM's beta and beta~ (2006.11239, eq. 7).
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from smalti.errors import SmaltiError
from smalti.prior.dynamics import Dynamics
from smalti.prior.normal import NormalSource
from smalti.prior.paths import GaussianPath
from smalti.prior.solvers import StepSolver, times_of

Variance = Literal["auto", "small", "large", "learned"]


@dataclass(frozen=True)
class Transition:
    """The coefficients of a step from t = start to s = stop > start."""

    alpha: float  # at s
    sigma: float  # at s
    large: float  # beta
    small: float  # beta~


def transition(path: GaussianPath, start: float, stop: float) -> Transition:
    """Computed in float64 on the CPU, whatever the samples are.

    Raises:
        SmaltiError: the times descend: these samplers only go towards data.
    """
    if stop < start:
        raise SmaltiError(
            f"times go from {start:.4g} down to {stop:.4g}; use an ODE solver to go back"
        )
    times = torch.tensor([start, stop], dtype=torch.float64)
    alpha, (sigma_t, sigma) = path.alpha(times)[1].item(), path.sigma(times).tolist()
    # sigma_t^2 (1 - SNR_t / SNR_s), which loses no digits where both are near 1.
    gain = (path.log_snr(times)[0] - path.log_snr(times)[1]).item()
    large = -(sigma_t**2) * math.expm1(gain)
    return Transition(alpha, sigma, large, large * sigma**2 / sigma_t**2)


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
        kept = math.sqrt(max(to.sigma**2 - to.small, 0.0))
        mean = to.alpha * estimate.data + kept * estimate.noise
        if to.sigma == 0 or to.large == 0:
            return mean
        return mean + self._std(to, estimate.surplus, x) * normal(x)

    def _std(self, to: Transition, surplus: Tensor, x: Tensor) -> Tensor | float:
        if self.variance in ("small", "large"):
            return math.sqrt(to.small if self.variance == "small" else to.large)
        if self.variance == "auto" and surplus.shape != x.shape:
            return math.sqrt(to.small)
        self.check(surplus.shape == x.shape)
        share = (surplus + 1) / 2
        log_small, log_large = math.log(to.small), math.log(to.large)
        return (0.5 * (share * log_large + (1 - share) * log_small)).exp()
