"""A prior continues with other conditions or classes: which weights it keeps."""

from itertools import permutations
from pathlib import Path

import pytest
import torch
from chance import randomised

from smalti.data.latents import CodeSpec
from smalti.pipelines.finetune import load_initial_weights
from smalti.prior.base import Prior
from smalti.prior.conditions.text import TextConfig
from smalti.prior.flow.config import FlowConfig
from smalti.prior.flow.dit import DiTConfig
from smalti.prior.next_scale.config import NextScaleConfig
from smalti.prior.next_token.config import NextTokenConfig
from smalti.prior.registry import PRIORS
from smalti.tokenizer.quantizers.codebook import CodebookConfig
from smalti.tokenizer.quantizers.multi_scale import MultiScaleConfig, MultiScaleQuantizer

SCALES = MultiScaleConfig(codebook=CodebookConfig(16, 4), scales=((1, 1), (2, 2)), convolutions=1)
SMALL = {"depth": 1, "width": 16, "num_heads": 2}
NETWORK = DiTConfig(in_channels=2, out_channels=2, grid=(4, 4), frequency_size=16, **SMALL)
CONFIGS = {
    "next-token": NextTokenConfig(spec=CodeSpec(16, ((2, 2),)), hidden=32, **SMALL),
    "next-scale": NextScaleConfig(spec=CodeSpec(16, SCALES.scales), quantizer=SCALES, **SMALL),
    "flow": FlowConfig(network=NETWORK),
}
KINDS = ("none", "class", "text", "class+text")


def make(name: str, kind: str, classes: int = 3) -> Prior:
    config = CONFIGS[name].conditioned(kind, TextConfig(6, 8))
    config = config.fitted(config.spec, classes, None, SCALES)
    prior = randomised(PRIORS.resolve(name)(config))
    if name == "next-scale":
        torch.manual_seed(0)
        prior.bind(MultiScaleQuantizer(SCALES))
    return prior


@pytest.mark.parametrize(("before", "after"), tuple(permutations(KINDS, 2)))
@pytest.mark.parametrize("name", CONFIGS)
def test_a_prior_continues_with_other_conditions(name, before, after, tmp_path: Path) -> None:
    source, model = make(name, before), make(name, after, classes=4)
    source.save_pretrained(tmp_path)
    load_initial_weights(model, str(tmp_path))
    ours, theirs = model.state_dict(), source.state_dict()
    shared = [n for n in ours.keys() & theirs.keys() if ours[n].shape == theirs[n].shape]
    assert all(torch.equal(ours[n], theirs[n]) for n in shared if n != model.class_table)


@pytest.mark.parametrize("name", CONFIGS)
def test_classes_stay_when_captions_are_added(name, tmp_path: Path) -> None:
    source, model = make(name, "class"), make(name, "class+text")
    source.save_pretrained(tmp_path)
    load_initial_weights(model, str(tmp_path))
    table = model.state_dict()[model.class_table]
    assert torch.equal(table, source.state_dict()[source.class_table])
