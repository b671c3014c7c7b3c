"""The registered discriminators: one line each, by the `kind` of their config."""

from torch import nn

from smalti.hub import Registry
from smalti.tokenizer.discriminators.frozen_features import FrozenFeatureDiscriminatorConfig
from smalti.tokenizer.discriminators.patchgan import PatchGANConfig
from smalti.tokenizer.discriminators.stylegan import StyleGANDiscriminatorConfig

DISCRIMINATORS = Registry(
    "discriminator",
    {
        "patchgan": "smalti.tokenizer.discriminators.patchgan:PatchGAN",
        "stylegan": "smalti.tokenizer.discriminators.stylegan:StyleGANDiscriminator",
        "features": "smalti.tokenizer.discriminators.frozen_features:FrozenFeatureDiscriminator",
    },
)
DiscriminatorConfig = (
    PatchGANConfig | StyleGANDiscriminatorConfig | FrozenFeatureDiscriminatorConfig
)


def build_discriminator(config: DiscriminatorConfig, image_size: int) -> nn.Module:
    """A new discriminator for images of `image_size` px: images (B, 3, S, S) -> logits (B, ...).

    Raises:
        SmaltiError: it does not work at that size, or its backbone cannot be loaded.
    """
    return DISCRIMINATORS.resolve(config.kind)(config, image_size)
