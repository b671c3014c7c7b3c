"""A source over picture files: verified, decoded, and damage dealt with as the options say."""

import contextlib
import logging

import torch
from PIL import Image

from smalti.data.decoding import FolderOptions, Unusable, decode
from smalti.data.sources.base import BadPicture, ImageSource, fingerprint_of, refuse_one_class
from smalti.data.sources.verification import EncodedPictures, Finding, verify
from smalti.errors import SmaltiError

logger = logging.getLogger(__name__)


class EncodedSource(ImageSource):
    """Picture files as labelled pictures with random access.

    A set of at most `verify_up_to` pictures is decoded once to check it. Its fingerprint then
    covers the bytes of all files, and equal files form a group: a picture that is there twice never
    stands on both sides of a split, and the split is the same whatever stores the files. Of a
    larger set the names, sizes and labels count.

    Raises:
        SmaltiError: one class only, or pictures that cannot be used; names the first of them.
    """

    def __init__(self, pictures: EncodedPictures, options: FolderOptions) -> None:
        self.pictures, self.options = pictures, options
        self.classes = pictures.classes
        refuse_one_class(pictures.title, pictures.classes, pictures.labels, options)
        self._findings: list[Finding] = []  # of the pictures that are used; none in a large set
        self._rows = list(range(len(pictures)))
        if len(pictures) <= options.verify_up_to:
            self._settle(verify(pictures, options))
        elif options.bad_images == "skip":
            raise SmaltiError(
                f"{pictures.title} has {len(pictures)} pictures, more than are decoded at the "
                "start: raise --folder.verify_up_to, or pass --folder.bad_images replace"
            )
        self.labels = pictures.labels[self._rows]
        self.heldout = None if pictures.heldout is None else pictures.heldout[self._rows]
        self.max_replaced = options.max_bad_images if options.bad_images == "replace" else 0
        self.fingerprint = fingerprint_of(
            [repr(self.classes).encode(), *map(self._identity, range(len(self)))]
        )

    def read(self, index: int) -> Image.Image:
        place = self.pictures.place(self._rows[index])
        try:
            with contextlib.closing(self.pictures.open(self._rows[index])) as stream:
                return decode(stream, self.options).image
        except OSError as error:
            raise BadPicture(f"{place} cannot be read ({error}): restore or remove it") from error
        except Unusable as problem:
            kind = BadPicture if problem.undecodable else SmaltiError
            raise kind(f"{place} {problem}") from problem

    def name(self, index: int) -> str:
        return self.pictures.name(self._rows[index])

    def group(self, index: int) -> str:
        return self._findings[index].sha256 if self._findings else self.name(index)

    def _identity(self, index: int) -> bytes:
        """What the fingerprint takes of a picture."""
        label = self.classes[self.labels[index]]
        if self._findings:
            content = self._findings[index].sha256
        else:
            row = self._rows[index]
            content = f"{self.pictures.size(row)}/{self.name(index)}"
        return f"{label}/{content}".encode(errors="surrogateescape")

    def _settle(self, findings: list[Finding]) -> None:
        """Keep the pictures that the options let pass, or raise."""
        policy = self.options.bad_images
        damaged = [row for row, found in enumerate(findings) if found.undecodable]
        refused = [
            row
            for row, found in enumerate(findings)
            if found.problem and not (found.undecodable and policy != "refuse")
        ]
        if refused:
            raise SmaltiError(self._complaint(refused, findings))
        done = "skipped" if policy == "skip" else "to be replaced"
        for row in damaged:
            logger.warning("%s: %s %s", done, self.pictures.place(row), findings[row].problem)
        if damaged:
            logger.warning("%s %d of %d pictures", done, len(damaged), len(findings))
        if policy == "replace":
            refuse_too_many(len(damaged), self.options.max_bad_images, self.pictures.title)
        if len(damaged) == len(findings):
            raise SmaltiError(
                f"{self.pictures.title} has no picture that can be used: check --data"
            )
        good = [row for row, found in enumerate(findings) if not found.problem]
        self._refuse_lost_classes(good)
        self._rows = good if policy == "skip" else self._rows
        self._findings = [findings[row] for row in self._rows]

    def _complaint(self, refused: list[int], findings: list[Finding]) -> str:
        first = findings[refused[0]]
        hint = ", or pass --folder.bad_images replace (or skip)" if first.undecodable else ""
        more = f" (and {len(refused) - 1} more cannot be used)" if len(refused) > 1 else ""
        return f"{self.pictures.place(refused[0])} {first.problem}{hint}{more}"

    def _refuse_lost_classes(self, good: list[int]) -> None:
        """A class that lost all its pictures would be asked for, and never be learned."""
        before, after = (set(labels.tolist()) for labels in (self.pictures.labels, self._of(good)))
        for label in sorted(before - after):
            raise SmaltiError(
                f'no picture of the class "{self.classes[label]}" in {self.pictures.title} can be '
                "decoded: replace them, or remove the class"
            )

    def _of(self, rows: list[int]) -> torch.Tensor:
        return self.pictures.labels[rows]


def refuse_too_many(bad: int, limit: int, title: str) -> None:
    """Raise `SmaltiError` if more pictures are bad than may be replaced."""
    if bad > limit:
        raise SmaltiError(
            f"{title} has {bad} bad pictures or more, and --folder.max_bad_images allows {limit}: "
            "look at them with smalti check-data"
        )
