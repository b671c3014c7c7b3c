"""Named sizes of tokenizers: the published ones, and small ones that train in minutes."""

from dataclasses import replace

from smalti.data.latents import resolution
from smalti.hub import Presets
from smalti.tokenizer.base import Tokenizer, TokenizerConfig
from smalti.tokenizer.conv import ConvConfig
from smalti.tokenizer.kl import KLConfig
from smalti.tokenizer.quantizers import QuantizerConfig
from smalti.tokenizer.quantizers.codebook import CodebookConfig
from smalti.tokenizer.quantizers.fsq import FSQConfig
from smalti.tokenizer.quantizers.lookup_free import LookupFreeConfig
from smalti.tokenizer.quantizers.multi_scale import MultiScaleConfig
from smalti.tokenizer.quantizers.nearest import NearestConfig
from smalti.tokenizer.registry import TOKENIZERS
from smalti.tokenizer.vq import VQConfig

__all__ = ["PRESETS", "TokenizerConfig"]

# -- published ----------------------------------------------------------------------------------

_F8 = ConvConfig(channel_mult=(1, 2, 2, 4), attention_levels=(3,))


def _taming(vocab_size: int) -> VQConfig:
    """VQGAN f16 of taming-transformers: 256 numbers per code, not normalised."""
    codebook = CodebookConfig(vocab_size, 256, l2_normalise=False)
    return VQConfig(quantizer=NearestConfig(codebook=codebook))


PUBLISHED: dict[str, TokenizerConfig] = {
    "vq-f16": VQConfig(),  # LlamaGen VQ-16
    "vq-f8": VQConfig(conv=_F8),  # LlamaGen VQ-8
    "vqgan-f16-1024": _taming(1024),
    "vqgan-f16-16384": _taming(16384),
    "var-f16": VQConfig(
        conv=ConvConfig(channels=160, z_channels=32),
        quantizer=MultiScaleConfig(),
        quant_kernel=3,
    ),
    "kl-f8": KLConfig(),  # Stable Diffusion
    "kl-f16": KLConfig(conv=ConvConfig(z_channels=16)),
    # VQ-VAE (1711.00937): running means, no normalisation; 4x down-sampling.
    "vqvae-f4": VQConfig(
        conv=ConvConfig(channel_mult=(1, 2, 2), attention_levels=(), mid_attention=False),
        quantizer=NearestConfig(
            codebook=CodebookConfig(512, 64, l2_normalise=False, learning="ema")
        ),
    ),
    "fsq-f16": VQConfig(quantizer=FSQConfig()),
    "lfq-f16": VQConfig(quantizer=LookupFreeConfig()),
    # Deep compression (DC-AE, 2410.10733): 32x, many channels, residual resampling.
    "kl-f32": KLConfig(
        conv=ConvConfig(
            channel_mult=(1, 2, 2, 4, 4, 4),
            attention_levels=(5,),
            z_channels=32,
            residual_resampling=True,
        )
    ),
}

# -- small: 32 px on two CPU cores ----------------------------------------------------------------

_TINY_CONV = ConvConfig(
    channels=64,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_levels=(),
    mid_attention=False,
    z_channels=128,
    patch_size=2,
)
_TINY_CODEBOOK = CodebookConfig(vocab_size=512, revive_after=50)
_TINY_SCALES = tuple((side, side) for side in (1, 2, 3, 4, 6, 8))

_SMALL_CONV = ConvConfig(
    channels=128,
    channel_mult=(1, 2, 4),
    num_res_blocks=2,
    attention_levels=(),
    z_channels=256,
)
_SMALL_CODEBOOK = CodebookConfig(vocab_size=2048, revive_after=100)


def _tiny(quantizer: QuantizerConfig) -> VQConfig:
    return VQConfig(image_size=32, conv=_TINY_CONV, quantizer=quantizer)


def _nearest(**changes: object) -> VQConfig:
    return _tiny(NearestConfig(codebook=replace(_TINY_CODEBOOK, **changes)))  # type: ignore[arg-type]


SMALL: dict[str, TokenizerConfig] = {
    "vq-32-tiny": _nearest(),
    "vq-1024-tiny": _nearest(vocab_size=1024),
    "ema-32-tiny": _nearest(learning="ema", vocab_size=1024),
    "vqvae-32-tiny": _tiny(
        NearestConfig(
            codebook=CodebookConfig(1024, 16, l2_normalise=False, learning="ema", revive_after=50)
        )
    ),
    "simvq-32-tiny": _nearest(learning="simvq", vocab_size=1024, revive_after=0),
    "rotation-32-tiny": _tiny(
        NearestConfig(codebook=replace(_TINY_CODEBOOK, vocab_size=1024), estimator="rotation")
    ),
    "fsq-32-tiny": _tiny(FSQConfig(levels=(8, 5, 5, 5))),
    "lfq-32-tiny": _tiny(LookupFreeConfig(bits=10, group_bits=10)),
    "bsq-32-tiny": _tiny(LookupFreeConfig(bits=10, group_bits=10, spherical=True)),
    "var-32-tiny": _tiny(
        MultiScaleConfig(
            codebook=CodebookConfig(1024, 16, l2_normalise=False, revive_after=50),
            scales=_TINY_SCALES,
        )
    ),
    "kl-32-tiny": KLConfig(image_size=32, conv=replace(_TINY_CONV, z_channels=8)),
    # 64 and 128 px on one GPU: 16 x 16 grids.
    "vq-64-small": VQConfig(
        image_size=64, conv=_SMALL_CONV, quantizer=NearestConfig(codebook=_SMALL_CODEBOOK)
    ),
    "var-64-small": VQConfig(
        image_size=64,
        conv=_SMALL_CONV,
        quantizer=MultiScaleConfig(
            codebook=CodebookConfig(2048, 16, l2_normalise=False, revive_after=100)
        ),
    ),
    "kl-64-small": KLConfig(image_size=64, conv=replace(_SMALL_CONV, z_channels=8)),
    "vq-128-small": VQConfig(
        image_size=128,
        conv=replace(_SMALL_CONV, channel_mult=(1, 2, 2, 4)),
        quantizer=NearestConfig(codebook=_SMALL_CODEBOOK),
    ),
}


def _latents(tokenizer: Tokenizer) -> str:
    size, spec = tokenizer.image_size, tokenizer.spec
    return f"{size if isinstance(size, int) else resolution(size)} px <-> {spec.in_words}"


PRESETS = Presets(TOKENIZERS, {**PUBLISHED, **SMALL}, _latents)
