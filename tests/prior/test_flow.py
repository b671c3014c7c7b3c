"""The flow prior: objective, sampling with every solver, likelihood, saving, errors."""

import math
from dataclasses import replace

import pytest
import torch
from chance import generators, randomised

from smalti.config import config_from_dict, config_to_dict, saved_fields
from smalti.data.latents import CodeSpec, ContinuousSpec
from smalti.errors import SmaltiError
from smalti.prior.flow.dit import DiTConfig
from smalti.prior.flow.guidance import Classifier
from smalti.prior.flow.path import (
    DDPMPath,
    LinearPath,
    TrigonometricPath,
    VEPath,
    VPCosinePath,
    VPLinearPath,
)
from smalti.prior.flow.prediction import PREDICTIONS
from smalti.prior.flow.prior import PRESETS, FlowConfig, FlowPrior
from smalti.prior.flow.solvers.base import SOLVERS, make_solver
from smalti.prior.flow.times import LogitNormalTimes, times_and_noise

NETWORK = DiTConfig(
    in_channels=2,
    out_channels=2,
    grid=(4, 6),
    patch_size=2,
    width=16,
    depth=1,
    num_heads=2,
    num_classes=3,
    frequency_size=16,
)
TINY = FlowConfig(network=NETWORK)
PATHS = [
    LinearPath(),
    LinearPath(sigma_min=0.01),
    TrigonometricPath(),
    VPLinearPath(),
    VPCosinePath(),
    DDPMPath(),
    VEPath(),
]
LABELS = torch.tensor([0, 1, 2, 3])  # 3 is the null label
LATENTS = torch.randn(4, 2, 4, 6, generator=torch.Generator().manual_seed(1))


def make_prior(config: FlowConfig = TINY) -> FlowPrior:
    return randomised(FlowPrior(config), std=0.2)


# -- objective ------------------------------------------------------------------------------------


def test_the_first_loss_is_the_variance_of_the_target() -> None:
    """A new network outputs 0. For unit data and noise the velocity has variance 2, the noise 1."""
    latents, labels = torch.randn(4000, 2, 4, 6), torch.randint(4, (4000,))
    for prediction, expected in (("velocity", 2), ("noise", 1), ("data", 1)):
        loss = FlowPrior(replace(TINY, prediction=prediction))(latents, labels)
        assert loss.total.item() == pytest.approx(expected, rel=0.02)
        assert loss.parts["mse"].item() == pytest.approx(expected, rel=0.02)


def test_the_objective_is_flow_matching() -> None:
    """Written out for the linear path, with the times and noise of eval mode."""
    model = make_prior()
    u, noise = times_and_noise(LATENTS, fixed=True).values()
    assert sorted(u.tolist()) == [0.125, 0.375, 0.625, 0.875]
    t = u[:, None, None, None]
    predicted = model.network(t * LATENTS + (1 - t) * noise, u, LABELS)
    expected = (predicted - (LATENTS - noise)).square().mean()
    torch.testing.assert_close(model(LATENTS, LABELS).total, expected)


def test_the_loss_in_eval_mode_repeats_and_leaves_the_random_state_alone() -> None:
    model, state = make_prior(), torch.get_rng_state()
    first, second = model(LATENTS, LABELS).total, model(LATENTS, LABELS).total
    assert first == second and torch.equal(torch.get_rng_state(), state)
    model.train()
    assert model(LATENTS, LABELS).total != model(LATENTS, LABELS).total


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.kind)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_path_and_prediction_trains_and_samples(path, prediction) -> None:
    weight = "noise" if prediction == "score" else "constant"
    config = replace(
        TINY, path=path, prediction=prediction, loss_weight=weight, times=LogitNormalTimes()
    )
    model = make_prior(config).train()
    loss = model(LATENTS, LABELS).total
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    for solver in ("heun", "ddim"):
        sampled = model.sample(LABELS, num_inference_steps=4, solver=solver)
        assert sampled.shape == (4, 2, 4, 6) and sampled.isfinite().all()


def test_labels_are_dropped_in_training_only() -> None:
    seen = []
    model = FlowPrior(replace(TINY, label_dropout=0.5))
    model.network.register_forward_pre_hook(lambda module, args: seen.append(args[2]))
    zeros = torch.zeros(2000, dtype=torch.int64)
    model.train()(torch.randn(2000, 2, 4, 6), zeros)
    model.eval()(torch.randn(2000, 2, 4, 6), zeros)
    assert 0.4 < (seen[0] == 3).float().mean() < 0.6 and (seen[1] == 0).all()


def test_the_network_receives_the_time_in_its_own_units() -> None:
    seen = []
    dit = replace(TINY, path=DDPMPath(), prediction="noise", time_scale=-1000.0, time_shift=999.0)
    for config in (TINY, replace(TINY, time_scale=1000.0), dit):
        model = FlowPrior(config)
        model.network.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
        model.velocity(LATENTS, torch.tensor([0.0, 0.25, 0.5, 0.999]).double(), LABELS)
    expected = [[0, 0.25, 0.5, 0.999], [0, 250, 500, 999], [999, 749, 499, 0]]
    torch.testing.assert_close(torch.stack(seen), torch.tensor(expected), atol=1e-4, rtol=1e-6)


def test_the_input_of_a_variance_exploding_network_has_unit_variance() -> None:
    seen = []
    model = FlowPrior(replace(TINY, path=VEPath(), prediction="noise"))
    model.network.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(torch.randn(4000, 2, 4, 6), torch.zeros(4000, dtype=torch.int64))
    assert seen[0].std().item() == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_rounded_model_and_autocast_change_little(dtype) -> None:
    model = make_prior()
    exact = model(LATENTS, LABELS).total
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(LATENTS, LABELS).total
    model.to(dtype)
    rounded = model(LATENTS.to(dtype), LABELS).total
    for loss in (rough, rounded):
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(exact.item(), rel=3e-2)
    assert model.sample(LABELS, num_inference_steps=2).dtype == torch.float32


def test_the_objective_compiles_into_one_graph() -> None:
    model = make_prior().train()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert compiled(LATENTS, LABELS).total.isfinite()


# -- sampling -------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", list(SOLVERS))
def test_with_a_list_of_generators_a_sample_does_not_depend_on_its_neighbours(solver) -> None:
    path = VEPath() if solver == "langevin" else LinearPath()
    model = make_prior(replace(TINY, path=path)).double()
    options = {"num_inference_steps": 4, "solver": solver, "guidance_scale": 2.0}
    together = model.sample(LABELS[:3], generator=generators(5, 6, 7), **options)
    alone = model.sample(LABELS[1:2], generator=generators(6), **options)
    other = model.sample(torch.tensor([2, 1]), generator=generators(9, 6), **options)
    torch.testing.assert_close(together[1], alone[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together[1], other[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("scale", "interval", "rows"),
    [
        (1.0, (0.0, 1.0), [4, 4, 4, 4]),
        (2.0, (0.0, 1.0), [8, 8, 8, 8]),
        (2.0, (0.25, 0.5), [4, 8, 8, 4]),
    ],
)
def test_guidance_costs_a_second_pass_only_where_it_is_on(scale, interval, rows) -> None:
    seen, model = [], make_prior()
    model.network.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    model.sample(
        LABELS,
        guidance_scale=scale,
        guidance_interval=interval,
        num_inference_steps=4,
        solver="euler",
    )
    assert seen == rows


def test_euler_sampling_written_out() -> None:
    model = make_prior()
    with torch.no_grad():
        x = LATENTS
        for i in range(5):
            velocity = model.network(x, torch.full((4,), i / 5), LABELS)
            nothing = model.network(x, torch.full((4,), i / 5), torch.full_like(LABELS, 3))
            x = x + (nothing + 3 * (velocity - nothing)) / 5
    sampled = model.sample(
        LABELS, noise=LATENTS, guidance_scale=3.0, num_inference_steps=5, solver="euler"
    )
    torch.testing.assert_close(sampled, x, rtol=1e-4, atol=1e-4)


def test_one_generator_repeats_and_none_leaves_the_global_state_alone() -> None:
    model, state = make_prior(), torch.get_rng_state()
    first, second, third = (
        model.sample(LABELS, generator=torch.Generator().manual_seed(s), num_inference_steps=2)
        for s in (1, 1, 2)
    )
    assert torch.equal(first, second) and not torch.equal(first, third)
    model.sample(LABELS, num_inference_steps=2)
    assert torch.equal(torch.get_rng_state(), state)


def test_sampling_leaves_the_mode_alone_and_reports_progress() -> None:
    model, steps = make_prior().train(), []
    model.sample(
        LABELS, num_inference_steps=3, on_step=lambda done, total, _: steps.append((done, total))
    )
    assert model.training and steps == [(1, 3), (2, 3), (3, 3)]
    assert model.sample(LABELS[:0], generator=[], num_inference_steps=2).shape == (0, 2, 4, 6)


def test_options_are_names_mappings_or_objects() -> None:
    model = make_prior()
    one = {"noise": LATENTS, "num_inference_steps": 4}
    sampled = [
        model.sample(LABELS, solver=solver, schedule=schedule, **one)
        for solver, schedule in (
            ("ddim", "uniform"),
            ({"kind": "ddim", "eta": 0.0}, {"kind": "shifted", "shift": 1.0}),
        )
    ]
    torch.testing.assert_close(sampled[0], sampled[1])


def test_a_learned_variance_is_used_by_ddpm_alone() -> None:
    network = replace(NETWORK, out_channels=4)
    model = make_prior(
        replace(TINY, network=network, path=DDPMPath(), prediction="noise", time_scale=-1000.0)
    )
    options = {"generator": generators(1, 2, 3, 4), "num_inference_steps": 4}
    learned = model.sample(LABELS, solver={"kind": "ddpm", "variance": "learned"}, **options)
    assert learned.isfinite().all() and model.config.spec.channels == 2
    assert model.sample(LABELS, num_inference_steps=2, solver="heun").shape == learned.shape


def test_a_classifier_guides() -> None:
    """A classifier that prefers large values increases the mean."""
    model = make_prior(replace(TINY, path=VPLinearPath()))
    classifier = Classifier(lambda x, t, labels: x.flatten(1).sum(1), scale=2.0)
    options = {"noise": LATENTS, "num_inference_steps": 10}
    plain = model.sample(LABELS, **options)
    assert model.sample(LABELS, classifier=classifier, **options).mean() > plain.mean() + 0.1


def test_velocity_and_score_are_of_the_same_prediction() -> None:
    model, t = make_prior(), torch.full((4,), 0.4)
    velocity, score = model.velocity(LATENTS, t, LABELS), model.score(LATENTS, t, LABELS)
    torch.testing.assert_close(velocity, model.network(LATENTS, t, LABELS))
    noise = LATENTS - 0.4 * velocity  # x - t v = x_0
    torch.testing.assert_close(score, -noise / 0.6)


def test_an_output_that_is_not_finite_is_an_error() -> None:
    model = make_prior()
    model.network.final_layer.linear.weight.data[0, 0] = math.nan
    with pytest.raises(SmaltiError, match="the model gives NaN"):
        model.sample(LABELS, num_inference_steps=2)


# -- likelihood -----------------------------------------------------------------------------------


def test_the_likelihood_of_a_new_model_is_that_of_noise() -> None:
    """Its velocity is 0, so the data have the density of the noise: log2 of the normal density."""
    bits = FlowPrior(TINY).bits_per_dimension(LATENTS, LABELS, num_inference_steps=2)
    nats = torch.distributions.Normal(0, 1).log_prob(LATENTS).flatten(1).mean(1)
    torch.testing.assert_close(bits, -nats / math.log(2))


def test_exact_and_estimated_likelihoods_agree() -> None:
    model = make_prior()
    options = {"num_inference_steps": 6, "solver": "midpoint"}
    exact = model.bits_per_dimension(LATENTS, LABELS, num_probes=None, **options)
    many = model.bits_per_dimension(
        LATENTS, LABELS, num_probes=200, generator=generators(1, 2, 3, 4), **options
    )
    torch.testing.assert_close(exact, many, atol=0.1, rtol=0)
    alone = model.bits_per_dimension(
        LATENTS[1:2], LABELS[1:2], num_probes=200, generator=generators(2), **options
    )
    torch.testing.assert_close(many[1:2], alone)


# -- configuration --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "millions"), [("sit-s/2", 33), ("sit-b/2", 130), ("dit-l/2", 458), ("sit-xl/2", 675)]
)
def test_published_sizes(name: str, millions: int) -> None:
    with torch.device("meta"):
        model = FlowPrior(PRESETS[name])
    count = sum(p.numel() for p in model.parameters())
    assert count / 1e6 == pytest.approx(millions, rel=0.01)


def test_presets_are_for_the_same_latents_until_fitted() -> None:
    expected = {
        f"{kind}-{size}/{p}" for kind in ("sit", "dit") for size in "sbl" for p in (2, 4, 8)
    }
    assert expected < set(PRESETS)
    default, spec = FlowConfig(), ContinuousSpec(8, 8, 8)
    for name, preset in PRESETS.items():
        assert (preset.spec, preset.num_classes) == (default.spec, default.num_classes), name
        fitted = preset.fitted(spec, 7, "abc")
        assert (fitted.spec, fitted.num_classes, fitted.tokenizer_fingerprint) == (spec, 7, "abc")
        assert fitted.network.out_channels == (8 if name.startswith("flow") else 16)
        assert config_from_dict(FlowConfig, config_to_dict(fitted), name) == fitted
    with pytest.raises(SmaltiError, match="use a next-token prior"):
        PRESETS["flow-nano"].fitted(CodeSpec(16, ((4, 4),)), 7, None)


def test_save_and_load(tmp_path) -> None:
    config = replace(TINY, path=VPCosinePath(), times=LogitNormalTimes(), guided_channels=1)
    saved = make_prior(replace(config, tokenizer_fingerprint="abc"))
    loaded = FlowPrior.from_pretrained(saved.save_pretrained(tmp_path / "prior"))
    assert loaded.config == saved.config and loaded.fingerprint == saved.fingerprint
    torch.testing.assert_close(loaded(LATENTS, LABELS).total, saved(LATENTS, LABELS).total)


@pytest.mark.parametrize("solver", ["ddim", "ddpm"])
def test_the_default_steps_of_a_chain_are_even_strides_to_its_first_index(solver: str) -> None:
    chain = FlowPrior(replace(TINY, path=DDPMPath(), prediction="noise"))
    times = chain.time_grid(10, make_solver(solver))
    assert torch.equal(times, chain.time_grid(10, make_solver(solver), "ddpm"))
    steps = [round(999 - 1000 * t) for t in times.tolist()]
    assert steps == [900, 800, 700, 600, 500, 400, 300, 200, 100, 0, -1]  # -1: the data
    assert torch.equal(
        chain.time_grid(10, make_solver("heun")),
        chain.time_grid(10, make_solver("heun"), "uniform"),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network": replace(NETWORK, out_channels=3)}, "3 output channels for latents of 2"),
        ({"label_dropout": 1.0}, "label_dropout is 1.0"),
        ({"guided_channels": 3}, "guided_channels is 3; there are 2 channels"),
        ({"time_scale": 0.0}, "the scale must not be 0"),
    ],
)
def test_impossible_configs_are_refused(changes, message: str) -> None:
    with pytest.raises(SmaltiError, match=message):
        replace(TINY, **changes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.sample(torch.tensor([4])), "class label 4 is out of range: use 0 to 2"),
        (lambda p: p.sample(LABELS, guidance_scale=math.nan), "guidance_scale is nan"),
        (lambda p: p.sample(LABELS, num_inference_steps=0), "num_inference_steps is 0"),
        (lambda p: p.sample(LABELS, num_inference_steps=2.5), "num_inference_steps is 2.5"),
        (lambda p: p.sample(LABELS, solver="huen"), 'did you mean "heun"'),
        (lambda p: p.sample(LABELS, schedule="ddpm"), "is for a ddpm path"),
        (lambda p: p.sample(LABELS, noise=LATENTS[:2]), r"noise of shape \(2, 2, 4, 6\)"),
        (lambda p: p.sample(LABELS, guidance_interval=(0.5, 0.1)), "guidance_interval"),
        (lambda p: p.sample(LABELS, generator=generators(1)), "1 generators were given for 4"),
        (lambda p: p(LATENTS[:, :1], LABELS), r"takes \(B, 2, 4, 6\) of floats"),
        (lambda p: p(LATENTS.long(), LABELS), "int64"),
        (lambda p: p(LATENTS, LABELS, {"noise": LATENTS[:, :1]}), r"noise of shape \(4, 1, 4, 6\)"),
        (lambda p: p(LATENTS, LABELS, {"noise": LATENTS[:2]}), r"takes \(4, 2, 4, 6\) of floats"),
        (lambda p: p.bits_per_dimension(LATENTS, LABELS, solver="ddim"), "use an ODE solver"),
        (lambda p: p.bits_per_dimension(LATENTS, LABELS, num_probes=0), "num_probes is 0"),
    ],
)
def test_errors_are_explained(call, message: str) -> None:
    with pytest.raises(SmaltiError, match=message):
        call(FlowPrior(TINY))


# -- several grids --------------------------------------------------------------------------------

BUCKETED = replace(TINY, buckets=((4, 6), (6, 4), (2, 8)))


@pytest.mark.parametrize("positions", ["sin-cos", "rotary", "both"])
def test_each_bucket_has_the_positions_of_its_grid(positions) -> None:
    network = replace(NETWORK, positions=positions, num_heads=1)
    prior = make_prior(replace(BUCKETED, network=network)).eval()
    for grid in prior.config.grids:
        alone = FlowPrior(replace(TINY, network=replace(network, grid=grid))).eval()
        alone.load_state_dict(prior.state_dict())
        x, t = torch.randn(4, 2, *grid), torch.rand(4)
        assert torch.equal(prior.network(x, t, LABELS), alone.network(x, t, LABELS))
        assert prior(x, LABELS).total == alone(x, LABELS).total
        noise = torch.randn(4, 2, *grid)
        options = {"noise": noise, "num_inference_steps": 2}
        assert torch.equal(prior.sample(LABELS, **options), alone.sample(LABELS, **options))
        inputs, theirs = (
            p.sample_random_inputs(4, torch.Generator().manual_seed(0), **given)
            for p, given in ((prior, {"grid": grid}), (alone, {}))
        )
        assert all(torch.equal(inputs[name], theirs[name]) for name in theirs)
    assert prior.sample(LABELS, num_inference_steps=1).shape == LATENTS.shape  # its own grid
    known = torch.randn(4, 2, 6, 4)
    mask = torch.zeros(4, 1, 6, 4, dtype=torch.bool)
    mask[..., :2] = True
    edited = prior.sample(LABELS, known=known, known_mask=mask, num_inference_steps=2)
    assert torch.equal(edited[..., :2], known[..., :2])


def test_buckets_are_saved_and_kept_at_another_size(tmp_path) -> None:
    saved = make_prior(BUCKETED)
    loaded = FlowPrior.from_pretrained(saved.save_pretrained(tmp_path / "prior"))
    assert loaded.config == BUCKETED
    high = loaded.resized(ContinuousSpec(2, 6, 4), "abc")
    assert high.spec == ContinuousSpec(2, 6, 4) and high.config.buckets == BUCKETED.buckets
    assert set(high.config.grids) == set(BUCKETED.grids)
    assert saved.state_dict().keys() == make_prior().state_dict().keys()
    assert BUCKETED.fitted(ContinuousSpec(2, 4, 6), 3, None).buckets == ()


def test_a_config_without_buckets_is_saved_as_before() -> None:
    assert "buckets" not in saved_fields(TINY) and "buckets" in saved_fields(BUCKETED)
    assert FlowPrior(TINY).config.grids == ((4, 6),)


def test_other_grids_than_those_of_the_buckets_are_refused() -> None:
    prior = make_prior(BUCKETED)
    with pytest.raises(
        SmaltiError, match=r"takes \(B, 2, 4, 6\) or \(B, 2, 6, 4\) or \(B, 2, 2, 8\)"
    ):
        prior(torch.randn(4, 2, 8, 2), LABELS)
    known, mask = torch.randn(4, 2, 6, 4), torch.ones(4, 1, 6, 4, dtype=torch.bool)
    mask[:, :, 0] = False
    with pytest.raises(SmaltiError, match="give both on the same grid"):
        prior.sample(LABELS, noise=LATENTS, known=known, known_mask=mask)
    with pytest.raises(SmaltiError, match="cannot be cut into patches"):
        replace(TINY, buckets=((4, 6), (3, 8)))
