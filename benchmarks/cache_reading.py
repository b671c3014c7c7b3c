"""Reading speed of a latent cache, compared with a numpy array of the same codes in memory.

    python benchmarks/cache_reading.py

All sides are timed in turns in one process, so that other load on the machine affects them equally.
Prints one line of JSON: samples per second of shuffled batches (medians over the rounds), and the
ratio.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from smalti.data.latent_cache.cache import CacheInfo, EncodedRange, LatentCache, write_cache
from smalti.data.latents import CodeSpec
from smalti.data.loader import stream_batches
from smalti.data.order import DataOrder
from smalti.data.transforms import VIEW_SETS

SIDE, BATCH = 16, 256  # 256 codes
PROMISED = 50_000  # samples per second


def make_cache(folder: Path, samples: int, shard_size: int) -> LatentCache:
    """A cache of random codes, two views per sample."""
    info = CacheInfo(
        spec=CodeSpec(1024, ((SIDE, SIDE),)),
        classes=("a", "b"),
        num_samples=samples,
        views=VIEW_SETS["flip"],
        tokenizer_fingerprint="none",
        dataset_fingerprint="none",
        shard_size=shard_size,
    )

    def encode(start: int, stop: int) -> EncodedRange:
        shape = (stop - start, len(info.views), SIDE * SIDE)
        return EncodedRange(torch.randint(1024, shape), torch.randint(2, (stop - start,)))

    write_cache(folder, info, encode)
    return LatentCache(folder)


def plain_batches(cache: LatentCache) -> Iterator[np.ndarray]:
    """Random rows and views of the same codes in memory, by one advanced index."""
    codes = cache.all_views(range(len(cache)))
    generator = np.random.default_rng(0)
    while True:
        rows = generator.integers(len(codes), size=BATCH)
        yield codes[rows, generator.integers(codes.shape[1], size=BATCH)]


def cache_batches(cache: LatentCache) -> Iterator[Any]:
    """Batches that the cache itself returns for the keys of each step."""
    order = DataOrder(len(cache), BATCH, seed=0)
    step = 0
    while True:
        yield cache.__getitems__(order.keys(step))
        step += 1


def rate(batches: Iterator[Any], repeat: int) -> float:
    """Samples per second of the next batches."""
    start = time.perf_counter()
    for _ in range(repeat):
        next(batches)
    return BATCH * repeat / (time.perf_counter() - start)


def main() -> None:
    """Print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=50_000, help="samples in the cache")
    parser.add_argument("--shard_size", type=int, default=8192, help="samples per file")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each side")
    parser.add_argument(
        "--batches", type=int, default=200, help="batches of 256 samples in each round"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cache = make_cache(Path(folder) / "cache", args.samples, args.shard_size)
        sides: dict[str, Iterator[Any]] = {
            "cache": cache_batches(cache),
            "loader": stream_batches(cache, DataOrder(len(cache), BATCH, seed=0)),
            "plain_numpy": plain_batches(cache),
        }
        rates: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(args.rounds + 1):  # the first round warms up
            for name, batches in sides.items():
                rates[name].append(rate(batches, args.batches))
    found = {name: round(statistics.median(values[1:])) for name, values in rates.items()}
    ratio = round(found["cache"] / found["plain_numpy"], 3)
    print(json.dumps({**found, "cache_to_plain": ratio, "promised": PROMISED}))


if __name__ == "__main__":
    main()
