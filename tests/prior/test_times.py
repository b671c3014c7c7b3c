"""Training times and loss weights against their definitions."""

import math

import pytest
import scipy.stats
import torch

from smalti.errors import SmaltiError
from smalti.prior.flow.path import LinearPath, TrigonometricPath, VEPath, VPLinearPath
from smalti.prior.flow.prediction import PREDICTIONS, convert
from smalti.prior.flow.times import LogitNormalTimes, UniformTimes, loss_weight, shift_times

DOUBLE = torch.float64
U = torch.linspace(0.001, 0.999, 999, dtype=DOUBLE)


def test_uniform_times_are_uniform_and_logit_normal_times_have_normal_logits() -> None:
    torch.testing.assert_close(UniformTimes().quantile(U), U)
    logits = torch.logit(LogitNormalTimes(0.4, 1.3).quantile(U))
    expected = torch.from_numpy(scipy.stats.norm.ppf(U.numpy(), 0.4, 1.3))
    torch.testing.assert_close(logits, expected)


def test_the_ends_are_times_too() -> None:
    ends = torch.tensor([0.0, 1.0])
    for times in (UniformTimes(), UniformTimes(3.0), LogitNormalTimes(), LogitNormalTimes(shift=3)):
        t = times.quantile(ends)
        assert t.isfinite().all() and t.min() >= 0 and t.max() <= 1


def test_a_shift_multiplies_the_noise_to_signal_ratio() -> None:
    """And moves the signal-to-noise ratio of the linear path as Stable Diffusion 3 has it."""
    shifted = shift_times(U, 3.0)
    torch.testing.assert_close((1 - shifted) / shifted, 3 * (1 - U) / U)
    assert (shifted < U).all()
    torch.testing.assert_close(shift_times(shifted, 1 / 3), U)
    torch.testing.assert_close(UniformTimes(3.0).quantile(U), shifted)


@pytest.mark.parametrize(
    "path", [LinearPath(), TrigonometricPath(), VPLinearPath(), VEPath()], ids=lambda p: p.kind
)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", PREDICTIONS)
def test_a_weight_measures_the_error_as_if_something_else_were_predicted(
    path, prediction, name
) -> None:
    t = torch.tensor([0.2, 0.5, 0.9], dtype=DOUBLE)
    x, truth, guess = torch.randn(3, 3, 4, dtype=DOUBLE)
    error = (guess - truth).square().sum(1)
    converted = convert(guess, prediction, name, path, x, t) - convert(
        truth, prediction, name, path, x, t
    )
    weight = loss_weight(name, path, prediction, t)
    torch.testing.assert_close(
        (weight * error).float(), converted.square().sum(1).float(), rtol=1e-5, atol=1e-8
    )


def test_a_constant_weight_is_one_and_min_snr_is_published() -> None:
    path, t = VPLinearPath(), torch.tensor([0.2, 0.5, 0.95], dtype=DOUBLE)
    assert (loss_weight("constant", path, "score", t) == 1).all()
    snr = path.snr(t).float()
    clipped = snr.clamp_max(5)
    torch.testing.assert_close(loss_weight("min-snr", path, "data", t), clipped)
    torch.testing.assert_close(loss_weight("min-snr", path, "noise", t), clipped / snr)


def test_the_likelihood_weight_is_half_the_growth_of_snr() -> None:
    for path in (LinearPath(), VPLinearPath(), VEPath()):
        t = torch.tensor([0.2, 0.5, 0.9], dtype=DOUBLE, requires_grad=True)
        (growth,) = torch.autograd.grad(path.snr(t).sum(), t)
        weight = loss_weight("likelihood", path, "data", t.detach())
        torch.testing.assert_close(weight, (growth / 2).float())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UniformTimes(0.0), "shift is 0.0; it must be positive"),
        (lambda: LogitNormalTimes(std=0.0), "std is 0.0"),
        (lambda: LogitNormalTimes(shift=math.nan), "shift is nan"),
    ],
)
def test_impossible_times_are_refused(make, message: str) -> None:
    with pytest.raises(SmaltiError, match=message):
        make()
