"""Fixed 2D positions of a grid of tokens, in raster order: added to the tokens, or turning queries
and keys. Any grid, square or not."""

from collections.abc import Callable
from functools import partial
from typing import Self

import torch
from torch import Tensor, nn

from smalti.prior.layers import rotary_table

ROTARY_BASE = 10000.0


def sin_cos_table(grid: tuple[int, int], dim: int) -> Tensor:
    """Sines and cosines of column and row, (h * w, dim) fp32 in [-1, 1].

    "Attention is all you need" (1706.03762, section 3.5) per axis, in the order of MAE (2111.06377)
    and DiT (2212.09748), whose published weights expect it: the first half of the channels speaks
    of the column, the second of the row; in each half all sines, then all cosines, at frequencies
    10000^(-i / (dim / 4)). The angles are computed in fp64.
    """
    height, width = grid
    quarter = dim // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    angles = [axis.flatten()[:, None] * frequencies for axis in (columns, rows)]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=-1).float()


def _turning_table(grid: tuple[int, int], head_dim: int) -> Tensor:
    """Cosine and sine of every turn, (h * w, head_dim / 2, 2) fp32: real, because gloo broadcasts
    no complex numbers."""
    return torch.view_as_real(rotary_table(grid, head_dim, ROTARY_BASE, 0, False))


class FixedTable(nn.Module):
    """A constant that follows its model to any device, but not to lower precision; never saved."""

    table: Tensor

    def __init__(self, make: Callable[[], Tensor]) -> None:
        super().__init__()
        self.make = make
        self.register_buffer("table", make(), persistent=False)

    @classmethod
    def sin_cos(cls, grid: tuple[int, int], dim: int) -> Self:
        """To be added to tokens, (h * w, dim)."""
        return cls(partial(sin_cos_table, grid, dim))

    @classmethod
    def rotary(cls, grid: tuple[int, int], head_dim: int) -> Self:
        """To turn the pairs of queries and keys, (h * w, head_dim / 2, 2)."""
        return cls(partial(_turning_table, grid, head_dim))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Of `Module.to`, `half` and their like only the device counts."""
        super()._apply(fn, recurse)
        self.table = self.make().to(self.table.device)
        return self
