"""VAR's multi-scale residual tokenizer (Tian et al., 2404.02905)."""

import re
from typing import Any

import numpy as np
import torch

from smalti.errors import SmaltiError
from smalti.pipelines.convert.conv import (
    VQSource,
    codebook_facts,
    infer_codebook,
    stated_size,
)
from smalti.pipelines.convert.conv_names import ConvNames
from smalti.pipelines.convert.layout import Buffer
from smalti.pipelines.convert.reader import WRAPPERS, Checkpoint
from smalti.pipelines.convert.source import Inferred, Options
from smalti.tokenizer.conv import ConvConfig
from smalti.tokenizer.quantizers import QuantizerConfig
from smalti.tokenizer.quantizers.multi_scale import MultiScaleConfig
from smalti.tokenizer.vq import VQConfig

# Sides of the code grids, by the side of the last one: 256 px and 512 px.
PUBLISHED_SCALES = {
    16: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    32: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
}
HITS = "quantize.ema_vocab_hit_SV"  # (scales, V): how often training used each code

SEVERAL, ONE = "quantize.quant_resi.qresi_ls.", "quantize.quant_resi.qresi."
BY_SCALE = re.compile(r"^quantize\.quant_resi\.(\d+)\.")


def _names(convolutions: int) -> ConvNames:
    """A single convolution has no number."""
    numbered = (r"^quantizer\.residual_convs\.(\d+)\.conv\.", rf"{SEVERAL}\1.")
    single = (r"^quantizer\.residual_convs\.0\.conv\.", ONE)
    return ConvNames(
        rules=(
            (r"^quantizer\.codebook\.weight$", "quantize.embedding.weight"),
            single if convolutions == 1 else numbered,
        ),
        fused_attention=True,
    )


class VARTokenizer(VQSource):
    """Which convolution serves which scale follows from their numbers alone, see `sharing`."""

    title = "VAR tokenizer"
    options = frozenset({"image_size", "scales"})
    wrappers = ("trainer", "vae_local", *WRAPPERS)  # the first two of a prior's training
    names = _names(convolutions=4)
    l2_normalise = False

    def prepare(self, checkpoint: Checkpoint) -> Checkpoint:
        """One spelling for convolutions that are shared and that are each scale's own."""
        return checkpoint.renamed(lambda name: BY_SCALE.sub(rf"{SEVERAL}\1.", name))

    def recognises(self, checkpoint: Checkpoint) -> bool:
        return checkpoint.has("quantize.quant_resi.") or checkpoint.has(HITS)

    def infer_quantizer(
        self, checkpoint: Checkpoint, options: Options, conv: ConvConfig
    ) -> tuple[QuantizerConfig, dict[str, object], dict[str, object]]:
        codebook = infer_codebook(checkpoint, "quantize.embedding.weight", self.l2_normalise)
        convolutions = 1 if checkpoint.has(ONE) else checkpoint.count(f"{SEVERAL}{{}}.")
        sides, origin = _sides(options, conv)
        trained = checkpoint.shape(HITS, 2)[0] if HITS in checkpoint.tensors else len(sides)
        if trained != len(sides):
            raise SmaltiError(
                f"{checkpoint.path} was trained with {trained} scales, not with the {len(sides)} of"
                f" {', '.join(map(str, sides))}: give theirs with --scales"
            )
        config = MultiScaleConfig(
            codebook=codebook,
            scales=tuple((side, side) for side in sides),
            convolutions=convolutions,
            sharing=sharing(len(sides), convolutions),
        )
        facts = {**codebook_facts(codebook), "residual convolutions": convolutions}
        return config, facts, {"scales": origin}

    def infer(self, checkpoint: Checkpoint, options: Options) -> Inferred:
        if not checkpoint.has("quantize.quant_resi."):
            raise SmaltiError(f"{checkpoint.path} lacks the tensors quantize.quant_resi.*")
        return super().infer(checkpoint, options)

    def image_size(
        self, options: Options, conv: ConvConfig, quantizer: QuantizerConfig
    ) -> tuple[int, object]:
        """Scales tell it, too."""
        if options.image_size is None and options.scales is not None:
            size = options.scales[-1] * conv.downsampling
            return size, f"{size}, from --scales"
        return stated_size(options)

    def names_of(self, config: VQConfig) -> ConvNames:
        assert isinstance(config.quantizer, MultiScaleConfig)
        return _names(config.quantizer.convolutions)

    def buffers(self, config: VQConfig) -> dict[str, Buffer]:
        """How often training used each code; original code loads no file without it."""
        assert isinstance(config.quantizer, MultiScaleConfig)
        hits = torch.zeros(len(config.quantizer.scales), config.quantizer.codebook.vocab_size)
        return {HITS: Buffer(hits, derived=False)}

    def flags(self, config: VQConfig) -> dict[str, object]:
        assert isinstance(config.quantizer, MultiScaleConfig)
        sides = tuple(height for height, _ in config.quantizer.scales)
        if PUBLISHED_SCALES.get(sides[-1]) == sides:
            return super().flags(config)
        return {"scales": ",".join(map(str, sides))}

    def fits(self, config: Any) -> bool:
        if not (isinstance(config, VQConfig) and isinstance(config.quantizer, MultiScaleConfig)):
            return False
        conv, quantizer = config.conv, config.quantizer
        return (
            self.published_conv(conv)
            and conv.attention_levels in ((), (len(conv.channel_mult) - 1,))
            and quantizer.codebook.learning == "gradient"
            and not quantizer.codebook.l2_normalise
            and quantizer.residual_ratio == MultiScaleConfig.residual_ratio
            and all(h == w for h, w in quantizer.scales)
            and quantizer.shared_out == sharing(len(quantizer.scales), quantizer.convolutions)
        )


def sharing(scales: int, convolutions: int) -> tuple[int, ...]:
    """Which convolution serves each scale: the one whose tick lies nearest to it on [0, 1].

    Ticks are evenly spaced inside [0, 1], four of them a little wider apart. Some scales lie midway
    between two ticks, and rounding in double precision decides: the arithmetic here is VAR's.
    """
    inset = 1 / 3 / convolutions if convolutions == 4 else 1 / 2 / convolutions
    ticks = np.linspace(inset, 1 - inset, convolutions)
    places = [scale / max(scales - 1, 1) for scale in range(scales)]
    return tuple(int(np.abs(ticks - place).argmin()) for place in places)


def _sides(options: Options, conv: ConvConfig) -> tuple[tuple[int, ...], str]:
    """Sides of the code grids, and where they come from."""
    if options.scales is not None:
        return options.scales, f"{', '.join(map(str, options.scales))}, as given"
    last = stated_size(options)[0] // conv.downsampling
    if last not in PUBLISHED_SCALES:
        raise SmaltiError(
            f"no scales were published for grids of {last} x {last} codes: give theirs with "
            "--scales, coarse to fine"
        )
    sides = PUBLISHED_SCALES[last]
    return sides, f"{', '.join(map(str, sides))}, the default of --scales"
