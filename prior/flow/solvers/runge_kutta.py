"""Explicit Runge-Kutta methods with fixed steps for the probability-flow ODE (Hairer, Norsett and
Wanner, Solving Ordinary Differential Equations I, section II.1)."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from torch import Tensor

from smalti.prior.flow.prediction import Field
from smalti.prior.flow.solvers.base import ODESolver, shared_time


@dataclass(frozen=True)
class Tableau:
    """A Butcher tableau: slope k_i is evaluated at time c_i, at x + h sum_j a_ij k_j; the step ends
    at x + h sum_i b_i k_i."""

    nodes: tuple[float, ...]  # c
    rows: tuple[tuple[float, ...], ...]  # a, below the diagonal
    weights: tuple[float, ...]  # b


EULER = Tableau((0,), ((),), (1,))
MIDPOINT = Tableau((0, 1 / 2), ((), (1 / 2,)), (0, 1))
HEUN = Tableau((0, 1), ((), (1,)), (1 / 2, 1 / 2))
CLASSICAL = Tableau(
    (0, 1 / 2, 1 / 2, 1),
    ((), (1 / 2,), (0, 1 / 2), (0, 0, 1)),
    (1 / 6, 1 / 3, 1 / 3, 1 / 6),
)


def advance(x: Tensor, slopes: list[Tensor], weights: tuple[float, ...], h: float) -> Tensor:
    """x + h sum_i weights_i slopes_i."""
    for slope, weight in zip(slopes, weights, strict=True):
        if weight:
            x = x + (h * weight) * slope
    return x


def node_times(start: float, stop: float, tableau: Tableau) -> list[float]:
    """The times of a step at which the slopes are evaluated."""
    # At node 1 the time is exactly `stop`; start + h may differ by rounding.
    return [stop if node == 1 else start + node * (stop - start) for node in tableau.nodes]


def runge_kutta_step(
    field: Field, x: Tensor, start: float, stop: float, tableau: Tableau
) -> Tensor:
    """x (B, ...) after one step of dx/dt = field(x, t)."""
    h, slopes = stop - start, []
    for time, row in zip(node_times(start, stop, tableau), tableau.rows, strict=True):
        slopes.append(field(advance(x, slopes, row, h), shared_time(time)))
    return advance(x, slopes, tableau.weights, h)


class RungeKutta(ODESolver):
    """A fixed-step method, defined by its tableau."""

    memoryless: ClassVar[bool] = True
    tableau: ClassVar[Tableau]

    def integrate(self, field: Field, x: Tensor, times: Tensor) -> Iterator[Tensor]:
        for start, stop in pairwise(times.tolist()):
            x = runge_kutta_step(field, x, start, stop, self.tableau)
            yield x

    def evaluation_times(self, times: Tensor) -> list[float]:
        steps = pairwise(times.tolist())
        return [time for step in steps for time in node_times(*step, self.tableau)]


@dataclass(frozen=True)
class Euler(RungeKutta):
    """Order 1, one evaluation per step."""

    tableau: ClassVar[Tableau] = EULER


@dataclass(frozen=True)
class Midpoint(RungeKutta):
    """Order 2, two evaluations per step, none at its end."""

    tableau: ClassVar[Tableau] = MIDPOINT


@dataclass(frozen=True)
class Heun(RungeKutta):
    """Order 2, two evaluations per step, at its start and its end."""

    tableau: ClassVar[Tableau] = HEUN


@dataclass(frozen=True)
class RK4(RungeKutta):
    """The classical method of order 4, four evaluations per step."""

    tableau: ClassVar[Tableau] = CLASSICAL
