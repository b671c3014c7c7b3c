"""The tokenizer's quantizer as a next-scale prior owns it: a frozen copy."""

from collections.abc import Callable
from dataclasses import fields
from typing import Self

import torch
from torch import Tensor, nn

from smalti.errors import SmaltiError
from smalti.tokenizer.quantizers.multi_scale import MultiScaleConfig, MultiScaleQuantizer


class FrozenQuantizer(MultiScaleQuantizer):
    """A copy that never learns, stays in fp32 whatever the model around it is cast to, and knows
    whether it has been filled: `bound` is saved with it."""

    bound: Tensor  # () bool

    def __init__(self, config: MultiScaleConfig) -> None:
        super().__init__(config)
        self.register_buffer("bound", torch.tensor(False))
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> Self:
        """Always in eval mode."""
        del mode
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Of `Module.to`, `half` and their like only the device counts."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)

    def bind(self, quantizer: nn.Module | None) -> None:
        """Copy the weights of a tokenizer's quantizer; again only from an equal one.

        Raises:
            SmaltiError: it is not a multi-scale quantizer of this configuration, or another one
                was bound before.
        """
        if not isinstance(quantizer, MultiScaleQuantizer):
            raise SmaltiError(
                f"a next-scale prior is bound to a multi-scale quantizer, not to a "
                f"{type(quantizer).__name__}: give tokenizer.quantizer of a multi-scale tokenizer"
            )
        if quantizer.config != self.config:
            raise SmaltiError(
                f"the prior is made for another quantizer than this one "
                f"({_difference(self.config, quantizer.config)}): build it with "
                "quantizer=tokenizer.config.quantizer"
            )
        state = {
            name: tensor.float() if tensor.is_floating_point() else tensor
            for name, tensor in quantizer.state_dict().items()
            if name != "bound"
        }
        if self.bound and not _equal(self.state_dict(), state):
            raise SmaltiError(
                "the prior is bound to another tokenizer's quantizer: use the tokenizer that it "
                "was trained with, or start a new prior"
            )
        self.load_state_dict({**state, "bound": torch.tensor(True)})

    def place(self, vectors: Tensor, scale: int) -> Tensor:
        """What vectors (B, h_k w_k, d) at one scale add to the sum, (B, d, H, W) fp32."""
        with torch.autocast(vectors.device.type, enabled=False):
            return self._place(vectors.flatten(0, 1), len(vectors), scale)

    def nearest(self, vectors: Tensor) -> Tensor:
        """Codes (B, n) of the vectors nearest to (B, n, d)."""
        with torch.autocast(vectors.device.type, enabled=False):
            rows = self.codebook.normalise(vectors.flatten(0, 1))
            return self.codebook.search(rows).view(vectors.shape[:2])


def _equal(owned: dict[str, Tensor], given: dict[str, Tensor]) -> bool:
    """Whether what is looked up and added is the same, on any devices; statistics may differ."""
    statistics = ("idle_steps", "mean_counts", "mean_sums")
    return all(
        torch.equal(owned[name].cpu(), tensor.cpu())
        for name, tensor in given.items()
        if not name.endswith(statistics)
    )


def _difference(own: MultiScaleConfig, other: MultiScaleConfig) -> str:
    """The first field that differs, with both values."""
    return next(
        f"{field.name} {getattr(own, field.name)}, not {getattr(other, field.name)}"
        for field in fields(own)
        if getattr(own, field.name) != getattr(other, field.name)
    )
