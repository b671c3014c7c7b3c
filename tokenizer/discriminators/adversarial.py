"""Adversarial losses as pure functions of logits, and how strongly they pull on the generator.

Logits are of any shape; positive means "real". What the critic minimises is the average of its
two terms, over reals and over fakes, as is usual for VQGAN; only Wasserstein's is their plain sum,
so that the penalty weight of its paper keeps its meaning.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.distributed import mean_over_processes

AdversarialLoss = Literal["hinge", "non-saturating", "vanilla", "wasserstein"]


def hinge_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """(E[max(0, 1 - D(x))] + E[max(0, 1 + D(x'))]) / 2 (Lim and Ye, 1705.02894), a scalar."""
    return (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()) / 2


def hinge_generator_loss(fake_logits: Tensor) -> Tensor:
    """-E[D(x')], a scalar; no gradient vanishes however sure the critic is."""
    return -fake_logits.mean()


def logistic_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """-(E[log s(D(x))] + E[log(1 - s(D(x')))]) / 2, s the logistic function (1406.2661, eq. 1)."""
    # log s(l) = -softplus(-l) and log(1 - s(l)) = -softplus(l): finite for any logit.
    return (F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()) / 2


def vanilla_generator_loss(fake_logits: Tensor) -> Tensor:
    """E[log(1 - s(D(x')))], the original min-max game (1406.2661, eq. 1), a scalar.

    Its gradient vanishes where the critic is sure of a fake.
    """
    return -F.softplus(fake_logits).mean()


def non_saturating_generator_loss(fake_logits: Tensor) -> Tensor:
    """-E[log s(D(x'))] (1406.2661, section 3), a scalar: strongest where the critic is sure."""
    return F.softplus(-fake_logits).mean()


def wasserstein_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """E[D(x')] - E[D(x)] (1701.07875), a scalar; bounded only with a gradient penalty."""
    return fake_logits.mean() - real_logits.mean()


def wasserstein_generator_loss(fake_logits: Tensor) -> Tensor:
    """-E[D(x')], a scalar."""
    return -fake_logits.mean()


@dataclass(frozen=True)
class Game:
    """What either side of an adversarial loss minimises."""

    discriminator: Callable[[Tensor, Tensor], Tensor]  # (real logits, fake logits) -> scalar
    generator: Callable[[Tensor], Tensor]  # fake logits -> scalar


GAMES: dict[AdversarialLoss, Game] = {
    "hinge": Game(hinge_discriminator_loss, hinge_generator_loss),
    "non-saturating": Game(logistic_discriminator_loss, non_saturating_generator_loss),
    "vanilla": Game(logistic_discriminator_loss, vanilla_generator_loss),
    "wasserstein": Game(wasserstein_discriminator_loss, wasserstein_generator_loss),
}


def last_layer_gradients(
    reconstruction_loss: Tensor, generator_loss: Tensor, last_layer: nn.Parameter
) -> Tensor:
    """Gradients of both losses with respect to the decoder's last weight, (2, *weight.shape)."""
    losses = (reconstruction_loss, generator_loss)
    gradients = [torch.autograd.grad(loss, last_layer, retain_graph=True)[0] for loss in losses]
    return torch.stack(gradients).float()


def adaptive_weight(gradients: Iterable[Tensor]) -> Tensor:
    """lambda = |grad reconstruction| / (|grad generator| + 1e-4), clamped to [0, 1e4], no gradient.

    VQGAN (2012.09841, eq. 7). The norms are those of the gradients of the *whole* batch of an
    optimizer step: of the mean over micro-batches and over processes, not of any part. So lambda
    depends neither on how many processes share the batch nor on how it is cut into micro-batches.

    Args:
        gradients: what `last_layer_gradients` gave for each micro-batch of this process.
    """
    mean = mean_over_processes(torch.stack(list(gradients)).mean(0))
    reconstruction, generator = mean.flatten(1).norm(dim=1)
    return (reconstruction / (generator + 1e-4)).clamp(0, 1e4).detach()
