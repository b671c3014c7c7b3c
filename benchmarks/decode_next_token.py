"""Decoding speed of a next-token prior with its key-value cache, relative to memory bandwidth.

    python benchmarks/decode_next_token.py --preset gpt-b --rows 1 --dtype float32 bfloat16 int8

A decoding step multiplies a few rows by every weight matrix once, so it takes at least the time of
reading the matrices. That limit is measured: an fp32 matrix-vector product whose matrix is far
larger than any cache, in the same process, after every decoding step. The results are ratios, which
other load on the machine affects little as long as every thread has a core (set OMP_NUM_THREADS):
`step_over_weights` 1 is the speed of memory. Precisions take turns, a sampling call each;
float32-rows is float32 with weights in the order of `nn.Linear`, as before
`arrange_for_sampling`; a name with -packed is of packed weights, as after `compile_parts()`.

--profile adds, on a CPU, what torch's profiler finds in a further call: the operators that a step
runs, how long its matrix products take, and how fast these read the weights.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from clock import now, quartiles
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from smalti.data.latents import CodeSpec
from smalti.prior.next_token.model import PRESETS, NextTokenPrior
from smalti.prior.weight_only import quantized_layers
from smalti.weights import chosen_dtype

PROBE_BYTES = 512 * 2**20  # of the probe's matrix: ten times a large last-level cache
WARM_UP = 3  # first steps of every call, not counted
ROWS = "float32-rows"
PACKED = "-packed"
PRODUCTS = (  # ends of names of operators
    *("::mm", "::addmm", "::mv", "pack_mm", "pack_mm_for_cpu"),
    *("linear_pointwise", "linear_dynamic_fp16"),
)
FLOATING = ("float32", "bfloat16", "float16")
PRECISIONS = (*FLOATING, ROWS, *(name + PACKED for name in FLOATING), "int8", "int4")


@dataclass
class Timings:
    """Seconds of the steps of one precision, and of the probe after each."""

    weight_bytes: int  # of the matrices that a step multiplies with
    cache_bytes: int  # keys and values that the middle step reads
    steps: list[float] = field(default_factory=list)  # one code for every sample
    probes: list[float] = field(default_factory=list)

    @property
    def bandwidth(self) -> float:
        """Bytes per second of the probe."""
        return PROBE_BYTES / statistics.median(self.probes)

    def over(self, size: int) -> float:
        """Step time over the time to read so many bytes once."""
        return statistics.median(self.steps) * self.bandwidth / size


def matrix_bytes(prior: NextTokenPrior) -> int:
    """Bytes of every matrix that a step multiplies with: all but the embedding tables."""
    linear = [m.weight for m in prior.modules() if isinstance(m, torch.nn.Linear)]
    buffers = [b for layer in quantized_layers(prior).values() for b in layer.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in (*linear, *buffers))


def cache_bytes(prior: NextTokenPrior, rows: int) -> int:
    """Bytes of keys and values of half of the codes."""
    config, weight = prior.config, prior.tok_embeddings.weight
    numbers = rows * (config.spec.length // 2) * 2 * config.depth * config.kv_heads
    size = 4 if weight.device.type == "cpu" else weight.element_size()
    return numbers * config.head_dim * size


def probe_on(device: torch.device) -> Callable[[], float]:
    """A function that multiplies a large matrix by a vector and returns the seconds."""
    columns = 4096
    matrix = torch.randn(PROBE_BYTES // (columns * 4), columns, device=device)
    vector = torch.randn(columns, device=device)

    def seconds() -> float:
        start = now(device)
        torch.mv(matrix, vector)
        return now(device) - start

    return seconds


def time_call(
    prior: NextTokenPrior,
    labels: Tensor,
    guidance_scale: float,
    probe: Callable[[], float],
    timings: Timings,
) -> None:
    """Time every step of one sampling call, with a probe after each."""
    steps, probes = list[float](), list[float]()
    started = now(labels.device)

    def on_step(done: int, total: int, _: Tensor) -> None:
        nonlocal started
        steps.append(now(labels.device) - started)
        probes.append(probe())
        started = now(labels.device)

    prior.sample(labels, guidance_scale=guidance_scale, on_step=on_step)
    timings.steps += steps[WARM_UP:]
    timings.probes += probes[WARM_UP:]


def profiled(
    prior: NextTokenPrior, labels: Tensor, guidance_scale: float, size: int
) -> dict[str, float]:
    """Of a step, on average: the operators that torch runs, and its products with weights of so
    many bytes."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        prior.sample(labels, guidance_scale=guidance_scale)
    events, steps = found.key_averages(), prior.config.spec.length
    products = [event for event in events if event.key.endswith(PRODUCTS)]
    seconds = sum(event.self_cpu_time_total for event in products) / steps / 1e6
    return {
        "operators": round(sum(event.count for event in events) / steps),
        "products": round(sum(event.count for event in products) / steps),
        "products_ms": round(1000 * seconds, 2),
        "products_gb_s": round(size / seconds / 1e9, 2),
    }


def build(args: argparse.Namespace, name: str) -> NextTokenPrior:
    """The prior in one precision, with the same random weights in all of them."""
    torch.manual_seed(0)
    config = replace(PRESETS[args.preset], spec=CodeSpec(16384, ((args.side, args.side),)))
    prior = NextTokenPrior(config).to(args.device).eval()
    torch.nn.init.normal_(prior.output.weight, std=0.02)
    if name != ROWS:
        dtype = chosen_dtype(name.removesuffix(PACKED), weight_only=True)
        assert isinstance(dtype, torch.dtype)
        prior.cast(dtype).arrange_for_sampling()
    if name.endswith(PACKED):
        prior.compile_parts()
    elif args.compile:
        prior.compile_parts(backend="inductor")
    return prior


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
    parser.add_argument("--dtype", nargs="+", choices=PRECISIONS, default=["float32"])
    parser.add_argument("--rounds", type=int, default=3, help="sampling calls of each precision")
    parser.add_argument("--profile", action="store_true", help="profile a further call")
    parser.add_argument("--compile", action="store_true", help="compile the blocks")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> None:
    """Print one line of JSON for each precision."""
    args = arguments()
    labels = torch.arange(args.rows, device=args.device)
    rows = args.rows * (2 if args.guidance_scale != 1 else 1)
    priors = {name: build(args, name) for name in args.dtype}
    found = {n: Timings(matrix_bytes(p), cache_bytes(p, rows)) for n, p in priors.items()}
    probe = probe_on(labels.device)
    for _ in range(args.rounds):
        for name, prior in priors.items():
            time_call(prior, labels, args.guidance_scale, probe, found[name])
    first = statistics.median(found[args.dtype[0]].steps)
    for name, timings in found.items():
        step, size = statistics.median(timings.steps), timings.weight_bytes
        both = size + timings.cache_bytes
        low, _, high = quartiles(timings.steps)
        more = {}
        if args.profile:
            more = profiled(priors[name], labels, args.guidance_scale, size)
        print(
            json.dumps(
                {
                    **{n: v for n, v in vars(args).items() if n not in ("rounds", "profile")},
                    "dtype": name,
                    "threads": torch.get_num_threads(),
                    "step_ms": round(1000 * step, 2),
                    "step_quartiles_ms": [round(1000 * low, 2), round(1000 * high, 2)],
                    "speed_over_first": round(first / step, 2),
                    "bandwidth_gb_s": round(timings.bandwidth / 1e9, 2),
                    "weights_mb": round(size / 1e6, 1),
                    "step_over_weights": round(timings.over(size), 2),
                    "step_over_weights_and_cache": round(timings.over(both), 2),
                    **more,
                }
            )
        )


if __name__ == "__main__":
    main()
