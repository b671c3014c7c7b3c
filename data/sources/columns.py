"""Tables of Hugging Face data sets: which columns hold pictures, labels and captions."""

import logging
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from smalti.config import nearest
from smalti.data.classes import named_classes, numbered_classes
from smalti.data.sources.annotations import CAPTION_COLUMNS, LABEL_COLUMNS
from smalti.data.sources.options import SourceOptions
from smalti.errors import ConfigurationError, DataError, SmaltiError

logger = logging.getLogger(__name__)

IMAGE_COLUMNS = ("image", "img", "picture", "jpg", "png", "webp")


@dataclass(frozen=True)
class Columns:
    """The columns of pictures, labels and captions."""

    image: str
    label: str | None  # None: there are no labels
    classes: tuple[str, ...] | None  # names of the labels, if the label column contains numbers
    captions: str | None = None  # None: there are none


def find_columns(title: str, features: Any, options: SourceOptions) -> Columns:
    """The columns that the options name, or else those found by type, or else by name.

    Raises:
        DataError: a column is missing, or several qualify.
    """
    lib = datasets_library()
    if features is None:
        raise DataError(f"{title} does not declare its columns: leave out --hf.streaming")
    image = options.hf.image_column or _one_column(
        title, features, lib.Image, IMAGE_COLUMNS, "hf.image_column"
    )
    if image is None:
        raise DataError(
            f"{title} has the columns {', '.join(features)}: name the one with pictures in "
            "--hf.image_column"
        )
    label = options.labels_in or _one_column(
        title, features, lib.ClassLabel, LABEL_COLUMNS, "label_column"
    )
    captions = options.caption_column or _caption_column(features, label)
    for column in filter(None, (image, label, captions)):
        if column not in features:
            raise DataError(f'{title} has no column "{column}"; {nearest(column, features)}')
    if label == image:
        raise DataError(f'{title}: "{image}" is the column of pictures: name that of labels')
    if captions and not _holds_texts(features[captions]):
        raise DataError(f'{title}: the column "{captions}" holds no texts: name that of captions')
    if label is None:
        others = ", ".join(name for name in features if name not in (image, captions))
        logger.warning(
            "no label column was found in %s (it has %s): if one has the labels, name it in "
            "--label_column",
            *(title, others or "no other"),
        )
    names = getattr(features[label], "names", None) if label else None
    return Columns(image, label, tuple(names) if names else None, captions)


def _caption_column(features: Any, label: str | None) -> str | None:
    """The first of the usual columns that exists and holds texts."""
    names = (name for name in CAPTION_COLUMNS if name in features and name != label)
    return next((name for name in names if _holds_texts(features[name])), None)


def _holds_texts(feature: Any) -> bool:
    """Whether a column holds texts, or lists of texts."""
    inner = getattr(feature, "feature", feature[0] if isinstance(feature, list) else feature)
    return getattr(inner, "dtype", "") in ("string", "large_string")


def _one_column(
    title: str, features: Any, kind: type, names: Sequence[str], option: str
) -> str | None:
    """The only column of a type; else the first of some names that exists."""
    of_kind = [name for name, feature in features.items() if isinstance(feature, kind)]
    if len(of_kind) > 1:
        raise DataError(
            f"{title} has several suitable columns ({', '.join(of_kind)}): choose one with "
            f"--{option}"
        )
    return next((name for name in (*of_kind, *names) if name in features), None)


def labels_of(
    title: str, values: list[Any], columns: Columns
) -> tuple[tuple[str, ...], torch.Tensor]:
    """Class names, and the labels (N,) int64.

    Args:
        values: the label column.

    Raises:
        DataError: a row has no label, or one that is neither a name nor a number from 0 on.
    """
    if columns.label is None:
        return (), torch.zeros(len(values), dtype=torch.int64)
    if all(type(value) is str for value in values):
        return named_classes(values, title)
    odd = [row for row, value in enumerate(values) if not _is_label(value)]
    if odd:
        more = f" (and {len(odd) - 1} more have none)" if len(odd) > 1 else ""
        raise DataError(
            f"{title}: row {odd[0]} has the label {reprlib.repr(values[odd[0]])}, which is neither "
            f"a name nor a number from 0 on{more}: correct it, or choose another --hf.split or "
            "--label_column"
        )
    return numbered_classes(values, columns.classes, title)


def _is_label(value: Any) -> bool:
    return type(value) is str or (type(value) is int and value >= 0)


def datasets_library() -> Any:
    """The package `datasets`, an optional dependency.

    Raises:
        ConfigurationError: it is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise ConfigurationError(
            "Hugging Face data sets need another package: pip install 'smalti[data]'"
        ) from error
    return datasets


def guarded(spec: str, load: Callable[[], Any]) -> Any:
    """The result of `load()`; any exception becomes a `DataError` of one line."""
    try:
        return load()
    except SmaltiError:
        raise
    except Exception as error:  # the libraries raise many kinds; all mean "cannot be read"
        raise DataError(f"{spec} cannot be read: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """The first line of the original error; that of `datasets` often has no cause in it."""
    while error.__cause__ is not None and type(error).__module__.startswith("datasets."):
        error = error.__cause__
    return (str(error).splitlines() or [type(error).__name__])[0]
