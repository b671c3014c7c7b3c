"""Which bucket a picture goes to, and the order of buckets in training."""

from collections import Counter

import pytest
import torch

from smalti.data.buckets import Bucket, check_buckets, cropped_share, nearest_buckets
from smalti.data.latent_cache.buckets import BucketOrder, sum_of_floors
from smalti.data.order import DataOrder
from smalti.errors import SmaltiError

SIZES = (64, (48, 80), (80, 48))  # height x width


@pytest.mark.parametrize(
    ("height", "width", "bucket"),
    [
        (500, 500, 0),
        (100, 125, 0),  # 0.8: log distances 0.22 and 0.29
        (100, 150, 1),  # 0.67
        (30, 900, 1),
        (150, 100, 2),
        (900, 30, 2),
        (0, 0, 0),  # damaged
    ],
)
def test_a_picture_goes_to_the_nearest_aspect_ratio(height: int, width: int, bucket: int) -> None:
    sizes = torch.tensor([[height, width]])
    assert nearest_buckets(sizes, SIZES).tolist() == [bucket]
    kept = [Bucket(number, SIZES).keeps(sizes).item() for number in range(3)]
    assert kept == [number == bucket for number in range(3)]


def test_portrait_and_landscape_are_symmetric() -> None:
    sizes = torch.randint(1, 4000, (500, 2))
    turned = nearest_buckets(sizes.flip(1), ((64, 64), (80, 48), (48, 80)))
    assert torch.equal(nearest_buckets(sizes, SIZES), turned)
    between = torch.tensor([[60, 60]])  # equally near to both
    assert nearest_buckets(between, ((48, 80), (80, 48))).tolist() == [0]
    assert nearest_buckets(between, ((80, 48), (48, 80))).tolist() == [0]


def test_the_share_that_a_crop_leaves_out() -> None:
    sizes = torch.tensor([[100, 100], [100, 200], [200, 100], [0, 0]])
    assert cropped_share(sizes, 64) == pytest.approx(1 / 3)
    assert cropped_share(sizes[1:2], (32, 64)) == 0
    assert cropped_share(sizes[3:], 64) == 0


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((), "no bucket was given"),
        ((64,), "1 bucket was given, 64x64"),
        ((64, (48, 80), (24, 40)), "48x80 and 24x40 have the same aspect ratio"),
    ],
)
def test_sizes_that_cannot_be_buckets(sizes, message: str) -> None:
    with pytest.raises(SmaltiError, match=message):
        check_buckets(sizes)


def test_the_buckets_of_steps_are_in_proportion_to_their_sizes() -> None:
    sizes = (70, 25, 5)
    for seed in range(3):
        order = BucketOrder(sizes, 4, seed)
        taken = [order.bucket(step) for step in range(2000)]
        for steps in (20, 100, 500, 2000):
            counts = Counter(taken[:steps])
            for bucket, size in enumerate(sizes):
                assert abs(counts[bucket] - steps * size / 100) < 3
        for step in (0, 1, 7, 500, 1999):
            for bucket in range(3):
                earlier = taken[:step].count(bucket)
                assert order.earlier_steps(step, bucket) == earlier
    others = BucketOrder(sizes, 4, 9)
    assert taken != [others.bucket(step) for step in range(2000)]


def test_every_sample_of_a_bucket_is_seen_once_in_its_epochs() -> None:
    sizes, batch = (12, 7), 4
    order = BucketOrder(sizes, batch, seed=3)
    keys = [order.keys(step) for step in range(200)]
    seen: dict[int, list[tuple[int, int]]] = {0: [], 1: []}
    for step, own in enumerate(keys):
        buckets = {int(index >= 12) for _, index in own}
        assert buckets == {order.bucket(step)}
        seen[buckets.pop()] += own
    for bucket, (first, size) in enumerate(((0, 12), (12, 7))):
        for epoch in range(3):
            part = seen[bucket][epoch * size : (epoch + 1) * size]
            assert {e for e, _ in part} == {epoch}
            assert sorted(i for _, i in part) == list(range(first, first + size))


def test_the_order_is_the_same_on_any_number_of_processes_and_after_a_resume() -> None:
    order = BucketOrder((12, 7, 30), 8, seed=1)
    for step in (0, 5, 123, 10**9):
        for world in (2, 4):
            shards = [key for rank in range(world) for key in order.shard(step, rank, world)]
            assert shards == order.keys(step)
    later = BucketOrder((12, 7, 30), 8, seed=1)  # begins at a later step
    assert later.keys(123) == order.keys(123)
    assert isinstance(order, DataOrder)


def test_sums_of_floors() -> None:
    for count, divisor, slope, offset in ((0, 5, 3, 1), (9, 7, 5, -20), (50, 64, 37, 11)):
        expected = sum((slope * s + offset) // divisor for s in range(count))
        assert sum_of_floors(count, divisor, slope, offset) == expected
