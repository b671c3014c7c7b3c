"""Tasks of image-conditional flow priors: what picture is given, and how it becomes a condition.

    super-resolution   a picture of 1/factor of the size, resized to the full size
                       (latent diffusion, 2112.10752, section 4.5)
    inpainting         a picture without a region, and the mask of the region (section 4.6)

The tokenizer of the prior encodes the picture; its latents, and a mask beside them, are the
channels of an `ImageCondition`. In training a task makes the given picture of a whole one
(`degraded`), in a call of the pipeline the user gives it. A task is a small configuration that a
prior stores as text: "super-resolution:factor=4".
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from smalti.config import check_at_least
from smalti.data.image_io import to_pil
from smalti.data.latent_cache.cache import LatentBatch
from smalti.data.latent_cache.manifest import StoredCondition
from smalti.data.latent_cache.on_the_fly import Latents
from smalti.data.latents import ContinuousSpec, as_image_size, height_and_width, rounded
from smalti.data.order import Key
from smalti.data.transforms import images_of
from smalti.errors import ConfigurationError, DataError, GenerationError
from smalti.hub import Registry
from smalti.pipelines.conditions import ConditionSource, Inputs, PictureEncoder
from smalti.pipelines.editing import A_MASK, Edit, Size, image_of, masked, regions, separate
from smalti.prior.base import Prior
from smalti.prior.conditions.base import Condition, ConditionKind
from smalti.prior.conditions.image import ImageCondition, ImageConfig, ImageKind
from smalti.tokenizer.base import Tokenizer

IMAGE_TASKS = Registry(
    "image task",
    {
        "super-resolution": "smalti.pipelines.image_tasks:SuperResolution",
        "inpainting": "smalti.pipelines.image_tasks:Inpainting",
    },
)


Masked = tuple[Image.Image, Image.Image | None]  # a picture and its mask


@dataclass(frozen=True)
class Given:
    """What a task is given for each sample."""

    images: Tensor  # (B, C, H', W') in [-1, 1]
    mask: Tensor | None = None  # (B, 1, H, W) of 0 and 1; 1 where the picture is to be painted


class ImageTask(ABC):
    """What picture is given to a prior, and how it is encoded."""

    # How many degraded versions of each view of a training picture a latent cache holds.
    versions: ClassVar[int] = 1
    takes_mask: ClassVar[bool] = False

    @property
    def text(self) -> str:
        """The task as `make_task` reads it, with all options."""
        options = [(f.name, getattr(self, f.name)) for f in fields(self) if f.name != "kind"]  # type: ignore[arg-type]
        listed = ",".join(f"{name}={value}" for name, value in options)
        return IMAGE_TASKS.name_of(type(self)) + (f":{listed}" if listed else "")

    def sizes(self, full: Size) -> tuple[Size, ...]:
        """Height and width that a given picture may have, for samples of the full size."""
        return (full,)

    def channels(self, spec: ContinuousSpec) -> int:
        """Channels of the condition: those of the latents, and one for a mask."""
        return spec.channels + self.takes_mask

    @abstractmethod
    def degraded(self, images: Tensor, keys: Sequence[tuple[int, int]]) -> Given:
        """What a user would give, made of whole pictures (B, C, H, W) in [-1, 1].

        Args:
            keys: (epoch, index) of each sample, of which random choices are a pure function.
        """

    @abstractmethod
    def condition(self, tokenizer: Tokenizer, given: Given) -> ImageCondition:
        """The condition of a prior, on the device of the tokenizer."""

    @abstractmethod
    def shown(self, rows: Sequence[Masked], full: Size) -> list[list[Image.Image]]:
        """For each picture, the original and what is given of it, in the full size: the start of
        the row of a strip."""


def make_task(task: "str | Mapping[str, Any] | ImageTask") -> ImageTask:
    """A task by name, with options, "super-resolution:factor=2"; a task is returned as it is.

    Raises:
        SmaltiError: unknown task or option, or a wrong value.
    """
    return task if isinstance(task, ImageTask) else IMAGE_TASKS.configured(task)


def encoded(tokenizer: Tokenizer, images: Tensor) -> Tensor:
    """The latents of images (B, C, H, W) in [-1, 1], the mean of their posterior."""
    weight = tokenizer.last_layer
    return tokenizer.encode(images.to(weight.device, weight.dtype)).float()


# -- super-resolution -----------------------------------------------------------------------------


def resized(images: Tensor, height: int, width: int) -> Tensor:
    """Images (B, C, H, W) in [-1, 1] at another size: bicubic, antialiased, rounded to 8 bits."""
    size = (height, width)
    return rounded(F.interpolate(images.float(), size, mode="bicubic", antialias=True))


@dataclass(frozen=True)
class SuperResolution(ImageTask):
    """From 1/factor of the height and width to all of it. A picture of the full size is reduced
    first."""

    factor: int = 4
    kind: Literal["super-resolution"] = "super-resolution"

    def __post_init__(self) -> None:
        check_at_least(2, self, "factor")

    def small_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the given pictures of a prior for pictures of this size.

        Raises:
            ConfigurationError: a side is not divisible by the factor.
        """
        if height % self.factor or width % self.factor:
            raise ConfigurationError(
                f"pictures of {height} x {width} pixels cannot be reduced by {self.factor}: choose "
                "a factor that divides both sides, --image_task super-resolution:factor=2"
            )
        return height // self.factor, width // self.factor

    def sizes(self, full: Size) -> tuple[Size, ...]:
        return self.small_size(*full), full

    def degraded(self, images: Tensor, keys: Sequence[tuple[int, int]]) -> Given:
        del keys
        return Given(resized(images, *self.small_size(*images.shape[2:])))

    def condition(self, tokenizer: Tokenizer, given: Given) -> ImageCondition:
        full = height_and_width(tokenizer.image_size)
        small = resized(given.images, *self.small_size(*full))
        return ImageCondition(encoded(tokenizer, resized(small, *full)))

    def shown(self, rows: Sequence[Masked], full: Size) -> list[list[Image.Image]]:
        """The original if all pictures have the full size, the pixels of the small picture, and its
        bicubic enlargement."""
        whole = all((picture.height, picture.width) == full for picture, _ in rows)
        return [self._shown(picture, full, whole) for picture, _ in rows]

    def _shown(self, picture: Image.Image, full: Size, whole: bool) -> list[Image.Image]:
        images = images_of(picture, as_image_size((picture.height, picture.width)))
        small = resized(images, *self.small_size(*full))
        pixels = F.interpolate(small, full, mode="nearest")
        return [*([picture] if whole else []), *to_pil(torch.cat([pixels, resized(small, *full)]))]


# -- inpainting -----------------------------------------------------------------------------------

GREY = 0.0  # value of pixels to be painted in the picture that is encoded


@dataclass(frozen=True)
class Inpainting(ImageTask):
    """From the pixels outside a mask to all of them."""

    kind: Literal["inpainting"] = "inpainting"

    # A mask is drawn once for each of them: a training set of N pictures with `flip` has 8 N masks.
    versions: ClassVar[int] = 4
    takes_mask: ClassVar[bool] = True

    def degraded(self, images: Tensor, keys: Sequence[tuple[int, int]]) -> Given:
        height, width = images.shape[2:]
        masks = [random_mask(0, epoch, index, height, width) for epoch, index in keys]
        return Given(images, torch.stack(masks).to(images))

    def condition(self, tokenizer: Tokenizer, given: Given) -> ImageCondition:
        assert given.mask is not None
        latents = encoded(tokenizer, torch.where(given.mask > 0.5, GREY, given.images))
        mask = mask_of_latents(given.mask, latents).to(latents)
        return ImageCondition(torch.cat([latents, mask], 1))

    def shown(self, rows: Sequence[Masked], full: Size) -> list[list[Image.Image]]:
        """The original, and the same with grey inside the mask."""
        del full
        return [[picture, masked(picture, mask)] for picture, mask in rows if mask is not None]


def mask_of_latents(mask: Tensor, latents: Tensor) -> Tensor:
    """A mask (B, 1, H, W) of pixels at the positions of latents, (B, 1, h, w): 1 where a pixel of
    the position is to be painted."""
    return F.adaptive_max_pool2d(mask.float(), tuple(latents.shape[2:]))


def random_mask(seed: int, epoch: int, index: int, height: int, width: int) -> Tensor:
    """A random region of boxes or brush strokes, (1, height, width), 1 inside and 0 outside: a pure
    function of the arguments.

    The mixture of LaMa (2109.07161, section 2.3): rectangles of any aspect ratio, or wide strokes
    along polygonal chains.
    """
    key = f"{seed}/mask/{epoch}/{index}".encode()
    digest = hashlib.blake2b(key, digest_size=16).digest()
    random = np.random.default_rng(int.from_bytes(digest, "big"))
    canvas = Image.new("L", (width, height))
    draw, sides = ImageDraw.Draw(canvas), np.array([width, height])
    if random.random() < 0.5:
        for _ in range(random.integers(1, 3)):
            extent = np.ceil(random.uniform(0.2, 0.6, 2) * sides)
            start = np.floor(random.uniform(0, 1, 2) * (sides - extent + 1))
            draw.rectangle([*start, *(start + extent - 1)], fill=255)
    else:
        for _ in range(random.integers(1, 4)):
            points = [tuple(random.uniform(0, 1, 2) * sides) for _ in range(random.integers(2, 5))]
            radius = random.uniform(0.04, 0.12) * min(height, width)
            draw.line(points, fill=255, width=max(1, round(2 * radius)))
            for x, y in points:
                draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=255)
    return torch.from_numpy(np.array(canvas)[None] > 127).float()


# -- the condition of a call, and that of a latent cache ------------------------------------------


def image_condition(tokenizer: Tokenizer, config: ImageConfig, inputs: Inputs) -> ImageCondition:
    """The condition of the pictures that a pipeline is given, encoded one by one, so that none
    depends on another.

    Raises:
        GenerationError: a picture or a mask is missing, or is not a part of the task.
        DataError: a picture or a mask has another size, or values outside its range.
    """
    if not config.task:
        raise GenerationError(
            "this prior was trained on pictures of an unknown task: call prior.sample in Python"
        )
    task = make_task(config.task)
    _check_inputs(task, inputs)
    full = height_and_width(tokenizer.image_size)
    images = [image_of(tokenizer, each, *task.sizes(full)) for each in separate(inputs.image)]
    masks: list[Tensor | None] = [None]
    if task.takes_mask:
        masks = list(regions(inputs.mask_image, full).float().to(images[0].device).split(1))
    count = max(len(images), len(masks))
    if {len(images), len(masks)} - {1, count}:
        raise GenerationError(
            f"{len(images)} images and {len(masks)} masks were given: give one mask for all "
            "images, or one each"
        )
    pairs = zip(images * (count // len(images)), masks * (count // len(masks)), strict=True)
    with torch.no_grad():
        latents = [task.condition(tokenizer, Given(*pair)).latents for pair in pairs]
    return ImageCondition(torch.cat(latents))


def with_image_condition(
    tokenizer: Tokenizer, prior: Prior, inputs: Inputs
) -> tuple[Inputs, Edit | None]:
    """The inputs of an image-conditional pipeline with the encoded image; and, with a mask, what
    keeps the known latents."""
    encoded = image_condition(tokenizer, prior.config.image, inputs)
    edit = None if inputs.mask_image is None else Edit.of(tokenizer, prior, inputs)
    return replace(inputs, encoded_image=encoded), edit


def _check_inputs(task: ImageTask, inputs: Inputs) -> None:
    name = IMAGE_TASKS.name_of(type(task))
    if inputs.image is None or not separate(inputs.image):
        raise GenerationError(f"this pipeline does {name}: pass image, or use smalti edit --image")
    if task.takes_mask and inputs.mask_image is None:
        raise GenerationError(
            f"this pipeline does {name}: pass {A_MASK}, white where it is to paint"
        )
    if not task.takes_mask and inputs.mask_image is not None:
        raise GenerationError(f"this pipeline does {name}: leave out {A_MASK}")
    if inputs.strength is not None:
        raise GenerationError(
            f"strength is {inputs.strength}, but this pipeline is conditional on pictures: leave "
            "it out"
        )


IMAGE = "image"  # the condition of a latent cache that holds encoded pictures


@dataclass(frozen=True)
class ImageTaskEncoder(PictureEncoder):
    """The condition of a prior of this task, made of whole pictures."""

    task: ImageTask
    tokenizer: Tokenizer

    @property
    def versions(self) -> int:
        return self.task.versions

    @property
    def stored(self) -> Sequence[StoredCondition]:
        """One condition, with the task as its recipe."""
        spec = self.tokenizer.spec
        if not isinstance(spec, ContinuousSpec):
            raise ConfigurationError(
                f"an image task needs continuous latents, not {spec.in_words}: use a KL tokenizer"
            )
        self.task.sizes(height_and_width(self.tokenizer.image_size))  # raises if it has none
        shape = self.task.channels(spec), spec.height, spec.width
        return (StoredCondition(IMAGE, shape, "float16", "view", self.task.text),)

    def of_images(self, images: Tensor, keys: Sequence[Key]) -> Mapping[str, Tensor]:
        """Conditions (B, C', h, w)."""
        given = self.task.degraded(images, keys)
        return {IMAGE: self.task.condition(self.tokenizer, given).latents}


def stored_image(latents: Latents) -> ImageConfig | None:
    """The encoded pictures that are beside latents; None if there are none."""
    found = next((c for c in latents.info.conditions if c.name == IMAGE), None)
    return None if found is None else ImageConfig(found.shape[0], found.recipe)


class ImageTaskSource(ConditionSource):
    """Pictures made of those of a data set; `image` and `mask_image` of a call, which other priors
    take to edit them."""

    Kind: ClassVar[type[ConditionKind]] = ImageKind
    ARGUMENTS: ClassVar[tuple[str, ...]] = ("image", "mask_image", "strength")
    EXCLUSIVE: ClassVar[bool] = False
    HUB_TASK: ClassVar[str] = "image-to-image"

    @classmethod
    def check_options(cls, options: Any, used: bool) -> None:
        """Raise `ConfigurationError` if no task, or an unknown one, is given."""
        if options.image_task:
            make_task(options.image_task)
        elif used:
            raise ConfigurationError(
                f"condition is {options.condition}: say of what pictures, with --image_task "
                "super-resolution or inpainting"
            )

    @classmethod
    def picture_encoder(cls, options: Any, tokenizer: Tokenizer) -> ImageTaskEncoder | None:
        """That of the task, if there is one."""
        if not options.image_task:
            return None
        return ImageTaskEncoder(make_task(options.image_task), tokenizer)

    @classmethod
    def prior_options(cls, options: Any, latents: Latents, condition: str) -> ImageConfig:
        """The pictures that are beside the latents.

        Raises:
            ConfigurationError: there are none.
        """
        if (found := stored_image(latents)) is not None:
            return found
        remedy = "give" if options.data else "use smalti encode with"
        raise ConfigurationError(
            f"condition is {condition}, but the latents of {latents.place} have no pictures beside "
            f"them: {remedy} --image_task super-resolution or inpainting"
        )

    def check_latents(self, latents: Latents, heldout: Latents | None) -> None:
        """Raise `DataError` if the pictures beside the latents are those of another task."""
        del heldout
        if (image := self.config.image) and stored_image(latents) != image:
            raise DataError(
                f"condition is {self.config.condition}, but the latents of {latents.place} have no "
                f"pictures for {image.task}: encode with --image_task {image.task}"
            )

    def of_batch(self, batch: LatentBatch) -> ImageCondition:
        return ImageCondition(batch.conditions[IMAGE])

    def check(self, inputs: Inputs, each: int) -> None:
        """Raise `GenerationError` if there is no picture."""
        del each
        if inputs.encoded_image is None:
            raise GenerationError(
                "this pipeline is conditional on pictures: pass image, or use smalti edit"
            )

    def of_call(self, inputs: Inputs) -> ImageCondition:
        assert inputs.encoded_image is not None
        return inputs.encoded_image

    def shown(self, value: Condition, tokenizer: Tokenizer) -> Tensor:
        """The pictures, without their masks, decoded."""
        given = value.latents[:, : tokenizer.spec.channels]  # type: ignore[union-attr]
        return tokenizer.decode(given.to(tokenizer.last_layer.device)).float()

    @property
    def example(self) -> str:
        task = self.config.image_task
        mask = ", mask_image=mask" if task and make_task(task).takes_mask else ""
        return f"image=picture{mask}"

    @property
    def in_words(self) -> str:
        return f"They are conditional on pictures: {self.config.image_task or 'an unknown task'}."
