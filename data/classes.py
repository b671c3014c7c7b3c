"""The classes of a picture set: their names, and the number of every picture's class.

A set labels its pictures by names, or by numbers from 0 on. Within smalti the classes of a set are
numbered 0 to n - 1 without gaps, and the tuple of their names is the table that leads back: labels
7, 70007 and 900000 become the classes 0, 1 and 2 with the names "7", "70007" and "900000". Latent
caches and pipelines store this table.

Names match after NFC normalisation: "é" is one letter, or a letter and an accent.
"""

import logging
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from smalti.errors import DataError
from smalti.files import read_json

logger = logging.getLogger(__name__)

MAX_NAME = 1000  # letters; names are printed in messages, tables and grids of pictures
SHOWN = 5  # classes that a warning names
# Unicode categories that no name has: control characters such as newlines and the escapes of
# terminals, lone surrogates, and separators of lines and paragraphs.
UNPRINTABLE = ("Cc", "Cs", "Zl", "Zp")

# -- Names ----------------------------------------------------------------------------------------


def normal_form(text: str) -> str:
    """The form in which names are compared (NFC)."""
    return unicodedata.normalize("NFC", text)


def problem_of(name: str) -> str | None:
    """Why a class cannot have this name, to follow it in a message; None if it can."""
    if len(name) > MAX_NAME:
        return f"has {len(name)} letters; use at most {MAX_NAME}"
    if any(unicodedata.category(letter) in UNPRINTABLE for letter in name):
        return "cannot be printed: write it without control characters"
    return None


def shown(name: str) -> str:
    """A name in quotes for a message, shortened, and escaped where it cannot be printed."""
    return f"{name[:40]!a}" if problem_of(name) else f'"{name}"'


def check_class_names(names: Sequence[str], place: object) -> None:
    """Raise `DataError` if a class cannot have its name, or two names are the same.

    Args:
        place: what contains the names, for messages.
    """
    numbers: dict[str, int] = {}
    for number, name in enumerate(names):
        if problem := problem_of(name):
            raise DataError(f"{place}: the class name {shown(name)} {problem}")
        first = numbers.setdefault(normal_form(name), number)
        if first != number:
            raise DataError(
                f"{place}: 2 classes are called {shown(name)} (numbers {first} and {number}): give "
                "each class a different name"
            )


def class_number(name: str, classes: Sequence[str]) -> int | None:
    """The number of the class with this name; None if there is none."""
    if name in classes:
        return classes.index(name)
    wanted = normal_form(name)
    return next((i for i, other in enumerate(classes) if normal_form(other) == wanted), None)


def same_names(one: Iterable[str], other: Iterable[str]) -> bool:
    """Whether two sets have the same classes, in the same order."""
    return [*map(normal_form, one)] == [*map(normal_form, other)]


# -- Labels ---------------------------------------------------------------------------------------


def named_classes(values: Sequence[str], place: object) -> tuple[tuple[str, ...], Tensor]:
    """Class names, sorted, and labels (N,) int64, where every picture has the name of its class.

    Names that are equal after normalisation are one class.

    Raises:
        DataError: a class cannot have its name.
    """
    forms: dict[str, set[str]] = {}
    for value in set(values):
        forms.setdefault(normal_form(value), set()).add(value)
    # A name that occurs in one form keeps it: the fingerprint of a set depends on the letters.
    names = tuple(sorted(key if len(f) > 1 else next(iter(f)) for key, f in forms.items()))
    check_class_names(names, place)
    numbers = {normal_form(name): number for number, name in enumerate(names)}
    where = {value: numbers[key] for key, values in forms.items() for value in values}
    return names, torch.tensor([where[value] for value in values], dtype=torch.int64)


def numbered_classes(
    values: Sequence[int] | np.ndarray, names: Sequence[str] | None, place: object
) -> tuple[tuple[str, ...], Tensor]:
    """Class names, and labels (N,) int64, where every picture has a number from 0 on.

    Args:
        values: (N,), at least one.
        names: of the classes 0, 1, ...; all are kept. None: the numbers that occur are the names,
            and classes are numbered in their order.

    Raises:
        DataError: there are fewer names than a number needs, or a class cannot have its name.
    """
    # Python's integers may be larger than those of numpy.
    array = values if isinstance(values, np.ndarray) else np.array(values, dtype=object)
    present, labels = np.unique(array, return_inverse=True)
    highest = int(present[-1])
    if names is None:
        if highest >= len(present):
            logger.warning(
                "the %d labels of %s, %s to %s, have gaps: they are numbered 0 to %d, and are the "
                "names of the classes",
                *(len(present), place, present[0], highest, len(present) - 1),
            )
        return tuple(map(str, present.tolist())), torch.from_numpy(labels.astype(np.int64))
    if len(names) <= highest:
        raise DataError(
            f"{place} has {len(names)} class names, but its labels go up to {highest}: name every "
            "class from 0 on"
        )
    check_class_names(names, place)
    warn_of_empty_classes(names, labels=array, place=place)
    return tuple(names), torch.from_numpy(array.astype(np.int64))


def warn_of_empty_classes(names: Sequence[str], labels: np.ndarray | Tensor, place: object) -> None:
    """Warn if no label is the number of a class: a prior would have it, but could not learn it."""
    present = set(labels.tolist())
    empty = [name for number, name in enumerate(names) if number not in present]
    if empty:
        more = ", ..." if len(empty) > SHOWN else ""
        logger.warning(
            "%d of the %d classes of %s have no picture, and a prior cannot learn them: %s%s",
            *(len(empty), len(names), place, ", ".join(map(shown, empty[:SHOWN])), more),
        )


def names_in(folder: Path) -> list[str] | None:
    """The class names in classes.json in a folder, if there is one.

    Raises:
        DataError: the file is not a list of names.
    """
    file = folder / "classes.json"
    if not file.is_file():
        return None
    names = read_json(file)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{file} must be a list of class names")
    return names
