"""A split of a picture set as tensors of one size."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from smalti.data.images import ImageSource, fingerprint_of, heldout_mask
from smalti.data.order import Key
from smalti.data.transforms import center_crop, flips, to_float, to_tensor
from smalti.errors import SmaltiError

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

    A set whose decoded pixels fit into `MEMORY_LIMIT` is decoded once.

    Args:
        flip: mirror a sample or not, as a pure function of (seed, epoch, index).

    Raises:
        SmaltiError: a picture cannot be decoded, or the split is empty.
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
        seed: int = 0,
    ) -> None:
        if image_size < 8:
            raise SmaltiError(f"image_size is {image_size}; it must be at least 8 pixels")
        self.source, self.image_size, self.flip, self.seed = source, image_size, flip, seed
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
        fits = len(self) * 3 * image_size**2 <= MEMORY_LIMIT
        self._pixels = self._decode_all(split) if fits else None

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def __len__(self) -> int:
        return len(self.positions)

    def name(self, index: int) -> str:
        """What to call a sample in a message."""
        return self.source.name(self.positions[index])

    def __getitems__(self, keys: Sequence[Key]) -> ImageBatch:
        batch = self._batch([index for _, index in keys])
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

    def _batch(self, indices: Sequence[int]) -> ImageBatch:
        rows = torch.as_tensor(indices)
        if self._pixels is None:
            pixels = torch.stack([self._decode(index) for index in indices])
        else:
            pixels = self._pixels[rows]
        return ImageBatch(to_float(pixels), self.labels[rows], rows)

    def _decode(self, index: int) -> Tensor:
        return to_tensor(center_crop(self.source.read(self.positions[index]), self.image_size))

    def _decode_all(self, split: str) -> Tensor:
        """uint8 (N, 3, S, S); a progress bar appears if it takes long."""
        pixels = torch.empty(len(self), 3, self.image_size, self.image_size, dtype=torch.uint8)
        for index in tqdm(range(len(self)), desc=f"read {split} pictures", delay=2, leave=False):
            pixels[index] = self._decode(index)
        return pixels
