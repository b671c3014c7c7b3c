"""Editing images in the latent space of a tokenizer, and showing the result as a latent grid.

`LatentEditor` is the object behind the commands `interpolate`, `attribute`, `traverse` and
`invert`: it reads images, encodes them to the vectors that the decoder takes, edits those with
`smalti.tokenizer.manipulation`, decodes them, and saves a grid of images with labelled rows and
columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from smalti.config import check_at_least
from smalti.data.dataset import PictureOptions
from smalti.data.image_io import image_grid, to_channels
from smalti.data.latents import CodeSpec, height_and_width, to_float
from smalti.data.sources.base import ImageSource
from smalti.data.sources.folder import read_picture
from smalti.data.transforms import center_crop, to_tensor
from smalti.data.value_range import limits_of
from smalti.errors import ConfigurationError, DataError
from smalti.folders import is_unreported, replacing_file
from smalti.pipelines.model_flag import place_of
from smalti.pipelines.pipeline import DEMO, check_model
from smalti.tokenizer import manipulation
from smalti.tokenizer.base import Tokenizer
from smalti.tokenizer.losses.perceptual import LPIPS, MIN_SIDE
from smalti.tokenizer.manipulation import Inversion

SHOWN_SIDE = 96  # pixels; smaller images are enlarged to about this
NAME_LENGTH = 24  # characters of a file name that are shown


@dataclass(frozen=True)
class LatentGridOptions(PictureOptions):
    """The tokenizer, the images, and the file of the latent grid."""

    TRAINED: ClassVar[str] = "model"

    model: Annotated[str, place_of("A tokenizer, or a pipeline whose tokenizer is used")] = DEMO
    images: tuple[Path, ...] = ()  # image files; or give --indices
    indices: tuple[int, ...] = ()  # positions in the data set, from 0
    output: Path = Path("strip.png")  # PNG file of the latent grid
    overwrite: bool = False  # replace the output if it exists
    batch_size: int = 64  # images encoded at once

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(1, self, "batch_size")


@dataclass(frozen=True)
class StatisticsOptions(LatentGridOptions):
    """Also: the number of images of the data set for statistics of the latents."""

    max_pictures: int = 2048  # images for statistics of the latents, evenly spaced in the data set

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(1, self, "max_pictures")


class LatentEditor:
    """A tokenizer, and the images that the options name.

    Shapes: images (B, C, H, W) in [-1, 1] of the tokenizer's channels and size; vectors
    (B, d, h, w).

    Raises:
        ConfigurationError: the output cannot be written.
        SmaltiError: the model is no tokenizer and no pipeline.
    """

    def __init__(self, options: LatentGridOptions) -> None:
        _check_output(options.output, options.overwrite)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer = load_tokenizer(options.model).to(self.device)
        self.given = options
        self.options = options.for_channels(self.tokenizer.image_channels)

    # -- images and vectors -------------------------------------------------------------------

    @cached_property
    def source(self) -> ImageSource:
        """The data set, opened at the first use."""
        self.given.note_stored()
        return self.options.source()

    @property
    def image_names(self) -> list[str]:
        """A label for each requested image."""
        files = [path.name[:NAME_LENGTH] for path in self.options.images]
        return files or [f"#{index}" for index in self.options.indices]

    def images(self, count: int | None = None) -> Tensor:
        """The requested images.

        Raises:
            ConfigurationError: no images were requested, or not `count`.
            DataError: an image cannot be read, or is not in the data set.
        """
        files, indices = self.options.images, self.options.indices
        if bool(files) == bool(indices):
            raise ConfigurationError(
                "give images either as --images FILE ... or as --indices NUMBER ..., positions in "
                "--data"
            )
        given = len(files or indices)
        if count not in (None, given):
            flag = "--images" if files else "--indices"
            raise ConfigurationError(f"{flag} names {given} images; this command takes {count}")
        if indices:
            return self.read(indices)
        return self._crops([self._read_file(path) for path in files])

    def _read_file(self, path: Path) -> Image.Image:
        limits = limits_of(self.options.value_range)
        return read_picture(path, self.options.folder, limits)

    def read(self, indices: Sequence[int]) -> Tensor:
        """Images of the data set.

        Raises:
            DataError: an index is out of range.
        """
        for index in indices:
            if not 0 <= index < len(self.source):
                raise DataError(
                    f"index {index} is out of range: {self.options.data} has images 0 to "
                    f"{len(self.source) - 1}"
                )
        return self._crops([self.source.read(index) for index in indices])

    def _crops(self, pictures: Sequence[Image.Image]) -> Tensor:
        size, channels = self.tokenizer.image_size, self.tokenizer.image_channels
        converted = (to_channels(picture, channels) for picture in pictures)
        tensors = [to_tensor(center_crop(picture, size)) for picture in converted]
        return to_float(torch.stack(tensors)).to(self.device)

    @torch.no_grad()
    def vectors(self, images: Tensor) -> Tensor:
        """Images -> the vectors that the decoder takes."""
        return self.tokenizer.vectors(self.tokenizer.encode(images))

    def vectors_of(self, indices: Sequence[int]) -> Tensor:
        """Vectors of images of the data set, encoded in batches."""
        size = self.options.batch_size
        parts = [
            self.vectors(self.read(indices[start : start + size]))
            for start in tqdm(range(0, len(indices), size), desc="encode", unit="batch", delay=2)
        ]
        return torch.cat(parts)

    def measured_vectors(self, count: int) -> Tensor:
        """Vectors of at most `count` images, evenly spaced in the data set."""
        return self.vectors_of(evenly_spaced(range(len(self.source)), count))

    @torch.no_grad()
    def decode(self, vectors: Tensor) -> Tensor:
        """Vectors -> images, decoded in batches."""
        parts = vectors.split(self.options.batch_size)
        return torch.cat([self.tokenizer.decode_vectors(part).float() for part in parts])

    # -- edits --------------------------------------------------------------------------------

    def interpolate(self, images: Tensor, steps: int) -> dict[str, Tensor]:
        """Blends of two images, (2, C, H, W), on a line and on an arc, by name.

        Returns:
            Each (steps + 2, C, H, W): the blends between the two originals.
        """
        start, end = self.vectors(images).split(1)
        discrete = isinstance(self.tokenizer.spec, CodeSpec)
        blends = {
            "linear": manipulation.linear,
            "spherical": manipulation.spherical if discrete else manipulation.spherical_as_one,
        }
        rows = {}
        for name, blend in blends.items():
            path = manipulation.interpolate(start, end, steps, blend)[0]  # (steps, d, h, w)
            rows[name] = torch.cat([images[:1], self.decode(path), images[1:]])
        return rows

    def add_attribute(
        self,
        images: Tensor,
        positive: int,
        negative: int,
        strengths: Sequence[float],
        max_images: int,
    ) -> Tensor:
        """Images plus multiples of the mean of one class minus the mean of another.

        Args:
            max_images: number of labelled images, for both means together.

        Returns:
            (B, 1 + len(strengths), C, H, W), the originals first.
        """
        labels = self.source.labels
        members: list[int] = []
        for label in (positive, negative):
            of_class = (labels == label).nonzero().flatten().tolist()
            members += evenly_spaced(of_class, max(1, max_images // 2))
        labelled = self.vectors_of(members)
        direction = manipulation.attribute_direction(labelled, labels[members], positive, negative)
        moved = manipulation.move(self.vectors(images), direction, strengths)  # (B, s, d, h, w)
        edited = self.decode(moved.flatten(0, 1)).unflatten(0, moved.shape[:2])
        return torch.cat([images[:, None], edited], dim=1)

    def traverse(
        self,
        image: Tensor,
        channels: Sequence[int],
        strengths: Sequence[float],
        max_images: int,
    ) -> list[tuple[int, Tensor]]:
        """An image, (1, C, H, W), plus multiples of each channel's standard deviation.

        Args:
            channels: empty means the first 8.
            max_images: number of images from which the deviations are computed.

        Returns:
            Each channel, and its images (1 + len(strengths), C, H, W), the original first.
        """
        vectors = self.vectors(image)  # (1, d, h, w)
        width = vectors.shape[1]
        channels = channels or range(min(width, 8))
        axes = [manipulation.channel_axis(channel, width).to(vectors) for channel in channels]
        deviations = manipulation.channel_deviations(self.measured_vectors(max_images))
        rows = []
        for axis in axes:
            moved = manipulation.move(vectors, deviations * axis, strengths)[0]  # (s, d, h, w)
            rows.append(torch.cat([image, self.decode(moved)]))
        return list(zip(channels, rows, strict=True))

    def invert(
        self,
        images: Tensor,
        start_at_mean: bool,
        *,
        steps: int,
        learning_rate: float,
        perceptual: LPIPS | None,
        perceptual_weight: float,
        max_images: int,
    ) -> tuple[Inversion, dict[str, Tensor]]:
        """Optimise vectors so that they decode to the images.

        Args:
            start_at_mean: start at the mean of `max_images` images of the data set, not at the
                encoder's output.
            perceptual: LPIPS, added to the mean squared error; None leaves it out.

        Returns:
            The result; and images (B, C, H, W) at some steps, by a name with the mean distance.
        """
        distance = partial(
            manipulation.picture_distance,
            perceptual=perceptual,
            perceptual_weight=perceptual_weight,
        )
        encoded = self.vectors(images)
        shown = {"encoder": encoded}
        start = encoded
        if start_at_mean:
            start = shown["mean"] = self.measured_vectors(max_images).mean(0).expand_as(encoded)
        shown_steps = {steps // 16, steps // 4} - {0}  # early, when most of the change happens
        with tqdm(total=steps, desc="invert") as bar:

            def observe(step: int, vectors: Tensor) -> None:
                bar.update(step - bar.n)
                if step in shown_steps:
                    shown[f"step {step}"] = vectors

            found = manipulation.invert(
                self.tokenizer.decode_vectors,
                distance,
                images,
                start,
                steps=steps,
                learning_rate=learning_rate,
                observe=observe,
            )
        shown[f"best of {steps}"] = found.vectors
        rows = {}
        for name, vectors in shown.items():
            decoded = self.decode(vectors)
            rows[f"{name}: {distance(decoded, images).mean():.4f}"] = decoded
        return found, rows

    def load_lpips(self) -> LPIPS:
        """LPIPS on the editor's device.

        Raises:
            ConfigurationError: the tokenizer's images are smaller than LPIPS needs.
        """
        shorter = min(height_and_width(self.tokenizer.image_size))
        if shorter < MIN_SIDE:
            raise ConfigurationError(
                f"the tokenizer decodes to {shorter} pixels per side; LPIPS needs"
                f" at least {MIN_SIDE}: pass --perceptual_weight 0"
            )
        return LPIPS.from_embedded().to(self.device)

    # -- the grid -----------------------------------------------------------------------------

    def save(self, images: Tensor, row_labels: Sequence[str], column_labels: Sequence[str]) -> Path:
        """Write images (rows, columns, C, H, W) as the latent grid; return its path."""
        output = self.options.output
        grid = image_grid(
            images.flatten(0, 1),
            columns=images.shape[1],
            row_labels=row_labels,
            column_labels=column_labels,
            scale=max(1, SHOWN_SIDE // max(images.shape[-2:])),
        )
        check = partial(_check_output, output, self.options.overwrite)
        with replacing_file(output, check=check, retry=True) as new:
            grid.save(new, "PNG")
        return output


def load_tokenizer(model: str) -> Tokenizer:
    """The tokenizer in a folder of its own or in a pipeline, on disk or on the Hub.

    Raises:
        SmaltiError: there is no such model, or it is neither.
    """
    check_model(model)
    return Tokenizer.from_pretrained(model)


def signed(number: float) -> str:
    """A number with its sign, for the label of a column."""
    return f"{number:+g}" if number else "0"


def evenly_spaced(indices: Sequence[int], count: int) -> list[int]:
    """At most `count` of the indices, evenly spaced, starting with the first."""
    count = min(count, len(indices))
    return [indices[row * len(indices) // count] for row in range(count)]


def _check_output(path: Path, overwrite: bool) -> None:
    """Raise `ConfigurationError` before any work if the latent grid could not be saved."""
    if path.suffix.lower() != ".png":
        raise ConfigurationError(
            f"--output is {path}; a latent grid is a PNG file: use a name that ends in .png"
        )
    for folder in path.parents:
        if folder.exists() and not folder.is_dir():
            raise ConfigurationError(
                f"--output is {path}, but {folder} is a file: choose another --output"
            )
    if path.is_dir():
        raise ConfigurationError(f"{path} is a folder: name a file in --output")
    if path.exists() and not (overwrite or is_unreported(path)):
        raise ConfigurationError(f"{path} exists: choose another --output, or pass --overwrite")
