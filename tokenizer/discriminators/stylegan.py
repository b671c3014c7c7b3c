"""StyleGAN2's discriminator (Karras et al., 1912.04958): residual blocks, blur, no normalisation.

It gives one logit per image. Differences: ordinary (He) initialisation instead of an equalised
learning rate, because the discriminator shares the tokenizer's optimizer settings; and no minibatch
standard deviation, because each reconstruction has its own target, so that modes cannot collapse.
"""

import itertools
import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.config import ImageSize
from smalti.data.latents import height_and_width
from smalti.errors import ConfigurationError
from smalti.tokenizer.discriminators import DiscriminatorConfig
from smalti.tokenizer.discriminators.augmentation import resized

LAST_SIDE = 4  # pixels; the blocks halve the images until their shorter side is 4 to 7
SLOPE = 0.2  # of the leaky ReLU


@dataclass(frozen=True)
class StyleGANDiscriminatorConfig(DiscriminatorConfig):
    """Widths of the blocks; the width doubles with each halving of the side."""

    channels: int = 64  # width at full resolution
    max_channels: int = 512  # the largest width of a block
    kind: Literal["stylegan"] = "stylegan"  # the kind of discriminator

    def __post_init__(self) -> None:
        if not 1 <= self.channels <= self.max_channels:
            raise ConfigurationError(
                f"channels is {self.channels} and max_channels {self.max_channels}: use 1 <= "
                "channels <= max_channels"
            )


def _activate(x: Tensor) -> Tensor:
    return F.leaky_relu(x, SLOPE)


def halve(x: Tensor) -> Tensor:
    """Blur with the binomial kernel (1, 3, 3, 1) / 8, keep every second pixel, (B, C, h/2, w/2).

    The blur avoids aliasing, which a discriminator could exploit.
    """
    channels = x.shape[1]
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype, device=x.device) / 8
    # Separable: rows, then columns, each channel by itself.
    x = F.conv2d(
        x, taps.view(1, 1, 4, 1).expand(channels, -1, -1, -1), None, (2, 1), (1, 0), 1, channels
    )
    return F.conv2d(
        x, taps.view(1, 1, 1, 4).expand(channels, -1, -1, -1), None, (1, 2), (0, 1), 1, channels
    )


class ResidualDown(nn.Module):
    """(conv(blur(conv(x))) + skip(blur(x))) / sqrt(2): half the side, variance kept."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_in, 3, padding=1)
        self.conv2 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.skip = nn.Conv2d(channels_in, channels_out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, h, w) -> (B, C', h/2, w/2)
        hidden = _activate(self.conv1(x))
        hidden = _activate(self.conv2(halve(hidden)))
        return (hidden + self.skip(halve(x))) / math.sqrt(2)


class StyleGANDiscriminator(nn.Module):
    """Images (B, C, H, W) in [-1, 1] -> logits (B, 1), positive for real images.

    Images of another size than `image_size` are resized to it.
    """

    Config: ClassVar[type] = StyleGANDiscriminatorConfig

    def __init__(
        self, config: StyleGANDiscriminatorConfig, image_size: ImageSize, channels: int = 3
    ) -> None:
        super().__init__()
        self.config = config
        self.image_size = image_size
        sides = height_and_width(image_size)
        levels = int(math.log2(max(min(sides) / LAST_SIDE, 1)))
        wrong = [side for side in sides if levels < 1 or side % 2**levels]
        if wrong:
            raise ConfigurationError(
                f"the stylegan discriminator halves images down to 4 to 7 px; {wrong[0]} px "
                "cannot be halved so: use 8, 16, 32, 64, 96, 128, 192, 256, ..."
            )
        widths = [min(config.channels * 2**i, config.max_channels) for i in range(levels + 1)]
        positions = sides[0] // 2**levels * (sides[1] // 2**levels)  # of the last block
        self.from_rgb = nn.Conv2d(channels, widths[0], 1)
        self.blocks = nn.Sequential(*(ResidualDown(i, o) for i, o in itertools.pairwise(widths)))
        self.conv = nn.Conv2d(widths[-1], widths[-1], 3, padding=1)
        self.hidden = nn.Linear(widths[-1] * positions, widths[-1])
        self.output = nn.Linear(widths[-1], 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                # He's gain compensates the variance that an activation loses. Skips and the output
                # have no activation.
                linear = module is self.output or module.bias is None
                nonlinearity = "linear" if linear else "leaky_relu"
                nn.init.kaiming_normal_(module.weight, SLOPE, nonlinearity=nonlinearity)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        x = _activate(self.from_rgb(resized(images, self.image_size)))
        x = self.blocks(x)  # (B, C, h, w), the shorter from 4 to 7
        x = _activate(self.conv(x)).flatten(1)
        return self.output(_activate(self.hidden(x)))
