"""The byte encoder: a small bidirectional transformer over the UTF-8 bytes of a caption, which is
part of a prior and trained with it. It works without any download."""

from einops import rearrange
from torch import Tensor, nn

from smalti.errors import ConfigurationError
from smalti.prior.attention import attend, rotary_frequencies, rotate
from smalti.prior.layers import RMSNorm, SwiGLU

BYTES = "bytes"  # the name of this encoder

# The numbers of ByT5 (2105.13626): padding, end of text, unknown (never used), then the bytes.
PADDING, END, FIRST_BYTE = 0, 1, 3
VOCAB_SIZE = FIRST_BYTE + 256


class ByteBlock(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)); every token attends to every other.

    Args:
        dim: channels; attention has heads of 64 channels, or one head.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.num_heads = max(1, dim // 64)
        self.attention_norm, self.ffn_norm = RMSNorm(dim, 1e-5), RMSNorm(dim, 1e-5)
        self.wqkv = nn.Linear(dim, 3 * dim, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)
        hidden = -(-8 * dim // 96) * 32  # 8/3 dim, rounded up to a multiple of 32
        self.feed_forward = SwiGLU(dim, hidden, dropout=0.0)

    def forward(self, x: Tensor, rope_freqs: Tensor, mask: Tensor) -> Tensor:  # (B, T, dim)
        qkv = self.wqkv(self.attention_norm(x))
        query, key, value = rearrange(qkv, "b t (n h d) -> n b h t d", n=3, h=self.num_heads)
        query, key = rotate(query, rope_freqs), rotate(key, rope_freqs)
        attended = attend(query, key, value, mask=mask)
        x = x + self.wo(rearrange(attended, "b h t d -> b t (h d)"))
        return x + self.feed_forward(self.ffn_norm(x))


class ByteEncoder(nn.Module):
    """Ids of bytes (B, T) -> features (B, T, dim): a bidirectional transformer with rotary
    positions, which is trained with the prior. Positions are relative, so padding shifts nothing.

    Raises:
        ConfigurationError: `dim` does not divide into heads.
    """

    def __init__(self, dim: int, depth: int = 2) -> None:
        super().__init__()
        self.head_dim, rest = divmod(dim, max(1, dim // 64))
        if rest or self.head_dim % 4 or dim < 4:
            raise ConfigurationError(
                f"text_dim is {dim}, which the byte encoder cannot divide into heads of about 64 "
                "channels, each a multiple of 4: set it to a multiple of 64"
            )
        self.embedding = nn.Embedding(VOCAB_SIZE, dim)
        self.blocks = nn.ModuleList(ByteBlock(dim) for _ in range(depth))
        self.norm = RMSNorm(dim, 1e-5)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Features (B, T, dim).

        Args:
            ids: (B, T) int64, as of `tokenize_bytes`.
            mask: (B, T) bool, True at tokens; no token attends to padding.
        """
        length = ids.shape[1]
        rope_freqs = rotary_frequencies((1, length), self.head_dim).to(ids.device)
        keys = mask[:, None, None].expand(-1, 1, length, -1)  # (B, 1, T, T)
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x, rope_freqs, keys)
        return self.norm(x)
