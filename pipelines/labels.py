"""What a caller calls a class, by name or by number, as class numbers."""

import difflib
import operator
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from smalti.errors import SmaltiError

ClassLabels = int | str | Sequence[int | str] | Tensor


def label_ids(class_labels: ClassLabels, classes: Sequence[str]) -> list[int]:
    """The numbers of classes that are given by number or name, one or several.

    Text is a name first, and a number only where no class is named by a number.

    Raises:
        SmaltiError: no such class, with near names; or something that is no class at all.
    """
    if isinstance(class_labels, Tensor):
        class_labels = class_labels.flatten().tolist()
    if isinstance(class_labels, str) or not isinstance(class_labels, Iterable):
        class_labels = [class_labels]
    return [_label_id(label, classes) for label in class_labels]


def whole_number(name: str, value: Any) -> int:
    """`value` as an int; what is only like one (1.9, True, None) is refused.

    Raises:
        SmaltiError: it is no whole number.
    """
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise SmaltiError(f"{name} {value!r} is no whole number: give an int")


def _label_id(label: int | str, classes: Sequence[str]) -> int:
    if isinstance(label, str):
        if label in classes:
            return classes.index(label)
        if not label.isdecimal() or any(name.isdecimal() for name in classes):
            near = difflib.get_close_matches(label, classes, n=3, cutoff=0.3) or classes[:10]
            raise SmaltiError(
                f'no class is named "{label}"; known are for example {", ".join(near)}'
            )
        label = int(label)
    number = whole_number("class label", label)
    if not 0 <= number < len(classes):
        raise SmaltiError(f"class label {number} is out of range: use 0 to {len(classes) - 1}")
    return number
