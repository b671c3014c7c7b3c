"""Winograd's convolution: the values of a direct one, and only where it is meant to be used."""

import pytest
import torch
import torch.nn.functional as F

from smalti.tokenizer import winograd
from smalti.tokenizer.conv import Conv3x3, ConvConfig
from smalti.tokenizer.quantizers.codebook import CodebookConfig
from smalti.tokenizer.quantizers.nearest import NearestConfig
from smalti.tokenizer.vq import VQConfig, VQTokenizer


def tokenizer() -> VQTokenizer:
    """One level of 128 channels on a 32 x 32 grid."""
    conv = ConvConfig(channel_mult=(1,), num_res_blocks=1, attention_levels=(), z_channels=8)
    quantizer = NearestConfig(codebook=CodebookConfig(64, 8))
    return VQTokenizer(VQConfig(image_size=32, conv=conv, quantizer=quantizer)).eval()


@pytest.mark.parametrize(("height", "width"), [(33, 38), (32, 32), (4, 1)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_values_are_those_of_a_direct_convolution(height, width, layout, monkeypatch) -> None:
    monkeypatch.setattr(winograd, "STRIP_ELEMENTS", 1500)  # several strips
    x = torch.randn(2, 12, height, width).to(memory_format=layout)
    weight, bias = torch.randn(20, 12, 3, 3), torch.randn(20)
    exact = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    result = winograd.convolve(x, weight, bias)
    assert result.shape == exact.shape
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert (result - exact).abs().max() < 1e-5 * exact.std()


def test_points_of_evaluation_are_accurate(monkeypatch) -> None:
    """The error is 1e-6 of the outputs on any processor; that of the paper's points is not. (That
    of a direct convolution depends on the width of the vectors: 2e-7 to 6e-7.)"""

    def error() -> float:
        winograd._matrices.cache_clear()
        return float((winograd.convolve(x, weight, bias) - exact).std() / exact.std())

    x, weight, bias = torch.randn(1, 128, 16, 16), torch.randn(128, 128, 3, 3), torch.zeros(128)
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    ours = error()
    monkeypatch.setattr(winograd, "POINTS", (0.0, 1.0, -1.0, 2.0, -2.0))
    papers = error()
    winograd._matrices.cache_clear()
    assert ours < 1.5e-6 < papers


def test_a_picture_does_not_depend_on_its_batch() -> None:
    x, weight, bias = torch.randn(3, 128, 32, 32), torch.randn(128, 128, 3, 3), torch.randn(128)
    together = winograd.convolve(x, weight, bias)
    assert torch.equal(together[1:2], winograd.convolve(x[1:2], weight, bias))


def test_it_is_used_without_gradients_in_fp32_on_large_maps_alone() -> None:
    layer = Conv3x3(128, 128)
    x = torch.randn(1, 128, 32, 32)
    assert not winograd.is_faster(x, layer.weight)
    assert torch.equal(layer(x), F.conv2d(x, layer.weight, layer.bias, padding=1))
    with torch.no_grad():
        assert winograd.is_faster(x, layer.weight)
        assert torch.equal(layer(x), winograd.convolve(x, layer.weight, layer.bias))
        assert not winograd.is_faster(x[..., 1:], layer.weight)
        assert not winograd.is_faster(x.bfloat16(), layer.weight.bfloat16())
        assert not winograd.is_faster(x, layer.weight[:100])
        assert not winograd.is_faster(x.to("meta"), layer.weight)
        with torch.autocast("cpu"):
            assert not winograd.is_faster(x, layer.weight)


def test_a_tokenizer_gives_the_same_codes_and_pictures() -> None:
    model, images = tokenizer(), torch.rand(2, 3, 32, 32) * 2 - 1
    codes = model.encode(images)
    with torch.no_grad():
        assert torch.equal(model.encode(images), codes)
        fast = model.decode(codes)
    torch.testing.assert_close(fast, model.decode(codes).detach(), rtol=0, atol=1e-5)
    assert fast.is_contiguous()


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_decoder_gives_the_same_pictures() -> None:
    model = tokenizer()
    codes = torch.randint(64, (1, 1024))
    pictures = model.decode(codes)
    model.compile_parts(fullgraph=True)
    torch.testing.assert_close(model.decode(codes), pictures, rtol=0, atol=1e-5)
