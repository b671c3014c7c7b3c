"""The bound that trains the variances of DDPM's steps: torch.distributions, and known optima."""

import math
from dataclasses import replace

import pytest
import torch
from chance import randomised
from torch.distributions import Normal, kl_divergence

from smalti.prior.flow.dit import DiTConfig
from smalti.prior.flow.path import DDPMPath, LinearPath, transition
from smalti.prior.flow.prediction import Estimate
from smalti.prior.flow.prior import FlowConfig, FlowPrior, bound_weight, variance_bound

PATH = DDPMPath(num_train_timesteps=50, beta_end=0.2)
CONFIG = FlowConfig(
    network=DiTConfig(
        in_channels=2,
        out_channels=4,
        grid=(4, 6),
        patch_size=2,
        width=16,
        depth=1,
        num_heads=2,
        num_classes=3,
        frequency_size=16,
    ),
    path=PATH,
    prediction="noise",
    time_scale=-50.0,
    time_shift=49.0,
)
LABELS = torch.tensor([0, 1, 2, 3])


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def estimate_of(
    t: torch.Tensor, data: torch.Tensor, noise: torch.Tensor, output: torch.Tensor
) -> Estimate:
    return Estimate(PATH, "noise", PATH.mix(data, noise, t), t, output)


@pytest.mark.parametrize("index", [1, 2, 20, 49])
def test_the_bound_is_the_divergence_of_the_two_steps(index: int) -> None:
    t = PATH.time_of_index(torch.tensor([index], dtype=torch.float64))
    data, noise, output = normal(1, 2, 4, 6), normal(1, 2, 4, 6, seed=1), normal(1, 4, 4, 6, seed=2)
    estimate = estimate_of(t, data, noise, output)
    to = transition(PATH, t.item(), t.item() + 1 / 50)
    share = (output[:, 2:] + 1) / 2
    std = (share * math.log(to.beta) + (1 - share) * math.log(to.beta_tilde)).div(2).exp()
    true = Normal(to.alpha * data + to.noise_weight * noise, math.sqrt(to.beta_tilde))
    claimed = Normal(to.alpha * estimate.data + to.noise_weight * estimate.noise, std)
    expected = kl_divergence(true, claimed).mean() / math.log(2)
    bound = variance_bound(PATH, estimate, data, noise)
    assert bound.item() == pytest.approx(expected.item(), rel=2e-4)


def test_the_bound_of_the_step_to_the_data_is_zero_with_a_finite_gradient() -> None:
    t = torch.tensor([1 - 1 / 50, 1 - 1e-3, 1.0], dtype=torch.float64)
    output = normal(3, 4, 4, 6).requires_grad_()
    bound = variance_bound(
        PATH, estimate_of(t, *normal(2, 3, 2, 4, 6), output), *normal(2, 3, 2, 4, 6)
    )
    assert torch.equal(bound, torch.zeros(3))
    bound.sum().backward()
    assert torch.equal(output.grad, torch.zeros_like(output))


def best_share(std: float, guess) -> float:
    """The share of log beta, in [0, 1], that minimises the mean bound for data N(0, std^2)."""
    t = PATH.time_of_index(torch.full((20_000,), 5.0, dtype=torch.float64))
    data, noise = std * normal(20_000, 1, 1, 1), normal(20_000, 1, 1, 1, seed=1)
    x = PATH.mix(data, noise, t)
    shares = torch.linspace(0, 1, 21)
    bounds = []
    for share in shares:
        output = torch.cat([guess(x, t), torch.full_like(x, 2 * share - 1)], 1)
        bounds.append(
            variance_bound(PATH, Estimate(PATH, "data", x, t, output), data, noise).mean()
        )
    return shares[torch.stack(bounds).argmin()].item()


def test_the_exact_variance_minimises_the_bound() -> None:
    """DDPM, section 3.2: beta for data N(0, 1), beta~ for a single point."""
    assert best_share(1.0, lambda x, t: PATH.alpha(t).float().view(-1, 1, 1, 1) * x) == 1.0
    assert best_share(0.0, lambda x, t: torch.zeros_like(x)) == 0.0


def test_the_bound_trains_the_variances_alone() -> None:
    data, noise = normal(4, 2, 4, 6), normal(4, 2, 4, 6, seed=1)
    output = normal(4, 4, 4, 6, seed=2).requires_grad_()
    t = torch.full((4,), 0.5)
    variance_bound(PATH, estimate_of(t, data, noise, output), data, noise).sum().backward()
    assert torch.equal(output.grad[:, :2], torch.zeros_like(data))
    assert (output.grad[:, 2:] != 0).all()


def test_the_loss_is_the_squared_error_and_the_bound() -> None:
    prior = randomised(FlowPrior(CONFIG), std=0.2).eval()
    loss = prior(normal(4, 2, 4, 6), LABELS)
    assert bound_weight(PATH) == pytest.approx(0.05)
    expected = loss.parts["mse"] + 0.05 * loss.parts["variance_bound"]
    assert loss.total.item() == pytest.approx(expected.item())
    straight = randomised(FlowPrior(replace(CONFIG, path=LinearPath())), std=0.2)
    assert set(straight(normal(4, 2, 4, 6), LABELS).parts) == {
        "mse"
    }  # as in SiT, which does not train them


def test_training_finds_variances_that_fit() -> None:
    torch.manual_seed(0)
    prior = FlowPrior(CONFIG).train()
    optimizer = torch.optim.Adam(prior.parameters(), 3e-3)
    data, labels = normal(64, 2, 4, 6), torch.arange(64) % 3
    before = prior.eval()(data, labels).parts["variance_bound"]
    for _ in range(60):
        loss = prior.train()(data, labels).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert prior.eval()(data, labels).parts["variance_bound"] < 0.7 * before
