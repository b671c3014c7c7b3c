"""LlamaGen (Sun et al., 2406.06525), restated as its published code samples: a peer to measure.

The norm is computed step by step. New keys and values are written into a cache by index; attention
reads the whole cache, also where nothing is written yet, under a mask. w1 and w3 are two products.
A guided step runs conditional and unconditional rows in one batch. Sampling sorts for top-p, and
selects for top-k, in every step.

Names of weights are LlamaGen's, which smalti's are too; the tensors are shared.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from smalti.prior.next_token.config import NextTokenConfig
from smalti.prior.next_token.model import NextTokenPrior


class PlainNorm(nn.Module):
    """x / rms(x) * weight, the quotient in fp32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        values = x.float()
        normed = values * torch.rsqrt(torch.mean(values * values, dim=-1, keepdim=True) + self.eps)
        return normed.type_as(x) * self.weight


class PlainAttention(nn.Module):
    """Causal self-attention with a cache of a fixed length."""

    def __init__(self, config: NextTokenConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = (
            config.num_heads,
            config.kv_heads,
            config.head_dim,
        )
        rows = config.width + 2 * config.kv_heads * config.head_dim
        self.wqkv = nn.Linear(config.width, rows, bias=False)
        self.wo = nn.Linear(config.width, config.width, bias=False)

    def start(self, rows: int, length: int) -> None:
        """Allocate the cache."""
        like, shape = self.wqkv.weight, (rows, self.kv_heads, length, self.head_dim)
        self.k_cache, self.v_cache = like.new_zeros(shape), like.new_zeros(shape)

    def forward(self, x: Tensor, freqs: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        batch, length, width = x.shape
        kv_width = self.kv_heads * self.head_dim
        q, k, v = self.wqkv(x).split([width, kv_width, kv_width], dim=-1)
        q = rotated(q.view(batch, length, self.heads, self.head_dim), freqs)
        k = rotated(k.view(batch, length, self.kv_heads, self.head_dim), freqs)
        v = v.view(batch, length, self.kv_heads, self.head_dim)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        self.k_cache[:, :, positions] = k
        self.v_cache[:, :, positions] = v
        keys = self.k_cache.repeat_interleave(self.heads // self.kv_heads, dim=1)
        values = self.v_cache.repeat_interleave(self.heads // self.kv_heads, dim=1)
        attended = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        return self.wo(attended.transpose(1, 2).contiguous().view(batch, length, width))


class PlainBlock(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: NextTokenConfig) -> None:
        super().__init__()
        width, hidden = config.width, config.feed_forward_hidden
        self.attention_norm = PlainNorm(width, config.norm_eps)
        self.attention = PlainAttention(config)
        self.ffn_norm = PlainNorm(width, config.norm_eps)
        self.feed_forward = nn.ModuleDict(
            {
                "w1": nn.Linear(width, hidden, bias=False),
                "w3": nn.Linear(width, hidden, bias=False),
                "w2": nn.Linear(hidden, width, bias=False),
            }
        )

    def forward(self, x: Tensor, freqs: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), freqs, positions, mask)
        normed, parts = self.ffn_norm(x), self.feed_forward
        return x + parts["w2"](F.silu(parts["w1"](normed)) * parts["w3"](normed))


class PlainLlamaGen(nn.Module):
    """LlamaGen with the weights of a class-conditional next-token prior."""

    def __init__(self, prior: NextTokenPrior) -> None:
        super().__init__()
        config = prior.config
        self.null, self.length = config.num_classes, config.spec.length
        with torch.device("meta"):
            self.cls_embedding = nn.Embedding(config.num_classes + 1, config.width)
            self.tok_embeddings = nn.Embedding(config.spec.vocab_size, config.width)
            self.layers = nn.ModuleList(PlainBlock(config) for _ in range(config.depth))
            self.norm = PlainNorm(config.width, config.norm_eps)
            self.output = nn.Linear(config.width, config.spec.vocab_size, bias=False)
        self.load_state_dict(prior.state_dict(), assign=True)
        self.freqs = torch.view_as_real(prior.rope_freqs(self.output.weight.device))

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:  # (B, T, width) -> (B, T, V)
        mask = self.causal_mask[: len(x), None, positions]
        freqs = self.freqs[positions]
        for block in self.layers:
            x = block(x, freqs, positions, mask)
        return self.output(self.norm(x)).float()

    @torch.no_grad()
    def sample(self, labels: Tensor, guidance_scale: float, top_k: int, top_p: float) -> Tensor:
        """Codes (B, L); greedy if top_k is 1."""
        guided, device = guidance_scale != 1, labels.device
        rows = len(labels) * (2 if guided else 1)
        padded = -(-(1 + self.length) // 8) * 8
        for block in self.layers:
            block.attention.start(rows, padded)
        ones = torch.ones(padded, padded, dtype=torch.bool, device=device)
        self.causal_mask = ones.tril().unsqueeze(0).repeat(rows, 1, 1)
        condition = torch.cat([labels, torch.full_like(labels, self.null)]) if guided else labels
        codes = torch.empty(len(labels), self.length, dtype=torch.int64, device=device)
        x, positions = self.cls_embedding(condition)[:, None], torch.zeros(1, dtype=torch.int64)
        positions = positions.to(device)
        with sdpa_kernel(SDPBackend.MATH):
            for step in range(self.length):
                logits = self(x, positions)
                if guided:
                    conditional, unconditional = logits.chunk(2)
                    logits = unconditional + (conditional - unconditional) * guidance_scale
                code = draw(logits[:, -1], top_k, top_p)
                codes[:, step] = code[:, 0]
                x = self.tok_embeddings(torch.cat([code, code]) if guided else code)
                positions = positions + 1
        return codes


def rotated(x: Tensor, freqs: Tensor) -> Tensor:
    """Pairs of channels of x (B, T, heads, head_dim), rotated by freqs (T, head_dim / 2, 2)."""
    pairs = x.float().reshape(*x.shape[:-1], -1, 2)
    freqs = freqs.view(1, pairs.shape[1], 1, pairs.shape[3], 2)
    turned = torch.stack(
        [
            pairs[..., 0] * freqs[..., 0] - pairs[..., 1] * freqs[..., 1],
            pairs[..., 1] * freqs[..., 0] + pairs[..., 0] * freqs[..., 1],
        ],
        dim=-1,
    )
    return turned.flatten(3).type_as(x)


def draw(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """One code for each row of logits (B, V); (B, 1)."""
    if top_k > 0:
        least = torch.topk(logits, top_k)[0][..., -1, None]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p < 1:
        ordered, order = torch.sort(logits, descending=True)
        remove = ordered.softmax(dim=-1).cumsum(dim=-1) > top_p
        remove[..., 1:] = remove[..., :-1].clone()
        remove[..., 0] = False
        logits = logits.masked_fill(remove.scatter(1, order, remove), -torch.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1)
