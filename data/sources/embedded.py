"""The picture sets that are part of the package, for use without a network.

They are lossless WebP sheets of tiles with a JSON index, written by `tools/pack_embedded.py`;
`assets/README.md` names their origins and licences.
"""

import json
import re
from functools import lru_cache
from importlib.resources import files

import numpy as np
import torch
from PIL import Image

from smalti.data.image_io import FORMATS
from smalti.data.sources.base import ImageSource, SourceOptions, fingerprint_of
from smalti.errors import ConfigurationError

ASSETS = files("smalti.data") / "assets"


# A hyphen between words; those of "t-rex", "x-ray" and "-1" stay.
HYPHEN = re.compile(r"(?<=\w\w)-")


class EmbeddedSource(ImageSource):
    """Square tiles of equal size."""

    def __init__(self, title: str, index: dict, tiles: np.ndarray) -> None:
        self.title, self._names, self._groups = title, index["names"], index["groups"]
        self.classes = tuple(index["classes"])
        self.labels = torch.tensor(index["labels"], dtype=torch.int64)
        self.has_captions = bool(self._names)
        self.tiles = tiles  # (N, S, S, 3) uint8
        if index["num_heldout"]:  # the last ones, which are the published test set
            self.heldout = torch.arange(len(tiles)) >= len(tiles) - index["num_heldout"]
        self.fingerprint = fingerprint_of([title.encode(), tiles.tobytes()])

    def read(self, index: int) -> Image.Image:
        return Image.fromarray(self.tiles[index])

    def name(self, index: int) -> str:
        return f"{self.title}/{self._names[index] if self._names else index}"

    def group(self, index: int) -> str:
        return str(self._groups[index]) if self._groups else self.name(index)

    def captions(self, index: int) -> tuple[str, ...]:
        """The name of the glyph in words: "rolling_on_the_floor_laughing-Noto" has the caption
        "rolling on the floor laughing"."""
        if not self._names:
            return ()
        glyph = self._names[index].rpartition("-")[0]  # without the artist
        return (HYPHEN.sub(" ", glyph).replace("_", " "),)


@lru_cache(maxsize=2)
def _load(title: str) -> EmbeddedSource:
    index = json.loads((ASSETS / f"{title}.json").read_text())
    side, columns = index["side"], index["columns"]
    sheets = []
    for name in index["sheets"]:
        with (
            (ASSETS / name).open("rb") as stream,
            Image.open(stream, formats=FORMATS) as image,
        ):
            pixels = np.asarray(image.convert("RGB"))
        rows = pixels.shape[0] // side
        tiles = pixels.reshape(rows, side, columns, side, 3).swapaxes(1, 2)
        sheets.append(tiles.reshape(-1, side, side, 3))
    count = len(index["labels"])
    return EmbeddedSource(title, index, np.concatenate(sheets)[:count])


def open_embedded(spec: str, options: SourceOptions) -> ImageSource:
    """emoji: 5,664 emoji at 64 px in 9 classes by 3 artists, grouped by glyph, so that no artist's
    version of a held-out emoji is trained on; the captions are the names of the glyphs.

    fashion: Fashion-MNIST, the first 10,000 training and, held out, the first 2,000 test pictures;
    28 px, grey, 10 classes.

    Raises:
        ConfigurationError: a column was named.
    """
    for name in ("caption_column", "label_column"):
        if getattr(options, name):
            raise ConfigurationError(f"{spec} has no columns: leave out --{name}")
    return _load(spec)
