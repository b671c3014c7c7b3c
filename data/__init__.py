"""Data: pictures in a reproducible order, latents and their cache, image files."""

from smalti.data.dataset import ImageBatch, ImageDataset
from smalti.data.latent_cache.cache import LatentCache
from smalti.data.latents import CodeSpec, ContinuousSpec, LatentSpec
from smalti.data.sources.base import ImageSource, open_source

__all__ = [
    "CodeSpec",
    "ContinuousSpec",
    "ImageBatch",
    "ImageDataset",
    "ImageSource",
    "LatentCache",
    "LatentSpec",
    "open_source",
]
