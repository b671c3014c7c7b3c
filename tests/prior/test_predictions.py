"""Conversions between velocity, noise, score and data: round trips, ends, and derivatives."""

import itertools

import pytest
import torch

from smalti.prior.flow.path import (
    DDPMPath,
    LinearPath,
    TrigonometricPath,
    VEPath,
    VPCosinePath,
    VPLinearPath,
)
from smalti.prior.flow.prediction import (
    PREDICTIONS,
    convert,
    derivative_by_data,
    derivative_by_score,
    prediction_target,
    time_range,
)

PATHS = [
    LinearPath(),
    LinearPath(sigma_min=0.1),
    TrigonometricPath(),
    VPLinearPath(),
    VPCosinePath(),
    DDPMPath(),
    VEPath(sigma_max=5.0),
]
PAIRS = list(itertools.product(PREDICTIONS, PREDICTIONS))


def name(path) -> str:
    return path.kind


@pytest.mark.parametrize("path", PATHS, ids=name)
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_every_prediction_is_converted_into_every_other(path, source, target) -> None:
    t = torch.linspace(0.01, 0.99, 25, dtype=torch.float64)
    data, noise = torch.randn(2, 25, 3, 2, 2, dtype=torch.float64)
    x = path.mix(data, noise, t)
    given = prediction_target(source, path, data, noise, t)
    wanted = prediction_target(target, path, data, noise, t)
    torch.testing.assert_close(
        convert(given, source, target, path, x, t), wanted, rtol=1e-8, atol=1e-8
    )


@pytest.mark.parametrize("path", PATHS, ids=name)
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_conversions_are_inverses_for_any_prediction_also_in_fp32(path, source, target) -> None:
    """The output of a network may be any number."""
    t = torch.linspace(0.1, 0.9, 17)
    value, x = torch.randn(2, 17, 4)
    there = convert(value, source, target, path, x, t)
    back = convert(there, target, source, path, x, t)
    assert there.dtype == torch.float32
    torch.testing.assert_close(back, value, rtol=1e-3, atol=1e-3)


def test_the_velocity_is_the_derivative_of_the_path() -> None:
    data, noise = torch.randn(2, 1, 4, dtype=torch.float64)
    for path in PATHS:
        t = torch.tensor([0.43712], dtype=torch.float64)
        step = torch.tensor([1e-6], dtype=torch.float64)
        rise = (path.mix(data, noise, t + step) - path.mix(data, noise, t - step)) / (2 * step)
        velocity = prediction_target("velocity", path, data, noise, t)
        torch.testing.assert_close(velocity, rise, rtol=1e-6, atol=1e-6)


def test_the_linear_path_has_the_published_target() -> None:
    data, noise, t = torch.randn(3, 4), torch.randn(3, 4), torch.rand(3)
    target = prediction_target("velocity", LinearPath(sigma_min=0.2), data, noise, t)
    torch.testing.assert_close(target, data - (1 - 0.2) * noise)


@pytest.mark.parametrize("path", PATHS, ids=name)
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_conversions_are_finite_at_both_ends(path, source, target) -> None:
    t = torch.tensor([0.0, 1.0])
    value, x = torch.randn(2, 2, 4)
    assert convert(value, source, target, path, x, t).isfinite().all()


def test_the_velocity_determines_all_at_the_ends_of_the_linear_path() -> None:
    t, path = torch.tensor([0.0, 1.0]), LinearPath()
    data, noise = torch.randn(2, 2, 4)
    x, velocity = path.mix(data, noise, t), data - noise
    torch.testing.assert_close(convert(velocity, "velocity", "data", path, x, t), data)
    torch.testing.assert_close(convert(velocity, "velocity", "noise", path, x, t), noise)


@pytest.mark.parametrize("path", PATHS, ids=name)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_derivatives_are_those_of_the_conversion(path, prediction) -> None:
    t = torch.tensor([0.31], dtype=torch.float64)
    x = torch.randn(1, 1, dtype=torch.float64)
    for source, expected in (("data", derivative_by_data), ("score", derivative_by_score)):
        value = torch.randn(1, 1, dtype=torch.float64, requires_grad=True)
        converted = convert(value, source, prediction, path, x, t)
        (grad,) = torch.autograd.grad(converted.sum(), value)
        torch.testing.assert_close(grad[0], expected(prediction, path, t))


@pytest.mark.parametrize(
    ("path", "prediction", "start", "end"),
    [
        (LinearPath(), "velocity", 0, 1),
        (LinearPath(), "noise", 1e-3, 1),
        (LinearPath(), "data", 0, 0.999),
        (LinearPath(), "score", 1e-3, 0.999),
        (LinearPath(sigma_min=0.01), "data", 0, 1),
        (VPLinearPath(), "noise", 0, 0.999),
        (VPLinearPath(), "velocity", 0, 0.999),
        (VPCosinePath(), "noise", 1e-3, 0.999),
        (VEPath(), "score", 0, 1),
    ],
)
def test_singular_ends_are_avoided_and_no_others(path, prediction, start, end) -> None:
    found = time_range(path, prediction)
    assert (found.start, found.end) == (start, pytest.approx(end))
