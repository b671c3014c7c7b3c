"""What a run shows while it works, on a terminal and in a log."""

import io
import re
import sys
from pathlib import Path

import pytest
from toy_run import toy_config, train

from smalti.training import progress
from smalti.training.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_has_a_line_per_logging_steps_and_validation(tmp_path: Path, capsys) -> None:
    train(toy_config(tmp_path / "run", logging_steps=2, validation_steps=3))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("toy: ")]
    number, left = r"[\d.,e+-]+", r"\d:\d\d:\d\d left"
    expected = [
        rf"toy: step 2 of 6: loss {number}, learning rate 0\.01, {number} images/s, {left}",
        rf"toy: step 3 of 6: validation: norm {number}",
        rf"toy: step 4 of 6: loss {number}, learning rate 0\.01, {number} images/s, {left}",
        rf"toy: step 6 of 6: loss {number}, learning rate 0\.01, {number} images/s, {left}",
        rf"toy: step 6 of 6: validation: norm {number}",
    ]
    assert len(lines) == len(expected)
    for line, pattern in zip(lines, expected, strict=True):
        assert re.fullmatch(pattern, line), line


def test_a_terminal_has_a_bar_with_the_loss(tmp_path: Path, monkeypatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    train(toy_config(tmp_path / "run"))
    shown = screen.getvalue()
    assert "toy: 100%" in shown and "6/6" in shown
    assert re.search(r"loss [\d.]+, learning rate 0\.01, [\d.,e+]+ images/s\]", shown)
    assert "toy: step 2 of 6: validation: norm " in shown
    assert "left" not in shown  # the bar says it


def test_work_between_steps_has_a_bar_on_a_terminal_only(monkeypatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with progress_bar(2, "validation", unit="image", part=True) as bar:
        bar.update(2)
    assert "validation: " in screen.getvalue()
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    with progress_bar(2, "validation", unit="image", part=True) as bar:
        bar.update(2)
    assert log.getvalue() == ""  # it was short


@pytest.mark.parametrize("part", [False, True])
def test_long_work_has_lines_in_a_log(monkeypatch, part: bool) -> None:
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    with progress_bar(4, "encode", part=part) as bar:
        for _ in range(4):
            bar.update()
    lines = log.getvalue().splitlines()
    assert "\r" not in log.getvalue() and lines[-1].startswith("encode: 4 of 4, ")
    with progress_bar(4, "encode", shown=False) as bar:
        bar.update()
    assert log.getvalue().splitlines() == lines
