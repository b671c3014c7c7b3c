"""Latent manipulation against closed forms."""

import math

import pytest
import torch
import torch.nn.functional as F

from smalti.errors import SmaltiError
from smalti.tokenizer.losses.perceptual import LPIPS
from smalti.tokenizer.manipulation import (
    attribute_direction,
    channel_axis,
    channel_deviations,
    class_mean,
    interpolate,
    invert,
    linear,
    move,
    picture_distance,
    spherical,
    spherical_as_one,
)

TIMES = (0.0, 0.25, 0.5, 0.9, 1.0)


def unit(*shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape), dim=1)


def norm(vectors: torch.Tensor) -> torch.Tensor:
    return vectors.norm(dim=1)


# -- blending ---------------------------------------------------------------------------------


@pytest.mark.parametrize("blend", [linear, spherical, spherical_as_one])
def test_a_blend_begins_and_ends_at_its_images(blend) -> None:
    start, end = torch.randn(2, 5, 3, 3), torch.randn(2, 5, 3, 3)
    torch.testing.assert_close(blend(start, end, 0.0), start)
    torch.testing.assert_close(blend(start, end, 1.0), end)


@pytest.mark.parametrize("t", TIMES)
def test_between_unit_vectors_the_arc_stays_on_the_sphere(t: float) -> None:
    blend = spherical(unit(2, 8, 4, 4), unit(2, 8, 4, 4), t)
    torch.testing.assert_close(norm(blend), torch.ones(2, 4, 4))


def test_the_straight_line_leaves_the_sphere() -> None:
    start = torch.tensor([[1.0, 0.0]])
    end = torch.tensor([[0.0, 1.0]])
    assert norm(linear(start, end, 0.5)).item() == pytest.approx(math.sqrt(0.5))


@pytest.mark.parametrize("t", TIMES)
def test_the_arc_is_followed_at_constant_speed(t: float) -> None:
    """In the plane, from angle 0 to 2 radians: at angle 2 t."""
    start = torch.tensor([[1.0, 0.0]])
    end = torch.tensor([[math.cos(2), math.sin(2)]])
    expected = torch.tensor([[math.cos(2 * t), math.sin(2 * t)]])
    torch.testing.assert_close(spherical(start, end, t), expected)


@pytest.mark.parametrize("t", TIMES)
def test_the_arc_is_shoemakes_formula(t: float) -> None:
    start, end = unit(7, 6), unit(7, 6)
    angle = (start * end).sum(1, keepdim=True).arccos()
    formula = (((1 - t) * angle).sin() * start + (t * angle).sin() * end) / angle.sin()
    torch.testing.assert_close(spherical(start, end, t), formula, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("t", TIMES)
def test_lengths_are_interpolated_linearly(t: float) -> None:
    start, end = 2 * unit(3, 6), 5 * unit(3, 6)
    torch.testing.assert_close(norm(spherical(start, end, t)), torch.full((3,), 2 + 3 * t))


@pytest.mark.parametrize("t", TIMES)
@pytest.mark.parametrize("factor", [1.0, 1 + 1e-7, 3.0])
def test_vectors_of_equal_direction_are_blended_linearly(t: float, factor: float) -> None:
    start = torch.randn(64, 8)
    torch.testing.assert_close(
        spherical(start, factor * start, t), linear(start, factor * start, t)
    )


@pytest.mark.parametrize("noise", [0.0, 1e-8, 1e-7, 1e-6, 1e-4])
def test_opposite_vectors_are_half_a_circle_apart(noise: float) -> None:
    start = unit(64, 8)
    end = F.normalize(-start + noise * torch.randn(64, 8), dim=1)
    for t in TIMES:
        blend = spherical(start, end, t)
        torch.testing.assert_close(norm(blend), torch.ones(64))
        cosine = torch.full((64,), math.cos(math.pi * t))
        torch.testing.assert_close((blend * start).sum(1), cosine, rtol=0, atol=1e-3)
    torch.testing.assert_close(spherical(start, end, 1.0), end, rtol=0, atol=2e-6)


@pytest.mark.parametrize("t", TIMES)
def test_a_zero_vector_is_blended_linearly(t: float) -> None:
    zero, vector = torch.zeros(1, 4), torch.randn(1, 4)
    torch.testing.assert_close(spherical(zero, vector, t), t * vector)
    torch.testing.assert_close(spherical(vector, zero, t), (1 - t) * vector)
    assert torch.equal(spherical(zero, zero, t), zero)


def test_opposite_numbers_pass_through_zero() -> None:
    """With one number per position there is no way round."""
    start = torch.ones(1, 1, 2, 2)
    blend = spherical(start, -start, 0.5)
    torch.testing.assert_close(blend, torch.zeros(1, 1, 2, 2), rtol=0, atol=1e-6)


def test_positions_are_rotated_one_by_one_or_as_one_vector() -> None:
    start, end = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    each, whole = spherical(start, end, 0.3), spherical_as_one(start, end, 0.3)
    torch.testing.assert_close(each[:, :, 1, 2], spherical(start[:, :, 1, 2], end[:, :, 1, 2], 0.3))
    torch.testing.assert_close(
        norm(whole.flatten(1)), 0.7 * norm(start.flatten(1)) + 0.3 * norm(end.flatten(1))
    )


def test_a_path_holds_its_blends() -> None:
    start, end = torch.zeros(2, 3, 1, 1), torch.ones(2, 3, 1, 1)
    path = interpolate(start, end, 5, linear)
    assert path.shape == (2, 5, 3, 1, 1)
    assert path[1, :, 0, 0, 0].tolist() == [0, 0.25, 0.5, 0.75, 1]


def test_impossible_paths_are_refused() -> None:
    with pytest.raises(SmaltiError, match="steps is 1; use at least 2"):
        interpolate(torch.zeros(1, 3, 1, 1), torch.zeros(1, 3, 1, 1), 1, linear)
    with pytest.raises(SmaltiError, match=r"\(1, 3, 1, 1\).*\(1, 4, 1, 1\)"):
        interpolate(torch.zeros(1, 3, 1, 1), torch.zeros(1, 4, 1, 1), 2, linear)


# -- directions -------------------------------------------------------------------------------


def test_an_attribute_is_the_difference_of_two_means() -> None:
    vectors = torch.randn(20, 3, 2, 2)
    labels = torch.arange(20) % 4
    torch.testing.assert_close(class_mean(vectors, labels, 2), vectors[2::4].mean(0))
    direction = attribute_direction(vectors, labels, 1, 3)
    torch.testing.assert_close(direction, vectors[1::4].mean(0) - vectors[3::4].mean(0))
    negated = attribute_direction(vectors, labels, 3, 1)
    torch.testing.assert_close(direction, -negated)


def test_an_attribute_that_was_added_is_found() -> None:
    plain, added = torch.randn(10, 3, 2, 2), torch.randn(3, 2, 2)
    vectors, labels = torch.cat([plain, plain + added]), torch.arange(20) // 10
    direction = attribute_direction(vectors, labels, 1, 0)
    torch.testing.assert_close(direction, added, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(move(plain, direction, [1.0])[:, 0], plain + added)


def test_a_label_without_pictures_has_no_mean() -> None:
    with pytest.raises(SmaltiError, match="no image has the label 5"):
        attribute_direction(torch.zeros(2, 3, 1, 1), torch.tensor([0, 1]), 0, 5)


def test_moving_adds_multiples_of_the_direction() -> None:
    vectors, direction = torch.randn(2, 3, 4, 4), torch.randn(3, 4, 4)
    moved = move(vectors, direction, [-1.0, 0.0, 2.0])
    assert moved.shape == (2, 3, 3, 4, 4)
    assert torch.equal(moved[:, 1], vectors)
    torch.testing.assert_close(moved[:, 2] - vectors, (2 * direction).expand(2, -1, -1, -1))
    torch.testing.assert_close(moved[:, 0] + moved[:, 2], 2 * vectors + direction)


def test_deviations_are_those_of_each_channel_over_pictures_and_positions() -> None:
    scales = torch.tensor([0.5, 1.0, 4.0])[:, None, None]
    vectors = torch.randn(64, 3, 16, 16) * scales + 7
    deviations = channel_deviations(vectors)
    assert deviations.shape == (3, 1, 1)
    torch.testing.assert_close(deviations, scales, rtol=0.03, atol=0)
    expected = (vectors - vectors.mean((0, 2, 3), keepdim=True)).square().mean((0, 2, 3)).sqrt()
    torch.testing.assert_close(deviations[:, 0, 0], expected)


def test_a_traversal_changes_one_channel_alike_everywhere() -> None:
    vectors = torch.randn(1, 3, 2, 2)
    direction = channel_axis(1, 3) * torch.tensor([5.0, 0.5, 5.0])[:, None, None]
    change = move(vectors, direction, [2.0])[:, 0] - vectors
    torch.testing.assert_close(change[:, 1], torch.ones(1, 2, 2))
    assert not change[:, [0, 2]].any()


@pytest.mark.parametrize("channel", [-1, 3])
def test_a_channel_that_is_not_there_is_refused(channel: int) -> None:
    with pytest.raises(SmaltiError, match=f"channel {channel} is out of range: use 0 to 2"):
        channel_axis(channel, 3)


def test_no_vectors_have_no_deviation() -> None:
    with pytest.raises(SmaltiError, match="no vectors"):
        channel_deviations(torch.zeros(0, 3, 2, 2))


# -- inversion --------------------------------------------------------------------------------


def test_inversion_solves_least_squares() -> None:
    """Against a linear decoder the best vectors have a closed form."""
    weight = torch.randn(3, 2, dtype=torch.float64)
    target = torch.randn(4, 3, 5, 5, dtype=torch.float64)

    def decode(vectors: torch.Tensor) -> torch.Tensor:
        return torch.einsum("cd,bdhw->bchw", weight, vectors)

    expected = torch.einsum("dc,bchw->bdhw", torch.linalg.pinv(weight), target)
    start = torch.zeros(4, 2, 5, 5, dtype=torch.float64)
    found = invert(decode, mean_square, target, start, steps=500, learning_rate=0.05)
    torch.testing.assert_close(found.vectors, expected, rtol=0, atol=1e-3)
    least = (decode(expected) - target).square().mean((1, 2, 3))
    torch.testing.assert_close(found.losses.min(0).values, least, rtol=1e-4, atol=1e-6)


def mean_square(images: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (images - target).square().mean((1, 2, 3))


def test_the_curve_is_that_of_the_vectors_observed() -> None:
    target, start, seen = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), []
    found = invert(
        torch.tanh, picture_distance, target, start, steps=9, learning_rate=0.1,
        observe=lambda step, vectors: seen.append((step, vectors)),
    )  # fmt: skip
    assert [step for step, _ in seen] == list(range(10))
    assert torch.equal(seen[0][1], start)
    curve = torch.stack([picture_distance(vectors.tanh(), target) for _, vectors in seen])
    torch.testing.assert_close(found.losses, curve)
    assert (found.losses[-1] < found.losses[0]).all()


def test_the_result_is_never_worse_than_the_start() -> None:
    start = torch.randn(3, 3, 4, 4)
    far = invert(
        lambda v: v, mean_square, start + 1e-3, start, steps=5, learning_rate=100.0
    )  # overshoots at once
    assert (far.losses[1:] > far.losses[0]).all()
    assert torch.equal(far.vectors, start)


def test_a_picture_is_found_regardless_of_its_neighbours(tokenizer) -> None:
    target = torch.rand(3, 3, 16, 16) * 2 - 1
    start = tokenizer.vectors(tokenizer.encode(target))
    options = {"steps": 4, "learning_rate": 0.05}
    many = invert(tokenizer.decode_vectors, picture_distance, target, start, **options)
    one = invert(tokenizer.decode_vectors, picture_distance, target[1:2], start[1:2], **options)
    torch.testing.assert_close(many.vectors[1:2], one.vectors, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(many.losses[:, 1:2], one.losses)


@pytest.mark.parametrize("outside", [torch.no_grad, torch.enable_grad])
def test_inversion_leaves_the_tokenizer_as_it_was(tokenizer, outside) -> None:
    before = {name: value.clone() for name, value in tokenizer.state_dict().items()}
    target = torch.rand(1, 3, 16, 16) * 2 - 1
    start = tokenizer.vectors(tokenizer.encode(target)).detach()
    kept = start.clone()
    with outside():
        found = invert(
            tokenizer.decode_vectors, picture_distance, target, start, steps=20, learning_rate=0.05
        )
    assert found.losses[-1].item() < found.losses[0].item()
    assert not found.vectors.requires_grad and not found.losses.requires_grad
    assert torch.equal(start, kept) and not start.requires_grad
    for name, parameter in tokenizer.named_parameters():
        assert parameter.grad is None and parameter.requires_grad, name
    assert all(torch.equal(value, before[name]) for name, value in tokenizer.state_dict().items())


@pytest.mark.parametrize("options", [(0, 0.1), (5, 0.0), (5, -1.0)])
def test_impossible_searches_are_refused(options) -> None:
    steps, rate = options
    with pytest.raises(SmaltiError, match=f"steps is {steps}, learning_rate {rate}"):
        invert(
            lambda v: v, mean_square, torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 2, 2),
            steps=steps, learning_rate=rate,
        )  # fmt: skip


def test_the_distance_adds_pixels_and_perception() -> None:
    images, target = torch.rand(2, 3, 32, 32) * 2 - 1, torch.rand(2, 3, 32, 32) * 2 - 1
    perceptual = LPIPS.from_embedded()
    pixels = picture_distance(images, target)
    torch.testing.assert_close(pixels, mean_square(images, target))
    both = picture_distance(images, target, perceptual, 0.5)
    torch.testing.assert_close(both, pixels + 0.5 * perceptual(images, target))
    assert not picture_distance(target, target, perceptual).any()
    with pytest.raises(SmaltiError, match="must be equal"):
        picture_distance(images, target[:1])
