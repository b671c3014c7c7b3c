"""Fine-tuning: a run starts from the settings and the weights of a saved model, or is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import smalti
from smalti.cli import main as smalti_main
from smalti.data.latents import CodeSpec
from smalti.pipelines.finetune import load_initial_weights, saved_prior, saved_tokenizer
from smalti.prior.attention import interpolated_positions
from smalti.prior.flow.dit import DiTConfig
from smalti.prior.flow.path import DDPMPath, LinearPath
from smalti.prior.flow.prior import FlowConfig, FlowPrior
from smalti.prior.next_token.model import NextTokenConfig, NextTokenPrior
from smalti.scripts.encode import EncodeConfig, encode
from smalti.tokenizer.conv import ConvConfig
from smalti.tokenizer.kl import KLConfig
from smalti.tokenizer.quantizers.codebook import CodebookConfig
from smalti.tokenizer.quantizers.nearest import NearestConfig
from smalti.tokenizer.vq import VQConfig, VQTokenizer

CONV = ConvConfig(
    channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(), z_channels=2
)
VQ = VQConfig(
    image_size=16,
    conv=CONV,
    quantizer=NearestConfig(codebook=CodebookConfig(16, 4, ema_decay=0.9), commitment_weight=0.5),
)
KL = KLConfig(image_size=16, conv=CONV, latent_mean=(0.5, 0.0), latent_std=(2.0, 0.5))
CODES = NextTokenConfig(
    spec=CodeSpec(16, ((8, 8),)),
    num_classes=3,
    depth=1,
    width=16,
    num_heads=2,
    hidden=32,
    dropout=0.3,
    prefix_rotary="zero",
)
FLOW = FlowConfig(
    network=DiTConfig(
        in_channels=2, out_channels=2, grid=(8, 8), depth=1, width=16, num_heads=2, num_classes=3
    ),
    path=DDPMPath(),
    prediction="noise",
)


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """Of a next-token prior."""
    torch.manual_seed(0)
    tokenizer = VQTokenizer(VQ)
    prior = NextTokenPrior(replace(CODES, tokenizer_fingerprint=tokenizer.fingerprint))
    folder = tmp_path / "saved"
    smalti.Pipeline(tokenizer, prior, ("blue", "green", "red")).save_pretrained(folder)
    return folder


def train_prior(pipeline: Path, pictures: Path, *flags: str) -> tuple[int, Path]:
    """Exit status and pipeline of one step that changes nothing."""
    root = pipeline.parent
    if not (root / "latents").exists():
        job = EncodeConfig(
            data=str(pictures), tokenizer=pipeline / "tokenizer", output_dir=root / "latents"
        )
        encode(job)
    job = ["train-prior", "--latents", str(root / "latents"), "--initial", str(pipeline)]
    job += ["--tokenizer", str(pipeline / "tokenizer"), "--output_dir", str(root / "run")]
    job += ["--max_train_steps", "1", "--train_batch_size", "4", "--learning_rate", "1e-30"]
    return smalti_main([*job, *flags]), root / "run" / "pipeline"


def test_without_settings_a_prior_takes_the_saved_ones(pipeline: Path, pictures: Path) -> None:
    status, result = train_prior(pipeline, pictures, "--prior.label_dropout", "0.2")
    assert status == 0
    saved, tuned = (smalti.Prior.from_pretrained(p / "prior") for p in (pipeline, result))
    assert tuned.config == replace(saved.config, label_dropout=0.2)
    for name, value in saved.state_dict().items():
        torch.testing.assert_close(tuned.state_dict()[name], value, rtol=0, atol=1e-20)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prior.prefix_rotary", "identity"], "prior.prefix_rotary is identity, but zero in"),
        (["--prior.num_heads", "4"], "prior.num_heads is 4, but 2 in"),
        (["--prior.rotary_base", "500"], "prior.rotary_base is 500.0, but 10000.0 in"),
        (
            ["--prior.preset", "gpt-nano"],
            "give the same settings, or give no settings of the prior",
        ),
        (["--prior.random_order", "0.1", "0.2"], "only this run's model has"),
    ],
)
def test_settings_that_give_the_weights_another_meaning_are_refused(
    pipeline: Path, pictures: Path, capsys, flags: list[str], message: str
) -> None:
    status, result = train_prior(pipeline, pictures, *flags)
    assert status == 2 and message in capsys.readouterr().err
    assert not result.parent.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prediction": "velocity"}, "prior.prediction is velocity, but noise in"),
        ({"path": LinearPath()}, "prior.path is linear, but ddpm in"),
        ({"path": DDPMPath(beta_end=0.01)}, "prior.path.beta_end is 0.01, but 0.02 in"),
        ({"time_scale": 1000.0}, "prior.time_scale is 1000.0, but 1.0 in"),
        ({"network": replace(FLOW.network, num_heads=4)}, "prior.network.num_heads is 4, but 2"),
        ({"tokenizer_fingerprint": "0" * 64}, "trained on the latents of another tokenizer"),
    ],
)
def test_a_flow_on_another_path_is_refused(tmp_path: Path, changes, message: str) -> None:
    FlowPrior(replace(FLOW, tokenizer_fingerprint="1" * 64)).save_pretrained(tmp_path / "flow")
    with pytest.raises(smalti.SmaltiError, match=message):
        load_initial_weights(FlowPrior(replace(FLOW, **changes)), str(tmp_path / "flow"))


def test_positions_of_another_grid_are_interpolated(tmp_path: Path, caplog) -> None:
    """The target positions of random orders are learned; the other weights are the saved ones."""
    tokenizer = VQTokenizer(VQ)
    large = tokenizer.resized(32)
    saved = NextTokenPrior(
        replace(CODES, random_order=(0.1, 0.2), tokenizer_fingerprint=tokenizer.fingerprint)
    )
    saved.save_pretrained(tmp_path / "prior")
    config = saved_prior(str(tmp_path / "prior"))
    new = NextTokenPrior(config.fitted(large.spec, 3, large.fingerprint))
    with caplog.at_level("INFO"):
        load_initial_weights(new, str(tmp_path / "prior"), tokenizer=large)
    assert "rotary positions are extended to 16 x 16 codes" in caplog.text
    assert "target positions are interpolated" in caplog.text
    expected = interpolated_positions(saved.target_positions, (8, 8), (16, 16))
    assert torch.equal(new.target_positions, expected)
    assert torch.equal(new.tok_embeddings.weight, saved.tok_embeddings.weight)
    other = VQTokenizer(VQ).resized(32)  # other weights
    stranger = NextTokenPrior(config.fitted(other.spec, 3, other.fingerprint))
    with pytest.raises(smalti.SmaltiError, match=r"latents of another tokenizer.*--image_size"):
        load_initial_weights(stranger, str(tmp_path / "prior"), tokenizer=other)


def test_settings_of_training_may_differ(tmp_path: Path) -> None:
    saved = FlowPrior(FLOW)
    saved.save_pretrained(tmp_path / "flow")
    assert saved_prior(str(tmp_path / "flow")).path == DDPMPath()
    new = FlowPrior(replace(FLOW, loss_weight="min-snr", label_dropout=0.0, guided_channels=1))
    load_initial_weights(new, str(tmp_path / "flow"))
    assert all(torch.equal(v, saved.state_dict()[name]) for name, v in new.state_dict().items())


@pytest.mark.parametrize("config", [VQ, KL], ids=["vq", "kl"])
def test_a_tokenizer_is_fine_tuned_with_its_saved_settings(
    tmp_path: Path, pictures: Path, config
) -> None:
    torch.manual_seed(0)
    saved = smalti.Tokenizer.registry.build(config)
    saved.save_pretrained(tmp_path / "saved")
    job = ["train-tokenizer", "--data", str(pictures), "--initial", str(tmp_path / "saved")]
    job += ["--objective.perceptual_weight", "0", "--objective.adversarial_weight", "0"]
    job += ["--max_train_steps", "1", "--train_batch_size", "4", "--learning_rate", "1e-30"]
    assert smalti_main([*job, "--output_dir", str(tmp_path / "run")]) == 0
    tuned = smalti.Tokenizer.from_pretrained(tmp_path / "run" / "tokenizer")
    begun = saved_tokenizer(str(tmp_path / "saved"))
    if isinstance(config, KLConfig):
        assert begun == replace(KL, latent_mean=(), latent_std=())
        assert tuned.config.latent_mean != KL.latent_mean  # measured on the new pictures
    else:
        assert begun == tuned.config == VQ
    old, new = (
        load_file(folder / "model.safetensors")
        for folder in (tmp_path / "saved", tmp_path / "run" / "tokenizer")
    )
    assert all(torch.equal(new[name], old[name]) for name in old if "conv" in name)


def test_a_tokenizer_with_other_codes_is_refused(tmp_path: Path) -> None:
    VQTokenizer(VQ).save_pretrained(tmp_path / "saved")
    book = replace(VQ.quantizer.codebook, l2_normalise=False)
    other = replace(VQ, quantizer=replace(VQ.quantizer, codebook=book))
    with pytest.raises(smalti.SmaltiError, match="l2_normalise is False, but True in"):
        load_initial_weights(VQTokenizer(other), str(tmp_path / "saved"))
