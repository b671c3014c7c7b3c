"""smalti: train your own image generator in two stages, on your own pictures.

`Pipeline`, `Prior` and `Tokenizer` are imported when first used, so that `import smalti` is quick.
"""

import importlib
from importlib.metadata import version
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
    from smalti.pipelines.pipeline import Pipeline
    from smalti.prior.base import Prior
    from smalti.tokenizer.base import Tokenizer

__all__ = [
    "CheckpointError",
    "ConfigurationError",
    "ConversionError",
    "DataError",
    "GenerationError",
    "Pipeline",
    "Prior",
    "SmaltiError",
    "Tokenizer",
    "__version__",
]

__version__ = version("smalti")

_MODULES = {
    "Pipeline": "smalti.pipelines.pipeline",
    "Prior": "smalti.prior.base",
    "Tokenizer": "smalti.tokenizer.base",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'smalti' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
