"""A training run: its folder, its processes, its clock. The loop itself stays in the script.

run = Run(config, kind="train-prior", result=config.output_dir / "pipeline")
run.track(model=model, ema=ema, optimizer=OptimizerState(optimizer))
wrapped = run.shard(model, optimizer)
run.resume(data.fingerprint)
for step in run.steps():
    ...
    run.log(step, values)
run.export(model.save_pretrained)
"""

import atexit
import contextlib
import logging
import platform
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from smalti.config import config_to_dict
from smalti.errors import EXIT_INTERRUPTED, SmaltiError
from smalti.randomness import derive_seed
from smalti.training import processes
from smalti.training.checkpoint import (
    Checkpoint,
    Stateful,
    checkpoints,
    collect,
    remove_leftovers,
    save_checkpoint,
)
from smalti.training.config import Precision, RunConfig
from smalti.training.folder import (
    changes,
    export,
    find_checkpoint,
    later_checkpoints,
    refuse_other_settings,
    refuse_target,
)
from smalti.training.lock import RunLock
from smalti.training.logging import Progress
from smalti.training.optim import Steps
from smalti.training.signals import EXIT_FAILURE, InterruptGuard, Watch, launcher

# -------------------------------------------------------------------------------------------------
# A training run: its folder, its processes, its clock. The loop itself stays in the script.

logger = logging.getLogger(__name__)


@runtime_checkable
class Gathered(Protocol):
    """What is spread over processes while it is trained, and put together to be used."""

    def gather(self) -> None:
        """Put it together; every process must call this."""


class Run(Steps):
    """One training run in `config.output_dir`, on one process or many.

    Args:
        kind: the command, so that no run goes on from a checkpoint of another command.
        result: the folder that the finished model will go to, checked before any work.

    Raises:
        SmaltiError: a folder holds what is not this run's, or no such run can be resumed.
    """

    def __init__(self, config: RunConfig, kind: str, result: Path) -> None:
        self.kind = kind
        self.folder = Path(config.output_dir)
        self.result = result
        settings = config_to_dict(config)
        found = find_checkpoint(self.folder, config.resume_from_checkpoint, settings)
        refuse_target(self.folder, result)
        self._seen = checkpoints(self.folder)
        self._to_replace: list[Path] = []
        requested: Precision = config.mixed_precision
        if found is not None:
            _refuse_other_run(found, kind, config)
            self._to_replace = later_checkpoints(self.folder, found.step)
            if requested == "auto":  # another machine might choose otherwise
                requested = found.state["precision"]
        self.precision: Literal["no", "bf16"] = processes.agreed_precision(
            requested, config.process_timeout
        )
        super().__init__(
            config, processes.start_accelerator(self.folder, self.precision, config.report_to)
        )
        self.start_step = 0
        self._checkpoint = found
        self._lock = RunLock(self.folder)
        self._data_fingerprint = ""
        self._tracked: dict[str, Stateful] = {}
        self._progress: Progress | None = None
        self.accelerator.wait_for_everyone()  # all have seen the folder as it was

    # -- state --------------------------------------------------------------------------------

    def track(self, **objects: Stateful) -> None:
        """Name what a checkpoint must hold. Modules are tracked unwrapped."""
        self._tracked.update(objects)

    def resume(self, data_fingerprint: str) -> None:
        """Restore the tracked objects if there is a checkpoint; take the folder.

        Args:
            data_fingerprint: of what the run learns from; a checkpoint of other data is refused.

        Raises:
            SmaltiError: the checkpoint does not fit, or another run is active in the folder.
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
            self.guard.restore(self._checkpoint.state.get("skipped", {}))
            logger.info("resumed from %s", self._checkpoint.path)
            self._warn_of_other_processes(self._checkpoint.state["num_processes"])
        with processes.agreed_errors():
            if self.accelerator.is_main_process:
                self._take_folder()

    def _warn_of_other_processes(self, before: int) -> None:
        if before != self.accelerator.num_processes and self.accelerator.is_main_process:
            logger.warning(
                "resuming on %d processes what ran on %d: the data order is the same, "
                "rounding and dropout are not",
                self.accelerator.num_processes,
                before,
            )

    def _take_folder(self) -> None:
        self._lock.acquire()
        atexit.register(self._lock.release)
        if checkpoints(self.folder) != self._seen:
            self._lock.release()
            raise SmaltiError(f"another run wrote into {self.folder} meanwhile: start again")
        remove_leftovers(self.folder)

    def save(self, step: int) -> None:
        """Write a checkpoint after `step` optimizer steps; every process must call this.

        Raises:
            SmaltiError: a process has other weights than the first.
            OSError: it cannot be written; the one before is untouched.
            SystemExit: the main process cannot write it.
        """
        processes.refuse_divergence(self._tracked)
        states = collect(self._tracked, keep=self.accelerator.is_main_process)
        failure = None
        if self.accelerator.is_main_process:
            self.progress.begin()
            keep, replaces = self.config.checkpoints_total_limit, self._to_replace
            try:
                save_checkpoint(
                    self.folder, step, states, self._state(), keep=keep, replaces=replaces
                )
                self._to_replace = []
            except OSError as error:
                failure = error
        if self.any_process(failure is not None):
            raise failure or SystemExit(EXIT_FAILURE)

    def _state(self) -> dict[str, Any]:
        """What a checkpoint says of the run."""
        return {
            "kind": self.kind,
            "config": config_to_dict(self.config),
            "data_fingerprint": self._data_fingerprint,
            "precision": self.precision,
            "num_processes": self.accelerator.num_processes,
            "skipped": self.guard.state(),
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
        }

    # -- the clock ----------------------------------------------------------------------------

    def steps(self) -> Iterator[int]:
        """Yield the steps still to do; save when due, at the end, and when asked to stop.

        Every random number of a step derives from (seed, step, process): torch's global generators
        are seeded anew each time, so a resumed step draws what the uninterrupted one would have.

        Raises:
            SystemExit: with `EXIT_INTERRUPTED`, after a checkpoint, because of a signal or because
                the launcher is gone.
        """
        config = self.config
        bar = tqdm(
            total=config.max_train_steps,
            initial=self.start_step,
            desc=self.kind,
            disable=not self.accelerator.is_local_main_process,
        )
        guard = InterruptGuard()
        with guard, Watch(guard, self._lock.beat, launcher()), self._releasing(), bar:
            for step in range(self.start_step, config.max_train_steps):
                torch.manual_seed(derive_seed(config.seed, step, self.accelerator.process_index))
                with self.progress.timed():
                    yield step
                self.progress.after_step(
                    step=step + 1,
                    logged=self.due(step, config.logging_steps),
                    validated=self.due(step, config.validation_steps),
                )
                bar.update()
                stop = self.any_process(guard.requested)
                if stop or self.due(step, config.checkpointing_steps):
                    self.save(step + 1)
                if stop:
                    self.progress.write_page()
                    self._say_how_to_go_on(step + 1)
                    raise SystemExit(EXIT_INTERRUPTED)

    @contextlib.contextmanager
    def _releasing(self) -> Iterator[None]:
        """Give the folder back if the run fails or is stopped; else `export` does."""
        try:
            yield
        except BaseException:
            self._lock.release()
            raise

    def _say_how_to_go_on(self, step: int) -> None:
        flag = "--resume_from_checkpoint latest"
        how = "" if self.config.resume_from_checkpoint == "latest" else f" and {flag}"
        self.accelerator.print(
            f"\nstopped after step {step}; saved in {self.folder}. Go on with the same command{how}"
        )

    def due(self, step: int, every: int) -> bool:
        """True after every `every`-th step, and after the last."""
        return (step + 1) % every == 0 or step + 1 == self.config.max_train_steps

    def validates(self, step: int) -> bool:
        """True on the main process after a step with validation; every process must call this.

        Averages of sharded models are put together for it.
        """
        due = self.due(step, self.config.validation_steps)
        if due:
            self._gather()
        return due and self.accelerator.is_main_process

    def _gather(self) -> None:
        for part in self._tracked.values():
            if isinstance(part, Gathered):
                part.gather()

    # -- what it tells ------------------------------------------------------------------------

    @property
    def progress(self) -> Progress:
        """The logs of this run; known once it is known where the run begins."""
        if self._progress is None:
            self._progress = Progress(self.folder, self.config, self.accelerator, self.start_step)
        return self._progress

    def log(self, step: int, values: Mapping[str, float | Tensor]) -> None:
        """Average the values over all processes and write them; every process must call this."""
        names = sorted(values)
        stacked = torch.tensor([float(values[name]) for name in names], device=self.device)
        means = self.sum_over_processes(stacked) / self.accelerator.num_processes
        skipped = {"skipped_steps": float(self.guard.total)} if self.guard.total else {}
        self.log_alone(step, {**dict(zip(names, means.tolist(), strict=True)), **skipped})

    def log_alone(self, step: int, values: Mapping[str, float]) -> None:
        """Write values that the main process measured."""
        if self.accelerator.is_main_process:
            self.progress.write(step + 1, values)

    def show(self, step: int, name: str, picture: Image.Image) -> None:
        """Send a picture that the main process drew to the trackers."""
        self.progress.show(step + 1, name, picture)

    def export(self, save: Callable[[Path], Any]) -> Path:
        """Close the logs; the main process writes the finished model by `save(folder)`."""
        self.progress.finish()
        self._gather()
        if self.accelerator.is_main_process:
            export(self.folder, self.result, save)
            self._lock.release()
        self.accelerator.wait_for_everyone()
        return self.result


def _refuse_other_run(checkpoint: Checkpoint, kind: str, config: RunConfig) -> None:
    """Raise `SmaltiError` unless the run described by `kind` and `config` may go on from it."""
    if checkpoint.state["kind"] != kind:
        raise SmaltiError(f"{checkpoint.path} is of a {checkpoint.state['kind']} run")
    ours, theirs = config_to_dict(config), checkpoint.state["config"]
    refuse_other_settings(ours, theirs, checkpoint.path)
    for change in changes(ours, theirs):
        logger.info("%s", change)
    if checkpoint.step > config.max_train_steps:
        raise SmaltiError(
            f"{checkpoint.path} is beyond max_train_steps {config.max_train_steps}: "
            "give at least its step, or resume an earlier checkpoint by its path"
        )
    replaced = later_checkpoints(Path(config.output_dir), checkpoint.step)
    if replaced:
        logger.warning(
            "going back to step %d: the next checkpoint replaces %s",
            checkpoint.step,
            ", ".join(path.name for path in replaced),
        )


# -------------------------------------------------------------------------------------------------
# What models draw in training, as a function of a sample's place in the whole batch of a step.
#
# Numbers are drawn for the whole batch on every process, which takes its rows: so gradients are the
# same however the batch is shared among processes or cut into micro-batches.


class HasRandomInputs(Protocol):
    """A model that draws random numbers in training."""

    def sample_random_inputs(self, count: int, generator: torch.Generator) -> dict[str, Tensor]: ...


def random_inputs_for(run: Run, model: HasRandomInputs, step: int) -> list[dict[str, Tensor]]:
    """What a model draws for each micro-batch of this process."""
    config = run.config
    generator = torch.Generator(run.device).manual_seed(derive_seed(config.seed, step, 0))
    whole = model.sample_random_inputs(config.train_batch_size, generator)
    parts = {name: shares(run, values) for name, values in whole.items()}
    return [
        {name: part[index] for name, part in parts.items()}
        for index in range(config.gradient_accumulation_steps)
    ]


def shares(run: Run, whole: Tensor) -> list[Tensor]:
    """The rows of each micro-batch of this process, of rows for the whole batch."""
    mine = whole.chunk(run.accelerator.num_processes)[run.accelerator.process_index]
    return list(mine.to(run.device).chunk(run.config.gradient_accumulation_steps))
