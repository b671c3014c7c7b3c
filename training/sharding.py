"""Tensors that are spread over processes (FSDP2), and back.

Checkpoints hold whole tensors, whoever wrote them: a run that shards its model goes on from one
that did not, and the other way round.
"""

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(module: nn.Module) -> bool:
    """Whether the parameters of a module are spread over the processes."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together from its shards; every process of its mesh must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_like(tensor: Tensor, target: Tensor) -> Tensor:
    """This process's shard of a whole tensor, which all processes hold, spread like `target`."""
    if not isinstance(target, DTensor):
        return tensor
    mesh = target.device_mesh
    local = tensor.to(device=target.device, dtype=target.dtype)
    return distribute_tensor(local, mesh, target.placements, src_data_rank=None)
