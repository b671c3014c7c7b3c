"""A tiny pipeline with a flow prior."""

import pytest
from chance import randomised

from smalti.pipelines.pipeline import Pipeline
from smalti.prior.flow.config import FlowConfig
from smalti.prior.flow.dit import DiTConfig
from smalti.prior.flow.prior import FlowPrior
from smalti.tokenizer.conv import ConvConfig
from smalti.tokenizer.kl import KLConfig, KLTokenizer

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
