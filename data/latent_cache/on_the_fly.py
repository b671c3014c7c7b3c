"""Latents without a cache: pictures are decoded, augmented and encoded for each batch.

This takes the place of a latent cache where the augmentation has no end, as with random crops, or
where a set is seen once. Worker processes decode the pictures; the tokenizer, which is on the
device of the training process, encodes them there.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from smalti.data.dataset import ImageBatch, ImageDataset
from smalti.data.latent_cache.buckets import BucketedLatents
from smalti.data.latent_cache.cache import LatentBatch, LatentCache, choice
from smalti.data.latent_cache.manifest import CacheInfo
from smalti.data.latents import LatentSpec
from smalti.data.loader import stream_batches
from smalti.data.order import DataOrder, Key

ENCODED_AT_ONCE = 64  # pictures


@dataclass
class OnTheFlyLatents:
    """The latents of a picture set, with the interface of `LatentCache`.

    The augmentation and the caption of a sample are pure functions of (seed, epoch, index), as the
    view of a cached one. Latents are those that a cache stores, in single precision, and up to the
    rounding of the encoder, which may depend on the size of the batch.
    """

    images: ImageDataset  # augmented with a seed of its own
    info: CacheInfo  # of the cache that would hold the pictures as they are
    store: Callable[[Tensor], Tensor]  # images (B, C, H, W) -> latents, see `Tokenizer.store`
    device: torch.device  # where `store` takes its images
    place: str  # the value of --data, for messages
    # By name, the conditions (B, ...) of images (B, C, H, W) with keys (epoch, index)
    conditions: Callable[[Tensor, Sequence[Key]], Mapping[str, Tensor]] = lambda images, keys: {}

    @property
    def spec(self) -> LatentSpec:
        return self.info.spec

    @property
    def buckets(self) -> tuple[tuple[int, int], ...]:
        """The grids of several buckets: these latents have one grid."""
        return ()

    @property
    def classes(self) -> tuple[str, ...]:
        return self.images.classes

    @property
    def num_classes(self) -> int:
        return len(self.images.classes)

    @property
    def labels(self) -> Tensor:
        """(N,) int64."""
        return self.images.labels

    @property
    def fingerprint(self) -> str:
        """Hash of the pictures and of the tokenizer."""
        return hashlib.sha256(f"on the fly/{self.info.identity()}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, keys: Sequence[Key]) -> LatentBatch:
        return self._encoded(_Decoding(self.images).__getitems__(keys))

    def first_view(self, indices: Sequence[int]) -> LatentBatch:
        """Some samples, not augmented, with their first captions."""
        (batch,) = self.images.batches_of(indices, len(indices))
        return self._encoded(_to_encode(batch, [(0, i) for i in indices], [0] * len(indices)))

    def batches_of(self, indices: Sequence[int], size: int) -> Iterator[LatentBatch]:
        """Some samples in order, as `first_view` gives them, at most `size` at a time."""
        for start in range(0, len(indices), size):
            yield self.first_view(indices[start : start + size])

    def even_subset(self, count: int, seed: int) -> list[int]:
        """At most `count` samples, evenly over classes and groups, to measure."""
        return self.images.even_subset(count, seed)

    def all_captions(self, indices: Sequence[int]) -> list[tuple[str, ...]] | None:
        """The texts of some samples; None if the pictures have none."""
        if not self.images.has_captions:
            return None
        return [self.images.captions(index) for index in indices]

    def order(self, batch_size: int, seed: int) -> DataOrder:
        """The order of training, in the blocks in which the pictures are read, if they are."""
        return DataOrder(len(self), batch_size, seed, self.images.blocks)

    def batches(self, order: DataOrder, **share: Any) -> Iterator[list[LatentBatch]]:
        """The batches of each step in this process; for `share` see `stream_batches`."""
        for step in stream_batches(_Decoding(self.images), order, **share):
            yield [self._encoded(batch) for batch in step]

    @torch.no_grad()
    def _encoded(self, batch: LatentBatch) -> LatentBatch:
        assert batch.epochs is not None
        keys = list(zip(batch.epochs.tolist(), batch.indices.tolist(), strict=True))
        stored, conditions = [], dict[str, list[Tensor]]()
        for start in range(0, len(keys), ENCODED_AT_ONCE):
            part = slice(start, start + ENCODED_AT_ONCE)
            images = batch.stored[part].to(self.device)
            stored.append(self.store(images))
            for name, rows in self.conditions(images, keys[part]).items():
                conditions.setdefault(name, []).append(rows)
        found = {name: torch.cat(rows) for name, rows in conditions.items()}
        return replace(batch, stored=torch.cat(stored), conditions=found)


Latents = LatentCache | BucketedLatents | OnTheFlyLatents  # that a prior can be trained on


class _Decoding:
    """What the worker processes do: keys -> a batch with images, still to be encoded."""

    def __init__(self, images: ImageDataset) -> None:
        self.images, self.decoded_bytes = images, images.decoded_bytes

    def __getitems__(self, keys: Sequence[Key]) -> LatentBatch:
        batch = self.images.__getitems__(keys)
        counts = [len(texts) for texts in batch.captions or [()] * len(keys)]
        pairs = zip(keys, counts, strict=True)
        shown = [choice("caption", self.images.seed, k, n) for k, n in pairs]
        return _to_encode(batch, keys, shown)


def _to_encode(batch: ImageBatch, keys: Sequence[Key], shown: Sequence[int]) -> LatentBatch:
    """A batch whose latents are still images.

    Args:
        shown: the caption that each sample has.
    """
    chosen = None if batch.captions is None else torch.tensor(shown)
    epochs = torch.tensor([epoch for epoch, _ in keys])
    return LatentBatch(
        batch.images, batch.labels, batch.indices, batch.captions, chosen, epochs=epochs
    )
