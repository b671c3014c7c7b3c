"""Where a run writes what it measures: always `metrics.jsonl`, trackers if asked for."""

import contextlib
import json
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from torch import Tensor

from smalti.errors import SmaltiError
from smalti.files import write_text

logger = logging.getLogger(__name__)

TRACKERS = ("tensorboard", "wandb", "trackio")


class MetricsLog:
    """One JSON object per line: {"step": 100, "loss": 0.25, ...}. Only the main process writes.

    "step" counts finished steps. Lines after `resume_step` are dropped, so that no step stands
    twice. A tracker that fails is left out from then on, and said so once: the file has it all.
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
        for tracker in list(self.accelerator.trackers):
            with leaving_out(tracker, self.accelerator):
                tracker.log(values, step=step)


@contextlib.contextmanager
def leaving_out(tracker: GeneralTracker, accelerator: Accelerator) -> Iterator[None]:
    """A context in which whatever a tracker raises costs that tracker, not the run."""
    try:
        yield
    except Exception as error:
        accelerator.trackers = [other for other in accelerator.trackers if other is not tracker]
        name = getattr(tracker, "name", type(tracker).__name__)
        logger.warning("the tracker %s failed and is left out: %s", name, error)


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


def start_trackers(accelerator: Accelerator, report_to: str, config: dict[str, Any]) -> None:
    """Initialise the tracker named by `report_to` ("none" starts nothing)."""
    if report_to != "none":
        flat = {k: v for k, v in config.items() if isinstance(v, int | float | str | bool)}
        try:
            accelerator.init_trackers("smalti", config=flat)
        except Exception as error:
            accelerator.trackers = []
            logger.warning("the tracker %s does not start, the run goes on: %s", report_to, error)


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
