"""Softmax attention, and the cache that makes decoding linear in what has been written."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor


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
