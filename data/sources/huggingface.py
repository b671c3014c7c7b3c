"""Pictures in Hugging Face data sets: saved folders, parquet and arrow files, and the Hub.

The package `datasets` reads the rows, by number, without decoding pictures or other columns. A
stream (`--hf.streaming`) is copied to local shards first. No code in a data set is run: `datasets`
itself refuses scripts and pickles.
"""

import importlib
import io
import itertools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from tqdm.auto import tqdm

from smalti.config import nearest
from smalti.data.classes import named_classes, numbered_classes
from smalti.data.image_io import format_of
from smalti.data.sources.base import EncodedPictures, HuggingFaceOptions, SourceOptions
from smalti.data.sources.download import folder_name, locked
from smalti.data.sources.folder import EXTENSIONS
from smalti.data.sources.webdataset import (
    MANIFESTS,
    ShardPictures,
    list_members,
    tar_writer,
    write_sample,
)
from smalti.errors import ConfigurationError, DataError, SmaltiError
from smalti.files import replacing, write_json

if TYPE_CHECKING:
    import datasets


logger = logging.getLogger(__name__)

# -- Columns: which contain pictures and labels, and what the labels mean -------------------------

IMAGE_COLUMNS = ("image", "img", "picture", "jpg", "png", "webp")
LABEL_COLUMNS = ("label", "labels", "class", "cls", "fine_label")


@dataclass(frozen=True)
class Columns:
    """The columns of pictures and labels."""

    image: str
    label: str | None  # None: there are no labels
    classes: tuple[str, ...] | None  # names of the labels, if the label column contains numbers


def find_columns(title: str, features: Any, options: HuggingFaceOptions) -> Columns:
    """The columns that the options name, or else those found by type, or else by name.

    Raises:
        DataError: a column is missing, or several qualify.
    """
    lib = datasets_library()
    if features is None:
        raise DataError(f"{title} does not declare its columns: leave out --hf.streaming")
    image = options.image_column or _one_column(
        title, features, lib.Image, IMAGE_COLUMNS, "image_column"
    )
    if image is None:
        raise DataError(
            f"{title} has the columns {', '.join(features)}: name the one with pictures in "
            "--hf.image_column"
        )
    label = options.label_column or _one_column(
        title, features, lib.ClassLabel, LABEL_COLUMNS, "label_column"
    )
    for column in filter(None, (image, label)):
        if column not in features:
            raise DataError(f'{title} has no column "{column}"; {nearest(column, features)}')
    if label is None:
        others = ", ".join(name for name in features if name != image) or "no other"
        logger.warning(
            "no label column was found in %s (it has %s): name one in --hf.label_column",
            title,
            others,
        )
    names = getattr(features[label], "names", None) if label else None
    return Columns(image, label, tuple(names) if names else None)


def _one_column(
    title: str, features: Any, kind: type, names: Sequence[str], option: str
) -> str | None:
    """The only column of a type; else the first of some names that exists."""
    of_kind = [name for name, feature in features.items() if isinstance(feature, kind)]
    if len(of_kind) > 1:
        raise DataError(
            f"{title} has several suitable columns ({', '.join(of_kind)}): choose one with "
            f"--hf.{option}"
        )
    return next((name for name in (*of_kind, *names) if name in features), None)


def labels_of(
    title: str, values: list[Any], columns: Columns
) -> tuple[tuple[str, ...], torch.Tensor]:
    """Class names, and the labels (N,) int64.

    Args:
        values: the label column.

    Raises:
        DataError: a row has no label, or one that is neither a name nor a number from 0 on.
    """
    if columns.label is None:
        return ("",), torch.zeros(len(values), dtype=torch.int64)
    if all(type(value) is str for value in values):
        return named_classes(values, title)
    for row, value in enumerate(values):
        if type(value) is not int or value < 0:
            raise DataError(
                f"{title}: row {row} has the label {value!r}: choose another --hf.split or "
                "--hf.label_column"
            )
    return numbered_classes(values, columns.classes, title)


def datasets_library() -> Any:
    """The package `datasets`, an optional dependency.

    Raises:
        ConfigurationError: it is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise ConfigurationError(
            "Hugging Face data sets need another package: pip install 'smalti[data]'"
        ) from error
    return datasets


# -- Streams: copied once to local shards ---------------------------------------------------------
#
# A stream has no random access, so it can neither be shuffled exactly nor resumed at a step.
# Its samples are copied to shards of equal numbers of samples, each written atomically, and the
# manifest last. An interrupted copy continues after its last finished shard.

SHARD_SIZE = 1000  # samples
MANIFEST = MANIFESTS[0]


@dataclass(frozen=True)
class Sample:
    """An encoded picture and its label."""

    content: bytes
    label: int | str | None


def copy_stream(
    folder: Path,
    samples: Callable[[int], Iterator[Sample]],
    *,
    title: str,
    classes: Callable[[], tuple[str, ...] | None],
    request: dict[str, Any],
    shard_size: int = SHARD_SIZE,
) -> ShardPictures:
    """The samples of a stream as local shards in `folder`, which is created if necessary.

    Args:
        samples: yields the samples from a position on, always in the same order.
        classes: returns the names of the classes where labels are numbers.
        request: the options of the stream, which the manifest records.

    Raises:
        DataError: the stream is empty.
    """
    with locked(folder / MANIFEST):
        if not (folder / MANIFEST).is_file():
            counts = _write_shards(folder, samples, title, shard_size)
            names = classes()
            if names is not None:
                write_json(folder / "classes.json", list(names))
            write_json(folder / MANIFEST, {"shards": counts, "stream": request})
    return ShardPictures(title, sorted(folder.glob("[0-9]*.tar")), expect_all=True)


def _write_shards(
    folder: Path, samples: Callable[[int], Iterator[Sample]], title: str, shard_size: int
) -> dict[str, int]:
    """Write the missing shards; return the number of samples of each."""
    finished = itertools.takewhile(Path.is_file, (_shard(folder, n) for n in itertools.count()))
    counts = {path.name: len(list_members(path)) for path in finished}
    done = sum(counts.values())
    if len(counts) * shard_size != done:  # the last one is shorter: the stream ended there
        return counts
    stream = iter(tqdm(samples(done), desc=f"copy {title}", initial=done, unit=" pictures"))
    for number in itertools.count(len(counts)):
        part = list(itertools.islice(stream, shard_size))
        if part:
            path = _shard(folder, number)
            _write_shard(path, part, number * shard_size)
            counts[path.name] = len(part)
        if len(part) < shard_size:
            break
    if not counts:
        raise DataError(f"the stream of {title} holds no pictures: check --data and --hf.split")
    return counts


def _shard(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.tar"


def _write_shard(path: Path, samples: list[Sample], first: int) -> None:
    with (
        replacing(path) as temporary,
        temporary.open("wb") as file,
        tar_writer(file) as archive,
    ):
        for number, sample in enumerate(samples, first):
            members = {_extension(sample.content): sample.content}
            if sample.label is not None:
                members["cls"] = str(sample.label).encode()
            write_sample(archive, f"{number:09d}", members)


def _extension(content: bytes) -> str:
    """The file extension of a picture; a damaged one is copied as it is, and verified later."""
    extension = (format_of(content) or "").lower()
    return extension if f".{extension}" in EXTENSIONS else "png"


# -- Pictures of saved folders, parquet and arrow files, and the Hub ------------------------------

SIZES_AT_ONCE = 10_000  # rows
SAVED = ("dataset_dict.json", "state.json")  # `save_to_disk` writes one of them


class HuggingFacePictures(EncodedPictures):
    """The rows of a map-style data set.

    Args:
        rows: the pictures to divide; if `heldout` is given, all are for training.
        heldout: the held-out pictures.

    Raises:
        DataError: the columns cannot be determined, or hold no pictures or labels.
    """

    def __init__(
        self,
        title: str,
        rows: "datasets.Dataset",
        heldout: "datasets.Dataset | None",
        options: HuggingFaceOptions,
    ) -> None:
        lib = datasets_library()
        columns = find_columns(title, rows.features, options)
        self.title, self._column = title, columns.image
        parts = [_plain(part, columns) for part in (rows, heldout) if part is not None]
        try:
            self._rows = lib.concatenate_datasets(parts)
        except ValueError as error:  # different columns, or labels with different names
            raise DataError(
                f"the splits of {title} have different columns: {_first_line(error)}"
            ) from error
        if len(self._rows) == 0:
            raise DataError(f"{title} holds no pictures: check --data and --hf.split")
        if heldout is not None:
            self.heldout = torch.arange(len(self._rows)) >= len(rows)
        values = [None] * len(self._rows) if columns.label is None else self._rows[columns.label]
        self.classes, self.labels = labels_of(title, list(values), columns)
        self._sizes: list[int] | None = None

    def open(self, index: int) -> BinaryIO:
        return io.BytesIO(_content(self._rows[index][self._column], self.place(index)))

    def size(self, index: int) -> int:
        if self._sizes is None:
            self._sizes = _sizes_of(self._rows, self._column)
        return self._sizes[index]

    def name(self, index: int) -> str:
        return f"row {index}"


def open_hub(spec: str, options: SourceOptions) -> EncodedPictures:
    """`hf:owner/name` on the Hub, or `hf:FOLDER` with files as on the Hub or of `save_to_disk`."""
    name = spec.removeprefix("hf:")
    folder = os.path.expanduser(name)
    if not os.path.isdir(folder) and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise DataError(f"the folder {name} does not exist: check --data")
    if any(os.path.isfile(os.path.join(folder, mark)) for mark in SAVED):
        return open_saved(folder, options)
    return _open(spec, options, folder if os.path.isdir(folder) else name)


def open_files(spec: str, options: SourceOptions) -> EncodedPictures:
    """Parquet or arrow files: one, those that match a glob, or those in a folder."""
    datasets_library()
    path = Path(spec).expanduser()
    if path.is_dir() and not any(path.glob("*.arrow")):
        _check_parquet(spec, sorted(path.glob("*.parquet")))
        return _open(spec, options, str(path))  # file names determine the splits
    files = sorted(path.glob("*.arrow")) if path.is_dir() else _matching(path)
    if path.is_dir() or path.suffix == ".arrow":
        _refuse_unused(spec, options)
        lib = datasets_library()
        parts = _guarded(spec, lambda: [lib.Dataset.from_file(str(file)) for file in files])
        return _map_style(spec, lib.concatenate_datasets(parts), options.hf)
    _check_parquet(spec, files)
    return _open(spec, options, "parquet", data_files=[str(file) for file in files])


def _check_parquet(spec: str, files: Sequence[Path]) -> None:
    """Raise `DataError` if a file is damaged, naming it, or if all are empty."""
    parquet: Any = importlib.import_module("pyarrow.parquet")  # without types
    rows = [_guarded(str(file), partial(parquet.read_metadata, file)).num_rows for file in files]
    if not any(rows):
        raise DataError(f"{spec} holds no pictures: check --data")


def open_saved(spec: str, options: SourceOptions) -> EncodedPictures:
    """A folder that `save_to_disk` wrote."""
    _refuse_unused(spec, options)
    loaded = _guarded(spec, lambda: datasets_library().load_from_disk(os.path.expanduser(spec)))
    return _map_style(spec, loaded, options.hf)


def _open(spec: str, options: SourceOptions, path: str, **arguments: Any) -> EncodedPictures:
    """The data set of `datasets.load_dataset(path)`, as a stream or not."""
    hf, cache = options.hf, options.stream_cache
    if hf.streaming and cache is None:
        raise ConfigurationError(
            f"{spec} is streamed: pass --stream_cache FOLDER for a copy of the samples, without "
            "which neither their order nor a resumed run would be exact"
        )
    if hf.streaming and cache is not None:
        return _streamed(spec, hf, cache, path, arguments)
    loaded = _guarded(spec, lambda: _load(hf, path, cache_dir=_arrow_cache(cache), **arguments))
    return _map_style(spec, loaded, hf)


def _load(hf: HuggingFaceOptions, path: str, **arguments: Any) -> Any:
    return datasets_library().load_dataset(
        path, hf.config or None, revision=hf.revision or None, **arguments
    )


def _arrow_cache(cache: Path | None) -> str | None:
    """Where `datasets` writes the arrow files that it makes of parquet; None = its own cache."""
    return None if cache is None else str(cache / "datasets")


def _map_style(spec: str, loaded: Any, hf: HuggingFaceOptions) -> HuggingFacePictures:
    rows = _choose_split(spec, loaded, hf.split)
    heldout = _choose_split(spec, loaded, hf.heldout_split) if hf.heldout_split else None
    return HuggingFacePictures(spec, rows, heldout, hf)


def _choose_split(spec: str, loaded: Any, split: str) -> Any:
    if not isinstance(loaded, dict):  # a single split without a name
        if split:
            raise DataError(f'{spec} has no splits: leave out "{split}"')
        return loaded
    name = split or ("train" if "train" in loaded else "")
    if not name and len(loaded) == 1:
        (name,) = loaded
    if name not in loaded:
        raise DataError(f'{spec} has no split "{name}" (--hf.split); {nearest(name, loaded)}')
    return loaded[name]


def _streamed(
    spec: str, hf: HuggingFaceOptions, cache: Path, path: str, arguments: dict[str, Any]
) -> EncodedPictures:
    """A local copy of the stream; once it is complete, the network is not used."""
    request = {
        "data": os.path.abspath(path) if os.path.isdir(path) else path,
        **arguments,
        "config": hf.config,
        "revision": hf.revision,
        "split": hf.split,
        "columns": [hf.image_column, hf.label_column],
        "max_samples": hf.max_samples,
    }
    opened: list[tuple[Any, Columns]] = []

    def stream() -> tuple[Any, Columns]:
        if not opened:
            loaded = _guarded(spec, lambda: _load(hf, path, streaming=True, **arguments))
            rows = _choose_split(spec, loaded, hf.split)
            columns = find_columns(spec, rows.features, hf)
            opened.append((_plain(rows, columns), columns))
        return opened[0]

    def samples(start: int) -> Iterator[Sample]:
        rows, columns = stream()
        rows = rows.take(hf.max_samples) if hf.max_samples else rows
        left = iter(rows.skip(start))
        for number in itertools.count(start):
            row = _guarded(f"{spec}, from sample {number} on,", lambda: next(left, None))
            if row is None:
                return
            place = f"{spec}: sample {number}"
            content = _guarded(place, partial(_content, row[columns.image], place))
            yield Sample(content, row[columns.label] if columns.label else None)

    return copy_stream(
        cache / folder_name(spec, repr(request)),
        samples,
        title=spec,
        classes=lambda: stream()[1].classes,
        request=request,
    )


def _refuse_unused(spec: str, options: SourceOptions) -> None:
    """Raise `ConfigurationError` for options that do not apply to local arrow files."""
    hf = options.hf
    unused = {"hf.streaming": hf.streaming, "hf.config": hf.config, "hf.revision": hf.revision}
    for name, value in {**unused, "stream_cache": options.stream_cache}.items():
        if value:
            raise ConfigurationError(f"{spec} is read in place: leave out --{name}")


def _plain(rows: Any, columns: Columns) -> Any:
    """Only the columns of pictures and labels, pictures not decoded."""
    kept = rows.select_columns([name for name in (columns.image, columns.label) if name])
    try:
        return kept.cast_column(columns.image, datasets_library().Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise DataError(
            f'the column "{columns.image}" holds no pictures: name another in --hf.image_column'
        ) from error


def _content(value: Any, place: str) -> bytes:
    """The bytes of a picture; a path is opened only if it is local or on the Hub.

    Raises:
        OSError: the row has no picture.
    """
    if isinstance(value, dict) and value.get("bytes") is not None:
        return value["bytes"]
    path = value.get("path") if isinstance(value, dict) else None
    if not path:
        raise FileNotFoundError(f"{place} holds no picture")
    if path.rpartition("::")[2].startswith("hf://"):  # a file in the Hub repository of a stream
        import fsspec

        with fsspec.open(path, "rb") as stream:
            return stream.read()  # type: ignore[union-attr]
    return Path(path).read_bytes()


def _sizes_of(rows: Any, column: str) -> list[int]:
    """The lengths in bytes of all pictures, from the offsets that arrow keeps; 0 for paths."""
    compute: Any = importlib.import_module("pyarrow.compute")  # without types
    sizes: list[int] = []
    for table in rows.with_format("arrow").iter(SIZES_AT_ONCE):
        content = compute.struct_field(table[column], "bytes")
        sizes += [size or 0 for size in compute.binary_length(content).to_pylist()]
    return sizes


def _matching(path: Path) -> list[Path]:
    files = [path] if path.is_file() else sorted(path.parent.glob(path.name))
    if not files:
        raise DataError(f"{path} does not exist: check --data")
    return files


def _guarded(spec: str, load: Any) -> Any:
    """The result of `load()`; any exception becomes a `DataError` of one line."""
    try:
        return load()
    except SmaltiError:
        raise
    except Exception as error:  # the libraries raise many kinds; all mean "cannot be read"
        raise DataError(f"{spec} cannot be read: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    """The first line of the original error; that of `datasets` often has no cause in it."""
    while error.__cause__ is not None and type(error).__module__.startswith("datasets."):
        error = error.__cause__
    return (str(error).splitlines() or [type(error).__name__])[0]
