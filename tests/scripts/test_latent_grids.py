"""The commands that show a latent space: the latent grids they write, and what they refuse."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY_VQ
from PIL import Image

from smalti.cli import main as smalti_main
from smalti.data.dataset import DataOptions, write_options
from smalti.pipelines.latent_editor import LatentEditor, evenly_spaced, signed
from smalti.pipelines.pipeline import Pipeline
from smalti.scripts.interpolate import InterpolateConfig, interpolate
from smalti.scripts.invert import InvertConfig, invert
from smalti.scripts.traverse import TraverseConfig, traverse
from smalti.tokenizer.kl import KLConfig, KLTokenizer
from smalti.tokenizer.vq import VQTokenizer

COMMANDS = {
    "interpolate": ["--indices", "0", "23", "--steps", "3"],
    "attribute": ["--indices", "0", "5", "--positive", "red", "--negative", "1"],
    "traverse": ["--indices", "7", "--channels", "3", "0", "--strengths", "-1", "0", "2.5"],
    "invert": ["--indices", "0", "9", "--steps", "4", "--perceptual_weight", "0"],
}


@pytest.fixture
def model(tokenizer, tmp_path: Path) -> Path:
    return tokenizer.save_pretrained(tmp_path / "model")


def command(name: str, model: Path, pictures: Path, *more: str) -> list[str]:
    return [name, "--model", str(model), "--data", str(pictures), *COMMANDS[name], *more]


def cell(grid: Path, row: int, column: int, *, left: int, scale: int = 6) -> np.ndarray:
    """The 16 px image in a cell of a latent grid, (16, 16, 3)."""
    pixels = np.asarray(Image.open(grid))[16:, left:][::scale, ::scale]
    top, side = 2 + row * 18, 2 + column * 18
    return pixels[top : top + 16, side : side + 16]


@pytest.mark.parametrize(
    ("name", "rows", "columns"),
    [("interpolate", 2, 5), ("attribute", 2, 6), ("traverse", 2, 4), ("invert", 4, 2)],
)
def test_every_command_writes_a_latent_grid(
    model: Path, pictures: Path, tmp_path: Path, capsys, name: str, rows: int, columns: int
) -> None:
    output = tmp_path / "new" / "grid.PNG"
    assert smalti_main(command(name, model, pictures, "--output", str(output))) == 0
    assert f"latent grid: {output}" in capsys.readouterr().out
    image = Image.open(output)
    left = image.width - 6 * (18 * columns + 2)
    assert image.mode == "RGB" and left > 8
    assert image.height == 16 + 6 * (18 * rows + 2)


def test_the_tokenizer_of_a_pipeline_is_used(
    tokenizer, prior, pictures: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Pipeline(tokenizer, prior, ["a", "b", "c"]).save_pretrained("pipe")
    tokenizer.save_pretrained("tok")
    for name in ("pipe", "tok"):
        more = ["--output", f"{name}.png"]
        assert smalti_main(command("interpolate", Path(name), pictures, *more)) == 0
    assert Path("pipe.png").read_bytes() == Path("tok.png").read_bytes()


def test_files_and_indices_name_the_same_pictures(
    model: Path, pictures: Path, tmp_path: Path
) -> None:
    base = InterpolateConfig(model=str(model), data=str(pictures))
    files = (pictures / "blue" / "0.png", pictures / "green" / "1.png")
    one = interpolate(replace(base, indices=(0, 9), output=tmp_path / "one.png"))
    two = interpolate(replace(base, images=files, output=tmp_path / "two.png"))
    assert one.read_bytes() == two.read_bytes()


def test_the_ends_of_a_row_are_reconstructions_beside_their_originals(
    tokenizer, model: Path, pictures: Path, tmp_path: Path
) -> None:
    output = tmp_path / "grid.png"
    config = InterpolateConfig(
        model=str(model), data=str(pictures), indices=(3, 20), output=output, steps=4
    )
    grid, editor = interpolate(config), LatentEditor(replace(config, output=tmp_path / "n.png"))
    left = Image.open(grid).width - 6 * (18 * 6 + 2)
    images = editor.read([3, 20])
    sampled = ((tokenizer.reconstruct(images) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
    original = ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
    for row in range(2):
        expected = [original[0], sampled[0], sampled[1], original[1]]
        for column, picture in zip((0, 1, 4, 5), expected, strict=True):
            shown = cell(grid, row, column, left=left).astype(int)
            assert np.abs(shown - picture.numpy()).max() <= 1


def test_inversion_reduces_the_distance(tokenizer, pictures: Path, tmp_path: Path) -> None:
    larger = type(tokenizer)(replace(tokenizer.config, image_size=32))
    folder = larger.save_pretrained(tmp_path / "model")
    base = InvertConfig(model=str(folder), data=str(pictures), indices=(0, 9), steps=10)
    for start in ({}, {"start": "mean", "max_pictures": 5}):
        found = invert(replace(base, **start, output=tmp_path / f"{len(start)}.png"))
        assert found.losses.shape == (11, 2) and found.vectors.shape == (2, 4, 16, 16)
        assert (found.losses.min(0).values < found.losses[0]).all()


@pytest.mark.parametrize("name", COMMANDS)
def test_continuous_latents_can_be_shown_too(
    tokenizer, pictures: Path, tmp_path: Path, name: str
) -> None:
    continuous = KLTokenizer(KLConfig(image_size=16, conv=tokenizer.config.conv))
    model = continuous.save_pretrained(tmp_path / "kl")
    output = tmp_path / "grid.png"
    assert smalti_main(command(name, model, pictures, "--output", str(output))) == 0
    assert output.is_file()


def test_the_first_channels_are_traversed_unless_others_are_named(
    model: Path, pictures: Path, tmp_path: Path
) -> None:
    config = TraverseConfig(
        model=str(model), data=str(pictures), indices=(1,), output=tmp_path / "grid.png"
    )
    assert Image.open(traverse(config)).height == 16 + 6 * (18 * 4 + 2)


def test_an_existing_file_is_replaced_only_on_request(
    model: Path, pictures: Path, tmp_path: Path, capsys
) -> None:
    output = tmp_path / "grid.png"
    output.write_text("mine")
    arguments = command("interpolate", model, pictures, "--output", str(output))
    assert smalti_main(arguments) == 2
    assert f"{output} exists: choose another --output" in capsys.readouterr().err
    assert output.read_text() == "mine"
    assert smalti_main([*arguments, "--overwrite"]) == 0
    assert Image.open(output).format == "PNG"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["interpolate"], "give images either as --images FILE"),
        (["interpolate", "--indices", "0", "1", "--images", "a.png"], "give images either"),
        (["interpolate", "--indices", "0"], "--indices names 1 images; this command takes 2"),
        (["interpolate", "--indices", "0", "24"], "index 24 is out of range"),
        (["interpolate", "--indices", "-1", "0"], "has images 0 to 23"),
        (["interpolate", "--indices", "0", "1", "--steps", "1"], "steps is 1"),
        (["interpolate", "--images", "a.png", "b.png"], "the picture a.png does not exist"),
        (["interpolate", "--images", "empty", "b.png"], "the picture empty is not a file"),
        (["interpolate", "--images", "text.png", "b.png"], "text.png cannot be decoded"),
        (["interpolate", "--images", "deep.png", "b.png"], "deep.png is 16-bit"),
        (["interpolate", "--images", "dot.png", "b.png"], "dot.png is 2 x 2 pixels, less than 8"),
        (["interpolate", "--indices", "0", "1", "--data", "emojj"], 'did you mean "emoji"'),
        (["interpolate", "--indices", "0", "1", "--model", "./none"], "folder not found: ./none"),
        (["interpolate", "--indices", "0", "1", "--model", "empty"], "not a saved tokenizer"),
        (["interpolate", "--indices", "0", "1", "--model", "PRIOR"], "a prior, not a tokenizer"),
        (
            ["interpolate", "--indices", "0", "1", "--output", "x.jpg"],
            "use a name that ends in .png",
        ),
        (["interpolate", "--indices", "0", "1", "--output", "f.png"], "f.png is a folder"),
        (["interpolate", "--indices", "0", "1", "--output", "dot.png/x.png"], "dot.png is a file"),
        (["interpolate", "--indices", "0", "1", "--batch_size", "0"], "batch_size is 0"),
        (["attribute", "--indices", "0"], "known are blue, green, red"),
        (
            ["attribute", "--indices", "0", "--positive", "rad", "--negative", "blue"],
            'no class is named "rad"; known are for example red',
        ),
        (
            ["attribute", "--indices", "0", "--positive", "3", "--negative", "blue"],
            "class label 3 is out of range: use 0 to 2",
        ),
        (
            ["attribute", "--indices", "0", "--positive", "0", "--negative", "blue"],
            'positive and negative are both "blue"',
        ),
        (
            ["attribute", "--indices", "0", "--strengths", "nan"],
            "strengths[0] is nan; expected a finite float",
        ),
        (["attribute", "--indices", "0", "--max_pictures", "0"], "max_pictures is 0"),
        (["traverse", "--indices", "0", "1"], "this command takes 1"),
        (["traverse", "--indices", "0", "--channels", "4"], "channel 4 is out of range"),
        (["traverse", "--indices", "0", "--strengths"], "strengths"),
        (["invert", "--indices", "0"], "pass --perceptual_weight 0"),
        (["invert", "--indices", "0", "--steps", "0"], "steps is 0"),
        (["invert", "--indices", "0", "--learning_rate", "-1"], "learning_rate -1.0"),
        (["invert", "--indices", "0", "--perceptual_weight", "-1"], "perceptual_weight is -1.0"),
        (["invert", "--indices", "0", "--start", "zero"], "start"),
        (["invert", "--indices", "0", "--max_pictures", "9"], "add --start mean"),
    ],
)
def test_errors_end_in_one_line_and_write_nothing(
    model: Path, prior, pictures: Path, tmp_path: Path, capsys, monkeypatch, arguments, message
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "f.png"):
        Path(folder).mkdir()
    Path("text.png").write_text("hello")
    Image.fromarray(np.full((20, 20), 40000, dtype=np.uint16)).save("deep.png")
    Image.new("RGB", (2, 2)).save("dot.png")
    before = set(tmp_path.rglob("*.png")) | set(tmp_path.rglob("*.jpg"))
    if "PRIOR" in arguments:
        arguments = [a if a != "PRIOR" else str(prior.save_pretrained("prior")) for a in arguments]
    name, *rest = arguments
    defaults = {"--model": str(model), "--data": str(pictures), "--output": "grid.png"}
    flags = [part for flag, value in defaults.items() if flag not in rest for part in (flag, value)]
    status = smalti_main([name, *flags, *rest])
    error = capsys.readouterr().err
    assert status == 2
    assert message in error.strip().splitlines()[-1]
    assert "Traceback" not in error
    assert set(tmp_path.rglob("*.png")) | set(tmp_path.rglob("*.jpg")) == before


def test_attributes_are_those_of_classes(model: Path, pictures: Path, capsys) -> None:
    more = ["--data", str(pictures / "red"), "--positive", "a", "--negative", "b"]
    assert smalti_main(["attribute", "--model", str(model), "--indices", "0", *more]) == 2
    assert "have no classes: name others in --data" in capsys.readouterr().err


def test_evenly_spaced_indices_start_with_the_first() -> None:
    assert evenly_spaced(range(100), 4) == [0, 25, 50, 75]
    assert evenly_spaced([4, 7], 10) == [4, 7]


def test_column_labels_are_signed_numbers() -> None:
    assert [signed(x) for x in (-1.5, 0.0, 2.0)] == ["-1.5", "0", "+2"]


def test_alpha_that_is_kept_is_no_other_option(tmp_path: Path, capsys, caplog) -> None:
    """A tokenizer with alpha was trained with the same options that the grid has."""
    for i in range(4):
        picture = Image.new("RGBA", (16, 16), (60 * i, 0, 0, 128))
        (tmp_path / "set").mkdir(exist_ok=True)
        picture.save(tmp_path / "set" / f"{i}.png")
    model = VQTokenizer(replace(TINY_VQ, image_channels=4)).save_pretrained(tmp_path / "model")
    data = str(tmp_path / "set")
    write_options(model, DataOptions(data=data))
    argv = ["--model", str(model), "--data", data, "--indices", "0", "1"]
    with caplog.at_level("INFO"):
        assert smalti_main(["interpolate", *argv, "--output", str(tmp_path / "x.png")]) == 0
    assert "was trained with" not in caplog.text
