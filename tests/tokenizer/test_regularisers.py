"""Penalties on a discriminator, against closed forms where its gradients are known."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from smalti.errors import SmaltiError
from smalti.tokenizer.discriminators.regularisers import (
    LeCam,
    PenaltyConfig,
    gradient_penalty,
    input_gradients,
    r1_penalty,
)

SHAPE = (3, 4, 4)


class Linear(nn.Module):
    """D(x) = <w, x>, in several logits that differ by constants."""

    def __init__(self, logits: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(SHAPE))
        self.offsets = torch.arange(float(logits))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (images * self.weight).sum((1, 2, 3))[:, None] + self.offsets


class Quadratic(nn.Module):
    """D(x) = a |x|^2 / 2, whose gradient is a x."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(1.5))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.factor * images.square().sum((1, 2, 3)) / 2


@pytest.mark.parametrize("logits", [1, 9])
def test_r1_of_a_linear_discriminator(logits: int) -> None:
    discriminator = Linear(logits)
    penalty = r1_penalty(discriminator, torch.randn(5, *SHAPE))
    torch.testing.assert_close(penalty, discriminator.weight.square().sum() / 2)
    penalty.backward()
    torch.testing.assert_close(
        discriminator.weight.grad, discriminator.weight.detach()
    )  # d(|w|^2 / 2) / dw


@pytest.mark.parametrize("logits", [1, 9])
def test_gradient_penalty_of_a_linear_discriminator(logits: int) -> None:
    discriminator = Linear(logits)
    a, b, mix = torch.randn(5, *SHAPE), torch.randn(5, *SHAPE), torch.rand(5)
    norm = discriminator.weight.detach().norm()
    penalty = gradient_penalty(discriminator, a, b, mix)
    torch.testing.assert_close(penalty.detach(), (norm - 1) ** 2)
    penalty.backward()
    torch.testing.assert_close(
        discriminator.weight.grad, 2 * (norm - 1) * discriminator.weight.detach() / norm
    )


def test_penalties_of_a_quadratic_discriminator_depend_on_the_images() -> None:
    discriminator, a, b = Quadratic(), torch.randn(5, *SHAPE), torch.randn(5, *SHAPE)
    expected = 1.5**2 * a.square().sum((1, 2, 3)).mean() / 2
    torch.testing.assert_close(r1_penalty(discriminator, a), expected)
    mix = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    mixed = torch.stack([m * x + (1 - m) * y for m, x, y in zip(mix, a, b, strict=True)])
    expected = (1.5 * mixed.flatten(1).norm(dim=1) - 1).square().mean()
    torch.testing.assert_close(gradient_penalty(discriminator, a, b, mix), expected)


def test_a_constant_discriminator_has_finite_gradients() -> None:
    discriminator = Linear()
    nn.init.zeros_(discriminator.weight)
    a = torch.randn(2, *SHAPE)
    penalty = gradient_penalty(discriminator, a, a, torch.rand(2))
    penalty.backward()
    torch.testing.assert_close(penalty.detach(), torch.tensor(1.0))
    assert discriminator.weight.grad is not None and discriminator.weight.grad.isfinite().all()


def test_penalties_are_computed_in_fp32_under_autocast() -> None:
    discriminator = nn.Sequential(nn.Conv2d(3, 8, 3), nn.LeakyReLU(), nn.Conv2d(8, 1, 2))
    images = torch.randn(2, *SHAPE)
    expected = input_gradients(discriminator, images)
    with torch.autocast("cpu", torch.bfloat16):
        found = input_gradients(discriminator, images)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_each_image_is_penalised_for_its_own_gradient() -> None:
    discriminator, images = Quadratic(), torch.randn(4, *SHAPE)
    parts = [r1_penalty(discriminator, image[None]) for image in images]
    torch.testing.assert_close(r1_penalty(discriminator, images), torch.stack(parts).mean())


def test_r1_is_lazy_and_costs_the_same_on_average() -> None:
    config = PenaltyConfig(r1_weight=0.5, r1_interval=4)
    strengths = [config.r1_strength(step) for step in range(12)]
    assert strengths == [0, 0, 0, 2] * 3
    assert sum(strengths) / len(strengths) == 0.5
    assert PenaltyConfig(r1_interval=4).r1_strength(3) == 0


def test_lecam_is_its_definition() -> None:
    lecam = LeCam(0.99)
    lecam.anchors.copy_(torch.tensor([0.5, -0.25]))
    real, fake = torch.randn(4, 1, 3, 3, requires_grad=True), torch.randn(4, 1, 3, 3)
    total = 0.0
    for r, f in zip(real.flatten().tolist(), fake.flatten().tolist(), strict=True):
        total += max(0, r + 0.25) ** 2 + max(0, 0.5 - f) ** 2
    loss = lecam(real, fake)
    assert loss.item() == pytest.approx(total / real.numel(), rel=1e-5)
    loss.backward()
    torch.testing.assert_close(real.grad, 2 * F.relu(real.detach() + 0.25) / real.numel())


def test_anchors_are_running_means_updated_once_per_step() -> None:
    lecam = LeCam(0.75)
    logits = torch.randn(8, 2, 6)  # steps, sides, pictures
    expected = torch.zeros(2)
    for step, (real, fake) in enumerate(logits):
        before = lecam.anchors.clone()
        for part in range(3):  # micro-batches
            lecam(real[2 * part : 2 * part + 2], fake[2 * part : 2 * part + 2])
            assert torch.equal(lecam.anchors, before)
        lecam.after_step()
        decay = min(step / (step + 1), 0.75)
        expected = decay * expected + (1 - decay) * torch.stack([real.mean(), fake.mean()])
        torch.testing.assert_close(lecam.anchors, expected)
    first = logits[:3].mean((0, 2))  # up to the decay they are plain means
    lecam = LeCam(0.75)
    for real, fake in logits[:3]:
        lecam(real, fake)
        lecam.after_step()
    torch.testing.assert_close(lecam.anchors, first)


def test_a_discarded_step_leaves_the_anchors_and_the_next_step_alone() -> None:
    lecam = LeCam(0.9)
    lecam(torch.full((2,), float("nan")), torch.zeros(2))
    lecam.discard_step()
    lecam.after_step()
    assert lecam.anchors.tolist() == [0, 0] and lecam.updates == 0
    lecam(torch.ones(2), torch.zeros(2))
    lecam.after_step()
    assert lecam.anchors.tolist() == [1, 0]


def test_anchors_are_saved() -> None:
    lecam, again = LeCam(0.9), LeCam(0.9)
    lecam(torch.ones(2), -torch.ones(2))
    lecam.after_step()
    again.load_state_dict(lecam.state_dict())
    assert again.anchors.tolist() == [1, -1] and again.updates == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r1_weight": -1.0}, "r1_weight is -1"),
        ({"gradient_penalty_weight": -1.0}, "gradient_penalty_weight is -1"),
        ({"lecam_weight": -1.0}, "lecam_weight is -1"),
        ({"r1_interval": 0}, "r1_interval is 0"),
        ({"lecam_decay": 1.0}, "lecam_decay is 1"),
    ],
)
def test_impossible_penalties_are_refused(options, message: str) -> None:
    with pytest.raises(SmaltiError, match=message):
        PenaltyConfig(**options)
