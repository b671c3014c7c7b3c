"""What a run tells while it goes: metrics, times, trackers, and the page that shows them."""

import contextlib
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from smalti.config import config_to_dict, recipe_text
from smalti.files import append_line, drop_lines_after, write_text
from smalti.training.config import RunConfig
from smalti.training.folder import METRICS, RECIPE, TIMING
from smalti.training.report import write_report

# -------------------------------------------------------------------------------------------------
# Trackers: services that show what a run logs. One that fails is left out, the run goes on.

logger = logging.getLogger(__name__)


def start_trackers(accelerator: Accelerator, report_to: str, config: dict[str, Any]) -> None:
    """Initialise the tracker named by `report_to` ("none" starts nothing)."""
    if report_to != "none":
        flat = {k: v for k, v in config.items() if isinstance(v, int | float | str | bool)}
        try:
            accelerator.init_trackers("smalti", config=flat)
        except Exception as error:
            accelerator.trackers = []
            logger.warning("the tracker %s does not start, the run goes on: %s", report_to, error)


def send(accelerator: Accelerator, step: int, values: Mapping[str, float]) -> None:
    """Send values of a number of finished steps."""
    _each(accelerator, lambda tracker: tracker.log(dict(values), step=step))


def send_picture(accelerator: Accelerator, step: int, name: str, picture: Image.Image) -> None:
    """Send a picture, under a name that it shares with earlier ones."""
    pixels = np.array(picture.convert("RGB"))  # (H, W, 3) uint8

    def show(tracker: Any) -> None:
        if tracker.name == "trackio":  # Accelerate knows no pictures of it
            import trackio  # type: ignore[import-not-found]

            tracker.log({name: trackio.Image(pixels)}, step=step)
        elif tracker.name == "tensorboard":
            tracker.log_images({name: pixels[None]}, step=step, dataformats="NHWC")
        else:
            tracker.log_images({name: [pixels]}, step=step)

    _each(accelerator, show)


def finish_trackers(accelerator: Accelerator) -> None:
    """Close them."""
    _each(accelerator, lambda tracker: tracker.finish())


def _each(accelerator: Accelerator, act: Callable[[Any], None]) -> None:
    """Do it with every tracker; one that fails is left out from then on."""
    for tracker in list(accelerator.trackers):
        try:
            act(tracker)
        except Exception as error:
            accelerator.trackers = [other for other in accelerator.trackers if other is not tracker]
            name = getattr(tracker, "name", type(tracker).__name__)
            logger.warning("the tracker %s failed and is left out: %s", name, error)


# -------------------------------------------------------------------------------------------------
# Where a run writes what it measures: always `metrics.jsonl`, trackers if asked for.


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


def mean_of(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Mean of each scalar over micro-batches."""
    return {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}


# -------------------------------------------------------------------------------------------------
# How fast a run goes: images per second, and how much of the machine's arithmetic it uses.
#
#     timing.jsonl   {"step": 100, "seconds_per_step": 0.21, "images_per_second": 304.8, ...}
#
# Times are kept apart from metrics.jsonl, where a run that was cut and resumed has the same lines.

# Dense bf16 operations per second of one device, as its maker states them; the first name found in
# the device's counts.
PEAK_FLOPS = {
    "A100": 312e12,
    "A10G": 70e12,
    "B200": 2250e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 3090": 71e12,
    "RTX 4090": 165e12,
}
COUNTED_STEP = 1  # of this process: the first one also starts workers and compiles


class Throughput:
    """Times the steps of a run, and counts the operations of one of them.

    Args:
        path: the file to write; lines after `resume_step` are dropped.
        images: per step, over all processes.
        processes: how many there are.
        peak: operations per second of all devices together; 0 if unknown.
        count: whether to count operations; those of compiled or sharded models cannot be seen.
    """

    def __init__(
        self,
        path: Path,
        *,
        resume_step: int,
        images: int,
        processes: int,
        peak: float,
        count: bool,
    ) -> None:
        self.path, self.images, self.processes = path, images, processes
        self.peak, self.count = peak, count
        self.flops = 0  # of a step, on this process
        self._resume_step = resume_step
        self._begun = False  # whether anything was written
        self._done = 0
        self._seconds: list[float] = []

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Measure one step."""
        start = time.perf_counter()
        if self.count and self._done == COUNTED_STEP:
            with _FlopCounter() as counter:
                yield
            self.flops = counter.total
        else:
            yield
        self._seconds.append(time.perf_counter() - start)
        self._done += 1

    def write(self, step: int) -> dict[str, float]:
        """Append a line on the steps since the last one, if any was timed; return its values.

        The median leaves out those in which the run also validated.
        """
        if not self._seconds:
            return {}
        if not self._begun:
            drop_lines_after(self.path, self._resume_step)
            self._begun = True
        seconds = statistics.median(self._seconds)
        self._seconds = []
        line: dict[str, float] = {
            "seconds_per_step": round(seconds, 6),
            "images_per_second": round(self.images / seconds, 3),
        }
        if self.flops:
            line["model_flops_per_second"] = self.flops * self.processes / seconds
            if self.peak:
                line["model_flops_utilisation"] = line["model_flops_per_second"] / self.peak
        append_line(self.path, {"step": step, **line})
        return line


class _FlopCounter(TorchDispatchMode):
    """Adds up the operations of matrix products, convolutions and attention, both passes.

    It only looks on: every kernel is called as without it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        output = func(*args, **options)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **options, out_val=output)
        return output


def peak_flops(device: torch.device, precision: str) -> float:
    """Operations per second that one device can do in this precision; 0 if that is not known."""
    if device.type != "cuda" or precision != "bf16":
        return 0.0
    name = torch.cuda.get_device_name(device)
    known = [peak for part, peak in PEAK_FLOPS.items() if part in name]
    return known[0] if known else 0.0


# -------------------------------------------------------------------------------------------------
# What a run tells while it goes: metrics, times, trackers, and the page that shows them.


class Progress:
    """The files of a run that people read. Only the main process writes any.

    Nothing is written before the first step is done.

    Args:
        start_step: the first one of this process; later lines of the logs are dropped.
    """

    def __init__(
        self, folder: Path, config: RunConfig, accelerator: Accelerator, start_step: int
    ) -> None:
        self.folder, self.config, self.accelerator = folder, config, accelerator
        self.start_step = start_step
        self._metrics: MetricsLog | None = None
        devices = accelerator.num_processes
        dynamo = accelerator.state.dynamo_plugin
        compiled = dynamo is not None and dynamo.backend != DynamoBackend.NO
        sharded = accelerator.distributed_type == DistributedType.FSDP
        self._clock = Throughput(
            folder / TIMING,
            resume_step=start_step,
            images=config.train_batch_size,
            processes=devices,
            peak=peak_flops(accelerator.device, accelerator.mixed_precision) * devices,
            count=not (compiled or sharded),
        )

    def begin(self) -> None:
        """Claim the folder, with the first step: the recipe, the trackers, the log."""
        if self.accelerator.is_main_process and self._metrics is None:
            start_trackers(self.accelerator, self.config.report_to, config_to_dict(self.config))
            write_text(self.folder / RECIPE, recipe_text(self.config))
            self._metrics = MetricsLog(self.folder / METRICS, self.accelerator, self.start_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log values of a number of finished steps."""
        self.begin()
        if self._metrics is not None:
            self._metrics.write(step, dict(values))

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Time one step."""
        with self._clock.step():
            yield

    def after_step(self, *, logged: bool, validated: bool, step: int) -> None:
        """Once after each step: the times if it was logged, the page if it was validated."""
        self.begin()
        if self.accelerator.is_main_process:
            if logged and (speed := self._clock.write(step)):
                send(self.accelerator, step, speed)
            if validated:
                self.write_page()

    def show(self, step: int, name: str, picture: Image.Image) -> None:
        """Send a picture, drawn after a number of finished steps, to the trackers."""
        if self.accelerator.is_main_process:
            send_picture(self.accelerator, step, name, picture)

    def write_page(self) -> None:
        """Write `report.html`."""
        if self.accelerator.is_main_process:
            write_report(self.folder)

    def finish(self) -> None:
        """Close the trackers, and write the page a last time."""
        finish_trackers(self.accelerator)
        self.write_page()
