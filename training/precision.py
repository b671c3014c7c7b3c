"""Which arithmetic to train in: bf16 autocast where it pays."""

import time
from functools import cache
from typing import Literal

import torch
from torch import nn

from smalti.errors import SmaltiError

Precision = Literal["auto", "no", "bf16"]


def resolve_precision(requested: Precision, device: torch.device) -> Literal["no", "bf16"]:
    """ "auto" becomes "bf16" where that is faster on this device: GPUs that support it, and CPUs
    on which a convolution block measures at least 1.2 times as fast as in fp32."""
    if requested != "auto":
        if requested == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
            raise SmaltiError("mixed_precision is bf16 but this GPU lacks bf16: use no")
        return requested
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "no"
    if device.type == "cpu":
        return "bf16" if _cpu_gains_from_bf16() else "no"
    return "no"


@cache
def _cpu_gains_from_bf16() -> bool:
    return _step_time(bf16=False) > 1.2 * _step_time(bf16=True)


def _step_time(bf16: bool) -> float:
    """Best of three forward and backward passes of a small convolution, in seconds."""
    with torch.random.fork_rng(devices=[]):
        block = nn.Conv2d(64, 64, 3, padding=1)
        images = torch.randn(16, 64, 16, 16)
    best = float("inf")
    for _ in range(4):  # the first one warms up
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = block(images)
        output.float().sum().backward()
        best = min(best, time.perf_counter() - start)
    return best
