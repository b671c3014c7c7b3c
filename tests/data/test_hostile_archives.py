"""Archives of data that ask for more memory or time than they are worth: refused in one line."""

import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from smalti.data.image_io import FolderOptions
from smalti.data.sources.base import open_source
from smalti.data.sources.shard_members import BLOCK
from smalti.errors import SmaltiError
from tests.data.test_arrays import declaring

# -- tar --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [-1, -BLOCK, -(2**40), 2**50])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_sizes_that_cannot_be_are_refused_before_anything_is_read(
    tmp_path: Path, size: int, kind: bytes
) -> None:
    """A negative size leads back to the same header for ever."""
    info = tarfile.TarInfo("000.png")
    info.type = kind
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
    header[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(header))[0]
    path = tmp_path / "000.tar"
    path.write_bytes(bytes(header) + b"picture" + bytes(20 * BLOCK))
    with pytest.raises(SmaltiError, match=r"000.tar is cut or damaged"):
        open_source(str(path))


def test_a_header_within_headers_without_end_is_refused(tmp_path: Path) -> None:
    info = tarfile.TarInfo("x")
    info.type = tarfile.XHDTYPE
    (tmp_path / "000.tar").write_bytes(info.tobuf() * 5000)
    with pytest.raises(SmaltiError, match=r"000.tar is cut or damaged"):
        open_source(str(tmp_path / "000.tar"))


def test_a_member_far_larger_than_a_picture_is_not_read(tmp_path: Path) -> None:
    """The file is sparse: its two gigabytes are not on the disk."""
    info = tarfile.TarInfo("000.png")
    info.size = 2**31
    with (tmp_path / "000.tar").open("wb") as stream:
        stream.write(info.tobuf())
        stream.truncate(BLOCK + info.size + 2 * BLOCK)
    with pytest.raises(SmaltiError, match=r"000.png is 2147483648 bytes long, more than"):
        open_source(str(tmp_path / "000.tar"), options=FolderOptions(single_class=True))


# -- npz and npy ------------------------------------------------------------------------------


def archive(path: Path, compression: int, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in members.items():
            file.writestr(f"{name}.npy", content)
    return path


LABELS = declaring("(4,)", "<i8", content=np.arange(4).tobytes())
PICTURES = declaring("(4, 8, 8, 3)", content=bytes(4 * 8 * 8 * 3))
HUGE = "(1000000000, 1024, 1024, 3)"


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("shape", [HUGE, "(-1, 8, 8, 3)", f"({2**62}, {2**62}, 8, 3)"])
def test_a_header_that_declares_more_than_the_file_has_is_refused(
    tmp_path: Path, compression: int, shape: str
) -> None:
    path = archive(tmp_path / "a.npz", compression, images=declaring(shape), labels=LABELS)
    with pytest.raises(SmaltiError, match=r"images in .*a.npz is damaged.*declares"):
        open_source(str(path))
    path = archive(tmp_path / "a.npz", compression, images=PICTURES, labels=declaring(shape, "<i8"))
    with pytest.raises(SmaltiError, match=r"labels in .*a.npz is damaged.*declares"):
        open_source(str(path))
    (tmp_path / "images.npy").write_bytes(declaring(shape))
    with pytest.raises(SmaltiError, match=r"images.npy is damaged"):
        open_source(str(tmp_path / "images.npy"))


def test_a_header_longer_than_any_is_refused(tmp_path: Path) -> None:
    start = b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**31) + b" " * 2**20
    path = archive(tmp_path / "a.npz", zipfile.ZIP_DEFLATED, images=start, labels=LABELS)
    with pytest.raises(SmaltiError, match=r"images in .*a.npz is damaged"):
        open_source(str(path))


def test_members_that_overlap_are_refused(tmp_path: Path) -> None:
    """Two entries of the directory name the same bytes."""
    path = archive(tmp_path / "a.npz", zipfile.ZIP_DEFLATED, images=PICTURES, labels=LABELS)
    many = tmp_path / "many.npz"
    with zipfile.ZipFile(path) as whole, many.open("wb") as stream:
        stream.write(path.read_bytes())
        with zipfile.ZipFile(stream, "a") as file:
            for number in range(200):
                entry = whole.getinfo("labels.npy")
                copy = zipfile.ZipInfo(f"labels{number}.npy")
                for name in ("header_offset", "file_size", "compress_size", "compress_type", "CRC"):
                    setattr(copy, name, getattr(entry, name))
                file.filelist.append(copy)
                file.NameToInfo[copy.filename] = copy
            file._didModify = True
    with pytest.raises(SmaltiError, match=r"many.npz is damaged: its members overlap"):
        open_source(str(many))


def test_a_compressed_array_beyond_the_budget_is_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("smalti.data.sources.arrays.MAX_UNPACKED", 500)
    path = archive(tmp_path / "a.npz", zipfile.ZIP_DEFLATED, images=PICTURES, labels=LABELS)
    with pytest.raises(
        SmaltiError, match=r"images in .* and at most 500 are unpacked: .*numpy.savez"
    ):
        open_source(str(path))
    path = archive(tmp_path / "a.npz", zipfile.ZIP_STORED, images=PICTURES, labels=LABELS)
    assert len(open_source(str(path))) == 4


def test_a_damaged_directory_of_an_archive_is_one_line(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.npz", zipfile.ZIP_STORED, images=PICTURES, labels=LABELS)
    content = bytearray(path.read_bytes())
    place = content.rindex(b"PK\x01\x02") + 42  # offset of the last member's header
    content[place : place + 4] = struct.pack("<I", len(content) - 5)
    path.write_bytes(content)
    with pytest.raises(SmaltiError, match=r"a.npz is damaged"):
        open_source(str(path))
