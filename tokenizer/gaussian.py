"""The diagonal Gaussian posterior of a variational auto-encoder (Kingma and Welling, 1312.6114)."""

from dataclasses import dataclass

import torch
from torch import Tensor

LOG_VARIANCE_RANGE = (-30.0, 20.0)  # as in latent diffusion


@dataclass(frozen=True)
class DiagonalGaussian:
    """N(mean, diag(exp(logvar))); both (B, C, h, w), fp32."""

    mean: Tensor
    logvar: Tensor

    @classmethod
    def of(cls, moments: Tensor) -> "DiagonalGaussian":
        """From an encoder's output (B, 2C, h, w): means, then log-variances."""
        mean, logvar = moments.float().chunk(2, dim=1)
        return cls(mean, logvar.clamp(*LOG_VARIANCE_RANGE))

    @property
    def std(self) -> Tensor:
        """Standard deviation, (B, C, h, w)."""
        return torch.exp(0.5 * self.logvar)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """mean + std * noise: differentiable in both; noise from `generator` or the global one."""
        return self.mean + self.std * standard_normal(self.mean, generator)

    def kl(self) -> Tensor:
        """KL(N(mean, std^2) || N(0, I)) of each sample, summed over its numbers, (B,), in nats."""
        terms = self.mean.square() + self.logvar.exp() - 1 - self.logvar
        return 0.5 * terms.flatten(1).sum(1)


def standard_normal(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal numbers with the shape, type and device of `like`.

    They are drawn on the generator's own device, so that a CPU generator gives the same anywhere.
    """
    device = like.device if generator is None else generator.device
    noise = torch.randn(like.shape, generator=generator, device=device, dtype=like.dtype)
    return noise.to(like.device)
