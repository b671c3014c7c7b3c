"""The VQ tokenizer: VQ-VAE (1711.00937) and VQGAN (2012.09841) are this model under different
losses; with l2-normalised low-dimensional codes it is LlamaGen's (2406.06525)."""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from smalti.data.latents import CodeSpec
from smalti.errors import SmaltiError
from smalti.tokenizer.base import Reconstruction, Tokenizer
from smalti.tokenizer.conv import ConvConfig, Decoder, Encoder, initialise
from smalti.tokenizer.quantize import VectorQuantizer


@dataclass(frozen=True)
class VQConfig:
    """Defaults: LlamaGen's VQ-16."""

    image_size: int = 256  # pixels, square
    conv: ConvConfig = field(default_factory=ConvConfig)
    vocab_size: int = 16384  # codes in the codebook, V
    code_dim: int = 8  # numbers per code
    l2_normalise: bool = True  # unit-length codes, compared by cosine
    commitment_weight: float = 0.25  # beta of VQ-VAE, eq. 3
    revive_after: int = 200  # steps without a hit until a code is re-drawn from data; 0 = never

    def __post_init__(self) -> None:
        if self.image_size % self.conv.downsampling:
            raise SmaltiError(
                f"image_size {self.image_size} is not a multiple of the down-sampling factor"
                f" {self.conv.downsampling}"
            )
        if self.vocab_size < 2 or self.code_dim < 1:
            raise SmaltiError(
                f"vocab_size {self.vocab_size} and code_dim {self.code_dim}: need at least 2 and 1"
            )
        if self.commitment_weight < 0 or self.revive_after < 0:
            raise SmaltiError("commitment_weight and revive_after must not be negative")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the code grid."""
        side = self.image_size // self.conv.downsampling
        return side, side


PRESETS: dict[str, VQConfig] = {
    # Published: LlamaGen VQ-16 and VQ-8 (about 72 and 70 M parameters).
    "vq-f16": VQConfig(),
    "vq-f8": VQConfig(conv=ConvConfig(channel_mult=(1, 2, 2, 4), attention_levels=(3,))),
    # Small ones, made to train in minutes on two CPU cores.
    "vq-32-tiny": VQConfig(
        image_size=32,
        conv=ConvConfig(
            channels=64,
            channel_mult=(1, 2),
            num_res_blocks=1,
            attention_levels=(),
            mid_attention=False,
            z_channels=128,
            patch_size=2,
        ),
        vocab_size=512,
        revive_after=50,
    ),
    # 64 px on one GPU.
    "vq-64-small": VQConfig(
        image_size=64,
        conv=ConvConfig(
            channels=128,
            channel_mult=(1, 2, 4),
            num_res_blocks=2,
            attention_levels=(),
            z_channels=256,
        ),
        vocab_size=2048,
        revive_after=100,
    ),
}


class VQTokenizer(Tokenizer):
    """Convolutional encoder, one codebook, convolutional decoder."""

    Config: ClassVar[type] = VQConfig
    config: VQConfig

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config.conv)
        self.quant_conv = nn.Conv2d(config.conv.z_channels, config.code_dim, 1)
        self.quantize = VectorQuantizer(
            config.vocab_size, config.code_dim, config.l2_normalise, config.revive_after
        )
        self.post_quant_conv = nn.Conv2d(config.code_dim, config.conv.z_channels, 1)
        self.decoder = Decoder(config.conv)
        initialise(self)

    @property
    def spec(self) -> CodeSpec:
        return CodeSpec(self.config.vocab_size, (self.config.grid,))

    @property
    def image_size(self) -> int:
        return self.config.image_size

    @property
    def last_layer(self) -> nn.Parameter:
        return self.decoder.conv_out.weight  # type: ignore[return-value]

    def store(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> codes (B, L) in raster order."""
        self.check_images(images)
        return self.quantize.search(self.quant_conv(self.encoder(images))).flatten(1)

    def vectors(self, latents: Tensor) -> Tensor:
        """Codes (B, L) -> codebook vectors (B, d, h, w).

        Raises:
            SmaltiError: codes of another length, or outside [0, vocab_size).
        """
        self._check_codes(latents)
        return self.quantize.lookup(latents.unflatten(1, self.config.grid))

    def decode_vectors(self, vectors: Tensor) -> Tensor:
        """Vectors (B, d, h, w) -> images (B, 3, H, W), not clamped."""
        return self.decoder(self.post_quant_conv(vectors.to(self.post_quant_conv.weight.dtype)))

    def forward(self, images: Tensor) -> Reconstruction:
        self.check_images(images)
        quantized = self.quantize(self.quant_conv(self.encoder(images)))
        return Reconstruction(
            images=self.decode_vectors(quantized.latents),
            losses={
                "codebook": quantized.codebook_loss,
                "commitment": self.config.commitment_weight * quantized.commitment_loss,
            },
            codes=quantized.codes.flatten(1),
        )

    def after_step(self, generator) -> None:
        self.quantize.after_step(generator)

    def discard_step(self) -> None:
        self.quantize.discard_step()

    def _check_codes(self, codes: Tensor) -> None:
        if codes.ndim != 2 or codes.shape[1] != self.spec.length:
            raise SmaltiError(
                f"codes have shape {tuple(codes.shape)};"
                f" this tokenizer takes (B, {self.spec.length})"
            )
        if codes.is_floating_point():
            raise SmaltiError(f"codes are {codes.dtype}; this tokenizer takes int64 codes")
        if codes.numel() and (codes.min() < 0 or codes.max() >= self.config.vocab_size):
            raise SmaltiError(
                f"codes lie in [{codes.min().item()}, {codes.max().item()}]; the codebook has"
                f" 0 to {self.config.vocab_size - 1}"
            )
