"""What the sources of published convolutional tokenizers share."""

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from smalti.pipelines.convert.conv_names import PUBLISHED_GROUPS, ConvNames, conv_facts, infer_conv
from smalti.pipelines.convert.layout import Buffer, Layout
from smalti.pipelines.convert.reader import Checkpoint
from smalti.pipelines.convert.source import Inferred, Options, Source
from smalti.tokenizer.conv import ConvConfig
from smalti.tokenizer.quantizers import QuantizerConfig
from smalti.tokenizer.quantizers.codebook import CodebookConfig
from smalti.tokenizer.quantizers.multi_scale import MultiScaleConfig
from smalti.tokenizer.quantizers.nearest import NearestConfig
from smalti.tokenizer.registry import TOKENIZERS
from smalti.tokenizer.vq import VQConfig

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

    def infer(self, checkpoint: Checkpoint, options: Options) -> Inferred:
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

    def norm_groups(self, checkpoint: Checkpoint) -> int:
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
        self, checkpoint: Checkpoint, options: Options, conv: ConvConfig
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
        self, checkpoint: Checkpoint, options: Options, conv: ConvConfig
    ) -> tuple[QuantizerConfig, dict[str, object], dict[str, object]]:
        del options, conv
        codebook = infer_codebook(checkpoint, "quantize.embedding.weight", self.l2_normalise)
        return NearestConfig(codebook=codebook), codebook_facts(codebook), {}


def infer_codebook(checkpoint: Checkpoint, name: str, l2_normalise: bool) -> CodebookConfig:
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
