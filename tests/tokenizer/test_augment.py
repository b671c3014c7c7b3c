"""Differentiable augmentation: identity at strength 0, exact shifts and cutouts, gradients."""

import pytest
import torch

from smalti.errors import SmaltiError
from smalti.tokenizer.discriminators.augmentation import (
    AUGMENT_UNIFORMS,
    AugmentConfig,
    augment,
    cut_out,
    resized,
    shift_colours,
    translate,
)

FULL = AugmentConfig(colour=1.0, translation=0.125, cutout=0.5)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(16, 3, 16, 16) * 2 - 1


@pytest.fixture
def uniforms() -> torch.Tensor:
    return torch.rand(16, AUGMENT_UNIFORMS)


def test_zero_strength_is_the_identity(images, uniforms) -> None:
    assert augment(images, AugmentConfig(), uniforms) is images
    torch.testing.assert_close(shift_colours(images, 0.0, uniforms[:, :3]), images)
    assert torch.equal(translate(images, 0.0, uniforms[:, 3:5]), images)
    assert torch.equal(cut_out(images, 0.0, uniforms[:, 5:]), images)


def test_uniforms_of_one_half_change_neither_colour_nor_place(images) -> None:
    middle = torch.full((16, 3), 0.5)
    torch.testing.assert_close(shift_colours(images, 1.0, middle), images)
    torch.testing.assert_close(translate(images, 0.5, middle[:, :2]), images)


@pytest.mark.parametrize("name", ["colour", "translation", "cutout"])
def test_every_strength_has_an_effect(images, uniforms, name: str) -> None:
    changed = augment(images, AugmentConfig(**{name: getattr(FULL, name)}), uniforms)
    assert changed.shape == images.shape
    assert not torch.allclose(changed, images)


def test_colours_follow_their_definition(images, uniforms) -> None:
    out = shift_colours(images, 0.8, uniforms[:, :3])
    for image, (b, s, c), found in zip(images, uniforms[:, :3].tolist(), out, strict=True):
        image = image + 0.8 * (b - 0.5)
        grey = image.mean(0)
        image = grey + (1 + 2 * 0.8 * (s - 0.5)) * (image - grey)
        image = image.mean() + (1 + 0.8 * (c - 0.5)) * (image - image.mean())
        torch.testing.assert_close(found, image)


def test_translation_moves_whole_pixels_and_fills_up_with_grey(images) -> None:
    # 16 px, ratio 1/8: shifts -2 to 2, each of probability 1/5
    down = translate(images, 0.125, torch.tensor([[0.9, 0.5]]).expand(16, 2))
    assert torch.equal(down[:, :, 2:], images[:, :, :-2])
    assert (down[:, :, :2] == 0).all()
    left = translate(images, 0.125, torch.tensor([[0.5, 0.21]]).expand(16, 2))
    assert torch.equal(left[..., :-1], images[..., 1:])
    assert (left[..., -1:] == 0).all()


def test_shifts_are_uniform_and_reach_both_ends() -> None:
    picture = torch.zeros(5000, 1, 1, 16)
    picture[..., 8] = 1
    moved = translate(picture, 0.125, torch.rand(5000, 2))
    counts = torch.bincount(moved[:, 0, 0].argmax(-1), minlength=16)
    assert counts.nonzero().flatten().tolist() == [6, 7, 8, 9, 10]
    assert counts[6:11].min() > 900 and counts[6:11].max() < 1100


def test_cutouts_are_squares_of_the_given_size(images) -> None:
    centre = cut_out(torch.ones_like(images), 0.25, torch.full((16, 2), 0.5))
    assert (centre == 0).sum((1, 2, 3)).tolist() == [3 * 4 * 4] * 16
    assert (centre[:, :, 6:10, 6:10] == 0).all()
    corner = cut_out(torch.ones_like(images), 0.25, torch.zeros(16, 2))
    assert (corner == 0).sum((1, 2, 3)).tolist() == [3 * 2 * 2] * 16  # the rest lies outside


def test_each_image_is_augmented_by_its_own_uniforms(images, uniforms) -> None:
    together = augment(images, FULL, uniforms)
    alone = [augment(images[i : i + 1], FULL, uniforms[i : i + 1]) for i in range(16)]
    torch.testing.assert_close(together, torch.cat(alone))
    order = torch.randperm(16)
    torch.testing.assert_close(augment(images[order], FULL, uniforms[order]), together[order])


def test_gradients_pass_and_are_exact(uniforms) -> None:
    images = torch.rand(2, 3, 6, 6, dtype=torch.double, requires_grad=True)
    few = uniforms[:2].double()
    assert torch.autograd.gradcheck(lambda x: augment(x, FULL, few), images)
    assert torch.autograd.gradgradcheck(lambda x: augment(x**2, FULL, few), images)


def test_resizing_keeps_constants_and_the_right_size(images) -> None:
    assert resized(images, 16) is images
    for side in (8, 24):
        torch.testing.assert_close(
            resized(torch.full_like(images, 0.3), side), torch.full((16, 3, side, side), 0.3)
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"colour": 1.5}, "augment.colour is 1.5"),
        ({"translation": -0.1}, "augment.translation is -0.1"),
        ({"cutout": 2.0}, "augment.cutout is 2.0"),
    ],
)
def test_impossible_strengths_are_refused(options, message: str) -> None:
    with pytest.raises(SmaltiError, match=message):
        AugmentConfig(**options)


def test_colours_change_and_alpha_does_not() -> None:
    images, uniforms = torch.rand(3, 4, 8, 10) * 2 - 1, torch.rand(3, AUGMENT_UNIFORMS)
    changed = augment(images, AugmentConfig(colour=1.0), uniforms)
    assert torch.equal(changed[:, 3], images[:, 3])
    assert torch.equal(changed[:, :3], augment(images[:, :3], AugmentConfig(colour=1.0), uniforms))
