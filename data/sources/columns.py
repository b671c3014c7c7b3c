"""Which columns of a Hugging Face data set hold pictures and labels, and what the labels mean."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from smalti.config import nearest
from smalti.data.sources.arrays import class_names
from smalti.data.sources.base import HuggingFaceOptions
from smalti.errors import SmaltiError

logger = logging.getLogger(__name__)

IMAGE_COLUMNS = ("image", "img", "picture", "jpg", "png", "webp")
LABEL_COLUMNS = ("label", "labels", "class", "cls", "fine_label")


@dataclass(frozen=True)
class Columns:
    """Where a data set keeps pictures and labels."""

    image: str
    label: str | None  # None: there are no labels
    classes: tuple[str, ...] | None  # names of the numbers in the label column


def find_columns(title: str, features: Any, options: HuggingFaceOptions) -> Columns:
    """The columns by option, by type, or by name.

    Raises:
        SmaltiError: a column is missing, or several would do.
    """
    lib = datasets_library()
    if features is None:
        raise SmaltiError(f"{title} does not tell its columns: leave out --hf.streaming")
    image = options.image_column or _one_column(
        title, features, lib.Image, IMAGE_COLUMNS, "image_column"
    )
    if image is None:
        raise SmaltiError(
            f"{title} has the columns {', '.join(features)}: name that of the pictures in "
            "--hf.image_column"
        )
    label = options.label_column or _one_column(
        title, features, lib.ClassLabel, LABEL_COLUMNS, "label_column"
    )
    for column in filter(None, (image, label)):
        if column not in features:
            raise SmaltiError(f'{title} has no column "{column}"; {nearest(column, features)}')
    if label is None:
        others = ", ".join(name for name in features if name != image) or "no other"
        logger.warning(
            "no column of labels is known in %s (it has %s): --hf.label_column names one",
            title,
            others,
        )
    names = getattr(features[label], "names", None) if label else None
    return Columns(image, label, tuple(names) if names else None)


def _one_column(
    title: str, features: Any, kind: type, names: Sequence[str], option: str
) -> str | None:
    """The only column of a kind; else the first that has one of some names."""
    of_kind = [name for name, feature in features.items() if isinstance(feature, kind)]
    if len(of_kind) > 1:
        raise SmaltiError(
            f"{title} has several columns that would do ({', '.join(of_kind)}): choose one with "
            f"--hf.{option}"
        )
    return next((name for name in (*of_kind, *names) if name in features), None)


def labels_of(
    title: str, values: list[Any], columns: Columns
) -> tuple[tuple[str, ...], torch.Tensor]:
    """Class names, and the labels (N,) int64.

    Args:
        values: what stands in the label column, for each row.

    Raises:
        SmaltiError: a row has no label, or one that is neither a name nor a number from 0 on.
    """
    if columns.label is None:
        return ("",), torch.zeros(len(values), dtype=torch.int64)
    if all(type(value) is str for value in values):
        names = tuple(sorted(set(values)))
        where = {name: number for number, name in enumerate(names)}
        return names, torch.tensor([where[value] for value in values])
    for row, value in enumerate(values):
        if type(value) is not int or value < 0:
            raise SmaltiError(
                f"{title}: row {row} has the label {value!r}: choose another --hf.split or "
                "--hf.label_column"
            )
    names = list(columns.classes) if columns.classes else None
    return class_names(Path(title), names, max(values) + 1), torch.tensor(values)


def datasets_library() -> Any:
    """The package `datasets`, which not every user has.

    Raises:
        SmaltiError: it is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise SmaltiError(
            "Hugging Face data sets need another package: pip install 'smalti[data]'"
        ) from error
    return datasets
