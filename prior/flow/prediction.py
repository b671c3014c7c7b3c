"""What a network predicts about x_t, and exact conversions: velocity, noise, score, data.

Each is a linear function of (x_1, x_0), and with x_t = alpha x_1 + sigma x_0 that gives two
equations for two unknowns (SiT, 2401.08740, appendix A):

    velocity  alpha' x_1 + sigma' x_0         noise  x_0
    score     -x_0 / sigma                    data   x_1

Networks predict the conditional expectations given x_t, to which the same equations apply.
Coefficients are computed in float64; a denominator that vanishes is held at 1e-12, so that all
that is returned is finite.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from smalti.prior.flow.path import TINY, GaussianPath, expand_like
from smalti.prior.sampling import exact_dtype

# -------------------------------------------------------------------------------------------------
# What a network predicts about x_t, and exact conversions: velocity, noise, score, data.

Prediction = Literal["velocity", "noise", "score", "data"]
PREDICTIONS: tuple[str, ...] = get_args(Prediction)
MARGIN = 1e-3  # how near to an end that is singular times go (SiT; Song et al., 2011.13456)


@dataclass(frozen=True)
class TimeRange:
    """Where a network is trained and asked: start <= t <= end."""

    start: float
    end: float


def time_range(path: GaussianPath, prediction: Prediction) -> TimeRange:
    """[0, 1], without the ends at which the prediction does not determine the velocity.

    At t = 0 noise says nothing about data if alpha is 0. At t = 1 data say nothing about noise if
    sigma is 0, the score is infinite, and so is the velocity of a variance preserving path.
    """
    zero = torch.zeros((), dtype=torch.float64, device="cpu")  # also while models are built on meta
    start, end = 0.0, 1.0
    if path.alpha(zero).item() == 0 and prediction in ("noise", "score"):
        start = MARGIN
    diverges = prediction in ("data", "score") or path.velocity_diverges
    if path.sigma(zero + 1).item() == 0 and diverges:
        end = 1 - MARGIN
    return TimeRange(start, end)


def exact_times(t: Tensor) -> Tensor:
    """Times (B,) in the most exact type of their device."""
    return t.to(exact_dtype(t.device))


def _safe(denominator: Tensor) -> Tensor:
    """The denominator, or +-1e-12 where it is smaller than that."""
    held = torch.full_like(denominator, TINY).copysign(denominator)
    return torch.where(denominator.abs() < TINY, held, denominator)


def of_data_and_noise(
    prediction: Prediction, path: GaussianPath, data: Tensor, noise: Tensor, t: Tensor
) -> Tensor:
    """What a network should predict, from x_1 and x_0 (B, ...) at times t (B,)."""
    t = exact_times(t)
    if prediction == "data":
        return data
    if prediction == "noise":
        return noise
    if prediction == "score":
        return expand_like(-1 / _safe(path.sigma(t)), noise) * noise
    return expand_like(path.d_alpha(t), data) * data + expand_like(path.d_sigma(t), noise) * noise


def _data(value: Tensor, source: Prediction, path: GaussianPath, x: Tensor, t: Tensor) -> Tensor:
    if source == "data":
        return value
    if source == "velocity":
        d = _safe(path.determinant(t))
        return expand_like(path.sigma(t) / d, x) * value - expand_like(path.d_sigma(t) / d, x) * x
    alpha, sigma = _safe(path.alpha(t)), path.sigma(t)
    share = sigma.square() if source == "score" else -sigma
    return expand_like(1 / alpha, x) * x + expand_like(share / alpha, x) * value


def _noise(value: Tensor, source: Prediction, path: GaussianPath, x: Tensor, t: Tensor) -> Tensor:
    if source == "noise":
        return value
    if source == "score":
        return expand_like(-path.sigma(t), x) * value
    if source == "velocity":
        d = _safe(path.determinant(t))
        return expand_like(path.d_alpha(t) / d, x) * x - expand_like(path.alpha(t) / d, x) * value
    sigma = _safe(path.sigma(t))
    return expand_like(1 / sigma, x) * x - expand_like(path.alpha(t) / sigma, x) * value


def convert(
    value: Tensor,
    source: Prediction,
    target: Prediction,
    path: GaussianPath,
    x: Tensor,
    t: Tensor,
) -> Tensor:
    """A prediction of one kind as another.

    Args:
        value: what was predicted, (B, ...).
        x: x_t, (B, ...).
        t: times (B,) in [0, 1].
    """
    if source == target:
        return value
    t = exact_times(t)
    if target == "data":
        return _data(value, source, path, x, t)
    noise = _noise(value, source, path, x, t)
    if target == "noise":
        return noise
    if target == "score":
        return expand_like(-1 / _safe(path.sigma(t)), x) * noise
    data = _data(value, source, path, x, t)
    return expand_like(path.d_alpha(t), x) * data + expand_like(path.d_sigma(t), x) * noise


def per_data(prediction: Prediction, path: GaussianPath, t: Tensor) -> Tensor:
    """How much a prediction changes with that of the data at the same x_t: (B,) float64."""
    t = exact_times(t)
    sigma = _safe(path.sigma(t))
    return {
        "data": torch.ones_like(t),
        "noise": -path.alpha(t) / sigma,
        "velocity": path.determinant(t) / sigma,
        "score": path.alpha(t) / sigma.square(),
    }[prediction]


def per_score(prediction: Prediction, path: GaussianPath, t: Tensor) -> Tensor:
    """How much a prediction changes with that of the score at the same x_t: (B,) float64."""
    t = exact_times(t)
    alpha, sigma = _safe(path.alpha(t)), path.sigma(t)
    return {
        "data": sigma.square() / alpha,
        "noise": -sigma,
        "velocity": path.determinant(t) * sigma / alpha,
        "score": torch.ones_like(t),
    }[prediction]


# -------------------------------------------------------------------------------------------------
# A path and what a model predicts on it: all that a solver needs to know of a prior.

Field = Callable[[Tensor, Tensor], Tensor]  # x (B, ...), times (B,) -> (B, ...)


@dataclass(frozen=True)
class Estimate:
    """One evaluation of a network at x (B, ...) and times t (B,), as whatever is asked of it."""

    path: GaussianPath
    prediction: Prediction
    x: Tensor
    t: Tensor
    output: Tensor  # (B, ...); channels beyond those of x are `surplus`

    @property
    def value(self) -> Tensor:
        """The prediction itself, like x."""
        return self.output[:, : self.x.shape[1]]

    @property
    def surplus(self) -> Tensor:
        """What the network says besides: the variances of DiT, like x or empty."""
        return self.output[:, self.x.shape[1] :]

    @property
    def velocity(self) -> Tensor:
        """E[alpha' x_1 + sigma' x_0 | x_t]."""
        return self._as("velocity")

    @property
    def noise(self) -> Tensor:
        """E[x_0 | x_t]."""
        return self._as("noise")

    @property
    def score(self) -> Tensor:
        """The gradient of log p_t at x_t."""
        return self._as("score")

    @property
    def data(self) -> Tensor:
        """E[x_1 | x_t]."""
        return self._as("data")

    def _as(self, target: Prediction) -> Tensor:
        return convert(self.value, self.prediction, target, self.path, self.x, self.t)


@dataclass(frozen=True)
class Dynamics:
    """The marginals p_t of a path, through a network that predicts one thing about them."""

    path: GaussianPath
    prediction: Prediction
    output: Field  # the network, conditioned and guided; its channels begin with the prediction

    def estimate(self, x: Tensor, t: Tensor) -> Estimate:
        """Evaluate the network once at x (B, ...) and times t (B,)."""
        return Estimate(self.path, self.prediction, x, t, self.output(x, t))

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """dx/dt of the probability-flow ODE, (B, ...)."""
        return self.estimate(x, t).velocity
