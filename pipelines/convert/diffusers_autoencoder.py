"""Diffusers' folders of `AutoencoderKL` and `VQModel`: config.json and a weights file."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from smalti.config import ImageSize
from smalti.data.latents import height_and_width
from smalti.errors import ConversionError
from smalti.pipelines.convert.conv import (
    PUBLISHED_GROUPS,
    ConvNames,
    ConvSource,
    conv_facts,
    image_size,
    infer_conv,
    infer_kl,
    infer_nearest,
    infer_vq,
    is_nearest_vq,
    mirrored,
)
from smalti.pipelines.convert.latent_diffusion import SCALING_FACTOR
from smalti.pipelines.convert.reader import PublishedCheckpoint
from smalti.pipelines.convert.source import (
    Inferred,
    Options,
    config_path,
    number,
    numbers,
    wrong_setting,
)
from smalti.pipelines.convert.taming import has_codes
from smalti.tokenizer.conv import ConvConfig
from smalti.tokenizer.kl import KLConfig
from smalti.tokenizer.quantizers.nearest import NearestConfig
from smalti.tokenizer.vq import VQConfig

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

# Names of the parts of attention before Diffusers 0.13, and today's.
OLD_ATTENTION = {
    ".query.": ".to_q.",
    ".key.": ".to_k.",
    ".value.": ".to_v.",
    ".proj_attn.": ".to_out.0.",
}

# Settings that the tensors do not determine, with the only value that our model has.
FIXED = {"act_fn": "silu", "norm_type": "group"}

# Settings that the tensors also determine.
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
    """The checkpoint with today's names of the parts of attention."""

    def current(name: str) -> str:
        if ".attentions." in name:
            for old, new in OLD_ATTENTION.items():
                name = name.replace(old, new)
        return name

    return checkpoint.renamed(current)


def looks_like_diffusers(checkpoint: PublishedCheckpoint) -> bool:
    """Whether encoder or decoder have Diffusers' names."""
    return checkpoint.has("encoder.down_blocks.") or checkpoint.has("decoder.up_blocks.")


# -- config.json ----------------------------------------------------------------------------------


def check_settings(checkpoint: PublishedCheckpoint, class_name: str) -> None:
    """Raise `ConversionError` if config.json describes another class, or a model that differs from
    ours in settings that the tensors do not determine."""
    found, where = checkpoint.config, config_path(checkpoint)
    name = found.get("_class_name", class_name)
    if name != class_name:
        raise ConversionError(f"{where} describes a {name}; this source reads {class_name}")
    for key, value in FIXED.items():
        if found.get(key, value) != value:
            raise ConversionError(f"{where}: {key} is {found[key]!r}; only {value!r} is read")


def norm_groups(checkpoint: PublishedCheckpoint) -> int:
    """Groups of the normalisations, which only config.json states."""
    groups = number(checkpoint, "norm_num_groups", PUBLISHED_GROUPS, positive=True)
    if groups != int(groups):
        raise wrong_setting(checkpoint, "norm_num_groups", "a positive integer")
    return int(groups)


def sizes_in(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that the tensors also determine."""
    return {key: value for key, value in settings.items() if key in SIZES}


def is_diffusers_conv(conv: ConvConfig) -> bool:
    """Whether Diffusers can build such an encoder and decoder: with any number of groups."""
    plain = conv.patch_size == 1 and not conv.residual_resampling
    return plain and conv.channel_mult[0] == 1 and _groups(conv) is not None


def _groups(conv: ConvConfig) -> int | None:
    """Groups of the normalisations; None if levels differ in it."""
    if conv.norm_groups is None and conv.channels * min(conv.channel_mult) < 4 * PUBLISHED_GROUPS:
        return None
    return conv.norm_groups or PUBLISHED_GROUPS


@dataclass(frozen=True)
class LatentScale:
    """Mean and standard deviation of the raw latents, and where they come from."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    facts: Mapping[str, object]  # settings in config.json, to print
    assumed: Mapping[str, object]  # options and defaults

    @classmethod
    def of(cls, checkpoint: PublishedCheckpoint, options: Options, channels: int) -> Self:
        """Our latents are (z - mean) / std. Diffusers' are (z - shift) * scaling, or
        (z - mean) * scaling / std where config.json has lists of means and deviations."""
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
        stated = {key: v for key, v in used.items() if checkpoint.config.get(key) is not None}
        facts = {key: f"{v}, from config.json" for key, v in stated.items() if v is not None}
        names = ("scaling_factor",) if mean else ("scaling_factor", "shift_factor")
        assumed = {name: used[name] for name in names if name not in stated}
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


def _shared_config(class_name: str, conv: ConvConfig, image_size: ImageSize) -> dict[str, Any]:
    """The settings that both classes have."""
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
        "sample_size": max(height_and_width(image_size)),  # one number there
        "mid_block_add_attention": conv.mid_attention,
    }


def _scaling_config(config: KLConfig) -> dict[str, Any]:
    """Mean and standard deviation of the latents in Diffusers' form: one number each if all
    channels have the same, which all of its pipelines support, else lists."""
    std = config.latent_std or (1.0,)
    mean = config.latent_mean or (0.0,)
    alike = len({*std}) == len({*mean}) == 1
    scaling = round(1 / std[0], 10) if alike else 1.0  # gives 0.18215 back exactly
    exact = alike and 1 / scaling == std[0]
    return {
        "scaling_factor": scaling if exact else 1.0,
        "shift_factor": mean[0] if exact and mean[0] else None,
        "latents_mean": None if exact else list(config.latent_mean or (0.0,) * config.channels),
        "latents_std": None if exact else list(config.latent_std or (1.0,) * config.channels),
    }


# -- the sources ----------------------------------------------------------------------------------


class DiffusersKL(ConvSource):
    """Scale and shift of the latents are in config.json."""

    title = "Diffusers AutoencoderKL"
    options = frozenset({"image_size", "scaling_factor"})
    names = NAMES

    def prepare(self, checkpoint: PublishedCheckpoint) -> PublishedCheckpoint:
        return current_names(checkpoint)

    def recognises(self, checkpoint: PublishedCheckpoint) -> bool:
        return looks_like_diffusers(checkpoint) and not has_codes(checkpoint)

    def infer(self, checkpoint: PublishedCheckpoint, options: Options) -> Inferred:
        check_settings(checkpoint, "AutoencoderKL")
        groups = norm_groups(checkpoint)
        sizes = infer_kl(checkpoint, self.names, groups)
        size, origin = image_size(options)
        latents = LatentScale.of(checkpoint, options, sizes.channels)
        if "sample_size" in checkpoint.config and options.image_size is None:
            origin += f"; config.json has sample_size {checkpoint.config['sample_size']}"
        return Inferred(
            sizes.config(size, latents.mean, latents.std),
            facts={
                **conv_facts(sizes.conv),
                "latent channels": sizes.channels,
                "norm_groups": groups,
                **latents.facts,
            },
            assumed={"image_size": origin, **latents.assumed},
        )

    def stated(self, config: KLConfig) -> dict[str, Any]:
        return sizes_in(self.export_config(config))

    def fits(self, config: Any) -> bool:
        return (
            isinstance(config, KLConfig)
            and is_diffusers_conv(config.conv)
            and config.channels == config.conv.z_channels
            and config.image_channels == 3
        )

    def export_config(self, config: KLConfig) -> dict[str, Any]:
        return {
            **_shared_config("AutoencoderKL", config.conv, config.image_size),
            **_scaling_config(config),
            "force_upcast": True,
            "use_quant_conv": config.quant_convs,
            "use_post_quant_conv": config.quant_convs,
        }


class DiffusersVQ(ConvSource):
    """The scaling factor in config.json is for priors of continuous features; codes have none."""

    title = "Diffusers VQModel"
    names = NAMES

    def prepare(self, checkpoint: PublishedCheckpoint) -> PublishedCheckpoint:
        return current_names(checkpoint)

    def recognises(self, checkpoint: PublishedCheckpoint) -> bool:
        return looks_like_diffusers(checkpoint) and has_codes(checkpoint)

    def infer(self, checkpoint: PublishedCheckpoint, options: Options) -> Inferred:
        check_settings(checkpoint, "VQModel")
        conv = infer_conv(checkpoint, self.names, norm_groups=norm_groups(checkpoint))
        quantizer = infer_nearest(checkpoint, l2_normalise=False)
        return infer_vq(checkpoint, conv, quantizer, image_size(options))

    def stated(self, config: VQConfig) -> dict[str, Any]:
        return sizes_in(self.export_config(config))

    def fits(self, config: Any) -> bool:
        return is_nearest_vq(config, l2_normalise=False) and is_diffusers_conv(config.conv)

    def export_config(self, config: VQConfig) -> dict[str, Any]:
        assert isinstance(config.quantizer, NearestConfig)
        return {
            **_shared_config("VQModel", config.conv, config.image_size),
            "num_vq_embeddings": config.quantizer.codebook.vocab_size,
            "vq_embed_dim": config.quantizer.codebook.code_dim,
            "scaling_factor": SCALING_FACTOR,
            "norm_type": "group",
        }
