"""Rows of parquet files, read where the files are: on this disk, at a URL, or on the Hub.

A row group is compressed as a whole, so it is the least that can be read. An order that jumps
between all rows would read a row group for each picture. The order of such a set is therefore made
of blocks (`Blocks`): row groups are shuffled, and so are the rows of a few of them together, which
are kept in memory meanwhile. The package `datasets` would write a copy of all rows first.
"""

import importlib
import io
import logging
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

import torch

from smalti.data.order import Blocks
from smalti.data.sources.annotations import captions_of
from smalti.data.sources.base import EncodedPictures, SourceOptions
from smalti.data.sources.columns import (
    Columns,
    datasets_library,
    find_columns,
    guarded,
    labels_of,
)
from smalti.data.sources.listing import RowFiles
from smalti.data.sources.remote import RemoteFile
from smalti.data.sources.verification import in_threads
from smalti.errors import DataError

logger = logging.getLogger(__name__)

MIXED_BYTES = 2**28  # of pictures in the row groups that are shuffled together
MAX_GROUP_BYTES = 2**30  # of pictures in one row group


@dataclass(frozen=True)
class RowGroup:
    """Rows that are compressed together."""

    file: int
    number: int  # in the file
    rows: int
    packed_bytes: int  # of its column of pictures, as stored
    bytes: int  # of that column in memory


class ParquetFiles:
    """Parquet files on this disk or at URLs, and their row groups.

    Raises:
        DataError: a file is damaged, or not there.
    """

    def __init__(self, names: Sequence[str | Path]) -> None:
        self.places = in_threads(lambda file: _place(str(names[file])), len(names), "find files")
        footer: Any = importlib.import_module("pyarrow.parquet").read_metadata  # without types
        self.footers = in_threads(
            lambda file: self._with(file, footer), len(names), "list row groups"
        )

    def schema(self, file: int) -> Any:
        """The columns of a file and their arrow types."""
        return self.footers[file].schema.to_arrow_schema()

    def groups(self, column: str) -> list[RowGroup]:
        """All row groups that have rows, in order, with the sizes of a column."""
        found = []
        for file, footer in enumerate(self.footers):
            for number in range(footer.num_row_groups):
                group = footer.row_group(number)
                chunks = [group.column(n) for n in range(group.num_columns)]
                own = [c for c in chunks if c.path_in_schema.partition(".")[0] == column]
                packed = sum(chunk.total_compressed_size for chunk in own)
                size = sum(chunk.total_uncompressed_size for chunk in own)
                found.append(RowGroup(file, number, group.num_rows, packed, size))
        return [group for group in found if group.rows]

    def read(self, group: RowGroup, columns: Sequence[str]) -> Any:
        """Columns of a row group, as an arrow table. Safe in several threads and processes."""
        parquet: Any = importlib.import_module("pyarrow.parquet")
        footer = self.footers[group.file]

        def read(stream: BinaryIO) -> Any:
            opened = parquet.ParquetFile(stream, metadata=footer)
            return opened.read_row_group(group.number, list(columns), use_threads=False)

        return self._with(group.file, read)

    def _with(self, file: int, read: Callable[[BinaryIO], Any]) -> Any:
        place = self.places[file]

        def work() -> Any:
            with place.open("rb") as stream:
                return read(stream)

        return guarded(str(place), work)


def _place(name: str) -> Path | RemoteFile:
    """A local file, or one at a URL."""
    return RemoteFile.find(name, Path(os.devnull)) if "://" in name else Path(name)


class KeptColumn:
    """One column by row groups, of which those that were used last are kept in memory."""

    def __init__(
        self, files: ParquetFiles, groups: Sequence[RowGroup], column: str, kept: int
    ) -> None:
        self.files, self.groups, self.column, self.kept = files, groups, column, kept
        self._start()

    def _start(self) -> None:
        self._lock = Lock()
        self._kept: OrderedDict[int, Future[Any]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:  # a worker process reads its own
        return {name: value for name, value in vars(self).items() if name[0] != "_"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start()

    def values(self, number: int) -> Any:
        """The values in a row group; of several threads that need them at once, one reads."""
        with self._lock:
            future = self._kept.get(number)
            is_new = future is None
            if future is None:
                future = self._kept[number] = Future()
            self._kept.move_to_end(number)
            while len(self._kept) > self.kept:
                self._kept.popitem(last=False)
        if is_new:
            group = self.groups[number]
            try:
                future.set_result(self.files.read(group, [self.column]).column(0))
            except BaseException as error:
                with self._lock:
                    self._kept.pop(number, None)
                future.set_exception(error)
        return future.result()


class ParquetPictures(EncodedPictures):
    """The rows of parquet files, in the order of `datasets`.

    Args:
        rows: the files with the pictures to divide; if there are others in `heldout`, all are for
            training.
        heldout: the files with the held-out pictures.
        files: the files that rows may name.
        features: the columns as the set's card describes them; None: as the files do.

    Raises:
        DataError: the columns cannot be determined, or hold no pictures or labels; or a row group
            has more than `MAX_GROUP_BYTES`.
    """

    def __init__(
        self,
        title: str,
        rows: Sequence[str | Path],
        heldout: Sequence[str | Path],
        options: SourceOptions,
        files: RowFiles,
        features: Any = None,
    ) -> None:
        self.title, self._files = title, files
        parquet = ParquetFiles([*rows, *heldout])
        columns = self._columns_in(parquet, len(rows), options, features)
        groups = parquet.groups(columns.image)
        for_training = _first_of(
            [group for group in groups if group.file < len(rows)], options.hf.max_samples
        )
        self._groups = for_training + [group for group in groups if group.file >= len(rows)]
        if not self._groups:
            raise DataError(f"{title} holds no pictures: check --data and --hf.split")
        self._first_rows = [0, *accumulate(group.rows for group in self._groups)]
        if heldout:
            first = self._first_rows[len(for_training)]
            self.heldout = torch.arange(self._first_rows[-1]) >= first
        largest = max(self._groups, key=lambda group: group.bytes)
        _refuse_large(parquet, largest)
        mixed = min(len(self._groups), max(1, MIXED_BYTES // max(1, largest.bytes)))
        sizes = torch.tensor([group.rows for group in self._groups])
        self.blocks = Blocks(torch.arange(len(sizes)).repeat_interleave(sizes), mixed)
        kept = mixed + 1  # where two turns meet, threads read the last group and the next
        self._images = KeptColumn(parquet, self._groups, columns.image, kept)
        self._texts = None
        if columns.captions:
            self._texts = KeptColumn(parquet, self._groups, columns.captions, kept)
            self.captions_from = f'the column "{columns.captions}"'
        self._read_annotations(parquet, columns)
        logger.info(
            "%s is read in place: %d row groups of up to %.3g MB, of which %d at a time are "
            "shuffled together",
            *(title, len(self._groups), largest.bytes / 1e6, mixed),
        )

    def _columns_in(
        self, parquet: ParquetFiles, for_training: int, options: SourceOptions, features: Any
    ) -> Columns:
        """The columns of pictures, labels and captions, which all files must have."""
        schemas = [parquet.schema(file) for file in range(len(parquet.places))]
        features = features or datasets_library().Features.from_arrow_schema(schemas[0])
        columns = find_columns(self.title, features, options)
        if not _may_hold_pictures(schemas[0].field(columns.image).type):
            raise DataError(
                f'the column "{columns.image}" holds no pictures: name another in --hf.image_column'
            )
        heldout = schemas[for_training:]
        if columns.captions and any(columns.captions not in schema.names for schema in heldout):
            self.captions_problem = (
                f'the column "{columns.captions}" is not in the held-out split of {self.title}'
            )
            columns = replace(columns, captions=None)
        for place, schema in zip(parquet.places, schemas, strict=True):
            for column in filter(None, (columns.image, columns.label, columns.captions)):
                if column not in schema.names:
                    raise DataError(f'{place} has no column "{column}", and other files have it')
        return columns

    def _read_annotations(self, parquet: ParquetFiles, columns: Columns) -> None:
        """The labels of all rows, and which have captions."""
        wanted = [name for name in (columns.label, columns.captions) if name]

        def read(number: int) -> tuple[list[Any], list[bool]]:
            group = self._groups[number]
            table = parquet.read(group, wanted).slice(0, group.rows)
            texts = table[columns.captions].to_pylist() if columns.captions else []
            values = table[columns.label].to_pylist() if columns.label else [None] * group.rows
            return values, [bool(captions_of(text)) for text in texts]

        found = in_threads(read, len(self._groups), "read labels") if wanted else []
        values = [value for labels, _ in found for value in labels]
        unlabelled = [None] * self._first_rows[-1]
        self.classes, self.labels = labels_of(self.title, values or unlabelled, columns)
        if columns.captions:
            self.captioned = torch.tensor([has for _, texts in found for has in texts])

    def _value(self, column: KeptColumn, index: int) -> Any:
        number = bisect_right(self._first_rows, index) - 1
        return column.values(number)[index - self._first_rows[number]].as_py()

    def open(self, index: int) -> BinaryIO:
        return io.BytesIO(self._files.picture(self._value(self._images, index), self.place(index)))

    def size(self, index: int) -> int:  # it is not known before the row group is read
        value = self._value(self._images, index)
        content = value.get("bytes") if isinstance(value, dict) else value
        return len(content) if isinstance(content, bytes) else 0

    def identities(self, rows: Sequence[int]) -> list[str]:
        numbers = [bisect_right(self._first_rows, row) - 1 for row in rows]
        packed = [self._groups[number].packed_bytes for number in numbers]
        return [f"{size}/{self.name(row)}" for size, row in zip(packed, rows, strict=True)]

    def name(self, index: int) -> str:
        return f"row {index}"

    def captions(self, index: int) -> tuple[str, ...]:
        return () if self._texts is None else captions_of(self._value(self._texts, index))


def _first_of(groups: list[RowGroup], limit: int) -> list[RowGroup]:
    """The groups with the first `limit` rows, of the last one only a part; 0 = all."""
    before = accumulate((group.rows for group in groups), initial=0)
    return [
        replace(group, rows=min(group.rows, limit - first)) if limit else group
        for group, first in zip(groups, before, strict=False)
        if not limit or first < limit
    ]


def _refuse_large(parquet: ParquetFiles, largest: RowGroup) -> None:
    """Raise `DataError` if the largest row group does not fit into memory a few times."""
    if largest.bytes > MAX_GROUP_BYTES:
        raise DataError(
            f"row group {largest.number} of {parquet.places[largest.file]} has "
            f"{largest.bytes / 1e9:.3g} GB of pictures, and is read as a whole: write the file "
            "with about 100 rows per group (row_group_size=100 in pyarrow.parquet.write_table), or "
            "pass --stream_cache FOLDER for a copy"
        )


def _may_hold_pictures(kind: Any) -> bool:
    """Whether values of an arrow type are bytes, paths, or a struct of these as in `datasets`."""
    types: Any = importlib.import_module("pyarrow.types")  # without types
    if types.is_struct(kind):
        return "bytes" in {field.name for field in kind}
    simple = (types.is_binary, types.is_large_binary, types.is_string, types.is_large_string)
    return any(is_kind(kind) for is_kind in simple)
