"""Weight-only quantization: the weights of linear layers as integers of 8 or 4 bits, rounded to the
nearest; activations stay floating-point, and so does every other layer.

A decoding step is as fast as memory delivers the weights, so fewer bytes take less time. Products
of few rows on a CPU are torch's own kernels for such weights, which round activations to bfloat16
and compute every row by itself: a row does not depend on how many others there are.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.errors import CheckpointError, ConfigurationError
from smalti.hub import Pretrained

INT4 = torch.int4  # type: ignore[attr-defined]
WEIGHT_ONLY = (torch.int8, INT4)  # types of weights that `quantize_weights` makes
GROUP = 64  # neighbouring weights of a row that share a scale and a zero in int4
INT4_OUTPUTS = 16  # torch's kernel computes so many outputs at a time
# With more rows, a product in the type of the activations is faster than the kernel for int8, by
# more than it takes to make the weights floating-point again.
KERNEL_ROWS = 32


class Int8Linear(nn.Module):
    """x W^T + b with W (out, in) as whole numbers from -127 to 127 times a scale of each output."""

    weight: Tensor  # (out, in) int8
    scale: Tensor  # (out,) bfloat16, the type of the kernel's activations

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.bias = linear.bias
        weight = linear.weight.detach().float()
        largest = weight.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny)
        # Rounded first, so that the rounding of the scale is no error of the product.
        self.register_buffer("scale", (largest / 127).bfloat16())
        levels = (weight / self.scale.float()[:, None]).round().clamp(-127, 127)
        self.register_buffer("weight", levels.to(torch.int8).contiguous())

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:  # (..., in) -> (..., out)
        rows = x.reshape(-1, x.shape[-1])
        if x.device.type == "cpu" and len(rows) <= KERNEL_ROWS:
            product = torch.ops.aten._weight_int8pack_mm(
                rows.bfloat16(), self.weight, self.scale
            ).to(x.dtype)
        else:
            product = F.linear(rows, self.weight.to(x.dtype)) * self.scale.to(x.dtype)
        return _biased(product, self.bias if bias is None else bias).view(*x.shape[:-1], -1)


class Int4Linear(nn.Module):
    """x W^T + b with W (out, in) as whole numbers from 0 to 15, two in a byte, times the scale plus
    the zero of a group of `GROUP` neighbours in a row.

    Raises:
        ConfigurationError: in `forward`: the layer was moved between a CPU, whose kernel has an
            order of its own, and another device.
    """

    packed: Tensor  # (out, in / 2) uint8
    scale_and_zero: Tensor  # (in / GROUP, out, 2) bfloat16

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.bias, self.for_cpu = linear.bias, linear.weight.device.type == "cpu"
        weight = linear.weight.detach().float().unflatten(1, (-1, GROUP))  # (out, groups, GROUP)
        low, high = weight.aminmax(dim=2, keepdim=True)
        scale = ((high - low) / 15).clamp(min=torch.finfo(torch.float32).tiny).bfloat16()
        zero = (low + 8 * scale.float()).bfloat16()  # the value of level 8
        levels = (
            ((weight - zero.float()) / scale.float() + 8)
            .round()
            .clamp(0, 15)
            .flatten(1)
            .contiguous()
        )
        if self.for_cpu:
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels.int(), 1)
        else:
            packed = levels[:, ::2].to(torch.uint8) | levels[:, 1::2].to(torch.uint8) << 4
        self.register_buffer("packed", packed)
        pairs = torch.cat([scale, zero], 2).transpose(0, 1)
        self.register_buffer("scale_and_zero", pairs.contiguous())

    @staticmethod
    def fits(linear: nn.Linear) -> bool:
        """Whether groups and the kernel divide a layer."""
        return linear.in_features % GROUP == 0 and linear.out_features % INT4_OUTPUTS == 0

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:  # (..., in) -> (..., out)
        if (x.device.type == "cpu") != self.for_cpu:
            raise ConfigurationError(
                "int4 weights were packed for another device than their inputs are on: load the "
                "pipeline again, with device= and dtype= together"
            )
        rows = x.reshape(-1, x.shape[-1])
        if self.for_cpu:
            product = torch.ops.aten._weight_int4pack_mm_for_cpu(
                rows.bfloat16(), self.packed, GROUP, self.scale_and_zero
            ).to(x.dtype)
        else:
            product = F.linear(rows, self._weight().to(x.dtype))
        return _biased(product, self.bias if bias is None else bias).view(*x.shape[:-1], -1)

    def _weight(self) -> Tensor:
        """The weights, (out, in) fp32, of bytes in the order of the row."""
        levels = torch.stack([self.packed & 15, self.packed >> 4], 2).flatten(1)
        scale, zero = self.scale_and_zero.float().transpose(0, 1).split(1, 2)  # (out, groups, 1)
        return ((levels.unflatten(1, (-1, GROUP)).float() - 8) * scale + zero).flatten(1)


def _biased(product: Tensor, bias: Tensor | None) -> Tensor:
    return product if bias is None else product + bias


def quantize_weights(model: nn.Module, parts: Iterable[str], dtype: torch.dtype) -> None:
    """Replace the linear layers of some parts of a model, by name, in place.

    Args:
        dtype: one of `WEIGHT_ONLY`; layers that int4 does not fit are int8.
    """
    for part in parts:
        for name, layer in list(model.get_submodule(part).named_modules(prefix=part)):
            if isinstance(layer, nn.Linear):
                is_int4 = dtype == INT4 and Int4Linear.fits(layer)
                model.set_submodule(name, Int4Linear(layer) if is_int4 else Int8Linear(layer))


def quantized_layers(model: nn.Module) -> dict[str, Int8Linear | Int4Linear]:
    """The layers that `quantize_weights` made, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, Int8Linear | Int4Linear)}


def share_quantized_layers(source: nn.Module, target: nn.Module) -> None:
    """Put the quantized layers of a model in the place of those of another one."""
    for name, layer in quantized_layers(source).items():
        target.set_submodule(name, layer)


class Quantizable(Pretrained):
    """A saved model whose precision may be int8 or int4: a mixin for an `nn.Module`."""

    weight_only_parts: ClassVar[tuple[str, ...]] = ()  # modules whose linear layers `cast` replaces

    @property
    def dtype(self) -> torch.dtype:
        """The precision: the type of the weights, or int8 or int4 of its linear layers."""
        model = cast("nn.Module", self)
        layers = quantized_layers(model).values()
        if layers:
            return INT4 if any(isinstance(m, Int4Linear) for m in layers) else torch.int8
        return next(model.parameters()).dtype

    @property
    def in_full_precision(self) -> bool:
        """Whether activations are fp32 or better. In half precision a sample also depends on the
        other samples of its batch, by rounding."""
        model = cast("nn.Module", self)
        return all(p.dtype not in (torch.bfloat16, torch.float16) for p in model.parameters())

    def cast(self, dtype: torch.dtype) -> Self:
        """Change the precision of all weights in place, keep the fingerprint, and return self.

        Args:
            dtype: torch.int8 and torch.int4 are of linear layers, in `weight_only_parts`; all other
                weights are then fp32.

        Raises:
            ConfigurationError: it has no such layers; its linear layers are int8 or int4 already.
        """
        if dtype == self.dtype in WEIGHT_ONLY:
            return self
        self.check_cast(dtype)
        if dtype not in WEIGHT_ONLY:
            return super().cast(dtype)
        fingerprint = self.fingerprint
        quantize_weights(cast("nn.Module", self).float(), self.weight_only_parts, dtype)
        self._keep_fingerprint(fingerprint)
        return self

    def check_cast(self, dtype: torch.dtype) -> None:
        """Raise `ConfigurationError` where `cast` does."""
        if self.dtype in WEIGHT_ONLY:
            raise ConfigurationError(
                f"the weights are {_name(self.dtype)}, from which {_name(dtype)} cannot be made: "
                "load the model again"
            )
        if dtype in WEIGHT_ONLY and not self.weight_only_parts:
            kind = self.registry.name_of(type(self))
            raise ConfigurationError(
                f"dtype is {_name(dtype)}, and a {kind} prior has no weights of this type: use "
                "float32, bfloat16 or float16"
            )

    def save_pretrained(self, path: str | Path, **options: Any) -> Path:
        """As of every model, see `Tokenizer.save_pretrained`; refused for int8 and int4.

        Raises:
            CheckpointError: also if the weights are int8 or int4.
        """
        if self.dtype in WEIGHT_ONLY:
            raise CheckpointError(
                f"the weights are {_name(self.dtype)}, which is chosen when a model is loaded and "
                "never saved: load it again without dtype, and save that"
            )
        return super().save_pretrained(path, **options)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
