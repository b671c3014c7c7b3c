"""Speed of reading data, compared with the speed at which the demo's prior is trained on it.

    python benchmarks/data_loading.py

All sides are timed in turns in one process, so that other load on the machine affects them equally.
Prints one line of JSON: samples per second of each side, and their ratio.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from smalti.data.dataset import ImageDataset
from smalti.data.latent_cache.cache import CacheInfo, EncodedRange, LatentCache, write_cache
from smalti.data.latents import CodeSpec
from smalti.data.loader import stream_batches
from smalti.data.order import DataOrder
from smalti.data.sources.base import open_source
from smalti.data.transforms import VIEW_SETS, RandomCrop
from smalti.prior.base import Prior
from smalti.scripts.demo import SCALES
from smalti.training.processes import resolve_precision

NUM_SAMPLES = 20_000
NUM_CLASSES = 9
PROMISED_RATIO = 10  # speed of the loader over that of the demo's prior


@dataclass(frozen=True)
class Result:
    """Samples per second, medians over the rounds."""

    demo_codes_per_image: int
    demo_cache: float  # codes of an image through the loader, shuffled, as training reads them
    demo_prior: float  # codes of an image, in training the prior
    cache_256_codes: float  # as demo_cache, with 256 codes per image
    images_in_memory: float  # images of the demo's size through the loader
    images_cropped_at_random: float  # the same, decoded and cropped each time

    @property
    def ratio(self) -> float:
        """Speed of the loader over that of the prior."""
        return self.demo_cache / self.demo_prior


def make_cache(folder: Path, codes: int) -> LatentCache:
    """A cache of random codes, two views per sample."""
    side = round(codes**0.5)
    info = CacheInfo(
        spec=CodeSpec(1024, ((side, side),)),
        classes=tuple(map(str, range(NUM_CLASSES))),
        num_samples=NUM_SAMPLES,
        views=VIEW_SETS["flip"],
        tokenizer_fingerprint="none",
        dataset_fingerprint="none",
        shard_size=8192,
    )

    def encode(start: int, stop: int) -> EncodedRange:
        stored = torch.randint(1024, (stop - start, 2, codes))
        return EncodedRange(stored, torch.randint(NUM_CLASSES, (stop - start,)))

    write_cache(folder, info, encode)
    return LatentCache(folder)


def stream(dataset: Any, batch_size: int) -> Iterator[list[Any]]:
    """Batches as training reads them, in this process."""
    return stream_batches(dataset, DataOrder(len(dataset), batch_size, seed=0))


def prior_step(cache: LatentCache, batch_size: int) -> Callable[[], None]:
    """One optimizer step of the demo's prior, on a batch that is in memory."""
    size = SCALES["cpu"].prior.prior
    config = size.fitted(cache.spec, cache.num_classes, cache.info.tokenizer_fingerprint)
    prior = Prior.registry.build(config).train()
    optimizer = torch.optim.AdamW(prior.parameters(), lr=1e-4)
    (batch,) = next(stream(cache, batch_size))
    bf16 = resolve_precision("auto", torch.device("cpu")) == "bf16"

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = prior(batch.stored, batch.labels).total
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def rate(work: Callable[[], Any], samples: int, repeat: int) -> float:
    """Samples per second of `repeat` calls, each of which processes `samples`."""
    start = time.perf_counter()
    for _ in range(repeat):
        work()
    return samples * repeat / (time.perf_counter() - start)


def measure(folder: Path, rounds: int, steps: int) -> Result:
    """Time all sides in turns."""
    batch_size, codes = SCALES["cpu"].prior.train_batch_size, 64
    small, large = (make_cache(folder / str(count), count) for count in (codes, 256))
    source = open_source("emoji")
    side = SCALES["cpu"].tokenizer.tokenizer.image_size
    read = [
        stream(small, batch_size),
        stream(large, 256),
        stream(ImageDataset(source, side, flip=True), batch_size),
        stream(ImageDataset(source, side, flip=True, crop=RandomCrop()), batch_size),
    ]
    train = prior_step(small, batch_size)
    timed: list[list[float]] = [[] for _ in range(5)]
    for _ in range(rounds + 1):  # the first round warms up
        timed[0].append(rate(lambda: next(read[0]), batch_size, 20 * steps))
        timed[1].append(rate(train, batch_size, steps))
        timed[2].append(rate(lambda: next(read[1]), 256, 20 * steps))
        timed[3].append(rate(lambda: next(read[2]), batch_size, 5 * steps))
        timed[4].append(rate(lambda: next(read[3]), batch_size, steps))
    return Result(codes, *(round(statistics.median(values[1:])) for values in timed))


def main() -> None:
    """Print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each side")
    parser.add_argument(
        "--steps", type=int, default=4, help="training steps of the prior in each round"
    )
    args = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), args.rounds, args.steps)
    print(
        json.dumps(
            {
                **asdict(result),
                "loader_to_prior": round(result.ratio, 1),
                "promised": PROMISED_RATIO,
                "threads": torch.get_num_threads(),
            }
        )
    )


if __name__ == "__main__":
    main()
