"""Autoencoders of latent-diffusion (Rombach et al., 2112.10752), with codes and with a Gaussian
posterior. Their names are those of taming-transformers."""

import math
from typing import Any

from smalti.errors import ConversionError
from smalti.pipelines.convert.conv import (
    ConvNames,
    ConvSource,
    KLSizes,
    conv_facts,
    image_size,
    infer_conv,
    infer_kl,
    infer_nearest,
    infer_vq,
    is_nearest_vq,
    is_published_conv,
)
from smalti.pipelines.convert.reader import PublishedCheckpoint
from smalti.pipelines.convert.source import Inferred, Options
from smalti.pipelines.convert.taming import (
    NAMES,
    REST,
    SURPLUS,
    autoencoder_alone,
    has_codes,
    looks_like_taming,
)
from smalti.tokenizer.conv import ConvConfig
from smalti.tokenizer.kl import KLConfig

# 1 / the standard deviation of the latents of Stable Diffusion's 8x autoencoder with 4 channels.
# The setting belongs to the diffusion model and is not in the autoencoder's file.
SCALING_FACTOR = 0.18215

MEASURED_SCALING = f"{REST}scale_factor"  # (), in the file of a whole model that measured it


class LatentDiffusionVQ(ConvSource):
    """Like taming-transformers', with narrower codes, and in some sizes without any attention."""

    title = "latent-diffusion VQ autoencoder"
    names = NAMES
    surplus = SURPLUS
    aside = REST
    export_wrapper = "state_dict"

    def prepare(self, checkpoint: PublishedCheckpoint) -> PublishedCheckpoint:
        return autoencoder_alone(checkpoint)

    def recognises(self, checkpoint: PublishedCheckpoint) -> bool:
        gumbel = checkpoint.has("quantize.embed.")
        return looks_like_taming(checkpoint) and has_codes(checkpoint) and not gumbel

    def infer(self, checkpoint: PublishedCheckpoint, options: Options) -> Inferred:
        conv = infer_conv(checkpoint, self.names)
        quantizer = infer_nearest(checkpoint, l2_normalise=False)
        return infer_vq(checkpoint, conv, quantizer, image_size(options))

    def fits(self, config: Any) -> bool:
        return is_nearest_vq(config, l2_normalise=False) and is_published_conv(config.conv)


class LatentDiffusionKL(ConvSource):
    """The scaling factor of the latents is in the file of a whole model, if it was measured in
    training, and never in that of an autoencoder."""

    title = "latent-diffusion KL autoencoder"
    options = frozenset({"image_size", "scaling_factor"})
    names = ConvNames()
    surplus = SURPLUS
    aside = REST
    export_wrapper = "state_dict"

    def prepare(self, checkpoint: PublishedCheckpoint) -> PublishedCheckpoint:
        return autoencoder_alone(checkpoint)

    def recognises(self, checkpoint: PublishedCheckpoint) -> bool:
        return looks_like_taming(checkpoint) and not has_codes(checkpoint)

    def infer(self, checkpoint: PublishedCheckpoint, options: Options) -> Inferred:
        sizes = infer_kl(checkpoint, self.names)
        size, origin = image_size(options)
        facts = {**conv_facts(sizes.conv), "latent channels": sizes.channels}
        assumed: dict[str, object] = {"image_size": origin}
        if options.scaling_factor is None and MEASURED_SCALING in checkpoint.tensors:
            facts["scaling_factor"] = scaling = _measured_scaling(checkpoint)
        else:
            scaling, assumed["scaling_factor"] = _scaling(options, sizes)
        mean, std = (0.0,) * sizes.channels, (1 / scaling,) * sizes.channels
        return Inferred(sizes.config(size, mean, std), facts, assumed)

    def fits(self, config: Any) -> bool:
        """The file has no statistics of the latents; an option can give one scaling factor."""
        if not isinstance(config, KLConfig) or not is_published_conv(config.conv):
            return False
        alike = len({*config.latent_std}) <= 1 and not any(config.latent_mean)
        return config.quant_convs and alike and config.image_channels == 3

    def flags(self, config: KLConfig) -> dict[str, object]:
        scaling = 1 / config.latent_std[0] if config.latent_std else 1.0
        default = _default_scaling(config.conv, config.channels)
        return super().flags(config) | ({} if scaling == default else {"scaling_factor": scaling})


def _measured_scaling(checkpoint: PublishedCheckpoint) -> float:
    """The scaling factor that the diffusion model in the file saved."""
    checkpoint.shape(MEASURED_SCALING, 0)
    scaling = float(checkpoint.tensors[MEASURED_SCALING])
    if not 0 < scaling < math.inf:
        raise ConversionError(f"{checkpoint.path}: scale_factor is {scaling}; it must be positive")
    return scaling


def _default_scaling(conv: ConvConfig, channels: int) -> float:
    return SCALING_FACTOR if conv.downsampling == 8 and channels == 4 else 1.0


def _scaling(options: Options, sizes: KLSizes) -> tuple[float, str]:
    """The scaling factor of the latents, and the same with its origin, to print."""
    if options.scaling_factor is not None:
        return options.scaling_factor, f"{options.scaling_factor}, as given"
    default = _default_scaling(sizes.conv, sizes.channels)
    if default == SCALING_FACTOR:
        return default, f"{default}, Stable Diffusion's; --scaling_factor changes it"
    return default, "1, because none was published for this size; --scaling_factor changes it"
