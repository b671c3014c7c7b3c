"""Diffusers' folder of `DiTTransformer2DModel`: config.json and a weights file.

Every block has its own embedders of time and class; in published weights they are all equal, and
ours has one of each. Two settings differ from the authors' DiT: the frequencies of the time
embedding, and the epsilon of the second norm of a block. Diffusers' pipeline guides all channels.
"""

from dataclasses import replace
from typing import Any

import torch

from smalti.data.latents import ContinuousSpec
from smalti.errors import ConversionError
from smalti.pipelines.convert.dit import (
    CLASS_TABLE,
    DDPM_NOISE,
    PUBLISHED_HEADS,
    fits_objective,
    is_plain,
    mlp_ratio,
    network_facts,
)
from smalti.pipelines.convert.layout import Layout, Link, Tensors, same
from smalti.pipelines.convert.reader import PublishedCheckpoint
from smalti.pipelines.convert.source import (
    Inferred,
    Options,
    Source,
    class_count,
    head_count,
    layers,
    listed,
    number,
    positive_integer,
    single_side,
    tokenizer_fingerprint,
    wrong_setting,
)
from smalti.prior.flow.dit import DiTConfig
from smalti.prior.flow.prior import FlowConfig
from smalti.prior.registry import PRIORS

# Names of the class; the first was split into several in Diffusers 0.28.
CLASSES = ("Transformer2DModel", "DiTTransformer2DModel")

# Settings that the tensors do not determine, with the only value that our model has.
FIXED = {
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_zero",
    "attention_bias": True,
    "norm_elementwise_affine": False,
    "only_cross_attention": False,
    "cross_attention_dim": None,
    "num_vector_embeds": None,
    "double_self_attention": False,
}
# Settings that the tensors also determine.
SIZES = (
    "attention_head_dim",
    "in_channels",
    "num_attention_heads",
    "num_embeds_ada_norm",
    "num_layers",
    "out_channels",
    "patch_size",
    "sample_size",
)
NORM_EPS = 1e-5  # default of "norm_eps"
FREQUENCY_SHIFT = 1  # the exponents of the time frequencies run from 0 to 1, both included
# Two settings of our own, which Diffusers ignores. Our exports of the authors' DiT have
# `frequency_shift` 0 and `guided_channels` 3.
SHIFT, GUIDED = "frequency_shift", "guided_channels"
FREQUENCY_SIZE = 256
MLP_RATIO = 4
PUBLISHED_SIDE = 32  # of the latents, for images of 256 px

EMBEDDERS = {  # ours: theirs, in every block
    "t_embedder.mlp.0.weight": "timestep_embedder.linear_1.weight",
    "t_embedder.mlp.0.bias": "timestep_embedder.linear_1.bias",
    "t_embedder.mlp.2.weight": "timestep_embedder.linear_2.weight",
    "t_embedder.mlp.2.bias": "timestep_embedder.linear_2.bias",
    CLASS_TABLE: "class_embedder.embedding_table.weight",
}
BLOCK_PARTS = {
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}
OTHERS = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}


# -- tensors --------------------------------------------------------------------------------------


def _copy(block: int, name: str) -> str:
    return f"transformer_blocks.{block}.norm1.emb.{name}"


def _copied(ours: str, theirs: str, depth: int) -> Link:
    """One tensor of ours, and an equal one of theirs in every block."""
    return Link(
        (f"network.{ours}",),
        tuple(_copy(i, theirs) for i in range(depth)),
        to_ours=lambda tensors: tensors[:1],
        to_theirs=lambda tensors: [tensors[0].clone() for _ in range(depth)],
    )


def _qkv(block: int, kind: str) -> Link:
    """Queries, keys and values, which ours concatenates along the rows."""

    def join(parts: Tensors) -> Tensors:
        if len({part.shape for part in parts}) > 1:
            raise ValueError("queries, keys and values differ in shape")
        return [torch.cat(list(parts))]

    return Link(
        (f"network.blocks.{block}.attn.qkv.{kind}",),
        tuple(f"transformer_blocks.{block}.attn1.to_{part}.{kind}" for part in "qkv"),
        to_ours=join,
        to_theirs=lambda tensors: [part.clone() for part in tensors[0].chunk(3)],
    )


def _check_copies(checkpoint: PublishedCheckpoint, depth: int) -> None:
    """Raise `ConversionError` if the embedders of time and class differ between blocks."""
    tensors = checkpoint.tensors
    for name in EMBEDDERS.values():
        first = tensors.get(_copy(0, name))
        for i in range(1, depth):
            other = tensors.get(_copy(i, name))
            if first is not None and other is not None and not torch.equal(first, other):
                raise ConversionError(
                    f"{checkpoint.path}: {_copy(i, name)} differs from that of block 0; our DiT "
                    "has one embedding for all of its blocks"
                )


# -- config.json ----------------------------------------------------------------------------------


def _check_settings(checkpoint: PublishedCheckpoint) -> None:
    """Raise `ConversionError` if config.json describes a model that ours cannot represent."""
    found = checkpoint.config
    if found.get("_class_name", CLASSES[-1]) not in CLASSES:
        raise wrong_setting(checkpoint, "_class_name", " or ".join(CLASSES))
    for key, value in FIXED.items():
        if found.get(key, value) != value:
            raise wrong_setting(checkpoint, key, f"{value!r}, as in all published models")


def _norm_eps(checkpoint: PublishedCheckpoint) -> float:
    value = number(checkpoint, "norm_eps", NORM_EPS)
    if not 0 <= value < 1:
        raise wrong_setting(checkpoint, "norm_eps", "a number from 0 to 1, such as 1e-5")
    return float(value)


def _frequency_shift(checkpoint: PublishedCheckpoint) -> int:
    value = checkpoint.config.get(SHIFT, FREQUENCY_SHIFT)
    if value not in (0, FREQUENCY_SHIFT):
        raise wrong_setting(checkpoint, SHIFT, f"0 or {FREQUENCY_SHIFT}")
    return int(value)


def _side(checkpoint: PublishedCheckpoint, options: Options) -> tuple[int, dict[str, object]]:
    """The side of the latents, and its origin where config.json does not state it."""
    side = positive_integer(checkpoint, "sample_size")
    if side is None:
        spec = None if options.tokenizer is None else options.tokenizer.spec
        if isinstance(spec, ContinuousSpec) and options.scales is None:
            return spec.width, {"grid": f"{spec.width} x {spec.width}, the tokenizer's"}
        return single_side(options, PUBLISHED_SIDE)
    if options.scales not in (None, (side,)):
        raise ConversionError(
            f"--scales is {listed(options.scales)}, but config.json has sample_size {side}: leave "
            "it out"
        )
    return side, {}


# -- the source -----------------------------------------------------------------------------------


class DiffusersDiT(Source):
    """Predicts the noise of DDPM and its variance, like DiT."""

    title = "Diffusers DiT"
    registry = PRIORS
    options = frozenset({"heads", "scales", "tokenizer", "num_classes"})

    def recognises(self, checkpoint: PublishedCheckpoint) -> bool:
        ends = checkpoint.has("pos_embed.proj.") or checkpoint.has("proj_out_")
        return ends and checkpoint.has("transformer_blocks.")

    def infer(self, checkpoint: PublishedCheckpoint, options: Options) -> Inferred:
        _check_settings(checkpoint)
        width, channels, patch, _ = checkpoint.shape("pos_embed.proj.weight", 4)
        depth = layers(checkpoint, "transformer_blocks.{}.")
        _check_copies(checkpoint, depth)
        in_file = positive_integer(checkpoint, "num_attention_heads")
        heads, assumed = head_count(options, width, PUBLISHED_HEADS, in_file)
        side, origin = _side(checkpoint, options)
        embedder = _copy(0, "timestep_embedder.linear_1.weight")
        count = class_count(checkpoint, _copy(0, EMBEDDERS[CLASS_TABLE]), options)
        hidden = checkpoint.shape("transformer_blocks.0.ff.net.0.proj.weight", 2)[0]
        network = DiTConfig(
            in_channels=channels,
            out_channels=checkpoint.shape("proj_out_2.weight", 2)[0] // patch**2,
            grid=(side, side),
            patch_size=patch,
            width=width,
            depth=depth,
            num_heads=heads,
            mlp_ratio=mlp_ratio(hidden, width),
            num_classes=count.classes,
            frequency_size=checkpoint.shape(embedder, 2)[1],
            frequency_shift=_frequency_shift(checkpoint),
            mlp_norm_eps=_norm_eps(checkpoint),
        )
        config = replace(
            DDPM_NOISE,
            network=network,
            guided_channels=positive_integer(checkpoint, GUIDED),
            tokenizer_fingerprint=tokenizer_fingerprint(options),
            **count.label_dropout,
        )
        facts = network_facts(network) | count.facts
        facts |= {} if assumed else {"heads": heads}
        facts |= {} if origin else {"grid": f"{side} x {side}"}
        # Diffusers' class always has a null class: nothing is assumed about it.
        return Inferred(config, facts, assumed | origin)

    def layout(self, config: FlowConfig) -> Layout:
        depth = config.network.depth
        links = [_copied(ours, theirs, depth) for ours, theirs in EMBEDDERS.items()]
        named = dict(OTHERS)
        for i in range(depth):
            named |= {
                f"blocks.{i}.{ours}": f"transformer_blocks.{i}.{theirs}"
                for ours, theirs in BLOCK_PARTS.items()
            }
        for kind in ("weight", "bias"):
            links += [same(f"network.{o}.{kind}", f"{t}.{kind}") for o, t in named.items()]
            links += [_qkv(i, kind) for i in range(depth)]
        return Layout(links)

    def fits(self, config: Any) -> bool:
        if not (fits_objective(config, DDPM_NOISE) and is_plain(config.network)):
            return False
        network: DiTConfig = config.network
        return (
            network.frequency_shift in (0, FREQUENCY_SHIFT)
            and network.frequency_size == FREQUENCY_SIZE
            and network.hidden == MLP_RATIO * network.width
        )

    def remarks(self, config: FlowConfig) -> list[str]:
        if config.network.frequency_shift == FREQUENCY_SHIFT:
            return []
        return [
            "note: Diffusers embeds the time with slightly different frequencies than the authors'"
            " DiT, which this model is: the images that Diffusers generates with it will differ"
        ]

    def export_config(self, config: FlowConfig) -> dict[str, Any]:
        network = config.network
        return {
            "_class_name": CLASSES[-1],
            "num_attention_heads": network.num_heads,
            "attention_head_dim": network.head_dim,
            "in_channels": network.in_channels,
            "out_channels": network.out_channels,
            "num_layers": network.depth,
            "sample_size": network.grid[0],
            "patch_size": network.patch_size,
            "num_embeds_ada_norm": network.num_classes,
            "norm_eps": network.mlp_norm_eps,
            "attention_bias": True,
            "activation_fn": "gelu-approximate",
            "norm_type": "ada_norm_zero",
            "norm_elementwise_affine": False,
            **({} if network.frequency_shift == FREQUENCY_SHIFT else {SHIFT: 0}),
            **({} if config.guided_channels is None else {GUIDED: config.guided_channels}),
        }

    def stated(self, config: FlowConfig) -> dict[str, Any]:
        settings = self.export_config(config)
        return {key: settings[key] for key in SIZES}
