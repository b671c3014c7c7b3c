"""Discriminator on frozen features (StyleGAN-T, Sauer et al., 2301.09515): heads on a ViT.

The features of a pretrained backbone represent the content of images, so the heads learn fast, and
the adversarial loss compares content, not only texture. The intended backbone is a ViT of DINO.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.config import ImageSize
from smalti.data.latents import rgb_views
from smalti.errors import CheckpointError, ConfigurationError
from smalti.tokenizer.backbone import FrozenBackbone
from smalti.tokenizer.discriminators import DiscriminatorConfig
from smalti.tokenizer.discriminators.augmentation import resized
from smalti.tokenizer.discriminators.regularisers import SpectralConv2d

BACKBONE = "backbone."  # prefix of its tensors


@dataclass(frozen=True)
class FrozenFeatureDiscriminatorConfig(DiscriminatorConfig):
    """A frozen backbone, such as DINO's ViT-S at 224 px, and heads at several depths."""

    # A folder of the package transformers (DINOv2, CLIP, SigLIP), a Hub id, or a safetensors file
    # with DINO's or timm's keys.
    backbone: Path
    num_heads: int = 6  # attention heads, for a safetensors file only: width / 64 in all of DINO's
    depths: tuple[int, ...] = (2, 5, 8, 11)  # blocks, counted from 0, after which features are read
    image_size: int = 224  # images are resized to this side, in pixels, for the backbone
    channels: int = 64  # width of the heads
    kind: Literal["features"] = "features"  # the kind of discriminator

    def __post_init__(self) -> None:
        if not self.depths or min(self.depths) < 0 or len(set(self.depths)) < len(self.depths):
            raise ConfigurationError(
                f"depths is {self.depths}; give different blocks, counted from 0"
            )
        if self.image_size < 1 or self.channels < 1:
            raise ConfigurationError(
                f"image_size {self.image_size} and channels {self.channels} must be at least 1"
            )


class Head(nn.Module):
    """Features (B, D, h, w) -> logits (B, 1, h, w), with spectral normalisation only."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.project = SpectralConv2d(width, channels, 1)
        self.mix = SpectralConv2d(channels, channels, 3, padding=1)
        self.output = SpectralConv2d(channels, 1, 1)

    def forward(self, features: Tensor) -> Tensor:
        x = F.leaky_relu(self.project(features), 0.2)
        x = (x + F.leaky_relu(self.mix(x), 0.2)) / 2**0.5
        return self.output(x)


class FrozenFeatureDiscriminator(nn.Module):
    """Images (B, C, H, W) in [-1, 1] -> logits (B, N), positive for real, of all heads and patches.

    Only the heads are trained. A checkpoint contains them and a digest of the backbone, so that a
    run cannot be resumed with another backbone.
    """

    Config: ClassVar[type] = FrozenFeatureDiscriminatorConfig

    def __init__(
        self, config: FrozenFeatureDiscriminatorConfig, image_size: ImageSize, channels: int = 3
    ) -> None:
        super().__init__()
        del image_size, channels  # images are resized, and shown to the backbone as RGB
        self.config = config
        self.backbone = FrozenBackbone.load(
            config.backbone, config.depths, config.image_size, config.num_heads
        )
        self.heads = nn.ModuleList(
            Head(self.backbone.width, config.channels) for _ in config.depths
        )
        self.register_buffer("digest", torch.tensor(self.backbone.digest))
        self.digest: Tensor
        self.register_state_dict_post_hook(_leave_out_backbone)
        self.register_load_state_dict_pre_hook(_put_in_backbone)

    def forward(self, images: Tensor) -> Tensor:  # (B, C, H, W) -> (B, N)
        views = resized(rgb_views(images), self.config.image_size)
        features = self.backbone(views)  # (B, D, h, w) of each depth; with alpha, 2 B of each
        pairs = zip(self.heads, features, strict=True)
        logits = torch.cat([head(feature).flatten(1) for head, feature in pairs], dim=1)
        return torch.cat(logits.split(len(images)), dim=1) if len(images) else logits


def _leave_out_backbone(module: nn.Module, state: Any, prefix: str, metadata: Any) -> None:
    del module, metadata
    for key in [key for key in state if key.startswith(prefix + BACKBONE)]:
        del state[key]


def _put_in_backbone(module: nn.Module, state: Any, prefix: str, *_: Any) -> None:
    assert isinstance(module, FrozenFeatureDiscriminator)
    saved = state.get(f"{prefix}digest")
    if saved is not None and int(saved) != int(module.digest):
        raise CheckpointError(
            f"{module.config.backbone} is not the backbone that this discriminator was trained on:"
            " give that one, or train a new discriminator"
        )
    for key, value in module.backbone.state_dict().items():
        state[f"{prefix}{BACKBONE}{key}"] = value
