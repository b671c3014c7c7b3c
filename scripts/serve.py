"""A pipeline behind HTTP, in the form of OpenAI's image API: a saved pipeline -> a server.

    smalti serve --model runs/demo/pipeline
    curl http://127.0.0.1:8000/v1/images/generations -H 'Content-Type: application/json' \\
        -d '{"class_label": "cat", "seed": 7}'

It ends, with status 0, on SIGTERM or SIGINT, after it has finished what it has accepted.
"""

import contextlib
import ipaddress
import math
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from smalti.checkpoints import Weights
from smalti.cli import end_at_once, parse_config, run_command
from smalti.config import ImageSize, check_at_least
from smalti.errors import ConfigurationError
from smalti.pipelines.model_flag import place_of
from smalti.pipelines.pipeline import DEMO, Pipeline, check_model
from smalti.pipelines.serving import Batcher
from smalti.prior.registry import PRIORS
from smalti.scripts.options import DType, sample_options
from smalti.training.processes import join_job

TOKEN = "SMALTI_SERVE_TOKEN"  # environment variable


@dataclass(frozen=True)
class ServeConfig:
    """Answer requests for pictures over HTTP with a saved pipeline."""

    model: Annotated[str, place_of("A pipeline")] = DEMO
    weights: Weights = "ema"  # of a checkpoint: averaged over its run (ema), or raw
    host: str = "127.0.0.1"  # address to listen on; one that other machines reach needs a token
    port: int = 8000  # 0 = any free one, which is printed
    # What clients send as Authorization: Bearer TOKEN. Other users of the machine can see the
    # options of a command: SMALTI_SERVE_TOKEN in the environment sets it, too.
    token: str = ""
    # As of smalti generate. In fp32, int8 and int4 a picture does not depend on the others of its
    # batch; bf16 and fp16 are faster on GPUs.
    dtype: DType = "fp32"
    compile: bool = False  # torch.compile, in minutes for each size, or packed weights
    # Sizes that requests may ask for, beside those that the prior was trained on: the side of a
    # square, or height x width as in 48x64.
    image_sizes: tuple[ImageSize, ...] = ()
    # Pictures sampled at once; in fp32, int8 and int4 always so many. Default: the number of a
    # generation job.
    max_batch_size: int | None = None
    # With a next-token prior, pictures join the running batch. Off: all pictures of a batch begin
    # at once, which takes less time on a CPU where every slot is always taken.
    continuous: bool = True
    max_wait_ms: float = 20  # that a picture waits for a batch to fill, where none joins later
    max_queue: int = 256  # pictures that may wait; a request for more gets status 429
    max_images: int = 10  # pictures of one request at most

    def __post_init__(self) -> None:
        check_at_least(1, self, "max_images")
        check_port(self.port)
        if self.max_batch_size is not None:
            check_at_least(1, self, "max_batch_size")
        if not 0 <= self.max_wait_ms < math.inf:
            raise ConfigurationError(f"max_wait_ms is {self.max_wait_ms}; it must be 0 or more")
        if self.max_queue < self.max_images:
            raise ConfigurationError(
                f"max_queue is {self.max_queue} and max_images {self.max_images}: a request for "
                "so many would never have a place; raise --max_queue, or lower --max_images"
            )

    def checked_token(self) -> str:
        """The token, of the configuration or the environment; "" is none.

        Raises:
            ConfigurationError: it is missing although other machines reach the host, or no client
                could send it.
        """
        token = secret(self.token, TOKEN, "--token", self.host)
        if any(
            not letter.isascii() or not letter.isprintable() or letter == " " for letter in token
        ):
            raise ConfigurationError(
                "the token has a character that a header cannot hold: use ASCII without spaces"
            )
        return token


# -- What every command that listens does: `smalti ui`, too ----------------------------------------


@contextlib.contextmanager
def needing(extra: str) -> Iterator[None]:
    """Context of the imports of an optional dependency group, which has the command's name.

    Raises:
        ConfigurationError: it is not installed.
    """
    try:
        yield
    except ImportError as error:
        raise ConfigurationError(
            f"{extra} needs other packages ({error.name} is missing): pip install 'smalti[{extra}]'"
        ) from error


def check_port(port: int) -> None:
    """Raise `ConfigurationError` unless it is a number that a port can have."""
    if not 0 <= port <= 65535:
        raise ConfigurationError(f"port is {port}; it must lie between 0 and 65535")


def secret(given: str, variable: str, flag: str, host: str) -> str:
    """What clients must show: given, or of the environment; "" is nothing.

    Raises:
        ConfigurationError: it is missing although other machines reach the host, or that is none.
    """
    if not host or "/" in host:
        raise ConfigurationError(f'host is "{host}", not an address: give one such as 127.0.0.1')
    found = given or os.environ.get(variable, "")
    if not found and not is_loopback(host):
        raise ConfigurationError(
            f"host is {host}, which other machines may reach: give {flag}, or set {variable}"
        )
    return found


def loaded(models: Sequence[str], weights: Weights, dtype: DType, remedy: str) -> list[Pipeline]:
    """The pipelines of a command that runs in one process, on its device.

    Args:
        remedy: what a user who started several processes can do.

    Raises:
        SmaltiError: there are several processes; a pipeline cannot be loaded.
    """
    state = join_job()
    if state.num_processes > 1:
        raise ConfigurationError(remedy)
    for model in models:
        check_model(model)
    given: dict[str, Any] = {"device": state.device, "weights": weights, "dtype": dtype}
    return [Pipeline.from_pretrained(model, **given) for model in models]


def is_loopback(host: str) -> bool:
    """Whether only programs of this machine reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens on an address.

    Raises:
        ConfigurationError: it cannot.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ConfigurationError(
            f"cannot listen on {host}, port {port} ({error.strerror or error}): choose another "
            "--host or --port"
        ) from error


def serve(config: ServeConfig) -> None:
    """Load the pipeline, and answer requests until a signal. A second signal before all requests
    are finished ends the process, with status 130.

    Raises:
        SmaltiError: the pipeline cannot be loaded or served, or the address cannot be used.
    """
    with needing("serve"):
        from smalti.pipelines.image_api import ServerMetrics, image_app, server_of
    token = config.checked_token()
    remedy = "serve runs in one process: start one for each GPU, each with its own --port"
    listening(config.host, config.port).close()  # raises at once; loading takes long
    (pipeline,) = loaded([config.model], config.weights, config.dtype, remedy)
    metrics = ServerMetrics()
    batcher = Batcher(
        pipeline,
        max_batch_size=config.max_batch_size,
        max_wait=config.max_wait_ms / 1000,
        max_queue=config.max_queue,
        image_sizes=config.image_sizes,
        observe=metrics.observe_batch,
        continuous=config.continuous and not config.compile,
    )
    if config.compile:
        for sized in batcher.pipelines.values():
            sized.compile()
    is_local = Path(config.model).exists()
    app = image_app(
        batcher,
        metrics,
        model_id=Path(config.model).resolve().name if is_local else config.model,
        options=request_options(pipeline),
        max_images=config.max_images,
        token=token,
    )
    with listening(config.host, config.port) as place:
        host = f"[{config.host}]" if ":" in config.host else config.host
        url = f"http://{host}:{place.getsockname()[1]}"
        print(f"{config.model}: {url}/v1/images/generations", flush=True)
        try:
            server_of(app, batcher).run([place])
        except KeyboardInterrupt:
            end_at_once()
    batcher.join()


def request_options(pipeline: Pipeline) -> dict[str, tuple[Any, str]]:
    """Type and help text of the sampling options of a pipeline's prior, by name."""
    kind = PRIORS.name_of(type(pipeline.prior))
    return {
        option.name: (option.type, option.help)
        for option in sample_options()
        if option.prior == kind
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `smalti serve`."""
    serve(parse_config(ServeConfig, argv, prog="smalti serve"))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
