"""Image-conditional priors from the command line: encode, train, sample, edit."""

from pathlib import Path

import pytest
import torch
from PIL import Image

import smalti
from smalti.cli import main as smalti_main
from smalti.data.dataset import DataOptions
from smalti.data.image_io import to_pil
from smalti.data.latent_cache.cache import LatentCache
from smalti.evaluation.reconstruction import psnr
from smalti.files import read_hashed_json
from smalti.pipelines.finetune import load_initial_weights
from smalti.pipelines.image_tasks import resized
from smalti.prior.conditions.base import Combination
from smalti.prior.conditions.image import ImageCondition
from smalti.prior.flow.config import FlowConfig
from smalti.prior.flow.dit import DiTConfig
from smalti.prior.flow.prior import FlowPrior
from smalti.tokenizer.conv import ConvConfig
from smalti.tokenizer.kl import KLConfig, KLTokenizer
from smalti.tokenizer.presets import PRESETS
from smalti.tokenizer.vq import VQTokenizer

CONV = ConvConfig(
    channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(), z_channels=2
)
KL = KLConfig(image_size=16, conv=CONV, latent_mean=(0.5, 0.0), latent_std=(2.0, 0.5))
NETWORK = DiTConfig(
    in_channels=2, out_channels=2, grid=(8, 8), patch_size=2, depth=1, width=16, num_heads=2,
    num_classes=2, frequency_size=16,
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Pictures of 2 classes, a tokenizer, and a class-conditional pipeline."""
    folder = tmp_path_factory.mktemp("made")
    generator = torch.Generator().manual_seed(0)
    for name in ("a", "b"):
        (folder / "pictures" / name).mkdir(parents=True)
        for number, picture in enumerate(to_pil(torch.rand(10, 3, 16, 16, generator=generator))):
            picture.save(folder / "pictures" / name / f"{number}.png")
    torch.manual_seed(0)
    tokenizer = KLTokenizer(KL)
    prior = FlowPrior(FlowConfig(network=NETWORK, tokenizer_fingerprint=tokenizer.fingerprint))
    for parameter in prior.parameters():  # a new flow is zero
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    smalti.Pipeline(tokenizer, prior, ("a", "b")).save_pretrained(folder / "class")
    return folder


def trained(made: Path, task: str, out: Path, condition: str, steps: int = 2) -> Path:
    """A pipeline that was trained by the commands, from the class-conditional one."""
    tokenizer = str(made / "class" / "tokenizer")
    common = ["--tokenizer", tokenizer]
    data = ["--data", str(made / "pictures"), "--heldout_fraction", "0.2"]
    latents = ["--output_dir", str(out / "latents"), "--image_task", task]
    assert smalti_main(["encode", *common, *data, *latents]) == 0
    argv = ["--latents", str(out / "latents"), "--output_dir", str(out / "run"), *common]
    argv += ["--initial", str(made / "class"), "--condition", condition]
    argv += ["--max_train_steps", str(steps), "--train_batch_size", "4", "--validation_steps", "2"]
    argv += ["--preview.num_inference_steps", "2", "--mixed_precision", "no"]
    assert smalti_main(["train-prior", *argv]) == 0
    return out / "run" / "pipeline"


@pytest.fixture(scope="module")
def upscaler(made: Path, tmp_path_factory) -> Path:
    return trained(made, "super-resolution", tmp_path_factory.mktemp("sr"), "class+image")


@pytest.fixture(scope="module")
def painter(made: Path, tmp_path_factory) -> Path:
    return trained(made, "inpainting", tmp_path_factory.mktemp("inpainting"), "image")


def picture_of(made: Path, size: int = 16) -> Image.Image:
    return Image.open(made / "pictures" / "a" / "0.png").resize((size, size))


OPTIONS = {"num_inference_steps": 2, "output_type": "pt", "guidance_scale": 1.0}


# -- what the commands store ----------------------------------------------------------------------


def test_the_cache_holds_what_the_prior_is_given(painter: Path, upscaler: Path) -> None:
    for pipeline, channels, views in ((painter, 3, 8), (upscaler, 2, 2)):
        latents = LatentCache(pipeline.parents[1] / "latents" / "train")
        batch = latents.first_view([0, 5])
        assert batch.conditions["image"].shape == (2, channels, 8, 8)
        assert len(latents.info.views) == views
    masks = LatentCache(painter.parents[1] / "latents" / "train")

    def given(epoch: int) -> torch.Tensor:
        return masks.__getitems__([(epoch, 3)]).conditions["image"]

    chosen = [given(epoch)[:, 2:] for epoch in range(40)]
    assert len({tuple(mask.flatten().tolist()) for mask in chosen}) > 4  # 4 masks of each view
    assert torch.equal(given(7), given(7))


def test_the_prior_knows_its_task(painter: Path, upscaler: Path) -> None:
    one, two = (smalti.Prior.from_pretrained(folder / "prior") for folder in (painter, upscaler))
    assert (one.config.condition, one.config.image.task) == ("image", "inpainting")
    assert two.config.condition == "class+image" and two.num_classes == 2
    assert two.config.image.task == "super-resolution:factor=4"
    assert (one.config.image.channels, two.config.image.channels) == (3, 2)
    card = (painter / "README.md").read_text()
    assert "pipe(image=picture, mask_image=mask, num_images_per_prompt=4)" in card
    assert "pipeline_tag: image-to-image\n" in card
    assert (painter / "samples.png").is_file()


def test_the_class_prior_is_the_start(made: Path, upscaler: Path, tmp_path: Path) -> None:
    """Before the first step the samples are those of the class-conditional prior, bitwise."""
    source = smalti.Prior.from_pretrained(made / "class" / "prior")
    config = smalti.Prior.from_pretrained(upscaler / "prior").config
    prior = FlowPrior(config).eval()
    load_initial_weights(prior, str(made / "class"))
    x, t, labels = torch.randn(3, 2, 8, 8), torch.rand(3), torch.tensor([0, 1, 2])
    given = Combination({"class": labels, "image": ImageCondition(torch.randn(3, 2, 8, 8))})
    assert torch.equal(prior.network(x, t, given), source.network(x, t, labels))


# -- calls of a pipeline --------------------------------------------------------------------------


def test_super_resolution_takes_a_small_or_a_whole_picture(made: Path, upscaler: Path) -> None:
    pipe = smalti.Pipeline.from_pretrained(upscaler)
    small, whole = picture_of(made, 4), picture_of(made)
    for picture in (small, whole):
        generator = torch.Generator().manual_seed(0)
        out = pipe(image=picture, num_images_per_prompt=2, generator=generator, **OPTIONS)
        assert out.images.shape == (2, 3, 16, 16)
    with_class = pipe("b", image=[small, whole], **OPTIONS)
    assert with_class.images.shape == (2, 3, 16, 16) and with_class.labels == [1, 1]


def test_an_image_depends_on_its_own_picture_and_generator_alone(made, upscaler) -> None:
    pipe = smalti.Pipeline.from_pretrained(upscaler)
    pictures = [picture_of(made), picture_of(made).rotate(90)]

    def generators(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    both = pipe(image=pictures, generator=generators(0, 1), **OPTIONS).images
    alone = pipe(image=pictures[1], generator=generators(1), **OPTIONS).images
    torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-5)
    other = pipe(image=pictures[0], generator=generators(1), **OPTIONS).images
    assert not torch.equal(both[1:], other)


def test_known_pixels_of_an_inpainting_are_those_of_the_tokenizer(made, painter) -> None:
    """Where no masked pixel is near, the error is the tokenizer's own."""
    pipe = smalti.Pipeline.from_pretrained(painter)
    picture, mask = picture_of(made), Image.new("L", (16, 16))
    mask.paste(255, (12, 12, 16, 16))
    out = pipe(image=picture, mask_image=mask, **OPTIONS)
    with torch.no_grad():
        known = pipe.tokenizer.encode(picture)
    assert torch.equal(out.latents[..., :6, :6], known[..., :6, :6])
    assert not torch.allclose(out.latents[..., 6:, 6:], known[..., 6:, 6:])


# -- the command edit -----------------------------------------------------------------------------


def test_edit_writes_the_original_the_condition_and_the_result(made, upscaler, painter, tmp_path):
    whole = made / "pictures" / "a" / "0.png"
    picture_of(made, 4).save(tmp_path / "small.png")
    common = ["--num_images", "2", "--num_inference_steps", "2"]
    for model, image, extra, columns in (
        (upscaler, whole, [], 5),  # original, small, bicubic, two results
        (upscaler, tmp_path / "small.png", [], 4),
        (painter, whole, ["--box", "4,4,10,12"], 4),
    ):
        out = tmp_path / f"{model.parents[1].name}-{image.stem}"
        argv = ["--model", str(model), "--image", str(image), "--output_dir", str(out), *extra]
        assert smalti_main(["edit", *argv, *common]) == 0
        assert Image.open(out / "000001.png").size == (16, 16)
        strip = Image.open(out / "strip.png")
        assert round(strip.width / strip.height) == columns


def measured(model: Path, out: Path, capsys) -> tuple[dict, dict, str]:
    """Values, reasons and what `smalti evaluate` prints of a pipeline."""
    argv = ["--model", str(model), "--output_dir", str(out), "--num_inference_steps", "2"]
    assert smalti_main(["evaluate", *argv, "--classifier_epochs", "1"]) == 0
    summary = read_hashed_json(out / "summary.json")
    assert Image.open(out / "samples.png").height > Image.open(out / "reconstructions.png").height
    protocols = {n: m["protocol"] for n, m in summary["metrics"].items() if n.endswith("_samples")}
    given = [p["sampling"]["given"] for n, p in protocols.items() if "psnr" in n]
    task = smalti.Prior.from_pretrained(model / "prior").config.image.task
    assert given and all(text.startswith(f"{task}, of held-out pictures") for text in given)
    values = {name: metric["value"] for name, metric in summary["metrics"].items()}
    return values, summary["undefined"], capsys.readouterr().out


def test_an_inpainting_is_measured(painter: Path, tmp_path: Path, capsys) -> None:
    values, undefined, _ = measured(painter, tmp_path / "evaluation", capsys)
    # Near the mask the decoder looks at painted positions, so the two differ a little.
    assert abs(values["known_psnr_samples"] - values["known_psnr_tokenizer"]) < 3
    assert {"fd_alexnet", "rfd_alexnet", "fdr_1", "heldout_bits_per_dimension"} <= values.keys()
    assert not any("classifier" in name for name in {**values, **undefined})


def test_super_resolution_is_measured_beside_bicubic(
    made: Path, upscaler: Path, tmp_path: Path, capsys
) -> None:
    values, undefined, out = measured(upscaler, tmp_path / "evaluation", capsys)
    sets = {"samples", "tokenizer", "bicubic"}
    assert {f"{m}_{s}" for m in ("psnr", "ssim") for s in sets} <= values.keys()
    data = DataOptions(data=str(made / "pictures"), heldout_fraction=0.2)
    originals = data.dataset("heldout", 16).all_images()
    enlarged = resized(resized(originals, 4, 4), 16, 16)
    assert values["psnr_bicubic"] == pytest.approx(psnr(enlarged, originals).mean().item())
    assert values["psnr_tokenizer"] == pytest.approx(values["psnr"])  # all held-out pictures
    assert "classifier_accuracy_samples" in values
    assert {"lpips", *(f"lpips_{s}" for s in sets)} == undefined.keys()  # of 16 px
    assert undefined["lpips"] == "the pictures have 16 x 16 pixels; LPIPS needs at least 32 x 32"
    assert f"not defined: {undefined['lpips']}\n" in out
    assert smalti_main(["info", str(tmp_path / "evaluation")]) == 0
    assert f"not defined: {undefined['lpips']}\n" in capsys.readouterr().out


# -- errors ---------------------------------------------------------------------------------------


def test_info_names_the_command_for_pictures(upscaler: Path, painter: Path, capsys) -> None:
    for folder, files in ((upscaler, "--image FILE"), (painter, "--image FILE --mask FILE")):
        assert smalti_main(["info", str(folder)]) == 0
        assert f"smalti edit --model {folder} {files}\n" in capsys.readouterr().out


def test_a_factor_that_does_not_divide_the_size_writes_nothing(made, tmp_path, capsys) -> None:
    argv = ["--tokenizer", str(made / "class" / "tokenizer"), "--data", str(made / "pictures")]
    argv += ["--output_dir", str(tmp_path / "out"), "--image_task", "super-resolution:factor=3"]
    assert smalti_main(["encode", *argv]) == 2
    assert "16 x 16 pixels cannot be reduced by 3" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_wrong_inputs_are_one_clear_line(made: Path, upscaler: Path, painter: Path) -> None:
    up, paint = (smalti.Pipeline.from_pretrained(folder) for folder in (upscaler, painter))
    whole, mask = picture_of(made), Image.new("L", (16, 16), 255)
    mask.paste(0, (0, 0, 8, 8))
    for call, message in (
        (lambda: up(), "does super-resolution: pass image"),
        (lambda: up(image=picture_of(made, 5)), "takes 4 x 4 or 16 x 16"),
        (lambda: up(image=whole, mask_image=mask), "leave out mask_image"),
        (lambda: up(image=whole, strength=0.5), "strength is 0.5"),
        (lambda: up(prompt="cat", image=whole), "conditional on class and image"),
        (lambda: up(["a", "b", "a"], image=[whole, whole]), "2 of image were given for 3"),
        (lambda: paint(image=whole), "does inpainting: pass mask_image"),
        (lambda: paint("a", image=whole, mask_image=mask), "image-conditional"),
        (lambda: paint(image=whole, mask_image=mask.resize((8, 8))), "the mask has 8 x 8 pixels"),
    ):
        with pytest.raises(smalti.SmaltiError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_training_needs_pictures_beside_the_latents(made: Path, tmp_path: Path, capsys) -> None:
    tokenizer = ["--tokenizer", str(made / "class" / "tokenizer")]
    data = ["--data", str(made / "pictures"), "--output_dir", str(tmp_path / "plain")]
    assert smalti_main(["encode", *tokenizer, *data]) == 0
    argv = ["--latents", str(tmp_path / "plain"), "--output_dir", str(tmp_path / "run")]
    argv += [*tokenizer, "--initial", str(made / "class"), "--condition", "image"]
    assert smalti_main(["train-prior", *argv]) == 2
    assert "encode with --image_task super-resolution or inpainting" in capsys.readouterr().err


def test_codes_are_no_latents_of_an_image_task(made: Path, tmp_path: Path, capsys) -> None:
    VQTokenizer(PRESETS["vq-32-tiny"]).save_pretrained(tmp_path / "vq")
    argv = ["--tokenizer", str(tmp_path / "vq"), "--data", str(made / "pictures")]
    argv += ["--output_dir", str(tmp_path / "latents"), "--image_task", "inpainting"]
    assert smalti_main(["encode", *argv]) == 2
    assert "needs continuous latents" in capsys.readouterr().err
    assert not (tmp_path / "latents").exists()
