"""Adversarial losses as pure functions of logits, and the adaptive weight of the generator's.

Logits have any shape; positive means "real". The discriminator's losses average their two terms,
over real and over fake images, as is usual for VQGAN. Only the Wasserstein loss is their sum, so
that the penalty weight of its paper applies unchanged.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.distributed import mean_over_processes

AdversarialLoss = Literal["hinge", "non-saturating", "vanilla", "wasserstein"]

# -------------------------------------------------------------------------------------------------
# Hinge (Geometric GAN, Lim and Ye, 1705.02894)


def hinge_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """(E[max(0, 1 - D(x))] + E[max(0, 1 + D(x'))]) / 2, a scalar."""
    return (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()) / 2


def hinge_generator_loss(fake_logits: Tensor) -> Tensor:
    """-E[D(x')], a scalar; its gradient does not vanish where the discriminator is confident."""
    return -fake_logits.mean()


# -------------------------------------------------------------------------------------------------
# The original GAN (Goodfellow et al., 1406.2661), s the logistic function


def logistic_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """-(E[log s(D(x))] + E[log(1 - s(D(x')))]) / 2 (eq. 1), a scalar."""
    # log s(l) = -softplus(-l) and log(1 - s(l)) = -softplus(l): finite for any logit.
    return (F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()) / 2


def vanilla_generator_loss(fake_logits: Tensor) -> Tensor:
    """E[log(1 - s(D(x')))], the min-max game (eq. 1), a scalar.

    Its gradient vanishes where the discriminator is confident that an image is fake.
    """
    return -F.softplus(fake_logits).mean()


def non_saturating_generator_loss(fake_logits: Tensor) -> Tensor:
    """-E[log s(D(x'))] (section 3), a scalar; its gradient is largest where eq. 1's vanishes."""
    return F.softplus(-fake_logits).mean()


# -------------------------------------------------------------------------------------------------
# Wasserstein GAN (Arjovsky et al., 1701.07875)


def wasserstein_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """E[D(x')] - E[D(x)], a scalar; bounded only with a gradient penalty."""
    return fake_logits.mean() - real_logits.mean()


def wasserstein_generator_loss(fake_logits: Tensor) -> Tensor:
    """-E[D(x')], a scalar."""
    return -fake_logits.mean()


@dataclass(frozen=True)
class LossPair:
    """The losses of the discriminator and of the generator."""

    discriminator: Callable[[Tensor, Tensor], Tensor]  # (real logits, fake logits) -> scalar
    generator: Callable[[Tensor], Tensor]  # fake logits -> scalar


ADVERSARIAL_LOSSES: dict[AdversarialLoss, LossPair] = {
    "hinge": LossPair(hinge_discriminator_loss, hinge_generator_loss),
    "non-saturating": LossPair(logistic_discriminator_loss, non_saturating_generator_loss),
    "vanilla": LossPair(logistic_discriminator_loss, vanilla_generator_loss),
    "wasserstein": LossPair(wasserstein_discriminator_loss, wasserstein_generator_loss),
}

# -------------------------------------------------------------------------------------------------
# Adaptive weight: lambda = |grad L_rec| / (|grad L_adv| + delta) (VQGAN, 2012.09841, eq. 7)


def last_layer_gradients(
    reconstruction_loss: Tensor, generator_loss: Tensor, last_layer: nn.Parameter
) -> Tensor:
    """Gradients of both losses with respect to the decoder's last weight, (2, *weight.shape)."""
    losses = (reconstruction_loss, generator_loss)
    gradients = [torch.autograd.grad(loss, last_layer, retain_graph=True)[0] for loss in losses]
    return torch.stack(gradients).float()


def compute_adaptive_weight(gradients: Iterable[Tensor]) -> Tensor:
    """lambda, clamped to [0, 1e4], a scalar without gradient. delta is 1e-4 as in taming's code;
    the paper has 1e-6.

    The norms are those of the gradients of the *whole* batch of an optimizer step: of the mean over
    micro-batches and over processes. So lambda depends neither on how many processes share the
    batch nor on how it is split into micro-batches.

    Args:
        gradients: what `last_layer_gradients` returned for each micro-batch of this process.
    """
    mean = mean_over_processes(torch.stack(list(gradients)).mean(0))
    reconstruction, generator = mean.flatten(1).norm(dim=1)  # (2,)
    return (reconstruction / (generator + 1e-4)).clamp(0, 1e4).detach()
