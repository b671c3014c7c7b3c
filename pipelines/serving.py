"""Dynamic batching: pictures that several callers want at about the same time are sampled together.

PictureRequest   what one caller wants: of which classes or prompt, how many, how they are sampled
Batcher          a bounded queue, and a thread that samples what waits in it

With a next-token prior, pictures of one size join a running batch between two codes, each with its
own options (continuous batching, see pipelines/continuous.py). Otherwise pictures with equal
sampling options and size share a batch, from its first step to its last. In fp32 a picture is the
same to the byte whichever others share it: a batch always has the same number of rows, those that
nobody wants are filled, and the row of a picture follows from its seed. (Matrix products round
differently at another number of rows, and elementwise functions at another row; see generation.py.)
It does depend on that number of rows, the batch size of the server. In half precision the row is
any, batches are not filled but where pictures join them, and a picture also depends on the others,
by rounding.
"""

import logging
import math
import secrets
import threading
import time
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor

from smalti.config import ImageSize
from smalti.data.image_io import to_pil
from smalti.data.latents import as_image_size
from smalti.errors import ConfigurationError, GenerationError, SmaltiError, about
from smalti.hub import named_options
from smalti.pipelines.conditions import (
    Inputs,
    arguments_for,
    check_options,
    conditional_on,
    integer,
    sources_of,
)
from smalti.pipelines.continuous import ContinuousBatch
from smalti.pipelines.generation import group_size, picture_generator
from smalti.pipelines.pipeline import Pipeline
from smalti.prior.next_token.model import NextTokenPrior

logger = logging.getLogger(__name__)

SEEDS = 2**53  # seeds are below it: every program that reads JSON keeps such an integer exactly
LONGEST_RETRY = 60  # seconds after which a caller that was refused may try again, at most
CHECKED = 1024  # settings that are remembered as valid
REQUESTED = ("class_labels", "prompt")  # the conditions of a request


class QueueFullError(GenerationError):
    """The queue has no place for the pictures of a request; `retry_after` is in seconds."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class StoppingError(GenerationError):
    """The batcher finishes what it has accepted, and takes no more."""


@dataclass(frozen=True)
class PictureRequest:
    """The pictures that one caller wants; None: not given."""

    class_labels: Sequence[int | str] | None = None  # names or numbers
    prompt: str | None = None
    negative_prompt: str | None = None
    num_images: int = 1  # of each class, or of the prompt
    seed: int | None = None  # of the first picture; the next ones have seed + 1, seed + 2, ...
    image_size: ImageSize | None = None  # pixels: the side of a square, or (height, width)
    guidance_scale: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)  # of the prior's `sample`


@dataclass(frozen=True)
class SharedSettings:
    """What the pictures of one batch have in common."""

    image_size: ImageSize
    negative_prompt: str | None
    options: tuple[tuple[str, Any], ...]  # sorted; guidance_scale among them if it was given

    @property
    def keywords(self) -> dict[str, Any]:
        """The options as a pipeline takes them."""
        return {
            name: named_options(value) if isinstance(value, str) and ":" in value else value
            for name, value in self.options
        }


@dataclass(eq=False)
class QueuedPicture:
    """One picture that is waited for."""

    settings: SharedSettings
    label: int
    prompt: str | None
    seed: int
    since: float = field(default_factory=time.monotonic)  # in the queue, then in the batch
    result: "Future[Image.Image]" = field(default_factory=Future)


class Batcher:
    """Samples the pictures of concurrent requests in batches.

    Args:
        max_batch_size: pictures sampled at once; in fp32 always so many. None: `group_size`, the
            number of a generation job.
        max_wait: seconds that a picture waits for others to share its batch, at most. None waits
            where pictures join a running batch.
        max_queue: pictures that may wait; more are refused.
        image_sizes: sizes that requests may ask for, beside those that the prior was trained on.
        observe: called after each batch with the number of pictures and the seconds it took; where
            pictures join a running batch, with those that finished together and the seconds since
            they joined.
        continuous: whether pictures join a running batch, if the prior is a next-token prior that
            is not compiled, in fp32, int8 or int4, or on a GPU. (In half precision on a CPU, the
            time of a step grows with its rows, and a batch has no empty ones.)

    Raises:
        ConfigurationError: the pipeline needs pictures or features of captions as its condition.
        SmaltiError: it does not make images of one of the sizes.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        *,
        max_batch_size: int | None = None,
        max_wait: float = 0.02,
        max_queue: int = 256,
        image_sizes: Iterable[ImageSize] = (),
        observe: Callable[[int, float], object] = lambda pictures, seconds: None,
        continuous: bool = True,
    ) -> None:
        _check_served(pipeline)
        self.pipeline, self.exact = pipeline, pipeline.prior.in_full_precision
        self.max_wait, self.max_queue, self.observe = max_wait, max_queue, observe
        trained = [bucket.size for bucket in pipeline.buckets]
        sizes = [pipeline.tokenizer.image_size, *trained, *map(as_image_size, image_sizes)]
        self.pipelines = {size: pipeline.resized(size) for size in dict.fromkeys(sizes)}
        self.batch_sizes = {
            size: max_batch_size or group_size(resized) for size, resized in self.pipelines.items()
        }
        self.continuous = continuous and _can_join(pipeline)
        self._queue: list[QueuedPicture] = []  # in the order of arrival
        self._changed = threading.Condition()
        self._stopping = False
        self._in_work = 0  # pictures of the batch that is sampled now
        self._unseeded = 0  # pictures that were given a seed so far
        self._seconds = 1.0  # of the last batch
        self._valid: set[SharedSettings] = set()
        run = self._run_continuously if self.continuous else self._run
        self._thread = threading.Thread(target=run, name="batcher", daemon=True)
        self._thread.start()

    # -- callers ------------------------------------------------------------------------------

    def submit(self, request: PictureRequest) -> list[QueuedPicture]:
        """Queue the pictures of a request, all or none; each has a future, `result`.

        Raises:
            QueueFullError: there is no place for them.
            StoppingError: the batcher was stopped.
            SmaltiError: the request does not fit the pipeline.
        """
        labels, settings = self._labels(request), self._settings(request)
        count = len(labels)
        self._check_seed(request.seed, count)
        with self._changed:
            if self._stopping:
                raise StoppingError("the server is stopping: send the request to another one")
            if len(self._queue) + count > self.max_queue:
                raise QueueFullError(
                    f"{len(self._queue)} pictures are waiting, and there is no place for {count} "
                    f"more: try again in {self._retry_after} seconds",
                    self._retry_after,
                )
            seeds = self._new_seeds(count, settings)
            if request.seed is not None:
                seeds = list(range(request.seed, request.seed + count))
            pictures = [
                QueuedPicture(settings, label, request.prompt, seed)
                for label, seed in zip(labels, seeds, strict=True)
            ]
            self._queue += pictures
            self._changed.notify_all()
        return pictures

    def cancel(self, pictures: Iterable[QueuedPicture]) -> None:
        """Give the places of pictures in the queue to others: nobody waits for them any more.
        Pictures of a batch that is being sampled are finished, but leave a continuous batch."""
        with self._changed:
            for picture in pictures:
                if picture in self._queue:
                    self._queue.remove(picture)
                picture.result.cancel()
            self._changed.notify_all()

    def stop(self) -> None:
        """Take no more requests; what was accepted is finished. Returns at once, see `join`."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def join(self) -> None:
        """Stop, and wait until everything accepted is finished."""
        self.stop()
        self._thread.join()

    @property
    def waiting(self) -> int:
        """Pictures in the queue."""
        return len(self._queue)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        with self._changed:
            return not self._queue and not self._in_work

    @property
    def is_ready(self) -> bool:
        """Whether requests are taken."""
        return self._thread.is_alive() and not self._stopping

    @property
    def _retry_after(self) -> int:
        """Seconds until the queue is probably served."""
        batches = len(self._queue) / max(self.batch_sizes.values()) + 1
        return max(1, min(LONGEST_RETRY, math.ceil(batches * self._seconds)))

    # -- checks, in the thread of the caller -----------------------------------------------------

    def _labels(self, request: PictureRequest) -> list[int]:
        """The label of every picture; zeros without classes.

        Raises:
            SmaltiError: the pipeline does not take these classes or this prompt.
        """
        kinds, config = self.pipeline.prior.condition_kinds, self.pipeline.prior.config
        each = integer("num_images", request.num_images)
        inputs = Inputs(request.class_labels, request.prompt, request.negative_prompt)
        if each < 1:
            raise GenerationError(
                f"num_images is {each}; it must be at least 1", argument="num_images"
            )
        if [*kinds] == ["none"] and inputs.has_condition:
            given = (name for name in REQUESTED if inputs.get(name) is not None)
            raise GenerationError(
                f"this pipeline is {conditional_on(kinds)}: give no class and no prompt",
                argument=next(given, "negative_prompt"),
            )
        inputs.check(sources_of(kinds, config), 1)
        text, encoder = config.text, self.pipeline.text_encoder
        if text is not None and encoder is not None:
            for name in ("prompt", "negative_prompt"):
                words = inputs.get(name)
                with about(name):
                    encoder.check_captions([] if words is None else [words], text.length)
        labels = [0]
        with about("class_labels"):
            if request.class_labels is not None:
                labels = self.pipeline.label_ids(request.class_labels)
            if not labels:
                raise GenerationError("class_labels is empty: give at least one class")
        return [label for label in labels for _ in range(each)]

    def _settings(self, request: PictureRequest) -> SharedSettings:
        """What the pictures of a request share with others.

        Raises:
            SmaltiError: another size, or an option that the prior refuses.
        """
        size = request.image_size
        with about("image_size"):
            size = self.pipeline.tokenizer.image_size if size is None else as_image_size(size)
            if size not in self.pipelines:
                raise GenerationError(f"image_size is {size}; choose one of {[*self.pipelines]}")
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in request.options.items()}
        if request.guidance_scale is not None:
            options["guidance_scale"] = request.guidance_scale
        settings = SharedSettings(size, request.negative_prompt, tuple(sorted(options.items())))
        if settings not in self._valid:
            check_options(self.pipelines[size].prior, settings.keywords)
            if len(self._valid) >= CHECKED:
                self._valid.clear()
            self._valid.add(settings)
        return settings

    def _check_seed(self, seed: int | None, count: int) -> None:
        if seed is not None and not 0 <= integer("seed", seed) <= SEEDS - count:
            raise GenerationError(
                f"seed is {seed}; it must lie between 0 and {SEEDS - count}", argument="seed"
            )

    def _new_seeds(self, count: int, settings: SharedSettings) -> list[int]:
        """Random seeds of consecutive rows, so that pictures without a seed fill batches."""
        rows = self.batch_sizes[settings.image_size]
        first = secrets.randbelow(2**32 // rows - count) * rows + self._unseeded % rows
        self._unseeded += count
        return list(range(first, first + count))

    # -- the thread that samples -----------------------------------------------------------------

    def _run(self) -> None:
        while batch := self._next_batch():
            start = time.monotonic()
            try:
                found = self._sample(batch)
            except Exception as error:  # of these pictures; the next ones are sampled all the same
                _fail(batch.values(), error)
            else:
                for picture, image in zip(batch.values(), found, strict=True):
                    picture.result.set_result(image)
            self._seconds = time.monotonic() - start
            self.observe(len(batch), self._seconds)
            with self._changed:
                self._in_work = 0

    def _next_batch(self) -> dict[int, QueuedPicture]:
        """The pictures to sample next, by their row; {} at the end. Waits until there are some."""
        with self._changed:
            while self._queue or not self._stopping:
                if not self._queue:
                    self._changed.wait()
                    continue
                batch = self._together_with_the_oldest()
                oldest = self._queue[0]
                left = oldest.since + self.max_wait - time.monotonic()
                is_full = len(batch) == self.batch_sizes[oldest.settings.image_size]
                if not is_full and left > 0 and not self._stopping:
                    self._changed.wait(left)
                    continue
                taken = {*batch.values()}
                self._queue = [picture for picture in self._queue if picture not in taken]
                running = {
                    row: picture
                    for row, picture in batch.items()
                    if picture.result.set_running_or_notify_cancel()
                }
                self._in_work = len(running)
                if running:
                    return running
            return {}

    def _together_with_the_oldest(self) -> dict[int, QueuedPicture]:
        """The pictures that can share a batch with the one that waits longest, by their row."""
        settings = self._queue[0].settings
        rows = self.batch_sizes[settings.image_size]
        batch: dict[int, QueuedPicture] = {}
        for picture in self._queue:
            if picture.settings == settings and len(batch) < rows:
                batch.setdefault(picture.seed % rows if self.exact else len(batch), picture)
        return batch

    @torch.no_grad()
    def _sample(self, batch: Mapping[int, QueuedPicture]) -> list[Image.Image]:
        """The pictures of a batch, in its order."""
        filled, rows = [*batch.values()], [*range(len(batch))]
        some = filled[0]
        settings, pipe = some.settings, self.pipelines[some.settings.image_size]
        if self.exact:
            rows = [*batch]
            filled = [batch.get(row, some) for row in range(self.batch_sizes[settings.image_size])]
        prompts = [picture.prompt for picture in filled if picture.prompt is not None]
        given = arguments_for(pipe.classes, [picture.label for picture in filled], prompts)
        if settings.negative_prompt is not None:
            given["negative_prompt"] = settings.negative_prompt
        latents = pipe(
            **given,
            generator=[picture_generator(picture.seed, 0) for picture in filled],
            output_type="latent",
            **settings.keywords,
        ).latents
        # Only what is wanted is decoded; one by one in fp32, as a pipeline decodes.
        wanted = latents[rows]
        parts = [row[None].clone() for row in wanted] if self.exact else [wanted]
        return to_pil(torch.cat([_decoded(pipe, part) for part in parts]))

    # -- the same with a continuous batch --------------------------------------------------------

    def _run_continuously(self) -> None:
        """One code of every picture in the batch, and again; others join and leave in between."""
        batch: RunningBatch | None = None
        while True:
            with self._changed:
                if batch is not None:
                    batch.drop_cancelled()
                self._in_work = len(batch.pictures) if batch else 0
                while not (self._queue or self._in_work or self._stopping):
                    self._changed.wait()
                if not (self._queue or self._in_work):
                    return
                batch, joining = self._joining(batch)
                self._in_work += len(joining)
            for slot, picture in joining.items():
                batch.join(slot, picture)
            finished = batch.step()
            if finished:
                self._seconds = time.monotonic() - next(iter(finished)).since
                self.observe(len(finished), self._seconds)
            for picture, image in finished.items():
                if isinstance(image, Exception):
                    _fail([picture], image)
                elif picture.result.set_running_or_notify_cancel():
                    picture.result.set_result(image)

    def _joining(
        self, batch: "RunningBatch | None"
    ) -> "tuple[RunningBatch, dict[int, QueuedPicture]]":
        """The batch to go on with, and the pictures that join it, taken from the queue, by slot.
        Pictures of another size wait until the batch is empty, and those behind them, too."""
        size = self._queue[0].settings.image_size if self._queue else None
        if batch is None or (size is not None and size != batch.size and not batch.pictures):
            size = self._queue[0].settings.image_size
            batch = RunningBatch(self.pipelines[size], size, self.batch_sizes[size], self.exact)
        taken: dict[int, QueuedPicture] = {}
        for picture in self._queue if size == batch.size else ():
            if len(batch.pictures) + len(taken) == batch.slots:
                break
            slot = batch.slot_for(picture, taken)
            if slot is not None:
                taken[slot] = picture
        chosen = {*taken.values()}
        self._queue = [picture for picture in self._queue if picture not in chosen]
        return batch, taken


class RunningBatch:
    """The pictures of one size that are sampled, each in a slot of a `ContinuousBatch`.

    Args:
        exact: whether the slot of a picture follows from its seed.
    """

    def __init__(self, pipeline: Pipeline, size: ImageSize, slots: int, exact: bool) -> None:
        self.pipeline, self.size, self.slots, self.exact = pipeline, size, slots, exact
        self.pictures: dict[int, QueuedPicture] = {}  # by slot

    @cached_property
    def batch(self) -> ContinuousBatch:
        """Made when it is first needed: memory that is missing is an error of a picture."""
        return ContinuousBatch(cast(NextTokenPrior, self.pipeline.prior), self.slots)

    def slot_for(self, picture: QueuedPicture, taken: Container[int]) -> int | None:
        """A slot that the picture may have, and that is empty and not taken."""
        if picture.settings.image_size != self.size:
            return None
        allowed = [picture.seed % self.slots] if self.exact else range(self.slots)
        return next((s for s in allowed if s not in self.pictures and s not in taken), None)

    @torch.no_grad()
    def join(self, slot: int, picture: QueuedPicture) -> None:
        """Begin to sample a picture; if that fails, it has the error."""
        pipe, settings = self.pipeline, picture.settings
        prompts = [] if picture.prompt is None else [picture.prompt]
        given = arguments_for(pipe.classes, [picture.label], prompts)
        if settings.negative_prompt is not None:
            given["negative_prompt"] = settings.negative_prompt
        picture.since = time.monotonic()
        try:
            conditions, _ = pipe.conditions(Inputs.of(given), 1)
            self.batch.join(
                slot,
                conditions.value,
                picture_generator(picture.seed, 0),
                conditions.negative,
                **pipe.sampling_options(settings.keywords),
            )
        except Exception as error:
            _fail([picture], error)
        else:
            self.pictures[slot] = picture

    def drop_cancelled(self) -> None:
        """Empty the slots of pictures for which nobody waits any more."""
        for slot, picture in list(self.pictures.items()):
            if picture.result.cancelled():
                self.batch.leave(slot)
                del self.pictures[slot]

    @torch.no_grad()
    def step(self) -> dict[QueuedPicture, Image.Image | Exception]:
        """Sample a code of every picture; those that are finished or failed, which leave."""
        found: dict[int, Tensor | Exception] = {}
        try:
            if self.pictures:
                found |= self.batch.step()
        except Exception as error:
            found |= dict.fromkeys(self.pictures, error)
            self.batch.rows.clear()
        return {self.pictures.pop(slot): self._image(codes) for slot, codes in found.items()}

    def _image(self, codes: Tensor | Exception) -> Image.Image | Exception:
        if isinstance(codes, Exception):
            return codes
        try:
            return to_pil(_decoded(self.pipeline, codes[None]))[0]
        except Exception as error:  # of this picture
            return error


def _can_join(pipeline: Pipeline) -> bool:
    """Whether pictures may join a running batch of a pipeline."""
    prior = pipeline.prior
    if not isinstance(prior, NextTokenPrior) or prior.compiled_with is not None:
        return False
    return prior.in_full_precision or pipeline.device.type != "cpu"


def _decoded(pipeline: Pipeline, latents: Tensor) -> Tensor:
    """Images (B, C, H, W) in [-1, 1] on the CPU."""
    return pipeline.tokenizer.decode(latents).float().clamp(-1, 1).cpu()


def _fail(pictures: Iterable[QueuedPicture], error: Exception) -> None:
    """Log an error of pictures, and give it to those who wait for them."""
    pictures = list(pictures)
    traceback = None if isinstance(error, SmaltiError) else error
    logger.error("%d pictures failed: %s", len(pictures), error, exc_info=traceback)
    for picture in pictures:
        if picture.result.running() or picture.result.set_running_or_notify_cancel():
            picture.result.set_exception(error)


def _check_served(pipeline: Pipeline) -> None:
    """Raise `ConfigurationError` if requests cannot hold what a pipeline is conditional on."""
    prior, _ = pipeline.prior, pipeline.text_encoder  # which must load
    sources = sources_of(prior.condition_kinds, prior.config, pipeline.classes)
    for source in sources.values():
        if source.is_needed(sources) and source.argument not in REQUESTED:
            remedy = "use smalti edit" if source.argument == "image" else "call it in Python"
            raise ConfigurationError(
                f"this pipeline is {conditional_on(sources)} and needs {source.argument}, which a "
                f"request does not have: {remedy}"
            )
