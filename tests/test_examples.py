"""The programs of `examples/` run, each in a tiny form on the CPU."""

import json
import os
import runpy
import sys
from pathlib import Path

import pytest

from smalti.pipelines.pipeline import Pipeline
from smalti.prior.next_token.model import NextTokenPrior
from smalti.tokenizer.base import Tokenizer
from smalti.tokenizer.quantizers import QUANTIZERS
from smalti.tokenizer.vq import VQTokenizer

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(monkeypatch: pytest.MonkeyPatch, name: str, **options: object) -> None:
    """Run a script as a user would: `python examples/name --option value ...`."""
    flags = [str(part) for key, value in options.items() for part in (f"--{key}", value)]
    monkeypatch.setattr(sys, "argv", [name, *flags])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.fixture
def pipeline(tmp_path: Path, tokenizer: VQTokenizer, prior: NextTokenPrior) -> Path:
    """A saved pipeline of the tiny models, with the classes of the fixture `pictures`."""
    return Pipeline(tokenizer, prior, ("blue", "green", "red")).save_pretrained(tmp_path / "saved")


def test_every_example_is_run_here() -> None:
    source = Path(__file__).read_text()
    examples = [path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")]
    assert len(examples) == 6
    assert [name for name in examples if f'"{name}"' not in source] == []


@pytest.mark.slow
def test_train_on_a_folder(monkeypatch, tmp_path: Path, pictures: Path) -> None:
    out = tmp_path / "out"
    options = {"data": pictures, "output_dir": out, "steps": 2, "batch_size": 4}
    run(monkeypatch, "train_on_a_folder.py", **options)
    assert (out / "samples.png").is_file()
    assert Pipeline.from_pretrained(out / "prior" / "pipeline").classes == ("blue", "green", "red")


def test_sample_and_interpolate(monkeypatch, tmp_path: Path, pipeline: Path) -> None:
    out = tmp_path / "out"
    run(monkeypatch, "sample_and_interpolate.py", pipeline=pipeline, output_dir=out, count=3)
    assert (out / "guidance.png").is_file()
    assert (out / "interpolation.png").is_file()


def test_new_pictures(monkeypatch, capsys, tmp_path: Path, pipeline: Path) -> None:
    out = tmp_path / "new" / "pictures.png"
    run(monkeypatch, "new_pictures.py", pipeline=pipeline, output=out, per_class=2, seed=7)
    assert "3 classes x 2 new pictures" in capsys.readouterr().out
    assert out.is_file()


def test_edit_pictures(monkeypatch, capsys, tmp_path: Path, pipeline: Path, pictures: Path) -> None:
    out = tmp_path / "out"
    options = {"pipeline": pipeline, "data": pictures, "output_dir": out, "count": 2}
    run(monkeypatch, "edit_pictures.py", **options)
    assert (out / "edits.png").is_file()
    assert capsys.readouterr().out.count("result to reconstruction 0.") == 4


@pytest.mark.slow
def test_custom_quantizer(monkeypatch, tmp_path: Path, pictures: Path) -> None:
    monkeypatch.setattr(QUANTIZERS, "_entries", dict(QUANTIZERS._entries))
    out = tmp_path / "out"
    options = {"data": pictures, "output_dir": out, "steps": 2, "batch_size": 4}
    run(monkeypatch, "custom_quantizer.py", **options)
    assert (out / "reconstructions.png").is_file()
    assert Tokenizer.from_pretrained(out / "tokenizer").spec.vocab_size == 729


def test_the_notebook(monkeypatch, capsys, pictures: Path, pipeline: Path) -> None:
    """Every code cell runs, in order, in one namespace; none is saved with its output."""
    monkeypatch.setitem(os.environ, "SMALTI_PIPELINE", str(pipeline))
    monkeypatch.setitem(os.environ, "SMALTI_DATA", str(pictures))
    notebook = json.loads((EXAMPLES / "walk_through.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    names: dict[str, object] = {}
    for cell in cells:
        assert not cell["outputs"]
        exec(compile("".join(cell["source"]), "walk_through.ipynb", "exec"), names)
    assert len(cells) >= 5
    assert "bits per code" in capsys.readouterr().out
