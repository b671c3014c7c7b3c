"""Options of the next-token prior: grouped queries, normed queries and keys, dropouts, drop path,
token corruption."""

from dataclasses import replace

import pytest
import torch
from chance import randomised

from smalti.data.latents import CodeSpec
from smalti.errors import SmaltiError
from smalti.prior.attention import KeyValueCache
from smalti.prior.next_token.decoding import TokenDecoder
from smalti.prior.next_token.model import (
    BlockStep,
    NextTokenConfig,
    NextTokenPrior,
    corrupted,
)
from smalti.prior.sampling import SamplingOptions

TINY = NextTokenConfig(
    spec=CodeSpec(16, ((3, 5),)),
    num_classes=3,
    depth=2,
    width=32,
    num_heads=4,
    hidden=32,
    dropout=0.0,
    label_dropout=0.0,
)
CODES = torch.randint(16, (4, 15), generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2, 3])


def make_prior(config: NextTokenConfig) -> NextTokenPrior:
    torch.manual_seed(0)
    return randomised(NextTokenPrior(config), vector_mean=1.0)


# -- grouped queries and normed heads --------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize(
    "changes",
    [
        {"num_kv_heads": 2},
        {"num_kv_heads": 1, "qk_norm": True, "prefix_rotary": "zero"},
        {"random_order": (0.0, 0.0)},
    ],
    ids=str,
)
def test_cached_and_teacher_forced_logits_agree(changes, scale: float) -> None:
    model = make_prior(replace(TINY, **changes))
    with torch.no_grad():
        conditional = model.logits(CODES, LABELS)
        unconditional = model.logits(CODES, torch.full_like(LABELS, 3))
        expected = unconditional + scale * (conditional - unconditional)
        decoder = TokenDecoder(
            model, LABELS, model.null(LABELS), SamplingOptions(guidance_scale=scale)
        )
        for j in range(15):
            torch.testing.assert_close(decoder.logits(j), expected[:, j], rtol=1e-4, atol=1e-5)
            decoder.append(CODES[:, j], j)


@pytest.mark.parametrize(("kv_heads", "scale", "rows"), [(0, 1.0, 4), (2, 1.0, 4), (1, 2.0, 8)])
def test_the_cache_holds_key_and_value_heads_alone(kv_heads, scale, rows) -> None:
    model = NextTokenPrior(replace(TINY, num_kv_heads=kv_heads)).eval()
    decoder = TokenDecoder(model, LABELS, model.null(LABELS), SamplingOptions(guidance_scale=scale))
    assert decoder.full_cache.keys.shape == decoder.full_cache.values.shape
    assert decoder.full_cache.keys.shape == (2, rows, kv_heads or 4, 15, 8)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_queries_are_attention_with_repeated_heads(kv_heads: int) -> None:
    grouped = make_prior(replace(TINY, num_kv_heads=kv_heads))
    full = make_prior(TINY)
    state = grouped.state_dict()
    for name in list(state):
        if name.endswith("wqkv.weight"):
            sizes = [32, 8 * kv_heads, 8 * kv_heads]  # q | k | v, as in LlamaGen
            query, key, value = state[name].split(sizes)
            key, value = (
                part.view(kv_heads, 8, 32).repeat_interleave(4 // kv_heads, 0).reshape(32, 32)
                for part in (key, value)
            )
            state[name] = torch.cat([query, key, value])
    full.load_state_dict(state)
    torch.testing.assert_close(
        grouped.logits(CODES, LABELS), full.logits(CODES, LABELS), rtol=1e-4, atol=1e-5
    )
    sampled, same = (
        model.sample(LABELS, generator=torch.Generator().manual_seed(1), guidance_scale=1.5)
        for model in (grouped, full)
    )
    assert torch.equal(sampled, same)


def test_normed_heads_ignore_the_norm_of_queries_and_keys() -> None:
    model, plain = make_prior(replace(TINY, qk_norm=True, norm_eps=0.0)), make_prior(TINY)
    names = {"q_norm.weight", "k_norm.weight"}
    added = set(model.state_dict()) - set(plain.state_dict())
    assert added == {f"layers.{i}.attention.{name}" for i in range(2) for name in names}
    assert model.layers[0].attention.q_norm.weight.shape == (8,)  # of a head
    for prior, same in ((model, True), (plain, False)):
        before = prior.logits(CODES, LABELS)
        with torch.no_grad():
            prior.layers[0].attention.wqkv.weight[:64] *= 5
        after = prior.logits(CODES, LABELS)
        assert torch.allclose(before, after, rtol=1e-3, atol=1e-3) == same


def test_normed_heads_are_their_definition() -> None:
    """Of queries and keys, before they are rotated; never of values."""
    attention = make_prior(replace(TINY, qk_norm=True)).layers[0].attention
    x, rope_freqs = torch.randn(1, 1, 32), torch.ones(1, 4, dtype=torch.complex64)
    query = torch.zeros(1, 4, 1, 8)
    attention.q_norm.register_forward_hook(lambda module, args, out: query.copy_(out))
    out = attention(x, rope_freqs, None, None)
    raw_query, _, value = (x @ attention.wqkv.weight.T).chunk(3, -1)
    torch.testing.assert_close(out, value @ attention.wo.weight.T)  # one token: its own value
    heads = raw_query.view(4, 8)
    normed = heads / (heads.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(query.view(4, 8), normed * attention.q_norm.weight)


# -- dropouts and drop path ------------------------------------------------------------------------


def test_each_dropout_drops_what_its_name_says() -> None:
    config = replace(TINY, dropout=0.2, token_dropout=0.3, attention_dropout=0.5)
    model, shares = make_prior(config).train(), {}
    block = model.layers[0]
    modules = {"tokens": model.dropout, "attention": block.attention, "ffn": block.feed_forward}
    for name, module in modules.items():
        module.register_forward_hook(
            lambda module, args, out, name=name: shares.update(
                {name: (out == 0).float().mean().item()}
            )
        )
    model(CODES.repeat(16, 1), LABELS.repeat(16))
    assert shares["tokens"] == pytest.approx(0.3, abs=0.02)
    assert shares["attention"] == pytest.approx(0.2, abs=0.02)
    assert shares["ffn"] == pytest.approx(0.2, abs=0.02)
    assert NextTokenPrior(replace(TINY, dropout=0.2)).dropout.p == 0.2  # None = dropout
    assert NextTokenPrior(replace(TINY, dropout=0.2, token_dropout=0.0)).dropout.p == 0.0


def test_attention_dropout_is_of_the_weights_and_unbiased() -> None:
    attention = make_prior(replace(TINY, attention_dropout=0.5)).layers[0].attention
    x, rope_freqs = (
        torch.randn(1, 3, 32).expand(4000, -1, -1),
        torch.ones(3, 4, dtype=torch.complex64),
    )
    exact = attention.eval()(x[:1], rope_freqs, None, None)[0]
    sampled = attention.train()(x, rope_freqs, None, None)
    # The first token sees itself alone: its value twice, or nothing, head by head.
    first = sampled[:, 0] @ torch.linalg.inv(attention.wo.weight.T)
    value = (x[0, 0] @ attention.wqkv.weight.T)[64:]
    ratio = (first / value).view(4000, 4, 8)
    kept = ratio[..., :1].round() / 2
    torch.testing.assert_close(ratio, 2 * kept.expand_as(ratio), rtol=0, atol=5e-2)
    assert kept.unique().tolist() == [0, 1] and kept.mean().item() == pytest.approx(0.5, abs=0.02)
    torch.testing.assert_close(sampled.mean(0), exact, rtol=0.1, atol=0.1)


def test_drop_path_leaves_out_whole_branches_of_a_sample() -> None:
    """With a rate next to 1 the last block hardly ever adds anything."""
    config = replace(TINY, drop_path=0.999)
    model = make_prior(config)
    shallow = make_prior(replace(TINY, depth=1))
    shallow.load_state_dict(
        {k: v for k, v in model.state_dict().items() if not k.startswith("layers.1.")}
    )
    assert [layer.drop_path.probability for layer in model.layers] == [0, pytest.approx(0.999)]
    expected = shallow.logits(CODES, LABELS)
    torch.testing.assert_close(model.train().logits(CODES, LABELS), expected)
    assert not torch.allclose(model.eval().logits(CODES, LABELS), expected)
    assert torch.equal(
        model.logits(CODES, LABELS), make_prior(replace(config, drop_path=0)).logits(CODES, LABELS)
    )


# -- token corruption ------------------------------------------------------------------------------


def test_codes_are_corrupted_at_their_rate_and_uniformly() -> None:
    codes = torch.full((400, 100), 3)
    changed = corrupted(codes, 16, 0.4)
    assert (changed != codes).float().mean().item() == pytest.approx(0.4 * 15 / 16, abs=0.01)
    counts = torch.bincount(changed[changed != 3], minlength=16)[torch.arange(16) != 3]
    expected = counts.sum() / 15
    assert ((counts - expected) ** 2 / expected).sum() < 36  # 14 degrees of freedom, 0.1 %
    assert torch.equal(corrupted(codes, 16, 0.0), codes) and (codes == 3).all()
    assert torch.bincount(corrupted(codes, 16, 1.0).flatten(), minlength=16).min() > 2000


def test_corruption_is_of_inputs_in_training_and_never_of_targets() -> None:
    model = make_prior(replace(TINY, token_corruption=1.0))
    plain = make_prior(TINY)
    assert torch.equal(model(CODES, LABELS).total, plain(CODES, LABELS).total)  # evaluation
    inputs = []
    model.tok_embeddings.register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    torch.manual_seed(3)
    loss = model.train()(CODES, LABELS).total
    assert (inputs[0] == CODES[:, :-1]).float().mean() < 0.3
    # Teacher forcing with the corrupted inputs, whose logits score the true codes.
    given = torch.cat([inputs[0], CODES[:, -1:]], 1)
    logits = plain.logits(given, LABELS).log_softmax(-1)
    torch.testing.assert_close(loss, -logits.gather(-1, CODES[..., None]).mean())


# -- all at once -----------------------------------------------------------------------------------

EVERYTHING = replace(
    TINY,
    num_kv_heads=2,
    qk_norm=True,
    dropout=0.1,
    token_dropout=0.2,
    attention_dropout=0.1,
    drop_path=0.1,
    label_dropout=0.1,
    token_corruption=0.1,
    random_order=(0.5, 0.75),
)


def test_options_that_are_off_use_no_random_numbers() -> None:
    model = make_prior(TINY).train()
    state = torch.get_rng_state()
    model(CODES, LABELS)
    assert torch.equal(torch.get_rng_state(), state)


def test_everything_together_trains_compiles_saves_and_samples(tmp_path) -> None:
    model = make_prior(EVERYTHING).train()
    model.set_progress(0.6)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.manual_seed(4)
    expected = model(CODES, LABELS).total
    torch.manual_seed(4)
    torch.testing.assert_close(compiled(CODES, LABELS).total, expected)
    expected.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    loaded = NextTokenPrior.from_pretrained(model.save_pretrained(tmp_path / "prior"))
    assert loaded.config == EVERYTHING
    sampled = loaded.sample(LABELS, temperature=0)
    assert torch.equal(sampled, loaded.logits(sampled, LABELS).argmax(-1))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_everything_together_runs_in_bf16(dtype) -> None:
    model = make_prior(EVERYTHING)
    exact = model(CODES, LABELS).total.item()
    if dtype is not None:
        model.to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is None):
        assert model(CODES, LABELS).total.item() == pytest.approx(exact, rel=3e-2)
        assert model.sample(LABELS, guidance_scale=2.0, temperature=0).shape == (4, 15)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads is 3; it must divide num_heads 4"),
        ({"num_kv_heads": -1}, "num_kv_heads is -1"),
        ({"num_kv_heads": 8}, "num_kv_heads is 8"),
        ({"token_dropout": 1.0}, "token_dropout is 1.0"),
        ({"attention_dropout": -0.1}, "attention_dropout is -0.1"),
        ({"drop_path": 1.0}, "drop_path is 1.0"),
        ({"token_corruption": 1.1}, "token_corruption is 1.1"),
        ({"num_classes": 0}, "num_classes is 0"),
    ],
)
def test_impossible_configs_are_refused(changes, message: str) -> None:
    with pytest.raises(SmaltiError, match=message):
        replace(TINY, **changes)


@pytest.mark.parametrize("kv_heads", [0, 2])
def test_a_step_has_the_bits_of_the_block_and_respects_hooks(kv_heads: int) -> None:
    """Also with weights of w1 and w3 read by one product, but for rounding."""
    model = make_prior(replace(TINY, num_kv_heads=kv_heads, hidden=80)).eval()
    block, calls = model.layers[0], []
    x, rope_freqs = torch.randn(3, 5, 32), model.rope_freqs(torch.device("cpu"))

    def run(one_token) -> torch.Tensor:
        cache = KeyValueCache(1, 3, kv_heads or 4, 5, 8, like=x).layers[0]
        block(x[:, :4], rope_freqs[:4], None, cache)
        return one_token(x[:, 4:], rope_freqs[4:5], None, cache)

    with torch.no_grad():
        expected = run(block)
        assert isinstance(BlockStep.of(block), BlockStep)
        assert torch.equal(run(BlockStep.of(block)), expected)
        model.arrange_for_sampling()
        torch.testing.assert_close(run(BlockStep.of(block)), expected)
        hook = block.attention.wo.register_forward_hook(lambda *_: calls.append(1))
        run(BlockStep.of(block))
        assert len(calls) == 2  # of the block's pass, too
        hook.remove()
        block.ffn_norm.register_forward_hook(lambda *_: None)
    assert BlockStep.of(block) is block
