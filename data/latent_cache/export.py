"""Export of a latent cache for other code: parquet files, or WebDataset shards.

    out/
        shard-00000.parquet   columns index, label, captions (a list of texts), and codes, or mean
                              and std, or latents: (views, values)
        shard-00000.tar       00000000.codes.npy (views, L), or .mean.npy and .std.npy (views, C,
                              h, w) each, or .latents.npy; 00000000.cls; 00000000.captions.json
        _latents.json         the manifest of the cache, samples and sha256 of every file
        README.md             the splits, for `datasets.load_dataset(out)`

The caches of several splits, train/ and heldout/, become folders of such files. Values keep the
type that the cache has; the columns of pairs (rectified flow) are data and noise. Pictures without
classes have no label, and those without captions no texts.
"""

import io
import json
import logging
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm.auto import tqdm

from smalti.config import saved_fields
from smalti.data.latent_cache.cache import LatentCache
from smalti.data.latent_cache.manifest import MANIFEST, SPLITS, CacheInfo, bucket_folders
from smalti.data.latent_cache.splits import open_splits
from smalti.data.latents import ContinuousSpec
from smalti.data.sources.webdataset import tar_writer, write_sample
from smalti.errors import DataError
from smalti.files import replacing, sha256_of, write_hashed_json, write_text
from smalti.folders import replacing_folder

logger = logging.getLogger(__name__)

Format = Literal["parquet", "webdataset"]
Columns = Mapping[str, np.ndarray]  # name -> (n, views, ...)

INDEX = "_latents.json"  # pyarrow ignores names that begin with _
GROUP = 1024  # rows of a row group of a parquet file


def export_cache(folder: Path, out: Path, layout: Format) -> list[Path]:
    """Write a cache, or the caches of all splits in a folder, to a new folder; return its files.

    The folder appears complete or not at all.

    Raises:
        DataError: there is no finished cache, or not of every split; `out` exists already, or a
            package is missing.
    """
    write = WRITERS[layout]()
    with replacing_folder(out, check=lambda: _refuse_existing(out), retry=True) as new:
        caches = {cache.folder.relative_to(folder): cache for cache in _open_caches(folder)}
        for name, cache in caches.items():
            _export(cache, new / name, layout, write)
        write_text(new / "README.md", _card(caches, SUFFIXES[layout]))
    return sorted(path for path in out.rglob("*") if path.is_file())


def _refuse_existing(out: Path) -> None:
    """Raise `DataError` if there is anything at `out` but an empty folder."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise DataError(f"{out} exists, and nothing is overwritten: choose another folder")


def columns_of(info: CacheInfo, stored: np.ndarray) -> dict[str, np.ndarray]:
    """(n, views, ...) as the cache stores it -> its parts by name, (n, views, ...) each."""
    if not isinstance(info.spec, ContinuousSpec):
        return {"codes": stored}
    names = ("data", "noise") if info.pairs else info.statistics or ("latents",)
    return dict(zip(names, np.split(stored, len(names), axis=2), strict=True))


def _open_caches(folder: Path) -> list[LatentCache]:
    """A cache itself, or those of its splits."""
    if (folder / MANIFEST).is_file():
        return [LatentCache(folder)]
    if bucket_folders(folder):
        open_splits(folder)  # raises
    missing = [split for split in SPLITS if not (folder / split / MANIFEST).is_file()]
    if len(missing) == len(SPLITS):
        raise DataError(
            f"{folder} holds no finished latent cache: give the output folder of smalti encode"
        )
    if missing:
        raise DataError(
            f"the latent cache {folder / missing[0]} is not finished: run the command that writes "
            "it again, or export one split by naming its own folder"
        )
    return sorted(open_splits(folder), key=lambda cache: cache.folder)


@dataclass(frozen=True)
class _Samples:
    """The samples of one file."""

    indices: np.ndarray  # (n,)
    labels: list[int] | None
    captions: list[tuple[str, ...]] | None
    columns: Columns


Writer = Callable[[Path, _Samples], None]


def _export(cache: LatentCache, out: Path, layout: Format, write: Writer) -> None:
    out.mkdir(parents=True, exist_ok=True)
    shards = []
    if cache.info.conditions:
        names = ", ".join(condition.name for condition in cache.info.conditions)
        logger.warning("%s: the conditions are not exported: %s", cache.folder, names)
    for number in tqdm(range(cache.info.num_shards), desc=f"export {cache.folder.name}"):
        indices = np.arange(*cache.info.shard_range(number))
        path = out / f"shard-{number:05d}{SUFFIXES[layout]}"
        samples = _Samples(
            indices,
            cache.labels[indices].tolist() if cache.classes else None,
            cache.all_captions(indices),
            columns_of(cache.info, cache.all_views(indices)),
        )
        with replacing(path) as temporary:
            write(temporary, samples)
        shards.append({"url": path.name, "nsamples": len(indices), "sha256": sha256_of(path)})
    manifest = {"format": layout, "cache": saved_fields(cache.info), "shardlist": shards}
    write_hashed_json(out / INDEX, manifest)


def _card(caches: Mapping[Path, LatentCache], suffix: str) -> str:
    """The card of the data set: its splits, their numbers of samples and their views."""
    files, parts = "", ""
    for name, cache in caches.items():
        split = re.sub(r"\W", "_", name.name) or "train"
        files += f'  - split: {split}\n    path: "{(name / f"*{suffix}").as_posix()}"\n'
        views = ", ".join(cache.info.views)
        parts += f"- {split}: {cache.info.num_samples} samples; views of each: {views}\n"
    head = f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}---\n\n"
    return f"{head}# Latents\n\nExported by smalti; the manifest is `{INDEX}`.\n\n{parts}"


# -- WebDataset -----------------------------------------------------------------------------------


def _webdataset_writer() -> Writer:
    return _write_tar


def _write_tar(path: Path, samples: _Samples) -> None:
    with path.open("wb") as file, tar_writer(file) as archive:
        for row, index in enumerate(samples.indices):
            members = {f"{name}.npy": _npy(values[row]) for name, values in samples.columns.items()}
            if samples.labels is not None:
                members["cls"] = str(samples.labels[row]).encode()
            if samples.captions is not None:
                members["captions.json"] = json.dumps(samples.captions[row]).encode()
            write_sample(archive, f"{index:08d}", members)


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


# -- parquet --------------------------------------------------------------------------------------


def _parquet_writer() -> Writer:
    """Needs pyarrow."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError("parquet files need another package: pip install 'smalti[data]'") from error

    def write(path: Path, samples: _Samples) -> None:
        known = {"label": samples.labels, "captions": samples.captions}
        given = {name: values for name, values in known.items() if values is not None}
        arrays = {name: _nested(pyarrow, values) for name, values in samples.columns.items()}
        table = pyarrow.table({"index": samples.indices, **given, **arrays})
        pyarrow.parquet.write_table(table, path, row_group_size=GROUP)

    return write


def _nested(pyarrow: Any, values: np.ndarray) -> Any:
    """(n, views, ...) -> n lists of flat lists, one for each view.

    The number of views is not part of the type, because `datasets` needs one type for all splits.
    """
    n, views, length = len(values), values.shape[1], math.prod(values.shape[2:])
    flat = pyarrow.array(values.reshape(-1))
    inner = pyarrow.FixedSizeListArray.from_arrays(flat, length)
    offsets = np.arange(0, n * views + 1, views, dtype=np.int32)
    return pyarrow.ListArray.from_arrays(offsets, inner)


WRITERS: dict[Format, Callable[[], Writer]] = {
    "parquet": _parquet_writer,
    "webdataset": _webdataset_writer,
}
SUFFIXES: dict[Format, str] = {"parquet": ".parquet", "webdataset": ".tar"}
