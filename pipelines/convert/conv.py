"""What the sources of published convolutional tokenizers share."""

import re
from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from smalti.errors import SmaltiError
from smalti.pipelines.convert.layout import Buffer, Layout, Link, joined, pointwise, same
from smalti.pipelines.convert.reader import PublishedCheckpoint
from smalti.pipelines.convert.source import Inferred, Options, Source
from smalti.tokenizer.conv import ConvConfig
from smalti.tokenizer.quantizers import QuantizerConfig
from smalti.tokenizer.quantizers.codebook import CodebookConfig
from smalti.tokenizer.quantizers.multi_scale import MultiScaleConfig
from smalti.tokenizer.quantizers.nearest import NearestConfig
from smalti.tokenizer.registry import TOKENIZERS
from smalti.tokenizer.vq import VQConfig

# -------------------------------------------------------------------------------------------------
# How other code bases call the parts of the convolutional encoder and decoder, and the sizes that
# their shapes tell.
#
# All of them descend from taming-transformers, whose names ours are: encoder level i, block j is
# `encoder.down.i.block.j`, decoder level i, counted from the highest resolution, `decoder.up.i`.

PUBLISHED_GROUPS = 32  # of every group normalisation
ATTENTION = re.compile(r"(attn(?:_1|\.\d+))\.(q|k|v|proj_out)\.")

Rule = tuple[str, str | Callable[[re.Match[str], int], str]]


@dataclass(frozen=True)
class ConvNames:
    """The names of one code base: `rules` rewrite ours, one after the other.

    A rule is a pattern and what takes its place; a function gets the match and the number of
    levels, because some decoders count their levels from the lowest resolution.
    """

    rules: tuple[Rule, ...] = ()
    fused_attention: bool = False  # q, k and v in one tensor "qkv"
    linear_attention: bool = False  # matrices instead of 1x1 convolutions

    def theirs(self, ours: str, levels: int) -> str:
        """Their name of a tensor, or of the part that a beginning of a name stands for."""
        for pattern, replacement in self.rules:
            if isinstance(replacement, str):
                ours = re.sub(pattern, replacement, ours)
            else:
                ours = re.sub(pattern, lambda match, r=replacement: r(match, levels), ours)
        return ours

    def links(self, ours: Iterable[str], levels: int) -> list[Link]:
        """Where each of our tensors comes from."""
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
    """A replacement for a decoder level by one that is counted from the lowest resolution."""
    return lambda match, levels: f"{before}.{levels - 1 - int(match[1])}."


def infer_conv(
    checkpoint: PublishedCheckpoint,
    names: ConvNames,
    *,
    double_z: bool = False,
    norm_groups: int = PUBLISHED_GROUPS,
) -> ConvConfig:
    """The sizes of encoder and decoder, read from the encoder's tensors.

    Args:
        double_z: the encoder ends in mean and log-variance, not in features.
        norm_groups: which shapes do not tell.

    Raises:
        SmaltiError: a tensor that tells a size is missing, or the sizes are none that we know.
    """

    def name(ours: str) -> str:
        return names.theirs(ours, levels=1)  # no matter for the encoder

    def shape(ours: str) -> tuple[int, ...]:
        return checkpoint.shape(name(ours), 4)

    channels, colours, *_ = shape("encoder.conv_in.weight")
    if colours != 3:
        raise SmaltiError(f"{checkpoint.path} takes images of {colours} channels; only RGB is read")
    levels = checkpoint.count(name("encoder.down.{}."))
    blocks = [checkpoint.count(name(f"encoder.down.{i}.block.{{}}.")) for i in range(levels)]
    if not levels or len(set(blocks)) > 1 or not blocks[0]:
        raise SmaltiError(
            f"{checkpoint.path} has an encoder of {levels} levels with {blocks} blocks: each of at "
            "least one level must have as many as the others; is a tensor missing?"
        )
    widths = [shape(f"encoder.down.{i}.block.0.conv2.weight")[0] for i in range(levels)]
    if any(width % channels for width in widths):
        raise SmaltiError(
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
    """What `infer_conv` found, to print."""
    return {
        "channels": conv.channels,
        "channel_mult": ", ".join(map(str, conv.channel_mult)),
        "down-sampling": f"{conv.downsampling}x",
        "blocks per level": conv.num_res_blocks,
        "attention on levels": ", ".join(map(str, conv.attention_levels)) or "none",
        "attention in the middle": "yes" if conv.mid_attention else "no",
        "z_channels": conv.z_channels,
    }


# -------------------------------------------------------------------------------------------------
# What the sources of published convolutional tokenizers share.

IMAGE_SIZE = 256  # of nearly all published tokenizers

# What training leaves in the same state dict: the perceptual network and the critic, shadow copies
# of a running mean, and the weights of classes in a loss.
TRAINING_PARTS = ("loss.*", "model_ema.*", "discriminator.*", "colorize")

IDLE_STEPS = "quantizer.codebook.idle_steps"  # ours alone: when each code was last used


class ConvSource(Source):
    """A tokenizer with our convolutional encoder and decoder under other names."""

    registry = TOKENIZERS
    options = frozenset({"image_size"})
    names: ClassVar[ConvNames] = ConvNames()
    own: ClassVar[tuple[str, ...]] = ()
    surplus: ClassVar[tuple[str, ...]] = TRAINING_PARTS

    def layout(self, config: Any) -> Layout:
        with torch.device("meta"):
            ours = TOKENIZERS.build(config).state_dict()
        linked = [name for name in ours if name not in self.own]
        levels = len(config.conv.channel_mult)
        return Layout(
            links=self.names_of(config).links(linked, levels),
            buffers=self.buffers(config),
            surplus=self.surplus,
            own=self.own,
        )

    def names_of(self, config: Any) -> ConvNames:
        """Their names, where they depend on the sizes of the model."""
        del config
        return self.names

    def buffers(self, config: Any) -> dict[str, Buffer]:
        """Buffers of theirs that ours does not keep."""
        del config
        return {}

    def flags(self, config: Any) -> dict[str, object]:
        return {} if config.image_size == IMAGE_SIZE else {"image_size": config.image_size}

    def published_conv(self, conv: ConvConfig) -> bool:
        """Whether original code builds such an encoder and decoder."""
        narrowest = conv.channels * min(1, *conv.channel_mult)
        groups = conv.norm_groups or min(PUBLISHED_GROUPS, narrowest // 4)
        plain = conv.patch_size == 1 and not conv.residual_resampling
        return plain and groups == PUBLISHED_GROUPS


class VQSource(ConvSource):
    """A tokenizer with codes of one grid, compared with the vectors of one codebook."""

    own = (IDLE_STEPS,)
    l2_normalise: ClassVar[bool]

    def infer(self, checkpoint: PublishedCheckpoint, options: Options) -> Inferred:
        conv = infer_conv(checkpoint, self.names, norm_groups=self.norm_groups(checkpoint))
        quantizer, found, supposed = self.infer_quantizer(checkpoint, options, conv)
        size, assumed = self.image_size(options, conv, quantizer)
        config = VQConfig(
            image_size=size,
            conv=conv,
            quantizer=quantizer,
            quant_kernel=checkpoint.shape("quant_conv.weight", 4)[-1],
        )
        return Inferred(
            config,
            facts={**conv_facts(conv), **found},
            assumed={**supposed, "image_size": assumed},
        )

    def norm_groups(self, checkpoint: PublishedCheckpoint) -> int:
        """Groups of the normalisations, which shapes do not tell."""
        del checkpoint
        return PUBLISHED_GROUPS

    def image_size(
        self, options: Options, conv: ConvConfig, quantizer: QuantizerConfig
    ) -> tuple[int, object]:
        """Pixels per side, and the same with where the number comes from."""
        del conv, quantizer
        return stated_size(options)

    @abstractmethod
    def infer_quantizer(
        self, checkpoint: PublishedCheckpoint, options: Options, conv: ConvConfig
    ) -> tuple[QuantizerConfig, dict[str, object], dict[str, object]]:
        """The quantizer's config; what was read from the tensors; what was assumed."""

    def own_tensors(self, config: VQConfig, options: Options) -> dict[str, Tensor]:
        """A published codebook counts as just used: nothing of it is dead."""
        del options
        if not isinstance(config.quantizer, NearestConfig | MultiScaleConfig):
            return {}
        codes = config.quantizer.codebook.vocab_size
        return {IDLE_STEPS: torch.zeros(codes, dtype=torch.int64)}

    def fits(self, config: Any) -> bool:
        return (
            isinstance(config, VQConfig)
            and self.published_conv(config.conv)
            and isinstance(config.quantizer, NearestConfig)
            and config.quantizer.codebook.learning == "gradient"
            and config.quantizer.codebook.l2_normalise == self.l2_normalise
            and config.quant_kernel == 1
        )


class OneCodebook(VQSource):
    """`quantize.embedding.weight` (V, d) holds the codebook."""

    def infer_quantizer(
        self, checkpoint: PublishedCheckpoint, options: Options, conv: ConvConfig
    ) -> tuple[QuantizerConfig, dict[str, object], dict[str, object]]:
        del options, conv
        codebook = infer_codebook(checkpoint, "quantize.embedding.weight", self.l2_normalise)
        return NearestConfig(codebook=codebook), codebook_facts(codebook), {}


def infer_codebook(
    checkpoint: PublishedCheckpoint, name: str, l2_normalise: bool
) -> CodebookConfig:
    """The codebook that a table (V, d) is; none of its codes will be revived.

    Raises:
        SmaltiError: there is no such table.
    """
    vocab_size, code_dim = checkpoint.shape(name, 2)
    return CodebookConfig(vocab_size, code_dim, l2_normalise=l2_normalise, revive_after=0)


def codebook_facts(codebook: CodebookConfig) -> dict[str, object]:
    """What `infer_codebook` found, to print."""
    how = ", l2-normalised" if codebook.l2_normalise else ""
    return {"codebook": f"{codebook.vocab_size} codes of {codebook.code_dim} numbers{how}"}


def stated_size(options: Options) -> tuple[int, object]:
    """Pixels per side of a picture, and the same with where the number comes from."""
    if options.image_size is None:
        return IMAGE_SIZE, f"{IMAGE_SIZE}, the default of --image_size"
    return options.image_size, f"{options.image_size}, as given"
