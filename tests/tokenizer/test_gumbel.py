"""The Gumbel-softmax quantizer: it samples from the softmax, its loss is a divergence."""

import math

import pytest
import torch
import torch.nn.functional as F

from smalti.errors import SmaltiError
from smalti.tokenizer.quantizers.gumbel import GumbelConfig, GumbelQuantizer


@pytest.fixture
def quantizer() -> GumbelQuantizer:
    return GumbelQuantizer(GumbelConfig(vocab_size=5, code_dim=3, kl_weight=2.0))


@torch.no_grad()
def test_training_samples_codes_with_the_probabilities_of_the_softmax(quantizer) -> None:
    feature = torch.randn(1, 3, 1, 1)
    expected = quantizer.scores(feature.flatten(1)).softmax(-1)[0]
    codes = quantizer.train()(feature.expand(1, 3, 200, 200)).codes
    share = codes.flatten().bincount(minlength=5) / 40000
    torch.testing.assert_close(share, expected, atol=0.015, rtol=0)  # 6 standard errors


@torch.no_grad()
def test_in_eval_mode_the_best_score_is_the_code(quantizer) -> None:
    features = torch.randn(2, 3, 4, 4)
    scores = F.conv2d(features, quantizer.proj.weight, quantizer.proj.bias)
    found = quantizer.eval()(features)
    assert torch.equal(found.codes, scores.argmax(1).flatten(1))
    assert torch.equal(found.codes, quantizer.search(features))
    torch.testing.assert_close(found.latents, quantizer.lookup(found.codes, 4, 4))


@torch.no_grad()
def test_the_loss_is_the_divergence_from_uniform_codes(quantizer) -> None:
    features = torch.randn(2, 3, 4, 4)
    p = quantizer.scores(features.movedim(1, -1).flatten(0, -2)).softmax(-1)
    divergence = (p * (p * 5).log()).sum(-1).mean()
    torch.testing.assert_close(quantizer(features).losses["uniformity"], 2 * divergence)
    quantizer.proj.weight.zero_()
    quantizer.proj.bias.zero_()
    assert quantizer(features).losses["uniformity"].abs() < 1e-6
    quantizer.proj.bias[1] = 100.0
    assert float(quantizer(features).losses["uniformity"]) == pytest.approx(2 * math.log(5))


@pytest.mark.parametrize(
    "wrong", [{"vocab_size": 1}, {"code_dim": 0}, {"temperature": 0.0}, {"kl_weight": -1.0}]
)
def test_impossible_settings_are_refused(wrong: dict) -> None:
    with pytest.raises(SmaltiError):
        GumbelConfig(**wrong)
