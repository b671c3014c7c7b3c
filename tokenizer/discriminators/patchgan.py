"""PatchGAN discriminator (pix2pix, Isola et al., 1611.07004): one logit per overlapping patch."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from smalti.config import ImageSize
from smalti.data.latents import height_and_width
from smalti.errors import ConfigurationError
from smalti.tokenizer.discriminators import DiscriminatorConfig
from smalti.tokenizer.discriminators.augmentation import resized
from smalti.tokenizer.discriminators.regularisers import SpectralConv2d


@dataclass(frozen=True)
class PatchGANConfig(DiscriminatorConfig):
    """`num_layers` strided convolutions; the receptive field of 3 is 70 px, of 2 34, of 1 16 px."""

    channels: int = 64  # width after the first convolution; doubles per layer up to 8x
    num_layers: int = 3  # strided convolutions
    norm: Literal["group", "spectral"] = "group"  # no batch norm, which mixes real and fake
    kind: Literal["patchgan"] = "patchgan"  # the kind of discriminator

    def __post_init__(self) -> None:
        if self.channels < 8 or self.channels % 8:
            raise ConfigurationError(f"channels is {self.channels}; use a multiple of 8")
        if not 1 <= self.num_layers <= 6:
            raise ConfigurationError(f"num_layers is {self.num_layers}; use 1 to 6")


class PatchGAN(nn.Module):
    """Images (B, C, H, W) in [-1, 1] -> logits (B, 1, h, w), positive for real patches.

    Images below the minimum size, which equivariance regularisation may produce, are enlarged.
    """

    Config: ClassVar[type] = PatchGANConfig

    def __init__(self, config: PatchGANConfig, image_size: ImageSize, channels: int = 3) -> None:
        super().__init__()
        self.config = config
        self.least = 3 * 2**config.num_layers  # smallest side, in pixels, that gives one logit
        shorter = min(height_and_width(image_size))
        if shorter < self.least:
            raise ConfigurationError(
                f"PatchGAN with num_layers {config.num_layers} needs images of at least "
                f"{self.least} px, these have {shorter}: use fewer layers"
            )
        widths = [config.channels * min(2**i, 8) for i in range(config.num_layers + 1)]
        layers: list[nn.Module] = [self._convolution(channels, widths[0], 2), nn.LeakyReLU(0.2)]
        for i in range(1, config.num_layers + 1):
            stride = 2 if i < config.num_layers else 1
            layers.append(self._convolution(widths[i - 1], widths[i], stride))
            if config.norm == "group":
                layers.append(nn.GroupNorm(8, widths[i]))
            layers.append(nn.LeakyReLU(0.2))
        layers.append(self._convolution(widths[-1], 1, 1))
        self.main = nn.Sequential(*layers)

    def _convolution(self, channels_in: int, channels_out: int, stride: int) -> nn.Conv2d:
        convolution = SpectralConv2d if self.config.norm == "spectral" else nn.Conv2d
        return convolution(channels_in, channels_out, 4, stride, 1)

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[2:]
        if min(height, width) < self.least:
            images = resized(images, (max(height, self.least), max(width, self.least)))
        return self.main(images)
