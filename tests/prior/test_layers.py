"""RMS norm and stochastic depth against their definitions; packed linear layers."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from smalti.prior.layers import DropPath, PackableLinear, RMSNorm, drop_path_rates


def test_rms_norm_is_its_definition() -> None:
    norm, x = RMSNorm(8, 1e-5), torch.randn(3, 8)
    torch.nn.init.normal_(norm.weight)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)
    assert norm(x.bfloat16()).dtype == torch.bfloat16  # as queries under autocast


def test_drop_path_leaves_out_whole_samples_in_training_only() -> None:
    path, x = DropPath(0.25), torch.ones(4000, 2, 3)
    dropped = path(x)
    assert dropped.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert torch.equal(dropped.amax((1, 2)), dropped.amin((1, 2)))
    assert dropped.mean().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(path.eval()(x), x)


def test_drop_path_is_unbiased_and_absent_in_evaluation() -> None:
    path, x = DropPath(0.25), torch.randn(3, 2, 3).repeat(4000, 1, 1)
    mean = path(x).view(4000, 3, 2, 3).mean(0)
    torch.testing.assert_close(mean, x[:3], rtol=0.05, atol=0.01)
    assert path.eval()(x) is x
    assert list(drop_path_rates(0.3, 4)) == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert list(drop_path_rates(0.3, 1)) == [0.0]


@pytest.fixture
def packed(monkeypatch) -> PackableLinear:
    monkeypatch.setattr("smalti.prior.layers.PACKED_FROM", 1)
    torch.manual_seed(0)
    layer = PackableLinear(24, 40)
    layer.pack()
    return layer


def is_used(layer: PackableLinear) -> bool:
    """Whether a product without gradients uses the packed weight."""
    with torch.no_grad():
        return layer._packed_is_valid(torch.ones(1, 24))


def test_a_packed_product_is_the_product(packed) -> None:
    x, bias = torch.randn(2, 5, 24), torch.randn(40)
    assert is_used(packed)
    with torch.no_grad():
        torch.testing.assert_close(packed(x), F.linear(x, packed.weight, packed.bias))
        torch.testing.assert_close(packed(x, bias), F.linear(x, packed.weight, bias))
        transposed = torch.randn(24, 5).T
        torch.testing.assert_close(packed(transposed), F.linear(transposed, *packed.parameters()))


def test_a_packed_weight_is_for_fp32_without_gradients(packed) -> None:
    x = torch.randn(5, 24)
    packed(x).sum().backward()
    assert packed.weight.grad is not None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert packed(x).dtype == torch.bfloat16
    assert not is_used(packed.bfloat16())
    assert packed(x.bfloat16()).dtype == torch.bfloat16
    unpacked = PackableLinear(24, 40).bfloat16()
    unpacked.pack()
    assert unpacked._packed is None


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


def test_copies_and_pickles_of_a_packed_layer_are_not_packed(packed) -> None:
    for copied in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert not is_used(copied) and torch.equal(copied.weight, packed.weight)
    assert list(packed.state_dict()) == ["weight", "bias"] and is_used(packed)


def test_many_rows_are_not_multiplied_with_the_packed_weight(packed) -> None:
    with torch.no_grad():
        few, many = torch.randn(96, 24), torch.randn(97, 24)
        assert packed._packed_is_valid(few) and not packed._packed_is_valid(many)
        torch.testing.assert_close(packed(many)[:1], packed(many[:1]))
