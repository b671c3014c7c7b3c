"""The options of `smalti generate`: shares of classes, formats and precision."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from smalti.cli import main
from smalti.errors import SmaltiError
from smalti.files import checked_lines, read_json
from smalti.pipelines.pipeline import Pipeline
from smalti.scripts.generate import GenerateConfig, by_shares, generate
from smalti.training import progress

CLASSES = ("blue", "green", "red")


@pytest.fixture
def pipe(tokenizer, prior, tmp_path: Path) -> Path:
    return Pipeline(tokenizer, prior, CLASSES).save_pretrained(tmp_path / "pipe")


def run(pipe: Path, out: Path, *flags: str) -> int:
    return main(["generate", "--model", str(pipe), "--output_dir", str(out), *flags])


def classes_of(folder: Path) -> list[str]:
    rows, damaged = checked_lines(folder / "manifest.jsonl", "index")
    assert damaged == []
    return [row["class"] for row in rows]


# -- shares of classes ----------------------------------------------------------------------------


def test_shares_are_kept_by_every_beginning_of_the_sequence() -> None:
    """The seats that Webster's method gives; equal shares take turns."""
    assert by_shares([1, 1, 1], 7) == [0, 1, 2, 0, 1, 2, 0]
    assert Counter(by_shares([5, 3, 0, 2], 100)) == {0: 50, 1: 30, 3: 20}
    shares = np.array([0.53, 0.31, 0.11, 0.05])
    long = by_shares(list(shares), 1000)
    for total in (1, 10, 77, 500, 1000):
        counts = np.bincount(long[:total], minlength=4)
        assert long[:total] == by_shares(list(shares), total)
        assert np.abs(counts - shares * total).max() <= 1


def test_the_classes_have_the_given_shares(pipe: Path, tmp_path: Path, pictures: Path) -> None:
    out = tmp_path / "numbers"
    assert run(pipe, out, "--num_images", "4", "--class_weights", "2", "0", "6") == 0
    assert Counter(classes_of(out)) == {"blue": 1, "red": 3}
    assert run(pipe, out, "--num_images", "8", "--class_weights", "2", "0", "6") == 0
    assert Counter(classes_of(out)) == {"blue": 2, "red": 6}
    for number in range(6):  # of 8
        (pictures / "green" / f"{number}.png").unlink()
    listed = ("--class_labels", "green", "red", "--class_weights", str(pictures))
    assert run(pipe, tmp_path / "data", "--num_images", "5", *listed) == 0
    assert Counter(classes_of(tmp_path / "data")) == {"green": 1, "red": 4}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--class_weights", "1", "1", "1"], "shares of num_images: give --num_images"),
        (["--num_images", "4", "--class_weights", "1", "2"], "2 class_weights were given for 3"),
        (["--num_images", "4", "--class_weights", "0", "0", "0"], "numbers of 0 or more, not all"),
        (["--num_images", "4", "--class_weights", "1", "-1", "1"], "numbers of 0 or more"),
        (["--num_images", "4", "--class_weights", "1", "nan", "1"], "numbers of 0 or more"),
        (["--num_images", "4", "--class_weights", "1", "x", "1"], "give numbers, or one place"),
        (["--num_images", "4", "--class_weights", "./nowhere"], "nowhere"),
        (["--quality", "90"], "quality is 90, but png keeps pictures as they are"),
        (["--format", "jpeg", "--quality", "0"], "quality is 0; it must be 1 to 100"),
        (["--format", "npz", "--layout", "class"], "layout class makes a folder for each class"),
        (["--format", "gif"], "gif"),
        (["--dtype", "int9"], "int9"),
    ],
)
def test_a_wrong_value_is_one_line_and_writes_nothing(
    pipe: Path, tmp_path: Path, capsys, flags: list[str], message: str
) -> None:
    try:
        status = run(pipe, tmp_path / "out", *flags)
    except SystemExit as stop:  # of a word that is not one of the choices
        status = int(str(stop.code))
    assert status == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_pictures_without_a_class_of_the_pipeline_are_refused(pipe, tmp_path, pictures) -> None:
    (pictures / "green").rename(pictures / "grey")
    weights = (str(pictures),)
    config = GenerateConfig(
        model=str(pipe), output_dir=tmp_path / "out", num_images=4, class_weights=weights
    )
    with pytest.raises(SmaltiError, match="which has no class green: give --class_labels"):
        generate(config)


# -- precision ------------------------------------------------------------------------------------


def test_half_precision_is_a_job_of_its_own(pipe: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert run(pipe, out, "--num_images", "3", "--dtype", "bf16") == 0
    assert "torch.bfloat16" in read_json(out / "generation.json")["model"]
    assert run(pipe, out, "--num_images", "3") == 2
    error = capsys.readouterr().err
    assert "sampled in bfloat16, not in float32: give --dtype bfloat16, or choose another" in error
    assert read_json(out / "generation.json")["dtype"] == "bfloat16"
    assert run(pipe, tmp_path / "whole", "--num_images", "2", "--dtype", "int8") == 0
    assert read_json(tmp_path / "whole" / "generation.json")["dtype"] == "int8"
    assert run(pipe, tmp_path / "half", "--num_images", "2", "--dtype", "fp16") == 0
    assert Image.open(tmp_path / "half" / "000001.png").size == (16, 16)


@pytest.mark.slow
def test_compiled_models_make_the_same_pictures_but_for_rounding(
    pipe: Path, tmp_path: Path, capsys
) -> None:
    flags = ("--num_images", "3", "--temperature", "0", "--guidance_scale", "1")
    assert run(pipe, tmp_path / "plain", *flags) == 0
    assert run(pipe, tmp_path / "fast", *flags, "--compile") == 0
    for index in range(3):
        names = [tmp_path / name / f"{index:06d}.png" for name in ("plain", "fast")]
        plain, fast = (np.asarray(Image.open(name)).astype(int) for name in names)
        assert np.abs(plain - fast).max() <= 1
    assert run(pipe, tmp_path / "fast", *flags) == 2
    assert "its compiled differs" in capsys.readouterr().err


# -- processes ------------------------------------------------------------------------------------

JOB = """
import sys
from pathlib import Path
import torch
from accelerate import PartialState
from torch.distributed.distributed_c10d import _get_default_group
from smalti.scripts.generate import main

assert main(sys.argv[2:]) == 0
state = PartialState()
# One may take hours longer than the others.
assert _get_default_group()._get_backend(torch.device("cpu")).options._timeout.days >= 1
Path(sys.argv[1], f"{state.process_index} of {state.num_processes}").touch()
"""


@pytest.mark.slow  # three starts of Python
def test_two_processes_write_the_bytes_of_one(pipe: Path, tmp_path: Path) -> None:
    flags = ("--num_images", "7", "--batch_size", "2", "--format", "webdataset")
    assert run(pipe, tmp_path / "one", *flags) == 0
    (tmp_path / "job.py").write_text(JOB)
    out = ["--model", str(pipe), "--output_dir", str(tmp_path / "two"), *flags]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launcher, str(tmp_path / "job.py"), str(tmp_path), *out],
        env={**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert {path.name for path in tmp_path.glob("* of *")} == {"0 of 2", "1 of 2"}
    assert done.stdout.count("7 pictures") == 1
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / name).rglob("*") if path.is_file()}
        for name in ("one", "two")
    )
    assert one == two


# -- progress -------------------------------------------------------------------------------------


def test_a_log_has_lines_with_images_per_second_and_the_time_left(
    pipe: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    assert run(pipe, tmp_path / "out", "--num_images", "20") == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "generate:" in line]
    assert "20 of 20" in lines[-1]
    assert all("images/s" in line and line.endswith("left") for line in lines[1:])
