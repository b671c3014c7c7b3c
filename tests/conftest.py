"""Shared fixtures: tiny models, a folder of pictures, and no network."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
from chance import randomised
from PIL import Image

from smalti.data.latents import CodeSpec
from smalti.pipelines.pipeline import Pipeline
from smalti.prior.flow.config import FlowConfig
from smalti.prior.flow.dit import DiTConfig
from smalti.prior.flow.prior import FlowPrior
from smalti.prior.next_scale.model import NextScaleConfig, NextScalePrior
from smalti.prior.next_token.model import NextTokenConfig, NextTokenPrior
from smalti.tokenizer.conv import ConvConfig
from smalti.tokenizer.kl import KLConfig, KLTokenizer
from smalti.tokenizer.quantizers.codebook import CodebookConfig
from smalti.tokenizer.quantizers.multi_scale import MultiScaleConfig
from smalti.tokenizer.quantizers.nearest import NearestConfig
from smalti.tokenizer.vq import VQConfig, VQTokenizer

CLASSES = ("cat", "dog", "emu")
TINY_CONV = ConvConfig(
    channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(1,), z_channels=8
)
TINY_QUANTIZER = NearestConfig(codebook=CodebookConfig(16, 4, revive_after=2))
TINY_VQ = VQConfig(image_size=16, conv=TINY_CONV, quantizer=TINY_QUANTIZER)
TINY_SPEC = CodeSpec(16, ((8, 8),))
TINY_PRIOR = NextTokenConfig(
    spec=TINY_SPEC, num_classes=3, depth=2, width=16, num_heads=2, hidden=32
)
TINY_FLOW = FlowConfig(network=DiTConfig(depth=1, width=16, num_heads=2))


@pytest.fixture(autouse=True, scope="session")
def _fast_writes() -> Iterator[None]:
    """Without fsync, which takes milliseconds for each file: tests kill processes, and what those
    wrote outlives them; only a machine that loses its power would lose it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def tokenizer() -> VQTokenizer:
    return VQTokenizer(TINY_VQ).eval()


@pytest.fixture
def prior() -> NextTokenPrior:
    """A prior with a random head: the zero head of a new one predicts every code alike."""
    model = NextTokenPrior(TINY_PRIOR).eval()
    torch.nn.init.normal_(model.output.weight, std=0.5)
    return model


@pytest.fixture
def flow_pipe() -> Pipeline:
    """A flow prior, of pictures of 8 x 8 pixels in three classes."""
    conv = replace(TINY_CONV, attention_levels=(), z_channels=2)
    tokenizer = KLTokenizer(KLConfig(image_size=8, conv=conv)).eval()
    spec = tokenizer.spec
    network = DiTConfig(
        in_channels=spec.channels,
        out_channels=spec.channels,
        grid=(spec.height, spec.width),
        patch_size=2,
        depth=1,
        width=16,
        num_heads=1,
        num_classes=3,
        frequency_size=16,
    )
    prior = randomised(FlowPrior(FlowConfig(network=network)))
    return Pipeline(tokenizer, prior, CLASSES)


@pytest.fixture
def scale_pipe() -> Pipeline:
    """A next-scale prior, of pictures of 16 x 16 pixels in three classes, in three scales."""
    scales = MultiScaleConfig(
        codebook=CodebookConfig(16, 4), scales=((1, 1), (4, 4), (8, 8)), convolutions=1
    )
    conv = replace(TINY_CONV, attention_levels=(), z_channels=4)
    tokenizer = VQTokenizer(VQConfig(image_size=16, conv=conv, quantizer=scales)).eval()
    config = NextScaleConfig(depth=1, width=16, num_heads=2)
    prior = NextScalePrior(config.fitted(tokenizer.spec, 3, tokenizer.fingerprint, scales))
    prior.bind(tokenizer.quantizer)
    return Pipeline(tokenizer, randomised(prior), CLASSES)


@pytest.fixture(scope="session")
def pictures_once(tmp_path_factory) -> Path:
    """A folder of 24 noisy pictures, 40 x 36 px, in the classes blue, green and red, for tests that
    leave them as they are."""
    return make_pictures(tmp_path_factory.mktemp("once") / "pictures")


@pytest.fixture
def pictures(pictures_once: Path, tmp_path: Path) -> Path:
    """A copy of these pictures, which a test may change."""
    return Path(shutil.copytree(pictures_once, tmp_path / "pictures"))


def make_pictures(root: Path) -> Path:
    """Write them; return the folder."""
    random = np.random.default_rng(0)
    for channel, name in enumerate(("red", "green", "blue")):
        (root / name).mkdir(parents=True)
        for number in range(8):
            array = random.integers(0, 80, (36, 40, 3), dtype=np.uint8)
            array[..., channel] += 150
            Image.fromarray(array).save(root / name / f"{number}.png")
    return root
