"""DiT: a transformer that denoises latents (Peebles and Xie, 2212.09748). SiT has the same network.

The latent is cut into patches, one token each. Every block receives time and class through adaptive
layer norm whose gates start at zero ("adaLN-zero", section 3.2). Options follow LightningDiT
(2501.01423): rotary positions, SwiGLU, RMS norm, and normalised queries and keys.

Module names are those of the published weights, which load without renaming: `x_embedder.proj`,
`t_embedder.mlp.{0,2}`, `y_embedder.embedding_table`, `blocks.{i}.attn.{qkv,proj}`,
`blocks.{i}.mlp.{fc1,fc2}`, `blocks.{i}.adaLN_modulation.1`, `final_layer.linear` and
`final_layer.adaLN_modulation.1`. Two things differ: the published `pos_embed` (1, N, width) is a
constant here, `sin_cos_table` of the grid, to be compared and dropped when weights are converted;
and the options add `attn.q_norm`, `attn.k_norm` and `mlp.{w1,w2,w3}`.

Captions and pictures are further conditions. The tokens attend to a caption in every block, after
they attend to each other (PixArt-alpha, 2310.00426, section 2.3: `blocks.{i}.cross_attn`), and a
projection of the mean of its tokens is added to the embedding of time and class. The latents of a
picture are further channels of the noisy latents (latent diffusion, 2112.10752, section 4.3.2;
InstructPix2Pix, 2211.09800, section 3.2). The output layers of the one and the input weights of the
other start at zero: a class-conditional network that is continued with them is unchanged at first.

Shapes: B batch, C channels, (h, w) latent grid, p patch size, N = h w / p^2 tokens, T text tokens.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self, TypeVar, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from smalti.config import check_at_least
from smalti.data.latents import ContinuousSpec
from smalti.errors import ConfigurationError, DataError
from smalti.prior.adaln import Conditioning, Modulation, Parts, modulate
from smalti.prior.attention import FixedTable, attend, rotate
from smalti.prior.conditions.base import Combination, Condition, count, with_vectors
from smalti.prior.conditions.image import ImageCondition, ImageKind
from smalti.prior.conditions.text import (
    CaptionEmbedding,
    Embedded,
    KeysValues,
    TextAttention,
    TextCondition,
    TextConfig,
)
from smalti.prior.layers import RMSNorm, SwiGLU
from smalti.prior.packing import PackableLinear, gelu_of

NORM_EPS = 1e-6
MAX_PERIOD = 10000.0

Positions = Literal["sin-cos", "rotary", "both"]
FeedForward = Literal["gelu", "swiglu"]
Norm = Literal["layer", "rms"]


@dataclass(frozen=True)
class DiTConfig:
    """Sizes of a DiT; the preset dit-b/2 is DiT-B/2, which predicts noise and variance."""

    FROM_LATENTS: ClassVar[tuple[str, ...]] = ("in_channels", "grid", "num_classes")

    in_channels: int = 4  # C of the latents
    out_channels: int = 8  # 2 C where variances are learned, as in all published weights
    grid: tuple[int, int] = (32, 32)  # (h, w) of the latents
    patch_size: int = 2  # p, side of the square of latent positions that becomes one token
    width: int = 768  # channels of a token
    depth: int = 12  # number of blocks
    num_heads: int = 12  # attention heads
    mlp_ratio: float = 4.0  # hidden / width of the feed-forward; SwiGLU uses 2/3 of it, same cost
    num_classes: int = 1000  # the label table has one more row, for the null label; 0: that only
    positions: Positions = "sin-cos"  # sin-cos: added to tokens; rotary: rotates queries and keys
    feed_forward: FeedForward = "gelu"  # activation: gelu, or the gated swiglu
    norm: Norm = "layer"  # layer norm, or RMS norm
    qk_norm: bool = False  # RMS norm of each head's queries and keys: stabilises large models
    frequency_size: int = 256  # channels of the sinusoidal time embedding
    # The frequencies are 10000^(-i / (frequency_size / 2 - frequency_shift)); Diffusers' DiT: 1
    frequency_shift: int = 0
    mlp_norm_eps: float = NORM_EPS  # of the norms before the feed-forward; Diffusers' DiT: 1e-5

    def __post_init__(self) -> None:
        choices = {"positions": Positions, "feed_forward": FeedForward, "norm": Norm}
        for name, known in choices.items():
            if getattr(self, name) not in get_args(known):
                wrong, right = getattr(self, name), ", ".join(get_args(known))
                raise ConfigurationError(f'{name} is "{wrong}"; choose one of {right}')
        check_at_least(1, self, "in_channels", "out_channels", "width", "depth", "num_heads")
        check_at_least(0, self, "num_classes")
        if self.patch_size < 1 or min(self.grid) < 1 or any(s % self.patch_size for s in self.grid):
            raise ConfigurationError(
                f"a grid of {self.grid[0]} x {self.grid[1]} cannot be cut into patches of side "
                f"{self.patch_size}: choose a patch_size that divides both"
            )
        ContinuousSpec(self.in_channels, *self.grid)  # raises on sizes that no latents have
        if self.width % self.num_heads or self.width % 4:
            raise ConfigurationError(
                f"width {self.width} with {self.num_heads} heads: the width must be a multiple of"
                " both 4 and the number of heads"
            )
        if self.positions != "sin-cos" and self.head_dim % 4:
            raise ConfigurationError(
                f"width {self.width} with {self.num_heads} heads: with rotary positions each head "
                "needs a width that is a multiple of 4"
            )
        if not 0 < self.mlp_ratio < float("inf") or self.hidden < 1:
            raise ConfigurationError(f"mlp_ratio is {self.mlp_ratio}; it must be positive, like 4")
        if self.frequency_size < 2 or self.frequency_size % 2:
            raise ConfigurationError(
                f"frequency_size is {self.frequency_size}; it must be even, 2 or more"
            )
        if not 0 <= self.frequency_shift < self.frequency_size // 2:
            raise ConfigurationError(
                f"frequency_shift is {self.frequency_shift}; use 0, or 1 as in Diffusers' DiT"
            )
        if not 0 <= self.mlp_norm_eps < 1:
            raise ConfigurationError(
                f"mlp_norm_eps is {self.mlp_norm_eps}; use a small number, like 1e-6"
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.width // self.num_heads

    @property
    def token_grid(self) -> tuple[int, int]:
        """Patches per side, (h / patch_size, w / patch_size)."""
        return self.grid[0] // self.patch_size, self.grid[1] // self.patch_size

    @property
    def hidden(self) -> int:
        """Width of the feed-forward's hidden layer; SwiGLU's is rounded up to a multiple of 32."""
        hidden = self.mlp_ratio * self.width
        return int(hidden) if self.feed_forward == "gelu" else -(-int(hidden * 2 / 3) // 32) * 32

    def fitted(self, spec: ContinuousSpec, num_classes: int) -> Self:
        """This size of network for other latents; it predicts a variance if it did before."""
        return replace(
            self,
            in_channels=spec.channels,
            out_channels=spec.channels * (self.out_channels // self.in_channels),
            grid=(spec.height, spec.width),
            num_classes=num_classes,
        )


def _published() -> dict[str, DiTConfig]:
    """Table 1 of the paper, with patches of 2, 4 and 8, and also of 1."""
    sizes = {"s": (12, 384, 6), "b": (12, 768, 12), "l": (24, 1024, 16), "xl": (28, 1152, 16)}
    return {
        f"dit-{size}/{patch}": DiTConfig(
            patch_size=patch, depth=depth, width=width, num_heads=num_heads
        )
        for size, (depth, width, num_heads) in sizes.items()
        for patch in (1, 2, 4, 8)
    }


# For 8 x 8 latents on two CPU cores: 4 and 7 million parameters. Without q/k norm, which costs a
# sixth of the time of a step there and helps large models only.
_NANO = DiTConfig(
    in_channels=8,
    out_channels=8,
    grid=(8, 8),
    patch_size=1,
    width=192,
    depth=6,
    num_heads=3,
    num_classes=9,
    positions="both",
    feed_forward="swiglu",
    norm="rms",
)

PRESETS: dict[str, DiTConfig] = {
    **_published(),
    "dit-nano": _NANO,
    "dit-micro": replace(_NANO, width=256, num_heads=4),
}


# -------------------------------------------------------------------------------------------------
# Embeddings of time and class


def sinusoids(t: Tensor, size: int, shift: int = 0) -> Tensor:
    """cos(t w_i), then sin(t w_i), with w_i = 10000^(-i / (size / 2 - shift)): (B,) -> (B, size)
    fp32.

    The time embedding of DDPM (2006.11239). `shift` is 0 in guided diffusion and DiT, and 1 in the
    code of DDPM and in the DiT of Diffusers. `t` is not scaled: it is an index from 0 to 999 in
    DiT, and a time from 0 to 1 in SiT (2401.08740).
    """
    half = size // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device) / (half - shift)
    angles = t.float()[:, None] * torch.exp(-math.log(MAX_PERIOD) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedder(nn.Module):
    """linear(silu(linear(sinusoids(t)))).

    Computed in fp32 whatever the precision of the model: in bf16 the sinusoids of
    neighbouring times in [0, 1] would be equal.
    """

    def __init__(self, frequency_size: int, width: int, frequency_shift: int = 0) -> None:
        super().__init__()
        self.frequency_size = frequency_size
        self.frequency_shift = frequency_shift
        self.mlp = nn.Sequential(
            nn.Linear(frequency_size, width), nn.SiLU(), nn.Linear(width, width)
        )

    def forward(self, t: Tensor) -> Tensor:  # (B,) -> (B, width)
        weight1, bias1, weight2, bias2 = self.mlp.parameters()
        with torch.autocast(t.device.type, enabled=False):
            waves = sinusoids(t, self.frequency_size, self.frequency_shift)
            hidden = F.linear(waves, weight1.float(), bias1.float())
            embedded = F.linear(F.silu(hidden), weight2.float(), bias2.float())
        return embedded.to(weight2.dtype)


class LabelEmbedder(nn.Module):
    """One learned row per class, and a last row, `num_classes`, for the null label."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, labels: Tensor) -> Tensor:  # (B,) in [0, num_classes] -> (B, width)
        return self.embedding_table(labels)


# -------------------------------------------------------------------------------------------------
# Patches: each square of p x p latent positions is one token, in raster order


def patchify(x: Tensor, patch_size: int) -> Tensor:
    """(B, C, h, w) -> (B, N, C p p), channels first in each patch, as in a convolution weight."""
    p = patch_size
    return rearrange(x, "b c (rows p) (columns q) -> b (rows columns) (c p q)", p=p, q=p)


def unpatchify(patches: Tensor, token_grid: tuple[int, int], patch_size: int) -> Tensor:
    """(B, N, p p C), channels last in each patch, as in the published head -> (B, C, h, w)."""
    return rearrange(
        patches,
        "b (rows columns) (p q c) -> b c (rows p) (columns q)",
        rows=token_grid[0],
        p=patch_size,
        q=patch_size,
    )


class PatchEmbedder(nn.Module):
    """A linear map of each patch. The weight has the shape of a convolution, as published; its last
    input channels are those of an image condition."""

    def __init__(self, in_channels: int, patch_size: int, width: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, h, w) -> (B, N, width)
        weight, bias = self.proj.weight, self.proj.bias
        # The strided convolution as one matrix product.
        patches = patchify(x.to(weight.dtype), self.patch_size)
        tokens = F.linear(patches, weight.flatten(1), bias)
        return tokens.to(weight.dtype)  # under autocast: the residual stream stays in fp32


# -------------------------------------------------------------------------------------------------
# Blocks: adaLN-zero (2212.09748, section 3.2 and figure 3)


class DiTAttention(nn.Module):
    """Multi-head self-attention without a mask."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = PackableLinear(config.width, 3 * config.width)  # rows q | k | v, head-major
        self.proj = PackableLinear(config.width, config.width)
        use_norm = config.qk_norm
        self.q_norm = RMSNorm(config.head_dim, NORM_EPS) if use_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, NORM_EPS) if use_norm else nn.Identity()

    def forward(self, x: Tensor, rope_freqs: Tensor | None) -> Tensor:  # (B, N, width)
        query, key, value = rearrange(  # each (B, heads, N, head_dim)
            self.qkv(x), "b n (k heads d) -> k b heads n d", k=3, heads=self.num_heads
        )
        query, key = self.q_norm(query), self.k_norm(key)
        if rope_freqs is not None:
            query, key = rotate(query, rope_freqs), rotate(key, rope_freqs)
        attended = attend(query, key, value, causal=False)
        return self.proj(rearrange(attended, "b heads n d -> b n (heads d)"))


class DiTMLP(nn.Module):
    """fc2(gelu(fc1 x)), with the tanh approximation of GELU, as published."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = PackableLinear(dim, hidden)
        self.fc2 = PackableLinear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(gelu_of(self.fc1, x))


def _norm(config: DiTConfig, eps: float = NORM_EPS) -> nn.Module:
    """A norm without gain and bias, which the modulation supplies."""
    kind = nn.RMSNorm if config.norm == "rms" else nn.LayerNorm
    return kind(config.width, eps=eps, elementwise_affine=False)


class DiTBlock(nn.Module):
    """x + gate attention(modulate(norm x)), then the same with the feed-forward (figure 3). With
    gates of zero, as at the start of training, the block is the identity.

    In a network with captions the tokens attend to them between the two, without norm and gate, as
    in PixArt-alpha.
    """

    def __init__(self, config: DiTConfig, has_text: bool = False) -> None:
        super().__init__()
        self.norm1 = _norm(config)
        self.attn = DiTAttention(config)
        self.cross_attn = TextAttention(config.width, config.num_heads) if has_text else None
        self.norm2 = _norm(config, config.mlp_norm_eps)
        self.mlp = (
            DiTMLP(config.width, config.hidden)
            if config.feed_forward == "gelu"
            else SwiGLU(config.width, config.hidden, dropout=0.0)
        )
        self.adaLN_modulation = Modulation(config.width, 6)

    def forward(
        self,
        x: Tensor,
        c: Tensor | Parts,
        rope_freqs: Tensor | None,
        embedded: Embedded | None = None,
        keys_values: KeysValues | None = None,
    ) -> Tensor:
        """Tokens x (B, N, width) and conditioning c (B, width) -> (B, N, width).

        Args:
            c: or the modulation, if it was computed from c before.
            keys_values: of the caption, if they were computed before.
        """
        parts = self.adaLN_modulation(c) if isinstance(c, Tensor) else c  # each (B, 1, width)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        attended = self.attn(modulate(self.norm1(x), shift1, scale1), rope_freqs)
        x = torch.addcmul(x, gate1, attended)  # x + gate1 attended, in one kernel
        if self.cross_attn is not None and embedded is not None:
            x = x + self.cross_attn(x, embedded, keys_values)
        return torch.addcmul(x, gate2, self.mlp(modulate(self.norm2(x), shift2, scale2)))


class FinalLayer(nn.Module):
    """linear(modulate(norm x)): tokens (B, N, width) to patches (B, N, p p C_out)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.norm_final = _norm(config)
        self.linear = nn.Linear(config.width, config.patch_size**2 * config.out_channels)
        self.adaLN_modulation = Modulation(config.width, 2)

    def forward(self, x: Tensor, c: Tensor | Parts) -> Tensor:
        shift, scale = self.adaLN_modulation(c) if isinstance(c, Tensor) else c
        return self.linear(modulate(self.norm_final(x), shift, scale))


# -------------------------------------------------------------------------------------------------
# The network


class GridPositions(nn.Module):
    """Positions of the tokens of one grid; an attribute is None where a network does not use it."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        grid, use = config.token_grid, config.positions
        self.pos_embed = FixedTable.sin_cos(grid, config.width) if use != "rotary" else None
        self.rope_freqs = FixedTable.rotary(grid, config.head_dim) if use != "sin-cos" else None


class DiT(nn.Module):
    """Latents (B, C, h, w), times (B,) and conditions (B,) -> (B, C_out, h, w).

    Times are in the network's own units, and labels lie in [0, num_classes], the last being the
    null label: the prior scales times, drops conditions, and defines what the output means
    (velocity, noise, ...). Computed in the precision of the weights or of autocast, returned in
    that of the latents.

    Args:
        text: the captions that are part of the conditions; None: there are none.
        image_channels: channels of the pictures that are part of the conditions; 0: there are none.
        vectors: the conditions that are added to the row of the class, see `vector_kinds`.
        has_null: see `CaptionEmbedding`.
        grids: further grids (h, w) that the latents of a batch may have.
    """

    def __init__(
        self,
        config: DiTConfig,
        text: TextConfig | None = None,
        image_channels: int = 0,
        vectors: nn.ModuleDict | None = None,
        has_null: bool = True,
        grids: Sequence[tuple[int, int]] = (),
    ) -> None:
        super().__init__()
        self.config, self.image_channels = config, image_channels
        channels = config.in_channels + image_channels
        self.x_embedder = PatchEmbedder(channels, config.patch_size, config.width)
        self.t_embedder = TimestepEmbedder(
            config.frequency_size, config.width, config.frequency_shift
        )
        self.y_embedder = LabelEmbedder(config.num_classes, config.width)
        positions = GridPositions(config)
        self.pos_embed, self.rope_freqs = positions.pos_embed, positions.rope_freqs
        self.grid_positions = nn.ModuleDict(
            {_name(grid): GridPositions(replace(config, grid=grid)) for grid in grids}
        )
        self.blocks = nn.ModuleList(
            DiTBlock(config, has_text=text is not None) for _ in range(config.depth)
        )
        self.final_layer = FinalLayer(config)
        self.caption_embedder = (
            None if text is None else CaptionEmbedding(text, config.width, has_null)
        )
        self.caption_mean = None if text is None else nn.Linear(config.width, config.width)
        self.vectors = nn.ModuleDict() if vectors is None else vectors
        self._initialise()

    def _initialise(self) -> None:
        """As published: linear layers Xavier, embeddings N(0, 0.02^2), biases zero; modulations and
        the last layer zero, so that every block is the identity and the first output is 0. What
        captions and pictures add to a class-conditional network is zero, too."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1))  # a view; patches as vectors
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters():
            if name.startswith(("t_embedder", "y_embedder")) and name.endswith("weight"):
                nn.init.normal_(parameter, std=0.02)
        for layer in self.zero_layers():
            nn.init.zeros_(layer.weight)
        if self.image_channels:
            nn.init.zeros_(self.x_embedder.proj.weight[:, self.config.in_channels :])

    def zero_layers(self) -> list[nn.Linear]:
        """The linear layers that start at zero."""
        modulations = [m for m in self.modules() if isinstance(m, Modulation)]
        captions = [m.proj for m in self.modules() if isinstance(m, TextAttention)]
        if self.caption_mean is not None:
            captions.append(self.caption_mean)
        return [self.final_layer.linear, *(m[1] for m in modulations), *captions]  # type: ignore[list-item]

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Latents (B, C, h, w), times (B,) and conditions (B,) -> (B, C_out, h, w).

        Args:
            condition: labels (B,), a `TextCondition`, an `ImageCondition`, or a `Combination`; or
                what `conditioning` has computed from it.
        """
        known = condition if isinstance(condition, Conditioning) else None
        labels, text, image = self._parts(condition if known is None else known.condition)
        self._check(x, t, labels, text, image)
        given = self.conditioning(condition) if known is None else known
        depth, grid = len(self.blocks), (x.shape[2], x.shape[3])
        positions: Any = self if grid == self.config.grid else self.grid_positions[_name(grid)]
        if image is not None:
            x = torch.cat([x, image.latents.to(x.dtype)], 1)
        tokens = self.x_embedder(x)  # (B, N, width)
        if positions.pos_embed is not None:
            tokens = tokens + positions.pos_embed.table.to(tokens.dtype)
        # (N, head_dim / 2) complex, stored as pairs of real numbers
        rotary = positions.rope_freqs
        freqs = None if rotary is None else torch.view_as_complex(rotary.table)
        # Each part of the network gets c, or its modulation if that is known.
        c = given.modulations or [self.t_embedder(t) + given.embedded.vector] * (depth + 1)
        keys_values = given.keys_values or [None] * depth
        for block, of_block, captions in zip(self.blocks, c, keys_values, strict=False):
            tokens = block(tokens, of_block, freqs, given.embedded, captions)
        patches = self.final_layer(tokens, c[-1]).to(x.dtype)  # (B, N, p p C_out)
        size = self.config.patch_size
        return unpatchify(patches, (grid[0] // size, grid[1] // size), size)

    def _parts(
        self, condition: Condition
    ) -> tuple[Tensor | None, TextCondition | None, ImageCondition | None]:
        """The labels (B,), captions and pictures of a condition."""
        only = next(iter(self.vectors), "")  # kind of a condition that is no combination
        parts = condition.parts if isinstance(condition, Combination) else {only: condition}
        known = [part for name, part in parts.items() if name not in self.vectors]
        return _part(known, Tensor), _part(known, TextCondition), _part(known, ImageCondition)

    def conditioning(self, condition: Condition, keep_text: bool = False) -> Conditioning:
        """What does not depend on latents and times.

        Args:
            keep_text: whether to compute the keys and values of captions here, for many passes.
        """
        labels, text, _ = self._parts(condition)
        if labels is None:
            device = self.y_embedder.embedding_table.weight.device
            labels = torch.full((count(condition),), self.config.num_classes, device=device)
        embedded = self.embedded(labels, text)
        vector = with_vectors(embedded.vector, self.vectors, condition)
        embedded = replace(embedded, vector=vector)
        if not (keep_text and embedded.tokens is not None):
            return Conditioning(condition, embedded)
        layers: Any = [block.cross_attn for block in self.blocks]
        keys_values = tuple(layer.keys_values(embedded.tokens) for layer in layers)
        return Conditioning(condition, embedded, keys_values)

    def modulations(self, c: Tensor) -> list[Parts]:
        """Those of each block and of the final layer, from c (B, width)."""
        layers: Any = [*self.blocks, self.final_layer]
        return [layer.adaLN_modulation(c) for layer in layers]

    def embedded(self, labels: Tensor, text: TextCondition | None) -> Embedded:
        """The embedded condition; an image is part of the latents instead."""
        row = self.y_embedder(labels)
        if text is None:
            return Embedded(row)
        assert self.caption_embedder is not None and self.caption_mean is not None
        caption = self.caption_embedder.embedded(text)
        return Embedded(row + self.caption_mean(caption.vector), caption.tokens, caption.mask)

    def _check(
        self,
        x: Tensor,
        t: Tensor,
        labels: Tensor | None,
        text: TextCondition | None,
        image: ImageCondition | None,
    ) -> None:
        expected, given = (self.config.in_channels, *self.config.grid), tuple(x.shape[1:])
        known = given[:1] == expected[:1] and _name(given[1:]) in self.grid_positions
        if given != expected and not known:
            raise DataError(
                f"latents have shape {tuple(x.shape)}; this network takes (B, "
                f"{', '.join(map(str, expected))})"
            )
        for name, value in (("times", t), ("labels", labels)):
            if value is not None and value.shape != x.shape[:1]:
                raise DataError(
                    f"{name} have shape {tuple(value.shape)}; give one for each of the "
                    f"{len(x)} latents"
                )
        for name, takes, part in (
            ("captions", self.caption_embedder is not None, text),
            ("pictures", bool(self.image_channels), image),
        ):
            if takes != (part is not None) or (part is not None and len(part) != len(x)):
                found = "none were" if part is None else f"{len(part)} were"
                wanted = f"{len(x)}, one for each of the latents" if takes else "none"
                raise DataError(f"{found} given of {name}; this network takes {wanted}")
        if image is not None:
            ImageKind(self.image_channels, (x.shape[2], x.shape[3])).check(image)


def _name(grid: tuple[int, ...]) -> str:
    """The key of a grid (h, w)."""
    return "x".join(map(str, grid))


T = TypeVar("T")


def _part(parts: Iterable[Condition], kind: type[T]) -> T | None:
    """The condition of this type, None if there is none."""
    return next((part for part in parts if isinstance(part, kind)), None)
