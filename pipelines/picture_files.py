"""The files in which a job keeps its pictures: one for each, WebDataset shards, or one npz.

    000000.png  000001.png ...      png, webp or jpeg; or in a folder for each class
    shard-000000.tar ...            webdataset: members 000000.png and 000000.json for each picture
    samples.npz                     npz, as ADM's: arr_0 uint8 (N, H, W, 3), arr_1 int64 labels (N,)

Shards and the npz are packed when all their pictures are there; until then, each picture is kept
in a hidden place. So their bytes depend on the pictures alone, and a process that ends at any
moment loses none.
"""

import hashlib
import io
import json
import re
import struct
import tarfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo

import numpy as np
from PIL import Image

from smalti.data.generated import Row
from smalti.data.sources.webdataset import tar_writer, write_sample
from smalti.errors import ConfigurationError
from smalti.files import replacing, write_text

Layout = Literal["flat", "class"]
FormatName = Literal["png", "webp", "jpeg", "webdataset", "npz"]
Describe = Callable[[int], Row | None]  # the row of a picture; None if it is missing

SUFFIXES = {"png": ".png", "webp": ".webp", "jpeg": ".jpg"}
PICTURE = re.compile(r"(.+/)?\d{6,}\.(png|webp|jpg)")  # file of a picture, in any layout
JPEG_QUALITY = 95
PER_SHARD = 1000  # pictures
CLASSES = "classes.json"  # beside shards: the names of the numbered classes


@dataclass(frozen=True)
class PictureFormat:
    """The format of the pictures of a job.

    Args:
        name: png; webp, lossless unless a quality is given; jpeg; or all pictures in webdataset
            shards or in one npz.
        quality: of jpeg and of lossy webp, 1 to 100; None is 95 for jpeg.
        per_shard: pictures of a shard.
        image_size: (height, width) of the pictures in an npz.

    Raises:
        ConfigurationError: the format has no quality, or not this one.
    """

    name: FormatName = "png"
    quality: int | None = None
    per_shard: int = PER_SHARD
    image_size: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        if self.quality is None:
            return
        if self.name not in ("webp", "jpeg"):
            raise ConfigurationError(
                f"quality is {self.quality}, but {self.name} keeps pictures as they are: leave it "
                "out, or choose format jpeg or webp"
            )
        if not 1 <= self.quality <= 100:
            raise ConfigurationError(f"quality is {self.quality}; it must be 1 to 100")

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "PictureFormat":
        """The format that the settings of a job name; PNG in those of earlier versions."""
        size = settings.get("image_size", (0, 0))
        per_shard = settings.get("pictures_per_shard", PER_SHARD)
        name = settings.get("format", "png")
        return cls(name, settings.get("quality"), per_shard, (size[0], size[1]))

    @property
    def settings(self) -> dict[str, Any]:
        """What is stored of the format; nothing of PNG, as in earlier versions."""
        if self.name == "png":
            return {}
        found: dict[str, Any] = {"format": self.name}
        if self.quality is not None:
            found["quality"] = self.quality
        if self.name == "webdataset":
            found["pictures_per_shard"] = self.per_shard
        if self.name == "npz":
            found["image_size"] = list(self.image_size)
        return found

    def encode(self, image: Image.Image) -> bytes:
        """The content of the file of one picture."""
        stream = io.BytesIO()
        if self.name == "jpeg":
            image.save(stream, "JPEG", quality=self.quality or JPEG_QUALITY)
        elif self.name == "webp" and self.quality is None:
            image.save(stream, "WEBP", lossless=True, exact=True)
        elif self.name == "webp":
            image.save(stream, "WEBP", quality=self.quality)
        else:
            image.save(stream, "PNG")
        return stream.getvalue()

    def store(self, folder: Path, files: Mapping[int, str] | Sequence[str], count: int) -> "Store":
        """Where the pictures of a job in a folder are.

        Args:
            files: the file of each picture, where each has its own.
            count: the number of pictures.
        """
        if self.name == "webdataset":
            return Shards(folder, self, count)
        return Npz(folder, self, count) if self.name == "npz" else Files(folder, self, files)


def sha256_of_bytes(content: bytes) -> str:
    """The SHA-256 of some bytes, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def picture_names(
    labels: Sequence[int], classes: Sequence[str], layout: Layout, picture_format: PictureFormat
) -> list[str]:
    """The name of the file of each picture within the folder of a job."""
    suffix = SUFFIXES.get(picture_format.name, "")
    names = [f"{index:06d}{suffix}" for index in range(len(labels))]
    if layout == "flat":
        return names
    inside = class_folders(classes)
    return [f"{inside[label]}/{name}" for label, name in zip(labels, names, strict=True)]


def class_folders(classes: Sequence[str]) -> list[str]:
    """A name for the folder of each class: the name of the class, without what file systems do not
    allow; where two would be the same, their numbers are appended."""
    plain = [re.sub(r'[\x00-\x1f\x7f<>:"/\\|?*]', "_", name)[:60].strip(" .") for name in classes]
    counts = Counter(name.lower() for name in plain)
    return [
        name if name and counts[name.lower()] == 1 else f"{name} ({label})".strip()
        for label, name in enumerate(plain)
    ]


# -------------------------------------------------------------------------------------------------
# Where the pictures are


class Store(ABC):
    """Where the pictures of a job are. Any thread of any process may save a picture; one process
    calls `finish`."""

    beside: tuple[str, ...] = ()  # further files that it writes

    def __init__(self, folder: Path, picture_format: PictureFormat) -> None:
        self.folder, self.format = folder, picture_format

    @abstractmethod
    def place(self, index: int) -> dict[str, str]:
        """The file of a picture within the folder, and its member within the file."""

    @abstractmethod
    def stored(self, index: int) -> Iterator[bytes]:
        """What is stored as a picture: in its place, and where it waits to be packed."""

    @abstractmethod
    def save(self, index: int, image: Image.Image) -> str:
        """Store a picture, and return the SHA-256 of what is stored."""

    def find(self, index: int, sha256: str) -> bytes | None:
        """The stored picture with this hash."""
        return next((c for c in self.stored(index) if sha256_of_bytes(c) == sha256), None)

    def finish(self, describe: Describe, classes: Sequence[str] = ()) -> None:
        """Pack the pictures that are complete. A shard or npz that is up to date stays as it is."""
        del describe, classes  # a file of its own needs no packing

    def problems(self, describe: Describe) -> list[str]:
        """What is wrong with the files beside the pictures themselves."""
        return []

    def thumbnail(self, content: bytes) -> Image.Image | None:
        """A stored picture, where a page cannot refer to its file."""
        return None


class Files(Store):
    """A file for each picture."""

    def __init__(
        self, folder: Path, picture_format: PictureFormat, names: Mapping[int, str] | Sequence[str]
    ) -> None:
        super().__init__(folder, picture_format)
        self.names = names

    def place(self, index: int) -> dict[str, str]:
        return {"file": self.names[index]}

    def stored(self, index: int) -> Iterator[bytes]:
        return _content_of(self.folder / self.names[index])

    def save(self, index: int, image: Image.Image) -> str:
        return _write(self.folder / self.names[index], self.format.encode(image))


def _content_of(path: Path) -> Iterator[bytes]:
    if path.is_file():
        yield path.read_bytes()


def _write(path: Path, content: bytes) -> str:
    """Write a file atomically; return its SHA-256. Missing folders are created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(content)
    return sha256_of_bytes(content)


class Shards(Store):
    """WebDataset shards of a fixed number of pictures. A picture waits as a file in `.pictures/`
    until its shard is complete."""

    beside = (CLASSES,)

    def __init__(self, folder: Path, picture_format: PictureFormat, count: int) -> None:
        super().__init__(folder, picture_format)
        self.count, self.waiting = count, folder / ".pictures"
        self._listed: dict[int, dict[str, tuple[int, int]]] = {}

    def place(self, index: int) -> dict[str, str]:
        number = index // self.format.per_shard
        return {"file": f"shard-{number:06d}.tar", "member": f"{index:06d}.png"}

    def stored(self, index: int) -> Iterator[bytes]:
        yield from _content_of(self.waiting / f"{index:06d}.png")
        content = self._member(index, f"{index:06d}.png")
        if content is not None:
            yield content

    def save(self, index: int, image: Image.Image) -> str:
        return _write(self.waiting / f"{index:06d}.png", self.format.encode(image))

    def thumbnail(self, content: bytes) -> Image.Image | None:
        return Image.open(io.BytesIO(content), formats=("PNG",))

    def finish(self, describe: Describe, classes: Sequence[str] = ()) -> None:
        if classes:
            write_text(self.folder / CLASSES, json.dumps(list(classes), indent=2) + "\n")
        for indices in self._shards():
            rows = [row for index in indices if (row := describe(index)) is not None]
            if len(rows) < len(indices):
                continue  # a picture is missing
            waiting = [self.waiting / row["member"] for row in rows]
            if any(path.is_file() for path in waiting) or not self._is_packed(rows):
                self._pack(rows)
            for path in waiting:
                path.unlink(missing_ok=True)
        with suppress(OSError):
            self.waiting.rmdir()

    def problems(self, describe: Describe) -> list[str]:
        found = []
        for indices in self._shards():
            rows = [row for index in indices if (row := describe(index)) is not None]
            if not rows or any((self.waiting / row["member"]).is_file() for row in rows):
                continue  # not packed yet
            path = self.folder / rows[0]["file"]
            if path.is_file() and not self._is_packed(rows):
                found.append(f"{path} is not the shard that this job made")
        return found

    def _shards(self) -> Iterator[range]:
        """The pictures of each shard."""
        size = self.format.per_shard
        for first in range(0, self.count, size):
            yield range(first, min(first + size, self.count))

    def _pack(self, rows: Sequence[Row]) -> None:
        """Write the shard of some pictures."""
        path = self.folder / rows[0]["file"]
        with (
            replacing(path) as temporary,
            temporary.open("wb") as stream,
            tar_writer(stream) as archive,
        ):
            for row in rows:
                content = self.find(row["index"], row["sha256"])
                assert content is not None, "the manifest has a row for stored pictures only"
                write_sample(archive, f"{row['index']:06d}", {"png": content, "json": _about(row)})
        self._listed.clear()

    def _is_packed(self, rows: Sequence[Row]) -> bool:
        """Whether a shard has these pictures and no others, and their descriptions."""
        names = [f"{row['index']:06d}{suffix}" for row in rows for suffix in (".png", ".json")]
        if list(self._members(rows[0]["file"])) != names:
            return False
        return all(
            self._member(row["index"], f"{row['index']:06d}.json") == _about(row) for row in rows
        )

    def _member(self, index: int, name: str) -> bytes | None:
        file = self.place(index)["file"]
        offset, size = self._members(file).get(name, (0, -1))
        if size < 0:
            return None
        with (self.folder / file).open("rb") as stream:
            stream.seek(offset)
            return stream.read(size)

    def _members(self, file: str) -> dict[str, tuple[int, int]]:
        """Offset and size of each member of a shard; none of a shard that cannot be read."""
        number = int(Path(file).stem.removeprefix("shard-"))
        if number not in self._listed:
            self._listed[number] = {}
            with suppress(OSError, tarfile.TarError), tarfile.open(self.folder / file, "r:") as tar:
                self._listed[number] = {
                    member.name: (member.offset_data, member.size) for member in tar
                }
        return self._listed[number]


def _about(row: Row) -> bytes:
    """The description of a picture in a shard."""
    first = ("index", "class", "label", "prompt", "seed")
    of_files = ("file", "member", "sha256", "crc32")  # the last is of the line in the manifest
    others = [name for name in row if name not in (*first, *of_files)]
    return json.dumps({name: row[name] for name in (*first, *others) if name in row}).encode()


class Npz(Store):
    """One uncompressed npz of all pictures, as the evaluator of ADM (2105.05233, guided-diffusion)
    reads it. Its pictures wait in `.samples.rows`, each at its position; no more than one of them
    is held in memory."""

    def __init__(self, folder: Path, picture_format: PictureFormat, count: int) -> None:
        super().__init__(folder, picture_format)
        self.count, self.path, self.waiting = (
            count,
            folder / "samples.npz",
            folder / ".samples.rows",
        )
        self.shape = (*picture_format.image_size, 3)  # of a picture
        self.bytes = int(np.prod(self.shape))
        self._mapped: np.ndarray | None = None

    def place(self, index: int) -> dict[str, str]:
        return {"file": self.path.name}

    def stored(self, index: int) -> Iterator[bytes]:
        if self.waiting.is_file():
            with self.waiting.open("rb") as stream:
                stream.seek(index * self.bytes)
                content = stream.read(self.bytes)
            if len(content) == self.bytes:
                yield content
        rows = self._rows()
        if rows is not None and index < len(rows):
            yield rows[index].tobytes()

    def save(self, index: int, image: Image.Image) -> str:
        content = image.convert("RGB").tobytes()
        self.waiting.touch()
        with self.waiting.open("rb+") as stream:
            stream.seek(index * self.bytes)
            stream.write(content)
        return sha256_of_bytes(content)

    def thumbnail(self, content: bytes) -> Image.Image | None:
        return Image.fromarray(np.frombuffer(content, np.uint8).reshape(self.shape))

    def finish(self, describe: Describe, classes: Sequence[str] = ()) -> None:
        count, labels = self._recorded(describe)
        if count < self.count:
            return  # a picture is missing
        if self.waiting.is_file() or not self._is_packed(count, labels):
            self._pack(describe, labels)
        self.waiting.unlink(missing_ok=True)

    def problems(self, describe: Describe) -> list[str]:
        if self.waiting.is_file() or not self.path.is_file():
            return []  # not packed yet, or missing
        if self._is_packed(*self._recorded(describe)):
            return []
        return [f"{self.path} is not the file that this job made"]

    def _recorded(self, describe: Describe) -> tuple[int, np.ndarray | None]:
        """The number of pictures that have a row, and their labels (N,) int64; None without
        classes."""
        count, labels = 0, []
        for index in range(self.count):
            if (row := describe(index)) is not None:
                count += 1
                labels += [row["label"]] if "label" in row else []
        return count, np.array(labels, np.int64) if labels else None

    def _pack(self, describe: Describe, labels: np.ndarray | None) -> None:
        with replacing(self.path) as temporary, ZipFile(temporary, "w", ZIP_STORED) as archive:
            # ZipInfo without a date, so that equal pictures give equal bytes.
            with archive.open(ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
                shape = (self.count, *self.shape)
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(member, header)
                for index in range(self.count):
                    row = describe(index)
                    content = None if row is None else self.find(index, row["sha256"])
                    assert content is not None, "the manifest has a row for stored pictures only"
                    member.write(content)
            if labels is not None:
                with archive.open(ZipInfo("arr_1.npy"), "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, labels)
        self._mapped = None

    def _is_packed(self, count: int, labels: np.ndarray | None) -> bool:
        """Whether the npz has so many pictures, and these labels."""
        rows = self._rows()
        if rows is None or len(rows) != count:
            return False
        try:
            with np.load(self.path) as content:
                if set(content.files) != {"arr_0"} | ({"arr_1"} if labels is not None else set()):
                    return False
                return labels is None or bool(np.array_equal(content["arr_1"], labels))
        except (OSError, ValueError, BadZipFile):
            return False

    def _rows(self) -> np.ndarray | None:
        """The pictures (N, H, W, 3), mapped; None if there is no npz, or it cannot be read."""
        if self._mapped is None and self.path.is_file():
            with suppress(OSError, ValueError, KeyError, BadZipFile, struct.error):
                found = _mapped_array(self.path, "arr_0.npy")
                if found.dtype == np.uint8 and found.shape[1:] == self.shape:
                    self._mapped = found
        return self._mapped


def _mapped_array(path: Path, name: str) -> np.ndarray:
    """An array in an uncompressed npz, mapped into memory.

    Raises:
        ValueError: it is compressed, or not an array of this kind. Others mean damage, too.
    """
    with ZipFile(path) as archive:
        member = archive.getinfo(name)
    if member.compress_type != ZIP_STORED:
        raise ValueError(f"{name} in {path} is compressed")
    with path.open("rb") as stream:
        stream.seek(member.header_offset + 26)  # the lengths of two fields of varying length
        stream.seek(sum(struct.unpack("<HH", stream.read(4))), io.SEEK_CUR)
        np.lib.format.read_magic(stream)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
        if fortran:
            raise ValueError(f"{name} in {path} is in Fortran's order")
        return np.memmap(path, dtype, "r", stream.tell(), shape)
