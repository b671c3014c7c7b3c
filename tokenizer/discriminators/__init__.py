"""Discriminators: images -> logits. The registered ones, and their configurations."""

import inspect
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from smalti.config import ImageSize
from smalti.errors import ConfigurationError
from smalti.hub import Registry

DISCRIMINATORS = Registry(
    "discriminator",
    {
        "patchgan": "smalti.tokenizer.discriminators.patchgan:PatchGAN",
        "stylegan": "smalti.tokenizer.discriminators.stylegan:StyleGANDiscriminator",
        "features": "smalti.tokenizer.discriminators.frozen_features:FrozenFeatureDiscriminator",
    },
)


@dataclass(frozen=True)
class DiscriminatorConfig:
    """A configuration of a discriminator: a frozen dataclass with a `kind`, its registered name."""

    registry: ClassVar[Registry] = DISCRIMINATORS


def build_discriminator(
    config: DiscriminatorConfig, image_size: ImageSize, channels: int = 3
) -> nn.Module:
    """A new discriminator for images of a size in pixels: images (B, C, H, W) -> logits (B, ...).

    Raises:
        ConfigurationError: it does not work at that size or with so many channels, or its backbone
            cannot be loaded.
    """
    if channels == 3:
        return DISCRIMINATORS.build(config, image_size)
    kind = getattr(config, "kind", "")
    if "channels" not in inspect.signature(DISCRIMINATORS.resolve(kind)).parameters:
        raise ConfigurationError(
            f"the {kind} discriminator takes RGB images only, and these have {channels} channels: "
            "use another, such as patchgan"
        )
    return DISCRIMINATORS.build(config, image_size, channels)
