"""Paths from noise to data: x_t = alpha(t) x_1 + sigma(t) x_0, with x_0 ~ N(0, I).

Time runs from noise, t = 0, to data, t = 1. Every path is a small configuration, told apart by
`kind`, that knows alpha, sigma and their derivatives in closed form (Lipman et al., 2210.02747;
Albergo et al., 2303.08797). Times are tensors of any shape; coefficients have the same shape and
type. Where a derivative is infinite, at t = 1 of a variance preserving path, it is large instead.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, Literal, TypeVar

import torch
from torch import Tensor

from smalti.config import check_at_least
from smalti.errors import SmaltiError

# -------------------------------------------------------------------------------------------------
# Paths from noise to data: x_t = alpha(t) x_1 + sigma(t) x_0, with x_0 ~ N(0, I).

TINY = 1e-12  # what a vanishing denominator is held at


class GaussianPath(ABC):
    """p_t(x | x_1) = N(alpha(t) x_1, sigma(t)^2 I)."""

    velocity_diverges: bool = False  # whether sigma' is infinite at t = 1

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Share of the data."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Standard deviation of the noise, 0 or more."""

    @abstractmethod
    def d_alpha(self, t: Tensor) -> Tensor:
        """Derivative of alpha."""

    @abstractmethod
    def d_sigma(self, t: Tensor) -> Tensor:
        """Derivative of sigma, finite everywhere."""

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio alpha^2 / sigma^2; very large where sigma is 0."""
        return (self.alpha(t) / self.sigma(t).clamp_min(TINY)).square()

    def log_snr(self, t: Tensor) -> Tensor:
        """log(alpha^2 / sigma^2), finite everywhere."""
        return 2 * (self.alpha(t).clamp_min(TINY).log() - self.sigma(t).clamp_min(TINY).log())

    def determinant(self, t: Tensor) -> Tensor:
        """alpha' sigma - alpha sigma', positive: half the growth of log SNR times alpha sigma."""
        return self.d_alpha(t) * self.sigma(t) - self.alpha(t) * self.d_sigma(t)

    def marginal_std(self, t: Tensor) -> Tensor:
        """Of x_t, if the data have unit variance, as latents have."""
        return (self.alpha(t).square() + self.sigma(t).square()).sqrt()

    def input_scale(self, t: Tensor) -> Tensor:
        """What a network's input is multiplied with: 1, except where x_t grows without bound."""
        return torch.ones_like(t)

    def mix(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t of data and noise (B, ...) at times (B,)."""
        return expand_like(self.alpha(t), data) * data + expand_like(self.sigma(t), noise) * noise


def expand_like(coefficients: Tensor, like: Tensor) -> Tensor:
    """Coefficients (B,) as (B, 1, ...), to be multiplied with a tensor (B, ...), in its type."""
    return coefficients.to(like.dtype).view(-1, *[1] * (like.ndim - 1))


@dataclass(frozen=True)
class LinearPath(GaussianPath):
    """alpha = t, sigma = 1 - (1 - sigma_min) t: flow matching with straight conditional paths,
    optimal transport in Lipman et al. (2210.02747, eq. 20); rectified flow with sigma_min = 0."""

    sigma_min: float = 0.0  # noise left at t = 1
    kind: Literal["linear"] = "linear"

    def __post_init__(self) -> None:
        if not 0 <= self.sigma_min < 1:
            raise SmaltiError(f"sigma_min is {self.sigma_min}; it must lie in [0, 1)")

    def alpha(self, t: Tensor) -> Tensor:
        return t

    def sigma(self, t: Tensor) -> Tensor:
        return (1 - t) + self.sigma_min * t

    def d_alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return torch.full_like(t, self.sigma_min - 1)


@dataclass(frozen=True)
class TrigonometricPath(GaussianPath):
    """alpha = sin(pi t / 2), sigma = cos(pi t / 2): the generalised variance preserving path of
    SiT (2401.08740), which is the cosine schedule without its offset."""

    kind: Literal["trigonometric"] = "trigonometric"

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sin(math.pi / 2 * t)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(math.pi / 2 * (1 - t))  # exactly 0 at t = 1, which the cosine is not

    def d_alpha(self, t: Tensor) -> Tensor:
        return math.pi / 2 * self.sigma(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return -math.pi / 2 * self.alpha(t)


class VariancePreservingPath(GaussianPath):
    """alpha^2 + sigma^2 = 1, so sigma' = -alpha alpha' / sigma."""

    velocity_diverges = True

    def d_sigma(self, t: Tensor) -> Tensor:
        return -self.alpha(t) * self.d_alpha(t) / self.sigma(t).clamp_min(TINY)


@dataclass(frozen=True)
class VPLinearPath(VariancePreservingPath):
    """The variance preserving SDE with linear beta (Song et al., 2011.13456, eq. 32 and 33)."""

    beta_min: float = 0.1  # rate of noising at the data
    beta_max: float = 20.0  # and at the noise
    kind: Literal["vp-linear"] = "vp-linear"

    def __post_init__(self) -> None:
        if not 0 < self.beta_min <= self.beta_max:
            raise SmaltiError(
                f"beta_min and beta_max are {self.beta_min} and {self.beta_max}; "
                "use 0 < beta_min <= beta_max"
            )

    def _log_alpha(self, t: Tensor) -> Tensor:
        rest = 1 - t
        return -rest.square() * (self.beta_max - self.beta_min) / 4 - rest * self.beta_min / 2

    def alpha(self, t: Tensor) -> Tensor:
        return self._log_alpha(t).exp()

    def sigma(self, t: Tensor) -> Tensor:
        return (-torch.expm1(2 * self._log_alpha(t))).clamp_min(0).sqrt()

    def d_alpha(self, t: Tensor) -> Tensor:
        beta = self.beta_min + (1 - t) * (self.beta_max - self.beta_min)
        return self.alpha(t) * beta / 2


@dataclass(frozen=True)
class VPCosinePath(VariancePreservingPath):
    """alpha = cos(A) / cos(B) with A = pi/2 (1 - t + s) / (1 + s) and B its value at t = 1:
    Nichol and Dhariwal's schedule (2102.09672, eq. 17) without the cap on beta."""

    offset: float = 0.008  # s
    kind: Literal["vp-cosine"] = "vp-cosine"

    def __post_init__(self) -> None:
        if not 0 < self.offset < 1:
            raise SmaltiError(
                f"offset is {self.offset}; it must lie in (0, 1): 0 is the trigonometric path"
            )

    @property
    def _rate(self) -> float:
        return math.pi / 2 / (1 + self.offset)

    def alpha(self, t: Tensor) -> Tensor:
        # cos(A) = sin(pi/2 - A), which is exactly 0 at t = 0.
        return torch.sin(self._rate * t) / math.cos(self._rate * self.offset)

    def sigma(self, t: Tensor) -> Tensor:
        rest = 1 - t  # cos^2 B - cos^2 A = sin(A - B) sin(A + B), without cancellation
        product = torch.sin(self._rate * rest) * torch.sin(self._rate * (rest + 2 * self.offset))
        return product.clamp_min(0).sqrt() / math.cos(self._rate * self.offset)

    def d_alpha(self, t: Tensor) -> Tensor:
        return self._rate * torch.cos(self._rate * t) / math.cos(self._rate * self.offset)


@dataclass(frozen=True)
class DDPMPath(VariancePreservingPath):
    """The discrete chain of DDPM (2006.11239): alpha^2 = prod_{j <= k} (1 - beta_j).

    Index k of the chain, T - 1 for noise to 0 for almost data, stands at t = 1 - (k + 1) / T; data
    themselves, alpha = 1, at t = 1. Between these times log alpha is linear.
    """

    num_train_timesteps: int = 1000  # T
    # linear: DDPM and DiT; scaled-linear: Stable Diffusion, linear in sqrt(beta); cosine: improved
    # DDPM, which takes no beta_start and beta_end and caps beta at 0.999
    beta_schedule: Literal["linear", "scaled-linear", "cosine"] = "linear"
    beta_start: float = 1e-4
    beta_end: float = 0.02
    kind: Literal["ddpm"] = "ddpm"

    def __post_init__(self) -> None:
        check_at_least(1, self, "num_train_timesteps")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise SmaltiError(
                f"beta_start and beta_end are {self.beta_start} and {self.beta_end}; "
                "use 0 < beta_start <= beta_end < 1"
            )

    @cached_property
    def betas(self) -> Tensor:
        """Variances of the chain's steps, (T,) float64."""
        steps = self.num_train_timesteps
        ramp = torch.arange(steps + 1, dtype=torch.float64, device="cpu")
        share = ramp[:-1] / max(steps - 1, 1)  # from 0 to 1
        if self.beta_schedule == "linear":
            return self.beta_start + share * (self.beta_end - self.beta_start)
        if self.beta_schedule == "scaled-linear":
            first, last = math.sqrt(self.beta_start), math.sqrt(self.beta_end)
            return (first + share * (last - first)).square()
        abar = torch.cos((ramp / steps + 0.008) / 1.008 * math.pi / 2).square()
        return (1 - abar[1:] / abar[:-1]).clamp_max(0.999)

    @cached_property
    def _log_alphas(self) -> Tensor:
        """log alpha at data and then at k = 0, 1, ..., T - 1: (T + 1,) float64."""
        steps = torch.log1p(-self.betas).cumsum(0) / 2
        return torch.cat([torch.zeros_like(steps[:1]), steps])

    def time_of_index(self, index: Tensor) -> Tensor:
        """t of indices k of the chain; -1 is the data."""
        return 1 - (index + 1) / self.num_train_timesteps

    def _segment(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """log alpha, and its derivative, at t."""
        table = self._log_alphas.to(t)
        position = self.num_train_timesteps * (1 - t)
        before = position.floor().clamp(0, self.num_train_timesteps - 1).long()
        slope = table[before + 1] - table[before]
        return table[before] + (position - before) * slope, -self.num_train_timesteps * slope

    def alpha(self, t: Tensor) -> Tensor:
        return self._segment(t)[0].exp()

    def sigma(self, t: Tensor) -> Tensor:
        return (-torch.expm1(2 * self._segment(t)[0])).clamp_min(0).sqrt()

    def d_alpha(self, t: Tensor) -> Tensor:
        log_alpha, slope = self._segment(t)
        return log_alpha.exp() * slope


@dataclass(frozen=True)
class VEPath(GaussianPath):
    """alpha = 1, sigma falls geometrically: variance exploding (NCSN, 1907.05600; 2011.13456)."""

    sigma_min: float = 0.01  # noise left at t = 1
    sigma_max: float = 50.0  # at t = 0: as large as data lie apart
    kind: Literal["ve"] = "ve"

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise SmaltiError(
                f"sigma_min and sigma_max are {self.sigma_min} and {self.sigma_max}; "
                "use 0 < sigma_min < sigma_max"
            )

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_max * (t * math.log(self.sigma_min / self.sigma_max)).exp()

    def d_alpha(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return self.sigma(t) * math.log(self.sigma_min / self.sigma_max)

    def input_scale(self, t: Tensor) -> Tensor:
        return 1 / self.marginal_std(t)


PathConfig = LinearPath | TrigonometricPath | VPLinearPath | VPCosinePath | DDPMPath | VEPath


# -------------------------------------------------------------------------------------------------
# The exact Gaussian steps between two times of a path (Kingma et al., 2107.00630, appendix A).
#
# From t to a later time s, with r = alpha_t / alpha_s:
#
#     q(x_t | x_s) = N(r x_s, beta),  beta = sigma_t^2 - r^2 sigma_s^2
#     q(x_s | x_t, x_1) = N(alpha_s x_1 + sqrt(sigma_s^2 - beta~) x_0, beta~),
#         beta~ = beta sigma_s^2 / sigma_t^2
#
# On the discrete chain these are DDPM's beta and beta~ (2006.11239, eq. 7).

Number = TypeVar("Number", float, Tensor)


@dataclass(frozen=True)
class Transition(Generic[Number]):
    """The coefficients of a step from t to s > t, or of many."""

    alpha: Number  # at s
    sigma: Number  # at s
    large: Number  # beta
    small: Number  # beta~
    kept: Number  # what the posterior mean keeps of the noise: sqrt(sigma_s^2 - beta~)


def transitions(path: GaussianPath, t: Tensor, s: Tensor) -> Transition[Tensor]:
    """Of steps from t to s, float64 of any shape."""
    sigma_t, sigma = path.sigma(t), path.sigma(s)
    # sigma_t^2 (1 - SNR_t / SNR_s), which loses no digits where both are near 1.
    large = -sigma_t.square() * torch.expm1(path.log_snr(t) - path.log_snr(s))
    small = large * sigma.square() / sigma_t.square()
    kept = (sigma.square() - small).clamp_min(0).sqrt()
    return Transition(path.alpha(s), sigma, large, small, kept)


def transition(path: GaussianPath, start: float, stop: float) -> Transition[float]:
    """Of one step, computed on the CPU, wherever the samples are.

    Raises:
        SmaltiError: the times descend: these steps only go towards data.
    """
    if stop < start:
        raise SmaltiError(
            f"times go from {start:.4g} down to {stop:.4g}; use an ODE solver to go back"
        )
    to = transitions(path, *torch.tensor([start, stop], dtype=torch.float64))
    return Transition(
        to.alpha.item(), to.sigma.item(), to.large.item(), to.small.item(), to.kept.item()
    )


def log_variance(surplus: Tensor, log_small: Tensor | float, log_large: Tensor | float) -> Tensor:
    """Of a step whose variance lies between beta~ and beta, on a log scale, where the network says:
    at beta~ for -1, at beta for 1 (2102.09672, eq. 15)."""
    share = (surplus + 1) / 2
    return share * log_large + (1 - share) * log_small
