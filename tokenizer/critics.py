"""The critics that smalti knows: one line each, by the `kind` of their config."""

from torch import nn

from smalti.hub import Registry
from smalti.tokenizer.discriminator import PatchGANConfig
from smalti.tokenizer.feature_discriminator import FeatureCriticConfig
from smalti.tokenizer.stylegan_discriminator import StyleGANCriticConfig

CRITICS = Registry(
    "discriminator",
    {
        "patchgan": "smalti.tokenizer.discriminator:PatchGAN",
        "stylegan": "smalti.tokenizer.stylegan_discriminator:StyleGANCritic",
        "features": "smalti.tokenizer.feature_discriminator:FeatureCritic",
    },
)
CriticConfig = PatchGANConfig | StyleGANCriticConfig | FeatureCriticConfig


def build_critic(config: CriticConfig, image_size: int) -> nn.Module:
    """A new critic for pictures of `image_size` px: images (B, 3, S, S) -> logits (B, ...).

    Raises:
        SmaltiError: it cannot judge pictures of that size, or its backbone's file is wrong.
    """
    return CRITICS.resolve(config.kind)(config, image_size)
