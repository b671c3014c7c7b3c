"""The formats of generated pictures: each has the same bytes whatever happens to the job, and each
is read by the programs for which it is made."""

import errno
import io
import json
import os
import signal
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from conftest import TINY_VQ
from generated import files_of, manifest
from PIL import Image
from runs import in_a_fork, kill_self

from smalti.cli import main
from smalti.data.sources.base import open_source
from smalti.errors import SmaltiError
from smalti.folders import locked
from smalti.pipelines import picture_files
from smalti.pipelines.generation import generate_folder
from smalti.pipelines.manifest import problems_in
from smalti.pipelines.picture_files import PictureFormat
from smalti.pipelines.pipeline import Pipeline
from smalti.tokenizer.vq import VQTokenizer

CLASSES = ("cat", "dog", "emu")
LABELS = [0, 1, 2, 0, 1]
FORMATS = {
    "png": PictureFormat(),
    "webp": PictureFormat("webp"),
    "lossy": PictureFormat("webp", quality=60),
    "jpeg": PictureFormat("jpeg"),
    "webdataset": PictureFormat("webdataset", per_shard=2),
    "npz": PictureFormat("npz"),
}
SHARDS, NPZ = FORMATS["webdataset"], FORMATS["npz"]


@pytest.fixture
def pipe(tokenizer, prior) -> Pipeline:
    return Pipeline(tokenizer, prior, CLASSES)


def generate(pipe: Pipeline, folder: Path, kind: PictureFormat, labels=LABELS, **changes):
    options = {"seed": 1, "guidance_scale": 1.0, "batch_size": 2, **changes}
    return generate_folder(pipe, folder, labels, picture_format=kind, **options)


@pytest.fixture
def pictures(pipe, tmp_path: Path) -> list[np.ndarray]:
    """The pictures of the job, as PNG keeps them."""
    paths = generate(pipe, tmp_path / "as_png", FORMATS["png"])
    return [np.asarray(Image.open(path)) for path in paths]


# -- the same bytes -------------------------------------------------------------------------------


def killed_while_saving(patch: pytest.MonkeyPatch, kind: PictureFormat) -> None:
    """SIGKILL at the third picture."""
    cls = type(kind.store(Path(), [], 0))
    original = cls.save
    patch.setattr(
        cls, "save", lambda s, i, p: kill_self() if i == 2 else original(s, i, p), raising=True
    )


def killed_while_packing(patch: pytest.MonkeyPatch, kind: PictureFormat) -> None:
    """SIGKILL in the second shard, in the npz, or before the manifest."""
    if kind is SHARDS:
        original = picture_files.write_sample
        patch.setattr(
            picture_files,
            "write_sample",
            lambda a, key, m: kill_self() if key == "000003" else original(a, key, m),
        )
    elif kind is NPZ:
        patch.setattr(np.lib.format, "write_array", kill_self)
    else:
        patch.setattr("smalti.pipelines.manifest.write_lines", kill_self)


@pytest.mark.parametrize("name", FORMATS)
def test_kills_other_batches_and_processes_change_no_byte(pipe, tmp_path: Path, name: str) -> None:
    kind = FORMATS[name]
    generate(pipe, tmp_path / "whole", kind)
    whole = files_of(tmp_path / "whole")
    assert problems_in(tmp_path / "whole") == []
    folder = tmp_path / "cut"
    torch.set_num_threads(1)
    for plant in (killed_while_saving, killed_while_packing):

        def killed(plant=plant) -> None:
            with pytest.MonkeyPatch.context() as patch:
                plant(patch, kind)
                generate(pipe, folder, kind, batch_size=3)

        assert in_a_fork(killed) == -signal.SIGKILL
        assert problems_in(folder) == []
    for rank in (1, 0):
        with locked(folder, deep=True):
            generate(pipe, folder, kind, batch_size=5, rank=rank, world_size=2)
    assert files_of(folder) == whole
    assert [row["index"] for row in manifest(folder)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("name", ["webp", "webdataset", "npz"])
def test_a_full_disk_loses_nothing(pipe, tmp_path: Path, monkeypatch, name: str) -> None:
    """While pictures are written, and when they are packed and recorded: the disk is full after a
    number of files."""
    kind = FORMATS[name]
    generate(pipe, tmp_path / "whole", kind)
    folder = tmp_path / "out"
    original = os.replace
    for room in (3, 1, 2, 5):
        allowed = [0] * room

        def full(source, target, allowed=allowed) -> None:
            if not allowed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
            allowed.pop()
            original(source, target)

        with monkeypatch.context() as patch, locked(folder):
            patch.setattr(os, "replace", full)
            try:
                generate(pipe, folder, kind)
            except OSError as error:
                assert error.errno == errno.ENOSPC
            else:
                break
        assert problems_in(folder) == []
    generate(pipe, folder, kind)
    assert files_of(folder) == files_of(tmp_path / "whole")


def test_a_full_disk_in_the_rows_of_an_npz_is_an_error(pipe, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    generate(pipe, tmp_path / "whole", NPZ)
    folder.mkdir()
    (folder / ".samples.rows").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        generate(pipe, folder, NPZ)
    (folder / ".samples.rows").unlink()
    generate(pipe, folder, NPZ)
    assert files_of(folder) == files_of(tmp_path / "whole")


@pytest.mark.parametrize("kind", [SHARDS, NPZ])
def test_more_pictures_are_added_to_shards_and_to_an_npz(pipe, tmp_path: Path, kind) -> None:
    generate(pipe, tmp_path / "whole", kind)
    generate(pipe, tmp_path / "out", kind, LABELS[:3])
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("shard-000000.tar")}
    generate(pipe, tmp_path / "out", kind)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert all((tmp_path / "out" / n).stat().st_mtime_ns == time for n, time in kept.items())
    for other in (FORMATS["png"], replace(SHARDS, per_shard=3)):
        with pytest.raises(SmaltiError, match=r"\(its (format|pictures_per_shard) differs\)"):
            generate(pipe, tmp_path / "out", other)


# -- what is stored -------------------------------------------------------------------------------


def test_webp_is_lossless_unless_a_quality_is_given(pipe, tmp_path: Path, pictures) -> None:
    for name, suffix in (("webp", ".webp"), ("lossy", ".webp"), ("jpeg", ".jpg")):
        paths = generate(pipe, tmp_path / name, FORMATS[name])
        assert [path.name for path in paths] == [f"{i:06d}{suffix}" for i in range(5)]
        found = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
        error = np.abs(np.stack(found).astype(int) - np.stack(pictures)).mean()
        assert error == 0 if name == "webp" else 0 < error < 30
    settings = json.loads((tmp_path / "lossy" / "generation.json").read_text())
    assert settings["format"] == "webp" and settings["quality"] == 60


@contextmanager
def adm_array(path: Path, name: str) -> Iterator["AdmReader"]:
    """An array of an npz as the evaluator of guided-diffusion opens it: as a stream."""
    with (
        path.open("rb") as stream,
        zipfile.ZipFile(stream, "r") as archive,
        archive.open(f"{name}.npy", "r") as array,
    ):
        version = np.lib.format.read_magic(array)
        assert version == (1, 0)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(array)
        assert not fortran and not dtype.hasobject
        yield AdmReader(array, shape, dtype)


class AdmReader:
    """After StreamingNpzArrayReader of guided-diffusion's evaluations/evaluator.py."""

    def __init__(self, stream, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.stream, self.shape, self.dtype, self.at = stream, shape, dtype, 0

    def batches(self, size: int) -> Iterator[np.ndarray]:
        while self.at < self.shape[0]:
            count = min(size, self.shape[0] - self.at)
            self.at += count
            length = int(count * np.prod(self.shape[1:]) * self.dtype.itemsize)
            content = b""
            while len(content) < length:  # as in numpy's _read_bytes
                part = self.stream.read(length - len(content))
                assert part
                content += part
            yield np.frombuffer(content, self.dtype).reshape(count, *self.shape[1:])


def test_the_reader_of_adm_reads_the_npz(pipe, tmp_path: Path, pictures) -> None:
    paths = generate(pipe, tmp_path / "out", NPZ)
    assert paths == [tmp_path / "out" / "samples.npz"] * 5
    with adm_array(paths[0], "arr_0") as reader:
        assert reader.shape == (5, 16, 16, 3) and reader.dtype == np.uint8
        parts = list(reader.batches(2))
    assert [len(part) for part in parts] == [2, 2, 1]
    assert np.array_equal(np.concatenate(parts), np.stack(pictures))
    with np.load(paths[0]) as content:
        assert content.files == ["arr_0", "arr_1"]
        assert content["arr_1"].dtype == np.int64 and content["arr_1"].tolist() == LABELS
    assert {info.compress_type for info in zipfile.ZipFile(paths[0]).infolist()} == {0}
    row = manifest(tmp_path / "out")[3]
    assert row["file"] == "samples.npz" and row["class"] == "cat"
    assert row["sha256"] == picture_files.sha256_of_bytes(pictures[3].tobytes())


def test_shards_are_read_by_smalti_and_by_webdataset(pipe, tmp_path: Path, pictures) -> None:
    folder = tmp_path / "out"
    paths = generate(pipe, folder, SHARDS)
    names = [f"shard-{number:06d}.tar" for number in (0, 0, 1, 1, 2)]
    assert [path.name for path in paths] == names
    source = open_source(f"{folder}/shard-{{000000..000002}}.tar")
    assert source.classes == CLASSES and source.labels.tolist() == LABELS
    read = [np.asarray(source.read(index)) for index in range(5)]
    assert np.array_equal(np.stack(read), np.stack(pictures))
    shards = [str(folder / name) for name in sorted(set(names))]
    samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode("pil"))
    assert [sample["__key__"] for sample in samples] == [f"{i:06d}" for i in range(5)]
    assert all(np.array_equal(s["png"], p) for s, p in zip(samples, pictures, strict=True))
    assert samples[4]["json"] == {"index": 4, "class": "dog", "label": 1, "seed": 1}
    rows = manifest(folder)
    assert [(row["file"], row["member"]) for row in rows] == [
        (name, f"{index:06d}.png") for index, name in enumerate(names)
    ]
    with tarfile.open(folder / names[3]) as tar:
        content = tar.extractfile(rows[3]["member"]).read()
    assert picture_files.sha256_of_bytes(content) == rows[3]["sha256"]


def test_an_npz_holds_one_picture_in_memory_at_a_time(tmp_path: Path) -> None:
    """Peak of numpy and Python together: 400 pictures of 256 KB are 100 MB."""
    import tracemalloc

    kind = replace(NPZ, image_size=(256, 341))
    store = kind.store(tmp_path, (), 400)
    picture = Image.new("RGB", (341, 256))
    tracemalloc.start()
    hashes = [store.save(index, picture) for index in range(400)]
    store.finish(lambda index: {"index": index, "label": 0, "sha256": hashes[index]})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "samples.npz").stat().st_size > 100e6
    assert peak < 3e6


# -- damage ---------------------------------------------------------------------------------------


def test_damage_of_shards_is_named_and_repaired(pipe, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "out"
    generate(pipe, folder, SHARDS)
    before = files_of(folder)
    shard = folder / "shard-000001.tar"
    content = bytearray(shard.read_bytes())
    with tarfile.open(shard) as tar:
        picture, about = tar.getmembers()[:2]
    for place, problem in (
        (picture.offset_data + 60, f"{shard}: 000002.png is not the picture that this job wrote"),
        (about.offset_data + 20, f"{shard} is not the shard that this job made"),
    ):
        damaged = bytearray(content)
        damaged[place] ^= 1
        shard.write_bytes(damaged)
        assert problem in problems_in(folder)
        assert main(["info", str(folder)]) == 1
        assert problem in " ".join(capsys.readouterr().out.split())
        generate(pipe, folder, SHARDS)
        assert files_of(folder) == before
    shard.unlink()
    assert problems_in(folder) == [f"{shard} is missing"]
    generate(pipe, folder, SHARDS)
    assert files_of(folder) == before


def test_damage_of_an_npz_is_named_and_repaired(pipe, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    generate(pipe, folder, NPZ)
    before = files_of(folder)
    path = folder / "samples.npz"
    content = before["samples.npz"]
    for place, problem in (
        (content.index(b"NUMPY") + 200, f"{path}: picture 0 is not the picture that this job"),
        (content.rindex(b"NUMPY") + 127, f"{path} is not the file that this job made"),
        (len(content) - 20, ""),
    ):
        damaged = bytearray(content)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        assert any(found.startswith(problem) for found in problems_in(folder))
        generate(pipe, folder, NPZ)
        assert files_of(folder) == before
    path.unlink()
    assert problems_in(folder) == [f"{path} is missing"]


# -- what cannot be stored ------------------------------------------------------------------------


def test_quality_and_layout_fit_the_format(pipe, tmp_path: Path) -> None:
    for name in ("png", "webdataset", "npz"):
        with pytest.raises(SmaltiError, match=f"quality is 90, but {name} keeps pictures"):
            PictureFormat(name, 90)
    for quality in (0, 101):
        with pytest.raises(SmaltiError, match=f"quality is {quality}; it must be 1 to 100"):
            PictureFormat("jpeg", quality)
    for kind in (SHARDS, NPZ):
        with pytest.raises(SmaltiError, match="layout class makes a folder for each class"):
            generate(pipe, tmp_path / "out", kind, layout="class")
    assert not (tmp_path / "out").exists()
    paths = generate(pipe, tmp_path / "out", FORMATS["jpeg"], layout="class")
    assert paths[1] == tmp_path / "out" / "dog" / "000001.jpg"


@pytest.mark.parametrize("channels", [1, 4])
def test_grey_and_alpha(prior, tmp_path: Path, channels: int) -> None:
    tokenizer = VQTokenizer(replace(TINY_VQ, image_channels=channels)).eval()
    pipe = Pipeline(tokenizer, prior, CLASSES)
    for kind in (NPZ, FORMATS["jpeg"]):
        if channels == 4:
            with pytest.raises(SmaltiError, match=f"alpha channel, which {kind.name} cannot hold"):
                generate(pipe, tmp_path / kind.name, kind, LABELS[:2])
        else:
            generate(pipe, tmp_path / kind.name, kind, LABELS[:2])
    for kind in (FORMATS["webp"], SHARDS):
        generate(pipe, tmp_path / kind.name, kind, LABELS[:2])
    if channels == 1:
        with np.load(tmp_path / "npz" / "samples.npz") as content:
            assert content["arr_0"].shape == (2, 16, 16, 3)
        return
    with tarfile.open(tmp_path / "webdataset" / "shard-000000.tar") as tar:
        picture = Image.open(io.BytesIO(tar.extractfile("000000.png").read()))
    assert picture.mode == "RGBA"
    assert np.array_equal(picture, Image.open(tmp_path / "webp" / "000000.webp").convert("RGBA"))
