"""The repeated blocks of a model in training: compiled, or computed again in the backward pass.

Activation checkpointing (Chen et al., 1604.06174) keeps the input of each block instead of all that
its backward pass needs, and computes the block twice: a third more operations, and memory that
grows with the depth by one tensor for each block. Gradients are the same to the last bit.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

_recomputing = False  # whether a block is being computed again, see `recomputing`


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The blocks of a transformer: the modules in its lists that have parts of their own."""
    lists = [part for part in module.modules() if isinstance(part, nn.ModuleList)]
    return [block for part in lists for block in part if next(block.children(), None) is not None]


def trained_blocks(module: nn.Module) -> list[nn.Module]:
    """Those with weights that are trained: a frozen quantizer's are not."""
    blocks = blocks_of(module)
    return [block for block in blocks if any(p.requires_grad for p in block.parameters())]


def prepare_blocks(module: nn.Module, *, compiled: bool, recomputed: bool) -> None:
    """Compile each block, and let the backward pass compute it again, as asked. Names and values of
    weights stay. Call it after the EMA has copied the module."""
    for block in trained_blocks(module) if compiled or recomputed else []:
        run: Any = block.forward
        if compiled:
            run = torch.compile(run)
        if recomputed:
            run = partial(_checkpointed, block, run)
        block.forward = run


def _checkpointed(block: nn.Module, run: Any, *args: Any, **options: Any) -> Any:
    if not (block.training and torch.is_grad_enabled()):
        return run(*args, **options)
    return checkpoint(run, *args, use_reentrant=False, context_fn=_contexts, **options)


def _contexts() -> tuple[Any, Any]:
    """Those of the forward pass, and of its repetition."""
    return nullcontext(), _repetition()


@contextmanager
def _repetition() -> Iterator[None]:
    global _recomputing
    _recomputing = True
    try:
        yield
    finally:
        _recomputing = False


def recomputing() -> bool:
    """Whether a block is being computed again: operations that are not counted as the model's
    (PaLM, 2204.02311, appendix B)."""
    return _recomputing
