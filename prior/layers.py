"""Parts of a Llama-style transformer: normalisation, feed-forward, rotary positions."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# -------------------------------------------------------------------------------------------------
# Stochastic depth: whole residual branches are left out in training (1603.09382).


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


# -------------------------------------------------------------------------------------------------
# Parts of a Llama-style transformer: normalisation, feed-forward, rotary positions.


class RMSNorm(nn.Module):
    """x / rms(x) * weight (1910.07467); torch accumulates the mean in fp32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:  # (..., dim)
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x) (2002.05202)."""

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))


def rotary_table(
    grid: tuple[int, int], head_dim: int, base: float, prefix: int, prefix_is_zero: bool
) -> Tensor:
    """e^(i angle) of every position and pair, (prefix + h*w, head_dim / 2) complex64.

    2D rotary positions (RoFormer, 2104.09864, per axis): of the head_dim / 2 pairs of a head, the
    first half turns with the row and the second with the column, at frequencies
    base^(-2i / (head_dim / 2)). Prefix tokens do not turn: their factor is 1. LlamaGen's published
    models have the factor 0 there instead, which blanks the prefix's queries and keys.
    """
    height, width = grid
    quarter = head_dim // 4
    frequencies = base ** (-torch.arange(quarter, dtype=torch.float32) / quarter)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    angles = torch.cat(
        [rows.flatten()[:, None] * frequencies, columns.flatten()[:, None] * frequencies], dim=-1
    )
    turning = torch.polar(torch.ones_like(angles), angles)  # (h*w, head_dim / 2)
    still = torch.full((prefix, head_dim // 2), 0.0 if prefix_is_zero else 1.0)
    return torch.cat([still.to(turning.dtype), turning])


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn the interleaved pairs x[2j] + i x[2j+1] of x (B, heads, T, head_dim) by table
    (T, head_dim / 2) complex, or (B, 1, T, head_dim / 2) for positions that differ by sample;
    computed in fp32, returned in x's type."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * table).flatten(-2).to(x.dtype)
