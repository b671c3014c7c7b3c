"""PatchGAN (Isola et al., 1611.07004): a convolutional critic that judges overlapping patches."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from smalti.errors import SmaltiError


@dataclass(frozen=True)
class PatchGANConfig:
    """`num_layers` strided convolutions; 3 see patches of 70 px, 2 see 34 px, 1 sees 16 px."""

    channels: int = 64  # width after the first convolution; doubles per layer up to 8x
    num_layers: int = 3
    norm: Literal["group", "spectral"] = "group"  # never batch norm: it mixes reals and fakes

    def __post_init__(self) -> None:
        if self.channels < 8 or self.channels % 8:
            raise SmaltiError(f"channels is {self.channels}; use a multiple of 8")
        if not 1 <= self.num_layers <= 6:
            raise SmaltiError(f"num_layers is {self.num_layers}; use 1 to 6")


class PatchGAN(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] -> logits (B, 1, h, w), positive for real patches."""

    def __init__(self, config: PatchGANConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.channels * min(2**i, 8) for i in range(config.num_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, 2, 1), nn.LeakyReLU(0.2)]
        for i in range(1, config.num_layers + 1):
            stride = 2 if i < config.num_layers else 1
            layers += self._block(widths[i - 1], widths[i], stride)
        layers.append(nn.Conv2d(widths[-1], 1, 4, 1, 1))
        self.main = nn.Sequential(*layers)

    def _block(self, channels_in: int, channels_out: int, stride: int) -> list[nn.Module]:
        conv = nn.Conv2d(channels_in, channels_out, 4, stride, 1)
        if self.config.norm == "spectral":
            return [spectral_norm(conv), nn.LeakyReLU(0.2)]
        return [conv, nn.GroupNorm(8, channels_out), nn.LeakyReLU(0.2)]

    def forward(self, images: Tensor) -> Tensor:
        return self.main(images)
