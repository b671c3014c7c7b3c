"""A flow prior with every kind of condition: none, classes, captions, pictures, and several."""

from dataclasses import replace

import pytest
import torch
from chance import generators, randomised
from torch import Tensor

from smalti.errors import SmaltiError
from smalti.prior.base import Prior
from smalti.prior.conditions.base import Combination, Condition, joined, repeated, rows
from smalti.prior.conditions.image import ImageCondition
from smalti.prior.conditions.text import TextCondition, TextConfig
from smalti.prior.flow.config import FlowConfig
from smalti.prior.flow.dit import DiT, DiTConfig
from smalti.prior.flow.prior import FlowPrior

NETWORK = DiTConfig(
    in_channels=2,
    out_channels=2,
    grid=(4, 6),
    patch_size=2,
    depth=2,
    width=16,
    num_heads=2,
    num_classes=3,
    frequency_size=16,
)
TEXT = TextConfig(length=5, dim=6)
IMAGE_CHANNELS = 3
KINDS = ("none", "class", "text", "image", "class+text", "class+image", "text+image")
LABELS = torch.tensor([0, 1, 2, 1])


def config(condition: str) -> FlowConfig:
    classes = 3 if "class" in condition else 0
    return FlowConfig(
        network=replace(NETWORK, num_classes=classes),
        condition=condition,
        text_length=TEXT.length,
        text_dim=TEXT.dim,
        image_channels=IMAGE_CHANNELS if "image" in condition else 0,
    )


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def captions(seed: int = 0) -> TextCondition:
    """Four captions of 1, 2, 3 and 5 tokens."""
    mask = torch.arange(TEXT.length) >= TEXT.length - torch.tensor([1, 2, 3, 5])[:, None]
    return TextCondition(normal(4, TEXT.length, TEXT.dim, seed=seed), mask)


def condition_of(kinds: str, seed: int = 0) -> Condition:
    """One for each of four samples."""
    parts: dict[str, Condition] = {
        "class": LABELS.roll(seed),
        "text": captions(seed),
        "image": ImageCondition(normal(4, IMAGE_CHANNELS, 4, 6, seed=seed)),
    }
    if kinds == "none":
        return torch.zeros(4, dtype=torch.int64)
    names = kinds.split("+")
    chosen = {name: parts[name] for name in names}
    return Combination(chosen) if len(names) > 1 else chosen[names[0]]


LATENTS = normal(4, 2, 4, 6, seed=7)
TIMES = torch.tensor([0.1, 0.4, 0.7, 0.95])


@pytest.fixture(params=KINDS)
def kinds(request) -> str:
    return request.param


@pytest.fixture
def prior(kinds: str) -> FlowPrior:
    return randomised(FlowPrior(config(kinds)))


def sample(prior: FlowPrior, condition: Condition, *seeds: int, **options: object) -> Tensor:
    return prior.sample(condition, generator=generators(*seeds), num_inference_steps=2, **options)


# -- what every kind promises ---------------------------------------------------------------------


def test_every_kind_of_condition_is_used(prior, kinds) -> None:
    """Each part of a condition changes the output; captions beyond their padding do not."""
    out = prior.network(LATENTS, TIMES, condition_of(kinds))
    assert out.shape == LATENTS.shape
    if kinds == "none":
        return
    other = condition_of(kinds, seed=1)
    assert not torch.equal(out, prior.network(LATENTS, TIMES, other))
    if "+" not in kinds:
        return
    given = condition_of(kinds)
    for name in given.parts:
        changed = Combination({**given.parts, name: other.parts[name]})
        assert not torch.equal(out, prior.network(LATENTS, TIMES, changed)), name


def test_the_gradient_reaches_every_weight(kinds) -> None:
    prior = randomised(FlowPrior(config(kinds))).train()
    inputs = {"label_dropout": torch.tensor([0.0, 0.9, 0.9, 0.9])}
    prior(LATENTS, condition_of(kinds), inputs).total.backward()
    assert [n for n, p in prior.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_sample_depends_on_its_own_condition_and_generator_alone(prior, kinds) -> None:
    together = sample(prior, condition_of(kinds), 0, 1, 2, 3, guidance_scale=1.0)
    alone = sample(prior, rows(condition_of(kinds), slice(1, 2)), 1)
    torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-5)


def test_a_dropped_condition_is_the_null_condition(prior, kinds) -> None:
    prior.train()
    given = condition_of(kinds)
    dropped = prior.drop(given, 0.5, torch.tensor([0.1, 0.9, 0.2, 0.8]))
    prior.eval()
    out, null, kept = (
        prior.network(LATENTS, TIMES, value) for value in (dropped, prior.null(given), given)
    )
    expected = torch.stack([null[0], kept[1], null[2], kept[3]])
    torch.testing.assert_close(out, expected)
    assert torch.equal(null, kept) == (kinds in ("none", "image"))


def test_guidance_is_its_formula_and_one_is_off(prior, kinds) -> None:
    given, other = condition_of(kinds), condition_of(kinds, seed=1)
    velocity = prior.dynamics(given).estimate(LATENTS, TIMES).velocity
    if kinds in ("none", "image"):
        with pytest.raises(SmaltiError, match="nothing to guide"):
            prior.dynamics(given, 3.0)
        return
    for negative, away in ((None, prior.null(given)), (other, other)):
        uncond = prior.dynamics(away).estimate(LATENTS, TIMES).velocity
        guided = prior.dynamics(given, 3.0, negative_condition=negative)
        expected = uncond + 3.0 * (velocity - uncond)
        torch.testing.assert_close(
            guided.estimate(LATENTS, TIMES).velocity, expected, rtol=1e-4, atol=1e-4
        )
    seeds = (0, 1, 2, 3)
    assert torch.equal(
        sample(prior, given, *seeds),
        sample(prior, given, *seeds, guidance_scale=1.0, negative_condition=other),
    )


def test_a_picture_stays_in_both_passes_of_guidance() -> None:
    prior = FlowPrior(config("class+image"))
    null = prior.null(condition_of("class+image"))
    assert null.parts["class"].tolist() == [3, 3, 3, 3]
    given = condition_of("class+image").parts["image"]
    assert torch.equal(null.parts["image"].latents, given.latents)


def test_it_is_saved_and_loaded(prior, kinds, tmp_path) -> None:
    prior.save_pretrained(tmp_path)
    again = Prior.from_pretrained(tmp_path)
    assert again.config == prior.config and again.config.condition == kinds
    condition = condition_of(kinds)
    assert torch.equal(sample(again, condition, 0, 1, 2, 3), sample(prior, condition, 0, 1, 2, 3))


def test_there_may_be_no_samples(prior) -> None:
    assert prior.sample(prior.no_conditions()).shape == (0, 2, 4, 6)


def test_a_likelihood_is_given_of_every_kind(prior, kinds) -> None:
    bits = prior.bits_per_dimension(
        LATENTS, condition_of(kinds), generator=torch.Generator().manual_seed(0)
    )
    assert bits.shape == (4,) and bits.isfinite().all()


def test_the_network_compiles_into_one_graph_with_all_conditions() -> None:
    network = randomised(FlowPrior(config("text+image"))).network
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    condition = condition_of("text+image")
    torch.testing.assert_close(
        compiled(LATENTS, TIMES, condition), network(LATENTS, TIMES, condition)
    )


def test_bf16_changes_little() -> None:
    prior = randomised(FlowPrior(config("text+image")), std=0.1)
    condition = condition_of("text+image")
    exact = prior.network(LATENTS, TIMES, condition)
    with torch.autocast("cpu", torch.bfloat16):
        rough = prior.network(LATENTS, TIMES, condition)
    half = prior.to(torch.bfloat16).network(LATENTS, TIMES, condition)
    for out, tolerance in ((rough, 0.03), (half, 0.06)):
        assert out.dtype == torch.float32 and (out - exact).norm() < tolerance * exact.norm()


# -- a class-conditional network is the start of all others ---------------------------------------


@pytest.mark.parametrize("kinds", ["class+text", "class+image"])
def test_what_a_new_condition_adds_starts_at_zero(kinds: str) -> None:
    """Bitwise: text through cross-attention and adaLN, pictures through new input channels."""
    old = randomised(DiT(NETWORK))
    new = FlowPrior(config(kinds)).network
    state = new.state_dict()
    for name, weight in old.state_dict().items():
        if name == "x_embedder.proj.weight":
            state[name][:, : NETWORK.in_channels] = weight
        else:
            assert state[name].shape == weight.shape
            state[name] = weight
    new.load_state_dict(state)
    expected = old(LATENTS, TIMES, LABELS)
    assert torch.equal(new(LATENTS, TIMES, condition_of(kinds)), expected)


def test_a_class_network_has_the_published_names_and_no_others() -> None:
    plain, text = (FlowPrior(config(kinds)).network for kinds in ("class", "class+text"))
    added = set(text.state_dict()) - set(plain.state_dict())
    assert {name.split(".")[0] for name in added} == {"blocks", "caption_embedder", "caption_mean"}
    assert {name.split(".")[2] for name in added if name.startswith("blocks")} == {"cross_attn"}


# -- attention to a caption -----------------------------------------------------------------------


def test_padding_of_a_caption_has_no_influence() -> None:
    prior = randomised(FlowPrior(config("text")))
    given = captions()
    features = given.features.masked_fill(~given.mask[..., None], float("nan"))
    out = prior.network(LATENTS, TIMES, given)
    torch.testing.assert_close(
        prior.network(LATENTS, TIMES, TextCondition(features, given.mask)), out
    )


def test_the_tokens_attend_to_the_caption_after_they_attend_to_each_other() -> None:
    """PixArt-alpha's block, written out: x + gate attn, then + cross-attention, then + gate mlp."""
    prior = randomised(FlowPrior(config("text")))
    block, embedded = prior.network.blocks[0], prior.network.caption_embedder.embedded(captions())
    x, c = normal(4, 6, 16), normal(4, 16, seed=1)
    shift1, scale1, gate1, shift2, scale2, gate2 = block.adaLN_modulation(c)
    h = x + gate1 * block.attn(block.norm1(x) * (1 + scale1) + shift1, None)
    query = block.cross_attn.q_linear(h).view(4, 6, 2, 8)
    key, value = block.cross_attn.kv_linear(embedded.tokens).view(4, 5, 2, 2, 8).unbind(2)
    scores = torch.einsum("bnhd,bthd->bhnt", query, key) / 8**0.5
    scores = scores.masked_fill(~captions().mask[:, None, None], -torch.inf)
    attended = torch.einsum("bhnt,bthd->bnhd", scores.softmax(-1), value).flatten(2)
    h = h + block.cross_attn.proj(attended)
    h = h + gate2 * block.mlp(block.norm2(h) * (1 + scale2) + shift2)
    torch.testing.assert_close(block(x, c, None, embedded), h, rtol=1e-4, atol=1e-4)


# -- values with rows -----------------------------------------------------------------------------


def test_pictures_have_rows() -> None:
    image = condition_of("image")
    assert torch.equal(repeated(image, 2).latents[2:4], image.latents[1:2].expand(2, -1, -1, -1))
    both = joined(rows(image, slice(0, 1)), rows(image, slice(1, 4)))
    assert torch.equal(both.latents, image.latents)


# -- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kinds", "given", "message"),
    [
        ("class", "image", "give a tensor"),
        ("image", "class", "give an ImageCondition"),
        ("none", "text", "this prior is unconditional"),
        ("class+image", "class", "conditional on class and image"),
        ("text+image", "class+image", "conditional on text and image"),
    ],
)
def test_another_kind_of_condition_is_refused(kinds: str, given: str, message: str) -> None:
    prior = FlowPrior(config(kinds))
    for call in (prior.sample, lambda value: prior(LATENTS, value)):
        with pytest.raises(SmaltiError, match=message):
            call(condition_of(given))


def test_pictures_of_another_shape_are_refused() -> None:
    prior = FlowPrior(config("image"))
    for shape in ((4, 2, 4, 6), (4, 3, 6, 4)):
        with pytest.raises(SmaltiError, match=r"this prior takes \(B, 3, 4, 6\)"):
            prior.sample(ImageCondition(torch.zeros(shape)))
    with pytest.raises(SmaltiError, match="of a floating-point type"):
        ImageCondition(torch.zeros(4, 3, 4, 6, dtype=torch.int64))
    with pytest.raises(SmaltiError, match="conditions were given for 4 samples"):
        prior(LATENTS, ImageCondition(torch.zeros(3, 3, 4, 6)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (LABELS, "none were given of pictures; this network takes 4"),
        (condition_of("class+text"), "4 were given of captions; this network takes none"),
        (
            Combination({"class": LABELS[:3], "image": ImageCondition(torch.zeros(3, 3, 4, 6))}),
            "labels have shape",
        ),
    ],
)
def test_the_network_names_what_it_takes(given: Condition, message: str) -> None:
    with pytest.raises(SmaltiError, match=message):
        FlowPrior(config("class+image")).network(LATENTS, TIMES, given)


def test_the_config_has_channels_for_pictures_or_no_pictures() -> None:
    for changes in ({"image_channels": 0}, {"condition": "class"}):
        with pytest.raises(SmaltiError, match="a prior has both or neither"):
            replace(config("class+image"), **changes)
    with pytest.raises(SmaltiError, match="num_classes is 3, but a prior with condition text"):
        replace(config("text"), network=NETWORK)
