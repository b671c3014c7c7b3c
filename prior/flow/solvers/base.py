"""What every solver provides, and the solvers by name.

    ODE   dx = v dt                             euler, midpoint, heun, rk4, dopri5
    SDE   dx = (v + w score) dt + sqrt(2 w) dW  euler-maruyama
    exact Gaussian transitions                  ddpm, ddim
    MCMC at decreasing noise                    langevin

Time runs from 0, noise, to 1, data. A solver is a small configuration: `Heun()`, `DDIM(eta=1.0)`.
All have the same marginals p_t in the limit of many steps.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from smalti.hub import Registry
from smalti.prior.flow.prediction import Dynamics, Field
from smalti.prior.sampling import exact_dtype
from smalti.randomness import NormalSource

SOLVERS = Registry(
    "solver",
    {
        "euler": "smalti.prior.flow.solvers.runge_kutta:Euler",
        "midpoint": "smalti.prior.flow.solvers.runge_kutta:Midpoint",
        "heun": "smalti.prior.flow.solvers.runge_kutta:Heun",
        "rk4": "smalti.prior.flow.solvers.runge_kutta:RK4",
        "dopri5": "smalti.prior.flow.solvers.dormand_prince:DormandPrince",
        "euler-maruyama": "smalti.prior.flow.solvers.sde:EulerMaruyama",
        "ddpm": "smalti.prior.flow.solvers.ancestral:DDPM",
        "ddim": "smalti.prior.flow.solvers.ancestral:DDIM",
        "langevin": "smalti.prior.flow.solvers.sde:Langevin",
    },
)


class Solver(ABC):
    """Moves samples along a grid of times."""

    # Whether the last step may end where the velocity is infinite: such a solver does not evaluate
    # the network there, and returns the expected data where sigma is 0.
    lands_on_data: ClassVar[bool]
    # Whether a step depends on the samples at its start alone, which a caller may then change.
    memoryless: ClassVar[bool] = False

    @abstractmethod
    def states(
        self, dynamics: Dynamics, x: Tensor, times: Tensor, normal: NormalSource
    ) -> Iterator[Tensor]:
        """The samples after each step.

        Args:
            x: samples (B, ...) of p_t at times[0].
            times: (N + 1,) float64, monotonic; ascending from noise to data.
            normal: source of standard normal noise, for stochastic solvers.

        Yields:
            (B, ...) at times[1], times[2], ..., times[N].
        """

    def check(self, predicts_variance: bool) -> None:
        """Raise `GenerationError` if the solver needs an output that such a network lacks."""
        del predicts_variance

    def solve(self, dynamics: Dynamics, x: Tensor, times: Tensor, normal: NormalSource) -> Tensor:
        """The samples (B, ...) at the last of `times`."""
        for state in self.states(dynamics, x, times, normal):
            x = state
        return x

    def evaluation_times(self, times: Tensor) -> list[float]:
        """The times at which `states` evaluates the dynamics, in this order, if they are the same
        for all samples and known in advance; [] if not. Others may follow."""
        del times
        return []


class ODESolver(Solver):
    """A solver of dx/dt = field(x, t), in either direction of time."""

    lands_on_data = False

    @abstractmethod
    def integrate(self, field: Field, x: Tensor, times: Tensor) -> Iterator[Tensor]:
        """x (B, ...) at times[1], times[2], ..., from x at times[0]."""

    def states(
        self, dynamics: Dynamics, x: Tensor, times: Tensor, normal: NormalSource
    ) -> Iterator[Tensor]:
        return self.integrate(dynamics.velocity, x, times)


class StepSolver(Solver):
    """A solver whose step depends on the samples at the start of the step alone."""

    lands_on_data = True
    memoryless = True

    @abstractmethod
    def step(
        self, dynamics: Dynamics, x: Tensor, start: float, stop: float, normal: NormalSource
    ) -> Tensor:
        """Samples (B, ...) at time `stop` from those at `start`."""

    def states(
        self, dynamics: Dynamics, x: Tensor, times: Tensor, normal: NormalSource
    ) -> Iterator[Tensor]:
        for start, stop in pairwise(times.tolist()):
            x = self.step(dynamics, x, start, stop, normal)
            yield x

    def evaluation_times(self, times: Tensor) -> list[float]:
        return times.tolist()


def shared_time(time: float) -> Tensor:
    """One time for all samples, (1,) float64 on the CPU, whose value costs no wait for a GPU."""
    return torch.full((1,), time, dtype=torch.float64, device="cpu")


def times_of(time: float, x: Tensor) -> Tensor:
    """One time for each of the samples (B, ...): (B,) in the most exact type of their device."""
    return torch.full((len(x),), time, dtype=exact_dtype(x.device), device=x.device)


def make_solver(solver: str | Mapping[str, Any] | Solver) -> Solver:
    """A solver by name, "heun", by name and options, {"kind": "ddim", "eta": 1.0}; a solver
    is returned as it is.

    Raises:
        SmaltiError: unknown solver or option, or a wrong value.
    """
    return solver if isinstance(solver, Solver) else SOLVERS.configured(solver)
