"""Winograd's convolution F(4 x 4, 3 x 3) (Lavin and Gray, 1509.09308): 4 times fewer products.

    y = A'[(G g G') * (B' d B)] A

for tiles d of 6 x 6 inputs, filters g of 3 x 3 and tiles y of 4 x 4 outputs. The elementwise
product, summed over channels, is 36 matrix products. For encoders and decoders on a CPU, which
spend 90 % of their time in 3 x 3 convolutions: there the direct convolution already works at the
processor's peak, so that only fewer operations make it faster.

The rounding error is about 1e-6 of the outputs in fp32; that of a direct convolution is 2e-7 with
vectors of 512 bits and 6e-7 with vectors of 256 bits.
"""

import threading
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 4  # outputs per tile and side
WINDOW = TILE + 2  # inputs per tile and side
# Where the polynomials of Cook and Toom are evaluated, beside infinity. The points of the paper
# (0, 1, -1, 2, -2) double the rounding error.
POINTS = (0.0, 2 / 3, -2 / 3, 3 / 2, -3 / 2)
# Below these sizes the transforms cost more than they save.
LEAST_CHANNELS, LEAST_POSITIONS = 128, 32 * 32
STRIP_ELEMENTS = 2**16  # tiles times channels that are transformed at once: 9 MB, for the cache


def is_faster(x: Tensor, weight: Tensor) -> bool:
    """Whether `convolve` takes less time than PyTorch's direct convolution, and needs no gradient.

    The number of images does not count, so that a picture is the same in a batch of any size.
    """
    return (
        not torch.is_grad_enabled()
        and x.device.type == "cpu"  # cuDNN has its own choice of algorithms
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and min(weight.shape[:2]) >= LEAST_CHANNELS
        and x.shape[2] * x.shape[3] >= LEAST_POSITIONS
    )


@cache
def _matrices() -> tuple[Tensor, Tensor, Tensor]:
    """B' (6, 6), G (6, 3) and A' (4, 6), by the construction of Cook and Toom: polynomials are
    multiplied by their values at some points; a correlation is the transpose of that product."""
    points = torch.tensor(POINTS, dtype=torch.float64)

    def values(terms: int) -> Tensor:
        """Powers of the points, and the leading term for infinity, (6, terms)."""
        last = F.one_hot(torch.tensor([terms - 1]), terms)
        return torch.cat([points[:, None] ** torch.arange(terms), last])

    inverse = torch.linalg.inv(values(WINDOW)).T
    return inverse.float(), values(3).float(), values(TILE).T.float()


class _Scratch(threading.local):
    """Memory for transformed filters, 4 times as large as the filters, which each thread reuses:
    the operating system takes longer to hand out new memory than they to be computed."""

    def __init__(self) -> None:
        self.values = torch.empty(0)

    def of(self, rows: int, columns: int) -> Tensor:
        """An uninitialised matrix, valid until the next one is requested."""
        if len(self.values) < rows * columns:
            self.values = torch.empty(rows * columns)
        return self.values[: rows * columns].view(rows, columns)


_scratch = _Scratch()


# Registered as an operator, so that torch.compile calls it instead of tracing its loops.
@torch.library.custom_op("smalti::winograd_convolution", mutates_args=())
def convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`F.conv2d(x, weight, bias, padding=1)` up to rounding, in channels-last format.

    Images are convolved one by one, so that none depends on its batch, in strips of tiles that fit
    the cache.

    Args:
        x: (B, C, h, w).
        weight: (K, C, 3, 3).
        bias: (K,).

    Returns:
        (B, K, h, w).
    """
    from_window, from_filter, to_outputs = _matrices()
    (batch, channels, height, width), filters = x.shape, len(weight)
    rows, columns = -(-height // TILE), -(-width // TILE)  # of tiles
    both = torch.kron(from_filter, from_filter)  # (36, 9)
    kernels = _scratch.of(WINDOW**2, filters * channels)
    torch.mm(both, weight.reshape(-1, 9).T, out=kernels)
    kernels = kernels.view(WINDOW**2, filters, channels).mT
    output = x.new_empty(batch, rows, TILE, columns, TILE, filters)
    strip = max(1, STRIP_ELEMENTS // (columns * channels))  # rows of tiles
    for image, result in zip(x.permute(0, 2, 3, 1), output, strict=True):
        padding = (0, 0, 1, TILE * columns + 1 - width, 1, TILE * rows + 1 - height)
        padded = F.pad(image, padding).contiguous()  # (4 rows + 2, 4 columns + 2, C)
        windows = padded.unfold(0, WINDOW, TILE).unfold(1, WINDOW, TILE)  # (rows, columns, C, 6, 6)
        for part, place in zip(windows.split(strip), result.split(strip), strict=True):
            tiles = part.permute(3, 4, 0, 1, 2).reshape(WINDOW, -1)  # (6, 6 n C), n tiles
            tiles = from_window @ tiles
            tiles = torch.matmul(from_window, tiles.view(WINDOW, WINDOW, -1))
            tiles = torch.bmm(tiles.view(WINDOW**2, -1, channels), kernels)  # (36, n, K)
            tiles = to_outputs @ tiles.view(WINDOW, -1)  # (4, 6 n K)
            tiles = torch.matmul(to_outputs, tiles.view(TILE, WINDOW, -1))  # (4, 4, n K)
            tiles = tiles.view(TILE, TILE, -1, columns, filters).add_(bias)
            place.copy_(tiles.permute(2, 0, 3, 1, 4))
    maps = output.view(batch, TILE * rows, TILE * columns, filters)[:, :height, :width]
    return maps.contiguous().permute(0, 3, 1, 2)


@convolve.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    del bias
    return x.new_empty(len(x), *x.shape[2:], len(weight)).permute(0, 3, 1, 2)
