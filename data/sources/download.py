"""Shards at a URL: copied to a local folder once, each file atomically."""

import contextlib
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any, BinaryIO
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import url2pathname, urlopen

from filelock import BaseFileLock, FileLock
from tqdm.auto import tqdm

from smalti.errors import ConfigurationError, DataError, SmaltiError
from smalti.files import replacing, write_json

WEB = {"http", "https"}
# Schemes read through fsspec -> the package that implements them.
STORES = {"hf": "huggingface_hub", "s3": "s3fs", "gs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}
ATTEMPTS = 3
TIMEOUT = 60  # seconds without an answer
ABSENT = {403, 404, 410}  # HTTP status: there is no such file
LOOKED = "source.json"  # written, with the URL, once a manifest has been looked for


def local_copies(
    urls: Sequence[str],
    cache: Path | None,
    manifests: Sequence[str],
    check: Callable[[Path], object],
) -> list[Path]:
    """Local copies of URLs; existing copies are not fetched again.

    Args:
        cache: the folder for the copies. Processes that share it share the work.
        manifests: names of files beside the shards; the first that exists is also copied.
        check: raises `DataError` if a copy is incomplete or damaged.

    Raises:
        ConfigurationError: a URL scheme that is not supported, or no folder for the copies.
        DataError: a shard cannot be fetched; the message names it.
    """
    for url in urls:
        check_scheme(url)
    if all(url.startswith("file:") for url in urls):
        return [Path(url2pathname(urlsplit(url).path)) for url in urls]
    if cache is None:
        raise ConfigurationError(
            f"{urls[0]} is not a local file: pass --stream_cache FOLDER for a copy"
        )
    targets = [cache / folder_name(parent_of(url), parent_of(url)) / file_name(url) for url in urls]
    pairs = list(zip(urls, targets, strict=True))
    for url, target in {target.parent: (url, target) for url, target in reversed(pairs)}.values():
        copy_manifest(url, target.parent, manifests)
    start = os.getpid() % len(pairs)  # processes begin at different shards
    for url, target in tqdm(pairs[start:] + pairs[:start], desc="copy shards", delay=2):
        with locked(target):
            if not target.is_file():
                _copy(url, target, check)
    return targets


def locked(target: Path) -> BaseFileLock:
    """A context manager in which one process at a time creates `target`; others wait."""
    target.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(target.with_name(f".{target.name}.lock"))


def folder_name(title: str, identity: str) -> str:
    """A folder name for a copy: a readable part, and a hash of all that determines the content."""
    readable = "".join(letter if letter.isalnum() else "-" for letter in title)[-40:].strip("-")
    return f"{readable}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"


def parent_of(url: str) -> str:
    """The folder of a URL, without user name, password and query, which may be secret."""
    parts = urlsplit(url)
    port = f":{parts.port}" if parts.port else ""
    return f"{parts.scheme}://{parts.hostname or ''}{port}{parts.path.rpartition('/')[0]}"


def file_name(url: str) -> str:
    """The name of the file that a URL names."""
    return urlsplit(url).path.rpartition("/")[2]


def check_scheme(url: str) -> None:
    """Raise `ConfigurationError` unless a URL names a file and has a scheme that is supported."""
    scheme = urlsplit(url).scheme
    if scheme not in WEB | STORES.keys() | {"file"}:
        known = ", ".join(sorted(WEB | STORES.keys() | {"file"}))
        raise ConfigurationError(f"{url} cannot be read: URLs may begin with {known}")
    if not file_name(url):
        raise ConfigurationError(f"{url} names no file: name the shards")


def copy_manifest(url: str, folder: Path, names: Sequence[str]) -> None:
    """Copy the first manifest beside a URL, if there is one; look for it only once."""
    with locked(folder / LOOKED):
        if (folder / LOOKED).is_file():
            return
        parts = urlsplit(url)
        base = parts.path.rpartition("/")[0]
        for name in names:
            beside = parts._replace(path=f"{base}/{name}").geturl()
            with contextlib.suppress(FileNotFoundError):
                _copy(beside, folder / name, lambda path: None)
                break
        write_json(folder / LOOKED, {"url": parent_of(url)})


def _copy(url: str, target: Path, check: Callable[[Path], object]) -> None:
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with replacing(target) as temporary:
                with _opened(url) as stream, temporary.open("wb") as file:
                    shutil.copyfileobj(stream, file, 2**20)
                    _check_length(stream, file.tell())
                check(temporary)
            return
        except FileNotFoundError:
            if target.suffix in (".tar", ".parquet"):
                raise DataError(f"there is no shard {url}: check --data") from None
            raise
        except SmaltiError as error:
            raise DataError(f"{url}: {error}") from error
        except (OSError, HTTPException) as error:
            if attempt == ATTEMPTS:
                raise DataError(f"{url} cannot be fetched: {error}") from error
            time.sleep(attempt)


def _check_length(stream: Any, received: int) -> None:
    promised = getattr(stream, "headers", {}).get("Content-Length")
    if promised is not None and int(promised) != received:
        raise OSError(f"{received} of {promised} bytes arrived")


def _opened(url: str) -> BinaryIO:
    """A stream of the content of a URL; FileNotFoundError if it does not exist."""
    scheme = urlsplit(url).scheme
    if scheme in STORES:
        try:
            import fsspec

            return fsspec.open(url, "rb").open()  # type: ignore[return-value]
        except ImportError as error:
            raise ConfigurationError(
                f"{scheme}:// needs another package: pip install {STORES[scheme]}"
            ) from error
    try:
        return urlopen(url, timeout=TIMEOUT)
    except HTTPError as error:
        if error.code in ABSENT:
            raise FileNotFoundError(url) from error
        raise
