"""Options that several commands share."""

from dataclasses import dataclass, field
from typing import Literal

from smalti.data.dataset import ImageDataset
from smalti.data.folder import FolderOptions
from smalti.data.images import open_source


@dataclass(frozen=True)
class DataOptions:
    """Which pictures, and how they are divided."""

    data: str = "emoji"  # emoji, fashion, or a folder with one sub-folder of pictures per class
    heldout_fraction: float = 0.1  # kept from training; ignored where a set has a fixed split
    split_seed: int = 0
    folder: FolderOptions = field(default_factory=FolderOptions)

    def dataset(
        self,
        split: Literal["train", "heldout", "all"],
        image_size: int,
        *,
        flip: bool = False,
        seed: int = 0,
    ) -> ImageDataset:
        """One split of the pictures, squared to image_size pixels; `flip` mirrors half of them."""
        return ImageDataset(
            open_source(self.data, options=self.folder),
            image_size,
            split=split,
            heldout_fraction=self.heldout_fraction,
            split_seed=self.split_seed,
            flip=flip,
            seed=seed,
        )
