"""Discriminators: images -> logits. The registered ones, and their configurations."""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

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


def build_discriminator(config: DiscriminatorConfig, image_size: int) -> nn.Module:
    """A new discriminator for images of `image_size` px: images (B, 3, S, S) -> logits (B, ...).

    Raises:
        ConfigurationError: it does not work at that size, or its backbone cannot be loaded.
    """
    return DISCRIMINATORS.build(config, image_size)
