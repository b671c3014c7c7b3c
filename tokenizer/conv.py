"""The convolutional encoder and decoder of VQGAN (Esser et al., 2012.09841), shared by the VQ and
KL families. Module names follow taming-transformers, whose published weights can be converted.

A *level* works at one resolution; each but the last ends in a 2x down-sampling. `patch_size`
folds p x p pixels into channels first (1 in the published models): level 0 then works at
H/p, which makes small images cheap.

Shapes: B batch, C channels, h w the grid of a level, H W pixels, f the down-sampling factor.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from smalti.config import ImageSize, check_at_least
from smalti.data.latents import height_and_width, resolution
from smalti.errors import ConfigurationError
from smalti.tokenizer import winograd
from smalti.tokenizer.tiling import Stages

# No model of this kind is larger. The limits prevent an untrusted config.json from requesting more
# memory than available.
MAX_LEVELS, MAX_BLOCKS, MAX_WIDTH, MAX_PATCH = 12, 64, 2**16, 64
MAX_IMAGE_SIZE = 2**14  # pixels per side


@dataclass(frozen=True)
class ConvConfig:
    """Sizes of encoder and decoder; those of the preset vq-f16 down-sample 16 times."""

    channels: int = 128  # width of level 0
    channel_mult: tuple[int, ...] = (1, 1, 2, 2, 4)  # width of each level, a multiple of `channels`
    num_res_blocks: int = 2  # per level in the encoder; the decoder has one more
    attention_levels: tuple[int, ...] = (4,)  # levels with self-attention after each block
    mid_attention: bool = True  # self-attention at the lowest resolution, between two blocks
    z_channels: int = 256  # encoder output and decoder input
    patch_size: int = 1  # pixels per side folded into channels before level 0
    # Groups of every normalisation; None: 32, and fewer on levels narrower than 128. Published
    # models have 32 whatever their width.
    norm_groups: int | None = None
    # Every change of resolution adds a learned correction to averaged or repeated pixels (DC-AE,
    # 2410.10733); models that down-sample by 32 or more need this.
    residual_resampling: bool = False

    def __post_init__(self) -> None:
        groups = self.norm_groups
        if groups is not None and (groups < 1 or self.channels % groups):
            raise ConfigurationError(
                f"channels is {self.channels}; use a multiple of norm_groups {groups}"
            )
        if groups is None and (self.channels % 32 and self.channels not in (8, 16)):
            raise ConfigurationError(f"channels is {self.channels}; use 8, 16 or a multiple of 32")
        check_at_least(1, self, "channels", "num_res_blocks", "z_channels", "patch_size")
        if not self.channel_mult or min(self.channel_mult) < 1:
            raise ConfigurationError(
                f"channel_mult is {self.channel_mult}; give at least one value >= 1"
            )
        wrong = [i for i in self.attention_levels if not 0 <= i < len(self.channel_mult)]
        if wrong:
            raise ConfigurationError(
                f"attention_levels names level {wrong[0]}, but channel_mult has levels"
                f" 0 to {len(self.channel_mult) - 1}"
            )
        for name, value, most in (
            ("the number of levels", len(self.channel_mult), MAX_LEVELS),
            ("num_res_blocks", self.num_res_blocks, MAX_BLOCKS),
            ("the width of a level", self.channels * max(self.channel_mult), MAX_WIDTH),
            ("z_channels", self.z_channels, MAX_WIDTH),
            ("patch_size", self.patch_size, MAX_PATCH),
        ):
            if value > most:
                raise ConfigurationError(f"{name} is {value}; it must be at most {most}")

    @property
    def downsampling(self) -> int:
        """Pixels per latent position and side, f."""
        return self.patch_size * 2 ** (len(self.channel_mult) - 1)

    def grid(self, size: ImageSize) -> tuple[int, int]:
        """Rows and columns of the features of images of a size, in pixels.

        Raises:
            ConfigurationError: they have no grid, because a side is not a multiple of the
                down-sampling factor; or they are too large.
        """
        sides = height_and_width(size)
        if min(sides) < 1 or any(side % self.downsampling for side in sides):
            what = size if isinstance(size, int) else resolution(size)
            raise ConfigurationError(
                f"image_size {what} is not a multiple of the down-sampling factor"
                f" {self.downsampling}"
            )
        if max(sides) > MAX_IMAGE_SIZE:
            raise ConfigurationError(
                f"image_size is {max(sides)}; it must be at most {MAX_IMAGE_SIZE}"
            )
        return sides[0] // self.downsampling, sides[1] // self.downsampling


def _norm(channels: int, groups: int | None) -> nn.GroupNorm:
    return nn.GroupNorm(groups or min(32, channels // 4), channels, eps=1e-6)


def _activated(normed: Tensor) -> Tensor:
    """SiLU of a normalisation's output, in place where no gradient needs that output."""
    return F.silu(normed, inplace=not torch.is_grad_enabled())


def _formatted(x: Tensor) -> Tensor:
    """Maps as the layers after them are fastest without gradients: on a CPU in channels-last
    format, which convolutions, normalisations and products of matrices share. (On a GPU, group
    normalisation changes the format back.)"""
    if torch.is_grad_enabled() or x.device.type != "cpu":
        return x
    return x.contiguous(memory_format=torch.channels_last)


class Conv3x3(nn.Conv2d):
    """A 3 x 3 convolution that keeps the resolution; without gradients by Winograd's algorithm,
    where that is faster."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out, 3, padding=1)

    def forward(self, input: Tensor) -> Tensor:
        if self.bias is not None and winograd.is_faster(input, self.weight):
            return winograd.convolve(input, self.weight, self.bias)
        return super().forward(input)


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 shortcut if the width changes."""

    def __init__(self, channels_in: int, channels_out: int, norm_groups: int | None) -> None:
        super().__init__()
        self.norm1 = _norm(channels_in, norm_groups)
        self.conv1 = Conv3x3(channels_in, channels_out)
        self.norm2 = _norm(channels_out, norm_groups)
        self.conv2 = Conv3x3(channels_out, channels_out)
        same = channels_in == channels_out
        self.nin_shortcut = None if same else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, h, w)
        hidden = self.conv1(_activated(self.norm1(x)))
        hidden = self.conv2(_activated(self.norm2(hidden)))
        shortcut = x if self.nin_shortcut is None else self.nin_shortcut(x)
        return hidden + shortcut if torch.is_grad_enabled() else hidden.add_(shortcut)


class AttentionBlock(nn.Module):
    """Single-head self-attention over all positions of the grid, with a residual."""

    def __init__(self, channels: int, norm_groups: int | None) -> None:
        super().__init__()
        self.norm = _norm(channels, norm_groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, h, w)
        normed = self.norm(x)
        # Fused attention, which has no (h w, h w) matrix, needs contiguous rows: on a CPU these are
        # views of maps in channels-last format.
        query, key, value = (
            rearrange(project(normed), "b c h w -> b 1 (h w) c")
            for project in (self.q, self.k, self.v)
        )
        if not torch.is_grad_enabled():
            query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        attended = F.scaled_dot_product_attention(query, key, value)  # (B, 1, h w, C)
        return x + self.proj_out(rearrange(attended, "b 1 (h w) c -> b c h w", h=x.shape[2]))


class Downsample(nn.Module):
    """Strided convolution, padded on the right and bottom only (the published convention)."""

    def __init__(self, channels: int, residual: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:  # (B, C, h, w) -> (B, C, h/2, w/2)
        small = self.conv(F.pad(x, (0, 1, 0, 1)))
        return small + F.avg_pool2d(x, 2) if self.residual else small


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a convolution."""

    def __init__(self, channels: int, residual: bool) -> None:
        super().__init__()
        self.conv = Conv3x3(channels, channels)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:  # (B, C, h, w) -> (B, C, 2h, 2w)
        large = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(large) + large if self.residual else self.conv(large)


class Level(nn.Module):
    """Residual blocks at one resolution, each followed by attention if `attention` is set, and a
    change of resolution, which all levels but one have."""

    def __init__(
        self,
        widths: list[int],
        attention: bool,
        norm_groups: int | None,
        downsample: Downsample | None = None,
        upsample: Upsample | None = None,
    ) -> None:
        super().__init__()
        self.downsample = downsample
        self.upsample = upsample
        pairs = list(itertools.pairwise(widths))
        self.block = nn.ModuleList(ResBlock(i, o, norm_groups) for i, o in pairs)
        self.attn = nn.ModuleList(AttentionBlock(o, norm_groups) for _, o in pairs if attention)

    def forward(self, x: Tensor) -> Tensor:
        return self.resampled(self.transformed(x))

    def transformed(self, x: Tensor) -> Tensor:
        """After the blocks, (B, C, h, w)."""
        for index, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[index](x)
        return x

    def resampled(self, x: Tensor) -> Tensor:
        """After the change of resolution."""
        for resample in (self.downsample, self.upsample):
            if resample is not None:
                x = resample(x)
        return x


class Middle(nn.Module):
    """Block, attention, block at the lowest resolution."""

    def __init__(self, channels: int, attention: bool, norm_groups: int | None) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels, norm_groups)
        self.attn_1 = AttentionBlock(channels, norm_groups) if attention else None
        self.block_2 = ResBlock(channels, channels, norm_groups)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block_1(x)
        if self.attn_1 is not None:
            x = self.attn_1(x)
        return self.block_2(x)


class Encoder(nn.Module):
    """Images (B, image_channels, H, W) -> features (B, out_channels, H/f, W/f)."""

    def __init__(
        self, config: ConvConfig, out_channels: int | None = None, image_channels: int = 3
    ) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        widths = [config.channels * m for m in config.channel_mult]
        values = image_channels * config.patch_size**2  # of one position of level 0
        self.conv_in = nn.Conv2d(values, config.channels, 3, padding=1)
        self.down = nn.ModuleList()
        for i, (before, width) in enumerate(
            zip([config.channels, *widths[:-1]], widths, strict=True)
        ):
            blocks = [before] + [width] * config.num_res_blocks
            last = i == len(widths) - 1
            downsample = None if last else Downsample(width, config.residual_resampling)
            attention = i in config.attention_levels
            self.down.append(Level(blocks, attention, config.norm_groups, downsample=downsample))
        self.mid = Middle(widths[-1], config.mid_attention, config.norm_groups)
        self.norm_out = _norm(widths[-1], config.norm_groups)
        self.conv_out = nn.Conv2d(widths[-1], out_channels or config.z_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        # Pixel shuffles are torch's own, not einops': they keep the memory format (channels last).
        x = F.pixel_unshuffle(images, self.patch_size)
        x = self.conv_in(_formatted(x))  # (B, C, H/p, W/p)
        for level in self.down:
            x = level(x)  # (B, C, h, w) -> (B, C', h/2, w/2), except in the last level
        return self.conv_out(_activated(self.norm_out(self.mid(x)))).contiguous()


class Decoder(nn.Module):
    """Features (B, z_channels, h, w) -> images (B, image_channels, f h, f w).

    `up[0]` is the highest resolution, as in the published weights; it runs last.
    """

    def __init__(self, config: ConvConfig, image_channels: int = 3) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        widths = [config.channels * m for m in config.channel_mult]
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], config.mid_attention, config.norm_groups)
        self.up = nn.ModuleList()
        for i, (before, width) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True)):
            blocks = [before] + [width] * (config.num_res_blocks + 1)
            upsample = Upsample(width, config.residual_resampling) if i > 0 else None
            attention = i in config.attention_levels
            self.up.append(Level(blocks, attention, config.norm_groups, upsample=upsample))
        self.norm_out = _norm(widths[0], config.norm_groups)
        values = image_channels * config.patch_size**2  # of one position of level 0
        self.conv_out = nn.Conv2d(widths[0], values, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        return self.upsampled(self.transformed(features))

    def transformed(self, features: Tensor) -> Tensor:
        """All blocks at the resolution of the features, (B, z_channels, h, w) -> (B, C, h, w)."""
        x = self.mid(self.conv_in(_formatted(features)))
        return self.up[-1].transformed(x)  # type: ignore[operator]

    def upsampled(self, x: Tensor) -> Tensor:
        """The images of what `transformed` returns, (B, C, h, w)."""
        x = self.up[-1].resampled(x)  # type: ignore[operator]
        for level in list(self.up)[-2::-1]:
            x = level(x)
        x = self.conv_out(_activated(self.norm_out(x)))  # (B, C p^2, H/p, W/p)
        return F.pixel_shuffle(x, self.patch_size).contiguous()

    def stages(self, given: Callable[[Tensor], Tensor]) -> Stages:
        """The parts of this decoder for tiles: all layers at the resolution of the latents, and the
        upsampling.

        Args:
            given: vectors of a tokenizer -> features, which this decoder takes.
        """
        return Stages(
            whole=lambda vectors: self.transformed(given(vectors)),
            tiled=self.upsampled,
            tiles_attend=any(len(level.attn) for level in self.up[:-1]),  # type: ignore[arg-type]
        )


def initialise(module: nn.Module) -> None:
    """PyTorch's default initialisation, with the last convolution of every block scaled by 0.1.

    A deep stack then starts near the identity, and small models train fast from the first step.
    """
    for block in module.modules():
        if isinstance(block, ResBlock):
            with torch.no_grad():
                block.conv2.weight.mul_(0.1)
