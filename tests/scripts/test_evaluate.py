"""The evaluate command: what counts as a copy, and which folders it may write to."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from smalti.data.image_io import FolderOptions
from smalti.data.latent_cache.cache import LatentCache
from smalti.data.latent_cache.manifest import group_numbers
from smalti.data.latents import CodeSpec, rounded
from smalti.errors import ConfigurationError, DataError, SmaltiError
from smalti.evaluation import evaluator as evaluator_module
from smalti.evaluation.distances import frechet_distance
from smalti.evaluation.evaluator import (
    TokenizerEvaluator,
    evenly_spaced,
    first_of_each,
    reference_rows,
)
from smalti.evaluation.features import AlexNetFeatures
from smalti.evaluation.metrics import table, undefined
from smalti.evaluation.pictures import stored_pictures
from smalti.files import read_hashed_json, write_hashed_json
from smalti.pipelines.pipeline import Pipeline
from smalti.prior.base import Loss
from smalti.prior.next_token.model import NextTokenConfig, NextTokenPrior
from smalti.scripts import demo, train_prior, train_tokenizer
from smalti.scripts.demo import DemoConfig
from smalti.scripts.encode import EncodeConfig, encode
from smalti.scripts.evaluate import (
    EvaluateConfig,
    check_training_images,
    claim,
    evaluate,
    measured,
    sample_evaluator,
    training_images,
)
from smalti.tokenizer.conv import ConvConfig
from smalti.tokenizer.losses.perceptual import LPIPS
from smalti.tokenizer.quantizers.codebook import CodebookConfig
from smalti.tokenizer.quantizers.nearest import NearestConfig
from smalti.tokenizer.vq import VQConfig, VQTokenizer

CONV = ConvConfig(
    channels=8, channel_mult=(1, 2, 2), num_res_blocks=1, attention_levels=(), z_channels=8
)


@pytest.fixture
def pipeline() -> Pipeline:
    book = NearestConfig(codebook=CodebookConfig(32, 4))
    tokenizer = VQTokenizer(VQConfig(image_size=32, conv=CONV, quantizer=book))
    prior = NextTokenPrior(
        NextTokenConfig(
            spec=CodeSpec(32, ((8, 8),)), num_classes=3, depth=1, width=16, num_heads=2, hidden=32
        )
    )
    return Pipeline(tokenizer, prior, ("blue", "green", "red"))


@pytest.fixture
def config(pipeline: Pipeline, pictures: Path, tmp_path: Path) -> EvaluateConfig:
    model = pipeline.save_pretrained(tmp_path / "pipe")
    return EvaluateConfig(
        model=str(model),
        data=str(pictures),
        output_dir=tmp_path / "out",
        num_samples=16,
        classifier_epochs=1,
    )


def test_a_memoriser_is_caught_and_noise_is_not(config, pipeline, tmp_path: Path) -> None:
    """The samples of a prior that memorised the training set are reconstructions of it."""
    evaluator = sample_evaluator(config, pipeline)
    _, memorised = evaluator.tokenizer.reconstruct(evaluator.train)

    def share(samples: torch.Tensor) -> float:
        sets = evaluator.sets(samples, evaluator.train_labels)
        metrics = evaluator.neighbours(sets, {}, tmp_path / "n.png")
        return metrics["share_of_near_copies"].value

    assert share(memorised) == 1.0
    assert share(torch.rand_like(memorised) * 2 - 1) == 0.0


def test_the_same_evaluation_may_run_again_but_no_other(config, tmp_path: Path) -> None:
    first = evaluate(config)
    before = {p.name: p.read_bytes() for p in config.output_dir.iterdir()}
    assert evaluate(config) == first
    assert {p.name: p.read_bytes() for p in config.output_dir.iterdir()} == before
    with pytest.raises(ConfigurationError, match="its num_samples differs"):
        evaluate(replace(config, num_samples=17))
    assert {p.name: p.read_bytes() for p in config.output_dir.iterdir()} == before


def test_a_part_of_the_held_out_set_is_even_over_classes_in_every_measurement(
    config, pipeline, pictures: Path, monkeypatch
) -> None:
    """Pictures are sorted by class; each measurement sees 3 of the 9 held-out ones."""
    monkeypatch.setattr(evaluator_module, "LIKELIHOOD_IMAGES", 3)
    config = replace(config, heldout_fraction=0.35)
    labels = []

    def bits(latents, condition, *, generator):
        labels.append(condition.tolist())
        return torch.zeros(len(latents))

    metric = sample_evaluator(config, pipeline).likelihood(bits)["heldout_bits_per_dimension"]
    assert labels == [[0, 1, 2]] and metric.protocol["num_pictures"] == 3

    monkeypatch.setattr(train_tokenizer, "VALIDATION_IMAGES", 3)
    monkeypatch.setattr(train_tokenizer, "PREVIEW_IMAGES", 6)
    images, seen = config.dataset("heldout", 32), []
    kept = images.batches_of
    monkeypatch.setattr(images, "batches_of", lambda rows, n: seen.append(rows) or kept(rows, n))
    run = SimpleNamespace(device=torch.device("cpu"), config=config)
    train_tokenizer.validate(pipeline.tokenizer, images, run)
    train_tokenizer.preview(pipeline.tokenizer, images, run)
    assert [images.labels[rows].tolist() for rows in seen] == [[0, 1, 2], [0, 0, 1, 1, 2, 2]]

    config = EncodeConfig(
        data=str(pictures), heldout_fraction=0.35, output_dir=config.output_dir / "latents"
    )
    config = replace(config, tokenizer=pipeline.tokenizer.save_pretrained(config.output_dir / "t"))
    cache = LatentCache(encode(replace(config, output_dir=config.output_dir / "c")) / "heldout")
    monkeypatch.setattr(train_prior, "VALIDATION_SAMPLES", 3)
    run = SimpleNamespace(accelerator=Accelerator(), config=EvaluateConfig())
    seen.clear()

    def loss_of(prior, batch):
        seen.append(batch.labels.tolist())
        return Loss(torch.tensor(1.0))

    train_prior.validate(pipeline.prior, cache, loss_of, run)
    assert seen == [[0, 1, 2]]


def test_a_cache_keeps_the_groups_of_held_out_pictures(
    pipeline, pictures: Path, tmp_path: Path
) -> None:
    """Equal files are a group: one of them is taken before another picture is taken twice."""
    for number in range(20):
        shutil.copy(pictures / "red" / "0.png", pictures / "red" / f"copy {number}.png")
    config = EncodeConfig(
        data=str(pictures),
        heldout_fraction=0.6,
        output_dir=tmp_path / "latents",
        tokenizer=pipeline.tokenizer.save_pretrained(tmp_path / "tokenizer"),
    )
    for seed in range(20):  # a seed that holds out the copies
        config = replace(config, split_seed=seed)
        images = config.dataset("heldout", 32)
        if len(images) > 20:
            break
    cache = LatentCache(encode(config) / "heldout")
    assert group_numbers(images.groups) == cache.info.groups != ()
    chosen = images.even_subset(9, seed=0)
    assert chosen == cache.even_subset(9, seed=0)
    assert len({images.groups[i] for i in chosen}) == 9


@pytest.mark.parametrize("name", ["samples.png", "summary.json"])
def test_files_from_elsewhere_are_not_overwritten(config, name: str) -> None:
    config.output_dir.mkdir()
    (config.output_dir / name).write_text("precious")
    with pytest.raises(ConfigurationError, match=f"already holds a {name}"):
        evaluate(config)
    assert (config.output_dir / name).read_text() == "precious"


def test_every_metric_names_its_pictures(config) -> None:
    evaluate(config)
    summary = json.loads((config.output_dir / "summary.json").read_text())
    prints = {m["protocol"]["heldout_fingerprint"] for m in summary["metrics"].values()}
    assert len(prints) == 1 and len(prints.pop()) == 64


def test_what_was_trained_on_is_not_held_out(config, pipeline) -> None:
    pipeline.training_pictures = config.dataset("train", 32).fingerprint
    pipeline.save_pretrained(config.model)
    metrics = evaluate(config)
    assert {m.protocol["trained_on_the_rest"] for m in metrics.values()} == {"yes"}
    other = replace(config, split_seed=1, output_dir=config.output_dir / "other")
    with pytest.raises(DataError, match="it may have learned"):
        evaluate(other)
    metrics = evaluate(replace(other, other_data=True))
    assert {m.protocol["trained_on_the_rest"] for m in metrics.values()} == {"no"}


def test_classes_in_another_unicode_form_keep_the_numbers_of_the_pipeline(
    config, pipeline, pictures: Path
) -> None:
    """A copied folder may have other forms of its names, which are sorted differently."""
    composed, decomposed = "\u00e9clair", "e\u0301clair"
    pipeline.classes = ("f", "z", composed)
    for folder, name in (("blue", decomposed), ("green", "f"), ("red", "z")):
        (pictures / folder).rename(pictures / name)
    images = config.dataset("train", 32)
    assert images.classes == (decomposed, "f", "z")
    before = images.labels.tolist()
    assert check_training_images(config, pipeline, images) == "not known"
    assert images.classes == pipeline.classes
    assert images.labels.tolist() == [[2, 0, 1][label] for label in before]
    evaluator = sample_evaluator(config, pipeline)
    for labels in (evaluator.train_labels, evaluator.tokenizer.heldout_labels):
        assert labels[0] == 2 and labels[-1] == 1
    pipeline.classes = ("f", "z", "\u00e8clair")
    with pytest.raises(DataError, match="give --data as in training"):
        sample_evaluator(config, pipeline)


def test_few_references_are_spread_over_the_set(config) -> None:
    assert evenly_spaced(3, 11).tolist() == [0, 5, 10]
    dataset = config.dataset("train", 32)
    rows = reference_rows(dataset, 5)
    labels = dataset.labels[rows].tolist()
    assert len(labels) == 5 and labels == sorted(labels) and set(labels) == {0, 1, 2}
    assert torch.equal(stored_pictures(dataset, rows)[:], dataset.all_images()[rows])
    assert reference_rows(dataset, 1000) is None
    assert torch.equal(stored_pictures(dataset)[:], dataset.all_images())


def test_the_first_of_each_class_are_shown() -> None:
    labels = torch.tensor([2, 0, 2, 1, 2, 0])
    assert first_of_each(labels, 2).tolist() == [1, 5, 3, 0, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_samples": 2}, "num_samples is 2; it must be at least 16"),
        ({"num_references": 2}, "num_references is 2; it must be at least 16"),
        ({"classifier_epochs": 0}, "must be at least 1"),
    ],
)
def test_impossible_evaluations_are_refused(config, changes, message: str) -> None:
    with pytest.raises(SmaltiError, match=message):
        replace(config, **changes)


def test_a_pipeline_is_not_compared_with_other_classes(config, pipeline) -> None:
    pipeline.classes = ("blue", "green", "yellow")
    pipeline.save_pretrained(config.model)
    with pytest.raises(DataError, match="was trained on blue, green, yellow: give --data"):
        evaluate(config)


def test_one_held_out_image_is_not_enough(config, pipeline) -> None:
    heldout = config.dataset("heldout", 32)
    heldout.positions = heldout.positions[:1]
    with pytest.raises(DataError, match="is 1; evaluation needs at least 2: raise --heldout_frac"):
        TokenizerEvaluator(
            pipeline.tokenizer, heldout, {}, device=torch.device("cpu"), batch_size=8
        )


def test_a_prior_without_a_likelihood_is_evaluated(config, monkeypatch) -> None:
    monkeypatch.setattr(NextTokenPrior, "has_likelihood", False)
    found = measured(config)
    assert undefined(found) == {"heldout_bits_per_dimension": "the prior has no likelihood"}
    assert "fd_alexnet" in found


def test_reconstructions_of_a_tokenizer_have_a_frechet_distance(config, pipeline) -> None:
    model, default = f"{config.model}/tokenizer", EvaluateConfig()
    config = replace(config, model=model, num_samples=default.num_samples, classifier_epochs=12)
    metrics = evaluate(config)
    assert {"psnr", "lpips", "rfd_alexnet", "codebook_usage"} <= metrics.keys()
    images = config.dataset("heldout", 32).all_images()
    extractor = AlexNetFeatures(LPIPS.from_embedded())
    with torch.no_grad():
        decoded = pipeline.tokenizer.eval().reconstruct(images)
    expected = frechet_distance(extractor(images), extractor(rounded(decoded)))
    assert metrics["rfd_alexnet"].value == pytest.approx(expected, rel=1e-3)
    assert metrics["rfd_alexnet"].protocol["pictures"] == len(images)


def test_one_class_has_no_accuracy(config, pipeline, pictures: Path) -> None:
    for name in ("blue", "green"):
        shutil.rmtree(pictures / name)
    prior = NextTokenPrior(replace(pipeline.prior.config, num_classes=1))
    Pipeline(pipeline.tokenizer, prior, ("red",)).save_pretrained(config.model)
    config = replace(config, folder=FolderOptions(single_class=True), heldout_fraction=0.4)
    found = measured(config)
    names = [f"classifier_accuracy_{name}" for name in ("heldout", "samples", "ratio")]
    assert undefined(found) == dict.fromkeys(names, "there is one class")
    summary = read_hashed_json(config.output_dir / "summary.json")
    assert summary["undefined"] == undefined(found)
    assert not set(names) & summary["metrics"].keys()
    line = next(x for x in table(found).splitlines() if x.startswith(names[2]))
    assert line.split(None, 1)[1] == "not defined: there is one class"


@pytest.mark.parametrize("option", ["shards", "split_seed"])
@pytest.mark.parametrize(
    ("mark", "name"),
    [
        (lambda folder: claim(EvaluateConfig(output_dir=folder)), "evaluation.json"),
        (lambda folder: demo._claim(DemoConfig(output_dir=folder)), "demo.json"),
    ],
)
def test_options_that_an_earlier_version_did_not_store_had_their_defaults(
    tmp_path: Path, mark, name: str, option: str
) -> None:
    mark(tmp_path)
    (tmp_path / "tokenizer").mkdir()  # of a demo that has begun
    stored = read_hashed_json(tmp_path / name)
    del stored[option]
    write_hashed_json(tmp_path / name, stored)
    mark(tmp_path)
    write_hashed_json(tmp_path / name, {**stored, option: "another"})
    with pytest.raises(ConfigurationError, match=rf"{option}.*choose another --output_dir"):
        mark(tmp_path)


def test_other_held_out_pictures_may_be_given_to_a_pipeline_that_held_out_a_part(
    config, pipeline, tmp_path: Path
) -> None:
    """Its samples are then compared with what it was trained on, not with all of --data."""
    held = tmp_path / "held"
    for number, name in enumerate(config.dataset("train", 32).classes):
        (held / name).mkdir(parents=True)
        Image.new("RGB", (32, 32), (number, 9, 9)).save(held / name / "0.png")
    apart = config.dataset("train", 32)
    pipeline.training_pictures = apart.fingerprint
    other = replace(config, heldout_data=str(held))
    assert other.dataset("train", 32).fingerprint != apart.fingerprint  # all of --data
    found = training_images(other, pipeline)
    assert found.fingerprint == apart.fingerprint
    assert check_training_images(other, pipeline, found) == "yes"
    pipeline.training_pictures = other.dataset("train", 32).fingerprint  # with --heldout_data
    assert len(training_images(other, pipeline)) > len(apart)
