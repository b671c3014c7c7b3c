"""Parquet files that are read in place: the rows of a copy, in an order made of row groups."""

import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path

import datasets
import pyarrow
import pytest
import torch
from pyarrow.parquet import write_table

from smalti.data.dataset import ImageDataset
from smalti.data.image_io import FolderOptions
from smalti.data.loader import stream_batches
from smalti.data.order import Blocks, DataOrder
from smalti.data.sources import parquet
from smalti.data.sources.base import open_source
from smalti.data.sources.options import HuggingFaceOptions
from smalti.errors import SmaltiError
from tests.data.test_huggingface import png
from tests.data.test_remote import RangeServer

IN_PLACE = HuggingFaceOptions(streaming=True)
ROWS, GROUP = 24, 4  # of each of two files; rows in a row group
FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=["a", "b"]),
        "text": datasets.Value("string"),
    }
)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Two parquet files of 24 labelled pictures with captions, in six row groups each."""
    (tmp_path / "set").mkdir()
    for number in range(2):
        rows = range(number * ROWS, (number + 1) * ROWS)
        table = datasets.Dataset.from_dict(
            {
                "image": [{"bytes": png(5 * row), "path": None} for row in rows],
                "label": [row % 2 for row in rows],
                "text": [f"picture {row}" for row in rows],
            },
            features=FEATURES,
        )
        name = f"train-{number:05}-of-00002.parquet"
        write_table(table.data.table, tmp_path / "set" / name, row_group_size=GROUP)
    return tmp_path / "set"


def largest_group(files: Path) -> int:
    """Bytes of pictures in the largest row group."""
    groups = parquet.ParquetFiles(sorted(files.iterdir())).groups("image")
    return max(group.bytes for group in groups)


@pytest.fixture
def url(files: Path) -> Iterator[str]:
    RangeServer.ranges, RangeServer.failures = True, 0
    RangeServer.requested.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(RangeServer, root=files))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/train-{{00000..00001}}-of-00002.parquet"
    server.shutdown()
    server.server_close()


def test_the_set_is_that_of_a_copy_and_none_is_made(files: Path, url: str, tmp_path: Path) -> None:
    copy = open_source(f"hf:{files}", stream_cache=tmp_path / "cache")
    before = set(tmp_path.rglob("*"))
    for data, hf in ((f"hf:{files}", IN_PLACE), (f"{files}/*.parquet", IN_PLACE), (url, None)):
        source = open_source(data, hf=hf)
        assert source.fingerprint == copy.fingerprint and source.classes == copy.classes
        assert torch.equal(source.labels, copy.labels) and len(source) == 2 * ROWS
        assert source.captions(30) == copy.captions(30) == ("picture 30",)
        ours, theirs = (ImageDataset(each, 8, split="heldout") for each in (source, copy))
        assert ours.positions == theirs.positions
        assert torch.equal(ours.all_images(), theirs.all_images())
        assert ours.blocks is None  # all are decoded: the order is that of the copy, too
    assert set(tmp_path.rglob("*")) == before


def test_a_set_that_is_not_verified_changes_with_its_row_groups(files: Path) -> None:
    few = FolderOptions(verify_up_to=0)
    before = open_source(f"hf:{files}", hf=IN_PLACE, options=few)
    assert before.group(5) == "row 5"  # as of a copy: both are divided alike
    assert open_source(f"hf:{files}", hf=IN_PLACE, options=few).fingerprint == before.fingerprint
    table = datasets.Dataset.from_dict(
        {"image": [{"bytes": png(7) * 2, "path": None}] * ROWS, "label": [0] * ROWS}
    )
    write_table(table.data.table, files / "train-00000-of-00002.parquet", row_group_size=GROUP)
    with pytest.raises(SmaltiError, match='no column "text"'):
        open_source(f"{files}/*.parquet", hf=IN_PLACE, options=few, caption_column="text")
    other = open_source(f"{files}/*.parquet", hf=IN_PLACE, options=few)
    assert other.fingerprint != before.fingerprint


@pytest.mark.parametrize("world_size", [1, 2])
def test_each_row_group_is_read_once_per_epoch_in_a_seeded_order(
    files: Path, url: str, world_size: int, monkeypatch
) -> None:
    """The same order at any world size and from any step on, locally and at a URL."""
    monkeypatch.setattr("smalti.data.dataset.MEMORY_LIMIT", 0)  # read when it is its turn
    monkeypatch.setattr(parquet, "MIXED_BYTES", 3 * largest_group(files))
    few = FolderOptions(verify_up_to=0)
    read = list[tuple[int, int]]()
    whole = parquet.ParquetFiles.read
    monkeypatch.setattr(
        parquet.ParquetFiles,
        "read",
        lambda self, group, columns: (
            read.append((group.file, group.number)) or whole(self, group, columns)
            if columns == ["image"]
            else whole(self, group, columns)
        ),
    )

    def steps(data: str, start: int, stop: int) -> list[list[int]]:
        images = ImageDataset(open_source(data, hf=IN_PLACE, options=few), 8, captions=False)
        assert images.blocks is not None and images.blocks.mixed == 3
        order = DataOrder(len(images), 8, 3, images.blocks)
        ranks = [
            stream_batches(images, order, start_step=start, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        shown = []
        for step in range(start, stop):
            batches = [next(rank)[0] for rank in ranks]
            shown.append([i for batch in batches for i in batch.indices.tolist()])
            values = ((torch.cat([b.images for b in batches])[:, 0, 0, 0] + 1) * 127.5).round()
            assert values.tolist() == [5 * index for index in shown[-1]]
            assert shown[-1] == [index for _, index in order.keys(step)]
        return shown

    seen = steps(f"hf:{files}", 0, 12)  # two epochs
    assert set(Counter(read).values()) == {2} and len(read) == 24
    for epoch in (seen[:6], seen[6:]):
        assert Counter(i for step in epoch for i in step) == Counter(range(2 * ROWS))
    assert seen[:6] != seen[6:]
    assert steps(url, 4, 9) == seen[4:9]


def test_the_order_of_blocks_mixes_a_few_of_them_and_all_over_the_epochs() -> None:
    blocks = Blocks(torch.arange(8).repeat_interleave(5), 2)
    order = DataOrder(40, 10, 0, blocks)
    turns = set()
    for step in range(12):
        keys = order.keys(step)
        turn = frozenset(index // 5 for _, index in keys)
        assert len(turn) == 2 and len({index for _, index in keys}) == 10
        assert [index for _, index in keys] != sorted(index for _, index in keys)
        turns.add(turn)
    assert len(turns) > 4  # other blocks meet in other epochs
    assert DataOrder(40, 10, 0, blocks).keys(5) == order.keys(5)
    assert DataOrder(40, 10, 1, blocks).keys(5) != order.keys(5)
    other = DataOrder(40, 10, 0, Blocks(blocks.of, 3))
    assert len({order.identity("x"), other.identity("x"), "x"}) == 3
    assert DataOrder(40, 10, 0).identity("x") == "x"


def test_splits_and_a_number_of_rows_are_chosen(files: Path) -> None:
    (files / "train-00001-of-00002.parquet").rename(files / "test-00000-of-00001.parquet")
    (files / "train-00000-of-00002.parquet").rename(files / "train-00000-of-00001.parquet")
    both = HuggingFaceOptions(streaming=True, heldout_split="test", max_samples=10)
    source = open_source(f"hf:{files}", hf=both)
    assert len(source) == 10 + ROWS and source.heldout is not None
    assert source.heldout.sum() == ROWS and not source.heldout[:10].any()
    assert source.captions(9) == ("picture 9",) and source.captions(10) == (f"picture {ROWS}",)
    assert len(open_source(f"hf:{files}", hf=IN_PLACE)) == ROWS
    with pytest.raises(SmaltiError, match='has no split "val"'):
        open_source(f"hf:{files}", hf=HuggingFaceOptions(streaming=True, split="val"))


def test_columns_of_bytes_and_of_numbers(tmp_path: Path) -> None:
    table = {"image": [png(1), png(2)], "label": ["x", "y"], "width": [3, 4]}
    write_table(pyarrow.table(table), tmp_path / "a.parquet")
    source = open_source(f"{tmp_path}/a.parquet", hf=IN_PLACE)
    assert source.classes == ("x", "y") and source.read(1).getpixel((0, 0)) == (2, 2, 2)
    numbers = HuggingFaceOptions(streaming=True, image_column="width")
    with pytest.raises(SmaltiError, match="holds no pictures: name another in"):
        open_source(f"{tmp_path}/a.parquet", hf=numbers)


def test_large_row_groups_are_refused_with_a_remedy_that_works(
    files: Path, url: str, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(parquet, "MAX_GROUP_BYTES", largest_group(files) - 1)
    with pytest.raises(SmaltiError, match=r"row_group_size=100.* or pass --stream_cache FOLDER"):
        open_source(url)
    assert len(open_source(url, stream_cache=tmp_path / "cache")) == 2 * ROWS
    copied = open_source(f"hf:{files}", hf=IN_PLACE, stream_cache=tmp_path / "samples")
    assert len(copied) == 2 * ROWS
    for name in ("train-00000-of-00002.parquet", "train-00001-of-00002.parquet"):
        write_table(pyarrow.parquet.read_table(files / name), files / name, row_group_size=1)
    assert len(open_source(f"hf:{files}", hf=IN_PLACE)) == 2 * ROWS


def test_files_that_are_damaged_missing_or_changed_are_one_line(
    files: Path, url: str, monkeypatch
) -> None:
    with pytest.raises(SmaltiError, match=r"there is no shard http.*02.parquet: check --data"):
        open_source(url.replace("00001}", "00002}"))
    source = open_source(url, options=FolderOptions(verify_up_to=0))
    first = files / "train-00000-of-00002.parquet"
    first.write_bytes(first.read_bytes() + b" ")
    with pytest.raises(SmaltiError, match="has changed since it was listed"):
        source.read(0)
    with pytest.raises(SmaltiError, match=r"00000-of-00002.parquet cannot be read: .*arquet"):
        open_source(url)
    with pytest.raises(SmaltiError, match="arrow files are read from this disk: copy them"):
        open_source("http://127.0.0.1/a.arrow")
    RangeServer.ranges = False
    with pytest.raises(SmaltiError, match="does not send parts of files: pass --stream_cache"):
        open_source(url)
