"""The command `smalti edit`: the files it writes, and what it refuses before it writes anything."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import CLASSES, TINY_CONV, TINY_FLOW, TINY_PRIOR
from PIL import Image

from smalti.cli import main
from smalti.pipelines.generation import picture_generator
from smalti.pipelines.pipeline import Pipeline
from smalti.prior.conditions.image import ImageConfig
from smalti.prior.flow.prior import FlowConfig
from smalti.prior.next_token.model import NextTokenPrior
from smalti.prior.registry import PRIORS
from smalti.tokenizer.kl import KLConfig, KLTokenizer

BOX = "4,4,12,12"


@pytest.fixture
def model(tokenizer, prior, tmp_path: Path) -> Path:
    return Pipeline(tokenizer, prior, ("cat", "dog", "emu")).save_pretrained(tmp_path / "model")


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two pictures of 16 x 16 pixels."""
    random = np.random.default_rng(0)
    paths = [tmp_path / f"{name}.png" for name in ("one", "two")]
    for path in paths:
        Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    return paths


def edit(model: Path, files: list[Path], *more: object, out: str = "edited") -> int:
    words = ["edit", "--model", model, "--image", *files, "--output_dir", model.parent / out, *more]
    return main([str(word) for word in words])


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_results_and_strip(model: Path, files: list[Path], tmp_path: Path, capsys) -> None:
    more = ("--box", BOX, "--class_labels", "dog", "2", "--num_images", 3, "--seed", 5)
    assert edit(model, files, *more, "--temperature", "0.5", "--batch_size", 5, "--no_paste") == 0
    out = tmp_path / "edited"
    assert capsys.readouterr().out == f"12 pictures, and strip.png: {out}\n"
    names = sorted(path.name for path in out.iterdir())
    assert names == [f"{i:06d}.png" for i in range(12)] + ["strip.png"]
    mask = Image.new("L", (16, 16))
    mask.paste(255, (4, 4, 12, 12))
    wanted = Pipeline.from_pretrained(model)(
        ["emu"],
        image=Image.open(files[1]),
        mask_image=mask,
        temperature=0.5,
        generator=[picture_generator(5, 10)],
    )
    assert np.array_equal(pixels(out / "000010.png"), np.asarray(wanted.images[0]))
    strip = pixels(out / "strip.png")
    height, width = (n * 18 * 6 + 12 for n in (4, 5))
    assert strip.shape[0] == height and strip.shape[1] > width  # and the class of each row
    grid = strip[:, -width:][::6, ::6]
    original, condition = (grid[2:18, 2 + 18 * i : 18 + 18 * i] for i in range(2))
    assert np.array_equal(original, pixels(files[0]))
    inside = np.asarray(mask) > 0
    assert (condition[inside] == 128).all()
    assert np.array_equal(condition[~inside], original[~inside])
    assert np.array_equal(grid[-18:-2, -18:-2], pixels(out / "000011.png"))


def test_a_mask_is_the_same_as_its_box(model: Path, files: list[Path], tmp_path: Path) -> None:
    mask = Image.new("RGB", (16, 16))
    mask.paste((255, 255, 255), (4, 4, 12, 12))
    mask.save(tmp_path / "mask.png")
    for out, condition in (("a", ("--box", BOX)), ("b", ("--mask", tmp_path / "mask.png"))):
        assert edit(model, files, *condition, "--num_images", 1, out=out) == 0
    for name in ("000000.png", "000001.png", "strip.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_pasting_keeps_the_pixels_outside_the_mask(
    model: Path, files: list[Path], tmp_path: Path
) -> None:
    for out, more in (("a", []), ("b", ["--no_paste"])):
        assert edit(model, files[:1], "--box", BOX, "--num_images", 1, *more, out=out) == 0
    pasted, plain = (pixels(tmp_path / out / "000000.png") for out in "ab")
    inside = np.zeros((16, 16), bool)
    inside[4:12, 4:12] = True
    assert np.array_equal(pasted[inside], plain[inside])
    assert np.array_equal(pasted[~inside], pixels(files[0])[~inside])
    assert not np.array_equal(plain[~inside], pixels(files[0])[~inside])


def test_deep_pictures_are_converted_and_masks_with_alpha_refused(
    model: Path, files: list[Path], tmp_path: Path, capsys
) -> None:
    deep = tmp_path / "deep.png"
    grey = np.asarray(Image.open(files[0]).convert("L")).astype(np.uint16) * 257
    Image.fromarray(grey).save(deep)
    assert edit(model, [deep], "--box", BOX, "--num_images", 1) == 0
    assert np.array_equal(pixels(tmp_path / "edited" / "000000.png")[0, :, 0], grey[0] // 257)
    mask = Image.new("RGBA", (16, 16))
    mask.paste((255, 255, 255, 255), (4, 4, 12, 12))
    mask.save(tmp_path / "mask.png")
    assert edit(model, files[:1], "--mask", tmp_path / "mask.png", out="alpha") == 2
    assert "the mask has transparent pixels" in capsys.readouterr().err


def test_pictures_of_another_size_are_cropped_when_asked(
    model: Path, files: list[Path], tmp_path: Path, capsys
) -> None:
    large = tmp_path / "large.png"
    Image.open(files[0]).resize((64, 32), Image.Resampling.NEAREST).save(large)
    box = ("--box", "24,8,40,24", "--num_images", 1)
    assert edit(model, [large], *box) == 2
    assert "the image has 64 x 32 pixels; this model takes 16 x 16" in capsys.readouterr().err
    assert not (tmp_path / "edited").exists()
    assert edit(model, [large], *box, "--resize") == 0
    assert (pixels(tmp_path / "edited" / "strip.png")[::6, ::6][2 + 4, 20 + 4] == 128).all()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--box", BOX, "--class_labels", "cow"], 'no class is named "cow"'),
        (["--box", "4,4,20,12"], "box is 4,4,20,12; in a picture of 16 x 16 pixels give"),
        (["--box", BOX, "--mask", "two.png"], "both a mask and a box were given"),
        (["--mask", "none.png"], "the picture none.png does not exist"),
        (["--mask", "a.png", "b.png"], "1 pictures and 2 masks were given"),
        ([], "an image without a mask cannot be edited by a next-token prior"),
        (["--strength", "0.5"], "strength is 0.5, but a next-token prior samples codes"),
        (["--box", BOX, "--solver", "heun"], 'has no sampling option "solver"'),
        (["--box", BOX, "--num_images", "0"], "num_images is 0"),
        (["--box", BOX, "--output_dir", "full"], "full is not empty: choose another --output_dir"),
    ],
)
def test_what_is_refused(
    model: Path, files: list[Path], tmp_path: Path, monkeypatch, capsys, more, message
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    before = sorted(tmp_path.rglob("*"))
    assert edit(model, files[:1], *more) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


TEXT = replace(TINY_PRIOR, condition="text", num_classes=0, text_length=8, text_dim=8)
CAPTIONS = replace(TEXT, text_encoder="bytes")
ALL_LABELLED = replace(TINY_PRIOR, label_dropout=0.0)
PAINTER = TINY_FLOW.conditioned("image", image=ImageConfig(3, "inpainting"))
WHITE = "white.png"
NO_FLAG = ("mask_image", "num_images_per_prompt", "known_mask", "prompt_embeds")  # of Python alone


@pytest.mark.parametrize(
    ("prior", "more", "message"),
    [
        (TINY_PRIOR, [], "give mask_image (smalti edit: --mask), white where it is to generate"),
        (TINY_PRIOR, ["--strength", "0.5"], "and give mask_image (smalti edit: --mask)"),
        (TINY_PRIOR, ["--box", BOX, "--prompt", "a"], "--prompt is given, but "),
        (TINY_PRIOR, ["--mask", WHITE], "paint black what is to be kept, or generate without a"),
        (TINY_PRIOR.conditioned("none"), ["--box", BOX, "--prompt", "a"], "--prompt is given, but"),
        (CAPTIONS, ["--box", BOX, "--class_labels", "cat"], "--class_labels is given, but"),
        (CAPTIONS, ["--box", BOX], "is text-conditional: give --prompt\n"),
        (ALL_LABELLED, ["--box", BOX], "is class-conditional: give --class_labels\n"),
        (TINY_FLOW, ["--strength", "1"], "mask_image (smalti edit: --mask), or a strength below 1"),
        (PAINTER, [], "does inpainting: pass mask_image (smalti edit: --mask), white where it"),
        (PAINTER, ["--box", BOX, "--strength", "0.5"], "conditional on pictures: leave it out"),
        (TEXT, ["--box", BOX], "needs prompt_embeds, for which there is no flag: call it in"),
    ],
)
def test_errors_name_flags_or_say_that_there_is_none(
    tokenizer, files: list[Path], tmp_path: Path, capsys, prior, more, message
) -> None:
    Image.new("L", (16, 16), 255).save(tmp_path / WHITE)
    if isinstance(prior, FlowConfig):
        tokenizer = KLTokenizer(KLConfig(16, conv=replace(TINY_CONV, z_channels=2)))
    classes = CLASSES if prior.condition == "class" else ()
    made = PRIORS.build(prior.fitted(tokenizer.spec, len(classes), tokenizer.fingerprint))
    if prior is ALL_LABELLED:
        made.get_parameter(made.class_table).data[-1] = 0  # no null class
    model = Pipeline(tokenizer, made, classes)
    more = [str(tmp_path / word) if word == WHITE else word for word in more]
    assert edit(model.save_pretrained(tmp_path / "model"), files[:1], *more) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    for name in NO_FLAG:
        assert name not in error or "smalti edit: --" in error or "no flag" in error
    assert not re.search(r"(?<!-)\b(class_labels|prompt)\b", error)


def test_a_picture_is_needed(capsys) -> None:
    assert main(["edit"]) == 2
    assert "no picture was given: pass --image FILE" in capsys.readouterr().err


def test_known_codes_and_strength_are_options_of_this_command_alone(capsys) -> None:
    assert main(["generate", "--strength", "0.5"]) == 2
    assert "strength" in capsys.readouterr().err


def test_every_picture_is_edited_with_every_class_and_prompt(
    tokenizer, files: list[Path], tmp_path: Path
) -> None:
    config = replace(
        TINY_PRIOR,
        condition="class+text",
        text_length=8,
        text_dim=8,
        text_encoder="bytes",
        tokenizer_fingerprint=tokenizer.fingerprint,
    )
    pipe = Pipeline(tokenizer, NextTokenPrior(config), ("cat", "dog", "emu"))
    model = pipe.save_pretrained(tmp_path / "both")
    more = ("--box", BOX, "--class_labels", "cat", "dog", "--prompt", "a", "b", "c")
    assert edit(model, files, *more, "--num_images", 1, "--no_paste") == 0
    out = tmp_path / "edited"
    assert len(list(out.glob("0*.png"))) == 12
    mask = Image.new("L", (16, 16))
    mask.paste(255, (4, 4, 12, 12))
    wanted = Pipeline.from_pretrained(model)(
        "dog",
        prompt="b",
        image=Image.open(files[1]),
        mask_image=mask,
        generator=[picture_generator(0, 9)],
    )
    assert np.array_equal(pixels(out / "000009.png"), np.asarray(wanted.images[0]))
