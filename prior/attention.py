"""Attention of the priors' transformers: softmax attention, the key-value cache, rotary positions
(RoPE) and fixed sine-cosine positions."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import chain
from typing import Self

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

ROTARY_BASE = 10000.0


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(scale q k^T) v of queries (B, heads, T, head_dim) to keys and values
    (B, kv_heads, n, head_dim), like the queries.

    With fewer key and value heads, each of them serves heads / kv_heads neighbouring query heads
    (grouped-query attention, 2305.13245).

    Args:
        causal: whether query i attends to keys 0 to i only.
        mask: (T, n) or (B, 1, T, n) bool, True where a query may attend to a key; or numbers that
            are added to the scores.
        scale: factor of the attention scores; None is 1 / sqrt(head_dim).
        dropout: the probability with which an attention weight is set to zero.
    """
    shape, kv_heads = query.shape, key.shape[1]
    if shape[2] == 1:  # heads that share keys become queries of one head: no key is repeated
        query = query.reshape(shape[0], kv_heads, -1, shape[3])  # (B, kv_heads, group, head_dim)
    # On a CPU always in fp32: torch's bf16 kernel is several times slower there.
    autocast, dtype = False, query.dtype
    if query.device.type == "cpu":
        query, key, value = query.float(), key.float(), value.float()
        autocast = torch.is_autocast_enabled("cpu")
    # The context costs as much as the attention of one token.
    with torch.autocast("cpu", enabled=False) if autocast else nullcontext():
        attended = F.scaled_dot_product_attention(
            query,
            key,
            value,
            mask,
            dropout,
            causal,
            scale=scale,
            enable_gqa=query.shape[1] != kv_heads,
        )
    return attended.to(dtype).view(shape)


class LayerCache:
    """Keys and values of all tokens so far in one layer.

    A layer does not know its number, so that a compiled block serves all layers.
    """

    def __init__(
        self, keys: Tensor, values: Tensor, length: int = 0, position: Tensor | None = None
    ) -> None:
        self.keys, self.values = keys, values  # (rows, heads, most tokens, head_dim)
        self.length = length  # tokens written so far
        self.position = position  # the same, (1,) int64 on the device, in a static cache

    def write(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values (rows, heads, n, head_dim) of new tokens; return views of those of
        all tokens so far, (rows, heads, length + n, head_dim).

        A static cache takes a single token without a number of the host, and returns all it has:
        the caller masks what is not written yet, and sets the length.
        """
        if self.position is not None and keys.shape[2] == 1:
            self.keys.index_copy_(2, self.position, keys.to(self.keys.dtype))
            self.values.index_copy_(2, self.position, values.to(self.values.dtype))
            return self.keys, self.values
        start, stop = self.length, self.length + keys.shape[2]
        self.keys[:, :, start:stop] = keys
        self.values[:, :, start:stop] = values
        self.length = stop
        return self.keys[:, :, :stop], self.values[:, :, :stop]

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, causal: bool, mask: Tensor | None
    ) -> Tensor:
        """`attend` from new tokens, whose keys and values are written, to all tokens so far."""
        return attend(query, *self.write(key, value), causal, mask)


class KeyValueCache:
    """Keys and values of all tokens so far, for every layer; allocated once per sampling call.

    Its type is that of `like`, but fp32 on a CPU, in which `attend` computes there: otherwise every
    step would convert all of them.

    Args:
        static: shapes and addresses of what a step of one token reads and writes are the same in
            all steps, which CUDA graphs need: see `LayerCache.write`.
    """

    def __init__(
        self,
        layers: int,
        rows: int,
        heads: int,
        length: int,
        head_dim: int,
        like: Tensor,
        static: bool = False,
    ) -> None:
        shape = (layers, rows, heads, length, head_dim)
        self.made_like = (like.dtype, like.device)
        dtype = torch.float32 if like.device.type == "cpu" else like.dtype
        # Zeros where a mask hides what is not written: 0 times NaN would be NaN.
        make = torch.zeros if static else torch.empty
        self.keys = make(shape, dtype=dtype, device=like.device)
        self.values = make(shape, dtype=dtype, device=like.device)
        self.position = torch.zeros(1, dtype=torch.int64, device=like.device) if static else None
        self.layers = self._layers()

    def _layers(self, length: int = 0) -> list[LayerCache]:
        pairs = list(zip(self.keys, self.values, strict=True))
        if self.position is not None and self.keys.is_cuda:
            for tensor in chain(*pairs):  # a graph may write to it, if its address does not change
                torch._dynamo.mark_static_address(tensor, guard=False)
        return [LayerCache(*pair, length, self.position) for pair in pairs]

    def restart(self) -> None:
        """Forget all tokens. A static cache is used again, so that its addresses stay."""
        self.length = 0
        self.keys.zero_()
        self.values.zero_()

    @property
    def length(self) -> int:
        """Tokens written so far, in every layer."""
        return self.layers[0].length

    @length.setter
    def length(self, length: int) -> None:
        for layer in self.layers:
            layer.length = length

    def part(self, rows: slice) -> "KeyValueCache":
        """A cache of some of the rows: it shares the memory, and has a length of its own."""
        part = copy.copy(self)
        part.keys, part.values = self.keys[:, rows], self.values[:, rows]
        part.layers = part._layers(self.length)
        return part


# -------------------------------------------------------------------------------------------------
# Positions on a grid of tokens in raster order. The grid need not be square.


def raster_positions(grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Row and column of every position of a grid (h, w) in raster order, each (h * w, 1) int64."""
    height, width = grid
    rows = repeat(torch.arange(height), "h -> (h w) 1", w=width)
    columns = repeat(torch.arange(width), "w -> (h w) 1", h=height)
    return rows, columns


def rotary_frequencies(
    grid: tuple[int, int],
    head_dim: int,
    base: float = ROTARY_BASE,
    prefix: int = 0,
    prefix_is_zero: bool = False,
) -> Tensor:
    """e^(i angle) of every position and pair of channels, (prefix + h * w, head_dim / 2) complex64.

    RoFormer (2104.09864, section 3.2.2) per axis: of the head_dim / 2 pairs, the first half
    rotates by row * theta_i and the second by column * theta_i, with
    theta_i = base^(-2i / (head_dim / 2)).
    Prefix tokens are not rotated: their factor is 1. LlamaGen's published models have the factor 0
    there instead, which sets the prefix's queries and keys to zero.
    """
    quarter = head_dim // 4
    theta = base ** (-torch.arange(quarter, dtype=torch.float32) / quarter)
    angles = torch.cat([axis * theta for axis in raster_positions(grid)], dim=-1)
    rotated = torch.polar(torch.ones_like(angles), angles)  # (h * w, head_dim / 2)
    constant = torch.full((prefix, head_dim // 2), 0.0 if prefix_is_zero else 1.0)
    return torch.cat([constant.to(rotated.dtype), rotated])


def rotate(x: Tensor, rope_freqs: Tensor) -> Tensor:
    """Multiply the interleaved pairs x[2j] + i x[2j+1] of x (B, heads, T, head_dim) by rope_freqs
    (T, head_dim / 2) complex, or (B, 1, T, head_dim / 2) for positions that differ by sample;
    computed in fp32, returned in x's type."""
    if torch.compiler.is_compiling():  # inductor makes no code for complex numbers
        real, imaginary = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        cosine, sine = torch.view_as_real(rope_freqs).unbind(-1)
        rotated = (real * cosine - imaginary * sine, real * sine + imaginary * cosine)
        return torch.stack(rotated, -1).flatten(-2).to(x.dtype)
    pairs = torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2).contiguous())
    return torch.view_as_real(pairs * rope_freqs).flatten(-2).to(x.dtype)


def sin_cos_table(grid: tuple[int, int], dim: int) -> Tensor:
    """Sines and cosines of column and row, (h * w, dim) fp32 in [-1, 1].

    "Attention is all you need" (1706.03762, section 3.5) per axis, in the order of MAE (2111.06377)
    and DiT (2212.09748), whose published weights expect it: the first half of the channels encodes
    the column, the second the row; each half holds all sines, then all cosines, at frequencies
    10000^(-i / (dim / 4)). The angles are computed in fp64.
    """
    quarter = dim // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    rows, columns = raster_positions(grid)
    angles = [columns * frequencies, rows * frequencies]  # each (h * w, dim / 4)
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=-1).float()


def _real_rotary_frequencies(grid: tuple[int, int], head_dim: int) -> Tensor:
    return torch.view_as_real(rotary_frequencies(grid, head_dim))


def interpolated_positions(
    table: Tensor, grid: tuple[int, int], new_grid: tuple[int, int]
) -> Tensor:
    """Learned positions (h * w, D) of a grid (h, w) -> (h' * w', D) of another, bicubic."""
    if grid == new_grid:
        return table
    maps = rearrange(table.float(), "(h w) d -> 1 d h w", h=grid[0])
    resized = F.interpolate(maps, new_grid, mode="bicubic", antialias=True)
    return rearrange(resized, "1 d h w -> (h w) d").to(table.dtype)


class FixedTable(nn.Module):
    """A constant tensor that moves with its model to any device but keeps its precision; it is not
    saved."""

    table: Tensor

    def __init__(self, make: Callable[[], Tensor]) -> None:
        super().__init__()
        self.make = make
        self.register_buffer("table", make(), persistent=False)

    @classmethod
    def sin_cos(cls, grid: tuple[int, int], dim: int) -> Self:
        """Sine-cosine positions, (h * w, dim) fp32, which are added to tokens."""
        return cls(partial(sin_cos_table, grid, dim))

    @classmethod
    def rotary(cls, grid: tuple[int, int], head_dim: int) -> Self:
        """Rotary frequencies as cosine and sine, (h * w, head_dim / 2, 2) fp32: real numbers,
        because gloo cannot broadcast complex ones."""
        return cls(partial(_real_rotary_frequencies, grid, head_dim))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """`Module.to`, `half` and similar calls change the device alone, not the type."""
        super()._apply(fn, recurse)
        self.table = self.make().to(self.table.device)
        return self
