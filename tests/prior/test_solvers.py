"""ODE solvers: orders of convergence, and scipy and diffusers as oracles."""

import diffusers
import numpy as np
import pytest
import scipy.integrate
import torch

from smalti.errors import SmaltiError
from smalti.prior.flow.path import LinearPath, TrigonometricPath, VEPath, VPLinearPath
from smalti.prior.flow.solvers.ancestral import DDIM
from smalti.prior.flow.solvers.base import SOLVERS, Solver, make_solver
from smalti.prior.flow.solvers.dormand_prince import NODES, ROWS, WEIGHTS, DormandPrince
from smalti.prior.flow.solvers.runge_kutta import (
    RK4,
    Euler,
    Heun,
    Midpoint,
    Tableau,
    runge_kutta_step,
)
from smalti.randomness import NormalSource

DOUBLE = torch.float64
MEAN, STD = [0.7, -1.2], [0.5, 1.5]


def grid(steps: int, start: float = 0.0, stop: float = 1.0) -> torch.Tensor:
    return torch.linspace(start, stop, steps + 1, dtype=DOUBLE)


def normal(rows: int, seed: int = 0) -> NormalSource:
    return NormalSource(torch.Generator().manual_seed(seed), rows)


def transported(path, x: torch.Tensor, start: float, stop: float) -> torch.Tensor:
    """The exact flow of the Gaussian N(MEAN, STD^2): (x - mean) / std is constant."""
    mean, std = torch.tensor(MEAN, dtype=DOUBLE), torch.tensor(STD, dtype=DOUBLE)
    times = torch.tensor([start, stop], dtype=DOUBLE)
    (a, b), (c, d) = path.alpha(times), path.sigma(times)
    before, after = (a**2 * std**2 + c**2).sqrt(), (b**2 * std**2 + d**2).sqrt()
    return b * mean + after / before * (x - a * mean)


@pytest.mark.parametrize(
    "path",
    [LinearPath(), TrigonometricPath(), VPLinearPath(), VEPath(sigma_max=5.0)],
    ids=lambda path: path.kind,
)
@pytest.mark.parametrize(
    ("solver", "order"), [(Euler(), 1), (Midpoint(), 2), (Heun(), 2), (RK4(), 4)]
)
def test_orders_of_convergence(mixtures, path, solver, order: int) -> None:
    stop = 0.8  # at 1 errors of some methods cancel on the linear path
    if (path.kind, order, solver) == ("linear", 2, Midpoint()):
        order = 3  # for Gaussian data, whose variance there is quadratic in t
    dynamics = mixtures.gaussian(MEAN, STD).dynamics(path)
    x = torch.randn(50, 2, dtype=DOUBLE)
    exact = transported(path, x, 0.0, stop)
    errors = [
        (solver.solve(dynamics, x, grid(n, 0.0, stop), normal(50)) - exact).square().mean().sqrt()
        for n in (40, 80)
    ]
    assert (errors[0] / errors[1]).log2().item() == pytest.approx(order, abs=0.3)


def test_dormand_and_prince_have_order_five(mixtures) -> None:
    tableau = Tableau(NODES, ROWS, WEIGHTS)
    dynamics = mixtures.gaussian(MEAN, STD).dynamics(LinearPath())
    x = torch.randn(50, 2, dtype=DOUBLE)
    errors = []
    for steps in (16, 32):
        moved = x
        for a, b in zip(grid(steps)[:-1].tolist(), grid(steps)[1:].tolist(), strict=True):
            moved = runge_kutta_step(dynamics.velocity, moved, a, b, tableau)
        errors.append((moved - transported(LinearPath(), x, 0.0, 1.0)).abs().max())
    assert (errors[0] / errors[1]).log2().item() == pytest.approx(5, abs=0.5)


@pytest.mark.parametrize(("start", "stop"), [(0.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("tolerance", [1e-3, 1e-6])
def test_every_sample_is_integrated_as_scipy_integrates_it_alone(
    mixtures, start, stop, tolerance
) -> None:
    data, path = mixtures.two(), LinearPath()
    x = torch.randn(6, 2, dtype=DOUBLE)
    calls = torch.zeros(1)

    def field(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        calls.add_(1)
        return data.predict("velocity", path, x, t)

    options = DormandPrince(rtol=tolerance, atol=1e-6)
    *_, ours = options.integrate(field, x, grid(1, start, stop))
    most = 0
    for i in range(6):
        theirs = scipy.integrate.solve_ivp(
            lambda t, y: data.predict(
                "velocity", path, torch.from_numpy(np.asarray(y))[None], torch.tensor([t])
            )[0].numpy(),
            (start, stop),
            x[i].numpy(),
            method="RK45",
            rtol=tolerance,
            atol=1e-6,
        )
        np.testing.assert_allclose(ours[i].numpy(), theirs.y[:, -1], rtol=1e-8, atol=1e-10)
        most = max(most, theirs.nfev)
    assert calls.item() == most  # as many evaluations as the slowest sample needs


def test_adaptive_steps_do_not_depend_on_the_neighbours(mixtures) -> None:
    data = mixtures.two()
    x = torch.randn(5, 2, dtype=DOUBLE)
    x[3] *= 20
    dynamics, solver = data.dynamics(LinearPath()), DormandPrince()
    together = solver.solve(dynamics, x, grid(1), normal(5))
    alone = torch.cat([solver.solve(dynamics, row[None], grid(1), normal(1)) for row in x])
    assert torch.equal(together, alone)


def test_the_adaptive_solver_meets_its_tolerance_at_all_times_of_the_grid_and_is_reversible(
    mixtures,
) -> None:
    path, x = TrigonometricPath(), torch.randn(20, 2, dtype=DOUBLE)
    dynamics = mixtures.gaussian(MEAN, STD).dynamics(path)
    solver = DormandPrince(rtol=1e-8, atol=1e-10)
    for time, state in zip(
        grid(4).tolist()[1:], solver.states(dynamics, x, grid(4), normal(20)), strict=True
    ):
        torch.testing.assert_close(state, transported(path, x, 0.0, time), rtol=1e-6, atol=1e-6)
    back = solver.solve(dynamics, state, grid(4).flip(0), normal(20))
    torch.testing.assert_close(back, x, rtol=1e-6, atol=1e-6)


def test_too_many_steps_and_nan_are_errors(mixtures) -> None:
    x = torch.randn(2, 2, dtype=DOUBLE)
    dynamics = mixtures.two().dynamics(LinearPath())
    with pytest.raises(SmaltiError, match="are not met in 3 steps: loosen them"):
        DormandPrince(max_steps=3).solve(dynamics, x, grid(1), normal(2))
    with pytest.raises(SmaltiError, match="the model gives NaN"):
        list(DormandPrince().integrate(lambda x, t: x * torch.nan, x, grid(1)))
    assert DormandPrince().solve(dynamics, x[:0], grid(3), normal(0)).shape == (0, 2)


def test_euler_is_diffusers_flow_matching_scheduler(mixtures) -> None:
    data, path = mixtures.two(), LinearPath()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=np.linspace(1, 0.1, 10))
    x = theirs = torch.randn(8, 2)
    for sigma, timestep in zip(scheduler.sigmas[:-1], scheduler.timesteps, strict=True):
        t = (1 - sigma).double().expand(8)
        velocity = data.predict("velocity", path, theirs.double(), t)
        theirs = scheduler.step(-velocity.float(), timestep, theirs).prev_sample
    ours = Euler().solve(data.dynamics(path), x.double(), grid(10), normal(8))
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("solver", [n for n in SOLVERS if SOLVERS.resolve(n)().lands_on_data])
def test_the_network_is_not_evaluated_at_the_end_by_solvers_that_land_on_data(
    mixtures, solver
) -> None:
    """Where sigma is 0 all return the data that the network expected at the previous time."""
    data, path, seen = mixtures.two(), VPLinearPath(), []
    exact = data.dynamics(path, "noise")

    def output(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append(t[0].item())
        return exact.output(x, t)

    dynamics = type(exact)(path, "noise", output)
    x = torch.randn(4, 2, dtype=DOUBLE)
    landed = make_solver(solver).solve(dynamics, x, grid(1, 0.9, 1.0), normal(4))
    assert max(seen) < 1
    torch.testing.assert_close(landed, exact.estimate(x, torch.full((4,), 0.9, dtype=DOUBLE)).data)


@pytest.mark.parametrize("name", list(SOLVERS))
def test_every_solver_reaches_gaussian_data(mixtures, name) -> None:
    """Contract: any solver, many steps, the right mean and standard deviation."""
    path = VEPath(sigma_max=10.0) if name == "langevin" else VPLinearPath()
    data, solver, random = mixtures.gaussian([0.6], [0.5]), make_solver(name), normal(4000)
    x = random(torch.empty(4000, 1, dtype=DOUBLE)) * path.marginal_std(grid(1))[0]
    end = 1.0 if solver.lands_on_data else 0.999
    sampled = solver.solve(data.dynamics(path), x, grid(250, 0.0, end), random)
    assert sampled.mean().item() == pytest.approx(0.6, abs=0.035)
    assert sampled.std().item() == pytest.approx(0.5, abs=0.035)


def test_solvers_by_name_with_options_and_errors() -> None:
    for name in SOLVERS:
        assert isinstance(make_solver(name), Solver)
    assert make_solver({"kind": "ddim", "eta": 0.5}) == DDIM(0.5)
    assert make_solver(DDIM(0.5)) == DDIM(0.5)
    for wrong, message in (
        ("huen", 'did you mean "heun"'),
        ({"kind": "ddim", "etta": 1.0}, 'solver ddim: unknown key "etta"; did you mean "eta"'),
        ({"eta": 1.0}, "give a name"),
        ({"kind": "ddim", "eta": 2.0}, r"eta is 2.0; it must lie in \[0, 1\]"),
        (
            {"kind": "ddpm", "variance": "big"},
            "variance is 'big'; choose one of auto, small, large",
        ),
        ({"kind": "dopri5", "rtol": 0.0}, "rtol, atol and max_steps are 0.0"),
        ({"kind": "euler-maruyama", "diffusion": "sigmo"}, 'did you mean "sigma"'),
        ({"kind": "langevin", "step_size": 1.5}, "0.1|1.5"),
    ):
        with pytest.raises(SmaltiError, match=message):
            make_solver(wrong)
