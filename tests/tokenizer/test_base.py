"""Images that every tokenizer refuses, with the reason."""

import pytest
import torch

from smalti.errors import SmaltiError


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
