"""VQGAN of taming-transformers (Esser et al., 2012.09841), and its variant with Gumbel-softmax."""

from typing import Any

from smalti.pipelines.convert.conv import TRAINING_PARTS, ConvNames, OneCodebook
from smalti.pipelines.convert.reader import PublishedCheckpoint
from smalti.pipelines.convert.source import Options
from smalti.tokenizer.conv import ConvConfig
from smalti.tokenizer.quantizers import QuantizerConfig
from smalti.tokenizer.quantizers.gumbel import GumbelConfig
from smalti.tokenizer.vq import VQConfig

# The file of a whole model has its autoencoder under the first name: beside a transformer in
# taming-transformers, a diffusion model in latent-diffusion. The rest goes under a second name, to
# be dropped.
FIRST_STAGE, REST = "first_stage_model.", "second_stage."
ENDS = ("encoder.conv_out.weight", "decoder.conv_in.weight")  # of every encoder and decoder
SURPLUS = (*TRAINING_PARTS, f"{REST}*")

NAMES = ConvNames(
    rules=(
        (r"^quantizer\.codebook\.weight$", "quantize.embedding.weight"),
        (r"^quantizer\.(proj|embed)\.", r"quantize.\1."),
    ),
)


class TamingVQGAN(OneCodebook):
    """The Gumbel variant has a map from features to scores beside the table of vectors."""

    title = "taming-transformers VQGAN"
    names = NAMES
    surplus = SURPLUS
    aside = REST
    l2_normalise = False
    export_wrapper = "state_dict"

    def prepare(self, checkpoint: PublishedCheckpoint) -> PublishedCheckpoint:
        return autoencoder_alone(checkpoint)

    def recognises(self, checkpoint: PublishedCheckpoint) -> bool:
        return looks_like_taming(checkpoint) and has_codes(checkpoint)

    def infer_quantizer(
        self, checkpoint: PublishedCheckpoint, options: Options, conv: ConvConfig
    ) -> tuple[QuantizerConfig, dict[str, object], dict[str, object]]:
        if not checkpoint.has("quantize.embed."):
            return super().infer_quantizer(checkpoint, options, conv)
        vocab_size, code_dim = checkpoint.shape("quantize.embed.weight", 2)
        config = GumbelConfig(vocab_size=vocab_size, code_dim=code_dim)
        return config, {"codebook": f"{vocab_size} codes of {code_dim} numbers (Gumbel)"}, {}

    def fits(self, config: Any) -> bool:
        if not isinstance(config, VQConfig) or not config.conv.mid_attention:
            return False
        if not isinstance(config.quantizer, GumbelConfig):
            return super().fits(config)
        square = config.quantizer.code_dim == config.conv.z_channels  # its only way to be built
        return self.published_conv(config.conv) and config.quant_kernel == 1 and square


def looks_like_taming(checkpoint: PublishedCheckpoint) -> bool:
    """Whether encoder or decoder are called as in taming-transformers, and are not VAR's."""
    named = checkpoint.has("encoder.down.") or checkpoint.has("decoder.up.")
    return named and not checkpoint.has("quantize.quant_resi.")


def has_codes(checkpoint: PublishedCheckpoint) -> bool:
    """Whether a codebook belongs between encoder and decoder, even where it is missing: features of
    as many channels go out of one as into the other. A Gaussian takes twice as many."""
    out, into = (checkpoint.tensors.get(name) for name in ENDS)
    if checkpoint.has("quantize.") or out is None or into is None:
        return checkpoint.has("quantize.")
    return out.shape[:1] == into.shape[1:2]


def autoencoder_alone(checkpoint: PublishedCheckpoint) -> PublishedCheckpoint:
    """The checkpoint with the names of an autoencoder, and the rest of the model set apart."""
    if not checkpoint.has(FIRST_STAGE):
        return checkpoint
    return checkpoint.renamed(
        lambda name: (
            name.removeprefix(FIRST_STAGE) if name.startswith(FIRST_STAGE) else f"{REST}{name}"
        )
    )
