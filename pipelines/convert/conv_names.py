"""How other code bases call the parts of the convolutional encoder and decoder, and the sizes that
their shapes tell.

All of them descend from taming-transformers, whose names ours are: encoder level i, block j is
`encoder.down.i.block.j`, decoder level i, counted from the highest resolution, `decoder.up.i`.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from smalti.errors import SmaltiError
from smalti.pipelines.convert.layout import Link, joined, pointwise, same
from smalti.pipelines.convert.reader import Checkpoint
from smalti.tokenizer.conv import ConvConfig

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
    checkpoint: Checkpoint,
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
