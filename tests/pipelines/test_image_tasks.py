"""Image tasks: what is given, what becomes of it, and the random masks of inpainting."""

import pytest
import torch
from chance import randomised
from torch import Tensor

from smalti.data.latents import rounded, to_levels
from smalti.errors import SmaltiError
from smalti.pipelines.image_tasks import (
    Given,
    Inpainting,
    SuperResolution,
    encoded,
    make_task,
    mask_of_latents,
    random_mask,
)
from smalti.tokenizer.conv import ConvConfig
from smalti.tokenizer.kl import KLConfig, KLTokenizer

CONV = ConvConfig(
    channels=8,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_levels=(),
    mid_attention=False,
    z_channels=2,
    patch_size=2,
)
KEYS = [(0, 0), (0, 1), (1, 0)]


@pytest.fixture
def tokenizer() -> KLTokenizer:
    return randomised(KLTokenizer(KLConfig(image_size=16, conv=CONV)), std=0.2)


@pytest.fixture
def images() -> Tensor:
    pixels = torch.randint(0, 256, (3, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    return pixels / 127.5 - 1


# -- tasks ----------------------------------------------------------------------------------------


def test_a_task_is_text_that_is_read_back() -> None:
    assert make_task("super-resolution") == SuperResolution(4)
    assert make_task("super-resolution:factor=2") == SuperResolution(2)
    for task in (SuperResolution(8), Inpainting()):
        assert make_task(task.text) == task and make_task(task) is task
    assert SuperResolution(8).text == "super-resolution:factor=8"
    assert Inpainting().text == "inpainting"


def test_super_resolution_is_given_a_small_picture(tokenizer, images) -> None:
    task = SuperResolution(4)
    given = task.degraded(images, KEYS)
    assert given.images.shape == (3, 3, 4, 4) and given.mask is None
    torch.testing.assert_close(given.images, rounded(given.images))  # as a file of 8 bits has it
    # The mean of a smooth picture stays; a constant one stays as it is.
    flat = torch.full((1, 3, 16, 16), 0.5).mul(255).round() / 127.5 - 1
    assert torch.equal(
        to_levels(task.degraded(flat, KEYS[:1]).images).unique(), torch.tensor([128.0])
    )
    condition = task.condition(tokenizer, given)
    assert condition.latents.shape == (3, task.channels(tokenizer.spec), 4, 4)
    alone = task.condition(tokenizer, Given(given.images[1:2]))
    torch.testing.assert_close(condition.latents[1:2], alone.latents, rtol=1e-4, atol=1e-5)


def test_inpainting_does_not_see_what_is_masked(tokenizer, images) -> None:
    task = Inpainting()
    given = task.degraded(images, KEYS)
    assert given.mask.shape == (3, 1, 16, 16) and torch.equal(given.images, images)
    condition = task.condition(tokenizer, given).latents
    assert condition.shape == (3, task.channels(tokenizer.spec), 4, 4) == (3, 3, 4, 4)
    noise = torch.randn_like(images)
    other = Given(torch.where(given.mask.bool(), noise, images), given.mask)
    assert torch.equal(task.condition(tokenizer, other).latents, condition)
    shown = Given(torch.where(given.mask.bool(), images, noise), given.mask)
    assert not torch.equal(task.condition(tokenizer, shown).latents, condition)
    nothing = Given(images, torch.zeros(3, 1, 16, 16))
    whole = task.condition(tokenizer, nothing).latents
    assert torch.equal(whole[:, :2], encoded(tokenizer, images)) and not whole[:, 2].any()


def test_a_position_is_masked_if_one_of_its_pixels_is() -> None:
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 3, 4] = 1
    found = mask_of_latents(mask, torch.zeros(1, 2, 4, 4))
    assert found.sum() == 1 and found[0, 0, 0, 1] == 1


# -- masks ----------------------------------------------------------------------------------------


def test_a_mask_is_a_pure_function_of_its_key() -> None:
    one = random_mask(0, 1, 2, 32, 48)
    assert one.shape == (1, 32, 48) and set(one.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(one, random_mask(0, 1, 2, 32, 48))
    for other in ((1, 1, 2), (0, 2, 2), (0, 1, 3)):
        assert not torch.equal(one, random_mask(*other, 32, 48))


@pytest.mark.parametrize("size", [(8, 8), (32, 32), (32, 64)])
def test_masks_hide_something_of_every_picture_and_some_of_every_place(size) -> None:
    masks = torch.stack([random_mask(0, 0, index, *size) for index in range(300)])
    shares = masks.flatten(1).mean(1)
    assert shares.min() > 0 and shares.max() < 0.9
    assert 0.15 < shares.mean() < 0.4 and shares.std() > 0.1
    places = masks.mean((0, 1))
    assert places.min() > 0


# -- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("superresolution", 'did you mean "super-resolution"'),
        ("super-resolution:factor=1", "factor is 1; it must be at least 2"),
        ("super-resolution:scale=2", "scale"),
        ("inpainting:factor=2", "factor"),
    ],
)
def test_a_wrong_task_is_one_clear_line(task: str, message: str) -> None:
    with pytest.raises(SmaltiError, match=message) as caught:
        make_task(task)
    assert "\n" not in str(caught.value)


def test_a_factor_must_divide_the_sides(images) -> None:
    with pytest.raises(SmaltiError, match="16 x 16 pixels cannot be reduced by 3"):
        SuperResolution(3).degraded(images, KEYS)
