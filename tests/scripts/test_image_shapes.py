"""Images of other shapes through every stage: rectangles, grey, and RGB with alpha."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_FLOW
from PIL import Image

import smalti
from smalti.cli import main as smalti_main
from smalti.cli import parse_config
from smalti.data.dataset import DataOptions
from smalti.data.image_io import FolderOptions
from smalti.data.latent_cache.cache import LatentCache
from smalti.prior.base import PriorConfig
from smalti.prior.next_scale.model import NextScaleConfig
from smalti.prior.next_token.model import NextTokenConfig
from smalti.scripts.demo import DemoConfig, chosen_scale
from smalti.scripts.encode import EncodeConfig, encode
from smalti.scripts.train_prior import TrainPriorConfig
from smalti.scripts.train_prior import train as train_prior
from smalti.scripts.train_tokenizer import TrainTokenizerConfig
from smalti.scripts.train_tokenizer import train as train_tokenizer
from smalti.tokenizer.base import TokenizerConfig
from smalti.tokenizer.conv import ConvConfig
from smalti.tokenizer.discriminators.patchgan import PatchGANConfig
from smalti.tokenizer.kl import KLConfig
from smalti.tokenizer.losses.objective import ObjectiveConfig
from smalti.tokenizer.quantizers.codebook import CodebookConfig
from smalti.tokenizer.quantizers.fsq import FSQConfig
from smalti.tokenizer.quantizers.lookup_free import LookupFreeConfig
from smalti.tokenizer.quantizers.multi_scale import MultiScaleConfig
from smalti.tokenizer.quantizers.nearest import NearestConfig
from smalti.tokenizer.vq import VQConfig

CONV = ConvConfig(
    channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(), z_channels=4
)
CODEBOOK = CodebookConfig(16, 4, revive_after=2)
VQ = VQConfig(image_size=16, conv=CONV, quantizer=NearestConfig(codebook=CODEBOOK))
FSQ = replace(VQ, quantizer=FSQConfig(levels=(4, 4)))
LFQ = replace(VQ, quantizer=LookupFreeConfig(bits=4, group_bits=4))
SCALES = MultiScaleConfig(codebook=CODEBOOK, scales=((1, 1), (2, 2), (4, 4), (8, 8)))
VAR = replace(VQ, quantizer=SCALES)
KL = KLConfig(image_size=16, conv=CONV, equivariance=0.5)

TOKEN = NextTokenConfig(depth=1, width=16, num_heads=2, hidden=32)
SCALE = NextScaleConfig(depth=1, width=16, num_heads=2)

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
STEPS = {"max_train_steps": 2, "train_batch_size": 4, "mixed_precision": "no"}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """20 noisy pictures of 2 classes, half transparent, 40 x 30 pixels (width x height)."""
    root, random = tmp_path_factory.mktemp("rgba"), np.random.default_rng(0)
    for name, red in (("dark", 0), ("light", 170)):
        (root / name).mkdir()
        for number in range(10):
            pixels = random.integers(0, 80, (30, 40, 4), dtype=np.uint8)
            pixels[..., 0] += red
            pixels[..., 3] = np.where(np.arange(40) < 20, 0, 255)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


def train(
    root: Path, pictures: Path, config: TokenizerConfig, size: tuple[int, int], **options
) -> Path:
    """A tokenizer for images of a size, after two steps."""
    objective = ObjectiveConfig(
        perceptual_weight=0, adversarial_start=0, discriminator=PatchGANConfig(8, 1)
    )
    job = TrainTokenizerConfig(
        output_dir=root / "tokenizer",
        data=str(pictures),
        tokenizer=config,
        image_size=size,
        objective=objective,
        **STEPS,
        **options,
    )
    return train_tokenizer(job)


def pipeline_of(root: Path, pictures: Path, tokenizer: Path, prior: PriorConfig) -> Path:
    """The pipeline of a prior that was trained for two steps on the latents of the pictures."""
    encode(EncodeConfig(data=str(pictures), tokenizer=tokenizer, output_dir=root / "latents"))
    job = TrainPriorConfig(
        output_dir=root / "prior",
        latents=root / "latents",
        tokenizer=tokenizer,
        prior=prior,
        **STEPS,
    )
    return train_prior(job)


@pytest.mark.parametrize(
    ("config", "prior", "channels"),
    [(VQ, TOKEN, 3), (FSQ, TOKEN, 1), (LFQ, TOKEN, 3), (VAR, SCALE, 3), (KL, TINY_FLOW, 4)],
    ids=["vq", "fsq", "lfq", "multi-scale", "kl"],
)
def test_every_stage_makes_images_of_the_size_and_channels_of_the_tokenizer(
    tmp_path: Path, pictures: Path, config, prior: PriorConfig, channels: int
) -> None:
    config = replace(config, image_channels=channels)
    tokenizer = train(tmp_path, pictures, config, (16, 24), crop="random")
    pipe = smalti.Pipeline.from_pretrained(pipeline_of(tmp_path, pictures, tokenizer, prior))
    assert pipe.tokenizer.image_size == (16, 24) and pipe.tokenizer.image_channels == channels
    spec = pipe.prior.spec
    last = spec.grids[-1] if hasattr(spec, "grids") else (spec.height, spec.width)
    assert last == (8, 12)
    assert LatentCache(tmp_path / "latents" / "train").spec == spec
    options = {"num_inference_steps": 2} if prior is TINY_FLOW else {}
    made = pipe(["dark", 1], guidance_scale=1.0, **options).images
    assert [(image.size, image.mode) for image in made] == [((24, 16), MODES[channels])] * 2
    array = pipe([0], guidance_scale=1.0, output_type="np", **options)
    assert array.images.shape == (1, 16, 24, channels)
    assert array.pictures()[0].mode == MODES[channels]
    assert array._repr_png_()
    card = (tmp_path / "prior" / "pipeline" / "README.md").read_text()
    assert "Images are 16 x 24 pixels (height x width)" in card
    assert ("grey" in card, "alpha" in card) == (channels == 1, channels == 4)


@pytest.mark.parametrize("channels", [1, 4])
def test_pipelines_for_grey_and_for_alpha_are_evaluated_and_edited(
    tmp_path: Path, pictures: Path, channels: int
) -> None:
    torch.manual_seed(0)
    config = replace(KL, image_size=(32, 48), image_channels=channels, equivariance=0.0)
    tokenizer = smalti.Tokenizer.registry.build(config)
    prior = smalti.Prior.registry.build(TINY_FLOW.fitted(tokenizer.spec, 2, tokenizer.fingerprint))
    smalti.Pipeline(tokenizer, prior, ("dark", "light")).save_pretrained(tmp_path / "pipeline")
    job = ["evaluate", "--model", str(tmp_path / "pipeline"), "--data", str(pictures)]
    job += ["--output_dir", str(tmp_path / "out"), "--num_samples", "16", "--num_references", "16"]
    job += ["--num_inference_steps", "1", "--solver", "euler", "--classifier_epochs", "1"]
    job += ["--image_size", "48x32"] * (channels == 1)
    assert smalti_main(job) == 0
    metrics = json.loads((tmp_path / "out" / "summary.json").read_text())["metrics"]
    protocol = metrics["lpips"]["protocol"]
    assert protocol["image_size"] == ([48, 32] if channels == 1 else [32, 48])
    assert protocol["image_channels"] == channels
    assert ("white" in protocol["networks_see"]) == (channels == 4)
    assert np.isfinite([metric["value"] for metric in metrics.values()]).all()
    assert Image.open(tmp_path / "out" / "reconstructions.png").mode == "RGB"
    editing = ["--model", str(tmp_path / "pipeline"), "--data", str(pictures)]
    for command, flags in (
        ("interpolate", ["--indices", "0", "12", "--steps", "3"]),
        ("invert", ["--indices", "0", "--steps", "1"]),
    ):
        strip = tmp_path / f"{command}.png"
        assert smalti_main([command, *editing, *flags, "--output", str(strip)]) == 0
        assert Image.open(strip).mode == "RGB"
    job = ["edit", "--model", str(tmp_path / "pipeline"), "--box", "0,0,20,15", "--resize"]
    job += ["--image", str(next(pictures.rglob("*.png"))), "--class_labels", "dark"]
    job += ["--num_images", "1", "--num_inference_steps", "1", "--solver", "euler"]
    assert smalti_main([*job, "--output_dir", str(tmp_path / "edited")]) == 0
    edited = Image.open(tmp_path / "edited" / "000000.png")
    assert edited.size == (48, 32) and edited.mode == MODES[channels]


def test_pictures_of_any_mode_become_those_of_the_tokenizer(pictures: Path) -> None:
    """Grey is Pillow's luma on the background; alpha is kept only by four channels."""
    options = DataOptions(data=str(pictures))
    first = Image.open(sorted(pictures.rglob("*.png"))[0])
    for channels, expected in (
        (1, Image.alpha_composite(Image.new("RGBA", first.size, "white"), first).convert("L")),
        (3, Image.alpha_composite(Image.new("RGBA", first.size, "white"), first).convert("RGB")),
    ):
        images = options.dataset("all", (30, 40), channels=channels)
        pixels = ((images.all_images()[0] + 1) * 127.5).round().byte()
        right = np.asarray(expected).reshape(30, 40, channels)
        assert np.array_equal(pixels.permute(1, 2, 0).numpy(), right)
    rgba = options.dataset("all", (30, 40), channels=4).all_images()[0]
    assert rgba[3, :, :20].eq(-1).all() and rgba[3, :, 20:].eq(1).all()
    assert rgba[:3, :, :20].eq(1).all()  # white, where nothing can be seen
    blue = replace(options, folder=FolderOptions(background="#0000ff"))
    left = blue.dataset("all", (30, 40)).all_images()[0, :, :, :20]
    assert left[:2].eq(-1).all() and left[2].eq(1).all()


def test_the_fingerprint_of_a_square_rgb_set_is_that_of_earlier_versions(pictures: Path) -> None:
    options = DataOptions(data=str(pictures))
    fingerprints = [
        options.dataset("train", size, channels=channels).fingerprint
        for size, channels in ((16, 3), ((16, 16), 3), ((16, 24), 3), ((24, 16), 3), (16, 1))
    ]
    assert fingerprints[0] == fingerprints[1] and len({*fingerprints}) == 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--image_size", "48x"], "image_size is '48x'; give the side of a square"),
        (["--image_size", "0x64"], "image_size 0 x 64 is not a multiple"),
        (["--image_size", "48x50"], "image_size 48 x 50 is not a multiple of the down-sampling"),
        (["--tokenizer.image_size", "1x2x3"], "image_size is '1x2x3'"),
        (["--tokenizer.image_channels", "2"], "image_channels is 2; use 1 (grey), 3 (RGB) or 4"),
        (["--folder.background", "blu"], "background is 'blu'; give the name of a colour"),
        (
            ["--folder.background", "blue", "--tokenizer.image_channels", "4"],
            "a tokenizer with 4 image_channels keeps alpha: leave out --folder.background",
        ),
        (["--folder.background", "transparent"], "give a colour, or train a tokenizer with 4"),
    ],
)
def test_wrong_shapes_are_named_and_nothing_is_written(
    tmp_path: Path, pictures: Path, capsys, flags: list[str], message: str
) -> None:
    out = tmp_path / "out"
    job = ["train-tokenizer", "--data", str(pictures), "--output_dir", str(out), *flags]
    assert smalti_main(job) == 2
    errors = capsys.readouterr().err
    assert message in errors and errors.count("\n") == 1 and not out.exists()


@pytest.mark.parametrize("prior", ["gpt-nano", "var-nano", "flow-nano"])
def test_the_demo_trains_its_tokenizer_at_the_size(prior: str) -> None:
    scale = chosen_scale(DemoConfig(image_size=(32, 48), prior=prior))
    config = scale.tokenizer.tokenizer
    assert config.image_size == (32, 48)
    if prior == "var-nano":
        assert config.quantizer.scales[-1] == (8, 12)


def test_a_size_is_read_and_written_alike_in_recipes_and_on_the_command_line(
    tmp_path: Path, capsys
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("image_size: 48x64\ntokenizer: {preset: var-32-tiny}\n")
    config = parse_config(TrainTokenizerConfig, ["--config", str(file)], prog="test")
    assert config.image_size == (48, 64) == config.tokenizer.image_size
    assert config.tokenizer.quantizer.scales[-1] == (12, 16)
    with pytest.raises(SystemExit):
        parse_config(TrainTokenizerConfig, ["--config", str(file), "--print-config"], prog="test")
    file.write_text(capsys.readouterr().out)
    assert parse_config(TrainTokenizerConfig, ["--config", str(file)], prog="test") == config
    square = parse_config(TrainTokenizerConfig, ["--image_size", "48x48"], prog="test")
    assert square.tokenizer.image_size == 48
