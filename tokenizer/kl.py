"""KL-VAE: continuous latents with a Gaussian posterior (latent diffusion, 2112.10752).

    DiagonalGaussian    the posterior q(z | x) = N(mean, std^2) and its KL divergence
    transformed         EQ-VAE's equivariance regularisation, optional
    KLTokenizer         encoder, posterior, decoder, and the statistics that normalise latents

Shapes: B batch, C latent channels, h w latent grid, H W pixels.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.config import ImageSize, added
from smalti.data.latents import ContinuousSpec
from smalti.errors import ConfigurationError, DataError
from smalti.randomness import Generators, NormalSource, RandomInputs
from smalti.tokenizer.base import Reconstruction, Tokenizer, TokenizerConfig, check_finite
from smalti.tokenizer.conv import ConvConfig, Decoder, Encoder, initialise
from smalti.tokenizer.tiling import Stages

# -------------------------------------------------------------------------------------------------
# The posterior: q(z | x) = N(mean, diag(exp(logvar))) (VAE, Kingma and Welling,
# 1312.6114, appendix B)

LOG_VARIANCE_RANGE = (-30.0, 20.0)  # as in latent diffusion


@dataclass(frozen=True)
class DiagonalGaussian:
    """N(mean, diag(exp(logvar))); both (B, C, h, w), fp32."""

    mean: Tensor
    logvar: Tensor

    @classmethod
    def of(cls, moments: Tensor) -> "DiagonalGaussian":
        """From an encoder's output (B, 2C, h, w): mean, then logvar, along the channels."""
        mean, logvar = moments.float().chunk(2, dim=1)
        return cls(mean, logvar.clamp(*LOG_VARIANCE_RANGE))

    @property
    def std(self) -> Tensor:
        """Standard deviation, (B, C, h, w)."""
        return torch.exp(0.5 * self.logvar)

    def sample(self, noise: Tensor | None = None) -> Tensor:
        """z = mean + std * noise (B, C, h, w), differentiable in mean and std.

        Args:
            noise: (B, C, h, w), standard normal; None: sampled from torch's global generator.
        """
        return self.mean + self.std * (torch.randn_like(self.mean) if noise is None else noise)

    def kl(self) -> Tensor:
        """KL(q(z | x) || N(0, I)) of each image, summed over its C h w latents, (B,), in nats."""
        terms = self.mean.square() + self.logvar.exp() - 1 - self.logvar
        return 0.5 * terms.flatten(1).sum(1)


# -------------------------------------------------------------------------------------------------
# Equivariance regularisation: decode(tau(z)) should be tau(x), tau a rotation and scaling
# (EQ-VAE, 2502.09509)

MIN_SIDE = 32  # pixels; LPIPS needs that many


def resized(maps: Tensor, height: int, width: int) -> Tensor:
    """Maps (B, C, H, W) shrunk to (B, C, height, width) with antialiasing."""
    if maps.shape[2:] == (height, width):
        return maps
    size = (height, width)
    return F.interpolate(maps.float(), size, mode="bicubic", antialias=True).to(maps.dtype)


def transformed(z: Tensor, images: Tensor, turn: float, size: float) -> tuple[Tensor, Tensor]:
    """Rotate by quarter turns and scale latents (B, C, h, w) and images (B, C', H, W) alike.

    The latent grid becomes (h', w') with h/4 <= h' <= h, the images H/h times as large. Images keep
    sides of at least 32 px, below which LPIPS is undefined.

    Args:
        turn: uniform in [0, 1), chooses 0 to 3 quarter turns.
        size: uniform in [0, 1), chooses h' from the smallest to h.
    """
    turns = int(4 * turn)
    height, width = z.shape[2:]
    factor = images.shape[2] // height  # pixels per latent position and side
    shorter = factor * min(height, width)  # pixels of the shorter side of the images
    least = min(height, max(height // 4, -(-MIN_SIDE * height // shorter), 1))
    rows = least + int((height + 1 - least) * size)
    columns = max(1, round(rows * width / height))
    z = torch.rot90(resized(z, rows, columns), turns, (2, 3))
    images = torch.rot90(resized(images, rows * factor, columns * factor), turns, (2, 3))
    return z, images


# -------------------------------------------------------------------------------------------------
# The tokenizer: L = reconstruction losses + kl_weight * KL (latent diffusion, appendix G)


@dataclass(frozen=True)
class KLConfig(TokenizerConfig):
    """Sizes of a KL-VAE; the preset kl-f8 is the auto-encoder of Stable Diffusion."""

    # May change without changing what saved weights mean.
    NON_ARCHITECTURE_FIELDS: ClassVar[tuple[str, ...]] = (
        "image_size",
        "kl_weight",
        "equivariance",
        "latent_mean",
        "latent_std",
    )

    kind: Literal["kl"] = "kl"  # the kind of tokenizer
    image_size: ImageSize = 256  # pixels: the side of a square, or height x width
    conv: ConvConfig = field(
        default_factory=lambda: ConvConfig(
            channel_mult=(1, 2, 4, 4), attention_levels=(), z_channels=4
        )
    )
    latent_channels: int | None = None  # C; None: conv.z_channels
    # 1x1 convolutions between encoder, posterior and decoder. Where there are none (Stable
    # Diffusion 3), latent_channels must be conv.z_channels.
    quant_convs: bool = True
    # Of the KL divergence summed over the C h w latents of an image, beside reconstruction losses
    # that are means over the pixels. Latent diffusion sums those over the 3 H W values, too: its
    # 1e-6 is 1e-6 / (3 H W) here.
    kl_weight: float = 1e-6
    equivariance: float = 0.0  # probability that a batch is decoded from transformed latents
    # Mean of each latent channel over the training set: `latents` gives (z - mean) / std. Measured
    # after training; empty until then.
    latent_mean: tuple[float, ...] = ()
    latent_std: tuple[float, ...] = ()  # standard deviation of each; measured like latent_mean
    image_channels: int = added(3)  # 3: RGB; 1: grey; 4: RGB and alpha

    def __post_init__(self) -> None:
        super().__post_init__()
        self.conv.grid(self.image_size)
        if self.kl_weight < 0 or not 0 <= self.equivariance <= 1:
            raise ConfigurationError(
                f"kl_weight is {self.kl_weight}, equivariance {self.equivariance}: the first must"
                " not be negative, the second must lie in [0, 1]"
            )
        if self.channels < 1 or not (self.quant_convs or self.channels == self.conv.z_channels):
            raise ConfigurationError(
                f"latent_channels is {self.latent_channels}; it must be positive, and without "
                f"quant_convs the {self.conv.z_channels} of conv.z_channels"
            )
        for name in ("latent_mean", "latent_std"):
            if len(getattr(self, name)) not in (0, self.channels):
                raise ConfigurationError(
                    f"{name} has {len(getattr(self, name))} values; there are "
                    f"{self.channels} latent channels"
                )
        if any(std <= 0 for std in self.latent_std):
            raise ConfigurationError(f"latent_std is {self.latent_std}; each must be positive")

    @property
    def channels(self) -> int:
        """Channels of the latents, C."""
        return self.conv.z_channels if self.latent_channels is None else self.latent_channels


class KLTokenizer(Tokenizer):
    """Images <-> latents (B, C, h, w), each channel of mean 0, variance 1 on the training set."""

    Config: ClassVar[type] = KLConfig
    compiled_parts: ClassVar[tuple[str, ...]] = ("decoder",)
    config: KLConfig

    @classmethod
    def settings_before_training(cls, config: KLConfig) -> KLConfig:
        """Without the mean and standard deviation of the latents, which are measured again."""
        return replace(config, latent_mean=(), latent_std=())

    def __init__(self, config: KLConfig) -> None:
        super().__init__()
        self.config = config
        channels, z = config.channels, config.conv.z_channels
        self.encoder = Encoder(config.conv, 2 * z, config.image_channels)
        self.quant_conv = nn.Conv2d(2 * z, 2 * channels, 1) if config.quant_convs else None
        self.post_quant_conv = nn.Conv2d(channels, z, 1) if config.quant_convs else None
        self.decoder = Decoder(config.conv, config.image_channels)
        initialise(self)
        self.register_buffer("shift", torch.zeros(1, channels, 1, 1), persistent=False)
        self.register_buffer("scale", torch.ones(1, channels, 1, 1), persistent=False)
        self.shift: Tensor
        self.scale: Tensor
        self._apply_statistics()

    def _apply_statistics(self) -> None:
        for buffer, values in (
            (self.shift, self.config.latent_mean),
            (self.scale, self.config.latent_std),
        ):
            if values:
                buffer.copy_(torch.tensor(values).view_as(buffer))

    @property
    def spec(self) -> ContinuousSpec:
        return ContinuousSpec(self.config.channels, *self.config.conv.grid(self.config.image_size))

    @property
    def image_size(self) -> ImageSize:
        return self.config.image_size

    @property
    def last_layer(self) -> nn.Parameter:
        return self.decoder.conv_out.weight  # type: ignore[return-value]

    def gaussian(self, images: Tensor) -> DiagonalGaussian:
        """Posterior q(z | x) of images (B, C', H, W) in [-1, 1], in raw, un-normalised units."""
        self.check_images(images)
        moments = self.encoder(images)  # (B, 2 z_channels, h, w)
        moments = self.quant_conv(moments) if self.quant_conv else moments
        if not self.training:  # an infinite logvar would be clamped
            check_finite(moments, "the encoder", images, "images")
        return DiagonalGaussian.of(moments)

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance (B, C, h, w) of q(z | x), in raw, un-normalised units."""
        gaussian = self.gaussian(images)
        return gaussian.mean, gaussian.logvar

    @property
    def stored_statistics(self) -> tuple[str, ...]:
        """Mean and standard deviation of the posterior, in this order along the channels."""
        return ("mean", "std")

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """(2C, h, w)."""
        return (2 * self.spec.channels, self.spec.height, self.spec.width)

    def store(self, images: Tensor) -> Tensor:
        """Images (B, C', H, W) in [-1, 1] -> posterior mean and std (B, 2C, h, w), raw units."""
        gaussian = self.gaussian(images)
        return torch.cat([gaussian.mean, gaussian.std], 1)

    def latents(
        self, stored: Tensor, *, generator: Generators = None, noise: Tensor | None = None
    ) -> Tensor:
        """Stored mean and std (B, 2C, h, w) -> normalised latents (B, C, h, w).

        Args:
            generator: samples from the posterior; a list with one generator per image samples
                image i from generators[i] alone. None: the posterior mean.
            noise: (B, C, h, w), standard normal, used instead of a generator.

        Raises:
            SmaltiError: the length of the list is not the number of images.
        """
        z, std = stored.float().chunk(2, dim=1)
        if noise is None and generator is not None:
            noise = NormalSource(generator, len(z))(z)
        if noise is not None:
            z = z + std * noise
        return (z - self.shift) / self.scale

    def vectors(self, latents: Tensor) -> Tensor:
        """The latents themselves, (B, C, h, w): a continuous tokenizer decodes them as they are.

        Raises:
            DataError: they have another shape.
        """
        spec = self.spec
        expected = (spec.channels, spec.height, spec.width)
        if latents.ndim != 4 or tuple(latents.shape[1:]) != expected:
            raise DataError(
                f"latents have shape {tuple(latents.shape)}; this tokenizer takes (B, "
                f"{spec.channels}, {spec.height}, {spec.width})"
            )
        return latents

    def decode_vectors(self, vectors: Tensor) -> Tensor:
        """Normalised latents (B, C, h, w) -> images (B, C', H, W), not clamped."""
        return self._decode_raw(vectors * self.scale + self.shift)

    def _decode_raw(self, z: Tensor) -> Tensor:
        return self.decoder(self._decoder_input(z))

    def _decoder_input(self, z: Tensor) -> Tensor:
        z = z.to(self.last_layer.dtype)
        return self.post_quant_conv(z) if self.post_quant_conv else z

    def decoding_stages(self) -> Stages:
        return self.decoder.stages(
            lambda vectors: self._decoder_input(vectors * self.scale + self.shift)
        )

    def sample_random_inputs(
        self, count: int, generator: torch.Generator, grid: tuple[int, int] | None = None
    ) -> dict[str, Tensor]:
        """`noise` of the posterior (B, C, h, w) and uniforms of the `transformation` (B, 3).

        All images of a batch are transformed alike, so all rows of the uniforms are equal.
        """
        spec, device = self.spec, generator.device
        shape = (count, spec.channels, *(grid or (spec.height, spec.width)))
        noise = torch.randn(shape, generator=generator, device=device)
        uniforms = torch.rand(3, generator=generator, device=device)
        return {"noise": noise, "transformation": uniforms.expand(count, 3)}

    def forward(self, images: Tensor, random_inputs: RandomInputs | None = None) -> Reconstruction:
        gaussian = self.gaussian(images)
        latents = gaussian.sample(None if random_inputs is None else random_inputs["noise"])
        z, targets = latents, images
        if self.training and self.config.equivariance:
            row = torch.rand(3) if random_inputs is None else random_inputs["transformation"][0]
            uniform, turn, size = row.tolist()
            if uniform < self.config.equivariance:
                z, targets = transformed(latents, images, turn, size)
        return Reconstruction(
            images=self._decode_raw(z),
            targets=targets,
            losses={"kl": self.config.kl_weight * gaussian.kl().mean()},
            latents=latents,
        )

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """Measure mean and std of the latents of all images and keep them in the config.

        The variance of z over images and samples is that of the means plus the mean of the
        variances, so no sample is needed.

        Args:
            batches: images (B, C', H, W) in [-1, 1].

        Raises:
            DataError: there are no images.
        """
        count, total, squares = 0, 0.0, 0.0
        for images in batches:
            gaussian = self.gaussian(images)
            mean, variance = gaussian.mean.double(), gaussian.logvar.double().exp()
            count += mean.numel() // mean.shape[1]
            total = total + mean.sum((0, 2, 3))
            squares = squares + (mean.square() + variance).sum((0, 2, 3))
        if count == 0:
            raise DataError("no images were given: the statistics need at least one")
        mean = torch.as_tensor(total) / count
        std = (torch.as_tensor(squares) / count - mean.square()).clamp_min(1e-12).sqrt()
        self.config = replace(
            self.config, latent_mean=tuple(mean.tolist()), latent_std=tuple(std.tolist())
        )
        self._apply_statistics()
