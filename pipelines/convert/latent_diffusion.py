"""The autoencoders of latent-diffusion (Rombach et al., 2112.10752), with codes and with a Gaussian
posterior. Their names are those of taming-transformers."""

import math
from typing import Any

from smalti.errors import SmaltiError
from smalti.pipelines.convert.conv import (
    PUBLISHED_GROUPS,
    ConvNames,
    ConvSource,
    OneCodebook,
    conv_facts,
    infer_conv,
    stated_size,
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

# Of Stable Diffusion's 8x autoencoder with 4 channels, one over the standard deviation of its
# latents. It stands with the diffusion model, not in the autoencoder's file.
SCALING_FACTOR = 0.18215

MEASURED_SCALING = f"{REST}scale_factor"  # () where it was measured in training


class LatentDiffusionVQ(OneCodebook):
    """As taming-transformers', with fewer numbers per code, and some without any attention."""

    title = "latent-diffusion VQ autoencoder"
    names = NAMES
    surplus = SURPLUS
    aside = REST
    l2_normalise = False
    export_wrapper = "state_dict"

    def prepare(self, checkpoint: PublishedCheckpoint) -> PublishedCheckpoint:
        return autoencoder_alone(checkpoint)

    def recognises(self, checkpoint: PublishedCheckpoint) -> bool:
        gumbel = checkpoint.has("quantize.embed.")
        return looks_like_taming(checkpoint) and has_codes(checkpoint) and not gumbel


class KLSource(ConvSource):
    """An encoder of mean and log-variance, a decoder, and convolutions between them."""

    options = frozenset({"image_size", "scaling_factor"})

    def infer_sizes(
        self, checkpoint: PublishedCheckpoint, norm_groups: int = PUBLISHED_GROUPS
    ) -> tuple[ConvConfig, int, bool]:
        """Sizes of encoder and decoder; latent channels; whether there are quant_convs."""
        conv = infer_conv(checkpoint, self.names, double_z=True, norm_groups=norm_groups)
        if not checkpoint.has("quant_conv.") and not checkpoint.has("post_quant_conv."):
            return conv, conv.z_channels, False
        moments = checkpoint.shape("quant_conv.weight", 4)[0]
        if moments % 2:
            raise SmaltiError(
                f"{checkpoint.path}: quant_conv makes {moments} channels; mean and log-variance "
                "are equally many"
            )
        return conv, moments // 2, True

    def fits(self, config: Any) -> bool:
        return isinstance(config, KLConfig) and self.published_conv(config.conv)


class LatentDiffusionKL(KLSource):
    """An autoencoder's file does not say by how much the diffusion model scales the latents; that
    of a whole model does, if it was measured in training."""

    title = "latent-diffusion KL autoencoder"
    names = ConvNames()
    surplus = SURPLUS
    aside = REST
    export_wrapper = "state_dict"

    def prepare(self, checkpoint: PublishedCheckpoint) -> PublishedCheckpoint:
        return autoencoder_alone(checkpoint)

    def recognises(self, checkpoint: PublishedCheckpoint) -> bool:
        return looks_like_taming(checkpoint) and not has_codes(checkpoint)

    def infer(self, checkpoint: PublishedCheckpoint, options: Options) -> Inferred:
        conv, channels, convs = self.infer_sizes(checkpoint)
        size, stated = stated_size(options)
        facts = {**conv_facts(conv), "latent channels": channels}
        assumed: dict[str, object] = {"image_size": stated}
        if options.scaling_factor is None and MEASURED_SCALING in checkpoint.tensors:
            facts["scaling_factor"] = scaling = _measured_scaling(checkpoint)
        else:
            scaling, assumed["scaling_factor"] = _scaling(options, conv, channels)
        config = KLConfig(
            image_size=size,
            conv=conv,
            latent_channels=None if channels == conv.z_channels else channels,
            quant_convs=convs,
            latent_mean=(0.0,) * channels,
            latent_std=(1 / scaling,) * channels,
        )
        return Inferred(config, facts, assumed)

    def fits(self, config: Any) -> bool:
        """The file keeps no statistics of the latents; an option can give one scaling factor."""
        if not super().fits(config):
            return False
        alike = len({*config.latent_std}) <= 1 and not any(config.latent_mean)
        return config.quant_convs and alike

    def flags(self, config: KLConfig) -> dict[str, object]:
        scaling = 1 / config.latent_std[0] if config.latent_std else 1.0
        default, _ = _scaling(Options(), config.conv, config.channels)
        return super().flags(config) | ({} if scaling == default else {"scaling_factor": scaling})


def _measured_scaling(checkpoint: PublishedCheckpoint) -> float:
    """What latents are multiplied by, according to the diffusion model in the file."""
    checkpoint.shape(MEASURED_SCALING, 0)
    scaling = float(checkpoint.tensors[MEASURED_SCALING])
    if not 0 < scaling < math.inf:
        raise SmaltiError(f"{checkpoint.path}: scale_factor is {scaling}; it must be positive")
    return scaling


def _scaling(options: Options, conv: ConvConfig, channels: int) -> tuple[float, str]:
    """What latents are multiplied by, and where the number comes from."""
    if options.scaling_factor is not None:
        return options.scaling_factor, f"{options.scaling_factor}, as given"
    if conv.downsampling == 8 and channels == 4:
        return SCALING_FACTOR, f"{SCALING_FACTOR}, Stable Diffusion's; --scaling_factor changes it"
    return 1.0, "1, because none was published for this size; --scaling_factor changes it"
