"""The logs of a training run: metrics.jsonl, timing.jsonl, trackers and report.html.

    metrics.jsonl   {"step": 100, "loss": 0.25, ..., "crc32": "..."}
    timing.jsonl    {"step": 100, "seconds_per_step": 0.21, "images_per_second": 304.8, ...}

"step" counts the steps that are done. Times are in a separate file, so that metrics.jsonl is the
same whether a run was interrupted or not.
"""

import contextlib
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from smalti.files import append_line, drop_lines_after, replacing, write_text
from smalti.training.blocks import recomputing
from smalti.training.config import RunConfig
from smalti.training.folder import METRICS, RECIPE, TIMING
from smalti.training.progress import RunProgress
from smalti.training.report import write_report

logger = logging.getLogger(__name__)

# -------------------------------------------------------------------------------------------------
# Trackers: services that show what a run logs. If one fails, the run continues without it.


def start_trackers(accelerator: Accelerator, report_to: str, config: dict[str, Any]) -> None:
    """Initialise the tracker named by `report_to` ("none" starts nothing)."""
    if report_to != "none":
        flat = {k: v for k, v in config.items() if isinstance(v, int | float | str | bool)}
        try:
            accelerator.init_trackers("smalti", config=flat)
        except Exception as error:
            accelerator.trackers = []
            logger.warning("the tracker %s does not start, the run continues: %s", report_to, error)


def send(accelerator: Accelerator, step: int, values: Mapping[str, float]) -> None:
    """Send values after a number of finished steps."""
    _each(accelerator, lambda tracker: tracker.log(dict(values), step=step))


def send_image(accelerator: Accelerator, step: int, name: str, image: Image.Image) -> None:
    """Send an image, under a name that it shares with earlier ones."""
    pixels = np.array(image.convert("RGB"))  # (H, W, 3) uint8

    def show(tracker: Any) -> None:
        if tracker.name == "trackio":  # Accelerate's tracker for it has no method for images
            import trackio  # type: ignore[import-not-found]

            tracker.log({name: trackio.Image(pixels)}, step=step)
        elif tracker.name == "tensorboard":
            tracker.log_images({name: pixels[None]}, step=step, dataformats="NHWC")
        else:
            tracker.log_images({name: [pixels]}, step=step)

    _each(accelerator, show)


def finish_trackers(accelerator: Accelerator) -> None:
    """Close the trackers."""
    _each(accelerator, lambda tracker: tracker.finish())


def _each(accelerator: Accelerator, act: Callable[[Any], None]) -> None:
    """Call `act` with every tracker; one that fails is not called again."""
    for tracker in list(accelerator.trackers):
        try:
            act(tracker)
        except Exception as error:
            accelerator.trackers = [other for other in accelerator.trackers if other is not tracker]
            name = getattr(tracker, "name", type(tracker).__name__)
            logger.warning("the tracker %s failed, the run continues without it: %s", name, error)


# -------------------------------------------------------------------------------------------------
# Metrics.


def mean_of(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Mean of each scalar over micro-batches."""
    return {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}


def _continue_log(path: Path, resume_step: int) -> None:
    """Drop the lines of a log after a step, so that each step occurs once, and damaged ones."""
    for damage in drop_lines_after(path, resume_step):
        logger.warning("%s: it is left out", damage)


class MetricsLog:
    """One JSON object per line; the trackers get the same values. Only the main process writes.

    Lines after `resume_step` are dropped, so that each step occurs once.
    """

    def __init__(self, path: Path, accelerator: Accelerator, resume_step: int = 0) -> None:
        self.path = path
        self.accelerator = accelerator
        if accelerator.is_main_process:
            _continue_log(path, resume_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line; also send the values to the trackers."""
        if not self.accelerator.is_main_process:
            return
        # JSON has no NaN: a value that is not finite is written as a string, never lost.
        safe = {k: v if math.isfinite(v) else str(v) for k, v in values.items()}
        append_line(self.path, {"step": step, **safe})
        send(self.accelerator, step, values)


# -------------------------------------------------------------------------------------------------
# Throughput: images per second, and model FLOPs utilisation (PaLM, 2204.02311, appendix B).

# Dense bf16 operations per second of one device, by its manufacturer's specification; the first
# name that is part of the device's name is used.
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
COUNTED_STEP = 1  # of this process: step 0 also starts workers and compiles


def peak_flops(device: torch.device, precision: str) -> float:
    """Peak operations per second of one device in this precision: by its specification, or else
    those of a matrix product."""
    if device.type == "cuda" and precision == "bf16":
        name = torch.cuda.get_device_name(device)
        for part, peak in PEAK_FLOPS.items():
            if part in name:
                return peak
    return measured_flops(device, torch.bfloat16 if precision == "bf16" else torch.float32)


@torch.no_grad()
def measured_flops(device: torch.device, dtype: torch.dtype, rounds: int = 3) -> float:
    """Operations per second of a large matrix product, the fastest of some."""
    size = 512 if device.type == "cpu" else 8192
    matrix = torch.ones(size, size, dtype=dtype, device=device)
    seconds = []
    for _ in range(rounds + 1):  # the first one also loads kernels
        start = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


class _FlopCounter(TorchDispatchMode):
    """Adds up the operations of matrix products, convolutions and attention, in both passes.

    It uses torch's formulas, but not its `FlopCounterMode`, which decomposes operators, so that the
    step's rounding changes, and whose hooks fail on second derivatives (R1). This mode does not
    change which kernels are called.
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
        if formula is not None and not recomputing():
            self.total += formula(*args, **options, out_val=output)
        return output


class Throughput:
    """Times the steps of a run, and counts the operations of one of them.

    Args:
        path: the file to write; lines after `resume_step` are dropped.
        images: number of images per step, over all processes.
        processes: number of processes.
        peak: returns the operations per second of all devices together; called once, when the
            first line is written.
        count: whether to count operations; those of compiled or sharded models cannot be counted.
    """

    def __init__(
        self,
        path: Path,
        *,
        resume_step: int,
        images: int,
        processes: int,
        peak: Callable[[], float],
        count: bool,
    ) -> None:
        self.path, self.images, self.processes = path, images, processes
        self.count, self._measure_peak, self._peak = count, peak, 0.0
        self._resume_step = resume_step
        self.flops = 0  # of one step, on this process
        self._begun = False  # whether anything was written
        self._done = 0
        self._seconds: list[float] = []

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around one step: measure its seconds, and at `COUNTED_STEP` its operations."""
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
        """Append a line with the median over the steps since the last line, if there are any.

        Returns:
            The values of the line.
        """
        if not self._seconds:
            return {}
        if not self._begun:
            _continue_log(self.path, self._resume_step)
            self._begun = True
        seconds = statistics.median(self._seconds)
        self._seconds = []
        line: dict[str, float] = {
            "seconds_per_step": round(seconds, 6),
            "images_per_second": round(self.images / seconds, 3),
        }
        if self.flops:
            self._peak = self._peak or self._measure_peak()
            line["model_flops_per_second"] = self.flops * self.processes / seconds
            line["model_flops_utilisation"] = line["model_flops_per_second"] / self._peak
        append_line(self.path, {"step": step, **line})
        return line


# -------------------------------------------------------------------------------------------------
# The log of a run.


class RunLog:
    """Metrics, times, images and report of a run. Only the main process writes files.

    Nothing is written before something is logged or saved, so that a run which fails in its first
    step leaves no files behind.

    Args:
        start_step: the first step of this process, counted from 0; later lines of the logs are
            dropped.
        title: the kind of run, on the console.
    """

    def __init__(
        self,
        folder: Path,
        config: RunConfig,
        accelerator: Accelerator,
        start_step: int,
        title: str,
    ) -> None:
        self.folder, self.config, self.accelerator = folder, config, accelerator
        self.start_step = start_step
        self.progress = RunProgress(
            title, start_step, config.max_train_steps, accelerator.is_main_process
        )
        self._metrics: MetricsLog | None = None
        devices = accelerator.num_processes
        dynamo = accelerator.state.dynamo_plugin
        compiled = dynamo is not None and dynamo.backend != DynamoBackend.NO
        compiled = compiled or getattr(config, "compile", False)  # the flag of train-prior
        sharded = accelerator.distributed_type == DistributedType.FSDP
        self.throughput = Throughput(
            folder / TIMING,
            resume_step=start_step,
            images=config.train_batch_size,
            processes=devices,
            peak=lambda: devices * peak_flops(accelerator.device, accelerator.mixed_precision),
            count=not (compiled or sharded),
        )

    def begin(self) -> MetricsLog | None:
        """Write the recipe and start the trackers, at the first call. Return the log of metrics on
        the main process, None on the others."""
        if self.accelerator.is_main_process and self._metrics is None:
            start_trackers(self.accelerator, self.config.report_to, config_to_dict(self.config))
            write_text(self.folder / RECIPE, recipe_text(self.config))
            self._metrics = MetricsLog(self.folder / METRICS, self.accelerator, self.start_step)
        return self._metrics

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log values of training after a number of finished steps, and how fast the steps were."""
        if (metrics := self.begin()) is not None:
            speed = self.throughput.write(step)
            if speed:
                send(self.accelerator, step, speed)
            metrics.write(step, values)
            self.progress.training(step, values, speed)

    def write_validation(self, step: int, values: Mapping[str, float]) -> None:
        """Log values that were measured on held-out data."""
        if (metrics := self.begin()) is not None:
            metrics.write(step, values)
            self.progress.validation(step, values)

    def show(self, step: int, name: str, image: Image.Image) -> None:
        """Save an image, made after a number of finished steps, as `name/step_000100.png`; send it
        to the trackers, and update the report."""
        if self.begin() is not None:
            path = self.folder / name / f"step_{step:06d}.png"
            path.parent.mkdir(exist_ok=True)
            with replacing(path) as temporary:
                image.save(temporary, "PNG")
            send_image(self.accelerator, step, name, image)
            self.write_report()

    def write_report(self) -> None:
        """Write `report.html`, or replace it."""
        if self.accelerator.is_main_process:
            write_report(self.folder)

    def finish(self) -> None:
        """Close the trackers, and write the report a last time."""
        finish_trackers(self.accelerator)
        self.write_report()
