"""Causal self-attention, and the cache that makes decoding linear in what has been written."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.prior.layers import rotate


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


class CausalAttention(nn.Module):
    """Each token attends to itself and to earlier ones."""

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.wqkv = nn.Linear(dim, 3 * dim, bias=False)  # rows q | k | v, each head-major
        self.wo = nn.Linear(dim, dim, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, table: Tensor, layer: int, cache: KeyValueCache | None
    ) -> Tensor:  # (B, T, dim)
        query, key, value = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, T, head_dim)
            for part in self.wqkv(x).chunk(3, dim=-1)
        )
        query, key = rotate(query, table), rotate(key, table)
        if cache is not None:
            key, value = cache.write(layer, key, value)
        # A single new token may see everything; several start an empty cache or have none.
        attended = attend(query, key, value, causal=query.shape[2] > 1)
        return self.dropout(self.wo(attended.transpose(1, 2).flatten(2)))


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention, (B, heads, T, head_dim).

    On a CPU always in fp32: torch's bf16 kernel is several times slower there.

    Args:
        causal: whether query i sees keys 0 to i alone.
        mask: (T, keys) bool, True where a query may see a key.
        scale: what scores are multiplied by; None is 1 / sqrt(head_dim).
    """
    if query.device.type != "cpu":
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal, scale=scale
        )
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(
            query.float(),
            key.float(),
            value.float(),
            attn_mask=mask,
            is_causal=causal,
            scale=scale,
        ).to(query.dtype)
