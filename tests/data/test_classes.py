"""Classes: every number of a label is a class with pictures, and names are found in any form."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from smalti.data.classes import MAX_NAME, class_number, named_classes, numbered_classes, same_names
from smalti.data.latent_cache.cache import LatentCache
from smalti.data.latent_cache.imports import Division, Origin, import_latents, open_foreign
from smalti.data.latents import CodeSpec
from smalti.data.sources.base import ImageSource, open_source
from smalti.errors import SmaltiError
from smalti.pipelines.class_labels import label_ids
from smalti.prior.presets import PRESETS
from smalti.scripts.train_prior import build_prior

COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"


def png(value: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (12, 12), (value, value, value)).save(stream, "PNG")
    return stream.getvalue()


def as_arrays(root: Path, labels: list) -> ImageSource:
    images = np.arange(len(labels), dtype=np.uint8)[:, None, None] + np.zeros((12, 12), np.uint8)
    np.savez(root / "a.npz", images=images, labels=np.array(labels))
    return open_source(str(root / "a.npz"))


def as_shards(root: Path, labels: list) -> ImageSource:
    with tarfile.open(root / "0.tar", "w") as archive:
        for number, label in enumerate(labels):
            for suffix, content in (("png", png(number)), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{number:03d}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return open_source(str(root / "0.tar"))


def as_parquet(root: Path, labels: list) -> ImageSource:
    datasets = pytest.importorskip("datasets")
    columns = {
        "image": [{"bytes": png(number), "path": None} for number in range(len(labels))],
        "label": labels,
    }
    kind = "string" if isinstance(labels[0], str) else "int64"
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value(kind)})
    datasets.Dataset.from_dict(columns, features=features).to_parquet(root / "a.parquet")
    return open_source(str(root / "a.parquet"))


def as_folder(root: Path, labels: list) -> ImageSource:
    for number, label in enumerate(labels):
        (root / "set" / label).mkdir(parents=True, exist_ok=True)
        (root / "set" / label / f"{number}.png").write_bytes(png(number))
    return open_source(str(root / "set"))


def as_metadata(root: Path, labels: list) -> ImageSource:
    (root / "flat").mkdir()
    with (root / "flat" / "metadata.jsonl").open("w") as file:
        for number, label in enumerate(labels):
            (root / "flat" / f"{number}.png").write_bytes(png(number))
            file.write(json.dumps({"file_name": f"{number}.png", "label": label}) + "\n")
    return open_source(str(root / "flat"))


Maker = Callable[[Path, list], ImageSource]


@pytest.mark.parametrize("make", [as_arrays, as_shards, as_parquet, as_metadata])
@pytest.mark.parametrize(
    ("labels", "classes", "numbers"),
    [
        ([70007, 7, 900000, 7], ("7", "70007", "900000"), [1, 0, 2, 0]),
        ([1, 2, 3, 1], ("1", "2", "3"), [0, 1, 2, 0]),
        ([2, 10, 2, 10], ("2", "10"), [0, 1, 0, 1]),
        ([2**62, 5, 5, 2**62], ("5", str(2**62)), [1, 0, 0, 1]),
        ([2, 0, 1, 2], ("0", "1", "2"), [2, 0, 1, 2]),
    ],
)
def test_labels_with_gaps_are_renumbered_and_keep_their_names(
    make: Maker, labels: list, classes: tuple, numbers: list, tmp_path: Path, caplog
) -> None:
    source = make(tmp_path, labels)
    assert source.classes == classes
    assert source.labels.tolist() == numbers and source.labels.dtype == torch.int64
    assert ("have gaps" in caplog.text) == (max(labels) > 2)


def test_a_prior_has_the_classes_that_occur_and_finds_them_by_name(tmp_path: Path) -> None:
    for name in ("codes", "labels"):
        (tmp_path / f"x_{name}").mkdir()
    for i in range(12):
        np.save(tmp_path / "x_codes" / f"{i}.npy", np.full((1, 1, 6), i))
        np.save(tmp_path / "x_labels" / f"{i}.npy", np.array([[7, 70007, 900000][i % 3]]))
    origin = Origin(CodeSpec(64, ((2, 3),)), "tokenizer", (6,))
    latents = open_foreign(tmp_path, "llamagen", origin, False)
    import_latents(latents, origin, tmp_path / "out", Division(heldout_fraction=0.3))
    cache = LatentCache(tmp_path / "out" / "train")
    assert cache.classes == ("7", "70007", "900000")
    assert torch.equal(cache.labels, cache.first_view(range(len(cache))).stored[:, 0] % 3)
    prior = build_prior(PRESETS["gpt-nano"], cache, tokenizer=None)  # type: ignore[arg-type]
    assert prior.num_classes == 3
    assert label_ids(["70007", 1], cache.classes) == [1, 1]
    with pytest.raises(SmaltiError, match='0 to 2, or "70007", the name of a class'):
        label_ids(70007, cache.classes)


def test_named_numbers_keep_all_names_and_empty_classes_are_named(caplog) -> None:
    names = [f"class {i}" for i in range(9)]
    classes, labels = numbered_classes([2, 1], names, "x")
    assert classes == tuple(names) and labels.tolist() == [2, 1]
    assert "7 of the 9 classes of x have no picture" in caplog.text
    assert '"class 0", "class 3", "class 4", "class 5", "class 6", ...' in caplog.text
    with pytest.raises(SmaltiError, match="x has 9 class names, but its labels go up to 9"):
        numbered_classes([9], names, "x")


# -- Unicode: names match after NFC normalisation --


@pytest.mark.parametrize("make", [as_shards, as_parquet, as_folder, as_metadata])
def test_two_forms_of_a_name_are_one_class(make: Maker, tmp_path: Path) -> None:
    source = make(tmp_path, [COMPOSED, DECOMPOSED, "tea", COMPOSED])
    assert source.classes == (COMPOSED, "tea")
    assert sorted(source.labels.tolist()) == [0, 0, 0, 1]


@pytest.mark.parametrize("name", [COMPOSED, DECOMPOSED])
def test_a_name_keeps_its_form_and_is_found_in_any(name: str) -> None:
    classes, labels = named_classes([name, "tea", name], "x")
    assert name in classes and labels.tolist() in ([0, 1, 0], [1, 0, 1])
    for form in (COMPOSED, DECOMPOSED):
        assert class_number(form, classes) == classes.index(name)
        assert label_ids(form, classes) == [classes.index(name)]
    assert same_names([COMPOSED, "tea"], [DECOMPOSED, "tea"])
    assert not same_names([COMPOSED, "tea"], ["tea", COMPOSED])
    assert class_number("cafe", classes) is None


def test_equal_names_of_two_numbers_are_refused() -> None:
    with pytest.raises(SmaltiError, match=r"\(numbers 0 and 1\): give each class a different"):
        numbered_classes([0, 1], [COMPOSED, DECOMPOSED], "x")


# -- Names that cannot be shown --

BAD = {
    "newline": "a\nb",
    "escape": "\x1b[2J",
    "separator": "a\u2028b",
    "long": "x" * (MAX_NAME + 1),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("make", [as_shards, as_parquet])
def test_class_names_that_cannot_be_shown_are_refused_when_a_set_is_opened(
    make: Maker, kind: str, tmp_path: Path
) -> None:
    with pytest.raises(SmaltiError, match=r"cannot be printed|has 1001 letters") as error:
        make(tmp_path, [BAD[kind], "b"])
    assert str(error.value).isprintable() and len(str(error.value)) < 1000


def test_a_class_folder_that_cannot_be_shown_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SmaltiError, match=r"the class name 'a\\nb' cannot be printed"):
        as_folder(tmp_path, ["a\nb", "c"])


def test_class_names_in_a_file_are_checked(tmp_path: Path) -> None:
    (tmp_path / "classes.json").write_text(json.dumps(["a", BAD["escape"]]))
    with pytest.raises(SmaltiError, match=r"class name '\\x1b\[2J' cannot be printed"):
        as_shards(tmp_path, [0, 1])
