"""Shards behind a URL: copied into a local folder once, whole or not at all."""

import contextlib
import hashlib
import importlib.util
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any, BinaryIO
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import url2pathname, urlopen

from tqdm.auto import tqdm

from smalti.errors import SmaltiError
from smalti.files import replacing, write_json

WEB = {"http", "https"}
# Read through fsspec, with the package that knows them.
STORES = {"hf": "huggingface_hub", "s3": "s3fs", "gs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}
ATTEMPTS = 3
TIMEOUT = 60  # seconds without any answer
ABSENT = {403, 404, 410}  # how servers say that there is no such file
LOOKED = "source.json"  # where the shards come from; the manifest was looked for


def local_copies(
    urls: Sequence[str],
    cache: Path | None,
    manifests: Sequence[str],
    check: Callable[[Path], object],
) -> list[Path]:
    """Local files with the contents of URLs; what is there already is not fetched again.

    Args:
        cache: the folder for the copies. Processes that share it share the work.
        manifests: names of files that are copied, too, if they lie beside the shards.
        check: raises `SmaltiError` if a copy is not whole.

    Raises:
        SmaltiError: a URL of a kind that is not read, no place for the copies, or a shard that
            cannot be fetched; names it.
    """
    for url in urls:
        _check_scheme(url)
    if all(url.startswith("file:") for url in urls):
        return [Path(url2pathname(urlsplit(url).path)) for url in urls]
    if cache is None:
        raise SmaltiError(
            f"{urls[0]} is not on this machine: pass --stream_cache FOLDER for a copy"
        )
    targets = [cache / folder_name(_base(url), _base(url)) / _file_name(url) for url in urls]
    pairs = list(zip(urls, targets, strict=True))
    for url, target in {target.parent: (url, target) for url, target in reversed(pairs)}.values():
        _copy_manifest(url, target.parent, manifests)
    start = os.getpid() % len(pairs)  # processes begin at different shards
    for url, target in tqdm(pairs[start:] + pairs[:start], desc="copy shards", delay=2):
        with alone(target):
            if not target.is_file():
                _copy(url, target, check)
    return targets


@contextlib.contextmanager
def alone(target: Path) -> Iterator[None]:
    """Let one process at a time make `target`; the others wait.

    Where the system has no such locks they all make it: what they write is the same, and replaces
    the file in one step.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f".{target.name}.lock").open("w") as lock:
        if importlib.util.find_spec("fcntl"):
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)  # let go when the file is closed, or its process dies
        yield


def folder_name(title: str, identity: str) -> str:
    """A name for a copy: a readable part, and a hash of all that decides the content."""
    readable = "".join(letter if letter.isalnum() else "-" for letter in title)[-40:].strip("-")
    return f"{readable}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"


def _base(url: str) -> str:
    """The folder of a URL, without what may be secret in it."""
    parts = urlsplit(url)
    port = f":{parts.port}" if parts.port else ""
    return f"{parts.scheme}://{parts.hostname or ''}{port}{parts.path.rpartition('/')[0]}"


def _file_name(url: str) -> str:
    return urlsplit(url).path.rpartition("/")[2]


def _check_scheme(url: str) -> None:
    scheme = urlsplit(url).scheme
    if scheme not in WEB | STORES.keys() | {"file"}:
        known = ", ".join(sorted(WEB | STORES.keys() | {"file"}))
        raise SmaltiError(f"{url} cannot be read: URLs may begin with {known}")
    if not _file_name(url):
        raise SmaltiError(f"{url} names no file: name the shards")


def _copy_manifest(url: str, folder: Path, names: Sequence[str]) -> None:
    """Copy the first manifest beside a URL, if there is one; look only once."""
    with alone(folder / LOOKED):
        if (folder / LOOKED).is_file():
            return
        parts = urlsplit(url)
        base = parts.path.rpartition("/")[0]
        for name in names:
            beside = parts._replace(path=f"{base}/{name}").geturl()
            with contextlib.suppress(FileNotFoundError):
                _copy(beside, folder / name, lambda path: None)
                break
        write_json(folder / LOOKED, {"url": _base(url)})


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
            if target.suffix == ".tar":
                raise SmaltiError(f"there is no shard {url}: check --data") from None
            raise
        except SmaltiError as error:
            raise SmaltiError(f"{url}: {error}") from error
        except (OSError, HTTPException) as error:
            if attempt == ATTEMPTS:
                raise SmaltiError(f"{url} cannot be fetched: {error}") from error
            time.sleep(attempt)


def _check_length(stream: Any, received: int) -> None:
    promised = getattr(stream, "headers", {}).get("Content-Length")
    if promised is not None and int(promised) != received:
        raise OSError(f"{received} of {promised} bytes arrived")


def _opened(url: str) -> BinaryIO:
    """A stream of what lies behind a URL; FileNotFoundError if there is nothing."""
    scheme = urlsplit(url).scheme
    if scheme in STORES:
        try:
            import fsspec

            return fsspec.open(url, "rb").open()  # type: ignore[return-value]
        except ImportError as error:
            raise SmaltiError(
                f"{scheme}:// needs another package: pip install {STORES[scheme]}"
            ) from error
    try:
        return urlopen(url, timeout=TIMEOUT)
    except HTTPError as error:
        if error.code in ABSENT:
            raise FileNotFoundError(url) from error
        raise
