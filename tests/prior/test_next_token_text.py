"""Captions as the prefix: LlamaGen written out, padding, no text, and decoding."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from chance import randomised
from torch import Tensor

from smalti.data.latents import CodeSpec
from smalti.errors import SmaltiError
from smalti.prior.conditions.base import Combination
from smalti.prior.conditions.text import TextCondition
from smalti.prior.next_token.decoding import TokenDecoder
from smalti.prior.next_token.model import PRESETS, NextTokenConfig, NextTokenPrior
from smalti.prior.sampling import SamplingOptions

TINY = NextTokenConfig(
    spec=CodeSpec(16, ((3, 5),)),
    condition="text",
    num_classes=0,
    text_length=5,
    text_dim=6,
    depth=2,
    width=16,
    num_heads=2,
    hidden=32,
    dropout=0.0,
)
CODES = torch.randint(16, (4, 15), generator=torch.Generator().manual_seed(1))
LENGTHS = torch.tensor([5, 3, 1, 4])  # tokens of the captions
MASK = torch.arange(5) >= 5 - LENGTHS[:, None]
TEXT = TextCondition(torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(2)), MASK)


def make_prior(config: NextTokenConfig = TINY) -> NextTokenPrior:
    torch.manual_seed(0)
    return randomised(NextTokenPrior(config), vector_mean=1.0)


@pytest.fixture
def model() -> NextTokenPrior:
    return make_prior()


def null_of(model: NextTokenPrior, text: TextCondition = TEXT) -> TextCondition:
    features = model.state_dict()["cls_embedding.uncond_embedding"]
    return TextCondition(features.expand(len(text), -1, -1), text.mask)


# -- the network -----------------------------------------------------------------------------------


def test_names_and_sizes_are_those_of_the_published_weights() -> None:
    config = replace(PRESETS["gpt-xl"], condition="text", num_classes=0)
    with torch.device("meta"):
        state = NextTokenPrior(config).state_dict()
    prefix = {name: tuple(state[name].shape) for name in state if name.startswith("cls_embedding")}
    assert prefix == {
        "cls_embedding.cap_proj.fc1.weight": (1280, 2048),
        "cls_embedding.cap_proj.fc2.weight": (1280, 1280),
        "cls_embedding.uncond_embedding": (120, 2048),
    }
    count = sum(value.numel() for value in state.values())
    assert count - 120 * 2048 == 777_678_080  # theirs is no parameter


def plain_logits(model: NextTokenPrior, codes: Tensor, features: Tensor, mask: Tensor) -> Tensor:
    """LlamaGen's forward pass for one caption (T, D) and codes (L,), written out: (L, V)."""
    config, w = model.config, model.state_dict()
    heads, head_dim = config.num_heads, config.width // config.num_heads
    columns, prefix = config.spec.grids[0][1], len(features)

    def rms(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[name]

    hidden = F.gelu(features @ w["cls_embedding.cap_proj.fc1.weight"].T, approximate="tanh")
    caption = hidden @ w["cls_embedding.cap_proj.fc2.weight"].T
    x = torch.cat([caption, w["tok_embeddings.weight"][codes[:-1]]])
    length = len(x)
    angles = torch.zeros(length, head_dim // 2)
    for t in range(prefix, length):
        for pair in range(head_dim // 2):
            side, i = divmod(pair, head_dim // 4)
            angles[t, pair] = divmod(t - prefix, columns)[side] * 10000 ** (-4 * i / head_dim)
    rope_freqs = torch.polar(torch.ones_like(angles), angles)
    rope_freqs[:prefix] = 0 if config.prefix_rotary == "zero" else 1

    def rotated(x: Tensor) -> Tensor:  # (length, heads, head_dim)
        pairs = torch.complex(x[..., ::2], x[..., 1::2]) * rope_freqs[:, None]
        return torch.stack([pairs.real, pairs.imag], -1).flatten(-2)

    allowed = torch.ones(length, length).tril().bool()
    allowed[:, :prefix] &= mask
    allowed |= torch.eye(length).bool()
    for i in range(config.depth):
        at = f"layers.{i}"
        qkv = rms(x, f"{at}.attention_norm.weight") @ w[f"{at}.attention.wqkv.weight"].T
        query, key, value = qkv.view(length, 3, heads, head_dim).unbind(1)
        scores = torch.einsum("qhd,khd->hqk", rotated(query), rotated(key)) / math.sqrt(head_dim)
        shares = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
        attended = torch.einsum("hqk,khd->qhd", shares, value).flatten(1)
        x = x + attended @ w[f"{at}.attention.wo.weight"].T
        w1, w2, w3 = (w[f"{at}.feed_forward.w{n}.weight"] for n in (1, 2, 3))
        h = rms(x, f"{at}.ffn_norm.weight")
        x = x + (F.silu(h @ w1.T) * (h @ w3.T)) @ w2.T
    return (rms(x, "norm.weight") @ w["output.weight"].T)[prefix - 1 :]


@pytest.mark.parametrize("rotary", ["identity", "zero"])
def test_logits_are_those_of_a_plain_llamagen(rotary) -> None:
    model = make_prior(replace(TINY, prefix_rotary=rotary))
    with torch.no_grad():
        logits = model.logits(CODES, TEXT)
        assert logits.shape == (4, 15, 16)
        for row in range(4):
            expected = plain_logits(model, CODES[row], TEXT.features[row], TEXT.mask[row])
            torch.testing.assert_close(logits[row], expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("junk", [100.0, math.nan])
def test_padding_has_no_influence(model, junk: float) -> None:
    features = torch.where(MASK[..., None], TEXT.features, junk)
    other = TextCondition(features, MASK)
    assert torch.equal(model.logits(CODES, other), model.logits(CODES, TEXT))
    options = {"guidance_scale": 2.0, "temperature": 0}
    assert torch.equal(model.sample(other, **options), model.sample(TEXT, **options))


def test_every_token_of_a_caption_has_influence(model) -> None:
    before = model.logits(CODES, TEXT)
    for row, position in MASK.nonzero().tolist():
        features = TEXT.features.clone()
        features[row, position] += 1
        after = model.logits(CODES, TextCondition(features, MASK))
        changed = (after - before).abs().amax((1, 2)) > 1e-4
        assert changed.tolist() == [each == row for each in range(4)]


def test_a_shorter_prefix_is_the_same_caption() -> None:
    """Three tokens of padding have no influence."""
    model, text = (
        make_prior(),
        TextCondition(TEXT.features, torch.arange(5) >= 3 * torch.ones(4, 1)),
    )
    short = make_prior(replace(TINY, text_length=2))
    state = model.state_dict()
    state["cls_embedding.uncond_embedding"] = state["cls_embedding.uncond_embedding"][3:]
    short.load_state_dict(state)
    cut = TextCondition(TEXT.features[:, 3:], text.mask[:, 3:])
    torch.testing.assert_close(model.logits(CODES, text), short.logits(CODES, cut))


# -- no text ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{}, {"condition": "class+text", "num_classes": 3}, {"text_encoder": "bytes", "text_dim": 64}],
)
def test_training_leaves_out_padding_that_all_captions_share(changes: dict) -> None:
    model = make_prior(replace(TINY, text_length=30, label_dropout=0.0, **changes))
    mask = torch.arange(30) >= 30 - LENGTHS[:, None]
    features = torch.randint(256, (4, 30)) if "text_encoder" in changes else None
    text = TextCondition(torch.randn(4, 30, 6) if features is None else features, mask)
    labels = torch.tensor([0, 1, 2, 0])
    condition = Combination({"class": labels, "text": text}) if "condition" in changes else text
    lengths: list[int] = []
    model.norm.register_forward_hook(lambda _, inputs, __: lengths.append(inputs[0].shape[1]))
    in_training = model.train()(CODES, condition).total
    in_training.backward()
    whole = model.eval()(CODES, condition).total
    torch.testing.assert_close(in_training, whole, rtol=1e-5, atol=1e-6)
    assert lengths[1] - lengths[0] == 22  # the longest caption has 5 tokens: 8 columns are left


def test_no_text_is_the_learned_caption_with_the_same_padding(model) -> None:
    null = model.null(TEXT)
    assert torch.equal(null.mask, MASK)
    assert torch.equal(model.logits(CODES, null), model.logits(CODES, null_of(model)))
    assert not torch.allclose(model.logits(CODES, null), model.logits(CODES, TEXT))


def test_guidance_starts_from_the_learned_caption(model) -> None:
    """At scale 0 the text has no influence; otherwise uncond + s (cond - uncond)."""
    unconditional = model.sample(null_of(model), temperature=0)
    assert torch.equal(model.sample(TEXT, temperature=0, guidance_scale=0.0), unconditional)
    sampled = model.sample(TEXT, temperature=0, guidance_scale=2.5)
    conditional, without = (
        model.logits(sampled, TEXT),
        model.logits(sampled, null_of(model)),
    )
    assert torch.equal(sampled, (without + 2.5 * (conditional - without)).argmax(-1))


def test_whole_captions_are_dropped_in_training_only() -> None:
    model = make_prior(replace(TINY, label_dropout=0.3))
    embedded = []
    model.cls_embedding.cap_proj.register_forward_pre_hook(lambda m, args: embedded.append(args[0]))
    text = TextCondition(torch.ones(1000, 5, 6), torch.ones(1000, 5, dtype=torch.bool))
    codes = CODES[:1].expand(1000, -1)
    model(codes, text)
    assert (embedded[0] == 1).all()
    loss = model.train()(codes, text).total
    null = (embedded[1] == model.cls_embedding.uncond_embedding).all((1, 2))
    assert null.float().mean().item() == pytest.approx(0.3, abs=0.05)
    assert (embedded[1][~null] == 1).all()
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_the_learned_caption_is_always_in_the_graph() -> None:
    """DDP needs a gradient for every parameter, even where no caption is dropped."""
    model = make_prior(replace(TINY, label_dropout=0.0)).train()
    model(CODES, TEXT).total.backward()
    assert (model.cls_embedding.uncond_embedding.grad == 0).all()


# -- sampling --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{}, {"prefix_rotary": "zero"}, {"num_kv_heads": 1, "random_order": (0.0, 0.0)}]
)
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.4, 0.6)])
def test_cached_and_teacher_forced_logits_agree(changes, interval) -> None:
    model = make_prior(replace(TINY, **changes))
    options = SamplingOptions(guidance_scale=2.0, guidance_interval=interval)
    with torch.no_grad():
        conditional, without = model.logits(CODES, TEXT), model.logits(CODES, null_of(model))
        scales = torch.tensor(options.guidance_scales(15))[:, None]
        expected = without + scales * (conditional - without)
        decoder = TokenDecoder(model, TEXT, model.null(TEXT), options)
        for j in range(15):
            torch.testing.assert_close(decoder.logits(j), expected[:, j], rtol=1e-4, atol=1e-5)
            decoder.append(CODES[:, j], j)


def test_a_caption_does_not_see_its_neighbours(model) -> None:
    def generators(*seeds: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    together = model.sample(TEXT, generator=generators(1, 2, 3, 4), guidance_scale=1.5)
    alone = model.sample(TEXT[1:2], generator=generators(2), guidance_scale=1.5)
    assert torch.equal(together[1], alone[0])
    assert len({tuple(row) for row in together.tolist()}) == 4
    assert model.sample(TEXT[:0], generator=[]).shape == (0, 15)


def test_save_and_load(model, tmp_path) -> None:
    loaded = NextTokenPrior.from_pretrained(model.save_pretrained(tmp_path / "prior"))
    assert loaded.config == TINY and loaded.num_classes == 0
    assert torch.equal(loaded.logits(CODES, TEXT), model.logits(CODES, TEXT))


def test_the_objective_compiles_into_one_graph(model) -> None:
    compiled = torch.compile(model.train(), backend="eager", fullgraph=True)
    torch.manual_seed(4)
    expected = model(CODES, TEXT).total
    torch.manual_seed(4)
    torch.testing.assert_close(compiled(CODES, TEXT).total, expected)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_text_works_in_bf16(model, dtype) -> None:
    exact = model(CODES, TEXT).total.item()
    if dtype is not None:
        model.to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is None):
        assert model(CODES, TEXT).total.item() == pytest.approx(exact, rel=3e-2)
        assert model.sample(TEXT, guidance_scale=2.0).shape == (4, 15)


# -- the condition ---------------------------------------------------------------------------------


def test_padding_moves_to_the_left() -> None:
    features = torch.arange(1.0, 7.0).view(2, 3, 1)
    mask = torch.tensor([[True, True, False], [False, True, False]])
    text = TextCondition.left_padded(features, mask)
    assert text.mask.tolist() == [[False, True, True], [False, False, True]]
    assert text.features[text.mask].flatten().tolist() == [1, 2, 5]
    again = TextCondition.left_padded(text.features, text.mask)
    assert torch.equal(again.features, text.features) and len(again) == 2


@pytest.mark.parametrize(
    ("features", "mask", "message"),
    [
        (torch.ones(4, 5), MASK, r"\(4, 5\).* give \(B, T, D\)"),
        (torch.ones(4, 5, 6).long(), MASK, "int64"),
        (torch.ones(4, 5, 6), MASK[:, 1:], r"\(4, 4\).* give \(4, 5\) bool"),
        (torch.ones(4, 5, 6), MASK.long(), "int64"),
        (torch.ones(4, 5, 6), MASK & False, "a caption has no token"),
        (torch.ones(4, 5, 6), MASK.flip(1), "use TextCondition.left_padded"),
    ],
)
def test_an_invalid_text_condition_is_refused(features: Tensor, mask: Tensor, message: str) -> None:
    with pytest.raises(SmaltiError, match=message):
        TextCondition(features, mask)


def test_conditions_of_another_kind_are_refused(model) -> None:
    for call in (model.sample, lambda c: model(CODES, c), lambda c: model.logits(CODES, c)):
        with pytest.raises(SmaltiError, match="takes text, not a Tensor"):
            call(torch.tensor([0, 1, 2, 3]))
        with pytest.raises(SmaltiError, match=r"this prior takes \(B, 5, 6\)"):
            call(TextCondition(TEXT.features[:, 1:], MASK[:, 1:]))
    classes = NextTokenPrior(replace(TINY, condition="class", num_classes=3))
    with pytest.raises(SmaltiError, match="labels are a TextCondition"):
        classes.sample(TEXT)


def test_a_prior_of_text_has_no_classes() -> None:
    with pytest.raises(SmaltiError, match="condition text has no classes"):
        NextTokenConfig(condition="text")
    with pytest.raises(SmaltiError, match="text_length is 0; it must be at least 1"):
        replace(TINY, text_length=0)
    assert TINY.fitted(CodeSpec(8, ((2, 2),)), 7, "abc").num_classes == 0
