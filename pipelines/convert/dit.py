"""DiT's weights (Peebles and Xie, 2212.09748): a state dict, or the `ema` of a training run."""

import math
from dataclasses import replace
from typing import Any, ClassVar

import torch

from smalti.errors import SmaltiError
from smalti.pipelines.convert.layout import Buffer, Layout, same
from smalti.pipelines.convert.reader import PublishedCheckpoint
from smalti.pipelines.convert.source import (
    Inferred,
    Options,
    Source,
    dims,
    fingerprint,
    head_count,
    head_flags,
    layers,
    square_side,
)
from smalti.prior.attention import sin_cos_table
from smalti.prior.flow.dit import DiTConfig
from smalti.prior.flow.path import DDPMPath
from smalti.prior.flow.prior import FlowConfig
from smalti.prior.registry import PRIORS

# -------------------------------------------------------------------------------------------------
# DiT's weights (Peebles and Xie, 2212.09748): a state dict, or the `ema` of a training run.

POSITIONS = "pos_embed"  # (1, N, width): sines and cosines
NETWORK = "network."  # what our names of the same tensors begin with

PUBLISHED_HEADS = {1152: 16}  # by width: XL
GUIDED_CHANNELS = 3  # in the authors' samplers, of 4 channels

# Noise on DDPM's chain of 1000 steps with linear variances, told the index of a step.
NOISE_ON_A_CHAIN = FlowConfig(
    path=DDPMPath(), prediction="noise", time_scale=-1000.0, time_shift=999.0
)


class DiTNetwork(Source):
    """What DiT and SiT share: everything but what time and output mean, which no file tells."""

    registry = PRIORS
    options = frozenset({"heads", "scales", "tokenizer"})
    objective: ClassVar[FlowConfig]  # what time and output mean, around any network

    def recognises(self, checkpoint: PublishedCheckpoint) -> bool:
        ends = checkpoint.has("x_embedder.") or checkpoint.has("final_layer.")
        return ends and checkpoint.has("blocks.")

    def infer(self, checkpoint: PublishedCheckpoint, options: Options) -> Inferred:
        width, channels, patch, _ = dims(checkpoint, "x_embedder.proj.weight", 4)
        heads, assumed = head_count(options, width, PUBLISHED_HEADS)
        side = _side(checkpoint, options, patch)
        network = DiTConfig(
            in_channels=channels,
            out_channels=dims(checkpoint, "final_layer.linear.weight", 2)[0] // patch**2,
            grid=(side, side),
            patch_size=patch,
            width=width,
            depth=layers(checkpoint, "blocks.{}."),
            num_heads=heads,
            mlp_ratio=mlp_ratio(dims(checkpoint, "blocks.0.mlp.fc1.weight", 2)[0], width),
            num_classes=dims(checkpoint, "y_embedder.embedding_table.weight", 2)[0] - 1,
            frequency_size=dims(checkpoint, "t_embedder.mlp.0.weight", 2)[1],
        )
        config = replace(
            self.objective,
            network=network,
            guided_channels=min(GUIDED_CHANNELS, channels),
            tokenizer_fingerprint=fingerprint(options),
        )
        return Inferred(config, network_facts(network) | {"grid": f"{side} x {side}"}, assumed)

    def layout(self, config: FlowConfig) -> Layout:
        with torch.device("meta"):
            names = PRIORS.build(config).state_dict()
        links = [same(name, name.removeprefix(NETWORK)) for name in names]
        table = sin_cos_table(config.network.token_grid, config.network.width)
        return Layout(links, buffers={POSITIONS: Buffer(table[None])})

    def flags(self, config: FlowConfig) -> dict[str, object]:
        return head_flags(config.network.num_heads, config.network.width, PUBLISHED_HEADS)

    def fits(self, config: Any) -> bool:
        return (
            fits_objective(config, self.objective)
            and is_plain(config.network)
            and config.network.frequency_shift == DiTConfig.frequency_shift
            and config.network.mlp_norm_eps == DiTConfig.mlp_norm_eps
        )


class DiTSource(DiTNetwork):
    """A noise and its variance on the chain of DDPM, told the index of a step.

    The authors' sampler is ours with solver "ddim" or "ddpm" (variance "learned") on the schedule
    "ddpm".
    """

    title = "DiT"
    objective = NOISE_ON_A_CHAIN


# -- sizes ----------------------------------------------------------------------------------------


def network_facts(network: DiTConfig) -> dict[str, object]:
    """What shapes told, to print."""
    learned = network.out_channels == 2 * network.in_channels
    return {
        "channels": f"{network.in_channels}{', with learned variance' if learned else ''}",
        "patch": network.patch_size,
        "width": network.width,
        "depth": network.depth,
        "classes": network.num_classes,
    }


def mlp_ratio(hidden: int, width: int) -> float:
    """The ratio that gives back exactly the hidden width, although it is rounded down."""
    ratio = hidden / width
    return ratio if int(ratio * width) == hidden else math.nextafter(ratio, math.inf)


def _side(checkpoint: PublishedCheckpoint, options: Options, patch: int) -> int:
    """Side of the latents.

    Raises:
        SmaltiError: the table of positions is missing, of no square, or not of the side in the
            flag.
    """
    tokens = dims(checkpoint, POSITIONS, 3)[1]
    side = square_side(tokens)
    if side is None:
        raise SmaltiError(f"{checkpoint.path}: {POSITIONS} has {tokens} tokens, which is no square")
    side *= patch
    if options.scales not in (None, (side,)):
        given = ", ".join(map(str, options.scales or ()))
        raise SmaltiError(
            f"--scales is {given}, but {POSITIONS} in the file is for latents of {side} x {side}: "
            "leave it out"
        )
    return side


# -- may it be exported? --------------------------------------------------------------------------


def fits_objective(config: Any, objective: FlowConfig) -> bool:
    """Whether a model is a flow prior whose time and output mean this."""
    names = ("path", "prediction", "time_scale", "time_shift")
    return isinstance(config, FlowConfig) and all(
        getattr(config, name) == getattr(objective, name) for name in names
    )


def is_plain(network: DiTConfig) -> bool:
    """Whether a network has no parts of our own."""
    height, width = network.grid
    parts = (network.positions, network.feed_forward, network.norm)
    return height == width and parts == ("sin-cos", "gelu", "layer") and not network.qk_norm


# -------------------------------------------------------------------------------------------------
# SiT's weights (Ma et al., 2401.08740), which are laid out as DiT's.


class SiTSource(DiTNetwork):
    """A velocity on straight paths, told a time from 0, noise, to 1, data.

    The second half of the output channels is not used, as in SiT.
    """

    title = "SiT"
    objective = FlowConfig()
