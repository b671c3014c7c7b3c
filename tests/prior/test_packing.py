"""Packed weights: products, when they are used, and samples of priors that have them."""

import copy
import os
import pickle
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from smalti.data.latents import CodeSpec, ContinuousSpec
from smalti.prior.flow.prior import FlowPrior
from smalti.prior.next_token.model import NextTokenPrior
from smalti.prior.packing import PackableLinear, gelu_of


@pytest.fixture
def packed() -> PackableLinear:
    torch.manual_seed(0)
    layer = PackableLinear(24, 40)
    layer.pack()
    return layer


def is_used(layer: PackableLinear) -> bool:
    """Whether a product without gradients uses the packed weight."""
    with torch.no_grad():
        return layer._packed_is_valid(torch.ones(2, 24, dtype=layer.weight.dtype))


def test_a_packed_product_is_the_product(packed) -> None:
    x, bias = torch.randn(2, 5, 24), torch.randn(40)
    assert is_used(packed)
    with torch.no_grad():
        torch.testing.assert_close(packed(x), F.linear(x, packed.weight, packed.bias))
        torch.testing.assert_close(packed(x, bias), F.linear(x, packed.weight, bias))
        transposed = torch.randn(24, 5).T
        torch.testing.assert_close(packed(transposed), F.linear(transposed, *packed.parameters()))
        assert packed(x[:, :0]).shape == (2, 0, 40)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_packed_products_of_each_precision(packed, dtype, monkeypatch) -> None:
    """Of the rounded weight, summed in fp32, each row by itself; GELU is of the unrounded sum."""
    monkeypatch.setattr("smalti.prior.packing.cpu_multiplies_bf16", lambda: True)
    packed.to(dtype).pack()
    if not packed.has_packed_copy:
        pytest.skip("this processor has no library for it")
    x = torch.randn(2, 9, 24).to(dtype)
    with torch.no_grad():
        expected = F.linear(x.double(), packed.weight.double(), packed.bias.double())
        product = packed(x)
        assert packed._packed_is_valid(x) and product.dtype == dtype
        rounding = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
        torch.testing.assert_close(product.double(), expected, rtol=rounding, atol=rounding)
        assert all(torch.equal(packed(x[:, :n]), product[:, :n]) for n in range(1, 9))
        gelu = F.gelu(expected, approximate="tanh")
        for found in (gelu_of(packed, x), gelu_of(copy.deepcopy(packed), x)):
            torch.testing.assert_close(found.double(), gelu, rtol=rounding, atol=rounding)
        packed.register_forward_hook(lambda module, inputs, output: output * 0)
        assert not gelu_of(packed, x).any()


def test_packed_weights_are_for_passes_without_gradients(packed) -> None:
    x = torch.randn(5, 24)
    packed(x).sum().backward()
    assert packed.weight.grad is not None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert packed(x).dtype == torch.bfloat16


def test_bf16_is_packed_where_a_processor_multiplies_it(monkeypatch) -> None:
    for has_units in (False, True):
        monkeypatch.setattr("smalti.prior.packing.cpu_multiplies_bf16", lambda h=has_units: h)
        packs = has_units and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        assert PackableLinear(24, 40).bfloat16().can_be_packed == packs


@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE"])
def test_bf16_is_not_packed_where_onednn_may_not_use_the_processor(isa: str) -> None:
    """As on an older processor."""
    code = """
import torch
from smalti.prior import packing
packing.cpu_multiplies_bf16 = lambda: True
layer = packing.PackableLinear(24, 40).bfloat16()
layer.pack()
with torch.no_grad():
    layer(torch.ones(2, 24, dtype=torch.bfloat16))
"""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


@pytest.mark.parametrize("change", ["in place", "loaded", "assigned", "replaced"])
def test_a_packed_weight_that_has_changed_is_not_used(packed, change: str) -> None:
    other = PackableLinear(24, 40)
    with torch.no_grad():
        if change == "in place":
            packed.weight.copy_(other.weight)
        elif change == "replaced":
            packed.weight = torch.nn.Parameter(other.weight.clone())
        else:
            packed.load_state_dict(other.state_dict(), assign=change == "assigned")
        x = torch.randn(5, 24)
        assert torch.equal(packed(x), F.linear(x, other.weight, packed.bias))
        packed.pack()
        assert is_used(packed)


def test_a_later_weight_at_the_address_of_the_packed_one_is_not_taken_for_it() -> None:
    """As when several files of weights are loaded in turn: freed memory is used again."""
    torch.manual_seed(0)
    layers, x = torch.nn.ModuleList(PackableLinear(64, 64) for _ in range(4)), torch.randn(5, 64)
    with torch.no_grad():
        for time in range(12):
            weights = {name: torch.randn_like(w) for name, w in layers.state_dict().items()}
            layers.load_state_dict(weights, assign=True)
            del weights
            for layer in layers:
                torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
                if time == 0:
                    layer.pack()


@pytest.mark.parametrize("fused", [False, True])
def test_a_packed_weight_is_not_used_after_a_step_of_an_optimizer(packed, fused: bool) -> None:
    """Fused ones do not count as changes for torch. Gradients alone, as those that guide, change
    nothing."""
    optimizer, x = torch.optim.AdamW(packed.parameters(), lr=0.1, fused=fused), torch.randn(5, 24)
    packed.eval()(x).sum().backward()
    assert is_used(packed)
    packed.train()(x).sum().backward()
    optimizer.step()
    with torch.no_grad():
        assert torch.equal(packed.eval()(x), F.linear(x, packed.weight, packed.bias))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_layer_that_is_cast_keeps_no_packed_copy(packed, dtype) -> None:
    """Nor does it take memory; a layer that stays where it is keeps it."""
    packed.to("cpu", torch.float32)
    assert is_used(packed)
    packed.to(dtype)
    assert not packed.has_packed_copy
    packed.float().pack()
    assert is_used(packed)


def test_layers_made_in_inference_mode_are_not_packed() -> None:
    """Nothing tells whether their weights have changed."""
    with torch.inference_mode():
        layer, x = PackableLinear(24, 40), torch.randn(2, 24)
        layer.pack()
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
        assert not layer.has_packed_copy


def test_transformed_calls_of_a_packed_layer(packed) -> None:
    """Forward derivatives, and weights that torch.func puts in the place of the layer's own."""
    x, direction = torch.randn(2, 24), torch.randn(2, 24)
    with torch.no_grad():
        _, derivative = torch.func.jvp(packed, (x,), (direction,))
        torch.testing.assert_close(derivative, F.linear(direction, packed.weight))
        weights = {name: torch.stack([w, 2 * w]) for name, w in packed.state_dict().items()}
        call = torch.func.vmap(lambda w: torch.func.functional_call(packed, w, (x,)))
        torch.testing.assert_close(call(weights)[1], 2 * F.linear(x, packed.weight, packed.bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_packed_layers_take_and_refuse_what_others_do(packed, dtype) -> None:
    packed.to(dtype).pack()
    with torch.no_grad():
        assert packed(torch.ones(24, dtype=dtype)).shape == (40,)
        for shape in ((0, 24), (2, 0, 24)):
            assert gelu_of(packed, torch.ones(shape, dtype=dtype)).shape == (*shape[:-1], 40)
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            packed(torch.ones(2, 12, dtype=dtype))


class Halved(PackableLinear):
    """A layer with its own product, as those that add one of low rank have."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) / 2


@pytest.mark.parametrize("way", ["subclass", "hook", "bias"])
def test_a_layer_that_someone_has_changed_is_called(way: str) -> None:
    """Not replaced by a product with its weight, or with those of two layers."""
    torch.manual_seed(0)
    config = replace(NextTokenPrior.PRESETS["gpt-nano"], depth=1, width=32, num_heads=2)
    prior = NextTokenPrior(replace(config, spec=CodeSpec(16, ((2, 2),)), num_classes=2)).eval()
    layers, x = prior.layers[0].feed_forward, torch.randn(1, 1, 32)
    if way == "subclass":
        layers.w1 = Halved(layers.w1.in_features, layers.w1.out_features, bias=False)
        assert torch.equal(gelu_of(layers.w1, x), F.gelu(layers.w1(x), approximate="tanh"))
    elif way == "hook":
        layers.w1.register_forward_hook(lambda module, inputs, output: output / 2)
    else:
        layers.w1 = torch.nn.Linear(layers.w1.in_features, layers.w1.out_features)
    prior.half().arrange_for_sampling()
    assert layers.joined_weights() is None
    called = []
    layers.w1.register_forward_hook(lambda module, inputs, output: called.append(len(inputs[0])))
    prior.sample(torch.tensor([1]), guidance_scale=1.0)
    assert len(called) == 4  # codes


def test_copies_and_pickles_of_a_packed_layer_are_not_packed(packed) -> None:
    for copied in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert not is_used(copied) and torch.equal(copied.weight, packed.weight)
    assert list(packed.state_dict()) == ["weight", "bias"] and is_used(packed)


def test_packed_products_have_the_rows_with_which_they_are_faster(packed, monkeypatch) -> None:
    """With vectors of 256 bits at most 96; one thread multiplies one row faster otherwise."""
    for wide, most in ((False, 96), (True, 10**6)):
        monkeypatch.setattr("smalti.prior.packing.cpu_has_wide_vectors", lambda w=wide: w)
        assert packed.is_packed_for(most) and packed.is_packed_for(96)
        assert packed.is_packed_for(97) == wide
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda t=threads: t)
        assert packed.is_packed_for(1) == (threads > 1) and packed.is_packed_for(2)
    with torch.no_grad():
        many = torch.randn(97, 24)
        torch.testing.assert_close(packed(many)[:2], packed(many[:2]))


LABELS = torch.tensor([0, 1, 1])


def test_packed_weights_leave_greedy_codes_of_a_next_token_prior_alone(monkeypatch) -> None:
    monkeypatch.setattr("smalti.prior.packing.PACKED_FROM", 1)
    torch.manual_seed(0)
    config = replace(NextTokenPrior.PRESETS["gpt-nano"], depth=2, width=32, num_heads=2)
    prior = NextTokenPrior(replace(config, spec=CodeSpec(16, ((3, 3),)), num_classes=2)).eval()
    torch.nn.init.normal_(prior.output.weight)
    prior.arrange_for_sampling()
    options = {"guidance_scale": 2.0, "temperature": 0}
    expected = prior.sample(LABELS, **options)
    one = prior.sample(LABELS[:1], temperature=0)
    prior.compile_parts()
    assert all(m.has_packed_copy for m in prior.modules() if isinstance(m, PackableLinear))
    assert torch.equal(prior.sample(LABELS, **options), expected)
    assert torch.equal(prior.sample(LABELS[:1], temperature=0), one)


def test_a_flow_prior_is_packed_where_many_rows_are_faster(monkeypatch) -> None:
    """Elsewhere it is compiled."""
    monkeypatch.setattr("smalti.prior.packing.PACKED_FROM_OF_MANY_ROWS", 1)
    torch.manual_seed(0)
    config = replace(FlowPrior.PRESETS["flow-nano"], network=replace(
        FlowPrior.PRESETS["flow-nano"].network, width=32, num_heads=2, depth=2, feed_forward="gelu"
    ))  # fmt: skip
    prior = FlowPrior(config.fitted(ContinuousSpec(8, 4, 4), 2, None)).eval()
    for parameter in prior.parameters():
        torch.nn.init.normal_(parameter, std=0.1)

    def sample() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return prior.sample(LABELS, num_inference_steps=3, generator=generator)

    expected, asked = sample(), []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: asked.append(self))
    monkeypatch.setattr("smalti.prior.packing.cpu_has_wide_vectors", lambda: False)
    prior.compile_parts()
    assert asked == [prior.network]
    monkeypatch.setattr("smalti.prior.packing.cpu_has_wide_vectors", lambda: True)
    prior.compile_parts()
    assert asked == [prior.network] and prior.network.blocks[1].mlp.fc2.has_packed_copy
    torch.testing.assert_close(sample(), expected)


def test_a_prior_of_another_size_shares_the_packed_copies(monkeypatch) -> None:
    monkeypatch.setattr("smalti.prior.packing.PACKED_FROM_OF_MANY_ROWS", 1)
    monkeypatch.setattr("smalti.prior.packing.cpu_has_wide_vectors", lambda: True)
    prior = FlowPrior(FlowPrior.PRESETS["flow-nano"].fitted(ContinuousSpec(8, 4, 4), 2, None))
    prior.compile_parts()
    other = prior.resized(ContinuousSpec(8, 8, 4), None)
    other.compile_parts()
    pairs = list(zip(prior.modules(), other.modules(), strict=True))
    layers = [(a, b) for a, b in pairs if isinstance(a, PackableLinear) and a.has_packed_copy]
    assert layers and all(a._packed is b._packed for a, b in layers)
    with torch.no_grad():
        layers[0][0].weight.mul_(2)  # it is the weight of both
    assert not any(layer.is_packed_for(8) for layer in layers[0])
