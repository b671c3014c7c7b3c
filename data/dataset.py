"""A split of a picture set as tensors of one size, and the options that choose it.

`ImageDataset` is indexed with keys (epoch, index), of which augmentation is a pure function: the
same keys give the same batch in any process, whatever was read before.
"""

import dataclasses
import logging
import math
import mmap
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from smalti.checkpoints import is_checkpoint, state_of
from smalti.config import ImageSize, config_from_dict, saved_fields
from smalti.data.buckets import Bucket
from smalti.data.classes import class_number
from smalti.data.image_io import TRANSPARENT, WHITE, to_channels
from smalti.data.latent_cache.manifest import SPLITS, training_cache
from smalti.data.latents import as_image_size, height_and_width, resolution, to_float
from smalti.data.order import Blocks, Key, even_subset
from smalti.data.sources.base import (
    BadPicture,
    ImageSource,
    SourceOptions,
    fingerprint_of,
    heldout_mask,
    measured_range,
    open_verified,
)
from smalti.data.sources.splits import SplitSource, open_heldout
from smalti.data.sources.verification import in_threads
from smalti.data.transforms import (
    RandomCrop,
    center_crop,
    crop_uniforms,
    flips,
    random_crop,
    to_tensor,
)
from smalti.errors import ConfigurationError, DataError
from smalti.files import read_hashed_json, write_hashed_json
from smalti.repository import local_folder

logger = logging.getLogger(__name__)

MEMORY_LIMIT = 2 * 2**30  # bytes; a set whose uint8 pixels fit into this is kept decoded

Split = Literal["train", "heldout", "all"]


def kept(source: ImageSource, split: Split, fraction: float, seed: int) -> Tensor:
    """Which pictures of a source are of a split, (N,) bool; for the arguments see
    `ImageDataset`."""
    if split == "all":
        return torch.ones(len(source), dtype=torch.bool)
    heldout = heldout_mask(source, fraction, seed)
    return heldout if split == "heldout" else ~heldout


@dataclass
class ImageBatch:
    """Images as a tokenizer takes them."""

    images: Tensor  # (B, C, H, W) float in [-1, 1]
    labels: Tensor  # (B,) int64
    indices: Tensor  # (B,) int64, positions in the data set
    captions: list[tuple[str, ...]] | None = None  # of each picture, where the set has captions


class ImageDataset(Dataset):
    """One split of a source as images of one size. Index with keys (epoch, index).

    A set whose decoded pixels fit into `MEMORY_LIMIT` is decoded once, unless it is cropped at
    random. If the source allows it, a damaged picture is replaced by the next one of its class in
    the split, so that every batch has its full size.

    Args:
        image_size: pixels: the side of squares, or (height, width).
        channels: 3 for RGB, 1 for grey, 4 for RGB and alpha; the source must keep alpha for that.
        flip: mirror half of the samples, chosen by (seed, epoch, index).
        crop: show a part of each sample, chosen by (seed, epoch, index); None = its centre.
        captions: batches have the captions, if the source has any.
        bucket: only the pictures that go to this one of several sizes; None: all.

    Raises:
        DataError: a picture cannot be decoded, or more are damaged than may be replaced.
    """

    def __init__(
        self,
        source: ImageSource,
        image_size: ImageSize,
        *,
        channels: int = 3,
        split: Split = "all",
        heldout_fraction: float = 0.1,
        split_seed: int = 0,
        flip: bool = False,
        crop: RandomCrop | None = None,
        seed: int = 0,
        captions: bool = True,
        bucket: Bucket | None = None,
    ) -> None:
        image_size = as_image_size(image_size)
        height, width = height_and_width(image_size)
        if min(height, width) < 8:
            what = image_size if height == width else resolution(image_size)
            raise ConfigurationError(f"image_size is {what}; it must be at least 8 pixels")
        self.source, self.image_size = source, image_size
        self.shape = (channels, height, width)  # of an image
        self.flip, self.crop, self.seed = flip, crop, seed
        self.has_captions = captions and source.has_captions
        keep = kept(source, split, heldout_fraction, split_seed)
        if bucket is not None:
            keep = keep & bucket.keeps(source.sizes)
        self.positions = keep.nonzero().flatten().tolist()  # in the source
        self.classes = source.classes
        self.labels = source.labels[keep]
        which = ",".join(map(str, self.positions))
        form = str(height) if height == width else f"{height}x{width}"
        form += "" if channels == 3 else f"/{channels}"
        self.fingerprint = fingerprint_of(
            [source.fingerprint.encode(), form.encode(), which.encode()]
        )
        # Which samples were found to be damaged; shared with the worker processes of a loader. The
        # memory is anonymous: torch's shared tensors need /dev/shm even if there are no workers.
        self._bad = torch.frombuffer(mmap.mmap(-1, max(1, len(self))), dtype=torch.bool)
        fits = len(self) * math.prod(self.shape) <= MEMORY_LIMIT
        self._pixels = self._decode_all(split) if fits and crop is None else None

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def num_replaced(self) -> int:
        """Number of damaged samples that were found and replaced so far."""
        return int(self._bad.sum())

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def groups(self) -> list[str]:
        """The group of each sample, see `ImageSource.group`."""
        return [self.source.group(position) for position in self.positions]

    @property
    def levels(self) -> Tensor | None:
        """All samples as uint8 (N, C, H, W), if they are kept decoded."""
        return self._pixels

    @property
    def blocks(self) -> Blocks | None:
        """The blocks in which samples are read; None if each is read by itself, or all are kept
        decoded."""
        whole = self.source.blocks if self._pixels is None else None
        return None if whole is None else whole.part(self.positions)

    @property
    def decoded_bytes(self) -> int:
        """Bytes of a sample in a batch, if pictures are decoded for it; 0 if all are decoded."""
        return 0 if self._pixels is not None else math.prod(self.shape) * 4

    def name(self, index: int) -> str:
        """The name of a sample in messages."""
        return self.source.name(self.positions[index])

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of a sample, see `ImageSource.captions`; those of the picture that replaces
        it, if it is damaged and was read."""
        used = next((i for i in self._candidates(index) if not self._bad[i]), index)
        return self.source.captions(self.positions[used])

    @property
    def captions_fingerprint(self) -> str:
        """A hash of the captions of all samples. (`fingerprint` does not depend on them.)"""
        texts = ("\n".join(self.captions(index)) for index in range(len(self)))
        return fingerprint_of([text.encode() for text in texts])

    # -- Batches --

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
        yield from self.batches_of(range(start, stop), batch_size)

    def batches_of(self, indices: Sequence[int], batch_size: int) -> Iterator[ImageBatch]:
        """Some samples in order, not augmented; decoded in threads."""
        for first in range(0, len(indices), batch_size):
            yield self._batch(indices[first : first + batch_size], threads=True)

    def number_as(self, classes: Sequence[str]) -> bool:
        """Number the classes in another order, that of a pipeline for example; return whether both
        tables have the same names. (In another Unicode form, names are sorted differently.)"""
        numbers = [class_number(name, classes) for name in self.classes]
        if sorted(n for n in numbers if n is not None) != list(range(len(classes))):
            return False
        if not numbers:
            return True
        self.labels, self.classes = torch.tensor(numbers)[self.labels], tuple(classes)
        return True

    def even_subset(self, count: int, seed: int) -> list[int]:
        """At most `count` samples, evenly over classes and groups, to measure or show."""
        return even_subset(self.labels, self.groups, count, seed)

    def all_images(self) -> Tensor:
        """Every sample in order, not augmented: (N, C, H, W) float in [-1, 1].

        For sets that fit into memory four times over; `batches` reads any set.
        """
        return torch.cat([batch.images for batch in self.batches(512)])

    def _batch(self, indices: Sequence[int], *, threads: bool = False) -> ImageBatch:
        rows = torch.as_tensor(indices)
        if self._pixels is not None:
            pixels = self._pixels[rows]
        elif threads:
            decoded = in_threads(lambda n: self._decode(indices[n]), len(indices), "read pictures")
            pixels = torch.stack(decoded)
        else:
            pixels = torch.stack([self._decode(index) for index in indices])
        return self._as_batch(pixels, rows)

    def _as_batch(self, pixels: Tensor, rows: Tensor) -> ImageBatch:
        captions = [self.captions(index) for index in rows.tolist()] if self.has_captions else None
        return ImageBatch(to_float(pixels), self.labels[rows], rows, captions)

    def _cropped(self, keys: Sequence[Key]) -> ImageBatch:
        rows = torch.tensor([index for _, index in keys])
        pixels = torch.stack([self._decode_crop(*key) for key in keys])
        return self._as_batch(pixels, rows)

    # -- Decoding, and the replacement of damaged pictures --

    def _decode(self, index: int) -> Tensor:
        return self._cut(index, lambda image: center_crop(image, self.image_size))

    def _decode_crop(self, epoch: int, index: int) -> Tensor:
        assert self.crop is not None
        limits, uniforms = self.crop, crop_uniforms(self.seed, epoch, index)
        return self._cut(index, lambda image: random_crop(image, self.image_size, limits, uniforms))

    def _cut(self, index: int, cut: Callable[[Image.Image], Image.Image]) -> Tensor:
        """A sample, or its replacement if it is damaged, cut to its size: uint8 (C, H, W)."""
        problem: BadPicture | None = None
        for candidate in self._candidates(index):
            if self._bad[candidate]:
                continue
            try:
                picture = self.source.read(self.positions[candidate])
                return to_tensor(cut(to_channels(picture, self.shape[0])))
            except BadPicture as error:
                problem = error
                self._record_bad(candidate, error)
        raise DataError(
            f"{self.name(index)} is damaged, and no other picture of its class can replace it"
        ) from problem

    def _candidates(self, index: int) -> Iterator[int]:
        """A sample, then the others of its class from there on, then those before it."""
        yield index
        same = (self.labels == self.labels[index]).nonzero().flatten()
        place = int(torch.searchsorted(same, index))
        yield from torch.cat([same[place + 1 :], same[:place]]).tolist()

    def _record_bad(self, index: int, error: BadPicture) -> None:
        """Count a damaged picture; raise if it may not be replaced."""
        limit = self.source.max_replaced
        if not limit:
            raise error
        if not self._bad[index]:
            logger.warning("replaced by another of its class: %s", error)
        self._bad[index] = True
        if self.num_replaced > limit:
            raise DataError(
                f"{self.num_replaced} pictures are damaged, and --folder.max_bad_images allows "
                f"{limit}: list them with smalti check-data"
            )

    def _decode_all(self, split: str) -> Tensor:
        """uint8 (N, C, H, W); a progress bar appears if it takes long."""
        pixels = torch.empty(len(self), *self.shape, dtype=torch.uint8)

        def decode(index: int) -> None:
            pixels[index] = self._decode(index)

        in_threads(decode, len(self), f"read {split} pictures")
        return pixels


# -- Options of the commands that read pictures ---------------------------------------------------


@dataclass(frozen=True)
class PictureOptions(SourceOptions):
    """Which pictures to read."""

    # emoji, fashion, a folder of pictures (with one sub-folder per class, or without classes),
    # hf:owner/name, parquet or arrow files, WebDataset shards (path/{000..009}.tar, or URLs), or
    # arrays (.npz, .npy)
    data: str = "emoji"

    # The field that names a trained model: on the command line, the options of its pictures are the
    # defaults, see `stored_defaults`. "": none does.
    TRAINED: ClassVar[str] = ""

    @classmethod
    def stored_defaults(cls, given: Callable[[str], Any]) -> dict[str, Any]:
        """The options of the pictures that the command's model was trained on, by field.

        Empty if it is not known, or if the command names other pictures.

        Args:
            given: the value of a field on the command line or in the recipe, None if there is none.

        Raises:
            SmaltiError: the file of the options is damaged.
        """
        defaults: dict[str, Any] = {part.name: part.default for part in dataclasses.fields(cls)}
        model = given(cls.TRAINED) or defaults.get(cls.TRAINED)
        stored = read_options(Path(model).expanduser()) if isinstance(model, str | Path) else None
        if stored is None or not _same_place(str(given("data") or stored.data), stored.data):
            return {}
        kept = {name: getattr(stored, name) for name in STORED if name in defaults}
        return {**kept, "data": stored.data}

    def note_stored(self) -> None:
        """Log which options are those of the model's training, and which contradict them."""
        model = getattr(self, self.TRAINED)
        stored = read_options(Path(model).expanduser())
        if stored is None:
            return
        if not _same_place(self.data, stored.data):
            logger.info(
                "%s was trained on %s, and these are pictures of %s: its options of the data are "
                "not used",
                model,
                stored.data,
                self.data,
            )
            return
        ours, theirs, usual = (
            _leaves({name: getattr(options, name) for name in STORED if hasattr(options, name)})
            for options in (self, stored, DataOptions())
        )
        same = [f"{k} {v}" for k, v in theirs.items() if ours.get(k) == v != usual.get(k)]
        if same:
            logger.info("pictures are read as in the training of %s: %s", model, ", ".join(same))
        for name in sorted(theirs.keys() & ours.keys()):
            if ours[name] != theirs[name]:
                shown = [value if value != "" else '""' for value in (ours[name], theirs[name])]
                logger.warning("%s is %s; %s was trained with %s", name, shown[0], model, shown[1])

    def for_channels(self, channels: int) -> Self:
        """These options for images of so many channels: with 4, alpha is kept.

        Raises:
            ConfigurationError: the background does not fit.
        """
        background = self.folder.background
        if channels != 4 and background == TRANSPARENT:
            raise ConfigurationError(
                f"folder.background is {TRANSPARENT}, but the tokenizer has {channels} "
                "image_channels: give a colour, or train a tokenizer with 4"
            )
        if channels != 4 or background == TRANSPARENT:
            return self
        if background != WHITE:
            raise ConfigurationError(
                f"folder.background is {background}, but a tokenizer with 4 image_channels keeps "
                "alpha: leave out --folder.background"
            )
        folder = dataclasses.replace(self.folder, background=TRANSPARENT)
        return dataclasses.replace(self, folder=folder)

    def source(self) -> ImageSource:
        """All pictures, before they are divided into splits.

        Raises:
            DataError: no source opens `data`, or its pictures cannot be used.
        """
        return open_verified(self.data, self)


@dataclass(frozen=True)
class DataOptions(PictureOptions):
    """Which pictures to read, and how to divide them into training and held-out pictures."""

    # Pictures to hold out, of any kind that --data takes; their classes are matched by name. Empty:
    # the held-out split of the set, if it has one, or else a part of the pictures.
    heldout_data: str = ""
    heldout_fraction: float = 0.1  # of the pictures; ignored where a set has its own split
    split_seed: int = 0  # decides which pictures are held out

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.heldout_fraction < 1:
            raise ConfigurationError(
                f"heldout_fraction is {self.heldout_fraction}; it must lie between 0 and 1"
            )

    def sources(self) -> list[ImageSource]:
        """Every set that is read: that of `data`, and of `heldout_data` if it is given.

        Raises:
            DataError: as `source_of`.
        """
        heldout = [self.source_of("heldout")[0]] if self.heldout_data else []
        return [self.source(), *heldout]

    def source_of(
        self, split: Split, whole: ImageSource | None = None
    ) -> tuple[ImageSource, Split]:
        """The source of a split, and what to read of it. (What the training pictures are, and so
        their fingerprint, does not depend on the held-out pictures of another source.)

        Args:
            whole: the set of `data`, if it is open already.

        Raises:
            DataError: the pictures cannot be used, or the held-out ones do not fit the others.
        """
        source = whole or self.source()
        if self.heldout_data and split != "all":
            if split == "heldout":
                limits = measured_range(self.data, self)  # those of the training pictures
                options = dataclasses.replace(self, value_range=limits)
                return open_heldout(self.heldout_data, options, source), "all"
            split = "all" if source.heldout is None else "train"
        if isinstance(source, SplitSource) and split != "all":
            return source.train if split == "train" else source.held, "all"
        return source, split

    def opened(self, channels: int = 3) -> dict[Split, tuple[ImageSource, Split]]:
        """What `source_of` returns for both splits; a set that they share is opened once.

        Raises:
            DataError: as `source_of`.
        """
        options = self.for_channels(channels)
        whole = options.source()
        return {split: options.source_of(split, whole) for split in SPLITS}

    def dataset(
        self,
        split: Split,
        image_size: ImageSize,
        *,
        channels: int = 3,
        flip: bool = False,
        crop: RandomCrop | None = None,
        seed: int = 0,
        captions: bool = True,
        bucket: Bucket | None = None,
        opened: tuple[ImageSource, Split] | None = None,
    ) -> ImageDataset:
        """One split of the pictures; for the arguments see `ImageDataset`.

        Args:
            opened: what `source_of` returned, where several data sets read it; see `opened`.
        """
        source, part = opened or self.for_channels(channels).source_of(split)
        return ImageDataset(
            source,
            image_size,
            channels=channels,
            split=part,
            heldout_fraction=self.heldout_fraction,
            split_seed=self.split_seed,
            flip=flip,
            crop=crop,
            seed=seed,
            captions=captions,
            bucket=bucket,
        )


@dataclass(frozen=True)
class TrainingPictures(DataOptions):
    """Which pictures to train on, and how they are augmented."""

    flip: bool = True  # mirror each training image with probability 1/2
    crop: Literal["centre", "random"] = "centre"  # of training images
    random_crop: RandomCrop = field(default_factory=RandomCrop)  # ADM's; for --crop random

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.crop == "centre" and self.random_crop != RandomCrop():
            raise ConfigurationError(
                "random_crop was given, but crop is centre: add --crop random, or leave it out"
            )

    def training_and_heldout(
        self, image_size: ImageSize, channels: int, seed: int, *, captions: bool = True
    ) -> tuple[ImageDataset, ImageDataset]:
        """The training images, cropped and mirrored at random as configured, and the held-out
        images as they are.

        Args:
            seed: of the augmentation.
        """
        crop = self.random_crop if self.crop == "random" else None
        read: dict[str, Any] = {"channels": channels, "captions": captions}
        train, heldout = self.opened(channels).values()
        augmented: dict[str, Any] = {"flip": self.flip, "crop": crop, "seed": seed}
        images = self.dataset("train", image_size, opened=train, **augmented, **read)
        return images, self.dataset("heldout", image_size, opened=heldout, **read)


# -- Options that are stored with what was made from the pictures ---------------------------------

OPTIONS = "pictures.json"  # beside a tokenizer or a latent cache
# All but `stream_cache`, which is a place on one machine.
STORED = (
    *("folder", "hf", "shards", "value_range", "caption_column", "label_column"),
    *("heldout_data", "heldout_fraction", "split_seed"),
)


def write_options(folder: Path, options: DataOptions) -> None:
    """Store which pictures a tokenizer was trained on, or a cache encoded from, and how they were
    read and divided."""
    for place in (options.data, options.heldout_data):
        if "://" in place and ("@" in place or "?" in place):
            return  # a URL with a password or a key, which a shared model must not tell
    content = {name: saved_fields(getattr(options, name)) for name in ("data", *STORED)}
    content["value_range"] = saved_fields(measured_range(options.data, options))
    write_hashed_json(folder / OPTIONS, content)


def read_options(model: Path) -> DataOptions | None:
    """The options that `write_options` stored with a tokenizer, a cache or the tokenizer of a
    pipeline, or those of the run that a checkpoint belongs to; None if there are none.

    Raises:
        SmaltiError: the file is damaged, or was edited.
    """
    model = local_folder(model)
    for path in (model / OPTIONS, model / "tokenizer" / OPTIONS):
        if path.is_file():
            return config_from_dict(DataOptions, read_hashed_json(path), str(path))
    run = state_of(model).get("config") if is_checkpoint(model) else None
    if not isinstance(run, dict):
        return None
    if run.get("latents") and not run.get("data"):  # of a prior, which reads no pictures
        return read_options(training_cache(Path(str(run["latents"]))))
    known = {name: run[name] for name in ("data", *STORED) if name in run}
    return config_from_dict(DataOptions, known, str(model)) if known.get("data") else None


def _same_place(one: str, other: str) -> bool:
    """Whether two values of --data name the same pictures."""
    first, second = (os.path.abspath(os.path.expanduser(data)) for data in (one, other))
    return first == second


def _leaves(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Options and options within them, by dotted name."""
    leaves: dict[str, Any] = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(value):
            leaves |= _leaves(vars(value), f"{prefix}{name}.")
        else:
            leaves[f"{prefix}{name}"] = value
    return leaves
