"""What every tokenizer promises, whatever its latents; run over every quantizer and codebook."""

import pytest
import torch

from smalti.data.latents import CodeSpec
from smalti.tokenizer.base import Tokenizer
from smalti.tokenizer.conv import ConvConfig
from smalti.tokenizer.kl import KLConfig
from smalti.tokenizer.quantizers import QUANTIZERS
from smalti.tokenizer.quantizers.codebook import CodebookConfig
from smalti.tokenizer.quantizers.fsq import FSQConfig
from smalti.tokenizer.quantizers.gumbel import GumbelConfig
from smalti.tokenizer.quantizers.lookup_free import LookupFreeConfig
from smalti.tokenizer.quantizers.multi_scale import MultiScaleConfig
from smalti.tokenizer.quantizers.nearest import NearestConfig
from smalti.tokenizer.registry import TOKENIZERS
from smalti.tokenizer.vq import VQConfig

CONV = ConvConfig(
    channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(), z_channels=4
)
BOOK = CodebookConfig(16, 4, revive_after=2)
EMA_BOOK = CodebookConfig(16, 4, learning="ema", revive_after=2)
SCALES = ((1, 1), (3, 2), (8, 8))
CONFIGS = {
    "nearest": NearestConfig(codebook=BOOK),
    "ema": NearestConfig(codebook=EMA_BOOK),
    "simvq": NearestConfig(codebook=CodebookConfig(16, 4, learning="simvq", revive_after=0)),
    "rotation": NearestConfig(codebook=BOOK, estimator="rotation"),
    "entropy": NearestConfig(codebook=BOOK, entropy_weight=0.1),
    "fsq": FSQConfig(levels=(4, 4)),
    "lookup-free": LookupFreeConfig(bits=4),
    "spherical": LookupFreeConfig(bits=4, spherical=True),
    "gumbel": GumbelConfig(vocab_size=16, code_dim=4, kl_weight=0.1),
    "multi-scale": MultiScaleConfig(codebook=BOOK, scales=SCALES, convolutions=2),
    "multi-scale-ema": MultiScaleConfig(
        codebook=EMA_BOOK, scales=SCALES, convolutions=1, scale_dropout=0.5, scale_dropout_keeps=1
    ),
}
ALL = {
    **{name: VQConfig(image_size=16, conv=CONV, quantizer=q) for name, q in CONFIGS.items()},
    "kl": KLConfig(image_size=16, conv=CONV),
}


@pytest.fixture(params=ALL)
def model(request) -> Tokenizer:
    torch.manual_seed(0)
    return TOKENIZERS.build(ALL[request.param]).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_every_registered_name_is_here() -> None:
    assert {config.kind for config in CONFIGS.values()} == set(QUANTIZERS)
    assert {config.kind for config in ALL.values()} == set(TOKENIZERS)


@torch.no_grad()
def test_verbs_agree(model, images) -> None:
    latents = model.encode(images)
    assert torch.equal(latents, model.latents(model.store(images)))
    spec = model.spec
    if isinstance(spec, CodeSpec):
        assert latents.shape == (3, spec.length) and latents.dtype == torch.int64
        assert latents.min() >= 0 and latents.max() < spec.vocab_size
    else:
        assert latents.shape == (3, spec.channels, spec.height, spec.width)
    decoded = model.decode(latents)
    assert decoded.shape == images.shape
    torch.testing.assert_close(model.decode_vectors(model.vectors(latents)), decoded)
    assert torch.equal(model.reconstruct(images), decoded.clamp(-1, 1))
    torch.testing.assert_close(model.encode(images[1:2]), latents[1:2], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_an_empty_batch_makes_empty_latents_and_pictures(model, images) -> None:
    for verb in (model.store, model.encode):
        some, none = verb(images), verb(images[:0])
        assert none.shape == (0, *some.shape[1:]) and none.dtype == some.dtype
    assert model.decode(model.encode(images[:0])).shape == (0, 3, 16, 16)
    assert model.reconstruct(images[:0]).shape == (0, 3, 16, 16)
    with pytest.raises(ValueError, match="resize and crop"):
        model.store(torch.zeros(0, 3, 8, 8))


@torch.no_grad()
def test_with_a_generator_each_a_picture_does_not_depend_on_its_neighbours(model, images) -> None:
    def encoded(*seeds: int) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return model.encode(images[list(seeds)], generator=generators)

    whole = encoded(0, 1, 2)
    torch.testing.assert_close(encoded(2, 0), whole[[2, 0]], rtol=1e-4, atol=1e-5)
    if not isinstance(model.spec, CodeSpec):
        assert (whole - model.encode(images)).abs().flatten(1).amax(1).gt(0.01).all()


INTEGERS = (torch.uint8, torch.int8, torch.uint16, torch.int32, torch.uint64)


@torch.no_grad()
def test_codes_of_every_integer_type_are_understood(model, images) -> None:
    if not isinstance(model.spec, CodeSpec):
        pytest.skip("no codes")
    codes = model.encode(images)
    pictures = model.decode(codes)
    for dtype in INTEGERS:
        assert torch.equal(model.decode(codes.to(dtype)), pictures), dtype
        stored = model.latents(codes.to(dtype))
        assert stored.dtype == torch.int64 and torch.equal(stored, codes), dtype
    for dtype in (torch.float32, torch.bfloat16, torch.bool, torch.complex64):
        for verb in (model.decode, model.latents):
            with pytest.raises(ValueError, match=f"codes are {dtype}; .* takes integers"):
                verb(codes.to(dtype))


def test_the_training_pass_decodes_what_was_encoded(model, images) -> None:
    output = model(images)
    assert output.images.shape == output.targets.shape == images.shape
    assert torch.equal(output.targets, images)
    if isinstance(model.spec, CodeSpec):
        assert torch.equal(output.codes, model.encode(images))
        torch.testing.assert_close(output.images, model.decode(output.codes), rtol=1e-4, atol=1e-5)


def test_a_training_step_reaches_every_parameter(model, images) -> None:
    model.train()
    for step in range(2):  # the second one with what `after_step` left
        output = model(images)
        loss = (output.images - output.targets).square().mean() + sum(output.losses.values())
        model.zero_grad()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        model.after_step(torch.Generator().manual_seed(step))
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert all(torch.isfinite(v).all() for v in model.state_dict().values())


def test_a_skipped_step_leaves_no_trace(model, images) -> None:
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model(images)
    model.discard_step()
    model.after_step(torch.Generator().manual_seed(0))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_save_and_load(model, images, tmp_path) -> None:
    model.save_pretrained(tmp_path)
    again = Tokenizer.from_pretrained(tmp_path)
    assert type(again) is type(model) and again.config == model.config
    assert again.fingerprint == model.fingerprint
    assert torch.equal(again.encode(images), model.encode(images))


@torch.no_grad()
def test_codes_and_their_meaning_are_those_of_fp32_under_autocast(model, images) -> None:
    if not isinstance(model.spec, CodeSpec):
        pytest.skip("no codes")
    features = 0.1 * torch.randn(8, model.quantizer.dim, 8, 8)
    codes = model.quantizer.search(features)
    vectors = model.vectors(codes)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.quantizer.search(features), codes)
        assert torch.equal(model.quantizer(features).codes, codes)
        assert torch.equal(model.vectors(codes), vectors)


@torch.no_grad()
def test_half_precision_copies_decode(model, images) -> None:
    expected = model.decode(model.encode(images))
    latents = model.encode(images)
    decoded = model.cast(torch.bfloat16).decode(latents)
    assert decoded.dtype == torch.bfloat16
    assert (decoded - expected).abs().mean() < 0.05 * expected.abs().mean() + 0.02


@torch.no_grad()
def test_another_size_of_images_is_the_same_tokenizer(model, images) -> None:
    large = model.resized(32)
    assert large.image_size == 32 and large.spec != model.spec
    weights = large.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    pictures = torch.cat([images, images.flip(0)])[:4].repeat(1, 1, 2, 2)
    assert large.decode(large.encode(pictures)).shape == (4, 3, 32, 32)
    assert model.for_latents(model.spec, model.fingerprint) is model
    again = model.for_latents(large.spec, large.fingerprint)
    assert again is not None and again.config == large.config
    back = large.for_latents(model.spec, model.fingerprint)
    assert back is not None and back.config == model.config
    assert model.for_latents(large.spec, "0" * 64) is None
    model.last_layer.add_(1)
    assert model.for_latents(large.spec, large.fingerprint) is None


def test_wrong_images_are_refused(model) -> None:
    with pytest.raises(ValueError, match="resize and crop"):
        model.encode(torch.zeros(1, 3, 8, 8))
