"""A checkpoint is accepted wherever its model is wanted."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import smalti
from smalti.cli import main as smalti_main
from smalti.errors import SmaltiError
from smalti.pipelines.finetune import load_initial_weights, saved_tokenizer
from smalti.prior.next_token.model import NextTokenConfig
from smalti.scripts.encode import EncodeConfig, encode
from smalti.scripts.info import info
from smalti.scripts.train_prior import TrainPriorConfig
from smalti.scripts.train_prior import train as train_prior
from smalti.scripts.train_tokenizer import TrainTokenizerConfig
from smalti.scripts.train_tokenizer import train as train_tokenizer
from smalti.tokenizer.conv import ConvConfig
from smalti.tokenizer.kl import KLConfig
from smalti.tokenizer.losses.objective import ObjectiveConfig
from smalti.tokenizer.quantizers.codebook import CodebookConfig
from smalti.tokenizer.quantizers.nearest import NearestConfig
from smalti.tokenizer.vq import VQConfig

CONV = ConvConfig(
    channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(), z_channels=2
)
VQ = VQConfig(image_size=16, conv=CONV, quantizer=NearestConfig(codebook=CodebookConfig(16, 4)))
KL = KLConfig(image_size=16, conv=CONV)
COMMON = {
    "max_train_steps": 3,
    "train_batch_size": 4,
    "checkpointing_steps": 3,
    "validation_steps": 100,
    "learning_rate": 1e-2,
    "mixed_precision": "no",
}


def train_stage_one(pictures: Path, out: Path, tokenizer, **changes) -> Path:
    """The checkpoint of a run without a discriminator."""
    objective = ObjectiveConfig(perceptual_weight=0.0, adversarial_weight=0.0)
    config = TrainTokenizerConfig(
        output_dir=out, data=str(pictures), tokenizer=tokenizer, objective=objective, **COMMON
    )
    train_tokenizer(replace(config, **changes))
    return out / "checkpoint-000003"


def assert_weights(model: torch.nn.Module, file: Path) -> None:
    """The model has the tensors of a file."""
    expected = load_file(file)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("config", [VQ, KL], ids=["vq", "kl"])
def test_a_tokenizer_is_read_from_a_checkpoint(tmp_path: Path, pictures: Path, config) -> None:
    checkpoint = train_stage_one(pictures, tmp_path / "run", config)
    finished = smalti.Tokenizer.from_pretrained(tmp_path / "run" / "tokenizer")
    average = smalti.Tokenizer.from_pretrained(checkpoint)
    assert_weights(average, tmp_path / "run" / "tokenizer" / "model.safetensors")
    assert_weights(average, checkpoint / "ema.safetensors")
    raw = smalti.Tokenizer.from_pretrained(checkpoint, weights="raw")
    assert_weights(raw, checkpoint / "model.safetensors")
    assert saved_tokenizer(str(checkpoint)) == config

    latents = tmp_path / "latents"
    job = EncodeConfig(data=str(pictures), tokenizer=checkpoint, output_dir=latents)
    for _ in range(2):  # the second time it continues
        encode(job)
    assert smalti.Tokenizer.from_pretrained(latents / "tokenizer").config == finished.config
    with pytest.raises(SmaltiError, match="has the latents of other weights"):
        encode(replace(job, weights="raw"))


def test_a_run_starts_from_a_checkpoint(tmp_path: Path, pictures: Path) -> None:
    checkpoint = train_stage_one(pictures, tmp_path / "run", VQ)
    model = smalti.Tokenizer.registry.build(VQ)
    for weights, file in (("ema", "ema"), ("raw", "model")):
        load_initial_weights(model, str(checkpoint), weights)
        assert_weights(model, checkpoint / f"{file}.safetensors")
    job = ["train-tokenizer", "--data", str(pictures), "--initial", str(checkpoint)]
    job += ["--weights", "raw", "--max_train_steps", "1", "--train_batch_size", "4"]
    job += ["--objective.perceptual_weight", "0", "--objective.adversarial_weight", "0"]
    assert smalti_main([*job, "--output_dir", str(tmp_path / "second")]) == 0
    assert smalti.Tokenizer.from_pretrained(tmp_path / "second" / "tokenizer").config == VQ


def test_a_prior_and_its_pipeline_are_read_from_a_checkpoint(
    tmp_path: Path, pictures: Path, capsys
) -> None:
    stage_one = train_stage_one(pictures, tmp_path / "tok", VQ)
    latents = tmp_path / "latents"
    encode(EncodeConfig(data=str(pictures), tokenizer=stage_one, output_dir=latents))
    config = TrainPriorConfig(
        output_dir=tmp_path / "prior",
        latents=latents,
        tokenizer=latents / "tokenizer",
        prior=NextTokenConfig(depth=1, width=16, num_heads=2, hidden=32),
        **COMMON,
    )
    advice = dict(info(latents).lines)["next"]
    assert advice.endswith(f"--tokenizer {latents / 'tokenizer'}")
    folder = train_prior(config)
    checkpoint = tmp_path / "prior" / "checkpoint-000003"
    finished, found = (smalti.Pipeline.from_pretrained(path) for path in (folder, checkpoint))
    assert found.prior.fingerprint == finished.prior.fingerprint
    assert found.tokenizer.fingerprint == finished.tokenizer.fingerprint
    assert (found.classes, found.training_pictures) == (
        finished.classes,
        finished.training_pictures,
    )
    raw = smalti.Prior.from_pretrained(checkpoint, weights="raw")
    assert_weights(raw, checkpoint / "model.safetensors")
    for path in (folder, latents / "tokenizer"):
        kind = smalti.Pipeline if path == folder else smalti.Tokenizer
        with pytest.raises(SmaltiError, match=r'weights is "raw", but .* is no checkpoint'):
            kind.from_pretrained(path, weights="raw")
    job = ["generate", "--model", str(checkpoint), "--num_images_per_class", "1"]
    assert smalti_main([*job, "--output_dir", str(tmp_path / "samples")]) == 0
    job = ["train-prior", "--initial", str(checkpoint), "--latents", str(latents)]
    job += ["--tokenizer", str(latents / "tokenizer"), "--max_train_steps", "1"]
    job += ["--train_batch_size", "4", "--output_dir", str(tmp_path / "second")]
    assert smalti_main(job) == 0
    with pytest.raises(SmaltiError, match="a checkpoint of a train-prior run: it has no tokenizer"):
        smalti.Tokenizer.from_pretrained(checkpoint)
    with pytest.raises(SmaltiError, match="a checkpoint of a train-tokenizer run: it has no prior"):
        smalti.Pipeline.from_pretrained(stage_one)


def test_a_checkpoint_for_pictures_of_another_size_is_read_in_half_precision(
    tmp_path: Path, pictures: Path
) -> None:
    tokenizer = smalti.Tokenizer.registry.build(VQ).save_pretrained(tmp_path / "tok")
    job = EncodeConfig(data=str(pictures), tokenizer=tokenizer, output_dir=tmp_path / "latents")
    config = TrainPriorConfig(
        output_dir=tmp_path / "prior",
        latents=encode(replace(job, image_size=VQ.image_size // 2)),
        tokenizer=tokenizer,
        prior=NextTokenConfig(depth=1, width=16, num_heads=2, hidden=32),
        preview=replace(TrainPriorConfig().preview, guidance_scale=3.0, temperature=0.5),
        **COMMON,
    )
    checkpoint = tmp_path / "prior" / "checkpoint-000003"
    finished = smalti.Pipeline.from_pretrained(train_prior(config))
    half = smalti.Pipeline.from_pretrained(checkpoint, dtype="bfloat16")
    assert half.tokenizer.last_layer.dtype == half.prior.output.weight.dtype == torch.bfloat16
    assert half.tokenizer.image_size == VQ.image_size // 2
    assert half.tokenizer.fingerprint == finished.tokenizer.fingerprint
    assert half.sampling == finished.sampling == {"guidance_scale": 3.0, "temperature": 0.5}


def test_a_damaged_checkpoint_is_no_model(tmp_path: Path, pictures: Path) -> None:
    checkpoint = train_stage_one(pictures, tmp_path / "run", VQ)
    file = checkpoint / "ema.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(SmaltiError, match=r"ema\.safetensors is damaged"):
        smalti.Tokenizer.from_pretrained(checkpoint)
    assert smalti.Tokenizer.from_pretrained(checkpoint, weights="raw")
    file.unlink()
    with pytest.raises(SmaltiError, match=r"lacks ema\.safetensors"):
        smalti.Tokenizer.from_pretrained(checkpoint)
    with pytest.raises(SmaltiError, match="exists and is not a saved tokenizer"):
        smalti.Tokenizer.registry.build(VQ).save_pretrained(checkpoint)
