"""VAR (Tian et al., 2404.02905), restated as its published code runs it: a peer to measure against.

At every scale it projects the class to the adaLN modulations of all blocks again, concatenates new
keys and values to a cache that grows, and runs the conditional and the unconditional rows in one
batch, at all scales. Attention is torch's, sampling is top-k, then top-p by a sort of the whole
vocabulary. The decoder is that of the tokenizer, a VQGAN, layer by layer. Training adds a mask of
L x L numbers in fp32 to the attention scores.

Names of weights are VAR's, which smalti's are too.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.prior.next_scale.model import NextScalePrior
from smalti.tokenizer.quantizers.multi_scale import MultiScaleQuantizer
from smalti.tokenizer.vq import VQTokenizer


class PlainAttention(nn.Module):
    """Self-attention with queries and keys of norm 1, and a cache while sampling."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width), persistent=False)
        self.scale_mul_1H11 = nn.Parameter(torch.zeros(1, heads, 1, 1))
        self.proj = nn.Linear(width, width)
        self.caching = False
        self.cached: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor, attn_bias: Tensor | None) -> Tensor:  # (B, T, width)
        batch, length, width = x.shape
        bias = torch.cat((self.q_bias, self.zero_k_bias, self.v_bias))
        qkv = F.linear(x, self.mat_qkv.weight, bias).view(batch, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, T, head_dim)
        q = F.normalize(q, dim=-1).mul(self.scale_mul_1H11.clamp_max(math.log(100)).exp())
        k = F.normalize(k, dim=-1)
        if self.caching:
            if self.cached is not None:
                k, v = torch.cat((self.cached[0], k), 2), torch.cat((self.cached[1], v), 2)
            self.cached = k, v
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_bias, scale=1.0)
        return self.proj(attended.transpose(1, 2).reshape(batch, length, width))


class PlainBlock(nn.Module):
    """Attention and feed-forward with adaptive norms; the class is projected in every call."""

    def __init__(self, width: int, heads: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.width = width
        self.attn = PlainAttention(width, heads)
        feed_forward = {"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)}
        self.ffn = nn.ModuleDict(feed_forward)
        self.norm = nn.LayerNorm(width, eps, elementwise_affine=False)
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, condition: Tensor, attn_bias: Tensor | None) -> Tensor:
        parts = self.ada_lin(condition).view(-1, 1, 6, self.width).unbind(2)
        gamma1, gamma2, scale1, scale2, shift1, shift2 = parts
        attended = self.attn(self.norm(x).mul(scale1.add(1)).add_(shift1), attn_bias)
        x = x + attended.mul_(gamma1)
        hidden = self.ffn["fc1"](self.norm(x).mul(scale2.add(1)).add_(shift2))
        return x + self.ffn["fc2"](F.gelu(hidden, approximate="tanh")).mul(gamma2)


class PlainVAR(nn.Module):
    """VAR with the weights of a next-scale prior, which must be class-conditional.

    `quantizer` is shared with the prior; all other weights are copies.
    """

    def __init__(self, prior: NextScalePrior) -> None:
        super().__init__()
        config, grids = prior.config, prior.config.spec.grids
        width, hidden = config.width, round(config.mlp_ratio * config.width)
        self.sides = [height for height, _ in grids]
        self.num_classes = config.num_classes
        self.class_emb = nn.Embedding(config.num_classes + 1, width)
        self.pos_start = nn.Parameter(torch.empty(1, config.spec.lengths[0], width))
        self.pos_1LC = nn.Parameter(torch.empty(1, config.spec.length, width))
        self.lvl_embed = nn.Embedding(len(grids), width)
        self.word_embed = nn.Linear(config.quantizer.codebook.code_dim, width)
        self.blocks = nn.ModuleList(
            PlainBlock(width, config.num_heads, hidden, config.norm_eps)
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(width, config.norm_eps, elementwise_affine=False)
        ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.head_nm = nn.ModuleDict({"ada_lin": ada_lin})
        self.head = nn.Linear(width, config.spec.vocab_size)
        levels = torch.cat([torch.full((s * s,), level) for level, s in enumerate(self.sides)])
        bias = torch.zeros(len(levels), len(levels))
        bias.masked_fill_(levels[:, None] < levels, -torch.inf)
        self.register_buffer("lvl_1L", levels[None], persistent=False)
        self.register_buffer("attn_bias", bias[None, None], persistent=False)
        own = {k: v for k, v in prior.state_dict().items() if not k.startswith("quantizer.")}
        self.load_state_dict(own)
        self.to(prior.head.weight.device)
        self.quantizers: list[MultiScaleQuantizer] = [prior.quantizer]  # not a module of the peer

    def get_logits(self, hidden: Tensor, condition: Tensor) -> Tensor:
        """(B, T, V) in fp32."""
        scale, shift = self.head_nm["ada_lin"](condition).view(len(condition), 1, 2, -1).unbind(2)
        return self.head(self.norm(hidden.float()).mul(scale.add(1)).add_(shift)).float()

    def next_input(self, scale: int, f_hat: Tensor, codes: Tensor) -> Tensor:
        """Add the codes (B, n) of a scale to the sum f_hat, in place; returns the sum at the
        resolution of the next scale, (B, d, h, w)."""
        quantizer, side, last = self.quantizers[0], self.sides[scale], self.sides[-1]
        vectors = F.embedding(codes, quantizer.codebook.weight)
        maps = vectors.transpose(1, 2).reshape(len(codes), -1, side, side)
        convolution = quantizer.residual_convs[quantizer.config.shared_out[scale]].conv
        ratio = quantizer.config.residual_ratio
        is_last = scale == len(self.sides) - 1
        maps = maps if is_last else F.interpolate(maps, (last, last), mode="bicubic")
        f_hat.add_(maps.mul(1 - ratio) + convolution(maps).mul_(ratio))
        if is_last:
            return f_hat
        return F.interpolate(f_hat, (self.sides[scale + 1],) * 2, mode="area")

    # -- sampling -------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self, labels: Tensor, guidance_scale: float, top_k: int = 0, top_p: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Codes (B, L) and their features (B, d, h, w); greedy if top_k is 1."""
        batch, cfg = len(labels), guidance_scale - 1
        nulls = torch.full_like(labels, self.num_classes)
        condition = self.class_emb(torch.cat((labels, nulls)))
        positions = self.lvl_embed(self.lvl_1L) + self.pos_1LC
        first = self.sides[0] ** 2
        x = condition[:, None].expand(-1, first, -1) + self.pos_start + positions[:, :first]
        weight = self.quantizers[0].codebook.weight
        f_hat = weight.new_zeros(batch, weight.shape[1], self.sides[-1], self.sides[-1])
        self._cache(True)
        codes, done = [], 0
        for scale, side in enumerate(self.sides):
            done += side * side
            for block in self.blocks:
                x = block(x, condition, None)
            logits = self.get_logits(x, condition)
            t = cfg * scale / (len(self.sides) - 1)
            logits = (1 + t) * logits[:batch] - t * logits[batch:]
            codes.append(draw(logits, top_k, top_p))
            following = self.next_input(scale, f_hat, codes[-1])
            if scale < len(self.sides) - 1:
                tokens = self.word_embed(following.flatten(2).transpose(1, 2))
                tokens = tokens + positions[:, done : done + self.sides[scale + 1] ** 2]
                x = tokens.repeat(2, 1, 1)
        self._cache(False)
        return torch.cat(codes, 1), f_hat

    def _cache(self, on: bool) -> None:
        for block in self.blocks:
            block.attn.caching, block.attn.cached = on, None

    # -- training -------------------------------------------------------------------------------

    def forward(self, codes: Tensor, labels: Tensor) -> Tensor:
        """The mean cross-entropy of codes (B, L)."""
        weight = self.quantizers[0].codebook.weight
        with torch.no_grad():
            f_hat = weight.new_zeros(len(codes), weight.shape[1], self.sides[-1], self.sides[-1])
            parts = codes.split([side * side for side in self.sides], 1)
            inputs = [
                self.next_input(scale, f_hat, part).flatten(2).transpose(1, 2)
                for scale, part in enumerate(parts[:-1])
            ]
        condition = self.class_emb(labels)
        start = condition[:, None].expand(-1, self.sides[0] ** 2, -1) + self.pos_start
        x = torch.cat((start, self.word_embed(torch.cat(inputs, 1))), 1)
        x = x + (self.lvl_embed(self.lvl_1L) + self.pos_1LC)
        for block in self.blocks:
            x = block(x, condition, self.attn_bias)
        logits = self.get_logits(x, condition)
        return F.cross_entropy(logits.flatten(0, 1), codes.flatten())


def draw(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """One code for each row of logits (B, n, V), which are changed; (B, n)."""
    if top_k > 0:
        least = logits.topk(top_k, sorted=False, dim=-1)[0].amin(-1, keepdim=True)
        logits.masked_fill_(logits < least, -torch.inf)
    if top_p > 0:
        ordered, order = logits.sort(dim=-1, descending=False)
        remove = ordered.softmax(dim=-1).cumsum_(dim=-1) <= 1 - top_p
        remove[..., -1:] = False
        logits.masked_fill_(remove.scatter(-1, order, remove), -torch.inf)
    probabilities = logits.softmax(dim=-1).view(-1, logits.shape[-1])
    return torch.multinomial(probabilities, 1, replacement=True).view(logits.shape[:2])


# -------------------------------------------------------------------------------------------------
# The decoder of VAR's tokenizer, with the weights of smalti's


@torch.no_grad()
def decode(tokenizer: VQTokenizer, f_hat: Tensor) -> Tensor:
    """Features (B, d, h, w) -> images (B, 3, H, W) in [-1, 1]."""
    decoder = tokenizer.decoder
    x = decoder.conv_in(tokenizer.post_quant_conv(f_hat))
    x = _block(decoder.mid.block_1, x)
    x = _attention(decoder.mid.attn_1, x)
    x = _block(decoder.mid.block_2, x)
    for level in reversed(decoder.up):
        for index, block in enumerate(level.block):
            x = _block(block, x)
            if len(level.attn):
                x = _attention(level.attn[index], x)
        if level.upsample is not None:
            x = _convolution(level.upsample.conv, F.interpolate(x, scale_factor=2, mode="nearest"))
    x = F.silu(_normalised(decoder.norm_out, x), inplace=True)
    return _convolution(decoder.conv_out, x).clamp_(-1, 1)


def _normalised(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    return F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)


def _convolution(layer: nn.Conv2d, x: Tensor) -> Tensor:
    return F.conv2d(x, layer.weight, layer.bias, padding=layer.padding)


def _block(block: nn.Module, x: Tensor) -> Tensor:
    hidden = _convolution(block.conv1, F.silu(_normalised(block.norm1, x), inplace=True))
    hidden = _convolution(block.conv2, F.silu(_normalised(block.norm2, hidden), inplace=True))
    shortcut = block.nin_shortcut
    return (x if shortcut is None else _convolution(shortcut, x)) + hidden


def _attention(layer: nn.Module, x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    normed = _normalised(layer.norm, x)
    q, k, v = (_convolution(part, normed).flatten(2) for part in (layer.q, layer.k, layer.v))
    weights = torch.bmm(q.transpose(1, 2), k).mul_(channels**-0.5).softmax(dim=2)
    attended = torch.bmm(v, weights.transpose(1, 2)).view(batch, channels, height, width)
    return x + _convolution(layer.proj_out, attended)
