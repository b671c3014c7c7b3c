"""Parts of a Llama-style transformer: normalisation, feed-forward, rotary positions."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / rms(x) * weight (1910.07467), the division in fp32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:  # (..., dim)
        normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight


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
    """Cosine and sine of every position's angles, (prefix + h*w, head_dim / 2, 2), fp32.

    2D rotary positions (RoFormer, 2104.09864, per axis): of the head_dim / 2 pairs of a head, the
    first half turns with the row and the second with the column, at frequencies
    base^(-2i / (head_dim / 2)). Prefix tokens do not turn: cosine 1, sine 0. LlamaGen's published
    models instead have cosine 0 and sine 0 there, which blanks their queries and keys.
    """
    height, width = grid
    quarter = head_dim // 4
    frequencies = base ** (-torch.arange(quarter, dtype=torch.float32) / quarter)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    angles = torch.cat(
        [rows.flatten()[:, None] * frequencies, columns.flatten()[:, None] * frequencies], dim=-1
    )
    table = torch.stack([angles.cos(), angles.sin()], dim=-1)  # (h*w, head_dim / 2, 2)
    still = torch.zeros(prefix, head_dim // 2, 2)
    if not prefix_is_zero:
        still[..., 0] = 1
    return torch.cat([still, table])


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn the interleaved pairs (x[2j], x[2j+1]) of x (B, heads, T, head_dim) by table
    (T, head_dim / 2, 2); computed in fp32, returned in x's type."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = table.unbind(-1)
    turned = torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], dim=-1)
    return turned.flatten(-2).to(x.dtype)
