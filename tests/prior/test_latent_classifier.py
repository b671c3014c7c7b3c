"""The classifier of noisy latents: against a closed form, saved and loaded, and what it refuses."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from chance import randomised

from smalti.config import config_from_dict, config_to_dict
from smalti.data.latents import CodeSpec, ContinuousSpec
from smalti.errors import SmaltiError
from smalti.prior.base import Prior
from smalti.prior.flow.classifier import LatentClassifier, LatentClassifierConfig
from smalti.prior.flow.config import FlowConfig
from smalti.prior.flow.dit import DiTConfig
from smalti.prior.flow.guidance import Classifier
from smalti.prior.flow.path import PATHS, DDPMPath, LinearPath, VPLinearPath
from smalti.prior.flow.prediction import derivative_by_score
from smalti.prior.flow.times import LogitNormalTimes, times_and_noise

TINY = LatentClassifierConfig(
    spec=ContinuousSpec(2, 4, 6),
    classes=("a", "b", "c"),
    patch_size=2,
    width=16,
    depth=2,
    num_heads=2,
    tokenizer_fingerprint="f" * 64,
)
LATENTS, LABELS = torch.randn(8, 2, 4, 6), torch.arange(8) % 3


def make(config: LatentClassifierConfig = TINY) -> LatentClassifier:
    return randomised(LatentClassifier(config))


@pytest.mark.parametrize("path", [LinearPath(), VPLinearPath()], ids=lambda path: path.kind)
def test_a_trained_classifier_and_its_gradient_are_those_of_bayes(path) -> None:
    """Classes N(+-m, s^2 I): p(1 | x_t) = sigmoid(2 alpha m sum(x) / (alpha^2 s^2 + sigma^2))."""
    mean, std = 0.8, 0.5
    config = LatentClassifierConfig(
        spec=ContinuousSpec(1, 1, 2),
        classes=("minus", "plus"),
        path=path,
        width=32,
        depth=1,
        num_heads=2,
    )
    torch.manual_seed(0)
    model = LatentClassifier(config)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(200):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / 200)
        labels = torch.randint(2, (256,))
        signs = (2.0 * labels - 1)[:, None, None, None]
        loss = model(signs * mean + std * torch.randn(256, 1, 1, 2), labels).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    t = torch.tensor([0.2, 0.5, 0.8]).repeat(64)
    labels = torch.randint(2, (192,))
    signs = (2.0 * labels - 1)[:, None, None, None]
    x = path.mix(signs * mean + std * torch.randn(192, 1, 1, 2), torch.randn(192, 1, 1, 2), t)
    x = x.requires_grad_()
    alpha, sigma = path.alpha(t), path.sigma(t)
    slope = 2 * alpha * mean / (alpha.square() * std**2 + sigma.square())
    exact = torch.nn.functional.logsigmoid(slope * x.sum((1, 2, 3)))
    found = model.eval().log_probability(x, t, torch.ones_like(labels))
    assert (found.exp() - exact.exp()).abs().mean() < 0.03
    undecided = (exact.exp() - 0.5).abs() < 0.4  # elsewhere few of the samples that it learnt from
    gradients = [torch.autograd.grad(v[undecided].sum(), x)[0].flatten() for v in (exact, found)]
    assert torch.nn.functional.cosine_similarity(*gradients, 0) > 0.9


@pytest.mark.parametrize("kind", PATHS)
def test_the_objective_is_the_cross_entropy_at_random_times(kind: str) -> None:
    path = PATHS.configured(kind)
    model = make(replace(TINY, path=path, times=LogitNormalTimes(mean=0.5)))
    u, noise = times_and_noise(LATENTS, fixed=True).values()
    t = torch.sigmoid(0.5 + torch.special.ndtri(u))
    x = path.mix(LATENTS, noise, t)
    chosen = model.log_probability(x, t, LABELS)
    loss = model(LATENTS, LABELS)
    torch.testing.assert_close(loss.total, -chosen.mean())
    right = (model.logits(x, t).argmax(1) == LABELS).float().mean()
    assert loss.parts["accuracy"] == right


def test_random_inputs_make_the_pass_a_function_of_its_rows() -> None:
    model = make().train()
    inputs = model.sample_random_inputs(8, torch.Generator().manual_seed(3))
    whole = model(LATENTS, LABELS, inputs).total
    halves = [
        model(LATENTS[rows], LABELS[rows], {name: part[rows] for name, part in inputs.items()})
        for rows in (slice(4), slice(4, 8))
    ]
    torch.testing.assert_close(whole, sum(half.total for half in halves) / 2)


def test_a_class_is_recognised_in_the_part_of_the_times_where_it_is() -> None:
    """A classifier that only looks at the time: right for a label at the times of one band."""
    model = make()
    model.logits = lambda x, t: torch.nn.functional.one_hot((3 * t).long().clamp(max=2), 3)
    found = model.recognised(LATENTS, LABELS, 3)
    assert found.shape == (3, 8)
    for band in range(3):
        assert torch.equal(found[band], band == LABELS)


def test_samples_do_not_depend_on_each_other() -> None:
    model, t = make(), torch.linspace(0.1, 0.9, 8)
    alone = torch.cat([model.logits(LATENTS[i : i + 1], t[i : i + 1]) for i in range(8)])
    torch.testing.assert_close(model.logits(LATENTS, t), alone)


@pytest.mark.parametrize("kind", PATHS)
def test_guidance_is_finite_up_to_the_noise_end(kind: str) -> None:
    """A velocity is guided by the gradient divided by alpha, which is 0 at t = 0 of most paths; so
    the gradient of the exact classifier vanishes there, and so must that of a trained one."""
    path = PATHS.configured(kind)
    guide = Classifier.of(make(replace(TINY, path=path)))

    def shift(t: float) -> float:
        times = torch.full((8,), t, dtype=torch.float64)
        x = path.mix(LATENTS, torch.randn(8, 2, 4, 6), times)
        factor = derivative_by_score("velocity", path, times)[:, None, None, None]
        return (factor * guide.gradient(x, times, LABELS)).norm().item()

    assert max(shift(1e-6), shift(0.0)) < 20 * max(shift(0.1), shift(0.5))


def test_a_new_classifier_has_blocks_that_are_the_identity() -> None:
    model = LatentClassifier(TINY)
    tokens, time = torch.randn(2, 6, 16), torch.randn(2, 16)
    torch.testing.assert_close(model.blocks[0](tokens, time, None), tokens)


def test_it_is_saved_and_loaded_as_every_model(tmp_path: Path) -> None:
    config = replace(TINY, path=DDPMPath(beta_schedule="cosine"), times=LogitNormalTimes())
    model = make(config)
    model.save_pretrained(tmp_path / "model")
    loaded = LatentClassifier.from_pretrained(tmp_path / "model")
    assert loaded.config == config and loaded.fingerprint == model.fingerprint
    t = torch.full((8,), 0.5)
    assert torch.equal(loaded.logits(LATENTS, t), model.logits(LATENTS, t))
    assert config_from_dict(LatentClassifierConfig, config_to_dict(config), "test") == config
    with pytest.raises(SmaltiError, match='"noisy-latents" is a classifier, not a prior'):
        Prior.from_pretrained(tmp_path / "model")


def prior(**changes) -> FlowConfig:
    network = DiTConfig(
        in_channels=2, out_channels=2, grid=(4, 6), width=16, num_heads=2, num_classes=3
    )
    return replace(FlowConfig(network=network, tokenizer_fingerprint="f" * 64), **changes)


def test_the_prior_that_it_was_trained_for_is_accepted() -> None:
    make().check_prior(prior())
    make().check_prior(prior(tokenizer_fingerprint=None))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (prior(tokenizer_fingerprint="e" * 64), "latents of tokenizer ffffffffffff, and the prior"),
        (prior(path=VPLinearPath()), "was trained on the path LinearPath"),
        (FlowConfig(), "takes 2 x 4 x 6 numbers, and the prior models 4 x 32 x 32"),
    ],
)
def test_another_prior_is_refused(config: FlowConfig, message: str) -> None:
    with pytest.raises(SmaltiError, match=message):
        make().check_prior(config)


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda: TINY.fitted(CodeSpec(16, ((4, 4),)), ("a", "b"), ""), "for flow priors"),
        (lambda: TINY.fitted(TINY.spec, ("a",), ""), "have 1 classes, and a classifier needs at"),
        (lambda: TINY.fitted(TINY.spec, (), ""), "have 0 classes"),
        (lambda: TINY.fitted(ContinuousSpec(2, 5, 5), ("a", "b"), ""), "choose a patch_size"),
        (lambda: make().logits(torch.zeros(1, 2, 3, 3), torch.zeros(1)), "takes .B, 2, 4, 6."),
        (lambda: make().check_labels(torch.tensor([0, 3])), "no class 3: use labels from 0 to 2"),
    ],
)
def test_errors_are_explained(make_it, message: str) -> None:
    with pytest.raises(SmaltiError, match=message):
        make_it()
