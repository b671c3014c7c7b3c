"""What smalti 0.1.0 (commit 75edc13) saved still loads, samples the same, and goes on.

`fixtures/made_by_0_1_0.zip` holds, for each family of priors, a run of each stage with its last
checkpoint, a latent cache and a pipeline; `fixtures/make_0_1_0.py` made it.
"""

import json
import re
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import smalti
from smalti.cli import main, parse_config
from smalti.data.latent_cache.cache import LatentCache
from smalti.scripts.encode import EncodeConfig, encode
from smalti.scripts.train_prior import TrainPriorConfig
from smalti.scripts.train_prior import train as train_prior
from smalti.scripts.train_tokenizer import TrainTokenizerConfig
from smalti.scripts.train_tokenizer import train as train_tokenizer

ARCHIVE = Path(__file__).parent / "fixtures" / "made_by_0_1_0.zip"
FAMILIES = ("next-token", "next-scale", "flow")
# Rounding of another processor; on the machine that made the fixtures all is bitwise equal.
TOLERANCE = {"rtol": 1e-3, "atol": 1e-4}


@pytest.fixture
def old(tmp_path: Path, monkeypatch) -> Path:
    """The folder in which the old code ran; its paths are relative to it."""
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("family", FAMILIES)
def test_an_old_pipeline_samples_the_same_pictures(old: Path, family: str) -> None:
    pipe = smalti.Pipeline.from_pretrained(old / family / "prior_run" / "pipeline")
    expected = load_file(old / family / "expected.safetensors")
    fingerprints = json.loads((old / family / "expected.json").read_text())
    assert pipe.tokenizer.fingerprint == fingerprints["tokenizer_fingerprint"]
    assert pipe.prior.fingerprint == fingerprints["prior_fingerprint"]
    out = pipe(
        class_labels=["round", 1],
        num_images_per_prompt=2,
        guidance_scale=2.0,
        generator=[torch.Generator().manual_seed(i) for i in range(4)],
        output_type="pt",
    )
    torch.testing.assert_close(out.latents, expected["latents"], **TOLERANCE)
    torch.testing.assert_close(out.images, expected["images"], **TOLERANCE)


def test_an_old_pipeline_has_no_hash(old: Path, capsys) -> None:
    assert main(["info", str(old / "flow" / "prior_run" / "pipeline")]) == 0
    assert "no hash: tokenizer and prior belong together" in capsys.readouterr().out


@pytest.mark.parametrize("family", FAMILIES)
def test_an_old_cache_holds_what_its_tokenizer_encodes(old: Path, family: str) -> None:
    cache = LatentCache(old / family / "latents" / "heldout")
    tokenizer = smalti.Tokenizer.from_pretrained(old / family / "tokenizer_run" / "tokenizer")
    assert cache.info.tokenizer_fingerprint == tokenizer.fingerprint
    assert list(cache.classes) == ["round", "square"]
    config = parse_recipe(TrainTokenizerConfig, old / family / "tokenizer_run")
    images = next(iter(config.dataset("heldout", tokenizer.image_size).batches(64))).images
    with torch.no_grad():
        stored = tokenizer.store(images)
    kept = cache.first_view(range(len(cache))).stored
    torch.testing.assert_close(stored.float(), kept.float(), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_old_prior_is_tuned_on_pictures_of_twice_the_size(
    old: Path, family: str, caplog
) -> None:
    """Its tokenizer stays the same one: only the size of the pictures is another."""
    folder, run = old / family / "prior_run" / "pipeline", old / family / "tuned"
    tokenizer = smalti.Tokenizer.from_pretrained(folder / "tokenizer")
    size, recipe = (
        2 * tokenizer.image_size,
        parse_recipe(TrainTokenizerConfig, old / family / "tokenizer_run"),
    )
    encode(
        EncodeConfig(
            data=recipe.data,
            tokenizer=folder / "tokenizer",
            output_dir=old / family / "large",
            image_size=size,
        )
    )
    job = ["--latents", str(old / family / "large"), "--tokenizer", str(folder / "tokenizer")]
    job += ["--initial", str(folder), "--output_dir", str(run), "--max_train_steps", "1"]
    job += ["--train_batch_size", "4", "--preview.guidance_scale", "1"]
    with caplog.at_level("INFO"):
        tuned = smalti.Pipeline.from_pretrained(
            train_prior(parse_config(TrainPriorConfig, job, prog="smalti train-prior"))
        )
    assert re.search(r"this run .*positions are (extended|interpolated) to", caplog.text)
    assert tuned.tokenizer.image_size == size
    assert tuned("round", output_type="pt").images.shape == (1, 3, size, size)
    weights = tuned.tokenizer.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in tokenizer.state_dict().items())


def parse_recipe(config_class: type, run: Path):
    """The settings of a run, from the recipe in its folder."""
    return parse_config(config_class, ["--config", str(run / "config.yaml")], prog="smalti")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stage", ["tokenizer_run", "prior_run"])
def test_an_old_run_goes_on_from_its_checkpoint(old: Path, family: str, stage: str) -> None:
    """Two more steps give the losses that the old code gave."""
    folder = old / family / stage
    config_class = TrainTokenizerConfig if stage == "tokenizer_run" else TrainPriorConfig
    train = train_tokenizer if stage == "tokenizer_run" else train_prior
    config = replace(
        parse_recipe(config_class, folder), max_train_steps=6, resume_from_checkpoint="latest"
    )
    train(config)
    assert (folder / "checkpoint-000006").is_dir()
    expected = read_log(old / family / f"{stage}_at_6.jsonl")
    found = read_log(folder / "metrics.jsonl")
    assert expected.keys() <= found.keys()
    for (step, name), value in expected.items():
        assert found[step, name] == pytest.approx(value, rel=1e-3, abs=1e-4), (step, name)


def read_log(path: Path) -> dict[tuple[int, str], float]:
    """(step, name) -> value."""
    lines = map(json.loads, path.read_text().splitlines())
    return {
        (line["step"], name): value
        for line in lines
        for name, value in line.items()
        if name != "step"
    }


def test_the_old_recipes_are_valid_input(old: Path) -> None:
    for run in sorted(old.glob("*/*_run")):
        content = yaml.safe_load((run / "config.yaml").read_text())
        assert content["max_train_steps"] == 4
