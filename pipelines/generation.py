"""Batch generation that can be killed and restarted: image i depends only on the model, the
settings, the seed, i, and its class or prompt.

    out/
        generation.json             the settings of the job; another job is refused
        000000.png  000001.png ...  or in a folder for each class
        index.json                  file, class or prompt, and sha256 of each picture; written last

More pictures of the same job may be added. A picture that was swapped, edited or put there by
someone else does not have its hash, and is generated again.
"""

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from PIL import Image

from smalti.config import plain
from smalti.data.image_io import image_grid, save_png
from smalti.data.latent_cache.buckets import BucketedLatents
from smalti.data.latent_cache.on_the_fly import Latents
from smalti.data.latents import ContinuousSpec
from smalti.errors import GenerationError, SmaltiError
from smalti.files import first_difference, read_hashed_json, sha256_of, write_hashed_json
from smalti.folders import contents
from smalti.pipelines.conditions import BatchConditions, Inputs, arguments_for, check_options
from smalti.pipelines.guided import GuidedPipeline
from smalti.pipelines.pipeline import Pipeline
from smalti.prior.base import Prior
from smalti.prior.conditions.base import moved, part_of, repeated
from smalti.tokenizer.base import Tokenizer

logger = logging.getLogger(__name__)

Layout = Literal["flat", "class"]

SETTINGS = "generation.json"
INDEX = "index.json"
PICTURE = re.compile(r"(.+/)?\d{6,}\.png")  # file of a picture, in any layout
PART = ".index-{:05d}.jsonl"  # hashes of the pictures of one process, until the index is written

# Pictures of a job are sampled in groups of a fixed size: group g holds the pictures g n to
# (g + 1) n - 1, whichever of them are wanted. Matrix products round differently at another size,
# and elementwise functions at another position, so each picture keeps its position in its group.
POSITIONS_AT_ONCE = 512  # latent positions that a group has in one pass, at most ...
LARGEST_GROUP = 16  # ... and pictures
SHOWN_ROWS = 20  # of a grid of samples, at most
GIVEN_ROWS = 8  # of a grid of samples with their given pictures
UNNAMED_ROWS = 4  # of a grid of unconditional samples


@dataclass(frozen=True)
class GenerationJob:
    """Everything that the images of a job depend on."""

    model: str  # checksums of tokenizer and prior, and their precision
    labels: tuple[int, ...]  # class label of each image; zeros without classes
    seed: int
    guidance_scale: float
    options: dict[str, Any]  # temperature, solver, ...
    prompts: tuple[str, ...] = ()  # prompt of each image; () without prompts
    negative_prompt: str = ""

    @property
    def settings(self) -> dict[str, Any]:
        """What is stored of the job. Without prompts it is what earlier versions stored."""
        content = asdict(self)
        return {
            name: value
            for name, value in content.items()
            if value or name not in ("prompts", "negative_prompt")
        }

    def inputs(self, indices: Sequence[int], classes: Sequence[str]) -> dict[str, Any]:
        """The arguments of a pipeline for some images; a number past the last is the last one."""
        rows = [min(index, len(self.labels) - 1) for index in indices]
        prompts = [self.prompts[row] for row in rows] if self.prompts else ()
        given = arguments_for(classes, [self.labels[row] for row in rows], prompts)
        return {**given, "negative_prompt": self.negative_prompt} if prompts else given


def picture_generator(seed: int, index: int) -> torch.Generator:
    """The generator of image `index`: the same at any batch size and in any process."""
    # A CPU generator uses 32 bits of its seed. For a fixed job seed this is a bijection of the
    # index (an odd factor modulo 2^32), so no two images of a job share their random numbers.
    job = int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4], "big")
    return torch.Generator().manual_seed((index ^ job) * 0x9E3779B1 % 2**32)


def group_size(pipeline: Pipeline) -> int:
    """Pictures of a group: as many as make a pass through the prior efficient.

    A next-token prior has one position of a picture in a pass, a next-scale prior one scale, a
    flow prior all of them.
    """
    spec = pipeline.prior.spec
    if isinstance(spec, ContinuousSpec):
        positions = spec.height * spec.width
    else:
        positions = spec.length // len(spec.grids) if len(spec.grids) > 1 else 1
    return max(1, min(POSITIONS_AT_ONCE // max(positions, 1), LARGEST_GROUP))


def sample_grid(
    pipeline: Pipeline,
    *,
    prompts: Sequence[str] = (),
    per_row: int = 10,
    seed: int = 0,
    scale: int = 2,
    **options: Any,
) -> Image.Image:
    """Newly generated images in one grid: a row for each of the first classes, or of the prompts;
    rows without a name if the pipeline is unconditional.

    Args:
        prompts: for a pipeline of captions, which has no grid without them.
        scale: an integer by which images are enlarged.
        options: of the pipeline: `guidance_scale`, `temperature`, `solver`, ...
    """
    names = list(prompts or pipeline.classes or [""] * UNNAMED_ROWS)[:SHOWN_ROWS]
    labels = [row % max(len(pipeline.classes), 1) for row in range(len(names))]
    job = GenerationJob(
        model="",
        labels=tuple(label for label in labels for _ in range(per_row)),
        seed=seed,
        guidance_scale=1.0,
        options={},
        prompts=tuple(name for name in names for _ in range(per_row)) if prompts else (),
    )
    images = range(len(job.labels))
    output = pipeline(
        **job.inputs(images, pipeline.classes),
        generator=[picture_generator(seed, i) for i in images],
        output_type="pt",
        batch_size=128,
        **options,
    )
    shown = names if any(names) else ()
    return image_grid(output.images * 2 - 1, per_row, row_labels=shown, scale=scale)


def condition_grid(
    pipeline: Pipeline,
    latents: Latents,
    *,
    per_row: int = 4,
    seed: int = 0,
    scale: int = 2,
    **options: Any,
) -> Image.Image:
    """Samples of a prior with a condition that has no name, a row for each of some held-out
    pictures: what is given, if it can be shown, the samples, and the original, all decoded from
    latents.

    Args:
        latents: with the conditions beside them.
        scale, options: as for `sample_grid`.
    """
    prior, tokenizer, device = pipeline.prior, pipeline.tokenizer, pipeline.device
    if isinstance(latents, BucketedLatents):
        latents = latents.caches[0]  # on the grid of the pipeline
    batch = latents.first_view(latents.even_subset(GIVEN_ROWS, 0))
    conditions = BatchConditions(prior.config, pipeline.text_encoder, latents)
    condition = conditions(batch)
    originals = tokenizer.latents(batch.stored.to(device))
    samples = prior.sample(
        moved(repeated(condition, per_row), device),
        generator=[picture_generator(seed, i) for i in range(per_row * len(originals))],
        **pipeline.sampling_options(options),
    )
    sampled, whole = (
        torch.cat([tokenizer.decode(part).float() for part in latents.split(128)])
        for latents in (samples, originals)
    )
    shown = [
        source.shown(part_of(condition, name), tokenizer)
        for name, source in conditions.sources.items()
    ]
    given = [images for images in shown if images is not None]
    parts = [*(images.split(1) for images in given), sampled.split(per_row), whole.split(1)]
    images = torch.cat([part.to(device) for row in zip(*parts, strict=True) for part in row])
    columns = [*["given"] * len(given), *[""] * per_row, "original"]
    return image_grid(images.cpu(), len(columns), column_labels=columns, scale=scale)


def generate_folder(
    pipeline: Pipeline,
    folder: Path,
    labels: Sequence[int],
    *,
    seed: int,
    guidance_scale: float | None = None,
    batch_size: int,
    prompts: Sequence[str] = (),
    negative_prompt: str = "",
    layout: Layout = "flat",
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] = lambda: None,
    progress: Callable[[int], object] = lambda images: None,
    **options: Any,
) -> list[Path]:
    """Write image i of class `labels[i]` to `folder/{i:06d}.png`; keep those already there.

    Without classes, labels are zeros, as many as images are wanted.

    In fp32 a file is the same to the byte whichever of the others are missing, at any `batch_size`
    and on any number of processes of equal machines. The folder may hold fewer images of the same
    job: its labels are the first of `labels`.

    Args:
        batch_size: images sampled at once in half precision; in fp32 it is `group_size`, on which
            the rounding of the images depends.
        prompts: of each image, for a pipeline of captions.
        negative_prompt: what guidance leads away from, for all images; "" is no text.
        layout: "class" puts each image into a folder with the name of its class.
        rank, world_size, barrier: the index of this process, the number of processes, and a
            function that waits for all of them; each generates every `world_size`-th group.
        progress: called with the number of images finished since the last call.

    Returns:
        The paths of all images, in order.

    Raises:
        GenerationError: the prior does not have an option; the folder contains other files, or
            images of a job with other settings.
    """
    given = {"guidance_scale": guidance_scale, **options}
    options = {name: plain(value) for name, value in pipeline.sampling_options(given).items()}
    check_options(pipeline.prior, options)
    guide = pipeline.settings if isinstance(pipeline, GuidedPipeline) else {}
    job = GenerationJob(
        model="/".join(map(_exact_name, (pipeline.tokenizer, pipeline.prior))),
        labels=tuple(map(plain, labels)),
        seed=plain(seed),
        guidance_scale=options.pop("guidance_scale"),
        options=dict(sorted({**options, **guide}.items())),
        prompts=tuple(prompts),
        negative_prompt=negative_prompt,
    )
    check_conditions(pipeline, job, layout)
    _claim_together(folder, job, layout, rank, barrier)
    pictures = Pictures(folder, job, pipeline.classes, layout, rank)
    exact = pipeline.prior.in_full_precision
    size = group_size(pipeline) if exact else min(batch_size, -(-len(labels) // world_size))
    for start in range(rank * size, len(labels), world_size * size):
        group = range(start, start + size)
        wanted = [index for index in group if index < len(labels)]
        missing = [index for index in wanted if not pictures.has(index)]
        progress(len(wanted) - len(missing))
        if not missing:
            continue
        output = pipeline(
            **job.inputs(group, pipeline.classes),
            guidance_scale=job.guidance_scale,
            generator=[picture_generator(job.seed, index) for index in group],
            **options,
        )
        for index in missing:
            pictures.save(index, output.images[index - start])
        progress(len(missing))
    barrier()  # all images are written
    pictures.finish()
    barrier()
    return pictures.paths


def check_conditions(pipeline: Pipeline, job: GenerationJob, layout: Layout) -> None:
    """Raise `GenerationError` unless a pipeline takes the conditions of a job."""
    if not job.labels:
        raise GenerationError("no images were requested: give at least one label")
    if job.prompts and len(job.prompts) != len(job.labels):
        raise GenerationError(
            f"{len(job.prompts)} prompts were given for {len(job.labels)} images: give one each"
        )
    if layout == "class" and not pipeline.classes:
        raise GenerationError("layout class needs classes, and this pipeline has none: use flat")
    first = job.inputs([0], pipeline.classes)
    pipeline.conditions(Inputs(**first), 1)  # raises
    text, encoder = pipeline.prior.config.text, pipeline.text_encoder
    if job.prompts and text is not None and encoder is not None:
        texts = dict.fromkeys((*job.prompts, job.negative_prompt))
        encoder.check_captions(list(texts), text.length)  # all, before any work is done


def _exact_name(model: Tokenizer | Prior) -> str:
    """Checksum and precision: a copy of a model in another precision is another model."""
    return f"{model.checksum}/{next(model.parameters()).dtype}"


Row = TypeVar("Row")


def _continued(there: Sequence[Row], wanted: Sequence[Row]) -> list[Row]:
    """The wanted labels, or prompts, in an order that begins with those of a job that is `there`.

    So the images that are there stay, and the missing ones of each class or prompt are added. If
    the job has more of one than are wanted, the order stays as it is.
    """
    if Counter(there) - Counter(wanted):
        return list(wanted)
    left, added = Counter(there), []
    for row in wanted:
        if left[row]:
            left[row] -= 1
        else:
            added.append(row)
    return [*there, *added]


def continued_labels(
    folder: Path, labels: Sequence[int], prompts: Sequence[str] = ()
) -> tuple[list[int], list[str]]:
    """Labels and prompts, a row for each image, in an order that continues the job in `folder`."""
    stored = read_hashed_json(folder / SETTINGS) if (folder / SETTINGS).is_file() else {}
    theirs = [stored.get("labels"), stored.get("prompts") or [""] * len(stored.get("labels") or [])]
    if not all(isinstance(values, list) for values in theirs) or len({*map(len, theirs)}) > 1:
        return list(labels), list(prompts)
    wanted = list(zip(labels, prompts or [""] * len(labels), strict=True))
    rows = _continued(list(zip(*theirs, strict=True)), wanted)
    return [label for label, _ in rows], [prompt for _, prompt in rows] if prompts else []


def _claim_together(
    folder: Path, job: GenerationJob, layout: Layout, rank: int, barrier: Callable[[], None]
) -> None:
    """`_claim` in the first process, then in all of them."""
    try:
        if rank == 0:
            _claim(folder, job, layout)
    finally:
        barrier()
    _claim(folder, job, layout)


def _claim(folder: Path, job: GenerationJob, layout: Layout) -> None:
    """Write the settings of the job into the folder, or check those that are there.

    Other processes of the job may be writing already. They write the settings before any image;
    so this function lists the files first and looks for the settings second: otherwise it could
    take their images for foreign files.
    """
    if folder.exists() and not folder.is_dir():
        raise GenerationError(f"{folder} is a file: choose a folder")
    folder.mkdir(parents=True, exist_ok=True)
    foreign, path = contents(folder), folder / SETTINGS
    settings = {"layout": layout, **job.settings}
    if not path.is_file():
        if foreign:
            raise GenerationError(
                f"{folder} is not empty and holds no {SETTINGS}: choose another folder"
            )
        write_hashed_json(path, settings)
    elif _stored_count(folder, settings) < len(job.labels):
        write_hashed_json(path, settings)


def _stored_count(folder: Path, settings: dict[str, Any]) -> int:
    """The number of images in the settings that are stored in a folder.

    Raises:
        GenerationError: they are those of another job, or of more images of this one.
    """
    stored = read_hashed_json(folder / SETTINGS)
    rows = ("labels", "prompts")  # a job may grow
    same = {name: value for name, value in settings.items() if name not in (*rows, "layout")}
    different = first_difference(stored, same)
    labels, wanted = stored.get("labels"), list(settings["labels"])
    if different is None and stored.get("layout", "flat") != settings["layout"]:
        different = ("layout", stored.get("layout"))
    if not isinstance(labels, list):
        labels = []
        different = different or ("labels", None)
    for name in rows:
        theirs, ours = stored.get(name, []), list(settings.get(name, []))
        if different is None and theirs[: len(wanted)] != ours[: len(labels)]:
            different = (name, theirs)
    if different:
        raise GenerationError(
            f"{folder} holds images of another job (its {different[0]} differs): "
            "choose another output folder"
        )
    if len(labels) > len(wanted):
        raise GenerationError(
            f"{folder} holds {len(labels)} images of this job, and {len(wanted)} are wanted: "
            f"ask for {len(labels)} or more, or choose another output folder"
        )
    return len(labels)


# -------------------------------------------------------------------------------------------------
# The images of a job and their hashes


class Pictures:
    """The images of a job in a folder, each known by its hash.

    A process notes the hash of each image that it wrote in a file of its own; the main process
    joins them at the end. So an image without a hash was written by a process that was killed, or
    by smalti 0.1.0, which kept no hashes.
    """

    def __init__(
        self, folder: Path, job: GenerationJob, classes: Sequence[str], layout: Layout, rank: int
    ) -> None:
        self.folder, self.job, self.classes = folder, job, classes
        self.names = [f"{index:06d}.png" for index in range(len(job.labels))]
        if layout == "class":
            inside = class_folders(classes)
            self.names = [f"{inside[label]}/{self.names[i]}" for i, label in enumerate(job.labels)]
        self.rank, self._part = rank, folder / PART.format(rank)
        self._hashes = picture_hashes(folder)
        self._has_hashes = (folder / INDEX).is_file() or bool(self._hashes)

    @property
    def paths(self) -> list[Path]:
        return [self.folder / name for name in self.names]

    def has(self, index: int) -> bool:
        """Whether image `index` is there, and is the one that was written."""
        name, path = self.names[index], self.folder / self.names[index]
        if not path.is_file():
            return False
        known = self._hashes.get(name)
        if known is None:
            return not self._has_hashes and _is_complete(path)
        if sha256_of(path) == known:
            return True
        logger.warning("%s is not the picture that this job wrote: it is generated again", path)
        return False

    def save(self, index: int, image: Image.Image) -> None:
        """Write image `index`, and note its hash."""
        path = self.folder / self.names[index]
        save_png(path, image)
        with self._part.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"file": self.names[index], "sha256": sha256_of(path)}) + "\n")

    def _condition(self, index: int) -> dict[str, Any]:
        """The class and the prompt of an image, as far as it has them."""
        label, found = self.job.labels[index], dict[str, Any]()
        if self.classes:
            found |= {"class": self.classes[label], "label": label}
        if self.job.prompts:
            found["prompt"] = self.job.prompts[index]
        return found

    def finish(self) -> None:
        """In the first process: write the index of all images, and name the files that are none of
        them."""
        if self.rank:
            return
        hashes = picture_hashes(self.folder)
        entries = [
            {
                "file": name,
                **self._condition(index),
                "sha256": hashes.get(name) or sha256_of(self.folder / name),
            }
            for index, name in enumerate(self.names)
            if (self.folder / name).is_file()
        ]
        write_hashed_json(self.folder / INDEX, {"pictures": entries})
        for part in _parts(self.folder):
            part.unlink()
        foreign = foreign_files(self.folder, self.names)
        if foreign:
            logger.warning(
                "%s holds %d files that this job did not write, for example %s",
                self.folder,
                len(foreign),
                foreign[0],
            )


def class_folders(classes: Sequence[str]) -> list[str]:
    """A name for the folder of each class: the name of the class, without what file systems do not
    allow; where two would be the same, their numbers are appended."""
    plain = [re.sub(r'[\x00-\x1f\x7f<>:"/\\|?*]', "_", name)[:60].strip(" .") for name in classes]
    counts = Counter(name.lower() for name in plain)
    return [
        name if name and counts[name.lower()] == 1 else f"{name} ({label})".strip()
        for label, name in enumerate(plain)
    ]


def picture_hashes(folder: Path) -> dict[str, str]:
    """sha256 of each image of a job by its name in the folder, from the index and its parts."""
    hashes: dict[str, str] = {}
    if (folder / INDEX).is_file():
        try:
            entries = read_hashed_json(folder / INDEX)["pictures"]
            hashes = {entry["file"]: entry["sha256"] for entry in entries}
        except (SmaltiError, LookupError, TypeError):
            logger.warning("%s is damaged: its pictures are generated again", folder / INDEX)
    for part in _parts(folder):
        for line in part.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
                hashes[entry["file"]] = entry["sha256"]
            except (ValueError, LookupError, TypeError):
                continue  # cut by a kill: its picture is generated again
    return hashes


def problems_in(folder: Path) -> list[str]:
    """What is wrong with the images of a job: each that is missing or changed, and other files.

    While pictures are missing, one without a hash is no other file: a process that was killed may
    have written it, and smalti 0.1.0 recorded no hashes. The job judges it when it goes on.
    """
    if (folder / INDEX).is_file():
        try:
            read_hashed_json(folder / INDEX)
        except SmaltiError as error:
            return [str(error)]
    problems, hashes = [], picture_hashes(folder)
    for name, known in sorted(hashes.items()):
        path = folder / name
        if not path.is_file():
            problems.append(f"{path} is missing")
        elif sha256_of(path) != known:
            problems.append(f"{path} is not the picture that this job wrote")
    others = foreign_files(folder, list(hashes))
    if len(hashes) < len(read_hashed_json(folder / SETTINGS)["labels"]):
        others = [name for name in others if not PICTURE.fullmatch(name)]
    return problems + [f"{folder / name} was not written by this job" for name in others]


def foreign_files(folder: Path, names: Sequence[str]) -> list[str]:
    """The files below a folder that are neither images of its job nor its records."""
    own = {SETTINGS, INDEX, *names}
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    visible = (path for path in found if not any(part.startswith(".") for part in path.parts))
    return sorted({path.as_posix() for path in visible} - own)


def _parts(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name.startswith(".index-"))


def _is_complete(path: Path) -> bool:
    """Whether a file is a complete PNG: one that was truncated later is generated again."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            image.verify()
        return True
    except Exception:  # decoders raise many kinds of errors
        return False
