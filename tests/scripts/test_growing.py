"""A set that grows: runs continue on more pictures, by the remedies that the messages name."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import losses, weights

import smalti
from smalti.data.latent_cache.cache import LatentCache
from smalti.errors import SmaltiError
from smalti.prior.next_token.model import NextTokenConfig
from smalti.scripts.encode import EncodeConfig, encode
from smalti.scripts.train_prior import TrainPriorConfig, train
from smalti.tokenizer.conv import ConvConfig
from smalti.tokenizer.quantizers.codebook import CodebookConfig
from smalti.tokenizer.quantizers.nearest import NearestConfig
from smalti.tokenizer.vq import VQConfig, VQTokenizer

CONV = ConvConfig(
    channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(), z_channels=4
)
VQ = VQConfig(image_size=16, conv=CONV, quantizer=NearestConfig(codebook=CodebookConfig(16, 4)))


def add(root: Path, name: str, numbers: range) -> None:
    (root / name).mkdir(parents=True, exist_ok=True)
    for i in numbers:
        pixels = np.random.default_rng([ord(name[0]), i]).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(root / name / f"{i}.png")


def test_a_run_continues_on_more_pictures(tmp_path: Path, caplog) -> None:
    pictures = tmp_path / "pictures"
    for name in ("cat", "tiger"):
        add(pictures, name, range(8))
    torch.manual_seed(0)
    VQTokenizer(VQ).save_pretrained(tmp_path / "vq")
    job = EncodeConfig(
        data=str(pictures), tokenizer=tmp_path / "vq", output_dir=tmp_path / "few", views="identity"
    )
    run = TrainPriorConfig(
        output_dir=tmp_path / "run",
        latents=encode(job),
        tokenizer=tmp_path / "vq",
        prior=NextTokenConfig(depth=1, width=16, num_heads=2, hidden=32),
        train_batch_size=4,
        max_train_steps=2,
        logging_steps=1,
        preview=replace(TrainPriorConfig().preview, guidance_scale=1.0),
    )
    train(run)
    for name in ("cat", "tiger"):
        add(pictures, name, range(8, 20))

    before = [path.read_bytes() for path in sorted((tmp_path / "few" / "train").iterdir())]
    with pytest.raises(SmaltiError, match="latents of other pictures") as refused:
        encode(job)
    assert before == [path.read_bytes() for path in sorted((tmp_path / "few" / "train").iterdir())]
    assert "choose another output folder" in str(refused.value)
    latents = encode(replace(job, output_dir=tmp_path / "many"))
    assert len(LatentCache(latents / "train")) > len(LatentCache(tmp_path / "few" / "train"))

    assert "--resume_from_checkpoint latest --accept_new_data" in str(refused.value)
    more = replace(run, latents=latents, max_train_steps=6, resume_from_checkpoint="latest")
    with pytest.raises(SmaltiError, match="trained on other data") as refused:
        train(more)
    assert "add --accept_new_data" in str(refused.value)
    shutil.copytree(tmp_path / "run", tmp_path / "parts")
    caplog.clear()
    train(replace(more, accept_new_data=True))
    assert "continues on other training data: from step 2 on" in caplog.text
    assert [line["step"] for line in losses(tmp_path / "run") if "loss" in line] == [*range(1, 7)]

    # From there on it is a run like any other: it resumes exactly, without the flag.
    with pytest.raises(SmaltiError, match="add --resume_from_checkpoint latest"):
        replace(run, accept_new_data=True)
    parts = replace(more, output_dir=tmp_path / "parts", accept_new_data=True)
    train(replace(parts, max_train_steps=4))
    train(replace(parts, accept_new_data=False))
    one, two = (weights(tmp_path / name) for name in ("run", "parts"))
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    with pytest.raises(SmaltiError, match="trained on other data"):
        train(replace(more, latents=tmp_path / "few"))

    add(pictures, "dog", range(8))  # a class more
    latents = encode(replace(job, output_dir=tmp_path / "three"))
    with pytest.raises(SmaltiError, match="start a new run in another --output_dir") as refused:
        train(replace(more, latents=latents, accept_new_data=True))
    checkpoint = str(refused.value).split("--initial ")[1].split(" starts")[0]
    fresh = replace(
        run, latents=latents, initial=checkpoint, output_dir=tmp_path / "new", prior=run.prior
    )
    assert smalti.Pipeline.from_pretrained(train(fresh)).classes == ("cat", "dog", "tiger")
