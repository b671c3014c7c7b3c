"""A quantizer, a tokenizer and a prior of one's own are one class and one registration line each.

`extension.py` defines and registers them. Every command runs on them in a process of its own, as
the commands of a person who imports that file.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXTENSION = Path(__file__).parent / "extension.py"
QUICK = ["--train_batch_size=8", "--validation_steps=100", "--mixed_precision=no"]
QUICK += ["--max_train_steps=4", "--logging_steps=1"]
NO_NETWORKS = ["--objective.perceptual_weight=0", "--objective.adversarial_weight=0"]


def smalti(*arguments: object) -> str:
    """What the command prints, with the extension registered."""
    done = subprocess.run(
        [sys.executable, str(EXTENSION), *map(str, arguments)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def coded(pictures_once: Path, tmp_path_factory) -> Path:
    """A pipeline of a VQ tokenizer with the new quantizer, and the new prior."""
    root = tmp_path_factory.mktemp("coded")
    conv = ["--tokenizer.conv.channels=8", "--tokenizer.conv.z_channels=8"]
    kind = ["--tokenizer.kind=vq", "--tokenizer.quantizer.kind=sign"]
    data = ["--data", pictures_once]
    smalti(
        *("train-tokenizer", *data, *QUICK, *NO_NETWORKS, *kind, *conv),
        *("--tokenizer.image_size=32", "--output_dir", root / "tok"),
    )
    smalti("encode", *data, "--tokenizer", root / "tok/tokenizer", "--output_dir", root / "lat")
    smalti(
        *("train-prior", *QUICK, "--prior.preset=histogram", "--latents", root / "lat"),
        *("--tokenizer", root / "tok/tokenizer", "--output_dir", root / "prior"),
    )
    return root


@pytest.mark.slow
def test_a_new_quantizer_and_prior_train_save_load_and_sample(coded: Path, tmp_path: Path) -> None:
    saved = json.loads((coded / "prior/pipeline/prior/config.json").read_text())
    assert saved["type"] == "histogram"
    saved = json.loads((coded / "prior/pipeline/tokenizer/config.json").read_text())
    assert saved["quantizer"] == {"type": "sign", "bits": 4}
    smalti(
        *("generate", "--model", coded / "prior/pipeline", "--num_images_per_class=2"),
        *("--sharpness=3.0", "--output_dir", tmp_path / "out"),
    )
    assert len(list((tmp_path / "out").glob("*.png"))) == 6
    assert "HistogramPrior" in smalti("info", coded / "prior/pipeline")


@pytest.mark.slow
def test_a_new_prior_is_evaluated_without_a_likelihood(
    coded: Path, pictures_once: Path, tmp_path: Path
) -> None:
    smalti(
        *("evaluate", "--data", pictures_once, "--model", coded / "prior/pipeline"),
        *("--num_samples=16", "--classifier_epochs=1", "--output_dir", tmp_path / "measured"),
    )
    summary = json.loads((tmp_path / "measured/summary.json").read_text())
    assert "psnr" in json.dumps(summary) and "fd_alexnet" in json.dumps(summary)
    assert "heldout_bits_per_dimension" not in summary["metrics"]
    assert "the prior has no likelihood" in json.dumps(summary)


@pytest.mark.slow
def test_a_new_continuous_tokenizer_takes_a_flow_prior(pictures_once: Path, tmp_path: Path) -> None:
    """The demo trains it, encodes plain latents, fits a flow prior, samples and measures."""
    smalti(
        *("demo", "--quick", "--data", pictures_once, "--tokenizer=patch-tiny"),
        *("--tokenizer_steps=3", "--prior_steps=3", "--output_dir", tmp_path / "demo"),
    )
    assert (tmp_path / "demo/samples.png").is_file()
    saved = json.loads((tmp_path / "demo/pipeline/tokenizer/config.json").read_text())
    assert saved["type"] == "patch"


@pytest.mark.slow
def test_a_new_prior_is_demonstrated(pictures_once: Path, tmp_path: Path) -> None:
    smalti(
        *("demo", "--quick", "--data", pictures_once, "--prior=histogram"),
        *("--tokenizer_steps=3", "--prior_steps=3", "--output_dir", tmp_path / "demo"),
    )
    saved = json.loads((tmp_path / "demo/pipeline/prior/config.json").read_text())
    assert saved["type"] == "histogram"


def test_help_lists_what_is_registered() -> None:
    text = re.sub(r"[\s│]+", " ", smalti("generate", "--help"))
    assert "--sharpness" in text and "histogram: logits are multiplied by it" in text
    text = re.sub(r"[\s│]+", "", smalti("train-prior", "--help"))
    assert "--prior.kind{next-token,next-scale,flow,histogram}" in text


def test_every_kind_of_path_is_listed() -> None:
    done = smalti("train-prior", "--prior.kind=flow", "--help")
    listed = re.search(r"--prior\.path\.kind\s*\{([^}]*)\}", re.sub(r"[\s│]+", "", done))
    assert listed and {"linear", "ve"} <= set(listed[1].split(","))
