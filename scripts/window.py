"""What the window of `smalti ui` computes: pipelines and settings in, pictures out; no widgets.

Settings      the classes, prompt, number, seed and sampling options of a call
live          a call of a pipeline, with previews while it runs
reconstructed a picture, its codes, and what the decoder makes of them
interpolated  from one picture to another through latent space
inpainted     a region of a picture, generated
RunView       the curves and pictures of a run
"""

import colorsys
import contextlib
import math
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from smalti.data.image_io import (
    TRANSPARENT,
    WHITE,
    FolderOptions,
    Unusable,
    decode,
    image_grid,
    to_8_bit,
    to_channels,
    to_pil,
)
from smalti.data.latents import CodeSpec, to_float
from smalti.data.transforms import center_crop, to_tensor
from smalti.errors import ConfigurationError, DataError, GenerationError
from smalti.evaluation.reconstruction import psnr
from smalti.pipelines.editing import fitted, masked, pasted
from smalti.pipelines.generation import picture_generator
from smalti.pipelines.pipeline import Pipeline
from smalti.prior.flow.solvers.base import SOLVERS
from smalti.prior.flow.solvers.schedules import SCHEDULES
from smalti.prior.registry import PRIORS
from smalti.prior.sampling import GUIDANCE_SCHEDULES
from smalti.scripts.options import SampleOption, sample_options
from smalti.tokenizer import manipulation
from smalti.tokenizer.base import Tokenizer
from smalti.training.report import IMAGE_FOLDERS, charts

MAX_IMAGES = 64  # pictures of a call
MAX_BLENDS = 32  # pictures of an interpolation
MAX_STEPS = 1000  # of a flow prior's solver
MAX_SEED = 2**53  # a browser's integers are exact below
PREVIEWS = 24  # of a call; a preview decodes, and for a flow prior runs the network once
SHOWN_SIDE = 128  # pixels: codes and pictures that are smaller are enlarged to about this
GOLDEN = 0.618034  # neighbouring codes get hues far apart
SHOWN_DEVIATIONS = 3  # a channel of latents is grey from -3, black, to 3, white
NO_PICTURE = "there is no picture: drop one into the field, or click it to upload one"
CHOICES = {"solver": SOLVERS, "schedule": SCHEDULES, "guidance_schedule": GUIDANCE_SCHEDULES}


@dataclass(frozen=True)
class Settings:
    """What a user has set; None or empty: not given.

    Raises:
        GenerationError: the number of pictures or of steps, or the seed, is out of range.
    """

    classes: Sequence[str] = ()  # names
    prompt: str = ""
    negative_prompt: str = ""
    number: int = 4  # pictures of each class, or of the prompt
    seed: int = 0  # of the call; picture i of `smalti generate` has the same random numbers
    guidance_scale: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)  # of the prior's `sample`

    def __post_init__(self) -> None:
        total = self.number * max(1, len(self.classes))
        if not 1 <= total <= MAX_IMAGES:
            raise GenerationError(f"{total} pictures are asked for: choose 1 to {MAX_IMAGES}")
        if not 0 <= self.seed < MAX_SEED:
            raise GenerationError(f"the seed is {self.seed}; it must lie in [0, 2^53)")
        steps = self.options.get("num_inference_steps") or 1
        if steps > MAX_STEPS:
            raise GenerationError(f"num_inference_steps is {steps}; use at most {MAX_STEPS}")

    def keywords(self, pipeline: Pipeline) -> dict[str, Any]:
        """The arguments of a call of a pipeline."""
        conditions = pipeline.prior.config
        given: dict[str, Any] = {"guidance_scale": self.guidance_scale, **self.options}
        if pipeline.classes:
            given["class_labels"] = list(self.classes) or list(pipeline.classes[:1])
        if conditions.text is not None:
            given["prompt"] = self.prompt
            given["negative_prompt"] = self.negative_prompt or None
        given["num_images_per_prompt" if conditions.conditions else "num_images"] = self.number
        count = self.number * len(given.get("class_labels", [""]))
        given["generator"] = [picture_generator(self.seed, index) for index in range(count)]
        return given


def options_of(pipeline: Pipeline) -> list[SampleOption]:
    """The sampling options of a pipeline's prior, but guidance_scale."""
    kind = PRIORS.name_of(type(pipeline.prior))
    found = (option for option in sample_options() if option.prior == kind)
    return [option for option in found if option.name != "guidance_scale"]


def option_value(option: SampleOption, given: Any) -> Any:
    """The value of a widget as the prior takes it; None if the widget is empty.

    Raises:
        GenerationError: an interval is not two numbers.
    """
    if given is None or given == "":
        return None
    if option.type in (bool, int, float, str):
        return option.type(given)
    try:
        low, high = map(float, str(given).replace(",", " ").split())
    except ValueError:
        raise GenerationError(
            f"{option.name} is {given}: give two numbers, as in 0.2 0.8"
        ) from None
    return low, high


# -- Sampling, with previews --


@dataclass(frozen=True)
class Frame:
    """What a call has reached."""

    pictures: list[Image.Image]
    captions: list[str]  # of each picture; "" if it has none
    done: float  # share of the steps; 1 of a finished call
    is_last: bool = False  # of its call: with done < 1, the call was stopped


def live(pipeline: Pipeline, **keywords: Any) -> Iterator[Frame]:
    """Call a pipeline with these arguments: previews while it samples, then the result.

    The pipeline runs in a thread. If the iterator is closed before its end, sampling ends after the
    step that is running.

    Raises:
        SmaltiError: that of the call.
    """
    frames: queue.SimpleQueue[Frame | BaseException | None] = queue.SimpleQueue()
    closed = threading.Event()
    reached = 0.0

    def show(pipe: Pipeline, step: int, done: float, tensors: dict[str, Any]) -> None:
        nonlocal reached
        reached = done
        if closed.is_set():
            pipe.interrupt = True
        before = done - done / (step + 1)
        if done < 1 and math.floor(done * PREVIEWS) > math.floor(before * PREVIEWS):
            images = pipe.preview(tensors["latents"])
            frames.put(Frame(to_pil(images * 2 - 1), [""] * len(images), done))

    def work() -> None:
        try:
            made = pipeline(callback_on_step_end=show, **keywords)
            captions = made.names or made.prompts or [""] * len(made.images)
            done = reached if pipeline.interrupt else 1.0
            frames.put(Frame(made.images, captions, done, is_last=True))
            frames.put(None)
        except BaseException as error:  # raised again in the thread that iterates
            frames.put(error)

    thread = threading.Thread(target=work, name="sampling", daemon=True)
    thread.start()
    try:
        while (found := frames.get()) is not None:
            if isinstance(found, BaseException):
                raise found
            yield found
    finally:
        closed.set()
        thread.join()


def side_by_side(
    first: Pipeline, second: Pipeline, settings: Settings
) -> Iterator[tuple[Frame, Frame | None]]:
    """Two pipelines, one after the other, with the same classes or prompts and the same seeds. If
    the first one is stopped, the second one does not begin.

    The sampling options of the settings are for the first prior; the second one takes those that
    it has, too.

    Raises:
        SmaltiError: that of a call.
    """
    left = Frame([], [], 0.0)
    for left in live(first, **settings.keywords(first)):
        yield left, None
    if left.done < 1:
        return
    known = {option.name for option in options_of(second)}
    shared = {name: value for name, value in settings.options.items() if name in known}
    given = replace(settings, options=shared).keywords(second)
    for right in live(second, **given):
        yield left, right


# -- Pictures in, pictures out --


def uploaded(file: Path | None) -> Image.Image:
    """The picture in an uploaded file, with alpha; of one that moves the first frame.

    Raises:
        DataError: there is none, it cannot be decoded, or it is too large.
    """
    if file is None:
        raise DataError(NO_PICTURE)
    options = FolderOptions(unusual_images="convert", min_side=1, background=TRANSPARENT)
    try:
        return decode(file, options).image
    except Unusable as problem:
        raise DataError(f"{file.name} {problem}") from problem


def image_of(tokenizer: Tokenizer, picture: Image.Image) -> Tensor:
    """An uploaded picture as an image (1, C, H, W) in [-1, 1] of a tokenizer."""
    image = to_float(to_tensor(cropped(tokenizer, picture))[None])
    return image.to(tokenizer.last_layer.device)


def cropped(tokenizer: Tokenizer, picture: Image.Image) -> Image.Image:
    """The centre of an uploaded picture, of the size and the channels of a tokenizer's images."""
    return center_crop(_in_channels(picture, tokenizer.image_channels), tokenizer.image_size)


def _in_channels(picture: Image.Image, channels: int) -> Image.Image:
    """On white, unless images of so many channels have alpha."""
    return to_channels(to_8_bit(picture, TRANSPARENT if channels == 4 else WHITE), channels)


@dataclass(frozen=True)
class Reconstructed:
    """A picture after the tokenizer's encoder and decoder."""

    original: Image.Image
    codes: Image.Image
    reconstruction: Image.Image
    words: str  # PSNR, and what the latents are


@torch.no_grad()
def reconstructed(pipeline: Pipeline, picture: Image.Image) -> Reconstructed:
    """Encode and decode a picture."""
    tokenizer = pipeline.tokenizer
    images = image_of(tokenizer, picture)
    latents = tokenizer.encode(images)
    decoded = tokenizer.decode(latents).float().clamp(-1, 1)
    ratio = psnr(decoded, images).item()
    words = f"PSNR {ratio:.2f} dB from {tokenizer.spec.in_words}"
    pictures = [enlarged(to_pil(each.cpu())[0]) for each in (images, decoded)]
    return Reconstructed(pictures[0], shown_latents(tokenizer, latents), pictures[1], words)


def shown_latents(tokenizer: Tokenizer, latents: Tensor) -> Image.Image:
    """The latents of one image: each grid of codes, a colour for each code; or each channel in
    grey."""
    spec = tokenizer.spec
    if isinstance(spec, CodeSpec):
        parts = latents[0].cpu().split(spec.lengths)
        grids = [part.view(grid).numpy() for part, grid in zip(parts, spec.grids, strict=True)]
        return _row([enlarged(Image.fromarray(code_colours(grid))) for grid in grids])
    values = latents[0].float().cpu()[:, None] / SHOWN_DEVIATIONS  # (C, 1, h, w)
    scale = max(1, SHOWN_SIDE // 2 // max(values.shape[-2:]))
    columns = math.ceil(math.sqrt(len(values)))
    return image_grid(values.clamp(-1, 1), columns, scale=scale, padding=1)


def code_colours(codes: np.ndarray) -> np.ndarray:
    """A colour for each code: (h, w) integers -> (h, w, 3) uint8."""
    different, places = np.unique(codes, return_inverse=True)
    colours = [
        colorsys.hsv_to_rgb(code * GOLDEN % 1, 0.45 + 0.15 * (code % 4), 0.95 - 0.12 * (code % 5))
        for code in different.tolist()
    ]
    table = (np.array(colours) * 255).round().astype(np.uint8)
    return table[places.reshape(codes.shape)]


def enlarged(picture: Image.Image, side: int = SHOWN_SIDE) -> Image.Image:
    """A small picture with each pixel as a square; a large one as it is."""
    scale = max(1, side // max(picture.size))
    size = (picture.width * scale, picture.height * scale)
    return picture.resize(size, resample=Image.Resampling.NEAREST)


def _row(pictures: Sequence[Image.Image], gap: int = 6) -> Image.Image:
    width = sum(picture.width + gap for picture in pictures) - gap
    row = Image.new("RGB", (width, max(picture.height for picture in pictures)), "white")
    left = 0
    for picture in pictures:
        row.paste(picture, (left, 0))
        left += picture.width + gap
    return row


@torch.no_grad()
def interpolated(
    pipeline: Pipeline, first: Image.Image, second: Image.Image, steps: int
) -> Image.Image:
    """The originals, and between them the blends on a line and on an arc, a row each.

    Raises:
        ConfigurationError: there are too few or too many steps.
    """
    if not 2 <= steps <= MAX_BLENDS:
        raise ConfigurationError(f"steps is {steps}; use 2 to {MAX_BLENDS}")
    tokenizer = pipeline.tokenizer
    images = torch.cat([image_of(tokenizer, picture) for picture in (first, second)])
    start, end = tokenizer.vectors(tokenizer.encode(images)).split(1)
    discrete = isinstance(tokenizer.spec, CodeSpec)
    arc = manipulation.spherical if discrete else manipulation.spherical_as_one
    rows = []
    for blend in (manipulation.linear, arc):
        path = manipulation.interpolate(start, end, steps, blend)[0]
        rows += [images[:1], tokenizer.decode_vectors(path).float().clamp(-1, 1), images[1:]]
    scale = max(1, 96 // max(images.shape[-2:]))
    labels = ["linear", "spherical"]
    return image_grid(torch.cat(rows).cpu(), steps + 2, row_labels=labels, scale=scale)


def painted(layers: Sequence[Image.Image]) -> Image.Image:
    """The mask of what was painted: white where a layer of an editor is not transparent.

    Raises:
        DataError: nothing was painted.
    """
    if not any(np.asarray(layer.getchannel("A")).any() for layer in layers):
        raise DataError("nothing is painted: paint over what is to be generated")
    alpha = np.max([np.asarray(layer.getchannel("A")) for layer in layers], axis=0)
    return Image.fromarray(np.where(alpha > 0, 255, 0).astype(np.uint8))


def inpainted(
    pipeline: Pipeline,
    picture: Image.Image | None,
    layers: Sequence[Image.Image],
    settings: Settings,
) -> Iterator[Frame]:
    """The painted region of a picture, generated; the first frame is what the pipeline is given.

    Raises:
        SmaltiError: there is no picture, nothing is painted, or that of the call.
    """
    if picture is None:
        raise DataError(NO_PICTURE)
    whole = _in_channels(picture, pipeline.tokenizer.image_channels)
    image, mask = fitted(whole, painted(layers), pipeline.tokenizer.image_size)
    yield Frame([masked(image, mask)], ["given"], 0.0)
    for frame in live(pipeline, image=image, mask_image=mask, **settings.keywords(pipeline)):
        results = [pasted(each, image, mask) for each in frame.pictures]
        yield replace(frame, pictures=results)


# -- Runs --


@dataclass(frozen=True)
class RunView:
    """The state of a run's folder."""

    curves: str  # HTML: the last values, and a chart for each value of metrics.jsonl
    previews: list[tuple[Image.Image, str]]  # the newest of samples/ and reconstructions/


def run_view(folder: Path) -> RunView:
    """Read a run's folder, while it trains or later. A folder that is not there yet has none."""
    drawn = "\n".join(charts(folder))
    if "<svg" not in drawn:
        drawn = f"<p>There are no metrics in {folder.name} yet.</p>"
    return RunView(drawn, [*_newest(folder)])


def _newest(folder: Path) -> Iterator[tuple[Image.Image, str]]:
    for name in IMAGE_FOLDERS:
        for file in sorted((folder / name).glob("*.png"))[-1:]:
            with contextlib.suppress(DataError):  # it is being written; the next refresh shows it
                yield uploaded(file), f"{name}, {file.stem}"
