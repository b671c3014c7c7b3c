"""Files of a set on disk: found by a pattern, counted where they are passed over.

A pipe or a device is never opened: reading one may never end.
"""

import errno
import math
import os
import re
import reprlib
import stat
from collections import Counter
from dataclasses import dataclass, field
from glob import escape, glob
from pathlib import Path
from typing import Any, BinaryIO

from smalti.errors import DataError

# Suffixes of the picture files that are read.
EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
MAX_KINDS = 10  # that a message names
MAX_SHOWN = 300  # letters of a name that a message shows
SPECIAL = "pipe or device"  # kinds of files that are passed over, beside their suffixes
HIDDEN = "hidden"
UNNAMED = "without suffix"


@dataclass
class PassedOver:
    """What is not read: how many files of each kind, and the name of the first."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, kind: str, name: str) -> None:
        """Count a file."""
        self.counts[kind] += 1
        self.first.setdefault(kind, printable(name))

    def merge(self, other: "PassedOver") -> None:
        """Add what was passed over elsewhere."""
        self.counts += other.counts
        self.first = other.first | self.first

    @property
    def total(self) -> int:
        """How many files are passed over."""
        return self.counts.total()

    def __str__(self) -> str:
        kinds = sorted(self.counts)
        named = [f"{self.counts[kind]} {kind} ({self.first[kind]})" for kind in kinds[:MAX_KINDS]]
        return ", ".join(named) + (", ..." if len(kinds) > MAX_KINDS else "")


def printable(text: str) -> str:
    """A text for a message: long ones shortened, control characters and the like as escapes."""
    text = text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."
    return text if text.isprintable() else ascii(text)[1:-1]


def kind_of(name: str) -> str:
    """The kind of a file by its name: its suffix, `HIDDEN` or `UNNAMED`."""
    name = name.rpartition("/")[2]
    return HIDDEN if name.startswith(".") else Path(name).suffix.lower() or UNNAMED


def is_picture(path: Path) -> bool:
    """Whether a file has the suffix of a picture that is read."""
    return path.suffix.lower() in EXTENSIONS


def is_special(path: Path) -> bool:
    """Whether it is a pipe, a device or a socket."""
    try:
        mode = path.stat().st_mode
    except OSError:  # a dangling link, which is named when it is opened
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def open_file(path: Path) -> BinaryIO:
    """A file.

    Raises:
        OSError: there is none, or it is a pipe or a device.
    """
    if is_special(path):
        raise OSError(errno.EINVAL, "a pipe or a device, not a file")
    return path.open("rb")


# -- Files that a row of a table names ------------------------------------------------------------

MAX_ROW_BYTES = 2**31  # of a file that a row names
MAX_PATH = 4096  # characters; a longer text in a column of pictures is something else
# A file of a repository, or one in a zip file there. A longer chain, file:///etc/x::hf://..., could
# lead anywhere.
PART = "(?:(?!::).)*"
ON_HUB = f"(?:zip://{PART}::)?hf://datasets/{{}}[@/]{PART}"


@dataclass(frozen=True)
class RowFiles:
    """Where the files are that rows may name instead of containing their pictures.

    A row is data from anywhere: it must not make this machine read a file that is not the set's.
    """

    folders: tuple[Path, ...]  # of the set, and those into which `datasets` unpacks it
    repository: str = ""  # on the Hub, "owner/name", if the set is there

    def picture(self, value: Any, place: str) -> bytes:
        """The bytes of a picture in a row: a value of a column of pictures.

        Raises:
            OSError: the row has no picture, or names a file that is not the set's.
        """
        parts = value if isinstance(value, dict) else {}
        content = value if isinstance(value, bytes) else parts.get("bytes")
        if content is not None:
            return content
        path = value if isinstance(value, str) else parts.get("path")
        if not path:
            raise FileNotFoundError(f"{place} holds no picture")
        return self.read(path)

    def read(self, name: str) -> bytes:
        """The content of a file of the set; relative names are relative to its first folder.

        Raises:
            OSError: it is not a file of the set, or cannot be read.
        """
        if self.repository and re.fullmatch(ON_HUB.format(re.escape(self.repository)), name):
            return _read_remote(name)
        if len(name) > MAX_PATH or "\0" in name or not self._contain(name):
            raise OSError(
                f"it has {reprlib.repr(name)} instead of the bytes of a picture, which is not a "
                "file in the folder of the set: store the bytes"
            )
        with open_file(self._absolute(name)) as stream:
            size = os.fstat(stream.fileno()).st_size
            if size > MAX_ROW_BYTES:
                raise OSError(errno.EFBIG, f"{size} bytes, more than {MAX_ROW_BYTES}")
            return stream.read()

    def _absolute(self, name: str) -> Path:
        return Path(os.path.abspath(os.path.join(self.folders[0], name)))

    def _contain(self, name: str) -> bool:
        path = self._absolute(name)
        return any(path.is_relative_to(os.path.abspath(folder)) for folder in self.folders)


def _read_remote(name: str) -> bytes:
    """The content of a file on the Hub."""
    import fsspec

    try:
        with fsspec.open(name, "rb") as stream:
            return stream.read()  # type: ignore[union-attr]
    except OSError:
        raise
    except Exception as error:  # of a damaged zip file, for example
        raise OSError(f"{reprlib.repr(name)}: {error}") from error


# -- Patterns: {000..009}, {a,b}, *, ? and [...] --------------------------------------------------

BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")
MAX_SHARDS = 1_000_000


def split_pattern(pattern: Path) -> tuple[Path, str]:
    """The part of a path that exists, whatever brackets and braces are in it, and the rest."""
    literal = next((path for path in (pattern, *pattern.parents) if path.exists()), Path())
    rest = str(pattern.relative_to(literal))
    return literal, "" if rest == "." else rest


def matching(pattern: Path) -> list[Path]:
    """The files and folders that a pattern with *, ? and [...] names, sorted.

    Brackets in the name of a folder or a file that exists are part of its name, and so are those
    that match nothing.
    """
    literal, rest = split_pattern(pattern)
    if not rest:
        return [literal]
    for names in (rest, rest.replace("[", "[[]")):
        if found := glob(os.path.join(escape(str(literal)), names)):
            return sorted(map(Path, found))
    return []


def expand_braces(pattern: str) -> list[str]:
    """All names that a pattern with {a,b} and {000..009} expands to.

    They are counted first, because `braceexpand` builds every range in memory.

    Raises:
        DataError: braces with neither a list nor an ascending range, or too many names.
    """
    from braceexpand import braceexpand

    count = math.prod(_num_alternatives(body, pattern) for body in BRACES.findall(pattern))
    if count > MAX_SHARDS:
        raise DataError(f"{pattern} expands to {count} files; use at most {MAX_SHARDS}")
    if re.search(r"[{}]", BRACES.sub("", pattern)):
        raise DataError(f"the braces in {pattern} are nested or unbalanced: write simple ones")
    return list(braceexpand(pattern, escape=False))


def _num_alternatives(body: str, pattern: str) -> int:
    if found := RANGE.fullmatch(body):
        first, last = map(int, found.groups())
        if last < first:
            raise DataError(f"{{{body}}} in {pattern} is a descending range: swap its ends")
        return last - first + 1
    if "," in body:
        return body.count(",") + 1
    raise DataError(
        f"{{{body}}} in {pattern} is neither a range like {{000..009}} nor a list like {{a,b}}"
    )


# -- Names of splits ------------------------------------------------------------------------------

# Names of folders that are splits, as `datasets` knows them.
SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


WORDS = re.compile(r"[-._ 0-9]+")  # what divides a file name into words


def split_called(name: str) -> str | None:
    """The split that a name means: "train", "validation" or "test"."""
    return next((s for s, names in SPLIT_FOLDERS.items() if name.casefold() in names), None)


def split_word(name: str) -> str:
    """The word of a file name that means a split, as "val" in set-val-000.tar; "" if none does."""
    return next((word for word in WORDS.split(name) if split_called(word)), "")
