"""Latent manipulation: blend two pictures, move one along a direction, find a picture's latents.

All of it works on the real features that a decoder draws from, `Tokenizer.vectors`, and is made
visible by `Tokenizer.decode_vectors`: codes and continuous latents are treated alike. Moved codes
are no longer entries of the codebook; the decoder draws them all the same.

    blend        linear, spherical                    `interpolate` makes a path of either
    direction    attribute_direction, channel_axis    `move` goes along either
    inversion    invert                               minimises for example `picture_distance`
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from smalti.errors import SmaltiError
from smalti.tokenizer.losses.perceptual import LPIPS

# -- blending two pictures --------------------------------------------------------------------


def linear(start: Tensor, end: Tensor, t: float) -> Tensor:
    """(1 - t) start + t end, of equal shapes."""
    return torch.lerp(start, end, t)


def spherical(start: Tensor, end: Tensor, t: float) -> Tensor:
    """Turn start (B, d, ...) towards end at constant speed along a great circle.

    Shoemake's slerp (SIGGRAPH 1985), for latents proposed by White (1609.04468): between two unit
    vectors all blends are unit vectors, whereas the middle of a straight line lies inside the
    sphere, where a decoder has seen nothing. Every grid position of (B, d, h, w) turns by itself,
    as suits codes; for Gaussian latents see `spherical_as_one`.

    Lengths, where they differ, go linearly from one to the other. Opposite vectors have many great
    circles; one of them is taken. A zero vector has no direction: the blend is linear there.
    """
    first, second = (torch.linalg.vector_norm(v, dim=1, keepdim=True) for v in (start, end))
    u, v = F.normalize(start, dim=1), F.normalize(end, dim=1)
    # Twice is enough (Kahan): rounding leaves a trace of u in what remains of a nearly parallel v.
    across = _without(_without(v, u), u)
    sine = torch.linalg.vector_norm(across, dim=1, keepdim=True)
    angle = torch.atan2(sine, (u * v).sum(1, keepdim=True))  # exact near 0 and pi, unlike arccos
    parallel = sine <= 8 * torch.finfo(sine.dtype).eps
    w = torch.where(parallel, _perpendicular(u), F.normalize(across, dim=1))
    turned = torch.lerp(first, second, t) * (torch.cos(t * angle) * u + torch.sin(t * angle) * w)
    return torch.where((first == 0) | (second == 0), torch.lerp(start, end, t), turned)


def spherical_as_one(start: Tensor, end: Tensor, t: float) -> Tensor:
    """`spherical` with all numbers of a picture (B, d, h, w) as one vector, as White has it.

    The length of a Gaussian latent hardly varies as a whole; at one position it does.
    """
    return spherical(start.flatten(1), end.flatten(1), t).view_as(start)


def _without(vectors: Tensor, unit: Tensor) -> Tensor:
    """What is left of vectors (B, d, ...) without their part along unit vectors."""
    return vectors - (vectors * unit).sum(1, keepdim=True) * unit


def _perpendicular(unit: Tensor) -> Tensor:
    """Unit vectors (B, d, ...) at a right angle to the given ones; 0 where d = 1 allows none."""
    least = unit.abs().argmin(1, keepdim=True)
    axis = torch.zeros_like(unit).scatter_(1, least, 1.0)
    return F.normalize(_without(axis, unit), dim=1)


def interpolate(
    start: Tensor, end: Tensor, steps: int, blend: Callable[[Tensor, Tensor, float], Tensor]
) -> Tensor:
    """Blends of start and end (B, d, h, w) at `steps` equal distances, both ends included.

    Returns:
        (B, steps, d, h, w).

    Raises:
        SmaltiError: the shapes differ, or there are fewer than 2 steps.
    """
    if start.shape != end.shape:
        raise SmaltiError(
            f"start has shape {tuple(start.shape)}, end {tuple(end.shape)}: they must be equal"
        )
    if steps < 2:
        raise SmaltiError(f"steps is {steps}; use at least 2, the two ends")
    return torch.stack([blend(start, end, i / (steps - 1)) for i in range(steps)], dim=1)


# -- moving along a direction -----------------------------------------------------------------


def class_mean(vectors: Tensor, labels: Tensor, label: int) -> Tensor:
    """Mean (d, h, w) of those vectors (N, d, h, w) whose labels (N,) equal `label`.

    Raises:
        SmaltiError: there are none.
    """
    members = vectors[labels == label]
    if not len(members):
        raise SmaltiError(f"no picture has the label {label}: a mean needs at least one")
    return members.mean(0)


def attribute_direction(vectors: Tensor, labels: Tensor, positive: int, negative: int) -> Tensor:
    """Mean of one label minus mean of another, (d, h, w): what adding the attribute changes.

    Latent arithmetic as in DCGAN (Radford et al., 1511.06434), by an encoder's labelled means as
    in VAE/GAN (Larsen et al., 1512.09300).

    Args:
        vectors: (N, d, h, w), of labelled pictures.
        labels: (N,) int64.

    Raises:
        SmaltiError: no picture has one of the two labels.
    """
    return class_mean(vectors, labels, positive) - class_mean(vectors, labels, negative)


def channel_axis(channel: int, num_channels: int) -> Tensor:
    """1 in one channel and 0 in all others, (d, 1, 1): the direction of a latent dimension.

    Raises:
        SmaltiError: there is no such channel.
    """
    if not 0 <= channel < num_channels:
        raise SmaltiError(f"channel {channel} is out of range: use 0 to {num_channels - 1}")
    axis = torch.zeros(num_channels, 1, 1)
    axis[channel] = 1
    return axis


def channel_deviations(vectors: Tensor) -> Tensor:
    """Standard deviation of each channel of (N, d, h, w) over pictures and positions, (d, 1, 1).

    Raises:
        SmaltiError: there are no vectors.
    """
    if not len(vectors):
        raise SmaltiError("there are no vectors: a standard deviation needs pictures")
    return vectors.std((0, 2, 3), correction=0)[:, None, None]


def move(vectors: Tensor, direction: Tensor, strengths: Sequence[float]) -> Tensor:
    """vectors + strength * direction for every strength; 0 leaves a picture where it is.

    Args:
        vectors: (B, d, h, w).
        direction: (d, h, w), or (d, 1, 1) for the same change everywhere.

    Returns:
        (B, S, d, h, w) for S strengths.
    """
    return torch.stack([vectors + strength * direction for strength in strengths], dim=1)


# -- inversion --------------------------------------------------------------------------------


@dataclass
class Inversion:
    """What a search for latents found."""

    vectors: Tensor  # (B, d, h, w): for each picture the best that the search came by
    losses: Tensor  # (steps + 1, B): the curve of each picture, from the start on


def picture_distance(
    images: Tensor, target: Tensor, perceptual: LPIPS | None = None, perceptual_weight: float = 1.0
) -> Tensor:
    """Mean squared pixel difference plus weighted LPIPS, (B,): Image2StyleGAN's, 1904.03189.

    Args:
        images, target: (B, 3, H, W) in [-1, 1].
        perceptual: None leaves LPIPS out, as one must below 32 px.

    Raises:
        SmaltiError: the shapes differ, or LPIPS cannot judge pictures as small as these.
    """
    if images.shape != target.shape:
        raise SmaltiError(
            f"images have shape {tuple(images.shape)}, the target {tuple(target.shape)}: "
            "they must be equal"
        )
    pixels = (images.float() - target.float()).square().mean((1, 2, 3))
    if perceptual is None:
        return pixels
    return pixels + perceptual_weight * perceptual(images, target)


@torch.enable_grad()
def invert(
    decode: Callable[[Tensor], Tensor],
    distance: Callable[[Tensor, Tensor], Tensor],
    target: Tensor,
    start: Tensor,
    *,
    steps: int,
    learning_rate: float,
    observe: Callable[[int, Tensor], None] = lambda step, vectors: None,
) -> Inversion:
    """Find the vectors that decode to a picture: Adam on the vectors, the decoder stays as it is.

    As Image2StyleGAN (Abdal et al., 1904.03189) does for a GAN. Pictures do not influence one
    another, the result is never worse than the start, and no gradient is left anywhere.

    Args:
        decode: vectors (B, d, h, w) -> images (B, 3, H, W), for example a tokenizer's
            `decode_vectors`.
        distance: (images, target) -> (B,), for example `picture_distance`.
        target: (B, 3, H, W) in [-1, 1].
        start: (B, d, h, w), for example the encoder's answer, or the mean over many pictures.
        observe: called with the number of steps done and the vectors that they led to.

    Raises:
        SmaltiError: `steps` or `learning_rate` is not positive.
    """
    if steps < 1 or learning_rate <= 0:
        raise SmaltiError(f"steps is {steps}, learning_rate {learning_rate}; both must exceed 0")
    vectors = start.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([vectors], lr=learning_rate)
    best, least = start.detach().clone(), start.new_full((len(start),), torch.inf)
    losses = []
    for step in range(steps + 1):  # one more, so that what the last step led to is judged, too
        loss = distance(decode(vectors), target)  # (B,)
        (vectors.grad,) = torch.autograd.grad(loss.sum(), [vectors])  # no parameter gets one
        losses.append(loss.detach())
        better = losses[-1] < least
        best[better], least[better] = vectors.detach()[better], losses[-1][better]
        observe(step, vectors.detach().clone())
        if step < steps:
            optimizer.step()
    return Inversion(best, torch.stack(losses))
