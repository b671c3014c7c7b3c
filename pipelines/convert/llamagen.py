"""LlamaGen (Sun et al., 2406.06525): the tokenizers VQ-8 and VQ-16, and the class-conditional and
text-conditional priors.

A prior's file states neither its number of heads nor its grid, unless it is an old one with
the rotary table, or was saved after sampling, with masks and key-value caches. These are checked
and not imported.
"""

from typing import Any

import torch
from torch import Tensor

from smalti.data.latents import CodeSpec
from smalti.errors import ConversionError
from smalti.pipelines.convert.conv import (
    ConvNames,
    ConvSource,
    image_size,
    infer_conv,
    infer_nearest,
    infer_vq,
    is_nearest_vq,
    is_published_conv,
    mirrored,
)
from smalti.pipelines.convert.layout import Buffer, Layout, class_table, same
from smalti.pipelines.convert.reader import PublishedCheckpoint
from smalti.pipelines.convert.source import (
    Inferred,
    Options,
    Source,
    class_count,
    class_flags,
    head_count,
    head_flags,
    layers,
    single_side,
    square_side,
    tokenizer_fingerprint,
)
from smalti.prior.attention import rotary_frequencies
from smalti.prior.conditions.byte_encoder import BYTES
from smalti.prior.next_token.model import NextTokenConfig
from smalti.prior.registry import PRIORS

# -------------------------------------------------------------------------------------------------
# Tokenizers.

NAMES = ConvNames(
    rules=(
        (r"^encoder\.down\.([^.]+)\.", r"encoder.conv_blocks.\1."),
        (r"^decoder\.up\.(\d+)\.", mirrored("decoder.conv_blocks")),
        (r"(conv_blocks\.[^.]+)\.block\.", r"\1.res."),
        (r"\.mid\.block_1\.", ".mid.0."),
        (r"\.mid\.attn_1\.", ".mid.1."),
        (r"\.mid\.block_2\.", ".mid.2."),
        (r"^quantizer\.codebook\.weight$", "quantize.embedding.weight"),
    ),
)
# (65536,), the codes that training used last. The original code cannot load a file without it.
USED_CODES = "quantize.codebook_used"
USAGE_WINDOW = 65536


class LlamaGenTokenizer(ConvSource):
    """Codes are l2-normalised before they are compared and looked up; no tensor shows it."""

    title = "LlamaGen tokenizer"
    names = NAMES
    export_wrapper = "model"

    def recognises(self, checkpoint: PublishedCheckpoint) -> bool:
        return checkpoint.has("encoder.conv_blocks.") or checkpoint.has("decoder.conv_blocks.")

    def infer(self, checkpoint: PublishedCheckpoint, options: Options) -> Inferred:
        conv = infer_conv(checkpoint, self.names)
        quantizer = infer_nearest(checkpoint, l2_normalise=True)
        return infer_vq(checkpoint, conv, quantizer, image_size(options))

    def buffers(self, config: Any) -> dict[str, Buffer]:
        del config
        return {USED_CODES: Buffer(torch.zeros(USAGE_WINDOW), derived=False)}

    def fits(self, config: Any) -> bool:
        return (
            is_nearest_vq(config, l2_normalise=True)
            and is_published_conv(config.conv)
            and config.conv.mid_attention
            and config.conv.attention_levels == (len(config.conv.channel_mult) - 1,)
        )


# -------------------------------------------------------------------------------------------------
# Priors.

PUBLISHED_HEADS = {3200: 32, 4096: 32}  # by width: the sizes 3B and 7B
PUBLISHED_SIDE = 16  # codes per side, for images of 256 px

CAPTIONS, NO_CAPTION = "cls_embedding.cap_proj.", "cls_embedding.uncond_embedding"
OUR_CLASSES = "cls_embedding.weight"
CLASSES = "cls_embedding.embedding_table.weight"
QKV, GATE = "layers.0.attention.wqkv.weight", "layers.0.feed_forward.w1.weight"

ROTARY = "freqs_cis"  # (prefix + codes, head_dim / 2, 2): cosines and sines
MASKS = ("causal_mask", "mask_cache")  # (..., T, T)
CACHES = "layers.*.attention.kv_cache.*_cache"  # (B, heads, T, head_dim)
CACHE = "layers.0.attention.kv_cache.k_cache"


class LlamaGenPrior(Source):
    """Names are ours except for the class table. The condition gets no rotary embedding: the config
    has `prefix_rotary` "zero"."""

    title = "LlamaGen prior"
    registry = PRIORS
    options = frozenset({"heads", "scales", "tokenizer", "num_classes"})
    wrappers = ("model", "module", "state_dict", "ema")  # the order of the authors' sampler
    export_wrapper = "model"

    def recognises(self, checkpoint: PublishedCheckpoint) -> bool:
        codes = checkpoint.has("tok_embeddings.") or checkpoint.has("cls_embedding.")
        return codes and checkpoint.has("layers.")

    def infer(self, checkpoint: PublishedCheckpoint, options: Options) -> Inferred:
        vocab, width = checkpoint.shape("tok_embeddings.weight", 2)
        sizes, facts, null = _condition(checkpoint, options)
        heads, assumed = head_count(
            options, width, PUBLISHED_HEADS, _heads_in_file(checkpoint, width)
        )
        side, origin = _side(checkpoint, options, sizes)
        config = NextTokenConfig(
            spec=CodeSpec(vocab, ((side, side),)),
            depth=layers(checkpoint, "layers.{}."),
            width=width,
            num_heads=heads,
            num_kv_heads=_kv_heads(checkpoint, width, heads),
            hidden=checkpoint.shape(GATE, 2)[0],
            prefix_rotary="zero",
            tokenizer_fingerprint=tokenizer_fingerprint(options),
            **sizes,
        )
        _check_leftovers(checkpoint, config)
        facts |= {"codes": vocab, "width": width, "depth": config.depth, "hidden": config.hidden}
        facts |= {} if assumed else {"heads": heads}
        facts |= {} if origin else {"grid": f"{side} x {side}"}
        return Inferred(config, facts, assumed | origin | null)

    def layout(self, config: NextTokenConfig) -> Layout:
        with torch.device("meta"):
            names = PRIORS.build(config).state_dict()
        links = [same(name, name) for name in names if name != OUR_CLASSES]
        if OUR_CLASSES in names:
            classes = config.num_classes
            links.append(class_table(OUR_CLASSES, CLASSES, classes, null_is_optional=True))
        return Layout(links, surplus=(ROTARY, *MASKS, CACHES))

    def flags(self, config: NextTokenConfig) -> dict[str, object]:
        heads = head_flags(config.num_heads, config.width, PUBLISHED_HEADS)
        side = config.spec.grids[0][0]
        sides = {} if side == PUBLISHED_SIDE else {"scales": side}
        classes = class_flags(config.label_dropout, config.num_classes)
        return heads | sides | (classes if config.condition == "class" else {})

    def example(self, config_class: type) -> Any:
        """With the rotary positions of the prefix that LlamaGen's weights have."""
        own = config_class is NextTokenConfig
        return NextTokenConfig(prefix_rotary="zero") if own else config_class()

    def fits(self, config: Any) -> bool:
        if not isinstance(config, NextTokenConfig):
            return False
        height, width = config.spec.grids[0]
        return (
            config.prefix_rotary == "zero"
            and len(config.conditions) <= 1
            and config.text_encoder != BYTES
            and height == width
            and not config.qk_norm
            and config.random_order is None
            and config.norm_eps == NextTokenConfig.norm_eps
            and config.rotary_base == NextTokenConfig.rotary_base
        )


def _condition(
    checkpoint: PublishedCheckpoint, options: Options
) -> tuple[dict[str, Any], dict[str, object], dict[str, object]]:
    """The condition's fields of the config, facts to print, and what is assumed."""
    if not (checkpoint.has(CAPTIONS) or NO_CAPTION in checkpoint.tensors):
        count = class_count(checkpoint, CLASSES, options)
        return {"num_classes": count.classes, **count.label_dropout}, count.facts, count.assumed
    if options.num_classes is not None:
        raise ConversionError(
            f"--num_classes is {options.num_classes}, but {checkpoint.path} is conditional on "
            "captions: leave it out"
        )
    length, dim = checkpoint.shape(NO_CAPTION, 2)
    fields = {"condition": "text", "num_classes": 0, "text_length": length, "text_dim": dim}
    return fields, {"captions": f"{length} tokens of {dim} features"}, {}


def _heads_in_file(checkpoint: PublishedCheckpoint, width: int) -> int | None:
    """The number of heads that a rotary table or cache in the file implies, if there is one."""
    if ROTARY in checkpoint.tensors:
        name, head_dim = ROTARY, 2 * checkpoint.shape(ROTARY, 3)[1]
    elif CACHE in checkpoint.tensors:
        name, head_dim = CACHE, checkpoint.shape(CACHE, 4)[3]
    else:
        return None
    if width % head_dim:
        raise ConversionError(
            f"{checkpoint.path}: {name} is for heads of width {head_dim}, which does not divide "
            f"the width {width} of tok_embeddings.weight"
        )
    return width // head_dim


def _kv_heads(checkpoint: PublishedCheckpoint, width: int, heads: int) -> int:
    """Heads of keys and values as in the config: 0 means as many as queries have."""
    rows = checkpoint.shape(QKV, 2)[0]
    kv_heads, rest = divmod(rows - width, 2 * (width // heads))
    if rest or not 1 <= kv_heads <= heads or heads % kv_heads:
        raise ConversionError(
            f"{checkpoint.path}: {QKV} has {rows} rows, which does not fit {heads} heads in width "
            f"{width}: give the number of heads with --heads"
        )
    return 0 if kv_heads == heads else kv_heads


def _side(
    checkpoint: PublishedCheckpoint, options: Options, condition: dict[str, Any]
) -> tuple[int, dict[str, object]]:
    """The side of the code grid, and its origin where the file does not state it.

    Raises:
        ConversionError: the tokenizer has several grids, or none of codes.
    """
    if options.tokenizer is not None:
        spec = options.tokenizer.spec
        if not isinstance(spec, CodeSpec) or len(spec.grids) != 1:
            raise ConversionError(
                f"the tokenizer makes {spec}; a LlamaGen prior models one grid of codes: give its "
                "own tokenizer"
            )
        if options.scales is None:
            side = spec.grids[0][1]
            return side, {"grid": f"{side} x {side}, the tokenizer's"}
    if options.scales is None and ROTARY in checkpoint.tensors:
        prefix = condition.get("text_length", 1)
        side = square_side(max(0, checkpoint.shape(ROTARY, 3)[0] - prefix))
        if side:
            return side, {}
    return single_side(options, PUBLISHED_SIDE)


def _check_leftovers(checkpoint: PublishedCheckpoint, config: NextTokenConfig) -> None:
    """Raise `ConversionError` if a table, mask or cache in the file contradicts the config."""
    tensors, path = checkpoint.tensors, checkpoint.path
    if ROTARY in tensors:
        expected = _rotary(config)
        if not _close(tensors[ROTARY], expected):
            raise ConversionError(
                f"{path}: {ROTARY} is not the table of shape {tuple(expected.shape)} for "
                f"{config.num_heads} heads and grids of {config.spec.grids[0][0]} codes per side: "
                "give the model's own values with --heads and --scales"
            )
    for name in MASKS:
        if name in tensors and not _is_causal(tensors[name], config.condition == "text"):
            raise ConversionError(f"{path}: {name} is not a causal mask")
    for name in tensors:
        if ".kv_cache." in name:
            shape = checkpoint.shape(name, 4)
            if shape[1] not in (config.num_heads, config.kv_heads) or shape[3] != config.head_dim:
                raise ConversionError(
                    f"{path}: {name} has shape {shape}, which does not fit {config.num_heads} "
                    f"heads of width {config.head_dim}"
                )


def _rotary(config: NextTokenConfig) -> Tensor:
    grid, prefix = config.spec.grids[0], config.prefix_length
    table = rotary_frequencies(
        grid, config.head_dim, config.rotary_base, prefix, prefix_is_zero=True
    )
    return torch.view_as_real(table)


def _close(found: Tensor, expected: Tensor) -> bool:
    """Whether both agree to the precision of `found`."""
    if found.shape != expected.shape or not found.is_floating_point():
        return False
    tolerance = max(1e-5, torch.finfo(found.dtype).eps)
    return torch.allclose(found.double(), expected.double(), rtol=0, atol=tolerance)


def _is_causal(mask: Tensor, padded: bool) -> bool:
    """Whether a mask (..., T, T), boolean or additive, lets each position attend to itself and to
    all earlier ones alone; where captions are padded, to some of the earlier ones."""
    if mask.ndim < 2 or mask.shape[-1] != mask.shape[-2]:
        return False
    added = mask.is_floating_point() and bool((mask < 0).any())
    seen = mask == 0 if added else mask.bool()
    before = torch.ones(mask.shape[-2:], dtype=torch.bool).tril()
    if padded:
        own = seen.diagonal(dim1=-2, dim2=-1)
        return bool(own.all()) and not bool((seen & ~before).any())
    return bool((seen == before).all())
