"""How fast a run goes: images per second, and how much of the machine's arithmetic it uses.

    timing.jsonl   {"step": 100, "seconds_per_step": 0.21, "images_per_second": 304.8, ...}

Times are kept apart from metrics.jsonl, where a run that was cut and resumed has the same lines.
"""

import contextlib
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from smalti.training.log import append_line, drop_lines_after

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
