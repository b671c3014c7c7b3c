"""Adversarial losses as pure functions of logits, and how strongly they pull on the generator."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


def hinge_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """(E[max(0, 1 - D(x))] + E[max(0, 1 + D(x'))]) / 2 (Lim and Ye, 1705.02894), a scalar."""
    return (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()) / 2


def hinge_generator_loss(fake_logits: Tensor) -> Tensor:
    """-E[D(x')], a scalar."""
    return -fake_logits.mean()


def adaptive_weight(
    reconstruction_loss: Tensor, generator_loss: Tensor, last_layer: nn.Parameter
) -> Tensor:
    """lambda = |grad reconstruction| / (|grad generator| + 1e-4), clamped to [0, 1e4], no gradient.

    The gradients are those of the decoder's last layer (VQGAN, 2012.09841, eq. 7), averaged over
    all processes first, so that every process weighs alike and as one process would.
    """
    norms = []
    for loss in (reconstruction_loss, generator_loss):
        (gradient,) = torch.autograd.grad(loss, last_layer, retain_graph=True)
        if dist.is_initialized():
            dist.all_reduce(gradient)
            gradient = gradient / dist.get_world_size()
        norms.append(gradient.float().norm())
    return (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4).detach()


def round_to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] snapped to the 256 values a file can hold.

    Real pictures lie on this grid; without rounding a critic can tell fakes by that alone.
    """
    return ((images.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
