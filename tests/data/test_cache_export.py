"""An exported cache holds the same latents, as read by `datasets` and `webdataset`."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
import webdataset

from smalti.config import config_from_dict
from smalti.data.latent_cache import export as cache_export
from smalti.data.latent_cache.cache import CacheInfo, EncodedRange, LatentCache, write_cache
from smalti.data.latent_cache.export import export_cache
from smalti.data.latent_cache.manifest import StoredCondition
from smalti.data.latents import CodeSpec, ContinuousSpec
from smalti.errors import SmaltiError
from smalti.files import sha256_of

CODES = CacheInfo(
    spec=CodeSpec(1024, ((2, 3),)),
    classes=("a", "b"),
    num_samples=10,
    views=("identity", "flip"),
    tokenizer_fingerprint="t",
    dataset_fingerprint="d",
    shard_size=4,
)
KINDS = {
    "codes": CODES,
    "many codes": replace(CODES, spec=CodeSpec(70000, ((2, 3),))),
    "continuous": replace(CODES, spec=ContinuousSpec(2, 3, 4)),
    "pairs": replace(CODES, spec=ContinuousSpec(2, 3, 4), views=("identity",), pairs="p"),
}
NAMES = {"continuous": ("mean", "std"), "pairs": ("data", "noise")}


def make_cache(folder: Path, info: CacheInfo) -> LatentCache:
    shape = (info.num_samples, len(info.views), *info.shape)
    generator = torch.Generator().manual_seed(0)
    if isinstance(info.spec, CodeSpec):
        stored = torch.randint(info.spec.vocab_size, shape, generator=generator)
    else:
        stored = torch.randn(shape, generator=generator)
    labels = torch.arange(info.num_samples) % 2
    write_cache(folder, info, lambda a, b: EncodedRange(stored[a:b], labels[a:b]))
    return LatentCache(folder)


@pytest.fixture(params=KINDS)
def cache(request, tmp_path: Path) -> tuple[LatentCache, dict[str, np.ndarray]]:
    """A cache, and the parts of its latents by name."""
    made = make_cache(tmp_path / "cache", KINDS[request.param])
    stored = made.all_views(range(len(made)))
    names = NAMES.get(request.param)
    parts = dict(zip(names, np.split(stored, 2, axis=2), strict=True)) if names else None
    return made, parts or {"codes": stored}


def test_datasets_reads_the_same_from_parquet(cache, tmp_path: Path) -> None:
    made, parts = cache
    export_cache(made.folder, tmp_path / "out", "parquet")
    rows = datasets.load_dataset(
        str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "arrow")
    )
    assert rows.column_names == ["index", "label", *parts]
    assert rows["index"][:] == list(range(10)) and rows["label"][:] == made.labels.tolist()
    for name, values in parts.items():
        found = np.array(rows[name][:]).reshape(values.shape)
        assert np.array_equal(found, values), name


def test_parquet_keeps_the_types(cache, tmp_path: Path) -> None:
    made, parts = cache
    export_cache(made.folder, tmp_path / "out", "parquet")
    schema = pyarrow.parquet.read_schema(tmp_path / "out" / "shard-00000.parquet")
    for name, values in parts.items():
        stored_as = schema.field(name).type.value_type.value_type
        assert stored_as.to_pandas_dtype() == values.dtype
    files = sorted((tmp_path / "out").glob("*.parquet"))
    assert [pyarrow.parquet.read_metadata(file).num_rows for file in files] == [4, 4, 2]


def test_webdataset_reads_the_same(cache, tmp_path: Path) -> None:
    made, parts = cache
    export_cache(made.folder, tmp_path / "out", "webdataset")
    shards = [str(path) for path in sorted((tmp_path / "out").glob("*.tar"))]
    samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode())
    assert [s["__key__"] for s in samples] == [f"{i:08d}" for i in range(10)]
    assert [s["cls"] for s in samples] == made.labels.tolist()
    for name, values in parts.items():
        found = np.stack([s[f"{name}.npy"] for s in samples])
        assert found.dtype == values.dtype and np.array_equal(found, values)


@pytest.mark.parametrize("layout", ["parquet", "webdataset"])
def test_the_manifest_is_exported_and_counts_every_file(tmp_path: Path, layout) -> None:
    made = make_cache(tmp_path / "cache", CODES)
    export_cache(made.folder, tmp_path / "out", layout)
    manifest = json.loads((tmp_path / "out" / "_latents.json").read_text())
    assert config_from_dict(CacheInfo, manifest["cache"], "test") == made.info
    assert [entry["nsamples"] for entry in manifest["shardlist"]] == [4, 4, 2]
    for entry in manifest["shardlist"]:
        assert sha256_of(tmp_path / "out" / entry["url"]) == entry["sha256"]


@pytest.mark.parametrize("layout", ["parquet", "webdataset"])
def test_equal_caches_make_equal_files(tmp_path: Path, layout) -> None:
    made = make_cache(tmp_path / "cache", CODES)
    one, two = (export_cache(made.folder, tmp_path / name, layout) for name in ("one", "two"))
    assert [p.read_bytes() for p in one] == [p.read_bytes() for p in two] and len(one) == 5


@pytest.mark.parametrize("layout", ["parquet", "webdataset"])
def test_splits_keep_their_names(tmp_path: Path, layout) -> None:
    make_cache(tmp_path / "caches" / "train", CODES)
    make_cache(tmp_path / "caches" / "heldout", replace(CODES, num_samples=3, views=("identity",)))
    export_cache(tmp_path / "caches", tmp_path / "out", layout)
    found = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "arrow"))
    assert {name: len(rows) for name, rows in found.items()} == {"train": 10, "heldout": 3}


@pytest.mark.parametrize("state", ["unfinished", "missing"])
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_a_split_without_a_manifest_is_not_left_out(tmp_path: Path, split: str, state: str) -> None:
    for name in ("train", "heldout"):
        make_cache(tmp_path / "caches" / name, CODES)
    broken = tmp_path / "caches" / split
    (broken / "manifest.json").unlink() if state == "unfinished" else shutil.rmtree(broken)
    with pytest.raises(SmaltiError, match=rf"{split} is not finished: run the command"):
        export_cache(tmp_path / "caches", tmp_path / "out", "webdataset")
    assert not (tmp_path / "out").exists()
    other = tmp_path / "caches" / ({"train", "heldout"} - {split}).pop()
    assert export_cache(other, tmp_path / "out", "webdataset")  # as the message says


def test_splits_of_two_tokenizers_are_not_exported_as_one_set(tmp_path: Path) -> None:
    make_cache(tmp_path / "caches" / "train", CODES)
    make_cache(tmp_path / "caches" / "heldout", replace(CODES, tokenizer_fingerprint="u"))
    with pytest.raises(SmaltiError, match="do not belong together, because the tokenizer differs"):
        export_cache(tmp_path / "caches", tmp_path / "out", "webdataset")


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    made = make_cache(tmp_path / "cache", CODES)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "diary.txt").write_text("mine")
    with pytest.raises(SmaltiError, match="nothing is overwritten"):
        export_cache(made.folder, tmp_path / "out", "webdataset")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["diary.txt"]


def test_an_export_that_fails_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    made = make_cache(tmp_path / "cache", CODES)

    def full_disk(path: Path, samples) -> None:
        path.write_bytes(b"half")
        if 4 in samples.indices:
            raise OSError(28, "No space left on device")

    monkeypatch.setitem(cache_export.WRITERS, "webdataset", lambda: full_disk)
    with pytest.raises(OSError, match="No space left"):
        export_cache(made.folder, tmp_path / "out", "webdataset")
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]


def test_a_damaged_cache_is_not_exported(tmp_path: Path) -> None:
    made = make_cache(tmp_path / "cache", CODES)
    shard = made.folder / "shard-00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(bytes(content))
    with pytest.raises(SmaltiError, match=r"shard-00002\.safetensors is damaged"):
        export_cache(made.folder, tmp_path / "out", "webdataset")
    with pytest.raises(SmaltiError, match="holds no finished latent cache"):
        export_cache(tmp_path / "nowhere", tmp_path / "out", "webdataset")
    assert not (tmp_path / "out").exists()


def test_without_pyarrow_one_line_says_what_to_install(tmp_path: Path, monkeypatch) -> None:
    made = make_cache(tmp_path / "cache", CODES)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(SmaltiError, match=r"pip install 'smalti\[data\]'"):
        export_cache(made.folder, tmp_path / "out", "parquet")
    assert not (tmp_path / "out").exists()
    export_cache(made.folder, tmp_path / "out", "webdataset")


@pytest.mark.parametrize("layout", ["parquet", "webdataset"])
def test_captions_are_exported_and_conditions_named(tmp_path: Path, layout, caplog) -> None:
    """From pictures without classes, which therefore have no label."""
    conditions = (StoredCondition("features", (2,), "float32", "caption", "r"),)
    info = replace(CODES, classes=(), captions="t", conditions=conditions)
    texts = [(f"picture {i}", "\u00e9t\u00e9") for i in range(10)]

    def encode(start: int, stop: int) -> EncodedRange:
        zeros = torch.zeros(stop - start, 2, 6, dtype=torch.int64)
        features = {"features": torch.zeros(2 * (stop - start), 2)}
        return EncodedRange(zeros, zeros[:, 0, 0], texts[start:stop], features)

    write_cache(tmp_path / "cache", info, encode)
    export_cache(tmp_path / "cache", tmp_path / "out", layout)
    assert "the conditions are not exported: features" in caplog.text
    if layout == "parquet":
        files = sorted((tmp_path / "out").glob("*.parquet"))
        table = pyarrow.concat_tables(map(pyarrow.parquet.read_table, files))
        assert table.column_names == ["index", "captions", "codes"]
        assert list(map(tuple, table["captions"].to_pylist())) == texts
    else:
        urls = [str(path) for path in sorted((tmp_path / "out").glob("*.tar"))]
        samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
        assert [tuple(sample["captions.json"]) for sample in samples] == texts
        assert not any("cls" in sample for sample in samples)
