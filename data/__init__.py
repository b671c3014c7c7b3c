"""What flows: latents and their cache, pictures in a reproducible order, picture files out."""

from smalti.data.cache import LatentCache
from smalti.data.dataset import ImageBatch, ImageDataset
from smalti.data.images import ImageSource, open_source
from smalti.data.latents import CodeSpec, ContinuousSpec, LatentSpec

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
