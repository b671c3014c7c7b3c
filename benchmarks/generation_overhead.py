"""What generation spends outside the models: encoding, hashing and writing of pictures.

    python benchmarks/generation_overhead.py --num_images 64

The share of the processor's time, in one thread, of a job that is not inside `prior.sample` or
`tokenizer.decode`. Threads write pictures while the models run, so on a GPU it is hidden, too. The
models are presets with random weights: the time does not depend on them. Pictures of random weights
compress worse than real ones, so that a real job spends less.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from exact_generation import pipeline_of

from smalti.pipelines.generation import generate_folder
from smalti.pipelines.picture_files import FormatName, PictureFormat

PAIRS = (("vq-32-tiny", "gpt-nano"), ("var-32-tiny", "var-nano"), ("kl-32-tiny", "flow-nano"))
FORMATS: tuple[FormatName, ...] = ("png", "webp", "jpeg", "webdataset", "npz")


def timed(call: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    """A function that notes the processor's time of the calling thread."""

    @wraps(call)
    def noted(*arguments: Any, **options: Any) -> Any:
        start = time.thread_time()
        try:
            return call(*arguments, **options)
        finally:
            spent.append(time.thread_time() - start)

    return noted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num_images", type=int, default=64)
    parser.add_argument("--formats", nargs="+", default=FORMATS, choices=FORMATS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| tokenizer, prior | format | ms in the models, of a picture | share outside |")
    print("| --- | --- | --- | --- |")
    for names in PAIRS:
        pipe = pipeline_of(*names)
        spent: list[float] = []
        pipe.prior.sample = timed(pipe.prior.sample, spent)
        pipe.tokenizer.decode = timed(pipe.tokenizer.decode, spent)
        pipe([0], num_images_per_prompt=2)  # warm
        for name in args.formats:
            spent.clear()
            with tempfile.TemporaryDirectory() as folder:
                labels = [index % 10 for index in range(args.num_images)]
                start = time.process_time()
                generate_folder(
                    *(pipe, Path(folder) / "out", labels),
                    seed=0,
                    batch_size=64,
                    picture_format=PictureFormat(name),
                )
                total = time.process_time() - start
            each, share = 1e3 * sum(spent) / args.num_images, 1 - sum(spent) / total
            print(f"| `{names[0]}`, `{names[1]}` | {name} | {each:.1f} | {share:.1%} |", flush=True)


if __name__ == "__main__":
    main()
