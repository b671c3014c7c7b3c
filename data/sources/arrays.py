"""Pictures in array files, memory-mapped: uint8 (N, H, W, C) or (N, H, W); 1 channel is grey, 3
are RGB, 4 are RGB and alpha.

set.npz              images (or arr_0); optionally, labels, classes (their names) and captions
folder/images.npy    optionally, labels.npy, captions.npy, and classes.json with the names

Labels are integers (N,). Captions are texts (N,), or (N, K), padded with empty ones, for several
captions per picture.
"""

import hashlib
import io
import logging
import math
import struct
import threading
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image

from smalti.config import nearest
from smalti.data.classes import names_in, numbered_classes
from smalti.data.image_io import WHITE, FolderOptions, to_8_bit
from smalti.data.sources.annotations import CAPTION_COLUMNS, captions_of, why_incomplete
from smalti.data.sources.base import (
    ImageSource,
    SourceOptions,
    classes_kept,
    fingerprint_of,
    names_present,
)
from smalti.data.sources.verification import in_threads
from smalti.errors import DataError, SmaltiError

logger = logging.getLogger(__name__)

MAX_UNPACKED = 2**32  # bytes of a compressed array
MAX_HEADER = 2**16  # bytes of a header; numpy refuses more than 10,000 letters
LOCAL_HEADER = struct.Struct("<26xHH")  # of a zip member: lengths of its name and its extra field
CHANNELS = (1, 3, 4)
PICTURES = ("images", "arr_0")  # names of the array of pictures


class ArraySource(ImageSource):
    """Rows of an array. Equal rows form a group, as equal files do.

    Raises:
        DataError: an array is missing, or has a wrong type or shape.
    """

    def __init__(self, path: Path, options: SourceOptions) -> None:
        self.path, self.background = path, options.folder.background
        self._array: np.ndarray | None = None
        images = self.images
        _check_images(path, images, options.folder)
        labels, names = _labels_and_names(path, options.labels_in)
        self.classes, self.labels = (), torch.zeros(len(images), dtype=torch.int64)
        if labels is not None:
            _check_labels(path, labels, len(images))
            self.classes, self.labels = numbered_classes(labels, names, path)
        elif others := _others_in(path):
            logger.warning(
                "no labels in %s (it has %s): if one array has them, name it in --label_column",
                *(path, ", ".join(others)),
            )
        self._leave_out_one_class(options.folder)
        self._captions: np.ndarray | None = None
        self._find_captions(options.caption_column)
        self._digests: list[str] = []  # empty for a large set
        if len(images) <= options.folder.verify_up_to:
            self._digests = in_threads(self._digest, len(images), "read pictures")
        content = "".join(self._digests) or f"{images.shape}/{path.stat().st_size}"
        plain = self.labels.numpy() if labels is None else labels
        self.fingerprint = fingerprint_of(
            [repr(self.classes).encode(), plain.astype("<i8").tobytes(), content.encode()]
            + ([] if self.background == WHITE else [self.background.encode()])
        )

    def _leave_out_one_class(self, options: FolderOptions) -> None:
        names = self.classes
        self.classes, remark = classes_kept(str(self.path), names, self.labels, options)
        if remark:
            logger.info(remark)
            self.remarks += (remark,)
        if not self.classes:
            self.only_class = names_present(names, self.labels)
            self.labels = torch.zeros_like(self.labels)

    def _find_captions(self, wanted: str) -> None:
        """Read the captions, or say why they cannot be used."""
        name, found = _captions(self.path, wanted)
        if found is None:
            return
        if found.dtype.kind not in "US" or found.shape[:1] != self.labels.shape or found.ndim > 2:
            self.captions_problem = (
                f"{name} in {self.path} is {found.dtype} {found.shape}; captions must be texts "
                f"(N,) or (N, K), for each of the {len(self)} pictures"
            )
        else:
            self._captions = found
            try:
                captioned = torch.tensor([bool(self.captions(row)) for row in range(len(self))])
                self.captions_problem = why_incomplete(str(self.path), captioned, self.name)
            except ValueError as error:
                self.captions_problem = f"{name} in {self.path}: {error}"
                self._captions = None
        self.has_captions = not self.captions_problem
        if self.has_captions:
            logger.info("captions of %s: %s", self.path, name)
        else:
            remark = f"captions are not used: {self.captions_problem}"
            logger.warning(remark)
            self.remarks += (remark,)

    def captions(self, index: int) -> tuple[str, ...]:
        if self._captions is None:
            return ()
        return captions_of([_text(value) for value in np.atleast_1d(self._captions[index])])

    @property
    def images(self) -> np.ndarray:
        """The pictures, memory-mapped at the first use."""
        if self._array is None:
            self._array = _mapped(self.path)
        return self._array

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_array": None}  # a worker process maps the file again

    def read(self, index: int) -> Image.Image:
        pixels = self.images[index]
        if pixels.ndim == 3 and pixels.shape[2] == 1:
            pixels = pixels[..., 0]
        return to_8_bit(Image.fromarray(np.ascontiguousarray(pixels)), self.background)

    def name(self, index: int) -> str:
        return f"{self.path.name}/{index}"

    def group(self, index: int) -> str:
        return self._digests[index] if self._digests else self.name(index)

    def _digest(self, index: int) -> str:
        return hashlib.sha256(self.images[index].tobytes()).hexdigest()


def open_arrays(spec: str, options: SourceOptions) -> ArraySource:
    """An .npz file, an .npy file with labels.npy beside it, or a folder of one of these."""
    path = Path(spec).expanduser()
    if path.is_dir():
        path = _only_array(path)
    if not path.is_file():
        raise DataError(f"{path} does not exist: check --data")
    return ArraySource(path, options)


def _only_array(folder: Path) -> Path:
    """The .npz file, or images.npy, of a folder.

    Raises:
        DataError: there are several.
    """
    found = sorted(folder.glob("*.npz"))
    if (folder / "images.npy").is_file() or not found:
        found.append(folder / "images.npy")
    if len(found) > 1:
        named = ", ".join(path.name for path in found[:3])
        raise DataError(f"{folder} holds several sets ({named}): name one, --data {found[0]}")
    return found[0]


def _text(value: Any) -> str:
    """An element of an array of texts; that of bytes is UTF-8."""
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def _check_labels(path: Path, labels: np.ndarray, count: int) -> None:
    if labels.shape != (count,) or labels.dtype.kind not in "iu" or labels.min() < 0:
        raise DataError(
            f"the labels of {path} are {labels.dtype} {labels.shape}; they must be integers "
            f"from 0 on, one for each of the {count} pictures"
        )


def _check_images(path: Path, images: np.ndarray, options: FolderOptions) -> None:
    grey = images.ndim == 3
    if images.dtype != np.uint8 or not (grey or (images.ndim == 4 and images.shape[3] in CHANNELS)):
        raise DataError(
            f"the pictures of {path} are {images.dtype} {images.shape}; they must be uint8 "
            "(N, H, W, 3), (N, H, W, 1), (N, H, W, 4) or (N, H, W)"
        )
    if len(images) == 0:
        raise DataError(f"{path} holds no pictures: check --data")
    height, width = images.shape[1:3]
    if min(height, width) < options.min_side:
        raise DataError(
            f"the pictures of {path} are {width} x {height} pixels, less than {options.min_side} "
            "on a side: lower --folder.min_side"
        )


_DAMAGE = (
    *(OSError, ValueError, EOFError, KeyError, OverflowError, MemoryError),
    *(zipfile.BadZipFile, zlib.error, struct.error),
    *(NotImplementedError, RuntimeError),  # unknown compression, encryption
)


def _mapped(path: Path) -> np.ndarray:
    """The pictures of a file, memory-mapped unless it is a compressed .npz."""
    if path.suffix == ".npy":
        return map_npy(path)
    with _open_npz(path) as archive:
        name = next((n for n in PICTURES if n in archive.files), None)
        if name is None:
            raise DataError(
                f"{path} holds {', '.join(archive.files) or 'nothing'}: name the pictures images"
            )
        return _member(path, archive, name)


def _labels_and_names(path: Path, wanted: str) -> tuple[np.ndarray | None, list[str] | None]:
    """The labels, and the names of the classes; None where there are none.

    Args:
        wanted: the name of the array of labels; "" = labels, if there is one.
    """
    labels = _array_called(path, wanted, "label_column") if wanted else _find(path, "labels")
    if path.suffix != ".npz":
        return labels, names_in(path.parent)
    names = _find(path, "classes")
    return labels, None if names is None else [str(name) for name in names.ravel()]


def _captions(path: Path, wanted: str) -> tuple[str, np.ndarray | None]:
    """The array of captions and its name; None if there is none."""
    if wanted:
        return wanted, _array_called(path, wanted, "caption_column")
    arrays = ((name, _find(path, name)) for name in CAPTION_COLUMNS)
    return next(((name, array) for name, array in arrays if array is not None), ("", None))


def _array_called(path: Path, name: str, option: str) -> np.ndarray:
    """An array that an option names.

    Raises:
        DataError: there is none.
    """
    array = _find(path, name)
    if array is None:
        known = "" if path.suffix != ".npz" else f"; {nearest(name, _names_in(path))}"
        raise DataError(f'{path} has no array "{name}" (--{option}){known}')
    return array


def _find(path: Path, name: str) -> np.ndarray | None:
    """An array of an .npz file, or the .npy file beside one: labels.npy, or train_labels.npy beside
    train_images.npy. None if there is none."""
    if path.suffix == ".npz":
        with _open_npz(path) as archive:
            return _member(path, archive, name) if name in archive.files else None
    file = path.with_name(path.name.replace("images", name))
    return map_npy(file) if file != path and file.exists() else None


def _names_in(path: Path) -> list[str]:
    with _open_npz(path) as archive:
        return archive.files


def _others_in(path: Path) -> list[str]:
    """The names of arrays in an .npz file that are not read where there are no labels."""
    names = _names_in(path) if path.suffix == ".npz" else []
    return [name for name in names if name not in (*PICTURES, "classes", *CAPTION_COLUMNS)][:5]


def _open_npz(path: Path) -> np.lib.npyio.NpzFile:
    if not zipfile.is_zipfile(path):  # of another file, numpy would read what its header declares
        raise DataError(f"{path} is not an archive of arrays: write it with numpy.savez")
    try:
        archive = np.load(path, allow_pickle=False)
    except _DAMAGE as error:
        raise DataError(f"{path} is damaged, or not an archive of arrays: {error}") from error
    if sum(entry.compress_size for entry in archive.zip.infolist()) > path.stat().st_size:
        raise DataError(f"{path} is damaged: its members overlap; write it again")
    return archive


def _member(path: Path, archive: np.lib.npyio.NpzFile, name: str) -> np.ndarray:
    """An array of an archive, memory-mapped, or of at most `MAX_UNPACKED` bytes in memory."""
    assert archive.zip is not None  # it is closed with the archive
    try:
        member = archive.zip.getinfo(f"{name}.npy")
        _check_size(archive.zip, member)
        offset = _offset_of(path, member)
        if offset is not None:
            return map_npy(path, offset)
        if member.file_size <= MAX_UNPACKED:
            return archive[name]
    except SmaltiError:
        raise
    except _DAMAGE as error:
        raise DataError(
            f"{name} in {path} is damaged, or not an array of plain numbers: {error}"
        ) from error
    raise DataError(
        f"{name} in {path} has {member.file_size} bytes, and at most {MAX_UNPACKED} are unpacked: "
        "write it with numpy.savez, which does not compress, or as a .npy file"
    )


def _check_size(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    """Raise `ValueError` if the header of an array declares another size than the array has."""
    with archive.open(member) as stream:
        start = io.BytesIO(stream.read(MAX_HEADER))
    shape, _, dtype = _header(start)
    declared = start.tell() + math.prod(shape) * dtype.itemsize
    if declared != member.file_size:
        raise ValueError(f"its header declares {declared} bytes, and there are {member.file_size}")


def _offset_of(path: Path, member: zipfile.ZipInfo) -> int | None:
    """The offset of a member's bytes in a zip file; None if they are compressed."""
    if member.compress_type != zipfile.ZIP_STORED:
        return None
    with path.open("rb") as stream:
        stream.seek(member.header_offset)
        name_length, extra_length = LOCAL_HEADER.unpack(stream.read(LOCAL_HEADER.size))
    return member.header_offset + LOCAL_HEADER.size + name_length + extra_length


# numpy reads a header with Python's parser, which fails now and then where several threads use it
# at once ("AST constructor recursion depth mismatch", CPython's issue 106905).
_ONE_AT_A_TIME = threading.Lock()


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether the order is Fortran's, and type of the .npy array that begins here."""
    old = np.lib.format.read_magic(stream) == (1, 0)
    read = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
    with _ONE_AT_A_TIME:
        shape, fortran, dtype = read(stream)
    if dtype.hasobject:
        raise ValueError("pickled objects are refused")
    return shape, fortran, dtype


def map_npy(path: Path, offset: int = 0) -> np.ndarray:
    """The .npy array that begins at an offset of a file, memory-mapped.

    Raises:
        DataError: there is none, it holds pickled objects, or the file is shorter than its header
            declares.
    """
    if not path.is_file():  # a pipe, for example, for which reading would wait
        raise DataError(f"{path} is not a file: copy it again")
    with path.open("rb") as stream:
        try:
            stream.seek(offset)
            head = io.BytesIO(stream.read(MAX_HEADER))
            shape, fortran, dtype = _header(head)
            start = offset + head.tell()
            declared, held = math.prod(shape) * dtype.itemsize, path.stat().st_size - start
            if declared > held:  # np.memmap would compute it in 64 bits
                raise ValueError(f"its header declares {declared} bytes, and there are {held}")
            order = "F" if fortran else "C"
            return np.memmap(path, dtype, "r", start, shape, order)
        except _DAMAGE as error:
            raise DataError(
                f"{path} is damaged, or not an array of plain numbers: {error}"
            ) from error
