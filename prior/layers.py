"""Layers that priors share: RMS norm, SwiGLU feed-forward, stochastic depth."""

import ctypes
import sys
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.prior.packing import PackableLinear, is_plain_linear


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight over the last dimension (1910.07467); the mean is accumulated in fp32.

    If inputs are bf16 and weights fp32, as for queries under autocast, `nn.RMSNorm` does not use
    torch's fused kernel and rounds differently; this class casts the weight first. Otherwise both
    classes are bitwise equal.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__(dim, eps=eps)

    def forward(self, x: Tensor) -> Tensor:  # (..., dim)
        return torch.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x), without biases (2002.05202)."""

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.w1 = PackableLinear(dim, hidden, bias=False)
        self.w3 = PackableLinear(dim, hidden, bias=False)
        self.w2 = PackableLinear(hidden, dim, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:  # (..., dim)
        return self.dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))

    def is_packed_for(self, rows: int) -> bool:
        """Whether products with so many rows use packed weights."""
        return isinstance(self.w1, PackableLinear) and self.w1.is_packed_for(rows)

    def arrange(self) -> None:
        """Store w1 beside w3, input by input, so that one product may read both; values stay."""
        faster = _is_faster_by_input(self.w1) and _is_faster_by_input(self.w3)
        if faster and self.joined_weights() is None:
            _store_by_input(self.w1, self.w3)

    def joined_weights(self) -> Tensor | None:
        """w1 above w3, (2 hidden, dim), a view, if they lie as `arrange` has stored them and calls
        of both layers are products with them alone."""
        if not is_plain_linear(self.w1) or not is_plain_linear(self.w3):
            return None
        if self.w1.bias is not None or self.w3.bias is not None:
            return None
        first, second = self.w1.weight, self.w3.weight
        if type(first) is not nn.Parameter or type(second) is not nn.Parameter:
            return None
        outputs, strides = len(first), first.stride()
        beside = second.data_ptr() - first.data_ptr() == outputs * first.element_size()
        if not beside or strides != second.stride() or strides[0] != 1 or strides[1] < 2 * outputs:
            return None
        return first.detach().as_strided((2 * outputs, first.shape[1]), strides)


SPACE = 16  # numbers between the columns of a matrix that is stored input by input


def arrange_for_few_rows(model: nn.Module) -> None:
    """Store the weights of linear layers in the order in which products with few rows read them
    fastest; values stay.

    MKL, the fp32 library of torch on x86, reads a matrix with many more outputs than inputs faster
    input by input than in the order of `nn.Linear` (benchmarks/decode_next_token.py). Its sums
    differ in the last bits. `SPACE` parts the columns: those of a power of two of numbers would
    push each other out of the cache.
    """
    for module in model.modules():
        if isinstance(module, SwiGLU):
            module.arrange()
        elif isinstance(module, nn.Linear):
            _arrange_layer(module)


def _arrange_layer(linear: nn.Linear) -> None:
    weight, outputs = linear.weight, linear.out_features
    if not _is_faster_by_input(linear):
        weight.data = weight.data.contiguous()
    elif weight.stride(0) != 1 or weight.stride(1) < outputs + SPACE:
        _store_by_input(linear)  # not a second time: a packed copy stays valid


def _is_faster_by_input(linear: nn.Module) -> bool:
    """Whether products of few rows read the weight faster input by input."""
    return (
        isinstance(linear, nn.Linear)
        and linear.weight.device.type == "cpu"
        and linear.weight.dtype == torch.float32
        and torch.backends.mkl.is_available()
        and linear.out_features > 2 * linear.in_features
    )


def _store_by_input(*linears: nn.Linear) -> None:
    """Store the weights of layers with the same inputs beside each other, input by input."""
    outputs = [linear.out_features for linear in linears]
    like = linears[0].weight
    spaced = like.new_empty(like.shape[1], sum(outputs) + SPACE)
    for linear, part in zip(linears, spaced.split([*outputs, SPACE], 1), strict=False):
        linear.weight.data = part.copy_(linear.weight.data.t()).t()
    _return_freed_memory()


def _return_freed_memory() -> None:
    """Give freed memory back to the system. The C library of Linux keeps pieces below 32 MB, into
    which the next, slightly larger copy does not fit: a fifth of the memory of a model."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
        if trim is not None:
            trim(0)


class DropPath(nn.Module):
    """Stochastic depth (1603.09382): in training, a residual branch is zero for a sample with
    probability p, and multiplied by 1 / (1 - p) otherwise.

    The class `torchvision.ops.StochasticDepth` has the same distribution but samples other random
    numbers, so a run that was started with this class would not resume exactly.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:  # (B, T, width)
        if not (self.training and self.probability):
            return x
        kept = torch.rand(len(x), 1, 1, device=x.device) >= self.probability
        return x * kept / (1 - self.probability)


def drop_path_rates(last: float, depth: int) -> Iterator[float]:
    """The drop probability of every block: it grows linearly from 0 to `last`."""
    return (last * block / max(depth - 1, 1) for block in range(depth))
