"""Files behind a URL of which parts are read, without a copy.

A server that answers range requests (RFC 9110, section 14) gives random access: once the positions
of all samples in a shard are known, each of them is one request, and the order of the data is the
same as on a local copy.
"""

import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from smalti.data.sources.download import (
    ABSENT,
    ATTEMPTS,
    STORES,
    TIMEOUT,
    check_scheme,
    file_name,
    parent_of,
)
from smalti.errors import ConfigurationError, DataError

T = TypeVar("T")

SKIPPED = 2**20  # bytes: a shorter gap is read and dropped, a longer one is another request
NO_RANGES = "its server does not send parts of files: pass --stream_cache FOLDER for a copy"


@dataclass(frozen=True)
class RemoteFile:
    """A file behind a URL. It is opened like a path; every `open` is independent of the others, so
    several threads and processes may read at once."""

    url: str
    length: int  # bytes
    version: str  # what the server says of its content: an entity tag, or a time of change
    beside: Path  # a local folder with copies of what stands beside it: manifest, classes.json

    @classmethod
    def find(cls, url: str, beside: Path) -> "RemoteFile":
        """Ask for the length and the version of a file.

        Raises:
            ConfigurationError: a URL scheme that is not supported.
            DataError: there is no such file, or its server does not send parts of files.
        """
        check_scheme(url)
        length, version = _attempts(url, lambda: _describe(url))
        return cls(url, length, version, beside)

    @property
    def name(self) -> str:
        """The name of the file."""
        return file_name(self.url)

    @property
    def parent(self) -> Path:
        """The local folder of what stands beside it."""
        return self.beside

    @property
    def place(self) -> str:
        """Its folder, for messages: without user name, password and query."""
        return parent_of(self.url)

    def __str__(self) -> str:
        return f"{self.place}/{self.name}"

    def open(self, mode: str = "rb") -> BinaryIO:
        """The content, from which the parts that are read are fetched."""
        assert mode == "rb"
        return io.BufferedReader(self.raw())

    def raw(self) -> "RemoteReader":
        """The content without a buffer."""
        return RemoteReader(self)

    def part(self, offset: int, size: int) -> bytes:
        """`size` bytes from a position on, in one request.

        Raises:
            DataError: they cannot be fetched, or the file has changed.
        """

        def fetch() -> bytes:
            with _from(self, offset, offset + size) as stream:
                content = stream.read(size)
            if len(content) != size:
                raise OSError(f"{len(content)} of {size} bytes arrived")
            return content

        return _attempts(self.url, fetch) if size else b""


class RemoteReader(io.RawIOBase):
    """Reads on from wherever it was moved to: one long answer, until a move is far or backwards."""

    def __init__(self, file: RemoteFile) -> None:
        self.file = file
        self.position = 0
        self._stream: Any = None
        self._at = 0  # the position of the stream

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.file.length}[whence]
        self.position = max(0, start + offset)
        return self.position

    def readinto(self, buffer: Any, /) -> int:
        size = min(len(buffer), max(0, self.file.length - self.position))
        if size == 0:
            return 0
        content = _attempts(self.file.url, lambda: self._read(size))
        buffer[: len(content)] = content
        self.position += len(content)
        return len(content)

    def close(self) -> None:
        self._drop()
        super().close()

    def _read(self, size: int) -> bytes:
        try:
            gap = self.position - self._at
            if self._stream is None or not 0 <= gap <= SKIPPED:
                self._drop()
                self._stream = _from(self.file, self.position, None)
            elif gap:
                self._stream.read(gap)
            content = self._stream.read(size)
            if not content:
                raise OSError(f"the answer ended at byte {self.position} of {self.file.length}")
        except BaseException:
            self._drop()
            raise
        self._at = self.position + len(content)
        return content

    def _drop(self) -> None:
        if self._stream is not None:
            self._stream.close()
        self._stream = None


# -- Requests -------------------------------------------------------------------------------------


def _attempts(url: str, ask: Callable[[], T]) -> T:
    """The result of a request, which is made again if the connection fails.

    Raises:
        DataError: it fails each time, or there is no such file.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return ask()
        except FileNotFoundError:
            raise DataError(
                f"there is no shard {parent_of(url)}/{file_name(url)}: check --data"
            ) from None
        except (OSError, HTTPException) as error:
            if attempt == ATTEMPTS:
                raise DataError(
                    f"{parent_of(url)}/{file_name(url)} cannot be read: {error}"
                ) from error
            time.sleep(attempt)
    raise AssertionError


def _describe(url: str) -> tuple[int, str]:
    """The length of a file, and its version."""
    if url.split("://")[0] in STORES:
        files, path = _store(url)
        found = files.info(path)
        names = ("ETag", "etag", "blob_id", "mtime", "created")
        version = next((found[name] for name in names if name in found), "")
        return int(found["size"]), str(version)
    with _answer(url, {"Range": "bytes=0-0"}) as answer:
        total = answer.headers.get("Content-Range", "").rpartition("/")[2]
        if answer.status != 206 or not total.isdecimal():
            raise ConfigurationError(f"{parent_of(url)}/{file_name(url)}: {NO_RANGES}")
        return int(total), _version(answer)


def _version(answer: Any) -> str:
    return answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""


def _from(file: RemoteFile, start: int, stop: int | None) -> Any:
    """A stream of the bytes [start, stop) of a file; None = up to its end."""
    if file.url.split("://")[0] in STORES:
        files, path = _store(file.url)
        if stop is not None:
            return io.BytesIO(files.cat_file(path, start=start, end=stop))
        stream = files.open(path, "rb")
        stream.seek(start)
        return stream
    answer = _answer(file.url, {"Range": f"bytes={start}-{'' if stop is None else stop - 1}"})
    total = answer.headers.get("Content-Range", "").rpartition("/")[2]
    if answer.status != 206 or total != str(file.length) or _version(answer) != file.version:
        answer.close()
        raise DataError(f"{file} has changed since it was listed: start the command again")
    return answer


def _answer(url: str, headers: dict[str, str]) -> Any:
    # Compressed answers would have other positions.
    request = Request(url, headers={**headers, "Accept-Encoding": "identity"})
    try:
        return urlopen(request, timeout=TIMEOUT)
    except HTTPError as error:
        if error.code in ABSENT:
            raise FileNotFoundError(url) from error
        raise


def _store(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it."""
    scheme = url.split("://")[0]
    try:
        import fsspec.core

        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise ConfigurationError(
            f"{scheme}:// needs another package: pip install {STORES[scheme]}"
        ) from error
