"""Adversarial losses: values, signs and magnitudes from closed forms; the adaptive weight."""

import math

import pytest
import torch
from torch import nn

from smalti.tokenizer.discriminators.adversarial import (
    ADVERSARIAL_LOSSES,
    compute_adaptive_weight,
    last_layer_gradients,
)

LOGITS = (-30.0, -2.0, -0.5, 0.0, 0.5, 2.0, 30.0)


def logistic(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))


# Gradients of one logit: of the discriminator's loss on a real and on a fake image, and of the
# generator's loss on a fake image.
GRADIENTS = {
    "hinge": (lambda r: -0.5 * (r < 1), lambda f: 0.5 * (f > -1), lambda f: -1.0),
    "non-saturating": (
        lambda r: -0.5 * logistic(-r),
        lambda f: 0.5 * logistic(f),
        lambda f: -logistic(-f),
    ),
    "vanilla": (
        lambda r: -0.5 * logistic(-r),
        lambda f: 0.5 * logistic(f),
        lambda f: -logistic(f),
    ),
    "wasserstein": (lambda r: -1.0, lambda f: 1.0, lambda f: -1.0),
}
# Values of the discriminator's and of the generator's loss at one real and one fake logit.
VALUES = {
    "hinge": (lambda r, f: (max(0, 1 - r) + max(0, 1 + f)) / 2, lambda f: -f),
    "non-saturating": (
        lambda r, f: -(math.log(logistic(r)) + math.log(logistic(-f))) / 2,
        lambda f: -math.log(logistic(f)),
    ),
    "vanilla": (
        lambda r, f: -(math.log(logistic(r)) + math.log(logistic(-f))) / 2,
        lambda f: math.log(logistic(-f)),
    ),
    "wasserstein": (lambda r, f: f - r, lambda f: -f),
}


@pytest.mark.parametrize("name", ADVERSARIAL_LOSSES)
def test_gradients_of_every_loss_are_its_closed_form(name) -> None:
    real = torch.tensor(LOGITS, dtype=torch.double, requires_grad=True)
    fake = torch.tensor(LOGITS, dtype=torch.double, requires_grad=True)
    ADVERSARIAL_LOSSES[name].discriminator(real, fake).backward()
    on_real, on_fake, on_generator = GRADIENTS[name]
    count = len(LOGITS)
    assert real.grad is not None and fake.grad is not None
    assert (real.grad * count).tolist() == pytest.approx([on_real(r) for r in LOGITS], abs=1e-12)
    assert (fake.grad * count).tolist() == pytest.approx([on_fake(f) for f in LOGITS], abs=1e-12)
    assert (real.grad <= 0).all() and (fake.grad >= 0).all()  # real logits grow, fake ones shrink
    logits = torch.tensor(LOGITS, dtype=torch.double, requires_grad=True)
    ADVERSARIAL_LOSSES[name].generator(logits).backward()
    assert logits.grad is not None
    expected = [on_generator(f) for f in LOGITS]
    assert (logits.grad * count).tolist() == pytest.approx(expected, abs=1e-12)
    assert (logits.grad < 0).all()  # fake logits grow


@pytest.mark.parametrize("name", ADVERSARIAL_LOSSES)
@pytest.mark.parametrize(("real", "fake"), [(0.0, 0.0), (0.3, -0.7), (-2.0, 3.0), (5.0, -5.0)])
def test_values_of_every_loss(name, real: float, fake: float) -> None:
    discriminator, generator = VALUES[name]
    tensors = torch.tensor([[real]]), torch.tensor([[fake]])
    assert ADVERSARIAL_LOSSES[name].discriminator(*tensors).item() == pytest.approx(
        discriminator(real, fake)
    )
    assert ADVERSARIAL_LOSSES[name].generator(tensors[1]).item() == pytest.approx(generator(fake))


@pytest.mark.parametrize("name", ADVERSARIAL_LOSSES)
def test_losses_are_means_over_logits_of_any_shape(name) -> None:
    real, fake = torch.randn(4, 1, 3, 3), torch.randn(4, 1, 3, 3)
    flat = ADVERSARIAL_LOSSES[name].discriminator(real.flatten(), fake.flatten())
    torch.testing.assert_close(ADVERSARIAL_LOSSES[name].discriminator(real, fake), flat)
    halves = [ADVERSARIAL_LOSSES[name].generator(part) for part in fake.chunk(2)]
    torch.testing.assert_close(ADVERSARIAL_LOSSES[name].generator(fake), sum(halves) / 2)


def test_the_original_loss_saturates_and_the_non_saturating_one_does_not() -> None:
    """Where the discriminator is sure of a fake only one of the two still has a gradient."""
    sure = torch.tensor([-20.0], requires_grad=True)
    for name, least, most in (("vanilla", 0, 1e-8), ("non-saturating", 1 - 1e-8, 1)):
        (gradient,) = torch.autograd.grad(ADVERSARIAL_LOSSES[name].generator(sure), sure)
        assert least <= gradient.abs().item() <= most


def test_adaptive_weight_is_the_ratio_of_gradient_norms() -> None:
    layer = nn.Parameter(torch.randn(3, 4))
    a, b = layer.square().sum(), (3 * layer).sum()
    expected = (2 * layer).norm() / (torch.full_like(layer, 3.0).norm() + 1e-4)
    weight = compute_adaptive_weight([last_layer_gradients(a, b, layer)])
    torch.testing.assert_close(weight, expected.detach())
    assert not weight.requires_grad
    huge = last_layer_gradients(1e9 * a, 1e-9 * b, layer)
    assert compute_adaptive_weight([huge]) == 1e4  # clamped
    assert compute_adaptive_weight([torch.zeros(2, 3, 4)]) == 0


def test_adaptive_weight_of_micro_batches_is_that_of_the_whole_batch() -> None:
    layer, inputs = nn.Parameter(torch.randn(5)), torch.randn(12, 5)
    losses = lambda x: ((x @ layer).square().mean(), (x @ layer).sin().mean())  # noqa: E731
    whole = compute_adaptive_weight([last_layer_gradients(*losses(inputs), layer)])
    parts = [last_layer_gradients(*losses(x), layer) for x in inputs.chunk(4)]
    torch.testing.assert_close(compute_adaptive_weight(parts), whole)
    mean_of_ratios = torch.stack([compute_adaptive_weight([part]) for part in parts]).mean()
    assert not torch.allclose(mean_of_ratios, whole, rtol=0.05)  # what it is not


def test_gradients_of_the_last_layer_leave_the_graph_alone() -> None:
    layer = nn.Parameter(torch.randn(5))
    loss = layer.square().sum()
    last_layer_gradients(loss, layer.sum(), layer)
    assert layer.grad is None
    loss.backward()
    assert layer.grad is not None
