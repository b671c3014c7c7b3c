"""Paths from noise to data, x_t = alpha(t) x_1 + sigma(t) x_0 with x_0 ~ N(0, I), and the exact
Gaussian transitions between two times of a path.

Time t runs from 0, noise, to 1, data. DDPM, DDIM and the score SDE count the other way: their index
k or time 1 - t grows from data to noise.

A path is a small configuration, identified by its `kind`, that gives alpha, sigma and their
derivatives in closed form (flow matching, Lipman et al., 2210.02747; stochastic interpolants,
Albergo et al., 2303.08797). Times are tensors of any shape; coefficients have the shape and the
type of the times. Where a derivative is infinite (at t = 1 of a variance preserving path), a large
finite value is returned. To add a path, write one class and one line in `PATHS`. The
conversions between velocity, noise, score and data on a path are in prediction.py.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Generic, Literal, TypeVar

import torch
from torch import Tensor

from smalti.config import check_at_least
from smalti.errors import ConfigurationError, GenerationError
from smalti.hub import Registry

PATHS = Registry(
    "path",
    {
        "linear": "smalti.prior.flow.path:LinearPath",
        "trigonometric": "smalti.prior.flow.path:TrigonometricPath",
        "vp-linear": "smalti.prior.flow.path:VPLinearPath",
        "vp-cosine": "smalti.prior.flow.path:VPCosinePath",
        "ddpm": "smalti.prior.flow.path:DDPMPath",
        "ve": "smalti.prior.flow.path:VEPath",
    },
)
TINY = 1e-12  # smallest magnitude of a denominator

# -------------------------------------------------------------------------------------------------
# Gaussian paths: p_t(x | x_1) = N(alpha(t) x_1, sigma(t)^2 I) (2210.02747, eq. 10)


@dataclass(frozen=True)
class GaussianPath(ABC):
    """The coefficients of data and noise in x_t, and what follows from them."""

    registry: ClassVar[Registry] = PATHS  # a configuration may contain any of these paths
    velocity_diverges: ClassVar[bool] = False  # whether sigma' is infinite at t = 1

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Coefficient of the data x_1."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Coefficient of the noise x_0, 0 or more."""

    @abstractmethod
    def d_alpha(self, t: Tensor) -> Tensor:
        """d alpha / dt."""

    @abstractmethod
    def d_sigma(self, t: Tensor) -> Tensor:
        """d sigma / dt, finite everywhere."""

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio alpha^2 / sigma^2; large but finite where sigma is 0."""
        return (self.alpha(t) / self.sigma(t).clamp_min(TINY)).square()

    def log_snr(self, t: Tensor) -> Tensor:
        """log(alpha^2 / sigma^2), finite everywhere."""
        return 2 * (self.alpha(t).clamp_min(TINY).log() - self.sigma(t).clamp_min(TINY).log())

    def determinant(self, t: Tensor) -> Tensor:
        """alpha' sigma - alpha sigma' > 0, the determinant of the two equations that give data and
        noise from x_t and the velocity; alpha sigma / 2 times the derivative of log SNR."""
        return self.d_alpha(t) * self.sigma(t) - self.alpha(t) * self.d_sigma(t)

    def marginal_std(self, t: Tensor) -> Tensor:
        """Standard deviation of x_t for data of unit variance, which latents have."""
        return (self.alpha(t).square() + self.sigma(t).square()).sqrt()

    def input_scale(self, t: Tensor) -> Tensor:
        """Factor of x_t before it enters the network: 1, except on variance exploding paths."""
        return torch.ones_like(t)

    def mix(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t from data and noise (B, ...) at times t (B,)."""
        return expand_like(self.alpha(t), data) * data + expand_like(self.sigma(t), noise) * noise


def expand_like(coefficients: Tensor, like: Tensor) -> Tensor:
    """Coefficients (B,) as (B, 1, ..., 1) of the rank and type of `like` (B, ...); one for all
    samples, (1,), as a scalar, which may stay on the CPU."""
    cast = coefficients.to(like.dtype)
    return cast.view(()) if cast.numel() == 1 else cast.view(-1, *[1] * (like.ndim - 1))


@dataclass(frozen=True)
class LinearPath(GaussianPath):
    """alpha = t, sigma = 1 - (1 - sigma_min) t: straight lines, the optimal transport path of flow
    matching (2210.02747, eq. 20); with sigma_min = 0 rectified flow (2209.03003, eq. 1)."""

    sigma_min: float = 0.0  # noise left at t = 1
    kind: Literal["linear"] = "linear"  # the kind of path from noise to data

    def __post_init__(self) -> None:
        if not 0 <= self.sigma_min < 1:
            raise ConfigurationError(f"sigma_min is {self.sigma_min}; it must lie in [0, 1)")

    def alpha(self, t: Tensor) -> Tensor:
        return t

    def sigma(self, t: Tensor) -> Tensor:
        return (1 - t) + self.sigma_min * t

    def d_alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return torch.full_like(t, self.sigma_min - 1)


# -------------------------------------------------------------------------------------------------
# Variance preserving paths: alpha^2 + sigma^2 = 1


@dataclass(frozen=True)
class TrigonometricPath(GaussianPath):
    """alpha = sin(pi t / 2), sigma = cos(pi t / 2): the generalised variance preserving (GVP) path
    of SiT (2401.08740), the cosine schedule without its offset."""

    kind: Literal["trigonometric"] = "trigonometric"  # the kind of path from noise to data

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sin(math.pi / 2 * t)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(math.pi / 2 * (1 - t))  # exactly 0 at t = 1, unlike cos(pi / 2)

    def d_alpha(self, t: Tensor) -> Tensor:
        return math.pi / 2 * self.sigma(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return -math.pi / 2 * self.alpha(t)


class VariancePreservingPath(GaussianPath):
    """A path that defines alpha; sigma' = -alpha alpha' / sigma follows from alpha^2 + sigma^2 = 1
    and is infinite at t = 1."""

    velocity_diverges = True

    def d_sigma(self, t: Tensor) -> Tensor:
        return -self.alpha(t) * self.d_alpha(t) / self.sigma(t).clamp_min(TINY)


@dataclass(frozen=True)
class VPLinearPath(VariancePreservingPath):
    """The variance preserving SDE with linear beta (Song et al., 2011.13456, eq. 32 and 33)."""

    beta_min: float = 0.1  # beta at the data, t = 1
    beta_max: float = 20.0  # beta at the noise, t = 0
    kind: Literal["vp-linear"] = "vp-linear"  # the kind of path from noise to data

    def __post_init__(self) -> None:
        if not 0 < self.beta_min <= self.beta_max:
            raise ConfigurationError(
                f"beta_min and beta_max are {self.beta_min} and {self.beta_max}; "
                "use 0 < beta_min <= beta_max"
            )

    def _log_alpha(self, t: Tensor) -> Tensor:
        rest = 1 - t  # the time of the SDE
        return -rest.square() * (self.beta_max - self.beta_min) / 4 - rest * self.beta_min / 2

    def alpha(self, t: Tensor) -> Tensor:
        return self._log_alpha(t).exp()

    def sigma(self, t: Tensor) -> Tensor:
        # sqrt(1 - alpha^2); expm1 loses no digits near the data, where alpha is almost 1.
        return (-torch.expm1(2 * self._log_alpha(t))).clamp_min(0).sqrt()

    def d_alpha(self, t: Tensor) -> Tensor:
        beta = self.beta_min + (1 - t) * (self.beta_max - self.beta_min)
        return self.alpha(t) * beta / 2


@dataclass(frozen=True)
class VPCosinePath(VariancePreservingPath):
    """The cosine schedule of improved DDPM (2102.09672, eq. 17) without its limit on beta:
    alpha = cos(A) / cos(B) with A = pi/2 (1 - t + s) / (1 + s), and B the value of A at t = 1."""

    offset: float = 0.008  # s of the cosine schedule
    kind: Literal["vp-cosine"] = "vp-cosine"  # the kind of path from noise to data

    def __post_init__(self) -> None:
        if not 0 < self.offset < 1:
            raise ConfigurationError(
                f"offset is {self.offset}; it must lie in (0, 1); for 0 use the trigonometric path"
            )

    @property
    def _rate(self) -> float:
        return math.pi / 2 / (1 + self.offset)

    def alpha(self, t: Tensor) -> Tensor:
        # cos(A) = sin(pi/2 - A), which is exactly 0 at t = 0.
        return torch.sin(self._rate * t) / math.cos(self._rate * self.offset)

    def sigma(self, t: Tensor) -> Tensor:
        # cos^2 B - cos^2 A = sin(A - B) sin(A + B) avoids a difference of nearly equal numbers.
        rest = 1 - t
        product = torch.sin(self._rate * rest) * torch.sin(self._rate * (rest + 2 * self.offset))
        return product.clamp_min(0).sqrt() / math.cos(self._rate * self.offset)

    def d_alpha(self, t: Tensor) -> Tensor:
        return self._rate * torch.cos(self._rate * t) / math.cos(self._rate * self.offset)


@dataclass(frozen=True)
class DDPMPath(VariancePreservingPath):
    """The discrete chain of DDPM: alpha^2 = prod_{j <= k} (1 - beta_j) (2006.11239, eq. 4).

    Index k of the chain, from T - 1 (noise) down to 0 (the last step before the data), has the time
    t = 1 - (k + 1) / T; the data, alpha = 1, have t = 1. Between these times log alpha is linear.
    """

    num_train_timesteps: int = 1000  # steps of the noise schedule, T
    # linear: DDPM and DiT; scaled-linear: Stable Diffusion, linear in sqrt(beta); cosine: improved
    # DDPM, which ignores beta_start and beta_end and limits beta to 0.999
    beta_schedule: Literal["linear", "scaled-linear", "cosine"] = "linear"
    beta_start: float = 1e-4  # beta of the first step from the data, index 0
    beta_end: float = 0.02  # beta of the last step, index T - 1
    kind: Literal["ddpm"] = "ddpm"  # the kind of path from noise to data

    def __post_init__(self) -> None:
        check_at_least(1, self, "num_train_timesteps")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ConfigurationError(
                f"beta_start and beta_end are {self.beta_start} and {self.beta_end}; "
                "use 0 < beta_start <= beta_end < 1"
            )

    @cached_property
    def betas(self) -> Tensor:
        """Variances beta_k of the steps of the chain, (T,) float64."""
        steps = self.num_train_timesteps
        ramp = torch.arange(steps + 1, dtype=torch.float64, device="cpu")
        share = ramp[:-1] / max(steps - 1, 1)  # from 0 to 1
        if self.beta_schedule == "linear":
            return self.beta_start + share * (self.beta_end - self.beta_start)
        if self.beta_schedule == "scaled-linear":
            first, last = math.sqrt(self.beta_start), math.sqrt(self.beta_end)
            return (first + share * (last - first)).square()
        # 2102.09672, eq. 17; alphas_bar is the squared alpha, (T + 1,).
        alphas_bar = torch.cos((ramp / steps + 0.008) / 1.008 * math.pi / 2).square()
        return (1 - alphas_bar[1:] / alphas_bar[:-1]).clamp_max(0.999)

    @cached_property
    def _log_alphas(self) -> Tensor:
        """log alpha at the data and then at k = 0, 1, ..., T - 1: (T + 1,) float64."""
        steps = torch.log1p(-self.betas).cumsum(0) / 2
        return torch.cat([torch.zeros_like(steps[:1]), steps])

    def time_of_index(self, index: Tensor) -> Tensor:
        """Times of the indices k of the chain; -1 is the data."""
        return 1 - (index + 1) / self.num_train_timesteps

    def _segment(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """log alpha at t and its derivative, by linear interpolation."""
        table = self._log_alphas.to(t)
        position = self.num_train_timesteps * (1 - t)  # k + 1 at the times of the chain
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


# -------------------------------------------------------------------------------------------------
# Variance exploding paths: alpha = 1


@dataclass(frozen=True)
class VEPath(GaussianPath):
    """alpha = 1, sigma = sigma_max^(1 - t) sigma_min^t: noise levels in a geometric sequence
    (NCSN, 1907.05600; variance exploding SDE, 2011.13456, eq. 30 and 31)."""

    sigma_min: float = 0.01  # noise left at t = 1
    sigma_max: float = 50.0  # at t = 0: as large as the largest distance between two data points
    kind: Literal["ve"] = "ve"  # the kind of path from noise to data

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise ConfigurationError(
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


# -------------------------------------------------------------------------------------------------
# Exact Gaussian transitions from a time t to a later time s (Kingma et al., 2107.00630, appendix A)
#
# With r = alpha_t / alpha_s:
#
#     q(x_t | x_s)      = N(r x_s, beta),  beta = sigma_t^2 - r^2 sigma_s^2
#     q(x_s | x_t, x_1) = N(alpha_s x_1 + sqrt(sigma_s^2 - beta_tilde) x_0, beta_tilde),
#                         beta_tilde = beta sigma_s^2 / sigma_t^2
#
# On the discrete chain these are beta and beta_tilde of DDPM (2006.11239, eq. 7).

Number = TypeVar("Number", float, Tensor)


@dataclass(frozen=True)
class Transition(Generic[Number]):
    """The coefficients of a step from t to s > t: floats of one step, or tensors of many."""

    alpha: Number  # alpha_s
    sigma: Number  # sigma_s
    beta: Number  # variance of q(x_t | x_s)
    beta_tilde: Number  # variance of q(x_s | x_t, x_1)
    noise_weight: Number  # sqrt(sigma_s^2 - beta_tilde), of x_0 in the mean of q(x_s | x_t, x_1)


def transitions(path: GaussianPath, t: Tensor, s: Tensor) -> Transition[Tensor]:
    """The transitions from times t to times s, float64 of any shape."""
    sigma_t, sigma = path.sigma(t), path.sigma(s)
    # sigma_t^2 (1 - SNR_t / SNR_s): expm1 loses no digits where the two ratios are almost equal.
    beta = -sigma_t.square() * torch.expm1(path.log_snr(t) - path.log_snr(s))
    beta_tilde = beta * sigma.square() / sigma_t.square()
    noise_weight = (sigma.square() - beta_tilde).clamp_min(0).sqrt()
    return Transition(path.alpha(s), sigma, beta, beta_tilde, noise_weight)


def transition(path: GaussianPath, start: float, stop: float) -> Transition[float]:
    """One transition, computed on the CPU whatever the device of the samples.

    Raises:
        GenerationError: stop < start; a transition only goes towards the data.
    """
    if stop < start:
        raise GenerationError(
            f"times go from {start:.4g} down to {stop:.4g}; use an ODE solver to go to noise"
        )
    to = transitions(path, *torch.tensor([start, stop], dtype=torch.float64))
    return Transition(*(value.item() for value in vars(to).values()))


def interpolated_log_variance(
    v: Tensor, log_beta_tilde: Tensor | float, log_beta: Tensor | float
) -> Tensor:
    """log variance of a step from the variance output v of the network: linear between
    log beta_tilde at v = -1 and log beta at v = 1 (improved DDPM, 2102.09672, eq. 15)."""
    share = (v + 1) / 2
    return share * log_beta + (1 - share) * log_beta_tilde
