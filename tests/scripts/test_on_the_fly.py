"""Priors trained on pictures that are encoded for each step: `train-prior --data`."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_FLOW
from PIL import Image
from runs import assert_same, losses, stop_after

import smalti
from smalti.cli import main as smalti_main
from smalti.cli import parse_config
from smalti.data.dataset import DataOptions, read_options, write_options
from smalti.data.latent_cache.cache import LatentCache
from smalti.data.order import DataOrder
from smalti.data.transforms import RandomCrop
from smalti.errors import SmaltiError
from smalti.prior.next_token.model import NextTokenConfig
from smalti.scripts.encode import EncodeConfig, encode
from smalti.scripts.evaluate import EvaluateConfig, tokenizer_evaluator
from smalti.scripts.train_prior import TrainPriorConfig, open_latents, train
from smalti.tokenizer.conv import ConvConfig
from smalti.tokenizer.kl import KLConfig, KLTokenizer
from smalti.tokenizer.quantizers.codebook import CodebookConfig
from smalti.tokenizer.quantizers.nearest import NearestConfig
from smalti.tokenizer.vq import VQConfig, VQTokenizer

CONV = ConvConfig(
    channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(), z_channels=4
)
VQ = VQConfig(image_size=16, conv=CONV, quantizer=NearestConfig(codebook=CodebookConfig(16, 4)))
KL = KLConfig(image_size=16, conv=CONV, latent_mean=(0.5,) * 4, latent_std=(2.0,) * 4)
PRIORS = {
    "vq": NextTokenConfig(depth=1, width=16, num_heads=2, hidden=32, dropout=0.1),
    "kl": TINY_FLOW,
}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Pictures of two classes, two tokenizers, and caches of the pictures as they are."""
    root = tmp_path_factory.mktemp("latents")
    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / "pictures" / name).mkdir(parents=True)
        for i in range(12):
            pixels = generator.integers(0, 256, (33, 36, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "pictures" / name / f"{i}.png")
    torch.manual_seed(0)
    VQTokenizer(VQ).save_pretrained(root / "vq")
    KLTokenizer(KL).save_pretrained(root / "kl")
    for kind in PRIORS:
        encode(
            EncodeConfig(
                data=str(root / "pictures"),
                tokenizer=root / kind,
                output_dir=root / f"{kind}-cache",
                views="identity",
            )
        )
    return root


def config_of(root: Path, kind: str, out: Path, **changes) -> TrainPriorConfig:
    settings = {
        "data": str(root / "pictures"),
        "flip": False,
        "output_dir": out,
        "tokenizer": root / kind,
        "prior": PRIORS[kind],
        "train_batch_size": 8,
        "max_train_steps": 4,
        "checkpointing_steps": 2,
        "logging_steps": 1,
        "validation_steps": 4,
        "dataloader_num_workers": 0,
        "preview": replace(TrainPriorConfig().preview, guidance_scale=1.0),
    }
    return TrainPriorConfig(**{**settings, **changes})


def cached(root: Path, kind: str, out: Path) -> TrainPriorConfig:
    plain = config_of(root, kind, out)
    return replace(plain, data="", flip=True, latents=root / f"{kind}-cache")


AUGMENTED = {"flip": True, "crop": "random", "random_crop": RandomCrop(0.5, 1.0)}


@pytest.mark.parametrize("kind", PRIORS)
def test_without_augmentation_the_latents_are_those_of_a_cache(root: Path, kind: str) -> None:
    made = open_latents(config_of(root, kind, root), CPU)
    stored = open_latents(cached(root, kind, root), CPU)
    assert made[0].fingerprint == stored[0].fingerprint
    for ours, theirs in zip(made[1:], stored[1:], strict=True):
        assert len(ours) == len(theirs) and torch.equal(ours.labels, theirs.labels)
        assert ours.info == replace(
            theirs.info, shards=(), groups=(), shard_size=len(ours), format_version=1
        )
        keys = [(epoch, index) for epoch in range(2) for index in (3, 0, 1)]
        for one, two in (
            (ours.__getitems__(keys), theirs.__getitems__(keys)),
            (ours.first_view([1, 0]), theirs.first_view([1, 0])),
        ):
            if kind == "vq":
                assert torch.equal(one.stored, two.stored)
            else:  # a cache stores half precision
                torch.testing.assert_close(one.stored, two.stored, rtol=1e-3, atol=1e-4)
            assert one.stored.dtype == two.stored.dtype
            assert torch.equal(one.labels, two.labels) and torch.equal(one.indices, two.indices)
        assert ours.even_subset(2, 0) == theirs.even_subset(2, 0)


def test_the_loss_is_that_of_a_run_on_a_cache(root: Path, tmp_path: Path) -> None:
    train(config_of(root, "vq", tmp_path / "pictures"))
    train(cached(root, "vq", tmp_path / "cache"))
    assert losses(tmp_path / "pictures") == losses(tmp_path / "cache")


def test_augmentation_is_a_function_of_seed_epoch_and_index(root: Path) -> None:
    config = config_of(root, "kl", root, **AUGMENTED)
    one, again = (open_latents(config, CPU)[1] for _ in range(2))
    other = open_latents(replace(config, seed=1), CPU)[1]
    keys = [(epoch, 3) for epoch in range(12)]
    found = one.__getitems__(keys).stored
    again.__getitems__([(7, 1)])
    assert torch.equal(found, again.__getitems__(keys).stored)
    # In a batch of another size, the encoder may round otherwise.
    torch.testing.assert_close(found[4:5], again.__getitems__(keys[4:5]).stored)
    assert len(found.flatten(1).unique(dim=0)) > 8
    assert not torch.equal(found, other.__getitems__(keys).stored)
    centre = open_latents(config_of(root, "kl", root), CPU)[1]
    assert torch.equal(one.first_view([3]).stored, centre.first_view([3]).stored)
    assert not torch.equal(found[:1], centre.first_view([3]).stored)


def test_batches_are_the_same_for_any_number_of_processes_and_workers(root: Path) -> None:
    latents = open_latents(config_of(root, "vq", root, **AUGMENTED), CPU)[1]
    order = DataOrder(len(latents), 8, 0)
    alone = next(latents.batches(order, start_step=5))[0]
    halves = [next(latents.batches(order, start_step=5, rank=r, world_size=2)) for r in (0, 1)]
    assert torch.equal(alone.stored, torch.cat([half[0].stored for half in halves]))
    stream = latents.batches(order, start_step=5, micro_batches=2, num_workers=1)
    assert torch.equal(alone.stored, torch.cat([part.stored for part in next(stream)]))
    stream.close()


def test_a_stopped_run_resumes_and_its_checkpoint_is_a_pipeline(root: Path, tmp_path: Path) -> None:
    whole = config_of(root, "kl", tmp_path / "whole", **AUGMENTED)
    folder = train(whole)
    parts = replace(whole, output_dir=tmp_path / "parts")
    stop_after(parts, 3, train)
    train(replace(parts, resume_from_checkpoint="latest"))
    assert_same(tmp_path / "whole", tmp_path / "parts")

    images = DataOptions(data=str(root / "pictures")).dataset("train", 16)
    for path in (folder, tmp_path / "whole" / "checkpoint-000004"):
        pipeline = smalti.Pipeline.from_pretrained(path)
        assert pipeline.classes == ("cat", "dog")
        assert pipeline.training_pictures == images.fingerprint
        assert (
            pipeline.tokenizer.fingerprint
            == smalti.Tokenizer.from_pretrained(root / "kl").fingerprint
        )
        assert read_options(path) == DataOptions(data=str(root / "pictures"))
    with pytest.raises(SmaltiError, match=r"made with crop = random, this run has centre"):
        train(
            replace(whole, crop="centre", random_crop=RandomCrop(), resume_from_checkpoint="latest")
        )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--latents", "x", "--data", "y"), "--latents is x and --data is y: leave out one"),
        (("--crop", "random"), "crop was given, but latents are read from a cache"),
        (("--heldout_fraction", "0.2"), "heldout_fraction was given, but latents are read"),
        (("--data", "y", "--random_crop.min_fraction", "0.5"), "add --crop random"),
    ],
)
def test_options_that_contradict_each_other(tmp_path: Path, flags, message: str) -> None:
    with pytest.raises(SmaltiError, match=message):
        parse_config(TrainPriorConfig, [*flags, "--output_dir", str(tmp_path / "run")], prog="s")
    assert smalti_main(["train-prior", *flags, "--output_dir", str(tmp_path / "run")]) == 2
    assert not list(tmp_path.iterdir())


def test_the_options_of_the_tokenizers_pictures_are_used(root: Path, tmp_path: Path) -> None:
    tokenizer = smalti.Tokenizer.from_pretrained(root / "vq").save_pretrained(tmp_path / "vq")
    data = str(root / "pictures")
    write_options(tokenizer, DataOptions(data=data, heldout_fraction=0.3))
    flags = ["--tokenizer", str(tokenizer)]
    read = parse_config(TrainPriorConfig, [*flags, "--data", data], prog="s")
    assert read.heldout_fraction == 0.3
    assert parse_config(TrainPriorConfig, flags, prog="s").data == ""


def test_captions_are_those_of_a_cache(root: Path, tmp_path: Path) -> None:
    """Several captions per picture: each epoch has the same one, with and without a cache."""
    folder = tmp_path / "captioned"
    folder.mkdir()
    for i, file in enumerate(sorted((root / "pictures" / "cat").iterdir())):
        (folder / f"{i}.png").write_bytes(file.read_bytes())
        (folder / f"{i}.txt").write_text("".join(f"cat {i}, text {n}\n" for n in range(1 + i % 3)))
    job = EncodeConfig(
        data=str(folder), tokenizer=root / "vq", output_dir=tmp_path / "cache", views="identity"
    )
    encode(job)
    config = config_of(root, "vq", tmp_path / "run", data=str(folder))
    made = open_latents(config, CPU)[1]
    stored = open_latents(replace(config, data="", flip=True, latents=tmp_path / "cache"), CPU)[1]
    assert made.classes == stored.classes == () and made.info.captions == stored.info.captions
    everything = range(len(stored))
    assert made.all_captions(everything) == stored.all_captions(everything)
    keys = [(epoch, index) for epoch in range(5) for index in everything]
    one, two = made.__getitems__(keys), stored.__getitems__(keys)
    assert one.captions == two.captions and one.texts == two.texts
    assert len(set(one.texts or [])) > len(stored)  # over the epochs, all captions are shown
    assert made.first_view([0, 1]).texts == [c[0] for c in made.all_captions([0, 1]) or []]
    for file in folder.glob("*.txt"):
        file.write_text("another text")
    with pytest.raises(SmaltiError, match="or of other captions: choose another output folder"):
        encode(job)


def test_held_out_pictures_without_captions_are_refused_before_training(
    root: Path, tmp_path: Path
) -> None:
    folder, held = tmp_path / "captioned", tmp_path / "held"
    for place in (folder, held):
        shutil.copytree(root / "pictures" / "cat", place)
    for file in folder.glob("*.png"):
        file.with_suffix(".txt").write_text("a cat")
    data = {"data": str(folder), "heldout_data": str(held)}
    config = config_of(root, "kl", tmp_path / "run", condition="text", **data)
    with pytest.raises(SmaltiError, match=r"the held-out pictures of .* have no captions"):
        train(config)
    for file in held.glob("*.png"):
        file.with_suffix(".txt").write_text("a cat " * 50)
    with pytest.raises(SmaltiError, match=r"12 of 12 captions are longer"):
        train(config)


def test_commands_take_heldout_data(root: Path, tmp_path: Path) -> None:
    held = tmp_path / "held"
    for name in ("dog", "emu"):
        (held / name).mkdir(parents=True)
        for i in range(4):
            shutil.copy(root / "pictures" / "dog" / f"{i}.png", held / name)
    job = EncodeConfig(
        data=str(root / "pictures"),
        heldout_data=str(held),
        tokenizer=root / "vq",
        output_dir=tmp_path / "cache",
    )
    with pytest.raises(SmaltiError, match=r"1 classes of .* are not among the 2 .*\"emu\""):
        encode(job)
    assert not list((tmp_path / "cache").glob("[!.]*"))
    shutil.rmtree(held / "emu")
    train_set, heldout = (LatentCache(encode(job) / split) for split in ("train", "heldout"))
    assert len(train_set) == 24 and heldout.labels.tolist() == [1] * 4
    options = read_options(tmp_path / "cache" / "train")
    assert options is not None and options.heldout_data == str(held)

    fly = config_of(root, "vq", tmp_path / "run", heldout_data=str(held))
    _, ours, theirs = open_latents(fly, CPU)
    assert ours.info.dataset_fingerprint == train_set.info.dataset_fingerprint
    assert torch.equal(theirs.first_view(range(4)).stored, heldout.first_view(range(4)).stored)
    config = EvaluateConfig(data=str(root / "pictures"), heldout_data=str(held))
    evaluator = tokenizer_evaluator(config, smalti.Tokenizer.from_pretrained(root / "vq"))
    assert len(evaluator.dataset) == 4 and evaluator.protocol["heldout_data"] == str(held)


def test_pictures_of_a_task_are_made_in_each_step(root: Path, tmp_path: Path) -> None:
    """With the mask of another epoch, a pure function of (epoch, index); the run saves its task."""
    task = {"condition": "class+image", "image_task": "inpainting"}
    config = config_of(root, "kl", tmp_path / "run", **task, max_train_steps=2)
    _, made, heldout = open_latents(config, CPU)

    def given(*keys):
        return made.__getitems__(list(keys)).conditions["image"]

    assert given((0, 1), (0, 2)).shape == (2, 5, 8, 8)
    masks = {tuple(given((epoch, 3))[0, 4].flatten().tolist()) for epoch in range(8)}
    assert len(masks) == 8
    torch.testing.assert_close(given((7, 3)), given((0, 1), (7, 3))[1:], rtol=1e-4, atol=1e-5)
    encode(
        EncodeConfig(
            data=str(root / "pictures"),
            tokenizer=root / "kl",
            output_dir=tmp_path / "cache",
            views="identity",
            image_task="inpainting",
        )
    )
    stored = LatentCache(tmp_path / "cache" / "heldout")
    assert stored.info.conditions == heldout.info.conditions
    ours, theirs = (latents.first_view([0, 1]).conditions["image"] for latents in (heldout, stored))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)  # a cache stores half precision
    pipe = smalti.Pipeline.from_pretrained(train(config))
    assert pipe.prior.config.image_task == "inpainting"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"condition": "image"}, "no pictures beside them: give --image_task super-resolution"),
        ({"image_task": "inpainting"}, "condition is class: add image to --condition"),
        ({"image_task": "painting"}, 'did you mean "inpainting"'),
        ({"image_task": "inpainting", "data": ""}, "image_task was given, but .* from a cache"),
    ],
)
def test_a_task_that_does_not_fit_is_refused(root, tmp_path: Path, changes, message) -> None:
    with pytest.raises(SmaltiError, match=message):
        train(config_of(root, "kl", tmp_path / "run", **{"flip": True, **changes}))
    assert not (tmp_path / "run" / "pipeline").exists()
