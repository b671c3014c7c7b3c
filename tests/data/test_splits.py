"""Held-out pictures of their own: `--heldout_data`, and split folders of any kind of set."""

import io
import json
import re
import tarfile
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from smalti.data.dataset import DataOptions, TrainingPictures, read_options, write_options
from smalti.data.sources.base import open_source
from smalti.errors import SmaltiError

SHADES = {"ant": 10, "bee": 90, "cat": 170, "dog": 250}


def pictures(name: str, count: int, first: int = 0) -> list[np.ndarray]:
    """Grey pictures, from which class and number can be read: the level is that of the class, and
    one pixel is `first`, `first` + 1, ..."""
    made = np.full((count, 16, 16, 3), SHADES[name], dtype=np.uint8)
    made[:, 0, 0] = np.arange(first, first + count)[:, None]
    return list(made)


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png")
    return stream.getvalue()


def folder(root: Path, sets: dict[str, list[np.ndarray]]) -> Path:
    for name, members in sets.items():
        (root / name).mkdir(parents=True)
        for i, pixels in enumerate(members):
            (root / name / f"{i}.png").write_bytes(png(pixels))
    return root


def arrays(root: Path, sets: dict[str, list[np.ndarray]]) -> Path:
    root.mkdir(parents=True)
    labels = [number for number, members in enumerate(sets.values()) for _ in members]
    images = np.stack([pixels for members in sets.values() for pixels in members])
    np.savez(root / "set.npz", images=images, labels=np.array(labels), classes=list(sets))
    return root


def shards(root: Path, sets: dict[str, list[np.ndarray]]) -> Path:
    root.mkdir(parents=True)
    with tarfile.open(root / "000.tar", "w") as archive:
        for name, members in sets.items():
            for i, pixels in enumerate(members):
                for suffix, content in (("png", png(pixels)), ("cls", name.encode())):
                    entry = tarfile.TarInfo(f"{name}{i}.{suffix}")
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))
    return root


def parquet(root: Path, sets: dict[str, list[np.ndarray]]) -> Path:
    root.mkdir(parents=True)
    rows = [(name, Image.fromarray(p)) for name, members in sets.items() for p in members]
    columns = {"image": [image for _, image in rows], "label": [name for name, _ in rows]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    datasets.Dataset.from_dict(columns, features=features).to_parquet(root / "part.parquet")
    return root


MAKERS = {"folder": folder, "arrays": arrays, "shards": shards, "parquet": parquet}
TRAIN = {name: pictures(name, 3) for name in ("ant", "bee", "cat")}
# In another order, without ant, and with one class more.
HELD = {name: pictures(name, 2, first=100) for name in ("cat", "bee")}


def check(images, counts: dict[str, int]) -> None:
    """Every picture has the class that its grey level tells."""
    assert images.classes == tuple(TRAIN)
    found = dict.fromkeys(counts, 0)
    levels = ((images.all_images()[:, 0, 8, 8] + 1) * 127.5).round().int().tolist()
    for level, label in zip(levels, images.labels.tolist(), strict=True):
        name = images.classes[label]
        assert level == SHADES[name]
        found[name] += 1
    assert found == counts


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("other", ["folder", "arrays"])
def test_classes_of_heldout_data_are_matched_by_name(tmp_path: Path, kind, other, caplog) -> None:
    data = MAKERS[other](tmp_path / "a", TRAIN)
    held = MAKERS[kind](tmp_path / "b", HELD)
    options = DataOptions(data=str(data), heldout_data=str(held))
    train, heldout = (options.dataset(split, 16) for split in ("train", "heldout"))
    check(train, {"ant": 3, "bee": 3, "cat": 3})
    check(heldout, {"bee": 2, "cat": 2})
    assert "1 of the 3 classes have no held-out picture" in caplog.text
    whole = DataOptions(data=str(data))
    assert (
        train.fingerprint
        == replace(options, heldout_data=str(data)).dataset("train", 16).fingerprint
    )
    assert train.fingerprint != whole.dataset("train", 16).fingerprint


@pytest.mark.parametrize("kind", MAKERS)
def test_split_folders_of_any_kind(tmp_path: Path, kind: str) -> None:
    MAKERS[kind](tmp_path / "root" / "train", TRAIN)
    MAKERS[kind](tmp_path / "root" / "val", HELD)
    MAKERS[kind](tmp_path / "root" / "test", HELD)
    source = open_source(str(tmp_path / "root"))
    assert "9 pictures of train are read, 4 of validation are held out" in source.remarks[0]
    assert source.heldout is not None and source.heldout.sum() == 4 and len(source) == 13
    options = DataOptions(data=str(tmp_path / "root"))
    train, heldout = (options.dataset(split, 16) for split in ("train", "heldout"))
    check(train, {"ant": 3, "bee": 3, "cat": 3})
    check(heldout, {"bee": 2, "cat": 2})
    everything = options.dataset("all", 16)
    assert len(everything) == 13 and everything.name(12)
    assert torch.equal(everything.all_images()[9:], heldout.all_images())


def test_one_class_may_be_held_out(tmp_path: Path) -> None:
    data = folder(tmp_path / "a", TRAIN)
    held = folder(tmp_path / "b", {"cat": HELD["cat"]})
    check(DataOptions(data=str(data), heldout_data=str(held)).dataset("heldout", 16), {"cat": 2})


def test_labels_of_heldout_data_in_metadata_files(tmp_path: Path) -> None:
    for place, names in (("train", ("ant", "bee", "cat")), ("held", ("cat",))):
        folder(tmp_path / place, {".": [p for name in names for p in pictures(name, 3)]})
        labels = [name for name in names for _ in range(3)]
        rows = [{"file_name": f"{i}.png", "label": label} for i, label in enumerate(labels)]
        text = "".join(f"{json.dumps(row)}\n" for row in rows)
        (tmp_path / place / "metadata.jsonl").write_text(text)
    options = DataOptions(data=str(tmp_path / "train"), heldout_data=str(tmp_path / "held"))
    check(options.dataset("heldout", 16), {"ant": 0, "bee": 0, "cat": 3})


def test_without_classes_those_of_heldout_data_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    for i, pixels in enumerate(TRAIN["ant"]):
        (tmp_path / "flat" / f"{i}.png").write_bytes(png(pixels))
    held = folder(tmp_path / "b", HELD)
    options = DataOptions(data=str(tmp_path / "flat"), heldout_data=str(held))
    train, heldout = (options.dataset(split, 16) for split in ("train", "heldout"))
    assert train.classes == heldout.classes == () and len(train) == 3
    assert heldout.labels.tolist() == [0] * 4


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ({"dog": pictures("dog", 2), **HELD}, r'1 classes of .* are not among the 3 .*: "dog"'),
        ({"train": pictures("ant", 2), "val": pictures("bee", 2)}, "has splits of its own"),
    ],
)
def test_heldout_data_that_does_not_fit(tmp_path: Path, held, message: str) -> None:
    data = folder(tmp_path / "a", TRAIN)
    if "val" in held:
        for split in ("train", "val"):
            folder(tmp_path / "b" / split, HELD)
    else:
        folder(tmp_path / "b", held)
    options = DataOptions(data=str(data), heldout_data=str(tmp_path / "b"))
    with pytest.raises(SmaltiError, match=message):
        options.dataset("heldout", 16)
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "1.png").write_bytes(png(TRAIN["ant"][0]))
    with pytest.raises(SmaltiError, match="have no classes, and the training pictures have 3"):
        replace(options, heldout_data=str(tmp_path / "flat")).dataset("heldout", 16)
    with pytest.raises(SmaltiError, match="nowhere does not exist: check --heldout_data"):
        replace(options, heldout_data=str(tmp_path / "nowhere")).dataset("heldout", 16)


def test_the_own_split_of_the_training_set_is_not_trained_on(tmp_path: Path) -> None:
    """Validation pictures stay unseen, also where others are held out."""
    folder(tmp_path / "a" / "train", TRAIN)
    folder(tmp_path / "a" / "val", HELD)
    other = folder(tmp_path / "b", {name: pictures(name, 1, first=50) for name in TRAIN})
    options = DataOptions(data=str(tmp_path / "a"), heldout_data=str(other))
    check(options.dataset("train", 16), {"ant": 3, "bee": 3, "cat": 3})
    check(options.dataset("heldout", 16), {"ant": 1, "bee": 1, "cat": 1})


def test_splits_without_one_for_training_are_refused(tmp_path: Path) -> None:
    for split in ("val", "test"):
        arrays(tmp_path / "root" / split, HELD)
    with pytest.raises(SmaltiError, match=r"name it: --data .*test"):
        open_source(str(tmp_path / "root"))
    arrays(tmp_path / "two" / "val", HELD)
    arrays(tmp_path / "two" / "validation", HELD)
    with pytest.raises(SmaltiError, match="are both validation: merge them"):
        open_source(str(tmp_path / "two"))


def test_heldout_data_is_stored_with_a_model(tmp_path: Path) -> None:
    options = DataOptions(data="a", heldout_data="b")
    write_options(tmp_path, options)
    assert read_options(tmp_path) == options
    write_options(tmp_path, DataOptions(data="a"))
    assert read_options(tmp_path) == DataOptions(data="a")
    (tmp_path / "pictures.json").unlink()
    write_options(tmp_path, DataOptions(data="a", heldout_data="https://user:pass@host/x.tar"))
    assert not (tmp_path / "pictures.json").exists()


def test_shards_of_several_splits_in_one_folder_are_named(tmp_path: Path) -> None:
    for split, sets in (("train", TRAIN), ("validation", HELD)):
        shards(tmp_path / split, sets)
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / split / "000.tar").rename(tmp_path / "set" / f"animals-{split}-000.tar")
    with pytest.raises(SmaltiError, match=r"several splits \(train, validation\)") as refused:
        open_source(str(tmp_path / "set"))
    data, heldout = re.findall(r"'([^']*)'", str(refused.value))
    options = DataOptions(data=data, heldout_data=heldout)
    check(options.dataset("train", 16), {"ant": 3, "bee": 3, "cat": 3})
    check(options.dataset("heldout", 16), {"bee": 2, "cat": 2})


def test_a_set_is_opened_once_for_both_splits(tmp_path: Path, caplog, monkeypatch) -> None:
    """What is said of it is said once."""
    caplog.set_level("INFO")
    flat = folder(tmp_path / "set", {"ant": pictures("ant", 12)}) / "ant"
    (flat / "notes.pdf").write_bytes(b"")
    apart = TrainingPictures(data=str(flat))
    images, heldout = apart.training_and_heldout(16, 3, seed=0)
    assert images.source is heldout.source and len(images) + len(heldout) == 12
    for said in ("have no classes", "ignored 1 files"):
        assert sum(said in text for text in caplog.messages) == 1
    ours, theirs = (apart.dataset(split, 16) for split in ("train", "heldout"))
    assert ours.fingerprint == images.fingerprint and theirs.fingerprint == heldout.fingerprint
    with_own = replace(apart, heldout_data=str(folder(tmp_path / "val", {"b": pictures("bee", 3)})))
    images, heldout = with_own.training_and_heldout(16, 3, seed=0)
    assert (len(images), len(heldout)) == (12, 3)
