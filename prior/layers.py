"""Layers that priors share: RMS norm, SwiGLU feed-forward, stochastic depth."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight over the last dimension (1910.07467); the mean is accumulated in fp32.

    If inputs are bf16 and weights fp32, as for queries under autocast, `nn.RMSNorm` does not use
    torch's fused kernel and rounds differently; this class casts the weight first. Otherwise both
    classes are bitwise equal.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__(dim, eps=eps)

    def forward(self, x: Tensor) -> Tensor:  # (..., dim)
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x), without biases (2002.05202)."""

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:  # (..., dim)
        return self.dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))


class DropPath(nn.Module):
    """Stochastic depth (1603.09382): in training, a residual branch is zero for a sample with
    probability p, and multiplied by 1 / (1 - p) otherwise.

    The class `torchvision.ops.StochasticDepth` has the same distribution but samples other random
    numbers, so a run that was started with this class would not resume exactly.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:  # (B, T, width)
        if not (self.training and self.probability):
            return x
        kept = torch.rand(len(x), 1, 1, device=x.device) >= self.probability
        return x * kept / (1 - self.probability)


def drop_path_rates(last: float, depth: int) -> Iterator[float]:
    """The drop probability of every block: it grows linearly from 0 to `last`."""
    return (last * block / max(depth - 1, 1) for block in range(depth))
