"""Losses of stage one: signs, magnitudes, schedule and weights from their definitions."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from smalti.errors import SmaltiError
from smalti.tokenizer.adversarial import (
    adaptive_weight,
    hinge_discriminator_loss,
    hinge_generator_loss,
    round_to_uint8,
)
from smalti.tokenizer.base import Reconstruction
from smalti.tokenizer.discriminator import PatchGAN, PatchGANConfig
from smalti.tokenizer.objective import ObjectiveConfig, discriminator_loss, generator_loss

CONFIG = ObjectiveConfig(
    l1_weight=0.5, adversarial_start=10, adversarial_ramp=4, discriminator=PatchGANConfig(8, 1)
)


def test_hinge_gradients_have_the_right_sign_and_saturate() -> None:
    real = torch.tensor([-2.0, 0.0, 2.0], requires_grad=True)
    fake = torch.tensor([-2.0, 0.0, 2.0], requires_grad=True)
    hinge_discriminator_loss(real, fake).backward()
    # Averages over 3 logits and 2 terms; past the margin of 1 there is nothing left to learn.
    assert real.grad.tolist() == pytest.approx([-1 / 6, -1 / 6, 0])
    assert fake.grad.tolist() == pytest.approx([0, 1 / 6, 1 / 6])
    logits = torch.zeros(4, requires_grad=True)
    hinge_generator_loss(logits).backward()
    assert logits.grad.tolist() == pytest.approx([-0.25] * 4)


def test_adaptive_weight_is_the_ratio_of_gradient_norms() -> None:
    layer = nn.Parameter(torch.randn(3, 4))
    a, b = (layer.square().sum(), (3 * layer).sum())
    expected = (2 * layer).norm() / ((torch.full_like(layer, 3.0)).norm() + 1e-4)
    weight = adaptive_weight(a, b, layer)
    torch.testing.assert_close(weight, expected.detach())
    assert not weight.requires_grad
    assert adaptive_weight(1e9 * a, 1e-9 * b, layer) == 1e4  # clamped


def test_the_critic_is_heard_late_and_gradually() -> None:
    heard = [CONFIG.adversarial_strength(step) for step in (0, 9, 10, 11, 13, 99)]
    assert heard == pytest.approx([0, 0, 0.125, 0.25, 0.5, 0.5])
    assert replace(CONFIG, adversarial_weight=0.0).adversarial_strength(99) == 0


class Setup:
    """A one-layer decoder, its output, a critic and a stand-in for LPIPS."""

    def __init__(self) -> None:
        self.layer = nn.Conv2d(3, 3, 1)
        self.images = torch.rand(2, 3, 16, 16) * 2 - 1
        self.critic = PatchGAN(CONFIG.discriminator).requires_grad_(False)

    def loss(self, config: ObjectiveConfig, step: int):
        output = Reconstruction(self.layer(self.images), {"codebook": torch.tensor(0.25)})
        distance = lambda a, b: (a - b).abs().mean((1, 2, 3))  # noqa: E731
        return generator_loss(
            config,
            output,
            self.images,
            perceptual=distance,  # type: ignore[arg-type]
            discriminator=self.critic,
            last_layer=self.layer.weight,
            step=step,
        )

    def gradient(self, config: ObjectiveConfig, step: int) -> torch.Tensor:
        self.layer.zero_grad()
        self.loss(config, step).total.backward()
        assert self.layer.weight.grad is not None
        return self.layer.weight.grad.clone()


@pytest.mark.parametrize(
    "change",
    [
        {"l1_weight": 2.0},
        {"l2_weight": 2.0},
        {"perceptual_weight": 2.0},
        {"adversarial_weight": 2.0},
        {"adaptive": True},
    ],
)
def test_every_weight_changes_the_gradient_of_the_decoder(change) -> None:
    setup = Setup()
    base = setup.gradient(CONFIG, step=100)
    assert not torch.allclose(base, setup.gradient(replace(CONFIG, **change), step=100))


def test_total_is_the_sum_of_the_parts_and_parts_appear_when_they_count() -> None:
    setup = Setup()
    early, late = setup.loss(CONFIG, 0), setup.loss(CONFIG, 100)
    assert set(early.parts) == {"l1", "l2", "perceptual", "codebook"}
    assert set(late.parts) == {*early.parts, "adversarial"}
    torch.testing.assert_close(late.total.detach(), sum(late.parts.values()))


def test_the_critic_sees_detached_eight_bit_fakes() -> None:
    seen = []
    critic = PatchGAN(CONFIG.discriminator)
    critic.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    images = round_to_uint8(torch.rand(2, 3, 16, 16) * 2 - 1)
    fakes = torch.randn(2, 3, 16, 16, requires_grad=True)
    discriminator_loss(critic, images, fakes).total.backward()
    assert fakes.grad is None
    torch.testing.assert_close(seen[0], round_to_uint8(seen[0]))
    assert torch.equal(seen[0][:2], images) and seen[0].abs().max() <= 1
    assert all(p.grad is not None for p in critic.parameters())


@pytest.mark.parametrize("norm", ["group", "spectral"])
def test_a_critic_learns_to_tell_dark_from_bright(norm) -> None:
    critic = PatchGAN(PatchGANConfig(8, 1, norm))
    optimizer = torch.optim.Adam(critic.parameters(), lr=1e-2)
    images, fakes = torch.full((4, 3, 16, 16), 0.5), torch.full((4, 3, 16, 16), -0.5)
    fakes = fakes + 0.1 * torch.randn_like(fakes)
    for _ in range(60):
        loss = discriminator_loss(critic, images, fakes).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.3
    assert critic(images).mean() > 0 > critic(fakes).mean()


def test_critic_judges_patches() -> None:
    assert PatchGAN(PatchGANConfig(8, 3))(torch.zeros(1, 3, 64, 64)).shape == (1, 1, 6, 6)
    with pytest.raises(SmaltiError, match="num_layers is 9"):
        PatchGANConfig(num_layers=9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"l1_weight": -1.0}, "negative"),
        ({"l2_weight": 0.0, "perceptual_weight": 0.0}, "nothing to learn"),
        ({"adversarial_start": -1}, "must not be negative"),
    ],
)
def test_impossible_objectives_are_refused(options, message: str) -> None:
    with pytest.raises(SmaltiError, match=message):
        ObjectiveConfig(**options)
