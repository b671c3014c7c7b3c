"""How much of a codebook is used. Count over a whole set: a window flatters or slanders."""

import torch
from torch import Tensor

from smalti.errors import SmaltiError


def code_counts(codes: Tensor, vocab_size: int) -> Tensor:
    """How often each code occurs, (V,) int64, in codes of any shape.

    Raises:
        SmaltiError: no codes, or one outside [0, vocab_size).
    """
    if not codes.numel():
        raise SmaltiError("there are no codes to count: encode at least one picture")
    low, high = int(codes.min()), int(codes.max())
    if low < 0 or high >= vocab_size:
        raise SmaltiError(
            f"codes range from {low} to {high}; a codebook of {vocab_size} ends "
            f"at {vocab_size - 1}: count them with the tokenizer that made them"
        )
    return torch.bincount(codes.flatten(), minlength=vocab_size)


def usage(counts: Tensor) -> float:
    """Share of the codes that occur at least once, in [0, 1]."""
    return (counts > 0).double().mean().item()


def perplexity(counts: Tensor) -> float:
    """exp(entropy of the code frequencies), in [1, V]: V if all are equally frequent."""
    frequencies = counts.double() / counts.sum()
    return torch.exp(torch.special.entr(frequencies).sum()).item()
