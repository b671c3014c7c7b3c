"""smalti: train your own image generator in two stages, on your own pictures.

Models and the functions that train them are imported when first used, so that `import smalti` is
quick.
"""

import importlib
from typing import TYPE_CHECKING, Any

from smalti.errors import (
    CheckpointError,
    ConfigurationError,
    ConversionError,
    DataError,
    GenerationError,
    SmaltiError,
)

if TYPE_CHECKING:
    from smalti.pipelines.guided import GuidedPipeline
    from smalti.pipelines.pipeline import Pipeline
    from smalti.prior.base import Prior
    from smalti.prior.flow.classifier import LatentClassifier
    from smalti.scripts.encode import encode_pictures
    from smalti.scripts.train_classifier import train_classifier
    from smalti.scripts.train_prior import train_prior
    from smalti.scripts.train_tokenizer import train_tokenizer
    from smalti.tokenizer.base import Tokenizer

__all__ = [
    "CheckpointError",
    "ConfigurationError",
    "ConversionError",
    "DataError",
    "GenerationError",
    "GuidedPipeline",
    "LatentClassifier",
    "Pipeline",
    "Prior",
    "SmaltiError",
    "Tokenizer",
    "__version__",
    "encode_pictures",
    "train_classifier",
    "train_prior",
    "train_tokenizer",
]

__version__: str  # read from the installed package when first used

_MODULES = {
    "GuidedPipeline": "smalti.pipelines.guided",
    "LatentClassifier": "smalti.prior.flow.classifier",
    "Pipeline": "smalti.pipelines.pipeline",
    "Prior": "smalti.prior.base",
    "Tokenizer": "smalti.tokenizer.base",
    "encode_pictures": "smalti.scripts.encode",
    "train_classifier": "smalti.scripts.train_classifier",
    "train_prior": "smalti.scripts.train_prior",
    "train_tokenizer": "smalti.scripts.train_tokenizer",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("smalti")
    raise AttributeError(f"module 'smalti' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
