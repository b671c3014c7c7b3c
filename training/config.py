"""The settings of a training run that both stages share, and which of them may change on resume."""

import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from smalti.config import check_at_least
from smalti.errors import ConfigurationError

Precision = Literal["auto", "no", "bf16"]
OptimizerName = Literal["adamw", "muon", "adamw8bit"]
# How the next steps are made: these do not change what the run has learned so far, and changing
# them may be the remedy if it diverges.
STEP_SETTINGS = {
    "learning_rate",
    "lr_warmup_steps",
    "lr_final_ratio",
    "weight_decay",
    "max_grad_norm",
    "max_skipped_steps",
    "max_skipped_share",
    "mixed_precision",
    "gradient_accumulation_steps",
}
# May differ between a checkpoint and the run that resumes it, and the change is logged; everything
# else must be equal.
FREE_TO_CHANGE = STEP_SETTINGS | {
    *("gradient_checkpointing", "compile"),
    "weights",
    "pipeline_dir",
    "output_dir",
    "max_train_steps",
    "checkpointing_steps",
    "checkpointing_minutes",
    "checkpoints_total_limit",
    "resume_from_checkpoint",
    "validation_steps",
    "validation_budget",
    "heldout_data",  # the fingerprint of the data is that of the training pictures
    "accept_new_data",
    "preview",
    "logging_steps",
    "report_to",
    # Where labels are found: the fingerprint of the data covers the labels.
    *("shards", "label_column"),
    "dataloader_num_workers",
    "process_timeout",
}

# Paths to data and models, whose contents are compared by fingerprint: other paths may be given.
GUARDED_PATHS = {"data", "latents", "tokenizer", "prior"}

AT_LEAST_ONE = (
    "max_train_steps",
    "train_batch_size",
    "gradient_accumulation_steps",
    "checkpointing_steps",
    "validation_steps",
    "logging_steps",
    "max_skipped_steps",
    "process_timeout",
)
AT_LEAST_ZERO = (
    "lr_warmup_steps",
    "weight_decay",
    "checkpointing_minutes",
    "checkpoints_total_limit",
    "validation_budget",
)
TRACKERS = ("tensorboard", "wandb", "trackio")
MAX_SEED = 2**63 - 1  # the largest that torch accepts


@dataclass(frozen=True)
class RunConfig:
    """Settings that both stages share; the flags are named as in Diffusers' training scripts."""

    output_dir: Path = Path("runs/run")  # folder of checkpoints, logs and the result
    seed: int = 0  # of initial weights, data order and all noise; 0 to 2^63 - 1
    max_train_steps: int = 100_000  # number of optimizer steps
    train_batch_size: int = 64  # images per optimizer step, over all processes and accumulation
    gradient_accumulation_steps: int = 1  # micro-batches per optimizer step
    learning_rate: float = 1e-4  # of the optimizer, at its peak
    lr_warmup_steps: int = 0  # steps of linear warm-up to the peak
    lr_final_ratio: float = 1.0  # learning rate at the last step / peak; 1 = constant
    adam_beta1: float = 0.9  # decay of the mean of gradients, per step
    adam_beta2: float = 0.95  # decay of the mean of squared gradients, per step
    weight_decay: float = 0.0  # of the optimizer, on the matrices of layers only
    # adamw; muon: orthogonalised momentum for the matrices of repeated blocks, AdamW for the rest,
    # at the same learning rates; adamw8bit: AdamW whose moments take a quarter of the memory.
    optimizer: OptimizerName = "adamw"
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm
    ema_decay: float = 0.999  # decay of the averaged weights, per step
    mixed_precision: Precision = "auto"  # auto is bf16 where the device is faster with it
    checkpointing_steps: int = 1000  # steps between checkpoints
    checkpointing_minutes: float = 10.0  # most minutes between checkpoints; 0 = by steps only
    # Number of newest checkpoints to keep; 0 keeps all. The best one is kept, too, if the loss has
    # risen far above its own.
    checkpoints_total_limit: int = 2
    resume_from_checkpoint: str | None = None  # "latest", or the path of a checkpoint folder
    # Let a resumed run continue on other training data than before, for example on more pictures.
    accept_new_data: bool = False
    validation_steps: int = 1000  # steps between validations, each with a preview
    # Seconds of validation and previews per second of training, beyond a first minute. Those that
    # would take more are skipped, but neither the first nor those after the last step.
    validation_budget: float = 0.1
    logging_steps: int = 20  # steps between lines of metrics.jsonl
    # The run ends after this many steps in a row with a loss or gradient that is not finite.
    max_skipped_steps: int = 20
    # The run ends if a larger share of its steps has a loss or gradient that is not finite.
    max_skipped_share: float = 0.05
    process_timeout: int = 1800  # seconds that a process waits for the others before the job ends
    report_to: str = "none"  # none, tensorboard, wandb or trackio
    # Processes that load data, for each training process; None: by cores, memory and data.
    dataloader_num_workers: int | None = None

    def __post_init__(self) -> None:
        check_at_least(1, self, *AT_LEAST_ONE)
        for name in AT_LEAST_ZERO:
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ConfigurationError(f"{name} is {value}; it must be 0 or more")
        for name in ("learning_rate", "max_grad_norm"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ConfigurationError(f"{name} is {value}; it must be positive")
        if self.dataloader_num_workers is not None and self.dataloader_num_workers < 0:
            raise ConfigurationError(
                f"dataloader_num_workers is {self.dataloader_num_workers}; it must be 0 or more"
            )
        if self.accept_new_data and self.resume_from_checkpoint is None:
            raise ConfigurationError(
                "accept_new_data is for a run that is resumed: add --resume_from_checkpoint latest"
            )
        if not 0 <= self.max_skipped_share <= 1:
            raise ConfigurationError(
                f"max_skipped_share is {self.max_skipped_share}; it must lie in [0, 1]"
            )
        for name in ("adam_beta1", "adam_beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; it must lie in [0, 1)")
        if not 0 <= self.lr_final_ratio <= 1:
            raise ConfigurationError(
                f"lr_final_ratio is {self.lr_final_ratio}; it must lie in [0, 1]"
            )
        if not 0 <= self.seed <= MAX_SEED:
            raise ConfigurationError(f"seed is {self.seed}; it must lie between 0 and 2^63 - 1")
        check_tracker(self.report_to)
        check_optimizer(self.optimizer)


def check_optimizer(name: str) -> None:
    """Raise `ConfigurationError` if the optimizer is unknown, or what provides it is missing."""
    if name not in get_args(OptimizerName):
        known = ", ".join(get_args(OptimizerName))
        raise ConfigurationError(f'optimizer is "{name}"; choose one of {known}')
    if name == "muon":
        import torch

        if not hasattr(torch.optim, "Muon"):
            raise ConfigurationError(
                f"optimizer is muon, which torch {torch.__version__} lacks: pip install "
                "'torch>=2.9', or use --optimizer adamw"
            )
    if name == "adamw8bit" and importlib.util.find_spec("torchao") is None:
        raise ConfigurationError(
            "optimizer is adamw8bit but torchao is not installed: pip install 'smalti[lowbit]', or "
            "use --optimizer adamw"
        )


def check_tracker(report_to: str) -> None:
    """Raise `ConfigurationError` if the tracker is unknown or its package is not installed."""
    if report_to == "none":
        return
    if report_to not in TRACKERS:
        raise ConfigurationError(f'report_to is "{report_to}"; choose none, {", ".join(TRACKERS)}')
    package = importlib.util.find_spec(report_to)
    if package is None or package.origin is None:  # no origin: any folder of that name
        raise ConfigurationError(
            f'report_to is "{report_to}" but that package is not installed: '
            f"pip install {report_to}, or use --report_to none"
        )
