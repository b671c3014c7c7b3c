"""Sets of pictures that need not fit into memory.

A metric reads its pictures several times: for features, for neighbours, in each epoch of a
classifier. They are decoded once, to one byte per value, as every metric is one of 8-bit pictures.
A large set is kept in a temporary file that is mapped into memory, of which the system can take
back every page at any time.
"""

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from smalti.data.dataset import ImageDataset
from smalti.data.latents import to_float, to_levels
from smalti.errors import DataError

IN_MEMORY = 2**26  # bytes of a set; a larger one is kept in a file
DECODED_AT_ONCE = 64  # pictures
BLOCK = 2**27  # bytes, as floats, of the pictures that a comparison of all with all has in memory


class Images(Protocol):
    """Pictures (N, C, H, W) in [-1, 1]: a tensor, or `StoredImages`."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any, /) -> Tensor: ...

    def split(self, split_size: int, /) -> Iterable[Tensor]: ...


class StoredImages:
    """8-bit pictures that are converted to floats in [-1, 1] when a part of them is read.

    Args:
        levels: (N, C, H, W) uint8, in memory or mapped from a file.
    """

    def __init__(self, levels: Tensor) -> None:
        self.levels = levels

    def __len__(self) -> int:
        return len(self.levels)

    def __getitem__(self, rows: Any, /) -> Tensor:
        return to_float(self.levels[rows])

    def split(self, split_size: int, /) -> Iterator[Tensor]:
        """All pictures in order, in parts of `split_size`; the last part may be smaller."""
        return map(to_float, self.levels.split(split_size))

    @property
    def values_per_picture(self) -> int:
        """C H W."""
        return self.levels[0].numel()

    @property
    def per_block(self) -> int:
        """How many pictures a comparison of all with all reads at once."""
        return max(1, BLOCK // (4 * self.values_per_picture))


def stored(batches: Iterable[Tensor], folder: Path | None = None) -> StoredImages:
    """Pictures, rounded to 8 bits and kept without their floats.

    Args:
        batches: (B, C, H, W) in [-1, 1]; one is in memory at a time.
        folder: a set of more than `IN_MEMORY` bytes is kept in a temporary file there, which
            disappears with this process; None: in the system's folder for temporary files.

    Raises:
        DataError: there are no pictures, or a value is infinite or NaN.
        OSError: the file cannot be written, for example because the disk is full.
    """
    waiting: list[Tensor] = []
    file, count, shape = None, 0, torch.Size()
    for batch in batches:
        if not batch.isfinite().all():
            raise DataError(
                "the images have infinite or NaN values: use a model whose training did not diverge"
            )
        count, shape = count + len(batch), batch.shape[1:]
        waiting.append(to_levels(batch).byte().cpu())
        if count * shape.numel() > IN_MEMORY:
            file = file or tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  closed below
            for levels in waiting:
                file.write(levels.numpy().tobytes())
            waiting.clear()
    if file is None:
        if not count:
            raise DataError("there are no pictures to measure: check --data")
        return StoredImages(torch.cat(waiting))
    with file:
        file.flush()
        # Private pages: torch needs memory that it could write to.
        mapped = np.memmap(file, np.uint8, mode="c", shape=(count, *shape))
    return StoredImages(torch.from_numpy(mapped))


def as_stored(images: "Images") -> StoredImages:
    """Pictures as `StoredImages`; a tensor is rounded to 8 bits."""
    return images if isinstance(images, StoredImages) else stored(images.split(DECODED_AT_ONCE))


def stored_pictures(
    dataset: ImageDataset, rows: Tensor | None = None, folder: Path | None = None
) -> StoredImages:
    """The pictures of a data set, or those at `rows`, in order, not augmented.

    Those that the data set keeps decoded are not copied.
    """
    if dataset.levels is not None:
        return StoredImages(dataset.levels if rows is None else dataset.levels[rows])
    positions = range(len(dataset)) if rows is None else rows.tolist()
    batches = dataset.batches_of(positions, DECODED_AT_ONCE)
    return stored((batch.images for batch in batches), folder)
