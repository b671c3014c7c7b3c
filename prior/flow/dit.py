"""DiT: a transformer that denoises latents (Peebles and Xie, 2212.09748); SiT's is the same.

The latent is cut into patches; every block is told the time and the class through adaptive layer
norm whose gates start at zero ("adaLN-zero", section 3.2). Options follow LightningDiT
(2501.01423): rotary positions, SwiGLU, RMS norm, and normalised queries and keys.

Names are those of the published weights, which fit without renaming: `x_embedder.proj`,
`t_embedder.mlp.{0,2}`, `y_embedder.embedding_table`, `blocks.{i}.attn.{qkv,proj}`,
`blocks.{i}.mlp.{fc1,fc2}`, `blocks.{i}.adaLN_modulation.1`, `final_layer.linear` and
`final_layer.adaLN_modulation.1`. Two things differ: `pos_embed` (1, N, width) is no weight here but
`sin_cos_table` of the grid, to be compared and dropped; and the options add `attn.q_norm`,
`attn.k_norm` and `mlp.{w1,w2,w3}`, which DiT and SiT do not have.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal, Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.config import check_at_least
from smalti.data.latents import ContinuousSpec
from smalti.errors import SmaltiError
from smalti.prior.adaln import Modulation, modulate
from smalti.prior.attention import FixedTable, attend, rotate
from smalti.prior.layers import RMSNorm, SwiGLU

# -------------------------------------------------------------------------------------------------
# What a denoising network is told beside its input: the time and the class.

MAX_PERIOD = 10000.0


def sinusoids(t: Tensor, size: int, shift: int = 0) -> Tensor:
    """cos(t w_i), then sin(t w_i), with w_i = 10000^(-i / (size / 2 - shift)): (B,) -> (B, size)
    fp32.

    The embedding of DDPM (2006.11239) as in guided diffusion and DiT (2212.09748), where shift is
    0; in DDPM's own code and in Diffusers' DiT it is 1. `t` is taken as it is: steps from 0 to 999
    in DiT, times from 0 to 1 in SiT (2401.08740).
    """
    half = size // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device) / (half - shift)
    angles = t.float()[:, None] * torch.exp(-math.log(MAX_PERIOD) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedder(nn.Module):
    """linear(silu(linear(sinusoids(t)))).

    Computed in fp32 whatever the precision of the model: the sinusoids of neighbouring times in
    [0, 1] differ by less than bf16 resolves.
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
    """One learned row per class, and a last one, `num_classes`, for no class."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, labels: Tensor) -> Tensor:  # (B,) in [0, num_classes] -> (B, width)
        return self.embedding_table(labels)


# -------------------------------------------------------------------------------------------------
# Latents cut into square patches, one token each in raster order, and put together again.


def patchify(x: Tensor, patch_size: int) -> Tensor:
    """(B, C, rows * p, columns * p) -> (B, N, C * p * p), channels first in each patch."""
    cut = x.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, token_grid: tuple[int, int], patch_size: int) -> Tensor:
    """(B, N, p * p * C), channels last in each patch -> (B, C, rows * p, columns * p)."""
    patches = patches.unflatten(-1, (patch_size, patch_size, -1)).unflatten(1, token_grid)
    pixels = patches.permute(0, 5, 1, 3, 2, 4)  # (B, C, rows, p, columns, p)
    return pixels.flatten(4, 5).flatten(2, 3)


class PatchEmbedder(nn.Module):
    """A linear map of each patch, its weights those of a convolution as in the published files."""

    def __init__(self, in_channels: int, patch_size: int, width: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, h, w) -> (B, N, width)
        weight, bias = self.proj.weight, self.proj.bias
        patches = patchify(x.to(weight.dtype), self.patch_size)
        return F.linear(patches, weight.flatten(1), bias).to(weight.dtype)  # autocast: fp32 again


# -------------------------------------------------------------------------------------------------
# DiT: a transformer that denoises latents (Peebles and Xie, 2212.09748); SiT's is the same.

NORM_EPS = 1e-6

Positions = Literal["sin-cos", "rotary", "both"]
FeedForward = Literal["gelu", "swiglu"]
Norm = Literal["layer", "rms"]


@dataclass(frozen=True)
class DiTConfig:
    """Defaults: DiT-B/2 for 256 px ImageNet latents, which predicts a noise and its variance."""

    in_channels: int = 4  # C of the latents
    out_channels: int = 8  # 2 C where variances are learned, as in all published weights
    grid: tuple[int, int] = (32, 32)  # (h, w) of the latents
    patch_size: int = 2  # side of the square of latent positions that becomes one token
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0  # hidden / width of the feed-forward; SwiGLU has 2/3 of it, as costly
    num_classes: int = 1000  # the label table has one more row: no class
    positions: Positions = "sin-cos"  # sin-cos: added; rotary: turns queries and keys
    feed_forward: FeedForward = "gelu"
    norm: Norm = "layer"
    qk_norm: bool = False  # RMS norm of each head's queries and keys: keeps large models stable
    frequency_size: int = 256  # sinusoids of the time, which is given in the network's own units
    # Their frequencies are 10000^(-i / (frequency_size / 2 - frequency_shift)); Diffusers' DiT: 1
    frequency_shift: int = 0
    mlp_norm_eps: float = NORM_EPS  # of the norms before the feed-forward; Diffusers' DiT: 1e-5

    def __post_init__(self) -> None:
        choices = {"positions": Positions, "feed_forward": FeedForward, "norm": Norm}
        for name, known in choices.items():
            if getattr(self, name) not in get_args(known):
                wrong, right = getattr(self, name), ", ".join(get_args(known))
                raise SmaltiError(f'{name} is "{wrong}"; choose one of {right}')
        check_at_least(
            1, self, "in_channels", "out_channels", "width", "depth", "num_heads", "num_classes"
        )
        if self.patch_size < 1 or min(self.grid) < 1 or any(s % self.patch_size for s in self.grid):
            raise SmaltiError(
                f"a grid of {self.grid[0]} x {self.grid[1]} cannot be cut into patches of side "
                f"{self.patch_size}: choose a patch_size that divides both"
            )
        if self.width % self.num_heads or self.width % 4:
            raise SmaltiError(
                f"width {self.width} with {self.num_heads} heads: the width must be a multiple of"
                " both 4 and the heads"
            )
        if self.positions != "sin-cos" and self.head_dim % 4:
            raise SmaltiError(
                f"width {self.width} with {self.num_heads} heads: with rotary positions each head "
                "needs a multiple of 4"
            )
        if not 0 < self.mlp_ratio < float("inf") or self.hidden < 1:
            raise SmaltiError(f"mlp_ratio is {self.mlp_ratio}; it must be more than 0, like 4")
        if self.frequency_size < 2 or self.frequency_size % 2:
            raise SmaltiError(f"frequency_size is {self.frequency_size}; it must be even, from 2")
        if not 0 <= self.frequency_shift < self.frequency_size // 2:
            raise SmaltiError(
                f"frequency_shift is {self.frequency_shift}; use 0, or 1 as in Diffusers' DiT"
            )
        if not 0 <= self.mlp_norm_eps < 1:
            raise SmaltiError(f"mlp_norm_eps is {self.mlp_norm_eps}; use a small number, like 1e-6")

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
        """This size of network for other latents, with or without a variance as before."""
        return replace(
            self,
            in_channels=spec.channels,
            out_channels=spec.channels * (self.out_channels // self.in_channels),
            grid=(spec.height, spec.width),
            num_classes=num_classes,
        )


def _published() -> dict[str, DiTConfig]:
    """Table 1 of the paper, at patches of 2, 4 and 8, and of 1."""
    sizes = {"s": (12, 384, 6), "b": (12, 768, 12), "l": (24, 1024, 16), "xl": (28, 1152, 16)}
    return {
        f"dit-{size}/{patch}": DiTConfig(
            patch_size=patch, depth=depth, width=width, num_heads=num_heads
        )
        for size, (depth, width, num_heads) in sizes.items()
        for patch in (1, 2, 4, 8)
    }


# For 8 x 8 latents on two CPU cores: 4 and 7 million parameters. Without q/k norm, which costs a
# sixth of a step there and pays in large models only.
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


class DiTAttention(nn.Module):
    """Every token attends to all."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.width, 3 * config.width)  # rows q | k | v, each head-major
        self.proj = nn.Linear(config.width, config.width)
        normalise = config.qk_norm
        self.q_norm = RMSNorm(config.head_dim, NORM_EPS) if normalise else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, NORM_EPS) if normalise else nn.Identity()

    def forward(self, x: Tensor, turns: Tensor | None) -> Tensor:  # (B, N, width)
        query, key, value = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, N, head_dim)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        query, key = self.q_norm(query), self.k_norm(key)
        if turns is not None:
            query, key = rotate(query, turns), rotate(key, turns)
        return self.proj(attend(query, key, value, causal=False).transpose(1, 2).flatten(2))


class DiTMLP(nn.Module):
    """fc2(gelu(fc1 x)), with the tanh form of GELU."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def _norm(config: DiTConfig, eps: float = NORM_EPS) -> nn.Module:
    """Without gain and bias, which the modulation supplies."""
    kind = nn.RMSNorm if config.norm == "rms" else nn.LayerNorm
    return kind(config.width, eps=eps, elementwise_affine=False)


class DiTBlock(nn.Module):
    """x + gate attention(modulate(norm x)), then the same with the feed-forward (figure 3)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.norm1 = _norm(config)
        self.attn = DiTAttention(config)
        self.norm2 = _norm(config, config.mlp_norm_eps)
        gelu = config.feed_forward == "gelu"
        self.mlp = (
            DiTMLP(config.width, config.hidden)
            if gelu
            else SwiGLU(config.width, config.hidden, 0.0)
        )
        self.adaLN_modulation = Modulation(config.width, 6)

    def forward(self, x: Tensor, c: Tensor, turns: Tensor | None) -> Tensor:  # (B, N, width)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)
        x = torch.addcmul(x, gate1, self.attn(modulate(self.norm1(x), shift1, scale1), turns))
        return torch.addcmul(x, gate2, self.mlp(modulate(self.norm2(x), shift2, scale2)))


class FinalLayer(nn.Module):
    """linear(modulate(norm x)): tokens to patches (B, N, p * p * C_out)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.norm_final = _norm(config)
        self.linear = nn.Linear(config.width, config.patch_size**2 * config.out_channels)
        self.adaLN_modulation = Modulation(config.width, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(nn.Module):
    """Latents (B, C, h, w), times (B,) and labels (B,) -> (B, C_out, h, w).

    Times are in the network's own units; labels lie in [0, num_classes], the last being no class:
    dropping labels and scaling times is the prior's. What comes out (velocity, noise, ...) too.
    Computed in the precision of the weights or of autocast, returned in that of the latents.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.x_embedder = PatchEmbedder(config.in_channels, config.patch_size, config.width)
        self.t_embedder = TimestepEmbedder(
            config.frequency_size, config.width, config.frequency_shift
        )
        self.y_embedder = LabelEmbedder(config.num_classes, config.width)
        added, turned = config.positions != "rotary", config.positions != "sin-cos"
        self.pos_embed = FixedTable.sin_cos(config.token_grid, config.width) if added else None
        self.turns = FixedTable.rotary(config.token_grid, config.head_dim) if turned else None
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        self._initialise()

    def _initialise(self) -> None:
        """As DiT: the modulations and the last layer are zero, so that every block is the identity
        and the first output 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1))  # a view: patches are rows
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters():
            if name.startswith(("t_embedder", "y_embedder")) and name.endswith("weight"):
                nn.init.normal_(parameter, std=0.02)
        for layer in self.zero_layers():
            nn.init.zeros_(layer.weight)

    def zero_layers(self) -> list[nn.Linear]:
        """The linear layers that start at zero."""
        modulations = [m for m in self.modules() if isinstance(m, Modulation)]
        return [self.final_layer.linear, *(m[1] for m in modulations)]  # type: ignore[list-item]

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        self._check(x, t, labels)
        tokens = self.x_embedder(x)  # (B, N, width)
        if self.pos_embed is not None:
            tokens = tokens + self.pos_embed.table.to(tokens.dtype)
        turns = None if self.turns is None else torch.view_as_complex(self.turns.table)
        c = self.t_embedder(t) + self.y_embedder(labels)  # (B, width)
        for block in self.blocks:
            tokens = block(tokens, c, turns)
        patches = self.final_layer(tokens, c).to(x.dtype)
        return unpatchify(patches, self.config.token_grid, self.config.patch_size)

    def _check(self, x: Tensor, t: Tensor, labels: Tensor) -> None:
        expected = (self.config.in_channels, *self.config.grid)
        if tuple(x.shape[1:]) != expected:
            raise SmaltiError(
                f"latents have shape {tuple(x.shape)}; this network takes (B, "
                f"{', '.join(map(str, expected))})"
            )
        for name, value in (("times", t), ("labels", labels)):
            if value.shape != x.shape[:1]:
                raise SmaltiError(
                    f"{name} have shape {tuple(value.shape)}; give one for each of the "
                    f"{len(x)} latents"
                )
