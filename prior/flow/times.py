"""Training times, and what an error at a time counts.

t = 0 is noise, t = 1 is data. A distribution of times and a weight of the loss say the same thing
in two ways: their product is what counts (Kingma and Gao, 2303.00848).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from smalti.errors import SmaltiError
from smalti.prior.flow.path import GaussianPath
from smalti.prior.flow.prediction import Prediction, exact_times, per_data


def shift_times(t: Tensor, shift: float) -> Tensor:
    """Move times in [0, 1] towards noise by a factor > 1: 1 - t becomes
    s (1 - t) / (1 + (s - 1) (1 - t)), which multiplies sigma / alpha of the linear path by s
    (Stable Diffusion 3, 2403.03206, eq. 23)."""
    noise = 1 - t
    return 1 - shift * noise / (1 + (shift - 1) * noise)


def check_shift(shift: float) -> None:
    """Raise `SmaltiError` unless the shift is positive and finite."""
    if not 0 < shift < float("inf"):
        raise SmaltiError(f"shift is {shift}; it must be positive: 1 is none, more is more noise")


@dataclass(frozen=True)
class UniformTimes:
    """Every time is as likely."""

    shift: float = 1.0  # towards noise: larger latents need more
    kind: Literal["uniform"] = "uniform"

    def __post_init__(self) -> None:
        check_shift(self.shift)

    def quantile(self, u: Tensor) -> Tensor:
        """The times (B,) in [0, 1] below which the shares u (B,) of all times lie."""
        return shift_times(u, self.shift)


@dataclass(frozen=True)
class LogitNormalTimes:
    """sigmoid(N(mean, std^2)): most often in the middle (2403.03206, eq. 19)."""

    mean: float = 0.0  # more is nearer to data
    std: float = 1.0
    shift: float = 1.0  # towards noise: larger latents need more
    kind: Literal["logit-normal"] = "logit-normal"

    def __post_init__(self) -> None:
        check_shift(self.shift)
        if not 0 < self.std < float("inf"):
            raise SmaltiError(f"std is {self.std}; it must be positive")

    def quantile(self, u: Tensor) -> Tensor:
        """The times (B,) in [0, 1] below which the shares u (B,) of all times lie."""
        normal = torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6))
        return shift_times(torch.sigmoid(self.mean + self.std * normal), self.shift)


TimesConfig = UniformTimes | LogitNormalTimes


# -- weights ------------------------------------------------------------------------------------

LossWeight = Literal["constant", "velocity", "noise", "data", "score", "min-snr", "likelihood"]
MIN_SNR = 5.0  # gamma of min-SNR weighting (2303.09556)


def _min_snr(path: GaussianPath, t: Tensor) -> Tensor:
    return path.snr(t).clamp_max(MIN_SNR)


def _likelihood(path: GaussianPath, t: Tensor) -> Tensor:
    """Half the growth of SNR: then the loss is the variational bound (2107.00630, eq. 17)."""
    return path.snr(t) * path.determinant(t) / (path.alpha(t) * path.sigma(t)).clamp_min(1e-12)


# Weights of the squared error of data.
_OF_DATA: dict[str, Callable[[GaussianPath, Tensor], Tensor]] = {
    "velocity": lambda path, t: per_data("velocity", path, t).square(),
    "noise": lambda path, t: per_data("noise", path, t).square(),
    "data": lambda path, t: torch.ones_like(t),
    "score": lambda path, t: per_data("score", path, t).square(),
    "min-snr": _min_snr,
    "likelihood": _likelihood,
}


def loss_weight(name: LossWeight, path: GaussianPath, prediction: Prediction, t: Tensor) -> Tensor:
    """What the squared error of a prediction at times t (B,) is multiplied by: (B,) fp32.

    "constant" is 1. "velocity", "noise", "data" and "score" measure the error as if the network
    predicted that: "noise" is the loss of DDPM whatever is predicted. "min-snr" is the error of
    data times min(SNR, 5), "likelihood" that times half the derivative of SNR.
    """
    if name in ("constant", prediction):
        return torch.ones_like(t, dtype=torch.float32)
    t = exact_times(t)
    return (_OF_DATA[name](path, t) / per_data(prediction, path, t).square()).float()
