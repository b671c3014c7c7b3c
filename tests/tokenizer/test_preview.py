"""Progressive previews: images decoded from the first scales of a multi-scale tokenizer."""

import itertools

import pytest
import torch

from smalti.errors import SmaltiError
from smalti.tokenizer.conv import ConvConfig
from smalti.tokenizer.quantizers.codebook import CodebookConfig
from smalti.tokenizer.quantizers.multi_scale import MultiScaleConfig
from smalti.tokenizer.vq import VQConfig, VQTokenizer

CONV = ConvConfig(
    channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(), z_channels=4
)
SCALES = MultiScaleConfig(
    codebook=CodebookConfig(16, 4), scales=((1, 1), (3, 2), (8, 8)), convolutions=2
)
ENDS = (0, 1, 7, 71)  # codes of the first 0, 1, 2, 3 scales


@pytest.fixture
def model() -> VQTokenizer:
    return VQTokenizer(VQConfig(image_size=16, conv=CONV, quantizer=SCALES)).eval()


@pytest.fixture
def codes() -> torch.Tensor:
    return torch.randint(16, (3, 71), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("scales", range(4))
def test_the_codes_of_the_first_scales_are_enough(model, codes, scales: int) -> None:
    whole = model.preview(codes, scales)
    assert whole.shape == (3, 3, 16, 16) and whole.abs().max() <= 1
    assert torch.equal(model.preview(codes[:, : ENDS[scales]], scales), whole)
    assert torch.equal(model.preview(codes[:, : ENDS[scales]].to(torch.uint16), scales), whole)
    altered = torch.cat([codes[:, : ENDS[scales]], (codes[:, ENDS[scales] :] + 1) % 16], 1)
    assert torch.equal(model.preview(altered, scales), whole)


def test_every_scale_adds_to_the_picture_and_the_last_one_completes_it(model, codes) -> None:
    pictures = [model.preview(codes, scales) for scales in range(4)]
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(pictures))
    torch.testing.assert_close(pictures[-1], model.decode(codes).detach().clamp(-1, 1))


@pytest.mark.parametrize(
    ("length", "scales", "message"),
    [
        (7, 1, r"\(3, 7\); this tokenizer takes \(B, 1\) or \(B, 71\)"),
        (1, 2, r"\(3, 1\); this tokenizer takes \(B, 7\) or \(B, 71\)"),
        (7, 3, r"\(3, 7\); this tokenizer takes \(B, 71\)$"),
        (71, 4, "scales is 4; give 0 to 3"),
        (71, -1, "scales is -1; give 0 to 3"),
        (71, 2.0, "scales is 2.0; give 0 to 3"),
    ],
)
def test_codes_of_other_scales_are_refused(model, codes, length, scales, message: str) -> None:
    with pytest.raises(SmaltiError, match=message):
        model.preview(codes[:, :length], scales)


def test_codes_outside_the_codebook_are_refused(model, codes) -> None:
    with pytest.raises(SmaltiError, match=r"\[16, 16\]; the codebook has 0 to 15"):
        model.preview(torch.full((1, 7), 16), 2)
    with pytest.raises(SmaltiError, match=r"codes are torch\.float32"):
        model.preview(codes[:, :7].float(), 2)


def test_a_tokenizer_of_one_scale_has_no_previews(tokenizer) -> None:
    with pytest.raises(SmaltiError, match="this one has one scale"):
        tokenizer.preview(torch.zeros(1, 64, dtype=torch.int64), 1)
