"""`train-prior --condition`: none, text and class+text with every kind of prior, from pictures with
captions to new pictures."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import smalti
from smalti.cli import main as smalti_main
from smalti.files import checked_lines
from smalti.tokenizer.conv import ConvConfig
from smalti.tokenizer.kl import KLConfig, KLTokenizer
from smalti.tokenizer.quantizers.codebook import CodebookConfig
from smalti.tokenizer.quantizers.multi_scale import MultiScaleConfig
from smalti.tokenizer.quantizers.nearest import NearestConfig
from smalti.tokenizer.vq import VQConfig, VQTokenizer

CONV = ConvConfig(
    channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(), z_channels=4
)
CODES = CodebookConfig(16, 4)
TOKENIZERS = {
    "next-token": VQTokenizer(
        VQConfig(image_size=16, conv=CONV, quantizer=NearestConfig(codebook=CODES))
    ),
    "next-scale": VQTokenizer(
        VQConfig(
            image_size=16,
            conv=CONV,
            quantizer=MultiScaleConfig(codebook=CODES, scales=((1, 1), (8, 8)), convolutions=1),
        )
    ),
    "flow": KLTokenizer(
        KLConfig(image_size=16, conv=CONV, latent_mean=(0.0,) * 4, latent_std=(1.0,) * 4)
    ),
}
SIZES = {
    "next-token": ["depth=1", "width=16", "num-heads=2", "hidden=32"],
    "next-scale": ["depth=1", "width=16", "num-heads=2"],
    "flow": ["network.depth=1", "network.width=16", "network.num-heads=2"],
}
PRESETS = {"next-token": "gpt-nano", "next-scale": "var-nano", "flow": "flow-nano"}
SAMPLING = {"flow": ["--num_inference_steps", "2"]}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Two classes of noise, with captions in metadata.jsonl: of some pictures several."""
    root, generator = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / name).mkdir()
        rows = []
        for i in range(12):
            pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
            texts = [f"a {name}", f"{name} number {i}"][: 1 + i % 2]
            rows.append(json.dumps({"file_name": f"{i}.png", "text": texts}))
        (root / name / "metadata.jsonl").write_text("\n".join(rows))
    return root


@pytest.fixture(scope="module")
def flat(tmp_path_factory) -> Path:
    """The same kind of pictures, without classes and captions."""
    root, generator = tmp_path_factory.mktemp("flat"), np.random.default_rng(1)
    for i in range(16):
        pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{i}.png")
    return root


@pytest.fixture(scope="module", params=list(TOKENIZERS))
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def made(kind: str, pictures: Path, flat: Path, tmp_path_factory) -> Path:
    """A tokenizer, and the latents of both sets."""
    root = tmp_path_factory.mktemp(kind)
    torch.manual_seed(0)
    TOKENIZERS[kind].save_pretrained(root / "tokenizer")
    for name, data in (("latents", pictures), ("flat", flat)):
        where = ["--tokenizer", str(root / "tokenizer"), "--data", str(data)]
        assert smalti_main(["encode", *where, "--output_dir", str(root / name)]) == 0
    return root


def train(made: Path, kind: str, out: Path, *more: str, latents: str = "latents") -> int:
    where = ["--latents", str(made / latents), "--tokenizer", str(made / "tokenizer")]
    sizes = [part for size in SIZES[kind] for part in f"--prior.{size}".split("=")]
    steps = ["--max_train_steps", "2", "--train_batch_size", "4", "--mixed_precision", "no"]
    steps += ["--output_dir", str(out), "--prior.preset", PRESETS[kind]]
    preview = [
        f"--preview.{flag[2:]}" if flag[:2] == "--" else flag for flag in SAMPLING.get(kind, [])
    ]
    return smalti_main(["train-prior", *where, *sizes, *steps, *preview, *more])


def generate(kind: str, out: Path, *more: str) -> list[dict]:
    where = ["--model", str(out / "pipeline"), "--output_dir", str(out / "new")]
    assert smalti_main(["generate", *where, *SAMPLING.get(kind, []), *more]) == 0
    return checked_lines(out / "new" / "manifest.jsonl", "index")[0]


@pytest.mark.parametrize("latents", ["latents", "flat"])
def test_an_unconditional_prior(made, kind, tmp_path, latents: str) -> None:
    """Labels are ignored where it is asked for; without labels it is the default."""
    asked = ["--condition", "none"] if latents == "latents" else []
    assert train(made, kind, tmp_path, *asked, latents=latents) == 0
    pipe = smalti.Pipeline.from_pretrained(tmp_path / "pipeline")
    assert pipe.prior.config.condition == "none" and pipe.classes == ()
    assert pipe.prior.num_classes == 0 and pipe.guidance_scale == 1.0
    pictures = generate(kind, tmp_path, "--num_images", "3")
    assert [sorted(entry) for entry in pictures] == [["file", "index", "seed", "sha256"]] * 3


def test_a_prior_of_captions(made, kind, tmp_path) -> None:
    """It resumes bit for bit, and continues as a run of its own."""
    text = ["--condition", "text", "--text.length", "24", "--text.dim", "16"]
    assert train(made, kind, tmp_path / "a", *text) == 0
    pipe = smalti.Pipeline.from_pretrained(tmp_path / "a" / "pipeline")
    assert pipe.prior.config.conditions == ("text",) and pipe.classes == ()
    assert pipe.guidance_scale == 2.0
    pictures = generate(kind, tmp_path / "a", "--prompt", "a cat", "a dog")
    assert [entry["prompt"] for entry in pictures] == ["a cat", "a dog"]
    more = ["--max_train_steps", "3", "--initial", str(tmp_path / "a" / "pipeline")]
    where = ["--latents", str(made / "latents"), "--tokenizer", str(made / "tokenizer")]
    again = ["--output_dir", str(tmp_path / "b"), "--train_batch_size", "4"]
    assert smalti_main(["train-prior", *where, *again, *more]) == 0
    tuned = smalti.Pipeline.from_pretrained(tmp_path / "b" / "pipeline")
    assert tuned.prior.config == pipe.prior.config


def test_a_prior_of_classes_and_captions(made, kind, tmp_path) -> None:
    text = ["--condition", "class+text", "--text.length", "24", "--text.dim", "16"]
    assert train(made, kind, tmp_path, *text) == 0
    pipe = smalti.Pipeline.from_pretrained(tmp_path / "pipeline")
    assert pipe.classes == ("cat", "dog")
    output = pipe(class_labels=["cat", "dog"], prompt="asleep", num_images_per_prompt=2)
    assert output.names == ["cat", "cat", "dog", "dog"] and output.prompts == ["asleep"] * 4
    pictures = generate(kind, tmp_path, "--prompt", "asleep", "--class_labels", "dog")
    assert [(entry["class"], entry["prompt"]) for entry in pictures] == [("dog", "asleep")]


def test_a_condition_that_the_data_does_not_have_is_refused(made, kind, tmp_path, capsys) -> None:
    for condition, latents, message in (
        ("class", "flat", "have no classes: give --condition none"),
        ("text", "flat", "captions"),
        ("sound", "latents", 'condition is "sound"'),
    ):
        assert train(made, kind, tmp_path / "x", "--condition", condition, latents=latents) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "x").exists()
    long = ["--condition", "text", "--text.length", "8"]
    assert train(made, kind, tmp_path / "x", *long) == 2
    assert "longer than the text length of 8 tokens" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
