"""Between the stages: encode a picture set to a latent cache, once.

smalti encode --tokenizer runs/tokenizer/tokenizer --data emoji --output_dir runs/latents

After an interruption, the same command continues where it stopped.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from smalti.checkpoints import Weights, is_checkpoint
from smalti.cli import in_python, parse_config, run_command
from smalti.config import ImageSize, check_at_least, nearest
from smalti.data.buckets import (
    Bucket,
    bucket_name,
    check_buckets,
    cropped_share,
    nearest_buckets,
)
from smalti.data.dataset import DataOptions, ImageDataset, Split, kept, write_options
from smalti.data.latent_cache.buckets import write_buckets
from smalti.data.latent_cache.cache import EncodedRange, refuse_other_contents, write_cache
from smalti.data.latent_cache.manifest import (
    BUCKETS,
    SPLITS,
    TOKENIZER,
    CacheInfo,
    group_numbers,
)
from smalti.data.latents import ContinuousSpec, as_image_size, resolution
from smalti.data.sources.base import ImageSource
from smalti.data.transforms import VIEW_SETS, ViewSet, decoded_size, views_of
from smalti.errors import CheckpointError, ConfigurationError, DataError
from smalti.pipelines.conditions import CONDITION_SOURCES, ConditionEncoder, PictureEncoder
from smalti.pipelines.model_flag import place_of
from smalti.scripts.options import TextOptions
from smalti.tokenizer.base import Tokenizer
from smalti.training.processes import fills_folder, join_job, say, shared_work

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncodeConfig(DataOptions):
    """Encode pictures to a latent cache with one folder per split: train/ and heldout/."""

    TRAINED: ClassVar[str] = "tokenizer"

    tokenizer: Annotated[Path, place_of("A tokenizer, or a pipeline with one")] = Path(
        "runs/tokenizer/tokenizer"
    )
    weights: Weights = "ema"  # of a checkpoint: averaged over its run (ema), or raw
    output_dir: Path = Path("runs/latents")  # folder of the caches of both splits
    # Pixels: the side of a square, or height x width as in 48x64; default: the tokenizer's.
    image_size: ImageSize | None = None
    # Several sizes instead of one (aspect-ratio buckets), as in 64 48x80 80x48: each picture is
    # encoded at the one whose aspect ratio is nearest to its own. A flow prior is trained on all of
    # them; the first is its default size.
    buckets: tuple[ImageSize, ...] = ()
    # Views of each training picture: itself (identity), itself and its mirror image (flip), or
    # LlamaGen's ten crops (ten-crop). A held-out picture is encoded as it is.
    views: ViewSet = "flip"
    # What priors will be given, as of train-prior. With text, the pictures must have captions; the
    # features of a frozen --text.encoder are stored beside the latents, about 2 bytes x channels x
    # --text.length per caption. Captions and classes are stored in any case.
    condition: str = ""
    text: TextOptions = field(default_factory=TextOptions)
    # The pictures that a flow prior with --condition image is given, which are stored beside the
    # latents: super-resolution (a quarter of the size, or super-resolution:factor=2) or inpainting
    # (4 random masks of each view).
    image_task: str = ""
    batch_size: int = 128  # pictures encoded at once
    shard_size: int = 8192  # samples per file

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(1, self, "batch_size", "shard_size")
        object.__setattr__(self, "buckets", tuple(map(as_image_size, self.buckets)))
        if self.buckets:
            check_buckets(self.buckets)
        if self.buckets and self.image_size is not None:
            raise ConfigurationError(
                f"image_size is {resolution(self.image_size)}, and there are "
                f"{len(self.buckets)} buckets: leave out one of them"
            )
        kinds = [*filter(None, self.condition.split("+"))]
        for kind in kinds:
            if kind not in CONDITION_SOURCES:
                raise ConfigurationError(
                    f"condition is {self.condition}; {nearest(kind, CONDITION_SOURCES)}"
                )
        for name, source in CONDITION_SOURCES.classes.items():
            source.check_options(self, name in kinds)


@fills_folder(deep=True)
def encode(config: EncodeConfig) -> Path:
    """Write the caches of both splits, and return their folder."""
    state = join_job()
    if state.is_main_process:
        config.note_stored()
    names = [*map(bucket_name, config.buckets), BUCKETS]
    refuse_other_contents(config.output_dir, names if config.buckets else SPLITS)
    if is_checkpoint(config.tokenizer):
        tokenizer = finished_tokenizer(config)
    else:
        tokenizer = Tokenizer.from_pretrained(str(config.tokenizer), weights=config.weights)
    tokenizer = tokenizer.to(state.device)
    if config.image_size is not None:
        tokenizer = tokenizer.resized(config.image_size)
    if config.buckets:
        encode_buckets(config, tokenizer)
        return config.output_dir
    opened = config.opened(tokenizer.image_channels)  # raises before anything is encoded
    encoders = condition_encoders(config, tokenizer)
    for split in SPLITS:
        encode_split(config, split, tokenizer, encoders, opened=opened[split])
    if state.is_main_process:
        write_options(config.output_dir / SPLITS[0], config)
    return config.output_dir


def encode_buckets(config: EncodeConfig, tokenizer: Tokenizer) -> None:
    """Write the caches of both splits of every bucket, and then the list of the buckets.

    Raises:
        SmaltiError: the latents are codes; the tokenizer has no latents of one of the sizes; one
            has no training pictures, or the first no held-out pictures.
    """
    if not isinstance(tokenizer.spec, ContinuousSpec):
        raise ConfigurationError(
            "buckets are for a flow prior, which models continuous latents; this tokenizer makes "
            "codes, and priors of codes model a fixed number of them: use a KL tokenizer, or "
            "--image_size instead of --buckets"
        )
    for size in config.buckets:
        tokenizer.config_at(size)  # raises
    opened = config.opened(tokenizer.image_channels)
    counts = {split: pictures_in_buckets(config, split, opened[split]) for split in SPLITS}
    encoders = condition_encoders(config, tokenizer.resized(config.buckets[0]))
    others = [encoder for encoder in encoders if not isinstance(encoder, PictureEncoder)]
    for number, size in enumerate(config.buckets):
        bucket, resized = Bucket(number, config.buckets), tokenizer.resized(size)
        own = [*others, *picture_encoders(config, resized)]
        for split in SPLITS:
            if counts[split][number]:
                encode_split(config, split, resized, own, bucket, opened[split])
        if join_job().is_main_process:
            write_options(config.output_dir / bucket_name(size) / SPLITS[0], config)
    if join_job().is_main_process:
        write_buckets(config.output_dir, config.buckets)
    join_job().wait_for_everyone()


def pictures_in_buckets(
    config: EncodeConfig, split: Split, opened: tuple[ImageSource, Split]
) -> list[int]:
    """The number of pictures of a split that go to each bucket; the log says how many, and how much
    of them is cropped.

    Raises:
        DataError: no training picture goes to one of them, or no held-out picture to the first.
    """
    source, part = opened
    sizes = source.sizes[kept(source, part, config.heldout_fraction, config.split_seed)]
    where, counts = nearest_buckets(sizes, config.buckets), []
    for number, size in enumerate(config.buckets):
        inside = sizes[where == number]
        counts.append(len(inside))
        logger.info(
            "%s, bucket %s: %d pictures, of which the crop leaves out %.0f %%",
            *(split, bucket_name(size), len(inside), 100 * cropped_share(inside, size)),
        )
        if not len(inside) and (split == "train" or number == 0):
            what = "training" if split == "train" else "held-out"
            raise DataError(
                f"no {what} picture has an aspect ratio near that of the bucket "
                f"{bucket_name(size)} (height x width): leave it out of --buckets"
                + ("" if split == "train" else ", or give another one first")
            )
    return counts


def condition_encoders(config: EncodeConfig, tokenizer: Tokenizer) -> list[ConditionEncoder]:
    """What makes the conditions in the caches.

    Raises:
        SmaltiError: the text encoder cannot be loaded; the pictures have no captions, or one that
            is too long.
    """
    sources = CONDITION_SOURCES.classes.values()
    made = (source.cache_encoder(config, tokenizer) for source in sources)
    return [encoder for encoder in made if encoder is not None]


def picture_encoders(config: Any, tokenizer: Tokenizer) -> list[PictureEncoder]:
    """What makes the conditions of pictures, if they are made in each step of train-prior.

    Args:
        config: the options of train-prior or encode.
    """
    sources = CONDITION_SOURCES.classes.values()
    made = (source.picture_encoder(config, tokenizer) for source in sources)
    return [encoder for encoder in made if encoder is not None]


def encode_split(
    config: EncodeConfig,
    split: Split,
    tokenizer: Tokenizer,
    encoders: Sequence[ConditionEncoder] = (),
    bucket: Bucket | None = None,
    opened: tuple[ImageSource, Split] | None = None,
) -> None:
    """Write the cache of one split; `encoders` make the conditions in it.

    Args:
        bucket: of whose pictures; None: all.
        opened: see `DataOptions.dataset`.
    """
    views: ViewSet = config.views if split == "train" else "identity"
    # How often each view is stored, with other random choices of the encoders.
    versions = max((encoder.versions for encoder in encoders), default=1)
    versions = versions if split == "train" else 1
    side = decoded_size(views, tokenizer.image_size)
    channels, same = tokenizer.image_channels, side == tokenizer.image_size
    read: dict[str, Any] = {"channels": channels, "bucket": bucket, "opened": opened}
    images = config.dataset(split, tokenizer.image_size, **read)
    larger = images if same else config.dataset(split, side, **read)
    info = replace(
        latents_of(tokenizer, images, VIEW_SETS[views] * versions, config.shard_size),
        groups=group_numbers(images.groups) if split == "heldout" else (),
        conditions=tuple(condition for encoder in encoders for condition in encoder.stored),
    )
    name = bucket_name(bucket.size) if bucket else ""
    with shared_work(len(images), f"encode {name and f'{name} '}{split}") as share:
        write_cache(
            config.output_dir / name / split,
            info,
            EncodedViews(tokenizer, larger, info.views, config.batch_size, encoders),
            **share,
        )


def latents_of(
    tokenizer: Tokenizer, images: ImageDataset, views: tuple[str, ...], shard_size: int
) -> CacheInfo:
    """What a cache of these pictures holds."""
    return CacheInfo(
        spec=tokenizer.spec,
        classes=images.classes,
        num_samples=len(images),
        views=views,
        tokenizer_fingerprint=tokenizer.fingerprint,
        dataset_fingerprint=images.fingerprint,
        shard_size=shard_size,
        stored_shape=tokenizer.stored_shape,
        stored_statistics=tokenizer.stored_statistics,
        captions=images.captions_fingerprint if images.has_captions else "",
    )


def finished_tokenizer(config: EncodeConfig) -> Tokenizer:
    """The tokenizer in a checkpoint, with the statistics of its latents, as a finished run saves
    it: in the folder of the caches, because a later checkpoint replaces this one.

    Raises:
        CheckpointError: the folder has the latents of another tokenizer.
    """
    state, folder = join_job(), config.output_dir / TOKENIZER
    tokenizer = Tokenizer.from_pretrained(config.tokenizer, weights=config.weights)
    ours = tokenizer.state_dict()
    if state.is_main_process and not folder.exists():
        channels = tokenizer.image_channels
        train = config.opened(channels)["train"]  # raises for either split
        images = config.dataset("train", tokenizer.image_size, channels=channels, opened=train)
        tokenizer.to(state.device)
        tokenizer.calibrate(batch.images.to(state.device) for batch in images.batches(64))
        tokenizer.save_pretrained(folder)
    state.wait_for_everyone()
    saved = Tokenizer.from_pretrained(folder)
    theirs = saved.state_dict()
    if ours.keys() != theirs.keys() or not all(ours[k].equal(theirs[k]) for k in ours):
        raise CheckpointError(
            f"{config.output_dir} has the latents of other weights than {config.tokenizer}: "
            "choose another --output_dir"
        )
    say(f"the tokenizer of the checkpoint: {folder}; give it to train-prior as --tokenizer")
    return saved


@dataclass
class EncodedViews:
    """(start, stop) -> the encoded samples of that range, all views."""

    tokenizer: Tokenizer
    images: ImageDataset  # of `decoded_size`
    views: tuple[str, ...]
    batch_size: int
    encoders: Sequence[ConditionEncoder] = ()

    @torch.no_grad()
    def __call__(self, start: int, stop: int) -> EncodedRange:
        stored, labels, captions = [], [], []
        conditions: dict[str, list[Tensor]] = {}
        size, device = self.tokenizer.image_size, next(self.tokenizer.parameters()).device
        for batch in self.images.batches(self.batch_size, start=start, stop=stop):
            names = tuple(dict.fromkeys(self.views))  # each once: see `encode_split`, versions
            views = dict(zip(names, views_of(batch.images.to(device), names, size), strict=True))
            encoded = {name: self.tokenizer.store(view).cpu() for name, view in views.items()}
            stored.append(torch.stack([encoded[n] for n in self.views], dim=1))  # (b, views, ...)
            labels.append(batch.labels)
            captions += batch.captions or []
            for encoder in self.encoders:
                for name, rows in encoder(batch, [views[n] for n in self.views]).items():
                    conditions.setdefault(name, []).append(rows.cpu())
        return EncodedRange(
            torch.cat(stored),
            torch.cat(labels),
            captions or None,
            {name: torch.cat(rows) for name, rows in conditions.items()},
        )


def encode_pictures(config: EncodeConfig | None = None, **settings: Any) -> Path:
    """Encode pictures, and return the folder of the latents: `smalti encode` in Python.

    Args:
        config: all settings; or give `settings`.
        settings: fields of `EncodeConfig`.

    Raises:
        SmaltiError: as the command.
    """
    return in_python(encode, EncodeConfig, config, settings)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `smalti encode`."""
    say(f"latents: {encode(parse_config(EncodeConfig, argv, prog='smalti encode'))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
