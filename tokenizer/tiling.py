"""Tiled decoding: large pictures in parts that overlap, in bounded memory.

Of every overlap the outer quarter of each tile is discarded, because it was decoded with zeros, not
with its neighbours, outside; in the middle half both tiles are blended. So where the receptive
field of the decoder reaches less than a quarter of the overlap, and the decoder normalises nothing
over the whole picture, the result is that of decoding the whole picture.

Group normalisation (1803.08494) does: mean and variance are those of the whole picture. Those of a
tile differ, which would show as a change of colour from tile to tile. So they are estimated once,
by decoding every n-th position of the picture, and are the same for all tiles.

Attention needs the whole picture. The convolutional decoders attend at the resolution of the
latents, where the whole picture takes little memory: all layers there run once over the whole grid,
and only the upsampling runs in tiles (`Stages`). Attention at a higher resolution is within a tile:
with it, seams exceed one grey level of 255.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from smalti.errors import ConfigurationError


@dataclass(frozen=True)
class Stages:
    """The two parts of `Tokenizer.decode_vectors`, one after the other."""

    whole: Callable[[Tensor], Tensor]  # vectors (B, d, h, w) -> features (B, d', h, w)
    tiled: Callable[[Tensor], Tensor]  # features (B, d', h, w) -> images (B, C, H, W)
    tiles_attend: bool  # `tiled` has attention, which is then within each tile


@dataclass(frozen=True)
class Tiling:
    """Sides of the tiles and of their overlap, in pixels."""

    tile: int
    overlap: int

    def __post_init__(self) -> None:
        sizes = (self.tile, self.overlap)
        if any(type(size) is not int for size in sizes) or not 0 <= self.overlap < self.tile:
            raise ConfigurationError(
                f"tile is {self.tile} and overlap {self.overlap} pixels; give whole numbers, "
                "0 <= overlap < tile"
            )

    def decode(
        self,
        decode: Callable[[Tensor], Tensor],
        vectors: Tensor,
        image_size: tuple[int, int],
        norms: Sequence[nn.GroupNorm] = (),
    ) -> Tensor:
        """Images (B, C, H, W) of features (B, d, h, w).

        Args:
            decode: features of a tile -> its images.
            image_size: H and W in pixels.
            norms: the group normalisations of the decoder.
        """
        factors = [side // n for side, n in zip(image_size, vectors.shape[2:], strict=True)]
        tiles = [max(1, self.tile // factor) for factor in factors]  # in positions of the latents
        overlaps = [
            min(-(-self.overlap // factor), tile - 1)
            for factor, tile in zip(factors, tiles, strict=True)
        ]
        if all(tile >= n for tile, n in zip(tiles, vectors.shape[2:], strict=True)):
            return decode(vectors)
        sides = [min(tile, n) for tile, n in zip(tiles, vectors.shape[2:], strict=True)]
        with _shared_statistics(norms, decode, F.interpolate(vectors, sides, mode="nearest-exact")):
            return self._blended(decode, vectors, image_size, tiles, overlaps, factors)

    def _blended(
        self,
        decode: Callable[[Tensor], Tensor],
        vectors: Tensor,
        image_size: tuple[int, int],
        tiles: Sequence[int],
        overlaps: Sequence[int],
        factors: Sequence[int],
    ) -> Tensor:
        """The images of tiles with these sides and overlaps, in positions of the latents, of which
        each is `factors` pixels high and wide."""
        images = total = None
        rows, columns = (
            list(_spans(n, tile, overlap))
            for n, tile, overlap in zip(vectors.shape[2:], tiles, overlaps, strict=True)
        )
        for top, bottom in rows:
            for left, right in columns:
                part = decode(vectors[:, :, top:bottom, left:right])  # (B, C, a, b)
                if images is None or total is None:
                    images = part.new_zeros(*part.shape[:2], *image_size)
                    total = part.new_zeros(1, 1, *image_size)
                weight = _weights(top, bottom, vectors.shape[2], overlaps[0], factors[0])[:, None]
                weight = weight * _weights(
                    left, right, vectors.shape[3], overlaps[1], factors[1]
                )  # (a, b)
                weight = weight.to(part)
                place = (
                    slice(top * factors[0], bottom * factors[0]),
                    slice(left * factors[1], right * factors[1]),
                )
                images[:, :, *place] += weight * part
                total[:, :, *place] += weight
        assert images is not None and total is not None
        return images / total


@contextmanager
def _shared_statistics(
    norms: Sequence[nn.GroupNorm], decode: Callable[[Tensor], Tensor], vectors: Tensor
) -> Iterator[None]:
    """Let normalisations use the means and variances that they have while these features (B, d, a,
    b) are decoded."""
    found: dict[nn.Module, tuple[Tensor, Tensor]] = {}  # factor and summand, (B, C, 1, 1) each

    def record(norm: nn.GroupNorm, given: tuple[Tensor], normed: Tensor) -> None:
        del normed
        x = given[0].float()
        groups = x.reshape(len(x), norm.num_groups, -1)
        variance, mean = torch.var_mean(groups, 2, correction=0)  # (B, groups)
        factor = (variance + norm.eps).rsqrt()
        of_channels = x.shape[1] // norm.num_groups
        factor, mean = (values.repeat_interleave(of_channels, 1) for values in (factor, mean))
        summand = -mean * factor  # (B, C)
        if norm.affine:
            factor, summand = factor * norm.weight, summand * norm.weight + norm.bias
        found[norm] = factor[..., None, None], summand[..., None, None]

    def replace(norm: nn.GroupNorm, given: tuple[Tensor], normed: Tensor) -> Tensor:
        if norm not in found:
            return normed
        factor, summand = found[norm]
        return torch.addcmul(summand, given[0].float(), factor).to(normed.dtype)

    handles: list[RemovableHandle] = []
    try:
        handles += [norm.register_forward_hook(record) for norm in norms]
        if norms:
            decode(vectors)
        while handles:
            handles.pop().remove()
        handles += [norm.register_forward_hook(replace) for norm in norms]
        yield
    finally:
        for handle in handles:
            handle.remove()


def _spans(length: int, tile: int, overlap: int) -> Iterator[tuple[int, int]]:
    """Start and stop of the tiles along one side; the last one ends where the side ends."""
    start = 0
    while start + tile < length:
        yield start, start + tile
        start += tile - overlap
    yield max(0, length - tile), length


def _weights(start: int, stop: int, length: int, overlap: int, factor: int) -> Tensor:
    """Weight of each pixel of a tile along one side, (a,) in [0, 1]."""
    weight, pixels = torch.ones((stop - start) * factor), overlap * factor
    centres = (torch.arange(pixels) + 0.5) / max(pixels, 1)
    ramp = (2 * centres - 0.5).clamp(0, 1)  # 0 in the first quarter, 1 in the last
    if start > 0 and pixels:
        weight[:pixels] *= ramp
    if stop < length and pixels:
        weight[-pixels:] *= ramp.flip(0)
    return weight
