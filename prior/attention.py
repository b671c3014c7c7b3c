"""Softmax attention, and the cache that makes decoding linear in what has been written."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.prior.layers import rotary_table

# -------------------------------------------------------------------------------------------------
# Fixed 2D positions of a grid of tokens, in raster order: added to the tokens, or turning queries
# and keys. Any grid, square or not.

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


# -------------------------------------------------------------------------------------------------
# Softmax attention, and the cache that makes decoding linear in what has been written.


class KeyValueCache:
    """Keys and values of all tokens so far, for every layer; allocated once per sampling call."""

    def __init__(
        self, layers: int, rows: int, heads: int, length: int, head_dim: int, like: Tensor
    ) -> None:
        shape = (layers, rows, heads, length, head_dim)
        self.keys = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.values = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.length = 0  # tokens written by all layers

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values (rows, heads, n, head_dim); return all so far, without copying."""
        start, stop = self.length, self.length + keys.shape[2]
        self.keys[layer, :, :, start:stop] = keys
        self.values[layer, :, :, start:stop] = values
        return self.keys[layer, :, :, :stop], self.values[layer, :, :, :stop]

    def part(self, rows: slice) -> "KeyValueCache":
        """Some of the rows in the same memory, with a length of their own from now on."""
        part = copy.copy(self)
        part.keys, part.values = self.keys[:, rows], self.values[:, rows]
        return part


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Softmax attention of queries (B, heads, T, head_dim) to keys and values (B, kv_heads, n,
    head_dim); heads / kv_heads neighbouring heads share theirs.

    On a CPU always in fp32: torch's bf16 kernel is several times slower there.

    Args:
        causal: whether query i sees keys 0 to i alone.
        mask: (T, n) or (B, 1, T, n) bool, True where a query may see a key.
        scale: what scores are multiplied by; None is 1 / sqrt(head_dim).
        dropout: the probability with which an attention weight is left out.
    """
    shape, kv_heads = query.shape, key.shape[1]
    if shape[2] == 1:  # heads that share keys become queries of one head: no key is repeated
        query = query.reshape(shape[0], kv_heads, -1, shape[3])
    shared = query.shape[1] != kv_heads
    if query.device.type != "cpu":
        return F.scaled_dot_product_attention(
            query, key, value, mask, dropout, causal, scale=scale, enable_gqa=shared
        ).view(shape)
    with torch.autocast("cpu", enabled=False):
        attended = F.scaled_dot_product_attention(
            query.float(),
            key.float(),
            value.float(),
            mask,
            dropout,
            causal,
            scale=scale,
            enable_gqa=shared,
        )
    return attended.to(query.dtype).view(shape)
