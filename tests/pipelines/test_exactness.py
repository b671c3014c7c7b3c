"""Promise 4: a picture of a job is the same to the byte, whatever is sampled beside it."""

from dataclasses import replace
from functools import wraps
from pathlib import Path

import numpy as np
import pytest
import torch
from chance import generators, randomised
from conftest import TINY_CONV, TINY_VQ

from smalti.errors import SmaltiError
from smalti.pipelines.generation import generate_folder, group_size
from smalti.pipelines.pipeline import Pipeline
from smalti.prior.flow.config import FlowConfig
from smalti.prior.flow.dit import DiTConfig
from smalti.prior.flow.prior import FlowPrior
from smalti.prior.flow.solvers.sde import EulerMaruyama
from smalti.prior.next_scale.config import NextScaleConfig
from smalti.prior.next_token.config import NextTokenConfig
from smalti.prior.presets import PriorConfig
from smalti.scripts.encode import EncodeConfig, encode
from smalti.scripts.train_prior import TrainPriorConfig
from smalti.scripts.train_prior import train as train_prior
from smalti.scripts.train_tokenizer import TrainTokenizerConfig
from smalti.scripts.train_tokenizer import train as train_tokenizer
from smalti.tokenizer.kl import KLConfig, KLTokenizer
from smalti.tokenizer.losses.objective import ObjectiveConfig
from smalti.tokenizer.presets import TokenizerConfig
from smalti.tokenizer.quantizers.codebook import CodebookConfig
from smalti.tokenizer.quantizers.multi_scale import MultiScaleConfig

CLASSES = ("blue", "green", "red")
COUNT = 256
TINY_KL = KLConfig(image_size=16, conv=replace(TINY_CONV, z_channels=2))
TINY_FLOW = FlowConfig(network=DiTConfig(patch_size=1, depth=2, width=32, num_heads=2))
SCALES = MultiScaleConfig(
    codebook=CodebookConfig(16, 4, l2_normalise=False),
    scales=((1, 1), (2, 2), (4, 4), (8, 8)),
    convolutions=1,
)
FAMILIES: dict[str, tuple[TokenizerConfig, PriorConfig, dict[str, object]]] = {
    "next-token": (
        TINY_VQ,
        NextTokenConfig(depth=2, width=32, num_heads=2, hidden=64),
        {"temperature": 0.9},
    ),
    "next-scale": (
        replace(TINY_VQ, quantizer=SCALES),
        NextScaleConfig(depth=2, width=32, num_heads=2),
        {},
    ),
    "flow": (TINY_KL, TINY_FLOW, {"num_inference_steps": 4}),
}


def trained(root: Path, pictures: Path, tokenizer: TokenizerConfig, prior: PriorConfig) -> Pipeline:
    """A pipeline after 25 steps of each stage."""
    steps = {"max_train_steps": 25, "train_batch_size": 8, "learning_rate": 3e-3}
    folder = train_tokenizer(
        TrainTokenizerConfig(
            data=str(pictures),
            output_dir=root / "tokenizer",
            tokenizer=tokenizer,
            objective=ObjectiveConfig(perceptual_weight=0, adversarial_weight=0),
            **steps,
        )
    )
    latents = encode(EncodeConfig(data=str(pictures), tokenizer=folder, output_dir=root / "z"))
    return Pipeline.from_pretrained(
        train_prior(
            TrainPriorConfig(
                latents=latents, tokenizer=folder, output_dir=root / "prior", prior=prior, **steps
            )
        )
    )


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_repaired_job_of_256_pictures_is_exact_to_the_byte(
    tmp_path: Path, pictures_once: Path, family: str
) -> None:
    tokenizer, prior, options = FAMILIES[family]
    pipe = trained(tmp_path, pictures_once, tokenizer, prior)
    labels = [index % 3 for index in range(COUNT)]

    def generate(name: str, batch_size: int, **share: int) -> dict[str, bytes]:
        settings = {"seed": 3, "guidance_scale": 2.0, "batch_size": batch_size}
        generate_folder(pipe, tmp_path / name, labels, **settings, **share, **options)
        return files(tmp_path / name)

    whole = generate("whole", 64)
    assert len(whole) == COUNT
    for missing in (3, 100, 101, 255):
        (tmp_path / "whole" / f"{missing:06d}.png").unlink()
    assert generate("whole", 5) == whole
    for rank in range(3):
        divided = generate("divided", 7, rank=rank, world_size=3)
    assert divided == whole


@pytest.fixture
def flow() -> Pipeline:
    """Of random weights."""
    network = replace(TINY_FLOW.network, in_channels=2, out_channels=2, grid=(8, 8), num_classes=3)
    prior = randomised(FlowPrior(replace(TINY_FLOW, network=network)), std=0.1)
    return Pipeline(KLTokenizer(TINY_KL), prior, CLASSES)


def generate(pipe: Pipeline, folder: Path, count: int, batch_size: int) -> dict[str, bytes]:
    labels = [index % 3 for index in range(count)]
    settings = {"seed": 1, "guidance_scale": 1.5, "batch_size": batch_size}
    generate_folder(pipe, folder, labels, num_inference_steps=2, **settings)
    return files(folder)


def test_noise_is_divided_like_the_pictures(flow: Pipeline) -> None:
    noise = torch.randn(5, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    options = {"output_type": "latent", "num_inference_steps": np.int64(2)}
    whole = flow([0, 1, 2, 0, 1], noise=noise, **options).latents
    parts = flow([0, 1, 2, 0, 1], noise=noise.numpy(), batch_size=np.int64(2), **options).latents
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)
    for wrong in (noise[:4], noise[0, 0, 0, 0]):
        with pytest.raises(SmaltiError, match="for 5 images: give one row for each image"):
            flow([0, 1, 2, 0, 1], noise=wrong, batch_size=2, **options)


def test_a_solver_is_named_as_on_the_command_line(flow: Pipeline) -> None:
    def images(solver: object) -> torch.Tensor:
        options = {"output_type": "pt", "num_inference_steps": 2, "solver": solver}
        return flow(["red"], generator=generators(0), **options).images

    expected = images(EulerMaruyama(largest_ratio=1.5))
    assert torch.equal(images("euler-maruyama:largest_ratio=1.5"), expected)
    options = {"kind": "euler-maruyama", "largest_ratio": np.float32(1.5)}
    assert torch.equal(images(options), expected)


def test_a_job_takes_numbers_of_numpy(flow: Pipeline, tmp_path: Path) -> None:
    labels, one = np.array([0, 1]), torch.tensor(1)
    settings = {"seed": np.int64(1), "guidance_scale": np.float32(1.5), "batch_size": 2}
    generate_folder(flow, tmp_path, labels, num_inference_steps=one, **settings)
    plain = {"seed": 1, "guidance_scale": 1.5, "batch_size": 2}
    before = files(tmp_path)
    (tmp_path / "000000.png").unlink()
    generate_folder(flow, tmp_path, [0, 1], num_inference_steps=1, **plain)  # the same job
    assert files(tmp_path) == before


@pytest.fixture
def sizes(flow: Pipeline, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of pictures that are sampled together."""
    found: list[int] = []
    sample = flow.prior.sample

    @wraps(sample)
    def counted(condition: torch.Tensor, **options) -> torch.Tensor:
        found.extend([len(condition)] if len(condition) else [])  # none: a check of the options
        return sample(condition, **options)

    monkeypatch.setattr(flow.prior, "sample", counted)
    return found


def test_a_missing_picture_is_sampled_in_its_place_within_its_group(flow, sizes, tmp_path) -> None:
    size = group_size(flow)
    assert size == 8  # 64 positions each, 512 in all
    first = generate(flow, tmp_path, 20, 64)
    assert len(first) == 20 and sizes == [size] * 3
    for missing in (2, 19):
        (tmp_path / f"{missing:06d}.png").unlink()
    assert generate(flow, tmp_path, 20, 3) == first
    assert sizes == [size] * 5


def test_half_precision_is_sampled_in_batches_of_the_given_size(flow, sizes, tmp_path) -> None:
    assert len(generate(flow.to(torch.bfloat16), tmp_path, 7, 5)) == 7
    assert sizes == [5, 5]


def test_with_a_generator_each_pictures_are_decoded_one_by_one(flow, monkeypatch) -> None:
    decode, sizes = flow.tokenizer.decode, []

    def counted(latents: torch.Tensor) -> torch.Tensor:
        sizes.append(len(latents))
        return decode(latents)

    monkeypatch.setattr(flow.tokenizer, "decode", counted)
    flow([0, 1, 2], generator=generators(0, 1, 2), num_inference_steps=1)
    assert sizes == [1, 1, 1]
    sizes.clear()
    flow([0, 1, 2], generator=torch.Generator(), num_inference_steps=1)
    assert sizes == [3]
