"""Activation checkpointing of every prior's blocks: the same gradients, less kept."""

from dataclasses import replace

import pytest
import torch
from chance import randomised
from torch import Tensor, nn

from smalti.data.latents import CodeSpec
from smalti.prior.base import Prior
from smalti.prior.flow.config import FlowConfig
from smalti.prior.flow.dit import DiTConfig
from smalti.prior.flow.prior import FlowPrior
from smalti.prior.next_scale.config import NextScaleConfig
from smalti.prior.next_scale.model import NextScalePrior
from smalti.prior.next_token.config import PRESETS, NextTokenConfig
from smalti.prior.next_token.model import NextTokenPrior
from smalti.tokenizer.quantizers.codebook import CodebookConfig
from smalti.tokenizer.quantizers.multi_scale import MultiScaleConfig, MultiScaleQuantizer
from smalti.training.blocks import prepare_blocks, trained_blocks
from smalti.training.logging import _FlopCounter

SCALES = MultiScaleConfig(codebook=CodebookConfig(16, 4), scales=((1, 1), (2, 2)), convolutions=1)
LABELS = torch.tensor([0, 1, 2, 0])
SIZES = {"depth": 3, "width": 16, "num_heads": 2}


def next_token() -> tuple[Prior, Tensor]:
    config = NextTokenConfig(
        spec=CodeSpec(16, ((2, 2),)), num_classes=3, hidden=32, dropout=0.1, drop_path=0.2, **SIZES
    )
    return NextTokenPrior(config), torch.randint(16, (4, 4))


def next_scale() -> tuple[Prior, Tensor]:
    spec = CodeSpec(16, SCALES.scales)
    prior = NextScalePrior(NextScaleConfig(spec=spec, quantizer=SCALES, num_classes=3, **SIZES))
    prior.bind(MultiScaleQuantizer(SCALES))
    return prior, torch.randint(16, (4, 5))


def flow() -> tuple[Prior, Tensor]:
    network = DiTConfig(in_channels=2, out_channels=2, grid=(4, 4), num_classes=3, **SIZES)
    return FlowPrior(FlowConfig(network=network)), torch.randn(4, 2, 4, 4)


@pytest.fixture(params=[next_token, next_scale, flow], ids=lambda make: make.__name__)
def prior_and_latents(request) -> tuple[Prior, Tensor]:
    torch.manual_seed(0)
    prior, latents = request.param()
    return randomised(prior).train(), latents


def gradients(prior: nn.Module, latents: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(1)  # of dropout and of conditions that are dropped
    prior.zero_grad()
    prior(latents, LABELS).total.backward()
    return {n: p.grad.clone() for n, p in prior.named_parameters() if p.grad is not None}


def kept_bytes(prior: nn.Module, latents: Tensor, labels: Tensor = LABELS) -> int:
    """Of tensors that the backward pass needs, besides the weights."""
    weights = {p.untyped_storage()._cdata for p in prior.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in weights:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = prior(latents, labels).total
    del loss
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_gradients_of_blocks_that_are_computed_twice_are_the_same(prior_and_latents) -> None:
    prior, latents = prior_and_latents
    expected, names = gradients(prior, latents), list(prior.state_dict())
    calls: list[int] = []
    blocks = trained_blocks(prior)
    assert len(blocks) == 3
    first = next(blocks[0].children())
    first.register_forward_hook(lambda *_: calls.append(1))
    with _FlopCounter() as counter:
        gradients(prior, latents)
    operations, once = counter.total, len(calls)
    kept = kept_bytes(prior, latents)
    calls.clear()

    prepare_blocks(prior, compiled=False, recomputed=True)
    found = gradients(prior, latents)
    assert len(calls) == 2 * once
    assert found.keys() == expected.keys() and list(prior.state_dict()) == names
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    assert kept_bytes(prior, latents) < kept
    with _FlopCounter() as counter:
        gradients(prior, latents)
    assert counter.total == operations  # those of the repetition are not the model's

    calls.clear()
    prior.eval()
    prior(latents, LABELS).total.backward()
    assert len(calls) == once


def test_compiled_blocks_have_equal_losses(prior_and_latents, monkeypatch) -> None:
    """With the graphs as they are traced: generating code takes a minute."""
    prior, latents = prior_and_latents
    for module in prior.modules():  # dropout of compiled code has other random numbers
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if hasattr(prior.config, "drop_path"):
        prior.config = replace(prior.config, drop_path=0.0)
    expected = gradients(prior, latents)
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda call: compile(call, backend="eager"))
    prepare_blocks(prior, compiled=True, recomputed=True)
    found = gradients(prior, latents)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)
    torch.compiler.reset()


def test_a_step_of_the_7b_preset_fits_80_gb_with_checkpointing(monkeypatch) -> None:
    """By arithmetic: 64 pictures of 256 codes on each of 8 devices, sharded, in bf16."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # values are not looked at
    with torch.device("meta"):
        prior = NextTokenPrior(PRESETS["gpt-7b"]).train()
    parameters = sum(weight.numel() for weight in prior.parameters())
    assert 6.5e9 < parameters < 7.2e9
    # Weights, gradients and the average in fp32, two moments; each device has an eighth.
    state = parameters * (4 + 4 + 4 + 8) / 8
    latents = torch.empty(64, prior.spec.length, dtype=torch.int64, device="meta")
    labels = torch.empty(64, dtype=torch.int64, device="meta")
    prior = prior.to(torch.bfloat16)
    everything = kept_bytes(prior, latents, labels)
    prepare_blocks(prior, compiled=False, recomputed=True)
    inputs = kept_bytes(prior, latents, labels)
    block = (everything - inputs) / len(prior.layers)  # while one is computed again
    assert state + inputs + block < 80e9 < state + everything
