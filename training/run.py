"""A training run: a folder, one or many processes, checkpoints from which it resumes bit-exactly.

The loop stays in the script, and every operation is a call in it:

    run = Run(config, kind="train-prior", result=config.output_dir / "pipeline")
    run.track(model=prior, ema=ema, optimizer=OptimizerState(optimizer))
    model = shard(run.accelerator, prior, optimizer)
    run.resume(data.fingerprint)
    with run.interruptible():
        for step in run.remaining_steps():
            seed_everything(config.seed, step, run.rank)
            with run.timed():
                for index, batch in enumerate(next(batches)):
                    with run.micro_batch(index, model):
                        loss = model(batch)
                        run.backward(loss)
                ...  # clip, optimizer step, EMA update
            if run.due(step, config.logging_steps):
                run.log(step, values)
            if run.due(step, config.validation_steps):
                run.measure(step, validate, len(heldout), samples=preview)
            run.checkpoint(step)
    ema.gather()
    run.export(ema.model.save_pretrained)

Steps are counted from 0 in the loop; files and messages count the steps that are done.
"""

import atexit
import logging
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn

from smalti.config import config_to_dict, saved_fields
from smalti.errors import EXIT_FAILURE, EXIT_INTERRUPTED, BusyError, CheckpointError
from smalti.folders import FolderLock, remove_leftovers, swappable
from smalti.randomness import derive_seed
from smalti.training import processes
from smalti.training.budget import Budget
from smalti.training.checkpoint import (
    Checkpoint,
    Stateful,
    checkpoints,
    collect,
    refuse_not_finite,
    save_checkpoint,
)
from smalti.training.config import STEP_SETTINGS, Precision, RunConfig
from smalti.training.folder import (
    changes,
    completed,
    export,
    find_checkpoint,
    later_checkpoints,
    refuse_other_settings,
    refuse_target,
)
from smalti.training.launch import LaunchSettings, obeying, precision_of
from smalti.training.logging import RunLog
from smalti.training.optim import StepGuard
from smalti.training.progress import progress_bar
from smalti.training.signals import (
    Abandoned,
    InterruptGuard,
    LauncherWatch,
    launcher,
)

logger = logging.getLogger(__name__)

Batches = TypeVar("Batches")


class Run:
    """One training run in `config.output_dir`, on one process or many.

    Args:
        kind: the command, so that no run continues from a checkpoint of another command.
        result: the folder that the finished model will be saved in; checked before any work.

    Raises:
        CheckpointError: a folder contains files that are not of this run, or there is no such run
            to resume.
        ConfigurationError: the job was launched in a way that runs do not support, or with settings
            that contradict the config.
    """

    _log: RunLog  # made by `resume`, which knows the first step

    def __init__(self, config: RunConfig, kind: str, result: Path) -> None:
        launch = LaunchSettings.current()
        config = obeying(config, launch)
        self.config, self.kind, self.result = config, kind, result
        self.folder = Path(config.output_dir)
        found = find_checkpoint(self.folder, config.resume_from_checkpoint, config)
        refuse_target(self.folder, result)
        self._seen = checkpoints(self.folder)
        self._to_replace: list[Path] = []
        requested: Precision = precision_of(config.mixed_precision, launch)
        if found is not None:
            _refuse_other_run(found, kind, config)
            self._to_replace = later_checkpoints(self.folder, found.step)
            if requested == "auto":  # another machine might choose otherwise
                requested = found.state["precision"]
        self.precision: Literal["no", "bf16"] = processes.agreed_precision(
            requested, config.process_timeout
        )
        self.accelerator = processes.start_accelerator(
            self.folder, self.precision, config.report_to
        )
        self.device = self.accelerator.device
        self.rank, self.world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.is_main = self.accelerator.is_main_process
        self.start_step = 0  # known after `resume`
        self.guard = StepGuard(
            config.max_skipped_steps,
            self.sum_over_processes,
            rounded=self.precision != "no",
            share=config.max_skipped_share,
        )
        self._checkpoint = found
        self._data_fingerprint = ""
        # What pictures are encoded to for each batch, for readers of the checkpoints of a prior.
        self.latents: Any = None
        self._tracked: dict[str, Stateful] = {}
        # Of the folder, and of the place of the result: no other process may write there.
        self._locks = [FolderLock(self.folder), FolderLock(swappable(result), beside=True)]
        self._interrupt = InterruptGuard()
        self._budget = Budget(config.validation_budget)
        self._unmeasured = False  # whether the last validation was abandoned
        self._pictures: dict[str, tuple[int, Image.Image]] = {}  # name -> step, the last one shown
        self._saved_at = time.monotonic()
        self._saved_steps = 0  # that the newest checkpoint contains
        self._step = 0  # the step in progress
        self.accelerator.wait_for_everyone()  # all have read the folder before it changes

    # -- before the loop ----------------------------------------------------------------------

    def track(self, **objects: Stateful) -> None:
        """Register the objects that a checkpoint stores, one file each; modules unwrapped."""
        self._tracked.update(objects)

    def resume(self, data_fingerprint: str) -> None:
        """Restore the tracked objects if there is a checkpoint; lock the folder for this run.

        Args:
            data_fingerprint: of the training data; a checkpoint of other data is refused.

        Raises:
            CheckpointError: the checkpoint does not fit.
            BusyError: another process is writing into the folder, or the result.
        """
        self._data_fingerprint = data_fingerprint
        if self._checkpoint is not None:
            self._restore(self._checkpoint)
        self._log = RunLog(self.folder, self.config, self.accelerator, self.start_step, self.kind)
        with processes.agreed_errors():
            if self.is_main:
                self._take_folder()

    def _restore(self, checkpoint: Checkpoint) -> None:
        if checkpoint.state["data_fingerprint"] != self._data_fingerprint:
            self._accept_new_data(checkpoint)
        checkpoint.restore(self._tracked)
        self.start_step = self._saved_steps = checkpoint.step
        self._unmeasured = checkpoint.state.get("unmeasured", False)
        theirs = checkpoint.state["config"]
        changed = any(theirs.get(name) != getattr(self.config, name) for name in STEP_SETTINGS)
        self.guard.restore(checkpoint.state.get("skipped", {}), new_row=changed)
        logger.info("resumed from %s", checkpoint.path)
        if self.precision != checkpoint.state["precision"]:
            before = checkpoint.state["precision"]
            logger.info("precision %s until now, from here %s", before, self.precision)
        before = checkpoint.state["num_processes"]
        if before != self.world_size and self.is_main:
            logger.warning(
                "resuming on %d processes a run that had %d: the data order is the same, "
                "rounding and dropout are not",
                self.world_size,
                before,
            )

    def _accept_new_data(self, checkpoint: Checkpoint) -> None:
        """Raise `CheckpointError` unless the run may continue on other data than its checkpoint."""
        if not self.config.accept_new_data:
            raise CheckpointError(
                f"{checkpoint.path} was trained on other data than these: to continue on these, "
                "add --accept_new_data; or restore the former data, or choose another --output_dir"
            )
        model, before = self._tracked.get("model"), checkpoint.state.get("model") or {}
        if completed(before, getattr(model, "config", None)) != self._model_settings():
            raise CheckpointError(
                f"{checkpoint.path} has a model for other classes, captions or latents than those "
                "of these data: start a new run in another --output_dir (smalti train-prior "
                f"--initial {checkpoint.path} starts it from these weights)"
            )
        logger.warning(
            "the run continues on other training data: from step %d on, the order of the samples "
            "is that of the new data",
            checkpoint.step,
        )

    def _model_settings(self) -> Any:
        """The settings of the model, as a checkpoint stores them."""
        return config_to_dict(getattr(self._tracked.get("model"), "config", None))

    def _take_folder(self) -> None:
        try:
            for lock in self._locks:
                lock.acquire()
                atexit.register(lock.release)  # not `_unlock`, which would keep the models alive
        except BusyError:
            self._unlock()
            raise
        if checkpoints(self.folder) != self._seen:
            self._unlock()
            raise CheckpointError(
                f"another run wrote a checkpoint into {self.folder} while this one was starting:"
                " start it again"
            )
        remove_leftovers(self.folder)

    def _unlock(self) -> None:
        for lock in self._locks:
            lock.release()

    def share_of_data(self) -> dict[str, Any]:
        """Which batches this process needs, as keyword arguments of `stream_batches`."""
        return {
            "start_step": self.start_step,
            "rank": self.rank,
            "world_size": self.world_size,
            "micro_batches": self.config.gradient_accumulation_steps,
            "num_workers": self.config.dataloader_num_workers,
        }

    # -- the loop -----------------------------------------------------------------------------

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Around the loop: signals and the end of the launcher make `should_stop` true.

        If the loop raises, the folder is unlocked; else `export` unlocks it.
        """
        try:
            with self._interrupt, LauncherWatch(self._interrupt, launcher()):
                try:
                    yield
                except Abandoned:  # while it waited for the batch of a step
                    if self._step > self._saved_steps:
                        self.save(self._step - 1)
                    self.stop(self._step - 1)
        except BaseException:
            self._unlock()
            raise

    def remaining_steps(self) -> Iterable[int]:
        """The steps that are not done, with a progress bar."""
        for step in self._log.progress.steps():
            self._step = step
            yield step

    def reading(self, batches: Iterator[Batches]) -> Iterator[Batches]:
        """The batches of each step. If this process is alone, a request to stop ends the wait for
        them; otherwise the step must be finished together with the other processes."""
        while True:
            with self._interrupt.abandonable() if self.world_size == 1 else nullcontext():
                batch = next(batches)
            yield batch

    def bar(self, title: str, total: int, unit: str) -> AbstractContextManager[Any]:
        """Context of work between two steps: a bar; its `update` takes the number of items done."""
        return progress_bar(total, title, unit=unit, shown=self.is_main, part=True)

    def due(self, step: int, every: int) -> bool:
        """True at every `every`-th step, and at the last."""
        return (step + 1) % every == 0 or step + 1 == self.config.max_train_steps

    def timed(self) -> AbstractContextManager[None]:
        """Around the computation of a step: measure seconds and operations, for timing.jsonl."""
        return self._log.throughput.step()

    def micro_batch(self, index: int, model: nn.Module) -> AbstractContextManager[Any]:
        """Around a backward pass: gradients accumulate on each process until the last micro-batch
        of a step, whose backward pass averages them over the processes."""
        last = index == self.config.gradient_accumulation_steps - 1
        return nullcontext() if last else self.accelerator.no_sync(model)

    def backward(self, loss: Tensor) -> None:
        """Back-propagate the mean loss of a micro-batch, divided by the number of micro-batches."""
        self.accelerator.backward(loss / self.config.gradient_accumulation_steps)

    def sum_over_processes(self, values: Tensor) -> Tensor:
        """Sum of a tensor over all processes; every process must call this."""
        return processes.sum_over_processes(self.accelerator, values)

    def should_stop(self) -> bool:
        """Whether any process was asked to stop; every process must call this."""
        (stop,) = processes.any_process(self.accelerator, self._interrupt.requested)
        return stop

    def checkpoint(self, step: int) -> None:
        """Save if a checkpoint is due after this step, by steps or by minutes, or if any process
        was asked to stop; then also end the program. Every process must call this.

        Raises:
            CheckpointError, OSError: see `save`.
            SystemExit: the run was asked to stop, and is saved.
        """
        minutes = self.config.checkpointing_minutes
        late = bool(minutes) and time.monotonic() - self._saved_at >= 60 * minutes
        stop, late = processes.any_process(
            self.accelerator, self._interrupt.requested, late and self.is_main
        )
        if stop or late or self.due(step, self.config.checkpointing_steps):
            self.save(step)
        if stop:
            self.stop(step)

    def measure(
        self,
        step: int,
        values: Callable[[Callable[[int], object]], Mapping[str, float]],
        count: int = 1,
        **pictures: Callable[[], Image.Image],
    ) -> None:
        """Log held-out values and show pictures after a step, on the main process.

        A request to stop abandons them; the resumed run repeats them, see `catch_up`. They
        are skipped if they would take more than their share of time, except after the last step.

        Args:
            values: returns what to log; it is given a function to call with the number of samples
                that were measured since the last call.
            count: number of samples, for the bar.
            pictures: each by the name of its folder.
        """
        self._unmeasured = False
        if not self.is_main:
            return
        if step + 1 < self.config.max_train_steps and not self._budget.allows():
            logger.info(
                "step %d: validation and preview are skipped: they have taken %.0f s beside %.0f s "
                "of training, and validation_budget is %g; a larger --validation_steps makes fewer",
                step + 1,
                self._budget.spent,
                self._budget.training,
                self._budget.share,
            )
            return
        images: dict[str, Image.Image] = {}
        try:
            with self._interrupt.abandonable(), self._budget.spending():
                with self.bar("validation", count, "sample") as bar:
                    found = values(bar.update)
                with self.bar("preview", len(pictures), "grid") as bar:
                    for name, make in pictures.items():
                        images[name] = make()
                        bar.update()
        except Abandoned:
            self._unmeasured = True
            return
        self.log_on_main(step, found)
        for name, image in images.items():
            self._pictures[name] = (step, image)
            self.show(step, name, image)

    def catch_up(self, measure: Callable[[int], None]) -> None:
        """Before the first step: `measure(step)` the last one, if that was abandoned when the run
        was stopped; every process must call this."""
        if self._unmeasured:
            measure(self.start_step - 1)
            if self.should_stop():
                self.stop(self.start_step - 1)

    def final_picture(self, name: str) -> Image.Image | None:
        """The picture that `measure` showed after the last step; None if this process did not."""
        step, image = self._pictures.get(name, (-1, None))
        return image if step + 1 == self.config.max_train_steps else None

    def save(self, step: int) -> None:
        """Write a checkpoint of the state after a step; every process must call this.

        Raises:
            CheckpointError: a process has other weights than process 0, or weights are not finite;
                earlier checkpoints are untouched.
            OSError: it cannot be written; earlier checkpoints are untouched.
            SystemExit: the main process cannot write it.
        """
        processes.refuse_divergence(self._tracked)
        states = collect(self._tracked, keep=self.is_main)
        failure: OSError | CheckpointError | None = None
        if self.is_main:
            self._log.begin()
            try:
                refuse_not_finite(states, step + 1)
                save_checkpoint(
                    self.folder,
                    step + 1,
                    states,
                    self._state(),
                    keep=self.config.checkpoints_total_limit,
                    replaces=self._to_replace,
                )
                self._to_replace = []
            except (OSError, CheckpointError) as error:
                failure = error
        self._saved_at, self._saved_steps = time.monotonic(), step + 1
        if processes.any_process(self.accelerator, failure is not None) == [True]:
            raise failure or SystemExit(EXIT_FAILURE)

    def _state(self) -> dict[str, Any]:
        """The entries of a checkpoint's state.json."""
        return {
            "kind": self.kind,
            "config": config_to_dict(self.config),
            # What the weights need to be a model again, without the data of the run.
            "model": self._model_settings(),
            "data_fingerprint": self._data_fingerprint,
            **({} if self.latents is None else {"latents": saved_fields(self.latents)}),
            "precision": self.precision,
            "num_processes": self.world_size,
            "skipped": self.guard.state(),
            "unmeasured": self._unmeasured,
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
        }

    def stop(self, step: int) -> NoReturn:
        """End the program after a step that was saved, with the exit status `EXIT_INTERRUPTED`."""
        if step < self.start_step:  # then "latest" need not be the checkpoint of this run's start
            self.accelerator.print("\nstopped before a step was done. Repeat the same command")
            raise SystemExit(EXIT_INTERRUPTED)
        self._log.write_report()
        flag = "--resume_from_checkpoint latest"
        how = "" if self.config.resume_from_checkpoint == "latest" else f" and {flag}"
        self.accelerator.print(
            f"\nstopped after step {step + 1}; saved in {self.folder}. Continue with the same "
            f"command{how}"
        )
        raise SystemExit(EXIT_INTERRUPTED)

    # -- logs and the result ------------------------------------------------------------------

    def log(self, step: int, values: Mapping[str, float | Tensor]) -> None:
        """Log the mean of each value over all processes, and times; every process must call it."""
        names = sorted(values)
        stacked = torch.tensor([float(values[name]) for name in names], device=self.device)
        means = self.sum_over_processes(stacked) / self.world_size
        skipped = {"skipped_steps": float(self.guard.total)} if self.guard.total else {}
        self._log.write(step + 1, {**dict(zip(names, means.tolist(), strict=True)), **skipped})

    def log_on_main(self, step: int, values: Mapping[str, float]) -> None:
        """Write values that the main process measured on held-out data."""
        self._log.write_validation(step + 1, values)

    def show(self, step: int, name: str, image: Image.Image) -> None:
        """Save an image that the main process made, as `name/step_000100.png`, send it to the
        trackers, and update report.html."""
        self._log.show(step + 1, name, image)

    def export(self, save: Callable[[Path], Any]) -> Path:
        """Close the logs; the main process writes the finished model by `save(folder)`."""
        self._log.finish()
        if self.is_main:
            try:
                export(self.folder, self.result, save)
            finally:
                self._unlock()
        self.accelerator.wait_for_everyone()
        return self.result


def _refuse_other_run(checkpoint: Checkpoint, kind: str, config: RunConfig) -> None:
    """Raise `CheckpointError` unless the run of `kind` and `config` may continue from it."""
    if checkpoint.state["kind"] != kind:
        raise CheckpointError(
            f"{checkpoint.path} is of a {checkpoint.state['kind']} run, this is a {kind} run: "
            "choose another --output_dir"
        )
    ours, theirs = config_to_dict(config), completed(checkpoint.state["config"], config)
    refuse_other_settings(ours, theirs, checkpoint.path)
    for change in changes(ours, theirs):
        logger.info("%s", change)
    if checkpoint.step > config.max_train_steps:
        raise CheckpointError(
            f"{checkpoint.path} is beyond max_train_steps {config.max_train_steps}: "
            f"set it to {checkpoint.step} or more, or resume an earlier checkpoint by its path"
        )
    replaced = later_checkpoints(Path(config.output_dir), checkpoint.step)
    if replaced:
        logger.warning(
            "going back to step %d: the next checkpoint replaces %s",
            checkpoint.step,
            ", ".join(path.name for path in replaced),
        )


# -------------------------------------------------------------------------------------------------
# Random numbers of a step, as functions of (seed, step) and of a sample's place in the whole batch.
#
# Every process generates them for the whole batch and takes its own rows. So the gradients do not
# depend on how the batch is divided among processes and micro-batches, and a resumed step repeats
# the random numbers of the uninterrupted run.


def seed_everything(seed: int, step: int, rank: int) -> None:
    """Seed torch's global generators for one step of one process: for dropout and other sampling
    within the forward pass of a model."""
    torch.manual_seed(derive_seed(seed, step, rank))


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on the device; a GPU copies it from pinned memory, while the host goes on."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def local_micro_batches(run: Run, rows: Tensor) -> list[Tensor]:
    """Rows (B, ...) for the whole batch -> those of each micro-batch of this process."""
    own = rows.chunk(run.world_size)[run.rank]
    return list(own.to(run.device).chunk(run.config.gradient_accumulation_steps))


def random_inputs_of_step(
    run: Run,
    model: Any,
    step: int,
    generator: torch.Generator | None = None,
    **options: Any,
) -> list[dict[str, Tensor]]:
    """The random inputs of a model for each micro-batch of this process, by name.

    Args:
        model: with `sample_random_inputs(count, generator)`, which returns one row per sample.
        generator: equal on all processes; None is one on the run's device, seeded by
            (config.seed, step, 0).
        options: further arguments of `sample_random_inputs`, for the samples of this step.
    """
    config = run.config
    if generator is None:
        seed = derive_seed(config.seed, step, 0)
        generator = torch.Generator(run.device).manual_seed(seed)
    inputs = model.sample_random_inputs(config.train_batch_size, generator, **options)
    parts = {name: local_micro_batches(run, rows) for name, rows in inputs.items()}
    return [
        {name: part[index] for name, part in parts.items()}
        for index in range(config.gradient_accumulation_steps)
    ]
