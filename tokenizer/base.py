"""Stage one: the interface of every tokenizer."""

import copy
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self, get_type_hints

import torch
from torch import Tensor, nn

from smalti.config import ImageSize
from smalti.data.latents import (
    MODES,
    CodeSpec,
    LatentSpec,
    as_image_size,
    as_tensor,
    height_and_width,
    resolution,
)
from smalti.errors import ConfigurationError, DataError, SmaltiError
from smalti.hub import Pretrained, Registry
from smalti.randomness import Generators, RandomInputs
from smalti.tokenizer.registry import TOKENIZERS
from smalti.tokenizer.tiling import Stages, Tiling

logger = logging.getLogger(__name__)


@dataclass
class Reconstruction:
    """The inputs of the training objective of stage one."""

    images: Tensor  # (B, C, H, W), not clamped
    targets: Tensor  # (B, C, H, W), the images to reconstruct: usually those that were encoded
    losses: dict[str, Tensor]  # scalars, already weighted: codebook, commitment, kl, ...
    codes: Tensor | None = None  # (B, L) int64 of a discrete tokenizer
    latents: Tensor | None = None  # (B, C, h, w) of a continuous one, in raw units


@dataclass(frozen=True)
class TokenizerConfig:
    """The configuration of a tokenizer: a frozen dataclass with a `kind`, its registered name, and
    an `image_size` in pixels.

    A tokenizer that is not only for RGB also has `image_channels`: 1 (grey), 3 or 4 (with alpha).
    """

    image_size: ImageSize  # pixels: the side of square images, or height x width
    registry: ClassVar[Registry] = TOKENIZERS
    # Fields that may change without changing what saved weights mean.
    NON_ARCHITECTURE_FIELDS: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        size = as_image_size(self.image_size)  # a square has one form
        object.__setattr__(self, "image_size", size)
        channels = image_channels_of(self)
        if channels not in MODES:
            raise ConfigurationError(
                f"image_channels is {channels}; use 1 (grey), 3 (RGB) or 4 (RGB and alpha)"
            )


def image_channels_of(config: Any) -> int:
    """Channels of the images of a tokenizer; 3 where its configuration does not name them."""
    return getattr(config, "image_channels", 3)


class Tokenizer(nn.Module, Pretrained, ABC):
    """Images (B, C, H, W) in [-1, 1] <-> latents described by `spec`.

    C is `image_channels`: 3, or 1 for grey and 4 for RGB with alpha.

    Three methods connect images with a prior: `store` (images -> values in the cache), `latents`
    (values in the cache -> latents that a prior learns), `decode` (latents -> images). `forward` is
    the training pass, so that DDP and torch.compile wrap the object itself.
    """

    registry: ClassVar[Registry] = TOKENIZERS
    PRESETS: ClassVar[Mapping[str, Any]] = {}  # configurations by name, for --tokenizer.preset
    config: Any
    _tiling: Tiling | None = None
    _slicing: bool = False

    @classmethod
    def settings_before_training(cls, config: Any) -> Any:
        """The configuration that fine-tuning starts with: without what `calibrate` measured."""
        return config

    @property
    @abstractmethod
    def spec(self) -> LatentSpec:
        """What `latents` returns and `decode` takes."""

    @property
    @abstractmethod
    def image_size(self) -> ImageSize:
        """Size of the images that this tokenizer was made for, in pixels: the side of squares, or
        (height, width)."""

    @property
    def image_channels(self) -> int:
        """Channels of the images: 1 (grey), 3 (RGB) or 4 (RGB and alpha)."""
        return image_channels_of(self.config)

    @property
    @abstractmethod
    def last_layer(self) -> nn.Parameter:
        """The decoder's last weight, where the adaptive adversarial weight compares gradients."""

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of what `store` returns for one image; by default that of its latents."""
        if isinstance(self.spec, CodeSpec):
            return (self.spec.length,)
        return (self.spec.channels, self.spec.height, self.spec.width)

    @property
    def stored_statistics(self) -> tuple[str, ...]:
        """Names of the statistics that `store` stacks along the channels, ("mean", "std") of a
        Gaussian posterior; empty if it returns the latents themselves."""
        return ()

    @abstractmethod
    def store(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] -> what a latent cache keeps, for example codes (B, L)."""

    @abstractmethod
    def vectors(self, latents: Tensor) -> Tensor:
        """Latents -> the real-valued features (B, d, h, w) that the decoder takes.

        Discrete and continuous latents alike can be interpolated and edited in this space; see
        `decode_vectors`.
        """

    @abstractmethod
    def decode_vectors(self, vectors: Tensor) -> Tensor:
        """Features (B, d, h, w) -> images (B, C, H, W), differentiable, not clamped."""

    def decoding_stages(self) -> Stages:
        """`decode_vectors` as a part that runs once over a whole picture and one that can run in
        tiles; by default the first does nothing."""
        decoding = [getattr(self, name) for name in self.compiled_parts] or [self]
        modules = [module for part in decoding for module in part.modules()]
        return Stages(
            whole=lambda vectors: vectors,
            tiled=self.decode_vectors,
            tiles_attend=any(isinstance(module, nn.MultiheadAttention) for module in modules),
        )

    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> images (B, C, H, W), about [-1, 1] but not clamped.

        Raises:
            DataError: latents, or the images that the decoder makes of them, are infinite or NaN.
        """
        latents = as_tensor(latents)
        vectors = self.vectors(latents)
        if self._slicing and len(vectors) > 1:
            images = torch.cat([self._decode(part) for part in vectors.split(1)])
        else:
            images = self._decode(vectors)
        check_finite(images, "the decoder", latents, "latents")
        return images

    def _decode(self, vectors: Tensor) -> Tensor:
        rows, columns = vectors.shape[2:]
        size = height_and_width(self.size_of((rows, columns)))
        if self._tiling is None or max(size) <= self._tiling.tile:
            return self.decode_vectors(vectors)
        stages = self.decoding_stages()
        norms = [module for module in self.modules() if isinstance(module, nn.GroupNorm)]
        return self._tiling.decode(stages.tiled, stages.whole(vectors), size, norms)

    def compile_parts(self, **options: Any) -> None:
        """Compile the decoder, with options of torch.compile. Without options nothing is done on a
        CPU, where nearly all the time is that of convolutions, which are the same compiled."""
        if options or next(self.parameters()).device.type != "cpu":
            super().compile_parts(**options)

    def enable_slicing(self) -> None:
        """Let `decode` take one image at a time: less memory, more time."""
        self._slicing = True

    def disable_slicing(self) -> None:
        """Let `decode` take all images at once."""
        self._slicing = False

    def enable_tiling(self, tile: int = 512, overlap: int = 128) -> None:
        """Let `decode` take images in tiles that are blended where they overlap: memory for large
        images is that of a tile, and of the maps at the resolution of the latents, which are
        computed for the whole image. Means and variances of normalisations are estimated, so that
        the images differ from those of a whole decode: less than a grey level at the seams of a
        smooth picture, but more, with a warning, if there is attention in the tiles.

        Args:
            tile, overlap: pixels.

        Raises:
            ConfigurationError: not 0 <= overlap < tile.
        """
        self._tiling = Tiling(tile, overlap)
        if self.decoding_stages().tiles_attend:
            logger.warning(
                "the decoder attends within each tile of %d pixels alone, so that seams exceed one "
                "grey level: give a tile of at least the size of the training pictures",
                tile,
            )

    def disable_tiling(self) -> None:
        """Let `decode` take whole images."""
        self._tiling = None

    def sample_random_inputs(
        self, count: int, generator: torch.Generator, grid: tuple[int, int] | None = None
    ) -> dict[str, Tensor]:
        """Random numbers for a training pass over `count` images, a row for each; most tokenizers
        need none.

        Args:
            generator: on the device of the model.
            grid: (h, w) of continuous latents, where stored ones of another size than `spec` are
                sampled; None: that of `spec`.
        """
        del count, generator, grid
        return {}

    @abstractmethod
    def forward(self, images: Tensor, random_inputs: RandomInputs | None = None) -> Reconstruction:
        """Encode, quantize or sample, decode: the differentiable pass that training optimises.

        Args:
            random_inputs: rows of what `sample_random_inputs` returned, one for each image; None:
                sampled from torch's global generators.
        """

    def latents(
        self, stored: Tensor, *, generator: Generators = None, noise: Tensor | None = None
    ) -> Tensor:
        """Values in the cache -> latents that a prior learns. Codes stay unchanged.

        Args:
            generator: one for all images, or a list with one for each, whose latents then do not
                depend on the other images. Codes need none.
            noise: standard normal noise, used instead of a generator.
        """
        del generator, noise
        return stored

    def encode(self, images: Any, *, generator: Generators = None) -> Tensor:
        """`latents(store(images))`: images (B, C, H, W) in [-1, 1] -> latents.

        Args:
            images: a tensor or an array; or one or several pictures of Pillow, whose centre is
                resized to `image_size`, as in training.

        Raises:
            DataError: images, or what the encoder makes of them, are infinite or NaN.
        """
        images = self._as_images(images)
        stored = self.store(images)
        check_finite(stored, "the encoder", images, "images")
        return self.latents(stored, generator=generator)

    def _as_images(self, images: Any) -> Tensor:
        """A tensor as it is; an array or pictures as a tensor on the device of the weights."""
        weight = self.last_layer
        if isinstance(images, Tensor):
            return images
        if hasattr(images, "__array_interface__") and not hasattr(images, "convert"):
            return as_tensor(images).to(weight.device)
        from smalti.data.transforms import images_of  # needs Pillow, which models do not

        found = images_of(images, self.image_size, self.image_channels)
        return found.to(weight.device, weight.dtype)

    @torch.no_grad()
    def reconstruct(self, images: Any) -> Tensor:
        """`decode(encode(images))` clamped to [-1, 1], shape (B, C, H, W)."""
        return self.decode(self.encode(images)).clamp(-1, 1)

    # -- other sizes of images ----------------------------------------------------------------
    #
    # A tokenizer is identified by its weights and by what changes their meaning, not by the size
    # of the images. The fingerprint, a hash of weights and config, contains that size. So a stored
    # fingerprint is compared with that of this tokenizer at the size of the stored latents.

    def config_at(
        self, image_size: ImageSize, grids: tuple[tuple[int, int], ...] | None = None
    ) -> Any:
        """The configuration of this tokenizer for images of another size, in pixels.

        Args:
            grids: of the codes, coarse to fine, where the image size does not determine them.

        Raises:
            ConfigurationError: it has no latents for images of this size.
        """
        del grids
        squares_only = get_type_hints(type(self.config)).get("image_size") is int
        if squares_only and not isinstance(image_size, int):
            raise ConfigurationError(
                f"a {type(self).__name__} takes square images only, not {resolution(image_size)}: "
                "give one number"
            )
        return replace(self.config, image_size=image_size)

    def resized(
        self, image_size: ImageSize, grids: tuple[tuple[int, int], ...] | None = None
    ) -> Self:
        """A tokenizer with a copy of these weights for images of another size, in pixels.

        Args:
            grids: of a multi-scale tokenizer, (h, w) coarse to fine; None: its own, stretched to
                the new grid of the encoder.

        Raises:
            ConfigurationError: it has no latents for images of this size; its weights depend on the
                size, or were rounded by `cast`.
        """
        if self.fingerprint != self.checksum:
            raise ConfigurationError(
                "this tokenizer is a copy in lower precision: resize the original, then cast it"
            )
        return copy.deepcopy(self.sharing_weights(image_size, grids))

    def sharing_weights(
        self, image_size: ImageSize, grids: tuple[tuple[int, int], ...] | None = None
    ) -> Self:
        """Like `resized`, in any precision, with the same weights instead of a copy: a change of
        one model changes both."""
        with torch.random.fork_rng(devices=[]):
            model = type(self)(self.config_at(image_size, grids))
        try:
            model.load_state_dict(self.state_dict(), assign=True)
        except RuntimeError as error:
            raise ConfigurationError(
                f"a {self.registry.name_of(type(self))} tokenizer cannot be resized, because its "
                f"weights depend on the image size: train one for {resolution(image_size)} pixels"
            ) from error
        weight, model._tiling, model._slicing = self.last_layer, self._tiling, self._slicing
        return model.to(weight.device, weight.dtype).train(self.training)

    def size_of(self, grid: tuple[int, int]) -> ImageSize:
        """Size in pixels of the images whose latents, or finest codes, are on a grid (h, w)."""
        sides, own = height_and_width(self.image_size), _last_grid(self.spec)
        return as_image_size([s * new // old for s, new, old in zip(sides, grid, own, strict=True)])

    def for_latents(self, spec: LatentSpec, fingerprint: str) -> Self | None:
        """This tokenizer at the image size of latents that were stored with the fingerprint of
        their tokenizer; None if they were made by another tokenizer."""
        if spec == self.spec:
            return self if fingerprint == self.fingerprint else None
        if type(spec) is not type(self.spec):
            return None
        grids = spec.grids if isinstance(spec, CodeSpec) else None
        try:
            size = self.size_of(_last_grid(spec))
            same = copy.copy(self)
            same.config = self.config_at(size, grids)
        except SmaltiError:
            return None
        if fingerprint != same.checksum:
            return None
        resized = self.resized(size, grids)
        return resized if resized.spec == spec else None

    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """Measure the statistics that the config stores; called once after training with batches of
        all training images, (B, C, H, W) each. A discrete tokenizer has none."""
        del batches

    def after_step(self, generator: torch.Generator) -> None:
        """Update what gradients do not: called once after every accepted optimizer step.

        `generator` is equal on all processes, so that random choices agree.
        """
        del generator

    def discard_step(self) -> None:
        """Discard what `forward` collected for `after_step`, because the step was skipped."""

    def check_images(self, images: Tensor) -> None:
        """Raise `SmaltiError` unless images are (B, C, H, W) of `image_channels` and `image_size`,
        of the type of the weights or under autocast, and finite (in training, `StepGuard` checks
        that)."""
        height, width = height_and_width(self.image_size)
        expected = (self.image_channels, height, width)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            mode = MODES[self.image_channels]
            right = images.ndim == 4 and images.shape[1] == self.image_channels
            raise SmaltiError(
                f"images have shape {tuple(images.shape)}; this tokenizer takes (B, "
                f"{self.image_channels}, {height}, {width}): "
                + ("resize and crop them first" if right else f"make them {mode} first")
            )
        weights, device = self.last_layer.dtype, images.device.type
        fits = images.dtype == weights or torch.is_autocast_enabled(device)
        if not (fits and images.is_floating_point()):
            raise SmaltiError(
                f"images are {images.dtype}; this tokenizer takes {weights} in [-1, 1]: convert"
                " them first"
            )
        if not self.training:
            check_finite(images, "the encoder", images, "images")


def check_finite(values: Tensor, part: str, given: Tensor | None, name: str) -> None:
    """Raise `DataError` if a part of a model gave values (B, ...) that are infinite or NaN.

    One reduction over the values; nothing is checked while torch.compile traces, because a branch
    on values would break the graph.

    Args:
        part: of the model, for the message.
        given: what the part was given, which may be the cause; None: nothing that could be.
        name: of what was given, in the plural.
    """
    if torch.compiler.is_compiling() or values.is_meta or not values.is_floating_point():
        return
    if values.isfinite().all():
        return
    wrong, source = ~values.isfinite().flatten(1).all(1), f"{part} gives"
    if given is not None and not bool(given.isfinite().all()):
        wrong, source = ~given.isfinite().flatten(1).all(1), f"the {name} for {part} have"
        advice = f"find out where these {name} come from"
    elif values.dtype == torch.float16:
        advice = (
            "float16 ends at 65504, which this model exceeds: use bfloat16 or float32, for example "
            'with dtype="bfloat16"'
        )
    else:
        advice = "its weights are damaged, or their training diverged: take an earlier checkpoint"
    raise DataError(
        f"{source} values that are infinite or NaN, in {int(wrong.sum())} of {len(wrong)} samples "
        f"(the first is sample {int(wrong.nonzero()[0])} of the batch): {advice}"
    )


def _last_grid(spec: LatentSpec) -> tuple[int, int]:
    """Rows and columns of latents; of codes, those of the finest grid."""
    return spec.grids[-1] if isinstance(spec, CodeSpec) else (spec.height, spec.width)
