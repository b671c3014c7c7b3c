"""A path and what a model predicts on it: all that a solver needs to know of a prior."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from smalti.prior.flow.path import GaussianPath
from smalti.prior.flow.prediction import Prediction, convert

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
