"""How a run spreads over processes: one, DDP for both stages, FSDP2 for priors.

What an Accelerate config says of machines, processes, sharding and compilation holds. What this
library decides itself (precision, accumulation) is not taken from there; what would be ignored is
refused.
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FunctionType
from typing import Any, Literal

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedType,
    GradientAccumulationPlugin,
    ProjectConfiguration,
    broadcast_object_list,
    gather_object,
    parse_flag_from_env,
)
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from tqdm.auto import tqdm

from smalti.errors import SmaltiError
from smalti.training.checkpoint import Stateful, is_sharded
from smalti.training.config import Precision

# -------------------------------------------------------------------------------------------------
# Which arithmetic to train in: bf16 autocast where it pays.


def resolve_precision(requested: Precision, device: torch.device) -> Literal["no", "bf16"]:
    """ "auto" becomes "bf16" where that is faster on this device: GPUs that support it, and CPUs
    with matrix units for it."""
    if requested != "auto":
        if requested == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
            raise SmaltiError("mixed_precision is bf16 but this GPU lacks bf16: use no")
        return requested
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "no"
    if device.type == "cpu":
        return "bf16" if cpu_multiplies_bf16() else "no"
    return "no"


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has matrix units for bf16 (Intel's AMX).

    There, convolutions and matrix products take half the time; CPUs without them emulate bf16 or
    gain little. It is asked, not timed: a timing depends on what else the machine is doing, and a
    run would not repeat.
    """
    if hasattr(torch.cpu, "get_capabilities"):
        return bool(torch.cpu.get_capabilities().get("amx_bf16", False))
    return torch.cpu._is_amx_tile_supported()  # older torch


# -------------------------------------------------------------------------------------------------
# How a run spreads over processes: one, DDP for both stages, FSDP2 for priors.

UNSUPPORTED = {
    DistributedType.DEEPSPEED: "DeepSpeed",
    DistributedType.MEGATRON_LM: "Megatron-LM",
}


def join_job(timeout: float | None = None) -> PartialState:
    """This process among those of the launch, on CPUs where ACCELERATE_USE_CPU says so.

    Args:
        timeout: seconds that a process waits for the others until it gives up; None is torch's.
    """
    options = {} if timeout is None else {"timeout": timedelta(seconds=timeout)}
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), **options)


def say(text: str) -> None:
    """Print, once for all processes of the launch."""
    if join_job().is_main_process:
        print(text)


@contextmanager
def shared_work(total: int, title: str) -> Iterator[dict[str, Any]]:
    """Keyword arguments for work that is cut by index: this process's rank, the world_size, a
    barrier, and the progress of a bar that the main process shows.

    Args:
        total: samples, over all processes.
    """
    state = join_job()
    with tqdm(total=total, desc=title, disable=not state.is_main_process) as bar:
        yield {
            "rank": state.process_index,
            "world_size": state.num_processes,
            "barrier": state.wait_for_everyone,
            "progress": bar.update,
        }


def agreed_precision(requested: Precision, timeout: float) -> Literal["no", "bf16"]:
    """Join the job, and use what the main process resolves: the machines of a job may differ.

    Args:
        timeout: seconds that a process waits for the others until it gives up.
    """
    state = join_job(timeout)
    assert state.device is not None, "PartialState always has a device"
    choice: list[Literal["no", "bf16"]] = ["no"]
    if state.is_main_process:
        choice = [resolve_precision(requested, state.device)]
    broadcast_object_list(choice)
    return choice[0]


def start_accelerator(
    folder: Path, precision: Literal["no", "bf16"], report_to: str
) -> Accelerator:
    """The accelerator of one run.

    Raises:
        SmaltiError: the job was launched in a way that runs do not support.
    """
    # A process may train one stage after the other, each in its own precision.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision=precision,
        log_with=None if report_to == "none" else report_to,
        project_config=ProjectConfiguration(str(folder), logging_dir=str(folder)),
        # The run divides the loss by its own gradient_accumulation_steps, and by nothing else.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
    )
    kind = accelerator.distributed_type
    if kind in UNSUPPORTED:
        raise SmaltiError(f"{UNSUPPORTED[kind]} is not supported: launch with DDP or FSDP2")
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise SmaltiError("FSDP of version 1 is not supported: set fsdp_version to 2")
    return accelerator


def replicate(accelerator: Accelerator, module: nn.Module) -> nn.Module:
    """Wrap a module so that its gradients are averaged over the processes (DDP).

    Raises:
        SmaltiError: the job was launched with FSDP.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        raise SmaltiError("only priors can be sharded by FSDP: launch this command with DDP")
    return accelerator.prepare(module)


def shard(
    accelerator: Accelerator, module: nn.Module, optimizer: torch.optim.Optimizer
) -> nn.Module:
    """Like `replicate`, but under FSDP2 shard the module, in place, and its optimizer instead."""
    if accelerator.distributed_type != DistributedType.FSDP:
        return replicate(accelerator, module)
    plugin = accelerator.state.fsdp_plugin
    assert plugin is not None, "Accelerate has one whenever it shards"
    if plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = repeated_blocks(module)
    wrapped, _ = accelerator.prepare(module, optimizer)  # the optimizer itself is changed, too
    for part in module.modules():
        # Those of the whole are called within its `forward`, while its weights are together.
        if isinstance(part, FSDPModule) and part is not module:
            for name in own_methods(part):
                register_fsdp_forward_method(part, name)
    return wrapped


def own_methods(module: nn.Module) -> list[str]:
    """Public methods of a module besides `forward`, which may need its weights put together."""
    classes = [c for c in type(module).__mro__ if issubclass(c, nn.Module) and c is not nn.Module]
    return sorted(
        {
            name
            for c in classes
            for name, value in vars(c).items()
            if isinstance(value, FunctionType) and name != "forward" and not name.startswith("_")
        }
        - set(dir(nn.Module))
        - set(dir(FSDPModule))
    )


def repeated_blocks(module: nn.Module) -> list[str]:
    """Class names of what stands in lists in a module: each block becomes a unit of sharding."""
    lists = [part for part in module.modules() if isinstance(part, nn.ModuleList)]
    blocks = [block for part in lists for block in part if next(block.children(), None)]
    return sorted({type(block).__name__ for block in blocks})


@contextmanager
def agreed_errors() -> Iterator[None]:
    """What the main process finds wrong within is raised on all processes."""
    found: list[str | None] = [None]
    try:
        yield
    except SmaltiError as error:
        found = [str(error)]
    broadcast_object_list(found)
    if found[0] is not None:
        raise SmaltiError(found[0])


def refuse_divergence(tracked: Mapping[str, Stateful]) -> None:
    """Compare what all processes must hold alike: modules that are not sharded.

    Raises:
        SmaltiError: some process has other weights than the first.
    """
    if PartialState().num_processes == 1:
        return
    modules = {name: part for name, part in tracked.items() if isinstance(part, nn.Module)}
    ours = {name: digest(part) for name, part in modules.items() if not is_sharded(part)}
    first, *others = gather_object([ours])
    for rank, theirs in enumerate(others, start=1):
        for name in first:
            if theirs[name] != first[name]:
                raise SmaltiError(
                    f"process {rank} has other weights of {name} than process 0: a machine of this "
                    "job computes wrongly; nothing was saved, go on from the last checkpoint"
                )


def digest(module: nn.Module) -> str:
    """A hash of sums over each tensor of a module; equal for equal tensors."""
    sums = [_sums(tensor) for tensor in module.state_dict().values()]
    flat = torch.cat(sums).cpu().numpy().tobytes() if sums else b""
    return hashlib.sha256(flat).hexdigest()


def _sums(tensor: Tensor) -> Tensor:
    values = tensor.detach().double().flatten()
    return torch.stack([values.sum(), values.square().sum()])
