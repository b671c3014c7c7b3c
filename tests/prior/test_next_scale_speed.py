"""What makes the next-scale prior fast leaves its codes and losses alone: attention scale by scale,
packed weights, compiled blocks, a GPU."""

import copy
from dataclasses import replace

import pytest
import torch
from tiny_next_scale import CODES, LABELS, LENGTH, QUANTIZER, SCALES, TINY, make_prior
from torch._dynamo.testing import CompileCounter

from smalti.data.latents import CodeSpec
from smalti.prior.attention import attend
from smalti.prior.next_scale.model import (
    BlockCausal,
    NextScalePrior,
    block_causal_mask,
)


@pytest.fixture
def model() -> NextScalePrior:
    return make_prior()


def test_attention_scale_by_scale_is_attention_with_the_mask() -> None:
    mask = BlockCausal(SCALES, torch.device("cpu"))
    query, key, value = (torch.randn(2, 2, LENGTH, 8, requires_grad=True) for _ in range(3))
    expected = attend(query, key, value, mask=block_causal_mask(SCALES, query.device), scale=0.5)
    # As a CPU computes it, to the bit; and as other devices do.
    assert torch.equal(mask.attend(query, key, value, scale=0.5), expected)
    by_scale = mask.scale_by_scale(query, key, value, scale=0.5)
    torch.testing.assert_close(by_scale, expected, rtol=0, atol=1e-6)
    gradients = (
        torch.autograd.grad(attended.square().sum(), (query, key, value))
        for attended in (expected, by_scale)
    )
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=5e-6)


def test_no_mask_is_kept_where_attention_is_scale_by_scale() -> None:
    mask = BlockCausal(SCALES, torch.device("meta"))
    assert mask.bias is None
    shapes = [torch.empty(2, 2, LENGTH, 8, device="meta") for _ in range(3)]
    assert mask.attend(*shapes, scale=1.0).shape == shapes[0].shape


def test_packed_products_leave_greedy_codes_alone(model, monkeypatch) -> None:
    monkeypatch.setattr("smalti.prior.packing.PACKED_FROM", 1)
    options = {"guidance_scale": 2.0, "temperature": 0}
    expected = model.sample(LABELS, **options)
    logits = model.eval().logits(CODES, LABELS)
    model.compile_parts()
    assert model.blocks[1].ffn.fc2._packed is not None and model.head._packed is not None
    assert torch.equal(model.sample(LABELS, **options), expected)
    model.arrange_for_sampling()  # as a pipeline does when it is moved
    model.compile_parts()
    packed, x = model.blocks[1].ffn.fc1, torch.randn(2, 16)
    model.arrange_for_sampling()
    with torch.no_grad():
        assert packed._packed_is_valid(x) and not packed.weight.is_contiguous()
    assert torch.equal(model.sample(LABELS, **options), expected)
    with torch.no_grad():
        torch.testing.assert_close(model.logits(CODES, LABELS), logits)


@pytest.mark.slow
def test_compiled_sampling_has_few_graphs_and_the_same_codes() -> None:
    scales = tuple((side, side) for side in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10))
    quantizer = replace(QUANTIZER, scales=scales)
    config = replace(TINY, spec=CodeSpec(16, scales), quantizer=quantizer, depth=3)
    model, options = make_prior(config), {"guidance_scale": 2.0, "temperature": 0}
    expected = model.sample(LABELS, **options)
    torch.compiler.reset()
    counter = CompileCounter()
    model.compile_parts(backend=counter)
    assert torch.equal(model.sample(LABELS, **options), expected)
    assert counter.frame_count == 2  # one token, and more, of any block
    for count in (4, 3, 2):  # other batch sizes
        assert torch.equal(model.sample(LABELS[:count], **options), expected[:count])
    assert counter.frame_count == 4
    torch.compiler.reset()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_losses_gradients_and_greedy_codes_are_those_of_a_cpu(model) -> None:
    on_gpu = copy.deepcopy(model).cuda()
    options = {"guidance_scale": 2.0, "temperature": 0}
    codes = on_gpu.sample(LABELS.cuda(), **options).cpu()
    assert torch.equal(codes, model.sample(LABELS, **options))
    losses = [model(CODES, LABELS).total, on_gpu(CODES.cuda(), LABELS.cuda()).total]
    torch.testing.assert_close(losses[1].cpu(), losses[0])
    for loss in losses:
        loss.backward()
    for own, other in zip(model.parameters(), on_gpu.parameters(), strict=True):
        if own.grad is not None:
            torch.testing.assert_close(other.grad.cpu(), own.grad, rtol=1e-3, atol=1e-5)
