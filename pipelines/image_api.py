"""A batcher behind HTTP, in the form of OpenAI's image API.

    POST /v1/images/generations    pictures of classes or a prompt, as base64 in JSON
    GET  /v1/models                the model, with its classes and sizes
    GET  /health                   200 if requests are taken, 503 if not
    GET  /metrics                  counters in the text form of Prometheus

Needs the packages of the extra `serve`.
"""

import asyncio
import base64
import hmac
import json
import logging
import signal
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from PIL import Image
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client import generate_latest as metrics_text
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from smalti.config import ImageSize, nearest
from smalti.errors import GenerationError, SmaltiError
from smalti.pipelines.output import png_of
from smalti.pipelines.serving import (
    Batcher,
    PictureRequest,
    QueuedPicture,
    QueueFullError,
    StoppingError,
)
from smalti.prior.conditions.text import TextConfig
from smalti.signals import TERMINATING, handling

logger = logging.getLogger(__name__)

GENERATIONS, MODELS, HEALTH, METRICS = "/v1/images/generations", "/v1/models", "/health", "/metrics"
PATHS = (GENERATIONS, MODELS, HEALTH, METRICS)
LARGEST_BODY = 64 * 1024  # bytes of a request
LONGEST_PROMPT = 4000  # characters
MOST_STEPS = 1000  # num_inference_steps of a request
BODY_SECONDS = 30  # in which a request must have arrived
CLOSING_SECONDS = 30  # in which answers must be read, once the server stops
NOBODY = 499  # status of a request whose client went away; nginx's number
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)  # buckets of a histogram

# -- requests ------------------------------------------------------------------------------------


class ImagesRequest(BaseModel):
    """The body of a request; the sampling options of the prior are added to it."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str | None = Field(None, description="the id that /v1/models gives")
    prompt: str | None = Field(None, max_length=LONGEST_PROMPT, description="of captions' priors")
    negative_prompt: str | None = Field(
        None, max_length=LONGEST_PROMPT, description="what guidance leads away from"
    )
    class_label: int | str | None = Field(None, description="a class, by name or number")
    class_labels: list[int | str] | None = Field(None, description="several classes")
    n: int = Field(1, ge=1, description="pictures of each class, or of the prompt")
    size: str | None = Field(None, description="width x height in pixels, as in 64x64; or auto")
    seed: int | None = Field(
        None, description="of the first picture; the next ones have the next numbers"
    )
    response_format: Literal["b64_json", "url"] = Field("b64_json", description="b64_json only")
    guidance_scale: float | None = Field(None, description="s in uncond + s (cond - uncond)")


def request_model(options: Mapping[str, tuple[Any, str]]) -> type[ImagesRequest]:
    """`ImagesRequest` with the options of a prior's `sample`.

    Args:
        options: type and help text of each, by name.
    """
    fields = {
        name: (kind | None, Field(None, description=text))
        for name, (kind, text) in options.items()
        if name not in ImagesRequest.model_fields
    }
    return create_model("ImagesRequest", __base__=ImagesRequest, **fields)  # type: ignore[call-overload]


class RequestError(GenerationError):
    """A field of a request, or a request as a whole, is wrong."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message, argument=param)


def read_request(model: type[ImagesRequest], body: bytes) -> ImagesRequest:
    """The request in a body.

    Raises:
        RequestError: it is no JSON object, or a field is unknown or has a wrong type.
    """
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        wrong = error.errors(include_url=False)[0]
    param = ".".join(str(part) for part in wrong["loc"][:1]) or None
    if wrong["type"] == "extra_forbidden":
        raise RequestError(
            f'a request has no field "{param}"; {nearest(str(param), model.model_fields)}', param
        )
    if param is None:
        raise RequestError(f"the body must be a JSON object ({wrong['msg']})")
    value = json.dumps(wrong["input"], default=str)
    shown = value if len(value) <= 40 else f"{value[:40]}..."
    raise RequestError(f"{param} is {shown}: {wrong['msg']}", param)


def picture_request(
    given: ImagesRequest, batcher: Batcher, model_id: str, max_images: int
) -> PictureRequest:
    """What a request asks of the batcher.

    Raises:
        RequestError: it asks for another model, size or form of answer, or for too much.
    """
    if given.model not in (None, model_id):
        raise RequestError(f'model is "{given.model}"; this server has "{model_id}"', "model")
    if given.response_format == "url":
        raise RequestError(
            "response_format is url, but this server keeps no files: use b64_json",
            "response_format",
        )
    if given.class_label is not None and given.class_labels is not None:
        raise RequestError("give class_label or class_labels, one of them", "class_labels")
    labels = given.class_labels if given.class_label is None else [given.class_label]
    count = given.n * len(labels or [0])
    if count > max_images:
        raise RequestError(
            f"{count} pictures are asked for; this server makes at most {max_images} in a request",
            "class_labels" if given.n == 1 else "n",
        )
    own = {*ImagesRequest.model_fields}
    options = {
        name: value
        for name, value in given.model_dump(exclude_none=True).items()
        if name not in own
    }
    if options.get("num_inference_steps", 0) > MOST_STEPS:
        raise RequestError(
            f"num_inference_steps is {options['num_inference_steps']}; this server takes at most "
            f"{MOST_STEPS}",
            "num_inference_steps",
        )
    return PictureRequest(
        class_labels=labels,
        prompt=given.prompt,
        negative_prompt=given.negative_prompt,
        num_images=given.n,
        seed=given.seed,
        image_size=_size_of(given.size, batcher),
        guidance_scale=given.guidance_scale,
        options=options,
    )


def _size_of(text: str | None, batcher: Batcher) -> ImageSize | None:
    """The size that a request asks for, which OpenAI writes as width x height."""
    if text in (None, "auto"):
        return None
    sizes = {size_text(size): size for size in batcher.pipelines}
    if text not in sizes:
        raise RequestError(
            f'size is "{text}"; this server makes {", ".join(sizes)} (width x height)', "size"
        )
    return sizes[text]


def size_text(size: ImageSize) -> str:
    """A size as OpenAI writes it: width x height."""
    height, width = size if isinstance(size, tuple) else (size, size)
    return f"{width}x{height}"


async def read_body(request: Request) -> bytes:
    """The body of a request.

    Raises:
        RequestError: it is larger than `LARGEST_BODY`, is not declared as JSON, or does not arrive.
    """
    # A web page can send other types to a server on this machine without asking it first.
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(f'Content-Type is "{kind}": send application/json')
    body = b""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > LARGEST_BODY:
                    raise RequestError(f"the body is larger than {LARGEST_BODY} bytes: shorten it")
    except TimeoutError:
        raise RequestError(f"the body did not arrive within {BODY_SECONDS} seconds") from None
    return body


# -- answers -------------------------------------------------------------------------------------


def error_response(
    status: int,
    message: str,
    *,
    kind: str = "invalid_request_error",
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """An error in OpenAI's form."""
    content = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return JSONResponse(content, status, headers)


def response_to(error: Exception, given: ImagesRequest | None = None) -> JSONResponse:
    """The answer to a request that failed.

    Args:
        given: the request, if its body could be read.
    """
    if isinstance(error, QueueFullError):
        return error_response(
            429,
            str(error),
            kind="rate_limit_error",
            code="queue_full",
            headers={"Retry-After": str(error.retry_after)},
        )
    if isinstance(error, StoppingError):
        return error_response(503, str(error), kind="server_error", code="stopping")
    if isinstance(error, SmaltiError):
        return error_response(400, str(error), param=_field_of(error.argument, given))
    logger.error("a request failed", exc_info=error)
    return error_response(
        500, "the server failed; its log says why", kind="server_error", code="failed"
    )


def _field_of(argument: str | None, given: ImagesRequest | None) -> str | None:
    """The field of a request that gives an argument; None: it is unknown which one is wrong."""
    if given is None or given.class_label is None or given.class_labels is not None:
        return argument
    return "class_label" if argument == "class_labels" else argument


def _answer(pictures: list[QueuedPicture], images: list[Image.Image]) -> dict[str, Any]:
    """Pictures in OpenAI's form, each with its seed."""
    data = [
        {"b64_json": base64.b64encode(png_of(image)).decode(), "seed": picture.seed}
        for picture, image in zip(pictures, images, strict=True)
    ]
    return {"created": int(time.time()), "data": data}


async def images_of(
    request: Request, batcher: Batcher, pictures: list[QueuedPicture]
) -> list[Image.Image] | None:
    """The finished pictures; None if the client went away, whose places are then given back.

    Raises:
        StoppingError: the server ends at once, after a second signal.
    """
    finished = asyncio.create_task(_finished(pictures))
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait((finished, gone), return_when=asyncio.FIRST_COMPLETED)
        return await finished if finished.done() else None
    except asyncio.CancelledError:
        raise StoppingError("the server was ended: send the request to another one") from None
    finally:
        gone.cancel()
        if not finished.done():
            finished.cancel()
            batcher.cancel(pictures)


async def _finished(pictures: list[QueuedPicture]) -> list[Image.Image]:
    return [await asyncio.wrap_future(picture.result) for picture in pictures]


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


# -- the application -----------------------------------------------------------------------------


class ServerMetrics:
    """What `/metrics` reports."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "smalti_requests", "Requests answered", ["path", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "smalti_request_seconds",
            "From the request to the end of the answer",
            ["path"],
            registry=self.registry,
        )
        self.pictures = Counter("smalti_pictures", "Pictures sampled", registry=self.registry)
        self.batches = Histogram(
            "smalti_batch_pictures",
            "Pictures that were finished together",
            buckets=BATCHES,
            registry=self.registry,
        )
        self.batch_seconds = Histogram(
            "smalti_batch_seconds", "Time of a batch", registry=self.registry
        )
        self.queue = Gauge("smalti_queue_pictures", "Pictures that wait", registry=self.registry)

    def observe_batch(self, pictures: int, seconds: float) -> None:
        """Count a batch: the `observe` of a batcher."""
        self.pictures.inc(pictures)
        self.batches.observe(pictures)
        self.batch_seconds.observe(seconds)


class Gate:
    """ASGI middleware: refuses requests without the token, and counts all of them.

    `/health` needs no token: what watches a server has none.
    """

    def __init__(self, app: ASGIApp, token: str, metrics: ServerMetrics) -> None:
        self.app, self.token, self.metrics = app, token, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), 500
        path = scope["path"] if scope["path"] in PATHS else "other"

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            refused = None if path == HEALTH else self._refusal(scope)
            await (refused or self.app)(scope, receive, observed)
        finally:
            self.metrics.requests.labels(path, str(status)).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - start)

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        """The answer to a request without the token; None if it has it."""
        given = dict(scope["headers"]).get(b"authorization", b"")
        expected = f"Bearer {self.token}".encode()
        if not self.token or hmac.compare_digest(given, expected):
            return None
        return error_response(
            401,
            "the token is missing or wrong: send Authorization: Bearer TOKEN",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


def image_app(
    batcher: Batcher,
    metrics: ServerMetrics,
    *,
    model_id: str,
    options: Mapping[str, tuple[Any, str]],
    max_images: int,
    token: str = "",
) -> FastAPI:
    """The application.

    Args:
        metrics: those that the batcher's `observe` counts in.
        model_id: what clients call the model.
        options: of the prior, see `request_model`.
        max_images: pictures of one request at most.
        token: that every request but those to `/health` must have; "" is none.
    """
    request_type = request_model(options)
    # No page of documentation: FastAPI's load scripts from another server.
    app = FastAPI(title="smalti", docs_url=None, redoc_url=None)
    app.add_middleware(Gate, token=token, metrics=metrics)
    metrics.queue.set_function(lambda: batcher.waiting)
    started = int(time.time())
    content = {"application/json": {"schema": request_type.model_json_schema()}}

    @app.post(GENERATIONS, openapi_extra={"requestBody": {"content": content, "required": True}})
    async def generations(request: Request) -> Response:
        given: ImagesRequest | None = None
        try:
            given = read_request(request_type, await read_body(request))
            wanted = picture_request(given, batcher, model_id, max_images)
            pictures = await asyncio.to_thread(batcher.submit, wanted)  # it checks all options
            images = await images_of(request, batcher, pictures)
            if images is None:
                return Response(status_code=NOBODY)
            return JSONResponse(await asyncio.to_thread(_answer, pictures, images))
        except Exception as error:
            return response_to(error, given)

    @app.get(MODELS)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model_card_of(batcher, model_id, started)]}

    @app.get(HEALTH)
    async def health() -> Response:
        ready = batcher.is_ready
        return JSONResponse({"status": "ready" if ready else "not ready"}, 200 if ready else 503)

    @app.get(METRICS)
    async def measured() -> Response:
        return Response(metrics_text(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        where = f"{request.method} {request.url.path}"
        message = f"{where}: {error.detail}; this server has {', '.join(PATHS)}"
        return error_response(error.status_code, message, headers=error.headers)

    return app


def model_card_of(batcher: Batcher, model_id: str, created: int) -> dict[str, Any]:
    """A model in OpenAI's form, with what it takes."""
    pipeline = batcher.pipeline
    text: TextConfig | None = pipeline.prior.config.text
    return {
        "id": model_id,
        "object": "model",
        "created": created,
        "owned_by": "smalti",
        "conditions": [*pipeline.prior.condition_kinds],
        "classes": [*pipeline.classes],
        "prompt_tokens": None if text is None else text.length,
        "sizes": [size_text(size) for size in batcher.pipelines],
        "max_batch_size": batcher.batch_sizes[pipeline.tokenizer.image_size],
    }


# -- the server ----------------------------------------------------------------------------------


class GracefulServer(uvicorn.Server):
    """A server that, once its batcher is stopped, answers new requests with 503 until the accepted
    ones are finished, and then ends. `uvicorn.Server` would refuse connections at once."""

    def __init__(self, config: uvicorn.Config, batcher: Batcher) -> None:
        super().__init__(config)
        self.batcher, self.is_stopping = batcher, False

    async def on_tick(self, counter: int) -> bool:
        """Whether to end; called ten times a second.

        Raises:
            KeyboardInterrupt: a second signal came.
        """
        ends = await super().on_tick(counter)
        if self.force_exit:
            raise KeyboardInterrupt
        return ends or (self.is_stopping and self.batcher.is_idle)

    def stop(self, number: int, frame: object) -> None:
        """Handle a signal: the first ends the server when it is idle, the second at once.

        The second only sets a flag: an exception raised here would reach whatever code the signal
        interrupts, and uvicorn discards the exceptions of a request.
        """
        del frame
        if self.is_stopping:
            self.force_exit = True
            return
        self.is_stopping = True
        self.batcher.stop()
        name = signal.Signals(number).name
        logger.info("%s: finishing %d waiting pictures", name, self.batcher.waiting)

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Context in which a signal stops the server; uvicorn's would end with its status."""
        with handling((signal.SIGINT, *TERMINATING), self.stop):
            yield


def server_of(app: FastAPI, batcher: Batcher) -> GracefulServer:
    """A server for an application, to be run on a socket."""
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="warning",
        access_log=False,
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=CLOSING_SECONDS,
    )
    return GracefulServer(config, batcher)
