"""Alignment of continuous latents with a frozen vision model (VA-VAE, Yao et al., 2501.01423).

    L = w (mean relu(1 - m1 - cos(W z, f)) + mean relu(|cos(z_i, z_j) - cos(f_i, f_j)| - m2))

f are the features of a vision model. A prior learns more easily from latents that are similar where
a vision model finds the images similar: with 32 channels at 16x, VA-VAE halves the generation FID.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.data.latents import ContinuousSpec, as_rgb
from smalti.errors import ConfigurationError
from smalti.randomness import RandomInputs
from smalti.tokenizer.backbone import FrozenBackbone
from smalti.tokenizer.base import Reconstruction, Tokenizer
from smalti.tokenizer.discriminators.augmentation import resized


@dataclass(frozen=True)
class AlignmentConfig:
    """Margins and weight; the margins of VA-VAE are 0.5 and 0.25."""

    # A folder of the package transformers (DINOv2, CLIP, SigLIP), a Hub id, or a safetensors file
    # with DINO's or timm's keys.
    backbone: Path
    num_heads: int = 6  # attention heads, used for a safetensors file only
    depth: int = 11  # block, counted from 0, whose features are taken
    image_size: int = 224  # images are resized to this side, in pixels, for the backbone
    weight: float = 0.1  # w: weight of the alignment loss
    cosine_margin: float = 0.5  # m1: differences of cosines below it cost nothing
    distance_margin: float = 0.25  # m2: differences of similarities below it cost nothing

    def __post_init__(self) -> None:
        if self.weight <= 0 or min(self.cosine_margin, self.distance_margin) < 0:
            raise ConfigurationError(
                f"weight is {self.weight}, the margins {self.cosine_margin} and "
                f"{self.distance_margin}: the weight must be positive, margins 0 or more"
            )


def cosine_loss(projected: Tensor, features: Tensor, margin: float) -> Tensor:
    """mean over positions of relu(1 - m1 - cos(W z, f)), both (B, D, h, w) (eq. 3)."""
    return F.relu(1 - margin - F.cosine_similarity(projected, features, dim=1)).mean()


def _cosines(maps: Tensor) -> Tensor:
    """Cosines between all positions of each image: (B, D, h, w) -> (B, h w, h w)."""
    rows = F.normalize(maps.flatten(2), dim=1)  # (B, D, h w)
    return rows.mT @ rows


def distance_loss(latents: Tensor, features: Tensor, margin: float) -> Tensor:
    """mean over pairs of positions of relu(|cos(z_i, z_j) - cos(f_i, f_j)| - m2) (eq. 4).

    Args:
        latents: (B, C, h, w).
        features: (B, D, h, w).
    """
    latent_cosines, feature_cosines = (_cosines(maps) for maps in (latents, features))
    return F.relu((latent_cosines - feature_cosines).abs() - margin).mean()


class Alignment(nn.Module):
    """Latents (B, C, h, w) and images (B, 3, H, W) -> the weighted loss, a scalar.

    W is a 1x1 convolution from latents to the space of the features, trained with the tokenizer.
    """

    def __init__(self, config: AlignmentConfig, channels: int) -> None:
        super().__init__()
        self.config = config
        if config.depth < 0:
            raise ConfigurationError(f"depth is {config.depth}; count blocks from 0")
        self.backbone = FrozenBackbone.load(
            config.backbone, (config.depth,), config.image_size, config.num_heads
        )
        self.projection = nn.Conv2d(channels, self.backbone.width, 1, bias=False)

    def forward(self, latents: Tensor, images: Tensor) -> Tensor:
        config = self.config
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            (features,) = self.backbone(resized(as_rgb(images.float()), config.image_size))
            features = F.interpolate(features, latents.shape[2:], mode="bilinear")  # (B, D, h, w)
        latents = latents.float()
        cosine = cosine_loss(self.projection(latents).float(), features, config.cosine_margin)
        distance = distance_loss(latents, features, config.distance_margin)
        return config.weight * (cosine + distance)


class AlignedTokenizer(nn.Module):
    """A tokenizer whose training pass adds the alignment loss: the module that DDP wraps.

    Only the tokenizer is kept after training.
    """

    def __init__(self, tokenizer: Tokenizer, alignment: Alignment) -> None:
        super().__init__()
        self.tokenizer, self.alignment = tokenizer, alignment

    @classmethod
    def of(cls, tokenizer: Tokenizer, config: AlignmentConfig) -> Self:
        """A tokenizer with a new alignment.

        Raises:
            SmaltiError: the tokenizer is discrete, or the backbone cannot be loaded.
        """
        if not isinstance(tokenizer.spec, ContinuousSpec):
            raise ConfigurationError(
                "alignment needs continuous latents: use a KL tokenizer, or no alignment"
            )
        return cls(tokenizer, Alignment(config, tokenizer.spec.channels))

    def forward(self, images: Tensor, random_inputs: RandomInputs | None = None) -> Reconstruction:
        output = self.tokenizer(images, random_inputs)
        output.losses["alignment"] = self.alignment(output.latents, images)
        return output
