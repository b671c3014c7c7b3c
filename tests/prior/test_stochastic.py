"""Stochastic solvers: the marginals of the ODE, and samples that depend on their own generator."""

import pytest
import torch

from smalti.errors import SmaltiError
from smalti.prior.flow.path import LinearPath, TrigonometricPath, VEPath, VPLinearPath
from smalti.prior.flow.solvers.ancestral import DDIM, DDPM
from smalti.prior.flow.solvers.runge_kutta import Euler, Heun
from smalti.prior.flow.solvers.sde import DIFFUSIONS, EulerMaruyama, Langevin
from smalti.randomness import NormalSource

DOUBLE = torch.float64
COUNT = 20_000
FEWER = 8_000  # for a long solution


def grid(steps: int, start: float = 0.0, stop: float = 1.0) -> torch.Tensor:
    return torch.linspace(start, stop, steps + 1, dtype=DOUBLE)


def moments(x: torch.Tensor) -> torch.Tensor:
    """Of the mixture: share of the right component, then mean and std of each."""
    right = x[:, 0] > 0
    parts = [right.double().mean()[None]]
    for side in (x[~right], x[right]):
        parts += [side.mean(0), side.std(0)]
    return torch.cat(parts)


SOLVERS = {
    "heun": Heun(),
    "ddim": DDIM(0.0),
    "ddpm small": DDPM("small"),
    "ddpm large": DDPM("large"),
    **{f"sde {name}": EulerMaruyama(name) for name in DIFFUSIONS},
    "sde strong": EulerMaruyama("sigma", strength=4.0),
}


@pytest.mark.parametrize("name", list(SOLVERS))
@pytest.mark.parametrize("path", [LinearPath(), TrigonometricPath()], ids=lambda path: path.kind)
def test_ode_and_sde_have_the_marginals_of_the_data(mixtures, path, name) -> None:
    """Every w(t) gives the same share, mean and standard deviation of each component."""
    data, normal = mixtures.two(), NormalSource(torch.Generator().manual_seed(0), COUNT)
    x = normal(torch.empty(COUNT, 2, dtype=DOUBLE))
    sampled = SOLVERS[name].solve(data.dynamics(path), x, grid(150), normal)
    expected = moments(data.sample(200_000, torch.Generator().manual_seed(1)))
    # 20,000 samples know a share to 0.003; 150 steps leave a bias of the same size.
    torch.testing.assert_close(moments(sampled), expected, atol=0.025, rtol=0)


@pytest.mark.parametrize("path", [LinearPath(), VPLinearPath()], ids=lambda path: path.kind)
def test_the_marginals_agree_at_an_intermediate_time(mixtures, path) -> None:
    data, stop = mixtures.two(), 0.7
    start = NormalSource(torch.Generator().manual_seed(0), COUNT)(
        torch.empty(COUNT, 2, dtype=DOUBLE)
    )
    random = torch.Generator().manual_seed(1)
    exact = path.mix(
        data.sample(COUNT, random),
        torch.randn(COUNT, 2, dtype=DOUBLE, generator=random),
        torch.full((COUNT,), stop, dtype=DOUBLE),
    )
    for solver in (Heun(), EulerMaruyama("sigma"), EulerMaruyama("sbdm"), DDPM("small")):
        normal = NormalSource(torch.Generator().manual_seed(2), COUNT)
        x = solver.solve(data.dynamics(path), start, grid(100, 0.0, stop), normal)
        torch.testing.assert_close(x.mean(0), exact.mean(0), atol=0.03, rtol=0)
        torch.testing.assert_close(x.T.cov(), exact.T.cov(), atol=0.04, rtol=0)


def test_without_strength_the_sde_is_the_ode(mixtures) -> None:
    dynamics, x = mixtures.two().dynamics(LinearPath()), torch.randn(20, 2, dtype=DOUBLE)
    normal = NormalSource(None, 20)
    times = grid(10, 0.0, 0.9)
    torch.testing.assert_close(
        EulerMaruyama(strength=0.0).solve(dynamics, x, times, normal),
        Euler().solve(dynamics, x, times, normal),
    )


def test_a_step_is_euler_maruyama_with_and_without_the_limit_on_w(mixtures) -> None:
    """x + (v + w score) h + sqrt(2 w h) z for any w; with the limit, w h is a tenth of sigma^2."""
    path, t, h = LinearPath(), 0.5, 0.1
    dynamics, x = mixtures.two().dynamics(path), torch.randn(20, 2, dtype=DOUBLE)
    estimate = dynamics.estimate(x, torch.full((20,), t, dtype=DOUBLE))
    z = NormalSource(torch.Generator().manual_seed(3), 20)(x)
    for strength, ratio, w in ((1, None, 0.5), (9, None, 4.5), (1, 0.1, 0.16), (9, 0.1, 0.16)):
        solver = EulerMaruyama("sigma", strength, largest_ratio=ratio)
        normal = NormalSource(torch.Generator().manual_seed(3), 20)
        moved = solver.solve(dynamics, x, torch.tensor([t, t + h], dtype=DOUBLE), normal)
        expected = x + (estimate.velocity + w * estimate.score) * h + (2 * w * h) ** 0.5 * z
        torch.testing.assert_close(moved, expected)
    with pytest.raises(SmaltiError, match="largest_ratio is 2"):
        EulerMaruyama(largest_ratio=2)


def test_the_reverse_sde_of_score_models(mixtures) -> None:
    """dx = (f - g^2 score) dt + g dW backwards, with g^2 = beta, is w = beta / 2: "sbdm"."""
    path, t = VPLinearPath(), torch.tensor([0.2, 0.5, 0.8], dtype=DOUBLE)
    beta = path.beta_min + (1 - t) * (path.beta_max - path.beta_min)
    torch.testing.assert_close(DIFFUSIONS["sbdm"](path, t), beta / 2)
    # and v + w score = (x / 2 + score) beta, as f = -beta x / 2
    data, x = mixtures.two(), torch.randn(3, 2, dtype=DOUBLE)
    estimate = data.dynamics(path).estimate(x, t)
    drift = estimate.velocity + (beta / 2)[:, None] * estimate.score
    torch.testing.assert_close(drift, beta[:, None] * (x / 2 + estimate.score))


def test_euler_maruyama_is_its_definition(mixtures) -> None:
    path, x = LinearPath(), torch.randn(6, 2, dtype=DOUBLE)
    dynamics = mixtures.two().dynamics(path)
    times = torch.tensor([0.3, 0.301], dtype=DOUBLE)

    def fresh() -> NormalSource:
        return NormalSource(torch.Generator().manual_seed(3), 6)

    for name, w in (("constant", 1.0), ("sigma", 0.7), ("linear", 0.7), ("sbdm", 0.7 / 0.3)):
        estimate = dynamics.estimate(x, torch.full((6,), 0.3, dtype=DOUBLE))
        drift = estimate.velocity + w * estimate.score
        expected = x + drift * 1e-3 + (2 * w * 1e-3) ** 0.5 * fresh()(x)
        torch.testing.assert_close(EulerMaruyama(name).solve(dynamics, x, times, fresh()), expected)


def test_langevin_converges_to_the_marginal_of_the_last_level(mixtures) -> None:
    path, normal = VEPath(0.05, 5.0), NormalSource(torch.Generator().manual_seed(0), FEWER)
    data, x = mixtures.two(), 5 * normal(torch.empty(FEWER, 2, dtype=DOUBLE))
    sampled = Langevin(30, 0.05).solve(data.dynamics(path, "score"), x, grid(40), normal)
    expected = moments(data.sample(200_000, torch.Generator().manual_seed(1)))
    torch.testing.assert_close(moments(sampled), expected, atol=0.04, rtol=0)


def test_langevin_increases_the_variance_as_its_step_size_predicts(mixtures) -> None:
    """The stationary variance of x' = (1 - a / V) x + sqrt(2 a) z is V / (1 - a / 2V)."""
    path, normal = VEPath(1.0, 2.0), NormalSource(torch.Generator().manual_seed(0), COUNT)
    data, x = mixtures.gaussian([0.0], [0.5]), normal(torch.empty(COUNT, 1, dtype=DOUBLE))
    sampled = Langevin(60, 0.4).solve(data.dynamics(path), x, grid(1), normal)
    variance = 1.0 + 0.25
    expected = variance / (1 - 0.4 / (2 * variance))
    assert sampled.var().item() == pytest.approx(expected, rel=0.03)


def test_the_noise_of_a_sample_comes_from_its_own_generator(mixtures) -> None:
    dynamics, x = mixtures.two().dynamics(LinearPath()), torch.randn(3, 2, dtype=DOUBLE)

    def generators(*seeds: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    for solver in (EulerMaruyama(), DDPM(), DDIM(0.5), Langevin(2)):
        together = solver.solve(dynamics, x, grid(5), NormalSource(generators(1, 2, 3), 3))
        alone = solver.solve(dynamics, x[1:2], grid(5), NormalSource(generators(2), 1))
        assert torch.equal(together[1:2], alone)


def test_normal_numbers_are_normal_repeat_and_leave_the_global_state_alone() -> None:
    state, like = torch.get_rng_state(), torch.empty(1000, 50)
    sampled = NormalSource(None, 1000)(like)
    assert torch.equal(torch.get_rng_state(), state)
    assert abs(sampled.mean()) < 0.02 and abs(sampled.std() - 1) < 0.02
    one, two = (NormalSource(torch.Generator().manual_seed(4), 2) for _ in range(2))
    assert torch.equal(one(like[:2]), two(like[:2])) and not torch.equal(one(like[:2]), two(like))
    half = NormalSource(None, 2)(like[:2].bfloat16())
    assert half.dtype == torch.bfloat16
    assert NormalSource([], 0)(like[:0]).shape == (0, 50)
    with pytest.raises(SmaltiError, match="1 generators were given for 4 samples: give one each"):
        NormalSource([torch.Generator()], 4)


def test_descending_times_are_an_error(mixtures) -> None:
    dynamics, x = mixtures.two().dynamics(LinearPath()), torch.randn(3, 2, dtype=DOUBLE)
    with pytest.raises(SmaltiError, match=r"from 0.9 down to 0; use an ODE solver"):
        EulerMaruyama().solve(dynamics, x, grid(1, 0.9, 0.0), NormalSource(None, 3))
