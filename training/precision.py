"""Which arithmetic to train in: bf16 autocast where it pays."""

from typing import Literal

import torch

from smalti.errors import SmaltiError

Precision = Literal["auto", "no", "bf16"]


def resolve_precision(requested: Precision, device: torch.device) -> Literal["no", "bf16"]:
    """ "auto" becomes "bf16" where that is faster on this device: GPUs that support it, and CPUs
    with matrix units for it."""
    if requested != "auto":
        if requested == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
            raise SmaltiError("mixed_precision is bf16 but this GPU lacks bf16: use no")
        return requested
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "no"
    if device.type == "cpu":
        return "bf16" if cpu_multiplies_bf16() else "no"
    return "no"


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has matrix units for bf16 (Intel's AMX).

    There, convolutions and matrix products take half the time; CPUs without them emulate bf16 or
    gain little. It is asked, not timed: a timing depends on what else the machine is doing, and a
    run would not repeat.
    """
    if hasattr(torch.cpu, "get_capabilities"):
        return bool(torch.cpu.get_capabilities().get("amx_bf16", False))
    return torch.cpu._is_amx_tile_supported()  # older torch
