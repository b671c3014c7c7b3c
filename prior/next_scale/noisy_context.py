"""Teacher forcing for a next-scale prior, with or without mistakes in what it is shown."""

from dataclasses import dataclass

import torch
from torch import Tensor

from smalti.prior.next_scale.quantizer import FrozenQuantizer


@dataclass
class Context:
    """One training example per row."""

    inputs: Tensor  # (B, L - h_0 w_0, d): what is shown before each scale but the first
    targets: Tensor  # (B, L) int64: what is to be predicted


@torch.no_grad()
def true_context(quantizer: FrozenQuantizer, codes: Tensor) -> Context:
    """Teacher forcing with the true codes (B, L)."""
    return Context(quantizer.next_scale_inputs(codes), codes)


@torch.no_grad()
def noisy_context(quantizer: FrozenQuantizer, codes: Tensor, most: float) -> Context:
    """Codes (B, L) with mistakes, and targets that mend them.

    A prior that never saw its own mistakes cannot mend them (exposure bias). Of every picture a
    share p ~ U(0, most) of the codes shown is random; what is to be predicted next is quantized
    again, against the sum that was shown (bitwise self-correction of Infinity, 2412.04431, section
    3.3, here for a codebook).

    Infinity quantizes f - s' at scale k, with features f and the sum s' shown so far. The cache
    keeps no f, but f - s' = (f - s) + (s - s') with the sum s of the true codes, and the cells of
    f - s are about the vector of the true code k. So the target is the code nearest to that vector
    plus the cells of s - s': without mistakes the true code.
    """
    parts = codes.split_with_sizes(quantizer.lengths, 1)
    share = torch.rand(len(codes), 1, device=codes.device) * most
    true = shown = quantizer.lookup_first(codes, 0)  # both sums begin at 0, (B, d, H, W)
    inputs = [codes.new_zeros(len(codes), 0, quantizer.dim).float()]
    targets = []
    for scale, part in enumerate(parts):
        if scale:
            inputs.append(quantizer.scale_input(shown, scale))
        missing = quantizer.scale_input(true - shown, scale)
        wanted = quantizer.nearest(quantizer.codebook.lookup(part) + missing)
        targets.append(wanted)
        mistaken = torch.rand(part.shape, device=codes.device) < share
        given = torch.where(mistaken, torch.randint_like(part, quantizer.vocab_size), wanted)
        true = true + quantizer.contribution(part, scale)
        shown = shown + quantizer.contribution(given, scale)
    return Context(torch.cat(inputs, 1), torch.cat(targets, 1))
