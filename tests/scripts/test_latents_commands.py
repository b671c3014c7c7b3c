"""The commands that encode, export and import latents, and a prior trained on the result."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import datasets
import numpy as np
import pytest
import torch
from conftest import TINY_FLOW
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torchvision.transforms import TenCrop

import smalti
from smalti.cli import main as smalti_main
from smalti.data.dataset import ImageDataset
from smalti.data.latent_cache.cache import EncodedRange, LatentCache, write_cache
from smalti.data.latent_cache.imports import TEN_CROPS
from smalti.data.latent_cache.manifest import StoredCondition, read_manifest
from smalti.data.latents import ContinuousSpec
from smalti.data.sources.base import open_source
from smalti.errors import SmaltiError
from smalti.pipelines.conditions import ConditionEncoder
from smalti.prior.next_token.model import NextTokenConfig
from smalti.scripts.encode import EncodeConfig, encode_split
from smalti.scripts.train_prior import TrainPriorConfig
from smalti.scripts.train_prior import train as train_prior
from smalti.tokenizer.base import Reconstruction, Tokenizer
from smalti.tokenizer.conv import ConvConfig
from smalti.tokenizer.kl import KLConfig, KLTokenizer
from smalti.tokenizer.quantizers.codebook import CodebookConfig
from smalti.tokenizer.quantizers.nearest import NearestConfig
from smalti.tokenizer.registry import TOKENIZERS
from smalti.tokenizer.vq import VQConfig, VQTokenizer


@dataclass(frozen=True)
class PlainConfig:
    """A size, in pixels."""

    kind: Literal["plain"] = "plain"
    image_size: int = 16


class PlainTokenizer(Tokenizer):
    """A continuous tokenizer that is no KL-VAE: `store` returns the latents themselves."""

    Config: ClassVar[type] = PlainConfig

    def __init__(self, config: PlainConfig) -> None:
        super().__init__()
        self.config = config
        self.down = nn.Conv2d(3, 4, 4, stride=4)
        self.up = nn.ConvTranspose2d(4, 3, 4, stride=4)

    @property
    def spec(self) -> ContinuousSpec:
        return ContinuousSpec(4, self.image_size // 4, self.image_size // 4)

    @property
    def image_size(self) -> int:
        return self.config.image_size

    @property
    def last_layer(self) -> nn.Parameter:
        return self.up.weight  # type: ignore[return-value]

    def store(self, images: torch.Tensor) -> torch.Tensor:
        return self.down(images)

    def vectors(self, latents: torch.Tensor) -> torch.Tensor:
        return latents

    def decode_vectors(self, vectors: torch.Tensor) -> torch.Tensor:
        return self.up(vectors)

    def forward(self, images: torch.Tensor, random_inputs=None) -> Reconstruction:
        return Reconstruction(self.decode(self.store(images)), images, {})


CONV = ConvConfig(
    channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(), z_channels=4
)
VQ = VQConfig(image_size=16, conv=CONV, quantizer=NearestConfig(codebook=CodebookConfig(16, 4)))
KL = KLConfig(image_size=16, conv=CONV, latent_mean=(0.5,) * 4, latent_std=(2.0,) * 4)
GPT = NextTokenConfig(depth=1, width=16, num_heads=2, hidden=32)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Pictures of two classes, and two tokenizers."""
    root = tmp_path_factory.mktemp("latents")
    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / "pictures" / name).mkdir(parents=True)
        for i in range(10):
            pixels = generator.integers(0, 256, (33, 36, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "pictures" / name / f"{i}.png")
    torch.manual_seed(0)
    VQTokenizer(VQ).save_pretrained(root / "vq")
    KLTokenizer(KL).save_pretrained(root / "kl")
    return root


def encode(root: Path, out: Path, *more: str, tokenizer: str = "vq") -> Path:
    arguments = ["--data", str(root / "pictures"), "--tokenizer", str(root / tokenizer)]
    assert smalti_main(["encode", *arguments, "--output_dir", str(out), *more]) == 0
    return out


def pictures(root: Path, size: int) -> torch.Tensor:
    source = open_source(str(root / "pictures"))
    return ImageDataset(source, size, split="train").all_images()


def pictures_centre(root: Path) -> torch.Tensor:
    """The centre crops, of the size of the tokenizer, of enlarged pictures."""
    return TenCrop(16)(pictures(root, int(16 * 1.1)))[4]


def test_ten_crops_are_encoded_as_llamagen_does(root: Path, tmp_path: Path) -> None:
    out = encode(root, tmp_path / "lat", "--views", "ten-crop")
    train, heldout = LatentCache(out / "train"), LatentCache(out / "heldout")
    assert len(train.info.views) == 10 and heldout.info.views == ("identity",)
    tokenizer = smalti.Tokenizer.from_pretrained(root / "vq")
    crops = TenCrop(16)(pictures(root, int(16 * 1.1)))
    codes = train.all_views(range(len(train))).astype(np.int64)
    for view, number in enumerate(TEN_CROPS):
        assert np.array_equal(codes[:, view], tokenizer.encode(crops[number]).numpy())


def test_the_pictures_do_not_depend_on_the_views(root: Path, tmp_path: Path) -> None:
    caches = [
        LatentCache(encode(root, tmp_path / views, "--views", views) / "train")
        for views in ("identity", "flip", "ten-crop")
    ]
    assert [len(cache.info.views) for cache in caches] == [1, 2, 10]
    assert len({cache.info.dataset_fingerprint for cache in caches}) == 1
    assert np.array_equal(caches[0].all_views([3, 5])[:, 0], caches[1].all_views([3, 5])[:, 0])


class Brightness(ConditionEncoder):
    """A condition of each view: the mean of its pixels."""

    stored = (StoredCondition("brightness", (), "float32", "view", "mean"),)

    def __call__(self, batch, views) -> dict[str, torch.Tensor]:
        return {"brightness": torch.stack([view.mean((1, 2, 3)) for view in views], dim=1)}


def test_encoders_of_conditions_see_the_views_that_are_encoded(root: Path, tmp_path: Path) -> None:
    config = EncodeConfig(
        data=str(root / "pictures"), output_dir=tmp_path, views="ten-crop", batch_size=7
    )
    encode_split(config, "train", smalti.Tokenizer.from_pretrained(root / "vq"), [Brightness()])
    cache = LatentCache(tmp_path / "train", seed=5)
    crops = torch.stack(TenCrop(16)(pictures(root, int(16 * 1.1)))).mean((2, 3, 4))
    expected = crops[list(TEN_CROPS)]  # (views, N)
    tokenizer = smalti.Tokenizer.from_pretrained(root / "vq")
    first = cache.first_view(range(len(cache)))
    torch.testing.assert_close(first.conditions["brightness"], expected[0])
    assert torch.equal(first.stored, tokenizer.encode(pictures_centre(root)))
    shown = cache.__getitems__([(epoch, 3) for epoch in range(40)]).conditions["brightness"]
    assert {round(v, 4) for v in shown.tolist()} == {round(v, 4) for v in expected[:, 3].tolist()}


def test_info_says_what_a_cache_holds(root: Path, tmp_path: Path, capsys) -> None:
    out = encode(root, tmp_path / "lat")
    info = replace(
        read_manifest(out / "train"),
        classes=(),
        captions="t",
        conditions=(StoredCondition("features", (2, 8), "float16", "caption", "r"),),
    )
    cache = LatentCache(out / "train")

    def encoded(start: int, stop: int) -> EncodedRange:
        stored = torch.from_numpy(cache.all_views(range(start, stop)).astype(np.int64))
        features = torch.zeros(stop - start, 2, 8)
        labels = torch.zeros(stop - start, dtype=torch.int64)
        return EncodedRange(stored, labels, [("text",)] * len(labels), {"features": features})

    write_cache(tmp_path / "captioned", info, encoded)
    capsys.readouterr()
    assert smalti_main(["info", str(tmp_path / "captioned")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "classes    none" in lines and "captions   yes" in lines
    assert "condition  features, float16 (2, 8) for each caption" in lines


@pytest.mark.parametrize("layout", ["parquet", "webdataset"])
def test_encoded_latents_are_exported(root: Path, tmp_path: Path, layout: str) -> None:
    latents = encode(root, tmp_path / "lat", tokenizer="kl")
    arguments = [str(latents), str(tmp_path / "out"), "--format", layout]
    assert smalti_main(["export-latents", *arguments]) == 0
    found = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "arrow"))
    suffix = ".npy" if layout == "webdataset" else ""
    for split, rows in found.items():
        cache = LatentCache(latents / split)
        stored = cache.all_views(range(len(cache)))
        mean = np.array(rows[f"mean{suffix}"][:], dtype=np.float16)
        assert np.array_equal(
            mean.reshape(len(cache), -1), stored[:, :, :4].reshape(len(cache), -1)
        )
        assert rows["label" if layout == "parquet" else "cls"][:] == cache.labels.tolist()


def test_codes_of_llamagen_train_a_prior(root: Path, tmp_path: Path) -> None:
    tokenizer = smalti.Tokenizer.from_pretrained(root / "vq")
    crops = torch.stack(TenCrop(16)(pictures(root, 17)), 1)  # (N, 10, 3, 16, 16)
    for name in ("emoji_codes", "emoji_labels"):
        (tmp_path / "src" / name).mkdir(parents=True)
    for i, views in enumerate(crops):
        codes = tokenizer.encode(views)[None].numpy()
        np.save(tmp_path / "src" / "emoji_codes" / f"{i}.npy", codes)
        np.save(tmp_path / "src" / "emoji_labels" / f"{i}.npy", np.array([i % 2]))
    assert smalti_main(import_of(tmp_path, root / "vq")) == 0
    train_prior(prior_run(tmp_path, root / "vq", GPT))


def test_latents_of_lightningdit_train_a_prior(root: Path, tmp_path: Path) -> None:
    tokenizer = smalti.Tokenizer.from_pretrained(root / "kl")
    assert isinstance(tokenizer, KLTokenizer) and isinstance(tokenizer.spec, ContinuousSpec)
    images = pictures(root, 16)
    draws = [tokenizer.gaussian(view).mean.detach() for view in (images, images.flip(-1))]
    (tmp_path / "src").mkdir()
    save_file(
        {
            "latents": draws[0].contiguous(),
            "latents_flip": draws[1].contiguous(),
            "labels": torch.arange(len(images)) % 2,
        },
        tmp_path / "src" / "latents_rank00_shard000.safetensors",
    )
    unit = {"mean": tokenizer.shift, "std": tokenizer.scale}
    torch.save(unit, tmp_path / "src" / "latents_stats.pt")
    assert smalti_main([*import_of(tmp_path, root / "kl"), "--format", "lightningdit"]) == 0
    stored = LatentCache(tmp_path / "lat" / "train").first_view([0, 1]).stored
    sampled = tokenizer.latents(stored, generator=torch.Generator().manual_seed(0))
    assert torch.equal(
        sampled, tokenizer.latents(stored)
    )  # without a deviation, draws are the mean
    train_prior(prior_run(tmp_path, root / "kl", TINY_FLOW))


def test_a_tokenizer_that_stores_plain_latents_trains_a_prior(
    root: Path, tmp_path: Path, monkeypatch
) -> None:
    """From pictures to samples, then exported and imported."""
    monkeypatch.setitem(TOKENIZERS._entries, "plain", f"{__name__}:PlainTokenizer")
    torch.manual_seed(0)
    tokenizer = PlainTokenizer(PlainConfig())
    tokenizer.save_pretrained(tmp_path / "plain")
    arguments = ["--data", str(root / "pictures"), "--tokenizer", str(tmp_path / "plain")]
    assert smalti_main(["encode", *arguments, "--output_dir", str(tmp_path / "lat")]) == 0
    cache = LatentCache(tmp_path / "lat" / "train")
    with torch.no_grad():
        expected = tokenizer.store(pictures(root, 16))
    assert torch.equal(cache.first_view(range(len(cache))).stored, expected.half().float())
    assert cache.info.stored_shape == (4, 4, 4) and cache.info.stored_statistics == ()
    run = prior_run(tmp_path, tmp_path / "plain", TINY_FLOW)
    pipe = smalti.Pipeline.from_pretrained(train_prior(run))
    assert len(pipe(class_labels=["cat"], num_inference_steps=2).images) == 1

    assert smalti_main(["export-latents", str(tmp_path / "lat"), str(tmp_path / "out")]) == 0
    rows = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "arrow"))["train"]
    assert rows.column_names == ["index", "label", "latents"]
    (tmp_path / "src").mkdir()
    content = {"latents": expected.contiguous(), "labels": cache.labels}
    save_file(content, tmp_path / "src" / "latents_rank00_shard000.safetensors")
    importing = [*import_of(tmp_path, tmp_path / "plain"), "--format", "lightningdit"]
    importing[2] = str(tmp_path / "imported")
    assert smalti_main(importing) == 0
    assert LatentCache(tmp_path / "imported" / "train").info.shape == (4, 4, 4)


def write_codes(source: Path) -> None:
    """Codes of 20 pictures, as LlamaGen's extraction leaves them."""
    for name in ("x_codes", "x_labels"):
        (source / name).mkdir(parents=True)
    for i in range(20):
        np.save(source / "x_codes" / f"{i}.npy", np.full((1, 2, 64), i % 16))
        np.save(source / "x_labels" / f"{i}.npy", np.array([i % 2]))


def import_of(folder: Path, tokenizer: Path) -> list[str]:
    arguments = [str(folder / "src"), str(folder / "lat"), "--tokenizer", str(tokenizer)]
    return ["import-latents", *arguments, "--heldout_fraction", "0.2"]


def prior_run(folder: Path, tokenizer: Path, prior) -> TrainPriorConfig:
    return TrainPriorConfig(
        output_dir=folder / "prior",
        latents=folder / "lat",
        tokenizer=tokenizer,
        prior=prior,
        train_batch_size=4,
        max_train_steps=1,
        mixed_precision="no",
    )


def test_a_prior_refuses_imported_latents_of_another_tokenizer(root: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    VQTokenizer(VQ).save_pretrained(tmp_path / "other")
    encode(root, tmp_path / "lat")
    with pytest.raises(SmaltiError, match="were made by another tokenizer"):
        train_prior(prior_run(tmp_path, tmp_path / "other", GPT))


def test_the_import_says_that_the_tokenizer_is_not_verified(
    root: Path, tmp_path: Path, capsys
) -> None:
    write_codes(tmp_path / "src")
    assert smalti_main(import_of(tmp_path, root / "vq")) == 0
    assert f"recorded as made by {root / 'vq'} (not verified)" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "lat" / "train" / "manifest.json").read_text())
    named = smalti.Tokenizer.from_pretrained(root / "vq")
    assert manifest["tokenizer_fingerprint"] == named.fingerprint
    assert manifest["imported"] and manifest["dataset_fingerprint"] == ""


def test_latents_are_not_written_to_a_folder_with_other_files(
    root: Path, tmp_path: Path, capsys
) -> None:
    write_codes(tmp_path / "src")
    out = str(root / "pictures")
    encoding = ["encode", "--data", out, "--tokenizer", str(root / "vq"), "--output_dir", out]
    importing = ["import-latents", str(tmp_path / "src"), out, "--tokenizer", str(root / "vq")]
    for command in (encoding, importing):
        assert smalti_main(command) == 2
        assert f"{out} holds cat, which is not a latent cache" in capsys.readouterr().err
    assert sorted(path.name for path in Path(out).iterdir()) == ["cat", "dog"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["encode", "--views", "nine-crop"], "invalid choice"),
        (["export-latents"], "give two folders: smalti export-latents LATENTS OUT"),
        (["export-latents", "nowhere", "out"], "nowhere holds no finished latent cache"),
        (["export-latents", "a", "b", "--format", "csv"], "invalid choice"),
        (["import-latents"], "give two folders: smalti import-latents SOURCE OUT"),
        (["import-latents", "a", "out", "--tokenizer", "nowhere"], "folder not found: nowhere"),
        (["import-latents", "a", "out", "--tokenizer", "VQ"], "the folder a does not exist"),
        (["import-latents", "EMPTY", "out", "--tokenizer", "VQ"], "NAME_codes; it has none"),
        (["import-latents", "a", "out", "--shard_size", "0"], "shard_size is 0; it must be"),
        (["import-latents", "a", "out", "--num_samples", "-1"], "num_samples is -1; it must be"),
        (
            ["import-latents", "EMPTY", "out", "--tokenizer", "KL", "--format", "lightningdit"],
            "holds no .safetensors files",
        ),
        (["encode", "--heldout_fraction", "1"], "must lie between 0 and 1"),
    ],
)
def test_an_error_is_one_line_and_writes_nothing(
    root: Path, tmp_path: Path, capsys, monkeypatch, arguments, message
) -> None:
    (root / "empty").mkdir(exist_ok=True)
    places = {"VQ": root / "vq", "KL": root / "kl", "EMPTY": root / "empty"}
    monkeypatch.chdir(tmp_path)
    status = smalti_main([str(places.get(a, a)) for a in arguments])
    error = capsys.readouterr().err
    assert status == 2 and message in error.strip().splitlines()[-1], error
    assert "Traceback" not in error and list(tmp_path.iterdir()) == []
