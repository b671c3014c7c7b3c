"""Batch generation that can be killed and restarted: image i depends only on the model, the
settings, the seed, i, and its class or prompt.

    out/
        generation.json             the settings of the job; another job is refused
        000000.png  000001.png ...  or in other files, see `picture_files`
        manifest.jsonl              file, class or prompt, and sha256 of each picture
        index.html                  a page that shows them

More pictures of the same job may be added. A picture that was swapped, edited or put there by
someone else does not have its hash, and is generated again.
"""

import hashlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image

from smalti.config import plain
from smalti.data.generated import SETTINGS
from smalti.data.image_io import image_grid
from smalti.data.latent_cache.buckets import BucketedLatents
from smalti.data.latent_cache.on_the_fly import Latents
from smalti.data.latents import height_and_width
from smalti.errors import GenerationError
from smalti.files import first_difference, read_hashed_json, write_hashed_json
from smalti.folders import contents
from smalti.pipelines.conditions import BatchConditions, Inputs, arguments_for, check_options
from smalti.pipelines.guided import GuidedPipeline
from smalti.pipelines.manifest import Manifest
from smalti.pipelines.picture_files import PER_SHARD, Layout, PictureFormat, picture_names
from smalti.pipelines.pipeline import Pipeline
from smalti.prior.base import Prior
from smalti.prior.conditions.base import moved, part_of, repeated
from smalti.tokenizer.base import Tokenizer

# Pictures of a job are sampled in groups of a fixed size: group g holds the pictures g n to
# (g + 1) n - 1, whichever of them are wanted. Matrix products round differently at another size,
# and elementwise functions at another position, so each picture keeps its position in its group.
POSITIONS_AT_ONCE = 512  # latent positions that a group has in one pass, at most ...
LARGEST_GROUP = 16  # ... and pictures
SHOWN_ROWS = 20  # of a grid of samples, at most
GIVEN_ROWS = 8  # of a grid of samples with their given pictures
UNNAMED_ROWS = 4  # of a grid of unconditional samples
WRITERS = 4  # threads that encode and write pictures while the next ones are sampled
MOST_WAITING = 4 * LARGEST_GROUP  # pictures that wait for them

# What settings mean that do not name these.
UNSAID = {
    "layout": "flat",
    "negative_prompt": "",
    "compiled": False,
    "given": {},
    "format": "png",
    "quality": None,
    "pictures_per_shard": PER_SHARD,
    "image_size": None,
    "dtype": "float32",
}


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
    compiled: bool = False  # compiled models round differently
    dtype: str = "float32"  # precision of the prior, as `Pipeline.dtype` has it
    # Other arguments of the pipeline, whose rows the images take in turn, as JSON has them
    given: dict[str, list[Any]] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """What is stored of the job. Without prompts it is what earlier versions stored."""
        content = asdict(self)
        return {
            name: value
            for name, value in content.items()
            if name not in ("prompts", "negative_prompt", "compiled", "given", "dtype")
            or value not in ((), "", False, {}, UNSAID["dtype"])
        }

    def inputs(self, indices: Sequence[int], classes: Sequence[str]) -> dict[str, Any]:
        """The arguments of a pipeline for some images; a number past the last is the last one."""
        rows = [min(index, len(self.labels) - 1) for index in indices]
        prompts = [self.prompts[row] for row in rows] if self.prompts else ()
        others = {name: [v[row % len(v)] for row in rows] for name, v in self.given.items()}
        given = arguments_for(classes, [self.labels[row] for row in rows], prompts, **others)
        return {**given, "negative_prompt": self.negative_prompt} if prompts else given

    def conditions(self, index: int, classes: Sequence[str]) -> dict[str, Any]:
        """The seed of an image, and its class, prompt and the like as far as it has them."""
        label, found = self.labels[index], dict[str, Any](seed=self.seed)
        if classes:
            found |= {"class": classes[label], "label": label}
        if self.prompts:
            found["prompt"] = self.prompts[index]
        return found | {name: v[index % len(v)] for name, v in self.given.items()}

    @property
    def title(self) -> str:
        """One line about the job, for people."""
        options = {"seed": self.seed, "guidance_scale": self.guidance_scale, **self.options}
        named = ", ".join(f"{name} {value}" for name, value in options.items())
        return f"{len(self.labels)} pictures, {named}"


def picture_generator(seed: int, index: int) -> torch.Generator:
    """The generator of image `index`: the same at any batch size and in any process."""
    # A CPU generator uses 32 bits of its seed. For a fixed job seed this is a bijection of the
    # index (an odd factor modulo 2^32), so no two images of a job share their random numbers.
    job = int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4], "big")
    return torch.Generator().manual_seed((index ^ job) * 0x9E3779B1 % 2**32)


def group_size(pipeline: Pipeline) -> int:
    """Pictures of a group: as many as make a pass through the prior efficient."""
    return max(1, min(POSITIONS_AT_ONCE // pipeline.prior.positions_per_step, LARGEST_GROUP))


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
    given: Mapping[str, list[Any]] | None = None,
    layout: Layout = "flat",
    picture_format: PictureFormat | None = None,
    compiled: bool = False,
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
        given: other arguments of the pipeline, whose rows the images take in turn, as JSON has
            them.
        layout: "class" puts each image into a folder with the name of its class.
        picture_format: PNG, or another format.
        compiled: whether the models of the pipeline are compiled: they round differently.
        rank, world_size, barrier: the index of this process, the number of processes, and a
            function that waits for all of them; each generates every `world_size`-th group.
        progress: called with the number of images finished since the last call.

    Returns:
        The path of the file of each image, in order.

    Raises:
        GenerationError: the prior does not have an option; the format cannot hold the images; the
            folder contains other files, or images of a job with other settings.
    """
    job = _job(pipeline, labels, seed, guidance_scale, options)
    job = replace(job, prompts=tuple(prompts), negative_prompt=negative_prompt, compiled=compiled)
    job = replace(job, given=dict(given or {}))
    kind = _format_for(pipeline, picture_format or PictureFormat(), layout)
    check_conditions(pipeline, job, layout)
    _claim_together(folder, {"layout": layout, **kind.settings, **job.settings}, rank, barrier)
    names = picture_names(job.labels, pipeline.classes, layout, kind)
    store = kind.store(folder, names, len(names))
    manifest = Manifest(
        store, len(names), lambda index: job.conditions(index, pipeline.classes), rank
    )
    exact = pipeline.prior.in_full_precision
    size = group_size(pipeline) if exact else min(batch_size, -(-len(labels) // world_size))
    starts = range(rank * size, len(labels), world_size * size)
    _generate(pipeline, job, manifest, (range(start, start + size) for start in starts), progress)
    barrier()  # all images are written
    manifest.finish(job.title, pipeline.classes)
    barrier()
    return [folder / store.place(index)["file"] for index in range(len(names))]


def _job(
    pipeline: Pipeline,
    labels: Sequence[int],
    seed: int,
    guidance_scale: float | None,
    options: dict[str, Any],
) -> GenerationJob:
    """The job with these options, which the prior has."""
    given = {"guidance_scale": guidance_scale, **options}
    options = {name: plain(value) for name, value in pipeline.sampling_options(given).items()}
    check_options(pipeline.prior, options)
    return GenerationJob(
        model="/".join(map(_exact_name, (pipeline.tokenizer, pipeline.prior))),
        labels=tuple(map(plain, labels)),
        seed=plain(seed),
        guidance_scale=options.pop("guidance_scale"),
        options=dict(sorted({**options, **_guide(pipeline)}.items())),
        dtype=str(pipeline.dtype).removeprefix("torch."),
    )


def _format_for(pipeline: Pipeline, kind: PictureFormat, layout: Layout) -> PictureFormat:
    """The format with the size of the images of a pipeline.

    Raises:
        GenerationError: it cannot hold them, or has no such layout.
    """
    channels = pipeline.tokenizer.image_channels
    if channels == 4 and kind.name in ("jpeg", "npz"):
        raise GenerationError(
            f"the pictures have an alpha channel, which {kind.name} cannot hold: use format png, "
            "webp or webdataset"
        )
    if layout == "class" and kind.name in ("webdataset", "npz"):
        raise GenerationError(
            f"layout class makes a folder for each class, and {kind.name} has none: use flat"
        )
    if kind.name != "npz":
        return kind
    return replace(kind, image_size=height_and_width(pipeline.tokenizer.image_size))


def _generate(
    pipeline: Pipeline,
    job: GenerationJob,
    manifest: Manifest,
    groups: Iterable[range],
    progress: Callable[[int], object],
) -> None:
    """Sample the missing images of some groups. Threads store them, so that the device need not
    wait for the disk."""
    sampling = {name: v for name, v in job.options.items() if name not in _guide(pipeline)}
    waiting = deque[tuple[int, Future[str]]]()

    def note(most: int) -> None:
        """Record what was stored, until at most so many wait."""
        while len(waiting) > most:
            manifest.note(waiting[0][0], waiting[0][1].result())
            waiting.popleft()

    try:
        with ThreadPoolExecutor(WRITERS) as pool:
            for group in groups:
                wanted = [index for index in group if index < len(job.labels)]
                missing = [index for index in wanted if not manifest.has(index)]
                progress(len(wanted) - len(missing))
                if not missing:
                    continue
                output = pipeline(
                    **job.inputs(group, pipeline.classes),
                    guidance_scale=job.guidance_scale,
                    generator=[picture_generator(job.seed, index) for index in group],
                    **sampling,
                )
                for index in missing:
                    image = output.images[index - group.start]
                    waiting.append((index, pool.submit(manifest.store.save, index, image)))
                note(MOST_WAITING)
                progress(len(missing))
            note(0)
    finally:  # after an error or an interruption: the others were stored
        for index, stored in waiting:
            if stored.done() and not stored.exception():
                manifest.note(index, stored.result())


def _guide(pipeline: Pipeline) -> dict[str, Any]:
    """What identifies the classifier that guides a pipeline, if there is one."""
    return pipeline.settings if isinstance(pipeline, GuidedPipeline) else {}


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
    first = {**job.inputs([0], pipeline.classes), **job.given}
    pipeline.conditions(Inputs.of(first), 1)  # raises
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
    folder: Path, settings: dict[str, Any], rank: int, barrier: Callable[[], None]
) -> None:
    """`_claim` in the first process, then in all of them."""
    try:
        if rank == 0:
            _claim(folder, settings)
    finally:
        barrier()
    _claim(folder, settings)


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    """Write the settings of the job into the folder, or check those that are there.

    Other processes of the job may be writing already. They write the settings before any image;
    so this function lists the files first and looks for the settings second: otherwise it could
    take their images for foreign files.
    """
    if folder.exists() and not folder.is_dir():
        raise GenerationError(f"{folder} is a file: choose a folder")
    folder.mkdir(parents=True, exist_ok=True)
    foreign, path = contents(folder), folder / SETTINGS
    if not path.is_file():
        if foreign:
            raise GenerationError(
                f"{folder} is not empty and holds no {SETTINGS}: choose another folder"
            )
        write_hashed_json(path, settings)
    elif _stored_count(folder, settings) < len(settings["labels"]):
        write_hashed_json(path, settings)


def _stored_count(folder: Path, settings: dict[str, Any]) -> int:
    """The number of images in the settings that are stored in a folder.

    Raises:
        GenerationError: they are those of another job, or of more images of this one.
    """
    stored = read_hashed_json(folder / SETTINGS)
    rows = ("labels", "prompts")  # a job may grow
    same = {name: v for name, v in {**UNSAID, **settings}.items() if name not in rows}
    dtype = stored.get("dtype", UNSAID["dtype"])
    if dtype != same["dtype"]:
        raise GenerationError(
            f"{folder} holds images that were sampled in {dtype}, not in {same['dtype']}: give "
            f"--dtype {dtype}, or choose another output folder"
        )
    different = first_difference(stored, same, UNSAID)
    labels, wanted = stored.get("labels"), list(settings["labels"])
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
