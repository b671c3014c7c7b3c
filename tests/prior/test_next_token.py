"""The next-token prior: published sizes, causality, cached decoding, guidance, and training."""

import math
from dataclasses import replace

import pytest
import torch
from chance import generators, randomised

from smalti.data.latents import CodeSpec, ContinuousSpec
from smalti.errors import SmaltiError
from smalti.prior.next_token.decoding import TokenDecoder
from smalti.prior.next_token.model import PRESETS, NextTokenConfig, NextTokenPrior
from smalti.prior.sampling import SamplingOptions

CODES = torch.randint(16, (4, 64), generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2, 3])  # 3 is the null label
TINY = NextTokenConfig(
    spec=CodeSpec(16, ((3, 5),)), num_classes=3, depth=2, width=16, num_heads=2, hidden=32
)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("gpt-b", 110_888_448),
        ("gpt-l", 342_910_976),
        ("gpt-xl", 774_699_520),
        ("gpt-xxl", 1_410_972_672),
        ("gpt-1b", 1_199_616_000),
        ("gpt-3b", 3_096_659_200),
        ("gpt-xxxl", 3_893_027_840),
        ("gpt-7b", 6_614_589_440),
    ],
)
def test_published_sizes(name: str, count: int) -> None:
    with torch.device("meta"):
        model = NextTokenPrior(PRESETS[name])
    assert sum(p.numel() for p in model.parameters()) == count


def test_the_first_loss_is_the_log_of_the_vocabulary(prior) -> None:
    fresh = NextTokenPrior(prior.config).eval()
    assert fresh(CODES, LABELS).total.item() == pytest.approx(math.log(16), abs=1e-6)


def test_a_code_changes_no_earlier_logits(prior) -> None:
    changed = CODES.clone()
    changed[:, 20] = (changed[:, 20] + 1) % 16
    before, after = prior.logits(CODES, LABELS), prior.logits(changed, LABELS)
    assert torch.equal(before[:, :21], after[:, :21])
    assert not torch.allclose(before[:, 21:], after[:, 21:])


def plain_logits(model: NextTokenPrior, codes: torch.Tensor, label: int) -> torch.Tensor:
    """LlamaGen's forward pass for one sequence of codes (L,), written out: (L, V)."""
    config, weights = model.config, model.state_dict()
    heads, head_dim = config.num_heads, config.width // config.num_heads
    columns, length = config.spec.grids[0][1], len(codes)

    def rms(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weights[name]

    def rotated(x: torch.Tensor) -> torch.Tensor:  # (L, heads, head_dim)
        out = x.clone()
        for t in range(length):
            for pair in range(head_dim // 2):
                side, i = divmod(pair, head_dim // 4)
                position = divmod(t - 1, columns)[side]
                angle = position * 10000 ** (-2 * i / (head_dim / 2))
                cos, sin = math.cos(angle), math.sin(angle)
                if t == 0:
                    cos, sin = (0, 0) if config.prefix_rotary == "zero" else (1, 0)
                even, odd = x[t, :, 2 * pair], x[t, :, 2 * pair + 1]
                out[t, :, 2 * pair] = even * cos - odd * sin
                out[t, :, 2 * pair + 1] = even * sin + odd * cos
        return out

    x = torch.cat(
        [weights["cls_embedding.weight"][label][None], weights["tok_embeddings.weight"][codes[:-1]]]
    )
    mask = torch.full((length, length), -torch.inf).triu(1)
    for i in range(config.depth):
        at = f"layers.{i}"
        qkv = rms(x, f"{at}.attention_norm.weight") @ weights[f"{at}.attention.wqkv.weight"].T
        query, key, value = qkv.view(length, 3, heads, head_dim).unbind(1)
        scores = torch.einsum("qhd,khd->hqk", rotated(query), rotated(key)) / math.sqrt(head_dim)
        attended = torch.einsum("hqk,khd->qhd", (scores + mask).softmax(-1), value).flatten(1)
        x = x + attended @ weights[f"{at}.attention.wo.weight"].T
        w1, w2, w3 = (weights[f"{at}.feed_forward.w{n}.weight"] for n in (1, 2, 3))
        h = rms(x, f"{at}.ffn_norm.weight")
        gate = h @ w1.T
        x = x + (gate * gate.sigmoid() * (h @ w3.T)) @ w2.T
    return rms(x, "norm.weight") @ weights["output.weight"].T


def make_prior(config: NextTokenConfig) -> NextTokenPrior:
    return randomised(NextTokenPrior(config), vector_mean=0.3)


@pytest.mark.parametrize("rotary", ["identity", "zero"])
def test_logits_are_those_of_a_plain_llamagen(rotary) -> None:
    model = make_prior(replace(TINY, prefix_rotary=rotary))
    with torch.no_grad():
        logits = model.logits(CODES[:, :15], LABELS)
        for row in range(4):
            expected = plain_logits(model, CODES[row, :15], int(LABELS[row]))
            torch.testing.assert_close(logits[row], expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("rotary", ["identity", "zero"])
def test_cached_and_teacher_forced_logits_agree(rotary) -> None:
    model = make_prior(replace(TINY, prefix_rotary=rotary))
    codes = CODES[:, :15]
    with torch.no_grad():
        expected = model.logits(codes, LABELS)
        decoder = TokenDecoder(model, LABELS, model.null(LABELS), SamplingOptions())
        for j in range(15):
            torch.testing.assert_close(decoder.logits(j), expected[:, j], rtol=1e-4, atol=1e-5)
            decoder.append(codes[:, j], j)


def test_greedy_sampling_follows_the_argmax_of_the_logits(prior) -> None:
    sampled = prior.sample(LABELS, temperature=0)
    assert torch.equal(sampled, prior.logits(sampled, LABELS).argmax(-1))


def test_guided_greedy_sampling_follows_the_guided_logits(prior) -> None:
    labels = LABELS[:3]
    sampled = prior.sample(labels, temperature=0, guidance_scale=2.5, guidance_schedule="linear")
    conditional = prior.logits(sampled, labels)
    unconditional = prior.logits(sampled, torch.full_like(labels, 3))
    scales = 1 + 1.5 * torch.arange(64) / 63
    guided = unconditional + scales[:, None] * (conditional - unconditional)
    assert torch.equal(sampled, guided.argmax(-1))


@pytest.mark.parametrize(("scale", "passes"), [(1.0, 64 * [4]), (1.5, [4, 4] + 63 * [8])])
def test_guidance_one_costs_no_second_pass(prior, scale: float, passes: list[int]) -> None:
    seen = []
    prior.output.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    prior.sample(LABELS, guidance_scale=scale)
    assert seen == passes


def test_with_a_list_of_generators_a_sample_does_not_see_its_neighbours(prior) -> None:
    together = prior.sample(torch.tensor([0, 1, 2]), generator=generators(5, 6, 7))
    alone = prior.sample(torch.tensor([1]), generator=generators(6))
    other = prior.sample(torch.tensor([2, 1]), generator=generators(9, 6))
    assert torch.equal(together[1], alone[0]) and torch.equal(together[1], other[1])


def test_one_generator_repeats(prior) -> None:
    first, second, third = (
        prior.sample(LABELS, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, second) and not torch.equal(first, third)


def test_sampling_leaves_the_mode_alone_and_reports_progress(prior) -> None:
    steps = []
    prior.train()
    prior.norm.eval()
    modes = {name: module.training for name, module in prior.named_modules()}
    prior.sample(LABELS, on_step=lambda done, total, _: steps.append((done, total)))
    assert modes == {name: module.training for name, module in prior.named_modules()}
    assert steps == [(j + 1, 64) for j in range(64)]


def test_sampling_in_training_mode_has_no_dropout(prior) -> None:
    expected = prior.eval().sample(LABELS, generator=generators(1, 2, 3, 4))
    assert torch.equal(prior.train().sample(LABELS, generator=generators(1, 2, 3, 4)), expected)


def test_sampling_without_a_generator_leaves_the_global_random_state_alone(prior) -> None:
    state = torch.get_rng_state()
    first, second = prior.sample(LABELS), prior.sample(LABELS)
    assert torch.equal(torch.get_rng_state(), state) and not torch.equal(first, second)


def test_the_length_one_and_no_samples_at_all() -> None:
    model = NextTokenPrior(replace(TINY, spec=CodeSpec(16, ((1, 1),)))).eval()
    assert model.logits(CODES[:, :1], LABELS).shape == (4, 1, 16)
    assert model.sample(LABELS, guidance_scale=2.0, guidance_schedule="linear").shape == (4, 1)
    assert model.sample(LABELS[:0], generator=[]).shape == (0, 1)


def test_sampling_from_a_damaged_model_is_refused(prior) -> None:
    prior.layers[0].feed_forward.w2.weight.data[0, 0] = math.nan
    with pytest.raises(SmaltiError, match="the model gives NaN"):
        prior.sample(LABELS)


def test_save_and_load(prior, tmp_path) -> None:
    fitted = NextTokenPrior(replace(TINY, tokenizer_fingerprint="abc", prefix_rotary="zero"))
    loaded = NextTokenPrior.from_pretrained(fitted.save_pretrained(tmp_path / "prior"))
    assert loaded.config == fitted.config and loaded.fingerprint == fitted.fingerprint
    assert torch.equal(
        loaded.logits(CODES[:, :15], LABELS), fitted.eval().logits(CODES[:, :15], LABELS)
    )


def test_autocast_changes_little_and_the_loss_stays_fp32(prior) -> None:
    exact = prior(CODES, LABELS).total
    with torch.autocast("cpu", torch.bfloat16):
        rough = prior(CODES, LABELS).total
        sampled = prior.sample(LABELS, guidance_scale=2.0)
    assert rough.dtype == torch.float32 and sampled.shape == (4, 64)
    assert rough.item() == pytest.approx(exact.item(), rel=1e-2)


def test_a_bf16_model_samples_and_has_a_loss(prior) -> None:
    exact = prior(CODES, LABELS).total.item()
    prior.to(torch.bfloat16)
    assert prior(CODES, LABELS).total.item() == pytest.approx(exact, rel=2e-2)
    assert prior.sample(LABELS, temperature=0).shape == (4, 64)


def test_the_loss_is_the_cross_entropy_of_the_logits_and_reaches_every_weight(prior) -> None:
    loss = prior(CODES, LABELS)
    picked = prior.logits(CODES, LABELS).log_softmax(-1).gather(-1, CODES[..., None])
    torch.testing.assert_close(loss.total, -picked.mean())
    accuracy = (prior.logits(CODES, LABELS).argmax(-1) == CODES).float().mean()
    assert loss.parts["accuracy"] == accuracy
    loss.total.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in prior.parameters())


def test_the_objective_compiles_into_one_graph(prior) -> None:
    compiled = torch.compile(prior.train(False), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(CODES, LABELS).total, prior(CODES, LABELS).total)


def test_labels_are_dropped_in_training_only(prior) -> None:
    many = torch.zeros(4000, dtype=torch.int64)
    dropped = prior.train().drop_labels(many, 0.1)
    assert 0.07 < (dropped == 3).float().mean() < 0.13
    assert torch.equal(prior.eval().drop_labels(many, 0.1), many)


def test_embeddings_attention_and_feed_forward_have_dropout_in_training_only(prior) -> None:
    block, shares = prior.layers[0], []
    for module in (prior.dropout, block.attention, block.feed_forward):
        module.register_forward_hook(
            lambda module, args, out: shares.append((out == 0).float().mean().item())
        )
    prior.eval()(CODES, LABELS)
    assert shares == [0, 0, 0]
    prior.train()(CODES, LABELS)
    assert shares[3:] == [pytest.approx(0.1, abs=0.03)] * 3


def test_fitting_a_preset_to_latents() -> None:
    spec = CodeSpec(512, ((4, 6),))
    fitted = PRESETS["gpt-nano"].fitted(spec, 7, "abc")
    assert (fitted.spec, fitted.num_classes, fitted.tokenizer_fingerprint) == (spec, 7, "abc")
    assert fitted.width == PRESETS["gpt-nano"].width
    with pytest.raises(SmaltiError, match="use a flow prior"):
        PRESETS["gpt-nano"].fitted(ContinuousSpec(4, 8, 8), 7, None)
    with pytest.raises(SmaltiError, match="use a next-scale prior"):
        PRESETS["gpt-nano"].fitted(CodeSpec(4, ((1, 1), (2, 2))), 7, None)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.sample(torch.tensor([4])), "class label 4 is out of range: use 0 to 2"),
        (lambda p: p.sample(torch.tensor([-1])), "class label -1"),
        (lambda p: p.sample(torch.tensor([0.5])), "float32"),
        (lambda p: p.sample(torch.tensor([True])), "bool"),
        (lambda p: p.sample([0, 1]), "labels are a list"),
        (lambda p: p.sample(LABELS, guidance_scale=math.nan), "guidance_scale is nan"),
        (lambda p: p.sample(LABELS, top_k=2.5), "top_k is 2.5"),
        (lambda p: p.sample(LABELS, temperature=-1), "temperature is -1"),
        (lambda p: p.sample(LABELS, temperature=float("nan")), "temperature is nan"),
        (lambda p: p.sample(LABELS, top_p=0), "top_p is 0"),
        (lambda p: p.sample(LABELS, top_k=-2), "top_k is -2"),
        (lambda p: p.sample(LABELS, guidance_schedule="liner"), 'did you mean "linear"'),
        (lambda p: p.sample(LABELS, generator=generators(1)), "1 generators were given for 4"),
        (lambda p: p.logits(CODES[:, :5], LABELS), r"takes \(B, 64\)"),
        (lambda p: p.logits(CODES.int(), LABELS), "int32"),
        (lambda p: p.logits(CODES + 10, LABELS), "prior are 0 to 15"),
    ],
)
def test_errors_are_explained(prior, call, message: str) -> None:
    with pytest.raises(SmaltiError, match=message):
        call(prior)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 18}, "each head must be a multiple of 4"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"depth": 0}, "at least 1"),
        ({"hidden": -1}, "0 or more"),
        ({"rotary_base": 0.0}, "more than 1"),
    ],
)
def test_impossible_configs_are_refused(changes, message: str) -> None:
    with pytest.raises(SmaltiError, match=message):
        replace(NextTokenConfig(), **changes)


@pytest.mark.slow
def test_a_tiny_prior_recovers_a_known_distribution() -> None:
    """Two codes: the first depends on the class, the second on the first. Chi-square of samples."""
    first = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]])
    second = torch.tensor([[0.1, 0.8, 0.1], [0.5, 0.0, 0.5], [0.3, 0.3, 0.4]])
    config = NextTokenConfig(
        spec=CodeSpec(3, ((1, 2),)),
        num_classes=2,
        depth=2,
        width=32,
        num_heads=2,
        hidden=64,
        dropout=0.0,
        label_dropout=0.0,
    )
    torch.manual_seed(0)
    model, rng = NextTokenPrior(config), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(600):
        labels = torch.randint(2, (512,), generator=rng)
        a = torch.multinomial(first[labels], 1, generator=rng)
        b = torch.multinomial(second[a.flatten()], 1, generator=rng)
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / 600)
        loss = model(torch.cat([a, b], 1), labels).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for label in (0, 1):
        sampled = model.sample(torch.full((4000,), label), generator=rng)
        counts = torch.bincount(sampled[:, 0] * 3 + sampled[:, 1], minlength=9).double()
        expected = 4000 * (first[label][:, None] * second).flatten().double()
        assert counts[expected == 0].sum() <= 8
        likely = expected > 0
        chi_square = ((counts - expected).square() / expected)[likely].sum()
        assert chi_square < 40  # 7 degrees of freedom; the model is itself an estimate
