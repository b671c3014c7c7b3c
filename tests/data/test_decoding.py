"""Files that only look like pictures: they run no program and cause no traceback."""

import ast
import io
import struct
import tarfile
import warnings
import zlib
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, TiffImagePlugin

import smalti.data
from smalti.data.image_io import FORMATS, FolderOptions, Unusable, decode, format_of
from smalti.data.sources.base import HuggingFaceOptions, ImageSource, open_source
from smalti.data.sources.folder import EXTENSIONS, read_picture
from smalti.errors import SmaltiError

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n%%EOF\n"
STRIP_OFFSETS = 273  # the tag of a TIFF that tells where its pixels lie


def saved(kind: str, **options) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (20, 20, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **options)
    return stream.getvalue()


def tiff_with_offsets_of_type(kind: int) -> bytes:
    """A TIFF with a correct header except for the type of one field."""
    content = bytearray(saved("TIFF"))
    (start,) = struct.unpack_from("<I", content, 4)
    (count,) = struct.unpack_from("<H", content, start)
    fields = range(start + 2, start + 2 + 12 * count, 12)
    (field,) = [at for at in fields if struct.unpack_from("<H", content, at) == (STRIP_OFFSETS,)]
    struct.pack_into("<H", content, field + 2, kind)
    return bytes(content)


ODD = {f"type {kind}.tiff": tiff_with_offsets_of_type(kind) for kind in (2, 5, 7, 12, 16)}


@pytest.fixture
def interpreted(monkeypatch) -> list[str]:
    """What Pillow passes to the PostScript interpreter, which is replaced by a stub."""
    files: list[str] = []

    def ghostscript(*arguments, **_):
        files.append(str(arguments))
        return Image.new("RGB", (20, 20)).im

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", ghostscript)
    return files


def in_folder(root: Path, content: bytes) -> ImageSource:
    for number in range(4):
        path = root / "set" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if number == 3 else saved("PNG"))
    return open_source(str(root / "set"))


def in_shard(root: Path, content: bytes) -> ImageSource:
    with tarfile.open(root / "0.tar", "w") as archive:
        for number in range(4):
            picture = content if number == 3 else saved("PNG")
            for suffix, part in (("png", picture), ("cls", str(number % 2).encode())):
                member = tarfile.TarInfo(f"{number}.{suffix}")
                member.size = len(part)
                archive.addfile(member, io.BytesIO(part))
    return open_source(str(root / "0.tar"))


def parquet(root: Path, content: bytes) -> str:
    pictures = [{"bytes": saved("PNG"), "path": None}] * 3 + [{"bytes": content, "path": None}]
    columns = {"image": pictures, "label": [0, 1, 0, 1]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    file = root / "set.parquet"
    datasets.Dataset.from_dict(columns, features=features).to_parquet(file)
    return str(file)


def in_parquet(root: Path, content: bytes) -> ImageSource:
    return open_source(parquet(root, content), stream_cache=root / "cache")


def in_stream(root: Path, content: bytes) -> ImageSource:
    options = HuggingFaceOptions(streaming=True)
    return open_source(parquet(root, content), hf=options, stream_cache=root / "cache")


@pytest.mark.parametrize("opened", [in_folder, in_shard, in_parquet, in_stream])
def test_postscript_named_like_a_picture_is_never_interpreted(
    tmp_path: Path, interpreted: list[str], opened
) -> None:
    with pytest.raises(SmaltiError, match=r"not a picture in a known format: PNG, JPEG"):
        opened(tmp_path, EPS)
    assert not interpreted


def test_postscript_would_be_interpreted_otherwise(interpreted: list[str]) -> None:
    """Without a list of formats; otherwise the other tests would prove nothing."""
    with Image.open(io.BytesIO(EPS)) as image:
        image.load()
    assert interpreted


def test_a_single_file_of_postscript_is_not_interpreted(
    tmp_path: Path, interpreted: list[str]
) -> None:
    (tmp_path / "nice.png").write_bytes(EPS)
    with pytest.raises(SmaltiError, match=r"nice.png cannot be decoded"):
        read_picture(tmp_path / "nice.png", FolderOptions())
    assert format_of(EPS) is None and not interpreted


def test_nothing_in_the_package_opens_pictures_of_any_kind() -> None:
    (folder,) = smalti.data.__path__
    calls = [
        node
        for file in sorted(Path(folder).glob("*.py"))
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Image.open"
    ]
    assert calls
    for call in calls:
        assert {word.arg: ast.unparse(word.value) for word in call.keywords} == {
            "formats": "FORMATS"
        }


def test_every_kind_of_file_that_a_folder_takes_is_opened() -> None:
    """By the name of its format in Pillow, which opens MPO as JPEG."""
    Image.init()
    assert set(FORMATS) <= Image.OPEN.keys()
    assert {Image.EXTENSION[extension] for extension in EXTENSIONS} <= set(FORMATS)
    for kind in FORMATS:
        assert decode(io.BytesIO(saved(kind)), FolderOptions(unusual_images="convert"))
        assert format_of(saved(kind)) == kind


def test_a_photograph_with_a_second_one_in_it_is_opened() -> None:
    """Phones and drones add previews, depth and gain maps: the first is the photograph."""
    other = Image.new("RGB", (20, 20))
    content = saved("MPO", save_all=True, append_images=[other])
    image = decode(io.BytesIO(content), FolderOptions()).image
    assert np.array_equal(np.asarray(image), np.asarray(decode_plain(saved("JPEG"))))


def decode_plain(content: bytes) -> Image.Image:
    found = decode(io.BytesIO(content), FolderOptions())
    assert found.note is None
    return found.image


# -- metadata never decide whether a picture can be used --


def with_exif(kind: str, **tags: object) -> bytes:
    """The picture, 30 x 20 after a quarter turn, with Orientation 6 and what else is given."""
    exif = Image.Exif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    Image.new("RGB", (20, 30), "red").save(stream, kind, exif=exif, **tags)
    return stream.getvalue()


def with_chunk(content: bytes, name: bytes, body: bytes, checksum: int | None = None) -> bytes:
    """A PNG with one more chunk behind its header."""
    checksum = zlib.crc32(name + body) if checksum is None else checksum
    chunk = struct.pack(">I", len(body)) + name + body + struct.pack(">I", checksum)
    return content[:33] + chunk + content[33:]


def with_wrong_tag() -> bytes:
    """A JPEG with Orientation 6 and an entry of the wrong type: a rational that is text."""
    good = with_exif("JPEG")
    at = good.index(b"Exif\0\0") + 6
    entries = struct.pack(">HHI4s", 0x0112, 3, 1, b"\0\6\0\0")
    entries += struct.pack(">HHI4s", 0x011A, 2, 4, b"abcd")  # XResolution
    exif = b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", 2) + entries + b"\0\0\0\0"
    end = at - 10 + 2 + int.from_bytes(good[at - 8 : at - 6], "big")
    return good[: at - 10] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + good[end:]


HUGE = b"a" * 1_100_000
UNREADABLE = {
    "text.png": with_chunk(with_exif("PNG"), b"zTXt", b"key\0\0" + zlib.compress(HUGE)),
    "profile.png": with_chunk(with_exif("PNG"), b"iCCP", b"key\0\0" + zlib.compress(HUGE)),
    "checksum.png": with_chunk(with_exif("PNG"), b"tEXt", b"key\0text", checksum=1),
    "tag.jpg": with_wrong_tag(),
}


def test_a_damaged_exif_chunk_alone_is_ignored() -> None:
    content = bytearray(with_exif("PNG"))
    at = content.index(b"eXIf")
    content[at + 4 + int.from_bytes(content[at - 4 : at], "big")] ^= 0xFF  # its checksum
    found = decode(io.BytesIO(content), FolderOptions())
    assert found.image.size == (20, 30) and "metadata cannot be read" in str(found.note)


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_metadata_are_ignored_and_counted(pictures: Path, name: str, caplog) -> None:
    (pictures / "red" / name).write_bytes(UNREADABLE[name])
    for options in (FolderOptions(), FolderOptions(bad_images="skip")):
        source = open_source(str(pictures), options=options)
        (index,) = [i for i in range(len(source)) if source.name(i) == f"red/{name}"]
        image = source.read(index)
        assert image.size == (30, 20) and image.getpixel((3, 3))[0] > 250  # turned upright
    assert f"ignored metadata of 1 of 25 pictures, the first {pictures}/red/{name}" in caplog.text


def test_a_large_set_names_the_first_picture_whose_metadata_are_ignored(
    pictures: Path, caplog
) -> None:
    for number in range(2):
        (pictures / "red" / f"{number}.png").write_bytes(UNREADABLE["text.png"])
    source = open_source(str(pictures), options=FolderOptions(verify_up_to=0))
    assert [source.read(index).size for index in (16, 17)] == [(30, 20)] * 2
    assert caplog.text.count("its metadata cannot be read (Decompressed data too large") == 1


def test_a_damaged_orientation_is_ignored() -> None:
    content = with_exif("JPEG").replace(b"Exif\0\0MM\0*", b"Exif\0\0MX\0*")
    found = decode(io.BytesIO(content), FolderOptions())
    assert found.image.size == (20, 30) and "EXIF" in str(found.note)
    wrong = with_exif("JPEG").replace(b"\1\x12\0\3\0\0\0\1\0\6", b"\1\x12\0\3\0\0\0\1\0\x63")
    found = decode(io.BytesIO(wrong), FolderOptions())
    assert found.image.size == (20, 30) and "orientation is 99" in str(found.note)


def test_damage_outside_of_metadata_is_still_damage() -> None:
    damaged = UNREADABLE["text.png"].replace(b"IEND", b"IENX")
    cut = bytearray(UNREADABLE["text.png"])
    cut[cut.index(b"IDAT") + 6] ^= 0xFF
    for content in (damaged[: damaged.index(b"IDAT") + 10], bytes(cut)):
        with pytest.raises(Unusable, match="cannot be decoded") as problem:
            decode(io.BytesIO(content), FolderOptions())
        assert problem.value.undecodable


# -- budgets, checked before memory is allocated --


def test_more_pixels_than_pillow_allows_are_read_if_the_user_allows_them(monkeypatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow refuses twice as many
    content = saved("PNG")  # 400 pixels
    with pytest.raises(Unusable, match=r"declares 400 pixels, more than 90: .*--folder.max_pixels"):
        decode(io.BytesIO(content), FolderOptions(max_pixels=90))
    with pytest.raises(Unusable, match=r"declares 20 x 20 pixels, more than 399: .*max_pixels"):
        decode(io.BytesIO(content), FolderOptions(max_pixels=399))
    assert decode(io.BytesIO(content), FolderOptions(max_pixels=400)).image.size == (20, 20)


def tiff_of(pages: int) -> bytes:
    """A TIFF whose pages share their pixels, and in which every header leads to the next."""
    content = saved("TIFF")
    (start,) = struct.unpack_from("<I", content, 4)
    (count,) = struct.unpack_from("<H", content, start)
    header = content[start : start + 2 + 12 * count]
    size, first = len(header) + 4, len(content)
    offsets = [first + page * size for page in range(1, pages)] + [0]
    chain = b"".join(header + struct.pack("<I", offset) for offset in offsets)
    return content[:4] + struct.pack("<I", first) + content[8:] + chain


def test_the_pages_of_a_file_are_not_counted(monkeypatch) -> None:
    """60,000 of them took minutes."""
    content = tiff_of(60_000)
    sought = []
    seek = TiffImagePlugin.TiffImageFile._seek
    monkeypatch.setattr(
        TiffImagePlugin.TiffImageFile, "_seek", lambda *a: sought.append(a) or seek(*a)
    )
    with pytest.raises(Unusable, match=r"^has several pages: .*--folder.unusual_images convert"):
        decode(io.BytesIO(content), FolderOptions())
    found = decode(io.BytesIO(content), FolderOptions(unusual_images="convert"))
    assert np.array_equal(np.asarray(found.image), np.asarray(decode_plain(saved("TIFF"))))
    assert len(sought) < 10


def tags_bomb() -> bytes:
    """A million bytes of tags that each name the same million bytes: 80 GB if all were copied."""
    entries = b"".join(
        struct.pack("<HHII", 40_000 + number % 20_000, 1, 10**6, 8) for number in range(80_000)
    )[: 12 * 65_535]
    return b"II*\0" + struct.pack("<IH", 8, 65_535) + entries + bytes(10**6 - len(entries))


def test_tags_that_name_the_same_bytes_are_not_copied() -> None:
    with pytest.raises(Unusable, match="has tags that are longer than its 1000010 bytes"):
        decode(io.BytesIO(tags_bomb()), FolderOptions())
    content = with_chunk(saved("PNG"), b"eXIf", tags_bomb())
    found = decode(io.BytesIO(content), FolderOptions())
    assert found.note == "the tags of its EXIF are longer than itself"
    raw = f"\nexif\n{len(tags_bomb()[:400_000])}\n{tags_bomb()[:400_000].hex()}".encode()
    content = with_chunk(saved("PNG"), b"tEXt", b"Raw profile type exif\0" + raw)
    assert decode(io.BytesIO(content), FolderOptions()).note == found.note


@pytest.mark.parametrize("count", [2**33, 2**40, 2**63])
def test_tags_that_are_not_in_the_file_take_no_memory(tmp_path: Path, count: int) -> None:
    (tmp_path / "a.tif").write_bytes(b"II+\0" + struct.pack("<HHQQ", 8, 0, 16, count) + bytes(99))
    with warnings.catch_warnings(), pytest.raises(Unusable, match="cannot be decoded"):
        warnings.simplefilter("ignore")  # Pillow's
        decode(tmp_path / "a.tif", FolderOptions())


def test_a_file_longer_than_any_picture_is_not_read(tmp_path: Path, pictures: Path) -> None:
    with (pictures / "red" / "sparse.png").open("wb") as stream:
        stream.write(saved("PNG"))
        stream.truncate(2**34)
    with pytest.raises(SmaltiError, match=r"sparse.png is 17179869184 bytes long, more than the"):
        open_source(str(pictures))
    with pytest.raises(SmaltiError, match=r"sparse.png is 17179869184 bytes long.*remove it"):
        read_picture(pictures / "red" / "sparse.png", FolderOptions())


@pytest.mark.parametrize("name", ODD)
def test_any_exception_of_a_decoder_means_a_damaged_file(pictures: Path, name: str, caplog) -> None:
    (pictures / "red" / name).write_bytes(ODD[name])
    with pytest.raises(SmaltiError, match=rf"red/{name} cannot be decoded \([^\n]+$"):
        open_source(str(pictures))
    assert len(open_source(str(pictures), options=FolderOptions(bad_images="skip"))) == 24
    assert f"red/{name}" in caplog.text
    left = open_source(str(pictures), options=FolderOptions(bad_images="replace"))
    assert len(left) == 25 and left.max_replaced


@pytest.mark.parametrize("kind", [RuntimeError, KeyError, AttributeError, struct.error])
def test_an_exception_of_a_decoder_is_one_line(monkeypatch, kind: type[Exception]) -> None:
    def load(self) -> None:
        raise kind("a\nb") if kind is not AttributeError else kind()

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(Unusable, match=r"^cannot be decoded \([^\n]+\): replace") as problem:
        decode(io.BytesIO(saved("BMP")), FolderOptions())
    assert problem.value.undecodable


@pytest.mark.parametrize("kind", [MemoryError, KeyboardInterrupt])
def test_other_exceptions_are_not_attributed_to_the_file(
    monkeypatch, kind: type[BaseException]
) -> None:
    def load(self) -> None:
        raise kind

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(kind):
        decode(io.BytesIO(saved("BMP")), FolderOptions())
