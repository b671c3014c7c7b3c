"""Captions and labels in files beside the pictures of a folder.

metadata.jsonl, metadata.csv    the convention of Hugging Face's ImageFolder: each row names a
                                picture, relative to the folder of the file, in `file_name`; the
                                other columns describe it; several rows may name the same picture
cat.txt                         the captions of cat.png, one per line
"""

import csv
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smalti.config import nearest
from smalti.data.sources.annotations import (
    CAPTION_COLUMNS,
    LABEL_COLUMNS,
    MAX_CAPTION_BYTES,
    captions_in,
    captions_of,
    label_of,
)
from smalti.data.sources.listing import open_file, printable
from smalti.errors import DataError

METADATA = ("metadata.jsonl", "metadata.csv")
CLASSES = "classes.json"  # the names of classes, where labels are numbers
TEXT = ".txt"
FILE_NAME = "file_name"


def may_annotate(path: Path) -> bool:
    """Whether a file has the name of one that annotates pictures."""
    return path.name in (*METADATA, CLASSES) or path.suffix.lower() == TEXT


# -- Text files -----------------------------------------------------------------------------------


def text_files(pictures: Iterable[Path], files: Iterable[Path]) -> dict[Path, Path]:
    """The text file beside each picture that has one."""
    texts = {file.with_suffix(""): file for file in files if file.suffix.lower() == TEXT}
    named = ((path, texts.get(path.with_suffix(""))) for path in pictures)
    return {path: text for path, text in named if text is not None}


def read_text_file(path: Path) -> tuple[str, ...]:
    """The captions in a text file.

    Raises:
        DataError: it cannot be read, is not UTF-8, or holds none.
    """
    try:
        with open_file(path) as stream:
            content = stream.read(MAX_CAPTION_BYTES + 1)
        if len(content) > MAX_CAPTION_BYTES:
            raise ValueError(f"it has more than {MAX_CAPTION_BYTES} bytes: shorten it")
        found = captions_in(content)
    except (OSError, ValueError) as error:
        raise DataError(f"the captions in {path}: {error}") from error
    if not found:
        raise DataError(f"{path} holds no caption: write one into it")
    return found


# -- Metadata files -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Row:
    """What a line of a metadata file says about a picture."""

    file: Path
    line: int
    values: Mapping[str, Any]

    @property
    def place(self) -> str:
        """Where the row is, for messages."""
        return f"{self.file}, line {self.line}"


@dataclass
class Metadata:
    """The rows of all metadata files of a folder, by picture.

    Only columns that may hold captions or labels are kept.
    """

    rows: dict[Path, list[Row]] = field(default_factory=dict)
    columns: list[str] = field(default_factory=list)

    def column(self, wanted: str, usual: Iterable[str], option: str) -> str:
        """The column that an option names, or else the first of the usual ones; "" if there is
        none of them.

        Raises:
            DataError: there is no column of the name that was given.
        """
        if wanted and wanted not in self.columns:
            raise DataError(
                f'no metadata.jsonl or metadata.csv has a column "{wanted}" (--{option}); '
                f"{nearest(wanted, self.columns)}"
            )
        return wanted or next((name for name in usual if name in self.columns), "")

    def captions(self, column: str) -> dict[Path, tuple[str, ...]]:
        """The captions of each picture that is named.

        Raises:
            DataError: a row has none; the message names its line.
        """
        return {
            path: tuple(text for row in rows for text in _captions_in_row(row, column))
            for path, rows in self.rows.items()
        }

    def labels(self, column: str) -> dict[Path, int | str]:
        """The label of each picture that is named.

        Raises:
            DataError: a row has none, or two rows differ; the message names the line.
        """
        found: dict[Path, int | str] = {}
        for path, rows in self.rows.items():
            for row in rows:
                try:
                    label = label_of(row.values.get(column))
                except ValueError as error:
                    raise DataError(f'{row.place}, "{column}": {error}') from error
                if found.setdefault(path, label) != label:
                    raise DataError(
                        f"{row.place}: {printable(path.name)} has the label {label!r}, and "
                        f"{found[path]!r} in line {rows[0].line}: keep one of them"
                    )
        return found


def _captions_in_row(row: Row, column: str) -> tuple[str, ...]:
    try:
        found = captions_of(row.values.get(column))
    except ValueError as error:
        raise DataError(f'{row.place}, "{column}": {error}') from error
    if not found:
        raise DataError(f'{row.place}: "{column}" is empty: write a caption, or remove the line')
    return found


def read_metadata(
    root: Path, files: Iterable[Path], pictures: Iterable[Path], keep: Iterable[str]
) -> Metadata:
    """The rows of metadata files.

    Args:
        files: all files that may annotate pictures, see `may_annotate`.
        pictures: the pictures that may be named.
        keep: columns to keep, beside the usual ones of captions and labels.

    Raises:
        DataError: a file cannot be read, has no column `file_name`, or names a picture that does
            not exist; two files describe the same picture; the message names the file and the line.
    """
    metadata = Metadata()
    known = {os.path.normpath(path): path for path in pictures}
    kept = {*keep, *CAPTION_COLUMNS, *LABEL_COLUMNS}
    files = sorted(file for file in files if file.name in METADATA)
    for file in files:
        other = file.with_name(METADATA[0])
        if file != other and other in files:
            raise DataError(f"{other} and {file.name} are both there: remove one of them")
        for row in _rows_of(file):
            path = _picture_of(root, row, known)
            rows = metadata.rows.setdefault(path, [])
            if rows and rows[0].file != file:
                raise DataError(
                    f"{row.place}: {printable(path.name)} is also in {rows[0].place}: describe it "
                    "in one file"
                )
            values = {name: value for name, value in row.values.items() if name in kept}
            rows.append(Row(file, row.line, values))
            metadata.columns += [name for name in row.values if name not in metadata.columns]
    return metadata


def _picture_of(root: Path, row: Row, known: Mapping[str, Path]) -> Path:
    """The picture that a row names."""
    name = row.values.get(FILE_NAME)
    if not isinstance(name, str) or not name:
        has = ", ".join(map(printable, row.values)) or "nothing"
        raise DataError(f'{row.place} has no "{FILE_NAME}" (it has {has}): add it')
    place = os.path.normpath(row.file.parent / name)
    if place not in known:
        inside = Path(place).is_relative_to(os.path.normpath(root))
        exists = inside and "\0" not in name and os.path.exists(place)
        wrong = "which is not a picture that is read" if exists else "which does not exist"
        raise DataError(
            f"{row.place} names {printable(name)}, {wrong}: remove the line, or add the picture"
        )
    return known[place]


def _rows_of(file: Path) -> Iterator[Row]:
    """The rows of a metadata file.

    Raises:
        DataError: a line cannot be read.
    """
    read = _json_rows if file.suffix == ".jsonl" else _csv_rows
    try:
        with open_file(file) as stream:
            yield from read(file, stream)
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error}): restore or remove it") from error


def _lines_of(file: Path, lines: Iterable[bytes]) -> Iterator[str]:
    """Decoded lines.

    Raises:
        DataError: a line is not UTF-8.
    """
    for number, line in enumerate(lines, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{file}, line {number} is not UTF-8: save the file as UTF-8"
            ) from error


def _json_rows(file: Path, lines: Iterable[bytes]) -> Iterator[Row]:
    for number, line in enumerate(_lines_of(file, lines), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file}, line {number} is not JSON ({error}): correct it") from error
        if not isinstance(values, dict):
            raise DataError(f'{file}, line {number} is not an object, {{"{FILE_NAME}": ...}}')
        yield Row(file, number, values)


def _csv_rows(file: Path, lines: Iterable[bytes]) -> Iterator[Row]:
    reader = csv.DictReader(_lines_of(file, lines), strict=True)
    try:
        header = reader.fieldnames or []
        if FILE_NAME not in header:
            has = ", ".join(map(printable, header)) or "nothing"
            raise DataError(f'{file} has no column "{FILE_NAME}" (it has {has}): add it')
        for values in reader:
            if None in values or None in values.values():
                raise DataError(
                    f"{file}, line {reader.line_num} does not have the {len(header)} values of the "
                    'header: put values with commas into "..."'
                )
            yield Row(file, reader.line_num, values)
    except csv.Error as error:
        raise DataError(
            f"{file}, line {reader.reader.line_num} is not CSV ({error}): correct it"
        ) from error
