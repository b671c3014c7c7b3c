"""A transformer block of the next-token prior: causal attention and feed-forward (Llama, as in
LlamaGen, 2406.06525). Module names are LlamaGen's."""

from torch import Tensor, nn

from smalti.prior.attention import KeyValueCache, attend
from smalti.prior.drop_path import DropPath
from smalti.prior.layers import RMSNorm, SwiGLU, rotate
from smalti.prior.next_token.config import NextTokenConfig


class CausalAttention(nn.Module):
    """Each token attends to itself and to earlier ones.

    With fewer key and value heads than heads, neighbouring heads share them (grouped queries,
    2305.13245).
    """

    def __init__(self, config: NextTokenConfig) -> None:
        super().__init__()
        self.num_heads, self.kv_heads = config.num_heads, config.kv_heads
        kv_dim = config.kv_heads * config.head_dim
        # rows q | k | v, each head-major
        self.wqkv = nn.Linear(config.width, config.width + 2 * kv_dim, bias=False)
        self.wo = nn.Linear(config.width, config.width, bias=False)
        self.q_norm = self.k_norm = None
        if config.qk_norm:  # of every head (2302.05442): keeps scores in range
            self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.norm_eps)
        self.weight_dropout = config.attention_dropout
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        table: Tensor,
        mask: Tensor | None,
        layer: int,
        cache: KeyValueCache | None,
    ) -> Tensor:  # (B, T, width)
        heads = (self.num_heads, self.kv_heads, self.kv_heads)
        query, key, value = (
            self.wqkv(x).unflatten(-1, (sum(heads), -1)).transpose(1, 2).split(heads, dim=1)
        )  # (B, heads, T, head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = rotate(query, table), rotate(key, table)
        if cache is not None:
            key, value = cache.write(layer, key, value)
        # A single new token may see everything; several start an empty cache or have none.
        causal = mask is None and query.shape[2] > 1
        dropout = self.weight_dropout if self.training else 0.0
        attended = attend(query, key, value, causal, mask, dropout=dropout)
        return self.dropout(self.wo(attended.transpose(1, 2).flatten(2)))


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: NextTokenConfig, drop_path: float) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = CausalAttention(config)
        self.ffn_norm = RMSNorm(config.width, config.norm_eps)
        self.feed_forward = SwiGLU(config.width, config.feed_forward_hidden, config.dropout)
        self.drop_path = DropPath(drop_path)

    def forward(
        self,
        x: Tensor,
        table: Tensor,
        mask: Tensor | None,
        layer: int,
        cache: KeyValueCache | None,
    ) -> Tensor:  # (B, T, width)
        attended = self.attention(self.attention_norm(x), table, mask, layer, cache)
        x = x + self.drop_path(attended)
        return x + self.drop_path(self.feed_forward(self.ffn_norm(x)))
