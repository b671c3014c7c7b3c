"""Regularisers of a discriminator: spectral normalisation, R1, WGAN-GP's gradient penalty, LeCam.

In the gradient penalties, D(x) of an image is the mean of its logits over all patches and heads;
LeCam squares each logit. The adversarial losses average the same logits, so a weight means the same
for every discriminator and image size.

Spectral normalisation is written here because torch's own does a power iteration in every training
forward pass, so that its output depends on the number of passes. Here the iteration is done
separately, once per optimizer step: gradient accumulation and second derivatives use one fixed
estimate, in fp32.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.config import check_at_least
from smalti.distributed import mean_over_processes
from smalti.errors import ConfigurationError

# -------------------------------------------------------------------------------------------------
# Spectral normalisation: W / sigma(W), sigma the largest singular value (Miyato et al., 1802.05957)

STARTING_ITERATIONS = 15


class SpectralConv2d(nn.Conv2d):
    """A convolution whose weight W, as a matrix (out, in * k * k), is divided by sigma(W).

    sigma is estimated as u^T W v (appendix A), u and v by power iteration (algorithm 1).
    """

    def __init__(
        self, channels_in: int, channels_out: int, kernel: int, stride: int = 1, padding: int = 0
    ) -> None:
        super().__init__(channels_in, channels_out, kernel, stride, padding)
        rows, columns = self.weight.flatten(1).shape
        self.register_buffer("u", F.normalize(torch.randn(rows), dim=0))
        self.register_buffer("v", F.normalize(torch.randn(columns), dim=0))
        self.u: Tensor
        self.v: Tensor
        for _ in range(STARTING_ITERATIONS):
            self.advance()

    @torch.no_grad()
    def advance(self) -> None:
        """One power iteration: u and v approach the singular vectors of sigma."""
        matrix = self.weight.float().flatten(1)  # (out, in * k * k)
        self.u.copy_(F.normalize(matrix @ self.v, dim=0))
        self.v.copy_(F.normalize(matrix.T @ self.u, dim=0))

    def normalised_weight(self) -> Tensor:
        """W / sigma, fp32; gradients pass through both W and sigma."""
        with torch.autocast(self.weight.device.type, enabled=False):
            # Copies, because an iteration between forward and backward must not change the graph.
            u, v = self.u.clone(), self.v.clone()
            return self.weight / (u @ (self.weight.flatten(1) @ v))

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.normalised_weight(), self.bias)


def advance_spectral_norms(network: nn.Module) -> None:
    """One power iteration in every spectrally normalised layer of a network."""
    for module in network.modules():
        if isinstance(module, SpectralConv2d):
            module.advance()


# -------------------------------------------------------------------------------------------------
# Weights of the penalties


@dataclass(frozen=True)
class PenaltyConfig:
    """Weights of the penalties on a discriminator; a weight of 0 leaves that penalty out."""

    r1_weight: float = 0.0  # gamma of R1, 10 in its paper
    r1_interval: int = 16  # steps between two R1 penalties, each multiplied by this number
    gradient_penalty_weight: float = 0.0  # lambda of WGAN-GP, 10 in its paper
    lecam_weight: float = 0.0  # 0.001 to 0.05 in published tokenizers
    lecam_decay: float = 0.99  # of the running means of the logits (anchors)

    def __post_init__(self) -> None:
        for name in ("r1_weight", "gradient_penalty_weight", "lecam_weight"):
            if getattr(self, name) < 0:
                raise ConfigurationError(
                    f"{name} is {getattr(self, name)}; it must not be negative"
                )
        check_at_least(1, self, "r1_interval")
        if not 0 <= self.lecam_decay < 1:
            raise ConfigurationError(f"lecam_decay is {self.lecam_decay}; it must lie in [0, 1)")

    def r1_strength(self, step: int) -> float:
        """Weight of R1 at a step: 0, or gamma times the interval if R1 is due.

        Lazy regularisation (StyleGAN2, 1912.04958, appendix B).
        """
        due = (step + 1) % self.r1_interval == 0  # at the steps that are logged
        return self.r1_weight * self.r1_interval if due else 0.0


# -------------------------------------------------------------------------------------------------
# Gradient penalties: R1 (Mescheder et al., 1801.04406), WGAN-GP (Gulrajani et al., 1704.00028)

Discriminator = Callable[[Tensor], Tensor]  # images (B, 3, H, W) -> logits (B, ...)


def input_gradients(discriminator: Discriminator, images: Tensor) -> Tensor:
    """Gradient of D at each image, (B, 3 H W), itself differentiable; always in fp32."""
    with torch.enable_grad(), torch.autocast(images.device.type, enabled=False):
        images = images.detach().float().requires_grad_()
        scores = discriminator(images).reshape(len(images), -1).mean(1)  # (B,)
        # Each score depends on its own image alone, so their sum has all the gradients.
        (gradients,) = torch.autograd.grad(scores.sum(), images, create_graph=True)
    return gradients.flatten(1)


def r1_penalty(discriminator: Discriminator, images: Tensor) -> Tensor:
    """E[|grad_x D(x)|^2] / 2 over real images (R1, eq. 9), a scalar.

    Args:
        images: (B, 3, H, W), augmented.
    """
    return input_gradients(discriminator, images).square().sum(1).mean() / 2


def gradient_penalty(
    discriminator: Discriminator, images: Tensor, fakes: Tensor, mix: Tensor
) -> Tensor:
    """E[(|grad_x D(x)| - 1)^2], x = mix images + (1 - mix) fakes (WGAN-GP, eq. 3), a scalar.

    Args:
        images, fakes: (B, 3, H, W).
        mix: (B,), uniform in [0, 1).
    """
    mix = mix.view(-1, 1, 1, 1)
    squares = input_gradients(discriminator, mix * images + (1 - mix) * fakes).square().sum(1)
    return ((squares + 1e-12).sqrt() - 1).square().mean()  # finite where the gradient is 0


# -------------------------------------------------------------------------------------------------
# LeCam: E[max(0, D(x) - a_fake)^2] + E[max(0, a_real - D(x'))^2] (Tseng et al., 2104.03310)


class LeCam(nn.Module):
    """The LeCam penalty of real and fake logits, a scalar.

    The anchors a_real and a_fake are running means of D(x) and D(x'). As in the authors' code, only
    real logits above a_fake and fake logits below a_real are penalised. The anchors start as plain
    means and are updated once per optimizer step, with the logits of the whole batch: all
    micro-batches, all processes. They are buffers, so a checkpoint contains them.
    """

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("anchors", torch.zeros(2))  # real, fake
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.anchors: Tensor
        self.updates: Tensor
        self._pending: list[Tensor] = []  # (2,) mean logits of each micro-batch

    def forward(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        self._pending.append(torch.stack([real_logits.mean(), fake_logits.mean()]).detach())
        real, fake = self.anchors.clone()
        return (
            F.relu(real_logits - fake).square().mean() + F.relu(real - fake_logits).square().mean()
        )

    def discard_step(self) -> None:
        """Discard the pending logits, because the optimizer step was skipped."""
        self._pending = []

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the anchors towards the mean logits of the step."""
        if not self._pending:
            return
        means = mean_over_processes(torch.stack(self._pending).mean(0))  # (2,)
        self.discard_step()
        # 0, 1/2, 2/3, ...: a plain mean of all steps, until the decay is reached.
        decay = torch.clamp(self.updates / (self.updates + 1), max=self.decay)
        self.anchors.lerp_(means, 1 - decay)
        self.updates += 1
