"""Codes as LlamaGen's extraction leaves them: two .npy files per picture (2406.06525).

    source/
        imagenet256_codes/0.npy, 1.npy, ...    int64 (1, views, L)
        imagenet256_labels/0.npy, 1.npy, ...   int64 (1,)

Ten views are its ten crops, two are a picture and its mirror.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from smalti.data.latent_cache.imports import ForeignLatents, Origin
from smalti.data.latents import CodeSpec
from smalti.data.sources.base import fingerprint_of, in_threads
from smalti.data.transforms import VIEW_SETS
from smalti.errors import SmaltiError

CODES, LABELS = "_codes", "_labels"
# Where LlamaGen has our ten crops: of the picture and of its mirror image it takes the top left,
# top right, bottom left, bottom right and centre.
TEN_CROPS = (4, 0, 1, 2, 3, 9, 5, 6, 7, 8)
ORDERS = {
    1: (VIEW_SETS["identity"], (0,)),
    2: (VIEW_SETS["flip"], (0, 1)),
    10: (VIEW_SETS["ten-crop"], TEN_CROPS),
}


class LlamaGenCodes(ForeignLatents):
    """See `ForeignLatents`; `source` holds both folders, or is the one of the codes."""

    def __init__(self, source: Path, origin: Origin, *, normalised: bool) -> None:
        if normalised:
            raise SmaltiError("codes are not normalised: leave out --normalised")
        if not isinstance(origin.spec, CodeSpec):
            raise SmaltiError(
                "LlamaGen's latents are codes, and the tokenizer makes continuous latents: give "
                "the tokenizer that made them"
            )
        self._spec = origin.spec
        self._codes, self._labels = _folders(source)
        self.folder = self._codes.parent
        count = _count(self._codes, self._labels)
        self.views, self._order = self._views()
        labels = in_threads(self._label, count, "read labels")
        self.labels = torch.tensor(labels, dtype=torch.int64)
        self.fingerprint = fingerprint_of(
            [b"llamagen", self._codes.name.encode(), repr(labels).encode()]
        )

    def read(self, indices: Sequence[int]) -> Tensor:
        codes = np.concatenate([self._read(index) for index in indices])
        return torch.from_numpy(codes[:, self._order].astype(np.int64))

    def _views(self) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """The views of all samples by those of the first."""
        path = self._codes / "0.npy"
        shape = _read_npy(path).shape
        if len(shape) != 3 or shape[1] not in ORDERS:
            raise SmaltiError(
                f"{path} has shape {shape}; codes are (1, views, L) with 1, 2 or 10 views"
            )
        return ORDERS[shape[1]]

    def _read(self, index: int) -> np.ndarray:
        path = self._codes / f"{index}.npy"
        codes = _read_npy(path)
        expected = (1, len(self.views), self._spec.length)
        if codes.shape != expected:
            raise SmaltiError(
                f"{path} has shape {codes.shape}; with this tokenizer and the views of 0.npy it "
                f"must be {expected}"
            )
        if codes.min() < 0 or codes.max() >= self._spec.vocab_size:
            raise SmaltiError(
                f"{path} holds codes from {codes.min()} to {codes.max()}; the tokenizer has "
                f"{self._spec.vocab_size}: give the one that made them"
            )
        return codes

    def _label(self, index: int) -> int:
        path = self._labels / f"{index}.npy"
        label = _read_npy(path)
        if label.size != 1 or label.min() < 0:
            raise SmaltiError(f"{path} holds {label.tolist()}; a label is one number from 0 on")
        return int(label.item())


def _folders(source: Path) -> tuple[Path, Path]:
    """Those of codes and labels."""
    source = Path(source)
    if source.name.endswith(CODES):
        found = [source]
    else:
        found = sorted(path for path in source.glob(f"*{CODES}") if path.is_dir())
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise SmaltiError(f"{source} must hold one folder NAME{CODES}; it has {names}: name one")
    codes = found[0]
    labels = codes.with_name(codes.name.removesuffix(CODES) + LABELS)
    if not labels.is_dir():
        raise SmaltiError(f"the folder {labels} of the labels is missing")
    return codes, labels


def _count(*folders: Path) -> int:
    """How many samples there are: every folder holds 0.npy to N-1.npy, and nothing else."""
    found = [_numbers(folder) for folder in folders]
    count = max(len(numbers) for numbers in found)
    if count == 0:
        raise SmaltiError(f"{folders[0]} is empty: check where the latents are")
    for folder, numbers in zip(folders, found, strict=True):
        missing = next((n for n in range(count) if n not in numbers), None)
        if missing is not None:
            raise SmaltiError(
                f"{folder / f'{missing}.npy'} is missing: codes and labels are numbered from 0 "
                "without gaps"
            )
    return count


def _numbers(folder: Path) -> set[int]:
    numbers = set()
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.suffix != ".npy" or not path.stem.isascii() or not path.stem.isdecimal():
            raise SmaltiError(f"{path} is no numbered .npy file: move it elsewhere")
        if path.stem != str(int(path.stem)):
            raise SmaltiError(f"{path} is not named as LlamaGen does: {int(path.stem)}.npy")
        numbers.add(int(path.stem))
    return numbers


def _read_npy(path: Path) -> np.ndarray:
    """Integers of a file; pickled objects are never opened."""
    try:
        with path.open("rb") as stream:
            array = np.lib.format.read_array(stream, allow_pickle=False)
    except (ValueError, EOFError, MemoryError) as error:
        raise SmaltiError(f"{path} is damaged, or no array of plain numbers: {error}") from error
    if array.dtype.kind not in "iu" or array.size == 0:
        raise SmaltiError(f"{path} holds {array.dtype} {array.shape}; it must hold integers")
    return array
