"""The training and the held-out latents of a folder, each in a cache of its own."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from smalti.data.classes import normal_form
from smalti.data.latent_cache.cache import LatentCache
from smalti.data.latent_cache.manifest import SPLITS, bucket_folders
from smalti.errors import DataError


def open_splits(folder: Path, *, seed: int = 0) -> tuple[LatentCache, LatentCache]:
    """The training and the held-out latents of a folder.

    Args:
        seed: of the views of training latents.

    Raises:
        DataError: one is missing or damaged, or the two do not belong together.
    """
    if inside := bucket_folders(folder):
        raise DataError(
            f"{folder} holds the latents of {len(inside)} buckets, and this command reads those of "
            f"one size: give one of them, {inside[0]}"
        )
    train, heldout = (LatentCache(folder / split, seed=seed) for split in SPLITS)
    if name := differing_part(train, heldout):
        raise DataError(
            f"{train.folder} and {heldout.folder} do not belong together, because the {name} "
            "differs: write both with one command into a new folder"
        )
    return train, heldout


def differing_part(one: LatentCache, other: LatentCache, *, same_grid: bool = True) -> str | None:
    """What differs between two caches, and does not where one command wrote both; None if nothing
    does.

    Args:
        same_grid: whether their latents have one grid; otherwise, what depends on it may differ.
    """
    parts = (_common_parts(cache, same_grid) for cache in (one, other))
    for (name, ours), (_, theirs) in zip(*parts, strict=True):
        if ours != theirs:
            return name
    return None


def _common_parts(cache: LatentCache, with_grid: bool) -> list[tuple[str, Any]]:
    info = cache.info
    conditions = [replace(c, shape=c.shape[:1]) for c in info.conditions]
    on_a_grid = [
        ("tokenizer", info.tokenizer_fingerprint),
        ("specification of latents", cache.spec),
        ("shape of latents", info.shape),
    ]
    return [
        *(on_a_grid if with_grid else [("shape of latents", info.shape[0])]),
        ("kind of latents", (bool(info.pairs), bool(info.captions) and not with_grid)),
        ("condition", info.conditions if with_grid else conditions),
        ("table of classes", list(map(normal_form, cache.classes))),
    ]
