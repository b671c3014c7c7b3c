"""Published convolutional tokenizers: their names for our encoder and decoder, and their sizes.

All of these code bases descend from taming-transformers, whose names we use: encoder level i,
block j is `encoder.down.i.block.j`; decoder level i, counted from the highest resolution, is
`decoder.up.i`. A code base is described by rules that rewrite our names into its own.

    ConvNames               the rules of one code base
    infer_conv              sizes of encoder and decoder
    infer_vq, infer_kl      the same with a quantizer, or with a Gaussian posterior
    ConvSource              what the sources of such tokenizers share
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from smalti.config import ImageSize
from smalti.data.latents import resolution
from smalti.errors import ConversionError
from smalti.pipelines.convert.layout import Buffer, Layout, Link, joined, pointwise, same
from smalti.pipelines.convert.reader import PublishedCheckpoint
from smalti.pipelines.convert.source import Inferred, Options, Source
from smalti.tokenizer.conv import ConvConfig
from smalti.tokenizer.kl import KLConfig
from smalti.tokenizer.quantizers import QuantizerConfig
from smalti.tokenizer.quantizers.codebook import CodebookConfig
from smalti.tokenizer.quantizers.multi_scale import MultiScaleConfig
from smalti.tokenizer.quantizers.nearest import NearestConfig
from smalti.tokenizer.registry import TOKENIZERS
from smalti.tokenizer.vq import VQConfig

PUBLISHED_GROUPS = 32  # of every group normalisation
IMAGE_SIZE = 256  # pixels per side, of nearly all published tokenizers

# What training saves in the same state dict: the perceptual network and the discriminator, the
# exponential moving average, and the class weights of a loss.
TRAINING_PARTS = ("loss.*", "model_ema.*", "discriminator.*", "colorize")

CODEBOOK = "quantize.embedding.weight"  # (V, d)
IDLE_STEPS = "quantizer.codebook.idle_steps"  # only in our models: steps since a code was used


# -- names ----------------------------------------------------------------------------------------

ATTENTION = re.compile(r"(attn(?:_1|\.\d+))\.(q|k|v|proj_out)\.")

Rule = tuple[str, str | Callable[[re.Match[str], int], str]]


@dataclass(frozen=True)
class ConvNames:
    """The names of one code base: `rules` rewrite ours, one after the other.

    A rule is a pattern and its replacement. A replacement may be a function of the match and of the
    number of levels, because some decoders count their levels from the lowest resolution.
    """

    rules: tuple[Rule, ...] = ()
    fused_attention: bool = False  # q, k and v in one tensor "qkv"
    linear_attention: bool = False  # matrices instead of 1x1 convolutions

    def theirs(self, ours: str, levels: int) -> str:
        """Their name for a tensor of ours, or for the start of a name."""
        for pattern, replacement in self.rules:
            if isinstance(replacement, str):
                ours = re.sub(pattern, replacement, ours)
            else:
                ours = re.sub(pattern, lambda match, r=replacement: r(match, levels), ours)
        return ours

    def links(self, ours: Iterable[str], levels: int) -> list[Link]:
        """A link for each of our tensors; one for q, k and v together where they are fused."""
        found: list[Link] = []
        for name in ours:
            part = ATTENTION.search(name)
            if part is None:
                found.append(same(name, self.theirs(name, levels)))
            elif self.fused_attention and part[2] in ("q", "k", "v"):
                if part[2] == "q":
                    three = [ATTENTION.sub(rf"\1.{x}.", name) for x in ("q", "k", "v")]
                    fused = ATTENTION.sub(r"\1.qkv.", name)
                    found.append(joined(three, self.theirs(fused, levels)))
            elif self.linear_attention and name.endswith(".weight"):
                found.append(pointwise(name, self.theirs(name, levels)))
            else:
                found.append(same(name, self.theirs(name, levels)))
        return found


def mirrored(before: str) -> Callable[[re.Match[str], int], str]:
    """The replacement of a decoder level by one that is counted from the lowest resolution."""
    return lambda match, levels: f"{before}.{levels - 1 - int(match[1])}."


# -- sizes of encoder and decoder -----------------------------------------------------------------


def infer_conv(
    checkpoint: PublishedCheckpoint,
    names: ConvNames,
    *,
    double_z: bool = False,
    norm_groups: int = PUBLISHED_GROUPS,
) -> ConvConfig:
    """The sizes of encoder and decoder, read from the encoder's tensors.

    Args:
        double_z: the encoder's output is mean and log-variance, not features.
        norm_groups: groups of the normalisations, which shapes do not determine.

    Raises:
        ConversionError: a tensor that determines a size is missing, or no encoder of ours has these
            sizes.
    """

    def name(ours: str) -> str:
        return names.theirs(ours, levels=1)  # the number of levels matters to decoders only

    def shape(ours: str) -> tuple[int, ...]:
        return checkpoint.shape(name(ours), 4)

    channels, colours, *_ = shape("encoder.conv_in.weight")
    if colours != 3:
        raise ConversionError(
            f"{checkpoint.path} takes images of {colours} channels; only RGB is read"
        )
    levels = checkpoint.count(name("encoder.down.{}."))
    blocks = [checkpoint.count(name(f"encoder.down.{i}.block.{{}}.")) for i in range(levels)]
    if not levels or len(set(blocks)) > 1 or not blocks[0]:
        raise ConversionError(
            f"{checkpoint.path} has an encoder of {levels} levels with {blocks} blocks; expected "
            "at least one level, and equally many blocks in each: is a tensor missing?"
        )
    widths = [shape(f"encoder.down.{i}.block.0.conv2.weight")[0] for i in range(levels)]
    if any(width % channels for width in widths):
        raise ConversionError(
            f"{checkpoint.path} has levels {', '.join(map(str, widths))} channels wide; all must be"
            f" multiples of the first convolution's {channels}"
        )
    z = shape("encoder.conv_out.weight")[0]
    attention = [i for i in range(levels) if checkpoint.has(name(f"encoder.down.{i}.attn.0."))]
    return ConvConfig(
        channels=channels,
        channel_mult=tuple(width // channels for width in widths),
        num_res_blocks=blocks[0],
        attention_levels=tuple(attention),
        mid_attention=checkpoint.has(name("encoder.mid.attn_1.")),
        z_channels=z // 2 if double_z else z,
        norm_groups=norm_groups,
    )


def conv_facts(conv: ConvConfig) -> dict[str, object]:
    """The sizes that `infer_conv` found, to print."""
    return {
        "channels": conv.channels,
        "channel_mult": ", ".join(map(str, conv.channel_mult)),
        "down-sampling": f"{conv.downsampling}x",
        "blocks per level": conv.num_res_blocks,
        "attention on levels": ", ".join(map(str, conv.attention_levels)) or "none",
        "attention in the middle": "yes" if conv.mid_attention else "no",
        "z_channels": conv.z_channels,
    }


def is_published_conv(conv: ConvConfig) -> bool:
    """Whether the original code can build such an encoder and decoder."""
    narrowest = conv.channels * min(1, *conv.channel_mult)
    groups = conv.norm_groups or min(PUBLISHED_GROUPS, narrowest // 4)
    plain = conv.patch_size == 1 and not conv.residual_resampling
    return plain and groups == PUBLISHED_GROUPS


def image_size(options: Options) -> tuple[ImageSize, str]:
    """The size of an image in pixels, and the same with its origin, to print."""
    if options.image_size is None:
        return IMAGE_SIZE, f"{IMAGE_SIZE}, the default of --image_size"
    size = options.image_size
    return size, f"{size if isinstance(size, int) else resolution(size)}, as given"


# -- tokenizers with a codebook -------------------------------------------------------------------


@dataclass(frozen=True)
class InferredQuantizer:
    """The quantizer's part of `Inferred`."""

    config: QuantizerConfig
    facts: Mapping[str, object]
    assumed: Mapping[str, object] = field(default_factory=dict)


def infer_codebook(checkpoint: PublishedCheckpoint, *, l2_normalise: bool) -> CodebookConfig:
    """The sizes of the codebook; unused codes will not be re-initialised.

    Raises:
        ConversionError: there is no codebook.
    """
    vocab_size, code_dim = checkpoint.shape(CODEBOOK, 2)
    return CodebookConfig(vocab_size, code_dim, l2_normalise=l2_normalise, revive_after=0)


def codebook_facts(codebook: CodebookConfig) -> dict[str, object]:
    """The sizes that `infer_codebook` found, to print."""
    how = ", l2-normalised" if codebook.l2_normalise else ""
    return {"codebook": f"{codebook.vocab_size} codes of {codebook.code_dim} numbers{how}"}


def infer_nearest(checkpoint: PublishedCheckpoint, *, l2_normalise: bool) -> InferredQuantizer:
    """A quantizer that takes the nearest vector of one codebook."""
    codebook = infer_codebook(checkpoint, l2_normalise=l2_normalise)
    return InferredQuantizer(NearestConfig(codebook=codebook), codebook_facts(codebook))


def infer_vq(
    checkpoint: PublishedCheckpoint,
    conv: ConvConfig,
    quantizer: InferredQuantizer,
    size: tuple[ImageSize, str],
) -> Inferred:
    """A VQ tokenizer of these parts and this image size (see `image_size`)."""
    config = VQConfig(
        image_size=size[0],
        conv=conv,
        quantizer=quantizer.config,
        quant_kernel=checkpoint.shape("quant_conv.weight", 4)[-1],
    )
    return Inferred(
        config,
        facts={**conv_facts(conv), **quantizer.facts},
        assumed={**quantizer.assumed, "image_size": size[1]},
    )


def is_nearest_vq(config: Any, *, l2_normalise: bool) -> bool:
    """Whether the quantizer of a config can be written as `infer_nearest` reads it."""
    return (
        isinstance(config, VQConfig)
        and isinstance(config.quantizer, NearestConfig)
        and config.quantizer.codebook.learning == "gradient"
        and config.quantizer.codebook.l2_normalise == l2_normalise
        and config.quant_kernel == 1
        and config.image_channels == 3
    )


# -- tokenizers with a Gaussian posterior ---------------------------------------------------------


@dataclass(frozen=True)
class KLSizes:
    """The sizes of a KL autoencoder."""

    conv: ConvConfig
    channels: int  # of the latents
    quant_convs: bool  # whether there are convolutions around the latents

    def config(
        self, size: ImageSize, latent_mean: tuple[float, ...], latent_std: tuple[float, ...]
    ) -> KLConfig:
        """The config of our model for images of a size in pixels."""
        return KLConfig(
            image_size=size,
            conv=self.conv,
            latent_channels=None if self.channels == self.conv.z_channels else self.channels,
            quant_convs=self.quant_convs,
            latent_mean=latent_mean,
            latent_std=latent_std,
        )


def infer_kl(
    checkpoint: PublishedCheckpoint, names: ConvNames, norm_groups: int = PUBLISHED_GROUPS
) -> KLSizes:
    """The sizes of a KL autoencoder.

    Raises:
        ConversionError: see `infer_conv`; or `quant_conv` has an odd number of output channels.
    """
    conv = infer_conv(checkpoint, names, double_z=True, norm_groups=norm_groups)
    if not checkpoint.has("quant_conv.") and not checkpoint.has("post_quant_conv."):
        return KLSizes(conv, conv.z_channels, quant_convs=False)
    moments = checkpoint.shape("quant_conv.weight", 4)[0]  # mean and log-variance
    if moments % 2:
        raise ConversionError(
            f"{checkpoint.path}: quant_conv has {moments} output channels; expected an even number,"
            " half for the mean and half for the log-variance"
        )
    return KLSizes(conv, moments // 2, quant_convs=True)


# -- the source -----------------------------------------------------------------------------------


class ConvSource(Source):
    """A tokenizer with our convolutional encoder and decoder under other names."""

    registry = TOKENIZERS
    options = frozenset({"image_size"})
    names: ClassVar[ConvNames]
    surplus: ClassVar[tuple[str, ...]] = TRAINING_PARTS

    def names_for(self, config: Any) -> ConvNames:
        """Their names, where they depend on the sizes of the model."""
        del config
        return self.names

    def buffers(self, config: Any) -> dict[str, Buffer]:
        """Their buffers that our model does not store."""
        del config
        return {}

    def layout(self, config: Any) -> Layout:
        with torch.device("meta"):
            ours = TOKENIZERS.build(config).state_dict()
        linked = [name for name in ours if name != IDLE_STEPS]
        return Layout(
            links=self.names_for(config).links(linked, levels=len(config.conv.channel_mult)),
            buffers=self.buffers(config),
            surplus=self.surplus,
            own=(IDLE_STEPS,),
        )

    def own_tensors(self, config: Any, options: Options) -> dict[str, Tensor]:
        """Every code of a published codebook counts as just used."""
        del options
        quantizer = getattr(config, "quantizer", None)
        if not isinstance(quantizer, NearestConfig | MultiScaleConfig):
            return {}
        return {IDLE_STEPS: torch.zeros(quantizer.codebook.vocab_size, dtype=torch.int64)}

    def flags(self, config: Any) -> dict[str, object]:
        size = config.image_size
        if size == IMAGE_SIZE:
            return {}
        return {"image_size": size if isinstance(size, int) else "x".join(map(str, size))}
