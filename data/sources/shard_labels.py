"""What the label members of a WebDataset shard say: 000017.cls, 000017.json."""

import json
import unicodedata
from pathlib import Path
from typing import Any

from smalti.errors import SmaltiError

LABELS = (".cls", ".json")  # the first that tells a label counts
JSON_KEYS = ("label", "cls", "class")
MAX_LABEL_BYTES = 2**20


def read_label(shard: Path, name: str, content: bytes) -> int | str | None:
    """A number or the name of a class; None if a .json member says nothing of it.

    Raises:
        SmaltiError: the member holds something else; names it.
    """
    is_json = name.lower().endswith(".json")
    try:
        label: Any = content.decode("utf-8").strip()
        if is_json:
            label = _label_of(json.loads(label))
    except (ValueError, RecursionError) as error:
        kind = "JSON" if is_json else "label"
        raise SmaltiError(f"{name} in {shard} holds no {kind}: write it again") from error
    if isinstance(label, str) and label.removeprefix("-").isdecimal():
        label = int(label)
    if isinstance(label, str) and not all(map(_can_be_printed, label)):
        raise SmaltiError(
            f"{name} in {shard} has the label {label[:40]!a}, which cannot be printed: write it "
            "again"
        )
    if (type(label) is int and label >= 0) or (type(label) is str and label):
        return label
    if is_json:
        return None
    raise SmaltiError(
        f"{name} in {shard} holds no label: it must be a number from 0 on or the name of a class"
    )


def first_label(labels: dict[str, int | str | None]) -> int | str | None:
    """What the members of a sample say together, by suffix."""
    said = (labels.get(suffix) for suffix in LABELS)
    return next((label for label in said if label is not None), None)


def _label_of(values: Any) -> Any:
    if not isinstance(values, dict):
        return None
    return next((values[key] for key in JSON_KEYS if key in values), None)


def _can_be_printed(letter: str) -> bool:
    """Whether it is neither a control character (zero is one) nor half of a character."""
    return unicodedata.category(letter) not in ("Cc", "Cs")
