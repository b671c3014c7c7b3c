"""Change of variables: exact on a Gaussian and on a mixture; Hutchinson's estimate is unbiased."""

import math

import pytest
import torch

from smalti.prior.flow.likelihood import (
    bits_per_dimension,
    exact_divergence,
    hutchinson_divergence,
    log_likelihood,
    rademacher_probes,
)
from smalti.prior.flow.path import LinearPath, TrigonometricPath, VPLinearPath
from smalti.prior.flow.solvers.dormand_prince import DormandPrince
from smalti.prior.flow.solvers.runge_kutta import RK4, Heun
from smalti.randomness import NormalSource

DOUBLE = torch.float64


def grid(steps: int, stop: float = 1.0) -> torch.Tensor:
    return torch.linspace(0, stop, steps + 1, dtype=DOUBLE)


@pytest.mark.parametrize("solver", [RK4(), DormandPrince(1e-8, 1e-10)], ids=["rk4", "dopri5"])
@pytest.mark.parametrize(
    ("path", "stop"), [(LinearPath(), 1.0), (TrigonometricPath(), 1.0)], ids=["linear", "trig"]
)
def test_the_likelihood_of_a_gaussian_is_exact(mixtures, path, stop, solver) -> None:
    data = mixtures.gaussian([0.5, -1.0, 2.0], [0.4, 1.0, 2.0])
    x = data.sample(20, torch.Generator().manual_seed(0))
    expected = torch.distributions.Normal(data.means, data.stds).log_prob(x).sum(1)
    found = log_likelihood(data.dynamics(path), x, grid(80, stop), solver, exact_divergence)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_the_likelihood_of_a_mixture_is_exact(mixtures) -> None:
    data = mixtures.two()
    x = data.sample(20, torch.Generator().manual_seed(0))
    end = torch.ones(20, dtype=DOUBLE)
    found = log_likelihood(
        data.dynamics(LinearPath()), x, grid(1), DormandPrince(1e-8, 1e-10), exact_divergence
    )
    torch.testing.assert_close(found, data.log_density(LinearPath(), x, end), rtol=1e-5, atol=1e-5)


def test_the_start_need_not_be_pure_noise(mixtures) -> None:
    """At t = 0 of the VP path alpha is 0.007, which a unit Gaussian hides."""
    data, path, stop = mixtures.gaussian([0.3, -0.2], [0.9, 1.1]), VPLinearPath(), 0.999
    x = data.sample(20, torch.Generator().manual_seed(0))
    t = torch.full((20,), stop, dtype=DOUBLE)
    found = log_likelihood(data.dynamics(path), x, grid(200, stop), RK4(), exact_divergence)
    torch.testing.assert_close(found, data.log_density(path, x, t), rtol=1e-3, atol=3e-3)


def test_hutchinson_is_unbiased_and_exact_for_a_diagonal(mixtures) -> None:
    mixing = torch.randn(4, 4, dtype=DOUBLE)

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return (x @ mixing).tanh()

    x, t = torch.randn(3, 4, dtype=DOUBLE), torch.zeros(3, dtype=DOUBLE)
    value, exact = exact_divergence(velocity, x, t)
    torch.testing.assert_close(value, velocity(x, t))
    jacobians = torch.stack(
        [torch.autograd.functional.jacobian(lambda y: velocity(y, t), row) for row in x]
    )
    torch.testing.assert_close(exact, jacobians.diagonal(dim1=1, dim2=2).sum(-1))
    many, count = torch.arange(3).repeat_interleave(4000), 12_000
    probes = rademacher_probes(1, x[many], NormalSource(torch.Generator().manual_seed(0), count))
    _, estimates = hutchinson_divergence(probes)(velocity, x[many], t[many])
    means, errors = estimates.view(3, -1).mean(1), estimates.view(3, -1).std(1) / 4000**0.5
    assert ((means - exact).abs() < 4 * errors).all()
    data = mixtures.gaussian([0.5, -1.0], [0.4, 1.0])  # its Jacobian is diagonal
    x = torch.randn(5, 2, dtype=DOUBLE)
    pair = rademacher_probes(3, x, NormalSource(None, 5))
    for divergence in (exact_divergence, hutchinson_divergence(pair)):
        nats = log_likelihood(data.dynamics(LinearPath()), x, grid(60), Heun(), divergence)
        expected = torch.distributions.Normal(data.means, data.stds).log_prob(x).sum(1)
        torch.testing.assert_close(nats, expected, rtol=3e-3, atol=3e-3)


def test_probes_are_signs_of_their_own_generators() -> None:
    def generators(*seeds: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    sampled = rademacher_probes(4, torch.empty(3, 50), NormalSource(generators(1, 2, 3), 3))
    assert set(sampled.unique().tolist()) == {-1.0, 1.0} and sampled.shape == (4, 3, 50)
    alone = rademacher_probes(4, torch.empty(1, 50), NormalSource(generators(2), 1))
    assert torch.equal(sampled[:, 1:2], alone)


def test_a_field_that_does_not_depend_on_x_has_no_divergence() -> None:
    x, t = torch.randn(2, 3), torch.zeros(2)
    for divergence in (exact_divergence, hutchinson_divergence(torch.ones(1, 2, 3))):
        _, change = divergence(lambda x, t: torch.ones(2, 3), x, t)
        assert (change == 0).all()


def test_bits_per_dimension() -> None:
    """A standard normal number has log2(2 pi e) / 2 bits on average."""
    x = torch.randn(200_000, 1, generator=torch.Generator().manual_seed(0))
    nats = torch.distributions.Normal(0, 1).log_prob(x).sum(1)
    bits = bits_per_dimension(nats, 1).mean().item()
    assert bits == pytest.approx(math.log2(2 * math.pi * math.e) / 2, abs=0.01)
