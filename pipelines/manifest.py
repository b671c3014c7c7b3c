"""Writing and checking the records of a generation job, see `data/generated.py`."""

import io
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from PIL import Image

from smalti.data.generated import (
    INDEX,
    MANIFEST,
    PART,
    SETTINGS,
    Row,
    manifest_parts,
    recorded_rows,
)
from smalti.files import append_line, read_hashed_json, write_lines
from smalti.pipelines.contact_sheet import SHEET, write_contact_sheet
from smalti.pipelines.picture_files import (
    PICTURE,
    PictureFormat,
    Store,
    sha256_of_bytes,
)

logger = logging.getLogger(__name__)


class Manifest:
    """The pictures of a job, each known by its hash.

    A process notes the row of each picture that it wrote in a file of its own; the main process
    joins them at the end. So a picture without a hash was written by a process that was killed, or
    by smalti 0.1.0, which kept no hashes.

    Args:
        store: where the pictures are.
        conditions: the seed, and the class or prompt, of a picture, for its row.
    """

    def __init__(
        self, store: Store, count: int, conditions: Callable[[int], Row], rank: int
    ) -> None:
        self.store, self.count, self.rank = store, count, rank
        self.folder = store.folder
        self._conditions, self._part = conditions, self.folder / PART.format(rank)
        self._hashes = self._recorded()
        self._has_hashes = any(
            (self.folder / name).is_file() for name in (MANIFEST, INDEX)
        ) or bool(self._hashes)

    def _recorded(self) -> dict[int, str]:
        rows, damaged = recorded_rows(self.folder)
        for problem in damaged:
            logger.warning("%s: what it records is generated again", problem)
        return {index: row["sha256"] for index, row in rows.items()}

    def has(self, index: int) -> bool:
        """Whether picture `index` is there, and is the one that was written."""
        known = self._hashes.get(index)
        if known is None and self._has_hashes:
            return False
        found = next(self.store.stored(index), None)
        if found is None:
            return False
        if known is None:
            is_complete = _is_complete(found)
            if is_complete:
                self.note(index, sha256_of_bytes(found))
            return is_complete
        if sha256_of_bytes(found) == known or self.store.find(index, known) is not None:
            return True
        logger.warning(
            "%s is not the picture that this job wrote: it is generated again",
            place_of(self.folder, index, self.store.place(index)),
        )
        return False

    def note(self, index: int, sha256: str) -> None:
        """Record the hash of a picture that was stored."""
        self._hashes[index] = sha256
        append_line(self._part, self._row(index, sha256))

    def row(self, index: int) -> Row | None:
        """The row of a picture; None if it is missing."""
        return self._row(index, self._hashes[index]) if index in self._hashes else None

    def _row(self, index: int, sha256: str) -> Row:
        given = self._conditions(index)
        first = {"index": index, "seed": given["seed"], **self.store.place(index)}
        return {**first, **given, "sha256": sha256}

    def rows(self) -> Iterator[Row]:
        """The rows of the pictures that are there."""
        return (row for index in range(self.count) if (row := self.row(index)) is not None)

    def finish(self, title: str, classes: Sequence[str]) -> None:
        """In the first process: pack the pictures, write the manifest and the contact sheet of all,
        and name the files that are none of them."""
        if self.rank:
            return
        self._hashes |= {i: h for i, h in self._recorded().items() if i < self.count}
        self.store.finish(self.row, classes)
        write_lines(self.folder / MANIFEST, self.rows())
        write_contact_sheet(self.folder / SHEET, title, self.rows, self.store)
        for old in (*manifest_parts(self.folder), self.folder / INDEX):
            old.unlink(missing_ok=True)
        foreign = foreign_files(self.folder, self.store, (row["file"] for row in self.rows()))
        if foreign:
            logger.warning(
                "%s holds %d files that this job did not write, for example %s",
                self.folder,
                len(foreign),
                foreign[0],
            )


def place_of(folder: Path, index: int, place: Row) -> str:
    """The location of a picture, for messages."""
    if "member" in place:
        return f"{folder / place['file']}: {place['member']}"
    one = PICTURE.fullmatch(place["file"])
    return f"{folder / place['file']}" if one else f"{folder / place['file']}: picture {index}"


def problems_in(folder: Path) -> list[str]:
    """What is wrong with the pictures of a job: each that is missing or changed, and other files.

    While pictures are missing, one without a hash is no other file: a process that was killed may
    have written it, and smalti 0.1.0 recorded no hashes. The job judges it when it goes on.
    """
    settings = read_hashed_json(folder / SETTINGS)
    rows, problems = recorded_rows(folder)
    if problems and not rows:
        return problems
    store = store_in(folder, settings, rows)
    for index, row in sorted(rows.items()):
        if next(store.stored(index), None) is None:
            missing = folder / row["file"]
            where = place_of(folder, index, row) if missing.is_file() else missing
            problems.append(f"{where} is missing")
        elif store.find(index, row["sha256"]) is None:
            problems.append(
                f"{place_of(folder, index, row)} is not the picture that this job wrote"
            )
    problems += store.problems(rows.get)
    others = foreign_files(folder, store, (row["file"] for row in rows.values()))
    if len(rows) < len(settings["labels"]):
        others = [name for name in others if not PICTURE.fullmatch(name)]
    problems += [f"{folder / name} was not written by this job" for name in others]
    return list(dict.fromkeys(problems))


def store_in(folder: Path, settings: Row, rows: dict[int, Row]) -> Store:
    """Where the pictures of a job are, from its record."""
    files = {index: row["file"] for index, row in rows.items()}
    return PictureFormat.of(settings).store(folder, files, len(settings["labels"]))


def foreign_files(folder: Path, store: Store, names: Iterator[str]) -> list[str]:
    """The files below a folder that are neither pictures of its job nor its records."""
    own = {SETTINGS, MANIFEST, INDEX, SHEET, *store.beside, *names}
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    visible = (path for path in found if not any(part.startswith(".") for part in path.parts))
    return sorted({path.as_posix() for path in visible} - own)


def _is_complete(content: bytes) -> bool:
    """Whether a file is a complete PNG: one that was truncated later is generated again."""
    try:
        with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
            image.verify()
        return True
    except Exception:  # decoders raise many kinds of errors
        return False
