"""A training run: its folder, its processes, its clock. The loop itself stays in the script.

run = Run(config, kind="train-prior", result=config.output_dir / "pipeline")
run.track(model=model, ema=ema, optimizer=OptimizerState(optimizer))
run.resume(data.fingerprint)
for step in run.steps():
    ...
    run.log(step, values)
run.export(model.save_pretrained)
"""

import contextlib
import logging
import math
import platform
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import ProjectConfiguration
from torch import Tensor, nn
from tqdm.auto import tqdm

from smalti.config import config_to_dict, recipe_text
from smalti.errors import EXIT_INTERRUPTED, SmaltiError
from smalti.files import write_text
from smalti.training.checkpoint import Checkpoint, Stateful, save_checkpoint
from smalti.training.config import RunConfig
from smalti.training.folder import (
    METRICS,
    RECIPE,
    export,
    find_checkpoint,
    later_checkpoints,
    refuse_other_settings,
    refuse_target,
)
from smalti.training.interrupt import InterruptGuard
from smalti.training.log import MetricsLog, start_trackers
from smalti.training.precision import Precision, agreed_precision
from smalti.training.schedule import warmup_cosine
from smalti.training.seeding import derive_seed

logger = logging.getLogger(__name__)


class Run:
    """One training run in `config.output_dir`, on one process or many.

    Args:
        kind: the command, so that no run goes on from a checkpoint of another command.
        result: the folder that the finished model will go to, checked before any work.

    Raises:
        SmaltiError: a folder holds what is not this run's, or no such run can be resumed.
    """

    def __init__(self, config: RunConfig, kind: str, result: Path) -> None:
        self.config = config
        self.kind = kind
        self.folder = Path(config.output_dir)
        self.result = result
        settings = config_to_dict(config)
        found = find_checkpoint(self.folder, config.resume_from_checkpoint, settings)
        refuse_target(self.folder, result)
        self._to_replace: list[Path] = []
        requested: Precision = config.mixed_precision
        if found is not None:
            self._check_same_run(found)
            self._to_replace = later_checkpoints(self.folder, found.step)
            if requested == "auto":  # another machine might choose otherwise
                requested = found.state["precision"]
        self.precision: Literal["no", "bf16"] = agreed_precision(requested)
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
        self._checkpoint = found
        self._data_fingerprint = ""
        self._tracked: dict[str, Stateful] = {}
        self._log: MetricsLog | None = None
        self.accelerator.wait_for_everyone()  # all have seen the folder as it was

    def _check_same_run(self, checkpoint: Checkpoint) -> None:
        if checkpoint.state["kind"] != self.kind:
            raise SmaltiError(f"{checkpoint.path} is of a {checkpoint.state['kind']} run")
        ours, theirs = config_to_dict(self.config), checkpoint.state["config"]
        refuse_other_settings(ours, theirs, checkpoint.path)
        if checkpoint.step > self.config.max_train_steps:
            raise SmaltiError(
                f"{checkpoint.path} is beyond max_train_steps {self.config.max_train_steps}: "
                "give at least its step, or resume an earlier checkpoint by its path"
            )
        replaced = later_checkpoints(self.folder, checkpoint.step)
        if replaced:
            logger.warning(
                "going back to step %d: the next checkpoint replaces %s",
                checkpoint.step,
                ", ".join(path.name for path in replaced),
            )

    # -- state --------------------------------------------------------------------------------

    def track(self, **objects: Stateful) -> None:
        """Name what a checkpoint must hold. Modules are tracked unwrapped."""
        self._tracked.update(objects)

    def resume(self, data_fingerprint: str) -> None:
        """Restore the tracked objects if there is a checkpoint.

        Args:
            data_fingerprint: of what the run learns from; a checkpoint of other data is refused.
        """
        self._data_fingerprint = data_fingerprint
        if self._checkpoint is not None:
            if self._checkpoint.state["data_fingerprint"] != data_fingerprint:
                raise SmaltiError(
                    f"{self._checkpoint.path} was trained on other data than these: put back what "
                    "has changed since, or choose another --output_dir"
                )
            self._checkpoint.restore(self._tracked)
            self.start_step = self._checkpoint.step
            self.skipped_in_a_row = int(self._checkpoint.state["skipped_in_a_row"])
            logger.info("resumed from %s", self._checkpoint.path)
            self._warn_of_other_processes(self._checkpoint.state["num_processes"])
        self.folder.mkdir(parents=True, exist_ok=True)

    def _warn_of_other_processes(self, before: int) -> None:
        if before != self.accelerator.num_processes:
            logger.warning(
                "resuming on %d processes what ran on %d: the data order is the same, "
                "rounding and dropout are not",
                self.accelerator.num_processes,
                before,
            )

    def save(self, step: int) -> None:
        """Write a checkpoint after `step` optimizer steps."""
        if self.accelerator.is_main_process:
            self._metrics()
            state = {
                "kind": self.kind,
                "config": config_to_dict(self.config),
                "data_fingerprint": self._data_fingerprint,
                "precision": self.precision,
                "num_processes": self.accelerator.num_processes,
                "skipped_in_a_row": self.skipped_in_a_row,
                "versions": {"torch": torch.__version__, "python": platform.python_version()},
            }
            keep = self.config.checkpoints_total_limit
            replaces = self._to_replace
            save_checkpoint(self.folder, step, self._tracked, state, keep=keep, replaces=replaces)
            self._to_replace = []
        self.accelerator.wait_for_everyone()

    def _metrics(self) -> MetricsLog:
        """The log; the first call, in the first step of the main process, claims the folder."""
        if self._log is None:
            start_trackers(self.accelerator, self.config.report_to, config_to_dict(self.config))
            write_text(self.folder / RECIPE, recipe_text(self.config))
            self._log = MetricsLog(self.folder / METRICS, self.accelerator, self.start_step)
        return self._log

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
                if self.accelerator.is_main_process:
                    self._metrics()
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
        if self.accelerator.is_main_process:
            self._metrics().write(step + 1, dict(values))

    def export(self, save: Callable[[Path], Any]) -> Path:
        """Close the trackers; the main process writes the finished model by `save(folder)`."""
        for tracker in self.accelerator.trackers:
            tracker.finish()
        if self.accelerator.is_main_process:
            export(self.folder, self.result, save)
        self.accelerator.wait_for_everyone()
        return self.result
