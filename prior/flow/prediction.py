"""What a network predicts about x_t (velocity, noise, score or data), the exact conversions between
the four, and the dynamics that a solver integrates.

Each is a linear function of data x_1 and noise x_0; with x_t = alpha x_1 + sigma x_0 that gives two
equations for two unknowns (SiT, 2401.08740, section 2 and appendix A):

    velocity  alpha' x_1 + sigma' x_0         noise  x_0
    score     -x_0 / sigma                    data   x_1

Networks predict conditional expectations given x_t, to which the same equations apply. Time t runs
from 0, noise, to 1, data. Coefficients are computed in float64; the magnitude of a denominator is
at least 1e-12, so that every result is finite.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from smalti.prior.flow.path import TINY, GaussianPath, expand_like
from smalti.prior.sampling import exact_dtype

Prediction = Literal["velocity", "noise", "score", "data"]
PREDICTIONS: tuple[str, ...] = get_args(Prediction)
MARGIN = 1e-3  # distance kept from a singular end (SiT; Song et al., 2011.13456)

# -------------------------------------------------------------------------------------------------
# Times at which a prediction determines the velocity


@dataclass(frozen=True)
class TimeRange:
    """The times at which a network is trained and evaluated: start <= t <= end."""

    start: float
    end: float


def time_range(path: GaussianPath, prediction: Prediction) -> TimeRange:
    """[0, 1] without a margin at each end where the prediction does not determine the velocity.

    At t = 0 noise and score do not determine the data if alpha is 0. At t = 1 data do not determine
    the noise if sigma is 0; the score is infinite there, and so is the velocity of a variance
    preserving path.
    """
    zero = torch.zeros((), dtype=torch.float64, device="cpu")  # also when a model is built on meta
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


def times_of_samples(t: Tensor, x: Tensor) -> Tensor:
    """Times (B,) of samples x (B, ...), on their device, from these or from one for all, (1,)."""
    if len(t) == len(x) and t.device == x.device:
        return t
    return torch.full((len(x),), t.item(), dtype=exact_dtype(x.device), device=x.device)


# -------------------------------------------------------------------------------------------------
# Training targets, and conversions between predictions


def prediction_target(
    prediction: Prediction, path: GaussianPath, data: Tensor, noise: Tensor, t: Tensor
) -> Tensor:
    """What a network should predict, from x_1 and x_0 (B, ...) at times t (B,). For the velocity
    this is the target of conditional flow matching (2210.02747, eq. 9 and theorem 3)."""
    t = exact_times(t)
    if prediction == "data":
        return data
    if prediction == "noise":
        return noise
    if prediction == "score":
        return expand_like(-1 / _nonzero(path.sigma(t)), noise) * noise
    return expand_like(path.d_alpha(t), data) * data + expand_like(path.d_sigma(t), noise) * noise


def convert(
    value: Tensor,
    source: Prediction,
    target: Prediction,
    path: GaussianPath,
    x: Tensor,
    t: Tensor,
) -> Tensor:
    """A prediction of one kind converted into another.

    Args:
        value: what the network predicted, (B, ...).
        x: x_t, (B, ...).
        t: times (B,) in [0, 1].
    """
    if source == target:
        return value
    t = exact_times(t)
    if target == "data":
        return _to_data(value, source, path, x, t)
    noise = _to_noise(value, source, path, x, t)
    if target == "noise":
        return noise
    if target == "score":
        return expand_like(-1 / _nonzero(path.sigma(t)), x) * noise
    data = _to_data(value, source, path, x, t)
    return expand_like(path.d_alpha(t), x) * data + expand_like(path.d_sigma(t), x) * noise


def _to_data(value: Tensor, source: Prediction, path: GaussianPath, x: Tensor, t: Tensor) -> Tensor:
    if source == "data":
        return value
    if source == "velocity":  # Cramer's rule
        d = _nonzero(path.determinant(t))
        return expand_like(path.sigma(t) / d, x) * value - expand_like(path.d_sigma(t) / d, x) * x
    # (x_t - sigma noise) / alpha with noise = -sigma score
    alpha, sigma = _nonzero(path.alpha(t)), path.sigma(t)
    factor = sigma.square() if source == "score" else -sigma
    return expand_like(1 / alpha, x) * x + expand_like(factor / alpha, x) * value


def _to_noise(
    value: Tensor, source: Prediction, path: GaussianPath, x: Tensor, t: Tensor
) -> Tensor:
    if source == "noise":
        return value
    if source == "score":
        return expand_like(-path.sigma(t), x) * value
    if source == "velocity":  # Cramer's rule
        d = _nonzero(path.determinant(t))
        return expand_like(path.d_alpha(t) / d, x) * x - expand_like(path.alpha(t) / d, x) * value
    # (x_t - alpha data) / sigma
    sigma = _nonzero(path.sigma(t))
    return expand_like(1 / sigma, x) * x - expand_like(path.alpha(t) / sigma, x) * value


def _nonzero(denominator: Tensor) -> Tensor:
    """The denominator, or +-1e-12 where its magnitude is smaller."""
    smallest = torch.full_like(denominator, TINY).copysign(denominator)
    return torch.where(denominator.abs() < TINY, smallest, denominator)


# -------------------------------------------------------------------------------------------------
# Derivatives of one prediction by another at the same x_t, for loss weights and classifier guidance


def derivative_by_data(prediction: Prediction, path: GaussianPath, t: Tensor) -> Tensor:
    """d prediction / d data at fixed x_t and times t (B,): (B,) float64."""
    t = exact_times(t)
    sigma = _nonzero(path.sigma(t))
    return {
        "data": torch.ones_like(t),
        "noise": -path.alpha(t) / sigma,
        "velocity": path.determinant(t) / sigma,
        "score": path.alpha(t) / sigma.square(),
    }[prediction]


def derivative_by_score(prediction: Prediction, path: GaussianPath, t: Tensor) -> Tensor:
    """d prediction / d score at fixed x_t and times t (B,): (B,) float64."""
    t = exact_times(t)
    alpha, sigma = _nonzero(path.alpha(t)), path.sigma(t)
    return {
        "data": sigma.square() / alpha,
        "noise": -sigma,
        "velocity": path.determinant(t) * sigma / alpha,
        "score": torch.ones_like(t),
    }[prediction]


# -------------------------------------------------------------------------------------------------
# The dynamics: a path and a network, which are all that a solver uses of a prior

# x (B, ...), times (B,), or (1,) on the CPU: one time for all samples -> (B, ...). A field that
# needs one for each sample calls `times_of_samples`.
Field = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Estimate:
    """One evaluation of the network at x_t (B, C, ...) and times t (B,), converted on request."""

    path: GaussianPath
    prediction: Prediction
    x: Tensor
    t: Tensor
    output: Tensor  # (B, C, ...), or (B, 2 C, ...) with `variance_output`

    @property
    def value(self) -> Tensor:
        """The prediction itself, like x."""
        return self.output[:, : self.x.shape[1]]

    @property
    def variance_output(self) -> Tensor:
        """v of improved DDPM (2102.09672, eq. 15), like x; no channels if the network has none."""
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
    """The marginals p_t of a path, given by a network that makes one kind of prediction."""

    path: GaussianPath
    prediction: Prediction
    output: Field  # the network with condition and guidance; its first channels are the prediction

    def estimate(self, x: Tensor, t: Tensor) -> Estimate:
        """One evaluation of the network at x (B, ...) and times t, see `Field`."""
        return Estimate(self.path, self.prediction, x, t, self.output(x, t))

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """dx/dt of the probability-flow ODE (2011.13456, eq. 13), (B, ...)."""
        return self.estimate(x, t).velocity
