"""VQGAN of taming-transformers (Esser et al., 2012.09841), and its variant with Gumbel-softmax."""

from typing import Any

from smalti.pipelines.convert.conv import (
    TRAINING_PARTS,
    ConvNames,
    ConvSource,
    InferredQuantizer,
    image_size,
    infer_conv,
    infer_nearest,
    infer_vq,
    is_nearest_vq,
    is_published_conv,
)
from smalti.pipelines.convert.reader import PublishedCheckpoint
from smalti.pipelines.convert.source import Inferred, Options
from smalti.tokenizer.quantizers.gumbel import GumbelConfig
from smalti.tokenizer.vq import VQConfig

# In the file of a full model the autoencoder's names have the first prefix, beside a transformer
# (taming-transformers) or a diffusion model (latent-diffusion). Everything else gets the second
# prefix, and is dropped.
FIRST_STAGE, REST = "first_stage_model.", "second_stage."
ENDS = ("encoder.conv_out.weight", "decoder.conv_in.weight")  # of every encoder and decoder
SURPLUS = (*TRAINING_PARTS, f"{REST}*")

NAMES = ConvNames(
    rules=(
        (r"^quantizer\.codebook\.weight$", "quantize.embedding.weight"),
        (r"^quantizer\.(proj|embed)\.", r"quantize.\1."),
    ),
)


def autoencoder_alone(checkpoint: PublishedCheckpoint) -> PublishedCheckpoint:
    """The checkpoint with the names of an autoencoder; other tensors get the prefix `REST`."""
    if not checkpoint.has(FIRST_STAGE):
        return checkpoint
    return checkpoint.renamed(
        lambda name: (
            name.removeprefix(FIRST_STAGE) if name.startswith(FIRST_STAGE) else f"{REST}{name}"
        )
    )


def looks_like_taming(checkpoint: PublishedCheckpoint) -> bool:
    """Whether encoder or decoder have taming-transformers' names, without VAR's quantizer."""
    named = checkpoint.has("encoder.down.") or checkpoint.has("decoder.up.")
    return named and not checkpoint.has("quantize.quant_resi.")


def has_codes(checkpoint: PublishedCheckpoint) -> bool:
    """Whether a codebook belongs between encoder and decoder, even if it is missing: the encoder's
    output then has as many channels as the decoder's input, and twice as many for a Gaussian."""
    out, into = (checkpoint.tensors.get(name) for name in ENDS)
    if checkpoint.has("quantize.") or out is None or into is None:
        return checkpoint.has("quantize.")
    return out.shape[:1] == into.shape[1:2]


def infer_gumbel(checkpoint: PublishedCheckpoint) -> InferredQuantizer:
    """The Gumbel variant, which maps features to scores of codes (`quantize.proj`)."""
    vocab_size, code_dim = checkpoint.shape("quantize.embed.weight", 2)
    config = GumbelConfig(vocab_size=vocab_size, code_dim=code_dim)
    return InferredQuantizer(
        config, {"codebook": f"{vocab_size} codes of {code_dim} numbers (Gumbel)"}
    )


class TamingVQGAN(ConvSource):
    """Codes are compared without normalisation; the middle blocks always have attention."""

    title = "taming-transformers VQGAN"
    names = NAMES
    surplus = SURPLUS
    aside = REST
    export_wrapper = "state_dict"

    def prepare(self, checkpoint: PublishedCheckpoint) -> PublishedCheckpoint:
        return autoencoder_alone(checkpoint)

    def recognises(self, checkpoint: PublishedCheckpoint) -> bool:
        return looks_like_taming(checkpoint) and has_codes(checkpoint)

    def infer(self, checkpoint: PublishedCheckpoint, options: Options) -> Inferred:
        conv = infer_conv(checkpoint, self.names)
        if checkpoint.has("quantize.embed."):
            quantizer = infer_gumbel(checkpoint)
        else:
            quantizer = infer_nearest(checkpoint, l2_normalise=False)
        return infer_vq(checkpoint, conv, quantizer, image_size(options))

    def fits(self, config: Any) -> bool:
        if not isinstance(config, VQConfig) or not config.conv.mid_attention:
            return False
        if not is_published_conv(config.conv):
            return False
        if not isinstance(config.quantizer, GumbelConfig):
            return is_nearest_vq(config, l2_normalise=False)
        # The original code builds its Gumbel quantizer only with codes as wide as the features.
        return config.quant_kernel == 1 and config.quantizer.code_dim == config.conv.z_channels
