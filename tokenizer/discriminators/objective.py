"""The discriminator's objective: adversarial loss + R1 + gradient penalty + LeCam."""

import torch
from torch import Tensor, nn

from smalti.data.latents import rounded
from smalti.tokenizer.discriminators import build_discriminator
from smalti.tokenizer.discriminators.adversarial import ADVERSARIAL_LOSSES
from smalti.tokenizer.discriminators.augmentation import AUGMENT_UNIFORMS, augment
from smalti.tokenizer.discriminators.regularisers import (
    LeCam,
    advance_spectral_norms,
    gradient_penalty,
    r1_penalty,
)
from smalti.tokenizer.losses.objective import ObjectiveConfig, ObjectiveLoss

UNIFORMS_PER_IMAGE = AUGMENT_UNIFORMS + 1  # the last one mixes real and fake (gradient penalty)


class DiscriminatorObjective(nn.Module):
    """A discriminator and its loss in one module, so that DDP and autocast wrap both.

    Nothing in it depends on how a batch is split into micro-batches or shared among processes:
    randomness is an argument (`uniforms`), and the state besides the weights (LeCam's anchors,
    power iterations) changes once per optimizer step, in `after_step`.
    """

    def __init__(self, config: ObjectiveConfig, image_size: int) -> None:
        super().__init__()
        self.config = config
        self.discriminator = build_discriminator(config.discriminator, image_size)
        penalties = config.penalties
        self.lecam = LeCam(penalties.lecam_decay) if penalties.lecam_weight else None
        self.register_load_state_dict_pre_hook(_rename_critic)

    def forward(self, images: Tensor, fakes: Tensor, uniforms: Tensor, step: int) -> ObjectiveLoss:
        """The loss on real images against reconstructions of them.

        Args:
            images, fakes: (B, 3, H, W) in [-1, 1]; no gradient reaches the fakes.
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
