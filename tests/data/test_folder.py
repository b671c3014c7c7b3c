"""Folders of pictures: what is accepted, and the error message for everything else."""

import io
import json
import os
import shutil
import struct
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from smalti.data.image_io import FolderOptions
from smalti.data.order import divide
from smalti.data.sources.base import HuggingFaceOptions, ImageSource, heldout_mask, open_source
from smalti.data.sources.folder import read_picture
from smalti.errors import SmaltiError


def test_classes_are_the_sorted_sub_folders(pictures: Path) -> None:
    source = open_source(str(pictures))
    assert source.classes == ("blue", "green", "red")
    assert torch.bincount(source.labels).tolist() == [8, 8, 8]
    assert source.name(0) == "blue/0.png"
    pixels = np.asarray(source.read(0))
    assert pixels.shape == (36, 40, 3) and pixels[..., 2].mean() > 150


def test_nested_folders_belong_to_their_top_class_and_hidden_files_are_ignored(
    pictures: Path,
) -> None:
    (pictures / "red" / "deep er").mkdir()
    (pictures / "red" / "0.png").rename(pictures / "red" / "deep er" / "ünïcode 0.png")
    (pictures / "red" / ".DS_Store.png").write_bytes(b"junk")
    (pictures / "red" / "notes.txt").write_text("not a picture")
    source = open_source(str(pictures))
    assert torch.bincount(source.labels).tolist() == [8, 8, 8]


def test_the_fingerprint_follows_the_files(pictures: Path) -> None:
    before = open_source(str(pictures)).fingerprint
    assert open_source(str(pictures)).fingerprint == before
    (pictures / "red" / "0.png").unlink()
    assert open_source(str(pictures)).fingerprint != before


def test_a_picture_that_changes_changes_the_fingerprint(pictures: Path) -> None:
    """Even if its size does not."""
    before = open_source(str(pictures)).fingerprint
    path = pictures / "red" / "0.bmp"
    (pictures / "red" / "0.png").unlink()
    fingerprints = {before}
    for colour in ("red", "green"):
        path.write_bytes(saved(Image.new("RGB", (20, 20), colour), "BMP"))
        fingerprints.add(open_source(str(pictures)).fingerprint)
    assert len(fingerprints) == 3


def test_pictures_in_other_formats_are_counted(pictures: Path, caplog) -> None:
    for name in ("a.heic", "b.HEIC", "c.jfif", "notes.txt", ".d.avif"):
        (pictures / "red" / name).write_bytes(b"")
    assert len(open_source(str(pictures))) == 24
    kinds = "2 .heic (red/a.heic), 1 .jfif (red/c.jfif), 1 .txt (red/notes.txt), 1 hidden"
    message = f"ignored 5 files in {pictures} that are not pictures: {kinds} (red/.d.avif)"
    assert f"{message}; save .heic, .jfif as PNG or JPEG" in caplog.text


def test_a_class_name_must_be_unicode(pictures: Path) -> None:
    (pictures / "red").rename(pictures / "grün")
    assert open_source(str(pictures)).classes == ("blue", "green", "grün")
    try:
        os.rename(pictures / "grün", os.fsencode(pictures) + b"/gr\xfcn")
    except OSError:
        pytest.skip("this file system has Unicode names only")
    with pytest.raises(SmaltiError, match=r"class folder 'gr\\udcfcn' in .* is not UTF-8: rename"):
        open_source(str(pictures))


def handmade_png(width: int, height: int, pixels: bytes, depth: int = 8, kind: int = 2) -> bytes:
    """A colour PNG (grey for kind 0), valid or not: `pixels` are rows, each after a zero byte."""

    def chunk(name: bytes, body: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(name + body))
        return struct.pack(">I", len(body)) + name + body + checksum

    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    body = zlib.compress(pixels)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", body), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def png_that_declares(width: int, height: int) -> bytes:
    """A few bytes that declare a huge picture."""
    return handmade_png(width, height, b"\0" * 1000)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


RGB = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 20, 3), dtype=np.uint8))
GREY16 = Image.fromarray(np.full((20, 20), 40000, dtype=np.uint16))
TROUBLE = {
    "empty.png": (b"", "cannot be decoded"),
    "text.jpg": (b"hello, I am text", "cannot be decoded"),
    "cut.jpg": (saved(RGB, "JPEG")[:-60], "cannot be decoded"),
    "cut.png": (saved(RGB, "PNG")[:-60], "cannot be decoded"),
    "bomb.png": (png_that_declares(20000, 20000), "declares 400000000 pixels, more than 50000000"),
    "large.png": (png_that_declares(9000, 9000), "declares 9000 x 9000 pixels"),
    "deep.png": (saved(GREY16, "PNG"), "is 16-bit"),
    "deep colour.png": (
        handmade_png(20, 20, (b"\0" + struct.pack(">H", 40000) * 60) * 20, depth=16),
        "is 16-bit",
    ),
    "moving.gif": (
        saved(RGB, "GIF", save_all=True, append_images=[RGB.rotate(90)]),
        "is animated",
    ),
    "dot.png": (saved(RGB.crop((0, 0, 1, 1)), "PNG"), "is 1 x 1 pixels"),
}
UNUSUAL = ("deep.png", "deep colour.png", "moving.gif")
UNDECODABLE = ("empty.png", "text.jpg", "cut.jpg", "cut.png")


@pytest.mark.parametrize("name", TROUBLE)
def test_an_error_is_one_line_with_the_file_and_the_remedy(pictures: Path, name: str) -> None:
    content, message = TROUBLE[name]
    (pictures / "red" / name).write_bytes(content)
    with pytest.raises(SmaltiError) as error:
        open_source(str(pictures))
    text = str(error.value)
    assert f"red/{name}" in text and message in text and "\n" not in text
    remedies = ("--folder", "--value_range", "remove", "replace", "shrink")
    assert any(word in text for word in remedies)


@pytest.mark.parametrize("name", TROUBLE)
def test_a_single_file_is_under_the_same_rules(tmp_path: Path, name: str) -> None:
    content, message = TROUBLE[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SmaltiError) as error:
        read_picture(tmp_path / name, FolderOptions())
    assert name in str(error.value) and message in str(error.value)
    assert "skip" not in str(error.value)  # a file that was named is not skipped


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_pictures_can_be_converted(pictures: Path, name: str) -> None:
    (pictures / "red" / name).write_bytes(TROUBLE[name][0])
    source = open_source(str(pictures), options=FolderOptions(unusual_images="convert"))
    (index,) = [i for i in range(len(source)) if source.name(i) == f"red/{name}"]
    image = source.read(index)
    assert image.mode == "RGB" and image.size == (20, 20)
    if name == "deep.png":  # 40000 of 65535
        assert np.asarray(image)[0, 0].tolist() == [156, 156, 156]


def test_palette_and_cmyk_pictures_are_converted_by_default(pictures: Path) -> None:
    (pictures / "red" / "palette.png").write_bytes(saved(RGB.convert("P"), "PNG"))
    (pictures / "red" / "palette.gif").write_bytes(saved(RGB, "GIF"))
    (pictures / "red" / "print.tif").write_bytes(saved(RGB.convert("CMYK"), "TIFF"))
    source = open_source(str(pictures))
    images = {source.name(i): np.asarray(source.read(i)) for i in range(len(source))}
    assert np.array_equal(images["red/palette.png"], np.asarray(RGB.convert("P").convert("RGB")))
    assert np.array_equal(images["red/print.tif"], np.asarray(RGB))
    assert images["red/palette.gif"].shape == (20, 20, 3)


@pytest.mark.parametrize("name", UNDECODABLE)
def test_bad_pictures_can_be_skipped_and_are_counted(pictures: Path, name: str, caplog) -> None:
    (pictures / "red" / name).write_bytes(TROUBLE[name][0])
    source = open_source(str(pictures), options=FolderOptions(bad_images="skip"))
    assert len(source) == 24
    assert "skipped 1 of 25 pictures" in caplog.text and name in caplog.text


def test_a_decompression_bomb_is_not_skipped(pictures: Path) -> None:
    (pictures / "red" / "bomb.png").write_bytes(TROUBLE["bomb.png"][0])
    with pytest.raises(SmaltiError, match="declares"):
        open_source(str(pictures), options=FolderOptions(bad_images="skip"))


def test_all_bad_files_are_counted_at_once(pictures: Path) -> None:
    for name in ("cut.png", "dot.png", "deep.png"):
        (pictures / "red" / name).write_bytes(TROUBLE[name][0])
    with pytest.raises(SmaltiError, match=r"red/cut.png.*\(and 2 more cannot be used\)"):
        open_source(str(pictures))


def test_a_picture_that_is_damaged_later_is_named(pictures: Path) -> None:
    source = open_source(str(pictures))
    (pictures / "blue" / "0.png").write_bytes(TROUBLE["cut.png"][0])
    with pytest.raises(SmaltiError, match=r"blue/0.png cannot be decoded"):
        source.read(0)


def test_links_are_followed_but_not_in_circles(pictures: Path, tmp_path: Path) -> None:
    root = tmp_path / "linked"
    root.mkdir()
    for name in ("red", "green"):
        (root / name).symlink_to(pictures / name, target_is_directory=True)
    (pictures / "red" / "again").symlink_to(pictures / "red", target_is_directory=True)
    (pictures / "red" / "up").symlink_to(root, target_is_directory=True)
    source = open_source(str(root))
    assert source.classes == ("green", "red")
    assert torch.bincount(source.labels).tolist() == [8, 8]
    (root / "red" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(SmaltiError, match=r"gone.png cannot be decoded"):
        open_source(str(root))


def test_names_need_not_be_unicode(pictures: Path) -> None:
    strange = os.fsencode(pictures / "red") + b"/\xff\xfe.png"
    try:
        os.rename(pictures / "red" / "0.png", strange)
    except OSError:
        pytest.skip("this file system has Unicode names only")
    source = open_source(str(pictures))
    assert len(source) == 24 and heldout_mask(source, 0.3).any()


def test_a_class_without_pictures_is_refused(pictures: Path) -> None:
    (pictures / "empty").mkdir()
    with pytest.raises(SmaltiError, match=r"class folder .*/empty holds no pictures"):
        open_source(str(pictures))


def test_skipping_may_not_leave_a_class_without_pictures(pictures: Path) -> None:
    for path in (pictures / "green").iterdir():
        path.write_bytes(b"")
    with pytest.raises(SmaltiError, match=r'no picture of the class "green"'):
        open_source(str(pictures), options=FolderOptions(bad_images="skip"))


def test_one_class_is_kept_by_an_option(pictures: Path) -> None:
    for name in ("red", "green"):
        shutil.rmtree(pictures / name)
    assert open_source(str(pictures)).classes == ()
    one = open_source(str(pictures), options=FolderOptions(single_class=True))
    assert one.classes == ("blue",) and len(one) == 8


def test_a_flat_folder_has_no_classes(pictures: Path, caplog) -> None:
    caplog.set_level("INFO")
    source = open_source(str(pictures / "red"))
    assert source.classes == () and source.labels.tolist() == [0] * 8
    assert caplog.messages == [f"the pictures of {pictures / 'red'} have no classes"]
    one = open_source(str(pictures / "red"), options=FolderOptions(single_class=True))
    assert one.classes == ("",)  # as in version 0.1.0


def test_missing_empty_and_mixed_folders(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(SmaltiError, match="does not exist"):
        open_source(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(SmaltiError, match="holds no pictures"):
        open_source(str(tmp_path / "empty"))
    with pytest.raises(SmaltiError, match="is a file"):
        open_source(str(pictures / "red" / "0.png"))
    (pictures / "loose.png").write_bytes((pictures / "red" / "0.png").read_bytes())
    with pytest.raises(SmaltiError, match="is outside the class folders"):
        open_source(str(pictures))


def test_a_misspelt_set_has_a_suggestion() -> None:
    with pytest.raises(SmaltiError, match='did you mean "emoji"'):
        open_source("emojy")


def test_alpha_is_composited_on_white_and_exif_orientation_applied(pictures: Path) -> None:
    clear = Image.new("RGBA", (20, 20), (255, 0, 0, 0))
    (pictures / "red" / "clear.png").write_bytes(saved(clear, "PNG"))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise
    wide = Image.new("RGB", (30, 20), "white")
    (pictures / "red" / "turned.jpg").write_bytes(saved(wide, "JPEG", exif=exif))
    source = open_source(str(pictures))
    images = {source.name(i): source.read(i) for i in range(len(source))}
    assert np.asarray(images["red/clear.png"]).min() == 255
    assert images["red/turned.jpg"].size == (20, 30)


def test_held_out_pictures_do_not_depend_on_the_others(pictures: Path) -> None:
    source = open_source(str(pictures))
    mask = heldout_mask(source, 0.3)
    names = {source.name(i) for i in mask.nonzero().flatten().tolist()}
    assert 0 < len(names) < 24
    keep = next(i for i in range(24) if source.name(i) not in names)
    (pictures / source.name(keep)).unlink()
    fewer = open_source(str(pictures))
    again = heldout_mask(fewer, 0.3)
    assert {fewer.name(i) for i in again.nonzero().flatten().tolist()} == names
    assert not torch.equal(heldout_mask(source, 0.3, seed=1), mask)
    with pytest.raises(SmaltiError, match="between 0 and 1"):
        heldout_mask(source, 1.5)


def test_every_class_is_in_both_splits(pictures: Path) -> None:
    source = open_source(str(pictures))
    for seed in range(20):
        for fraction in (0.001, 0.5, 0.999):
            mask = heldout_mask(source, fraction, seed)
            counts = torch.bincount(source.labels[mask], minlength=3)
            assert (counts >= 1).all() and (counts <= 7).all()


def test_the_only_picture_of_a_class_is_for_training(pictures: Path) -> None:
    for number in range(1, 8):
        (pictures / "red" / f"{number}.png").unlink()
    source = open_source(str(pictures))
    red = source.labels == source.classes.index("red")
    assert red.sum() == 1
    assert not any(heldout_mask(source, 0.9, seed)[red].item() for seed in range(10))


def test_a_group_in_two_classes_leaves_each_training_pictures() -> None:
    """Class 1 has a single group, which class 0 alone would hold out."""
    labels = torch.tensor([0] * 8 + [1, 1])
    groups = [*"abcdefgh", "a", "a"]
    alone = [divide(labels[:8], groups[:8], 0.5, seed)[0].item() for seed in range(20)]
    assert any(alone)  # without class 1, "a" is held out at times
    for seed in range(20):
        mask = divide(labels, groups, 0.5, seed)
        assert not mask[8:].any() and not mask[0]


def test_a_set_that_cannot_be_divided_is_refused(pictures: Path) -> None:
    for name in ("red", "green", "blue"):
        for number in range(1, 8):
            (pictures / name / f"{number}.png").unlink()
    with pytest.raises(SmaltiError, match="3 pictures are too few"):
        heldout_mask(open_source(str(pictures)), 0.1)


# -- split folders ----------------------------------------------------------------------------


def move_into_splits(pictures: Path, **counts: int) -> None:
    """red/0.png -> train/red/0.png, ...: so many pictures of each class into each split."""
    for folder in [path for path in pictures.iterdir() if path.is_dir()]:
        left = sorted(folder.iterdir())
        for split, count in counts.items():
            (pictures / split / folder.name).mkdir(parents=True)
            for path in left[:count]:
                path.rename(pictures / split / folder.name / path.name)
            left = left[count:]
        folder.rmdir()


@pytest.mark.parametrize("prefix", ["", "hf:"])
@pytest.mark.parametrize("held", ["val", "Validation", "test", "dev"])
def test_split_folders_are_recognised(pictures: Path, caplog, prefix: str, held: str) -> None:
    move_into_splits(pictures, train=6, **{held: 2})
    source = open_source(f"{prefix}{pictures}")
    assert source.classes == ("blue", "green", "red") and len(source) == 24
    heldout = [source.name(i).split("/")[0] == held for i in range(24)]
    assert heldout_mask(source, 0.3).tolist() == heldout and sum(heldout) == 6
    assert "are splits: 18 pictures of train are read, 6 of " in caplog.text
    assert source.remarks == (caplog.messages[0],)


@pytest.mark.parametrize("prefix", ["", "hf:"])
def test_a_split_that_is_not_read_is_counted_and_named(pictures, caplog, prefix: str) -> None:
    move_into_splits(pictures, train=4, val=2, test=2)
    source = open_source(f"{prefix}{pictures}")
    said = "12 pictures of train are read, 6 of validation are held out, 6 of test are not read"
    assert len(source) == 18 and said in caplog.text
    test = open_source(str(pictures / "test"))
    assert len(test) == 6 and test.heldout is None


def test_splits_of_a_folder_are_chosen_with_hf(pictures: Path) -> None:
    move_into_splits(pictures, train=4, val=2, test=2)
    chosen = open_source(f"hf:{pictures}", hf=HuggingFaceOptions(split="test"))
    assert len(chosen) == 6 and chosen.heldout is None
    chosen = open_source(f"hf:{pictures}", hf=HuggingFaceOptions(heldout_split="test"))
    assert len(chosen) == 18 and chosen.heldout is not None
    assert {chosen.name(int(i)).split("/")[0] for i in chosen.heldout.nonzero()} == {"test"}
    with pytest.raises(SmaltiError, match=r'no split "tset"; did you mean "test"'):
        open_source(f"hf:{pictures}", hf=HuggingFaceOptions(split="tset"))
    with pytest.raises(SmaltiError, match="has no split folders"):
        open_source(f"hf:{pictures / 'test'}", hf=HuggingFaceOptions(split="test"))


@pytest.mark.parametrize("prefix", ["", "hf:"])
def test_split_folders_without_classes(pictures: Path, prefix: str) -> None:
    for old, new in {"red": "train", "green": "valid"}.items():
        (pictures / old).rename(pictures / new)
    shutil.rmtree(pictures / "blue")
    source = open_source(f"{prefix}{pictures}")
    assert source.classes == () and source.heldout is not None
    assert source.heldout.tolist() == [False] * 8 + [True] * 8


def test_an_unlabelled_test_folder_is_not_held_out(pictures: Path, caplog) -> None:
    move_into_splits(pictures, train=7, extra=1)
    (pictures / "test").mkdir()
    for folder in (pictures / "extra").iterdir():
        (folder / "7.png").rename(pictures / "test" / f"{folder.name}.png")
    shutil.rmtree(pictures / "extra")
    source = open_source(str(pictures))
    assert len(source) == 21 and source.heldout is None and "3 of test are not read" in caplog.text


def test_split_folders_that_cannot_be_used_are_named(pictures: Path) -> None:
    move_into_splits(pictures, val=4, test=4)
    with pytest.raises(SmaltiError, match=r"none is for training: .*--data '.*/(val|test)'"):
        open_source(str(pictures))
    (pictures / "val").rename(pictures / "training")
    assert len(open_source(str(pictures))) == 24
    (pictures / "dev").mkdir()
    with pytest.raises(SmaltiError, match=r"the split folder .*/dev holds no pictures"):
        open_source(str(pictures))
    (pictures / "dev").rmdir()
    shutil.rmtree(pictures / "training" / "red")
    with pytest.raises(SmaltiError, match=r'is held out, and no other .* class "red"'):
        open_source(str(pictures))
    (pictures / "training" / "red").mkdir()
    (pictures / "training").rename(pictures / "val")
    (pictures / "validation").mkdir()
    (pictures / "val" / "blue").rename(pictures / "validation" / "blue")
    with pytest.raises(SmaltiError, match="are both validation: merge them"):
        open_source(str(pictures))


def test_a_class_has_one_name_in_all_splits_whatever_the_form_of_its_letters(
    pictures: Path,
) -> None:
    for split, form in (("train", "NFD"), ("val", "NFC")):
        shutil.copytree(pictures / "red", pictures / split / unicodedata.normalize(form, "\xe9"))
        shutil.copytree(pictures / "blue", pictures / split / "blue")
    for name in ("red", "green", "blue"):
        shutil.rmtree(pictures / name)
    source = open_source(str(pictures))
    assert source.heldout is not None and source.heldout.sum() == 16 and len(source.classes) == 2


def test_classes_of_which_one_is_called_test_are_classes(pictures: Path) -> None:
    (pictures / "red").rename(pictures / "test")
    assert open_source(str(pictures)).classes == ("blue", "green", "test")


# -- pipes, other files, brackets --------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "hf:"])
def test_pipes_and_devices_are_named_and_never_read(pictures: Path, caplog, prefix: str) -> None:
    os.mkfifo(pictures / "red" / "pipe.png")
    (pictures / "red" / "zero.png").symlink_to("/dev/zero")
    assert len(open_source(f"{prefix}{pictures}")) == 24
    assert "2 pipe or device (red/" in caplog.text


def test_a_file_far_larger_than_a_picture_is_not_read(pictures: Path) -> None:
    with (pictures / "red" / "0.png").open("wb") as stream:
        stream.truncate(2**31)  # sparse
    with pytest.raises(SmaltiError, match=r"0.png is 2147483648 bytes long, more than"):
        open_source(str(pictures))


@pytest.mark.parametrize(
    ("file", "data"),
    [
        ("data/train-0.parquet", "hf:{root}"),
        ("train/000.tar", "{root}/train/*.tar"),
        ("a/b/set.npz", "{root}/a/b/set.npz"),
    ],
)
def test_a_folder_of_other_files_says_how_to_read_them(
    tmp_path: Path, file: str, data: str
) -> None:
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_bytes(b"")
    with pytest.raises(SmaltiError) as error:
        open_source(str(tmp_path))
    assert f"--data '{data.format(root=tmp_path)}'" in str(error.value)


def test_brackets_in_the_path_of_a_folder(pictures: Path) -> None:
    strange = pictures.rename(pictures.with_name("set [1] {a} *"))
    for prefix in ("", "hf:"):
        assert len(open_source(f"{prefix}{strange}")) == 24


# -- labels in metadata files --------------------------------------------------------------------


def described(root: Path, rows: list[dict], name: str = "metadata.jsonl") -> Path:
    """Write a metadata file into a folder."""
    (root / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def labels_by_name(source: ImageSource) -> dict[str, str]:
    labels = source.labels.tolist()
    return {source.name(index): source.classes[label] for index, label in enumerate(labels)}


def test_labels_of_a_flat_folder_are_in_metadata(pictures: Path, caplog) -> None:
    flat = pictures / "red"
    rows = [{"file_name": f"{n}.png", "label": "odd" if n % 2 else "even"} for n in range(8)]
    source = open_source(str(described(flat, rows)))
    assert source.classes == ("even", "odd") and source.labels.tolist() == [0, 1] * 4
    assert "ignored" not in caplog.text
    numbers = [{**row, "label": 5 + 3 * (n % 2), "kind": n % 3} for n, row in enumerate(rows)]
    assert open_source(str(described(flat, numbers))).classes == ("5", "8")
    (flat / "classes.json").write_text(json.dumps(["a", "b", "c"]))
    named = open_source(str(flat), label_column="kind")
    assert named.classes == ("a", "b", "c") and named.labels.tolist() == [0, 1, 2] * 2 + [0, 1]
    one = open_source(str(flat), options=FolderOptions(single_class=True))
    assert one.classes == ("",)  # as in version 0.1.0


def test_sub_folders_are_the_classes_unless_a_column_is_named(pictures: Path, caplog) -> None:
    rows = [
        {"file_name": f"{name}/{n}.png", "label": n % 2}
        for name in ("red", "green", "blue")
        for n in range(8)
    ]
    relative = Path(os.path.relpath(described(pictures, rows)))
    source = open_source(str(relative / "red" / ".."))
    assert source.classes == ("blue", "green", "red")
    assert "are its sub-folders; --label_column label reads those" in caplog.text
    source = open_source(str(relative / "red" / ".."), label_column="label")
    found = {name.rsplit("/", 1)[1]: label for name, label in labels_by_name(source).items()}
    assert source.classes == ("0", "1") and found["3.png"] == "1" and found["6.png"] == "0"


def test_labels_of_split_folders_are_in_metadata(pictures: Path) -> None:
    for old, new in {"red": "train", "green": "test"}.items():
        folder = (pictures / old).rename(pictures / new)
        described(folder, [{"file_name": f"{n}.png", "label": n % 2} for n in range(8)])
    shutil.rmtree(pictures / "blue")
    source = open_source(str(pictures))
    assert source.classes == ("0", "1") and source.labels.tolist() == [0, 1] * 8
    assert source.heldout is not None and source.heldout.tolist() == [False] * 8 + [True] * 8


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({3: None}, r"red/3.png has no label: no metadata file names it"),
        ({3: {"label": -1}}, r'metadata.jsonl, line 4, "label": holds no label \(-1\)'),
        ({3: {"label": [1, 2]}}, r'line 4, "label": holds no label \(\[1, 2\]\)'),
        ({3: {"label": "a\nb"}}, r"line 4, .* has the label 'a\\nb', which cannot be printed"),
        (
            {3: {"label": "cat"}},
            r"labels of .* are names, such as 'cat', .*numbers, such as 0",
        ),
        ({3: {"file_name": "2.png"}}, r"line 4: 2.png has the label 1, and 0 in line 3: keep one"),
    ],
)
def test_labels_that_cannot_be_used_are_named(pictures: Path, change: dict, match: str) -> None:
    rows = [{"file_name": f"{n}.png", "label": n % 2} for n in range(8)]
    kept = [
        {**row, **(change.get(n) or {})}
        for n, row in enumerate(rows)
        if change.get(n, row) is not None
    ]
    flat = described(pictures / "red", kept)
    with pytest.raises(SmaltiError, match=match):
        open_source(str(flat), label_column="label")


def test_metadata_that_are_not_used_are_counted(pictures: Path, caplog) -> None:
    described(pictures, [{"file_name": "red/0.png", "width": 40}])
    source = open_source(str(pictures))
    assert not source.has_captions and "1 .jsonl (metadata.jsonl)" in caplog.text
