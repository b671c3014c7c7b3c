"""Hugging Face data sets: columns, splits, streams, and errors in one line."""

import base64
import io
import json
import os
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow.parquet import write_table

from smalti.data.image_io import FolderOptions
from smalti.data.sources import streams as stream_module
from smalti.data.sources.base import HuggingFaceOptions, open_source
from smalti.data.sources.huggingface import find_columns
from smalti.data.sources.listing import RowFiles
from smalti.data.sources.options import SourceOptions
from smalti.data.sources.streams import Sample, copy_stream
from smalti.errors import SmaltiError


def png(value: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (12, 12), (value, value, value)).save(stream, "PNG")
    return stream.getvalue()


PICTURES = [{"bytes": png(value), "path": None} for value in range(10)]


def save(
    folder: Path, labels: list | None = None, feature=None, name: str = "label", **other
) -> Path:
    """Ten pictures with labels, as `save_to_disk` writes them."""
    columns = {"image": PICTURES, **other}
    features = {"image": datasets.Image(), **{key: datasets.Value("int64") for key in other}}
    if labels is not None:
        columns[name], features[name] = labels, feature or datasets.Value("int64")
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    table.save_to_disk(folder)
    return folder


def test_labels_are_class_labels_numbers_or_names(tmp_path: Path) -> None:
    names = datasets.ClassLabel(names=["cat", "dog", "eel"])
    cases = {
        "named": ([0, 1] * 5, names, ("cat", "dog", "eel"), [0, 1]),
        "numbers": ([3, 1] * 5, None, ("1", "3"), [1, 0]),
        "text": (["b", "a"] * 5, datasets.Value("string"), ("a", "b"), [1, 0]),
    }
    for name, (labels, feature, classes, first) in cases.items():
        source = open_source(str(save(tmp_path / name, labels, feature)))
        assert source.classes == classes and source.labels[:2].tolist() == first
        assert source.read(7).getpixel((0, 0)) == (7, 7, 7)
    for name, labels in {"minus": [-1] * 10, "none": [None] * 10}.items():
        with pytest.raises(SmaltiError, match=r"row 0 has the label .*choose another --hf.split"):
            open_source(str(save(tmp_path / name, labels)))


def test_columns_are_found_by_type_then_by_name(caplog) -> None:
    value, image = datasets.Value("int64"), datasets.Image()
    label, usual = datasets.ClassLabel(names=["a"]), SourceOptions()

    def found(options: SourceOptions = usual, **features) -> tuple[str, str | None]:
        columns = find_columns("x", datasets.Features(features), options)
        return columns.image, columns.label

    assert found(photo=image, kind=label, label=value) == ("photo", "kind")
    assert found(img=datasets.Value("binary"), labels=value) == ("img", "labels")
    assert caplog.messages == []
    assert found(image=image, caption=datasets.Value("string")) == ("image", None)
    assert "it has no other): if one has the labels, name it in --label_column" in caplog.text
    with pytest.raises(SmaltiError, match=r"fine_label, coarse_label.*--label_column"):
        found(img=image, fine_label=label, coarse_label=label)
    older = SourceOptions(hf=HuggingFaceOptions(label_column="coarse_label"))
    assert found(older, img=image, fine_label=label, coarse_label=label)[1] == "coarse_label"
    chosen = SourceOptions(label_column="coarse_label")
    assert found(chosen, img=image, fine_label=label, coarse_label=label)[1] == "coarse_label"
    with pytest.raises(SmaltiError, match=r'no column "labell"; did you mean "label"'):
        found(SourceOptions(label_column="labell"), image=image, label=label)
    with pytest.raises(SmaltiError, match=r"name the one with pictures in --hf.image_column"):
        found(photograph=value, label=label)


def test_a_column_without_pictures_is_refused(tmp_path: Path) -> None:
    folder = str(save(tmp_path / "set", [0, 1] * 5, width=list(range(10))))
    with pytest.raises(SmaltiError, match=r'column "width" holds no pictures'):
        open_source(folder, hf=HuggingFaceOptions(image_column="width"))


@pytest.fixture
def splits(tmp_path: Path) -> str:
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    parts = {
        name: datasets.Dataset.from_dict(
            {"image": PICTURES[:count], "label": [0, 1] * (count // 2)}, features=features
        )
        for name, count in (("train", 10), ("validation", 4))
    }
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "splits")
    return str(tmp_path / "splits")


def test_splits_are_chosen_and_may_be_held_out(splits: str) -> None:
    assert len(open_source(splits)) == 10
    assert len(open_source(splits, hf=HuggingFaceOptions(split="validation"))) == 4
    both = open_source(splits, hf=HuggingFaceOptions(heldout_split="validation"))
    assert both.heldout is not None
    assert both.heldout.tolist() == [False] * 10 + [True] * 4
    with pytest.raises(SmaltiError, match=r'no split "valid".*did you mean "validation"'):
        open_source(splits, hf=HuggingFaceOptions(split="valid"))


def test_a_set_that_the_hub_lacks_is_one_line() -> None:
    with pytest.raises(SmaltiError, match=r"^hf:nobody/nothing cannot be read: [^\n]+$"):
        open_source("hf:nobody/nothing")
    with pytest.raises(SmaltiError, match="does not exist"):
        open_source("hf:./nowhere/at/all")


def test_a_saved_folder_is_opened_with_or_without_the_prefix(
    splits: str, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "set", [0, 1] * 5)
    for name in ("set", Path(splits).name):
        plain, prefixed = open_source(f"./{name}"), open_source(f"hf:./{name}")
        assert prefixed.fingerprint == plain.fingerprint
        assert prefixed.read(3).getpixel((0, 0)) == (3, 3, 3)
    with pytest.raises(SmaltiError, match=r"leave out --hf.streaming"):
        open_source("hf:./set", hf=HuggingFaceOptions(streaming=True))


def test_a_row_without_a_picture_is_a_bad_picture(tmp_path: Path) -> None:
    folder = save(tmp_path / "set", [0, 1] * 5)
    rows = datasets.load_from_disk(folder).to_list()
    rows[3]["image"] = None
    holed = str(tmp_path / "holed.parquet")
    datasets.Dataset.from_list(rows).to_parquet(holed)
    cache = tmp_path / "cache"
    with pytest.raises(SmaltiError, match=r"row 3 .*holds no picture"):
        open_source(holed, stream_cache=cache)
    left = open_source(holed, stream_cache=cache, options=FolderOptions(bad_images="skip"))
    assert len(left) == 9
    with pytest.raises(SmaltiError, match=r"sample 3 holds no picture"):
        open_source(holed, stream_cache=cache, hf=HuggingFaceOptions(streaming=True))


def test_a_damaged_or_empty_file_among_others_is_named(tmp_path: Path) -> None:
    folder = save(tmp_path / "set", [0, 1] * 5)
    rows = datasets.load_from_disk(folder)
    made = tmp_path / "made"
    made.mkdir()
    rows.to_parquet(str(made / "0.parquet"))
    (made / "1.parquet").write_bytes((made / "0.parquet").read_bytes()[:-9])
    for data in (made / "*.parquet", made):
        with pytest.raises(SmaltiError, match=r"1.parquet cannot be read: [^\n]+$"):
            open_source(str(data), stream_cache=tmp_path / "cache")
    whole = bytearray((made / "0.parquet").read_bytes())
    whole[4 : len(whole) // 3] = bytes(len(whole) // 3 - 4)  # the pages, not the footer
    (tmp_path / "pages.parquet").write_bytes(whole)
    with pytest.raises(SmaltiError, match=r"pages.parquet cannot be read: (?!An error occurred)"):
        open_source(str(tmp_path / "pages.parquet"), stream_cache=tmp_path / "cache")
    rows.select([]).to_parquet(str(tmp_path / "none.parquet"))
    with pytest.raises(SmaltiError, match=r"none.parquet holds no pictures"):
        open_source(str(tmp_path / "none.parquet"), stream_cache=tmp_path / "cache")


def test_an_option_that_would_be_ignored_is_refused(tmp_path: Path) -> None:
    saved = str(save(tmp_path / "set", [0, 1] * 5))
    (arrow,) = map(str, (tmp_path / "set").glob("*.arrow"))
    for name in ("config", "revision"):
        with pytest.raises(SmaltiError, match=f"leave out --hf.{name}"):
            open_source(saved, hf=HuggingFaceOptions(**{name: "other"}))
    with pytest.raises(SmaltiError, match="leave out --stream_cache"):
        open_source(arrow, stream_cache=tmp_path / "cache")
    with pytest.raises(SmaltiError, match="has no splits"):
        open_source(arrow, hf=HuggingFaceOptions(split="train"))


def test_damaged_files_are_one_line(tmp_path: Path) -> None:
    for name in ("bad.parquet", "bad.arrow"):
        (tmp_path / name).write_bytes(b"nothing of the kind")
        with pytest.raises(SmaltiError, match=r"bad.\w+ cannot be read: [^\n]+$"):
            open_source(str(tmp_path / name))
    with pytest.raises(SmaltiError, match=r"gone.parquet does not exist"):
        open_source(str(tmp_path / "gone.parquet"))


# -- splits by name, brackets, and which files are read --------------------------------------


def write_parquet(path: Path, first: int, count: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {"image": PICTURES[first : first + count], "label": ["a", "b"] * (count // 2)}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    datasets.Dataset.from_dict(columns, features=features).to_parquet(path)


def test_all_pictures_of_a_folder_are_read_whatever_their_names(tmp_path: Path) -> None:
    """`datasets` would read the 8 of 40 that have "test" in their names."""
    for number in range(40):
        folder = tmp_path / "set" / ("cat" if number % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        name = f"test_{number}.png" if number < 8 else f"photo_{number}.png"
        (folder / name).write_bytes(png(number))
    for data in (str(tmp_path / "set"), f"hf:{tmp_path / 'set'}"):
        source = open_source(data)
        assert len(source) == 40 and source.classes == ("cat", "dog")
    (tmp_path / "set" / "metadata.csv").write_text(
        "file_name,label\n"
        + "".join(
            f"{path.relative_to(tmp_path / 'set')},{path.parent.name}\n"
            for path in sorted((tmp_path / "set").rglob("*.png"))
        )
    )
    source = open_source(f"hf:{tmp_path / 'set'}", stream_cache=tmp_path / "cache")
    assert len(source) == 40 and source.classes == ("cat", "dog")
    for option in ({"label_column": "label"}, {"streaming": True}):
        (tmp_path / "set" / "metadata.csv").unlink(missing_ok=True)
        with pytest.raises(SmaltiError, match="leave out --hf"):
            open_source(f"hf:{tmp_path / 'set'}", hf=HuggingFaceOptions(**option))


def test_parquet_files_without_a_split_in_their_names_are_all_read(tmp_path: Path, caplog) -> None:
    for number, name in enumerate(("a", "b", "b-test")):
        write_parquet(tmp_path / "set" / f"{name}.parquet", 2 * number, 2)
    cache = tmp_path / "cache"
    for data in (str(tmp_path / "set"), f"hf:{tmp_path / 'set'}"):
        caplog.clear()
        assert len(open_source(data, stream_cache=cache)) == 6
        assert "the names of 2 of 3 files in" in caplog.text
    chosen = HuggingFaceOptions(split="test")
    assert len(open_source(f"hf:{tmp_path / 'set'}", hf=chosen, stream_cache=cache)) == 2


def test_the_splits_of_parquet_files_are_named(tmp_path: Path, caplog) -> None:
    for name, count in (("train-00000-of-00001", 6), ("validation-00000-of-00001", 4)):
        write_parquet(tmp_path / "set" / "data" / f"{name}.parquet", 0, count)
    cache = tmp_path / "cache"
    source = open_source(f"hf:{tmp_path / 'set'}", stream_cache=cache)
    said = "train (6 rows) is read, validation (4 rows) is not read; choose with --hf.split"
    assert len(source) == 6 and said in caplog.text and said in source.remarks[0]
    both = HuggingFaceOptions(heldout_split="validation")
    source = open_source(f"hf:{tmp_path / 'set'}", hf=both, stream_cache=cache)
    assert len(source) == 10 and "validation (4 rows) is held out" in caplog.text
    with pytest.raises(SmaltiError, match=r"holds no pictures, but .* pass --data 'hf:"):
        open_source(str(tmp_path / "set"))


def test_brackets_in_the_path_of_parquet_files(tmp_path: Path) -> None:
    folder = tmp_path / "set [1]"
    for number in range(2):
        write_parquet(folder / f"part [{number}].parquet", 2 * number, 2)
    (cache,) = [tmp_path / "cache"]
    for data, count in {
        str(folder): 4,
        f"hf:{folder}": 4,
        f"{folder}/*.parquet": 4,
        f"{folder}/part [1].parquet": 2,
    }.items():
        assert len(open_source(data, stream_cache=cache)) == count, data
    save(folder / "saved", [0, 1] * 5)
    assert len(open_source(str(folder / "saved"))) == 10


def test_a_set_is_looked_up_on_the_hub_only_where_this_is_said(
    tmp_path: Path, monkeypatch, caplog
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SmaltiError, match="cannot be read"):
        open_source("hf:mine/cats")
    assert "there is no folder mine/cats: asking the Hub" in caplog.text
    (tmp_path / "mine").mkdir()
    caplog.clear()
    with pytest.raises(SmaltiError, match=r"the folder mine/cats does not exist, and the Hub is"):
        open_source("hf:mine/cats")
    assert caplog.messages == []


# -- rows that are not what they should be ---------------------------------------------------


def test_a_row_names_only_files_of_its_set(tmp_path: Path) -> None:
    """Not those of this machine, a device, or a file on a network."""
    (tmp_path / "secret.png").write_bytes(png(1))
    folder = tmp_path / "set"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "0.png").write_bytes(png(7))
    os.mkfifo(folder / "pipe")
    (folder / "zero").symlink_to("/dev/zero")
    wrong = (
        *(str(tmp_path / "secret.png"), "../secret.png", "/dev/zero", "zero", "pipe", "sub"),
        *("hf://datasets/a/b/c.png", "http://127.0.0.1/c.png", "file:///etc/passwd", "x\0y"),
    )
    for path in ("sub/0.png", str(folder / "sub" / "0.png"), *wrong):
        rows = [{"bytes": png(0), "path": None}, {"bytes": None, "path": path}]
        write_table(pyarrow.table({"image": rows, "label": [0, 1]}), folder / "a.parquet")
        cache = tmp_path / "cache"
        if path in wrong:
            with pytest.raises(SmaltiError, match=r"row 1 cannot be decoded"):
                open_source(f"{folder}/a.parquet", stream_cache=cache)
        else:
            source = open_source(f"{folder}/a.parquet", stream_cache=cache)
            assert source.read(1).getpixel((0, 0)) == (7, 7, 7)


def test_a_row_of_the_hub_names_only_files_of_its_repository(tmp_path: Path, monkeypatch) -> None:
    local = tmp_path / "0.png"
    local.write_bytes(png(1))
    files, opened = RowFiles((tmp_path / "cache",), "a/b"), []
    monkeypatch.setattr("fsspec.open", lambda *args: opened.append(args) or local.open("rb"))
    for name in (
        "hf://datasets/a/c/0.png",
        "hf://datasets/a/bc/0.png",
        f"file://{local}::hf://datasets/a/b/0.png",
        f"hf://datasets/a/b/0.png::file://{local}",
        f"zip://0.png::file://{local}::hf://datasets/a/b/0.zip",
    ):
        with pytest.raises(OSError):
            files.read(name)
    assert opened == []
    for name in ("hf://datasets/a/b@1/0.png", "zip://0.png::hf://datasets/a/b/0.zip"):
        assert files.read(name) == png(1)

    def damaged(name: str, mode: str) -> None:
        raise zipfile.BadZipFile("no directory")

    monkeypatch.setattr("fsspec.open", damaged)
    with pytest.raises(OSError, match="no directory"):
        files.read("zip://0.png::hf://datasets/a/b/0.zip")


def test_a_column_of_base64_is_not_printed_whole(tmp_path: Path) -> None:
    text = base64.b64encode(png(3) * 100).decode()
    for columns, option in (
        ({"image": [text] * 4, "label": [0, 1] * 2}, {}),
        ({"image": [text] * 4, "label": [0, 1] * 2}, {"label_column": "image"}),
        ({"image": PICTURES[:4], "label": [text] * 4}, {}),
    ):
        write_table(pyarrow.table(columns), tmp_path / "a.parquet")
        with pytest.raises(SmaltiError, match=r"row 0 |name that of labels|10536 letters") as error:
            open_source(
                str(tmp_path / "a.parquet"),
                stream_cache=tmp_path / "cache",
                hf=HuggingFaceOptions(**option),
            )
        assert len(str(error.value)) < 600 + len(str(tmp_path))


@pytest.mark.parametrize("odd", [None, True])
def test_the_row_without_a_label_is_blamed(tmp_path: Path, odd) -> None:
    for labels, kind in ((["cat", "dog"], "string"), ([0, 1], "int64"), ([False], "bool")):
        if odd is True and kind != "bool":
            continue
        values = (labels * 10)[:10]
        values[6] = odd
        first = 0 if kind == "bool" else 6
        folder = save(tmp_path / f"{kind}{odd}", values, datasets.Value(kind))
        with pytest.raises(SmaltiError, match=rf"row {first} has the label \w+, which is neither"):
            open_source(str(folder))


# -- streams ----------------------------------------------------------------------------------


@pytest.fixture
def parquet(tmp_path: Path) -> str:
    folder = save(tmp_path / "set", [0, 1] * 5, datasets.ClassLabel(names=["a", "b"]))
    (tmp_path / "files").mkdir()
    table = datasets.load_from_disk(folder)
    assert isinstance(table, datasets.Dataset)
    table.to_parquet(tmp_path / "files" / "train.parquet")
    return f"{tmp_path}/files/train.parquet"


def test_a_stream_is_copied_once_and_then_read_at_random(
    parquet: str, tmp_path: Path, monkeypatch
) -> None:
    options = HuggingFaceOptions(streaming=True)
    source = open_source(parquet, hf=options, stream_cache=tmp_path / "cache")
    assert source.classes == ("a", "b") and source.labels.tolist() == [0, 1] * 5
    assert [source.read(index).getpixel((0, 0))[0] for index in (7, 2)] == [7, 2]
    monkeypatch.setattr(datasets, "load_dataset", None)  # it would be called for a new copy
    again = open_source(parquet, hf=options, stream_cache=tmp_path / "cache")
    assert again.fingerprint == source.fingerprint


def test_a_part_of_a_stream_can_be_copied(parquet: str, tmp_path: Path) -> None:
    options = HuggingFaceOptions(streaming=True, max_samples=4)
    assert len(open_source(parquet, hf=options, stream_cache=tmp_path / "cache")) == 4
    whole = HuggingFaceOptions(streaming=True)
    assert len(open_source(parquet, hf=whole, stream_cache=tmp_path / "cache")) == 10


def test_streams_that_could_not_be_exact_are_refused(parquet: str, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "train.csv").write_text("image,label\na.png,1\n")
    with pytest.raises(SmaltiError, match="which alone are read in place: pass --stream_cache"):
        open_source(f"hf:{tmp_path}/texts", hf=HuggingFaceOptions(streaming=True))
    with pytest.raises(SmaltiError, match="is read in place"):
        open_source(str(tmp_path / "set"), hf=HuggingFaceOptions(streaming=True))
    with pytest.raises(SmaltiError, match=r"also pass --hf.streaming"):
        HuggingFaceOptions(max_samples=3)
    both = HuggingFaceOptions(streaming=True, heldout_split="test")
    with pytest.raises(SmaltiError, match=r"heldout_split cannot be copied.*--stream_cache"):
        open_source(parquet, hf=both, stream_cache=tmp_path / "cache")


def test_an_interrupted_copy_continues_after_its_last_finished_shard(tmp_path: Path) -> None:
    begun = []

    def samples(start: int, stop_at: int = 100):
        begun.append(start)
        for number in range(start, 10):
            if number == stop_at:
                raise KeyboardInterrupt
            yield Sample(png(number), number % 2)

    def copy(folder: Path, stop_at: int = 100):
        return copy_stream(
            folder,
            lambda start: samples(start, stop_at),
            title="numbers",
            classes=lambda: None,
            request={},
            shard_size=4,
        )

    with pytest.raises(KeyboardInterrupt):
        copy(tmp_path / "cut", stop_at=6)
    assert [path.name for path in (tmp_path / "cut").glob("[0-9]*")] == ["000000.tar"]
    cut, whole = copy(tmp_path / "cut"), copy(tmp_path / "whole")
    assert begun == [0, 4, 0] and len(cut) == 10
    for path in sorted((tmp_path / "whole").glob("*.*")):
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes()
    assert np.array_equal(cut.labels, whole.labels)
    copy(tmp_path / "whole")
    assert begun == [0, 4, 0]


def test_a_broken_stream_is_one_line(parquet: str, tmp_path: Path, monkeypatch) -> None:
    def broken(self):
        yield {"image": PICTURES[0], "label": 0}
        raise ConnectionError("the line is dead\nand more")

    monkeypatch.setattr(datasets.IterableDataset, "__iter__", broken)
    with pytest.raises(SmaltiError, match=r"from sample 1 on, cannot be read: the line is dead$"):
        open_source(parquet, hf=HuggingFaceOptions(streaming=True), stream_cache=tmp_path / "cache")


def test_an_empty_stream_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SmaltiError, match="holds no pictures"):
        copy_stream(
            tmp_path / "none",
            lambda start: iter(()),
            title="nothing",
            classes=lambda: None,
            request={},
        )
    assert stream_module.SHARD_SIZE >= 100


def test_a_copy_from_before_captions_were_copied_says_so(tmp_path: Path, caplog) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    table = datasets.Dataset.from_dict(
        {"image": PICTURES, "text": [f"picture {n}" for n in range(10)]},
        features=datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")}),
    )
    table.to_parquet(folder / "train.parquet")
    streamed = {
        "spec": f"{folder}/train.parquet",
        "hf": HuggingFaceOptions(streaming=True),
        "stream_cache": tmp_path / "cache",
    }
    for _ in range(2):  # a new copy has them
        assert open_source(**streamed).captions(3) == ("picture 3",)
    assert "when captions were not copied" not in caplog.text
    (manifest,) = (tmp_path / "cache").rglob("manifest.json")
    content = json.loads(manifest.read_text())
    del content["captions"]
    manifest.write_text(json.dumps(content))
    open_source(**streamed)
    said = [text for text in caplog.messages if "when captions were not copied" in text]
    assert len(said) == 1 and "name their column in --caption_column" in said[0]
    assert open_source(**streamed, caption_column="text").captions(3) == ("picture 3",)
    assert len([text for text in caplog.messages if "were not copied" in text]) == 1
