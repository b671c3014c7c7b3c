"""Time grids: ends, monotonicity, and the published spacings."""

import diffusers
import numpy as np
import pytest
import torch

from smalti.errors import SmaltiError
from smalti.prior.flow.path import DDPMPath, LinearPath, TrigonometricPath, VEPath, VPLinearPath
from smalti.prior.flow.prediction import TimeRange
from smalti.prior.flow.solvers.schedules import (
    SCHEDULES,
    DDPMSpaced,
    Karras,
    Shifted,
    Uniform,
    make_schedule,
    time_of_ratio,
)

DOUBLE = torch.float64
WHOLE = TimeRange(0.0, 1.0)


CASES = [
    (name, path)
    for name in SCHEDULES
    for path in (LinearPath(), TrigonometricPath(), DDPMPath(), VEPath())
    if name != "ddpm" or isinstance(path, DDPMPath)
]


@pytest.mark.parametrize(("name", "path"), CASES)
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
@pytest.mark.parametrize("within", [WHOLE, TimeRange(1e-3, 1 - 1e-3)])
def test_grids_ascend_from_start_to_end(name, steps, path, within) -> None:
    times = make_schedule(name).times(steps, path, within)
    assert times[-1] == pytest.approx(within.end) and times.dtype == DOUBLE
    assert (times.diff() > 0).all()
    if name == "ddpm":  # begins where the spacing does; index 0 is the end that is left out
        assert times[0] >= 0 and len(times) in (steps, steps + 1)
    else:
        assert times[0] == within.start and len(times) == steps + 1


def test_a_shifted_grid_is_stable_diffusions() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[1 - i / 8 for i in range(8)])
    torch.testing.assert_close(
        1 - Shifted(3.0).times(8, LinearPath(), WHOLE).float(), scheduler.sigmas
    )


def test_karras_steps_are_equal_in_a_root_of_sigma() -> None:
    """EDM's own formula, on a path whose ratio is EDM's sigma."""
    path = VEPath(0.002, 80.0)
    sigmas = path.sigma(Karras().times(17, path, WHOLE))
    ramp = torch.linspace(0, 1, 18, dtype=DOUBLE)
    expected = (80 ** (1 / 7) + ramp * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    torch.testing.assert_close(sigmas, expected)


def test_karras_steps_to_an_end_without_noise() -> None:
    path = VPLinearPath()
    times = Karras().times(18, path, WHOLE)
    ratio = path.sigma(times) / path.alpha(times)
    assert times[0] == 0 and times[-1] == 1 and ratio[-2].item() == pytest.approx(0.002)
    scheduler = diffusers.EDMEulerScheduler(sigma_max=80.0)
    scheduler.set_timesteps(18)
    torch.testing.assert_close(ratio[1:-1].float(), scheduler.sigmas[1:-1], rtol=1e-4, atol=0)


@pytest.mark.parametrize("path", [LinearPath(), VPLinearPath(), DDPMPath()], ids=lambda p: p.kind)
def test_times_of_ratios_invert_the_path(path) -> None:
    t = torch.linspace(0.01, 0.99, 33, dtype=DOUBLE)
    torch.testing.assert_close(time_of_ratio(path, path.sigma(t) / path.alpha(t)), t)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("steps", [1, 10, 50, 250, 1000])
def test_spaced_indices_are_diffusers(spacing, steps) -> None:
    scheduler = diffusers.DDPMScheduler(timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    times = DDPMSpaced(spacing).times(steps, DDPMPath(), WHOLE)
    index = (1000 * (1 - times) - 1).round().int().tolist()
    assert index[-1] == -1
    if (spacing, steps) != ("linspace", 1):  # there diffusers takes the last of the noise
        assert index[:-1] == scheduler.timesteps.tolist()


def test_the_leading_stride_is_the_one_of_dit() -> None:
    """DiT's `ddimN` takes the first stride with N multiples, and knows no others."""
    counts = {}
    for stride in range(1, 1001):
        counts.setdefault(len(range(0, 1000, stride)), stride)
    for steps in (*range(1, 120), 250, 333, 600, 1000):
        times = DDPMSpaced("leading").times(steps, DDPMPath(), WHOLE)[:-1]
        index = (1000 * (1 - times) - 1).round().int().flip(0).tolist()
        if steps in counts:
            assert index == list(range(0, 1000, counts[steps]))
        else:  # linspace over the whole chain
            assert index == np.linspace(0, 999, steps).round().astype(int).tolist()


def test_a_uniform_grid_is_the_trailing_spacing() -> None:
    torch.testing.assert_close(
        Uniform().times(50, DDPMPath(), WHOLE), DDPMSpaced("trailing").times(50, DDPMPath(), WHOLE)
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_schedule("karas"), 'did you mean "karras"'),
        (lambda: make_schedule({"kind": "shifted", "by": 2}), 'unknown key "by"'),
        (lambda: make_schedule({"shift": 2}), "give a name"),
        (lambda: make_schedule({"kind": "shifted", "shift": -1.0}), "shift is -1.0"),
        (lambda: DDPMSpaced("leding"), 'spacing is "leding"'),
        (lambda: Karras(rho=0), "rho, ratio_min and ratio_max are 0"),
        (lambda: DDPMSpaced().times(10, LinearPath(), WHOLE), "is for a ddpm path"),
        (lambda: DDPMSpaced().times(1001, DDPMPath(), WHOLE), "1001 steps of a chain of 1000"),
    ],
)
def test_errors_are_explained(make, message: str) -> None:
    with pytest.raises(SmaltiError, match=message):
        make()
    assert make_schedule({"kind": "shifted", "shift": 2.0}) == Shifted(2.0)
    assert make_schedule(Karras()) == Karras()
