"""Sets of pictures that `smalti evaluate` compares, read a part at a time.

    a folder, a data set or an npz    whatever `--data` takes, ADM's npz among it
    a generated folder                of `smalti generate`: its manifest has classes and prompts
    statistics                        an npz with mu and sigma, as ADM and torch-fidelity write them

(A pipeline, whose pictures are sampled, is a set in `scripts/evaluate_sets.py`.) All give 8-bit
pictures at given positions, so that a set is read by several processes, and again from any position
after an interruption.
"""

import dataclasses
import hashlib
import io
import json
import tarfile
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from smalti.config import ImageSize
from smalti.data.dataset import DataOptions, Split
from smalti.data.generated import SETTINGS, Row, has_manifest, manifest_parts, recorded_rows
from smalti.data.image_io import to_8_bit
from smalti.data.latents import resolution
from smalti.data.sources.arrays import ArraySource
from smalti.data.sources.base import ImageSource, SourceOptions, fingerprint_of, heldout_mask
from smalti.data.sources.verification import in_threads
from smalti.data.transforms import center_crop, to_tensor
from smalti.errors import DataError
from smalti.files import read_hashed_json, replacing, sha256_of

# -------------------------------------------------------------------------------------------------
# Sets of pictures


class ImageSet(ABC):
    """Pictures of one size, in a fixed order.

    Args:
        name: as the user gave it.
        kind: what it is, for the protocol.
        identity: changes when any picture does; known before they are read.
        exact: whether it covers the content of all pictures; otherwise their names and lengths, so
            that one could change and the identity stay.
        lossy: the format of its files, if that changes pixels, such as JPEG; "" if not.
        classes: names of the classes; () = the pictures have none.
        labels: (N,) the class of each picture.
        captions: a text for each picture; () = they have none.
        protocol: how the pictures were made or read.
    """

    def __init__(
        self,
        name: str,
        kind: str,
        identity: str,
        *,
        classes: Sequence[str] = (),
        labels: Tensor | None = None,
        captions: Sequence[str] = (),
        protocol: dict[str, Any] | None = None,
        exact: bool = True,
        lossy: str = "",
    ) -> None:
        self.name, self.kind, self.identity = name, kind, identity
        self.exact, self.lossy = exact, lossy
        self.classes, self.labels = tuple(classes), labels if classes else None
        self.captions, self.protocol = captions, protocol or {}

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def levels(self, rows: Sequence[int]) -> Tensor:
        """The pictures at some positions, uint8 (B, C, H, W).

        Raises:
            DataError: one cannot be read, or their sizes differ.
        """

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of the first picture, which is that of all of them."""
        return tuple(self.levels([0]).shape[1:])

    def _stacked(self, pictures: Sequence[Tensor], names: Sequence[str]) -> Tensor:
        """Pictures (C, H, W) of one size as (B, C, H, W).

        Raises:
            DataError: their sizes differ.
        """
        first = tuple(pictures[0].shape) if "shape" not in self.__dict__ else self.shape
        for picture, name in zip(pictures, names, strict=True):
            if tuple(picture.shape) != first:
                one, other = (_in_words(shape) for shape in (first, tuple(picture.shape)))
                raise DataError(
                    f"the first picture of {self.name} has {one}, and {name} has {other}: give "
                    "--image_size N, which crops the centre of each picture and resizes it to N x N"
                )
        return torch.stack(list(pictures))


def _in_words(shape: tuple[int, ...]) -> str:
    return f"{resolution((shape[1], shape[2]))} pixels in {shape[0]} channels"


class SourceSet(ImageSet):
    """The pictures of a data set, or those of one of its splits.

    Args:
        size: the centre of each picture is cropped and resized to it, as for training; None: the
            pictures as they are.
        exact: whether the fingerprint of the source covers the content of its pictures.
    """

    def __init__(
        self,
        name: str,
        source: ImageSource,
        rows: Tensor,
        size: ImageSize | None,
        split: Split,
        exact: bool,
    ) -> None:
        self.source, self.rows, self.size = source, rows.tolist(), size
        if not self.rows:
            raise DataError(f"{name} has no pictures in its split {split}: choose another split")
        crop = "none" if size is None else f"centre, to {resolution(size)}, box and bicubic (ADM's)"
        which = ",".join(map(str, self.rows)) if split != "all" else "all"
        has_captions = source.has_captions
        super().__init__(
            name,
            "npz" if isinstance(source, ArraySource) else "data set",
            fingerprint_of([source.fingerprint.encode(), which.encode(), crop.encode()]),
            classes=source.classes,
            labels=source.labels[rows],
            captions=[source.captions(row)[0] for row in self.rows] if has_captions else (),
            protocol={"split": split, "crop": crop},
            exact=exact,
            lossy=_lossy_format(source.name(row) for row in self.rows),
        )

    def __len__(self) -> int:
        return len(self.rows)

    def levels(self, rows: Sequence[int]) -> Tensor:
        places = [self.rows[row] for row in rows]

        def read(n: int) -> Tensor:
            picture = self.source.read(places[n])
            return to_tensor(picture if self.size is None else center_crop(picture, self.size))

        found = in_threads(read, len(places), f"read {self.name}")
        return self._stacked(found, [self.source.name(place) for place in places])


class GeneratedSet(ImageSet):
    """The pictures of a folder that `smalti generate` filled, in the order of their numbers.

    Raises:
        DataError: the manifest or a file is missing or damaged.
    """

    def __init__(self, name: str, folder: Path, size: ImageSize | None) -> None:
        self.folder, self.size, self.rows = folder, size, _rows_of(folder)
        self._shards: dict[str, dict[str, tuple[int, int]]] = {}  # file -> member -> place
        self._arrays: dict[str, np.ndarray] = {}
        given = [(row["class"], int(row.get("label", 0))) for row in self.rows if "class" in row]
        names = dict(sorted((label, name) for name, label in given))
        numbers = {label: number for number, label in enumerate(names)}
        complete = len(given) == len(self.rows)
        prompts = [str(row["prompt"]) for row in self.rows if "prompt" in row]
        hashes = [row["sha256"].encode() for row in self.rows]
        crop = "none" if size is None else f"centre, to {resolution(size)}, box and bicubic (ADM's)"
        settings = _settings_of(folder, len(self.rows))
        lossy = _lossy_format(row.get("member", row["file"]) for row in self.rows)
        if settings.get("format") == "webp" and settings.get("quality") is not None:
            lossy = f"WebP, quality {settings['quality']}"
        super().__init__(
            name,
            "generated folder",
            fingerprint_of([*hashes, crop.encode()]),
            classes=list(names.values()) if complete else (),
            labels=torch.tensor([numbers[label] for _, label in given]) if complete else None,
            captions=prompts if len(prompts) == len(self.rows) else (),
            protocol={"crop": crop, "sampling": settings},
            lossy=lossy,
        )

    def __len__(self) -> int:
        return len(self.rows)

    def levels(self, rows: Sequence[int]) -> Tensor:
        chosen = [self.rows[row] for row in rows]
        for row in chosen:  # in one thread: what is opened once
            self._open(str(row["file"]))
        found = in_threads(lambda n: self._read(chosen[n]), len(chosen), f"read {self.name}")
        names = [str(row.get("member", row["file"])) for row in chosen]
        return self._stacked(found, names)

    def _open(self, file: str) -> None:
        path = self.folder / file
        try:
            if file.endswith(".tar") and file not in self._shards:
                with tarfile.open(path) as shard:
                    members = [member for member in shard.getmembers() if member.isfile()]
                self._shards[file] = {m.name: (m.offset_data, m.size) for m in members}
            elif file.endswith(".npz") and file not in self._arrays:
                self._arrays[file] = ArraySource(path, SourceOptions()).images
        except (OSError, tarfile.TarError) as error:
            raise DataError(f"{path} cannot be read ({error}): generate it again") from error

    def _read(self, row: Row) -> Tensor:
        try:
            content, picture = self._content(row)
            if hashlib.sha256(content).hexdigest() != row["sha256"]:
                raise OSError("it is not the picture that this job wrote")
            if picture is None:
                with Image.open(io.BytesIO(content)) as opened:
                    picture = to_8_bit(opened) if opened.mode != "RGBA" else opened.copy()
        except (OSError, KeyError, IndexError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(
                f"{row.get('member', row['file'])} of {self.folder} cannot be read ({error}): run "
                "the same smalti generate again"
            ) from error
        return to_tensor(picture if self.size is None else center_crop(picture, self.size))

    def _content(self, row: Row) -> tuple[bytes, Image.Image | None]:
        """The bytes of a picture that its hash is of; and the picture, if they are pixels."""
        file = row["file"]
        if file in self._arrays:
            pixels = np.ascontiguousarray(self._arrays[file][row["index"]])
            return pixels.tobytes(), Image.fromarray(pixels)
        if file not in self._shards:
            return (self.folder / file).read_bytes(), None
        offset, length = self._shards[file][row["member"]]
        with (self.folder / file).open("rb") as stream:
            stream.seek(offset)
            return stream.read(length), None


def _lossy_format(names: Iterable[str]) -> str:
    """JPEG, if a file has such a name; ""."""
    return "JPEG" if any(name.lower().endswith((".jpg", ".jpeg")) for name in names) else ""


def _rows_of(folder: Path) -> list[Row]:
    """The rows of the pictures of a generated folder, in their order.

    Raises:
        DataError: it is not finished; its manifest is damaged, or names no pictures.
    """
    rows, damaged = recorded_rows(folder)
    found = [rows[index] for index in sorted(rows)]
    if not all(isinstance(row.get(name), str) for row in found for name in ("file", "sha256")):
        damaged.append("a line names no file or no hash")
    if damaged or not found:
        problem = f"is damaged ({damaged[0]})" if damaged else "names no pictures"
        raise DataError(f"the manifest of {folder} {problem}: run the same smalti generate again")
    if manifest_parts(folder):
        raise DataError(f"{folder} is not finished: run the same smalti generate again")
    return found


def _settings_of(folder: Path, pictures: int) -> dict[str, Any]:
    """How the pictures of a generated folder were sampled, without the lists of what they show.

    Args:
        pictures: their number.

    Raises:
        DataError: some are missing.
    """
    if not (folder / SETTINGS).is_file():
        return {}
    stored = read_hashed_json(folder / SETTINGS)
    wanted = len(stored.get("labels", ()))
    if pictures < wanted:
        raise DataError(
            f"{folder} has {pictures} of {wanted} pictures: finish it with the same smalti generate"
        )
    return {n: value for n, value in stored.items() if n not in ("labels", "prompts", "given")}


# -------------------------------------------------------------------------------------------------
# Statistics


@dataclass(frozen=True)
class Gaussian:
    """Mean and covariance of features: all that a Frechet distance needs of a set."""

    mean: Tensor  # (d,) float64
    covariance: Tensor  # (d, d) float64
    count: int | None  # pictures; None = the file does not say


@dataclass(frozen=True)
class Statistics:
    """An npz file of mu and sigma, and of mu_s and sigma_s, those of the features of sFID."""

    name: str
    sha256: str
    features: Gaussian
    spatial: Gaussian | None = None
    # Of files that smalti wrote: the extractor, its weights, and the pictures.
    record: dict[str, Any] = field(default_factory=dict)

    def check_extractor(self, name: str, weights_sha256: str, dim: int, resize: str = "") -> None:
        """Raise `DataError` unless the statistics may be those of this extractor.

        Args:
            resize: how it resizes pictures, if that is known.
        """
        before = self.record.get("resize", resize)
        if resize and before != resize:
            raise DataError(
                f"{self.name} has statistics of pictures with another resize ({before}) than that "
                f"of {name} ({resize}): save them again with --save_statistics"
            )
        known = self.record.get("weights_sha256")
        if known is not None and known != weights_sha256:
            raise DataError(
                f"{self.name} has statistics of features of {self.record.get('features')} (weights "
                f"{known[:12]}), and these are of {name} (weights {weights_sha256[:12]}): give the "
                "same --features"
            )
        if len(self.features.mean) != dim:
            raise DataError(
                f"{self.name} has statistics of {len(self.features.mean)} features, and {name} "
                f"gives {dim}: statistics of 2048 are mostly of Inception, --features inception"
            )


def save_statistics(
    path: Path, features: Gaussian, spatial: Gaussian | None, record: dict[str, Any]
) -> None:
    """Write the npz that ADM's evaluator and pytorch-fid read, with a record of its making."""
    arrays: dict[str, Any] = {"mu": features.mean.numpy(), "sigma": features.covariance.numpy()}
    if spatial is not None:
        arrays |= {"mu_s": spatial.mean.numpy(), "sigma_s": spatial.covariance.numpy()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open("wb") as stream:
        np.savez(stream, **arrays, record=np.array(json.dumps(record)))


_DAMAGE = (OSError, ValueError, KeyError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error)


def npz_names(path: Path) -> list[str]:
    """The names of the arrays in an npz file, () of another file."""
    if path.suffix != ".npz" or not path.is_file():
        return []
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except _DAMAGE as error:
        raise DataError(f"{path} is damaged, or not an archive of arrays: {error}") from error


def read_statistics(path: Path) -> Statistics:
    """The statistics in an npz file.

    Raises:
        DataError: it is damaged, or an array has a wrong shape.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            record = json.loads(str(arrays["record"])) if "record" in arrays.files else {}
            count = record.get("pictures")
            pairs = [("mu", "sigma"), ("mu_s", "sigma_s")]
            found = [
                Gaussian(
                    torch.from_numpy(arrays[mean].astype(np.float64)),
                    torch.from_numpy(arrays[covariance].astype(np.float64)),
                    count,
                )
                for mean, covariance in pairs
                if {mean, covariance} <= set(arrays.files)
            ]
    except _DAMAGE as error:
        raise DataError(f"{path} is damaged, or not an archive of arrays: {error}") from error
    for one in found:
        dim = one.mean.numel()
        finite = one.mean.isfinite().all() and one.covariance.isfinite().all()
        if one.mean.shape != (dim,) or one.covariance.shape != (dim, dim) or not finite:
            raise DataError(
                f"{path} has mu {tuple(one.mean.shape)} and sigma {tuple(one.covariance.shape)}; "
                "they must be finite numbers (d,) and (d, d)"
            )
    spatial = found[1] if len(found) > 1 else None
    return Statistics(str(path), sha256_of(path), found[0], spatial, record)


# -------------------------------------------------------------------------------------------------
# Opening


@dataclass
class OpenedSet:
    """Pictures, statistics, or both: ADM's reference files have the statistics of all pictures, and
    some of the pictures."""

    pictures: ImageSet | None
    statistics: Statistics | None = None
    fits: set[str] = field(default_factory=set)  # names of extractors that the statistics may be of

    @property
    def identity(self) -> str:
        """Changes when a picture or a number does."""
        parts = [self.pictures.identity] if self.pictures is not None else []
        return "/".join([*parts, *([self.statistics.sha256] if self.statistics else [])])


def open_set(
    spec: str, options: DataOptions, *, size: ImageSize | None = None, split: Split = "all"
) -> OpenedSet:
    """The set that `spec` names, see the top of this file.

    Args:
        options: how a data set is read.
        size: of the pictures, which are cropped to it; None: as they are.
        split: of a data set: all pictures, or those of training or held out by `options`.

    Raises:
        DataError: there is no such set, or it cannot be read.
    """
    place = Path(spec).expanduser()
    names = npz_names(place)
    statistics = read_statistics(place) if {"mu", "sigma"} <= set(names) else None
    if statistics is not None and not {"arr_0", "images"} & set(names):
        return OpenedSet(None, statistics)
    if place.is_dir() and has_manifest(place):
        return OpenedSet(GeneratedSet(spec, place, size))
    # Those of a command may be of a subclass, which has options of its own.
    given = {part.name: getattr(options, part.name) for part in dataclasses.fields(DataOptions)}
    options = DataOptions(**{**given, "data": spec})
    if "arr_1" in names and "labels" not in names and not options.label_column:
        options = dataclasses.replace(options, label_column="arr_1")  # as ADM names the labels
    source, part = options.source_of(split)
    keep = torch.ones(len(source), dtype=torch.bool)
    if part != "all":
        heldout = heldout_mask(source, options.heldout_fraction, options.split_seed)
        keep = heldout if part == "heldout" else ~heldout
    rows = keep.nonzero().flatten()
    exact = len(source) <= options.folder.verify_up_to
    return OpenedSet(SourceSet(spec, source, rows, size, split, exact), statistics)
