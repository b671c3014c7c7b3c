"""Training and held-out pictures from two sources: split folders, and `--heldout_data`.

Folders of pictures, and Hugging Face sets, tell their splits themselves. This is for all others:

    root/train/*.tar    root/val/*.tar     likewise arrays, parquet files, and saved data sets
    --data A --heldout_data B              of any kind each
"""

import logging
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from smalti.data.classes import SHOWN, class_number, shown
from smalti.data.sources.base import (
    HUGGING_FACE,
    SHARDS,
    ImageSource,
    SourceOptions,
    entry_of,
    fingerprint_of,
    open_verified,
)
from smalti.data.sources.listing import split_called
from smalti.data.sources.options import HuggingFaceOptions, ShardOptions
from smalti.errors import DataError

logger = logging.getLogger(__name__)


def open_heldout(spec: str, options: SourceOptions, train: ImageSource) -> ImageSource:
    """The held-out pictures that `spec` names, with the classes of the training pictures.

    Classes are matched by name: the labels are those of the table of `train`.

    Raises:
        DataError: no such set, or it has a class that the training pictures lack, no classes where
            they have some, or splits of its own.
    """
    try:
        source = open_verified(spec, _applicable(spec, options))
    except DataError as error:
        raise DataError(str(error).replace("check --data", "check --heldout_data")) from error
    if source.heldout is not None:
        raise DataError(
            f"{spec} has splits of its own: name the pictures of one, for example the sub-folder "
            "val, as --heldout_data"
        )
    if not train.classes:
        source.labels, source.classes = torch.zeros_like(source.labels), ()
        return source
    names = source.classes or source.only_class  # one class may be held out alone
    if not any(names) and train.classes != ("",):
        raise DataError(
            f"the held-out pictures of {spec} have no classes, and the training pictures have "
            f"{len(train.classes)}: put them into sub-folders with the names of these classes"
        )
    numbers = [class_number(name, train.classes) for name in names]
    present = set(source.labels.tolist())
    unknown = [names[i] for i in sorted(present) if numbers[i] is None]
    if unknown:
        raise DataError(
            f"{len(unknown)} classes of {spec} are not among the {len(train.classes)} of the "
            f"training pictures: {_named(unknown)}; rename or remove them"
        )
    table = torch.tensor([-1 if number is None else number for number in numbers])
    source.labels, source.classes = table[source.labels], train.classes
    found = set(source.labels.tolist())
    missing = [name for i, name in enumerate(train.classes) if i not in found]
    if missing:
        logger.warning(
            "%d of the %d classes have no held-out picture in %s: %s",
            *(len(missing), len(train.classes), spec, _named(missing)),
        )
    return source


def _applicable(spec: str, options: SourceOptions) -> SourceOptions:
    """The options, without those that are for another kind of set than `spec`."""
    entry = entry_of(spec)
    if not entry.startswith(HUGGING_FACE):
        cache = options.stream_cache if "://" in spec else None
        options = replace(options, hf=HuggingFaceOptions(), stream_cache=cache)
    return options if entry == SHARDS else replace(options, shards=ShardOptions())


def _named(classes: list[str]) -> str:
    return ", ".join(map(shown, classes[:SHOWN])) + (", ..." if len(classes) > SHOWN else "")


class SplitSource(ImageSource):
    """The pictures of two sources, of which those of the second are held out."""

    def __init__(self, train: ImageSource, heldout: ImageSource, remark: str) -> None:
        self.train, self.held = train, heldout
        self.classes = train.classes
        self.labels = torch.cat([train.labels, heldout.labels])
        self.heldout = torch.arange(len(self.labels)) >= len(train)
        self.has_captions = train.has_captions and heldout.has_captions
        self.captions_problem = train.captions_problem or heldout.captions_problem
        self.max_replaced = max(train.max_replaced, heldout.max_replaced)
        self.remarks = (remark, *train.remarks, *heldout.remarks)
        parts = (train.fingerprint, heldout.fingerprint)
        self.fingerprint = fingerprint_of([part.encode() for part in parts])

    def _at(self, index: int) -> tuple[ImageSource, int]:
        first = len(self.train)
        return (self.train, index) if index < first else (self.held, index - first)

    def read(self, index: int) -> Image.Image:
        source, row = self._at(index)
        return source.read(row)

    def name(self, index: int) -> str:
        source, row = self._at(index)
        return source.name(row)

    def group(self, index: int) -> str:
        source, row = self._at(index)
        return source.group(row)

    def captions(self, index: int) -> tuple[str, ...]:
        source, row = self._at(index)
        return source.captions(row)


def open_splits(spec: str, options: SourceOptions) -> SplitSource:
    """A folder whose sub-folders are splits, each of them a set that is not a folder of pictures.

    "train" is read; "validation", or else "test", is held out.

    Raises:
        DataError: there is no sub-folder for training, or two for the same split.
    """
    root = Path(spec).expanduser()
    folders: dict[str, Path] = {}
    for entry in sorted(root.iterdir()):
        split = split_called(entry.name) if entry.is_dir() else None
        if split in folders:
            raise DataError(f"{folders[split]} and {entry} are both {split}: merge them")
        if split is not None:
            folders[split] = entry
    held = next((split for split in ("validation", "test") if split in folders), None)
    if "train" not in folders or held is None:
        first = next(iter(folders.values()))
        raise DataError(
            f"{root} has the splits {', '.join(folders)}; to divide one into training and held-out "
            f"pictures, name it: --data {first}"
        )
    train = open_verified(str(folders["train"]), options)
    heldout = open_heldout(str(folders[held]), options, train)
    remark = (
        f"the folders of {root} are splits: {len(train)} pictures of train are read, "
        f"{len(heldout)} of {held} are held out"
    )
    unread = folders.keys() - {"train", held}
    remark += "".join(f", those of {split} are not read" for split in sorted(unread))
    logger.warning(remark)
    return SplitSource(train, heldout, remark)
