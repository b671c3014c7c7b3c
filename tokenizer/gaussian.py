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

    def sample(self, noise: Tensor | None = None) -> Tensor:
        """mean + std * noise, differentiable in both; standard normal noise like mean, or None to
        draw it from torch's global generator."""
        return self.mean + self.std * (torch.randn_like(self.mean) if noise is None else noise)

    def kl(self) -> Tensor:
        """KL(N(mean, std^2) || N(0, I)) of each sample, summed over its numbers, (B,), in nats."""
        terms = self.mean.square() + self.logvar.exp() - 1 - self.logvar
        return 0.5 * terms.flatten(1).sum(1)
