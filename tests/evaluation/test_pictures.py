"""Sets of pictures larger than memory: what is stored, found and held at once."""

import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from smalti.data import dataset as dataset_module
from smalti.data.dataset import ImageDataset
from smalti.data.latents import CodeSpec, rounded
from smalti.data.sources.base import ImageSource
from smalti.errors import DataError
from smalti.evaluation import pictures as pictures_module
from smalti.evaluation.distances import NeighbourSearch, nearest_neighbours
from smalti.evaluation.pictures import as_stored, stored, stored_pictures
from smalti.pipelines.pipeline import Pipeline
from smalti.prior.next_token.model import NextTokenConfig, NextTokenPrior
from smalti.scripts import train_tokenizer
from smalti.scripts.evaluate import EvaluateConfig, evaluate
from smalti.tokenizer.conv import ConvConfig
from smalti.tokenizer.quantizers.codebook import CodebookConfig
from smalti.tokenizer.quantizers.nearest import NearestConfig
from smalti.tokenizer.vq import VQConfig, VQTokenizer

SIDE = 32


class Noise(ImageSource):
    """Pictures of two classes, made when they are read."""

    classes = ("a", "b")

    def __init__(self, count: int) -> None:
        self.labels, self.seen = torch.arange(count) % 2, list[int]()
        self.fingerprint = f"noise/{count}"

    def read(self, index: int) -> Image.Image:
        self.seen.append(index)
        rng = np.random.default_rng(index)
        return Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8))

    def name(self, index: int) -> str:
        return str(index)


@pytest.fixture
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every set counts as too large for memory, and a block is 12 pictures."""
    monkeypatch.setattr(dataset_module, "MEMORY_LIMIT", 0)
    monkeypatch.setattr(pictures_module, "IN_MEMORY", 0)
    monkeypatch.setattr(pictures_module, "BLOCK", 12 * 4 * 3 * SIDE**2)


def test_stored_pictures_are_those_of_the_set(nothing_kept, tmp_path: Path) -> None:
    images = ImageDataset(Noise(150), SIDE)
    found = stored_pictures(images, folder=tmp_path)
    everything = images.all_images()
    assert len(found) == 150 and torch.equal(found[:], everything)
    assert torch.equal(torch.cat(list(found.split(64))), everything)
    some = torch.tensor([140, 3, 70])
    assert torch.equal(found[some], everything[some])
    assert torch.equal(stored_pictures(images, some, tmp_path)[:], everything[some])
    assert not list(tmp_path.iterdir())  # the file has no name


def test_a_set_that_is_kept_decoded_is_not_copied() -> None:
    images = ImageDataset(Noise(9), SIDE)
    assert images.levels is not None
    assert stored_pictures(images).levels.data_ptr() == images.levels.data_ptr()


def test_stored_pictures_are_rounded_and_finite(nothing_kept) -> None:
    images = torch.rand(30, 3, 8, 8) * 2.2 - 1.1
    assert torch.equal(as_stored(images)[:], rounded(images))
    images[7, 0, 0, 0] = torch.nan
    with pytest.raises(DataError, match="infinite or NaN values: use a model whose"):
        as_stored(images)
    with pytest.raises(DataError, match="no pictures to measure: check --data"):
        stored([])


def test_oracle_a_search_by_blocks_finds_what_a_search_of_all_finds(nothing_kept) -> None:
    rng = torch.Generator().manual_seed(0)
    references = rounded(torch.rand(50, 3, SIDE, SIDE, generator=rng) * 2 - 1)
    references[40] = references[11]
    near = references[:30] + 0.02 * torch.randn(30, 3, SIDE, SIDE, generator=rng)
    queries = as_stored(torch.cat([near, references[[40, 49]]]))
    search = NeighbourSearch(queries)
    for rows in torch.arange(50).split(12):  # mirrored ones have later positions
        block = references[rows]
        search.add(torch.cat([block, block.flip(-1)]), torch.cat([rows, rows + 50]))
    whole = nearest_neighbours(queries[:], torch.cat([references, references.flip(-1)]))
    assert torch.equal(search.indices, whole.indices)
    assert search.indices[30:].tolist() == [11, 49]  # of equal references the first
    torch.testing.assert_close(search.distances, whole.distances, rtol=1e-6, atol=0)
    assert search.distances[30:].tolist() == [0, 0]


def small_tokenizer() -> VQTokenizer:
    conv = ConvConfig(
        channels=8, channel_mult=(1,) * 5, num_res_blocks=1, attention_levels=(), z_channels=4
    )
    book = NearestConfig(codebook=CodebookConfig(16, 4))
    return VQTokenizer(VQConfig(image_size=SIDE, conv=conv, quantizer=book))


def test_validation_and_previews_read_as_many_pictures_of_any_set(
    nothing_kept, monkeypatch
) -> None:
    monkeypatch.setattr(train_tokenizer, "VALIDATION_IMAGES", 20)
    monkeypatch.setattr(train_tokenizer, "PREVIEW_IMAGES", 6)
    tokenizer = small_tokenizer()
    run: Any = SimpleNamespace(device=torch.device("cpu"), config=SimpleNamespace(seed=0))
    for count in (60, 180):
        source = Noise(count)
        images = ImageDataset(source, SIDE)
        train_tokenizer.validate(tokenizer, images, run)
        assert len(source.seen) == 20
        train_tokenizer.preview(tokenizer, images, run)
        assert len(source.seen) == 26


def is_pictures(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.shape[1:] == (3, SIDE, SIDE)
    )


class LivePictures(TorchDispatchMode):
    """Counts the pictures of one size, as floats, in all tensors that exist at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}  # address of a storage -> pictures in it
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if is_pictures(tensor):
                storage = tensor.untyped_storage()
                address = storage.data_ptr()
                self.live[address] = max(len(tensor), self.live.get(address, 0))
                self.most = max(self.most, sum(self.live.values()))
                weakref.finalize(storage, self.live.pop, address, None)
        return output


def test_evaluation_holds_a_few_batches_of_pictures_whatever_the_size_of_the_sets(
    nothing_kept, tmp_path: Path, monkeypatch
) -> None:
    with LivePictures() as pictures:  # the count itself is right
        kept = [torch.zeros(5, 3, SIDE, SIDE) for _ in range(3)]
        assert sum(pictures.live.values()) == pictures.most == 15
        del kept[1:]
        assert sum(pictures.live.values()) == 5
    tokenizer = small_tokenizer()
    spec = tokenizer.spec
    assert isinstance(spec, CodeSpec)
    prior = NextTokenPrior(
        NextTokenConfig(spec=spec, num_classes=2, depth=1, width=16, num_heads=2, hidden=16)
    )
    model = Pipeline(tokenizer, prior, ("a", "b")).save_pretrained(tmp_path / "pipeline")
    monkeypatch.setattr(pictures_module, "DECODED_AT_ONCE", 8)
    monkeypatch.setattr(pictures_module, "BLOCK", 3 * 4 * 3 * SIDE**2)
    monkeypatch.setattr("smalti.evaluation.evaluator.BATCH", 8)
    monkeypatch.setattr("smalti.evaluation.evaluator.LIKELIHOOD_IMAGES", 8)
    monkeypatch.setattr("smalti.evaluation.evaluator.SHOWN_RECONSTRUCTIONS", 3)
    monkeypatch.setattr("smalti.evaluation.metrics.CHUNK", 8)
    monkeypatch.setattr("smalti.evaluation.classifier.CHUNK", 8)
    grid = Image.new("RGB", (8, 8))  # of samples; its size is fixed
    monkeypatch.setattr("smalti.scripts.evaluate.sample_grid", lambda *args, **kwargs: grid)
    most = []
    for count in (32, 96):
        monkeypatch.setattr(EvaluateConfig, "source", lambda self, count=count: Noise(count))
        config = EvaluateConfig(
            model=str(model),
            batch_size=8,
            num_samples=count,
            classifier_epochs=1,
            heldout_fraction=0.4,  # more than a batch of either set
        )
        with LivePictures() as pictures:
            evaluate(replace(config, output_dir=tmp_path / f"out {count}"))
        most.append(pictures.most)
    # To hold the samples would take 64 more, the training pictures 39; two batches are chance.
    assert most[1] <= most[0] + 16, most


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells kinds of memory")
def test_a_large_set_is_on_the_disk_and_not_in_memory(tmp_path: Path, monkeypatch) -> None:
    """As 20,000 references of 256 px, 3.9 GB: here 96 MB, of which at most 8 MB may wait."""

    def own_memory() -> int:
        """Bytes that the system cannot take back, unlike pages of a mapped file."""
        status = Path("/proc/self/status").read_text()
        (line,) = [line for line in status.splitlines() if line.startswith("RssAnon")]
        return int(line.split()[1]) * 1024

    monkeypatch.setattr(pictures_module, "IN_MEMORY", 2**23)
    count, size = 256, 64 * 3 * 2**11  # of batches; bytes of one
    most = 0

    def batches() -> Iterator[Tensor]:
        nonlocal most
        for number in range(count):
            yield torch.full((64, 3, 32, 64), number / 127.5 - 1)
            most = max(most, own_memory())

    before = own_memory()
    images = stored(batches(), tmp_path)
    total = 0.0
    for part in images.split(64):
        total += float(part.double().mean())
        most = max(most, own_memory())
    assert len(images) == 64 * count and images.levels.numel() == count * size
    assert total == pytest.approx(sum(n / 127.5 - 1 for n in range(count)), abs=1e-4)
    assert most - before < count * size / 3, (most - before) / 2**20
