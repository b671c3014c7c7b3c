"""What the commands share that show a tokenizer's latent space as a strip of pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from smalti.config import check_at_least
from smalti.data.dataset import PictureOptions
from smalti.data.image_io import image_grid, save_png
from smalti.data.latents import to_float
from smalti.data.sources.base import ImageSource
from smalti.data.sources.folder import read_picture
from smalti.data.transforms import center_crop, to_tensor
from smalti.errors import SmaltiError
from smalti.hub import resolve_folder
from smalti.pipelines.pipeline import INDEX
from smalti.tokenizer.base import Tokenizer

SHOWN_SIDE = 96  # pixels; smaller pictures are enlarged to about this
NAME_LENGTH = 24  # letters of a file name that are shown


@dataclass(frozen=True)
class StripOptions(PictureOptions):
    """Which tokenizer, which pictures, and where the strip goes."""

    model: str = "runs/demo/pipeline"  # a tokenizer, or a pipeline whose tokenizer is used
    images: tuple[Path, ...] = ()  # picture files; or give --indices
    indices: tuple[int, ...] = ()  # positions in the data set, from 0
    output: Path = Path("strip.png")
    overwrite: bool = False  # replace the output if it exists
    batch_size: int = 64  # pictures encoded at once

    def __post_init__(self) -> None:
        check_at_least(1, self, "batch_size")


@dataclass(frozen=True)
class StatisticsOptions(StripOptions):
    """Also: how much of the data set is measured."""

    max_pictures: int = 2048  # evenly spread over the data set

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(1, self, "max_pictures")


class LatentEditor:
    """A tokenizer, and pictures as it takes them.

    Raises:
        SmaltiError: the output cannot be written, or the model is not a tokenizer's.
    """

    def __init__(self, options: StripOptions) -> None:
        _check_output(options.output, options.overwrite)
        self.options = options
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer = load_tokenizer(options.model).to(self.device)

    @cached_property
    def source(self) -> ImageSource:
        """The data set, opened when it is needed."""
        return self.options.source()

    @property
    def names(self) -> list[str]:
        """How the pictures that were asked for are called in a strip."""
        files = [path.name[:NAME_LENGTH] for path in self.options.images]
        return files or [f"#{index}" for index in self.options.indices]

    def pictures(self, count: int | None = None) -> Tensor:
        """The pictures that were asked for, (B, 3, S, S) in [-1, 1].

        Raises:
            SmaltiError: none were, or not `count`; one cannot be read, or is not in the data set.
        """
        files, indices = self.options.images, self.options.indices
        if bool(files) == bool(indices):
            raise SmaltiError(
                "give pictures either as --images FILE ... or as --indices NUMBER ..., positions "
                "in --data"
            )
        given = len(files or indices)
        if count not in (None, given):
            flag = "--images" if files else "--indices"
            raise SmaltiError(f"{flag} names {given} pictures; this command takes {count}")
        if indices:
            return self.read(indices)
        return self._square([read_picture(path, self.options.folder) for path in files])

    def read(self, indices: Sequence[int]) -> Tensor:
        """Pictures of the data set, (B, 3, S, S) in [-1, 1].

        Raises:
            SmaltiError: an index is out of range.
        """
        for index in indices:
            if not 0 <= index < len(self.source):
                raise SmaltiError(
                    f"index {index} is out of range: {self.options.data} has pictures 0 to "
                    f"{len(self.source) - 1}"
                )
        return self._square([self.source.read(index) for index in indices])

    def _square(self, pictures: Sequence) -> Tensor:
        size = self.tokenizer.image_size
        tensors = [to_tensor(center_crop(picture, size)) for picture in pictures]
        return to_float(torch.stack(tensors)).to(self.device)

    @torch.no_grad()
    def vectors(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) -> what the decoder draws them from, (B, d, h, w)."""
        return self.tokenizer.vectors(self.tokenizer.encode(images))

    def vectors_of(self, indices: Sequence[int]) -> Tensor:
        """Vectors (N, d, h, w) of pictures of the data set, encoded in batches."""
        size = self.options.batch_size
        starts = range(0, len(indices), size)
        parts = [
            self.vectors(self.read(indices[start : start + size]))
            for start in tqdm(starts, desc="encode", unit="batch", delay=2)
        ]
        return torch.cat(parts)

    @torch.no_grad()
    def decode(self, vectors: Tensor) -> Tensor:
        """Vectors (N, d, h, w) -> images (N, 3, S, S), decoded in batches."""
        parts = vectors.split(self.options.batch_size)
        return torch.cat([self.tokenizer.decode_vectors(part).float() for part in parts])

    def save(self, images: Tensor, row_labels: Sequence[str], column_labels: Sequence[str]) -> Path:
        """Write images (rows, columns, 3, S, S) as the strip; return its path."""
        output = self.options.output
        grid = image_grid(
            images.flatten(0, 1),
            columns=images.shape[1],
            row_labels=row_labels,
            column_labels=column_labels,
            scale=max(1, SHOWN_SIDE // images.shape[-1]),
        )
        save_png(output, grid)
        return output


def load_tokenizer(model: str) -> Tokenizer:
    """A tokenizer by its own folder or by that of a pipeline; also from the Hub.

    Raises:
        SmaltiError: there is no such model, or it is neither.
    """
    folder = resolve_folder(model)
    return Tokenizer.from_pretrained(folder / "tokenizer" if (folder / INDEX).is_file() else folder)


def signed(number: float) -> str:
    """A number with its sign, as the head of a column."""
    return f"{number:+g}" if number else "0"


def evenly_spaced(indices: Sequence[int], count: int) -> list[int]:
    """At most `count` of the indices, at equal distances, from the first on."""
    count = min(count, len(indices))
    return [indices[row * len(indices) // count] for row in range(count)]


def _check_output(path: Path, overwrite: bool) -> None:
    """Raise `SmaltiError` before any work if the strip could not be saved."""
    if path.suffix.lower() != ".png":
        raise SmaltiError(f"--output is {path}; a strip is a PNG file: let its name end in .png")
    for folder in path.parents:
        if folder.exists() and not folder.is_dir():
            raise SmaltiError(
                f"--output is {path}, but {folder} is a file: choose another --output"
            )
    if path.is_dir():
        raise SmaltiError(f"{path} is a folder: name a file in --output")
    if path.exists() and not overwrite:
        raise SmaltiError(f"{path} exists: choose another --output, or pass --overwrite")
