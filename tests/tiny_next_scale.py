"""A tiny next-scale prior over grids that are not square, for the tests of its codes and speed."""

import torch
from chance import randomised

from smalti.data.latents import CodeSpec
from smalti.prior.next_scale.model import NextScaleConfig, NextScalePrior
from smalti.tokenizer.quantizers.codebook import CodebookConfig
from smalti.tokenizer.quantizers.multi_scale import MultiScaleConfig, MultiScaleQuantizer

SCALES = ((1, 1), (1, 2), (2, 2), (2, 3))  # not square, too
LENGTHS = [1, 2, 4, 6]
STARTS = [0, 1, 3, 7]
LENGTH = sum(LENGTHS)
QUANTIZER = MultiScaleConfig(
    codebook=CodebookConfig(16, 4, l2_normalise=False), scales=SCALES, convolutions=2
)
TINY = NextScaleConfig(
    spec=CodeSpec(16, SCALES),
    quantizer=QUANTIZER,
    num_classes=3,
    depth=2,
    width=16,
    num_heads=2,
    drop_path=0.0,
)
CODES = torch.randint(16, (4, LENGTH), generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2, 3])  # 3 is the null label


def make_quantizer(config: MultiScaleConfig = QUANTIZER) -> MultiScaleQuantizer:
    quantizer = MultiScaleQuantizer(config)
    torch.nn.init.normal_(quantizer.codebook.weight)
    return quantizer


def make_prior(config: NextScaleConfig = TINY) -> NextScalePrior:
    """A bound model in which every weight matters: a new one is close to the identity."""
    torch.manual_seed(0)
    model = randomised(NextScalePrior(config))
    model.bind(make_quantizer(config.quantizer))
    return model
