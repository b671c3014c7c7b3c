"""Codes without a codebook: bijections, levels, entropies, oracles."""

import math

import pytest
import torch
from vector_quantize_pytorch import FSQ, LFQ

from smalti.errors import SmaltiError
from smalti.tokenizer.quantizers.base import as_rows, entropy_loss
from smalti.tokenizer.quantizers.fsq import FSQConfig, FSQuantizer
from smalti.tokenizer.quantizers.lookup_free import (
    LookupFreeConfig,
    LookupFreeQuantizer,
    joint_probabilities,
)

QUANTIZERS = [
    FSQuantizer(FSQConfig(levels=(4, 3, 2))),
    FSQuantizer(FSQConfig(levels=(5,))),
    LookupFreeQuantizer(LookupFreeConfig(bits=5)),
    LookupFreeQuantizer(LookupFreeConfig(bits=5, spherical=True)),
]


@pytest.mark.parametrize("q", QUANTIZERS)
def test_codes_and_vectors_are_a_bijection(q) -> None:
    codes = torch.arange(q.vocab_size)[None]  # (1, V)
    vectors = q.lookup(codes, 1, q.vocab_size)
    assert len(as_rows(vectors).unique(dim=0)) == q.vocab_size
    assert vectors.abs().max() <= 1
    found = q.search(8 * vectors)  # far enough out that every number is near its level
    if isinstance(q, LookupFreeQuantizer):
        assert torch.equal(found, codes)


@pytest.mark.parametrize("q", QUANTIZERS)
def test_a_pass_returns_the_vectors_of_its_codes(q) -> None:
    z = 3 * torch.randn(2, q.dim, 6, 5, requires_grad=True)
    out = q(z)
    assert out.codes.shape == (2, 30) and out.codes.dtype == torch.int64
    assert out.codes.min() >= 0 and out.codes.max() < q.vocab_size
    torch.testing.assert_close(out.latents, q.lookup(out.codes, 6, 5))
    assert torch.equal(out.codes, q.search(z))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(q(z).codes, out.codes)


@pytest.mark.parametrize("q", QUANTIZERS[:2])
def test_fsq_reaches_every_code_and_is_centred(q) -> None:
    z = 4 * torch.randn(1, q.dim, 100, 100)
    assert len(q.search(z).unique()) == q.vocab_size
    centre = as_rows(q.lookup(q.search(torch.zeros(1, q.dim, 1, 1)), 1, 1))
    assert centre.tolist() == [[0.0] * q.dim]


def test_fsq_gradient_is_that_of_the_bound() -> None:
    q = QUANTIZERS[0]
    z = torch.randn(1, 3, 4, 4, requires_grad=True)
    weight = torch.randn(1, 3, 4, 4)
    (ours,) = torch.autograd.grad((q(z).latents * weight).sum(), z)
    smooth = q.bounded(as_rows(z)) / q._half
    (expected,) = torch.autograd.grad((smooth * as_rows(weight)).sum(), z)
    torch.testing.assert_close(ours, expected)


def test_oracle_fsq_of_vector_quantize_pytorch() -> None:
    levels = [8, 5, 5, 5]
    ours, theirs = FSQuantizer(FSQConfig(levels=tuple(levels))), FSQ(levels)
    z = 2 * torch.randn(2, 4, 6, 6)
    latents, codes = theirs(z)
    out = ours(z)
    torch.testing.assert_close(out.latents, latents)
    assert torch.equal(out.codes, codes.flatten(1))


def test_spherical_error_is_bounded() -> None:
    q = LookupFreeQuantizer(LookupFreeConfig(bits=8, spherical=True))
    z = torch.randn(1, 8, 50, 50)
    unit = z / z.norm(dim=1, keepdim=True)
    error = (unit - q.lookup(q.search(z), 50, 50)).norm(dim=1)
    assert error.max() < math.sqrt(2 - 2 / math.sqrt(8))  # BSQ, 2406.07548, eq. 11


def test_joint_probabilities_number_bits_as_codes_do() -> None:
    p = torch.rand(3, 4)
    joint = joint_probabilities(p)
    assert joint.shape == (3, 16)
    torch.testing.assert_close(joint.sum(1), torch.ones(3))
    code = 0b0110  # bits 1 and 2 are set
    expected = (1 - p[:, 0]) * p[:, 1] * p[:, 2] * (1 - p[:, 3])
    torch.testing.assert_close(joint[:, code], expected)


@pytest.mark.parametrize("spherical", [True, False])
def test_bitwise_entropy_is_that_over_the_whole_codebook(spherical: bool) -> None:
    config = LookupFreeConfig(
        bits=5, spherical=spherical, entropy_temperature=0.8, entropy_diversity=1.5
    )
    q = LookupFreeQuantizer(config)
    rows = q._rows(torch.randn(1, 5, 7, 7))
    codebook = as_rows(q.lookup(torch.arange(32)[None], 1, 32))
    expected = entropy_loss(rows, codebook, 0.8, diversity=1.5)
    torch.testing.assert_close(q.entropy_loss(rows), expected)
    grouped = LookupFreeQuantizer(
        LookupFreeConfig(bits=5, spherical=spherical, entropy_temperature=0.8, group_bits=2)
    )
    whole = LookupFreeQuantizer(
        LookupFreeConfig(bits=5, spherical=spherical, entropy_temperature=0.8)
    )
    assert grouped.entropy_loss(rows) <= whole.entropy_loss(rows)  # H is bounded by the groups


def test_oracle_lfq_of_vector_quantize_pytorch() -> None:
    ours = LookupFreeQuantizer(LookupFreeConfig(bits=6))
    theirs = LFQ(codebook_size=64, dim=6).eval()
    z = torch.randn(2, 6, 4, 4)
    latents, codes, _ = theirs(z)
    out = ours(z)
    torch.testing.assert_close(out.latents, latents)
    flipped = sum(((out.codes >> i) & 1) << (5 - i) for i in range(6))  # they count from the left
    assert torch.equal(flipped, codes.flatten(1))


def test_weights_of_the_losses() -> None:
    z = torch.randn(1, 5, 3, 3)
    both = LookupFreeQuantizer(LookupFreeConfig(bits=5))(z)
    none = LookupFreeQuantizer(LookupFreeConfig(bits=5, commitment_weight=0, entropy_weight=0))(z)
    assert both.losses.keys() == {"commitment", "entropy"} and not none.losses
    rows = as_rows(z)
    expected = 0.25 * (rows - rows.sign()).square().mean()
    torch.testing.assert_close(both.losses["commitment"], expected)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (FSQConfig, {"levels": ()}, "levels is"),
        (FSQConfig, {"levels": (8, 1)}, "each 2 or more"),
        (FSQConfig, {"levels": (1000,) * 4}, "too many"),
        (LookupFreeConfig, {"bits": 0}, "bits is 0"),
        (LookupFreeConfig, {"group_bits": 20}, "group_bits is 20"),
        (LookupFreeConfig, {"entropy_weight": -1.0}, "must not be negative"),
        (LookupFreeConfig, {"entropy_temperature": 0.0}, "must be positive"),
    ],
)
def test_impossible_configs_are_refused(config, options, message: str) -> None:
    with pytest.raises(SmaltiError, match=message):
        config(**options)


@pytest.mark.parametrize("levels", [2, 3, 8, 501, 1001, 1002, 2048, 4001])
def test_saturated_fsq_features_have_valid_codes(levels: int) -> None:
    """The outermost numbers round to the outermost levels, however many there are."""
    quantizer = FSQuantizer(FSQConfig(levels=(levels,)))
    features = torch.tensor([-1e4, 1e4]).view(1, 1, 1, 2)
    assert quantizer.search(features).flatten().tolist() == [0, levels - 1]
