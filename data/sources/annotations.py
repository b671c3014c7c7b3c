"""Labels and captions of pictures, as texts, JSON values and columns of tables hold them.

A picture has one or several captions, each one line of text: runs of white space count as one
space, and surrounding white space does not count.
"""

import json
import reprlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from smalti.data.classes import problem_of, shown
from smalti.data.sources.listing import printable
from smalti.errors import DataError

# Columns and keys that are taken if none is named; the first that exists.
CAPTION_COLUMNS = ("text", "caption", "captions", "prompt", "description")
LABEL_COLUMNS = ("label", "labels", "class", "cls", "fine_label")

NO_CAPTIONS = (
    "the pictures have no captions: write them into a text file beside each picture, or into "
    'metadata.jsonl ({"file_name": ..., "text": ...}), or name their column in --caption_column'
)

MAX_CAPTION_BYTES = 2**20  # of the captions of one picture

# -- Captions -------------------------------------------------------------------------------------


def captions_of(value: Any) -> tuple[str, ...]:
    """The captions in a value of a table or a JSON file: a text, or a list of texts.

    Empty texts, and None, are no captions.

    Raises:
        ValueError: the value is something else.
    """
    if value is None:
        return ()
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str | None) for text in texts):
        raise ValueError(f"{reprlib.repr(value)} is neither a text nor a list of texts")
    return _lines(text for text in texts if text is not None)


def captions_in(content: bytes) -> tuple[str, ...]:
    """The captions in a text file: its lines, without empty ones.

    Raises:
        ValueError: it is not UTF-8.
    """
    try:
        return _lines(content.decode("utf-8-sig").splitlines())
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"line {line} is not UTF-8: save the file as UTF-8") from error


def _lines(texts: Iterable[str]) -> tuple[str, ...]:
    lines = (" ".join(text.split()) for text in texts)
    # JSON can hold halves of surrogate pairs, which no file and no encoder takes.
    return tuple(line.encode("utf-8", "replace").decode() for line in lines if line)


def why_incomplete(title: str, captioned: Tensor, place: Callable[[int], str]) -> str:
    """Why the captions of a set cannot be used: some pictures have none. "" if all have.

    Args:
        captioned: (N,) bool.
        place: the location of a picture, for messages.
    """
    without = (~captioned).nonzero().flatten().tolist()
    if not without:
        return ""
    return (
        f"{len(without)} of the {len(captioned)} pictures of {title} have no caption, the first "
        f"{printable(place(without[0]))}: write one for each picture"
    )


# -- Labels ---------------------------------------------------------------------------------------


def label_of(value: Any) -> int | str:
    """A label in a value of a table or a JSON file: a number from 0 on, or the name of a class.

    Raises:
        ValueError: it is neither; the message follows the place in which it was found.
    """
    if isinstance(value, str) and (problem := problem_of(value)):
        raise ValueError(f"has the label {shown(value)}, which {problem}")
    if isinstance(value, str) and value.removeprefix("-").isdecimal():
        value = int(value)
    if (type(value) is int and value >= 0) or (type(value) is str and value):
        return value
    raise ValueError(
        f"holds no label ({reprlib.repr(value)}): write a number from 0 on or the name of a class"
    )


# -- The members of a sample in a WebDataset shard ------------------------------------------------


@dataclass(frozen=True)
class MemberPlace:
    """Which member of a sample holds a label or captions: the first suffix, and the first key of
    .json members, with a value is used."""

    suffixes: tuple[str, ...]
    json_keys: tuple[str, ...]

    @classmethod
    def named(cls, name: str, usual: "MemberPlace") -> "MemberPlace":
        """The place that an option names: a suffix, or a key of .json members."""
        if not name:
            return usual
        suffix = name[0] == "."
        return cls((name.lower(),), usual.json_keys) if suffix else cls((".json",), (name,))


LABELS = MemberPlace((".cls", ".json"), ("label", "cls", "class"))
CAPTIONS = MemberPlace((".txt", ".json"), CAPTION_COLUMNS)


def read_label(
    shard: object, name: str, content: bytes, place: MemberPlace = LABELS
) -> int | str | None:
    """The label in a member; None if a .json member has none.

    Raises:
        DataError: the member has other content; the message names it.
    """
    is_json = name.lower().endswith(".json")
    try:
        label: Any = content.decode("utf-8").strip()
        if is_json:
            label = _value_of(json.loads(label), place.json_keys)
    except (ValueError, RecursionError) as error:
        kind = "JSON" if is_json else "label"
        raise DataError(f"{printable(name)} in {shard} holds no {kind}: write it again") from error
    if is_json and label is None:
        return None
    try:
        return label_of(label)
    except ValueError as error:
        raise DataError(
            f"{printable(name)} in {shard} {error}, or name the label in --label_column"
        ) from error


def read_captions(
    shard: object, name: str, content: bytes, keys: Sequence[str] = CAPTION_COLUMNS
) -> tuple[tuple[str, ...], str]:
    """The captions in a member, a text file or JSON, and the key of the latter; () if it has none.

    Raises:
        DataError: the member has other content; the message names it.
    """
    try:
        if not name.lower().endswith(".json"):
            return captions_in(content), ""
        values = json.loads(content.decode("utf-8"))
        key = next((key for key in keys if isinstance(values, dict) and key in values), "")
        return captions_of(values[key] if key else None), key
    except (ValueError, RecursionError) as error:
        raise DataError(f"the captions in {printable(name)} in {shard}: {error}") from error


def _value_of(values: Any, keys: Sequence[str]) -> Any:
    if not isinstance(values, dict):
        return None
    return next((values[key] for key in keys if key in values), None)
