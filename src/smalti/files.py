"""Files on disk: written atomically, checked when read.

Text, JSON, JSON lines, and the weights of models as safetensors.
"""

import errno
import hashlib
import json
import os
import re
import shlex
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from smalti.config import nearest
from smalti.errors import CheckpointError, SmaltiError

if TYPE_CHECKING:
    from torch import Tensor, nn


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what is written there takes its place at the end.

    If writing fails, the temporary file is removed and `path` stays as it was.
    """
    temporary = path.with_name(f".tmp-{path.name}-{uuid.uuid4().hex[:8]}")
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


def first_difference(path: Path, settings: dict[str, Any]) -> tuple[str, Any] | None:
    """Name and stored value of the first of `settings` that differs in a JSON file, or None.

    Raises:
        SmaltiError: the file is damaged, or contains no settings.
    """
    stored = read_json(path)
    if not isinstance(stored, dict):
        raise SmaltiError(f"{path} does not contain settings: choose another output folder")
    wanted = json.loads(json.dumps(settings))  # tuples become lists
    return next(((k, stored.get(k)) for k in wanted if stored.get(k) != wanted[k]), None)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def append_line(path: Path, content: dict[str, Any]) -> None:
    """Append one line of JSON to a file."""
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(content) + "\n")


def drop_lines_after(path: Path, step: int) -> None:
    """Keep the lines of a log, if there is one, up to a step."""
    if path.is_file():
        kept = [line for line in read_lines(path) if line["step"] <= step]
        write_text(path, "".join(f"{json.dumps(line)}\n" for line in kept))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; incomplete ones, which a killed run leaves, are skipped."""
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


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


# -------------------------------------------------------------------------------------------------
# Weights: one safetensors file. Its names and shapes are compared with those of the model, and the
# number of the model's parameters with the file, before memory is allocated. Pickle is never read.

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

# First letter of a safetensors dtype code (BF16, F8_E4M3, I64, U8, C64) -> kind of number.
KINDS = {"B": "float", "F": "float", "I": "integer", "U": "integer", "C": "complex"}


@dataclass(frozen=True)
class _Header:
    """Shape and kind of a tensor, known before it is read; loading never converts the kind."""

    shape: tuple[int, ...]
    kind: str  # "float", "integer", "bool" or "complex"


def save_weights(path: Path, state: "Mapping[str, Tensor]") -> None:
    """Write tensors, from any device, to a safetensors file."""
    from safetensors.torch import save_file

    contiguous = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    with replacing(path) as temporary:
        save_file(contiguous, temporary, metadata={"format": "pt"})


def hash_weights(state: "Mapping[str, Tensor]", prefix: bytes = b"") -> str:
    """sha256 over `prefix` and the names, shapes and values of tensors, on any device.

    Half-precision values are hashed as the equal 32-bit values, so that a model has the same hash
    in memory, on disk, and after loading.
    """
    import torch

    digest = hashlib.sha256(prefix)
    for name, tensor in sorted(state.items()):
        values = tensor.detach().cpu()
        if values.dtype in (torch.bfloat16, torch.float16):
            values = values.float()
        digest.update(f"{name}/{values.dtype}/{tuple(values.shape)}".encode())
        digest.update(values.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_weights(build: "Callable[[], nn.Module]", path: Path) -> "nn.Module":
    """The model that `build` returns, with every parameter and buffer read from `path`.

    Floating-point tensors are converted to the precision of the model. The global random state
    stays as it was.

    Raises:
        CheckpointError: the file is missing or damaged; a tensor is missing, unknown, or has
            the wrong shape or kind.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise CheckpointError(f"{path.parent} has no {path.name}{_pickle_hint(path.parent)}")
    try:
        found = _read_headers(path)
        with torch.device("meta"), _registering_at_most(4 * len(found) + 64, path):
            expected = {name: _header(value) for name, value in build().state_dict().items()}
        _compare(expected, found, path)
        with torch.random.fork_rng(devices=[]):
            model = build()
        model.load_state_dict(load_file(path))
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    return model


def _pickle_hint(folder: Path) -> str:
    names = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
    return f" ({names[0]} is a pickle, which can run code and is not read)" if names else ""


def _read_headers(path: Path) -> dict[str, _Header]:
    """Shapes and kinds of the tensors in a file; none of them is read."""
    from safetensors import safe_open

    headers = {}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a dict)
            part = file.get_slice(name)
            code = part.get_dtype()
            kind = "bool" if code == "BOOL" else KINDS[code[0]]
            headers[name] = _Header(tuple(part.get_shape()), kind)
    return headers


def _header(tensor: "Tensor") -> _Header:
    dtype = tensor.dtype
    if dtype.is_floating_point or dtype.is_complex:
        return _Header(tuple(tensor.shape), "complex" if dtype.is_complex else "float")
    return _Header(tuple(tensor.shape), "bool" if str(dtype) == "torch.bool" else "integer")


@contextmanager
def _registering_at_most(limit: int, path: Path) -> Iterator[None]:
    """Stop building a model once it has more than `limit` parameters.

    Otherwise a config with a billion layers would exhaust the memory before the comparison.
    """
    from torch.nn.modules.module import register_module_parameter_registration_hook

    count = 0

    def on_parameter(*_: object) -> None:
        nonlocal count
        count += 1
        if count > limit:
            raise CheckpointError(
                f"{path} has far fewer tensors than the model that the config describes"
            )

    handle = register_module_parameter_registration_hook(on_parameter)
    try:
        yield
    finally:
        handle.remove()


def _compare(expected: dict[str, _Header], found: dict[str, _Header], path: Path) -> None:
    missing, surplus = sorted(expected.keys() - found), sorted(found.keys() - expected)
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        hint = f"; it has {surplus[0]}, which is unknown" if surplus else ""
        raise CheckpointError(f"{path} lacks the tensor {missing[0]}{more}{hint}")
    if surplus:
        hint = nearest(surplus[0], expected)
        raise CheckpointError(
            f"{path} has a tensor {surplus[0]} that the model does not have; {hint}"
        )
    for name, header in expected.items():
        if found[name].shape != header.shape:
            raise CheckpointError(
                f"{path}: {name} has shape {found[name].shape}; the config requires {header.shape}"
            )
        if found[name].kind != header.kind:
            raise CheckpointError(
                f"{path}: {name} has {found[name].kind} values; the model takes {header.kind}"
            )
