"""What every registered prior promises; a new one needs a tiny configuration here, and no test."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from chance import generators, randomised
from torch import Tensor

from smalti.data.latents import CodeSpec, ContinuousSpec, LatentSpec
from smalti.errors import SmaltiError
from smalti.prior.base import Prior, PriorConfig
from smalti.prior.flow.config import FlowConfig
from smalti.prior.flow.dit import DiTConfig
from smalti.prior.next_scale.config import NextScaleConfig
from smalti.prior.next_token.config import NextTokenConfig
from smalti.prior.registry import PRIORS
from smalti.scripts.options import sample_options
from smalti.tokenizer.quantizers.codebook import CodebookConfig
from smalti.tokenizer.quantizers.multi_scale import MultiScaleConfig, MultiScaleQuantizer

SCALES = MultiScaleConfig(codebook=CodebookConfig(16, 4), scales=((1, 1), (2, 2)), convolutions=1)
SPECS: tuple[LatentSpec, ...] = (
    CodeSpec(16, ((2, 2),)),
    CodeSpec(16, ((1, 1), (2, 2))),
    ContinuousSpec(2, 4, 4),
)


@dataclass(frozen=True)
class Case:
    config: PriorConfig
    quick: dict[str, object]  # options of `sample` that make it cheap


CASES = {
    "next-token": Case(
        NextTokenConfig(
            spec=CodeSpec(16, ((2, 2),)), num_classes=3, depth=1, width=16, num_heads=2, hidden=32
        ),
        {},
    ),
    "next-scale": Case(
        NextScaleConfig(
            spec=CodeSpec(16, SCALES.scales),
            quantizer=SCALES,
            num_classes=3,
            depth=1,
            width=16,
            num_heads=2,
        ),
        {},
    ),
    "flow": Case(
        FlowConfig(
            network=DiTConfig(
                in_channels=2,
                out_channels=2,
                grid=(4, 4),
                patch_size=2,
                depth=1,
                width=16,
                num_heads=1,
                num_classes=3,
                frequency_size=16,
            )
        ),
        {"num_inference_steps": 2},
    ),
}
LABELS = torch.tensor([0, 2, 1, 3])  # the last one is the null label


def test_every_registered_prior_is_tested_here() -> None:
    assert set(CASES) == set(PRIORS)


@pytest.fixture(params=list(CASES))
def name(request) -> str:
    return request.param


@pytest.fixture
def prior(name: str) -> Prior:
    model = PRIORS.resolve(name)(CASES[name].config)
    if name == "next-scale":
        model.bind(MultiScaleQuantizer(SCALES))
    return randomised(model)


@pytest.fixture
def latents(prior: Prior) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if isinstance(prior.spec, CodeSpec):
        shape = (len(LABELS), prior.spec.length)
        return torch.randint(prior.spec.vocab_size, shape, generator=generator)
    spec = prior.spec
    return torch.randn(len(LABELS), spec.channels, spec.height, spec.width, generator=generator)


@pytest.fixture
def sample(prior: Prior, name: str) -> Callable[..., Tensor]:
    def call(labels: Tensor, *seeds: int, **options: object) -> Tensor:
        return prior.sample(labels, generator=generators(*seeds), **CASES[name].quick, **options)

    return call


def test_all_share_one_signature_of_forward(prior: Prior) -> None:
    names = ["self", "latents", "condition", "random_inputs"]
    assert list(inspect.signature(type(prior).forward).parameters) == names


def test_the_loss_is_a_scalar_whose_gradient_reaches_every_weight(prior, latents) -> None:
    prior.train()
    torch.manual_seed(0)
    loss = prior(latents, LABELS)
    assert loss.total.shape == () and loss.total.isfinite()
    assert not any(part.requires_grad for part in loss.parts.values())
    loss.total.backward()
    trained = {n: p for n, p in prior.named_parameters() if p.requires_grad}
    assert [n for n, p in trained.items() if p.grad is None or not p.grad.isfinite().all()] == []


def test_equal_random_inputs_give_an_equal_loss(prior, latents) -> None:
    inputs = prior.sample_random_inputs(len(LABELS), torch.Generator().manual_seed(0))
    assert all(len(rows) == len(LABELS) for rows in inputs.values())
    prior.train()
    losses = []
    for _ in range(2):
        torch.manual_seed(1)
        losses.append(prior(latents, LABELS, random_inputs=inputs or None).total)
    assert torch.equal(*losses)


def test_samples_are_latents_of_the_spec(prior, latents, sample) -> None:
    samples = sample(LABELS, 0, 1, 2, 3)
    assert samples.shape == latents.shape and samples.dtype == latents.dtype
    assert prior.sample(prior.no_conditions()).shape == (0, *latents.shape[1:])


def test_a_sample_depends_on_its_own_generator_alone(sample) -> None:
    together = sample(LABELS, 5, 6, 7, 8)
    alone = sample(LABELS[2:3], 7)
    torch.testing.assert_close(together[2:3], alone, rtol=1e-4, atol=1e-5)
    assert not torch.equal(together, sample(LABELS, 9, 10, 11, 12))


def test_guidance_pulls_towards_the_condition(prior, sample) -> None:
    """1 is off; another scale changes conditional samples and leaves unconditional ones."""
    labels, null = LABELS[:2], torch.full((2,), prior.num_classes)
    assert torch.equal(sample(labels, 0, 1), sample(labels, 0, 1, guidance_scale=1.0))
    changed = sample(labels, 0, 1, guidance_scale=30.0)
    assert not torch.equal(sample(labels, 0, 1), changed)
    unchanged = sample(null, 0, 1, guidance_scale=3.0)
    torch.testing.assert_close(sample(null, 0, 1), unchanged, rtol=1e-3, atol=1e-3)


def test_save_and_load(prior, sample, tmp_path, name) -> None:
    prior.save_pretrained(tmp_path)
    again = Prior.from_pretrained(tmp_path)
    assert type(again) is type(prior) and again.config == prior.config
    assert again.fingerprint == prior.fingerprint
    options = CASES[name].quick
    samples = again.sample(LABELS, generator=generators(0, 1, 2, 3), **options)
    assert torch.equal(samples, sample(LABELS, 0, 1, 2, 3))


def test_it_models_the_latents_that_its_configuration_can_be_fitted_to(prior) -> None:
    for spec in SPECS:
        if prior.supports(spec):
            fitted = prior.config.fitted(spec, 5, "abc", SCALES)
            assert (fitted.spec, fitted.num_classes) == (spec, 5)
            assert fitted.tokenizer_fingerprint == "abc"
        else:
            with pytest.raises(SmaltiError):
                prior.config.fitted(spec, 5, None, SCALES)
    assert sum(map(prior.supports, SPECS)) == 1


def test_likelihood_is_optional_and_then_per_sample(prior, latents) -> None:
    if not prior.has_likelihood:
        pytest.skip("no likelihood")
    bits = prior.bits_per_dimension(latents, LABELS, generator=torch.Generator().manual_seed(0))
    assert bits.shape == (len(LABELS),) and bits.isfinite().all()


@pytest.mark.parametrize("two", [np.float32(2), np.int64(2), np.array(2.0), torch.tensor(2.0)])
def test_numbers_of_numpy_and_torch_are_options(prior, sample, name, two) -> None:
    expected = sample(LABELS, 0, 1, 2, 3, guidance_scale=2.0, guidance_interval=(0.0, 0.75))
    interval = np.array([0.0, 0.75], dtype=np.float32)
    found = sample(LABELS, 0, 1, 2, 3, guidance_scale=two, guidance_interval=interval)
    assert torch.equal(found, expected)
    whole = {"num_inference_steps": 2} if name == "flow" else {"top_k": 2}
    integers = {option: np.int64(value) for option, value in whole.items()}
    results = [
        prior.sample(LABELS, generator=generators(*range(4)), **o) for o in (whole, integers)
    ]
    assert torch.equal(*results)


def test_arrays_of_numpy_are_labels_and_latents(prior, latents, sample) -> None:
    assert torch.equal(sample(LABELS.numpy(), 0, 1, 2, 3), sample(LABELS, 0, 1, 2, 3))
    bits = prior.bits_per_dimension(latents, LABELS, generator=torch.Generator())
    array = prior.bits_per_dimension(latents.numpy(), LABELS.numpy(), generator=torch.Generator())
    assert torch.equal(array, bits)
    with torch.no_grad():
        assert torch.equal(
            prior(latents.numpy(), LABELS.numpy()).total, prior(latents, LABELS).total
        )


def test_options_with_rows_are_options_of_sample(prior) -> None:
    assert {*prior.row_options} <= {*inspect.signature(prior.sample).parameters}


def test_labels_out_of_range_are_refused(prior, latents) -> None:
    for wrong in (torch.tensor([0, 1, 2, 4]), torch.tensor([0, 1, 2, -1])):
        with pytest.raises(SmaltiError, match="out of range"):
            prior(latents, wrong)
        with pytest.raises(SmaltiError, match="out of range"):
            prior.sample(wrong)


def test_presets_are_configurations_of_the_prior(name: str) -> None:
    cls = PRIORS.resolve(name)
    assert cls.PRESETS and all(type(preset) is cls.Config for preset in cls.PRESETS.values())
    assert {preset.kind for preset in cls.PRESETS.values()} == {name}


def test_every_sampling_flag_is_described(name: str) -> None:
    flags = [option for option in sample_options() if option.prior == name]
    assert "guidance_scale" in {option.name for option in flags}
    assert [option.name for option in flags if len(option.help) < 10] == []
