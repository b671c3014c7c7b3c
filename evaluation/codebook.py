"""How much of a codebook is used. Count over a whole set: a window flatters or slanders."""

import torch
from torch import Tensor


def code_counts(codes: Tensor, vocab_size: int) -> Tensor:
    """How often each code occurs, (V,) int64, in codes of any shape."""
    return torch.bincount(codes.flatten(), minlength=vocab_size)


def usage(counts: Tensor) -> float:
    """Share of the codes that occur at least once, in [0, 1]."""
    return (counts > 0).double().mean().item()


def perplexity(counts: Tensor) -> float:
    """exp(entropy of the code frequencies), in [1, V]: V if all are equally frequent."""
    frequencies = counts.double() / counts.sum()
    return torch.exp(torch.special.entr(frequencies).sum()).item()
