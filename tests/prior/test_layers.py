"""RMS norm and stochastic depth against their definitions."""

import pytest
import torch

from smalti.prior.layers import DropPath, RMSNorm, drop_path_rates


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
