"""What `accelerate launch` was asked for: obeyed, or refused with the command that works.

Accelerate passes some settings to the processes that it starts, in environment variables, and drops
others: `--gradient_accumulation_steps` unless DeepSpeed is used, and `--num_processes 2` where it
starts one process, on CPUs. It also passes mixed_precision "no" if none was chosen. So the command
line of the launcher is read, with Accelerate's own parser, and the variables where it cannot be.
"""

import contextlib
import io
import logging
import os
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Self, TypeVar

import psutil
from accelerate.commands.config.config_args import default_config_file, load_config_from_file
from accelerate.commands.launch import launch_command_parser

from smalti.errors import ConfigurationError
from smalti.training.config import RunConfig

logger = logging.getLogger(__name__)

PRECISIONS = ("no", "bf16")  # that a run can train in
Config = TypeVar("Config", bound=RunConfig)


@dataclass(frozen=True)
class LaunchSettings:
    """The settings that were chosen for a launch; None where nothing was chosen."""

    mixed_precision: str | None = None
    gradient_accumulation_steps: int | None = None
    num_processes: int | None = None  # on one machine
    script: str = "SCRIPT"  # as torchrun takes it: a path, or "-m" and a module

    @classmethod
    def current(cls) -> Self:
        """The settings of the launch that started this process, if there was one."""
        return cls.of_command(launcher_arguments(os.getppid())) or cls.of_environment(os.environ)

    @classmethod
    def of_environment(cls, variables: Any) -> Self:
        """From the variables that Accelerate sets, or the user."""
        precision = variables.get("ACCELERATE_MIXED_PRECISION", "no").lower()
        accumulation = variables.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "")
        return cls(
            mixed_precision=None if precision == "no" else precision,  # it may be the default
            gradient_accumulation_steps=int(accumulation) if accumulation.isdecimal() else None,
        )

    @classmethod
    def of_command(cls, arguments: Sequence[str] | None) -> Self | None:
        """From the arguments of `accelerate launch`, and the config file that it reads."""
        options = None if arguments is None else _parsed(tuple(arguments))
        if options is None:
            return None
        config = _config_of(options)
        precision = options.mixed_precision or getattr(config, "mixed_precision", None)
        total = options.num_processes or getattr(config, "num_processes", None) or 1
        machines = options.num_machines or getattr(config, "num_machines", None) or 1
        tpu = options.tpu or "TPU" in str(getattr(config, "distributed_type", ""))
        return cls(
            mixed_precision=str(precision).lower() if precision else None,
            gradient_accumulation_steps=options.gradient_accumulation_steps,
            num_processes=None if tpu else total // machines,
            script=f"{'-m ' if options.module else ''}{options.training_script}",
        )


@cache
def launcher_arguments(parent: int) -> list[str] | None:
    """The arguments of `accelerate launch`, if process `parent` is one; None for any other."""
    try:
        words = psutil.Process(parent).cmdline()
    except (psutil.Error, OSError):
        return None
    for position, word in enumerate(words):
        match Path(word).name:
            case "accelerate-launch" | "accelerate.commands.launch":
                return words[position + 1 :]
            case "accelerate" | "accelerate.commands.accelerate_cli":
                return (
                    words[position + 2 :]
                    if words[position + 1 : position + 2] == ["launch"]
                    else None
                )
    return None


@cache
def _parsed(arguments: tuple[str, ...]) -> Namespace | None:
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return launch_command_parser().parse_args(list(arguments))
    except SystemExit:  # not the arguments that we took them for
        return None


def _config_of(options: Namespace) -> Any:
    """The config file of a launch, if it reads one."""
    named = options.config_file is not None
    if not named and (options.cpu or not os.path.isfile(default_config_file)):
        return None
    try:
        return load_config_from_file(options.config_file)
    except (OSError, ValueError, TypeError, KeyError):  # the launcher has reported it
        return None


# -------------------------------------------------------------------------------------------------
# What a run makes of them.


def obeying(config: Config, launch: LaunchSettings) -> Config:
    """The config of a run with the accumulation of its launch.

    Raises:
        ConfigurationError: the launch contradicts the config.
    """
    asked, own = launch.gradient_accumulation_steps, config.gradient_accumulation_steps
    if asked is None or asked == own:
        return config
    if own != 1:
        raise ConfigurationError(
            f"gradient_accumulation_steps is {own}, and the launcher sets {asked}: leave out one of"
            " the two"
        )
    logger.info("gradient_accumulation_steps %d, as the launcher sets it", asked)
    return replace(config, gradient_accumulation_steps=asked)


def precision_of(own: str, launch: LaunchSettings) -> Any:
    """The precision that a run was asked for: "auto", "no" or "bf16".

    Raises:
        ConfigurationError: the launch contradicts the config, or asks for another precision.
    """
    asked = launch.mixed_precision
    if asked is None:
        return own
    if asked not in PRECISIONS:
        raise ConfigurationError(
            f"the launcher sets mixed_precision {asked}, and smalti trains in bf16 or fp32: use "
            "accelerate launch --mixed_precision bf16, or --mixed_precision no for fp32"
        )
    if own not in ("auto", asked):
        raise ConfigurationError(
            f"mixed_precision is {own}, and the launcher sets {asked}: leave out one of the two"
        )
    return asked


def refuse_fewer_processes(joined: int, launch: LaunchSettings) -> None:
    """Raise `ConfigurationError` if this process is alone, though several were asked for.

    Args:
        joined: number of processes in the job.
    """
    if joined > 1:
        return
    announced = int(os.environ.get("WORLD_SIZE", 1))
    if announced > 1:
        raise ConfigurationError(
            f"WORLD_SIZE is {announced}, but this process has joined no other: start the command "
            "with torchrun or accelerate launch on each machine, or unset WORLD_SIZE"
        )
    asked = launch.num_processes or 1
    if asked > 1:
        raise ConfigurationError(
            f"accelerate launch was asked for {asked} processes and has started one, because there "
            f"are no {asked} GPUs: for CPUs use ACCELERATE_USE_CPU=1 torchrun --nproc_per_node "
            f"{asked} {launch.script} and the same options, for one process --num_processes 1"
        )


def said_of_precision(launch: LaunchSettings) -> str:
    """The remark of a command that does not train on the precision of its launch, or ""."""
    asked = launch.mixed_precision
    if asked in (None, "no"):
        return ""
    return f"mixed_precision {asked} of the launcher concerns training: this command uses fp32"
