"""Files: written so that a reader finds the old one or the new one, read so that damage is told."""

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from smalti.errors import SmaltiError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what is written there takes its place at the end.

    If writing fails, the temporary file is removed and `path` stays as it was.
    """
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        with write_errors(path):
            yield temporary
        temporary.chmod(mode)  # safetensors makes files that only their owner may read
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn what safetensors says of a full or failing disk into the `OSError` that it was."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code), str(path)) from error


def flush(path: Path) -> None:
    """fsync a file or a folder; folders cannot be opened on some systems."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON; NaN and infinity, which JSON cannot hold, raise `ValueError`."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        SmaltiError: the file is not UTF-8, or not JSON.
        OSError: there is no such file, or it may not be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise SmaltiError(f"{path} is damaged: it is not valid JSON ({error})") from error


def first_difference(path: Path, settings: dict[str, Any]) -> tuple[str, Any] | None:
    """Name and stored value of the first of `settings` that a JSON file has otherwise, or None.

    Raises:
        SmaltiError: the file is damaged, or holds no settings.
    """
    stored = read_json(path)
    if not isinstance(stored, dict):
        raise SmaltiError(f"{path} holds no settings: choose another output folder")
    wanted = json.loads(json.dumps(settings))  # a tuple comes back as a list
    return next(((k, stored.get(k)) for k in wanted if stored.get(k) != wanted[k]), None)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
