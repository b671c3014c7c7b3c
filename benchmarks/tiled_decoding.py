"""Seams and memory of tiled decoding, beside a whole decode of the same picture.

    python benchmarks/tiled_decoding.py --image_size 1024 --channels 32
    python benchmarks/tiled_decoding.py --image_size 2048 --channels 32 --only tiled
    python benchmarks/tiled_decoding.py --image_size 2048 --channels 32 --only whole

Decodes smooth latents with a decoder of the preset, narrowed to `--channels` (its own width would
take minutes on a CPU), with attention in the middle. Prints the seams: the largest difference
between a step from pixel to pixel of the tiled and of the whole picture, in grey levels of which
the picture has 255; and by how much each decode raised the peak memory of the process (of the
second of two decodes, above that of the first: give `--only`). With `--old_tiles` every tile is
decoded from its latents alone, so that attention is within the tile.
"""

import argparse
import resource
import time
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from smalti.tokenizer.kl import KLTokenizer
from smalti.tokenizer.presets import PRESETS
from smalti.tokenizer.tiling import Stages


class AttentionWithinTiles(KLTokenizer):
    """Runs the whole decoder in tiles."""

    def decoding_stages(self) -> Stages:
        return Stages(lambda vectors: vectors, self.decode_vectors, tiles_attend=True)


def peak() -> float:
    """Peak memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def measured(name: str, model: KLTokenizer, latents: Tensor) -> Tensor:
    """The images of latents; prints what decoding them takes."""
    before, start = peak(), time.perf_counter()
    images = model.decode(latents)
    print(
        f"{name:6} {time.perf_counter() - start:6.1f} s, peak memory {peak() - before:6.0f} MiB "
        f"above {before:.0f}"
    )
    return images


def seams(tiled: Tensor, whole: Tensor, border: int) -> float:
    """The largest difference of a step between neighbouring pixels, in grey levels."""
    pictures = [image[..., border:-border, border:-border] for image in (tiled, whole)]
    steps = [[picture.diff(dim=dim) for dim in (2, 3)] for picture in pictures]
    largest = max(float((a - b).abs().max()) for a, b in zip(*steps, strict=True))
    return largest * 255 / float(whole.max() - whole.min())


@torch.no_grad()
def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="kl-f8")
    parser.add_argument("--channels", type=int, default=32, help="width of the first level")
    parser.add_argument("--image_size", type=int, default=1024)
    parser.add_argument("--tile", type=int, default=512)
    parser.add_argument("--overlap", type=int, default=128)
    parser.add_argument("--only", choices=("tiled", "whole"), help="one decode, for its memory")
    parser.add_argument("--old_tiles", action="store_true", help="decode each tile from latents")
    args = parser.parse_args()
    torch.manual_seed(0)
    config = PRESETS[args.preset]
    conv = replace(config.conv, channels=args.channels)
    kind = AttentionWithinTiles if args.old_tiles else KLTokenizer
    model = kind(replace(config, image_size=args.image_size, conv=conv)).eval()
    coarse = torch.randn(1, model.spec.channels, 4, 4)
    size = (model.spec.height, model.spec.width)
    latents = F.interpolate(coarse, size, mode="bicubic", align_corners=True)
    model.enable_tiling(args.tile, args.overlap)
    if args.only != "whole":
        tiled = measured("tiled", model, latents)
    model.disable_tiling()
    if args.only != "tiled":
        whole = measured("whole", model, latents)
    if not args.only:
        print(f"seams {seams(tiled, whole, args.overlap):.2f} grey levels of 255")


if __name__ == "__main__":
    main()
