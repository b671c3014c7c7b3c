"""Tiny pipelines with a flow prior and with a next-scale prior."""

from dataclasses import replace

import pytest
from chance import randomised

from smalti.pipelines.pipeline import Pipeline
from smalti.prior.flow.config import FlowConfig
from smalti.prior.flow.dit import DiTConfig
from smalti.prior.flow.prior import FlowPrior
from smalti.prior.next_scale.model import NextScaleConfig, NextScalePrior
from smalti.tokenizer.conv import ConvConfig
from smalti.tokenizer.kl import KLConfig, KLTokenizer
from smalti.tokenizer.quantizers.codebook import CodebookConfig
from smalti.tokenizer.quantizers.multi_scale import MultiScaleConfig
from smalti.tokenizer.vq import VQConfig, VQTokenizer

CONV = ConvConfig(
    channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(), z_channels=2
)


@pytest.fixture
def flow_pipe() -> Pipeline:
    """Of pictures of 8 x 8 pixels in three classes."""
    tokenizer = KLTokenizer(KLConfig(image_size=8, conv=CONV)).eval()
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
    return Pipeline(tokenizer, prior, ("cat", "dog", "emu"))


@pytest.fixture
def scale_pipe() -> Pipeline:
    """Of pictures of 16 x 16 pixels in three classes, in three scales."""
    scales = MultiScaleConfig(
        codebook=CodebookConfig(16, 4), scales=((1, 1), (4, 4), (8, 8)), convolutions=1
    )
    conv = replace(CONV, z_channels=4)
    tokenizer = VQTokenizer(VQConfig(image_size=16, conv=conv, quantizer=scales)).eval()
    config = NextScaleConfig(depth=1, width=16, num_heads=2)
    prior = NextScalePrior(config.fitted(tokenizer.spec, 3, tokenizer.fingerprint, scales))
    prior.bind(tokenizer.quantizer)
    return Pipeline(tokenizer, randomised(prior), ("cat", "dog", "emu"))
