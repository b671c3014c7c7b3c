"""`smalti convert` and `smalti export` from the command line."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from smalti.cli import main
from smalti.folders import FolderLock
from smalti.pipelines.convert.convert import export
from smalti.prior.next_token.model import NextTokenPrior
from smalti.tokenizer.base import Tokenizer
from smalti.tokenizer.conv import ConvConfig
from smalti.tokenizer.kl import KLConfig, KLTokenizer
from smalti.tokenizer.quantizers.codebook import CodebookConfig
from smalti.tokenizer.quantizers.multi_scale import MultiScaleConfig
from smalti.tokenizer.vq import VQConfig, VQTokenizer

CONV = ConvConfig(32, (1, 2), 1, attention_levels=(1,), z_channels=4, norm_groups=32)
BOOK = CodebookConfig(8, 4, l2_normalise=False)


@pytest.fixture
def var(tmp_path: Path) -> Path:
    """A file in VAR's layout."""
    scales = ((1, 1), (3, 3), (8, 8))
    quantizer = MultiScaleConfig(codebook=BOOK, scales=scales, convolutions=1)
    model = VQTokenizer(VQConfig(image_size=16, conv=CONV, quantizer=quantizer))
    export(model, tmp_path / "var.pth")
    return tmp_path / "var.pth"


@pytest.fixture
def kl(tmp_path: Path) -> Path:
    """A tokenizer's folder."""
    model = KLTokenizer(KLConfig(image_size=16, conv=CONV, latent_std=(2.0,) * 4))
    return model.save_pretrained(tmp_path / "kl")


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_convert_prints_what_it_found(var: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "ours"
    assert run("convert", "var-tokenizer", var, out, "--scales", "1,3,8") == 0
    told = capsys.readouterr().out
    for line in (
        f"VAR tokenizer: {var}",
        "  channel_mult: 1, 2",
        "  codebook: 8 codes of 4 numbers",
        "  scales: 1, 3, 8, as given (not in the file)",
        "  image_size: 16, from --scales (not in the file)",
        "each used exactly once",
        "1 dropped, not needed: quantize.ema_vocab_hit_SV",
        f"model: {out}",
    ):
        assert line in told
    model = Tokenizer.from_pretrained(out)
    assert model.image_size == 16 and model.spec.grids == ((1, 1), (3, 3), (8, 8))


def test_a_second_conversion_into_one_folder_is_refused(var: Path, tmp_path: Path, capsys) -> None:
    job = ("convert", "var-tokenizer", var, tmp_path / "ours", "--scales", "1,3,8")
    with FolderLock(tmp_path / "ours", beside=True), ThreadPoolExecutor(1) as pool:
        assert pool.submit(run, *job).result() == 2
    told = capsys.readouterr().err.splitlines()
    assert f"another run is active in {tmp_path / 'ours'} (process {os.getpid()}" in told[0]
    (tmp_path / ".tmp-ours-0123abcd").mkdir()  # left by a process that was killed
    assert run(*job) == 0
    assert sorted(os.listdir(tmp_path)) == ["ours", "var.pth"]


def test_options_may_stand_first_or_in_a_recipe(var: Path, tmp_path: Path) -> None:
    assert run("convert", "--scales=1,3,8", "var-tokenizer", var, tmp_path / "a") == 0
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f'source: var-tokenizer\ncheckpoint: {var}\nout: {tmp_path / "b"}\nscales: "1,3,8"\n'
    )
    assert run("convert", "--config", recipe) == 0
    names = [Tokenizer.from_pretrained(tmp_path / name).fingerprint for name in "ab"]
    assert names[0] == names[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give three arguments: smalti convert SOURCE CHECKPOINT OUT"),
        (("var-tokenizer", "VAR"), "give three arguments"),
        (("var-tokeniser", "VAR", "OUT"), 'did you mean "var-tokenizer"?'),
        (("ldm-kl", "VAR", "OUT"), "it looks like var-tokenizer"),
        (("var-tokenizer", "none.pt", "OUT"), "none.pt does not exist"),
        (("var-tokenizer", "VAR", "OUT"), "no scales were published for grids of 128 x 128"),
        (("var-tokenizer", "VAR", "OUT", "--scales", "1,x"), "scales is '1,x'; give numbers"),
        (("var-tokenizer", "VAR", "OUT", "--heads", "2"), "--heads does not apply to a VAR"),
        (("var-tokenizer", "VAR", "OUT", "--tokenizer", "none"), "none"),
        (("var-tokenizer", "VAR", "VAR", "--scales", "1,3,8"), "nothing is overwritten"),
    ],
)
def test_errors_are_one_line_and_write_nothing(arguments, message, var, tmp_path, capsys) -> None:
    places = {"VAR": var, "OUT": tmp_path / "out"}
    assert run("convert", *(places.get(a, a) for a in arguments)) == 2
    told = capsys.readouterr().err
    assert message in told and len(told.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["var.pth"]


def test_export_writes_what_convert_reads(kl: Path, tmp_path: Path, capsys) -> None:
    assert run("export", kl, tmp_path / "theirs") == 0
    told = capsys.readouterr().out
    assert "in the layout of a Diffusers AutoencoderKL" in told
    assert f"smalti convert diffusers-kl {tmp_path / 'theirs'} FOLDER --image_size 16" in told
    assert (
        run("convert", "diffusers-kl", tmp_path / "theirs", tmp_path / "b", "--image_size", 16) == 0
    )
    assert run("export", kl, tmp_path / "ldm.ckpt") == 0
    assert "in the layout of a latent-diffusion KL" in capsys.readouterr().out
    scaled = ("--image_size", 16, "--scaling_factor", 0.5)
    assert run("convert", "ldm-kl", tmp_path / "ldm.ckpt", tmp_path / "c", *scaled) == 0
    models = [Tokenizer.from_pretrained(tmp_path / name) for name in ("kl", "b", "c")]
    images = torch.rand(1, 3, 16, 16)
    for model in models[1:]:
        assert torch.equal(model.encode(images), models[0].encode(images))
    assert models[1].fingerprint == models[2].fingerprint


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give two arguments: smalti export MODEL OUT"),
        (("KL", "OUT", "--format", "var-tokenizer"), "this model is no VAR tokenizer"),
        (("SHIFTED", "OUT.pt"), "diffusers-kl is written as a folder"),
        (("PIPELINE", "OUT"), "is a pipeline: export"),
        (("PRIOR", "OUT", "--format", "ldm-kl"), "this model is no latent-diffusion KL"),
    ],
)
def test_errors_in_export_are_one_line(
    arguments, message, kl, prior: NextTokenPrior, tmp_path, capsys
) -> None:
    prior.save_pretrained(tmp_path / "prior")
    mean = (1.0, 0.0, 0.0, 0.0)  # which a file of latent-diffusion has no place for
    KLTokenizer(KLConfig(image_size=16, conv=CONV, latent_mean=mean)).save_pretrained(
        tmp_path / "shifted"
    )
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").touch()
    before = sorted(tmp_path.iterdir())
    places = {name: tmp_path / name.lower() for name in ("KL", "OUT", "OUT.pt", "PIPELINE")}
    places |= {name: tmp_path / name.lower() for name in ("PRIOR", "SHIFTED")}
    assert run("export", *(places.get(a, a) for a in arguments)) == 2
    told = capsys.readouterr().err
    assert message in told and len(told.splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before


def test_rectangles_go_out_and_come_back(var: Path, tmp_path: Path, capsys) -> None:
    """A published file does not state the size of images, so a flag does."""
    statistics = {"latent_mean": (0.0,) * 4, "latent_std": (2.0,) * 4}
    ours = KLTokenizer(KLConfig(image_size=(16, 24), conv=CONV, **statistics))
    ours.save_pretrained(tmp_path / "ours")
    assert run("export", tmp_path / "ours", tmp_path / "theirs") == 0
    assert "--image_size 16x24" in capsys.readouterr().out
    back = ["convert", "diffusers-kl", tmp_path / "theirs", tmp_path / "back"]
    assert run(*back, "--image_size", "16x24") == 0
    same = Tokenizer.from_pretrained(tmp_path / "back")
    assert same.config == ours.config and same.fingerprint == ours.fingerprint
    assert run("convert", "var-tokenizer", var, tmp_path / "v", "--image_size", "16x24") == 2
    assert "VAR's scales are square" in capsys.readouterr().err


def test_published_layouts_hold_rgb_tokenizers_only(tmp_path: Path, capsys) -> None:
    grey = KLTokenizer(KLConfig(image_size=16, conv=CONV, image_channels=1))
    grey.save_pretrained(tmp_path / "grey")
    assert run("export", tmp_path / "grey", tmp_path / "out") == 2
    assert "image_channels" in capsys.readouterr().err
