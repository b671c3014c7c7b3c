"""What this processor multiplies fast. Its features decide, not a timing, which depends on the load
of the machine, so that a run or a sample could not be repeated."""

import torch


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU multiplies bf16 faster than fp32: by matrix units (Intel's AMX), or by
    instructions for it (AVX-512 BF16 of Intel since 2020, of AMD since 2022). Others emulate bf16.
    """
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def cpu_has_wide_vectors() -> bool:
    """Whether torch uses vectors of 512 bits (AVX-512) on this CPU."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"
