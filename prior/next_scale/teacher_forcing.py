"""Teacher forcing of the next-scale prior, with true or with partly random input codes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from smalti.tokenizer.quantizers.multi_scale import MultiScaleQuantizer


@dataclass
class Context:
    """One training example per row."""

    inputs: Tensor  # (B, L - h_0 w_0, d): the input of each scale but the first
    targets: Tensor  # (B, L) int64: the codes to predict


@torch.no_grad()
def true_context(quantizer: MultiScaleQuantizer, codes: Tensor) -> Context:
    """Teacher forcing with the true codes (B, L)."""
    return Context(quantizer.next_scale_inputs(codes), codes)


@torch.no_grad()
def noisy_context(quantizer: MultiScaleQuantizer, codes: Tensor, most: float) -> Context:
    """Inputs from codes (B, L) some of which are random, and targets that correct the error.

    A prior that was trained on true codes only cannot correct its own errors (exposure bias). For
    every sample a share p ~ U(0, most) of the input codes is random, and each target is quantized
    again, relative to the sum of the input codes (bitwise self-correction of Infinity, 2412.04431,
    section 3.3, here for a codebook).

    Infinity quantizes f - s' at scale k, with features f and the sum s' of the input codes before.
    The latent cache does not contain f, but f - s' = (f - s) + (s - s') with the sum s of the true
    codes, and f - s, downsampled to scale k, is close to the vector of the true code. So the target
    is the code nearest to that vector plus s - s' downsampled; without errors it is the true code.
    """
    parts = codes.split_with_sizes(quantizer.lengths, 1)
    share = torch.rand(len(codes), 1, device=codes.device) * most
    true_sum = noisy_sum = quantizer.lookup_first(codes, 0)  # both start at 0, (B, d, H, W)
    inputs = [codes.new_zeros(len(codes), 0, quantizer.dim).float()]
    targets = []
    for scale, part in enumerate(parts):  # (B, h_k w_k)
        if scale:
            inputs.append(quantizer.scale_input(noisy_sum, scale))
        error = quantizer.scale_input(true_sum - noisy_sum, scale)  # (B, h_k w_k, d)
        target = quantizer.nearest(quantizer.codebook.lookup(part) + error)
        targets.append(target)
        is_random = torch.rand(part.shape, device=codes.device) < share
        random_codes = torch.randint_like(part, quantizer.vocab_size)
        noisy = torch.where(is_random, random_codes, target)
        true_sum = true_sum + quantizer.contribution(part, scale)
        noisy_sum = noisy_sum + quantizer.contribution(noisy, scale)
    return Context(torch.cat(inputs, 1), torch.cat(targets, 1))
