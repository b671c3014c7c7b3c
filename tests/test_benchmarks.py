"""The benchmarks run, at sizes that say nothing about speed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(script: str, *arguments: str) -> str:
    """Its output."""
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_tokenizer_speed_is_a_ratio_to_diffusers() -> None:
    out = run("tokenizer_speed.py", "--image_size=16", "--batch_size=1", "--rounds=1", "--codes=64")
    lines = out.splitlines()
    assert len(lines) == 7
    assert all(float(line.rpartition("= ")[2]) > 0 for line in lines[:6])


@pytest.mark.slow
def test_tokenizers_are_compared_in_a_table(tmp_path: Path) -> None:
    arguments = ("--presets", "vq-32-tiny", "kl-32-tiny", "--max_train_steps", "1")
    out = run("compare_tokenizers.py", *arguments, "--output_dir", str(tmp_path))
    rows = [line for line in out.splitlines() if line.startswith("| ")]
    assert rows[0].startswith("| preset | latents")
    assert rows[-2].startswith("| `vq-32-tiny` | 64 codes of 512 | 0.56 |")
    assert rows[-1].startswith("| `kl-32-tiny` | 8 x 8 x 8 numbers | - |")


@pytest.mark.slow
def test_next_scale_speed_is_a_share_of_time() -> None:
    arguments = ("--preset", "var-nano", "--sides", "1", "2", "--rounds", "1", "--device", "cpu")
    line = json.loads(run("next_scale_speed.py", *arguments))
    assert line["seconds_per_image"] > 0 and line["saved_by_projecting_once"] < 1
