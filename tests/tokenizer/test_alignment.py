"""Alignment of latents with a frozen vision model, against its definition."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from backbones import CONFIGS, write_file, write_folder

from smalti.errors import SmaltiError
from smalti.tokenizer.conv import ConvConfig
from smalti.tokenizer.kl import KLConfig, KLTokenizer
from smalti.tokenizer.losses.alignment import (
    AlignedTokenizer,
    Alignment,
    AlignmentConfig,
    cosine_loss,
    distance_loss,
)

CONV = ConvConfig(
    channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(), z_channels=4
)


@pytest.fixture
def config(tmp_path: Path) -> AlignmentConfig:
    write_file(tmp_path / "vit.safetensors", depth=2)
    return AlignmentConfig(tmp_path / "vit.safetensors", num_heads=2, depth=1, image_size=16)


def test_cosine_loss_is_its_definition() -> None:
    projected, features = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4)
    total = 0.0
    for b in range(2):
        for y in range(3):
            for x in range(4):
                cosine = F.cosine_similarity(projected[b, :, y, x], features[b, :, y, x], dim=0)
                total += max(0.0, 1 - 0.3 - cosine.item())
    assert cosine_loss(projected, features, 0.3).item() == pytest.approx(total / 24, rel=1e-5)
    assert cosine_loss(2 * features, features, 0.0).item() == pytest.approx(0, abs=1e-6)


def test_distance_loss_is_its_definition() -> None:
    latents, features = torch.randn(2, 3, 2, 2), torch.randn(2, 7, 2, 2)
    total = 0.0
    for b in range(2):
        z, f = latents[b].flatten(1).T, features[b].flatten(1).T
        for i in range(4):
            for j in range(4):
                a = F.cosine_similarity(z[i], z[j], dim=0)
                c = F.cosine_similarity(f[i], f[j], dim=0)
                total += max(0.0, abs(a - c).item() - 0.2)
    assert distance_loss(latents, features, 0.2).item() == pytest.approx(total / 32, rel=1e-5)
    assert distance_loss(latents, 3 * latents, 0.0).item() == pytest.approx(0, abs=1e-6)


def test_gradients_reach_latents_and_projection_but_not_the_backbone(config) -> None:
    alignment = Alignment(config, channels=4)
    latents = torch.randn(2, 4, 8, 8, requires_grad=True)
    loss = alignment(latents, torch.rand(2, 3, 32, 32) * 2 - 1)
    loss.backward()
    assert latents.grad.any() and alignment.projection.weight.grad.any()
    assert all(p.grad is None for p in alignment.backbone.parameters())
    half = Alignment(replace(config, weight=config.weight / 2), channels=4)
    half.load_state_dict(alignment.state_dict())
    torch.manual_seed(0)
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(2 * half(latents, images), alignment(latents, images))


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_folder_of_transformers_is_a_backbone(config, kind: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / kind, kind)
    alignment = Alignment(replace(config, backbone=folder), channels=4)
    latents = torch.randn(2, 4, 4, 4, requires_grad=True)
    alignment(latents, torch.rand(2, 3, 16, 16)).backward()
    assert latents.grad.any()


def test_descent_aligns(config) -> None:
    alignment = Alignment(config, channels=4)
    latents = torch.randn(2, 4, 4, 4, requires_grad=True)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    optimizer = torch.optim.Adam([latents, alignment.projection.weight], lr=0.05)
    first = alignment(latents, images).item()
    for _ in range(60):
        optimizer.zero_grad()
        loss = alignment(latents, images)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * first


def test_an_aligned_tokenizer_adds_one_loss(config) -> None:
    tokenizer = KLTokenizer(KLConfig(image_size=16, conv=CONV))
    aligned = AlignedTokenizer.of(tokenizer, config)
    output = aligned(torch.rand(2, 3, 16, 16))
    assert output.losses.keys() == {"kl", "alignment"}
    output.losses["alignment"].backward()
    assert tokenizer.encoder.conv_in.weight.grad.any()


def test_codes_cannot_be_aligned(config, tokenizer) -> None:
    with pytest.raises(SmaltiError, match="use a KL tokenizer"):
        AlignedTokenizer.of(tokenizer, config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": 0.0}, "weight must be positive"),
        ({"cosine_margin": -1.0}, "margins 0 or more"),
        ({"depth": 2}, "has blocks 0 to 1"),
        ({"depth": -1}, "count blocks from 0"),
        ({"backbone": Path("nowhere.safetensors")}, r"nowhere\.safetensors does not exist"),
    ],
)
def test_impossible_alignments_are_refused(config, changes, message: str) -> None:
    with pytest.raises(SmaltiError, match=message):
        Alignment(replace(config, **changes), 4)
