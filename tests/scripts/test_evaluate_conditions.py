"""smalti evaluate of pipelines of captions and of unconditional ones."""

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from smalti.data.latents import CodeSpec
from smalti.errors import SmaltiError
from smalti.evaluation.metrics import undefined
from smalti.evaluation.retrieval import RETRIEVAL_METRICS
from smalti.files import read_hashed_json
from smalti.pipelines.pipeline import Pipeline
from smalti.prior.conditions.text import TextConfig
from smalti.prior.next_token.model import NextTokenConfig, NextTokenPrior
from smalti.scripts.evaluate import (
    EvaluateConfig,
    evaluate,
    heldout_condition,
    measured,
    sample_evaluator,
)
from smalti.tokenizer.conv import ConvConfig
from smalti.tokenizer.quantizers.codebook import CodebookConfig
from smalti.tokenizer.quantizers.nearest import NearestConfig
from smalti.tokenizer.vq import VQConfig, VQTokenizer

CONV = ConvConfig(
    channels=8, channel_mult=(1, 2, 2), num_res_blocks=1, attention_levels=(), z_channels=8
)
SPEC = CodeSpec(32, ((8, 8),))
TINY = NextTokenConfig(spec=SPEC, depth=1, width=16, num_heads=2, hidden=32)
TEXT = TextConfig(24, 16, "bytes")
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "black": (0, 0, 0)}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """40 pictures in two folders, each with a text file beside it."""
    root = tmp_path_factory.mktemp("data")
    for i in range(40):
        colour = list(COLOURS)[i % 4]
        folder = root / ("even" if i % 2 == 0 else "odd")
        folder.mkdir(exist_ok=True)
        values = tuple(min(255, value + i) for value in COLOURS[colour])
        Image.new("RGB", (32, 32), values).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a {colour} square")
    return root


def config(kind: str, data: Path, folder: Path) -> EvaluateConfig:
    torch.manual_seed(0)
    book = NearestConfig(codebook=CodebookConfig(32, 4))
    tokenizer = VQTokenizer(VQConfig(image_size=32, conv=CONV, quantizer=book))
    prior = NextTokenPrior(TINY.conditioned(kind, TEXT if kind == "text" else None))
    model = Pipeline(tokenizer, prior, ()).save_pretrained(folder / "pipe")
    return EvaluateConfig(
        model=str(model),
        data=str(data),
        output_dir=folder / "out",
        heldout_fraction=0.3,
        num_samples=16,
        classifier_epochs=1,
    )


def test_samples_of_captions_are_scored_by_retrieval(data: Path, tmp_path: Path) -> None:
    settings = config("text", data, tmp_path)
    metrics = evaluate(settings)
    names = [f"retrieval_accuracy_{name}" for name in ("samples", "heldout", "shuffled")]
    assert set(names) <= metrics.keys() and not any("classifier" in name for name in metrics)
    assert all(0 <= metrics[name].value <= 1 for name in names)
    record = metrics[names[0]].protocol
    assert record["pictures"] == 16 and record["training"]["epochs"] == 1
    assert record["sampling"]["prompts"].startswith("first captions of held-out pictures")
    assert record["candidates"] <= 4 and record["data"] == str(data)
    saved = read_hashed_json(tmp_path / "out" / "summary.json")["metrics"]
    assert saved[names[1]]["value"] == metrics[names[1]].value
    assert metrics["heldout_bits_per_dimension"].value == pytest.approx(5.0)  # log2 32, untrained
    assert (tmp_path / "out" / "samples.png").is_file()


def test_the_likelihood_is_that_of_the_captions_of_the_pictures(data, tmp_path: Path) -> None:
    settings = config("text", data, tmp_path)
    pipeline = Pipeline.from_pretrained(settings.model)
    evaluator = sample_evaluator(settings, pipeline)
    heldout = evaluator.tokenizer.dataset
    found = heldout_condition(pipeline, evaluator, [3, 0])
    encoder = pipeline.text_encoder
    assert encoder is not None
    expected = encoder.encode([heldout.captions(3)[0], heldout.captions(0)[0]], TEXT.length)
    assert torch.equal(found.features, expected.features)


def test_an_unconditional_pipeline_is_measured_without_classes(data: Path, tmp_path: Path) -> None:
    metrics = evaluate(config("none", data, tmp_path))
    assert {"fd_alexnet", "share_of_near_copies", "heldout_bits_per_dimension"} <= metrics.keys()
    assert not any("classifier" in name or "retrieval" in name for name in metrics)


def test_captions_are_needed(data: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    for path in data.rglob("*.png"):
        Image.open(path).save(tmp_path / "plain" / path.name)
    with pytest.raises(SmaltiError, match="captions"):
        evaluate(config("text", tmp_path / "plain", tmp_path))


def test_one_caption_cannot_be_retrieved(data: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(data, root)
    for path in root.rglob("*.txt"):
        path.write_text("a square")
    found = measured(config("text", root, tmp_path))
    assert undefined(found).keys() == set(RETRIEVAL_METRICS)
    assert "have one caption" in undefined(found)["retrieval_accuracy_samples"]
