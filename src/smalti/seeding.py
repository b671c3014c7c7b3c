"""Random numbers as a pure function of where they are used, so that a resumed run repeats them."""

import hashlib

import torch


def derive_seed(*parts: int | str) -> int:
    """A 32-bit seed that depends on every part: (run seed, what for, step, rank, ...)."""
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:4], "big")  # all that a CPU generator keeps of its seed


def generator(*parts: int | str) -> torch.Generator:
    """A fresh CPU generator seeded by `derive_seed(*parts)`."""
    return torch.Generator().manual_seed(derive_seed(*parts))
