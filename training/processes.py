"""The processes of a job: precision, DDP for both stages, FSDP2 for priors, synchronisation.

Machines, processes, sharding and compilation are those of the Accelerate config; for precision and
gradient accumulation see `launch.py`. A launch with DeepSpeed, Megatron-LM, FSDP version 1 or
tensor, context or sequence parallelism is refused.
"""

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import wraps
from pathlib import Path
from types import FunctionType
from typing import Any, Literal, TypeVar

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

from smalti.errors import CheckpointError, ConfigurationError, SmaltiError
from smalti.folders import locked
from smalti.processor import cpu_multiplies_bf16
from smalti.training.blocks import blocks_of
from smalti.training.checkpoint import Stateful, is_sharded
from smalti.training.config import Precision
from smalti.training.launch import LaunchSettings, refuse_fewer_processes, said_of_precision
from smalti.training.progress import progress_bar

logger = logging.getLogger(__name__)

T = TypeVar("T")

UNSUPPORTED = {
    DistributedType.DEEPSPEED: "DeepSpeed",
    DistributedType.MEGATRON_LM: "Megatron-LM",
}

# -------------------------------------------------------------------------------------------------
# Precision: bf16 autocast where it is faster.


def resolve_precision(requested: Precision, device: torch.device) -> Literal["no", "bf16"]:
    """The precision to train in: "auto" becomes "bf16" on GPUs that support it and on CPUs that
    multiply it faster than fp32.

    Raises:
        ConfigurationError: bf16 was requested on a GPU that lacks it.
    """
    if requested != "auto":
        if requested == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
            raise ConfigurationError(
                "mixed_precision is bf16, but this GPU lacks bf16: use --mixed_precision no"
            )
        return requested
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "no"
    if device.type == "cpu":
        return "bf16" if cpu_multiplies_bf16() else "no"
    return "no"


# -------------------------------------------------------------------------------------------------
# Joining the job.

# Seconds that processes wait for one another whose shares of work may take hours: the main process
# also trains the classifier of an evaluation, or packs all pictures, alone. A process that fails is
# found at once by what launched it, which ends the others.
LONG_WAIT = 7 * 24 * 3600.0


def join_job(timeout: float | None = None) -> PartialState:
    """This process as a member of the launched job.

    It computes on CPUs if ACCELERATE_USE_CPU is set, or if torchrun started several processes on a
    machine without GPUs, where Accelerate would leave each of them alone.

    Args:
        timeout: seconds that a process waits for the others before it fails; None is torch's
            default.

    Raises:
        ConfigurationError: several processes were asked for, and this one is alone.
    """
    options = {} if timeout is None else {"timeout": timedelta(seconds=timeout)}
    if "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1 and not _has_gpus():
        if not parse_flag_from_env("ACCELERATE_USE_CPU"):
            logger.info("no GPU was found: %s processes on CPUs", os.environ["WORLD_SIZE"])
        os.environ["ACCELERATE_USE_CPU"] = "1"
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), **options)
    refuse_fewer_processes(state.num_processes, LaunchSettings.current())
    return state


def _has_gpus() -> bool:
    """Whether there are GPUs, or other accelerators, that can work together."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator is not None and accelerator.type != "mps"


@contextmanager
def job_in(folder: Path, *, deep: bool = False) -> Iterator[None]:
    """Join the launched job, whose main process holds the lock of the folder that the job fills,
    see `locked`.

    Raises:
        BusyError: another job is writing into the folder.
    """
    state = join_job(LONG_WAIT)
    with ExitStack() as stack:
        with agreed_errors():
            if state.is_main_process:
                stack.enter_context(locked(folder, deep=deep))
        yield
        state.wait_for_everyone()


def fills_folder(
    field: str = "output_dir", *, deep: bool = False
) -> Callable[[Callable[[Any], T]], Callable[[Any], T]]:
    """A decorator for what a command does with its configuration: the job holds the lock of the
    folder `config.field` all the time, see `job_in`."""

    def decorate(work: Callable[[Any], T]) -> Callable[[Any], T]:
        @wraps(work)
        def locked_work(config: Any) -> T:
            with job_in(getattr(config, field), deep=deep):
                return work(config)

        return locked_work

    return decorate


def say(text: str) -> None:
    """Print on the main process of the launch only."""
    if join_job().is_main_process:
        print(text)


@contextmanager
def shared_work(total: int, title: str, *, unit: str = "it") -> Iterator[dict[str, Any]]:
    """Keyword arguments for work that is divided by index among the processes: rank, world_size,
    barrier, and progress, which advances a bar on the main process. The bar shows the work of all
    processes, on the assumption that the others are as fast.

    Args:
        total: number of samples, over all processes.
        unit: what is counted.
    """
    state = join_job()
    if said := said_of_precision(LaunchSettings.current()):
        logger.info(said)
    with progress_bar(total, title, unit=unit, shown=state.is_main_process) as bar:

        def progress(count: int) -> None:
            bar.update(min(count * state.num_processes, total - bar.n))

        yield {
            "rank": state.process_index,
            "world_size": state.num_processes,
            "barrier": state.wait_for_everyone,
            "progress": progress,
        }


def agreed_precision(requested: Precision, timeout: float) -> Literal["no", "bf16"]:
    """Join the job, and return the precision that the main process resolved: the machines of a job
    may differ.

    Args:
        timeout: seconds that a process waits for the others before it fails.
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
        ConfigurationError: the job was launched in a way that runs do not support.
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
        raise ConfigurationError(f"{UNSUPPORTED[kind]} is not supported: launch with DDP or FSDP2")
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ConfigurationError("FSDP of version 1 is not supported: set fsdp_version to 2")
    mesh = accelerator.parallelism_config
    if mesh is not None and (mesh.tp_enabled or mesh.cp_enabled or mesh.sp_enabled):
        raise ConfigurationError(
            "tensor, context and sequence parallelism are not supported: leave parallelism_config "
            "out of the launch config"
        )
    return accelerator


# -------------------------------------------------------------------------------------------------
# The module to train: DDP averages its gradients over the processes, FSDP2 also shards its weights.


def replicate(accelerator: Accelerator, module: nn.Module) -> nn.Module:
    """Wrap a module so that its backward pass averages the gradients over the processes (DDP).

    Only this wrapper synchronises gradients: every pass whose gradients are used must call it.

    Raises:
        ConfigurationError: the job was launched with FSDP.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        raise ConfigurationError("FSDP shards priors only: launch this command with DDP")
    return accelerator.prepare(module)


def shard(
    accelerator: Accelerator, module: nn.Module, optimizer: torch.optim.Optimizer
) -> nn.Module:
    """Like `replicate`; under FSDP2 the module and its optimizer are sharded instead, in place.

    Create an EMA of the module before this call, and restore a checkpoint after it.

    Raises:
        ConfigurationError: the optimizer needs whole weights, and the job was launched with FSDP.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        return replicate(accelerator, module)
    if not isinstance(optimizer, torch.optim.AdamW):
        raise ConfigurationError(
            "FSDP shards the weights, and this optimizer needs whole ones: use --optimizer adamw, "
            "or launch with DDP"
        )
    plugin = accelerator.state.fsdp_plugin
    assert plugin is not None, "Accelerate has a plugin whenever it shards"
    if plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = repeated_blocks(module)
    wrapped, _ = accelerator.prepare(module, optimizer)  # changes the optimizer in place
    for part in module.modules():
        # The methods of the root module are called within its `forward`, while its weights are
        # gathered; the methods of a block gather the weights of the block.
        if isinstance(part, FSDPModule) and part is not module:
            for name in own_methods(part):
                register_fsdp_forward_method(part, name)
    return wrapped


def own_methods(module: nn.Module) -> list[str]:
    """Names of a module's public methods besides `forward`, which may need its gathered weights."""
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
    """Class names of the blocks in a module's lists: each block becomes one unit of sharding."""
    return sorted({type(block).__name__ for block in blocks_of(module)})


# -------------------------------------------------------------------------------------------------
# Synchronisation of the processes.


def sum_over_processes(accelerator: Accelerator, values: Tensor) -> Tensor:
    """Sum of a tensor over all processes; every process must call this."""
    reduced = accelerator.reduce(values, reduction="sum")
    assert isinstance(reduced, Tensor)
    return reduced


def any_process(accelerator: Accelerator, *flags: bool) -> list[bool]:
    """Whether each flag is set on any process; every process must call this."""
    counts = torch.tensor([int(flag) for flag in flags], device=accelerator.device)
    return [count > 0 for count in sum_over_processes(accelerator, counts).tolist()]


@contextmanager
def agreed_errors() -> Iterator[None]:
    """Raise on all processes what the main process raises in the block, on the others as a
    `SmaltiError`."""
    raised: SmaltiError | None = None
    try:
        yield
    except SmaltiError as error:
        raised = error
    found = [None if raised is None else str(raised)]
    broadcast_object_list(found)
    if raised is not None:
        raise raised
    if found[0] is not None:
        raise SmaltiError(found[0])


def refuse_divergence(tracked: Mapping[str, Stateful]) -> None:
    """Compare the weights that must be equal on all processes: those of modules not sharded.

    Raises:
        CheckpointError: a process has other weights than process 0.
    """
    if PartialState().num_processes == 1:
        return
    modules = {name: part for name, part in tracked.items() if isinstance(part, nn.Module)}
    ours = {name: digest(part) for name, part in modules.items() if not is_sharded(part)}
    first, *others = gather_object([ours])
    for rank, theirs in enumerate(others, start=1):
        for name in first:
            if theirs[name] != first[name]:
                raise CheckpointError(
                    f"process {rank} has other weights of {name} than process 0: a machine of this "
                    "job computes wrong results; nothing was saved, continue on other machines with"
                    " --resume_from_checkpoint latest"
                )


def digest(module: nn.Module) -> str:
    """A hash of the sum and the sum of squares of each tensor of a module."""
    sums = [_sums(tensor) for tensor in module.state_dict().values()]
    flat = torch.cat(sums).cpu().numpy().tobytes() if sums else b""
    return hashlib.sha256(flat).hexdigest()


def _sums(tensor: Tensor) -> Tensor:
    values = tensor.detach().double().flatten()
    return torch.stack([values.sum(), values.square().sum()])
