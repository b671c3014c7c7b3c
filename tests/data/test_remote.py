"""Shards at a URL that are read in place: the same samples in the same order as a local copy."""

import contextlib
import re
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from smalti.data.dataset import ImageDataset
from smalti.data.image_io import FolderOptions
from smalti.data.loader import stream_batches
from smalti.data.order import DataOrder
from smalti.data.sources import download, remote
from smalti.data.sources.base import open_source
from smalti.data.sources.options import SourceOptions
from smalti.data.sources.webdataset import ShardPictures, open_shards
from smalti.errors import DataError, SmaltiError
from tests.data.test_shards import png, write_tar

COUNT = 12


class RangeServer(BaseHTTPRequestHandler):
    """Serves the files of a folder, and parts of them."""

    ranges = True
    failures = 0  # answers that are cut before their end
    requested: ClassVar[list[tuple[str, str]]] = []

    def __init__(self, *arguments, root: Path) -> None:
        self.root = root
        super().__init__(*arguments)

    def do_GET(self) -> None:
        wanted = self.headers.get("Range", "")
        type(self).requested.append((self.path, wanted))
        path = self.root / self.path.lstrip("/").partition("?")[0]
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted)
        if found and self.ranges:
            first, last = int(found[1]), int(found[2] or len(content) - 1)
            part = content[first : last + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        else:
            part = content
            self.send_response(200)
        self.send_header("ETag", f'"{hash(content)}"')
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if len(part) > 1 and type(self).failures:
            type(self).failures -= 1
            part = part[: len(part) // 2]
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has what it needs
            self.wfile.write(part)

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two shards of 12 labelled pictures each."""
    for number in range(2):
        members = {}
        for sample in range(number * COUNT, (number + 1) * COUNT):
            members[f"{sample:03}.png"] = png(sample * 5)
            members[f"{sample:03}.cls"] = b"ab"[sample % 2 : sample % 2 + 1]
            members[f"{sample:03}.txt"] = f"picture {sample}".encode()
        write_tar(tmp_path / "shards" / f"{number:03}.tar", members)
    return tmp_path / "shards"


@pytest.fixture
def url(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("SMALTI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    RangeServer.ranges, RangeServer.failures = True, 0
    RangeServer.requested.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(RangeServer, root=shards))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/{{000..001}}.tar"
    server.shutdown()
    server.server_close()


def test_the_set_is_that_of_the_local_files(url: str, shards: Path, tmp_path: Path) -> None:
    here, there = open_source(str(shards)), open_source(url)
    assert there.fingerprint == here.fingerprint and there.classes == here.classes == ("a", "b")
    assert torch.equal(there.labels, here.labels)
    assert [there.captions(i) for i in range(24)] == [here.captions(i) for i in range(24)]
    for split in ("train", "heldout"):
        ours, theirs = (ImageDataset(each, 8, split=split) for each in (here, there))
        assert ours.positions == theirs.positions
        assert torch.equal(ours.all_images(), theirs.all_images())
    assert not list(tmp_path.rglob("cache/**/*.tar"))  # nothing but the index is kept


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_sample_comes_once_per_epoch_and_a_resumed_run_skips_to_its_place(
    url: str, shards: Path, world_size: int, monkeypatch
) -> None:
    monkeypatch.setattr("smalti.data.dataset.MEMORY_LIMIT", 0)  # read when it is its turn
    sets = [ImageDataset(open_source(each), 8, captions=False) for each in (str(shards), url)]
    order = DataOrder(24, global_batch_size=8, seed=3)

    def steps(images: ImageDataset, start: int, stop: int) -> list[list[int]]:
        ranks = [
            stream_batches(images, order, start_step=start, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        return [
            [i for rank in ranks for i in next(rank)[0].indices.tolist()]
            for _ in range(start, stop)
        ]

    here, there = (steps(images, 0, 6) for images in sets)
    assert here == there == [[index for _, index in order.keys(step)] for step in range(6)]
    for epoch in (there[:3], there[3:]):
        assert Counter(index for step in epoch for index in step) == Counter(range(24))
    RangeServer.requested.clear()
    assert steps(sets[1], 4, 5) == there[4:5]
    assert len(RangeServer.requested) == 8  # one for each sample, none for those before


def test_a_shard_is_read_once_and_then_its_index(url: str) -> None:
    options = SourceOptions()
    first = open_shards(url, options)
    # Of each shard: is there a manifest (three names, once per folder), its length, its content.
    of_first = [wanted for path, wanted in RangeServer.requested if path == "/000.tar"]
    assert of_first == ["bytes=0-0", "bytes=0-"]
    RangeServer.requested.clear()
    second = open_shards(url, options)
    assert sorted(RangeServer.requested) == [("/000.tar", "bytes=0-0"), ("/001.tar", "bytes=0-0")]
    assert isinstance(second, ShardPictures) and second._members == first._members
    assert second.remarks == first.remarks and second.captions(3) == ("picture 3",)
    RangeServer.requested.clear()
    assert second.open(13).read() == png(13 * 5)
    assert len(RangeServer.requested) == 1


def test_a_changed_shard_is_listed_again_and_refused_while_it_is_read(
    url: str, shards: Path
) -> None:
    before = open_shards(url, SourceOptions())
    write_tar(shards / "001.tar", {"x.png": png(7), "x.cls": b"a"})
    with pytest.raises(DataError, match=r"001.tar has changed since it was listed: start"):
        before.open(20)
    after = open_shards(url, SourceOptions())
    assert len(after) == COUNT + 1 and after.open(COUNT).read() == png(7)


def test_an_answer_that_is_cut_is_asked_for_again(url: str) -> None:
    pictures = open_shards(url, SourceOptions())
    RangeServer.failures = 2
    assert pictures.open(5).read() == png(25)
    RangeServer.failures = 3
    with pytest.raises(DataError, match=r"000.tar cannot be read: "):  # not a damaged picture
        pictures.open(5)


def test_a_server_without_ranges_is_named_with_the_remedy(url: str, tmp_path: Path) -> None:
    RangeServer.ranges = False
    with pytest.raises(SmaltiError, match="does not send parts of files: pass --stream_cache"):
        open_source(url)
    assert len(open_source(url, stream_cache=tmp_path / "copies")) == 24


def test_what_is_wrong_with_a_shard_is_said_as_for_a_local_one(url: str, shards: Path) -> None:
    path = shards / "001.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5120])
    with pytest.raises(SmaltiError, match=r"001.tar is cut or damaged"):
        open_source(url)
    path.unlink()
    with pytest.raises(SmaltiError, match=r"there is no shard http://.*001.tar: check --data"):
        open_source(url)


def test_passwords_and_keys_are_in_no_message(url: str, monkeypatch) -> None:
    secret = url.replace("{000..001}", "000") + "?token=hidden"
    pictures = open_shards(secret, SourceOptions())
    assert "hidden" not in pictures.place(0) and pictures.place(0).endswith("000.tar/000.png")


def test_damaged_pictures_are_found_as_in_local_files(url: str, shards: Path) -> None:
    write_tar(
        shards / "000.tar",
        {
            "a.png": png(3)[:40],
            "a.cls": b"a",
            "b.png": png(9),
            "b.cls": b"b",
            "c.png": png(1),
            "c.cls": b"a",
        },
    )
    with pytest.raises(SmaltiError, match=r"000.tar/a.png cannot be decoded"):
        open_source(url)
    assert len(open_source(url, options=FolderOptions(bad_images="skip"))) == 2 + COUNT


def test_stores_are_read_in_place_through_fsspec(shards: Path, tmp_path: Path, monkeypatch) -> None:
    """hf://, s3:// and the like; here fsspec's store in memory."""
    fsspec = pytest.importorskip("fsspec")
    monkeypatch.setitem(download.STORES, "memory", "fsspec")
    monkeypatch.setenv("SMALTI_CACHE", str(tmp_path / "cache"))
    store = fsspec.filesystem("memory")
    for path in shards.iterdir():
        store.pipe(f"/set/{path.name}", path.read_bytes())
    here, there = open_source(str(shards)), open_source("memory://set/{000..001}.tar")
    assert there.fingerprint == here.fingerprint
    assert there.captions(20) == ("picture 20",)
    store.rm("/set", recursive=True)
    with pytest.raises(SmaltiError, match=r"there is no shard memory://set/000.tar"):
        open_source("memory://set/{000..001}.tar")
