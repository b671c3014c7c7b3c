"""Losses of stage one: schedule, weights and parts from their definitions."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from smalti.data.latents import rounded
from smalti.errors import SmaltiError
from smalti.tokenizer.base import Reconstruction
from smalti.tokenizer.discriminators.adversarial import ADVERSARIAL_LOSSES, compute_adaptive_weight
from smalti.tokenizer.discriminators.augmentation import AugmentConfig, augment
from smalti.tokenizer.discriminators.patchgan import PatchGAN, PatchGANConfig
from smalti.tokenizer.discriminators.regularisers import PenaltyConfig
from smalti.tokenizer.losses.objective import (
    UNIFORMS_PER_IMAGE,
    DiscriminatorObjective,
    LossNetworks,
    ObjectiveConfig,
    ObjectiveLoss,
    frozen,
    generator_loss,
    gram_distance,
    gram_matrices,
)
from smalti.tokenizer.losses.perceptual import LPIPS

CONFIG = ObjectiveConfig(
    l1_weight=0.5, adversarial_start=10, adversarial_ramp=4, discriminator=PatchGANConfig(8, 1)
)
UNIFORMS = torch.rand(2, UNIFORMS_PER_IMAGE, generator=torch.Generator().manual_seed(5))


def test_the_adversarial_loss_starts_late_and_ramps_up_linearly() -> None:
    strengths = [CONFIG.adversarial_strength(step) for step in (0, 9, 10, 11, 13, 99)]
    assert strengths == pytest.approx([0, 0, 0.125, 0.25, 0.5, 0.5])
    assert replace(CONFIG, adversarial_weight=0.0).adversarial_strength(99) == 0


def test_networks_are_needed_only_where_their_weight_is_positive() -> None:
    assert CONFIG.needs_discriminator and CONFIG.needs_features
    plain = replace(CONFIG, adversarial_weight=0.0, perceptual_weight=0.0)
    assert not plain.needs_discriminator and not plain.needs_features
    assert replace(plain, gram_weight=1.0).needs_features


class Setup:
    """A one-layer decoder, its output, a discriminator and LPIPS."""

    def __init__(self) -> None:
        self.layer = nn.Conv2d(3, 3, 1)
        self.images = torch.rand(2, 3, 32, 32) * 2 - 1
        self.loss_networks = LossNetworks(LPIPS.from_embedded(), PatchGAN(PatchGANConfig(8, 1), 32))

    def loss(self, config: ObjectiveConfig, step: int, **options) -> ObjectiveLoss:
        output = self.layer(self.images)
        return generator_loss(
            config,
            self.loss_networks,
            Reconstruction(output, self.images, {"codebook": torch.tensor(0.25)}),
            uniforms=UNIFORMS,
            last_layer=self.layer.weight,
            step=step,
            **options,
        )

    def gradient(self, config: ObjectiveConfig, step: int, **options) -> torch.Tensor:
        self.layer.zero_grad()
        self.loss(config, step, **options).total.backward()
        assert self.layer.weight.grad is not None
        return self.layer.weight.grad.clone()


@pytest.mark.parametrize(
    "change",
    [
        {"l1_weight": 2.0},
        {"l2_weight": 2.0},
        {"perceptual_weight": 2.0},
        {"gram_weight": 2.0},
        {"adversarial_weight": 2.0},
        {"adversarial_loss": "vanilla"},
        {"adversarial_loss": "non-saturating"},
        {"augment": AugmentConfig(colour=1.0)},
        {"augment": AugmentConfig(translation=0.125)},
        {"augment": AugmentConfig(cutout=0.5)},
        {"adaptive": True},
    ],
)
def test_every_option_changes_the_gradient_of_the_decoder(change) -> None:
    setup = Setup()
    base = setup.gradient(CONFIG, step=100)
    assert not torch.allclose(base, setup.gradient(replace(CONFIG, **change), step=100))


def test_the_wasserstein_generator_loss_is_that_of_hinge() -> None:
    setup = Setup()
    penalties = PenaltyConfig(gradient_penalty_weight=10.0)
    config = replace(CONFIG, adversarial_loss="wasserstein", penalties=penalties)
    assert torch.equal(setup.gradient(config, 100), setup.gradient(CONFIG, 100))


def test_the_gradient_is_the_weighted_sum_of_its_terms() -> None:
    """Each weight scales its own gradient and no other's."""
    setup = Setup()
    off = {"l1_weight": 0.0, "l2_weight": 0.0, "perceptual_weight": 0.0, "adversarial_weight": 0.0}
    weights = {"l1_weight": 0.5, "l2_weight": 2.0, "perceptual_weight": 0.7, "gram_weight": 0.3}
    alone = {name: setup.gradient(replace(CONFIG, **{**off, name: 1.0}), 100) for name in weights}
    adversarial = replace(CONFIG, **{**off, "l1_weight": 1.0, "adversarial_weight": 1.0})
    alone["adversarial_weight"] = setup.gradient(adversarial, 100) - alone["l1_weight"]
    weights["adversarial_weight"] = 0.9
    together = setup.gradient(replace(CONFIG, **weights), 100)
    expected = sum(weights[name] * alone[name] for name in weights)
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-6)


def test_total_is_the_sum_of_the_parts_and_parts_appear_with_a_weight() -> None:
    setup = Setup()
    early, late = setup.loss(CONFIG, 0), setup.loss(CONFIG, 100)
    assert set(early.parts) == {"l1", "l2", "perceptual", "codebook"}
    assert set(late.parts) == {*early.parts, "adversarial"}
    assert set(setup.loss(replace(CONFIG, gram_weight=1.0), 0).parts) == {*early.parts, "gram"}
    torch.testing.assert_close(late.total.detach(), sum(late.parts.values()))


def test_adaptive_weight_equates_both_gradients() -> None:
    """With weight 1 the adversarial gradient is as long as the reconstruction's."""
    setup = Setup()
    config = replace(CONFIG, adversarial_weight=1.0, adaptive=True, adversarial_loss="vanilla")
    reconstruction_loss = setup.gradient(config, 0)
    both = setup.gradient(config, 100)
    torch.testing.assert_close(
        (both - reconstruction_loss).norm(), reconstruction_loss.norm(), rtol=1e-2, atol=0
    )
    given = setup.gradient(config, 100, adaptive_weight=torch.tensor(3.0))
    plain = setup.gradient(replace(config, adaptive=False), 100)
    torch.testing.assert_close(
        given - reconstruction_loss, 3 * (plain - reconstruction_loss), rtol=1e-3, atol=1e-5
    )


def test_adaptive_weight_is_not_computed_before_the_adversarial_start(monkeypatch) -> None:
    from smalti.tokenizer.losses import objective

    calls = []

    def measured(gradients):
        calls.append(True)
        return compute_adaptive_weight(gradients)

    monkeypatch.setattr(objective, "compute_adaptive_weight", measured)
    setup, config = Setup(), replace(CONFIG, adaptive=True)
    setup.loss(config, 9)
    assert not calls
    setup.loss(config, 10)
    assert calls


def test_the_generator_loss_gives_the_discriminator_no_gradients() -> None:
    setup = Setup()
    setup.gradient(CONFIG, 100)
    assert setup.loss_networks.discriminator is not None
    assert all(
        p.grad is None and p.requires_grad for p in setup.loss_networks.discriminator.parameters()
    )


def test_what_was_frozen_stays_frozen() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
    with pytest.raises(KeyError), frozen(network):
        assert not any(p.requires_grad for p in network.parameters())
        raise KeyError
    assert [p.requires_grad for p in network.parameters()] == [True, True, False, False]


# -- the discriminator's objective --------------------------------------------------------------


def objective_of(**changes) -> DiscriminatorObjective:
    torch.manual_seed(3)
    return DiscriminatorObjective(replace(CONFIG, **changes), 32)


def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(2, 3, 32, 32) * 2 - 1, torch.randn(2, 3, 32, 32)


@pytest.mark.parametrize("name", ADVERSARIAL_LOSSES)
def test_the_discriminator_minimises_its_loss_on_eight_bit_images(name) -> None:
    objective = objective_of(
        adversarial_loss=name, penalties=PenaltyConfig(gradient_penalty_weight=1.0)
    )
    images, fakes = pictures()
    loss = objective(images, fakes, UNIFORMS, 0)
    real, fake = (objective.discriminator(rounded(x)) for x in (images, fakes))
    expected = ADVERSARIAL_LOSSES[name].discriminator(real, fake)
    torch.testing.assert_close(loss.parts["discriminator"], expected.detach())
    torch.testing.assert_close(loss.parts["logits_real"], real.detach().mean())
    torch.testing.assert_close(loss.parts["logits_fake"], fake.detach().mean())


def test_the_discriminator_gets_detached_eight_bit_fakes() -> None:
    seen = []
    objective = objective_of()
    objective.discriminator.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    images, fakes = pictures()
    images = rounded(images)
    fakes.requires_grad_()
    objective(images, fakes, UNIFORMS, 0).total.backward()
    assert fakes.grad is None
    torch.testing.assert_close(seen[0], rounded(seen[0]))
    assert torch.equal(seen[0][:2], images) and seen[0].abs().max() <= 1
    assert all(p.grad is not None for p in objective.parameters())


def test_both_sides_see_the_same_augmentation() -> None:
    seen = []
    setup, config = Setup(), replace(CONFIG, augment=AugmentConfig(1.0, 0.125, 0.5))
    objective = DiscriminatorObjective(config, 32)
    setup.loss_networks.discriminator = objective.discriminator
    objective.discriminator.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].detach())
    )
    setup.loss(config, 100)
    output = setup.layer(setup.images).detach()
    objective(setup.images, output, UNIFORMS, 0)
    assert torch.equal(seen[0], augment(output, config.augment, UNIFORMS))
    assert torch.equal(seen[1][:2], augment(rounded(setup.images), config.augment, UNIFORMS))
    assert torch.equal(seen[1][2:], augment(rounded(output), config.augment, UNIFORMS))


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"r1_weight": 1.0}, "r1"),
        ({"gradient_penalty_weight": 1.0}, "gradient_penalty"),
        ({"lecam_weight": 1.0}, "lecam"),
    ],
)
def test_every_penalty_changes_the_gradient_of_the_discriminator(changes, part: str) -> None:
    images, fakes = pictures()

    def gradient(**options):
        objective = objective_of(penalties=PenaltyConfig(**options))
        loss = objective(images, fakes, UNIFORMS, 15)  # a step at which R1 is due
        loss.total.backward()
        return torch.cat([p.grad.flatten() for p in objective.parameters()]), loss  # type: ignore[union-attr]

    plain, without = gradient()
    once, loss = gradient(**changes)
    (name,) = changes
    twice, _ = gradient(**{name: 2.0})
    assert part in loss.parts and part not in without.parts
    torch.testing.assert_close(loss.total, without.total + loss.parts[part])
    assert not torch.allclose(once, plain)
    torch.testing.assert_close(twice - plain, 2 * (once - plain), rtol=1e-3, atol=1e-4)


def test_r1_is_due_every_interval() -> None:
    objective, (images, fakes) = objective_of(penalties=PenaltyConfig(1.0, 4)), pictures()
    due = ["r1" in objective(images, fakes, UNIFORMS, step).parts for step in range(8)]
    assert due == [False, False, False, True] * 2


def test_micro_batches_give_the_gradient_of_the_whole_batch() -> None:
    """With every penalty, every augmentation and spectral norms."""
    objective = objective_of(
        discriminator=PatchGANConfig(8, 1, "spectral"),
        augment=AugmentConfig(1.0, 0.125, 0.5),
        penalties=PenaltyConfig(1.0, 1, 1.0, 1.0),
    )
    images, fakes = torch.rand(8, 3, 32, 32) * 2 - 1, torch.rand(8, 3, 32, 32) * 2 - 1
    batch = images, fakes, torch.rand(8, UNIFORMS_PER_IMAGE)

    def step(chunks: int) -> tuple[list[torch.Tensor], torch.Tensor]:
        objective.zero_grad()
        for part in zip(*(x.chunk(chunks) for x in batch), strict=True):
            (objective(*part, 0).total / chunks).backward()
        assert objective.lecam is not None
        pending = torch.stack(objective.lecam._pending).mean(0)
        objective.discard_step()
        return [p.grad.clone() for p in objective.parameters()], pending  # type: ignore[union-attr]

    (whole, means), (parts, means_of_parts) = step(1), step(4)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(means_of_parts, means)


def test_anchors_and_power_iterations_are_updated_after_the_step_and_saved() -> None:
    objective = objective_of(
        discriminator=PatchGANConfig(8, 1, "spectral"), penalties=PenaltyConfig(lecam_weight=0.1)
    )
    images, fakes = pictures()
    before = {k: v.clone() for k, v in objective.state_dict().items()}
    objective(images, fakes, UNIFORMS, 0)
    assert all(torch.equal(v, before[k]) for k, v in objective.state_dict().items())
    objective.after_step()
    moved = {k for k, v in objective.state_dict().items() if not torch.equal(v, before[k])}
    assert {
        "lecam.anchors",
        "lecam.updates",
        "discriminator.main.0.u",
        "discriminator.main.0.v",
    } <= moved
    assert not any(k.endswith("weight") for k in moved)


# -- gram ---------------------------------------------------------------------------------------


def test_gram_matrices_are_mean_products() -> None:
    features = torch.randn(2, 3, 4, 5)
    expected = torch.zeros(2, 3, 3)
    for row in range(4):
        for column in range(5):
            at = features[:, :, row, column]
            expected += at[:, :, None] * at[:, None, :] / 20
    torch.testing.assert_close(gram_matrices(features), expected)


def test_gram_distance_is_that_of_gatys_and_ignores_positions() -> None:
    a, b = [torch.randn(2, 3, 4, 5), torch.randn(2, 6, 2, 2)], [torch.randn(2, 3, 4, 5)] * 2
    b[1] = torch.randn(2, 6, 2, 2)
    expected = torch.zeros(2)
    for x, y in zip(a, b, strict=True):
        channels, positions = x.shape[1], x[0, 0].numel()
        difference = torch.einsum("bchw,bdhw->bcd", x, x) - torch.einsum("bchw,bdhw->bcd", y, y)
        expected += difference.square().sum((1, 2)) / (4 * channels**2 * positions**2) / 2
    torch.testing.assert_close(gram_distance(a, b), expected)
    shuffled = [x.flatten(2)[..., torch.randperm(x[0, 0].numel())].view_as(x) for x in a]
    torch.testing.assert_close(gram_distance(a, shuffled), torch.zeros(2), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"l1_weight": -1.0}, "negative"),
        ({"gram_weight": -1.0}, "negative"),
        ({"l2_weight": 0.0, "perceptual_weight": 0.0}, "nothing to learn"),
        ({"adversarial_start": -1}, "must not be negative"),
        ({"adversarial_loss": "wasserstein"}, "gradient_penalty_weight"),
    ],
)
def test_impossible_objectives_are_refused(options, message: str) -> None:
    with pytest.raises(SmaltiError, match=message):
        ObjectiveConfig(**options)
