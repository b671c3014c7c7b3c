"""Damaged pictures: refused, skipped or replaced, but never a shorter batch."""

from pathlib import Path

import pytest
import torch

from smalti.data import dataset as dataset_module
from smalti.data.dataset import ImageDataset
from smalti.data.image_io import FolderOptions
from smalti.data.loader import stream_batches
from smalti.data.order import DataOrder
from smalti.data.sources.base import open_source
from smalti.errors import SmaltiError

REPLACE = FolderOptions(bad_images="replace")


def damage(pictures: Path, *names: str) -> None:
    """Truncate some files after their header."""
    for name in names:
        path = pictures / name
        path.write_bytes(path.read_bytes()[:-60])


@pytest.fixture(params=["decoded once", "read each time"])
def memory(request, monkeypatch) -> None:
    if request.param == "read each time":
        monkeypatch.setattr(dataset_module, "MEMORY_LIMIT", 0)


def test_the_next_good_picture_of_the_class_is_the_replacement(
    pictures: Path, memory: None, caplog
) -> None:
    whole = ImageDataset(open_source(str(pictures)), 16)
    expected = whole.all_images().clone()
    damage(pictures, "green/2.png", "green/3.png", "red/7.png")
    images = ImageDataset(open_source(str(pictures), options=REPLACE), 16)
    assert len(images) == 24 and torch.equal(images.labels, whole.labels)
    pixels = images.all_images()
    expected[10:12] = expected[12].clone()  # blue has 8, so green/2 is number 10
    expected[23] = expected[16].clone()  # around the class: red/0
    assert torch.equal(pixels, expected)
    assert images.num_replaced == 3
    assert "to be replaced 3 of 24 pictures" in caplog.text
    warnings = {r.getMessage() for r in caplog.records if r.name == dataset_module.__name__}
    assert len(warnings) == 3
    assert all("replaced by another of its class" in line for line in warnings)


def test_a_replacement_comes_from_the_same_split(pictures: Path) -> None:
    """Otherwise held-out pictures would be trained on."""
    options = FolderOptions(bad_images="replace", verify_up_to=0)  # divided by name
    splits = ("train", "heldout")

    def opened() -> list[ImageDataset]:
        source = open_source(str(pictures), options=options)
        return [ImageDataset(source, 16, split=split, heldout_fraction=0.4) for split in splits]

    before = [images.all_images() for images in opened()]
    damage(pictures, *(images.name(0) for images in opened()))
    for old, others, images in zip(before, reversed(before), opened(), strict=True):
        new = images.all_images()
        assert images.num_replaced == 1 and torch.equal(new[1:], old[1:])
        assert any(torch.equal(new[0], image) for image in old[1:])
        assert not any(torch.equal(new[0], image) for image in others)


def test_batches_are_full_and_equal_with_any_number_of_workers(pictures: Path, monkeypatch) -> None:
    monkeypatch.setattr(dataset_module, "MEMORY_LIMIT", 0)
    damage(pictures, "green/2.png", "blue/0.png")
    order = DataOrder(24, 8, seed=0)
    read = []
    for workers in (0, 2):
        images = ImageDataset(open_source(str(pictures), options=REPLACE), 16, flip=True)
        stream = stream_batches(images, order, num_workers=workers)
        read.append(torch.cat([next(stream)[0].images for _ in range(3)]))
        assert images.num_replaced == 2  # shared by the workers
    assert len(read[0]) == 24 and torch.equal(*read)


def test_more_than_the_limit_stops_the_run(pictures: Path, monkeypatch) -> None:
    damage(pictures, "green/2.png", "blue/0.png", "red/1.png")
    with pytest.raises(SmaltiError, match=r"3 bad pictures.*max_bad_images allows 2.*check-data"):
        open_source(str(pictures), options=FolderOptions(bad_images="replace", max_bad_images=2))
    # In a set too large to be decoded at the start, they are found one by one, also by workers.
    large = FolderOptions(bad_images="replace", max_bad_images=2, verify_up_to=0)
    monkeypatch.setattr(dataset_module, "MEMORY_LIMIT", 0)
    for workers in (0, 1):
        images = ImageDataset(open_source(str(pictures), options=large), 16)
        stream = stream_batches(images, DataOrder(24, 24, 0), num_workers=workers)
        with pytest.raises(SmaltiError, match=r"3 pictures are damaged, and --folder.max_bad"):
            next(stream)


def test_by_default_a_damaged_picture_stops_the_run(pictures: Path, memory: None) -> None:
    source = open_source(str(pictures))
    damage(pictures, "green/2.png")
    with pytest.raises(SmaltiError, match=r"green/2.png cannot be decoded"):
        ImageDataset(source, 16).all_images()
    with pytest.raises(SmaltiError, match=r"green/2.png.*--folder.bad_images replace"):
        open_source(str(pictures))


def test_a_class_without_an_undamaged_picture_is_refused(pictures: Path) -> None:
    damage(pictures, *(f"green/{number}.png" for number in range(8)))
    for policy in ("skip", "replace"):
        with pytest.raises(SmaltiError, match=r'no picture of the class "green"'):
            open_source(str(pictures), options=FolderOptions(bad_images=policy))
    large = FolderOptions(bad_images="replace", verify_up_to=0)
    with pytest.raises(SmaltiError, match="no other picture of its class"):
        ImageDataset(open_source(str(pictures), options=large), 16)


def test_a_picture_is_decoded_once_to_check_it_in_a_process(pictures: Path, monkeypatch) -> None:
    """However often its set is opened."""
    from smalti.data.sources import verification

    decoded = []
    decode = verification.decode
    monkeypatch.setattr(
        verification, "decode", lambda *arguments: decoded.append(1) or decode(*arguments)
    )
    verification._FINDINGS.clear()
    for _ in range(3):
        open_source(str(pictures))
    assert len(decoded) == 24
    damage(pictures, "green/2.png")
    with pytest.raises(SmaltiError, match=r"green/2.png"):
        open_source(str(pictures))
    assert len(decoded) == 25
