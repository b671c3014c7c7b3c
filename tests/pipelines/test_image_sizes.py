"""One pipeline at several image sizes: where positions are computed, and refused where learned."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import smalti
from smalti.cli import main as smalti_main
from smalti.data.latents import CodeSpec, ContinuousSpec
from smalti.errors import ConfigurationError, GenerationError
from smalti.prior.attention import sin_cos_table
from smalti.prior.flow.dit import DiTConfig
from smalti.prior.flow.prior import FlowConfig, FlowPrior
from smalti.prior.next_scale.model import NextScaleConfig, NextScalePrior
from smalti.prior.next_token.model import NextTokenConfig, NextTokenPrior
from smalti.tokenizer.conv import ConvConfig
from smalti.tokenizer.kl import KLConfig, KLTokenizer
from smalti.tokenizer.quantizers.codebook import CodebookConfig
from smalti.tokenizer.quantizers.multi_scale import MultiScaleConfig
from smalti.tokenizer.quantizers.nearest import NearestConfig
from smalti.tokenizer.vq import VQConfig, VQTokenizer

CONV = ConvConfig(
    channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(1,), z_channels=4
)
CODEBOOK = CodebookConfig(16, 4)
VQ = VQConfig(image_size=16, conv=CONV, quantizer=NearestConfig(codebook=CODEBOOK))
TOKEN = NextTokenConfig(depth=2, width=16, num_heads=2, hidden=32)
FLOW = FlowConfig(network=DiTConfig(patch_size=2, depth=2, width=16, num_heads=2, positions="both"))
CLASSES = ("cat", "dog")


def randomised(prior: smalti.Prior) -> smalti.Prior:
    """With weights in place of the zeros that hide everything before the last layer."""
    for parameter in prior.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return prior


def of_codes() -> smalti.Pipeline:
    tokenizer = VQTokenizer(VQ)
    prior = NextTokenPrior(TOKEN.fitted(tokenizer.spec, 2, tokenizer.fingerprint))
    return smalti.Pipeline(tokenizer, randomised(prior), CLASSES)


def of_numbers() -> smalti.Pipeline:
    tokenizer = KLTokenizer(KLConfig(image_size=16, conv=CONV))
    prior = FlowPrior(FLOW.fitted(tokenizer.spec, 2, tokenizer.fingerprint))
    return smalti.Pipeline(tokenizer, randomised(prior), CLASSES)


def of_scales() -> smalti.Pipeline:
    quantizer = MultiScaleConfig(codebook=CODEBOOK, scales=((1, 1), (4, 4), (8, 8)), convolutions=1)
    tokenizer = VQTokenizer(replace(VQ, quantizer=quantizer))
    config = NextScaleConfig(depth=1, width=16, num_heads=2)
    prior = NextScalePrior(
        config.fitted(tokenizer.spec, 2, tokenizer.fingerprint, tokenizer.quantizer.config)
    )
    prior.bind(tokenizer.quantizer)
    return smalti.Pipeline(tokenizer, prior, CLASSES)


@pytest.mark.parametrize("make", [of_codes, of_numbers], ids=["next-token", "flow"])
def test_computed_positions_allow_other_image_sizes(make) -> None:
    pipe = make()
    options = {} if make is of_codes else {"num_inference_steps": 2}

    def sampled(pipe: smalti.Pipeline, **size) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        return pipe(["cat", 1], generator=generators, output_type="pt", **options, **size).images

    own = sampled(pipe)
    assert torch.equal(sampled(pipe, image_size=[np.int64(16), 16]), own)
    wide = sampled(pipe, image_size=(12, 24))
    assert wide.shape == (2, 3, 12, 24) and not torch.equal(wide[0], wide[1])
    assert torch.equal(sampled(pipe.resized((12, 24))), wide)
    assert torch.equal(sampled(pipe), own)  # the pipeline itself stays as it was


def test_a_resized_prior_is_the_one_that_is_built_at_that_size() -> None:
    """Rotary and sine-cosine positions are those of the new grid; weights are shared."""
    codes, numbers = of_codes().prior, of_numbers().prior
    spec = CodeSpec(16, ((6, 12),))
    wide, built = codes.resized(spec, None), NextTokenPrior(TOKEN.fitted(spec, 2, None))
    built.load_state_dict(codes.state_dict())
    sample = torch.randint(16, (2, 72))
    labels = torch.tensor([0, 2])
    assert torch.equal(wide.logits(sample, labels), built.eval().logits(sample, labels))
    assert wide.output.weight.data_ptr() == codes.output.weight.data_ptr()
    flow = numbers.resized(ContinuousSpec(4, 6, 12), "f" * 64)
    assert isinstance(flow, FlowPrior) and flow.network.pos_embed is not None
    assert torch.equal(flow.network.pos_embed.table, sin_cos_table((3, 6), 16))
    assert flow.tokenizer_fingerprint == "f" * 64
    assert flow.spec == ContinuousSpec(4, 6, 12) and numbers.spec == ContinuousSpec(4, 8, 8)


def test_a_pipeline_in_half_precision_can_be_resized() -> None:
    pipe = of_codes().to(dtype=torch.bfloat16)
    assert pipe("dog", image_size=(8, 16)).images[0].size == (16, 8)


def test_learned_positions_refuse_another_size() -> None:
    with pytest.raises(GenerationError, match=r"this next-scale prior samples 81 codes .* learned"):
        of_scales()("cat", image_size=(16, 32))
    tokenizer = VQTokenizer(VQ)
    config = replace(TOKEN, random_order=(0.5, 0.75)).fitted(tokenizer.spec, 2, None)
    pipe = smalti.Pipeline(tokenizer, NextTokenPrior(config), CLASSES)
    with pytest.raises(GenerationError, match="because it has learned its positions: fine-tune"):
        pipe("cat", image_size=(32, 16))


def test_a_size_without_latents_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="image_size 15 x 24 is not a multiple"):
        of_codes()("cat", image_size=(15, 24))
    with pytest.raises(ConfigurationError, match="cannot be cut into patches"):
        of_numbers()("cat", image_size=(18, 24))
    for wrong in ("48x64", (16, 24, 3), (16, 24.0), True):
        with pytest.raises(ConfigurationError, match="give the side of a square in pixels"):
            of_codes()("cat", image_size=wrong)


def test_generate_writes_images_of_a_size(tmp_path: Path, capsys) -> None:
    of_codes().save_pretrained(tmp_path / "codes")
    of_scales().save_pretrained(tmp_path / "scales")

    def generate(model: str, *flags: str) -> int:
        job = ["generate", "--model", str(tmp_path / model), "--output_dir", str(tmp_path / "out")]
        return smalti_main([*job, "--num_images_per_class", "1", *flags])

    assert generate("scales", "--image_size", "16x32") == 2
    assert "learned its positions" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert generate("codes", "--image_size", "12x24") == 0
    assert [Image.open(p).size for p in sorted((tmp_path / "out").glob("*.png"))] == [(24, 12)] * 2
    assert generate("codes") == 2  # images of another size are another job
    assert "holds images of another job" in capsys.readouterr().err
