"""Mistakes in what a next-token prior is shown in training."""

import torch
from torch import Tensor


def corrupted(codes: Tensor, vocab_size: int, probability: float) -> Tensor:
    """Codes (B, L) int64, each replaced with a probability by a uniformly random one.

    A prior that never saw a mistake cannot go on from its own (exposure bias). The targets stay
    true; 1 - probability is `pkeep` in taming transformers (2012.09841).
    """
    mistaken = torch.rand(codes.shape, device=codes.device) < probability
    return torch.where(mistaken, torch.randint_like(codes, vocab_size), codes)
