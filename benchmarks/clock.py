"""Time on any device."""

import time

import torch


def now(device: torch.device) -> float:
    """Seconds, after all work given to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
