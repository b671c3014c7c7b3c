"""How many times more pictures `smalti serve` makes for 32 clients than one by one.

    python benchmarks/serving_load.py --clients 32

Three loads are measured in turn, on loopback: 32 clients, whose pictures share batches; one client
of a server that samples pictures singly (`--max_batch_size 1`); and one client of the first server,
whose batches are then filled with rows that nobody wants. The models are small presets with random
weights: speed does not depend on them. The results are ratios of pictures per second.

    python benchmarks/serving_load.py --arrivals 40

Requests for one picture each arrive at random times, the same for two servers that take them in
turn: one whose pictures join the running batch between two codes, and one whose pictures wait until
it ends. Times between arrivals are exponential, with a mean that is a share of the time of a batch.
The results are ratios of the latencies, from a request to its answer.
"""

import argparse
import itertools
import random
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
from exact_generation import CLASSES, DEVICE, pipeline_of

from smalti.pipelines.image_api import GENERATIONS, ServerMetrics, image_app, server_of
from smalti.pipelines.pipeline import Pipeline
from smalti.pipelines.serving import Batcher


@contextmanager
def server(
    pipeline: Pipeline, max_batch_size: int | None, continuous: bool = True
) -> Iterator[httpx.Client]:
    """A client of a server on loopback."""
    metrics = ServerMetrics()
    batcher = Batcher(
        pipeline,
        max_batch_size=max_batch_size,
        max_wait=0.005,
        observe=metrics.observe_batch,
        continuous=continuous,
    )
    app = image_app(batcher, metrics, model_id="tiny", options={}, max_images=1)
    place = socket.create_server(("127.0.0.1", 0))
    running = server_of(app, batcher)
    thread = threading.Thread(target=running.run, args=([place],))
    thread.start()
    url = f"http://127.0.0.1:{place.getsockname()[1]}"
    with httpx.Client(
        base_url=url, timeout=600, limits=httpx.Limits(max_connections=None)
    ) as client:
        yield client
    running.should_exit = True
    thread.join()
    batcher.join()


def pictures_per_second(client: httpx.Client, clients: int, pictures: int) -> float:
    """With so many clients, each of which sends its next request when it has its answer."""

    def ask(index: int) -> None:
        body = {"class_label": index % len(CLASSES), "guidance_scale": 2.0}
        client.post(GENERATIONS, json=body).raise_for_status()

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as threads:
        list(threads.map(ask, range(pictures)))
    return pictures / (time.perf_counter() - start)


def latencies(client: httpx.Client, times: list[float]) -> list[float]:
    """Seconds from each request to its answer; they arrive at these times, in seconds."""
    start = time.perf_counter()

    def ask(index: int) -> float:
        time.sleep(max(0.0, start + times[index] - time.perf_counter()))
        body = {"class_label": index % len(CLASSES), "guidance_scale": 2.0}
        client.post(GENERATIONS, json=body).raise_for_status()
        return time.perf_counter() - start - times[index]

    with ThreadPoolExecutor(len(times)) as threads:
        return list(threads.map(ask, range(len(times))))


def compare_arrivals(pipe: Pipeline, args: argparse.Namespace) -> None:
    """Print the ratios of latencies at random arrivals."""
    size = args.max_batch_size
    with server(pipe, size) as joining, server(pipe, size, continuous=False) as waiting:
        for client in (joining, waiting):
            latencies(client, [0.0])
        batch = min(latencies(waiting, [0.0])[0] for _ in range(3))
        for share in args.shares:
            generator, found = random.Random(0), ([], [])
            for _ in range(args.rounds):
                gaps = [generator.expovariate(1 / (share * batch)) for _ in range(args.arrivals)]
                times = list(itertools.accumulate(gaps))
                for client, own in zip((joining, waiting), found, strict=True):
                    own += latencies(client, times)
            halves, ends = zip(*(percentiles(own) for own in found), strict=True)
            print(
                f"mean gap {share:g} of a batch: waiting / joining = {halves[1] / halves[0]:.2f} "
                f"(median, {halves[1] / batch:.2f} of a batch), {ends[1] / ends[0]:.2f} (95th "
                f"percentile, {ends[1] / batch:.2f} of a batch)",
                flush=True,
            )


def percentiles(values: list[float]) -> tuple[float, float]:
    """The median and the 95th percentile."""
    cuts = statistics.quantiles(values, n=20)
    return statistics.median(values), cuts[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", default="vq-32-tiny", help="preset")
    parser.add_argument("--prior", default="gpt-nano", help="preset")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--pictures", type=int, default=96, help="of all clients together, a round")
    parser.add_argument("--singly", type=int, default=8, help="pictures of the single client")
    parser.add_argument("--max_batch_size", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--arrivals", type=int, default=0, help="random arrivals of a round instead"
    )
    shares = {"type": float, "nargs": "+", "default": [0.5, 0.2, 0.1]}
    parser.add_argument("--shares", help="mean times between them, of that of a batch", **shares)
    args = parser.parse_args()
    pipe = pipeline_of(args.tokenizer, args.prior).to(DEVICE)
    if args.arrivals:
        compare_arrivals(pipe, args)
        return
    rates: dict[str, list[float]] = {"together": [], "singly": [], "filled": []}
    with server(pipe, args.max_batch_size) as batched, server(pipe, 1) as single:
        for client in (batched, single):
            pictures_per_second(client, 1, 1)
        for _ in range(args.rounds):
            rates["together"].append(pictures_per_second(batched, args.clients, args.pictures))
            rates["singly"].append(pictures_per_second(single, 1, args.singly))
            rates["filled"].append(pictures_per_second(batched, 1, args.singly))
    together, singly, filled = (statistics.median(values) for values in rates.values())
    print(f"{args.clients} clients to one, sampled singly = {together / singly:.2f}")
    print(f"{args.clients} clients to one, in filled batches = {together / filled:.2f}")


if __name__ == "__main__":
    main()
