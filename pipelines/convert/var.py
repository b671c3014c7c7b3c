"""VAR (Tian et al., 2404.02905): the multi-scale residual tokenizer and its priors.

A VAR prior takes sums of code vectors as input, and so owns a copy of its tokenizer's quantizer.
The published file of a prior lacks that: it comes from the tokenizer, which is converted first.
"""

import re
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from smalti.data.latents import CodeSpec
from smalti.errors import ConversionError
from smalti.pipelines.convert.conv import (
    ConvNames,
    ConvSource,
    InferredQuantizer,
    codebook_facts,
    image_size,
    infer_codebook,
    infer_conv,
    infer_vq,
    is_published_conv,
)
from smalti.pipelines.convert.layout import Buffer, Layout, class_table, same
from smalti.pipelines.convert.reader import WRAPPERS, PublishedCheckpoint
from smalti.pipelines.convert.source import (
    Inferred,
    Options,
    Source,
    class_count,
    head_count,
    head_flags,
    layers,
    listed,
    square_side,
)
from smalti.prior.next_scale.model import (
    FrozenQuantizer,
    NextScaleConfig,
    block_causal_mask,
    scale_of_codes,
)
from smalti.prior.registry import PRIORS
from smalti.tokenizer.conv import ConvConfig
from smalti.tokenizer.quantizers.multi_scale import PUBLISHED_SIDES, MultiScaleConfig
from smalti.tokenizer.vq import VQConfig, VQTokenizer

# -------------------------------------------------------------------------------------------------
# Tokenizer.

# (scales, V): how often training used each code. The original code cannot load a file without it.
HITS = "quantize.ema_vocab_hit_SV"

SEVERAL, ONE = "quantize.quant_resi.qresi_ls.", "quantize.quant_resi.qresi."
BY_SCALE = re.compile(r"^quantize\.quant_resi\.(\d+)\.")


def _names(convolutions: int) -> ConvNames:
    """Names for this number of residual convolutions; a single one has no index."""
    numbered = (r"^quantizer\.residual_convs\.(\d+)\.conv\.", rf"{SEVERAL}\1.")
    single = (r"^quantizer\.residual_convs\.0\.conv\.", ONE)
    return ConvNames(
        rules=(
            (r"^quantizer\.codebook\.weight$", "quantize.embedding.weight"),
            single if convolutions == 1 else numbered,
        ),
        fused_attention=True,
    )


def sharing(scales: int, convolutions: int) -> tuple[int, ...]:
    """The convolution of each scale: the one whose position on [0, 1] is nearest to the scale's.

    Convolutions are evenly spaced inside [0, 1], four of them a little wider apart. Some scales are
    midway between two, where rounding in double precision decides: the arithmetic is VAR's.
    """
    inset = 1 / 3 / convolutions if convolutions == 4 else 1 / 2 / convolutions
    ticks = np.linspace(inset, 1 - inset, convolutions)
    places = [scale / max(scales - 1, 1) for scale in range(scales)]
    return tuple(int(np.abs(ticks - place).argmin()) for place in places)


def is_published_quantizer(quantizer: MultiScaleConfig) -> bool:
    """Whether the original code can build such a quantizer."""
    return (
        all(height == width for height, width in quantizer.scales)
        and not quantizer.codebook.l2_normalise
        and quantizer.residual_ratio == MultiScaleConfig.residual_ratio
        and quantizer.shared_out == sharing(len(quantizer.scales), quantizer.convolutions)
    )


def _sides(options: Options, conv: ConvConfig) -> tuple[tuple[int, ...], str]:
    """Sides of the code grids, and the same with their origin, to print."""
    if options.scales is not None:
        return options.scales, f"{listed(options.scales)}, as given"
    rows, columns = conv.grid(image_size(options)[0])
    if rows != columns:
        raise ConversionError(
            f"VAR's scales are square, and the grid of these images is {rows} x {columns}: convert "
            "it at a square --image_size, and resize the result with Tokenizer.resized"
        )
    if rows not in PUBLISHED_SIDES:
        raise ConversionError(
            f"no scales were published for grids of {rows} x {rows} codes: give them with "
            "--scales, coarse to fine"
        )
    sides = PUBLISHED_SIDES[rows]
    return sides, f"{listed(sides)}, the default of --scales"


def _infer_multi_scale(
    checkpoint: PublishedCheckpoint, options: Options, conv: ConvConfig
) -> InferredQuantizer:
    """A quantizer of several scales with residual convolutions.

    Raises:
        ConversionError: the file was trained with another number of scales.
    """
    codebook = infer_codebook(checkpoint, l2_normalise=False)
    convolutions = 1 if checkpoint.has(ONE) else checkpoint.count(f"{SEVERAL}{{}}.")
    sides, origin = _sides(options, conv)
    trained = checkpoint.shape(HITS, 2)[0] if HITS in checkpoint.tensors else len(sides)
    if trained != len(sides):
        raise ConversionError(
            f"{checkpoint.path} was trained with {trained} scales, not with the {len(sides)} of"
            f" {listed(sides)}: give them with --scales"
        )
    config = MultiScaleConfig(
        codebook=codebook,
        scales=tuple((side, side) for side in sides),
        convolutions=convolutions,
        sharing=sharing(len(sides), convolutions),
    )
    facts = {**codebook_facts(codebook), "residual convolutions": convolutions}
    return InferredQuantizer(config, facts, {"scales": origin})


class VARTokenizer(ConvSource):
    """Which convolution belongs to which scale follows from the number of each, see `sharing`."""

    title = "VAR tokenizer"
    options = frozenset({"image_size", "scales"})
    wrappers = ("trainer", "vae_local", *WRAPPERS)  # the first two in files of a prior's training
    names = _names(convolutions=4)

    def prepare(self, checkpoint: PublishedCheckpoint) -> PublishedCheckpoint:
        """One name for shared convolutions and for those of a single scale each."""
        return checkpoint.renamed(lambda name: BY_SCALE.sub(rf"{SEVERAL}\1.", name))

    def recognises(self, checkpoint: PublishedCheckpoint) -> bool:
        return checkpoint.has("quantize.quant_resi.") or checkpoint.has(HITS)

    def infer(self, checkpoint: PublishedCheckpoint, options: Options) -> Inferred:
        if not checkpoint.has("quantize.quant_resi."):
            raise ConversionError(f"{checkpoint.path} lacks the tensors quantize.quant_resi.*")
        conv = infer_conv(checkpoint, self.names)
        quantizer = _infer_multi_scale(checkpoint, options, conv)
        size = image_size(options)
        if options.image_size is None and options.scales is not None:
            side = options.scales[-1] * conv.downsampling
            size = side, f"{side}, from --scales"
        return infer_vq(checkpoint, conv, quantizer, size)

    def names_for(self, config: VQConfig) -> ConvNames:
        assert isinstance(config.quantizer, MultiScaleConfig)
        return _names(config.quantizer.convolutions)

    def buffers(self, config: VQConfig) -> dict[str, Buffer]:
        assert isinstance(config.quantizer, MultiScaleConfig)
        hits = torch.zeros(len(config.quantizer.scales), config.quantizer.codebook.vocab_size)
        return {HITS: Buffer(hits, derived=False)}

    def flags(self, config: VQConfig) -> dict[str, object]:
        assert isinstance(config.quantizer, MultiScaleConfig)
        sides = tuple(height for height, _ in config.quantizer.scales)
        if PUBLISHED_SIDES.get(sides[-1]) == sides:
            return super().flags(config)
        return {"scales": listed(sides, ",")}

    def fits(self, config: Any) -> bool:
        if not (isinstance(config, VQConfig) and isinstance(config.quantizer, MultiScaleConfig)):
            return False
        conv, quantizer = config.conv, config.quantizer
        return (
            is_published_conv(conv)
            and config.image_channels == 3
            and conv.attention_levels in ((), (len(conv.channel_mult) - 1,))
            and quantizer.codebook.learning == "gradient"
            and is_published_quantizer(quantizer)
        )


# -------------------------------------------------------------------------------------------------
# Priors.

LEVELS = "lvl_1L"  # (1, L) index of the scale of every code
CLASS_TABLE = "class_emb.weight"
MASK = "attn_bias_for_masking"  # (1, 1, L, L) 0, or -inf where attention is masked
KEY_BIAS = "blocks.{}.attn.zero_k_bias"  # (width,) zeros
HEAD_SCALES = "blocks.{}.attn.scale_mul_1H11"  # (1, heads, 1, 1)


class VARPrior(Source):
    """Names are ours; `quantizer.*` comes from the tokenizer."""

    title = "VAR prior"
    registry = PRIORS
    options = frozenset({"heads", "scales", "tokenizer", "num_classes"})
    wrappers = ("trainer", "var_wo_ddp", *WRAPPERS)

    def recognises(self, checkpoint: PublishedCheckpoint) -> bool:
        own = any(checkpoint.has(name) for name in ("pos_1LC", "lvl_embed.", "word_embed."))
        return own and checkpoint.has("blocks.")

    def infer(self, checkpoint: PublishedCheckpoint, options: Options) -> Inferred:
        sizes = Sizes.of(checkpoint)
        tokenizer = _tokenizer(options)
        quantizer = tokenizer.config.quantizer
        assert isinstance(quantizer, MultiScaleConfig)
        _check_fit(sizes, _known_scales(checkpoint, options), quantizer)
        l2_norm = any(".scale_mul_1H11" in name for name in checkpoint.tensors)
        in_file = checkpoint.shape(HEAD_SCALES.format(0), 4)[1] if l2_norm else None
        heads, assumed = head_count(options, sizes.width, {}, in_file)
        count = class_count(checkpoint, CLASS_TABLE, options)
        config = NextScaleConfig(
            spec=CodeSpec(quantizer.codebook.vocab_size, quantizer.scales),
            quantizer=quantizer,
            num_classes=count.classes,
            depth=sizes.depth,
            width=sizes.width,
            num_heads=heads,
            mlp_ratio=sizes.hidden / sizes.width,
            drop_path=min(0.1 * sizes.depth / 24, 0.5),  # for fine-tuning, as in VAR
            shared_adaln=checkpoint.has("shared_ada_lin."),
            qk_l2_norm=l2_norm,
            tokenizer_fingerprint=tokenizer.fingerprint,
            **count.label_dropout,
        )
        facts: dict[str, object] = {
            "scales": ", ".join(str(side) for side, _ in quantizer.scales),
            "codes": sizes.vocab,
            **count.facts,
            "width": sizes.width,
            "depth": sizes.depth,
            "adaLN": "shared" if config.shared_adaln else "of every block",
            "attention": "l2-normalised" if l2_norm else "plain",
        }
        facts |= {} if assumed else {"heads": heads}
        return Inferred(config, facts, assumed | count.assumed)

    def layout(self, config: NextScaleConfig) -> Layout:
        with torch.device("meta"):
            names = PRIORS.build(config).state_dict()
        others = {name for name in names if name.startswith("quantizer.")} | {CLASS_TABLE}
        links = [same(name, name) for name in names if name not in others]
        classes = config.num_classes
        links.append(class_table(CLASS_TABLE, CLASS_TABLE, classes, null_is_optional=False))
        return Layout(links, buffers=_buffers(config), own=("quantizer.*",))

    def own_tensors(self, config: NextScaleConfig, options: Options) -> dict[str, Tensor]:
        """The tokenizer's quantizer, frozen."""
        with torch.random.fork_rng(devices=[]):
            frozen = FrozenQuantizer(config.quantizer)
        frozen.bind(_tokenizer(options).quantizer)
        return {f"quantizer.{name}": tensor for name, tensor in frozen.state_dict().items()}

    def flags(self, config: NextScaleConfig) -> dict[str, object]:
        heads = {} if config.qk_l2_norm else head_flags(config.num_heads, config.width, {})
        return {"tokenizer": "TOKENIZER", **heads}

    def fits(self, config: Any) -> bool:
        if not isinstance(config, NextScaleConfig):
            return False
        return (
            all(height == width for height, width in config.spec.grids)
            and config.text is None
            and config.norm_eps == NextScaleConfig.norm_eps
            and is_published_quantizer(config.quantizer)
        )


@dataclass(frozen=True)
class Sizes:
    """The sizes that the shapes of a prior's tensors determine."""

    width: int
    depth: int
    hidden: int  # of the feed-forward
    vocab: int
    code_dim: int
    scales: int
    length: int  # codes of all scales

    @classmethod
    def of(cls, checkpoint: PublishedCheckpoint) -> Self:
        """Raises `ConversionError` if a tensor that determines a size is missing."""
        width, code_dim = checkpoint.shape("word_embed.weight", 2)
        return cls(
            width=width,
            depth=layers(checkpoint, "blocks.{}."),
            hidden=checkpoint.shape("blocks.0.ffn.fc1.weight", 2)[0],
            vocab=checkpoint.shape("head.weight", 2)[0],
            code_dim=code_dim,
            scales=checkpoint.shape("lvl_embed.weight", 2)[0],
            length=checkpoint.shape("pos_1LC", 3)[1],
        )


def _tokenizer(options: Options) -> VQTokenizer:
    """The tokenizer that was given.

    Raises:
        ConversionError: none was, or it is not a multi-scale one.
    """
    tokenizer = options.tokenizer
    if tokenizer is None:
        raise ConversionError(
            "a VAR prior needs the code vectors of its tokenizer: convert that first, from "
            "var-tokenizer, and give its folder with --tokenizer"
        )
    if not isinstance(tokenizer, VQTokenizer) or not isinstance(
        tokenizer.config.quantizer, MultiScaleConfig
    ):
        raise ConversionError(
            f"the tokenizer makes {tokenizer.spec}; a VAR prior needs codes of several scales: "
            "convert its own tokenizer, from var-tokenizer"
        )
    return tokenizer


def _known_scales(checkpoint: PublishedCheckpoint, options: Options) -> tuple[int, ...] | None:
    """Sides of the scales from the file, or else from the flag.

    Raises:
        ConversionError: the two differ, or those of the file are not squares.
    """
    if LEVELS not in checkpoint.tensors:
        return options.scales
    levels = checkpoint.tensors[LEVELS].flatten()
    numbers, counts = levels.unique_consecutive(return_counts=True)
    sides = [square_side(count) for count in counts.tolist()]
    if numbers.tolist() != list(range(len(numbers))) or None in sides:
        raise ConversionError(
            f"{checkpoint.path}: {LEVELS} does not number the codes of square grids, coarse to fine"
        )
    in_file = tuple(side for side in sides if side is not None)
    if options.scales not in (None, in_file):
        raise ConversionError(
            f"--scales is {listed(options.scales)}, but {LEVELS} in the file has "
            f"{listed(in_file)}: leave it out"
        )
    return in_file


def _check_fit(sizes: Sizes, known: tuple[int, ...] | None, quantizer: MultiScaleConfig) -> None:
    """Raise `ConversionError` if the prior was not trained on codes of this quantizer.

    Args:
        known: sides of the prior's scales, see `_known_scales`.
    """
    sides = tuple(side for side, _ in quantizer.scales)
    if known is not None and tuple((side, side) for side in known) != quantizer.scales:
        raise ConversionError(
            f"the prior has the scales {listed(known)}, the tokenizer {listed(sides)}: give the "
            f"prior's own tokenizer, converted with --scales {listed(known, ',')}"
        )
    made = sum(height * width for height, width in quantizer.scales)
    if (len(sides), made) != (sizes.scales, sizes.length):
        raise ConversionError(
            f"the prior has {sizes.length} codes in {sizes.scales} scales, the tokenizer {made} in "
            f"{len(sides)}, {listed(sides)}: give the prior's own tokenizer"
        )
    codebook = quantizer.codebook
    if (codebook.vocab_size, codebook.code_dim) != (sizes.vocab, sizes.code_dim):
        raise ConversionError(
            f"the prior has {sizes.vocab} codes of {sizes.code_dim} numbers, the tokenizer has "
            f"{codebook.vocab_size} of {codebook.code_dim}: give the prior's own tokenizer"
        )


def _buffers(config: NextScaleConfig) -> dict[str, Buffer]:
    """What VAR saves beside its weights, although it follows from the sizes."""
    cpu = torch.device("cpu")
    seen = block_causal_mask(config.spec.grids, cpu)
    mask = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)[None, None]
    zeros = torch.zeros(config.width)
    return {
        LEVELS: Buffer(scale_of_codes(config.spec.grids, cpu)[None], tolerance=0),
        MASK: Buffer(mask, tolerance=0),
        **{KEY_BIAS.format(i): Buffer(zeros, tolerance=0) for i in range(config.depth)},
    }
