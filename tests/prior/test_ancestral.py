"""DDPM and DDIM: diffusers as oracle, and their place among the solvers of the ODE and SDE."""

import diffusers
import pytest
import torch

from smalti.errors import SmaltiError
from smalti.prior.flow.path import (
    DDPMPath,
    LinearPath,
    TrigonometricPath,
    VEPath,
    VPCosinePath,
    transition,
)
from smalti.prior.flow.prediction import Dynamics, TimeRange
from smalti.prior.flow.solvers.ancestral import DDIM, DDPM
from smalti.prior.flow.solvers.schedules import DDPMSpaced
from smalti.randomness import NormalSource

DOUBLE = torch.float64
PATH = DDPMPath()
MIXED = torch.randn(3, 3, generator=torch.Generator().manual_seed(7))


class Replay(NormalSource):
    """The noise is the same at every call, as in diffusers when its generator is seeded anew."""

    def __init__(self) -> None:
        super().__init__(torch.Generator(), 1)

    def __call__(self, like: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(5)
        return torch.randn(like.shape, generator=generator, dtype=like.dtype)


def network(x: torch.Tensor) -> torch.Tensor:
    """Any function: samplers are compared on a network that is far from perfect."""
    return torch.einsum("bchw,dc->bdhw", x, MIXED.to(x)).sin()


def loop(scheduler, x: torch.Tensor, **options) -> torch.Tensor:
    for k in scheduler.timesteps:
        generator = torch.Generator().manual_seed(5)
        output = network(x)
        if getattr(scheduler.config, "variance_type", None) == "learned_range":
            output = torch.cat([output, network(x).cos()], 1)
        x = scheduler.step(output, int(k), x, generator=generator, **options).prev_sample
    return x


def ours(solver, x: torch.Tensor, spacing: str, learned: bool = False) -> torch.Tensor:
    def output(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.cat([network(x), network(x).cos()], 1) if learned else network(x)

    times = DDPMSpaced(spacing).times(20, PATH, TimeRange(0.0, 1.0))
    return solver.solve(Dynamics(PATH, "noise", output), x, times, Replay())


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_is_diffusers(spacing, eta) -> None:
    scheduler = diffusers.DDIMScheduler(
        beta_start=1e-4, beta_end=0.02, clip_sample=False, timestep_spacing=spacing
    )
    scheduler.set_timesteps(20)
    x = torch.randn(2, 3, 4, 4, dtype=DOUBLE)
    times = DDPMSpaced(spacing).times(20, PATH, TimeRange(0.0, 1.0))
    index = (1000 * (1 - times[:-1]) - 1).round().int().tolist()
    assert index == scheduler.timesteps.tolist()
    if spacing == "linspace":  # diffusers steps back by T // N, which is not the next index
        return
    torch.testing.assert_close(
        ours(DDIM(eta), x, spacing), loop(scheduler, x, eta=eta), rtol=2e-4, atol=2e-4
    )


@pytest.mark.parametrize(
    ("variance", "theirs", "spacing"),
    [
        *(("small", "fixed_small", spacing) for spacing in ("leading", "linspace", "trailing")),
        # With "trailing" diffusers adds noise to the data, too: its last index is not 0.
        *(("large", "fixed_large", spacing) for spacing in ("leading", "linspace")),
        *(("learned", "learned_range", spacing) for spacing in ("leading", "linspace")),
    ],
)
def test_ddpm_is_diffusers(variance, theirs, spacing) -> None:
    scheduler = diffusers.DDPMScheduler(
        clip_sample=False, timestep_spacing=spacing, variance_type=theirs
    )
    scheduler.set_timesteps(20)
    x = torch.randn(2, 3, 4, 4, dtype=DOUBLE)
    sampled = ours(DDPM(variance), x, spacing, learned=variance == "learned")
    if variance != "large":  # chosen by default
        assert torch.equal(sampled, ours(DDPM(), x, spacing, learned=variance == "learned"))
    torch.testing.assert_close(sampled, loop(scheduler, x), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    "path", [LinearPath(), TrigonometricPath(), VPCosinePath(), VEPath()], ids=lambda p: p.kind
)
def test_ddim_with_eta_0_is_euler_in_its_own_variable(mixtures, path) -> None:
    """With y = x / alpha and r = sigma / alpha the probability-flow ODE is dy/dr = noise."""
    dynamics, x = mixtures.two().dynamics(path), torch.randn(30, 2, dtype=DOUBLE)
    times = torch.linspace(0.1, 0.95, 12, dtype=DOUBLE)
    stepped = DDIM().solve(dynamics, x, times, Replay())
    alpha, sigma = path.alpha(times), path.sigma(times)
    y = x / alpha[0]
    for i in range(len(times) - 1):
        noise = dynamics.estimate(y * alpha[i], times[i].expand(30)).noise
        y = y + (sigma[i + 1] / alpha[i + 1] - sigma[i] / alpha[i]) * noise
    torch.testing.assert_close(stepped, y * alpha[-1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("path", [PATH, LinearPath(), VEPath()], ids=lambda path: path.kind)
def test_ddim_with_eta_1_is_ddpm_with_beta_tilde(mixtures, path) -> None:
    dynamics, x = mixtures.two().dynamics(path), torch.randn(30, 2, dtype=DOUBLE)
    times = torch.linspace(0, 1, 9, dtype=DOUBLE)
    torch.testing.assert_close(
        DDIM(1.0).solve(dynamics, x, times, Replay()), DDPM().solve(dynamics, x, times, Replay())
    )


@pytest.mark.parametrize("path", [PATH, LinearPath(), VEPath()], ids=lambda path: path.kind)
def test_the_posterior_is_bayes_rule(path) -> None:
    """q(x_s | x_t, x_1) from the joint Gaussian of (x_s, x_t) given x_1 = 1."""
    step = transition(path, 0.4, 0.6)
    t = torch.tensor([0.4, 0.6], dtype=DOUBLE)
    (alpha_t, alpha_s), (sigma_t, sigma_s) = path.alpha(t).tolist(), path.sigma(t).tolist()
    r = alpha_t / alpha_s
    assert step.beta == pytest.approx(sigma_t**2 - r**2 * sigma_s**2)
    assert 1 / step.beta_tilde == pytest.approx(1 / sigma_s**2 + r**2 / step.beta)


def test_beta_is_exact_for_gaussian_data_and_beta_tilde_for_a_point(mixtures) -> None:
    """DDPM, section 3.2: one big step from the exact marginal ends in the exact marginal."""
    normal, count = NormalSource(torch.Generator().manual_seed(0), 100_000), 100_000
    times = torch.tensor([0.5, 0.8], dtype=DOUBLE)
    for solver, std in ((DDPM("large"), 1.0), (DDPM("small"), 1e-6)):
        data = mixtures.gaussian([0.0], [std])
        a, b = (PATH.alpha(times) ** 2 * std**2 + PATH.sigma(times) ** 2).sqrt().tolist()
        x = a * normal(torch.empty(count, 1, dtype=DOUBLE))
        sampled = solver.solve(data.dynamics(PATH), x, times, normal)
        assert sampled.std().item() == pytest.approx(b, rel=0.01)


def test_errors_are_explained(mixtures) -> None:
    dynamics, x = mixtures.two().dynamics(PATH), torch.randn(3, 2, dtype=DOUBLE)
    times = torch.tensor([0.1, 0.5], dtype=DOUBLE)
    with pytest.raises(SmaltiError, match="this network predicts no variance"):
        DDPM("learned").solve(dynamics, x, times, Replay())
    with pytest.raises(SmaltiError, match=r"from 0.5 down to 0.1; use an ODE solver"):
        DDIM().solve(dynamics, x, times.flip(0), Replay())
    with pytest.raises(SmaltiError, match=r"eta is 1.5"):
        DDIM(1.5)
    with pytest.raises(SmaltiError, match='variance is "big"'):
        DDPM("big")
