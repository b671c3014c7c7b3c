"""Pack the embedded picture sets as lossless WebP sheets; run once, by hand.

python tools/pack_embedded.py SHARED_ASSETS data/assets
"""

import gzip
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

COLUMNS = 64
ROWS = 64  # per sheet
FASHION = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


def pack(title: str, tiles: np.ndarray, index: dict, out: Path) -> None:
    """Write a set as sheets and a JSON index.

    Args:
        tiles: (N, S, S, 3) or (N, S, S) uint8.
        index: classes, labels, names, groups, num_heldout.
    """
    side, per_sheet = tiles.shape[1], COLUMNS * ROWS
    sheets = []
    for number, start in enumerate(range(0, len(tiles), per_sheet)):
        part = tiles[start : start + per_sheet]
        rows = -(-len(part) // COLUMNS)
        padding = np.full((rows * COLUMNS - len(part), *part.shape[1:]), 255, np.uint8)
        grid = np.concatenate([part, padding]).reshape(rows, COLUMNS, *part.shape[1:])
        sheet = grid.swapaxes(1, 2).reshape(rows * side, COLUMNS * side, *part.shape[3:])
        name = f"{title}-{number}.webp"
        Image.fromarray(sheet).save(out / name, lossless=True, quality=100, method=6)
        sheets.append(name)
    content = {"side": side, "columns": COLUMNS, "sheets": sheets, **index}
    (out / f"{title}.json").write_text(json.dumps(content, separators=(",", ":")) + "\n")


def read_idx(path: Path, header: int) -> np.ndarray:
    """The bytes of a gzipped IDX file after its header."""
    return np.frombuffer(gzip.open(path).read(), np.uint8, offset=header)


def main(assets: Path, out: Path) -> None:
    """Pack both sets from the folder of their published files."""
    emoji = np.load(assets / "emoji64.npz", allow_pickle=False)
    artists = ("Noto", "Twemoji", "Fluent")
    names = [f"{n}-{artists[v]}" for n, v in zip(emoji["names"], emoji["vendor"], strict=True)]
    # Similar tiles side by side compress better: one artist after the other.
    order = np.lexsort((emoji["base"], emoji["vendor"]))
    index = {
        "classes": emoji["classes"].tolist(),
        "labels": emoji["y"][order].tolist(),
        "names": [names[i] for i in order],
        "groups": emoji["base"][order].tolist(),
        "num_heldout": 0,
    }
    pack("emoji", emoji["x"][order], index, out)
    folder = assets / "fashion-mnist"
    pixels, labels = [], []
    for part, count in (("train", 10_000), ("t10k", 2_000)):
        pixels.append(
            read_idx(folder / f"{part}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)[:count]
        )
        labels += read_idx(folder / f"{part}-labels-idx1-ubyte.gz", 8)[:count].tolist()
    index = {"classes": FASHION, "labels": labels, "names": [], "groups": [], "num_heldout": 2_000}
    pack("fashion", np.concatenate(pixels), index, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
