"""The contract of all sources: equal pictures, in equal order, divided equally."""

import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from smalti.data import dataset as dataset_module
from smalti.data.dataset import ImageDataset
from smalti.data.image_io import FolderOptions
from smalti.data.loader import stream_batches
from smalti.data.order import DataOrder
from smalti.data.sources.arrays import ArraySource
from smalti.data.sources.base import (
    SOURCES,
    HuggingFaceOptions,
    ImageSource,
    heldout_mask,
    open_source,
)
from smalti.data.transforms import RandomCrop
from smalti.errors import SmaltiError

CLASSES = ("blue", "green", "red")


def files_of(pictures: Path) -> list[tuple[Path, int]]:
    """The files of the folder, and their labels, in the order in which smalti reads them."""
    found = sorted(pictures.glob("*/*.png"))
    return [(path, CLASSES.index(path.parent.name)) for path in found]


def table_of(pictures: Path) -> datasets.Dataset:
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))}
    )
    rows = files_of(pictures)
    columns = {
        "image": [{"bytes": path.read_bytes(), "path": path.name} for path, _ in rows],
        "label": [label for _, label in rows],
    }
    return datasets.Dataset.from_dict(columns, features=features)


def make_shards(pictures: Path, folder: Path, per_shard: int = 10) -> Path:
    """000000.tar and so on, written by webdataset."""
    folder.mkdir(parents=True)
    (folder / "classes.json").write_text(json.dumps(CLASSES))
    with webdataset.ShardWriter(f"{folder}/%06d.tar", maxcount=per_shard, verbose=0) as writer:
        for number, (path, label) in enumerate(files_of(pictures)):
            sample = {"__key__": f"{number:06d}", "png": path.read_bytes(), "cls": label}
            writer.write(sample)
    return folder


def as_folder(pictures: Path, place: Path) -> dict:
    return {"spec": str(pictures)}


def as_parquet(pictures: Path, place: Path) -> dict:
    place.mkdir()
    table_of(pictures).to_parquet(place / "train-00000-of-00001.parquet")
    return {"spec": f"{place}/train-00000-of-00001.parquet", "stream_cache": place / "cache"}


def as_parquet_folder(pictures: Path, place: Path) -> dict:
    as_parquet(pictures, place)
    return {"spec": str(place), "stream_cache": place.with_name("cache")}


def as_hub_folder(pictures: Path, place: Path) -> dict:
    return {**as_parquet_folder(pictures, place), "spec": f"hf:{place}"}


def as_stream(pictures: Path, place: Path) -> dict:
    return {**as_hub_folder(pictures, place), "hf": HuggingFaceOptions(streaming=True)}


def as_parquet_in_place(pictures: Path, place: Path) -> dict:
    return {
        "spec": as_hub_folder(pictures, place)["spec"],
        "hf": HuggingFaceOptions(streaming=True),
    }


def as_saved(pictures: Path, place: Path) -> dict:
    table_of(pictures).save_to_disk(place)
    return {"spec": str(place)}


def as_arrow(pictures: Path, place: Path) -> dict:
    table_of(pictures).save_to_disk(place)
    return {"spec": f"{place}/data-00000-of-00001.arrow"}


def pattern_of(folder: Path) -> str:
    """{000000..000002}.tar for three shards."""
    return f"{{000000..{len(list(folder.glob('*.tar'))) - 1:06d}}}.tar"


def as_shards(pictures: Path, place: Path) -> dict:
    return {"spec": f"{make_shards(pictures, place)}/{pattern_of(place)}"}


def as_shard_folder(pictures: Path, place: Path) -> dict:
    return {"spec": str(make_shards(pictures, place))}


def as_file_url(pictures: Path, place: Path) -> dict:
    return {"spec": f"{make_shards(pictures, place).as_uri()}/{pattern_of(place)}"}


def arrays_of(pictures: Path) -> dict[str, np.ndarray]:
    rows = files_of(pictures)
    return {
        "images": np.stack([np.asarray(Image.open(path)) for path, _ in rows]),
        "labels": np.array([label for _, label in rows]),
    }


def as_npz(pictures: Path, place: Path) -> dict:
    place.mkdir()
    np.savez(place / "set.npz", **arrays_of(pictures), classes=np.array(CLASSES))
    return {"spec": f"{place}/set.npz"}


def as_compressed_npz(pictures: Path, place: Path) -> dict:
    place.mkdir()
    np.savez_compressed(place / "set.npz", **arrays_of(pictures), classes=np.array(CLASSES))
    return {"spec": str(place)}


def as_npy(pictures: Path, place: Path) -> dict:
    place.mkdir()
    for name, array in arrays_of(pictures).items():
        np.save(place / f"{name}.npy", array)
    (place / "classes.json").write_text(json.dumps(CLASSES))
    return {"spec": str(place)}


MAKERS: dict[str, Callable[[Path, Path], dict]] = {
    name.removeprefix("as_"): value for name, value in list(globals().items()) if name[:3] == "as_"
}
OPENERS = {  # which entry of the registry each of them stands for
    "smalti.data.sources.huggingface:open_hub": "hub_folder",
    "smalti.data.sources.huggingface:open_saved": "saved",
    "smalti.data.sources.huggingface:open_files": "parquet",
    "smalti.data.sources.webdataset:open_shards": "shards",
    "smalti.data.sources.arrays:open_arrays": "npz",
}


@pytest.fixture(params=MAKERS)
def source(request, pictures: Path, tmp_path: Path) -> ImageSource:
    return open_source(**MAKERS[request.param](pictures, tmp_path / "made"))


def test_the_contract_covers_the_whole_registry() -> None:
    assert set(SOURCES.values()) - {"smalti.data.sources.embedded:open_embedded"} == OPENERS.keys()
    assert set(OPENERS.values()) <= MAKERS.keys()


def test_every_source_gives_the_same_pictures(source: ImageSource, pictures: Path) -> None:
    expected = open_source(str(pictures))
    assert source.classes == expected.classes == CLASSES
    assert torch.equal(source.labels, expected.labels) and len(source) == 24
    ours, theirs = (ImageDataset(each, 16).all_images() for each in (source, expected))
    assert torch.equal(ours, theirs)
    assert len({source.name(index) for index in range(24)}) == 24


def test_every_source_is_divided_equally(source: ImageSource, pictures: Path) -> None:
    """Files by their content, in any container; arrays, which hold no files, by their rows."""
    expected = open_source(str(pictures))
    ours, theirs = (ImageDataset(each, 16, split="heldout") for each in (source, expected))
    assert 3 <= len(ours) <= 6
    if not isinstance(source, ArraySource):
        assert ours.positions == theirs.positions
        assert source.fingerprint == expected.fingerprint and ours.fingerprint == theirs.fingerprint


@pytest.mark.parametrize("name", ["folder", "parquet_in_place", *OPENERS.values()])
def test_the_order_is_that_of_one_process_at_any_world_size_and_number_of_workers(
    name: str, pictures: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(dataset_module, "MEMORY_LIMIT", 0)  # workers read the source itself
    source = open_source(**MAKERS[name](pictures, tmp_path / "made"))
    images = ImageDataset(source, 16, split="train", flip=True, crop=RandomCrop())
    order = DataOrder(len(images), 8, 0, images.blocks)

    def read(world_size: int, num_workers: int) -> torch.Tensor:
        streams = [
            stream_batches(images, order, rank=rank, world_size=world_size, num_workers=num_workers)
            for rank in range(world_size)
        ]
        return torch.cat([next(stream)[0].images for _ in range(3) for stream in streams])

    whole = read(1, 0)
    assert torch.equal(read(2, 0), whole)
    assert torch.equal(read(2, 1), whole)


def test_every_source_can_be_sent_to_another_process(source: ImageSource) -> None:
    copy = pickle.loads(pickle.dumps(source))
    assert np.array_equal(np.asarray(copy.read(5)), np.asarray(source.read(5)))


def test_every_source_changes_its_fingerprint_with_a_picture(
    request, pictures: Path, tmp_path: Path
) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(pictures, changed)
    Image.new("RGB", (40, 36), "white").save(changed / "red" / "3.png")
    for name, make in MAKERS.items():
        before, after = (
            open_source(**make(root, tmp_path / f"{name}{root.name}")).fingerprint
            for root in (pictures, changed)
        )
        assert before != after, name


def test_every_source_leaves_out_a_single_class(pictures: Path, tmp_path: Path, caplog) -> None:
    for name in ("red", "green"):
        shutil.rmtree(pictures / name)
    caplog.set_level("INFO")
    for name, make in MAKERS.items():
        arguments = make(pictures, tmp_path / name)
        caplog.clear()
        source = open_source(**arguments)
        assert source.classes == () and source.labels.tolist() == [0] * 8, name
        said = [text for text in caplog.messages if 'are of one class ("blue"), and are' in text]
        assert said == [said[0]] and said[0] in source.remarks, name
        assert heldout_mask(source, 0.3).sum() > 0
        batch = next(ImageDataset(source, 8).batches(3))
        assert batch.labels.tolist() == [0] * 3 and batch.captions is None
        one = open_source(**arguments, options=FolderOptions(single_class=True))
        assert len(one) == 8 and "blue" in one.classes, name


def test_options_for_other_kinds_of_sets_are_refused(pictures: Path, tmp_path: Path) -> None:
    hub = HuggingFaceOptions(split="train")
    for data in (str(pictures), "fashion", *as_shards(pictures, tmp_path / "made").values()):
        with pytest.raises(SmaltiError, match=r"--hf.\* is for Hugging Face data sets"):
            open_source(data, hf=hub)
        with pytest.raises(SmaltiError, match="read in place: leave it out"):
            open_source(data, stream_cache=tmp_path / "cache")


def test_a_missing_package_is_named_with_its_remedy(
    pictures: Path, tmp_path: Path, monkeypatch
) -> None:
    arguments = as_saved(pictures, tmp_path / "made")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SmaltiError, match=r"pip install 'smalti\[data\]'"):
        open_source(**arguments)


def test_a_folder_with_class_folders_is_one_of_pictures(pictures: Path) -> None:
    (pictures / "backup.tar").write_bytes(b"")
    (pictures / "latents.npz").write_bytes(b"")
    assert len(open_source(str(pictures))) == 24


def test_a_folder_of_several_kinds_of_files_is_refused(pictures: Path, tmp_path: Path) -> None:
    """None of them is read as if the others were not there."""
    flat = pictures / "red"
    shards = make_shards(pictures, tmp_path / "made")
    np.save(flat / "stats.npy", np.zeros(3))
    with pytest.raises(SmaltiError, match=r"several kinds \(stats.npy, 0.png\): .*'.*stats.npy'"):
        open_source(str(flat))
    (flat / "stats.npy").rename(shards / "stats.npy")
    with pytest.raises(SmaltiError, match=r"several kinds .*--data '(.*/\*.tar)'") as error:
        open_source(str(shards))
    remedy = str(error.value).split("'")[1]
    assert len(open_source(remedy)) == 24
    assert len(open_source(str(flat))) == 8
    (shards / "000000.tar").rename(flat / "a.tar")
    with pytest.raises(SmaltiError, match=r"several kinds \(a.tar, 0.png\)"):
        open_source(str(flat))


def test_large_sets_are_not_decoded_at_the_start(pictures: Path, tmp_path: Path) -> None:
    shards = make_shards(pictures, tmp_path / "made")
    (pictures / "red" / "bad.png").write_bytes(b"")
    small = FolderOptions(verify_up_to=24)
    source = open_source(str(pictures), options=small)  # 25 pictures
    assert len(source) == 25 and source.group(0) == source.name(0) == "blue/0.png"
    bad = [source.name(index) for index in range(25)].index("red/bad.png")
    with pytest.raises(SmaltiError, match=r"red/bad.png cannot be decoded"):
        source.read(bad)
    before = source.fingerprint
    (pictures / "red" / "bad.png").write_bytes(b"longer")
    assert open_source(str(pictures), options=small).fingerprint != before
    with pytest.raises(SmaltiError, match=r"raise --folder.verify_up_to"):
        open_source(str(pictures), options=FolderOptions(verify_up_to=24, bad_images="skip"))
    few = FolderOptions(verify_up_to=0)
    for arguments in ({"spec": str(shards)}, as_parquet(pictures, tmp_path / "p")):
        source = open_source(**arguments, options=few)
        assert source.group(3) == source.name(3)
