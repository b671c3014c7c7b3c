"""Paths: ends, derivatives, and the published noise schedules as oracles."""

import math

import diffusers
import pytest
import torch

from smalti.config import config_from_dict, config_to_dict
from smalti.errors import SmaltiError
from smalti.prior.flow.config import FlowConfig
from smalti.prior.flow.path import (
    PATHS,
    DDPMPath,
    LinearPath,
    TrigonometricPath,
    VEPath,
    VPCosinePath,
    VPLinearPath,
)

EXAMPLES = [
    LinearPath(),
    LinearPath(sigma_min=0.1),
    TrigonometricPath(),
    VPLinearPath(),
    VPCosinePath(),
    DDPMPath(),
    DDPMPath(beta_schedule="cosine"),
    VEPath(),
]
ENDS = torch.tensor([0.0, 1.0], dtype=torch.float64)


def name(path) -> str:
    return path.kind


@pytest.mark.parametrize("path", EXAMPLES, ids=name)
def test_derivatives_are_those_of_autograd(path) -> None:
    t = torch.linspace(0.0123, 0.9871, 61, dtype=torch.float64, requires_grad=True)
    for coefficient, derivative in ((path.alpha, path.d_alpha), (path.sigma, path.d_sigma)):
        value = coefficient(t).sum()
        grad = torch.autograd.grad(value, t)[0] if value.requires_grad else torch.zeros_like(t)
        torch.testing.assert_close(derivative(t), grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("path", EXAMPLES, ids=name)
def test_noise_becomes_data(path) -> None:
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    assert (path.log_snr(t).diff() > 0).all()
    assert (path.alpha(t).diff() >= 0).all() and (path.sigma(t).diff() < 0).all()
    assert path.alpha(ENDS)[1].item() == pytest.approx(1, abs=1e-12)
    assert path.sigma(ENDS)[1].item() == pytest.approx(getattr(path, "sigma_min", 0), rel=1e-9)
    assert path.alpha(ENDS)[0] / path.sigma(ENDS)[0] < 0.03


@pytest.mark.parametrize("path", EXAMPLES, ids=name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_everything_is_finite_at_both_ends(path, dtype) -> None:
    t = ENDS.to(dtype)
    methods = ("alpha", "sigma", "d_alpha", "d_sigma", "snr", "log_snr", "determinant")
    for method in (*methods, "marginal_std", "input_scale"):
        value = getattr(path, method)(t)
        assert value.isfinite().all() and value.dtype == dtype and value.shape == t.shape, method


@pytest.mark.parametrize("path", EXAMPLES, ids=name)
def test_the_log_snr_grows_as_the_determinant_says(path) -> None:
    t = torch.linspace(0.0123, 0.9871, 41, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(path.log_snr(t).sum(), t)
    expected = 2 * path.determinant(t) / (path.alpha(t) * path.sigma(t))
    torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(path.log_snr(t).exp(), path.snr(t))


def test_variance_preserving_paths_preserve_variance_also_where_sigma_is_tiny() -> None:
    t = torch.tensor([0.0, 0.3, 1 - 1e-6], dtype=torch.float64)
    for path in (TrigonometricPath(), VPLinearPath(), VPCosinePath(), DDPMPath()):
        torch.testing.assert_close(path.marginal_std(t), torch.ones_like(t))
    # Near the data sigma^2 = beta_min (1 - t): no digit may be lost, even in fp32.
    near = torch.tensor([1e-6], dtype=torch.float32)
    sigma = VPLinearPath().sigma(1 - near)
    assert sigma.item() == pytest.approx(math.sqrt(0.1 * (1 - (1 - near)).item()), rel=1e-4)


@pytest.mark.parametrize("path", EXAMPLES, ids=name)
def test_mixing_is_the_definition(path) -> None:
    data, noise, t = torch.randn(5, 3, 2, 2), torch.randn(5, 3, 2, 2), torch.rand(5)
    mixed = path.mix(data, noise, t)
    for i in range(5):
        torch.testing.assert_close(
            mixed[i], path.alpha(t)[i] * data[i] + path.sigma(t)[i] * noise[i]
        )


@pytest.mark.parametrize(
    ("schedule", "theirs"),
    [("linear", "linear"), ("scaled-linear", "scaled_linear"), ("cosine", "squaredcos_cap_v2")],
)
def test_the_discrete_chain_is_diffusers(schedule, theirs) -> None:
    path = DDPMPath(1000, schedule, 0.00085, 0.012)
    scheduler = diffusers.DDPMScheduler(
        1000, beta_start=0.00085, beta_end=0.012, beta_schedule=theirs
    )
    index = torch.arange(1000, dtype=torch.float64)
    abar = path.alpha(path.time_of_index(index)).square()
    torch.testing.assert_close(abar.float(), scheduler.alphas_cumprod, rtol=2e-5, atol=1e-9)
    assert path.alpha(path.time_of_index(torch.tensor([-1.0]))) == 1


def test_the_continuous_schedules_are_the_limits_of_the_discrete_ones() -> None:
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    discrete, continuous = DDPMPath(100_000, "linear", 1e-6, 2e-4), VPLinearPath()
    torch.testing.assert_close(discrete.alpha(t), continuous.alpha(t), rtol=1e-3, atol=1e-5)
    discrete, continuous = DDPMPath(beta_schedule="cosine"), VPCosinePath()
    torch.testing.assert_close(discrete.alpha(t), continuous.alpha(t), rtol=1e-5, atol=1e-5)


def test_variance_exploding_is_geometric() -> None:
    path = VEPath(0.01, 50.0)
    sigmas = path.sigma(torch.linspace(0, 1, 5, dtype=torch.float64))
    torch.testing.assert_close(sigmas[1:] / sigmas[:-1], torch.full_like(sigmas[1:], 5000**-0.25))
    t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(path.input_scale(t) * path.marginal_std(t), torch.ones_like(t))


@pytest.mark.parametrize("kind", list(PATHS))
def test_a_configuration_may_hold_any_registered_path(kind: str) -> None:
    config = config_from_dict(FlowConfig, {"path": {"kind": kind}}, "recipe")
    assert type(config.path) is PATHS.resolve(kind) and config.path.kind == kind
    assert config_from_dict(FlowConfig, config_to_dict(config), "recipe") == config
    assert kind in {path.kind for path in EXAMPLES}  # tested here


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearPath(sigma_min=1.0), "sigma_min is 1.0"),
        (lambda: VPLinearPath(beta_min=0), "beta_min and beta_max are 0 and 20.0"),
        (lambda: VPCosinePath(offset=0), "offset is 0"),
        (lambda: DDPMPath(0), "num_train_timesteps is 0"),
        (lambda: DDPMPath(beta_end=1.0), "0.0001 and 1.0"),
        (lambda: VEPath(sigma_min=50.0), "use 0 < sigma_min < sigma_max"),
        (lambda: LinearPath(sigma_min=math.nan), "sigma_min is nan"),
    ],
)
def test_impossible_paths_are_refused(make, message: str) -> None:
    with pytest.raises(SmaltiError, match=message):
        make()
