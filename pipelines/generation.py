"""Batch generation that can be killed and restarted: image i depends only on the model, the
settings, the seed, i and its class label.

    out/
        generation.json             the settings of the job; another job is refused
        000000.png  000001.png ...
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from smalti.data.image_io import image_grid, save_png
from smalti.errors import GenerationError
from smalti.files import first_difference, write_json
from smalti.pipelines.conditions import check_options
from smalti.pipelines.pipeline import Pipeline
from smalti.prior.base import Prior
from smalti.tokenizer.base import Tokenizer

SETTINGS = "generation.json"
SHOWN_CLASSES = 20  # rows of a class grid, at most


@dataclass(frozen=True)
class GenerationJob:
    """Everything that the images of a job depend on."""

    model: str  # checksums of tokenizer and prior, and their precision
    labels: tuple[int, ...]  # class label of each image
    seed: int
    guidance_scale: float
    options: dict[str, Any]  # temperature, solver, ...


def picture_generator(seed: int, index: int) -> torch.Generator:
    """The generator of image `index`: the same at any batch size and in any process."""
    # A CPU generator uses 32 bits of its seed. For a fixed job seed this is a bijection of the
    # index (an odd factor modulo 2^32), so no two images of a job share their random numbers.
    job = int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4], "big")
    return torch.Generator().manual_seed((index ^ job) * 0x9E3779B1 % 2**32)


def class_grid(
    pipeline: Pipeline, *, per_class: int = 10, seed: int = 0, scale: int = 2, **options: Any
) -> Image.Image:
    """Newly generated images in one grid, a row for each of the first classes.

    Args:
        scale: an integer by which images are enlarged.
        options: of the pipeline: `guidance_scale`, `temperature`, `solver`, ...
    """
    shown = range(min(len(pipeline.classes), SHOWN_CLASSES))
    generators = [picture_generator(seed, i) for i in range(len(shown) * per_class)]
    output = pipeline(
        list(shown),
        num_images_per_prompt=per_class,
        generator=generators,
        output_type="pt",
        batch_size=128,
        **options,
    )
    names = [pipeline.classes[i] for i in shown]
    return image_grid(output.images * 2 - 1, per_class, row_labels=names, scale=scale)


def generate_folder(
    pipeline: Pipeline,
    folder: Path,
    labels: Sequence[int],
    *,
    seed: int,
    guidance_scale: float,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] = lambda: None,
    progress: Callable[[int], object] = lambda images: None,
    **options: Any,
) -> list[Path]:
    """Write image i of class `labels[i]` to `folder/{i:06d}.png`; keep those already there.

    Args:
        rank, world_size, barrier: the index of this process, the number of processes, and a
            function that waits for all of them; each generates every `world_size`-th image.
        progress: called with the number of images finished since the last call.

    Returns:
        The paths of all images, in order.

    Raises:
        GenerationError: the prior does not have an option; the folder contains other files, or
            images of a job with other settings.
    """
    check_options(pipeline.prior, {"guidance_scale": guidance_scale, **options})
    job = GenerationJob(
        model="/".join(map(_exact_name, (pipeline.tokenizer, pipeline.prior))),
        labels=tuple(labels),
        seed=seed,
        guidance_scale=guidance_scale,
        options=dict(sorted(options.items())),
    )
    try:
        if rank == 0:
            _claim(folder, job)
    finally:
        barrier()
    _claim(folder, job)
    paths = [folder / f"{index:06d}.png" for index in range(len(labels))]
    mine = range(rank, len(labels), world_size)
    missing = [index for index in mine if not _is_complete(paths[index])]
    progress(len(mine) - len(missing))
    for start in range(0, len(missing), batch_size):
        part = missing[start : start + batch_size]
        output = pipeline(
            [labels[index] for index in part],
            guidance_scale=guidance_scale,
            generator=[picture_generator(seed, index) for index in part],
            **options,
        )
        for index, image in zip(part, output.images, strict=True):
            save_png(paths[index], image)
        progress(len(part))
    return paths


def _exact_name(model: Tokenizer | Prior) -> str:
    """Checksum and precision: a copy of a model in another precision is another model."""
    return f"{model.checksum}/{next(model.parameters()).dtype}"


def _claim(folder: Path, job: GenerationJob) -> None:
    """Write the settings of the job into the folder, or check those that are there.

    Other processes of the job may be writing already. They write the settings before any image;
    so this function lists the files first and looks for the settings second: otherwise it could
    take their images for foreign files.
    """
    if folder.exists() and not folder.is_dir():
        raise GenerationError(f"{folder} is a file: choose a folder")
    folder.mkdir(parents=True, exist_ok=True)
    foreign = [path for path in folder.iterdir() if not path.name.startswith(".tmp-")]
    settings, path = asdict(job), folder / SETTINGS
    if path.is_file():
        different = first_difference(path, settings)
        if different:
            raise GenerationError(
                f"{folder} holds images of another job (its {different[0]} differs): "
                "choose another output folder"
            )
    elif foreign:
        raise GenerationError(
            f"{folder} is not empty and holds no {SETTINGS}: choose another folder"
        )
    else:
        write_json(path, settings)


def _is_complete(path: Path) -> bool:
    """Whether a file is a complete PNG: one that was truncated later is generated again."""
    if not path.is_file():
        return False
    try:
        with Image.open(path, formats=("PNG",)) as image:
            image.verify()
        return True
    except Exception:  # decoders raise many kinds of errors
        return False
