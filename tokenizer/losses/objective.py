"""The training objective of stage one: reconstruction and adversarial loss (VQGAN, 2012.09841).

    L = l1 |x' - x| + l2 (x' - x)^2 + perceptual LPIPS(x', x) + gram Gram(x', x)
        + the tokenizer's own losses + lambda w(step) L_adv(D(x'))

x' are reconstructions of images x, w ramps up linearly from `adversarial_start`, and lambda is the
adaptive weight (eq. 7) or 1.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.config import ImageSize
from smalti.data.latents import rgb_views, rounded
from smalti.errors import ConfigurationError
from smalti.tokenizer.base import Reconstruction
from smalti.tokenizer.discriminators import DiscriminatorConfig, build_discriminator
from smalti.tokenizer.discriminators.adversarial import (
    ADVERSARIAL_LOSSES,
    AdversarialLoss,
    compute_adaptive_weight,
    last_layer_gradients,
)
from smalti.tokenizer.discriminators.augmentation import AUGMENT_UNIFORMS, AugmentConfig, augment
from smalti.tokenizer.discriminators.patchgan import PatchGANConfig
from smalti.tokenizer.discriminators.regularisers import (
    LeCam,
    PenaltyConfig,
    advance_spectral_norms,
    gradient_penalty,
    r1_penalty,
)
from smalti.tokenizer.losses.perceptual import LPIPS

# -------------------------------------------------------------------------------------------------
# Gram loss: texture as correlations between features (Gatys et al., 1508.06576, eq. 4 and 5)


def gram_matrices(features: Tensor) -> Tensor:
    """Features (B, C, h, w) -> mean over positions of the products of channels, (B, C, C)."""
    rows = features.flatten(2)  # (B, C, h w)
    return rows @ rows.mT / rows.shape[2]


def gram_distance(features: list[Tensor], reference: list[Tensor]) -> Tensor:
    """Distance of two images by the Gram matrices of their features at several layers.

    Args:
        features, reference: one (B, C, h, w) per layer.

    Returns:
        (B,): the mean over layers of sum((G - A)^2) / (4 C^2), where G and A are already divided by
        the number of positions (M in the paper).
    """
    distances = [
        (gram_matrices(a) - gram_matrices(b)).square().mean((1, 2)) / 4
        for a, b in zip(features, reference, strict=True)
    ]
    return torch.stack(distances).mean(0)


# -------------------------------------------------------------------------------------------------
# Weights and networks


@dataclass(frozen=True)
class ObjectiveConfig:
    """Weights of the losses; a weight of 0 leaves that loss, and its network, out."""

    l1_weight: float = 0.0  # of the mean absolute error of a pixel
    l2_weight: float = 1.0  # of the mean squared error of a pixel
    perceptual_weight: float = 1.0  # of the perceptual distance LPIPS
    perceptual_network: Literal["alex", "vgg"] = "alex"  # of LPIPS: AlexNet or VGG16
    # A safetensors file with its weights; without one, AlexNet's ship with smalti and VGG16's are
    # downloaded.
    perceptual_weights: Path | None = None
    gram_weight: float = 0.0  # on the features of LPIPS; the loss is large: try 1e-4 to 1e-2
    adversarial_weight: float = 0.5  # of the adversarial loss of the tokenizer
    adversarial_loss: AdversarialLoss = "hinge"  # of the discriminator and the tokenizer
    adaptive: bool = False  # also multiply by the adaptive weight
    # The discriminator is trained from step 0; the tokenizer's adversarial loss starts later and
    # ramps up linearly. With full weight from the first step, tokenizers often diverge.
    adversarial_start: int = 20_000  # step at which the tokenizer's adversarial loss starts
    adversarial_ramp: int = 1_000  # steps in which its weight grows linearly to the full weight
    discriminator: DiscriminatorConfig = field(default_factory=PatchGANConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)  # of the discriminator's input
    penalties: PenaltyConfig = field(default_factory=PenaltyConfig)  # on the discriminator

    def __post_init__(self) -> None:
        weights = self.l1_weight, self.l2_weight, self.perceptual_weight, self.gram_weight
        lowest = min(*weights, self.adversarial_weight)
        if lowest < 0:
            raise ConfigurationError(f"a loss weight is negative: {lowest}; use 0 or more")
        if sum(weights) == 0:
            raise ConfigurationError(
                "l1_weight, l2_weight, perceptual_weight and gram_weight are all 0, so there is "
                "nothing to learn: make one of them positive"
            )
        if min(self.adversarial_start, self.adversarial_ramp) < 0:
            raise ConfigurationError("adversarial_start and adversarial_ramp must not be negative")
        if self.adversarial_loss == "wasserstein" and not self.penalties.gradient_penalty_weight:
            raise ConfigurationError(
                "the wasserstein loss has no bound without a gradient penalty: set "
                "penalties.gradient_penalty_weight, to 10 as its paper does"
            )

    def adversarial_strength(self, step: int) -> float:
        """w(step): 0 before `adversarial_start`, then a linear ramp to the full weight."""
        if self.adversarial_weight == 0 or step < self.adversarial_start:
            return 0.0
        progress = (step - self.adversarial_start + 1) / max(self.adversarial_ramp, 1)
        return self.adversarial_weight * min(progress, 1.0)

    @property
    def needs_discriminator(self) -> bool:
        """Whether the adversarial loss has a weight."""
        return self.adversarial_weight > 0

    @property
    def needs_features(self) -> bool:
        """Whether a loss on the features of LPIPS has a weight."""
        return self.perceptual_weight + self.gram_weight > 0


@dataclass
class ObjectiveLoss:
    """A scalar to minimise, and its parts (detached scalars) for the log."""

    total: Tensor
    parts: dict[str, Tensor]


@dataclass
class LossNetworks:
    """The networks inside losses; None where no loss needs one."""

    perceptual: LPIPS | None
    discriminator: nn.Module | None  # images (B, C, H, W) -> logits (B, ...)


# -------------------------------------------------------------------------------------------------
# The losses


def sum_of(parts: dict[str, Tensor]) -> Tensor:
    """Sum of scalar losses."""
    return sum(parts.values(), start=next(iter(parts.values())).new_zeros(()))


def reconstruction_losses(
    config: ObjectiveConfig, loss_networks: LossNetworks, reconstruction: Reconstruction
) -> dict[str, Tensor]:
    """The weighted reconstruction losses by name, scalars."""
    output, images = reconstruction.images.float(), reconstruction.targets
    parts: dict[str, Tensor] = {}
    if config.l1_weight:
        parts["l1"] = config.l1_weight * F.l1_loss(output, images)
    if config.l2_weight:
        parts["l2"] = config.l2_weight * F.mse_loss(output, images)
    if loss_networks.perceptual is not None and config.needs_features:
        with torch.autocast(images.device.type, enabled=False):
            # Both losses compare the same features, which are computed once.
            features, reference = (
                loss_networks.perceptual.features(rgb_views(x.float())) for x in (output, images)
            )
            if config.perceptual_weight:
                distance = loss_networks.perceptual.distance(features, reference).mean()
                parts["perceptual"] = config.perceptual_weight * distance
            if config.gram_weight:
                parts["gram"] = config.gram_weight * gram_distance(features, reference).mean()
    return parts


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Context in which the network's weights get no gradients; frozen ones stay frozen after it."""
    learning = [p for p in network.parameters() if p.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def adversarial_loss(
    config: ObjectiveConfig, discriminator: nn.Module, output: Tensor, uniforms: Tensor
) -> Tensor:
    """The generator's adversarial loss of reconstructions (B, C, H, W), a scalar, not weighted.

    The discriminator's own weights get no gradient.

    Args:
        uniforms: (B, at least AUGMENT_UNIFORMS) in [0, 1), for the augmentation.
    """
    with frozen(discriminator):
        logits = discriminator(augment(output.float(), config.augment, uniforms))
    return ADVERSARIAL_LOSSES[config.adversarial_loss].generator(logits.float())


def generator_loss(
    config: ObjectiveConfig,
    loss_networks: LossNetworks,
    reconstruction: Reconstruction,
    *,
    uniforms: Tensor,
    last_layer: nn.Parameter,
    step: int,
    adaptive_weight: Tensor | None = None,
) -> ObjectiveLoss:
    """The loss that the tokenizer minimises at a step.

    Args:
        uniforms: (B, at least AUGMENT_UNIFORMS) in [0, 1), for the augmentation.
        last_layer: the decoder's last weight, for the adaptive weight.
        adaptive_weight: that of the whole batch, a scalar, if this reconstruction is only a part
            of the batch; None: computed here. See `adversarial.compute_adaptive_weight`.
    """
    parts = reconstruction_losses(config, loss_networks, reconstruction)
    reconstruction_loss = sum_of(parts)
    parts |= reconstruction.losses
    strength = config.adversarial_strength(step)
    if loss_networks.discriminator is not None and strength:
        adversarial = adversarial_loss(
            config, loss_networks.discriminator, reconstruction.images, uniforms
        )
        if config.adaptive:
            if adaptive_weight is None:
                gradients = last_layer_gradients(reconstruction_loss, adversarial, last_layer)
                adaptive_weight = compute_adaptive_weight([gradients])
            adversarial = adaptive_weight * adversarial
        parts["adversarial"] = strength * adversarial
    return ObjectiveLoss(sum_of(parts), {k: v.detach() for k, v in parts.items()})


# -------------------------------------------------------------------------------------------------
# The discriminator's side: its loss and penalties in one module


UNIFORMS_PER_IMAGE = AUGMENT_UNIFORMS + 1  # the last one mixes real and fake (gradient penalty)


class DiscriminatorObjective(nn.Module):
    """A discriminator and its loss in one module, so that DDP and autocast wrap both.

    Nothing in it depends on how a batch is split into micro-batches or shared among processes:
    randomness is an argument (`uniforms`), and the state besides the weights (LeCam's anchors,
    power iterations) changes once per optimizer step, in `after_step`.
    """

    def __init__(self, config: ObjectiveConfig, image_size: ImageSize, channels: int = 3) -> None:
        super().__init__()
        self.config = config
        self.discriminator = build_discriminator(config.discriminator, image_size, channels)
        penalties = config.penalties
        self.lecam = LeCam(penalties.lecam_decay) if penalties.lecam_weight else None
        self.register_load_state_dict_pre_hook(_rename_critic)

    def forward(self, images: Tensor, fakes: Tensor, uniforms: Tensor, step: int) -> ObjectiveLoss:
        """The loss on real images against reconstructions of them.

        Args:
            images, fakes: (B, C, H, W) in [-1, 1]; no gradient reaches the fakes.
            uniforms: (B, UNIFORMS_PER_IMAGE) in [0, 1).
            step: optimizer steps done, which decides whether R1 is due.
        """
        # An image and its fake are augmented alike. Both are rounded to 8 bits, because otherwise
        # the rounding alone would distinguish them; resized real images are not rounded either.
        real, fake = (
            augment(rounded(x.detach()), self.config.augment, uniforms) for x in (images, fakes)
        )
        # One pass over both is faster than two; no discriminator mixes the images of a batch.
        real_logits, fake_logits = self.discriminator(torch.cat([real, fake])).float().chunk(2)
        loss = ADVERSARIAL_LOSSES[self.config.adversarial_loss].discriminator
        losses = {
            "discriminator": loss(real_logits, fake_logits),
            **self._penalties(real, fake, uniforms[:, -1], step),
        }
        if self.lecam is not None:
            weight = self.config.penalties.lecam_weight
            losses["lecam"] = weight * self.lecam(real_logits, fake_logits)
        total = torch.stack(list(losses.values())).sum()
        parts = {name: loss.detach() for name, loss in losses.items()}
        parts["logits_real"] = real_logits.detach().mean()
        parts["logits_fake"] = fake_logits.detach().mean()
        return ObjectiveLoss(total, parts)

    def _penalties(self, real: Tensor, fake: Tensor, mix: Tensor, step: int) -> dict[str, Tensor]:
        """The weighted gradient penalties that are due at this step, at the augmented images."""
        penalties = self.config.penalties
        losses = {}
        if strength := penalties.r1_strength(step):
            losses["r1"] = strength * r1_penalty(self.discriminator, real)
        if weight := penalties.gradient_penalty_weight:
            losses["gradient_penalty"] = weight * gradient_penalty(
                self.discriminator, real, fake, mix
            )
        return losses

    def after_step(self) -> None:
        """Update power iterations and anchors, once after every accepted optimizer step."""
        advance_spectral_norms(self.discriminator)
        if self.lecam is not None:
            self.lecam.after_step()

    def discard_step(self) -> None:
        """Discard what `forward` collected, because the optimizer step was skipped."""
        if self.lecam is not None:
            self.lecam.discard_step()


def _rename_critic(module: nn.Module, state: dict[str, Tensor], *_: object) -> None:
    """Checkpoints of smalti 0.1 name the discriminator `critic`."""
    for name in [name for name in state if name.startswith("critic.")]:
        state["discriminator." + name.removeprefix("critic.")] = state.pop(name)
