"""Array files: memory-mapped, checked, and never unpickled."""

import os
import struct
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from smalti.data.image_io import TRANSPARENT, FolderOptions
from smalti.data.sources import arrays
from smalti.data.sources.base import open_source
from smalti.data.sources.verification import in_threads
from smalti.errors import SmaltiError

IMAGES = np.random.default_rng(0).integers(0, 255, (12, 10, 9, 3), dtype=np.uint8)
LABELS = np.arange(12) % 3


def npz(path: Path, **arrays) -> str:
    np.savez(path, **{"images": IMAGES, "labels": LABELS, **arrays})
    return str(path)


def test_rows_are_the_pictures_and_stay_on_disk(tmp_path: Path) -> None:
    source = open_source(npz(tmp_path / "a.npz"))
    assert isinstance(source.images, np.memmap)
    assert source.classes == ("0", "1", "2") and source.labels.tolist() == LABELS.tolist()
    for index in (0, 7, 11):
        assert np.array_equal(np.asarray(source.read(index)), IMAGES[index])


def test_threads_read_headers_one_after_the_other(tmp_path: Path, monkeypatch) -> None:
    """Python's parser, with which numpy reads them, fails now and then in several threads."""
    np.save(tmp_path / "a.npy", LABELS)
    read, inside, most = np.lib.format.read_array_header_1_0, [], []

    def slow(stream):
        inside.append(stream)
        most.append(len(inside))
        time.sleep(0.01)
        inside.pop()
        return read(stream)

    monkeypatch.setattr(np.lib.format, "read_array_header_1_0", slow)
    found = in_threads(lambda _: arrays.map_npy(tmp_path / "a.npy"), 8, "read headers")
    assert all(np.array_equal(labels, LABELS) for labels in found)
    assert most == [1] * 8


def test_evaluation_archives_and_grey_pictures_are_read(tmp_path: Path) -> None:
    grey = IMAGES[..., 0]
    for name, images in {"flat": grey, "one channel": grey[..., None]}.items():
        np.savez(tmp_path / f"{name}.npz", images, labels=LABELS)  # arr_0
        pixels = np.asarray(open_source(str(tmp_path / f"{name}.npz")).read(3))
        assert np.array_equal(pixels, np.repeat(grey[3][..., None], 3, axis=2))


def test_equal_rows_are_never_divided_between_splits(tmp_path: Path) -> None:
    source = open_source(npz(tmp_path / "a.npz", images=IMAGES[[0, 0, *range(2, 12)]]))
    assert source.group(0) == source.group(1) != source.group(2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": IMAGES / 255}, "float64"),
        ({"images": IMAGES.transpose(0, 3, 1, 2)}, r"uint8 \(12, 3, 10, 9\)"),
        ({"images": IMAGES[:0]}, "no pictures"),
        ({"images": IMAGES[:, :4]}, "9 x 4 pixels, less than 8"),
        ({"labels": LABELS[:3]}, "one for each of the 12"),
        ({"labels": LABELS - 1}, "integers from 0 on"),
        ({"labels": LABELS / 2}, "float64"),
        ({"classes": np.array(["a", "b\n", "c"])}, r"'b\\n' cannot be printed"),
        ({"classes": np.array(["a", "b"])}, "labels go up to 2"),
        ({"classes": np.array(["a", "b", "a"])}, "a different name"),
        ({"labels": np.array([None] * 12)}, "not an array of plain numbers"),
        ({"images": np.array([{}] * 12)}, "not an array of plain numbers"),
    ],
)
def test_arrays_that_are_not_a_picture_set_are_refused(
    tmp_path: Path, changes, message: str
) -> None:
    with pytest.raises(SmaltiError, match=message):
        open_source(npz(tmp_path / "a.npz", **changes))


# -- Bombs: what a header declares is checked before memory is allocated --


def declaring(
    shape: str, dtype: str = "|u1", version: int = 1, content: bytes = bytes(60)
) -> bytes:
    """An .npy file with any header, whatever its content is."""
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    length = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes((version, 0)) + length + text + content


BOMBS = {
    "more than the file": declaring("(100000000000, 12, 12)"),
    "more than 64 bits": declaring("(4294967296, 4294967296, 3)"),
    "a long header": declaring("(" + "1," * 20000 + ")", version=2),
    "a huge item": declaring("(12,)", "|V2147483647"),
    "pickles": declaring("(12,)", "|O"),
}


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, None])
def test_headers_that_declare_too_much_are_refused(
    tmp_path: Path, bomb: str, compression: int | None
) -> None:
    for name in ("images", "labels"):
        path = tmp_path / ("images.npy" if compression is None else "a.npz")
        contents = {"images": declaring("(1, 12, 12)"), "labels": declaring("(1,)", "<i8")}
        contents[name] = BOMBS[bomb]
        if compression is None:
            for part, content in contents.items():
                (tmp_path / f"{part}.npy").write_bytes(content)
        else:
            with zipfile.ZipFile(path, "w", compression) as archive:
                for part, content in contents.items():
                    archive.writestr(f"{part}.npy", content)
        with pytest.raises(SmaltiError, match="damaged, or not an array of plain numbers"):
            open_source(str(path))


def test_an_archive_that_unpacks_to_more_than_the_limit_is_refused(
    tmp_path: Path, monkeypatch
) -> None:
    np.savez_compressed(tmp_path / "a.npz", images=np.zeros_like(IMAGES), labels=LABELS)
    np.savez(tmp_path / "plain.npz", images=IMAGES, labels=LABELS)
    monkeypatch.setattr(arrays, "MAX_UNPACKED", 1000)
    with pytest.raises(SmaltiError, match=r"images in \S+a.npz has 3\d+ bytes, .* numpy.savez"):
        open_source(str(tmp_path / "a.npz"))
    assert len(open_source(str(tmp_path / "plain.npz"))) == 12  # as the message says


def test_a_pipe_in_place_of_an_array_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", IMAGES)
    os.mkfifo(tmp_path / "labels.npy")
    with pytest.raises(SmaltiError, match=r"labels.npy is not a file"):
        open_source(str(tmp_path / "images.npy"))


def test_arrays_without_labels_have_no_classes(tmp_path: Path, caplog) -> None:
    np.save(tmp_path / "images.npy", IMAGES)
    np.savez(tmp_path / "a.npz", images=IMAGES, targets=LABELS)
    for name in ("images.npy", "a.npz"):
        source = open_source(str(tmp_path / name))
        assert source.classes == () and source.labels.tolist() == [0] * 12
    assert "no labels in" in caplog.text and "(it has targets): if one array has" in caplog.text
    named = open_source(str(tmp_path / "a.npz"), label_column="targets")
    assert named.labels.tolist() == list(LABELS) and len(named.classes) > 1
    with pytest.raises(SmaltiError, match=r'no array "target" .*did you mean "targets"'):
        open_source(str(tmp_path / "a.npz"), label_column="target")
    np.save(tmp_path / "kinds.npy", LABELS)
    assert open_source(str(tmp_path / "images.npy"), label_column="kinds").classes == named.classes


def test_missing_parts_are_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", pictures=IMAGES, labels=LABELS)
    with pytest.raises(SmaltiError, match=r"holds pictures, labels: name the pictures images"):
        open_source(str(tmp_path / "a.npz"))
    with pytest.raises(SmaltiError, match=r"gone.npz does not exist"):
        open_source(str(tmp_path / "gone.npz"))


@pytest.mark.parametrize("name", ["a.npz", "images.npy"])
def test_truncated_files_are_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    np.save(tmp_path / "labels.npy", LABELS)
    if name == "a.npz":
        npz(path)
    else:
        np.save(path, IMAGES)
    content = path.read_bytes()
    for cut in (0, 5, 60, 200, len(content) - 100):
        path.write_bytes(content[:cut])
        with pytest.raises(SmaltiError, match=rf"{name} .*damaged|{name} is not an archive"):
            open_source(str(path))


def test_the_fingerprint_of_a_large_array_is_of_its_shape_alone(tmp_path: Path) -> None:
    source = open_source(npz(tmp_path / "a.npz"), options=FolderOptions(verify_up_to=3))
    assert source.group(4) == source.name(4) == "a.npz/4"


def test_a_folder_of_several_sets_names_them(tmp_path: Path) -> None:
    npz(tmp_path / "a.npz")
    assert len(open_source(str(tmp_path))) == 12
    for other in ("b.npz", "images.npy"):
        (tmp_path / other).write_bytes(b"")
        with pytest.raises(SmaltiError, match=rf"several sets \(a.npz, {other}\)"):
            open_source(str(tmp_path))
        (tmp_path / other).unlink()


def test_arrays_with_alpha_are_laid_on_the_background_or_keep_it(tmp_path: Path) -> None:
    alpha = np.where(np.arange(9) < 4, 0, 255).astype(np.uint8)
    images = np.concatenate([IMAGES, np.broadcast_to(alpha, (12, 10, 9))[..., None]], 3)
    path, fingerprints = npz(tmp_path / "a.npz", images=images), set()
    for background, left in (("white", [255] * 3), ("#000080", [0, 0, 128]), (TRANSPARENT, None)):
        source = open_source(path, options=FolderOptions(background=background))
        pixels = np.asarray(source.read(3))
        fingerprints.add(source.fingerprint)
        if left is None:
            assert np.array_equal(pixels, images[3])
        else:
            assert (pixels[:, :4] == left).all()
            assert np.array_equal(pixels[:, 4:], IMAGES[3][:, 4:])
    assert len(fingerprints) == 3
