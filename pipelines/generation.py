"""Batch generation that can be killed and restarted: picture i depends only on the model, the
settings, the seed, i and its label.

    out/
        000000.png  000001.png ...
        generation.json      the settings; another job may not write here
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from smalti.data.image_io import image_grid, save_png
from smalti.errors import SmaltiError
from smalti.files import first_difference, write_json
from smalti.pipelines.conditions import check_options
from smalti.pipelines.pipeline import Pipeline
from smalti.prior.base import Prior
from smalti.tokenizer.base import Tokenizer

SETTINGS = "generation.json"
SHOWN_CLASSES = 20


@dataclass(frozen=True)
class GenerationJob:
    """What decides every picture of a job."""

    model: str  # checksums of tokenizer and prior, and their precision
    labels: tuple[int, ...]  # class of each picture
    seed: int
    guidance_scale: float
    options: dict[str, Any]  # temperature, solver, ...


def picture_generator(seed: int, index: int) -> torch.Generator:
    """The generator of picture `index`: the same at any batch size and on any worker."""
    # A CPU generator keeps 32 bits of its seed. For a fixed job seed this is a bijection of the
    # index (an odd factor modulo 2^32), so no two pictures of a job share their random numbers.
    job = int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4], "big")
    return torch.Generator().manual_seed((index ^ job) * 0x9E3779B1 % 2**32)


def class_grid(
    pipeline: Pipeline, *, per_class: int = 10, seed: int = 0, scale: int = 2, **options: Any
) -> Image.Image:
    """New pictures, a row for each of the first classes, as one picture.

    Args:
        scale: enlargement, pixels per pixel.
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
    progress: Callable[[int], object] = lambda pictures: None,
    **options: Any,
) -> list[Path]:
    """Write picture i of class `labels[i]` to `folder/{i:06d}.png`; keep those already there.

    Args:
        rank, world_size, barrier: this process, all processes, and how to wait for them; each
            makes every `world_size`-th picture.
        progress: called with the number of pictures finished since the last call.

    Returns:
        The paths of all pictures, in order.

    Raises:
        SmaltiError: an option that the prior does not have; the folder holds something else, or
            pictures of a job with other settings.
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
    missing = [index for index in mine if not _is_whole(paths[index])]
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
    """What tells a model from all others, its copies in other precisions included."""
    return f"{model.checksum}/{next(model.parameters()).dtype}"


def _claim(folder: Path, job: GenerationJob) -> None:
    """Make the folder that of the job, or find that it is.

    Other processes of the job may be at it already. They write the settings before the pictures,
    so that listing first, and looking for the settings then, never takes them for strangers.
    """
    if folder.exists() and not folder.is_dir():
        raise SmaltiError(f"{folder} is a file: choose a folder")
    folder.mkdir(parents=True, exist_ok=True)
    strangers = [path for path in folder.iterdir() if not path.name.startswith(".tmp-")]
    settings, path = asdict(job), folder / SETTINGS
    if path.is_file():
        different = first_difference(path, settings)
        if different:
            raise SmaltiError(
                f"{folder} holds pictures of another job (its {different[0]} differs): "
                "choose another output folder"
            )
    elif strangers:
        raise SmaltiError(f"{folder} is not empty and holds no {SETTINGS}: choose another folder")
    else:
        write_json(path, settings)


def _is_whole(path: Path) -> bool:
    """Pictures are renamed into place when complete; one that was cut later is made again."""
    if not path.is_file():
        return False
    try:
        with Image.open(path, formats=("PNG",)) as image:
            image.verify()
        return True
    except Exception:  # decoders raise many kinds; the picture is made again
        return False
