"""Rectified flow: pairs, the reflow objective, and straightness."""

import pytest
import torch
from chance import generators, randomised
from torch import nn

from smalti.errors import SmaltiError
from smalti.prior.flow.dit import DiTConfig
from smalti.prior.flow.path import LinearPath, TrigonometricPath
from smalti.prior.flow.prediction import Dynamics
from smalti.prior.flow.prior import FlowConfig, FlowPrior
from smalti.prior.flow.rectified import check_straight, generate_pairs, straightness
from smalti.prior.flow.solvers.runge_kutta import RK4, Heun
from smalti.prior.flow.times import times_and_noise

DOUBLE = torch.float64
GRID = torch.linspace(0, 1, 41, dtype=DOUBLE)
TINY = FlowConfig(network=DiTConfig(2, 2, (4, 4), 2, 16, 1, 2, num_classes=3, frequency_size=16))


def make_prior(config: FlowConfig = TINY) -> FlowPrior:
    return randomised(FlowPrior(config), std=0.2)


def test_a_constant_velocity_is_straight_and_a_turning_one_is_not() -> None:
    x = torch.randn(5, 2, dtype=DOUBLE)

    def along(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(x)

    def bent(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return (2 * t)[:, None].expand(-1, 2)  # z = x + t^2: mean 1, S = int (1 - 2t)^2 = 1/3

    flat, curved = (
        straightness(Dynamics(LinearPath(), "velocity", field), x, GRID, RK4())
        for field in (along, bent)
    )
    torch.testing.assert_close(flat, torch.zeros(5, dtype=DOUBLE))
    torch.testing.assert_close(curved, torch.full((5,), 1 / 3, dtype=DOUBLE), rtol=2e-3, atol=0)


def test_the_straightness_of_a_gaussian_flow_is_its_integral(mixtures) -> None:
    """z_t = sqrt(t^2 s^2 + (1-t)^2) z_0: the known flow of N(0, s^2)."""
    s, x = 0.2, torch.randn(4, 1, dtype=DOUBLE)
    grid = torch.linspace(0, 1, 401, dtype=DOUBLE)
    t = grid.clone().requires_grad_()
    std = (t**2 * s**2 + (1 - t) ** 2).sqrt()
    (speed,) = torch.autograd.grad(std.sum(), t)
    expected = torch.trapezoid((s - 1 - speed).square(), grid) * x[:, 0] ** 2
    found = straightness(mixtures.gaussian([0.0], [s]).dynamics(LinearPath()), x, grid, Heun())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_pairs_are_noise_and_the_data_that_the_ode_maps_it_to() -> None:
    model, labels = make_prior(), torch.tensor([0, 1, 2])
    pairs = generate_pairs(model, labels, generator=generators(1, 2, 3), num_inference_steps=6)
    again = model.sample(labels, noise=pairs.noise, num_inference_steps=6)
    assert torch.equal(pairs.data, again) and torch.equal(pairs.labels, labels)
    sampled = model.sample(labels, generator=generators(1, 2, 3), num_inference_steps=6)
    torch.testing.assert_close(pairs.data, sampled)
    with pytest.raises(SmaltiError, match="cannot generate pairs: use an ODE solver"):
        generate_pairs(model, labels, solver="ddpm")


def test_the_objective_with_the_noise_given_is_that_of_the_line_between_the_pair() -> None:
    model = make_prior()
    pairs = generate_pairs(model, torch.tensor([0, 1, 2, 0]), num_inference_steps=4)
    u = times_and_noise(pairs.data, fixed=True)["times"]
    t = u[:, None, None, None]
    predicted = model.network(t * pairs.data + (1 - t) * pairs.noise, u, pairs.labels)
    expected = (predicted - (pairs.data - pairs.noise)).square().mean()
    found = model(pairs.data, pairs.labels, random_inputs={"noise": pairs.noise}).total
    torch.testing.assert_close(found, expected)


def test_only_a_flow_on_straight_lines_can_be_rectified(prior) -> None:
    check_straight(make_prior())
    with pytest.raises(SmaltiError, match="rectified flow needs the linear path"):
        check_straight(make_prior(FlowConfig(network=TINY.network, path=TrigonometricPath())))
    with pytest.raises(SmaltiError, match="for a flow prior, not a NextTokenPrior"):
        check_straight(prior)


@pytest.mark.slow
def test_reflow_straightens(mixtures) -> None:
    """A small network trained on pairs of a two-component flow: S falls, one step suffices."""
    random = torch.Generator().manual_seed(0)
    data = mixtures.two()
    exact = data.dynamics(LinearPath())
    noise = torch.randn(4000, 2, generator=random, dtype=DOUBLE)
    target = Heun().solve(exact, noise, GRID, None)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))
    net = net.double()
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return net(torch.cat([x, t.expand(len(x))[:, None]], 1))

    for step in range(400):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / 400)
        rows = torch.randint(4000, (512,), generator=random)
        t = torch.rand(512, generator=random, dtype=DOUBLE)
        x = LinearPath().mix(target[rows], noise[rows], t)
        loss = (velocity(x, t) - (target - noise)[rows]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    reflowed = Dynamics(LinearPath(), "velocity", velocity)
    fresh = torch.randn(1000, 2, generator=random, dtype=DOUBLE)
    before = straightness(exact, fresh, GRID, Heun()).mean()
    after = straightness(reflowed, fresh, GRID, Heun()).mean()
    assert after < before / 5

    def one_step_error(dynamics: Dynamics) -> float:
        with torch.no_grad():
            single = fresh + dynamics.velocity(fresh, torch.zeros(1000, dtype=DOUBLE))
            full = Heun().solve(dynamics, fresh, GRID, None)
        return (single - full).square().mean().item()

    assert one_step_error(reflowed) < one_step_error(exact) / 5
