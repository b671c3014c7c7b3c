"""Training times, and the weight of the loss at each time.

t = 0 is noise, t = 1 is data. Only the product of the density of the times and the weight of the
loss matters for the objective; the choice affects the variance of its gradient (Kingma and Gao,
2303.00848).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from smalti.errors import ConfigurationError
from smalti.hub import Registry
from smalti.prior.flow.path import GaussianPath
from smalti.prior.flow.prediction import Prediction, derivative_by_data, exact_times

TIMES = Registry(
    "distribution of times",
    {
        "uniform": "smalti.prior.flow.times:UniformTimes",
        "logit-normal": "smalti.prior.flow.times:LogitNormalTimes",
    },
)

# -------------------------------------------------------------------------------------------------
# Distributions of training times (Stable Diffusion 3, 2403.03206, section 3.1)


def shift_times(t: Tensor, shift: float) -> Tensor:
    """Times in [0, 1] moved towards noise for shift > 1: with s = shift, 1 - t becomes
    s (1 - t) / (1 + (s - 1) (1 - t)), which multiplies sigma / alpha of the linear path by s
    (2403.03206, eq. 23)."""
    noise_level = 1 - t
    return 1 - shift * noise_level / (1 + (shift - 1) * noise_level)


def check_shift(shift: float) -> None:
    """Raise `ConfigurationError` unless the shift is positive and finite."""
    if not 0 < shift < float("inf"):
        raise ConfigurationError(
            f"shift is {shift}; it must be positive: 1 is no shift, more shifts towards noise"
        )


@dataclass(frozen=True)
class TrainingTimes(ABC):
    """A distribution of times in [0, 1]."""

    registry: ClassVar[Registry] = TIMES  # a configuration may contain any of these

    @abstractmethod
    def quantile(self, u: Tensor) -> Tensor:
        """Times (B,) in [0, 1] from uniforms u (B,): the inverse cumulative distribution."""


@dataclass(frozen=True)
class UniformTimes(TrainingTimes):
    """All times in [0, 1] are equally likely."""

    shift: float = 1.0  # more than 1 shifts towards noise, which larger latents need
    kind: Literal["uniform"] = "uniform"  # the kind of distribution of training times

    def __post_init__(self) -> None:
        check_shift(self.shift)

    def quantile(self, u: Tensor) -> Tensor:
        return shift_times(u, self.shift)


@dataclass(frozen=True)
class LogitNormalTimes(TrainingTimes):
    """sigmoid(N(mean, std^2)): times in the middle are the most likely (2403.03206, eq. 19)."""

    mean: float = 0.0  # larger is nearer to the data
    std: float = 1.0  # of the logit of t; larger moves more times towards both ends
    shift: float = 1.0  # more than 1 shifts towards noise, which larger latents need
    kind: Literal["logit-normal"] = "logit-normal"  # the kind of distribution of training times

    def __post_init__(self) -> None:
        check_shift(self.shift)
        if not 0 < self.std < float("inf"):
            raise ConfigurationError(f"std is {self.std}; it must be positive and finite")

    def quantile(self, u: Tensor) -> Tensor:
        normal = torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6))  # finite at 0 and 1
        return shift_times(torch.sigmoid(self.mean + self.std * normal), self.shift)


def times_and_noise(latents: Tensor, *, fixed: bool) -> dict[str, Tensor]:
    """Random inputs of a pass over latents (B, C, h, w): "times", uniforms in [0, 1) (B,), of which
    `quantile` makes times, and "noise" like the latents.

    Args:
        fixed: whether they are the same at every call, so that losses can be compared.
    """
    if not fixed:
        times = torch.rand(len(latents), device=latents.device)
        return {"times": times, "noise": torch.randn_like(latents)}
    generator = torch.Generator().manual_seed(0)
    # One uniform in the middle of each of B equal parts of [0, 1], in random order.
    order = torch.randperm(len(latents), generator=generator)
    noise = torch.randn(latents.shape, generator=generator)
    return {"times": ((order + 0.5) / len(latents)).to(latents), "noise": noise.to(latents)}


# -------------------------------------------------------------------------------------------------
# Loss weights. At a fixed x_t predictions are affine functions of each other, so the squared error
# of one is that of another times a squared derivative.

LossWeight = Literal["constant", "velocity", "noise", "data", "score", "min-snr", "likelihood"]
MIN_SNR = 5.0  # gamma of min-SNR weighting (2303.09556)


def _likelihood(path: GaussianPath, t: Tensor) -> Tensor:
    """d SNR / dt / 2, which makes the loss the variational bound (2107.00630, eq. 17)."""
    return path.snr(t) * path.determinant(t) / (path.alpha(t) * path.sigma(t)).clamp_min(1e-12)


# Each is a weight of the squared error of the data.
_DATA_ERROR_WEIGHTS: dict[str, Callable[[GaussianPath, Tensor], Tensor]] = {
    "velocity": lambda path, t: derivative_by_data("velocity", path, t).square(),
    "noise": lambda path, t: derivative_by_data("noise", path, t).square(),
    "data": lambda path, t: torch.ones_like(t),
    "score": lambda path, t: derivative_by_data("score", path, t).square(),
    "min-snr": lambda path, t: path.snr(t).clamp_max(MIN_SNR),  # min(SNR, gamma)
    "likelihood": _likelihood,
}


def loss_weight(name: LossWeight, path: GaussianPath, prediction: Prediction, t: Tensor) -> Tensor:
    """The factor of the squared error of a prediction at times t (B,): (B,) fp32.

    "constant" is 1. "velocity", "noise", "data" and "score" give the squared error of that
    quantity, whatever the network predicts: "noise" is the loss of DDPM (2006.11239, eq. 14).
    "min-snr" is the squared error of the data times min(SNR, 5), "likelihood" that error times half
    the derivative of SNR.
    """
    if name in ("constant", prediction):
        return torch.ones_like(t, dtype=torch.float32)
    t = exact_times(t)
    weight = _DATA_ERROR_WEIGHTS[name](path, t)
    return (weight / derivative_by_data(prediction, path, t).square()).float()
