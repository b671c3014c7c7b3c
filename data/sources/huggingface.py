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
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch

from smalti.config import nearest
from smalti.data.sources.annotations import captions_of
from smalti.data.sources.base import EncodedPictures, HuggingFaceOptions, SourceOptions
from smalti.data.sources.columns import (
    Columns,
    datasets_library,
    find_columns,
    first_line,
    guarded,
    labels_of,
)
from smalti.data.sources.download import folder_name, local_copies
from smalti.data.sources.folder import FolderPictures
from smalti.data.sources.index import files_below
from smalti.data.sources.listing import (
    PassedOver,
    RowFiles,
    expand_braces,
    is_picture,
    is_special,
    kind_of,
    matching,
    split_called,
)
from smalti.data.sources.parquet import ParquetPictures
from smalti.data.sources.streams import Sample, copy_stream
from smalti.errors import ConfigurationError, DataError

if TYPE_CHECKING:
    import datasets


logger = logging.getLogger(__name__)

# -- Rows: their pictures, and the files that they may name ---------------------------------------

SIZES_AT_ONCE = 10_000  # rows


def _unpacked(cache: Path | None) -> tuple[Path, ...]:
    """The folders into which `datasets` downloads and unpacks files."""
    default = datasets_library().config.DOWNLOADED_DATASETS_PATH
    return (Path(default), *([cache / "datasets" / "downloads"] if cache else []))


def _on_hub(name: str, cache: Path | None) -> RowFiles:
    """The files of a set on the Hub."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return RowFiles((Path(HF_HUB_CACHE), *_unpacked(cache)), name)


class HuggingFacePictures(EncodedPictures):
    """The rows of a map-style data set.

    Args:
        rows: the pictures to divide; if `heldout` is given, all are for training.
        heldout: the held-out pictures.
        files: the files that rows may name.

    Raises:
        DataError: the columns cannot be determined, or hold no pictures or labels.
    """

    def __init__(
        self,
        title: str,
        rows: "datasets.Dataset",
        heldout: "datasets.Dataset | None",
        options: SourceOptions,
        files: RowFiles,
    ) -> None:
        lib = datasets_library()
        columns = find_columns(title, rows.features, options)
        if heldout is not None and columns.captions not in (None, *heldout.features):
            self.captions_problem = (
                f'the column "{columns.captions}" is not in the held-out split of {title}'
            )
            columns = replace(columns, captions=None)
        self.title, self._column, self._files = title, columns.image, files
        parts = [_plain(part, columns) for part in (rows, heldout) if part is not None]
        try:
            self._rows = lib.concatenate_datasets(parts)
        except ValueError as error:  # different columns, or labels with different names
            raise DataError(
                f"the splits of {title} have different columns: {first_line(error)}"
            ) from error
        if len(self._rows) == 0:
            raise DataError(f"{title} holds no pictures: check --data and --hf.split")
        if heldout is not None:
            self.heldout = torch.arange(len(self._rows)) >= len(rows)
        values = [None] * len(self._rows) if columns.label is None else self._rows[columns.label]
        self.classes, self.labels = labels_of(title, list(values), columns)
        self._sizes = guarded(title, lambda: _sizes_of(self._rows, self._column))
        self._texts = self._rows.select_columns([columns.captions] if columns.captions else [])
        self._caption_column = columns.captions
        if columns.captions:
            self.captions_from = f'the column "{columns.captions}"'
            self.captioned = torch.tensor(guarded(title, lambda: _have_text(self._texts)))

    def open(self, index: int) -> BinaryIO:
        value = self._rows[index][self._column]
        return io.BytesIO(self._files.picture(value, self.place(index)))

    def size(self, index: int) -> int:
        return self._sizes[index]

    def name(self, index: int) -> str:
        return f"row {index}"

    def captions(self, index: int) -> tuple[str, ...]:
        if self._caption_column is None:
            return ()
        return captions_of(self._texts[index][self._caption_column])


def _plain(rows: Any, columns: Columns) -> Any:
    """Only the columns of pictures, labels and captions, pictures not decoded."""
    wanted = (columns.image, columns.label, columns.captions)
    kept = rows.select_columns([name for name in dict.fromkeys(wanted) if name])
    try:
        return kept.cast_column(columns.image, datasets_library().Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise DataError(
            f'the column "{columns.image}" holds no pictures: name another in --hf.image_column'
        ) from error


def _sizes_of(rows: Any, column: str) -> list[int]:
    """The lengths in bytes of all pictures, from the offsets that arrow keeps; 0 for paths."""
    compute: Any = importlib.import_module("pyarrow.compute")  # without types
    sizes: list[int] = []
    for table in rows.with_format("arrow").iter(SIZES_AT_ONCE):
        content = compute.struct_field(table[column], "bytes")
        sizes += [size or 0 for size in compute.binary_length(content).to_pylist()]
    return sizes


def _have_text(texts: Any) -> list[bool]:
    """Which rows of a single column have a caption."""
    (column,) = texts.column_names
    return [bool(captions_of(value)) for row in texts.iter(SIZES_AT_ONCE) for value in row[column]]


# -- Sets: saved folders, parquet and arrow files, folders of pictures, and the Hub ---------------

SAVED = ("dataset_dict.json", "state.json")  # `save_to_disk` writes one of them
# What `datasets` reads beside pictures; metadata files contain labels and captions of pictures.
TABLES = {".parquet", ".arrow", ".csv", ".tsv", ".jsonl", ".zip", ".tar"}
METADATA = {f"metadata.{kind}" for kind in ("csv", "jsonl", "parquet")}
SHARD_NAME = re.compile(r"(\w+)-\d{5}-of-\d{5}")  # train-00000-of-00010.parquet
CARD = re.compile(r"^(configs|dataset_info):", re.MULTILINE)  # in the header of README.md


def open_hub(spec: str, options: SourceOptions) -> EncodedPictures:
    """`hf:owner/name` on the Hub, or `hf:FOLDER` with files as on the Hub or of `save_to_disk`."""
    name = spec.removeprefix("hf:")
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _open_folder(spec, options, folder)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise DataError(f"the folder {name} does not exist: check --data")
    if "/" in name and folder.parent.is_dir():
        raise DataError(
            f"the folder {name} does not exist, and the Hub is not asked for it, because "
            f"{folder.parent} is a folder here: check --data"
        )
    logger.warning("there is no folder %s: asking the Hub for the data set of this name", name)
    return _open(spec, options, name, _on_hub(name, options.stream_cache))


def _open_folder(spec: str, options: SourceOptions, folder: Path) -> EncodedPictures:
    """A local folder: of `save_to_disk`, of picture files, or of files that `datasets` reads."""
    if any((folder / mark).is_file() for mark in SAVED):
        return open_saved(str(folder), options)
    hf, passed = options.hf, PassedOver()
    files = sorted(files_below(folder, passed))
    if _are_pictures(files):
        _refuse_unused(spec, options)
        if hf.image_column or hf.label_column:
            raise ConfigurationError(
                f"{spec} is a folder of pictures, whose classes are its sub-folders: leave out "
                "--hf.image_column and --hf.label_column"
            )
        return FolderPictures(folder, options, hf.split, hf.heldout_split)
    card = folder / "README.md"
    described = card.is_file() and CARD.search(card.read_text("utf-8", errors="replace"))
    tables = [file for file in files if file.suffix.lower() in TABLES]
    row_files = RowFiles((folder, *_unpacked(options.stream_cache)))
    if hf.config or described or not _only_parquet(tables):
        if escape(str(folder.resolve())) != str(folder.resolve()):
            raise DataError(f"{folder} has brackets in its path: rename it for `datasets`")
        everything = {} if hf.split or hf.heldout_split or described else _everything(folder, files)
        return _open(spec, options, str(folder), row_files, **everything)
    for file in files:
        if file not in tables:
            passed.add(kind_of(file.name), file.relative_to(folder).as_posix())
    if passed.total:
        logger.warning("ignored %d files in %s: %s", passed.total, folder, passed)
    return _open_parquet(spec, options, folder, tables, row_files)


def _are_pictures(files: Sequence[Path]) -> bool:
    """Whether they are picture files without tables of labels or captions."""
    pictures = sum(map(is_picture, files))
    tables = Counter(file.suffix.lower() for file in files if file.suffix.lower() in TABLES)
    described = any(file.name in METADATA for file in files)
    return pictures > tables.total() and not described and not tables[".zip"]


def _only_parquet(tables: Sequence[Path]) -> bool:
    return bool(tables) and all(file.suffix == ".parquet" for file in tables)


def _everything(folder: Path, files: Sequence[Path]) -> dict[str, Any]:
    """The argument with which `datasets` reads all pictures of a folder as one split, unless they
    are in split folders; by itself it leaves files out if the names of others are those of splits.
    """
    pictures = [file.relative_to(folder) for file in files if is_picture(file)]
    if all(len(path.parts) > 1 and split_called(path.parts[0]) for path in pictures):
        return {}
    return {"data_files": {"train": "**"}}


def _open_parquet(
    spec: str, options: SourceOptions, folder: Path, files: list[Path], row_files: RowFiles
) -> EncodedPictures:
    """Parquet files whose names, or those of their folders, tell the splits; one split if any of
    them does not."""
    _check_parquet(spec, files)
    splits: dict[str, list[str]] = {}
    for file in files:
        splits.setdefault(_split_of(file.relative_to(folder)), []).append(escape(str(file)))
    if "" in splits and len(splits) > 1 and not (options.hf.split or options.hf.heldout_split):
        logger.warning(
            "the names of %d of %d files in %s tell no split: all are read as one",
            *(len(splits[""]), len(files), folder),
        )
        splits = {"train": [escape(str(file)) for file in files]}
    splits = {"train": [], **splits}
    splits["train"] += splits.pop("", [])
    named = {split: files for split, files in splits.items() if files}
    return _open(spec, options, "parquet", row_files, data_files=named)


def _split_of(path: Path) -> str:
    """The split that a relative path names as `datasets` understands it; "" if it names none."""
    if found := SHARD_NAME.match(path.name):
        return found[1]
    for part in reversed(path.with_suffix("").parts):
        for word in re.split(r"[-._ 0-9]+", part):
            if split := split_called(word):
                return split
    return ""


def open_files(spec: str, options: SourceOptions) -> EncodedPictures:
    """Parquet or arrow files: one, those that match a glob, those in a folder, or at URLs.

    Parquet files at URLs are copied to `stream_cache`, or read in place without it.
    """
    datasets_library()
    path = Path(spec).expanduser()
    if "://" in spec:
        if spec.endswith(".arrow"):
            raise DataError(f"{spec} is a URL, and arrow files are read from this disk: copy them")
        urls, cache = expand_braces(spec), options.stream_cache
        if cache is None and not spec.startswith("file:"):
            return ParquetPictures(spec, urls, [], options, RowFiles(_unpacked(None)))
        files = local_copies(urls, cache, (), check=lambda copy: _check_parquet(spec, [copy]))
    elif path.is_dir():
        found = [file for file in sorted(path.iterdir()) if not is_special(file)]
        kinds = {kind: [f for f in found if f.suffix == kind] for kind in (".parquet", ".arrow")}
        if all(kinds.values()):
            raise DataError(
                f"{path} holds parquet and arrow files: name those to read, for example "
                f"--data '{path}/*.parquet'"
            )
        if kinds[".parquet"]:
            return _open_folder(spec, options, path)
        files = kinds[".arrow"]
    else:
        files = [file for file in matching(path) if not is_special(file)]
    if not files:
        raise DataError(f"{path} does not exist: check --data")
    row_files = RowFiles(
        (*dict.fromkeys(file.parent for file in files), *_unpacked(options.stream_cache))
    )
    if files[0].suffix == ".arrow":
        _refuse_unused(spec, options)
        lib = datasets_library()
        parts = guarded(spec, lambda: [lib.Dataset.from_file(str(file)) for file in files])
        return _map_style(spec, lib.concatenate_datasets(parts), options, row_files)
    _check_parquet(spec, files)
    names = [escape(str(file)) for file in files]
    return _open(spec, options, "parquet", row_files, data_files=names)


def _check_parquet(spec: str, files: Sequence[Path]) -> None:
    """Raise `DataError` if a file is damaged, naming it, or if all are empty."""
    parquet: Any = importlib.import_module("pyarrow.parquet")  # without types
    rows = [guarded(str(file), partial(parquet.read_metadata, file)).num_rows for file in files]
    if not any(rows):
        raise DataError(f"{spec} holds no pictures: check --data")


def open_saved(spec: str, options: SourceOptions) -> EncodedPictures:
    """A folder that `save_to_disk` wrote."""
    _refuse_unused(spec, options)
    folder = os.path.expanduser(spec)
    loaded = guarded(spec, lambda: datasets_library().load_from_disk(folder))
    return _map_style(spec, loaded, options, RowFiles((Path(folder), *_unpacked(None))))


def _open(
    spec: str, options: SourceOptions, path: str, files: RowFiles, **arguments: Any
) -> EncodedPictures:
    """The data set of `datasets.load_dataset(path)`, as a stream or not."""
    hf, cache = options.hf, options.stream_cache
    if hf.streaming and cache is not None:
        return _streamed(spec, options, cache, path, files, arguments)
    if hf.streaming:
        return _in_place(spec, options, path, files, arguments)
    loaded = guarded(spec, lambda: _load(hf, path, cache_dir=_arrow_cache(cache), **arguments))
    return _map_style(spec, loaded, options, files)


def _in_place(
    spec: str, options: SourceOptions, path: str, files: RowFiles, arguments: dict[str, Any]
) -> ParquetPictures:
    """The rows of parquet files, without a copy."""
    hf, load = options.hf, datasets_library().load_dataset_builder
    revision = hf.revision or None
    builder = guarded(spec, lambda: load(path, hf.config or None, revision=revision, **arguments))
    splits = builder.config.data_files or {}
    names = [str(name) for split in splits.values() for name in split]
    if not names or not all(name.endswith(".parquet") for name in names):
        hub = (
            ""
            if os.path.isdir(path)
            else ", or read the Hub's own: --hf.revision refs/convert/parquet"
        )
        raise ConfigurationError(
            f"{spec} does not consist of parquet files, which alone are read in place: pass "
            f"--stream_cache FOLDER for a copy of the samples{hub}"
        )
    rows = _choose_split(spec, splits, hf.split)
    heldout = _choose_split(spec, splits, hf.heldout_split) if hf.heldout_split else []
    features = builder.info.features
    pictures = ParquetPictures(spec, rows, heldout, options, files, features)
    pictures.remarks = _say_splits(spec, splits, rows, heldout)
    return pictures


def _load(hf: HuggingFaceOptions, path: str, **arguments: Any) -> Any:
    return datasets_library().load_dataset(
        path, hf.config or None, revision=hf.revision or None, **arguments
    )


def _arrow_cache(cache: Path | None) -> str | None:
    """Where `datasets` writes the arrow files that it makes of parquet; None = its own cache."""
    return None if cache is None else str(cache / "datasets")


def _map_style(
    spec: str, loaded: Any, options: SourceOptions, files: RowFiles
) -> HuggingFacePictures:
    hf = options.hf
    rows = _choose_split(spec, loaded, hf.split)
    heldout = _choose_split(spec, loaded, hf.heldout_split) if hf.heldout_split else None
    pictures = HuggingFacePictures(spec, rows, heldout, options, files)
    pictures.remarks = _say_splits(spec, loaded, rows, heldout)
    return pictures


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


def _say_splits(spec: str, loaded: Any, rows: Any, heldout: Any = None) -> tuple[str, ...]:
    """Log which splits are read, if there are several or it is not "train"; return the remark."""
    if not isinstance(loaded, dict) or list(loaded) == ["train"]:
        return ()
    uses = {id(rows): "read", id(heldout): "held out"}
    parts = []
    for name, split in loaded.items():
        count = f" ({split.num_rows} rows)" if hasattr(split, "num_rows") else ""
        parts.append(f"{name}{count} is {uses.get(id(split), 'not read')}")
    remark = f"splits of {spec}: {', '.join(parts)}; choose with --hf.split and --hf.heldout_split"
    logger.warning(remark)
    return (remark,)


def _streamed(
    spec: str,
    options: SourceOptions,
    cache: Path,
    path: str,
    files: RowFiles,
    arguments: dict[str, Any],
) -> EncodedPictures:
    """A local copy of the stream; once it is complete, the network is not used."""
    hf, captions = options.hf, options.caption_column
    request = {
        "data": os.path.abspath(path) if os.path.isdir(path) else path,
        **arguments,
        "config": hf.config,
        "revision": hf.revision,
        "split": hf.split,
        "columns": [hf.image_column, options.labels_in, *([captions] if captions else [])],
        "max_samples": hf.max_samples,
    }
    opened: list[tuple[Any, Columns]] = []

    def stream() -> tuple[Any, Columns]:
        if not opened:
            loaded = guarded(spec, lambda: _load(hf, path, streaming=True, **arguments))
            rows = _choose_split(spec, loaded, hf.split)
            _say_splits(spec, loaded, rows)
            columns = find_columns(spec, rows.features, options)
            opened.append((_plain(rows, columns), columns))
        return opened[0]

    def samples(start: int) -> Iterator[Sample]:
        rows, columns = stream()
        rows = rows.take(hf.max_samples) if hf.max_samples else rows
        left = iter(rows.skip(start))
        for number in itertools.count(start):
            row = guarded(f"{spec}, from sample {number} on,", lambda: next(left, None))
            if row is None:
                return
            place = f"{spec}: sample {number}"
            content = guarded(place, partial(files.picture, row[columns.image], place))
            label = row[columns.label] if columns.label else None
            texts = captions_of(row[columns.captions]) if columns.captions else ()
            yield Sample(content, label, texts)

    return copy_stream(
        cache / folder_name(spec, repr(request)),
        samples,
        title=spec,
        classes=lambda: stream()[1].classes,
        request=request,
    )


def _refuse_unused(spec: str, options: SourceOptions) -> None:
    """Raise `ConfigurationError` for options that do not apply to local files."""
    hf = options.hf
    unused = {"hf.streaming": hf.streaming, "hf.config": hf.config, "hf.revision": hf.revision}
    for name, value in {**unused, "stream_cache": options.stream_cache}.items():
        if value:
            raise ConfigurationError(f"{spec} is read in place: leave out --{name}")
