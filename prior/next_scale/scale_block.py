"""A transformer block of the next-scale prior: attention between scales, feed-forward, and adaptive
norms (VAR, 2404.02905). Module names are VAR's."""

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.prior.adaln import adaptive_norm, as_parts, condition_projection
from smalti.prior.attention import KeyValueCache, attend
from smalti.prior.drop_path import DropPath
from smalti.prior.next_scale.config import NextScaleConfig

PARTS = 6  # of a block's modulation: gate, scale and shift of attention and feed-forward
MAX_LOG_SCALE = math.log(100)  # of attention, where it is learned
INITIAL_SCALE = 4.0
MODULATION_INIT = 0.5  # scales and shifts begin this much smaller than other projections


class ScaleAttention(nn.Module):
    """Self-attention, by default between queries and keys of length 1 (QK norm, 2010.04245):
    a head's scores are e^s cos(q, k) with a learned s <= ln 100."""

    def __init__(self, config: NextScaleConfig) -> None:
        super().__init__()
        width = config.width
        self.num_heads = config.num_heads
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)  # rows q | k | v, each head-major
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))  # keys have none: softmax would not see it
        self.proj = nn.Linear(width, width)
        self.dropout = nn.Dropout(config.dropout)
        self.scale = 0.25 / math.sqrt(width // config.num_heads)  # VAR's, if it is not learned
        self.register_parameter("scale_mul_1H11", None)
        if config.qk_l2_norm:
            initial = torch.full((1, config.num_heads, 1, 1), math.log(INITIAL_SCALE))
            self.scale_mul_1H11 = nn.Parameter(initial)

    def forward(
        self, x: Tensor, mask: Tensor | None, layer: int, cache: KeyValueCache | None
    ) -> Tensor:  # (B, T, width)
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        query, key, value = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, T, head_dim)
            for part in F.linear(x, self.mat_qkv.weight, bias).chunk(3, dim=-1)
        )
        scale = self.scale
        if self.scale_mul_1H11 is not None:
            query = F.normalize(query.float(), dim=-1)
            query = (query * self.scale_mul_1H11.clamp(max=MAX_LOG_SCALE).exp()).to(value.dtype)
            key = F.normalize(key.float(), dim=-1).to(value.dtype)
            scale = 1.0
        if cache is not None:
            key, value = cache.write(layer, key, value)
        attended = attend(query, key, value, mask=mask, scale=scale)
        return self.dropout(self.proj(attended.transpose(1, 2).flatten(2)))


class FeedForward(nn.Module):
    """fc2(gelu(fc1 x)), with the tanh approximation of GELU."""

    def __init__(self, config: NextScaleConfig) -> None:
        super().__init__()
        hidden = round(config.mlp_ratio * config.width)
        self.fc1 = nn.Linear(config.width, hidden)
        self.fc2 = nn.Linear(hidden, config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, width)
        return self.dropout(self.fc2(F.gelu(self.fc1(x), approximate="tanh")))


class Block(nn.Module, ABC):
    """x + gate1 attention(norm1(x)), then x + gate2 feed_forward(norm2(x))."""

    def __init__(self, config: NextScaleConfig, drop_path: float) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.attn = ScaleAttention(config)
        self.ffn = FeedForward(config)
        self.drop_path = DropPath(drop_path)

    @abstractmethod
    def modulation(self, condition: Tensor) -> Tensor:
        """What the class says to this block, (B, 1, 6, width): gate1, gate2, scale1, scale2,
        shift1, shift2. It is the same at every scale."""

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        mask: Tensor | None,
        layer: int,
        cache: KeyValueCache | None,
    ) -> Tensor:  # (B, T, width)
        gate1, gate2, scale1, scale2, shift1, shift2 = modulation.unbind(2)
        attended = self.attn(adaptive_norm(x, scale1, shift1, self.eps), mask, layer, cache)
        x = x + self.drop_path(attended * gate1)
        return x + self.drop_path(self.ffn(adaptive_norm(x, scale2, shift2, self.eps)) * gate2)


class OwnBlock(Block):
    """A block with a condition projection of its own: a third of the model's parameters."""

    def __init__(self, config: NextScaleConfig, drop_path: float) -> None:
        super().__init__(config, drop_path)
        self.ada_lin = condition_projection(config.width, PARTS)

    def modulation(self, condition: Tensor) -> Tensor:
        """Of the class embedding (B, width)."""
        return as_parts(self.ada_lin(condition), condition.shape[-1])


class SharedBlock(Block):
    """A block that adds an offset of its own to the projection that all blocks share."""

    def __init__(self, config: NextScaleConfig, drop_path: float) -> None:
        super().__init__(config, drop_path)
        width = config.width
        self.ada_gss = nn.Parameter(torch.randn(1, 1, PARTS, width) / math.sqrt(width))

    def modulation(self, condition: Tensor) -> Tensor:
        """Of the shared projection (B, 6 width)."""
        return as_parts(condition, self.ada_gss.shape[-1]) + self.ada_gss


def begin_gently(parts: Tensor, gate_init: float) -> None:
    """Shrink the first values of a modulation, whose first dimension is its six parts: the gates by
    gate_init, so that a new block hardly changes its input, scales and shifts by a half."""
    with torch.no_grad():
        parts[:2] *= gate_init
        parts[2:] *= MODULATION_INIT
