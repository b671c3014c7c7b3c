"""Batches of any data set in the order of `DataOrder`, from any step on.

torch's DataLoader prepares them. Its worker processes are killed here, because DataLoader itself
can wait forever for a worker that was killed, stopped, or could not send its batch.
"""

import atexit
import dataclasses
import logging
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch
from torch._C import _remove_worker_pids
from torch.utils.data import DataLoader, Dataset, get_worker_info

from smalti.data.order import DataOrder, Key
from smalti.errors import ConfigurationError
from smalti.signals import TERMINATING

logger = logging.getLogger(__name__)

POLL = 5  # seconds between two checks of the workers while a batch is missing
STOPPED_AFTER = 60  # seconds after which a stopped worker ends the run
SLOW_AFTER = 60  # seconds without a batch between two warnings
LOST_AFTER = 1800  # seconds without a batch after which any run ends
MOST_WORKERS = 8  # that are chosen by default
PREFETCHED = 2  # batches that a worker prepares ahead
WORKER_BYTES = 300e6  # memory of a worker, without its batches
SHARED_MEMORY = Path("/dev/shm")  # where Linux keeps what workers send
KILL_TIMEOUT = 5.0  # seconds to wait for a killed process to end


class Keyed(Protocol):
    """A data set that returns the batch of a list of keys (epoch, index)."""

    def __getitems__(self, keys: Sequence[Key]) -> Any: ...


class _BatchKeys:
    """An endless sequence of lists of keys, one for each micro-batch from a step on."""

    def __init__(
        self, order: DataOrder, start_step: int, rank: int, world_size: int, micro_batches: int
    ) -> None:
        self.order, self.start_step = order, start_step
        self.rank, self.world_size, self.micro_batches = rank, world_size, micro_batches

    def __iter__(self) -> Iterator[list[Key]]:
        step = self.start_step
        while True:
            keys = self.order.shard(step, self.rank, self.world_size)
            size = len(keys) // self.micro_batches
            for start in range(0, len(keys), size):
                yield keys[start : start + size]
            step += 1


def stream_batches(
    dataset: Keyed,
    order: DataOrder,
    *,
    start_step: int = 0,
    rank: int = 0,
    world_size: int = 1,
    micro_batches: int = 1,
    num_workers: int | None = 0,
) -> Iterator[list[Any]]:
    """Yield, for each step from `start_step` on, a list of `micro_batches` batches of equal size.

    Worker processes prepare batches ahead; the batches do not depend on their number.

    Args:
        num_workers: number of worker processes; None is `default_workers`.

    Raises:
        ConfigurationError: the batch size is not divisible by processes x micro-batches.
        RuntimeError: while reading, a worker died, was stopped for `STOPPED_AFTER` seconds, or no
            batch came in `LOST_AFTER` seconds.
    """
    size = order.global_batch_size
    if size % (world_size * micro_batches):
        raise ConfigurationError(
            f"the batch size {size} cannot be divided into {micro_batches} micro-batches on each of"
            f" {world_size} processes: use a multiple of {world_size * micro_batches}"
        )
    if num_workers is None:
        num_workers = default_workers(dataset, size // (world_size * micro_batches))
    keys = _BatchKeys(order, start_step, rank, world_size, micro_batches)
    loader = DataLoader(
        _AsDataset(dataset),
        batch_sampler=keys,  # type: ignore[arg-type]
        collate_fn=_sendable,
        num_workers=num_workers,
        prefetch_factor=PREFETCHED if num_workers else None,
        timeout=POLL if num_workers else 0,
        worker_init_fn=_ignore_signals,
        generator=torch.Generator(),  # or DataLoader would advance the global one
        persistent_workers=num_workers > 0,
    )
    return _steps(loader, micro_batches)


class _AsDataset(Dataset):
    """Adapter: torch's loader calls `__getitems__` with the keys of one batch."""

    def __init__(self, dataset: Keyed) -> None:
        self.dataset = dataset

    def __getitem__(self, key: Key) -> Any:
        return self.dataset.__getitems__([key])

    def __getitems__(self, keys: list[Key]) -> Any:
        return self.dataset.__getitems__(keys)


def default_workers(dataset: Any, batch_size: int) -> int:
    """The number of worker processes for batches of a data set, on this process.

    A set that is kept in memory, or mapped, needs none. For pictures that are decoded for each
    batch there is one per core beside that of the training process, up to `MOST_WORKERS`, and as
    many as memory can hold.
    """
    batch_bytes = batch_size * getattr(dataset, "decoded_bytes", 0)
    if not batch_bytes:
        return 0
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    wanted = min(MOST_WORKERS, _cores() // processes - 1)
    half = psutil.virtual_memory().available / 2 / processes
    fitting = half / (WORKER_BYTES + PREFETCHED * batch_bytes)
    if SHARED_MEMORY.is_dir():
        writable = os.access(SHARED_MEMORY, os.W_OK)
        free = shutil.disk_usage(SHARED_MEMORY).free / 2 / processes if writable else 0
        fitting = min(fitting, free / (PREFETCHED * batch_bytes))
    chosen = max(0, min(wanted, int(fitting)))
    logger.info(
        "%d processes load data%s",
        chosen,
        f", because memory holds the batches of no more (cores: {wanted})"
        if chosen < wanted
        else "",
    )
    return chosen


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _sendable(batch: Any) -> Any:
    """A batch as it is; in a worker, with its tensors in shared memory.

    A worker would otherwise move them there while it sends the batch, in a thread whose errors are
    lost, and the run would wait forever if shared memory is full.
    """
    if get_worker_info() is None:
        return batch
    if dataclasses.is_dataclass(batch):
        parts = [getattr(batch, part.name) for part in dataclasses.fields(batch)]
    else:
        parts = list(batch) if isinstance(batch, list | tuple) else [batch]
    for part in parts:
        for value in part.values() if isinstance(part, dict) else [part]:
            if isinstance(value, torch.Tensor):
                value.share_memory_()
    return batch


def _ignore_signals(worker: int) -> None:
    """A signal to the whole process group must not end a worker before the run has saved."""
    for number in (signal.SIGINT, *TERMINATING):
        signal.signal(number, signal.SIG_IGN)


def _check_shared_memory() -> None:
    """Raise `RuntimeError` where no lock for workers can be made. DataLoader would raise, too, but
    leave a half-made iterator, which prints a traceback when it is removed."""
    try:
        multiprocessing.get_context().Lock()
    except OSError as error:
        raise RuntimeError(f"shared memory: {error.strerror}") from error


def _steps(loader: DataLoader, micro_batches: int) -> Iterator[list[Any]]:
    others = {process.pid for process in multiprocessing.active_children()}
    if loader.num_workers:
        _check_shared_memory()
    batches: Any = iter(loader)
    workers = [p for p in multiprocessing.active_children() if p.pid not in others]
    # DataLoader ends its workers by an event that they share. A killed worker may hold the lock
    # of the event, for which DataLoader would wait forever, so DataLoader gets a separate event.
    batches._workers_done_event = threading.Event()

    watch = _StoppedWorkers(workers)
    if workers:
        watch.start()

    def end() -> None:
        watch.over.set()
        if workers:
            _end_workers(batches, workers)

    # The workers end with the iterator or with the program, whichever ends first. Python's own exit
    # handler would send them SIGTERM, which they ignore, and then wait for them.
    atexit.register(end)
    try:
        while True:
            yield [_next(batches, workers) for _ in range(micro_batches)]
    except (OSError, EOFError, RuntimeError) as error:
        if watch.found is not None:
            raise RuntimeError(
                f"DataLoader worker (pid {watch.found}) was stopped for {STOPPED_AFTER} s"
            ) from error
        if isinstance(error, RuntimeError):
            raise
        # The memory of a batch is lost when its worker dies.
        gone = wait([p.sentinel for p in workers], KILL_TIMEOUT) if workers else []
        dead = [p.pid for p in workers if p.sentinel in gone]
        if not dead:
            raise
        raise RuntimeError(f"DataLoader worker (pid {dead[0]}) died") from error
    finally:
        atexit.unregister(end)
        end()


def _next(batches: Any, workers: Sequence[BaseProcess]) -> Any:
    """The next batch. Polls are counted instead of seconds, so time in which the run itself
    was suspended does not count."""
    for look in range(1, LOST_AFTER // POLL + 1):
        try:
            return next(batches)
        except RuntimeError as error:
            if not workers or "timed out" not in str(error):
                raise
        if look * POLL % SLOW_AFTER == 0:
            logger.warning("no batch for %d s: the data are read slowly", look * POLL)
    raise RuntimeError(f"DataLoader worker processes sent no batch for {LOST_AFTER} s")


class _StoppedWorkers(threading.Thread):
    """Kills a worker that was stopped for `STOPPED_AFTER` seconds: the main thread may be reading
    from its socket, and would wait forever."""

    def __init__(self, workers: Sequence[BaseProcess]) -> None:
        super().__init__(name="smalti-stopped-workers", daemon=True)
        self.workers = workers
        self.found: int | None = None
        self.over = threading.Event()

    def run(self) -> None:
        """Check the workers every `POLL` seconds, unless the run itself is suspended."""
        looks = dict.fromkeys((worker.pid for worker in self.workers), 0)
        while not self.over.wait(POLL):
            for worker in self.workers:
                looks[worker.pid] = looks[worker.pid] + 1 if _is_stopped(worker.pid) else 0
                if looks[worker.pid] * POLL >= STOPPED_AFTER:
                    self.found = worker.pid
                    worker.kill()
                    return


def _is_stopped(pid: int | None) -> bool:
    """Whether a process was stopped by a signal, SIGSTOP or Ctrl-Z."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    except psutil.Error:
        return False


def _end_workers(batches: Any, workers: Sequence[BaseProcess]) -> None:
    """Kill the workers, which ignore SIGTERM and have nothing to save."""
    batches._shutdown = True  # DataLoader need not shut them down again
    _remove_worker_pids(id(batches))  # and must not report their end as a failure
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join(KILL_TIMEOUT)
