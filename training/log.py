"""Where a run writes what it measures: always `metrics.jsonl`, trackers if asked for."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from smalti.errors import SmaltiError
from smalti.files import write_text

TRACKERS = ("tensorboard", "wandb", "trackio")


class MetricsLog:
    """One JSON object per line: {"step": 100, "loss": 0.25, ...}. Only the main process writes.

    "step" counts finished steps. Lines after `resume_step` are dropped, so that no step stands
    twice.
    """

    def __init__(self, path: Path, accelerator: Accelerator, resume_step: int = 0) -> None:
        self.path = path
        self.accelerator = accelerator
        if accelerator.is_main_process and path.is_file():
            write_text(path, "".join(_lines_up_to(path, resume_step)))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append one line; also send the values to the trackers."""
        if not self.accelerator.is_main_process:
            return
        # JSON has no NaN: a value that is not finite is written as a string, never lost.
        safe = {k: v if math.isfinite(v) else str(v) for k, v in values.items()}
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": step, **safe}) + "\n")
        self.accelerator.log(values, step=step)


def _lines_up_to(path: Path, step: int) -> list[str]:
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(f"{line}\n")
        except (ValueError, KeyError, TypeError):
            continue  # the last line of a killed run may be cut
    return kept


def start_trackers(accelerator: Accelerator, report_to: str, config: dict[str, Any]) -> None:
    """Initialise the tracker named by `report_to` ("none" starts nothing)."""
    if report_to != "none":
        flat = {k: v for k, v in config.items() if isinstance(v, int | float | str | bool)}
        accelerator.init_trackers("smalti", config=flat)


def check_tracker(report_to: str) -> None:
    """Raise `SmaltiError` if the tracker is unknown or its package is missing."""
    import importlib.util

    if report_to == "none":
        return
    if report_to not in TRACKERS:
        raise SmaltiError(f'report_to is "{report_to}"; choose none, {", ".join(TRACKERS)}')
    package = importlib.util.find_spec(report_to)
    if package is None or package.origin is None:  # no origin: any folder of that name
        raise SmaltiError(
            f'report_to is "{report_to}" but that package is not installed: '
            f"pip install {report_to}, or use --report_to none"
        )


def mean_of(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Mean of each scalar over micro-batches."""
    return {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}
