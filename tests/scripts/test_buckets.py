"""Aspect-ratio buckets from the command line: encoding, training, sampling and what is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_VQ
from PIL import Image
from runs import assert_same, losses, stop_after

import smalti
from smalti.cli import main as smalti_main
from smalti.data.dataset import DataOptions
from smalti.data.latent_cache.buckets import open_buckets
from smalti.data.latent_cache.cache import LatentCache
from smalti.prior.conditions.image import ImageCondition
from smalti.prior.flow.dit import DiTConfig
from smalti.prior.flow.prior import FlowConfig
from smalti.prior.next_token.model import NextTokenConfig
from smalti.scripts.encode import EncodeConfig, encode
from smalti.scripts.evaluate import EvaluateConfig, check_training_images, resized
from smalti.scripts.train_prior import TrainPriorConfig
from smalti.scripts.train_prior import train as train_prior
from smalti.tokenizer.conv import ConvConfig
from smalti.tokenizer.kl import KLConfig, KLTokenizer
from smalti.tokenizer.vq import VQTokenizer

CONV = ConvConfig(
    channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(), z_channels=4
)
FLOW = FlowConfig(
    network=DiTConfig(patch_size=2, depth=1, width=16, num_heads=2, positions="both"),
    time_scale=1000.0,
)
BUCKETS = (16, (16, 24), (24, 16))
SHAPES = {"square": (40, 40), "wide": (30, 48), "high": (50, 32)}  # height x width
NAMES = {"square": "16x16", "wide": "16x24", "high": "24x16"}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Pictures of 2 classes in 3 shapes, 12 each, with captions; a tokenizer, and latents."""
    root, random = tmp_path_factory.mktemp("buckets"), np.random.default_rng(0)
    lines = []
    for name, red in (("dark", 0), ("light", 170)):
        (root / "pictures" / name).mkdir(parents=True)
        for shape, (height, width) in SHAPES.items():
            for number in range(12):
                pixels = random.integers(0, 60, (height, width, 3), dtype=np.uint8)
                pixels[..., 0] += red
                file = f"{name}/{shape}{number}.png"
                Image.fromarray(pixels).save(root / "pictures" / file)
                lines.append({"file_name": file, "text": f"a {name} {shape} picture"})
    metadata = "\n".join(map(json.dumps, lines))
    (root / "pictures" / "metadata.jsonl").write_text(metadata)
    torch.manual_seed(0)
    tokenizer = KLTokenizer(KLConfig(image_size=16, conv=CONV)).eval()
    assert tokenizer.quant_conv is not None
    with torch.no_grad():  # a narrow posterior, as after training
        tokenizer.quant_conv.bias[4:] = -12
        images = DataOptions(data=str(root / "pictures")).dataset("train", 16)
        tokenizer.calibrate([images.all_images()])
    tokenizer.save_pretrained(root / "tokenizer")
    job = ["encode", "--data", str(root / "pictures"), "--heldout_fraction", "0.25"]
    job += ["--tokenizer", str(root / "tokenizer"), "--output_dir", str(root / "latents")]
    assert smalti_main([*job, "--buckets", "16", "16x24", "24x16"]) == 0
    return root


def encoding(root: Path, **options) -> EncodeConfig:
    return EncodeConfig(
        data=str(root / "pictures"),
        heldout_fraction=0.25,
        tokenizer=root / "tokenizer",
        **{"output_dir": root / "latents", "buckets": BUCKETS, **options},
    )


def training(root: Path, out: Path, **options) -> TrainPriorConfig:
    given = {"prior": FLOW, "max_train_steps": 4, "train_batch_size": 4, "latents": "latents"}
    given |= options
    latents = root / given.pop("latents")
    return TrainPriorConfig(
        output_dir=out,
        latents=latents,
        tokenizer=root / "tokenizer",
        mixed_precision="no",
        preview=replace(TrainPriorConfig().preview, num_inference_steps=1),
        **given,
    )


@pytest.fixture(scope="module")
def trained(root: Path) -> Path:
    """A run of 40 steps on the three buckets."""
    job = training(
        root,
        root / "run",
        max_train_steps=40,
        train_batch_size=8,
        learning_rate=3e-3,
        validation_steps=10,
    )
    train_prior(job)
    return root / "run"


def test_each_picture_is_encoded_once_at_the_size_that_it_fits(root: Path) -> None:
    train, heldout = open_buckets(root / "latents")
    assert train.buckets == heldout.buckets == ((8, 8), (8, 12), (12, 8))
    assert len(train) + len(heldout) == 72
    for shape, name in NAMES.items():
        for split in ("train", "heldout"):
            cache = LatentCache(root / "latents" / name / split)
            captions = cache.all_captions(range(len(cache)))
            assert captions is not None and {t.split()[2] for (t,) in captions} == {shape}
            classes = [cache.classes[label] for label in cache.labels.tolist()]
            assert [t.split()[1] for (t,) in captions] == classes
    tokenizer = smalti.Tokenizer.from_pretrained(root / "tokenizer").resized((16, 24))
    wide = LatentCache(root / "latents" / "16x24" / "heldout")
    options = DataOptions(data=str(root / "pictures"), heldout_fraction=0.25)
    images = options.dataset("heldout", (16, 24))
    texts = [images.captions(i)[0].split()[2] for i in range(len(images))]
    rows = [i for i, text in enumerate(texts) if text == "wide"]
    (batch,) = images.batches_of(rows, len(rows))
    stored = tokenizer.store(batch.images)
    torch.testing.assert_close(
        wide.first_view(range(len(wide))).stored, stored, rtol=1e-2, atol=1e-3
    )


def test_a_prior_learns_every_bucket_and_samples_each(trained: Path) -> None:
    lines = [line for line in losses(trained) if "val_loss" in line]
    assert lines[-1]["val_loss"] < lines[0]["val_loss"]
    pipe = smalti.Pipeline.from_pretrained(trained / "pipeline")
    assert pipe.prior.config.buckets == ((8, 8), (8, 12), (12, 8))
    assert [bucket.size for bucket in pipe.buckets] == list(BUCKETS)
    _, heldout = open_buckets(trained.parent / "latents")
    torch.manual_seed(0)
    fresh = smalti.Prior.registry.build(pipe.prior.config).eval()
    for cache in heldout.caches:  # lower on each
        batch = cache.first_view(range(len(cache)))
        latents = pipe.tokenizer.latents(batch.stored)
        with torch.no_grad():
            now, before = (p(latents, batch.labels).total for p in (pipe.prior, fresh))
        assert now < 0.95 * before
    for size in BUCKETS:
        image = pipe(["dark"], image_size=size, num_inference_steps=2).images[0]
        height, width = (size, size) if isinstance(size, int) else size
        assert (image.height, image.width) == (height, width)
    noise = torch.randn(2, 4, 12, 8)
    latents = pipe.prior.sample(torch.tensor([0, 1]), noise=noise, num_inference_steps=2)
    assert latents.shape == noise.shape
    high = pipe.resized((24, 16))
    same = high.prior.sample(torch.tensor([0, 1]), noise=noise, num_inference_steps=2)
    assert torch.equal(latents, same)
    assert high.bucket is not None and high.bucket.number == 2
    card = (trained / "pipeline" / "README.md").read_text()
    assert "16 x 16 pixels, or, with `image_size`, 16 x 24, 24 x 16 (height x width)" in card
    checkpoint = smalti.Pipeline.from_pretrained(trained / "checkpoint-000040")
    assert [bucket.size for bucket in checkpoint.buckets] == list(BUCKETS)


def test_generate_samples_one_bucket(trained: Path, tmp_path: Path) -> None:
    job = ["generate", "--model", str(trained / "pipeline"), "--num_images", "2"]
    job += ["--output_dir", str(tmp_path / "wide"), "--image_size", "16x24"]
    assert smalti_main([*job, "--num_inference_steps", "1", "--solver", "euler"]) == 0
    sizes = [Image.open(file).size for file in sorted((tmp_path / "wide").glob("*.png"))]
    assert sizes == [(24, 16)] * 2


def test_encoding_goes_on_where_it_was_stopped(root: Path, tmp_path: Path) -> None:
    copy = tmp_path / "latents"
    shutil.copytree(root / "latents", copy)
    (copy / "buckets.json").unlink()
    shutil.rmtree(copy / "24x16" / "heldout")
    with pytest.raises(smalti.SmaltiError, match="does not exist"):
        train_prior(training(root, tmp_path / "run", latents=copy))
    encode(encoding(root, output_dir=copy))
    for one, other in zip(open_buckets(root / "latents"), open_buckets(copy), strict=True):
        assert one.fingerprint == other.fingerprint


def test_a_prior_of_one_size_is_the_start_of_one_of_many(trained: Path, tmp_path: Path) -> None:
    """And the other way round."""
    root = trained.parent
    one = training(root, tmp_path / "one", latents="latents/16x24", max_train_steps=1)
    train_prior(replace(one, prior=FLOW))
    many = training(root, tmp_path / "many", max_train_steps=1)
    for job, initial in ((many, tmp_path / "one"), (one, trained)):
        start = str(initial / "pipeline")
        given = {"initial": start, "output_dir": tmp_path / f"from_{initial.name}"}
        pipe = smalti.Pipeline.from_pretrained(train_prior(replace(job, **given)))
        assert len(pipe.buckets) == (3 if job is many else 0)


def test_a_stopped_run_goes_on_as_if_it_had_not_been(root: Path, tmp_path: Path) -> None:
    straight, stopped = (
        training(root, tmp_path / name, validation_steps=100, checkpointing_steps=3)
        for name in ("straight", "stopped")
    )
    changes = {"max_train_steps": 6, "gradient_accumulation_steps": 2}
    straight, stopped = (replace(c, **changes) for c in (straight, stopped))
    train_prior(straight)
    stop_after(stopped, 4, train_prior)
    train_prior(replace(stopped, resume_from_checkpoint="latest", dataloader_num_workers=1))
    assert_same(tmp_path / "straight", tmp_path / "stopped")


def test_captions_and_pictures_go_through_the_buckets(root: Path, tmp_path: Path) -> None:
    job = encoding(root, output_dir=tmp_path / "latents", image_task="inpainting")
    encode(replace(job, condition="text+image"))
    train, _ = open_buckets(tmp_path / "latents")
    shapes = [cache.info.conditions[0].shape for cache in train.caches]
    assert shapes == [(5, 8, 8), (5, 8, 12), (5, 12, 8)]
    run = training(root, tmp_path / "run", condition="text+image", latents=tmp_path / "latents")
    pipe = smalti.Pipeline.from_pretrained(train_prior(run))
    image, mask = Image.new("RGB", (24, 16)), Image.new("L", (24, 16))
    mask.paste(255, (0, 0, 12, 16))
    given = {"image": image, "mask_image": mask, "prompt": "a dark picture"}
    made = pipe(**given, image_size=(16, 24), num_inference_steps=1).images[0]
    assert made.size == (24, 16)
    condition = pipe.prior.no_conditions()
    assert isinstance(condition.parts["image"], ImageCondition)


def test_info_names_the_buckets_and_the_next_command(root: Path, trained: Path, capsys) -> None:
    assert smalti_main(["info", str(root / "latents")]) == 0
    said = capsys.readouterr().out
    assert "16x16, 16x24, 24x16 (height x width, the default first)" in said
    assert "train-prior" in said and "16x24/heldout: yes: all shards" in said
    assert smalti_main(["info", str(trained / "pipeline")]) == 0
    assert "16 x 16, 16 x 24, 24 x 16" in capsys.readouterr().out


def test_one_bucket_is_evaluated_against_its_own_pictures(root: Path, trained: Path) -> None:
    config = EvaluateConfig(
        model=str(trained / "pipeline"), data=str(root / "pictures"), heldout_fraction=0.25
    )
    pipe = smalti.Pipeline.from_pretrained(trained / "pipeline")
    for size, shape in zip(BUCKETS, SHAPES, strict=True):
        at = resized(config, pipe, size)
        images = config.dataset("train", size, bucket=at.bucket)
        assert check_training_images(config, at, images) == "yes"
        assert {images.captions(i)[0].split()[2] for i in range(len(images))} == {shape}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--buckets", "16"], "1 bucket was given, 16x16: give 2 or more"),
        (["--buckets", "16", "32"], "16x16 and 32x32 have the same aspect ratio"),
        (["--buckets", "16", "16x25"], "16 x 25 is not a multiple of the down-sampling"),
        (["--buckets", "16", "8x64"], "no training picture has an aspect ratio near"),
        (["--buckets", "16", "16x"], "'16x'"),
        (["--buckets", "16", "16x24", "--image_size", "16"], "leave out one of them"),
    ],
)
def test_wrong_buckets_are_named_and_nothing_is_written(
    root: Path, tmp_path: Path, capsys, flags: list[str], message: str
) -> None:
    out = tmp_path / "out"
    job = ["encode", "--data", str(root / "pictures"), "--tokenizer", str(root / "tokenizer")]
    assert smalti_main([*job, "--output_dir", str(out), *flags]) == 2
    errors = capsys.readouterr().err
    assert message in errors.splitlines()[-1] and not out.exists()


def test_codes_and_priors_of_one_grid_have_no_buckets(root: Path, tmp_path: Path, capsys) -> None:
    torch.manual_seed(0)
    VQTokenizer(TINY_VQ).eval().save_pretrained(tmp_path / "vq")
    job = ["encode", "--data", str(root / "pictures"), "--tokenizer", str(tmp_path / "vq")]
    job += ["--buckets", "16", "16x24", "--output_dir", str(tmp_path / "latents")]
    assert smalti_main(job) == 2
    assert "priors of codes model a fixed number of them" in capsys.readouterr().err
    with pytest.raises(smalti.SmaltiError, match="train a flow prior"):
        NextTokenConfig().bucketed([(8, 8), (8, 12)])
    assert NextTokenConfig().bucketed([]) == NextTokenConfig()


def test_pictures_that_are_encoded_on_the_fly_have_one_size(root: Path, capsys) -> None:
    job = ["train-prior", "--data", str(root / "pictures"), "--buckets", "16", "16x24"]
    assert smalti_main(job) == 2
    assert "--buckets is an option of smalti encode; " in capsys.readouterr().err


def test_commands_of_one_size_read_one_bucket(root: Path, tmp_path: Path, capsys) -> None:
    out = str(tmp_path / "out")
    assert smalti_main(["export-latents", str(root / "latents"), out]) == 2
    error = capsys.readouterr().err
    remedy = error.strip().rpartition("give one of them, ")[2]
    assert smalti_main(["export-latents", remedy, out]) == 0


def test_a_changed_or_missing_cache_is_named(root: Path, tmp_path: Path) -> None:
    copy = tmp_path / "latents"
    shutil.copytree(root / "latents", copy)
    manifest = copy / "16x24" / "train" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"dark"', '"mark"'))
    with pytest.raises(smalti.SmaltiError, match="16x24"):
        open_buckets(copy)
    manifest.unlink()
    with pytest.raises(smalti.SmaltiError, match=r"16x24.*is missing"):
        open_buckets(copy)
    with pytest.raises(smalti.SmaltiError, match="holds 16x16, the latents of other buckets"):
        encode(encoding(root, buckets=(), output_dir=root / "latents"))


def test_fewer_buckets_need_another_folder(root: Path) -> None:
    with pytest.raises(smalti.SmaltiError, match="holds 24x16, the latents of other buckets"):
        encode(encoding(root, buckets=BUCKETS[:2]))
