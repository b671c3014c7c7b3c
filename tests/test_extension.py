"""A quantizer, a tokenizer and a prior of one's own are one class and one registration line each.

`extension.py` defines and registers them. The commands run on them in a process of its own, which
imports that file before them, as the commands of a person who has written it.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

QUICK = ["--train_batch_size=8", "--validation_steps=100", "--mixed_precision=no"]
QUICK += ["--max_train_steps=4", "--logging_steps=1"]
NO_NETWORKS = ["--objective.perceptual_weight=0", "--objective.adversarial_weight=0"]
# Runs the commands of a list up to the first that fails; a line END ends what each prints.
ALL = """
import json, sys
import extension, pytest
from runs import small_demo
from smalti.cli import main

small_demo(pytest.MonkeyPatch())
for command in json.loads(sys.argv[1]):
    try:
        status = main(command)
    except SystemExit as end:
        status = end.code
    print("END", flush=True)
    if status:
        sys.exit(status)
"""


def smalti(commands: dict[str, list[object]]) -> dict[str, str]:
    """What each command prints, with the extension registered."""
    listed = json.dumps([[str(word) for word in words] for words in commands.values()])
    done = subprocess.run(
        [sys.executable, "-c", ALL, listed],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(zip(commands, done.stdout.split("END\n"), strict=False))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("extension")


@pytest.fixture(scope="module")
def printed(pictures_once: Path, root: Path) -> dict[str, str]:
    """Stages with the new quantizer and prior; demos of the new tokenizer and prior; help."""
    conv = ["--tokenizer.conv.channels=8", "--tokenizer.conv.z_channels=8"]
    kind = ["--tokenizer.kind=vq", "--tokenizer.quantizer.kind=sign"]
    data = ["--data", pictures_once]
    tokenizer, pipe = root / "tok/tokenizer", root / "prior/pipeline"
    few = ["--tokenizer_steps=3", "--prior_steps=3"]
    return smalti(
        {
            "train-tokenizer": [
                *("train-tokenizer", *data, *QUICK, *NO_NETWORKS, *kind, *conv),
                *("--tokenizer.image_size=32", "--output_dir", root / "tok"),
            ],
            "encode": [
                *("encode", *data, "--tokenizer", tokenizer, "--output_dir", root / "lat"),
            ],
            "train-prior": [
                *("train-prior", *QUICK, "--prior.preset=histogram", "--latents", root / "lat"),
                *("--tokenizer", tokenizer, "--output_dir", root / "prior"),
            ],
            "generate": [
                *("generate", "--model", pipe, "--num_images_per_class=2"),
                *("--sharpness=3.0", "--output_dir", root / "out"),
            ],
            "info": ["info", pipe],
            "evaluate": [
                *("evaluate", *data, "--model", pipe, "--num_samples=16"),
                *("--classifier_epochs=1", "--output_dir", root / "measured"),
            ],
            "demo of a tokenizer": [
                *("demo", "--quick", *data, "--tokenizer=patch-tiny", *few),
                *("--output_dir", root / "demo-tokenizer"),
            ],
            "demo of a prior": [
                *("demo", "--quick", *data, "--prior=histogram", *few),
                *("--output_dir", root / "demo-prior"),
            ],
            "generate --help": ["generate", "--help"],
            "train-prior --help": ["train-prior", "--help"],
            "train-prior of a flow --help": ["train-prior", "--prior.kind=flow", "--help"],
        }
    )


@pytest.mark.slow
def test_a_new_quantizer_and_prior_train_save_load_and_sample(printed, root: Path) -> None:
    saved = json.loads((root / "prior/pipeline/prior/config.json").read_text())
    assert saved["type"] == "histogram"
    saved = json.loads((root / "prior/pipeline/tokenizer/config.json").read_text())
    assert saved["quantizer"] == {"type": "sign", "bits": 4}
    assert len(list((root / "out").glob("*.png"))) == 6
    assert "HistogramPrior" in printed["info"]


@pytest.mark.slow
def test_a_new_prior_is_evaluated_without_a_likelihood(printed, root: Path) -> None:
    summary = json.loads((root / "measured/summary.json").read_text())
    assert "psnr" in json.dumps(summary) and "fd_alexnet" in json.dumps(summary)
    assert "heldout_bits_per_dimension" not in summary["metrics"]
    assert "the prior has no likelihood" in json.dumps(summary)


@pytest.mark.slow
def test_a_new_continuous_tokenizer_takes_a_flow_prior(printed, root: Path) -> None:
    """The demo trains it, encodes plain latents, fits a flow prior, samples and measures."""
    assert (root / "demo-tokenizer/samples.png").is_file()
    assert (root / "demo-tokenizer/summary.json").is_file()
    saved = json.loads((root / "demo-tokenizer/pipeline/tokenizer/config.json").read_text())
    assert saved["type"] == "patch"


@pytest.mark.slow
def test_a_new_prior_is_demonstrated(printed, root: Path) -> None:
    saved = json.loads((root / "demo-prior/pipeline/prior/config.json").read_text())
    assert saved["type"] == "histogram"


@pytest.mark.slow
def test_help_lists_what_is_registered(printed) -> None:
    text = re.sub(r"[\s│]+", " ", printed["generate --help"])
    assert "--sharpness" in text and "histogram: logits are multiplied by it" in text
    text = re.sub(r"[\s│]+", "", printed["train-prior --help"])
    assert "--prior.kind{next-token,next-scale,flow,histogram}" in text


@pytest.mark.slow
def test_every_kind_of_path_is_listed(printed) -> None:
    text = re.sub(r"[\s│]+", "", printed["train-prior of a flow --help"])
    listed = re.search(r"--prior\.path\.kind\s*\{([^}]*)\}", text)
    assert listed and {"linear", "ve"} <= set(listed[1].split(","))
