"""Captions of pictures, wherever a set keeps them, and captions that cannot be used."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
import webdataset

from smalti.data.dataset import ImageDataset
from smalti.data.image_io import FolderOptions
from smalti.data.loader import stream_batches
from smalti.data.order import DataOrder
from smalti.data.sources.annotations import captions_in, captions_of
from smalti.data.sources.base import HuggingFaceOptions, ImageSource, heldout_mask, open_source
from smalti.errors import SmaltiError
from smalti.scripts.check_data import CheckDataConfig, check_data
from tests.data.test_sources import CLASSES, arrays_of, files_of


def texts_of(pictures: Path) -> list[list[str]]:
    """One or two captions for each picture, in the order of `files_of`."""
    return [
        [f"a {path.parent.name} picture"] + ([f"number {path.stem}"] if int(path.stem) % 2 else [])
        for path, _ in files_of(pictures)
    ]


def as_text_files(pictures: Path, place: Path) -> dict:
    for (path, _), texts in zip(files_of(pictures), texts_of(pictures), strict=True):
        path.with_suffix(".txt").write_text("\n".join(texts) + "\n\n")
    return {"spec": str(pictures)}


def as_jsonl(pictures: Path, place: Path) -> dict:
    rows = [
        {"file_name": path.relative_to(pictures).as_posix(), "text": texts}
        for (path, _), texts in zip(files_of(pictures), texts_of(pictures), strict=True)
    ]
    write_jsonl(pictures, rows)
    return {"spec": str(pictures)}


def as_jsonl_in_class_folders(pictures: Path, place: Path) -> dict:
    for name in CLASSES:
        rows = [
            {"file_name": path.name, "caption": texts}
            for (path, _), texts in zip(files_of(pictures), texts_of(pictures), strict=True)
            if path.parent.name == name
        ]
        write_jsonl(pictures / name, rows)
    return {"spec": str(pictures)}


def as_csv(pictures: Path, place: Path) -> dict:
    """A row for each caption."""
    with (pictures / "metadata.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "width", "prompt"])
        for (path, _), texts in zip(files_of(pictures), texts_of(pictures), strict=True):
            for text in texts:
                writer.writerow([path.relative_to(pictures).as_posix(), 40, text])
    return {"spec": str(pictures)}


def table_of(pictures: Path, column: str) -> datasets.Dataset:
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=list(CLASSES)),
            column: [datasets.Value("string")],
        }
    )
    rows = files_of(pictures)
    columns = {
        "image": [{"bytes": path.read_bytes(), "path": path.name} for path, _ in rows],
        "label": [label for _, label in rows],
        column: texts_of(pictures),
    }
    return datasets.Dataset.from_dict(columns, features=features)


def as_saved(pictures: Path, place: Path) -> dict:
    table_of(pictures, "caption").save_to_disk(place)
    return {"spec": str(place)}


def as_named_column(pictures: Path, place: Path) -> dict:
    table_of(pictures, "alt").save_to_disk(place)
    return {"spec": str(place), "caption_column": "alt"}


def as_parquet(pictures: Path, place: Path) -> dict:
    place.mkdir()
    table_of(pictures, "text").to_parquet(place / "train-00000-of-00001.parquet")
    return {"spec": f"hf:{place}", "stream_cache": place.with_name("cache")}


def as_stream(pictures: Path, place: Path) -> dict:
    return {**as_parquet(pictures, place), "hf": HuggingFaceOptions(streaming=True)}


def shards_of(place: Path, pictures: Path, describe: Callable[[list[str]], dict]) -> Path:
    place.mkdir()
    (place / "classes.json").write_text(json.dumps(CLASSES))
    with webdataset.ShardWriter(f"{place}/%06d.tar", maxcount=10, verbose=0) as writer:
        rows = zip(files_of(pictures), texts_of(pictures), strict=True)
        for number, ((path, label), texts) in enumerate(rows):
            sample = {"__key__": f"{number:06d}", "png": path.read_bytes(), "cls": label}
            writer.write({**sample, **describe(texts)})
    return place


def as_txt_members(pictures: Path, place: Path) -> dict:
    return {"spec": str(shards_of(place, pictures, lambda texts: {"txt": "\n".join(texts)}))}


def as_json_members(pictures: Path, place: Path) -> dict:
    return {"spec": str(shards_of(place, pictures, lambda texts: {"json": {"caption": texts}}))}


def as_named_key(pictures: Path, place: Path) -> dict:
    spec = str(shards_of(place, pictures, lambda texts: {"txt": "?", "json": {"alt": texts}}))
    return {"spec": spec, "caption_column": "alt"}


def as_npz(pictures: Path, place: Path) -> dict:
    place.mkdir()
    texts = np.array([[*texts, ""][:2] for texts in texts_of(pictures)])
    arrays = arrays_of(pictures)
    np.savez(place / "a.npz", **arrays, classes=np.array(CLASSES), captions=texts)
    return {"spec": str(place)}


def as_npy(pictures: Path, place: Path) -> dict:
    place.mkdir()
    for name, array in arrays_of(pictures).items():
        np.save(place / f"{name}.npy", array)
    np.save(place / "captions.npy", np.array(["|".join(t) for t in texts_of(pictures)]))
    return {"spec": str(place)}


MAKERS = {
    function.__name__.removeprefix("as_"): function
    for function in (
        *(as_text_files, as_jsonl, as_jsonl_in_class_folders, as_csv, as_saved, as_named_column),
        *(as_parquet, as_stream, as_txt_members, as_json_members, as_named_key, as_npz),
    )
}


def write_jsonl(folder: Path, rows: list) -> None:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "metadata.jsonl").write_text("".join(f"{line}\n" for line in lines))


def captions_of_all(source: ImageSource) -> list[list[str]]:
    return [list(source.captions(index)) for index in range(len(source))]


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_captions_are_read_wherever_they_are(
    make: Callable, pictures: Path, tmp_path: Path, caplog
) -> None:
    caplog.set_level("INFO")
    plain = open_source(str(pictures))
    assert not plain.has_captions and plain.captions(0) == ()
    caplog.clear()
    source = open_source(**make(pictures, tmp_path / "made"))
    source.require_captions()
    assert source.has_captions and captions_of_all(source) == texts_of(pictures)
    assert source.labels.tolist() == plain.labels.tolist() and len(source.classes) == 3
    assert "captions of " in caplog.text
    assert "ignored" not in caplog.text or make is as_named_key  # which has other text members


def test_captions_in_an_array_that_are_not_utf_8_are_named(tmp_path: Path) -> None:
    images, texts = np.zeros((4, 16, 16, 3), np.uint8), np.array([b"a", b"\xff", b"c", b"d"])
    np.savez(tmp_path / "a.npz", images=images, captions=texts)
    options = CheckDataConfig(data=str(tmp_path / "a.npz"))
    report = check_data(options)  # does not raise
    assert report.captions is None and any("captions in" in remark for remark in report.remarks)


def test_an_array_of_single_captions(pictures: Path, tmp_path: Path) -> None:
    source = open_source(**as_npy(pictures, tmp_path / "made"))
    assert source.captions(1) == ("a blue picture|number 1",)
    texts = np.array([text.encode() for text in map("\xe9".__mul__, range(1, 25))])
    np.save(tmp_path / "made" / "captions.npy", texts)
    source = open_source(str(tmp_path / "made"))
    assert source.captions(2) == ("\xe9\xe9\xe9",)


def test_a_caption_is_one_line() -> None:
    assert captions_of(" a \n red\tapple ") == ("a red apple",)
    assert captions_of([None, "", " ", "x"]) == ("x",) and captions_of(None) == ()
    assert captions_in("\ufeffa cat\r\n\r\n a  dog \n".encode()) == ("a cat", "a dog")
    for wrong in (5, [["x"]], {"a": 1}):
        with pytest.raises(ValueError, match="neither a text nor a list of texts"):
            captions_of(wrong)
    with pytest.raises(ValueError, match="line 2 is not UTF-8"):
        captions_in(b"a\n\xff\n")


def test_the_names_of_emoji_are_their_captions() -> None:
    source = open_source("emoji")
    names = {source.name(index): source.captions(index) for index in range(len(source))}
    assert names["emoji/rolling_on_the_floor_laughing-Noto"] == ("rolling on the floor laughing",)
    assert names["emoji/man-raising-hand-Fluent"] == ("man raising hand",)
    assert names["emoji/t-rex-Twemoji"] == ("t-rex",) and names["emoji/-1-Noto"] == ("-1",)
    held = heldout_mask(source, 0.1)
    sides = [
        {source.captions(index) for index in mask.nonzero().flatten().tolist()}
        for mask in (held, ~held)
    ]
    assert sides[0] and not sides[0] & sides[1]  # no caption of a held-out glyph is trained on
    assert not open_source("fashion").has_captions
    with pytest.raises(SmaltiError, match=r"no columns: leave out --caption_column"):
        open_source("emoji", caption_column="text")


def test_batches_have_the_captions_of_their_pictures(pictures: Path) -> None:
    as_text_files(pictures, pictures)
    source = open_source(str(pictures))
    images = ImageDataset(source, 16)
    batch = next(images.batches(5, start=7))
    assert batch.captions == [tuple(texts) for texts in texts_of(pictures)[7:12]]
    order = DataOrder(24, 6, seed=1)
    for workers in (0, 1):
        (batch,) = next(stream_batches(images, order, num_workers=workers))
        wanted = [images.captions(index) for _, index in order.keys(0)]
        assert batch.captions == wanted and len(set(wanted)) > 1
    assert next(ImageDataset(source, 16, captions=False).batches(5)).captions is None
    before = images.captions_fingerprint
    (pictures / "red" / "3.txt").write_text("another")
    again = ImageDataset(open_source(str(pictures)), 16)
    assert again.captions_fingerprint != before and again.fingerprint == images.fingerprint


def test_a_replaced_picture_has_the_captions_of_its_replacement(pictures: Path) -> None:
    as_text_files(pictures, pictures)
    (pictures / "red" / "3.png").write_bytes(b"")
    source = open_source(str(pictures), options=FolderOptions(bad_images="replace"))
    images = ImageDataset(source, 16)
    index = next(i for i in range(24) if images.name(i) == "red/3.png")
    (batch,) = images.batches_of([index], 1)
    assert batch.captions == [source.captions(index + 1)] == [("a red picture",)]


# -- captions that cannot be used: one line; the pictures are read without them -------------------


def refused(pictures: Path, match: str, **options: str) -> None:
    """Without captions the set opens; where captions are needed, the message says why."""
    source = open_source(str(pictures))
    assert len(source) == 24 and not source.has_captions
    with pytest.raises(SmaltiError, match=match) as error:
        source.require_captions()
    assert "\n" not in str(error.value)
    assert any(str(error.value) in remark for remark in source.remarks)
    with pytest.raises(SmaltiError, match=match):
        open_source(str(pictures), caption_column="text")


ROWS = [{"file_name": f"{name}/{n}.png", "text": "x"} for name in CLASSES for n in range(8)]


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([{"file_name": "gone.png", "text": "x"}], r"jsonl, line 1 names gone.png, which does not"),
        ([*ROWS, {"file_name": "../a.png"}], r"jsonl, line 25 names ../a.png, which does not"),
        ([ROWS[0], {"text": "x"}], r'jsonl, line 2 has no "file_name" \(it has text\)'),
        ([ROWS[0], '{"file_name": '], r"jsonl, line 2 is not JSON"),
        ([ROWS[0], "", "[1]"], r"jsonl, line 3 is not an object"),
        (["[" * 100_000], r"jsonl, line 1 is not JSON"),
        ([*ROWS[:-1], {**ROWS[-1], "text": " "}], r'jsonl, line 24: "text" is empty'),
        ([*ROWS[:-1], {**ROWS[-1], "text": 7}], r'jsonl, line 24, "text": 7 is neither a text'),
        ([*ROWS[:-1], {"file_name": "red/7.png"}], r'jsonl, line 24: "text" is empty'),
        (ROWS[:-2], r"2 of the 24 pictures of .* have no caption, the first .*/red/6.png"),
    ],
)
def test_bad_lines_of_metadata_are_named(pictures: Path, rows: list, match: str) -> None:
    write_jsonl(pictures, rows)
    refused(pictures, match)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"file,text\nred/0.png,x\n", r'metadata.csv has no column "file_name" \(it has file, t'),
        (b"", r'metadata.csv has no column "file_name" \(it has nothing\)'),
        (b"file_name,text\nred/0.png,a, b\n", r"csv, line 2 does not have the 2 values"),
        (b"file_name,text\nred/0.png\n", r"csv, line 2 does not have the 2 values"),
        (b'file_name,text\nred/0.png,"a" b\n', r"csv, line 2 is not CSV"),
        (b"file_name,text\nred/0.png,a\nred/1.png,\xe9\n", r"csv, line 3 is not UTF-8"),
    ],
)
def test_bad_lines_of_a_table_are_named(pictures: Path, content: bytes, match: str) -> None:
    (pictures / "metadata.csv").write_bytes(content)
    refused(pictures, match)


def test_two_metadata_files_for_a_picture_are_named(pictures: Path) -> None:
    write_jsonl(pictures, ROWS)
    write_jsonl(pictures / "red", [{"file_name": "3.png", "text": "y"}])
    refused(pictures, r"red/metadata.jsonl, line 1: 3.png is also in .*s/metadata.jsonl, line 20")
    (pictures / "metadata.csv").write_text("file_name,text\n")
    refused(pictures, r"metadata.jsonl and metadata.csv are both there: remove one")


def test_text_files_that_cannot_be_used_are_named(pictures: Path, caplog) -> None:
    as_text_files(pictures, pictures)
    (pictures / "red" / "notes.txt").write_text("not a caption")
    assert open_source(str(pictures)).has_captions
    assert "ignored 1 files" in caplog.text and "1 .txt (red/notes.txt)" in caplog.text
    text = pictures / "red" / "3.txt"
    for content, match in {
        b" \n": r"red/3.txt holds no caption",
        b"\xff": r"the captions in .*red/3.txt: line 1 is not UTF-8",
        b"x" * 2**21: r"red/3.txt: it has more than 1048576 bytes",
    }.items():
        text.write_bytes(content)
        source = open_source(str(pictures))
        with pytest.raises(SmaltiError, match=match):
            source.require_captions()
        with pytest.raises(SmaltiError, match=match):
            open_source(str(pictures), caption_column=".txt")
    text.unlink()
    with pytest.raises(
        SmaltiError, match=r"1 of the 24 pictures .* caption, the first .*red/3.png"
    ):
        open_source(str(pictures)).require_captions()


def test_a_column_that_does_not_exist_is_named(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(SmaltiError, match=r'no metadata.jsonl .* column "alt" \(--caption_column'):
        open_source(str(pictures), caption_column="alt")
    write_jsonl(pictures, [{**row, "alternative": "x"} for row in ROWS])
    with pytest.raises(SmaltiError, match=r'column "alternativ" .*did you mean "alternative"'):
        open_source(str(pictures), caption_column="alternativ")
    with pytest.raises(SmaltiError, match=r'no column "alt"'):
        open_source(as_saved(pictures, tmp_path / "saved")["spec"], caption_column="alt")
    with pytest.raises(SmaltiError, match=r'the column "label" holds no texts'):
        open_source(str(tmp_path / "saved"), caption_column="label")
    npz = as_npz(pictures, tmp_path / "npz")["spec"]
    with pytest.raises(SmaltiError, match=r'no array "caption" .*did you mean "captions"'):
        open_source(npz, caption_column="caption")
    with pytest.raises(SmaltiError, match=r"labels in .* is int64 \(24,\); captions must be texts"):
        open_source(npz, caption_column="labels")
    shards = as_json_members(pictures, tmp_path / "shards")["spec"]
    with pytest.raises(SmaltiError, match=r"the pictures have no captions: .*--caption_column"):
        open_source(shards, caption_column="alt")


def test_samples_of_shards_without_captions_are_counted(pictures: Path, tmp_path: Path) -> None:
    def some(texts: list[str]) -> dict:
        return {"json": {"caption": texts if len(texts) > 1 else None}}

    source = open_source(str(shards_of(tmp_path / "a", pictures, some)))
    with pytest.raises(SmaltiError, match=r"12 of the 24 pictures .* the first .*000000.png"):
        source.require_captions()
    wrong = shards_of(tmp_path / "b", pictures, lambda texts: {"json": {"text": {"en": texts}}})
    with pytest.raises(SmaltiError, match=r"the captions in 000000.json in .*neither a text"):
        open_source(str(wrong)).require_captions()
    bad = shards_of(tmp_path / "c", pictures, lambda texts: {"txt": b"\xff"})
    with pytest.raises(SmaltiError, match=r"the captions in 000000.txt in .*line 1 is not UTF-8"):
        open_source(str(bad)).require_captions()


def test_rows_without_captions_are_counted(pictures: Path, tmp_path: Path) -> None:
    rows = table_of(pictures, "text").to_dict()
    rows["text"] = [[] if n < 3 else texts for n, texts in enumerate(rows["text"])]
    features = table_of(pictures, "text").features
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    source = open_source(str(tmp_path / "saved"))
    with pytest.raises(SmaltiError, match=r"3 of the 24 pictures .* no caption, the first .*row 0"):
        source.require_captions()
