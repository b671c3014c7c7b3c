"""Zero-shot editing: pictures and masks as the known latents of a prior.

    in-painting       what lies outside the mask is kept
    out-painting      the same, with a picture that the caller has pasted onto a larger canvas
    class editing     in-painting with another class inside the mask
    image-to-image    sampling starts from the noisy picture (flow priors)

Masks are those of Diffusers: white is generated, black is kept. A latent is kept if its whole patch
of pixels is black.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from smalti.config import ImageSize
from smalti.data.image_io import TRANSPARENT, WHITE, image_grid, to_8_bit, to_channels
from smalti.data.latents import (
    CodeSpec,
    LatentSpec,
    as_image_size,
    as_tensor,
    height_and_width,
    to_float,
)
from smalti.data.transforms import center_crop, images_of, to_tensor
from smalti.errors import DataError, GenerationError
from smalti.pipelines.conditions import Conditions, Inputs, integer
from smalti.prior.base import Prior
from smalti.tokenizer.base import Tokenizer

IMAGE_TO_IMAGE = 0.8  # strength where none is given and no mask either; Diffusers' default
THRESHOLD = 0.5  # a mask is white from this value on, in [0, 1]; Diffusers' too
SHOWN_SIDE = 96  # pixels of a picture in a strip; smaller ones are enlarged to about this
STRIP = "strip.png"  # of a folder of edited pictures: originals, conditions and results
A_MASK = "mask_image (smalti edit: --mask)"  # in messages: the argument, and the flag
Size = tuple[int, int]  # height, width

# -- pictures -------------------------------------------------------------------------------------


def separate(given: Any) -> list[Any]:
    """One picture or several, as a list: of Pillow, or tensors or arrays with or without a batch
    axis."""
    if isinstance(given, list | tuple):
        return [part for item in given for part in separate(item)]
    if isinstance(given, Tensor | np.ndarray) and given.ndim == 4:
        return list(given)
    return [given]


def known_latents(tokenizer: Tokenizer, image: Any) -> Tensor:
    """The latents of pictures, (N, ...), encoded one by one, so that none depends on another.

    Args:
        image: one or several, of the size of the tokenizer's images: of Pillow; tensors (C, H, W)
            or arrays (H, W, C) of floats in [0, 1], as a pipeline returns them, or of 8-bit values.

    Raises:
        DataError: there are none; one has another size, or values outside its range.
    """
    pictures = separate(image)
    if not pictures:
        raise DataError("image is an empty list: give at least one picture")
    with torch.no_grad():
        images = (image_of(tokenizer, each, _size(tokenizer)) for each in pictures)
        return torch.cat([tokenizer.encode(image) for image in images])


def image_of(tokenizer: Tokenizer, picture: Any, *sizes: Size) -> Tensor:
    """A picture as an image (1, C, H, W) in [-1, 1], of the channels, the device and the type of a
    tokenizer.

    Args:
        sizes: those that the picture may have.

    Raises:
        DataError: it has another size, or values outside its range.
    """
    weight = tokenizer.last_layer
    if isinstance(picture, Image.Image):
        found = picture.height, picture.width
        _check_size("the image", found, *sizes)
        images = images_of(picture, as_image_size(found), tokenizer.image_channels)
        return images.to(weight.device, weight.dtype)
    if not isinstance(picture, Tensor | np.ndarray) or picture.ndim != 3:
        raise DataError(
            f"image is {_described(picture)}: give pictures of Pillow, a tensor (B, C, H, W) or an "
            "array (B, H, W, C)"
        )
    channels_last = isinstance(picture, np.ndarray)
    values = as_tensor(picture)
    values = values.permute(2, 0, 1) if channels_last else values
    _check_size("the image", tuple(values.shape[1:]), *sizes)
    if values.dtype == torch.uint8:
        values = to_float(values)
    elif not values.is_floating_point() or not ((values >= 0) & (values <= 1)).all():
        raise DataError(
            f"the image has values from {values.min().item():.4g} to {values.max().item():.4g} of "
            f"type {values.dtype}: give floats in [0, 1], as a pipeline returns them, or uint8"
        )
    else:
        values = values * 2 - 1
    return values[None].to(weight.device, weight.dtype)


def _size(tokenizer: Tokenizer) -> Size:
    """Height and width of a tokenizer's images."""
    return height_and_width(tokenizer.image_size)


def _check_size(what: str, found: Size, *wanted: Size) -> None:
    if found not in wanted:
        takes = " or ".join(f"{width} x {height}" for height, width in wanted)
        if any(height != width for height, width in wanted):
            takes += " (width x height)"
        raise DataError(
            f"{what} has {found[1]} x {found[0]} pixels; this model takes {takes}: crop and resize "
            "it, for example with "
            "smalti.data.transforms.center_crop, or use smalti edit --resize"
        )


def _described(value: Any) -> str:
    shape = f" of shape {tuple(value.shape)}" if hasattr(value, "shape") else ""
    return f"a {type(value).__name__}{shape}"


# -- masks ----------------------------------------------------------------------------------------


def regions(mask_image: Any, size: Size) -> Tensor:
    """The regions to generate, (M, 1, H, W) bool, True where a mask is white.

    Args:
        mask_image: one mask or several: of Pillow; tensors or arrays (H, W) or (1, H, W) of bool,
            or of floats in [0, 1].

    Raises:
        DataError: there are none; one has another size, or cannot be read as black and white; one
            is white everywhere or nowhere.
    """
    found = [_region(mask, size) for mask in _separate_masks(mask_image)]
    if not found:
        raise DataError("the list of masks is empty: give at least one mask")
    for region in found:
        if not region.any():
            raise DataError(
                "the mask is black everywhere, so there is nothing to generate: paint white what is"
                " to be generated"
            )
        if region.all():
            raise DataError(
                "the mask is white everywhere, so nothing of the image is kept: paint black what is"
                " to be kept, or generate without a picture"
            )
    return torch.stack(found)


def _separate_masks(given: Any) -> list[Any]:
    if isinstance(given, Tensor | np.ndarray) and given.ndim == 3:  # (M, H, W)
        return list(given)
    return separate(given)


def _region(mask: Any, size: Size) -> Tensor:
    """One mask -> (1, H, W) bool."""
    if isinstance(mask, Image.Image):
        mask = _grey(mask)
    if not isinstance(mask, Tensor | np.ndarray) or mask.ndim not in (2, 3):
        raise DataError(
            f"a mask is {_described(mask)}: give pictures of Pillow, or a tensor (B, 1, H, W)"
        )
    values = as_tensor(mask)
    if values.ndim == 3 and values.shape[0] == 1:
        values = values[0]
    if values.ndim != 2:
        raise DataError(
            f"a mask has shape {tuple(values.shape)}: give one channel, (H, W) or (1, H, W)"
        )
    _check_size("the mask", tuple(values.shape), size)
    if values.dtype != torch.bool:
        if not ((values >= 0) & (values <= 1)).all():
            raise DataError(
                f"the mask has values from {values.min().item():.4g} to {values.max().item():.4g}: "
                "give bool, or numbers in [0, 1], where 1 is generated"
            )
        values = values >= THRESHOLD
    return values[None].cpu()


def _grey(mask: Image.Image) -> Tensor:
    """A mask of Pillow as floats (H, W) in [0, 1]."""
    if mask.mode not in ("1", "L", "P", "RGB", "LA", "RGBA"):
        raise DataError(f'the mask has the mode "{mask.mode}": save it as 8-bit grey, "L"')
    if mask.mode in ("LA", "RGBA") or "transparency" in mask.info:
        mask = mask.convert("RGBA")
        lowest: Any = mask.getchannel("A").getextrema()[0]
        if lowest < 255:
            raise DataError(
                "the mask has transparent pixels, which are neither black nor white: save it "
                'without transparency, as 8-bit grey, "L"'
            )
    return torch.from_numpy(np.asarray(mask.convert("L")).copy()) / 255


def kept_positions(region: Tensor, spec: LatentSpec) -> Tensor:
    """Which latents of images are kept, for the regions to generate, (M, 1, H, W).

    A latent of the finest grid is kept if its whole patch lies outside the region. A code of a
    coarser grid is kept if more than half of those below it are (as in VAR's demonstration).

    Returns:
        (M, L) bool for codes, (M, 1, h, w) bool for continuous latents.

    Raises:
        DataError: a mask leaves nothing to keep.
    """
    grids = spec.grids if isinstance(spec, CodeSpec) else ((spec.height, spec.width),)
    kept = F.adaptive_max_pool2d(region.float(), grids[-1]) == 0  # (M, 1, h, w)
    if not kept.flatten(1).any(1).all():
        height, width = grids[-1]
        raise DataError(
            f"the mask has white pixels in every patch of {region.shape[3] // width} x "
            f"{region.shape[2] // height} pixels, so no latent is kept: paint larger black areas"
        )
    if not isinstance(spec, CodeSpec):
        return kept
    shares = [F.adaptive_avg_pool2d(kept.double(), grid) for grid in grids]
    return torch.cat([(share > 0.5).flatten(1) for share in shares], 1)


# -- an edit --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Edit:
    """Pictures to edit, as options of a prior's `sample`: one row each, or one for all."""

    latents: Tensor  # (N, ...)
    kept: Tensor | None  # (M, ...) bool, True where latents are kept
    strength: float | None  # of the noise; None where the prior has no such option

    @classmethod
    def of(cls, tokenizer: Tokenizer, prior: Prior, inputs: Inputs) -> Self:
        """What a pipeline is given as `image`, `mask_image` and `strength`.

        Raises:
            SmaltiError: the prior cannot edit, or not so; see `known_latents` and `regions`.
        """
        image, mask_image = inputs.image, inputs.mask_image
        strength = _strength(prior, image, mask_image, inputs.strength)
        latents, kept = known_latents(tokenizer, image), None
        if mask_image is not None:
            kept = kept_positions(regions(mask_image, _size(tokenizer)), prior.spec)
        if kept is not None and len(latents) != len(kept) and 1 not in (len(latents), len(kept)):
            raise GenerationError(
                f"{len(latents)} images and {len(kept)} masks were given: give one mask for all "
                "images, or one each"
            )
        return cls(latents, kept, strength)

    @property
    def count(self) -> int:
        """Number of different edits."""
        return max(len(self.latents), 1 if self.kept is None else len(self.kept))

    def conditions(
        self, prior: Prior, inputs: Inputs, each: int, conditions: Callable[[int], Conditions]
    ) -> tuple[Conditions, int]:
        """The condition of every result, and the number of results of each edit.

        One class or prompt is for all images. Without any, a class-conditional prior with a null
        class gets that.

        Args:
            each: results of every class or prompt.
            conditions: so many of each of the inputs.
        """
        kinds = list(prior.condition_kinds)
        if kinds == ["none"]:
            each = len(conditions(each))
        elif kinds != ["class"] or inputs.has_condition or not prior.has_null_class:
            found = conditions(each)
            return (conditions(each * self.count) if len(found) == each else found), each
        each = integer("num_images_per_prompt", each)
        if each < 1:
            raise GenerationError("no images were requested: pass num_images_per_prompt >= 1")
        return Conditions(torch.full((self.count * each,), prior.num_classes)), each

    def options(self, conditions: int, each: int) -> dict[str, Any]:
        """The options of `sample` for a number of conditions, of which `each` next to each other
        belong to one edit.

        Raises:
            GenerationError: the numbers do not fit.
        """
        if self.count not in (1, conditions // each):
            raise GenerationError(
                f"{self.count} images or masks were given for {conditions // each} classes or "
                "prompts: give one of either, or one each"
            )
        found: dict[str, Any] = {"known": _spread(self.latents, conditions, each)}
        if self.kept is not None:
            found["known_mask"] = _spread(self.kept, conditions, each)
        if self.strength is not None:
            found["strength"] = self.strength
        return found


def _spread(rows: Tensor, count: int, each: int) -> Tensor:
    """One row for every sample."""
    if len(rows) == 1:
        return rows.expand(count, *rows.shape[1:])
    return rows.repeat_interleave(each, 0)


def _strength(prior: Prior, image: Any, mask_image: Any, strength: Any) -> float | None:
    """The strength of an edit; None where the prior has no such option.

    Raises:
        GenerationError: the prior cannot edit, or not so.
    """
    kind = Prior.registry.name_of(type(prior))
    takes = inspect.signature(prior.sample).parameters
    if image is None:
        given = "a mask" if mask_image is not None else "strength"
        raise GenerationError(f"{given} was given without image: give the picture to edit")
    if "known" not in takes:
        raise GenerationError(
            f"a {kind} prior cannot keep known latents: generate without a picture"
        )
    if "strength" not in takes:
        if strength is not None:
            raise GenerationError(
                f"strength is {strength}, but a {kind} prior samples codes, to which noise cannot "
                f"be added: leave out strength, and give {A_MASK}"
            )
        if mask_image is None:
            raise GenerationError(
                f"an image without a mask cannot be edited by a {kind} prior, which samples codes: "
                f"give {A_MASK}, white where it is to generate"
            )
        return None
    if strength == 1 and mask_image is None:
        raise GenerationError(
            f"at strength 1 nothing of an image stays: give {A_MASK}, or a strength below 1"
        )
    if strength is None:
        return 1.0 if mask_image is not None else IMAGE_TO_IMAGE
    return strength


# -- for commands: pictures of any size, boxes, strips --------------------------------------------


def box_mask(box: str, size: Size) -> Image.Image:
    """A mask that is white in a box, "x0,y0,x1,y1" in pixels, right and lower edge excluded.

    Args:
        size: height and width of the picture.

    Raises:
        DataError: these are not four numbers, or not those of a box inside the picture.
    """
    try:
        left, top, right, bottom = map(int, box.split(","))
    except ValueError:
        raise DataError(f'box is "{box}"; give x0,y0,x1,y1 in pixels, as in 8,8,24,24') from None
    if not (0 <= left < right <= size[1] and 0 <= top < bottom <= size[0]):
        raise DataError(
            f"box is {box}; in a picture of {size[1]} x {size[0]} pixels give x0,y0,x1,y1 with 0 <="
            f" x0 < x1 <= {size[1]} and 0 <= y0 < y1 <= {size[0]}"
        )
    mask = Image.new("L", (size[1], size[0]), 0)
    mask.paste(255, (left, top, right, bottom))
    return mask


def fitted(picture: Image.Image, mask: Image.Image | None, size: ImageSize) -> tuple[Any, Any]:
    """A picture and its mask, cropped to the centre and resized alike.

    Raises:
        DataError: they have different sizes.
    """
    if mask is None:
        return center_crop(picture, size), None
    _check_mask_of(picture, mask)
    return center_crop(picture, size), center_crop(mask.convert("L"), size)


def _check_mask_of(picture: Image.Image, mask: Image.Image) -> None:
    if picture.size != mask.size:
        raise DataError(
            f"the mask has {mask.width} x {mask.height} pixels, its picture {picture.width} x "
            f"{picture.height}: make them equal"
        )


def masked(picture: Image.Image, mask: Image.Image) -> Image.Image:
    """A picture with grey in the region to generate."""
    grey = Image.new("RGB", picture.size, (128, 128, 128)).convert(picture.mode)
    return Image.composite(grey, picture, _black_and_white(mask))


def strip(rows: list[list[Image.Image]], labels: list[str]) -> Image.Image:
    """Rows of pictures of one size as one picture.

    Args:
        labels: one for each row, written at its left; or none.
    """
    images = torch.stack([to_tensor(to_8_bit(each)) for row in rows for each in row])
    scale = max(1, SHOWN_SIDE // max(images.shape[-2:]))
    return image_grid(to_float(images), len(rows[0]), row_labels=labels, scale=scale)


def pasted(result: Image.Image, picture: Image.Image, mask: Image.Image) -> Image.Image:
    """A result with the pixels of the picture itself outside the mask, instead of decoded ones.

    Raises:
        DataError: the three are not of one size.
    """
    bands = len(result.getbands())
    same = to_channels(to_8_bit(picture, TRANSPARENT if bands == 4 else WHITE), bands)
    for name, given in (("picture", same), ("mask", mask)):
        if given.size != result.size:
            raise DataError(
                f"the {name} has {given.width} x {given.height} pixels and the result "
                f"{result.width} x {result.height}: resize it first"
            )
    return Image.composite(result, same, _black_and_white(mask))


def _black_and_white(mask: Image.Image) -> Image.Image:
    table = [255 * (value >= 255 * THRESHOLD) for value in range(256)]
    return mask.convert("L").point(table)
