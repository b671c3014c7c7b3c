"""DiT (Peebles and Xie, 2212.09748) and SiT (Ma et al., 2401.08740): one network, two objectives.

The files contain a state dict, or the `ema` of a training run. They do not state the objective
(the meaning of the time and of the output): it follows from the name of the source.
"""

import math
from dataclasses import replace
from typing import Any, ClassVar

import torch

from smalti.errors import ConversionError
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
    listed,
    square_side,
    tokenizer_fingerprint,
)
from smalti.prior.attention import sin_cos_table
from smalti.prior.flow.dit import DiTConfig
from smalti.prior.flow.path import DDPMPath
from smalti.prior.flow.prior import FlowConfig
from smalti.prior.registry import PRIORS

CLASS_TABLE = "y_embedder.embedding_table.weight"
POSITIONS = "pos_embed"  # (1, N, width): sines and cosines of N = side^2 positions
NETWORK = "network."  # prefix of our names for the same tensors

PUBLISHED_HEADS = {1152: 16}  # by width: the size XL
GUIDED_CHANNELS = 3  # of 4, in the authors' samplers

# Predicts the noise of DDPM with 1000 steps and linear beta; its time is the index of the step.
DDPM_NOISE = FlowConfig(path=DDPMPath(), prediction="noise", time_scale=-1000.0, time_shift=999.0)


def network_facts(network: DiTConfig) -> dict[str, object]:
    """The sizes of a network, to print."""
    learned = network.out_channels == 2 * network.in_channels
    return {
        "channels": f"{network.in_channels}{', with learned variance' if learned else ''}",
        "patch": network.patch_size,
        "width": network.width,
        "depth": network.depth,
        "classes": network.num_classes,
    }


def mlp_ratio(hidden: int, width: int) -> float:
    """The ratio whose product with the width, rounded down, is exactly the hidden width."""
    ratio = hidden / width
    return ratio if int(ratio * width) == hidden else math.nextafter(ratio, math.inf)


def _side(checkpoint: PublishedCheckpoint, options: Options, patch: int) -> int:
    """The side of the latents.

    Raises:
        ConversionError: the table of positions is missing, does not cover a square, or contradicts
            --scales.
    """
    tokens = checkpoint.shape(POSITIONS, 3)[1]
    side = square_side(tokens)
    if side is None:
        raise ConversionError(
            f"{checkpoint.path}: {POSITIONS} has {tokens} tokens, which is no square"
        )
    side *= patch
    if options.scales not in (None, (side,)):
        raise ConversionError(
            f"--scales is {listed(options.scales)}, but {POSITIONS} in the file is for latents of "
            f"{side} x {side}: leave it out"
        )
    return side


def fits_objective(config: Any, objective: FlowConfig) -> bool:
    """Whether a config is that of a flow prior with this objective, of classes or nothing."""
    names = ("path", "prediction", "time_scale", "time_shift")
    return (
        isinstance(config, FlowConfig)
        and config.text is None
        and config.image is None
        and all(getattr(config, name) == getattr(objective, name) for name in names)
    )


def is_plain(network: DiTConfig) -> bool:
    """Whether a network has only the parts of the original code, on a square grid."""
    height, width = network.grid
    parts = (network.positions, network.feed_forward, network.norm)
    return height == width and parts == ("sin-cos", "gelu", "layer") and not network.qk_norm


class DiTNetwork(Source):
    """What DiT and SiT share: everything but the objective."""

    registry = PRIORS
    options = frozenset({"heads", "scales", "tokenizer", "num_classes"})
    objective: ClassVar[FlowConfig]  # path, prediction and time; its network is not used

    def recognises(self, checkpoint: PublishedCheckpoint) -> bool:
        ends = checkpoint.has("x_embedder.") or checkpoint.has("final_layer.")
        return ends and checkpoint.has("blocks.")

    def infer(self, checkpoint: PublishedCheckpoint, options: Options) -> Inferred:
        width, channels, patch, _ = checkpoint.shape("x_embedder.proj.weight", 4)
        heads, assumed = head_count(options, width, PUBLISHED_HEADS)
        side = _side(checkpoint, options, patch)
        count = class_count(checkpoint, CLASS_TABLE, options)
        network = DiTConfig(
            in_channels=channels,
            out_channels=checkpoint.shape("final_layer.linear.weight", 2)[0] // patch**2,
            grid=(side, side),
            patch_size=patch,
            width=width,
            depth=layers(checkpoint, "blocks.{}."),
            num_heads=heads,
            mlp_ratio=mlp_ratio(checkpoint.shape("blocks.0.mlp.fc1.weight", 2)[0], width),
            num_classes=count.classes,
            frequency_size=checkpoint.shape("t_embedder.mlp.0.weight", 2)[1],
        )
        config = replace(
            self.objective,
            network=network,
            guided_channels=min(GUIDED_CHANNELS, channels),
            tokenizer_fingerprint=tokenizer_fingerprint(options),
            **count.label_dropout,
        )
        facts = network_facts(network) | count.facts | {"grid": f"{side} x {side}"}
        return Inferred(config, facts, assumed | count.assumed)

    def layout(self, config: FlowConfig) -> Layout:
        with torch.device("meta"):
            names = PRIORS.build(config).state_dict()
        ours = NETWORK + CLASS_TABLE
        links = [same(name, name.removeprefix(NETWORK)) for name in names if name != ours]
        classes = config.network.num_classes
        links.append(class_table(ours, CLASS_TABLE, classes, null_is_optional=True))
        table = sin_cos_table(config.network.token_grid, config.network.width)
        return Layout(links, buffers={POSITIONS: Buffer(table[None])})

    def flags(self, config: FlowConfig) -> dict[str, object]:
        network = config.network
        heads = head_flags(network.num_heads, network.width, PUBLISHED_HEADS)
        return heads | class_flags(config.label_dropout, network.num_classes)

    def fits(self, config: Any) -> bool:
        return (
            fits_objective(config, self.objective)
            and is_plain(config.network)
            and config.network.frequency_shift == DiTConfig.frequency_shift
            and config.network.mlp_norm_eps == DiTConfig.mlp_norm_eps
        )


class DiTSource(DiTNetwork):
    """Predicts the noise of DDPM and its variance; the time is the index of the step.

    The authors' sampler corresponds to ours with solver "ddim" or "ddpm" (variance "learned") on
    the schedule "ddpm".
    """

    title = "DiT"
    objective = DDPM_NOISE


class SiTSource(DiTNetwork):
    """Predicts the velocity on linear paths; the time is 0 for noise and 1 for data.

    The second half of the output channels is not used, as in SiT.
    """

    title = "SiT"
    objective = FlowConfig()
