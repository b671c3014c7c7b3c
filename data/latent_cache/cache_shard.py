"""One file of a latent cache: `stored` (n, views, ...) and `labels` (n,), as safetensors.

Each holds the identity of its cache and the hash of its own content, so that an interrupted
encoding knows what it can keep.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from smalti.data.sources.base import fingerprint_of
from smalti.errors import SmaltiError
from smalti.files import replacing

NAMES = ("stored", "labels")
SHARD = "shard"  # key of the metadata: identity of the cache, hash of the content
DAMAGED = "damaged"
TYPES = {"U16": np.uint16, "I32": np.int32, "I64": np.int64, "F16": np.float16}


def shard_path(folder: Path, number: int) -> Path:
    """Where a cache keeps its shard of this number."""
    return folder / f"shard-{number:05d}.safetensors"


def write_shard(path: Path, tensors: Mapping[str, np.ndarray], identity: str) -> None:
    """Write `stored` and `labels`; a reader finds all of it or nothing."""
    # safetensors writes memory as it lies, whatever the strides say.
    flat = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    with replacing(path) as temporary:
        save_file(flat, temporary, metadata=_metadata(flat, identity))


def is_whole(path: Path, identity: str) -> bool:
    """Whether a shard is there, belongs to the cache, and holds what was once written."""
    try:
        with safe_open(path, framework="np") as shard:
            found = shard.metadata() or {}
            tensors = {name: shard.get_tensor(name) for name in NAMES}
    except (FileNotFoundError, SafetensorError):
        return False
    return found == _metadata(tensors, identity)


def identity_in(path: Path) -> str:
    """The cache that a shard says it belongs to: "" if it says nothing, or `DAMAGED`."""
    try:
        with safe_open(path, framework="np") as shard:
            return (shard.metadata() or {}).get(SHARD, "").partition("/")[0]
    except SafetensorError:
        return DAMAGED


def map_shard(path: Path) -> dict[str, np.ndarray]:
    """`stored` and `labels` as they lie in the file: only what is used is read, when it is used.

    Raises:
        SmaltiError: the file is no shard of latents.
    """
    try:
        with safe_open(path, framework="np"):  # checks the header: its sizes fit the file
            pass
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        return {name: _map(path, header[name], 8 + length) for name in NAMES}
    except (SafetensorError, KeyError) as error:
        raise SmaltiError(f"{path} is no shard of latents ({error}): encode again") from error


def _map(path: Path, entry: Mapping[str, Any], data: int) -> np.ndarray:
    """The tensor of an entry of the header; `data` is where the tensors begin."""
    start, _ = entry["data_offsets"]
    shape = tuple(entry["shape"])
    array = np.memmap(path, TYPES[entry["dtype"]], "r", data + start, shape)
    return array.view(np.ndarray)  # rows of a plain array are quicker to take


def _metadata(tensors: Mapping[str, np.ndarray], identity: str) -> dict[str, str]:
    parts = [
        part
        for name, array in sorted(tensors.items())
        for part in (f"{name}/{array.dtype}/{array.shape}".encode(), array.tobytes())
    ]
    # One key only: safetensors writes several in no certain order.
    return {SHARD: f"{identity}/{fingerprint_of(parts)}"}
