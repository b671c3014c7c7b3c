"""Packed weights: a second copy of a weight, in the order in which a CPU's library multiplies.

A product packs the weight in every call, which takes longer than the arithmetic where there are few
rows. With a packed copy it does not, for as much memory again. oneDNN multiplies fp32 and, where
the processor has instructions for it, bf16; FBGEMM multiplies fp16 weights with fp32 numbers, on
processors that have no arithmetic in fp16. The operators are those that torch's compiler uses.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, TypeGuard, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.multiprocessing.reductions import StorageWeakRef

from smalti.hub import Pretrained
from smalti.processor import cpu_has_wide_vectors, cpu_multiplies_bf16

# Numbers of a weight from which packing saves time. A smaller one stays in the processor's cache.
PACKED_FROM = 2**19  # in products of few rows
PACKED_FROM_OF_MANY_ROWS = 2**16
PACKED_ROWS = 96  # most rows of a packed fp32 product with vectors of 256 bits


@dataclass(frozen=True)
class PackedWeight:
    """A copy of a weight in the layout of a library, and which weight it is of. Its storage is
    known by a weak reference, because a later one may have the same address."""

    weight: Any  # a tensor of oneDNN, or an object of FBGEMM
    storage: StorageWeakRef
    address: int
    version: int
    dtype: torch.dtype

    @classmethod
    def of(cls, weight: Tensor) -> "PackedWeight":
        """A copy of a weight as it is now."""
        storage = StorageWeakRef(weight.untyped_storage())
        packed = _packed(weight.detach())
        return cls(packed, storage, weight.data_ptr(), weight._version, weight.dtype)

    def is_of(self, weight: Tensor) -> bool:
        """Whether it is a copy of a weight as it is now."""
        return (
            type(weight) is nn.Parameter  # a tensor of torch.func has no storage
            and weight.untyped_storage()._cdata == self.storage.cdata
            and weight.data_ptr() == self.address
            and weight._version == self.version
            and weight.dtype == self.dtype
        )


class PackableLinear(nn.Linear):
    """A linear layer that may keep its weight a second time, packed for products on a CPU. Packed
    products round differently."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        self._packed: PackedWeight | None = None

    @property
    def can_be_packed(self) -> bool:
        """Whether a library here multiplies faster with a packed copy of the weight."""
        weight = self.weight
        on_cpu = type(weight) is nn.Parameter and weight.device.type == "cpu"
        # Nothing tells whether a weight that was made in torch.inference_mode has changed.
        return on_cpu and not weight.is_inference() and _has_packed_products(weight.dtype)

    @property
    def packed_rows(self) -> tuple[int, float]:
        """The fewest and the most rows with which a packed product is faster. In fp32, one thread
        multiplies one row faster with weights as `arrange_for_few_rows` stores them, and many rows
        are faster with vectors of 512 bits only."""
        if self.weight.dtype != torch.float32:
            return 1, math.inf
        fewest = 2 if torch.get_num_threads() == 1 else 1
        return fewest, math.inf if cpu_has_wide_vectors() else PACKED_ROWS

    @property
    def has_packed_copy(self) -> bool:
        """Whether the weight was packed, even if it has changed since."""
        return self._packed is not None

    def is_packed_for(self, rows: int) -> bool:
        """Whether products with so many rows use a packed copy of the weight as it is now."""
        known = self._packed
        if known is None or not known.is_of(self.weight):
            return False
        fewest, most = self.packed_rows
        return fewest <= rows <= most

    def pack(self) -> None:
        """Pack the weight as it is now, for passes without gradients. After a change of the weight,
        the copy is not used any more; call this again. Torch does not count all changes: a pass
        in train mode drops the copy, and changes through `weight.data` must not follow."""
        if not self.can_be_packed:
            self._packed = None
        elif self._packed is None or not self._packed.is_of(self.weight):
            self._packed = PackedWeight.of(self.weight)

    def share_packed_copy(self, other: "PackableLinear") -> None:
        """Take the packed copy of a layer that has the same weight."""
        if other._packed is not None and other._packed.is_of(self.weight):
            self._packed = other._packed

    def _apply(self, *args: Any, **kwargs: Any) -> "PackableLinear":
        """Move or cast the layer: a copy of another weight would only take memory."""
        super()._apply(*args, **kwargs)
        if self._packed is not None and not self._packed.is_of(self.weight):
            self._packed = None
        return self

    def forward(self, input: Tensor, bias: Tensor | None = None, gelu: bool = False) -> Tensor:
        """x W^T + bias, or its GELU, (..., in) -> (..., out); without `bias`, the layer's own."""
        bias = self.bias if bias is None else bias
        packed = self._packed
        if packed is not None and self._packed_is_valid(input):
            return _product(input, packed.weight, bias, gelu)
        if packed is not None and self._is_trained:
            self._packed = None
        output = F.linear(input, self.weight, bias)
        return F.gelu(output, approximate="tanh") if gelu else output

    @property
    def _is_trained(self) -> bool:
        """Whether an optimizer may change the weight next: torch does not count what those that
        are fused change."""
        return self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling()

    def _packed_is_valid(self, x: Tensor) -> bool:
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return False
        if x.dtype != self.weight.dtype or torch.is_autocast_enabled("cpu"):
            return False
        if x.ndim < 2 or x.shape[-1] != self.in_features or forward_ad._current_level >= 0:
            return False
        return self.is_packed_for(x.numel() // self.in_features)

    def __getstate__(self) -> dict[str, Any]:
        """Without the copy: the layouts of libraries can neither be pickled nor copied."""
        return {**self.__dict__, "_packed": None}


def share_packed_weights(source: nn.Module, target: nn.Module) -> None:
    """Give layers the packed copies of those of a model that has the same weights."""
    layers = dict(source.named_modules())
    for name, layer in target.named_modules():
        other = layers.get(name)
        if isinstance(layer, PackableLinear) and isinstance(other, PackableLinear):
            layer.share_packed_copy(other)


def gelu_of(layer: nn.Module, x: Tensor) -> Tensor:
    """gelu(layer(x)) in its tanh approximation; one product where the layer's weight is packed."""
    if is_plain_linear(layer) and isinstance(layer, PackableLinear):
        return layer.forward(x, gelu=True)
    return F.gelu(layer(x), approximate="tanh")


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a call of the module is a product with its weight, and nothing else depends on it: a
    subclass, such as one that adds a low-rank product, is not plain."""
    return type(module) in (nn.Linear, PackableLinear) and is_called_plainly(module)


def is_called_plainly(module: nn.Module) -> bool:
    """Whether a call of the module is its class's `forward`: it has no hook and is not compiled."""
    changed = module._forward_hooks or module._forward_pre_hooks or module._compiled_call_impl
    return not changed and "forward" not in vars(module)


def _has_packed_products(dtype: torch.dtype) -> bool:
    """Whether a library here multiplies with packed weights of this type, and faster."""
    if dtype == torch.float16:
        return torch.backends.quantized.engine in ("x86", "fbgemm")
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:  # which oneDNN may have been told to leave alone
        return cpu_multiplies_bf16() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32


def _packed(weight: Tensor) -> Any:
    """A weight (out, in) in the layout of its library."""
    if weight.dtype == torch.float16:
        return torch.ops.quantized.linear_prepack_fp16(weight.float(), None)
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())


def _product(x: Tensor, packed: Any, bias: Tensor | None, gelu: bool) -> Tensor:
    """x W^T + b, and its GELU if that is wanted."""
    if x.dtype != torch.float16:
        activation = ("gelu", [], "tanh") if gelu else ("none", [], "")
        return torch.ops.mkldnn._linear_pointwise(x, packed, bias, *activation)
    product = torch.ops.quantized.linear_dynamic_fp16(x.float(), packed)
    product = product if bias is None else product + bias
    return (F.gelu(product, approximate="tanh") if gelu else product).half()


class Packable(Pretrained):
    """A saved model that `compile_parts` packs on a CPU: a mixin for an `nn.Module`."""

    has_few_rows: ClassVar[bool] = False  # whether the products of sampling have few rows

    def compile_parts(self, **options: Any) -> None:
        """Compile the modules that sampling runs, with options of torch.compile.

        Without options, on a CPU, the weights of large linear layers are packed instead, where that
        saves time: it takes a second, and as much memory as they have. In a compiled block most of
        the time would still be that of products that are not packed.
        """
        smallest = PACKED_FROM if self.has_few_rows else PACKED_FROM_OF_MANY_ROWS
        layers = (m for m in cast("nn.Module", self).modules() if isinstance(m, PackableLinear))
        packable = [
            layer
            for layer in layers
            if layer.can_be_packed
            and layer.weight.numel() >= smallest
            and (self.has_few_rows or layer.packed_rows[1] == math.inf)
        ]
        if options or not packable:
            super().compile_parts(**options)
            return
        for layer in packable:
            layer.pack()
        self.compiled_with = {}
