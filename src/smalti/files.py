"""Files on disk: written atomically, checked when read.

Text, JSON, JSON with the hashes of what belongs to it, and JSON lines.
"""

import errno
import hashlib
import json
import os
import re
import shlex
import uuid
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from smalti.errors import CheckpointError, SmaltiError

UNFINISHED = ".tmp-"  # begins the name of what is being written, or was when its process ended


def unfinished(path: Path) -> Path:
    """A new name beside `path` for what will take its place when it is complete."""
    return path.with_name(f"{UNFINISHED}{path.name}-{uuid.uuid4().hex[:8]}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what is written there takes its place at the end.

    If writing fails, the temporary file is removed and `path` stays as it was.
    """
    temporary = unfinished(path)
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        with write_errors(path):
            yield temporary
        temporary.chmod(mode)  # safetensors creates files that only their owner may read
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Raise the `OSError` that caused a `SafetensorError`, for example a full disk."""
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
    """Write indented JSON; NaN and infinity, which JSON cannot represent, raise `ValueError`."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        SmaltiError: the file is not UTF-8, or not JSON.
        OSError: there is no such file, or it may not be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise SmaltiError(f"{path} is damaged: it is not valid JSON ({error})") from error


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# -------------------------------------------------------------------------------------------------
# A JSON file that records the SHA-256 of its own content and of other files, so that a change of
# any of them is found.

HASHES = "sha256"  # the entry: names of files -> hashes


def write_hashed_json(path: Path, content: Mapping[str, Any], files: Iterable[str] = ()) -> None:
    """Write JSON with the entry `HASHES`: of its other entries, and of files in the same folder.

    Args:
        files: paths relative to the folder of `path`.
    """
    hashes = {path.name: _hash_of(content)}
    hashes |= {name: sha256_of(path.parent / name) for name in files}
    write_json(path, {**content, HASHES: hashes})


def recorded_hashes(path: Path) -> dict[str, str]:
    """The hashes that a file of `write_hashed_json` records; empty if there are none, as in the
    files of smalti 0.1.0.

    Raises:
        SmaltiError: the file is damaged.
    """
    return _with_hashes(path)[1]


def _with_hashes(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The content of a file of `write_hashed_json`, and the hashes that it records."""
    content = read_config_file(path)
    if not isinstance(content, dict):
        return {}, {}
    hashes = content.pop(HASHES, {})
    if not isinstance(hashes, dict) or (hashes and path.name not in hashes):
        raise CheckpointError(f'{path} is damaged: "{HASHES}" does not hold the hash of the file')
    return content, hashes


def check_hashes(path: Path, files: Iterable[str] = ()) -> None:
    """Compare a file of `write_hashed_json`, and files that it records, with their hashes.

    Raises:
        CheckpointError: one of them is damaged or was changed.
    """
    content, hashes = _with_hashes(path)
    if not hashes:
        return
    found = {path.name: _hash_of(content)}
    found |= {name: sha256_of(path.parent / name) for name in files}
    for name, value in found.items():
        if hashes.get(name) != value:
            raise changed(path.parent / name)


def read_hashed_json(
    path: Path, remedy: str = "restore a copy of it, or choose another output folder"
) -> dict[str, Any]:
    """The content of a file of `write_hashed_json`, which has its hash, or of smalti 0.1.0.

    Args:
        remedy: what to do if it has another hash.

    Raises:
        SmaltiError: it is damaged, was edited, or contains no settings.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise SmaltiError(f"{path} does not contain settings: choose another output folder")
    hashes = content.pop(HASHES, None)
    renamed = any(isinstance(value, dict) and path.name in value for value in content.values())
    if hashes is not None and isinstance(hashes, dict):
        hashes = hashes.get(path.name, "")
    if renamed or hashes not in (None, _hash_of(content)):
        raise SmaltiError(
            f"{path} is damaged or was edited, because it does not have the {HASHES} that it "
            f"records: {remedy}"
        )
    return content


def first_difference(
    stored: Mapping[str, Any],
    settings: Mapping[str, Any],
    defaults: Mapping[str, Any] | None = None,
) -> tuple[str, Any] | None:
    """Name and stored value of the first of `settings` that differs from the stored ones, or None.

    Args:
        stored: the content of a JSON file.
        defaults: of settings that an earlier version did not have, and so did not store.
    """
    wanted = json.loads(json.dumps(settings))  # tuples become lists
    before = {**json.loads(json.dumps(defaults or {})), **stored}
    return next(((k, stored.get(k)) for k in wanted if before.get(k) != wanted[k]), None)


def changed(path: Path) -> CheckpointError:
    """The error for a file whose hash is not the one that was recorded."""
    return CheckpointError(
        f"{path} is damaged, or was changed after it was saved: its {HASHES} is not the one "
        "recorded then. Copy or download it again; if the change is meant, load the model with "
        "from_pretrained(..., verify=False) and save it again"
    )


MAX_CONFIG = 2**24  # bytes; the JSON of a model takes a few thousand


def read_config_file(path: Path) -> Any:
    """The content of a JSON file that describes a model.

    Raises:
        SmaltiError: it is damaged, or larger than any description.
    """
    size = path.stat().st_size
    if size > MAX_CONFIG:
        raise CheckpointError(
            f"{path} takes {size / 1e6:,.0f} MB; the description of a model takes at most "
            f"{MAX_CONFIG / 1e6:,.0f} MB: it is damaged or hostile"
        )
    return read_json(path)


def _hash_of(content: Mapping[str, Any]) -> str:
    """The SHA-256 of plain values, whatever the order of keys and the white space of their file."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# -------------------------------------------------------------------------------------------------
# Logs: one JSON object on each line, the last entry of which is a checksum of the others. Lines of
# smalti 0.1.0 have none.

CHECKSUM = "crc32"
COMPLETE = rf'"{CHECKSUM}": "[0-9a-f]{{8}}"}}'  # the end of a line


def append_line(path: Path, content: dict[str, Any]) -> None:
    """Append one line of JSON, with its checksum, to a file."""
    with path.open("a", encoding="utf-8") as stream:
        stream.write(_with_checksum(content) + "\n")


def write_lines(path: Path, contents: Iterable[dict[str, Any]]) -> None:
    """Write lines of JSON, with their checksums, in place of a file."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        for content in contents:
            stream.write(_with_checksum(content) + "\n")


def drop_lines_after(path: Path, step: int) -> list[str]:
    """Keep the lines of a log, if there is one, up to a step.

    Returns:
        What is wrong with lines that are damaged; they are dropped, too.
    """
    if not path.is_file():
        return []
    lines, damaged = checked_lines(path)
    kept = [line for line in lines if line["step"] <= step]
    write_text(path, "".join(f"{_with_checksum(line)}\n" for line in kept))
    return damaged


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The undamaged lines of a log, without their checksums."""
    return checked_lines(path)[0]


def checked_lines(path: Path, counter: str = "step") -> tuple[list[dict[str, Any]], list[str]]:
    """The undamaged lines of a log, without their checksums, and what is wrong with the others.

    An incomplete last line, which a killed run leaves, is not damage.

    Args:
        counter: the entry of every line that is an integer.
    """
    *texts, rest = path.read_text(encoding="utf-8", errors="replace").split("\n")
    lines, damaged = [], []
    for number, text in enumerate([*texts, rest], start=1):
        line = _checked(text, counter)
        if line is not None:
            lines.append(line)
        elif number <= len(texts) or re.search(COMPLETE, text):
            damaged.append(f"line {number} of {path} is damaged")
    return lines, damaged


def _with_checksum(content: dict[str, Any]) -> str:
    text = json.dumps(content)
    return f'{text[:-1]}, "{CHECKSUM}": "{zlib.crc32(text.encode()):08x}"}}'


def _checked(text: str, counter: str) -> dict[str, Any] | None:
    """The content of a line; None if it is incomplete or damaged."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or not isinstance(line.get(counter), int):
        return None
    *content, last = line.items()
    expected = f"{zlib.crc32(json.dumps(dict(content)).encode()):08x}"
    if CHECKSUM in last or expected in last:  # one of them alone: the other is damaged
        return dict(content) if last == (CHECKSUM, expected) else None
    return line


# -------------------------------------------------------------------------------------------------
# Reports on folders


@dataclass(frozen=True)
class Info:
    """Lines (name, value) about a folder, and whether its contents are complete and undamaged."""

    lines: list[tuple[str, str]]
    whole: bool = True


def command(*words: str | Path) -> str:
    """A command of smalti, quoted for a shell."""
    return shlex.join(["smalti", *map(str, words)])
