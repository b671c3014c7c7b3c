"""A training run: its folder, its processes, its clock. The loop itself stays in the script.

run = Run(config, kind="train-prior")
run.track(model=model, ema=ema, optimizer=OptimizerState(optimizer))
run.resume()
for step in run.steps():
    ...
    run.log(step, values)
"""

import contextlib
import logging
import math
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import ProjectConfiguration
from torch import Tensor, nn
from tqdm.auto import tqdm

from smalti.config import config_to_dict, recipe_text
from smalti.errors import SmaltiError
from smalti.files import write_text
from smalti.training.checkpoint import (
    Checkpoint,
    Stateful,
    checkpoints,
    newest_valid,
    save_checkpoint,
    verify,
)
from smalti.training.interrupt import EXIT_INTERRUPTED, InterruptGuard
from smalti.training.log import MetricsLog, check_tracker, start_trackers
from smalti.training.precision import Precision, resolve_precision
from smalti.training.schedule import warmup_cosine
from smalti.training.seeding import derive_seed

logger = logging.getLogger(__name__)

RECIPE = "config.yaml"  # the resolved config of a run, valid as --config

# May differ between a checkpoint and the run that resumes it; everything else must be equal.
FREE_TO_CHANGE = {
    "output_dir",
    "max_train_steps",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "resume_from_checkpoint",
    "validation_steps",
    "logging_steps",
    "report_to",
    "dataloader_num_workers",
}


@dataclass(frozen=True)
class RunConfig:
    """Settings that both stages share; the flag names are those of Diffusers' scripts."""

    output_dir: Path = Path("runs/run")
    seed: int = 0
    max_train_steps: int = 100_000  # optimizer steps
    train_batch_size: int = 64  # images per optimizer step, over all processes and accumulation
    gradient_accumulation_steps: int = 1  # micro-batches per optimizer step
    learning_rate: float = 1e-4  # peak
    lr_warmup_steps: int = 0
    lr_final_ratio: float = 1.0  # learning rate at the last step / peak; 1 = constant
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    weight_decay: float = 0.0  # on matrices only
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    mixed_precision: Precision = "auto"
    checkpointing_steps: int = 1000
    checkpoints_total_limit: int = 2  # 0 keeps all
    resume_from_checkpoint: str | None = None  # "latest", or the path of a checkpoint folder
    validation_steps: int = 1000  # between pictures and held-out losses
    logging_steps: int = 20
    max_skipped_steps: int = 20  # steps in a row with a non-finite gradient until the run stops
    report_to: str = "none"  # none, tensorboard, wandb or trackio
    dataloader_num_workers: int = 0

    def __post_init__(self) -> None:
        positive = (
            "max_train_steps",
            "train_batch_size",
            "gradient_accumulation_steps",
            "checkpointing_steps",
            "validation_steps",
            "logging_steps",
            "max_skipped_steps",
        )
        for name in positive:
            if getattr(self, name) < 1:
                raise SmaltiError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("learning_rate", "max_grad_norm"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise SmaltiError(f"{name} is {value}; it must be positive")
        if not 0 <= self.ema_decay < 1:
            raise SmaltiError(f"ema_decay is {self.ema_decay}; it must lie in [0, 1)")
        check_tracker(self.report_to)


class Run:
    """One training run in `config.output_dir`, on one process or many."""

    def __init__(self, config: RunConfig, kind: str) -> None:
        self.config = config
        self.kind = kind
        self.folder = Path(config.output_dir)
        use_cpu = os.environ.get("ACCELERATE_USE_CPU") in ("1", "true", "True") or None
        device = torch.device("cuda" if torch.cuda.is_available() and not use_cpu else "cpu")
        self.precision: Literal["no", "bf16"] = resolve_precision(config.mixed_precision, device)
        # A process may train one stage after the other, each in its own precision.
        AcceleratorState._reset_state()
        self.accelerator = Accelerator(
            mixed_precision=self.precision,
            log_with=None if config.report_to == "none" else config.report_to,
            project_config=ProjectConfiguration(str(self.folder), logging_dir=str(self.folder)),
        )
        self.device = self.accelerator.device
        self.start_step = 0
        self.skipped_in_a_row = 0
        self._tracked: dict[str, Stateful] = {}
        self._checkpoint = self._open_folder()
        self._log: MetricsLog | None = None

    # -- the folder ---------------------------------------------------------------------------

    def _open_folder(self) -> Checkpoint | None:
        """Find what to resume; refuse to overwrite another run. All processes decide alike."""
        wanted = self.config.resume_from_checkpoint
        found: Checkpoint | None = None
        if wanted == "latest":
            found, skipped = newest_valid(self.folder)
            for reason in skipped:
                logger.warning("skipped a checkpoint: %s", reason)
        elif wanted is not None:
            found = verify(Path(wanted))
        if found is not None:
            self._check_same_run(found)
        elif wanted is None and self._holds_a_run():
            raise SmaltiError(
                f"{self.folder} already holds a run: continue it with "
                "--resume_from_checkpoint latest, or choose another --output_dir"
            )
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(self.folder / RECIPE, recipe_text(self.config))
        self.accelerator.wait_for_everyone()
        return found

    def _holds_a_run(self) -> bool:
        return bool(checkpoints(self.folder)) or (self.folder / "metrics.jsonl").exists()

    def _check_same_run(self, checkpoint: Checkpoint) -> None:
        ours, theirs = config_to_dict(self.config), checkpoint.state["config"]
        if checkpoint.state["kind"] != self.kind:
            raise SmaltiError(f"{checkpoint.path} is of a {checkpoint.state['kind']} run")
        for name in sorted(ours.keys() | theirs.keys()):
            if name not in FREE_TO_CHANGE and ours.get(name) != theirs.get(name):
                raise SmaltiError(
                    f"{checkpoint.path} was made with {name} = {theirs.get(name)}, this run has "
                    f"{ours.get(name)}: use the same value, or another --output_dir"
                )
        world = checkpoint.state["num_processes"]
        if world != self.accelerator.num_processes:
            logger.warning(
                "resuming on %d processes what ran on %d: the data order is the same, "
                "rounding and dropout are not",
                self.accelerator.num_processes,
                world,
            )

    # -- state --------------------------------------------------------------------------------

    def track(self, **objects: Stateful) -> None:
        """Name what a checkpoint must hold. Modules are tracked unwrapped."""
        self._tracked.update(objects)

    def resume(self) -> None:
        """Restore the tracked objects if there is a checkpoint; open the logs."""
        if self._checkpoint is not None:
            self._checkpoint.restore(self._tracked)
            self.start_step = self._checkpoint.step
            self.skipped_in_a_row = int(self._checkpoint.state["skipped_in_a_row"])
            logger.info("resumed from %s", self._checkpoint.path)
        metrics_file = self.folder / "metrics.jsonl"
        self._log = MetricsLog(metrics_file, self.accelerator, self.start_step)
        start_trackers(self.accelerator, self.config.report_to, config_to_dict(self.config))

    def save(self, step: int) -> None:
        """Write a checkpoint after `step` optimizer steps."""
        if self.accelerator.is_main_process:
            state = {
                "kind": self.kind,
                "config": config_to_dict(self.config),
                "num_processes": self.accelerator.num_processes,
                "skipped_in_a_row": self.skipped_in_a_row,
                "versions": {"torch": torch.__version__, "python": platform.python_version()},
            }
            keep = self.config.checkpoints_total_limit
            save_checkpoint(self.folder, step, self._tracked, state, keep=keep)
        self.accelerator.wait_for_everyone()

    # -- the clock ----------------------------------------------------------------------------

    def steps(self) -> Iterator[int]:
        """Yield the steps still to do; save when due, at the end, and when asked to stop.

        Every random number of a step derives from (seed, step, process): torch's global generators
        are seeded anew each time, so a resumed step draws what the uninterrupted one would have.
        """
        config = self.config
        bar = tqdm(
            total=config.max_train_steps,
            initial=self.start_step,
            desc=self.kind,
            disable=not self.accelerator.is_local_main_process,
        )
        with InterruptGuard() as guard, bar:
            for step in range(self.start_step, config.max_train_steps):
                torch.manual_seed(derive_seed(config.seed, step, self.accelerator.process_index))
                yield step
                bar.update()
                stop = self._any_process(guard.requested)
                done = step + 1
                if stop or done % config.checkpointing_steps == 0 or done == config.max_train_steps:
                    self.save(done)
                if stop:
                    self._say_how_to_go_on(done)
                    raise SystemExit(EXIT_INTERRUPTED)

    def _any_process(self, flag: bool) -> bool:
        if self.accelerator.num_processes == 1:
            return flag
        return bool(self._mean(torch.tensor([float(flag)], device=self.device)).item() > 0)

    def _mean(self, values: Tensor) -> Tensor:
        """Mean over all processes."""
        reduced = self.accelerator.reduce(values, reduction="mean")
        assert isinstance(reduced, Tensor)
        return reduced

    def _say_how_to_go_on(self, step: int) -> None:
        flag = "--resume_from_checkpoint latest"
        how = "" if self.config.resume_from_checkpoint == "latest" else f" and {flag}"
        self.accelerator.print(
            f"\nstopped after step {step}; saved in {self.folder}. Go on with the same command{how}"
        )

    def due(self, step: int, every: int) -> bool:
        """True after every `every`-th step, and after the last."""
        return (step + 1) % every == 0 or step + 1 == self.config.max_train_steps

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step, a pure function of the config."""
        config = self.config
        return warmup_cosine(
            step,
            peak=config.learning_rate,
            warmup=config.lr_warmup_steps,
            total=config.max_train_steps,
            final_ratio=config.lr_final_ratio,
        )

    # -- one step -----------------------------------------------------------------------------

    def adamw(self, module: nn.Module) -> torch.optim.AdamW:
        """AdamW with weight decay on matrices only, fused where torch can."""
        config = self.config
        parameters = [p for p in module.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        betas = (config.adam_beta1, config.adam_beta2)
        kept = [group for group in groups if group["params"]]
        return torch.optim.AdamW(kept, lr=config.learning_rate, betas=betas, fused=True)

    @contextlib.contextmanager
    def micro_batch(self, index: int, model: nn.Module) -> Iterator[None]:
        """Gradients of all but the last micro-batch stay on their process."""
        last = index == self.config.gradient_accumulation_steps - 1
        with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
            yield

    def backward(self, loss: Tensor) -> None:
        """Back-propagate one micro-batch's share of the loss."""
        self.accelerator.backward(loss / self.config.gradient_accumulation_steps)

    def apply(self, optimizer: torch.optim.Optimizer, module: nn.Module, step: int) -> float:
        """Clip, then step with this step's learning rate; zero the gradients.

        Returns the gradient norm before clipping. If it is not finite nothing is changed: gradients
        are equal on all processes by then, so all skip alike.
        """
        norm = nn.utils.clip_grad_norm_(module.parameters(), self.config.max_grad_norm).item()
        if math.isfinite(norm):
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate(step)
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    def count_step(self, gradient_norm: float, step: int) -> bool:
        """Whether the step was taken. Ends the run after too many skipped ones in a row."""
        accepted = math.isfinite(gradient_norm)
        self.skipped_in_a_row = 0 if accepted else self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= self.config.max_skipped_steps:
            raise SmaltiError(
                f"the gradient was not finite in {self.skipped_in_a_row} steps in a row, up to step"
                f" {step}: lower --learning_rate or use --mixed_precision no; the last checkpoint"
                f" in {self.folder} is untouched"
            )
        return accepted

    def log(self, step: int, values: Mapping[str, float | Tensor]) -> None:
        """Average the values over all processes and write them; every process must call this."""
        names = sorted(values)
        stacked = torch.tensor([float(values[name]) for name in names], device=self.device)
        self.log_alone(step, dict(zip(names, self._mean(stacked).tolist(), strict=True)))

    def log_alone(self, step: int, values: Mapping[str, float]) -> None:
        """Write values that the main process measured."""
        assert self._log is not None, "call resume() before log()"
        self._log.write(step + 1, dict(values))

    def export(self, save: Callable[[Path], Any], folder: Path) -> Path:
        """Close the trackers; the main process writes the finished model by `save(folder)`."""
        for tracker in self.accelerator.trackers:
            tracker.finish()
        if self.accelerator.is_main_process:
            save(folder)
        self.accelerator.wait_for_everyone()
        return folder
