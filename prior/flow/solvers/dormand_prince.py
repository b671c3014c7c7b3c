"""Dormand and Prince's embedded pair of orders 5 and 4, with a step size of its own per sample.

Error norm, step control and first step are those of Hairer, Norsett and Wanner, Solving Ordinary
Differential Equations I, sections II.4 and II.5, and of scipy's RK45. Library solvers for torch
measure the error of the whole batch, so that a sample would depend on its neighbours; here every
sample has its own time and step.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from smalti.errors import SmaltiError
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
# Order 5 less order 4; the seventh slope is the first of the next step.
ERRORS = (-71 / 57600, 0, 71 / 16695, -71 / 1920, 17253 / 339200, -22 / 525, 1 / 40)
SAFETY, SHRINK, GROW = 0.9, 0.2, 10.0
ERROR_ORDER = 5  # the error of a step of order 4 falls as h^5


@dataclass(frozen=True)
class DormandPrince(ODESolver):
    """Adaptive order 5: as many steps as the tolerances need; the grid's inner times are only
    reported at. Defaults: SiT's."""

    rtol: float = 1e-3  # error of a step relative to the sample
    atol: float = 1e-6  # and absolute, where the sample is near 0
    max_steps: int = 1000  # accepted or rejected, before giving up

    def __post_init__(self) -> None:
        if not (self.rtol > 0 and self.atol > 0 and self.max_steps >= 1):
            raise SmaltiError(
                f"rtol, atol and max_steps are {self.rtol}, {self.atol} and {self.max_steps}; "
                "the tolerances must be positive and there must be at least 1 step"
            )

    def integrate(self, field: Field, x: Tensor, times: Tensor) -> Iterator[Tensor]:
        """x (B, ...) at times[1:] of dx/dt = field(x, t).

        Raises:
            SmaltiError: the field is not finite, or the tolerance is not met in `max_steps`.
        """
        grid = times.tolist()
        if len(x) == 0:
            yield from (x for _ in grid[1:])
            return
        walk = _Walk(field, x, grid[0], grid[-1], self)
        for stop in grid[1:]:
            while walk.lags(stop):
                walk.step(stop)
            yield walk.x


class _Walk:
    """All samples, each at its own time."""

    def __init__(
        self, field: Field, x: Tensor, start: float, stop: float, options: DormandPrince
    ) -> None:
        self.field, self.options, self.x = field, options, x
        self.direction = 1.0 if stop >= start else -1.0
        self.t = times_of(start, x)
        self.slope = field(x, self.t)
        self.h = self._first_step(abs(stop - start))  # (B,), positive
        self.rejected = torch.zeros_like(self.t, dtype=torch.bool)  # in its last step
        self.steps = 0

    def lags(self, stop: float) -> bool:
        """Whether a sample has not come to `stop`."""
        return bool((self.direction * (stop - self.t) > 0).any())

    def _norm(self, x: Tensor, scale: Tensor) -> Tensor:
        """Root mean square of x / scale of each sample, (B,)."""
        return (x / scale).flatten(1).square().mean(1).sqrt().to(self.t.dtype)

    def _tolerance(self, magnitude: Tensor) -> Tensor:
        return self.options.atol + self.options.rtol * magnitude

    def _first_step(self, longest: float) -> Tensor:
        """Algorithm of section II.4: h so that the first two derivatives are followed well."""
        scale = self._tolerance(self.x.abs())
        size, speed = self._norm(self.x, scale), self._norm(self.slope, scale)
        small = (size < 1e-5) | (speed < 1e-5)
        trial = torch.where(small, 1e-6, 0.01 * size / speed).clamp_max(longest)
        moved = self.x + expand_like(self.direction * trial, self.x) * self.slope
        change = self.field(moved, self.t + self.direction * trial) - self.slope
        mean_straightness = self._norm(change, scale) / trial
        steepest = torch.maximum(speed, mean_straightness)
        careful = (1e-3 * trial).clamp_min(1e-6)
        by_order = (0.01 / steepest) ** (1 / ERROR_ORDER)
        first = torch.where(steepest <= 1e-15, careful, by_order)
        return torch.minimum(100 * trial, first).clamp_max(longest)

    def step(self, stop: float) -> None:
        """Try one step of every sample; those that have come to `stop` stay."""
        self.steps += 1
        if self.steps > self.options.max_steps:
            raise SmaltiError(
                f"the tolerances rtol {self.options.rtol} and atol {self.options.atol} are not met "
                f"in {self.options.max_steps} steps: loosen them, or raise max_steps"
            )
        left = (self.direction * (stop - self.t)).clamp_min(0)
        h = torch.minimum(self.h, left)
        arrives = h == left
        slopes, x = self._slopes(self.direction * h)
        after = torch.where(arrives, torch.full_like(self.t, stop), self.t + self.direction * h)
        slopes.append(self.field(x, after))
        scale = self._tolerance(torch.maximum(self.x.abs(), x.abs()))
        error = self._norm(_combine(slopes, ERRORS, expand_like(h, x)), scale)
        if not error.isfinite().all():
            raise SmaltiError("the model gives NaN: its weights are damaged or overflow their type")
        moving = left > 0
        accepted = moving & (error < 1)
        self._set_step(h, error, moving, accepted, arrives)
        take = _chooser(accepted, x)
        self.x, self.slope = take(x, self.x), take(slopes[-1], self.slope)
        self.t = torch.where(accepted, after, self.t)

    def _slopes(self, h: Tensor) -> tuple[list[Tensor], Tensor]:
        """The six slopes of a step of signed length h (B,), and where it leads."""
        wide, slopes = expand_like(h, self.x), [self.slope]
        for node, row in zip(NODES[1:], ROWS[1:], strict=True):
            slopes.append(self.field(self.x + _combine(slopes, row, wide), self.t + node * h))
        return slopes, self.x + _combine(slopes, WEIGHTS, wide)

    def _set_step(
        self, h: Tensor, error: Tensor, moving: Tensor, accepted: Tensor, arrives: Tensor
    ) -> None:
        """The next step to try: so that its error would be just below the tolerance."""
        factor = SAFETY * error.clamp_min(1e-30) ** (-1 / ERROR_ORDER)
        growth = torch.where(self.rejected, 1.0, GROW)  # do not grow right after a rejection
        factor = torch.where(accepted, torch.minimum(factor, growth), factor.clamp_min(SHRINK))
        tried = h * factor
        # A step cut short by the grid says little about the next: keep the longer.
        tried = torch.where(accepted & arrives, torch.maximum(tried, self.h), tried)
        self.h = torch.where(moving, tried, self.h)
        self.rejected = torch.where(moving, ~accepted, self.rejected)


def _combine(slopes: list[Tensor], weights: tuple[float, ...], h: Tensor) -> Tensor:
    """h sum_i weights_i slopes_i."""
    total = torch.zeros_like(slopes[0])
    for slope, weight in zip(slopes, weights, strict=True):
        total = total + weight * slope
    return h * total


def _chooser(mask: Tensor, like: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    wide = mask.view(-1, *[1] * (like.ndim - 1))
    return lambda new, old: torch.where(wide, new, old)
