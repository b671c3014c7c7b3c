"""Pictures and masks given to a pipeline: what is kept, what is generated, what is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from chance import generators, randomised
from conftest import TINY_CONV, TINY_PRIOR, TINY_VQ
from PIL import Image
from torch import Tensor

from smalti.data.image_io import to_pil
from smalti.data.latents import CodeSpec, ContinuousSpec
from smalti.errors import SmaltiError
from smalti.pipelines.editing import box_mask, fitted, kept_positions, masked, pasted, regions
from smalti.pipelines.pipeline import Pipeline
from smalti.prior.flow.config import FlowConfig
from smalti.prior.flow.dit import DiTConfig
from smalti.prior.flow.prior import FlowPrior
from smalti.prior.next_token.model import NextTokenPrior
from smalti.tokenizer.kl import KLConfig, KLTokenizer
from smalti.tokenizer.vq import VQTokenizer

CLASSES = ("cat", "dog", "emu")
MASK = box_mask("3,4,9,10", (16, 16))  # of patches of 2 x 2 pixels: columns 1 to 4, rows 2 to 4


@pytest.fixture
def pipe(tokenizer, prior) -> Pipeline:
    return Pipeline(tokenizer, prior, CLASSES)


@pytest.fixture
def flow_pipe() -> Pipeline:
    tokenizer = KLTokenizer(KLConfig(image_size=16, conv=replace(TINY_CONV, z_channels=2))).eval()
    network = DiTConfig(
        in_channels=2,
        out_channels=2,
        grid=(8, 8),
        patch_size=2,
        depth=1,
        width=16,
        num_heads=1,
        num_classes=3,
        frequency_size=16,
    )
    prior = randomised(FlowPrior(FlowConfig(network=network)), std=0.1)
    return Pipeline(tokenizer, prior, CLASSES)


@pytest.fixture
def images() -> Tensor:
    """(2, 3, 16, 16), what 8-bit files can hold, in [0, 1]."""
    return torch.randint(256, (2, 3, 16, 16), generator=torch.Generator().manual_seed(5)) / 255


@pytest.fixture
def pictures(images: Tensor) -> list[Image.Image]:
    return to_pil(images * 2 - 1)


def kept_grid() -> Tensor:
    """(8, 8) bool: the patches that lie outside MASK."""
    kept = torch.ones(8, 8, dtype=torch.bool)
    kept[2:5, 1:5] = False
    return kept


# -- what is kept --------------------------------------------------------------------------------


def test_codes_of_patches_outside_the_mask_are_those_of_the_picture(pipe, pictures) -> None:
    out = pipe("dog", image=pictures[0], mask_image=MASK, generator=generators(0))
    codes, kept = pipe.tokenizer.encode(pictures[0]), kept_grid().flatten()
    assert out.labels == [1] and out.images[0].size == (16, 16)
    assert torch.equal(out.latents[:, kept], codes[:, kept])
    free = pipe("dog", generator=generators(0)).latents
    assert not torch.equal(out.latents[:, ~kept], codes[:, ~kept])
    assert not torch.equal(out.latents, free)
    alone = pipe.prior.sample(
        torch.tensor([1]),
        guidance_scale=pipe.guidance_scale,
        generator=generators(0),
        known=codes,
        known_mask=kept[None],
    )
    assert torch.equal(out.latents, alone)


def test_known_pixels_are_those_of_the_reconstruction(pipe, flow_pipe, images, monkeypatch) -> None:
    """Exactly, with a decoder that decodes each patch by itself."""
    outside = kept_grid().repeat_interleave(2, 0).repeat_interleave(2, 1)

    def decode(vectors: Tensor) -> Tensor:
        return F.interpolate(vectors[:, [0, 1, 0]].float(), scale_factor=2.0)

    for each in (pipe, flow_pipe):
        monkeypatch.setattr(each.tokenizer, "decode_vectors", decode)
        out = each("cat", image=images, mask_image=MASK, output_type="pt", num_images_per_prompt=2)
        known = [(each.tokenizer.reconstruct(image[None] * 2 - 1) + 1) / 2 for image in images]
        wanted = torch.cat(known).repeat_interleave(2, 0)
        assert torch.equal(out.images[..., outside], wanted[..., outside])
        assert not torch.equal(out.images[..., ~outside], wanted[..., ~outside])


def test_a_latent_is_kept_if_its_whole_patch_is_black() -> None:
    region = regions(MASK, (16, 16))
    assert torch.equal(kept_positions(region, ContinuousSpec(2, 8, 8))[0, 0], kept_grid())
    assert torch.equal(kept_positions(region, CodeSpec(9, ((8, 8),))), kept_grid().view(1, -1))


def test_a_code_of_a_coarse_grid_is_kept_if_most_of_its_cell_is() -> None:
    region = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
    region[..., 8:] = True  # the right half
    region[..., 0, 0] = True  # and a pixel
    kept = kept_positions(region, CodeSpec(9, ((1, 1), (2, 2), (4, 4))))[0]
    assert kept[:1].tolist() == [False]  # less than half
    assert kept[1:5].view(2, 2).tolist() == [[True, False], [True, False]]
    fine = torch.tensor([[1, 1, 0, 0]] * 4).bool()
    fine[0, 0] = False
    assert torch.equal(kept[5:].view(4, 4), fine)
    region[..., 10:] = False
    assert kept_positions(region, CodeSpec(9, ((1, 1), (8, 8))))[0, 0]


def test_image_to_image_stays_near_the_picture(flow_pipe, pictures) -> None:
    z = flow_pipe.tokenizer.encode(pictures[0])
    near, far = (
        flow_pipe("cat", image=pictures[0], strength=s, generator=generators(0)).latents
        for s in (0.05, 0.95)
    )
    assert (near - z).norm() < 0.2 * (far - z).norm()
    default = flow_pipe("cat", image=pictures[0], generator=generators(0)).latents
    given = flow_pipe("cat", image=pictures[0], strength=0.8, generator=generators(0)).latents
    assert torch.equal(default, given)


# -- which picture belongs to which condition ----------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "count", "each", "expected"),
    [
        ("cat", 1, 2, [(0, 0), (0, 0)]),
        (["cat", "emu"], 1, 1, [(0, 0), (2, 0)]),
        (["cat", "emu"], 2, 2, [(0, 0), (0, 0), (2, 1), (2, 1)]),
        ("dog", 2, 2, [(1, 0), (1, 0), (1, 1), (1, 1)]),
    ],
)
def test_pictures_and_classes(pipe, images, labels, count, each, expected) -> None:
    """(class, picture) of each result."""
    out = pipe(
        labels,
        image=list(images[:count]),
        mask_image=MASK,
        num_images_per_prompt=each,
        generator=generators(*range(len(expected))),
        batch_size=3,
    )
    codes, kept = pipe.tokenizer.encode(images * 2 - 1), kept_grid().flatten()
    assert out.labels == [label for label, _ in expected]
    for row, (label, picture) in enumerate(expected):
        assert torch.equal(out.latents[row, kept], codes[picture, kept])
        alone = pipe(label, image=images[picture], mask_image=MASK, generator=generators(row))
        assert torch.equal(out.latents[row], alone.latents[0])


def test_without_a_class_the_null_class_is_used(pipe, images) -> None:
    out = pipe(
        image=images, mask_image=MASK, generator=generators(0, 1, 2, 3), num_images_per_prompt=2
    )
    codes, kept = pipe.tokenizer.encode(images * 2 - 1), kept_grid().flatten()
    wanted = pipe.prior.sample(
        torch.full((4,), 3),
        generator=generators(0, 1, 2, 3),
        known=codes.repeat_interleave(2, 0),
        known_mask=kept.expand(4, -1),
    )
    assert torch.equal(out.latents, wanted) and out.names == []


def test_an_unconditional_pipeline_edits(tokenizer, images) -> None:
    prior = NextTokenPrior(replace(TINY_PRIOR, condition="none", num_classes=0)).eval()
    pipe = Pipeline(tokenizer, prior, ())
    codes, kept = tokenizer.encode(images * 2 - 1), kept_grid().flatten()
    out = pipe(image=images, mask_image=MASK, num_images=2)
    assert torch.equal(out.latents[:, kept], codes.repeat_interleave(2, 0)[:, kept])
    assert len(pipe(image=images[0], mask_image=MASK).images) == 1
    with pytest.raises(SmaltiError, match="this pipeline is unconditional"):
        pipe("cat", image=images, mask_image=MASK)


def test_a_text_pipeline_needs_a_prompt(tokenizer, images) -> None:
    prior = NextTokenPrior(replace(TINY_PRIOR, condition="text", num_classes=0)).eval()
    with pytest.raises(SmaltiError, match="this pipeline is text-conditional: pass prompt"):
        Pipeline(tokenizer, prior, ())(image=images, mask_image=MASK)


def test_one_picture_with_several_masks(pipe, pictures) -> None:
    other = box_mask("0,0,16,8", (16, 16))
    out = pipe("cat", image=pictures[0], mask_image=[MASK, other])
    codes = pipe.tokenizer.encode(pictures[0])[0]
    assert torch.equal(out.latents[0, kept_grid().flatten()], codes[kept_grid().flatten()])
    assert torch.equal(out.latents[1, 32:], codes[32:])


def test_all_forms_of_pictures_and_masks_are_the_same(pipe, images, pictures) -> None:
    white = regions(MASK, (16, 16))
    arrays = images.permute(0, 2, 3, 1).numpy()
    forms = [
        (pictures[0], MASK),
        (pictures[0].convert("RGBA"), MASK.convert("1")),
        (pictures[:1], MASK.convert("RGB")),
        (images[0], white[0, 0]),
        (images[:1], white.float() * 0.7),
        ((images[:1] * 255).round().byte(), white[0].numpy()),
        (arrays[0], MASK.convert("RGBA")),
        (arrays[:1], white.numpy().astype(np.float32)),
    ]
    results = [
        pipe("cat", image=image, mask_image=mask, generator=generators(0)).latents
        for image, mask in forms
    ]
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_grey_and_wide_pictures(mode) -> None:
    config = replace(TINY_VQ, image_size=(16, 24), image_channels=1)
    tokenizer = VQTokenizer(config).eval()
    prior = NextTokenPrior(replace(TINY_PRIOR, spec=tokenizer.spec)).eval()
    picture = Image.effect_noise((24, 16), 64)
    mask = box_mask("0,0,8,16", (16, 24))
    out = Pipeline(tokenizer, prior, CLASSES)("dog", image=picture.convert(mode), mask_image=mask)
    codes = tokenizer.encode(picture).view(8, 12)
    assert torch.equal(out.latents.view(8, 12)[:, 4:], codes[:, 4:])
    assert out.images[0].size == (24, 16) and out.images[0].mode == "L"
    with pytest.raises(SmaltiError, match="the image has 16 x 24 pixels; this model takes 24 x 16"):
        Pipeline(tokenizer, prior, CLASSES)(
            "dog", image=picture.rotate(90, expand=True), mask_image=mask
        )


# -- what is refused -----------------------------------------------------------------------------

WRONG = {
    "another size of picture": (
        {"image": Image.new("RGB", (20, 16))},
        "the image has 20 x 16 pixels; this model takes 16 x 16: crop and resize it",
    ),
    "another size of tensor": ({"image": torch.zeros(3, 8, 16)}, "the image has 16 x 8 pixels"),
    "another size of mask": (
        {"mask_image": Image.new("L", (15, 16))},
        "the mask has 15 x 16 pixels; this model takes 16 x 16",
    ),
    "a black mask": ({"mask_image": Image.new("L", (16, 16))}, "black everywhere"),
    "a white mask": ({"mask_image": Image.new("L", (16, 16), 255)}, "white everywhere"),
    "a mask of points": (
        {"mask_image": torch.tensor([[0.0, 1.0], [0.0, 0.0]]).repeat(8, 8)},
        "white pixels in every patch of 2 x 2 pixels, so no latent is kept",
    ),
    "a deep mask": ({"mask_image": Image.new("I", (16, 16))}, 'the mask has the mode "I"'),
    "a transparent mask": (
        {"mask_image": Image.new("RGBA", (16, 16))},
        "transparent pixels, which are neither black nor white",
    ),
    "a mask of three channels": (
        {"mask_image": torch.ones(1, 3, 16, 16)},
        r"a mask has shape \(3, 16, 16\): give one channel",
    ),
    "a mask of 8-bit values": (
        {"mask_image": torch.arange(256).view(16, 16)},
        "the mask has values from 0 to 255: give bool, or numbers in",
    ),
    "a deep picture": ({"image": Image.new("I", (16, 16))}, 'the picture has the mode "I"'),
    "values in [-1, 1]": (
        {"image": torch.linspace(-1, 1, 768).view(3, 16, 16)},
        r"values from -1 to 1 of type torch.float32: give floats in \[0, 1\]",
    ),
    "a name": ({"image": "picture.png"}, "image is a str: give pictures of Pillow"),
    "no picture in the list": ({"image": []}, "image is an empty list"),
    "no mask in the list": ({"mask_image": []}, "the list of masks is empty"),
    "no picture": ({"image": None}, "a mask was given without image: give the picture"),
    "neither": (
        {"image": None, "mask_image": None, "strength": 0.5},
        "strength was given without image",
    ),
    "no mask": ({"mask_image": None}, "an image without a mask cannot be edited by a next-tok"),
    "a strength for codes": (
        {"strength": 0.5},
        "strength is 0.5, but a next-token prior samples codes, to which noise cannot be added",
    ),
    "no results": ({"class_labels": None, "num_images_per_prompt": 0}, "no images were requested"),
    "more pictures than classes": (
        {"image": [Image.new("RGB", (16, 16))] * 3, "class_labels": ["cat", "dog"]},
        "3 images or masks were given for 2 classes",
    ),
    "more masks than pictures": (
        {"image": [Image.new("RGB", (16, 16))] * 3, "mask_image": [MASK] * 2},
        "3 images and 2 masks were given",
    ),
}


@pytest.mark.parametrize("what", list(WRONG))
def test_wrong_edits_are_refused(pipe, what) -> None:
    changes, message = WRONG[what]
    given = {"class_labels": "cat", "image": Image.new("RGB", (16, 16)), "mask_image": MASK}
    with pytest.raises(SmaltiError, match=message) as caught:
        pipe(**{**given, **changes})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("strength", [0, -1, 1.5, float("nan")])
def test_a_strength_out_of_range_is_refused(flow_pipe, pictures, strength) -> None:
    with pytest.raises(SmaltiError, match=r"strength is .*; it must lie in \(0, 1\]"):
        flow_pipe("cat", image=pictures[0], strength=strength)


def test_a_prior_that_keeps_nothing_is_named(pipe, pictures, monkeypatch) -> None:
    monkeypatch.setattr(pipe.prior, "sample", lambda condition, *, guidance_scale=1.0: None)
    with pytest.raises(SmaltiError, match="a next-token prior cannot keep known latents"):
        pipe("cat", image=pictures[0], mask_image=MASK)


# -- for the command -----------------------------------------------------------------------------


def test_a_box_is_white_inside() -> None:
    mask = np.asarray(box_mask("1,2,4,3", (5, 6)))
    assert mask.shape == (5, 6) and mask.sum() == 3 * 255 and (mask[2, 1:4] == 255).all()
    for wrong in ("1,2,3", "a,0,1,1", "3,0,2,1", "0,0,7,1", "-1,0,2,2", "2,2,2,4"):
        with pytest.raises(SmaltiError, match=f"box is .*{wrong}"):
            box_mask(wrong, (5, 6))


def test_picture_and_mask_are_cropped_alike(pictures) -> None:
    picture = Image.new("RGB", (48, 32), "black")
    picture.paste("white", (12, 8, 28, 24))
    mask = picture.convert("L")
    found = fitted(picture, mask, 16)
    assert [each.size for each in found] == [(16, 16)] * 2
    assert np.array_equal(np.asarray(found[0])[..., 0], np.asarray(found[1]))
    assert fitted(picture, None, 16)[1] is None
    with pytest.raises(SmaltiError, match="the mask has 16 x 16 pixels, its picture 48 x 32"):
        fitted(picture, pictures[0], 16)


def test_pasting_and_hiding_by_a_mask(pictures) -> None:
    one, two = pictures
    white = np.asarray(MASK) > 0
    result = np.asarray(pasted(one, two, MASK))
    assert np.array_equal(result[white], np.asarray(one)[white])
    assert np.array_equal(result[~white], np.asarray(two)[~white])
    clear = Image.new("RGBA", one.size)  # transparent black, which is shown on white
    assert (np.asarray(pasted(one, clear, MASK))[~white] == 255).all()
    with pytest.raises(SmaltiError, match="the mask has 8 x 8 pixels and the result 16 x 16"):
        pasted(one, two, MASK.resize((8, 8)))
    for mode in ("RGB", "L", "RGBA"):
        hidden = np.asarray(masked(one.convert(mode), MASK))
        assert (hidden[white][..., :3] == 128).all()
        assert np.array_equal(hidden[~white], np.asarray(one.convert(mode))[~white])
