"""A classifier of noisy latents from the command line: trained, resumed, used to guide, refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_pictures
from PIL import Image
from runs import assert_same, losses, stop_after
from torchvision.transforms.functional import pil_to_tensor

import smalti
from smalti.cli import main as smalti_main
from smalti.cli import parse_config
from smalti.data.latent_cache.cache import LatentCache
from smalti.data.latents import to_float
from smalti.files import checked_lines
from smalti.prior.flow.classifier import LatentClassifier, LatentClassifierConfig
from smalti.prior.flow.config import FlowConfig
from smalti.prior.flow.dit import DiTConfig
from smalti.prior.flow.path import VPLinearPath
from smalti.prior.flow.times import LogitNormalTimes
from smalti.scripts.encode import EncodeConfig, encode
from smalti.scripts.train_classifier import TrainClassifierConfig, train
from smalti.scripts.train_prior import TrainPriorConfig
from smalti.scripts.train_prior import train as train_prior
from smalti.scripts.train_tokenizer import TrainTokenizerConfig
from smalti.scripts.train_tokenizer import train as train_tokenizer
from smalti.tokenizer.conv import ConvConfig
from smalti.tokenizer.kl import KLConfig
from smalti.tokenizer.losses.objective import ObjectiveConfig

CONV = ConvConfig(
    channels=8, channel_mult=(1, 2, 2), num_res_blocks=1, attention_levels=(), z_channels=4
)
NETWORK = DiTConfig(patch_size=1, depth=1, width=32, num_heads=2)
QUICK = {"mixed_precision": "no", "learning_rate": 3e-3, "logging_steps": 10}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Pictures of three colours, a small KL tokenizer, its latents, and an unconditional flow prior
    of them."""
    root = tmp_path_factory.mktemp("classifier")
    make_pictures(root / "pictures")
    tokenizer = train_tokenizer(
        TrainTokenizerConfig(
            data=str(root / "pictures"),
            tokenizer=KLConfig(image_size=16, conv=CONV),
            objective=ObjectiveConfig(perceptual_weight=0, adversarial_weight=0),
            output_dir=root / "tokenizer",
            max_train_steps=120,
            train_batch_size=8,
            **QUICK,
        )
    )
    encode(
        EncodeConfig(data=str(root / "pictures"), tokenizer=tokenizer, output_dir=root / "latents")
    )
    train_prior(
        TrainPriorConfig(
            latents=root / "latents",
            tokenizer=tokenizer,
            prior=FlowConfig(network=NETWORK, times=LogitNormalTimes()),
            condition="none",
            output_dir=root / "prior",
            max_train_steps=60,
            train_batch_size=16,
            **QUICK,
        )
    )
    return root


def config_of(root: Path) -> TrainClassifierConfig:
    return TrainClassifierConfig(
        output_dir=root / "classifier",
        latents=root / "latents",
        prior=str(root / "prior" / "pipeline"),
        classifier=LatentClassifierConfig(width=32, depth=1, num_heads=2),
        max_train_steps=80,
        train_batch_size=16,
        gradient_accumulation_steps=2,
        validation_steps=40,
        lr_final_ratio=0.0,
        ema_decay=0.9,
        **QUICK,
    )


@pytest.fixture(scope="module")
def trained(root: Path) -> TrainClassifierConfig:
    config = config_of(root)
    train(config)
    return config


def test_a_classifier_learns_the_classes_where_there_is_little_noise(trained) -> None:
    lines = [line for line in losses(trained.output_dir) if "val_loss" in line]
    assert [line["step"] for line in lines] == [40, 80]
    last = lines[-1]
    quarters = [last[f"val_accuracy_q{i}"] for i in range(4)]
    assert quarters[3] >= 0.8 and quarters[3] > quarters[0]
    assert last["val_loss"] < torch.tensor(3.0).log()


def test_the_finished_classifier_knows_its_latents(trained, root: Path) -> None:
    model = LatentClassifier.from_pretrained(root / "classifier" / "classifier")
    latents = LatentCache(root / "latents" / "train")
    assert model.classes == ("blue", "green", "red") and model.spec == latents.spec
    assert model.config.tokenizer_fingerprint == latents.info.tokenizer_fingerprint
    model.check_prior(smalti.Prior.from_pretrained(root / "prior" / "pipeline" / "prior").config)


def test_a_checkpoint_is_a_classifier_too(trained, root: Path) -> None:
    folder = root / "classifier"
    model = LatentClassifier.from_pretrained(folder / "checkpoint-000080")
    assert model.fingerprint == LatentClassifier.from_pretrained(folder / "classifier").fingerprint


def test_it_resumes_bit_exactly(trained, tmp_path: Path) -> None:
    cut = replace(trained, output_dir=tmp_path / "cut", resume_from_checkpoint="latest")
    for step in (7, 31):
        stop_after(cut, step, train)
    train(cut)
    assert_same(trained.output_dir, cut.output_dir)


def test_path_and_times_are_those_of_the_prior(root: Path) -> None:
    flags = ["--prior", str(root / "prior" / "pipeline"), "--classifier.depth", "2"]
    found = parse_config(TrainClassifierConfig, flags, prog="test").classifier
    assert found.times == LogitNormalTimes() and found.depth == 2


def test_without_a_prior_the_path_is_an_option(root: Path, tmp_path: Path) -> None:
    job = ["train-classifier", "--latents", str(root / "latents"), "--max_train_steps", "1"]
    job += ["--tokenizer", str(root / "tokenizer" / "tokenizer"), "--train_batch_size", "4"]
    job += ["--classifier.width", "16", "--classifier.num_heads", "1"]
    job += ["--classifier.path.kind", "vp-linear", "--output_dir", str(tmp_path / "run")]
    assert smalti_main(job) == 0
    model = LatentClassifier.from_pretrained(tmp_path / "run" / "classifier")
    assert model.config.path == VPLinearPath()


def test_guided_pictures_are_recognised_and_unguided_ones_are_not(
    trained, root: Path, tmp_path: Path
) -> None:
    """The classical use: an unconditional prior, led to each class by the classifier."""
    pipeline, model = root / "prior" / "pipeline", root / "classifier" / "classifier"
    common = ["generate", "--model", str(pipeline), "--num_inference_steps", "12"]
    guide = ["--classifier", str(model), "--classifier_scale", "4", "--num_images_per_class", "12"]
    assert smalti_main([*common, *guide, "--output_dir", str(tmp_path / "guided")]) == 0
    assert (
        smalti_main([*common, "--num_images", "36", "--output_dir", str(tmp_path / "plain")]) == 0
    )
    classifier = LatentClassifier.from_pretrained(model)
    tokenizer = smalti.Tokenizer.from_pretrained(pipeline / "tokenizer")
    labels = torch.arange(3).repeat_interleave(12)

    def accuracy(folder: Path) -> float:
        files = sorted(folder.glob("*.png"))
        images = torch.stack([to_float(pil_to_tensor(Image.open(file))) for file in files])
        found = classifier.logits(tokenizer.encode(images), torch.ones(len(files))).argmax(1)
        return (found == labels).float().mean().item()

    entries, _ = checked_lines(tmp_path / "guided" / "manifest.jsonl", "index")
    assert [entry["class"] for entry in entries[::12]] == ["blue", "green", "red"]
    assert accuracy(tmp_path / "guided") > 0.8 and accuracy(tmp_path / "plain") < 0.6


def test_a_scale_without_a_classifier_is_refused(root: Path, tmp_path: Path, capsys) -> None:
    job = ["generate", "--model", str(root / "prior" / "pipeline"), "--classifier_scale", "2"]
    assert smalti_main([*job, "--output_dir", str(tmp_path / "out")]) == 2
    assert "give --classifier, or leave it out" in capsys.readouterr().err
    other = ["--classifier", str(root / "prior" / "pipeline" / "prior")]
    assert smalti_main([*job, *other, "--output_dir", str(tmp_path / "out")]) == 2
    assert '"flow" is a prior, not a classifier' in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prior": ""}, "give --prior, the pipeline to guide, or --tokenizer"),
        (
            {"classifier": LatentClassifierConfig(path=VPLinearPath())},
            "classifier.path is vp-linear, but linear in",
        ),
        ({"latents": Path("nowhere")}, "does not exist"),
    ],
)
def test_what_does_not_fit_is_refused(root: Path, tmp_path: Path, changes, message: str) -> None:
    config = replace(config_of(root), output_dir=tmp_path / "run", **changes)
    with pytest.raises(smalti.SmaltiError, match=message):
        train(config)
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


def test_a_prior_of_another_kind_is_refused(tmp_path: Path, prior) -> None:
    prior.save_pretrained(tmp_path / "prior")
    with pytest.raises(smalti.SmaltiError, match="holds a next-token prior; a classifier guides"):
        parse_config(TrainClassifierConfig, ["--prior", str(tmp_path / "prior")], prog="test")
