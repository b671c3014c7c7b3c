"""`smalti encode --condition text`: features of a frozen text encoder, from captions of a folder
to a trained pipeline that takes prompts."""

from pathlib import Path

import numpy as np
import pytest
import torch
from backbones import write_text_encoder
from PIL import Image

import smalti
from smalti.cli import main as smalti_main
from smalti.data.latent_cache.cache import LatentCache
from smalti.prior.conditions.text_encoder import FrozenTextEncoder, text_encoder_of
from smalti.tokenizer.conv import ConvConfig
from smalti.tokenizer.quantizers.codebook import CodebookConfig
from smalti.tokenizer.quantizers.nearest import NearestConfig
from smalti.tokenizer.vq import VQConfig, VQTokenizer

CONV = ConvConfig(
    channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(), z_channels=4
)
VQ = VQConfig(image_size=16, conv=CONV, quantizer=NearestConfig(codebook=CodebookConfig(16, 4)))
GPT = ["depth=1", "width=16", "num_heads=2", "hidden=32"]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A flat folder of pictures with a text file beside each, a tokenizer and a T5."""
    root = tmp_path_factory.mktemp("captions")
    (root / "pictures").mkdir()
    generator = np.random.default_rng(0)
    for i in range(20):
        pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "pictures" / f"{i}.png")
        (root / "pictures" / f"{i}.txt").write_text(f"a {'red' if i % 2 else 'green'} apple\n")
    torch.manual_seed(0)
    VQTokenizer(VQ).save_pretrained(root / "vq")
    write_text_encoder(root / "t5", "t5")
    return root


def arguments(root: Path, out: Path, *more: str) -> list[str]:
    where = ["--data", str(root / "pictures"), "--tokenizer", str(root / "vq")]
    text = ["--condition", "text", "--text.encoder", str(root / "t5")]
    return ["encode", *where, *text, "--output_dir", str(out), *more]


def test_from_captions_to_prompts(root: Path, tmp_path: Path, monkeypatch) -> None:
    latents = tmp_path / "latents"
    assert smalti_main(arguments(root, latents, "--text.length", "12")) == 0
    cache = LatentCache(latents / "heldout")
    batch = cache.first_view(range(len(cache)))
    encoder = text_encoder_of(str(root / "t5"))
    expected = encoder.encode(batch.texts or [], 12)
    features = batch.conditions["text_features"]
    torch.testing.assert_close(features, expected.features, rtol=1e-3, atol=1e-3)
    assert torch.equal(batch.conditions["text_mask"], expected.mask)

    encoded: list[list[str]] = []
    encode = FrozenTextEncoder.encode

    def counted(self, captions, length, **options):
        encoded.append(list(captions))
        return encode(self, captions, length, **options)

    monkeypatch.setattr(FrozenTextEncoder, "encode", counted)
    where = ["--latents", str(latents), "--tokenizer", str(root / "vq")]
    where += ["--output_dir", str(tmp_path / "prior"), "--mixed_precision", "no"]
    sizes = [part for option in GPT for part in f"--prior.{option}".split("=")]
    text = ["--condition", "text", "--text.encoder", str(root / "t5"), "--text.length", "12"]
    steps = ["--max_train_steps", "2", "--train_batch_size", "4"]
    assert smalti_main(["train-prior", *where, *sizes, *text, *steps]) == 0
    assert all(len(captions) != 4 for captions in encoded)  # prompts of previews alone
    pipe = smalti.Pipeline.from_pretrained(tmp_path / "prior" / "pipeline")
    assert len(pipe(prompt=["a red apple", ""]).images) == 2
    assert pipe.prior.config.text_encoder_fingerprint == encoder.fingerprint


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--text.length", "4"], "10 of 20 captions are longer than the text length of 4 tokens"),
        (["--condition", "txt"], 'condition is txt; did you mean "text"'),
        (
            ["--condition", "class"],
            "--text.encoder is for a prior of captions: add --condition text",
        ),
        (["--text.encoder", "nowhere"], 'no folder and no text encoder called "nowhere"'),
    ],
)
def test_an_error_is_one_line_and_writes_nothing(
    root: Path, tmp_path: Path, capsys, more: list[str], message: str
) -> None:
    assert smalti_main(arguments(root, tmp_path / "latents", *more)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1]
    assert not list(tmp_path.rglob("*.safetensors"))


def test_pictures_without_captions_are_refused(root: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "pictures").mkdir()
    for i in range(4):
        Image.new("RGB", (16, 16), (60 * i, 0, 0)).save(tmp_path / "pictures" / f"{i}.png")
    out, data = tmp_path / "latents", str(tmp_path / "pictures")
    assert smalti_main(arguments(root, out, "--data", data)) == 2
    assert "captions" in capsys.readouterr().err


def test_held_out_pictures_need_captions_too(root: Path, tmp_path: Path, capsys) -> None:
    """Without them, validation would fail after the training."""
    (tmp_path / "val").mkdir()
    for i in range(4):
        Image.new("RGB", (16, 16), (60 * i, 0, 0)).save(tmp_path / "val" / f"{i}.png")
    argv = ["--data", str(root / "pictures"), "--heldout_data", str(tmp_path / "val")]
    argv += ["--tokenizer", str(root / "vq"), "--output_dir", str(tmp_path / "run")]
    argv += ["--condition", "text", "--max_train_steps", "1"]
    assert smalti_main(["train-prior", *argv]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"the held-out pictures of {tmp_path / 'val'} have no captions" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--condition", "image"], 'condition is "image"; a next-token prior takes none, class'),
        (["--condition", "class+text"], "have no classes: give --condition text"),
    ],
)
def test_a_prior_refuses_conditions_in_one_line(root: Path, tmp_path, capsys, more, message):
    argv = ["--data", str(root / "pictures"), "--tokenizer", str(root / "vq"), *more]
    assert smalti_main(["train-prior", *argv, "--output_dir", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()
