"""Batches of any data set in the order of `DataOrder`, from any step on.

torch's DataLoader prepares them. Its worker processes are killed here, because DataLoader itself
can wait forever for a worker that was killed.
"""

import atexit
import multiprocessing
import signal
import threading
from collections.abc import Iterator, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

import torch
from torch._C import _remove_worker_pids
from torch.utils.data import DataLoader, Dataset

from smalti.data.order import DataOrder, Key
from smalti.errors import ConfigurationError

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
    num_workers: int = 0,
) -> Iterator[list[Any]]:
    """Yield, for each step from `start_step` on, a list of `micro_batches` batches of equal size.

    Worker processes prepare batches ahead; the batches do not depend on their number.

    Raises:
        ConfigurationError: the batch size is not divisible by processes x micro-batches.
    """
    size = order.global_batch_size
    if size % (world_size * micro_batches):
        raise ConfigurationError(
            f"the batch size {size} cannot be divided into {micro_batches} micro-batches on each of"
            f" {world_size} processes: use a multiple of {world_size * micro_batches}"
        )
    keys = _BatchKeys(order, start_step, rank, world_size, micro_batches)
    loader = DataLoader(
        _AsDataset(dataset),
        batch_sampler=keys,  # type: ignore[arg-type]
        collate_fn=_as_is,
        num_workers=num_workers,
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


def _as_is(batch: Any) -> Any:
    return batch


def _ignore_signals(worker: int) -> None:
    """A signal to the whole process group must not end a worker before the run has saved."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _steps(loader: DataLoader, micro_batches: int) -> Iterator[list[Any]]:
    others = {process.pid for process in multiprocessing.active_children()}
    batches: Any = iter(loader)
    workers = [p for p in multiprocessing.active_children() if p.pid not in others]
    # DataLoader ends its workers by an event that they share. A killed worker may hold the lock
    # of the event, for which DataLoader would wait forever, so DataLoader gets a separate event.
    batches._workers_done_event = threading.Event()

    def end() -> None:
        if workers:
            _end_workers(batches, workers)

    # The workers end with the iterator or with the program, whichever ends first. Python's own exit
    # handler would send them SIGTERM, which they ignore, and then wait for them.
    atexit.register(end)
    try:
        while True:
            yield [next(batches) for _ in range(micro_batches)]
    except (OSError, EOFError) as error:  # the memory of a batch is lost when its worker dies
        gone = wait([p.sentinel for p in workers], KILL_TIMEOUT) if workers else []
        dead = [p.pid for p in workers if p.sentinel in gone]
        if not dead:
            raise
        raise RuntimeError(f"DataLoader worker (pid {dead[0]}) died") from error
    finally:
        atexit.unregister(end)
        end()


def _end_workers(batches: Any, workers: Sequence[BaseProcess]) -> None:
    """Kill the workers, which ignore SIGTERM and have nothing to save."""
    batches._shutdown = True  # DataLoader need not shut them down again
    _remove_worker_pids(id(batches))  # and must not report their end as a failure
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join(KILL_TIMEOUT)
