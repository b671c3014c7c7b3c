"""Worker processes: how many by default, what they need, and how their failures are noticed."""

import errno
import multiprocessing
import multiprocessing.context
import os
import resource
import signal
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from smalti.data import loader
from smalti.data.dataset import DataOptions
from smalti.data.latent_cache import cache
from smalti.data.latent_cache.cache import CacheInfo, EncodedRange, LatentCache, write_cache
from smalti.data.latents import CodeSpec
from smalti.data.loader import default_workers, stream_batches
from smalti.data.order import DataOrder
from smalti.data.transforms import RandomCrop
from smalti.machine import failure_of

GB = 10**9
Memory = namedtuple("Memory", "available")
Disk = namedtuple("Disk", "free")


class Decoded:
    """A data set whose batches are its keys, as if it had to decode pictures."""

    decoded_bytes = 3 * 256 * 256 * 4

    def __getitems__(self, keys):
        return torch.tensor(keys)


def machine(patch, *, cores: int, memory=64 * GB, shared=32 * GB, processes=1) -> None:
    patch.setattr(loader, "_cores", lambda: cores)
    patch.setattr(loader.psutil, "virtual_memory", lambda: Memory(memory))
    patch.setattr(loader.shutil, "disk_usage", lambda path: Disk(shared))
    patch.setenv("LOCAL_WORLD_SIZE", str(processes))


@pytest.mark.parametrize(
    ("about", "expected"),
    [
        ({"cores": 1}, 0),
        ({"cores": 2}, 1),  # as in CI
        ({"cores": 16}, 8),
        ({"cores": 16, "processes": 4}, 3),
        ({"cores": 16, "memory": 4 * GB}, 4),
        ({"cores": 16, "shared": 64 * 10**6}, 0),  # a container's default
    ],
)
def test_workers_are_chosen_by_cores_and_memory(monkeypatch, about, expected: int) -> None:
    machine(monkeypatch, **about)
    assert default_workers(Decoded(), batch_size=64) == expected


def test_sets_that_are_not_decoded_for_each_batch_need_no_workers(
    pictures: Path, monkeypatch
) -> None:
    machine(monkeypatch, cores=16)
    options = DataOptions(data=str(pictures))
    assert default_workers(options.dataset("train", 16), 8) == 0  # kept in memory
    assert default_workers(options.dataset("train", 16, crop=RandomCrop()), 8) == 8
    assert default_workers(object(), 8) == 0  # latents, mapped


def test_the_default_does_not_change_the_batches(pictures: Path, monkeypatch) -> None:
    options = DataOptions(data=str(pictures))

    def batches() -> list:
        images = options.dataset("train", 16, crop=RandomCrop(), flip=True)
        stream = stream_batches(images, DataOrder(len(images), 4, seed=1), num_workers=None)
        first = [next(stream)[0] for _ in range(3)]
        stream.close()
        return first

    machine(monkeypatch, cores=1)
    alone = batches()
    assert multiprocessing.active_children() == []
    machine(monkeypatch, cores=3)
    together = batches()
    for one, two in zip(alone, together, strict=True):
        assert torch.equal(one.images, two.images) and torch.equal(one.indices, two.indices)


def test_shared_memory_is_not_needed_without_workers(pictures: Path, monkeypatch) -> None:
    def refuse(self, *args, **options):
        raise RuntimeError("unable to open shared memory object </torch_1>: Read-only file system")

    for name in ("_share_filename_cpu_", "_share_fd_cpu_"):
        monkeypatch.setattr(torch.UntypedStorage, name, refuse)
    images = DataOptions(data=str(pictures)).dataset("train", 16)
    stream = stream_batches(images, DataOrder(len(images), 4, seed=1))
    assert next(stream)[0].images.shape == (4, 3, 16, 16)
    child = os.fork()  # what a worker finds to be damaged is known here
    if child == 0:
        images._bad[3] = True
        os._exit(0)
    os.waitpid(child, 0)
    assert images.num_replaced == 1


def test_full_shared_memory_is_an_error_not_an_endless_wait(monkeypatch) -> None:
    def full(self, *args, **options):
        raise RuntimeError("unable to write to file </torch_1>: No space left on device (28)")

    for name in ("_share_filename_cpu_", "_share_fd_cpu_"):
        monkeypatch.setattr(torch.UntypedStorage, name, full)
    stream = stream_batches(Decoded(), DataOrder(8, 2, seed=0), num_workers=1)
    with pytest.raises(RuntimeError, match="No space left on device"):
        next(stream)


def test_a_stopped_worker_is_noticed(monkeypatch) -> None:
    monkeypatch.setattr(loader, "POLL", 1)
    monkeypatch.setattr(loader, "STOPPED_AFTER", 2)
    stream = stream_batches(Decoded(), DataOrder(8, 2, seed=0), num_workers=1)
    next(stream)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGSTOP)
    with pytest.raises(RuntimeError, match=rf"pid {worker.pid}\) was stopped for 2 s"):
        for _ in range(10):
            next(stream)


class Slow(Decoded):
    def __getitems__(self, keys):
        time.sleep(3)
        return torch.tensor(keys)


def test_a_slow_worker_is_waited_for(monkeypatch, caplog) -> None:
    monkeypatch.setattr(loader, "POLL", 1)
    monkeypatch.setattr(loader, "SLOW_AFTER", 1)
    stream = stream_batches(Slow(), DataOrder(8, 2, seed=0), num_workers=1)
    assert next(stream)[0].shape == (2, 2)
    stream.close()
    assert "the data are read slowly" in caplog.text


@pytest.mark.skipif(sys.platform != "linux", reason="counts open files as Linux does")
def test_a_cache_of_many_shards_keeps_few_files_open(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(cache, "most_mapped", lambda: 16)
    info = CacheInfo(
        spec=CodeSpec(16, ((2, 2),)),
        classes=("a", "b"),
        num_samples=120,
        views=("identity",),
        tokenizer_fingerprint="t",
        dataset_fingerprint="d",
        shard_size=2,
    )
    codes = torch.arange(120 * 4).view(120, 1, 4) % 16

    def encoded(start: int, stop: int) -> EncodedRange:
        return EncodedRange(codes[start:stop], torch.arange(start, stop) % 2)

    write_cache(tmp_path / "cache", info, encoded)
    before = number_of_open_files()
    latents = LatentCache(tmp_path / "cache")
    for _ in range(2):
        for start in range(0, 120, 4):
            batch = latents.first_view(range(start, start + 4))
            assert torch.equal(batch.stored, codes[start : start + 4, 0])
    assert number_of_open_files() <= before + 16
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = number_of_open_files() + 24
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    try:  # a batch of samples of 60 shards
        assert torch.equal(latents.first_view(range(120)).stored, codes[:, 0])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def number_of_open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_shared_memory_that_cannot_be_written_is_named(monkeypatch) -> None:
    def no_lock(self) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(multiprocessing.context.BaseContext, "Lock", no_lock)
    order = DataOrder(16, 8, 0)
    with pytest.raises(RuntimeError, match="shared memory: Read-only") as error:
        next(stream_batches(Decoded(), order, num_workers=1))
    assert "--dataloader_num_workers 0" in str(failure_of(error.value))
