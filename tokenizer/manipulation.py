"""Latent manipulation: interpolation between images, directions of change, inversion.

All functions use the real-valued features that a decoder takes: `Tokenizer.vectors` returns them,
`Tokenizer.decode_vectors` decodes them to images. Codes and continuous latents are treated alike.
Vectors between codes are not entries of the codebook, but can be decoded as well.

    interpolation    interpolate, by linear, spherical or spherical_as_one
    directions       move, along an attribute_direction or a channel_axis
    inversion        invert, minimises for example picture_distance

Shapes: B batch, N labelled images, d numbers per vector, h w latent grid.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from smalti.errors import ConfigurationError, DataError
from smalti.tokenizer.losses.perceptual import LPIPS

# -------------------------------------------------------------------------------------------------
# Interpolation: linear, and along a great circle (slerp, Shoemake, SIGGRAPH 1985)


def linear(start: Tensor, end: Tensor, t: float) -> Tensor:
    """(1 - t) start + t end; any shape, equal for both."""
    return torch.lerp(start, end, t)


def _orthogonal_part(vectors: Tensor, unit: Tensor) -> Tensor:
    """Vectors (B, d, ...) minus their projection onto unit vectors."""
    return vectors - (vectors * unit).sum(1, keepdim=True) * unit


def _perpendicular(unit: Tensor) -> Tensor:
    """Unit vectors (B, d, ...) at a right angle to the given ones; 0 where d = 1 allows none."""
    least = unit.abs().argmin(1, keepdim=True)
    axis = torch.zeros_like(unit).scatter_(1, least, 1.0)
    return F.normalize(_orthogonal_part(axis, unit), dim=1)


def spherical(start: Tensor, end: Tensor, t: float) -> Tensor:
    """Rotate start (B, d, ...) towards end at constant speed along a great circle.

    Shoemake's slerp, proposed for latents by White (1609.04468): between two unit vectors all
    results are unit vectors, whereas the middle of a straight line lies inside the sphere, where a
    decoder has no training data. Every grid position of (B, d, h, w) is rotated separately, which
    suits codes; for Gaussian latents see `spherical_as_one`.

    Lengths that differ are interpolated linearly. Opposite vectors have many great circles; one of
    them is taken. A zero vector has no direction: the interpolation is linear there.
    """
    first, second = (torch.linalg.vector_norm(v, dim=1, keepdim=True) for v in (start, end))
    u, v = F.normalize(start, dim=1), F.normalize(end, dim=1)
    # Orthogonalised twice (Kahan): if v is nearly parallel to u, rounding leaves some of u in it.
    rest = _orthogonal_part(_orthogonal_part(v, u), u)
    sine = torch.linalg.vector_norm(rest, dim=1, keepdim=True)
    angle = torch.atan2(sine, (u * v).sum(1, keepdim=True))  # exact near 0 and pi, unlike arccos
    parallel = sine <= 8 * torch.finfo(sine.dtype).eps
    w = torch.where(parallel, _perpendicular(u), F.normalize(rest, dim=1))
    rotated = torch.lerp(first, second, t) * (torch.cos(t * angle) * u + torch.sin(t * angle) * w)
    return torch.where((first == 0) | (second == 0), torch.lerp(start, end, t), rotated)


def spherical_as_one(start: Tensor, end: Tensor, t: float) -> Tensor:
    """`spherical` with the complete latent (B, d, h, w) of an image as one vector (White).

    Complete Gaussian latents have almost equal lengths; the lengths of single positions vary.
    """
    return spherical(start.flatten(1), end.flatten(1), t).view_as(start)


def interpolate(
    start: Tensor, end: Tensor, steps: int, blend: Callable[[Tensor, Tensor, float], Tensor]
) -> Tensor:
    """`steps` evenly spaced points from start to end, both (B, d, h, w), ends included.

    Args:
        blend: (start, end, t) -> the point at t in [0, 1], for example `linear` or `spherical`.

    Returns:
        (B, steps, d, h, w).

    Raises:
        SmaltiError: the shapes differ, or there are fewer than 2 steps.
    """
    if start.shape != end.shape:
        raise DataError(
            f"start has shape {tuple(start.shape)}, end {tuple(end.shape)}: they must be equal"
        )
    if steps < 2:
        raise ConfigurationError(f"steps is {steps}; use at least 2, the two ends")
    return torch.stack([blend(start, end, i / (steps - 1)) for i in range(steps)], dim=1)


# -------------------------------------------------------------------------------------------------
# Directions: z + strength * direction


def class_mean(vectors: Tensor, labels: Tensor, label: int) -> Tensor:
    """Mean (d, h, w) of those vectors (N, d, h, w) whose labels (N,) equal `label`.

    Raises:
        DataError: there are none.
    """
    members = vectors[labels == label]
    if not len(members):
        raise DataError(f"no image has the label {label}: a mean needs at least one")
    return members.mean(0)


def attribute_direction(vectors: Tensor, labels: Tensor, positive: int, negative: int) -> Tensor:
    """Mean of one label minus mean of another, (d, h, w): what adding the attribute changes.

    Latent arithmetic as in DCGAN (Radford et al., 1511.06434), with means over encoded, labelled
    images as in VAE/GAN (Larsen et al., 1512.09300).

    Args:
        vectors: (N, d, h, w), of labelled images.
        labels: (N,) int64.

    Raises:
        DataError: no image has one of the two labels.
    """
    return class_mean(vectors, labels, positive) - class_mean(vectors, labels, negative)


def channel_axis(channel: int, num_channels: int) -> Tensor:
    """The direction (d, 1, 1) of one latent channel: 1 in that channel, 0 in all others.

    Raises:
        ConfigurationError: there is no such channel.
    """
    if not 0 <= channel < num_channels:
        raise ConfigurationError(f"channel {channel} is out of range: use 0 to {num_channels - 1}")
    axis = torch.zeros(num_channels, 1, 1)
    axis[channel] = 1
    return axis


def channel_deviations(vectors: Tensor) -> Tensor:
    """Standard deviation of each channel of (N, d, h, w) over images and positions, (d, 1, 1).

    Raises:
        DataError: there are no vectors.
    """
    if not len(vectors):
        raise DataError("there are no vectors: a standard deviation needs at least one")
    return vectors.std((0, 2, 3), correction=0)[:, None, None]


def move(vectors: Tensor, direction: Tensor, strengths: Sequence[float]) -> Tensor:
    """vectors + strength * direction for every strength; strength 0 changes nothing.

    Args:
        vectors: (B, d, h, w).
        direction: (d, h, w), or (d, 1, 1) for the same change everywhere.

    Returns:
        (B, S, d, h, w) for S strengths.
    """
    return torch.stack([vectors + strength * direction for strength in strengths], dim=1)


# -------------------------------------------------------------------------------------------------
# Inversion: argmin_z distance(decode(z), target) (Image2StyleGAN, Abdal et al., 1904.03189)


@dataclass
class Inversion:
    """Result of an inversion."""

    vectors: Tensor  # (B, d, h, w): those with the lowest loss, for each image
    losses: Tensor  # (steps + 1, B): loss of each image, from the start on


def picture_distance(
    images: Tensor, target: Tensor, perceptual: LPIPS | None = None, perceptual_weight: float = 1.0
) -> Tensor:
    """Mean squared pixel difference plus weighted LPIPS, (B,), as in Image2StyleGAN.

    Args:
        images, target: (B, C, H, W) in [-1, 1].
        perceptual: None leaves LPIPS out, which is undefined below 32 px.

    Raises:
        DataError: the shapes differ, or the images are too small for LPIPS.
    """
    if images.shape != target.shape:
        raise DataError(
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
    """Find the vectors that decode to given images: Adam on the vectors, with a fixed decoder.

    Images do not influence one another, and the result is never worse than the start. No
    parameter of the decoder gets a gradient.

    Args:
        decode: vectors (B, d, h, w) -> images (B, 3, H, W), for example a tokenizer's
            `decode_vectors`.
        distance: (images, target) -> (B,), for example `picture_distance`.
        target: (B, 3, H, W) in [-1, 1].
        start: (B, d, h, w), for example the target's encoding, or the mean over many images.
        learning_rate: Adam's.
        observe: called before the first and after every step, with the number of steps done and
            the vectors then.

    Raises:
        ConfigurationError: `steps` or `learning_rate` is not positive.
    """
    if steps < 1 or learning_rate <= 0:
        raise ConfigurationError(
            f"steps is {steps}, learning_rate {learning_rate}; both must exceed 0"
        )
    vectors = start.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([vectors], lr=learning_rate)
    best, least = start.detach().clone(), start.new_full((len(start),), torch.inf)
    losses = []
    for step in range(steps + 1):  # one more, to evaluate the result of the last step
        loss = distance(decode(vectors), target)  # (B,)
        (vectors.grad,) = torch.autograd.grad(loss.sum(), [vectors])  # none of parameters
        losses.append(loss.detach())
        better = losses[-1] < least
        best[better], least[better] = vectors.detach()[better], losses[-1][better]
        observe(step, vectors.detach().clone())
        if step < steps:
            optimizer.step()
    return Inversion(best, torch.stack(losses))
