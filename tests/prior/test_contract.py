"""What every registered prior promises; a new one needs a tiny configuration here, and no test."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import pytest
import torch
from chance import generators, randomised
from colour import ColourKind
from torch import Tensor

from smalti.data.latents import CodeSpec, ContinuousSpec, LatentSpec
from smalti.errors import SmaltiError
from smalti.prior.base import Prior, PriorConfig
from smalti.prior.conditions.base import (
    Combination,
    Condition,
    count,
    joined,
    moved,
    part_of,
    repeated,
    rows,
)
from smalti.prior.conditions.byte_encoder import BYTES
from smalti.prior.conditions.registry import CONDITIONS
from smalti.prior.conditions.text import TextCondition, TextConfig
from smalti.prior.conditions.text_encoder import tokenize_bytes
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


# -- conditions ---------------------------------------------------------------------------------

T, D = 6, 8
TEXTS = ["ab", "", "apple", "ab"]
KINDS = {
    "none": torch.zeros(4, dtype=torch.int64),
    "class": torch.tensor([0, 2, 1, 0]),
    "text": TextCondition.left_padded(
        torch.randn(4, T, D, generator=torch.Generator().manual_seed(3)),
        torch.arange(T) < torch.tensor([[6], [2], [1], [4]]),
    ),
    "bytes": tokenize_bytes(TEXTS, T),
}
KINDS["class+text"] = Combination({"class": KINDS["class"], "text": KINDS["text"]})
COLOURS = torch.rand(4, 3, generator=torch.Generator().manual_seed(3))
KINDS["class+colour"] = Combination({"class": KINDS["class"], "colour": COLOURS})
TESTED = [
    (name, kind)
    for name, kind in product(CASES, KINDS)
    if kind == "none"
    or set(kind.replace("bytes", "text").split("+")) <= {*CASES[name].config.CONDITIONS, "colour"}
]


@pytest.fixture(autouse=True)
def own_kind(monkeypatch) -> None:
    """All priors take a kind of one's own."""
    monkeypatch.setitem(CONDITIONS._entries, "colour", ColourKind)


@pytest.fixture(params=TESTED, ids="-".join)
def case(request) -> tuple[str, str]:
    return request.param


@pytest.fixture
def family(case) -> str:
    return case[0]


@pytest.fixture
def kind(case) -> str:
    return case[1]


@pytest.fixture
def condition(kind) -> Condition:
    return KINDS[kind]


def make(name: str, kind: str) -> Prior:
    text = TextConfig(T, D, BYTES if kind == "bytes" else "")
    config = CASES[name].config.conditioned(kind.replace("bytes", "text"), text)
    config = config.fitted(config.spec, 3, None, SCALES)
    torch.manual_seed(0)
    model = PRIORS.resolve(name)(config)
    if name == "next-scale":
        model.bind(MultiScaleQuantizer(SCALES))
    return model


@pytest.fixture
def conditional(case) -> Prior:
    return randomised(make(*case))


@pytest.fixture
def some_latents(conditional) -> Tensor:
    generator, spec = torch.Generator().manual_seed(0), conditional.spec
    if isinstance(spec, CodeSpec):
        return torch.randint(spec.vocab_size, (4, spec.length), generator=generator)
    return torch.randn(4, spec.channels, spec.height, spec.width, generator=generator)


@pytest.fixture
def loss_of(conditional, some_latents) -> Callable[[Condition], Tensor]:
    """The loss of each sample, with equal random numbers."""

    def losses(condition: Condition) -> Tensor:
        parts = []
        for row in range(count(condition)):
            one = slice(row, row + 1)
            parts.append(conditional(some_latents[one], rows(condition, one)).total)
        return torch.stack(parts)

    return losses


def test_values_have_rows(condition) -> None:
    assert count(condition) == 4
    twice = repeated(condition, 2)
    assert count(twice) == 8 and count(joined(condition, twice)) == 12
    again = rows(moved(twice, "cpu"), slice(0, None, 2))
    for theirs, ours in zip(tensors(again), tensors(condition), strict=True):
        assert torch.equal(theirs, ours)


def tensors(value: Condition) -> list[Tensor]:
    if isinstance(value, Combination):
        return [tensor for part in value.parts.values() for tensor in tensors(part)]
    return [value] if isinstance(value, Tensor) else [value.features, value.mask, value.is_null]


def test_the_loss_reaches_every_weight(conditional, some_latents, condition) -> None:
    """The null caption too, where captions are dropped."""
    conditional.train()
    torch.manual_seed(0)
    given = joined(condition, conditional.null(condition))
    conditional(torch.cat([some_latents, some_latents]), given).total.backward()
    trained = {n: p for n, p in conditional.named_parameters() if p.requires_grad}
    assert [n for n, p in trained.items() if p.grad is None or not p.grad.isfinite().all()] == []


def test_samples_are_latents(conditional, family, some_latents, condition) -> None:
    quick = CASES[family].quick
    samples = conditional.sample(condition, generator=generators(0, 1, 2, 3), **quick)
    assert samples.shape == some_latents.shape and samples.dtype == some_latents.dtype
    assert conditional.sample(conditional.no_conditions(), **quick).shape == (
        0,
        *some_latents.shape[1:],
    )


def test_a_sample_depends_on_its_own_condition(conditional, family, condition) -> None:
    quick = CASES[family].quick
    if conditional.has_null_class:
        quick = {**quick, "guidance_scale": 2.0}
    together = conditional.sample(condition, generator=generators(0, 1, 2, 3), **quick)
    alone = conditional.sample(rows(condition, slice(2, 3)), generator=generators(2), **quick)
    torch.testing.assert_close(together[2:3], alone, rtol=1e-4, atol=1e-5)


def test_the_condition_matters(conditional, kind, condition, loss_of) -> None:
    conditional.eval()
    losses = loss_of(condition)
    if kind == "none":
        assert torch.equal(losses, loss_of(conditional.null(condition)))
        return
    swapped = loss_of(joined(rows(condition, slice(2, None)), rows(condition, slice(0, 2))))
    changed = losses != swapped
    assert changed[1:3].all()  # others of the same label or text do not change
    assert (losses != loss_of(conditional.null(condition))).all()


def test_dropped_conditions_are_the_null_condition(conditional, kind, condition, loss_of) -> None:
    """In training only, in the rows whose number is below the probability, of all kinds at once."""
    uniforms = torch.tensor([0.1, 0.6, 0.4, 0.9])
    assert conditional.eval().drop(condition, 0.5, uniforms) is condition
    dropped = conditional.train().drop(condition, 0.5, uniforms)
    conditional.eval()
    null, given, found = loss_of(conditional.null(condition)), loss_of(condition), loss_of(dropped)
    expected = torch.where(uniforms < 0.5, null, given)
    assert torch.equal(found, expected)
    assert torch.equal(given, null) == (kind == "none")


@pytest.mark.parametrize("name", CASES)
def test_captions_that_were_never_dropped_have_no_null(name) -> None:
    """As classes; weights that were trained with dropout bring theirs."""
    config = CASES[name].config.conditioned("text", TextConfig(T, D))
    config = replace(config, label_dropout=0.0)
    model = PRIORS.resolve(name)(config.fitted(config.spec, 0, None, SCALES))
    assert not model.has_null_class
    with pytest.raises(SmaltiError, match=r"without dropping captions .*: set guidance_scale to 1"):
        model.check_guidance(2.0)
    model.load_state_dict(make(name, "text").state_dict())
    assert model.has_null_class
    model.check_guidance(2.0)


def test_guidance_leads_away_from_the_negative_condition(
    conditional, family, kind, condition
) -> None:
    if kind == "none":
        with pytest.raises(SmaltiError, match="there is nothing to guide: set guidance_scale to 1"):
            conditional.sample(condition, guidance_scale=2.0)
        return
    options = {**CASES[family].quick, "guidance_scale": 25.0}
    draw = {"generator": generators(0, 1, 2, 3)}
    plain = conditional.sample(condition, **draw, **options)
    null = conditional.sample(
        condition,
        negative_condition=conditional.null(condition),
        generator=generators(0, 1, 2, 3),
        **options,
    )
    assert torch.equal(plain, null)
    same = conditional.sample(
        condition, negative_condition=condition, generator=generators(0, 1, 2, 3), **options
    )
    unguided = conditional.sample(
        condition, generator=generators(0, 1, 2, 3), **CASES[family].quick
    )
    torch.testing.assert_close(same, unguided, rtol=1e-3, atol=1e-3)
    assert not torch.equal(plain, unguided)
    with pytest.raises(SmaltiError, match="1 conditions were given for 4 samples"):
        conditional.sample(condition, negative_condition=rows(condition, slice(0, 1)), **options)


def test_a_condition_of_another_kind_is_refused(conditional, kind, condition) -> None:
    for other, value in KINDS.items():
        if other != kind and not (kind == "class" and other == "none"):
            with pytest.raises(SmaltiError):
                conditional.sample(value)


def test_save_and_load_with_conditions(conditional, family, condition, tmp_path) -> None:
    conditional.save_pretrained(tmp_path)
    again = Prior.from_pretrained(tmp_path)
    assert again.config == conditional.config and again.fingerprint == conditional.fingerprint
    samples = [
        model.sample(condition, generator=generators(0, 1, 2, 3), **CASES[family].quick)
        for model in (conditional, again)
    ]
    assert torch.equal(*samples)


def test_padding_has_no_influence(conditional, kind, condition, loss_of) -> None:
    if "text" not in conditional.condition_kinds:
        pytest.skip("no captions")
    text = part_of(condition, "text")
    junk = text.features.clone()
    junk[~text.mask] = 7
    other = TextCondition(junk, text.mask)
    if isinstance(condition, Combination):
        other = Combination({"class": part_of(condition, "class"), "text": other})
    conditional.eval()
    assert torch.equal(loss_of(condition), loss_of(other))


@pytest.mark.parametrize("name", [n for n, k in TESTED if k == "text" and n != "next-token"])
def test_a_new_prior_ignores_the_caption_but_for_its_mean(name) -> None:
    """The output layer of cross-attention starts at zero."""
    model = make(name, "text")
    layers = [p for n, p in model.named_parameters() if n.endswith("cross_attn.proj.weight")]
    assert len(layers) == 1 and not layers[0].any()


@dataclass(frozen=True)
class OwnConfig(PriorConfig):
    """Of a prior of one's own, which takes classes and says nothing about conditions."""

    kind: str = "new"
    num_classes: int = 3


def test_a_configuration_of_ones_own_is_checked() -> None:
    assert OwnConfig().conditioned("class") == OwnConfig()
    unconditional = OwnConfig().conditioned("none")
    assert unconditional.num_classes == 0 and unconditional.classes_of(3) == 0
    for other in ("text", "depth"):
        with pytest.raises(SmaltiError, match=f'condition is "{other}"; a new prior takes none'):
            OwnConfig().conditioned(other)


def test_a_configuration_that_no_prior_can_have_is_refused() -> None:
    config = CASES["next-token"].config
    with pytest.raises(SmaltiError, match='condition is "image"; a next-token prior takes none'):
        config.conditioned("image")
    with pytest.raises(SmaltiError, match='condition is "class\\+class"'):
        config.conditioned("class+class")
    with pytest.raises(SmaltiError, match="condition text has no classes: set it to 0"):
        replace(config, condition="text")
    assert config.conditioned("text").num_classes == 0
    with pytest.raises(SmaltiError, match="num_classes is 0, but a prior with condition class"):
        config.fitted(config.spec, 0, None)
