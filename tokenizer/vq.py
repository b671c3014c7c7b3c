"""VQ tokenizer: a convolutional encoder, a quantizer, a convolutional decoder.

VQ-VAE (1711.00937) and VQGAN (2012.09841) are this model with different losses; with l2-normalised
low-dimensional codes it is LlamaGen's (2406.06525), with the multi-scale quantizer VAR's
(2404.02905).

Shapes: B batch, d numbers per feature, h w latent grid, L codes per image, H W pixels.
"""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from smalti.config import ImageSize, added
from smalti.data.latents import CodeSpec
from smalti.errors import ConfigurationError, DataError
from smalti.randomness import Generators, RandomInputs
from smalti.tokenizer.base import Reconstruction, Tokenizer, TokenizerConfig, check_finite
from smalti.tokenizer.conv import ConvConfig, Decoder, Encoder, initialise
from smalti.tokenizer.quantizers import QUANTIZERS, QuantizerConfig
from smalti.tokenizer.quantizers.base import Grids, Quantizer
from smalti.tokenizer.quantizers.multi_scale import MultiScaleConfig, MultiScaleQuantizer
from smalti.tokenizer.quantizers.nearest import NearestConfig
from smalti.tokenizer.tiling import Stages


@dataclass(frozen=True)
class VQConfig(TokenizerConfig):
    """Sizes of a tokenizer with codes; the preset vq-f16 is LlamaGen's VQ-16."""

    # May change without changing what saved weights mean.
    NON_ARCHITECTURE_FIELDS: ClassVar[tuple[str, ...]] = ("image_size",)

    kind: Literal["vq"] = "vq"  # the kind of tokenizer
    image_size: ImageSize = 256  # pixels: the side of a square, or height x width
    conv: ConvConfig = field(default_factory=ConvConfig)
    quantizer: QuantizerConfig = field(default_factory=NearestConfig)
    quant_kernel: int = 1  # of the convolutions between encoder, quantizer and decoder; VAR: 3
    image_channels: int = added(3)  # 3: RGB; 1: grey; 4: RGB and alpha

    def __post_init__(self) -> None:
        super().__post_init__()
        self.conv.grid(self.image_size)
        if self.quant_kernel < 1 or self.quant_kernel % 2 == 0:
            raise ConfigurationError(
                f"quant_kernel is {self.quant_kernel}; use an odd number of 1 or more"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the features."""
        return self.conv.grid(self.image_size)


class VQTokenizer(Tokenizer):
    """Images <-> codes of one grid, or of several from coarse to fine."""

    Config: ClassVar[type] = VQConfig
    compiled_parts: ClassVar[tuple[str, ...]] = ("decoder",)
    config: VQConfig

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config.conv, image_channels=config.image_channels)
        self.quantizer: Quantizer = QUANTIZERS.build(config.quantizer)
        dim, z, kernel = self.quantizer.dim, config.conv.z_channels, config.quant_kernel
        self.grids = self.quantizer.grids(*config.grid)
        self.quant_conv = nn.Conv2d(z, dim, kernel, padding=kernel // 2)
        self.post_quant_conv = nn.Conv2d(dim, z, kernel, padding=kernel // 2)
        self.decoder = Decoder(config.conv, config.image_channels)
        initialise(self)

    @property
    def spec(self) -> CodeSpec:
        return CodeSpec(self.quantizer.vocab_size, self.grids)

    @property
    def image_size(self) -> ImageSize:
        return self.config.image_size

    def config_at(self, image_size: ImageSize, grids: Grids | None = None) -> Any:
        """The configuration for another image size; scales are stretched to the new grid."""
        config = super().config_at(image_size, grids)
        if not isinstance(config.quantizer, MultiScaleConfig):
            return config
        scales = grids or config.quantizer.stretched(config.grid)
        return replace(config, quantizer=replace(config.quantizer, scales=scales))

    @property
    def last_layer(self) -> nn.Parameter:
        return self.decoder.conv_out.weight  # type: ignore[return-value]

    def features(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] -> features to quantize, (B, d, h, w)."""
        self.check_images(images)
        features = self.quant_conv(self.encoder(images))
        if not self.training:  # the nearest code of NaN would be code 0
            check_finite(features, "the encoder", images, "images")
        return features

    def store(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] -> codes (B, L), each grid in raster order."""
        features = self.features(images)
        if not len(features):  # the search needs at least one row
            return torch.empty(0, self.spec.length, dtype=torch.int64, device=features.device)
        return self.quantizer.search(features)

    def latents(
        self, stored: Tensor, *, generator: Generators = None, noise: Tensor | None = None
    ) -> Tensor:
        """Stored codes (B, L) of any integer type -> the same as int64; nothing is sampled.

        Raises:
            DataError: they are not integers.
        """
        return _as_int64(super().latents(stored, generator=generator, noise=noise))

    def vectors(self, latents: Tensor) -> Tensor:
        """Codes (B, L) of any integer type -> quantized features (B, d, h, w).

        Raises:
            DataError: codes of another length, not integers, or outside [0, vocab_size).
        """
        return self.quantizer.lookup(self._checked(latents), *self.config.grid)

    def decode_vectors(self, vectors: Tensor) -> Tensor:
        """Quantized features (B, d, h, w) -> images (B, C, H, W), not clamped."""
        return self.decoder(self._decoder_input(vectors))

    def _decoder_input(self, vectors: Tensor) -> Tensor:
        return self.post_quant_conv(vectors.to(self.post_quant_conv.weight.dtype))

    def decoding_stages(self) -> Stages:
        return self.decoder.stages(self._decoder_input)

    @torch.no_grad()
    def preview(self, codes: Tensor, scales: int) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] decoded from the first `scales` scales alone.

        Args:
            codes: of all scales, (B, L), or of the first `scales` only, as they are available
                during sampling; of any integer type.
            scales: 0 (the decoded image of zero features) to the number of scales.

        Raises:
            SmaltiError: the tokenizer has one scale, or fewer than requested; codes of another
                length, not integers, or outside [0, vocab_size).
        """
        if not isinstance(self.quantizer, MultiScaleQuantizer):
            raise ConfigurationError(
                "previews need a multi-scale tokenizer: this one has one scale"
            )
        if type(scales) is not int or not 0 <= scales <= len(self.grids):
            raise ConfigurationError(f"scales is {scales}; give 0 to {len(self.grids)}, the scales")
        codes = self._checked(codes, first=scales)
        return self.decode_vectors(self.quantizer.lookup_first(codes, scales)).clamp(-1, 1)

    def sample_random_inputs(
        self, count: int, generator: torch.Generator, grid: tuple[int, int] | None = None
    ) -> dict[str, Tensor]:
        del grid
        return self.quantizer.sample_random_inputs(count, generator)

    def forward(self, images: Tensor, random_inputs: RandomInputs | None = None) -> Reconstruction:
        quantized = self.quantizer(self.features(images), **(random_inputs or {}))
        return Reconstruction(
            images=self.decode_vectors(quantized.latents),
            targets=images,
            losses=quantized.losses,
            codes=quantized.codes,
        )

    def after_step(self, generator: torch.Generator) -> None:
        self.quantizer.after_step(generator)

    def discard_step(self) -> None:
        self.quantizer.discard_step()

    def _checked(self, codes: Tensor, first: int | None = None) -> Tensor:
        """The codes as int64, after checks: of all scales or of the `first` ones, and in range."""
        lengths = {self.spec.length, sum(h * w for h, w in self.grids[:first])}
        if codes.ndim != 2 or codes.shape[1] not in lengths:
            takes = " or ".join(f"(B, {length})" for length in sorted(lengths))
            raise DataError(f"codes have shape {tuple(codes.shape)}; this tokenizer takes {takes}")
        codes, vocabulary = _as_int64(codes), self.spec.vocab_size
        if codes.numel() and (codes.min() < 0 or codes.max() >= vocabulary):
            raise DataError(
                f"codes lie in [{codes.min().item()}, {codes.max().item()}]; the codebook has"
                f" 0 to {vocabulary - 1}"
            )
        return codes


def _as_int64(codes: Tensor) -> Tensor:
    """Codes of any integer type as int64: a cache keeps uint16, which has few operations."""
    dtype = codes.dtype
    if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
        raise DataError(f"codes are {dtype}; this tokenizer takes integers, int64")
    return codes.long()
