"""Tokenizers with discrete codes: a convolutional encoder, a quantizer, a convolutional decoder.

VQ-VAE (1711.00937) and VQGAN (2012.09841) are this model under different losses; with
l2-normalised low-dimensional codes it is LlamaGen's (2406.06525), with the multi-scale quantizer
VAR's (2404.02905).
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from smalti.data.latents import CodeSpec
from smalti.errors import SmaltiError
from smalti.tokenizer.base import Reconstruction, Tokenizer
from smalti.tokenizer.conv import ConvConfig, Decoder, Encoder, initialise
from smalti.tokenizer.multi_scale import MultiScaleQuantizer
from smalti.tokenizer.nearest import NearestConfig
from smalti.tokenizer.quantize import Quantizer
from smalti.tokenizer.quantizers import QUANTIZERS, QuantizerConfig


@dataclass(frozen=True)
class VQConfig:
    """Defaults: LlamaGen's VQ-16."""

    # May change without changing what saved weights mean.
    FREE_OF_WEIGHTS: ClassVar[tuple[str, ...]] = ("image_size",)

    kind: Literal["vq"] = "vq"
    image_size: int = 256  # pixels, square
    conv: ConvConfig = field(default_factory=ConvConfig)
    quantizer: QuantizerConfig = field(default_factory=NearestConfig)
    quant_kernel: int = 1  # of the convolutions between encoder, quantizer and decoder; VAR: 3

    def __post_init__(self) -> None:
        if self.image_size < 1 or self.image_size % self.conv.downsampling:
            raise SmaltiError(
                f"image_size {self.image_size} is not a multiple of the down-sampling factor"
                f" {self.conv.downsampling}"
            )
        if self.quant_kernel < 1 or self.quant_kernel % 2 == 0:
            raise SmaltiError(f"quant_kernel is {self.quant_kernel}; use an odd number")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the features."""
        side = self.image_size // self.conv.downsampling
        return side, side


class VQTokenizer(Tokenizer):
    """Images <-> codes of one grid, or of several from coarse to fine."""

    Config: ClassVar[type] = VQConfig
    config: VQConfig

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config.conv)
        self.quantizer: Quantizer = QUANTIZERS.build(config.quantizer)
        dim, z, kernel = self.quantizer.dim, config.conv.z_channels, config.quant_kernel
        self.grids = self.quantizer.grids(*config.grid)
        self.quant_conv = nn.Conv2d(z, dim, kernel, padding=kernel // 2)
        self.post_quant_conv = nn.Conv2d(dim, z, kernel, padding=kernel // 2)
        self.decoder = Decoder(config.conv)
        initialise(self)

    @property
    def spec(self) -> CodeSpec:
        return CodeSpec(self.quantizer.vocab_size, self.grids)

    @property
    def image_size(self) -> int:
        return self.config.image_size

    @property
    def last_layer(self) -> nn.Parameter:
        return self.decoder.conv_out.weight  # type: ignore[return-value]

    def features(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> what is quantized, (B, d, h, w)."""
        self.check_images(images)
        return self.quant_conv(self.encoder(images))

    def store(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> codes (B, L), each grid in raster order."""
        return self.quantizer.search(self.features(images))

    def vectors(self, latents: Tensor) -> Tensor:
        """Codes (B, L) -> what they stand for, (B, d, h, w).

        Raises:
            SmaltiError: codes of another length, or outside [0, vocab_size).
        """
        self._check_codes(latents)
        return self.quantizer.lookup(latents, *self.config.grid)

    def decode_vectors(self, vectors: Tensor) -> Tensor:
        """Vectors (B, d, h, w) -> images (B, 3, H, W), not clamped."""
        return self.decoder(self.post_quant_conv(vectors.to(self.post_quant_conv.weight.dtype)))

    @torch.no_grad()
    def preview(self, codes: Tensor, scales: int) -> Tensor:
        """Codes (B, L) -> images (B, 3, H, W) as the first `scales` scales alone tell them.

        Raises:
            SmaltiError: the tokenizer has one scale, or fewer than asked for.
        """
        self._check_codes(codes)
        if not isinstance(self.quantizer, MultiScaleQuantizer):
            raise SmaltiError("previews need a multi-scale tokenizer: this one has one scale")
        if not 0 <= scales <= len(self.grids):
            raise SmaltiError(f"scales is {scales}; this tokenizer has {len(self.grids)}")
        return self.decode_vectors(self.quantizer.lookup_first(codes, scales)).clamp(-1, 1)

    def forward(self, images: Tensor) -> Reconstruction:
        quantized = self.quantizer(self.features(images))
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

    def _check_codes(self, codes: Tensor) -> None:
        if codes.ndim != 2 or codes.shape[1] != self.spec.length:
            raise SmaltiError(
                f"codes have shape {tuple(codes.shape)};"
                f" this tokenizer takes (B, {self.spec.length})"
            )
        if codes.is_floating_point():
            raise SmaltiError(f"codes are {codes.dtype}; this tokenizer takes int64 codes")
        vocabulary = self.spec.vocab_size
        if codes.numel() and (codes.min() < 0 or codes.max() >= vocabulary):
            raise SmaltiError(
                f"codes lie in [{codes.min().item()}, {codes.max().item()}]; the codebook has"
                f" 0 to {vocabulary - 1}"
            )
