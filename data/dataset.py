"""A split of a picture set as tensors of one size."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from smalti.data.latents import to_float
from smalti.data.order import Key
from smalti.data.sources.base import (
    BadPicture,
    ImageSource,
    SourceOptions,
    fingerprint_of,
    heldout_mask,
    in_threads,
    open_source,
)
from smalti.data.transforms import (
    RandomCrop,
    center_crop,
    crop_draw,
    flips,
    random_crop,
    to_tensor,
)
from smalti.errors import SmaltiError

# -------------------------------------------------------------------------------------------------
# A split of a picture set as tensors of one size.

logger = logging.getLogger(__name__)

MEMORY_LIMIT = 2 * 2**30  # bytes of uint8 pixels that are kept decoded

Split = Literal["train", "heldout", "all"]


@dataclass
class ImageBatch:
    """Pictures as a tokenizer takes them."""

    images: Tensor  # (B, 3, S, S) float in [-1, 1]
    labels: Tensor  # (B,) int64
    indices: Tensor  # (B,) int64, positions in the data set


class ImageDataset(Dataset):
    """One split of a source, squared to `image_size` pixels. Index with keys (epoch, index).

    A set whose decoded pixels fit into `MEMORY_LIMIT` is decoded once, unless it is cropped at
    random. In place of a damaged picture stands the next one of its class in the split, if the
    source lets it be replaced: a batch is never shorter.

    Args:
        flip: mirror a sample or not, as a pure function of (seed, epoch, index).
        crop: show a random part of a sample, as such a function, too; None = its centre.

    Raises:
        SmaltiError: a picture cannot be decoded, or more than may be replaced.
    """

    def __init__(
        self,
        source: ImageSource,
        image_size: int,
        *,
        split: Split = "all",
        heldout_fraction: float = 0.1,
        split_seed: int = 0,
        flip: bool = False,
        crop: RandomCrop | None = None,
        seed: int = 0,
    ) -> None:
        if image_size < 8:
            raise SmaltiError(f"image_size is {image_size}; it must be at least 8 pixels")
        self.source, self.image_size = source, image_size
        self.flip, self.crop, self.seed = flip, crop, seed
        keep = torch.ones(len(source), dtype=torch.bool)
        if split != "all":
            heldout = heldout_mask(source, heldout_fraction, split_seed)
            keep = heldout if split == "heldout" else ~heldout
        self.positions = keep.nonzero().flatten().tolist()  # in the source
        self.classes = source.classes
        self.labels = source.labels[keep]
        which = ",".join(map(str, self.positions))
        self.fingerprint = fingerprint_of(
            [source.fingerprint.encode(), str(image_size).encode(), which.encode()]
        )
        # Which samples turned out to be damaged. Shared with the worker processes of a loader.
        self._bad = torch.zeros(len(self), dtype=torch.bool).share_memory_()
        fits = len(self) * 3 * image_size**2 <= MEMORY_LIMIT
        self._pixels = self._decode_all(split) if fits and crop is None else None

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def __len__(self) -> int:
        return len(self.positions)

    def name(self, index: int) -> str:
        """What to call a sample in a message."""
        return self.source.name(self.positions[index])

    def __getitems__(self, keys: Sequence[Key]) -> ImageBatch:
        batch = self._cropped(keys) if self.crop else self._batch([index for _, index in keys])
        if self.flip:
            mirrored = torch.tensor([flips(self.seed, *key) for key in keys])
            batch.images = torch.where(
                mirrored[:, None, None, None], batch.images.flip(-1), batch.images
            )
        return batch

    def batches(
        self, batch_size: int, *, start: int = 0, stop: int | None = None
    ) -> Iterator[ImageBatch]:
        """The samples [start, stop) in order, not augmented."""
        stop = len(self) if stop is None else min(stop, len(self))
        for first in range(start, stop, batch_size):
            yield self._batch(range(first, min(first + batch_size, stop)))

    def all_images(self) -> Tensor:
        """Every sample in order, not augmented: (N, 3, S, S) float in [-1, 1]."""
        return torch.cat([batch.images for batch in self.batches(512)])

    @property
    def num_replaced(self) -> int:
        """How many damaged samples were met so far, and replaced."""
        return int(self._bad.sum())

    def _batch(self, indices: Sequence[int]) -> ImageBatch:
        rows = torch.as_tensor(indices)
        if self._pixels is None:
            pixels = torch.stack([self._decode(index) for index in indices])
        else:
            pixels = self._pixels[rows]
        return ImageBatch(to_float(pixels), self.labels[rows], rows)

    def _cropped(self, keys: Sequence[Key]) -> ImageBatch:
        rows = torch.tensor([index for _, index in keys])
        pixels = torch.stack([self._decode_crop(*key) for key in keys])
        return ImageBatch(to_float(pixels), self.labels[rows], rows)

    def _decode(self, index: int) -> Tensor:
        return self._square(index, lambda image: center_crop(image, self.image_size))

    def _decode_crop(self, epoch: int, index: int) -> Tensor:
        assert self.crop is not None
        limits, draw = self.crop, crop_draw(self.seed, epoch, index)
        return self._square(index, lambda image: random_crop(image, self.image_size, limits, draw))

    def _square(self, index: int, cut: Callable[[Image.Image], Image.Image]) -> Tensor:
        """A sample cut square, uint8 (3, S, S); of another picture if its own is damaged."""
        problem: BadPicture | None = None
        for candidate in self._candidates(index):
            if self._bad[candidate]:
                continue
            try:
                return to_tensor(cut(self.source.read(self.positions[candidate])))
            except BadPicture as error:
                problem = error
                self._note_bad(candidate, error)
        raise SmaltiError(
            f"{self.name(index)} is damaged, and no other picture of its class can replace it"
        ) from problem

    def _candidates(self, index: int) -> Iterator[int]:
        """A sample, then those of its class that follow it, around the split."""
        yield index
        same = (self.labels == self.labels[index]).nonzero().flatten()
        place = int(torch.searchsorted(same, index))
        yield from torch.cat([same[place + 1 :], same[:place]]).tolist()

    def _note_bad(self, index: int, error: BadPicture) -> None:
        """Count a damaged picture; raise if it may not be replaced."""
        limit = self.source.max_replaced
        if not limit:
            raise error
        if not self._bad[index]:
            logger.warning("replaced by another of its class: %s", error)
        self._bad[index] = True
        if self.num_replaced > limit:
            raise SmaltiError(
                f"{self.num_replaced} pictures are damaged, and --folder.max_bad_images allows "
                f"{limit}: look at them with smalti check-data"
            )

    def _decode_all(self, split: str) -> Tensor:
        """uint8 (N, 3, S, S); a progress bar appears if it takes long."""
        pixels = torch.empty(len(self), 3, self.image_size, self.image_size, dtype=torch.uint8)

        def decode(index: int) -> None:
            pixels[index] = self._decode(index)

        in_threads(decode, len(self), f"read {split} pictures")
        return pixels


# -------------------------------------------------------------------------------------------------
# Options that several commands share.


@dataclass(frozen=True)
class PictureOptions(SourceOptions):
    """Which pictures."""

    # emoji, fashion, a folder with one sub-folder of pictures per class, hf:owner/name, parquet or
    # arrow files, WebDataset shards (path/{000..009}.tar, or URLs), or arrays (.npz, .npy)
    data: str = "emoji"

    def source(self) -> ImageSource:
        """The pictures, not divided.

        Raises:
            SmaltiError: nothing opens `data`, or its pictures are unusable.
        """
        return open_source(
            self.data, options=self.folder, hf=self.hf, stream_cache=self.stream_cache
        )


@dataclass(frozen=True)
class DataOptions(PictureOptions):
    """Also: how they are divided."""

    heldout_fraction: float = 0.1  # kept from training; ignored where a set has a fixed split
    split_seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.heldout_fraction < 1:
            raise SmaltiError(
                f"heldout_fraction is {self.heldout_fraction}; it must lie between 0 and 1"
            )

    def dataset(
        self,
        split: Literal["train", "heldout", "all"],
        image_size: int,
        *,
        flip: bool = False,
        crop: RandomCrop | None = None,
        seed: int = 0,
    ) -> ImageDataset:
        """One split of the pictures, squared to image_size pixels; `flip` mirrors half of them,
        `crop` shows a random part of each."""
        return ImageDataset(
            self.source(),
            image_size,
            split=split,
            heldout_fraction=self.heldout_fraction,
            split_seed=self.split_seed,
            flip=flip,
            crop=crop,
            seed=seed,
        )
