"""How many times more pictures `smalti serve` makes for 32 clients than one by one.

    python benchmarks/serving_load.py --clients 32

Three loads are measured in turn, on loopback: 32 clients, whose pictures share batches; one client
of a server that samples pictures singly (`--max_batch_size 1`); and one client of the first server,
whose batches are then filled with rows that nobody wants. The models are small presets with random
weights: speed does not depend on them. The results are ratios of pictures per second.
"""

import argparse
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
def server(pipeline: Pipeline, max_batch_size: int | None) -> Iterator[httpx.Client]:
    """A client of a server on loopback."""
    metrics = ServerMetrics()
    batcher = Batcher(
        pipeline, max_batch_size=max_batch_size, max_wait=0.005, observe=metrics.observe_batch
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", default="vq-32-tiny", help="preset")
    parser.add_argument("--prior", default="gpt-nano", help="preset")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--pictures", type=int, default=96, help="of all clients together, a round")
    parser.add_argument("--singly", type=int, default=8, help="pictures of the single client")
    parser.add_argument("--max_batch_size", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    pipe = pipeline_of(args.tokenizer, args.prior).to(DEVICE)
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
