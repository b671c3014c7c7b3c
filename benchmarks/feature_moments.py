"""Accumulation of features of which a Frechet distance is computed, per second of CPU time.

    python benchmarks/feature_moments.py --features 8192 --dim 2048

Prints a Markdown table: features per second of CPU time of one thread, for several sizes of a part,
of `Moments` and of torchmetrics' sums of products, which lose digits where means are large.
"""

import argparse
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from smalti.evaluation.moments import Moments

PARTS = (32, 128, 1024)  # features that arrive at once


def rate(add: Callable[[Tensor], object], features: Tensor, part: int) -> float:
    """Features per second of CPU time."""
    add(features[:part])  # memory is touched for the first time
    start = time.process_time()
    for rows in features.split(part):
        add(rows)
    return len(features) / (time.process_time() - start)


def plain_sums(dim: int) -> Callable[[Tensor], object]:
    """What torchmetrics adds up."""
    total, products = torch.zeros(dim).double(), torch.zeros(dim, dim).double()

    def add(rows: Tensor) -> None:
        rows = rows.double()
        total.add_(rows.sum(0))
        products.add_(rows.T.mm(rows))

    return add


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--features", type=int, default=8192)
    parser.add_argument("--dim", type=int, default=2048)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(args.features, args.dim, generator=generator)
    print("| features at once | Moments, per CPU second | sums of products, per CPU second |")
    print("| --- | --- | --- |")
    for part in PARTS:
        ours = rate(Moments(args.dim).add, features, part)
        plain = rate(plain_sums(args.dim), features, part)
        print(f"| {part} | {ours:,.0f} | {plain:,.0f} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
