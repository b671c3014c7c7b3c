"""The training objective of stage one: pixels + perception + critic (VQGAN, 2012.09841, eq. 6)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.errors import SmaltiError
from smalti.tokenizer.base import Reconstruction
from smalti.tokenizer.discriminators import DiscriminatorConfig
from smalti.tokenizer.discriminators.adversarial import (
    GAMES,
    AdversarialLoss,
    adaptive_weight,
    last_layer_gradients,
)
from smalti.tokenizer.discriminators.augmentation import AugmentConfig, augment
from smalti.tokenizer.discriminators.patchgan import PatchGANConfig
from smalti.tokenizer.discriminators.regularisers import PenaltyConfig
from smalti.tokenizer.losses.perceptual import LPIPS

# -------------------------------------------------------------------------------------------------
# The style loss of Gatys et al. (1508.06576): texture as correlations between features.


def gram_matrices(features: Tensor) -> Tensor:
    """Features (B, C, h, w) -> mean products of channels over positions (B, C, C)."""
    rows = features.flatten(2)
    return rows @ rows.mT / rows.shape[2]


def gram_distance(features: list[Tensor], reference: list[Tensor]) -> Tensor:
    """Distance of two pictures by the Gram matrices of their features at several layers.

    Args:
        features, reference: one (B, C, h, w) per layer.

    Returns:
        (B,): the mean over layers of sum((G - A)^2) / (4 C^2) (eq. 4 and 5; G and A already
        divided by the number of positions, M in the paper).
    """
    distances = [
        (gram_matrices(a) - gram_matrices(b)).square().mean((1, 2)) / 4
        for a, b in zip(features, reference, strict=True)
    ]
    return torch.stack(distances).mean(0)


# -------------------------------------------------------------------------------------------------
# The training objective of stage one: pixels + perception + critic (VQGAN, 2012.09841, eq. 6).


@dataclass(frozen=True)
class ObjectiveConfig:
    """Weights of the losses; a weight of 0 leaves that loss, and its network, out."""

    l1_weight: float = 0.0
    l2_weight: float = 1.0
    perceptual_weight: float = 1.0  # LPIPS
    perceptual_network: Literal["alex", "vgg"] = "alex"
    # Its weights, a safetensors file; without one, AlexNet's ship with smalti and VGG16's are
    # downloaded.
    perceptual_weights: Path | None = None
    gram_weight: float = 0.0  # texture, by LPIPS' features; large numbers: try 1e-4 to 1e-2
    adversarial_weight: float = 0.5
    adversarial_loss: AdversarialLoss = "hinge"
    adaptive: bool = False  # also multiply by |grad reconstruction| / |grad adversarial|
    # The critic learns from step 0; what it says reaches the generator later, and gradually:
    # switching on both at once is the best-known way to wreck a tokenizer.
    adversarial_start: int = 20_000  # first step at which the generator hears the critic
    adversarial_ramp: int = 1_000  # steps from weight 0 to the full weight
    discriminator: DiscriminatorConfig = field(default_factory=PatchGANConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)  # of what the critic sees
    penalties: PenaltyConfig = field(default_factory=PenaltyConfig)  # what the critic pays for

    def __post_init__(self) -> None:
        reconstruction_loss = (
            self.l1_weight,
            self.l2_weight,
            self.perceptual_weight,
            self.gram_weight,
        )
        if min(*reconstruction_loss, self.adversarial_weight) < 0:
            lowest = min(*reconstruction_loss, self.adversarial_weight)
            raise SmaltiError(f"a loss weight is negative: {lowest}")
        if sum(reconstruction_loss) == 0:
            raise SmaltiError(
                "l1_weight, l2_weight, perceptual_weight and gram_weight are all 0: nothing to "
                "learn"
            )
        if min(self.adversarial_start, self.adversarial_ramp) < 0:
            raise SmaltiError("adversarial_start and adversarial_ramp must not be negative")
        if self.adversarial_loss == "wasserstein" and not self.penalties.gradient_penalty_weight:
            raise SmaltiError(
                "the wasserstein loss has no bound without a gradient penalty: set "
                "penalties.gradient_penalty_weight, to 10 as its paper does"
            )

    def adversarial_strength(self, step: int) -> float:
        """Weight of the generator's adversarial loss at a step: 0, a linear ramp, then full."""
        if self.adversarial_weight == 0 or step < self.adversarial_start:
            return 0.0
        progress = (step - self.adversarial_start + 1) / max(self.adversarial_ramp, 1)
        return self.adversarial_weight * min(progress, 1.0)

    @property
    def needs_discriminator(self) -> bool:
        """Whether a critic has any say."""
        return self.adversarial_weight > 0

    @property
    def needs_features(self) -> bool:
        """Whether the network of LPIPS is asked."""
        return self.perceptual_weight + self.gram_weight > 0


@dataclass
class ObjectiveLoss:
    """A scalar to minimise, and its parts (detached scalars) for the log."""

    total: Tensor
    parts: dict[str, Tensor]


@dataclass
class LossNetworks:
    """The networks that look at reconstructions; None where the objective does not ask them."""

    perceptual: LPIPS | None
    discriminator: nn.Module | None  # images (B, 3, H, W) -> logits (B, ...)


def generator_loss(
    config: ObjectiveConfig,
    loss_networks: LossNetworks,
    reconstruction: Reconstruction,
    *,
    draws: Tensor,  # (B, at least augment.DRAWS), uniform
    last_layer: nn.Parameter,
    step: int,
    balance: Tensor | None = None,
) -> ObjectiveLoss:
    """What the tokenizer minimises at a step.

    Args:
        last_layer: the decoder's last weight, for the adaptive weight.
        balance: the adaptive weight of the whole batch, if this reconstruction is only a part of
            it; otherwise it is measured here. See `adversarial.adaptive_weight`.
    """
    parts = reconstruction_losses(config, loss_networks, reconstruction)
    reconstruction_loss = sum_of(parts)
    parts |= reconstruction.losses
    strength = config.adversarial_strength(step)
    if loss_networks.discriminator is not None and strength:
        adversarial = adversarial_loss(
            config, loss_networks.discriminator, reconstruction.images, draws
        )
        if config.adaptive:
            if balance is None:
                balance = adaptive_weight(
                    [last_layer_gradients(reconstruction_loss, adversarial, last_layer)]
                )
            adversarial = balance * adversarial
        parts["adversarial"] = strength * adversarial
    return ObjectiveLoss(sum_of(parts), {k: v.detach() for k, v in parts.items()})


def reconstruction_losses(
    config: ObjectiveConfig, loss_networks: LossNetworks, reconstruction: Reconstruction
) -> dict[str, Tensor]:
    """The weighted distances between reconstructions and what they should look like: scalars."""
    output, images = reconstruction.images.float(), reconstruction.targets
    parts: dict[str, Tensor] = {}
    if config.l1_weight:
        parts["l1"] = config.l1_weight * F.l1_loss(output, images)
    if config.l2_weight:
        parts["l2"] = config.l2_weight * F.mse_loss(output, images)
    if loss_networks.perceptual is not None and config.needs_features:
        with torch.autocast(images.device.type, enabled=False):
            ours, theirs = (loss_networks.perceptual.features(x.float()) for x in (output, images))
            if config.perceptual_weight:
                distance = loss_networks.perceptual.distance(ours, theirs).mean()
                parts["perceptual"] = config.perceptual_weight * distance
            if config.gram_weight:
                parts["gram"] = config.gram_weight * gram_distance(ours, theirs).mean()
    return parts


def adversarial_loss(
    config: ObjectiveConfig, discriminator: nn.Module, output: Tensor, draws: Tensor
) -> Tensor:
    """What the critic says of reconstructions (B, 3, H, W), a scalar, not yet weighted.

    No gradients of the critic's own weights are made.
    """
    with frozen(discriminator):
        logits = discriminator(augment(output.float(), config.augment, draws))
    return GAMES[config.adversarial_loss].generator(logits.float())


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Inside, the network's weights take no gradients; what was frozen before stays so."""
    learning = [p for p in network.parameters() if p.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def sum_of(parts: dict[str, Tensor]) -> Tensor:
    """Sum of scalar losses."""
    return sum(parts.values(), start=next(iter(parts.values())).new_zeros(()))
