"""Rectified flow from the command line: pairs, training on them, a straighter flow."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import losses

import smalti
from smalti.cli import main as smalti_main
from smalti.data.latent_cache.cache import LatentCache
from smalti.pipelines.finetune import load_initial_weights
from smalti.prior.flow.dit import DiTConfig
from smalti.prior.flow.path import TrigonometricPath
from smalti.prior.flow.prior import FlowConfig, FlowPrior
from smalti.scripts.reflow import ReflowConfig, load, mean_straightness, reflow
from smalti.scripts.train_prior import TrainPriorConfig, train
from smalti.tokenizer.conv import ConvConfig
from smalti.tokenizer.kl import KLConfig, KLTokenizer

CONV = ConvConfig(
    channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(), z_channels=2
)
KL = KLConfig(image_size=8, conv=CONV, latent_mean=(0.5, 0.0), latent_std=(2.0, 0.5))
NETWORK = DiTConfig(
    in_channels=2, out_channels=2, grid=(4, 4), patch_size=2, depth=1, width=32, num_heads=2,
    num_classes=2, frequency_size=16,
)  # fmt: skip
LIKE_NETWORK = replace(NETWORK, in_channels=4, out_channels=4, grid=(32, 32), num_classes=1000)


def flow(**changes) -> FlowPrior:
    """A flow with curved trajectories; the velocity of a new network would be 0."""
    torch.manual_seed(1)
    prior = FlowPrior(FlowConfig(network=NETWORK, **changes))
    for parameter in prior.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return prior


@pytest.fixture
def bent(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = KLTokenizer(KL)
    prior = flow(tokenizer_fingerprint=tokenizer.fingerprint)
    smalti.Pipeline(tokenizer, prior, ("a", "b")).save_pretrained(tmp_path / "bent")
    return tmp_path / "bent"


def config_of(bent: Path, out: Path) -> ReflowConfig:
    return ReflowConfig(
        model=str(bent),
        output_dir=out,
        num_pairs=96,
        num_heldout=8,
        num_inference_steps=8,
        batch_size=16,
        shard_size=40,
    )


def test_pairs_are_noise_and_the_sample_generated_from_it(bent: Path, tmp_path: Path) -> None:
    reflow(config_of(bent, tmp_path / "pairs"))
    cache = LatentCache(tmp_path / "pairs" / "train")
    batch = cache.first_view(range(90, 96))
    data, noise = batch.stored.chunk(2, 1)
    assert batch.labels.tolist() == [0, 1] * 3
    prior = smalti.Prior.from_pretrained(bent / "prior")
    expected = prior.sample(batch.labels, noise=noise, num_inference_steps=8)
    torch.testing.assert_close(data, expected, rtol=0, atol=0.02)  # stored in half precision
    heldout = LatentCache(tmp_path / "pairs" / "heldout").first_view(range(8))
    close = torch.isclose(heldout.stored[:, None], cache.first_view(range(96)).stored)
    assert not close.flatten(2).all(2).any()


def test_pairs_do_not_depend_on_the_batch_size(bent: Path, tmp_path: Path) -> None:
    config = config_of(bent, tmp_path / "one")
    reflow(config)
    reflow(replace(config, output_dir=tmp_path / "two", batch_size=7))
    one, two = (LatentCache(tmp_path / name / "train") for name in ("one", "two"))
    torch.testing.assert_close(
        one.first_view(range(96)).stored, two.first_view(range(96)).stored, rtol=0, atol=2e-3
    )


def test_pairs_of_other_settings_are_not_mixed(bent: Path, tmp_path: Path) -> None:
    config = config_of(bent, tmp_path / "pairs")
    reflow(config)
    with pytest.raises(smalti.SmaltiError, match="choose another output folder"):
        reflow(replace(config, guidance_scale=2.0))


def test_training_on_pairs_straightens_the_flow(bent: Path, tmp_path: Path) -> None:
    config = config_of(bent, tmp_path / "pairs")
    bent_by = reflow(config)
    train(
        TrainPriorConfig(
            output_dir=tmp_path / "run",
            latents=tmp_path / "pairs",
            tokenizer=bent / "tokenizer",
            initial=str(bent),
            prior=FlowConfig(network=LIKE_NETWORK),
            max_train_steps=150,
            train_batch_size=32,
            learning_rate=3e-3,
            mixed_precision="no",
            ema_decay=0.9,
            logging_steps=50,
        )
    )
    _, straight = load(replace(config, model=str(tmp_path / "run" / "pipeline")))
    assert mean_straightness(straight, config) < 0.5 * bent_by
    assert losses(tmp_path / "run")[0]["loss"] < 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"solver": "ddim"}, "use an ODE solver"),
        ({"temperature": 0.5}, 'no sampling option "temperature"'),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
    ],
)
def test_other_priors_and_solvers_are_refused(bent, tmp_path, changes, message) -> None:
    with pytest.raises(smalti.SmaltiError, match=message):
        reflow(replace(config_of(bent, tmp_path / "pairs"), **changes))
    assert not (tmp_path / "pairs").exists()


@pytest.mark.parametrize("condition", ["none", "text", "class+text"])
def test_conditions_other_than_classes(condition: str, bent: Path, tmp_path: Path) -> None:
    """An unconditional flow has pairs; one of captions is refused before anything is written."""
    tokenizer = smalti.Tokenizer.from_pretrained(bent / "tokenizer")
    classes = ("a", "b") if "class" in condition else ()
    network = replace(NETWORK, num_classes=len(classes))
    config = FlowConfig(
        network=network,
        condition=condition,
        text_length=4,
        text_dim=8,
        tokenizer_fingerprint=tokenizer.fingerprint,
    )
    smalti.Pipeline(tokenizer, FlowPrior(config), classes).save_pretrained(tmp_path / "own")
    job = replace(config_of(tmp_path / "own", tmp_path / "pairs"), num_pairs=8)
    if condition == "none":
        reflow(job)
        cache = LatentCache(tmp_path / "pairs" / "train")
        assert cache.first_view(range(8)).labels.tolist() == [0] * 8 and cache.classes == ()
        return
    with pytest.raises(
        smalti.SmaltiError, match=re.escape(f"conditional on {condition}: reflow takes")
    ):
        reflow(job)
    assert not (tmp_path / "pairs").exists()


def test_only_linear_paths_are_rectified(bent: Path, tmp_path: Path) -> None:
    tokenizer = smalti.Tokenizer.from_pretrained(bent / "tokenizer")
    curved = flow(path=TrigonometricPath(), tokenizer_fingerprint=tokenizer.fingerprint)
    smalti.Pipeline(tokenizer, curved, ("a", "b")).save_pretrained(tmp_path / "curved")
    with pytest.raises(smalti.SmaltiError, match="needs the linear path"):
        reflow(config_of(tmp_path / "curved", tmp_path / "pairs"))


# -- fine-tuning ------------------------------------------------------------------------------


def test_a_run_starts_from_the_weights_of_a_saved_model(bent: Path) -> None:
    new, saved = flow(), smalti.Prior.from_pretrained(bent / "prior")
    for parameter in new.parameters():
        torch.nn.init.zeros_(parameter)
    load_initial_weights(new, str(bent))
    for name, value in saved.state_dict().items():
        assert torch.equal(new.state_dict()[name], value), name


def test_other_classes_are_initialised_anew_except_the_null_class(bent: Path) -> None:
    more = sized(num_classes=5)
    before = more.state_dict()[more.class_table].clone()
    load_initial_weights(more, str(bent / "prior"))
    after = more.state_dict()[more.class_table]
    saved = smalti.Prior.from_pretrained(bent / "prior").state_dict()
    assert torch.equal(after[:-1], before[:-1])
    assert torch.equal(after[-1], saved[more.class_table][-1])
    assert torch.equal(
        more.state_dict()["network.x_embedder.proj.weight"], saved["network.x_embedder.proj.weight"]
    )


def sized(**changes) -> FlowPrior:
    return FlowPrior(FlowConfig(network=replace(NETWORK, **changes)))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: FlowPrior(FlowConfig(network=replace(NETWORK, width=16))),
            "prior.network.width is 16, but 32 in .*give the same settings",
        ),
        (
            lambda: FlowPrior(FlowConfig(network=replace(NETWORK, depth=2))),
            "prior.network.depth is 2, but 1 in",
        ),
        (lambda: flow(tokenizer_fingerprint="0" * 64), "latents of another tokenizer"),
    ],
)
def test_weights_that_do_not_fit_are_refused(bent: Path, model, message: str) -> None:
    with pytest.raises(smalti.SmaltiError, match=message):
        load_initial_weights(model(), str(bent))


def test_a_tokenizer_starts_from_the_weights_of_a_saved_one(bent: Path) -> None:
    new = KLTokenizer(KL)
    load_initial_weights(new, str(bent))
    saved = smalti.Tokenizer.from_pretrained(bent / "tokenizer").state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in new.state_dict().items())


def test_the_command_prints_the_straightness(bent: Path, tmp_path: Path, capsys) -> None:
    arguments = ["reflow", "--model", str(bent), "--output_dir", str(tmp_path / "pairs")]
    arguments += ["--num_pairs", "4", "--num_heldout", "4", "--num_inference_steps", "2"]
    assert smalti_main(arguments) == 0
    assert "(0 is straight)" in capsys.readouterr().out
