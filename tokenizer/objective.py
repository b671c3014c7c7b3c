"""The training objective of stage one: pixels + perception + critic (VQGAN, 2012.09841, eq. 6)."""

from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor, nn

from smalti.errors import SmaltiError
from smalti.tokenizer.adversarial import (
    adaptive_weight,
    hinge_discriminator_loss,
    hinge_generator_loss,
    round_to_uint8,
)
from smalti.tokenizer.base import Reconstruction
from smalti.tokenizer.discriminator import PatchGANConfig


@dataclass(frozen=True)
class ObjectiveConfig:
    """Weights of the losses; a weight of 0 leaves that loss, and its network, out."""

    l1_weight: float = 0.0
    l2_weight: float = 1.0
    perceptual_weight: float = 1.0  # LPIPS
    adversarial_weight: float = 0.5
    adaptive: bool = False  # also multiply by |grad reconstruction| / |grad adversarial|
    # The critic learns from step 0; what it says reaches the generator later, and gradually:
    # switching on both at once is the best-known way to wreck a tokenizer.
    adversarial_start: int = 20_000  # first step at which the generator hears the critic
    adversarial_ramp: int = 1_000  # steps from weight 0 to the full weight
    discriminator: PatchGANConfig = field(default_factory=PatchGANConfig)

    def __post_init__(self) -> None:
        weights = (
            self.l1_weight,
            self.l2_weight,
            self.perceptual_weight,
            self.adversarial_weight,
        )
        if min(weights) < 0:
            raise SmaltiError(f"a loss weight is negative: {min(weights)}")
        if self.l1_weight + self.l2_weight + self.perceptual_weight == 0:
            raise SmaltiError(
                "l1_weight, l2_weight and perceptual_weight are all 0: nothing to learn"
            )
        if min(self.adversarial_start, self.adversarial_ramp) < 0:
            raise SmaltiError("adversarial_start and adversarial_ramp must not be negative")

    def adversarial_strength(self, step: int) -> float:
        """Weight of the generator's adversarial loss at a step: 0, a linear ramp, then full."""
        if self.adversarial_weight == 0 or step < self.adversarial_start:
            return 0.0
        progress = (step - self.adversarial_start + 1) / max(self.adversarial_ramp, 1)
        return self.adversarial_weight * min(progress, 1.0)


@dataclass
class ObjectiveLoss:
    """A scalar to minimise, and its parts (detached scalars) for the log."""

    total: Tensor
    parts: dict[str, Tensor]


def generator_loss(
    config: ObjectiveConfig,
    reconstruction: Reconstruction,
    images: Tensor,  # (B, 3, H, W) in [-1, 1]
    *,
    perceptual: nn.Module | None,  # LPIPS: (images, images) -> (B,)
    discriminator: nn.Module | None,  # with frozen parameters
    last_layer: nn.Parameter,
    step: int,
) -> ObjectiveLoss:
    """What the tokenizer minimises at a step."""
    output = reconstruction.images.float()
    parts: dict[str, Tensor] = {}
    if config.l1_weight:
        parts["l1"] = config.l1_weight * F.l1_loss(output, images)
    if config.l2_weight:
        parts["l2"] = config.l2_weight * F.mse_loss(output, images)
    if perceptual is not None and config.perceptual_weight:
        parts["perceptual"] = config.perceptual_weight * perceptual(output, images).mean()
    fidelity = sum_of(parts)
    parts |= reconstruction.losses
    strength = config.adversarial_strength(step)
    if discriminator is not None and strength:
        adversarial = hinge_generator_loss(discriminator(output).float())
        if config.adaptive:
            strength = strength * adaptive_weight(fidelity, adversarial, last_layer)
        parts["adversarial"] = strength * adversarial
    return ObjectiveLoss(sum_of(parts), {k: v.detach() for k, v in parts.items()})


def discriminator_loss(discriminator: nn.Module, images: Tensor, fakes: Tensor) -> ObjectiveLoss:
    """What the critic minimises: real images against detached reconstructions, (B, 3, H, W)."""
    # Two forwards, not one of a concatenation, would also do; one keeps DDP's bookkeeping simple.
    both = images.new_empty(2 * len(images), *images.shape[1:])
    both[: len(images)] = images
    both[len(images) :] = round_to_uint8(fakes.detach().float())
    real_logits, fake_logits = discriminator(both).float().chunk(2)
    loss = hinge_discriminator_loss(real_logits, fake_logits)
    parts = {
        "discriminator": loss.detach(),
        "logits_real": real_logits.detach().mean(),
        "logits_fake": fake_logits.detach().mean(),
    }
    return ObjectiveLoss(loss, parts)


def sum_of(parts: dict[str, Tensor]) -> Tensor:
    """Sum of scalar losses."""
    return sum(parts.values(), start=next(iter(parts.values())).new_zeros(()))
