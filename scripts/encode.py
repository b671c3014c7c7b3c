"""Between the stages: encode a picture set to a latent cache, once.

smalti encode --tokenizer runs/tokenizer/tokenizer --data emoji --output_dir runs/latents

After an interruption, the same command continues where it stopped.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from smalti.cli import parse_config, run_command
from smalti.config import check_at_least
from smalti.data.dataset import DataOptions, ImageDataset
from smalti.data.latent_cache.cache import (
    SPLITS,
    CacheInfo,
    EncodedRange,
    group_numbers,
    refuse_other_contents,
    write_cache,
)
from smalti.data.transforms import VIEW_SETS, ViewSet, decoded_size, views_of
from smalti.tokenizer.base import Tokenizer
from smalti.training.processes import join_job, say, shared_work


@dataclass(frozen=True)
class EncodeConfig(DataOptions):
    """Encode pictures to a latent cache with one folder per split: train/ and heldout/."""

    tokenizer: Path = Path("runs/tokenizer/tokenizer")  # folder of a saved tokenizer
    output_dir: Path = Path("runs/latents")  # folder of the caches of both splits
    # Views of each training picture: itself (identity), itself and its mirror image (flip), or
    # LlamaGen's ten crops (ten-crop). A held-out picture is encoded as it is.
    views: ViewSet = "flip"
    batch_size: int = 128  # pictures encoded at once
    shard_size: int = 8192  # samples per file

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(1, self, "batch_size", "shard_size")


def encode(config: EncodeConfig) -> Path:
    """Write the caches of both splits, and return their folder."""
    state = join_job()
    refuse_other_contents(config.output_dir)
    tokenizer = Tokenizer.from_pretrained(str(config.tokenizer)).to(state.device)
    for split in SPLITS:
        views: ViewSet = config.views if split == "train" else "identity"
        side = decoded_size(views, tokenizer.image_size)
        images = config.dataset(split, tokenizer.image_size)
        larger = images if side == tokenizer.image_size else config.dataset(split, side)
        info = CacheInfo(
            spec=tokenizer.spec,
            classes=images.classes,
            num_samples=len(images),
            views=VIEW_SETS[views],
            tokenizer_fingerprint=tokenizer.fingerprint,
            dataset_fingerprint=images.fingerprint,
            shard_size=config.shard_size,
            stored_shape=tokenizer.stored_shape,
            stored_statistics=tokenizer.stored_statistics,
            groups=group_numbers(images.groups) if split == "heldout" else (),
        )
        with shared_work(len(images), f"encode {split}") as share:
            write_cache(
                config.output_dir / split,
                info,
                EncodedViews(tokenizer, larger, info.views, config.batch_size),
                **share,
            )
    return config.output_dir


@dataclass
class EncodedViews:
    """(start, stop) -> the encoded samples of that range, all views."""

    tokenizer: Tokenizer
    images: ImageDataset  # with sides of `decoded_size`
    views: tuple[str, ...]
    batch_size: int

    @torch.no_grad()
    def __call__(self, start: int, stop: int) -> EncodedRange:
        stored, labels = [], []
        size, device = self.tokenizer.image_size, next(self.tokenizer.parameters()).device
        for batch in self.images.batches(self.batch_size, start=start, stop=stop):
            views = views_of(batch.images.to(device), self.views, size)
            encoded = [self.tokenizer.store(view).cpu() for view in views]
            stored.append(torch.stack(encoded, dim=1))  # (b, views, ...)
            labels.append(batch.labels)
        return EncodedRange(torch.cat(stored), torch.cat(labels))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `smalti encode`."""
    say(f"latents: {encode(parse_config(EncodeConfig, argv, prog='smalti encode'))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
