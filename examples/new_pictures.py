"""New pictures of a pipeline that ships with smalti, in one grid with a row for each class.

    python examples/new_pictures.py --pipeline smalti/emoji-next-token --seed 7

`make try` runs it. Without a seed, each run makes other pictures.
"""

import argparse
import time
from pathlib import Path

import torch

from smalti import Pipeline
from smalti.pipelines.generation import sample_grid


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pipeline", default="smalti/emoji-next-token", help="or a folder")
    parser.add_argument("--output", type=Path, default=Path("runs/new_pictures.png"))
    parser.add_argument("--seed", type=int, help="of the pictures")
    parser.add_argument("--per_class", type=int, default=10, help="pictures of each class")
    options = parser.parse_args()
    seed = torch.seed() % 2**31 if options.seed is None else options.seed

    started = time.monotonic()
    pipeline = Pipeline.from_pretrained(options.pipeline)
    grid = sample_grid(pipeline, per_row=options.per_class, seed=seed)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    grid.save(options.output)
    seconds = time.monotonic() - started
    rows = f"{len(pipeline.classes)} classes x {options.per_class}"
    print(f"{rows} new pictures in {seconds:.1f} s, seed {seed}: {options.output}")


if __name__ == "__main__":
    main()
