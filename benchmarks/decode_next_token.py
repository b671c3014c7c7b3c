"""Decoding speed of a next-token prior with its key-value cache, relative to memory bandwidth.

    python benchmarks/decode_next_token.py --preset gpt-b --rows 1 --dtype float32

A decoding step multiplies a few rows by every weight matrix once, so it takes at least the time of
reading the matrices. That limit is measured: a matrix-vector product whose matrix is far larger
than any cache, in the same process, between the decoding steps. The result is a ratio, which other
load on the machine affects little as long as every thread has a core (set OMP_NUM_THREADS): 1 is
the speed of memory, and the goal for one row is 1.5.
"""

import argparse
import json
import statistics
from dataclasses import dataclass, replace

import torch
from clock import now
from torch import Tensor

from smalti.data.latents import CodeSpec
from smalti.prior.next_token.model import PRESETS, NextTokenPrior

PROBE_BYTES = 512 * 2**20  # of the probe's matrix: ten times a large last-level cache
WARM_UP = 3  # first steps, not counted


@dataclass(frozen=True)
class Result:
    """Medians over the steps of one sampling call after the warm-up."""

    step_seconds: float  # one code for every sample
    probe_seconds: float  # one product with the probe's matrix
    weight_bytes: int  # of the matrices that a step multiplies with
    cache_bytes: int  # keys and values that the middle step reads
    probe_bytes: int

    @property
    def weights_ratio(self) -> float:
        """Step time over the time to read the weights once."""
        return self.step_seconds / self._read_seconds(self.weight_bytes)

    @property
    def traffic_ratio(self) -> float:
        """Step time over the time to read the weights and the cache once."""
        return self.step_seconds / self._read_seconds(self.weight_bytes + self.cache_bytes)

    def _read_seconds(self, size: int) -> float:
        return self.probe_seconds * size / self.probe_bytes


def matrix_bytes(prior: NextTokenPrior) -> int:
    """Bytes of every matrix that a step multiplies with: all but the embedding tables."""
    linear = [m for m in prior.modules() if isinstance(m, torch.nn.Linear)]
    return sum(m.weight.numel() * m.weight.element_size() for m in linear)


class Probe:
    """A matrix-vector product, timed."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        columns = 4096
        rows = PROBE_BYTES // (columns * dtype.itemsize)
        self.matrix = torch.randn(rows, columns, device=device).to(dtype)
        self.vector = torch.randn(columns, device=device).to(dtype)

    def seconds(self) -> float:
        """Time of one product."""
        start = now(self.matrix.device)
        torch.mv(self.matrix, self.vector)
        return now(self.matrix.device) - start


def measure(prior: NextTokenPrior, labels: Tensor, guidance_scale: float) -> Result:
    """Time every step of one sampling call, with a probe after each."""
    device, dtype = labels.device, prior.output.weight.dtype
    probe = Probe(dtype, device)
    steps, probes = [], []
    started = now(device)

    def on_step(done: int, total: int, _: Tensor) -> None:
        nonlocal started
        steps.append(now(device) - started)
        probes.append(probe.seconds())
        started = now(device)

    prior.sample(labels, guidance_scale=guidance_scale, on_step=on_step)
    rows = len(labels) * (2 if guidance_scale != 1 else 1)
    length, config = prior.config.spec.length, prior.config
    return Result(
        step_seconds=statistics.median(steps[WARM_UP:]),
        probe_seconds=statistics.median(probes[WARM_UP:]),
        weight_bytes=matrix_bytes(prior),
        cache_bytes=rows
        * (length // 2)
        * 2
        * config.depth
        * config.kv_heads
        * config.head_dim
        * dtype.itemsize,
        probe_bytes=probe.matrix.numel() * dtype.itemsize,
    )


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--preset", choices=list(PRESETS), default="gpt-b", help="preset of the prior"
    )
    parser.add_argument("--rows", type=int, default=1, help="samples per batch")
    parser.add_argument(
        "--guidance_scale", type=float, default=1.0, help="guidance scale; 1 is off"
    )
    parser.add_argument("--side", type=int, default=8, help="side of the square grid of codes")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> None:
    """Print one line of JSON."""
    args = arguments()
    torch.manual_seed(0)
    grid = (args.side, args.side)
    config = replace(PRESETS[args.preset], spec=CodeSpec(16384, (grid,)))
    prior = NextTokenPrior(config).to(args.device, getattr(torch, args.dtype)).eval()
    labels = torch.arange(args.rows, device=args.device) % config.num_classes
    result = measure(prior, labels, args.guidance_scale)
    print(
        json.dumps(
            {
                **vars(args),
                "threads": torch.get_num_threads(),
                "step_ms": round(1000 * result.step_seconds, 3),
                "bandwidth_gb_s": round(result.probe_bytes / result.probe_seconds / 1e9, 2),
                "weights_mb": round(result.weight_bytes / 1e6, 1),
                "step_over_weights": round(result.weights_ratio, 3),
                "step_over_weights_and_cache": round(result.traffic_ratio, 3),
            }
        )
    )


if __name__ == "__main__":
    main()
