"""Closed forms: the exact velocity and score of mixtures, and the flow matching objective."""

import pytest
import torch

from smalti.prior.flow.path import (
    LinearPath,
    TrigonometricPath,
    VEPath,
    VPCosinePath,
    VPLinearPath,
    expand_like,
)
from smalti.prior.flow.prediction import PREDICTIONS, Estimate, prediction_target

PATHS = [
    LinearPath(),
    LinearPath(sigma_min=0.1),
    TrigonometricPath(),
    VPLinearPath(),
    VPCosinePath(),
    VEPath(),
]
DOUBLE = torch.float64


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.kind)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_perfect_networks_of_all_predictions_agree(mixtures, path, prediction) -> None:
    data, x = mixtures.two(), torch.randn(40, 2, dtype=DOUBLE)
    t = torch.linspace(0.05, 0.95, 40, dtype=DOUBLE)
    estimate = data.dynamics(path, prediction).estimate(x, t)
    for target in PREDICTIONS:
        expected = data.predict(target, path, x, t)
        torch.testing.assert_close(getattr(estimate, target), expected, rtol=1e-7, atol=1e-7)
    leaf = x.clone().requires_grad_()
    (score,) = torch.autograd.grad(data.log_density(path, leaf, t).sum(), leaf)
    torch.testing.assert_close(estimate.score, score, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.kind)
def test_the_velocity_satisfies_the_continuity_equation(mixtures, path) -> None:
    """d/dt log p + v . grad log p + div v = 0."""
    data, x = mixtures.two(), torch.randn(30, 2, dtype=DOUBLE, requires_grad=True)
    t = torch.linspace(0.1, 0.9, 30, dtype=DOUBLE, requires_grad=True)
    score, rate = torch.autograd.grad(data.log_density(path, x, t).sum(), (x, t))
    velocity = data.predict("velocity", path, x, t)
    divergence = sum(
        torch.autograd.grad(velocity[:, i].sum(), x, retain_graph=True)[0][:, i] for i in range(2)
    )
    balance = rate + (velocity * score).sum(1) + divergence
    scale = rate.abs() + (velocity * score).sum(1).abs() + 1
    assert (balance.abs() / scale).max() < 1e-7


@pytest.mark.parametrize("path", [LinearPath(), TrigonometricPath()], ids=lambda path: path.kind)
def test_conditional_and_marginal_flow_matching_have_the_same_gradient(mixtures, path) -> None:
    """Lipman et al., 2210.02747, theorem 2; for a model linear in its parameters, per sample."""
    random = torch.Generator().manual_seed(0)
    data, count = mixtures.two(), 200_000
    x1 = data.sample(count, random)
    x0 = torch.randn(count, 2, generator=random, dtype=DOUBLE)
    t = torch.rand(count, generator=random, dtype=DOUBLE)
    x = path.mix(x1, x0, t)
    features = torch.stack([torch.ones_like(t), t, x[:, 0], x[:, 1], x[:, 0] * t, x[:, 1] ** 2], 1)
    weights = torch.randn(6, 2, generator=random, dtype=DOUBLE)
    model = features @ weights
    conditional = model - prediction_target("velocity", path, x1, x0, t)
    marginal = model - data.predict("velocity", path, x, t)
    # Gradients of the squared errors with respect to the weights, sample by sample.
    difference = features[:, :, None] * (conditional - marginal)[:, None, :]
    z = difference.mean(0) / (difference.std(0) / count**0.5)
    assert z.abs().max() < 4
    gradient = (features[:, :, None] * marginal[:, None, :]).mean(0)
    assert gradient.abs().max() > 20 * (difference.std(0) / count**0.5).max()


def test_the_variance_output_is_separate_from_the_prediction() -> None:
    x, output, t = torch.randn(2, 3, 4, 4), torch.randn(2, 6, 4, 4), torch.full((2,), 0.5)
    estimate = Estimate(LinearPath(), "velocity", x, t, output)
    assert torch.equal(estimate.velocity, output[:, :3])
    assert torch.equal(estimate.variance_output, output[:, 3:])
    torch.testing.assert_close(estimate.data, x + expand_like(1 - t, x) * output[:, :3])
