"""Images that every tokenizer refuses, with the reason."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from conftest import TINY_CONV, TINY_QUANTIZER, TINY_VQ
from PIL import Image

from smalti.data.latents import to_float
from smalti.data.transforms import center_crop, to_tensor
from smalti.errors import SmaltiError
from smalti.tokenizer.kl import KLConfig, KLTokenizer
from smalti.tokenizer.quantizers.multi_scale import MultiScaleConfig
from smalti.tokenizer.vq import VQConfig, VQTokenizer


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("verb", ["store", "encode", "reconstruct", "forward"])
def test_images_of_another_type_are_refused(tokenizer, dtype: torch.dtype, verb: str) -> None:
    images = torch.zeros(1, 3, 16, 16, dtype=dtype)
    with pytest.raises(
        SmaltiError, match=f"images are {dtype}; this tokenizer takes torch.float32"
    ):
        getattr(tokenizer, verb)(images)


def test_autocast_may_convert_real_images(tokenizer) -> None:
    images = torch.zeros(1, 3, 16, 16, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert tokenizer.store(images).shape == (1, 64)
        with pytest.raises(SmaltiError, match=r"images are torch\.uint8"):
            tokenizer.store(images.byte())


def test_a_tokenizer_in_half_precision_takes_its_own_type(tokenizer) -> None:
    tokenizer.cast(torch.bfloat16)
    images = torch.zeros(1, 3, 16, 16)
    assert tokenizer.reconstruct(images.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(SmaltiError, match=r"takes torch\.bfloat16"):
        tokenizer.reconstruct(images)


# -- values that are infinite or NaN --------------------------------------------------------------

KINDS = {
    "vq": lambda: VQTokenizer(TINY_VQ).eval(),
    "kl": lambda: KLTokenizer(KLConfig(image_size=16, conv=TINY_CONV)).eval(),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("verb", ["store", "encode", "reconstruct", "forward"])
def test_an_image_with_nan_is_named(kind: str, value: float, verb: str) -> None:
    images = torch.zeros(3, 3, 16, 16)
    images[1, 2, 3, 4] = value
    message = r"images for the encoder have .* in 1 of 3 samples \(the first is sample 1 "
    with pytest.raises(SmaltiError, match=message):
        getattr(KINDS[kind](), verb)(images)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("verb", ["store", "encode", "reconstruct"])
def test_an_encoder_that_leaves_the_range_of_float16_is_refused(kind: str, verb: str) -> None:
    model = KINDS[kind]()
    with torch.no_grad():
        model.quant_conv.weight.mul_(1e7)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    assert getattr(model, verb)(images).isfinite().all()  # in float32 it does not
    with pytest.raises(SmaltiError, match=r"encoder gives .*float16 ends at 65504.*bfloat16"):
        getattr(model.half(), verb)(images.half())


@pytest.mark.parametrize("kind", KINDS)
def test_a_decoder_that_gives_nan_is_refused(kind: str) -> None:
    model = KINDS[kind]()
    latents = model.encode(torch.zeros(2, 3, 16, 16))
    with torch.no_grad():
        model.decoder.conv_out.bias[0] = torch.nan
    with pytest.raises(SmaltiError, match=r"decoder gives .* in 2 of 2 samples.*earlier check"):
        model.decode(latents)
    with torch.no_grad():
        model.decoder.conv_out.bias[0] = 7e4
    with pytest.raises(SmaltiError, match=r"decoder gives .*float16 ends at 65504"):
        model.half().decode(latents)


def test_latents_with_nan_are_named() -> None:
    latents = torch.zeros(2, 8, 8, 8)
    latents[0] = torch.nan
    with pytest.raises(SmaltiError, match=r"latents for the decoder have .*find out where"):
        KINDS["kl"]().decode(latents)


def test_training_is_left_to_the_guard_of_its_steps() -> None:
    model = KINDS["vq"]().train()
    assert model(torch.full((1, 3, 16, 16), torch.nan)).images.isnan().all()


def test_sizes_without_latents_and_rounded_copies_are_refused(tokenizer) -> None:
    with pytest.raises(SmaltiError, match="image_size 33 is not a multiple"):
        tokenizer.resized(33)
    with pytest.raises(SmaltiError, match="resize the original, then cast it"):
        tokenizer.cast(torch.bfloat16).resized(32)


def test_the_scales_of_var_at_512_pixels_are_the_published_ones() -> None:
    var = MultiScaleConfig()
    sides = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
    assert var.stretched((32, 32)) == tuple((side, side) for side in sides)
    assert var.stretched((16, 16)) == var.scales
    tiny = MultiScaleConfig(scales=((1, 1), (2, 1), (4, 2)), convolutions=1)
    assert tiny.stretched((8, 4)) == ((1, 1), (3, 1), (8, 4))  # 2^(3/2) = 2.8


def test_pictures_are_encoded_as_in_training(tokenizer) -> None:
    random = np.random.default_rng(0)
    picture = Image.fromarray(random.integers(0, 255, (40, 36, 3), dtype=np.uint8))
    images = to_float(to_tensor(center_crop(picture, 16)))[None]
    codes = tokenizer.encode(images)
    assert torch.equal(tokenizer.encode(picture), codes)
    assert torch.equal(tokenizer.encode([picture, picture]), codes.repeat(2, 1))
    assert torch.equal(tokenizer.encode(images.numpy()), codes)
    assert torch.equal(tokenizer.reconstruct(picture), tokenizer.reconstruct(images))
    transparent = Image.new("RGBA", (20, 20), (0, 0, 0, 0))  # on white
    assert torch.equal(tokenizer.encode(transparent), tokenizer.encode(torch.ones(1, 3, 16, 16)))
    for wrong, message in (
        ("cat.png", "images are a str: give a tensor"),
        ([], "images are an empty list"),
        (Image.new("I;16", (20, 20)), "more than 8 bits per channel"),
    ):
        with pytest.raises(SmaltiError, match=message):
            tokenizer.encode(wrong)


def test_a_tokenizer_for_squares_refuses_rectangles() -> None:
    """Its configuration declares `image_size: int`, as those of earlier versions do."""

    @dataclass(frozen=True)
    class SquareConfig(VQConfig):
        image_size: int = 16

    tokenizer = VQTokenizer(SquareConfig(conv=TINY_CONV, quantizer=TINY_QUANTIZER))
    assert tokenizer.config_at(32).image_size == 32
    with pytest.raises(SmaltiError, match="takes square images only, not 16 x 24"):
        tokenizer.resized((16, 24))
