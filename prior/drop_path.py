"""Stochastic depth: whole residual branches are left out in training (1603.09382)."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn


class DropPath(nn.Module):
    """In training, a residual branch is left out of a sample with a probability, and multiplied by
    1 / (1 - p) elsewhere."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:  # (B, T, width)
        if not (self.training and self.probability):
            return x
        kept = torch.rand(len(x), 1, 1, device=x.device) >= self.probability
        return x * kept / (1 - self.probability)


def drop_path_rates(last: float, depth: int) -> Iterator[float]:
    """The probability of every block: from 0 at the first it grows linearly to `last`."""
    return (last * block / max(depth - 1, 1) for block in range(depth))
