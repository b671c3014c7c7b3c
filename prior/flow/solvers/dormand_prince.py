"""Dormand and Prince's embedded Runge-Kutta pair of orders 5 and 4, with a step size per sample.

We keep our own because torchdiffeq controls the error of the whole batch, so that a sample would
depend on its neighbours. torchode has a step size per sample, but takes states (B, D) only, needs
torchtyping (superseded by jaxtyping), and with its step control makes more steps than SciPy: 68
evaluations against 56 on the mixture of the tests at rtol 1e-3. Here every sample has the steps
that SciPy's RK45 makes on it alone; a test limits the difference to 1e-8.

Error norm, step control and first step are those of Hairer, Norsett and Wanner, Solving Ordinary
Differential Equations I, section II.4; the coefficients are in their table II.5.2.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from smalti.errors import GenerationError
from smalti.prior.flow.path import expand_like
from smalti.prior.flow.prediction import Field
from smalti.prior.flow.solvers.base import ODESolver, times_of

NODES = (0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1)
ROWS = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
)
WEIGHTS = (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)  # of order 5
# Weights of order 5 minus those of order 4; the seventh slope is the first of the next step.
ERRORS = (-71 / 57600, 0, 71 / 16695, -71 / 1920, 17253 / 339200, -22 / 525, 1 / 40)
SAFETY, MIN_FACTOR, MAX_FACTOR = 0.9, 0.2, 10.0  # of the step size
ERROR_ORDER = 5  # the error of a step of order 4 is proportional to h^5


@dataclass(frozen=True)
class DormandPrince(ODESolver):
    """Adaptive method of order 5: as many steps as the tolerances need. The inner times of the grid
    are reached exactly, but do not set the step size. The default tolerances are SiT's."""

    rtol: float = 1e-3  # tolerated error of a step relative to the magnitude of x
    atol: float = 1e-6  # tolerated absolute error, which counts where x is near 0
    max_steps: int = 1000  # limit of the steps, accepted and rejected

    def __post_init__(self) -> None:
        if not (self.rtol > 0 and self.atol > 0 and self.max_steps >= 1):
            raise GenerationError(
                f"rtol, atol and max_steps are {self.rtol}, {self.atol} and {self.max_steps}; "
                "the tolerances must be positive and there must be at least 1 step"
            )

    def integrate(self, field: Field, x: Tensor, times: Tensor) -> Iterator[Tensor]:
        """x (B, ...) at times[1:] of dx/dt = field(x, t).

        Raises:
            GenerationError: the field is not finite, or the tolerance is not met in `max_steps`.
        """
        grid = times.tolist()
        if len(x) == 0:
            yield from (x for _ in grid[1:])
            return
        integration = _Integration(field, x, grid[0], grid[-1], self)
        for stop in grid[1:]:
            while not integration.reached(stop):
                integration.step(stop)
            yield integration.x


class _Integration:
    """The state of all samples, each with a time t (B,) and a step size h (B,) of its own."""

    def __init__(
        self, field: Field, x: Tensor, start: float, stop: float, options: DormandPrince
    ) -> None:
        self.field, self.options, self.x = field, options, x
        self.direction = 1.0 if stop >= start else -1.0
        self.t = times_of(start, x)
        self.slope = field(x, self.t)
        self.h = self._first_step(abs(stop - start))  # (B,), positive
        self.rejected = torch.zeros_like(self.t, dtype=torch.bool)  # whether the last step failed
        self.steps = 0

    def reached(self, stop: float) -> bool:
        """Whether all samples are at `stop`."""
        return not (self.direction * (stop - self.t) > 0).any()

    def _norm(self, x: Tensor, scale: Tensor) -> Tensor:
        """Root mean square of x / scale of each sample, (B,) (eq. 4.11)."""
        return (x / scale).flatten(1).square().mean(1).sqrt().to(self.t.dtype)

    def _tolerance(self, magnitude: Tensor) -> Tensor:
        return self.options.atol + self.options.rtol * magnitude

    def _first_step(self, longest: float) -> Tensor:
        """The starting step size of section II.4, from estimates of the first two derivatives."""
        scale = self._tolerance(self.x.abs())
        size, speed = self._norm(self.x, scale), self._norm(self.slope, scale)
        tiny = (size < 1e-5) | (speed < 1e-5)
        trial = torch.where(tiny, 1e-6, 0.01 * size / speed).clamp_max(longest)
        # An Euler step of the trial size gives the second derivative.
        moved = self.x + expand_like(self.direction * trial, self.x) * self.slope
        change = self.field(moved, self.t + self.direction * trial) - self.slope
        acceleration = self._norm(change, scale) / trial
        largest = torch.maximum(speed, acceleration)
        by_order = (0.01 / largest) ** (1 / ERROR_ORDER)
        first = torch.where(largest <= 1e-15, (1e-3 * trial).clamp_min(1e-6), by_order)
        return torch.minimum(100 * trial, first).clamp_max(longest)

    def step(self, stop: float) -> None:
        """Try one step of every sample; samples that are at `stop` stay."""
        self.steps += 1
        if self.steps > self.options.max_steps:
            raise GenerationError(
                f"the tolerances rtol {self.options.rtol} and atol {self.options.atol} are not met "
                f"in {self.options.max_steps} steps: loosen them, or raise max_steps"
            )
        left = (self.direction * (stop - self.t)).clamp_min(0)
        h = torch.minimum(self.h, left)
        arrives = h == left
        slopes, x = self._slopes(self.direction * h)
        t = torch.where(arrives, torch.full_like(self.t, stop), self.t + self.direction * h)
        slopes.append(self.field(x, t))
        scale = self._tolerance(torch.maximum(self.x.abs(), x.abs()))
        error = self._norm(_combine(slopes, ERRORS, expand_like(h, x)), scale)
        if not error.isfinite().all():
            raise GenerationError(
                "the model gives NaN: its weights are damaged or overflow their type"
            )
        moving = left > 0
        accepted = moving & (error < 1)
        self._set_step_size(h, error, moving, accepted, arrives)
        mask = accepted.view(-1, *[1] * (x.ndim - 1))  # (B, 1, ..., 1)
        self.x = torch.where(mask, x, self.x)
        self.slope = torch.where(mask, slopes[-1], self.slope)
        self.t = torch.where(accepted, t, self.t)

    def _slopes(self, h: Tensor) -> tuple[list[Tensor], Tensor]:
        """The six slopes of a step of signed length h (B,), and x at its end."""
        h_like_x, slopes = expand_like(h, self.x), [self.slope]
        for node, row in zip(NODES[1:], ROWS[1:], strict=True):
            x = self.x + _combine(slopes, row, h_like_x)
            slopes.append(self.field(x, self.t + node * h))
        return slopes, self.x + _combine(slopes, WEIGHTS, h_like_x)

    def _set_step_size(
        self, h: Tensor, error: Tensor, moving: Tensor, accepted: Tensor, arrives: Tensor
    ) -> None:
        """Choose h so that the error of the next step is just below the tolerance (eq. 4.13)."""
        factor = SAFETY * error.clamp_min(1e-30) ** (-1 / ERROR_ORDER)
        growth = torch.where(self.rejected, 1.0, MAX_FACTOR)  # no growth right after a rejection
        factor = torch.where(accepted, torch.minimum(factor, growth), factor.clamp_min(MIN_FACTOR))
        next_h = h * factor
        # A step shortened to end at a time of the grid must not shorten the next: keep the longer.
        next_h = torch.where(accepted & arrives, torch.maximum(next_h, self.h), next_h)
        self.h = torch.where(moving, next_h, self.h)
        self.rejected = torch.where(moving, ~accepted, self.rejected)


def _combine(slopes: list[Tensor], weights: tuple[float, ...], h: Tensor) -> Tensor:
    """h sum_i weights_i slopes_i."""
    total = torch.zeros_like(slopes[0])
    for slope, weight in zip(slopes, weights, strict=True):
        total = total + weight * slope
    return h * total
