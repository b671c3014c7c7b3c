"""Time grids of sampling: the times, from 0, noise, to 1, data, at which a solver steps.

A grid of N steps has N + 1 ascending times. A schedule is a small configuration: `Uniform()`,
`Shifted(3.0)`, `Karras()`, `DDPMSpaced("leading")`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from smalti.errors import GenerationError
from smalti.hub import Registry
from smalti.prior.flow.path import DDPMPath, GaussianPath
from smalti.prior.flow.prediction import TimeRange
from smalti.prior.flow.times import check_shift, shift_times

SCHEDULES = Registry(
    "schedule",
    {
        "uniform": "smalti.prior.flow.solvers.schedules:Uniform",
        "shifted": "smalti.prior.flow.solvers.schedules:Shifted",
        "karras": "smalti.prior.flow.solvers.schedules:Karras",
        "ddpm": "smalti.prior.flow.solvers.schedules:DDPMSpaced",
    },
)
BISECTIONS = 60  # halvings of [0, 1], which give all bits of a float64


class Schedule(ABC):
    """Chooses the times of N steps."""

    @abstractmethod
    def times(self, steps: int, path: GaussianPath, within: TimeRange) -> Tensor:
        """(steps + 1,) float64, ascending; the last is `within.end`.

        Raises:
            GenerationError: the schedule does not apply to this path or number of steps.
        """


@dataclass(frozen=True)
class Uniform(Schedule):
    """Equal steps. On a DDPM path that ends at 1 this is the "trailing" spacing."""

    def times(self, steps: int, path: GaussianPath, within: TimeRange) -> Tensor:
        return torch.linspace(within.start, within.end, steps + 1, dtype=torch.float64)


@dataclass(frozen=True)
class Shifted(Schedule):
    """Equal steps moved by `shift_times`: smaller steps near noise (Stable Diffusion 3, 2403.03206,
    eq. 23)."""

    shift: float = 3.0  # 1 gives equal steps; more gives smaller steps near noise

    def __post_init__(self) -> None:
        check_shift(self.shift)

    def times(self, steps: int, path: GaussianPath, within: TimeRange) -> Tensor:
        unit = shift_times(torch.linspace(0, 1, steps + 1, dtype=torch.float64), self.shift)
        return within.start + (within.end - within.start) * unit


@dataclass(frozen=True)
class Karras(Schedule):
    """(sigma / alpha)^(1 / rho) decreases in equal steps (Karras et al., EDM, 2206.00364, eq. 5),
    from sigma / alpha at the start, but at most `ratio_max`, to that at the end. The first step
    begins at the start all the same. If sigma / alpha at the end is less than `ratio_min`, the grid
    goes to `ratio_min` and from there to the end in one step."""

    rho: float = 7.0  # larger gives smaller steps near the data
    ratio_min: float = 0.002  # smallest sigma / alpha before the last step
    ratio_max: float = 80.0  # largest sigma / alpha

    def __post_init__(self) -> None:
        if not (self.rho > 0 and 0 < self.ratio_min < self.ratio_max):
            raise GenerationError(
                f"rho, ratio_min and ratio_max are {self.rho}, {self.ratio_min} and "
                f"{self.ratio_max}; use rho > 0 and 0 < ratio_min < ratio_max"
            )

    def times(self, steps: int, path: GaussianPath, within: TimeRange) -> Tensor:
        ends = torch.tensor([within.start, within.end], dtype=torch.float64)
        first, last = (-path.log_snr(ends) / 2).exp().tolist()
        largest, smallest = min(first, self.ratio_max), max(last, self.ratio_min)
        if smallest >= largest:
            return Uniform().times(steps, path, within)
        extra_step = last < smallest  # from ratio_min to the end
        share = torch.linspace(0, 1, steps if extra_step else steps + 1, dtype=torch.float64)
        ratios = largest ** (1 / self.rho) * (1 - share) + smallest ** (1 / self.rho) * share
        inner = time_of_ratio(path, ratios**self.rho)
        return torch.cat([ends[:1], inner[1:] if extra_step else inner[1:-1], ends[1:]])


def time_of_ratio(path: GaussianPath, ratios: Tensor) -> Tensor:
    """The times at which sigma / alpha has these values, float64, by bisection."""
    target = -2 * ratios.double().log()  # log SNR, which increases with t on every path
    low, high = torch.zeros_like(target), torch.ones_like(target)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        below = path.log_snr(middle) < target
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


Spacing = Literal["leading", "linspace", "trailing"]


@dataclass(frozen=True)
class DDPMSpaced(Schedule):
    """N of the T indices of a discrete chain, then the data (2305.08891, table 2).

    "leading" takes the N multiples below T of the smallest stride that has N of them: 0, 100, ...,
    900 for N = 10 and T = 1000 (DiT's `ddimN`); if no stride has N, it is "linspace". "linspace"
    goes from 0 to T - 1, rounded (DiT's `N`), and "trailing" from T - 1 down.
    """

    spacing: Spacing = "leading"  # leading, linspace or trailing, see above

    def __post_init__(self) -> None:
        if self.spacing not in get_args(Spacing):
            raise GenerationError(
                f'spacing is "{self.spacing}"; choose one of {", ".join(get_args(Spacing))}'
            )

    def times(self, steps: int, path: GaussianPath, within: TimeRange) -> Tensor:
        if not isinstance(path, DDPMPath):
            raise GenerationError(
                f"the schedule ddpm is for a ddpm path; the path is {path}: use another schedule"
            )
        total = path.num_train_timesteps
        if steps > total:
            raise GenerationError(
                f"{steps} steps of a chain of {total} were requested: use at most {total}"
            )
        index = torch.arange(steps, dtype=torch.float64)
        stride = math.ceil(total / steps)  # the smallest with at most N multiples below T
        if self.spacing == "trailing":
            index = (total - (steps - 1 - index) * (total / steps)).round() - 1
            index = index.sort().values
        elif self.spacing == "leading" and math.ceil(total / stride) == steps:
            index = index * stride
        else:
            index = (index * ((total - 1) / max(steps - 1, 1))).round()
        times = path.time_of_index(index.flip(0))
        end = torch.tensor([within.end], dtype=torch.float64)
        return torch.cat([times, end[end > times[-1]]])


def make_schedule(schedule: str | Mapping[str, Any] | Schedule) -> Schedule:
    """A schedule by name, by name and options, {"kind": "shifted", "shift": 3.0}; a schedule
    is returned as it is.

    Raises:
        SmaltiError: unknown schedule or option, or a wrong value.
    """
    return schedule if isinstance(schedule, Schedule) else SCHEDULES.configured(schedule)
