"""Pictures as square tensors in [-1, 1], reproducible flips, and the embedded sets."""

import hashlib
import pickle
import resource
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from smalti.cli import parse_config, run_command
from smalti.data import dataset as dataset_module
from smalti.data.dataset import DataOptions, ImageDataset, write_options
from smalti.data.image_io import FolderOptions, image_grid, save_png, to_pil, to_uint8
from smalti.data.latents import to_float
from smalti.data.loader import stream_batches
from smalti.data.order import DataOrder
from smalti.data.sources.base import HuggingFaceOptions, heldout_mask, open_source
from smalti.data.transforms import center_crop, flips, to_tensor
from smalti.errors import SmaltiError
from smalti.scripts.encode import EncodeConfig
from smalti.scripts.evaluate import EvaluateConfig


def test_center_crop_keeps_the_middle() -> None:
    image = Image.new("RGB", (80, 40), "white")
    image.paste((255, 0, 0), (20, 0, 60, 40))
    square = np.asarray(center_crop(image, 10))
    assert square.shape == (10, 10, 3)
    assert (square[:, 1:-1] == [255, 0, 0]).all()
    assert center_crop(Image.new("RGB", (5, 9)), 16).size == (16, 16)


@pytest.mark.parametrize("shape", [(101, 67), (67, 101), (64, 64), (33, 200), (15, 16), (31, 32)])
def test_center_crop_is_that_of_guided_diffusion(shape: tuple[int, int]) -> None:
    random = np.random.default_rng(0)
    image = Image.fromarray(random.integers(0, 255, (*shape, 3), dtype=np.uint8))
    halved = np.asarray(image)
    while min(halved.shape[:2]) >= 32:  # twice the target of 16
        size = (halved.shape[1] // 2, halved.shape[0] // 2)
        halved = np.asarray(Image.fromarray(halved).resize(size, resample=Image.Resampling.BOX))
    height, width = halved.shape[:2]
    scale = 16 / min(height, width)
    size = (round(width * scale), round(height * scale))
    resized = np.asarray(Image.fromarray(halved).resize(size, resample=Image.Resampling.BICUBIC))
    top, left = (resized.shape[0] - 16) // 2, (resized.shape[1] - 16) // 2
    expected = resized[top : top + 16, left : left + 16]
    assert np.array_equal(np.asarray(center_crop(image, 16)), expected)


@pytest.mark.parametrize("turned", [False, True])
def test_a_long_picture_takes_little_memory(turned: bool, monkeypatch) -> None:
    """A few kB of PNG may be 8 x 1,000,000 pixels; 64 times as many after resizing."""
    strip = Image.new("RGB", (1_000_000, 8), "white")
    strip.paste((255, 0, 0), (499_990, 0, 500_010, 8))
    if turned:
        strip = strip.transpose(Image.Transpose.TRANSPOSE)
    largest = []
    resize = Image.Image.resize

    def watched(self, size, *args, **kwargs):
        largest.append(size[0] * size[1])
        return resize(self, size, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", watched)
    for size in (64, 4):
        square = np.asarray(center_crop(strip, size))
        assert square.shape == (size, size, 3) and (square == [255, 0, 0]).all()
    assert max(largest) <= 16 * 64**2


def test_float_and_uint8_are_inverse() -> None:
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    floats = to_float(values)
    assert floats.min() == -1 and floats.max() == 1
    assert torch.equal(torch.from_numpy(to_uint8(floats)).permute(0, 3, 1, 2), values)
    assert to_uint8(torch.full((1, 3, 1, 1), 7.0)).max() == 255
    assert torch.equal(to_tensor(to_pil(floats)[0]), values[0])


def test_flips_are_fair_and_pure() -> None:
    coins = [flips(0, epoch, index) for epoch in range(20) for index in range(100)]
    assert 900 < sum(coins) < 1100
    assert coins == [flips(0, epoch, index) for epoch in range(20) for index in range(100)]


def test_flipped_samples_are_mirror_images(pictures) -> None:
    source = open_source(str(pictures))
    plain, flipped = (ImageDataset(source, 16, flip=f) for f in (False, True))
    keys = [(epoch, 3) for epoch in range(8)]
    originals, batch = plain.__getitems__(keys), flipped.__getitems__(keys)
    for (epoch, index), a, b in zip(keys, originals.images, batch.images, strict=True):
        assert torch.equal(b, a.flip(-1) if flips(0, epoch, index) else a)


def test_decoding_once_or_each_time_gives_the_same(pictures, monkeypatch) -> None:
    source = open_source(str(pictures))
    kept = ImageDataset(source, 16, split="train")
    monkeypatch.setattr(dataset_module, "MEMORY_LIMIT", 0)
    fresh = ImageDataset(source, 16, split="train")
    assert fresh._pixels is None and kept._pixels is not None
    assert torch.equal(kept.all_images(), fresh.all_images())


def test_a_data_set_can_be_sent_to_worker_processes(pictures) -> None:
    original = ImageDataset(open_source(str(pictures)), 16, split="train", flip=True)
    copy = pickle.loads(pickle.dumps(original))
    order = DataOrder(len(original), 8, seed=0)
    stream = stream_batches(original, order, num_workers=2)
    for step in range(3):
        here = original.__getitems__(order.keys(step))
        (there,) = next(stream)
        assert torch.equal(copy.__getitems__(order.keys(step)).images, here.images)
        assert torch.equal(there.images, here.images)
        assert torch.equal(there.labels, here.labels)


def test_splits_divide_the_set(pictures) -> None:
    source = open_source(str(pictures))
    sizes = {
        split: len(ImageDataset(source, 16, split=split)) for split in ("train", "heldout", "all")
    }
    assert sizes["train"] + sizes["heldout"] == sizes["all"] == 24
    with pytest.raises(SmaltiError, match="image_size is 4"):
        ImageDataset(source, 4)


EMOJI = {
    "Smileys & Emotion": 504,
    "People & Body": 1133,
    "Animals & Nature": 475,
    "Food & Drink": 390,
    "Travel & Places": 654,
    "Activities": 255,
    "Objects": 789,
    "Symbols": 671,
    "Flags": 793,
}


def test_emoji_are_complete_and_split_by_glyph() -> None:
    source = open_source("emoji")
    assert dict(zip(source.classes, torch.bincount(source.labels).tolist(), strict=True)) == EMOJI
    heldout = heldout_mask(source, 0.1).tolist()
    sides: dict[str, set[bool]] = {}
    for index, side in enumerate(heldout):
        sides.setdefault(source.group(index), set()).add(side)
    assert all(len(side) == 1 for side in sides.values())
    assert 0.08 < sum(heldout) / len(heldout) < 0.12
    assert len(sides) == 1906
    assert source.read(0).size == (64, 64)
    assert source.name(0).startswith("emoji/")


def test_embedded_pixels_are_those_that_were_packed() -> None:
    digests = {
        name: hashlib.sha256(open_source(name).tiles.tobytes()).hexdigest()[:16]
        for name in ("emoji", "fashion")
    }
    assert digests == {"emoji": "7bfed6a61e25f0ba", "fashion": "c174d56e9a0dd37b"}


def test_the_embedded_sets_have_their_licences() -> None:
    assets = files("smalti.data") / "assets"
    text = (assets / "README.md").read_text()
    for line in ("Apache License 2.0", "CC-BY-4.0", "Changes", "emoji-0.webp", "fashion-0.webp"):
        assert line in text
    for name in ("fluent-emoji", "emoji-data", "fashion-mnist"):
        licence = (assets / f"LICENCE-{name}.txt").read_text()
        assert f"LICENCE-{name}.txt" in text
        assert "Copyright" in licence and "Permission is hereby granted" in licence


def test_fashion_keeps_its_published_split() -> None:
    source = open_source("fashion")
    assert len(source) == 12000 and len(source.classes) == 10
    assert heldout_mask(source, 0.5).nonzero().flatten().tolist() == list(range(10000, 12000))


def test_grids_and_atomic_files(tmp_path) -> None:
    images = torch.stack([torch.full((3, 8, 8), v) for v in (-1.0, 0.0, 1.0, -1.0)])
    grid = image_grid(images, columns=2, padding=2)
    assert grid.size == (22, 22)
    assert grid.getpixel((0, 0)) == (255, 255, 255) and grid.getpixel((5, 5)) == (0, 0, 0)
    labelled = image_grid(images, columns=2, row_labels=("first", "second"), scale=2)
    assert labelled.height == 44 and labelled.width > 44
    save_png(tmp_path / "new" / "grid.png", grid)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["grid.png"]


# -- options that are stored with a model --

TRAINED = DataOptions(
    data="hf:some/set",
    folder=FolderOptions(single_class=True, unusual_images="convert"),
    hf=HuggingFaceOptions(image_column="picture"),
    value_range=(0, 4095),
    split_seed=3,
)


@pytest.mark.parametrize("where", ["model", "model/tokenizer"])  # a tokenizer; a pipeline
def test_options_of_the_pictures_are_those_of_the_models_training(
    tmp_path: Path, where: str, caplog
) -> None:
    caplog.set_level("INFO")
    (tmp_path / where).mkdir(parents=True)
    write_options(tmp_path / where, TRAINED)
    model = str(tmp_path / "model")
    encoding = parse_config(EncodeConfig, ["--tokenizer", model], prog="smalti encode")
    evaluation = parse_config(EvaluateConfig, [f"--model={model}"], prog="smalti evaluate")
    for config in (encoding, evaluation):
        for name in ("data", "folder", "hf", "value_range", "split_seed", "heldout_fraction"):
            assert getattr(config, name) == getattr(TRAINED, name)
    encoding.note_stored()
    assert f"pictures are read as in the training of {model}: folder.unusual_im" in caplog.text
    assert "folder.single_class True" in caplog.text and "split_seed 3" in caplog.text
    assert "was trained with" not in caplog.text


def test_a_given_option_contradicts_the_models_with_a_note(tmp_path: Path, caplog) -> None:
    write_options(tmp_path, TRAINED)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("folder: {unusual_images: refuse}")
    flags = ["--tokenizer", str(tmp_path), "--split_seed", "4", "--config", str(recipe)]
    config = parse_config(EncodeConfig, flags, prog="smalti encode")
    assert config.folder == FolderOptions(single_class=True) and config.split_seed == 4
    config.note_stored()
    assert f"split_seed is 4; {tmp_path} was trained with 3" in caplog.text
    assert f"folder.unusual_images is refuse; {tmp_path} was trained with convert" in caplog.text


def test_options_of_other_pictures_are_not_used(tmp_path: Path, caplog) -> None:
    caplog.set_level("INFO")
    write_options(tmp_path, TRAINED)
    flags = ["--tokenizer", str(tmp_path), "--data", "emoji"]
    config = parse_config(EncodeConfig, flags, prog="smalti encode")
    assert config == EncodeConfig(tokenizer=tmp_path)
    config.note_stored()
    assert "was trained on hf:some/set, and these are pictures of emoji" in caplog.text


def test_the_same_folder_may_be_written_in_another_way(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_options(tmp_path, DataOptions(data="cats", split_seed=3))
    for data in ("cats/", "./cats", str(tmp_path / "cats")):
        flags = ["--tokenizer", str(tmp_path), "--data", data]
        config = parse_config(EncodeConfig, flags, prog="smalti encode")
        assert config.split_seed == 3 and config.data == data


# -- writing --


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_images_that_are_not_finite_are_not_written(value: float) -> None:
    images = torch.zeros(3, 3, 8, 8)
    images[1, 2, 4, 4] = value
    for write in (to_uint8, to_pil, lambda x: image_grid(x, 3)):
        with pytest.raises(SmaltiError, match=r"1 of 3 images .* NaN, the first at position 1, an"):
            write(images)
        with pytest.raises(SmaltiError, match=r"1 of 3 images.*earlier checkpoint"):
            write(images.half())


def test_a_loop_of_links_and_a_limit_on_files_are_one_line(tmp_path: Path, capsys) -> None:
    (tmp_path / "loop").symlink_to("loop")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (99, 99, 3), dtype=np.uint8))
    assert run_command(lambda _: save_png(tmp_path / "loop" / "a" / "b.png", noise), []) == 1
    assert "loop" in (line := capsys.readouterr().err) and "a link leads back to itself" in line
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, before[1]))
        assert run_command(lambda _: save_png(tmp_path / "c.png", noise), []) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "ulimit -f" in (line := capsys.readouterr().err) and line.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["loop"]


def test_a_loop_of_links_among_the_pictures_is_one_line(pictures: Path) -> None:
    (pictures / "red" / "loop.png").symlink_to("loop.png")
    with pytest.raises(SmaltiError, match=r"red/loop.png cannot be decoded \([^\n]+ links"):
        open_source(str(pictures))


@pytest.mark.parametrize("data", ["https://me:secret@host/a.tar", "https://host/a.tar?key=secret"])
def test_a_url_with_a_secret_is_not_stored(tmp_path: Path, data: str) -> None:
    write_options(tmp_path, DataOptions(data=data))
    assert list(tmp_path.iterdir()) == []
    write_options(tmp_path, DataOptions(data="https://host/a.tar"))
    assert len(list(tmp_path.iterdir())) == 1
