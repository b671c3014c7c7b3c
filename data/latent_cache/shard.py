"""One shard of a latent cache: a safetensors file with the arrays of some samples.

    stored (n, views, ...), labels (n,)           in every shard
    captions, caption_ends, captions_until        the texts of the samples, see `pack_captions`
    condition.NAME (rows, ...)                    other conditions, see `StoredCondition`

The metadata record the cache that the shard belongs to, and the hash of its content.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from smalti.data.sources.base import fingerprint_of
from smalti.errors import DataError
from smalti.files import replacing

SHARD = "shard"  # key of the metadata, whose value is "identity of the cache/hash of the content"
DAMAGED = "damaged"
MAX_HEADER = 2**16  # bytes of the header of a shard, which names a few tensors
TYPES: dict[str, type[np.generic]] = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "U16": np.uint16,
    "I32": np.int32,
    "I64": np.int64,
    "F16": np.float16,
    "F32": np.float32,
}


def shard_path(folder: Path, number: int) -> Path:
    """The file of a shard of a cache."""
    return folder / f"shard-{number:05d}.safetensors"


def write_shard(path: Path, tensors: Mapping[str, np.ndarray], identity: str) -> None:
    """Write the arrays of a shard atomically."""
    # safetensors ignores the strides of an array and writes its memory as it is.
    flat = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    with replacing(path) as temporary:
        save_file(flat, temporary, metadata=_metadata(flat, identity))


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A shard; safetensors checks that the sizes in its header fit the file.

    Raises:
        SafetensorError: it is damaged.
    """
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
    if length > MAX_HEADER:
        raise SafetensorError(f"its header has {length} bytes, and that of a shard {MAX_HEADER}")
    with safe_open(path, framework="np") as shard:
        yield shard


def is_whole(path: Path, identity: str) -> bool:
    """Whether a shard exists, belongs to the cache, and is not damaged."""
    try:
        with _opened(path) as shard:
            found = shard.metadata() or {}
            tensors = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
    except (FileNotFoundError, SafetensorError):
        return False
    return found == _metadata(tensors, identity)


def identity_in(path: Path) -> str:
    """The identity of the cache that a shard belongs to: "" if it has none, or `DAMAGED`."""
    try:
        with _opened(path) as shard:
            return (shard.metadata() or {}).get(SHARD, "").partition("/")[0]
    except SafetensorError:
        return DAMAGED


def map_shard(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a shard by name, memory-mapped: only the rows that are used are read.

    Raises:
        DataError: the file is not a shard of latents.
    """
    try:
        with _opened(path), path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        # One map for all arrays, because each keeps a file open. Indexing a plain array is faster.
        content = np.memmap(path, np.uint8, "r", 8 + length).view(np.ndarray)
        return {name: _array(content, entry) for name, entry in header.items()}
    except (SafetensorError, KeyError) as error:
        raise DataError(f"{path} is not a shard of latents ({error}): encode again") from error


def _array(content: np.ndarray, entry: Mapping[str, Any]) -> np.ndarray:
    """The array of an entry of the header; `content` are the bytes after it."""
    start, stop = entry["data_offsets"]
    return content[start:stop].view(TYPES[entry["dtype"]]).reshape(entry["shape"])


def _metadata(tensors: Mapping[str, np.ndarray], identity: str) -> dict[str, str]:
    parts = [
        part
        for name, array in sorted(tensors.items())
        for part in (f"{name}/{array.dtype}/{array.shape}".encode(), array.tobytes())
    ]
    # A single key, because safetensors writes several in no fixed order.
    return {SHARD: f"{identity}/{fingerprint_of(parts)}"}


# -- Captions -------------------------------------------------------------------------------------

DECODED_AT_ONCE = 4096  # texts, to verify them
CAPTIONS = ("captions", "caption_ends", "captions_until")


def pack_captions(captions: Sequence[Sequence[str]]) -> dict[str, np.ndarray]:
    """The captions of n samples, T in all, as arrays.

    Returns:
        captions: the texts in UTF-8, one after the other, (bytes,) uint8.
        caption_ends: the byte at which each text ends, (T,) int64.
        captions_until: the number of texts of each sample and all before it, (n,) int64.
    """
    texts = [text.encode() for of_sample in captions for text in of_sample]
    arrays = (
        np.frombuffer(b"".join(texts), np.uint8),
        np.cumsum([len(text) for text in texts], dtype=np.int64),
        np.cumsum([len(of_sample) for of_sample in captions], dtype=np.int64),
    )
    return dict(zip(CAPTIONS, arrays, strict=True))


class PackedCaptions:
    """The captions of a shard as `pack_captions` stores them; a text is decoded when it is used."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._bytes, self._ends, self._until = (arrays[name] for name in CAPTIONS)

    @property
    def count(self) -> int:
        """The number of texts of all samples."""
        return len(self._ends)

    def rows(self, sample: int) -> range:
        """The numbers of the texts of a sample, counted over the shard."""
        return range(int(self._until[sample - 1]) if sample else 0, int(self._until[sample]))

    def of(self, sample: int) -> tuple[str, ...]:
        """The texts of a sample."""
        return tuple(map(self._text, self.rows(sample)))

    def _text(self, number: int) -> str:
        start = self._ends[number - 1] if number else 0
        return self._bytes[start : self._ends[number]].tobytes().decode()

    def problem(self, samples: int) -> str | None:
        """Why these are not the captions of so many samples, to follow "the captions"; None if
        they are."""
        kinds = (self._bytes.dtype, self._ends.dtype, self._until.dtype)
        if kinds != (np.uint8, np.int64, np.int64) or self._until.shape != (samples,):
            return f"are {', '.join(map(str, kinds))} of {len(self._until)} samples"
        for ends, last in ((self._until, self.count), (self._ends, len(self._bytes))):
            if not (np.diff(ends, prepend=0) > 0).all() or ends[-1] != last:
                return "do not have one or more texts for each sample"
        starts = np.concatenate([[0], self._ends[:-1]])
        if (self._bytes[starts] & 0xC0 == 0x80).any():  # the middle of a letter
            return "are not divided into texts"
        try:
            for first in range(0, self.count, DECODED_AT_ONCE):
                last = min(first + DECODED_AT_ONCE, self.count) - 1
                self._bytes[starts[first] : self._ends[last]].tobytes().decode()
        except UnicodeDecodeError:
            return "are not UTF-8"
        return None
