"""Options that several commands share."""

from dataclasses import dataclass
from typing import Literal

from smalti.data.dataset import ImageDataset
from smalti.data.sources.base import ImageSource, SourceOptions, open_source
from smalti.data.transforms import RandomCrop
from smalti.errors import SmaltiError


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
