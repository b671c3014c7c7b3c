"""Diffusers' folders of `AutoencoderKL` and `VQModel`: config.json and a weights file."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self, TypeGuard

from smalti.errors import SmaltiError
from smalti.pipelines.convert.conv import (
    PUBLISHED_GROUPS,
    ConvNames,
    OneCodebook,
    conv_facts,
    mirrored,
    stated_size,
)
from smalti.pipelines.convert.latent_diffusion import SCALING_FACTOR, KLSource
from smalti.pipelines.convert.reader import CONFIG, PublishedCheckpoint
from smalti.pipelines.convert.source import Inferred, Options, Source
from smalti.pipelines.convert.taming import has_codes
from smalti.tokenizer.conv import ConvConfig
from smalti.tokenizer.kl import KLConfig
from smalti.tokenizer.quantizers.nearest import NearestConfig
from smalti.tokenizer.vq import VQConfig

# -------------------------------------------------------------------------------------------------
# config.json of a Diffusers folder: settings, checked as they are read.


def config_path(checkpoint: PublishedCheckpoint) -> Path:
    """Where the file lies, or would."""
    return checkpoint.path.parent / CONFIG


def refusal(checkpoint: PublishedCheckpoint, key: str, expected: str) -> SmaltiError:
    """What is said of a setting that is not as expected."""
    value = checkpoint.config.get(key)
    return SmaltiError(f"{config_path(checkpoint)}: {key} is {value!r}; expected {expected}")


def number(
    checkpoint: PublishedCheckpoint, key: str, default: float, *, positive: bool = False
) -> float:
    """A number; what the file lacks, or has as null, is the default."""
    value = checkpoint.config.get(key)
    value = default if value is None else value
    if not _is_number(value) or (positive and value <= 0):
        raise refusal(checkpoint, key, "a positive number" if positive else "a number")
    return value


def numbers(checkpoint: PublishedCheckpoint, key: str, count: int) -> tuple[float, ...] | None:
    """A list of so many numbers; None where there is none."""
    value = checkpoint.config.get(key)
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != count or not all(map(_is_number, value)):
        raise refusal(checkpoint, key, f"{count} numbers")
    return tuple(map(float, value))


def whole(checkpoint: PublishedCheckpoint, key: str) -> int | None:
    """A whole number from 1; None where there is none."""
    value = checkpoint.config.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise refusal(checkpoint, key, "a whole number from 1")
    return value


def check_stated(checkpoint: PublishedCheckpoint, stated: Mapping[str, object]) -> None:
    """Raise `SmaltiError` if config.json speaks of other sizes than the tensors have.

    Args:
        stated: what it says if it belongs to them; what it lacks, or has as null, says nothing.
    """
    for key, told in stated.items():
        said = checkpoint.config.get(key)
        if said is not None and said != told:
            raise SmaltiError(
                f"{config_path(checkpoint)}: {key} is {said!r}, but the tensors of "
                f"{checkpoint.path.name} say {told!r}: they were cut short, or it is another "
                "model's file"
            )


def _is_number(value: object) -> TypeGuard[float]:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value)


# -------------------------------------------------------------------------------------------------
# Diffusers' folders of `AutoencoderKL` and `VQModel`: config.json and a weights file.

ATTENTION_NAMES = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v"}

NAMES = ConvNames(
    rules=(
        (r"^encoder\.down\.([^.]+)\.", r"encoder.down_blocks.\1."),
        (r"^decoder\.up\.(\d+)\.", mirrored("decoder.up_blocks")),
        (r"(_blocks\.[^.]+)\.block\.", r"\1.resnets."),
        (r"(_blocks\.[^.]+)\.attn\.", r"\1.attentions."),
        (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
        (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
        (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
        (r"(attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
        (r"(attentions\.\d+)\.(norm|q|k|v)\.", lambda m, _: f"{m[1]}.{ATTENTION_NAMES[m[2]]}."),
        (r"\.nin_shortcut\.", ".conv_shortcut."),
        (r"\.(down|up)sample\.conv\.", r".\1samplers.0.conv."),
        (r"\.norm_out\.", ".conv_norm_out."),
        (r"^quantizer\.codebook\.weight$", "quantize.embedding.weight"),
    ),
    linear_attention=True,
)

# How attention was spelt before Diffusers 0.13.
OLD_ATTENTION = {
    ".query.": ".to_q.",
    ".key.": ".to_k.",
    ".value.": ".to_v.",
    ".proj_attn.": ".to_out.0.",
}

# Settings of config.json that the tensors do not show, and the only value that our model has.
FIXED = {"act_fn": "silu", "norm_type": "group"}

# Settings that the tensors show, too.
SIZES = (
    "block_out_channels",
    "down_block_types",
    "in_channels",
    "latent_channels",
    "layers_per_block",
    "mid_block_add_attention",
    "num_vq_embeddings",
    "out_channels",
    "up_block_types",
    "use_post_quant_conv",
    "use_quant_conv",
    "vq_embed_dim",
)


def current_names(checkpoint: PublishedCheckpoint) -> PublishedCheckpoint:
    """The checkpoint with attention spelt as today."""

    def current(name: str) -> str:
        if ".attentions." in name:
            for old, new in OLD_ATTENTION.items():
                name = name.replace(old, new)
        return name

    return checkpoint.renamed(current)


class DiffusersFolder(Source):
    """What both models share: spellings, and settings that only config.json tells."""

    names = NAMES
    class_name: ClassVar[str]

    def prepare(self, checkpoint: PublishedCheckpoint) -> PublishedCheckpoint:
        return current_names(checkpoint)

    def settings(self, checkpoint: PublishedCheckpoint) -> Mapping[str, Any]:
        """config.json, if it describes a model that ours can be.

        Raises:
            SmaltiError: it is of another class, or asks for what our model does not do.
        """
        found = checkpoint.config
        where = config_path(checkpoint)
        name = found.get("_class_name", self.class_name)
        if name != self.class_name:
            raise SmaltiError(f"{where} describes a {name}; this source reads {self.class_name}")
        for key, value in FIXED.items():
            if found.get(key, value) != value:
                raise SmaltiError(f"{where}: {key} is {found[key]!r}; only {value!r} is read")
        return found

    def norm_groups(self, checkpoint: PublishedCheckpoint) -> int:
        """Groups of the normalisations."""
        groups = number(checkpoint, "norm_num_groups", PUBLISHED_GROUPS, positive=True)
        if groups != int(groups):
            raise refusal(checkpoint, "norm_num_groups", "a whole number")
        return int(groups)

    def stated(self, config: Any) -> dict[str, Any]:
        said = self.export_config(config) or {}
        return {key: value for key, value in said.items() if key in SIZES}

    def published_conv(self, conv: ConvConfig) -> bool:
        """Whether Diffusers builds such an encoder and decoder: any number of groups will do."""
        plain = conv.patch_size == 1 and not conv.residual_resampling
        return plain and conv.channel_mult[0] == 1 and _groups(conv) is not None


def _groups(conv: ConvConfig) -> int | None:
    """Groups of the normalisations if all levels have equally many, else None."""
    if conv.norm_groups is None and conv.channels * min(conv.channel_mult) < 4 * PUBLISHED_GROUPS:
        return None
    return conv.norm_groups or PUBLISHED_GROUPS


@dataclass(frozen=True)
class LatentScale:
    """Mean and standard deviation of raw latents, from the settings that tell them."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    facts: Mapping[str, object]  # that config.json told, to print
    assumed: Mapping[str, object]

    @classmethod
    def of(cls, checkpoint: PublishedCheckpoint, options: Options, channels: int) -> Self:
        """Ours are (z - mean) / std; Diffusers' (z - shift) * scaling, or (z - mean) * scaling /
        std where config.json has both lists."""
        scaling = number(checkpoint, "scaling_factor", SCALING_FACTOR, positive=True)
        shift = float(number(checkpoint, "shift_factor", 0.0))
        mean = numbers(checkpoint, "latents_mean", channels)
        std = numbers(checkpoint, "latents_std", channels)
        used = {
            "scaling_factor": scaling,
            "shift_factor": None if mean else shift,
            "latents_mean": mean and ", ".join(f"{m:g}" for m in mean),
            "latents_std": std and ", ".join(f"{s:g}" for s in std),
        }
        told = {key: v for key, v in used.items() if checkpoint.config.get(key) is not None}
        facts = {key: f"{v}, from config.json" for key, v in told.items() if v is not None}
        names = ("scaling_factor",) if mean else ("scaling_factor", "shift_factor")
        assumed = {name: used[name] for name in names if name not in told}
        if options.scaling_factor is not None:
            scaling = options.scaling_factor
            facts.pop("scaling_factor", None)
            assumed["scaling_factor"] = f"{scaling}, as given"
        return cls(
            mean=mean or (shift,) * channels,
            std=tuple(s / scaling for s in std or (1.0,) * channels),
            facts=facts,
            assumed=assumed,
        )


class DiffusersKL(DiffusersFolder, KLSource):
    """Scale and shift of the latents stand in config.json: ours are (z - shift) * scaling."""

    title = "Diffusers AutoencoderKL"
    class_name = "AutoencoderKL"

    def recognises(self, checkpoint: PublishedCheckpoint) -> bool:
        return looks_like_diffusers(checkpoint) and not has_codes(checkpoint)

    def infer(self, checkpoint: PublishedCheckpoint, options: Options) -> Inferred:
        settings = self.settings(checkpoint)
        groups = self.norm_groups(checkpoint)
        conv, channels, convs = self.infer_sizes(checkpoint, groups)
        size, stated = stated_size(options)
        latents = LatentScale.of(checkpoint, options, channels)
        config = KLConfig(
            image_size=size,
            conv=conv,
            latent_channels=None if channels == conv.z_channels else channels,
            quant_convs=convs,
            latent_mean=latents.mean,
            latent_std=latents.std,
        )
        if "sample_size" in settings and options.image_size is None:
            stated = f"{stated}; config.json speaks of {settings['sample_size']}"
        return Inferred(
            config,
            facts={
                **conv_facts(conv),
                "latent channels": channels,
                "norm_groups": groups,
                **latents.facts,
            },
            assumed={"image_size": stated, **latents.assumed},
        )

    def fits(self, config: Any) -> bool:
        return super().fits(config) and config.channels == config.conv.z_channels

    def export_config(self, config: KLConfig) -> dict[str, Any]:
        return {
            **_shared_config("AutoencoderKL", config.conv, config.image_size),
            **_scaling_config(config),
            "force_upcast": True,
            "use_quant_conv": config.quant_convs,
            "use_post_quant_conv": config.quant_convs,
        }


class DiffusersVQ(DiffusersFolder, OneCodebook):
    """The scaling factor of config.json is for priors of continuous features; codes have none."""

    title = "Diffusers VQModel"
    class_name = "VQModel"
    l2_normalise = False

    def recognises(self, checkpoint: PublishedCheckpoint) -> bool:
        return looks_like_diffusers(checkpoint) and has_codes(checkpoint)

    def infer(self, checkpoint: PublishedCheckpoint, options: Options) -> Inferred:
        self.settings(checkpoint)
        return super().infer(checkpoint, options)

    def export_config(self, config: VQConfig) -> dict[str, Any]:
        assert isinstance(config.quantizer, NearestConfig)
        return {
            **_shared_config("VQModel", config.conv, config.image_size),
            "num_vq_embeddings": config.quantizer.codebook.vocab_size,
            "vq_embed_dim": config.quantizer.codebook.code_dim,
            "scaling_factor": SCALING_FACTOR,
            "norm_type": "group",
        }


def looks_like_diffusers(checkpoint: PublishedCheckpoint) -> bool:
    """Whether encoder or decoder are called as in Diffusers."""
    return checkpoint.has("encoder.down_blocks.") or checkpoint.has("decoder.up_blocks.")


# -- config.json ----------------------------------------------------------------------------------


def _shared_config(class_name: str, conv: ConvConfig, image_size: int) -> dict[str, Any]:
    """What both models are configured by."""
    attention = [i in conv.attention_levels for i in range(len(conv.channel_mult))]
    return {
        "_class_name": class_name,
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": [("Attn" if a else "") + "DownEncoderBlock2D" for a in attention],
        "up_block_types": [("Attn" if a else "") + "UpDecoderBlock2D" for a in attention[::-1]],
        "block_out_channels": [conv.channels * m for m in conv.channel_mult],
        "layers_per_block": conv.num_res_blocks,
        "act_fn": "silu",
        "latent_channels": conv.z_channels,
        "norm_num_groups": _groups(conv),
        "sample_size": image_size,
        "mid_block_add_attention": conv.mid_attention,
    }


def _scaling_config(config: KLConfig) -> dict[str, Any]:
    """Mean and standard deviation of the latents as Diffusers keeps them: one number each where
    all channels are alike, so that all of its pipelines understand them."""
    std = config.latent_std or (1.0,)
    mean = config.latent_mean or (0.0,)
    alike = len({*std}) == len({*mean}) == 1
    scaling = round(1 / std[0], 10) if alike else 1.0  # 0.18215 comes back as it was
    exact = alike and 1 / scaling == std[0]
    return {
        "scaling_factor": scaling if exact else 1.0,
        "shift_factor": mean[0] if exact and mean[0] else None,
        "latents_mean": None if exact else list(config.latent_mean or (0.0,) * config.channels),
        "latents_std": None if exact else list(config.latent_std or (1.0,) * config.channels),
    }
