"""Views of an image: the ten crops are torchvision's, as in LlamaGen."""

import pytest
import torch
from torchvision.transforms import TenCrop

from smalti.data.latent_cache.imports import ORDERS, TEN_CROPS
from smalti.data.transforms import VIEW_SETS, decoded_size, views_of


@pytest.mark.parametrize("size", [16, 20, 256])
def test_the_ten_crops_are_those_of_llamagen(size: int) -> None:
    images = torch.randn(2, 3, decoded_size("ten-crop", size), decoded_size("ten-crop", size))
    theirs = TenCrop(size)(images)
    ours = list(views_of(images, VIEW_SETS["ten-crop"], size))
    assert len(ours) == 10 and ours[0].shape == (2, 3, size, size)
    for view, number in zip(ours, TEN_CROPS, strict=True):
        assert torch.equal(view, theirs[number])


def test_only_ten_crops_need_enlarged_images() -> None:
    sides = {name: decoded_size(name, 256) for name in VIEW_SETS}
    assert sides == {"identity": 256, "flip": 256, "ten-crop": 281}  # LlamaGen: int(256 * 1.1)


def test_the_first_view_is_not_mirrored() -> None:
    images = torch.randn(1, 3, 9, 9)
    for name, views in VIEW_SETS.items():
        first = next(views_of(images, views, 9))
        assert torch.equal(first, images), name
    identity, flip = views_of(images, VIEW_SETS["flip"], 9)
    assert torch.equal(identity, images) and torch.equal(flip, images.flip(-1))


def test_imported_views_are_ours() -> None:
    assert {views for views, _ in ORDERS.values()} == set(VIEW_SETS.values())
    assert all(len(views) == len(order) == count for count, (views, order) in ORDERS.items())
