"""Where a run writes what it measures: always `metrics.jsonl`, trackers if asked for."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from smalti.files import write_text
from smalti.training.trackers import send


class MetricsLog:
    """One JSON object per line: {"step": 100, "loss": 0.25, ...}. Only the main process writes.

    "step" counts finished steps. Lines after `resume_step` are dropped, so that no step stands
    twice.
    """

    def __init__(self, path: Path, accelerator: Accelerator, resume_step: int = 0) -> None:
        self.path = path
        self.accelerator = accelerator
        if accelerator.is_main_process:
            drop_lines_after(path, resume_step)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append one line; also send the values to the trackers."""
        if not self.accelerator.is_main_process:
            return
        # JSON has no NaN: a value that is not finite is written as a string, never lost.
        safe = {k: v if math.isfinite(v) else str(v) for k, v in values.items()}
        append_line(self.path, {"step": step, **safe})
        send(self.accelerator, step, values)


def append_line(path: Path, content: dict[str, Any]) -> None:
    """Append one line of JSON to a file."""
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(content) + "\n")


def drop_lines_after(path: Path, step: int) -> None:
    """Keep the lines of a log, if there is one, up to a step."""
    if path.is_file():
        kept = [line for line in read_lines(path) if line["step"] <= step]
        write_text(path, "".join(f"{json.dumps(line)}\n" for line in kept))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; damaged ones, as a killed run leaves them, are left out."""
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


def mean_of(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Mean of each scalar over micro-batches."""
    return {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}
