"""Linear layers with weights of 8 and 4 bits."""

import copy
from dataclasses import replace

import pytest
import torch
from chance import randomised
from tiny_next_scale import CODES, LABELS, TINY, make_prior
from torch import nn

from smalti.data.latents import CodeSpec
from smalti.errors import CheckpointError, ConfigurationError
from smalti.prior.layers import SPACE, SwiGLU, arrange_for_few_rows
from smalti.prior.next_token.model import NextTokenConfig, NextTokenPrior
from smalti.prior.weight_only import (
    GROUP,
    KERNEL_ROWS,
    Int4Linear,
    Int8Linear,
    quantize_weights,
    quantized_layers,
)

KINDS = [(Int8Linear, 255), (Int4Linear, 15)]


def layer(inputs: int = 128, outputs: int = 48, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias=bias)


def dequantized(quantized: Int8Linear | Int4Linear, inputs: int) -> torch.Tensor:
    """The weights (out, in) that a layer multiplies with."""
    product = quantized(torch.eye(inputs))
    return (product if quantized.bias is None else product - quantized.bias).T


@pytest.mark.parametrize(("kind", "levels"), KINDS)
def test_weights_are_rounded_to_the_nearest_level(kind, levels):
    """Each differs by half a level at most, plus the rounding of the level to bfloat16."""
    linear = layer(bias=False)
    weight = linear.weight.detach()
    found = dequantized(kind(linear), 128)
    if kind is Int8Linear:
        step = 2 * weight.abs().amax(1, keepdim=True) / 254
    else:
        groups = weight.unflatten(1, (-1, GROUP))
        step = ((groups.amax(2) - groups.amin(2)) / levels).repeat_interleave(GROUP, 1)
    assert ((found - weight).abs() <= 0.5 * step + weight.abs() / 128 + step / 32).all()
    assert (found - weight).norm() < (0.01 if kind is Int8Linear else 0.1) * weight.norm()


@pytest.mark.parametrize(("kind", "levels"), KINDS)
@pytest.mark.parametrize("rows", [1, 3, KERNEL_ROWS, KERNEL_ROWS + 1])
def test_a_product_is_that_of_the_rounded_weights(kind, levels, rows):
    linear, x = layer(), torch.randn(rows, 128)
    quantized = kind(linear)
    expected = x @ dequantized(quantized, 128).T + linear.bias
    assert torch.allclose(quantized(x), expected, atol=0.03)
    assert torch.equal(quantized(x[None])[0], quantized(x))
    other = torch.ones(48)
    assert torch.allclose(quantized(x, other) - other, quantized(x) - linear.bias, atol=1e-5)


@pytest.mark.parametrize(("kind", "levels"), KINDS)
def test_a_row_does_not_depend_on_how_many_others_there_are(kind, levels):
    quantized, x = kind(layer()), torch.randn(KERNEL_ROWS, 128)
    together = quantized(x)
    for rows in (1, 2, 5, 8, 17):
        assert torch.equal(quantized(x[:rows]), together[:rows])


def test_int4_on_other_devices_multiplies_with_the_same_weights():
    """The bytes in the order of the row, as on a GPU, give the weights of the CPU's kernel."""
    linear = layer(bias=False)
    packed = Int4Linear(linear)
    plain = object.__new__(Int4Linear)
    nn.Module.__init__(plain)
    weight = linear.weight.detach().unflatten(1, (-1, GROUP))
    pairs = packed.scale_and_zero.float().transpose(0, 1)
    levels = ((weight - pairs[..., 1:]) / pairs[..., :1] + 8).round().clamp(0, 15).flatten(1)
    plain.packed = levels[:, ::2].to(torch.uint8) | levels[:, 1::2].to(torch.uint8) << 4
    plain.scale_and_zero = packed.scale_and_zero
    assert torch.allclose(plain._weight(), dequantized(packed, 128), atol=1e-3)


def test_int4_that_was_moved_is_refused():
    quantized = Int4Linear(layer())
    quantized.for_cpu = False
    with pytest.raises(ConfigurationError, match="load the pipeline again"):
        quantized(torch.zeros(1, 128))


def test_layers_that_int4_does_not_fit_are_int8():
    model = nn.Sequential(layer(128, 48), layer(48, 5))
    quantize_weights(model, ["0", "1"], torch.int4)
    assert [type(m) for m in quantized_layers(model).values()] == [Int4Linear, Int8Linear]


def small_prior() -> NextTokenPrior:
    config = NextTokenConfig(
        depth=2, width=64, num_heads=2, hidden=128, spec=CodeSpec(64, ((4, 4),)), num_classes=3
    )
    return randomised(NextTokenPrior(config)).eval()


@pytest.mark.parametrize("dtype", [torch.int8, torch.int4])
def test_a_cast_prior_is_a_rounded_copy(dtype, tmp_path):
    prior = small_prior()
    labels, before = torch.tensor([0, 2]), prior.fingerprint
    codes = torch.randint(64, (2, 16))
    exact = prior.logits(codes, labels)
    assert prior.cast(dtype) is prior and prior.dtype == dtype
    assert prior.fingerprint == before != prior.checksum
    assert prior.cast(dtype).dtype == dtype
    error = (prior.logits(codes, labels) - exact).norm() / exact.norm()
    assert error < (0.03 if dtype == torch.int8 else 0.4)
    uniform = [torch.Generator().manual_seed(i) for i in range(2)]
    alone = prior.sample(labels[1:], generator=[torch.Generator().manual_seed(1)])
    assert torch.equal(prior.sample(labels, generator=uniform)[1:], alone)
    with pytest.raises(ConfigurationError, match="load the model again"):
        prior.cast(torch.float32)
    with pytest.raises(CheckpointError, match="load it again without dtype"):
        prior.save_pretrained(tmp_path / "prior")
    assert not (tmp_path / "prior").exists()


@pytest.mark.parametrize("dtype", [torch.int8, torch.int4])
def test_a_cast_next_scale_prior_is_a_rounded_copy(dtype):
    """Of its blocks, with their adaLN, and its output layer; the quantizer stays exact."""
    prior = make_prior(replace(TINY, width=64)).eval()
    with torch.no_grad():
        exact = prior.logits(CODES, LABELS)
    codebook = prior.quantizer.codebook.weight.clone()
    prior.cast(dtype)
    layers = quantized_layers(prior)
    assert prior.dtype == dtype and len(layers) == 5 * len(prior.blocks) + 1
    assert {type(m) for m in layers.values()} == {Int4Linear if dtype == torch.int4 else Int8Linear}
    assert torch.equal(prior.quantizer.codebook.weight, codebook)
    with torch.no_grad():
        error = (prior.logits(CODES, LABELS) - exact).norm() / exact.norm()
    assert 0 < error < (0.03 if dtype == torch.int8 else 0.4)
    generator = [torch.Generator().manual_seed(i) for i in range(4)]
    codes = prior.sample(LABELS, generator=generator, guidance_scale=2.0)
    alone = prior.sample(
        LABELS[2:3], generator=torch.Generator().manual_seed(2), guidance_scale=2.0
    )
    assert codes.shape == CODES.shape and torch.equal(codes[2:3], alone)
    prior.compile_parts()  # packs no weight: there is none in fp32 to pack
    assert quantized_layers(prior).keys() == layers.keys()


def test_the_order_in_memory_changes_no_greedy_code():
    """Values, names and checksum stay; codes of a prior with well separated logits, too."""
    prior = small_prior()
    checksum = prior.checksum
    labels = torch.tensor([0, 1, 2])
    before = prior.sample(labels, temperature=0.0)
    prior.arrange_for_sampling()
    assert torch.equal(prior.sample(labels, temperature=0.0), before)
    assert prior.checksum == checksum


def test_only_wide_fp32_layers_are_stored_by_input():
    wide, square = layer(16, 48), layer(16, 16)
    half = layer(16, 48).bfloat16()
    for linear in (wide, square, half):
        arrange_for_few_rows(linear)
    assert wide.weight.is_contiguous() != torch.backends.mkl.is_available()
    if torch.backends.mkl.is_available():
        assert wide.weight.stride() == (1, 48 + SPACE)
    assert square.weight.is_contiguous() and half.weight.is_contiguous()
    assert torch.equal(wide.weight, layer(16, 48).weight)
    wide.bfloat16()
    arrange_for_few_rows(wide)
    assert wide.weight.is_contiguous()


def test_both_weights_of_a_gated_layer_are_read_by_one_product():
    """As long as they lie as they were arranged: values, gradients and the saved weights stay."""
    torch.manual_seed(0)
    plain = SwiGLU(16, 48, dropout=0.0)
    arranged, x = copy.deepcopy(plain), torch.randn(3, 2, 16)
    arranged.arrange()
    with torch.no_grad():
        assert (arranged.joined_weights() is not None) == torch.backends.mkl.is_available()
        joined = copy.deepcopy(arranged).joined_weights()
        assert joined is None or torch.equal(joined, torch.cat([plain.w1.weight, plain.w3.weight]))
        torch.testing.assert_close(arranged(x), plain(x))
        for name, weight in plain.state_dict().items():
            assert torch.equal(arranged.state_dict()[name], weight)
    for model in (plain, arranged):
        model(x).square().sum().backward()
    for ours, theirs in zip(arranged.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    with torch.no_grad():
        before = arranged.w3.weight.data_ptr()
        arranged.arrange()
        assert arranged.w3.weight.data_ptr() == before
        arranged.w3.weight = torch.nn.Parameter(torch.zeros(48, 16))  # no longer beside w1
        assert arranged.joined_weights() is None and not arranged(x).any()
        other = copy.deepcopy(plain)
        other.arrange()
        assert other.bfloat16().joined_weights() is None
