"""The data order is a pure function of the step, however it is read."""

import multiprocessing
import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from jobs import forked

from smalti.data.loader import stream_batches
from smalti.data.order import DataOrder, even_subset
from smalti.errors import SmaltiError


@dataclass
class Numbers:
    """A data set whose batches are the keys themselves."""

    def __getitems__(self, keys):
        return torch.tensor(keys)


def take(steps: int, **options) -> list[list[list[int]]]:
    stream = stream_batches(Numbers(), DataOrder(10, 4, seed=1), **options)
    return [[batch.tolist() for batch in next(stream)] for _ in range(steps)]


def test_every_epoch_holds_each_sample_once() -> None:
    order = DataOrder(10, 4, seed=0)
    keys = [key for step in range(5) for key in order.keys(step)]  # 20 samples: 2 epochs
    assert Counter(epoch for epoch, _ in keys) == {0: 10, 1: 10}
    for epoch in (0, 1):
        assert sorted(i for e, i in keys if e == epoch) == list(range(10))


def test_epochs_and_seeds_shuffle_differently() -> None:
    order = DataOrder(50, 50, seed=0)
    first, second = ([i for _, i in order.keys(step)] for step in (0, 1))
    assert first != second
    assert first != [i for _, i in DataOrder(50, 50, seed=1).keys(0)]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_shards_are_the_global_batch_at_any_world_size(world_size: int) -> None:
    order = DataOrder(10, 8, seed=0)
    for step in range(4):
        parts = [order.shard(step, rank, world_size) for rank in range(world_size)]
        assert [key for part in parts for key in part] == order.keys(step)


# -- A part of the held-out set --


@pytest.mark.parametrize("count", [1, 7, 60, 128, 300])
def test_a_subset_of_a_sorted_set_is_even_over_its_classes(count: int) -> None:
    """60 classes of 10, sorted, of which the first 128 samples show 13."""
    labels = torch.arange(60).repeat_interleave(10)
    chosen = even_subset(labels, None, count, seed=3)
    assert len(set(chosen)) == count and chosen == sorted(chosen)
    counts = labels[chosen].bincount(minlength=60)
    assert counts.max() - counts.min() <= 1


def test_a_small_class_is_taken_whole_and_the_others_evenly() -> None:
    labels = torch.tensor([0] * 100 + [1] * 3 + [2] * 50)
    assert labels[even_subset(labels, None, 33, seed=0)].bincount().tolist() == [15, 3, 15]


def test_the_groups_of_a_class_take_turns() -> None:
    """91 copies of a picture, and 9 pictures."""
    groups = ["copy"] * 91 + [f"other {i}" for i in range(9)]
    for seed in range(5):
        chosen = even_subset(torch.zeros(100, dtype=torch.int64), groups, 10, seed)
        assert Counter(groups[i] for i in chosen) == Counter(set(groups))


def test_the_seed_chooses_among_equals_and_all_are_taken_in_order() -> None:
    labels = torch.arange(4).repeat(25)
    first, again, other = (even_subset(labels, None, 20, seed) for seed in (0, 0, 1))
    assert first == again != other
    for count in (100, 1000):
        assert even_subset(labels, None, count, seed=0) == list(range(100))


# -- The order of training samples --


def test_a_batch_larger_than_the_data_spans_epochs() -> None:
    keys = DataOrder(3, 8, seed=0).keys(0)
    assert [epoch for epoch, _ in keys] == [0, 0, 0, 1, 1, 1, 2, 2]


def test_resuming_at_a_step_yields_the_remaining_batches() -> None:
    assert take(5)[3:] == take(2, start_step=3)


def test_micro_batches_and_workers_do_not_change_the_samples() -> None:
    whole = take(4)
    split = take(4, micro_batches=2)
    assert [[*step[0], *step[1]] for step in split] == [step[0] for step in whole]
    assert all(len(step) == 2 for step in split)
    assert take(4, num_workers=2) == whole


def test_reading_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    take(3)
    take(3, num_workers=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_program_that_fails_does_not_wait_for_its_workers() -> None:
    """Although they ignore the signal with which Python would end them."""
    code = (
        "import sys, torch\n"
        "from smalti.data.loader import stream_batches\n"
        "from smalti.data.order import DataOrder\n"
        "class Numbers:\n"
        "    def __getitems__(self, keys): return torch.tensor(keys)\n"
        "stream = stream_batches(Numbers(), DataOrder(10, 4, 0), num_workers=1)\n"
        "sys.stream = stream  # what a traceback holds outlives the program's last line\n"
        "next(stream)\n"
        "raise RuntimeError('out of memory')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=300)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == b"RuntimeError: out of memory"


class Failing:
    """A data set that cannot be read."""

    def __getitems__(self, keys):
        raise SmaltiError("the disk is gone")


def test_workers_end_with_the_batches_even_after_an_error() -> None:
    others = set(multiprocessing.active_children())
    for dataset in (Numbers(), Failing()):
        stream = stream_batches(dataset, DataOrder(10, 4, 0), num_workers=2)
        try:
            next(stream)
            assert set(multiprocessing.active_children()) > others
            stream.close()
        except SmaltiError as error:
            assert "the disk is gone" in str(error)
        assert set(multiprocessing.active_children()) == others


class Fatal:
    """A data set that kills its worker at the second epoch, with the lock of DataLoader's event."""

    def __init__(self, tensors: bool) -> None:
        self.tensors = tensors

    def __getitems__(self, keys):
        if keys[0][0] == 1:
            frame = sys._getframe()
            while "done_event" not in frame.f_locals:
                frame = frame.f_back
            frame.f_locals["done_event"]._cond.acquire()
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.tensor(keys) if self.tensors else keys


@pytest.mark.parametrize("tensors", [True, False])  # of tensors, the worker holds the memory
def test_a_killed_worker_ends_the_batches_at_once(tensors: bool) -> None:
    """In a child, because a failure would hang forever."""

    def work() -> None:
        stream = stream_batches(Fatal(tensors), DataOrder(10, 5, 0), num_workers=2)
        try:
            for _ in stream:
                pass
        except RuntimeError as error:
            print(error)
        print(len(multiprocessing.active_children()))

    done = forked(work)
    first, last = done.stdout.splitlines()
    assert first.startswith("DataLoader worker (pid") and last == "0", done.stderr


def test_indivisible_batches_are_refused() -> None:
    with pytest.raises(SmaltiError, match="cannot be divided among 3"):
        DataOrder(10, 4, seed=0).shard(0, 0, 3)
    with pytest.raises(SmaltiError, match="multiple of 8"):
        stream_batches(Numbers(), DataOrder(10, 4, 0), world_size=2, micro_batches=4)
    with pytest.raises(SmaltiError, match="no samples"):
        DataOrder(0, 4, seed=0)
