"""Files that only look like pictures: they run no program and cause no traceback."""

import ast
import io
import struct
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

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
    other = Image.new("RGB", (20, 20))
    content = saved("MPO", save_all=True, append_images=[other])
    with pytest.raises(Unusable, match="is animated"):
        decode(io.BytesIO(content), FolderOptions())
    image = decode(io.BytesIO(content), FolderOptions(unusual_images="convert")).image
    assert image.size == (20, 20) and np.asarray(image).any()


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
