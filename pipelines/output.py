"""What a pipeline returns: images in the requested form, which a notebook shows."""

import base64
import html
import io
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from smalti.data.image_io import as_picture, image_grid, to_pil
from smalti.data.latents import to_float
from smalti.data.transforms import to_tensor
from smalti.errors import GenerationError
from smalti.pipelines.conditions import integer

OutputType = Literal["pil", "np", "pt", "latent"]
MOST_SHOWN = 64  # pictures in a notebook
COLUMNS = 8  # of the grid that is shown as one picture
LEAST_SIDE = 64  # CSS pixels: smaller pictures are shown enlarged


@dataclass(repr=False)
class PipelineOutput:
    """The result of calling a pipeline."""

    images: Any  # "pil": list; "np": (B, H, W, C) in [0, 1]; "pt": (B, C, H, W) in [0, 1]; or None
    latents: Tensor  # what the prior sampled
    labels: list[int]  # class label of each image; empty without classes
    names: list[str] = field(default_factory=list)  # class name of each image, likewise
    prompts: list[str] = field(default_factory=list)  # of each image; empty without prompts

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields, in their order: images first."""
        return self.images, self.latents, self.labels, self.names, self.prompts

    def __repr__(self) -> str:
        texts = self.prompts or self.names
        shown = ", ".join(dict.fromkeys(texts))
        number = f"{len({*texts})} {'prompts' if self.prompts else 'classes'}"
        of = f" of {shown if len(shown) <= 60 else number}" * bool(shown)
        what = "latents" if self.images is None else "images"
        return f"PipelineOutput({len(self.latents)} {what}{of})"

    def pictures(self) -> list[Image.Image]:
        """The images as pictures, whatever the output type; none of latents."""
        if self.images is None:
            return []
        if isinstance(self.images, np.ndarray):
            return [as_picture((image * 255).round().astype("uint8")) for image in self.images]
        return to_pil(self.images * 2 - 1) if isinstance(self.images, Tensor) else self.images

    def _repr_html_(self) -> str | None:
        """The pictures with their prompts or classes, for a notebook."""
        pictures = self.pictures()
        if not pictures:
            return None
        names = self.prompts or self.names or [""] * len(pictures)
        shown = zip(pictures[:MOST_SHOWN], names, strict=False)
        figures = "".join(_figure(picture, name) for picture, name in shown)
        more = len(pictures) - MOST_SHOWN
        rest = f"<p>and {more} more</p>" if more > 0 else ""
        return f'<div style="display:flex;flex-wrap:wrap;gap:4px">{figures}</div>{rest}'

    def _repr_png_(self) -> bytes | None:
        """The first pictures in one grid, where a notebook shows no HTML."""
        pictures = self.pictures()[:MOST_SHOWN]
        if not pictures:
            return None
        images = to_float(torch.stack([to_tensor(picture) for picture in pictures]))
        return png_of(image_grid(images, min(COLUMNS, len(images))))


def check_output(output_type: str, batch_size: int | None) -> None:
    """Raise `GenerationError` unless these are arguments of a call of a pipeline."""
    if output_type not in get_args(OutputType):
        raise GenerationError(
            f'output_type is "{output_type}"; choose one of {", ".join(get_args(OutputType))}'
        )
    if batch_size is not None and integer("batch_size", batch_size) < 1:
        raise GenerationError(f"batch_size is {batch_size}; it must be at least 1")


def as_output(images: Tensor, output_type: OutputType) -> list[Image.Image] | np.ndarray | Tensor:
    """Images (B, C, H, W) in [-1, 1] -> the requested output type."""
    if output_type == "pil":
        return to_pil(images)
    unit = (images + 1) / 2
    return unit if output_type == "pt" else unit.permute(0, 2, 3, 1).numpy()


def _figure(picture: Image.Image, name: str) -> str:
    """An HTML figure: the picture, and the name of its class below it."""
    data = base64.b64encode(png_of(picture)).decode()
    width = max(picture.width, LEAST_SIDE)
    caption = html.escape(name)
    return (
        f'<figure style="margin:0;width:{width}px"><img width="{width}" alt="{caption}" '
        f'style="image-rendering:pixelated" src="data:image/png;base64,{data}">'
        f'<figcaption style="font-size:small;overflow-wrap:anywhere">{caption}</figcaption>'
        "</figure>"
    )


def png_of(picture: Image.Image) -> bytes:
    """The content of a PNG file."""
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()
