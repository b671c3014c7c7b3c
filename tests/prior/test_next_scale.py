"""The next-scale prior: VAR written out, block causality, cached decoding, guidance, training."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from chance import generators
from tiny_next_scale import (
    CODES,
    LABELS,
    LENGTH,
    LENGTHS,
    QUANTIZER,
    SCALES,
    STARTS,
    TINY,
    make_prior,
    make_quantizer,
)
from torch import Tensor

from smalti.data.latents import CodeSpec, ContinuousSpec
from smalti.errors import SmaltiError
from smalti.prior.next_scale.decoding import ScaleDecoder
from smalti.prior.next_scale.model import (
    PRESETS,
    NextScaleConfig,
    NextScalePrior,
    block_causal_mask,
)
from smalti.prior.next_scale.teacher_forcing import noisy_context, true_context
from smalti.prior.sampling import SamplingOptions, filtered
from smalti.tokenizer.quantizers.codebook import CodebookConfig
from smalti.tokenizer.quantizers.multi_scale import MultiScaleConfig, MultiScaleQuantizer
from smalti.tokenizer.quantizers.nearest import NearestConfig, NearestQuantizer


@pytest.fixture
def model() -> NextScalePrior:
    return make_prior()


# -- the network ---------------------------------------------------------------------------------

SCALES_512 = tuple((s, s) for s in (1, 2, 3, 4, 6, 9, 13, 18, 24, 32))


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("var-d16", 310_283_520),
        ("var-d20", 600_917_136),
        ("var-d24", 1_033_399_360),
        ("var-d30", 2_010_020_356),
        ("var-d36", 2_353_893_904),  # at 512 px, with shared adaptive norms
    ],
)
def test_published_sizes(name: str, count: int) -> None:
    config = PRESETS[name]
    if name == "var-d36":
        quantizer = MultiScaleConfig(scales=SCALES_512)
        config = config.fitted(CodeSpec(4096, SCALES_512), 1000, None, quantizer)
    with torch.device("meta"):
        model = NextScalePrior(config)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


def test_names_are_those_of_the_published_weights() -> None:
    own = {name for name in NextScalePrior(TINY).state_dict() if not name.startswith("quantizer.")}
    block = {
        *("ada_lin.1.weight", "ada_lin.1.bias", "attn.scale_mul_1H11", "attn.q_bias"),
        *("attn.v_bias", "attn.mat_qkv.weight", "attn.proj.weight", "attn.proj.bias"),
        *("ffn.fc1.weight", "ffn.fc1.bias", "ffn.fc2.weight", "ffn.fc2.bias"),
    }
    assert own == {f"blocks.{i}.{name}" for i in range(2) for name in block} | {
        *("pos_start", "pos_1LC", "lvl_embed.weight", "class_emb.weight"),
        *("word_embed.weight", "word_embed.bias", "head.weight", "head.bias"),
        *("head_nm.ada_lin.1.weight", "head_nm.ada_lin.1.bias"),
    }
    shared = NextScalePrior(replace(TINY, shared_adaln=True, qk_l2_norm=False)).state_dict()
    assert shared["blocks.1.ada_gss"].shape == (1, 1, 6, 16)
    assert shared["shared_ada_lin.1.weight"].shape == (96, 16)
    assert not any(name.endswith("scale_mul_1H11") for name in shared)


def plain_logits(model: NextScalePrior, codes: Tensor, label: int) -> Tensor:
    """VAR's forward pass for one sequence of codes (L,), written out: (L, V)."""
    config, w = model.config, model.state_dict()
    width, heads = config.width, config.num_heads

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        mean, var = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
        return (x - mean) / (var + 1e-6).sqrt() * (1 + scale) + shift

    # Inputs: class token, then area-downsampled sums of the contributions of the scales before.
    condition = w["class_emb.weight"][label]
    activated = condition * condition.sigmoid()
    total, inputs = torch.zeros(1, 4, 2, 3), [condition + w["pos_start"][0]]
    for k, (h, b) in enumerate(SCALES[:-1]):
        vectors = w["quantizer.codebook.weight"][codes[STARTS[k] : STARTS[k] + LENGTHS[k]]]
        up = F.interpolate(vectors.T.reshape(1, 4, h, b), (2, 3), mode="bicubic")
        at = f"quantizer.residual_convs.{k * 2 // 4}.conv"
        total = total + 0.5 * up + 0.5 * F.conv2d(up, w[f"{at}.weight"], w[f"{at}.bias"], padding=1)
        small = total if k == 2 else F.interpolate(total, SCALES[k + 1], mode="area")
        inputs.append(linear(small.flatten(2)[0].T, "word_embed"))
    scale_of = [k for k, n in enumerate(LENGTHS) for _ in range(n)]
    x = torch.cat(inputs) + w["pos_1LC"][0] + w["lvl_embed.weight"][scale_of]

    for i in range(config.depth):
        at = f"blocks.{i}"
        if config.shared_adaln:
            six = linear(activated, "shared_ada_lin.1").view(6, width) + w[f"{at}.ada_gss"][0, 0]
        else:
            six = linear(activated, f"{at}.ada_lin.1").view(6, width)
        gate1, gate2, scale1, scale2, shift1, shift2 = six
        h = norm(x, scale1, shift1)
        q_rows, k_rows, v_rows = w[f"{at}.attn.mat_qkv.weight"].chunk(3)
        q = (h @ q_rows.T + w[f"{at}.attn.q_bias"]).view(LENGTH, heads, -1)
        k = (h @ k_rows.T).view(LENGTH, heads, -1)
        v = (h @ v_rows.T + w[f"{at}.attn.v_bias"]).view(LENGTH, heads, -1)
        if config.qk_l2_norm:
            factor = w[f"{at}.attn.scale_mul_1H11"].flatten().clamp(max=math.log(100)).exp()
            q = q / q.norm(dim=-1, keepdim=True) * factor[:, None]
            k = k / k.norm(dim=-1, keepdim=True)
        else:
            q = q * 0.25 / math.sqrt(width / heads)
        attended = torch.zeros(LENGTH, heads, width // heads)
        for t in range(LENGTH):
            seen = [s for s in range(LENGTH) if scale_of[s] <= scale_of[t]]
            shares = torch.einsum("hd,shd->hs", q[t], k[seen]).softmax(-1)
            attended[t] = torch.einsum("hs,shd->hd", shares, v[seen])
        x = x + linear(attended.flatten(1), f"{at}.attn.proj") * gate1
        h = linear(norm(x, scale2, shift2), f"{at}.ffn.fc1")
        h = 0.5 * h * (1 + (math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)).tanh())
        x = x + linear(h, f"{at}.ffn.fc2") * gate2
    scale, shift = linear(activated, "head_nm.ada_lin.1").view(2, width)
    return linear(norm(x, scale, shift), "head")


@pytest.mark.parametrize("changes", [{}, {"shared_adaln": True}, {"qk_l2_norm": False}])
def test_logits_are_those_of_a_plain_var(changes) -> None:
    model = make_prior(replace(TINY, **changes))
    if not changes:
        model.blocks[0].attn.scale_mul_1H11.data[0, 0] = 9.0  # more than ln 100
    with torch.no_grad():
        logits = model.logits(CODES, LABELS)
        for row in range(4):
            expected = plain_logits(model, CODES[row], int(LABELS[row]))
            torch.testing.assert_close(logits[row], expected, rtol=5e-4, atol=5e-5)


def test_the_mask_shows_own_and_coarser_scales() -> None:
    mask = block_causal_mask(((1, 1), (1, 2), (1, 3)), torch.device("cpu"))
    rows = ["100000", "111000", "111000", "111111", "111111", "111111"]
    assert mask.tolist() == [[c == "1" for c in row] for row in rows]


@pytest.mark.parametrize("scale", [0, 1, 2, 3])
def test_a_code_changes_no_logits_of_its_own_or_earlier_scales(model, scale: int) -> None:
    changed, later = CODES.clone(), STARTS[scale] + LENGTHS[scale]
    changed[:, STARTS[scale]] = (changed[:, STARTS[scale]] + 1) % 16
    before, after = model.logits(CODES, LABELS), model.logits(changed, LABELS)
    assert torch.equal(before[:, :later], after[:, :later])
    if scale < 3:
        for k in range(scale + 1, 4):
            part = slice(STARTS[k], STARTS[k] + LENGTHS[k])
            assert not torch.allclose(before[:, part], after[:, part])


def test_a_first_scale_of_several_codes() -> None:
    scales = ((1, 2), (2, 3))
    config = replace(TINY, spec=CodeSpec(16, scales), quantizer=replace(QUANTIZER, scales=scales))
    model = make_prior(config)
    sampled = model.sample(LABELS, temperature=0)
    assert sampled.shape == (4, 8) and torch.equal(
        sampled, model.logits(sampled, LABELS).argmax(-1)
    )


# -- training --------------------------------------------------------------------------------------


def test_a_new_model_begins_near_the_log_of_the_vocabulary_and_near_the_identity() -> None:
    model = NextScalePrior(TINY).eval()
    model.bind(make_quantizer())
    assert model(CODES, LABELS).total.item() == pytest.approx(math.log(16), abs=0.02)
    tokens = torch.randn(4, LENGTH, 16)
    modulation = model.modulation(model.class_emb(LABELS))
    changed = model.transform(tokens, modulation, None, None)
    assert 0 < (changed - tokens).abs().max() < 0.01


def test_the_loss_is_the_cross_entropy_and_reaches_every_weight_but_the_quantizers(model) -> None:
    loss, logits = model(CODES, LABELS), model.logits(CODES, LABELS)
    picked = logits.log_softmax(-1).gather(-1, CODES[..., None])
    torch.testing.assert_close(loss.total, -picked.mean())
    assert loss.parts["accuracy"] == (logits.argmax(-1) == CODES).float().mean()
    loss.total.backward()
    for name, parameter in model.named_parameters():
        if name.startswith("quantizer."):
            assert not parameter.requires_grad and parameter.grad is None
        else:
            assert parameter.grad is not None and parameter.grad.any(), name


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_the_objective_compiles_into_one_graph(noise: float) -> None:
    model = make_prior(replace(TINY, context_noise=noise, label_dropout=0.0)).train()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.manual_seed(4)
    expected = model(CODES, LABELS).total
    torch.manual_seed(4)
    torch.testing.assert_close(compiled(CODES, LABELS).total, expected)


def test_drop_path_rates_grow_linearly_over_the_blocks() -> None:
    rates = [b.drop_path.probability for b in NextScalePrior(replace(TINY, drop_path=0.2)).blocks]
    assert rates == [0.0, pytest.approx(0.2)]


def test_a_context_without_noise_is_the_true_one(model) -> None:
    true, same = true_context(model.quantizer, CODES), noisy_context(model.quantizer, CODES, 0.0)
    assert torch.equal(true.targets, CODES) and torch.equal(same.targets, CODES)
    torch.testing.assert_close(same.inputs, true.inputs)


def test_a_noisy_context_is_its_definition(model) -> None:
    """Inputs follow codes some of which are random; targets correct the error."""
    torch.manual_seed(7)
    context = noisy_context(model.quantizer, CODES, 0.9)
    torch.manual_seed(7)
    share, inputs, targets = torch.rand(4, 1) * 0.9, [], []
    true = shown = torch.zeros(4, 4, 2, 3)
    for k, (h, w) in enumerate(SCALES):
        part = CODES[:, STARTS[k] : STARTS[k] + LENGTHS[k]]
        vectors = model.quantizer.codebook.vectors[part]
        missing = F.interpolate(true - shown, (h, w), mode="area").flatten(2).mT
        distance = torch.cdist(vectors + missing, model.quantizer.codebook.vectors)
        targets.append(distance.argmin(-1))
        wrong = torch.rand(part.shape) < share
        given = torch.where(wrong, torch.randint_like(part, 16), targets[-1])
        true = true + model.quantizer.contribution(part, k)
        shown = shown + model.quantizer.contribution(given, k)
        if k < 3:
            small = F.interpolate(shown, SCALES[k + 1], mode="area") if k < 2 else shown
            inputs.append(small.flatten(2).mT)
    torch.testing.assert_close(context.inputs, torch.cat(inputs, 1))
    assert torch.equal(context.targets, torch.cat(targets, 1))
    assert torch.equal(context.targets[:, :1], CODES[:, :1])
    assert not torch.equal(context.targets, CODES)


def test_context_noise_is_for_training_only() -> None:
    noisy, plain = make_prior(replace(TINY, context_noise=0.9, label_dropout=0.0)), make_prior()
    assert torch.equal(noisy(CODES, LABELS).total, plain(CODES, LABELS).total)
    assert not torch.allclose(noisy.train()(CODES, LABELS).total, plain(CODES, LABELS).total)


def test_autocast_changes_little_and_the_loss_stays_fp32(model) -> None:
    exact = model(CODES, LABELS).total
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(CODES, LABELS).total
        sampled = model.sample(LABELS, guidance_scale=2.0)
    assert rough.dtype == torch.float32 and sampled.shape == (4, LENGTH)
    assert rough.item() == pytest.approx(exact.item(), rel=2e-2)


def test_a_bf16_model_keeps_its_quantizer_in_fp32(model) -> None:
    exact, inputs = model(CODES, LABELS).total.item(), model.quantizer.next_scale_inputs(CODES)
    model.to(torch.bfloat16)
    assert model.head.weight.dtype == torch.bfloat16
    assert torch.equal(model.quantizer.next_scale_inputs(CODES), inputs)
    assert model(CODES, LABELS).total.item() == pytest.approx(exact, rel=3e-2)
    assert model.sample(LABELS, temperature=0, guidance_scale=2.0).shape == (4, LENGTH)


# -- sampling --------------------------------------------------------------------------------------


def test_cached_and_teacher_forced_logits_agree_at_every_scale(model) -> None:
    with torch.no_grad():
        expected = model.logits(CODES, LABELS)
        decoder = ScaleDecoder(model, LABELS, model.null(LABELS), SamplingOptions())
        for k, part in enumerate(CODES.split(LENGTHS, 1)):
            logits = decoder.logits(decoder.hidden(k), k)
            forced = expected[:, STARTS[k] : STARTS[k] + LENGTHS[k]]
            torch.testing.assert_close(logits, forced, rtol=1e-4, atol=1e-5)
            decoder.append(model.quantizer.contribution(part, k), k)


def test_decoding_has_the_inputs_of_teacher_forcing(model) -> None:
    inputs = []
    handle = model.word_embed.register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    sampled = model.sample(LABELS, generator=generators(1, 2, 3, 4))
    handle.remove()
    torch.testing.assert_close(torch.cat(inputs, 1), model.quantizer.next_scale_inputs(sampled))


def test_greedy_sampling_follows_the_argmax_of_the_logits(model) -> None:
    sampled = model.sample(LABELS, temperature=0)
    assert torch.equal(sampled, model.logits(sampled, LABELS).argmax(-1))


@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_guided_greedy_sampling_follows_the_guided_logits(model, schedule: str) -> None:
    labels = LABELS[:3]
    sampled = model.sample(labels, temperature=0, guidance_scale=2.5, guidance_schedule=schedule)
    conditional = model.logits(sampled, labels)
    unconditional = model.logits(sampled, torch.full_like(labels, 3))
    scales = [1.0, 1.5, 2.0, 2.5] if schedule == "linear" else [2.5] * 4
    each = torch.tensor(scales).repeat_interleave(torch.tensor(LENGTHS))[:, None]
    guided = unconditional + each * (conditional - unconditional)
    assert torch.equal(sampled, guided.argmax(-1))
    if schedule == "linear":
        assert torch.equal(sampled, model.sample(labels, temperature=0, guidance_scale=2.5))


@pytest.mark.parametrize(("scale", "rows"), [(1.0, 4), (1.5, 8)])
def test_guidance_one_costs_no_second_pass(model, scale: float, rows: int) -> None:
    seen, projected = [], []
    model.blocks[0].register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[:2]))
    model.blocks[1].ada_lin.register_forward_pre_hook(
        lambda m, args: projected.append(len(args[0]))
    )
    model.sample(LABELS, guidance_scale=scale)
    assert seen == [(rows, n) for n in LENGTHS]  # one pass per scale, of its tokens alone
    assert projected == [rows]  # adaLN modulations: once per call


@pytest.mark.parametrize("smooth", [False, True])
def test_with_a_list_of_generators_a_sample_does_not_see_its_neighbours(model, smooth) -> None:
    options = {"smooth": smooth, "guidance_scale": 1.5}
    together = model.sample(torch.tensor([0, 1, 2]), generator=generators(5, 6, 7), **options)
    alone = model.sample(torch.tensor([1]), generator=generators(6), **options)
    other = model.sample(torch.tensor([2, 1]), generator=generators(9, 6), **options)
    assert torch.equal(together[1], alone[0]) and torch.equal(together[1], other[1])


def test_sampling_in_small_portions_changes_nothing(model, monkeypatch) -> None:
    whole = model.sample(LABELS, generator=generators(1, 2, 3, 4))
    monkeypatch.setattr("smalti.prior.next_scale.decoding.LOGITS_AT_ONCE_ON_CPU", 4 * 16 * 2)
    assert torch.equal(model.sample(LABELS, generator=generators(1, 2, 3, 4)), whole)


def test_one_generator_repeats_and_the_global_random_state_is_left_alone(model) -> None:
    state = torch.get_rng_state()
    first, second, third = (model.sample(LABELS, generator=g) for g in generators(1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, third)
    assert not torch.equal(model.sample(LABELS), model.sample(LABELS))
    assert torch.equal(torch.get_rng_state(), state)


def test_sampling_leaves_the_mode_alone_and_reports_progress(model) -> None:
    steps = []
    modes = {name: module.training for name, module in model.train().named_modules()}
    model.sample(LABELS, on_step=lambda done, total, _: steps.append((done, total)))
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert model.sample(LABELS[:0], generator=[]).shape == (0, LENGTH)


def test_a_mixture_of_codes_is_its_formula(model) -> None:
    options = SamplingOptions(temperature=0.8, top_k=6, guidance_scale=2.0)
    with torch.no_grad():
        decoder = ScaleDecoder(model, LABELS, model.null(LABELS), options)
        hidden = decoder.hidden(0)
        uniforms = torch.rand(4, 1, 16, dtype=torch.float64)
        for k, progress in ((0, 0.0), (2, 2 / 3)):
            logits = filtered(decoder.logits(hidden, k)[:, 0], options)
            noise = -torch.log(-torch.log(uniforms[:, 0]))
            tau = 0.27 * (1 - progress * 0.95)
            shares = ((logits * (1 + progress) + noise) / tau).softmax(-1)
            expected = shares.float() @ model.quantizer.codebook.vectors
            torch.testing.assert_close(decoder._mix(hidden, uniforms, k)[:, 0], expected)


def test_smooth_sampling_of_a_confident_model_is_greedy_sampling(model) -> None:
    with torch.no_grad():
        model.head.weight *= 1e5
        model.head.bias *= 1e5
    greedy = model.sample(LABELS, temperature=0)
    expected = model.quantizer.search(model.quantizer.lookup(greedy, 2, 3))
    assert torch.equal(model.sample(LABELS, smooth=True), expected)


# -- the quantizer -------------------------------------------------------------------------------


def test_a_saved_prior_needs_no_tokenizer(model, tmp_path) -> None:
    loaded = NextScalePrior.from_pretrained(model.save_pretrained(tmp_path / "prior"))
    assert loaded.config == model.config and loaded.fingerprint == model.fingerprint
    assert torch.equal(loaded.logits(CODES, LABELS), model.logits(CODES, LABELS))
    assert not any(p.requires_grad for p in loaded.quantizer.parameters())
    assert torch.equal(copy.deepcopy(loaded)(CODES, LABELS).total, model(CODES, LABELS).total)


@pytest.mark.parametrize("learning", ["ema", "simvq"])
def test_other_codebooks_are_copied_too(learning, tmp_path) -> None:
    revive = 0 if learning == "simvq" else 200
    book = replace(QUANTIZER.codebook, learning=learning, revive_after=revive)
    quantizer = MultiScaleQuantizer(replace(QUANTIZER, codebook=book))
    model = NextScalePrior(replace(TINY, quantizer=quantizer.config))
    model.bind(quantizer)
    loaded = NextScalePrior.from_pretrained(model.save_pretrained(tmp_path / "prior"))
    assert torch.equal(loaded.quantizer.lookup(CODES, 2, 3), quantizer.lookup(CODES, 2, 3))


def test_binding_copies_once(model) -> None:
    quantizer = make_quantizer()
    fresh = NextScalePrior(TINY)
    fresh.bind(quantizer)
    fresh.bind(quantizer)  # the same again
    with torch.no_grad():
        quantizer.codebook.weight += 1  # the tokenizer's own
    assert not torch.equal(fresh.quantizer.codebook.weight, quantizer.codebook.weight)
    with pytest.raises(SmaltiError, match="bound to another tokenizer's quantizer"):
        fresh.bind(quantizer)


def test_a_quantizer_that_does_not_fit_is_refused() -> None:
    fresh = NextScalePrior(TINY)
    with pytest.raises(SmaltiError, match="not to a NearestQuantizer"):
        fresh.bind(NearestQuantizer(NearestConfig(codebook=CodebookConfig(16, 4))))
    with pytest.raises(SmaltiError, match=r"convolutions 2, not 4.*tokenizer.config.quantizer"):
        fresh.bind(make_quantizer(replace(QUANTIZER, convolutions=4)))


def test_nothing_works_before_a_quantizer_is_bound(tmp_path) -> None:
    fresh = NextScalePrior(TINY)
    for call in (
        lambda: fresh(CODES, LABELS),
        lambda: fresh.logits(CODES, LABELS),
        lambda: fresh.sample(LABELS),
        lambda: fresh.save_pretrained(tmp_path / "prior"),
    ):
        with pytest.raises(SmaltiError, match=r"call bind\(tokenizer.quantizer\) first"):
            call()
    assert not (tmp_path / "prior").exists()


def test_fitting_a_preset_to_latents() -> None:
    fitted = PRESETS["var-nano"].fitted(TINY.spec, 7, "abc", QUANTIZER)
    assert (fitted.spec, fitted.num_classes, fitted.tokenizer_fingerprint) == (TINY.spec, 7, "abc")
    assert fitted.quantizer == QUANTIZER and fitted.width == PRESETS["var-nano"].width
    with pytest.raises(SmaltiError, match="use a flow prior"):
        PRESETS["var-nano"].fitted(ContinuousSpec(4, 8, 8), 7, None, QUANTIZER)
    with pytest.raises(SmaltiError, match="NearestConfig: use a next-token prior"):
        PRESETS["var-nano"].fitted(CodeSpec(4, ((2, 2),)), 7, None, NearestConfig())
    with pytest.raises(SmaltiError, match=r"the latents are .* but the quantizer makes"):
        PRESETS["var-nano"].fitted(CodeSpec(17, SCALES), 7, None, QUANTIZER)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.sample(torch.tensor([4])), "class label 4 is out of range: use 0 to 2"),
        (lambda p: p.sample(LABELS, top_p=0), "top_p is 0"),
        (lambda p: p.sample(LABELS, guidance_schedule="liner"), 'did you mean "linear"'),
        (lambda p: p.sample(LABELS, generator=generators(1)), "1 generators were given for 4"),
        (lambda p: p.sample(LABELS, smooth=True, temperature=0), "needs a temperature above 0"),
        (lambda p: p.logits(CODES[:, :5], LABELS), r"takes \(B, 13\)"),
        (lambda p: p(CODES + 10, LABELS), "prior are 0 to 15"),
    ],
)
def test_errors_are_explained(model, call, message: str) -> None:
    with pytest.raises(SmaltiError, match=message):
        call(model)


def test_sampling_from_a_damaged_model_is_refused(model) -> None:
    model.blocks[0].ffn.fc2.weight.data[0, 0] = math.nan
    for smooth in (False, True):
        with pytest.raises(SmaltiError, match="the model gives NaN"):
            model.sample(LABELS, smooth=smooth)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spec": CodeSpec(16, ((2, 3),))}, "use a next-token prior"),
        ({"spec": CodeSpec(17, SCALES)}, "give the quantizer of the tokenizer"),
        ({"width": 18, "num_heads": 4}, "width 18 does not divide into 4 heads"),
        ({"depth": 0}, "depth is 0"),
        ({"drop_path": 1.0}, "drop_path is 1.0"),
        ({"label_dropout": -0.1}, "label_dropout is -0.1"),
        ({"context_noise": 1.5}, "context_noise is 1.5"),
        ({"mlp_ratio": 0.0}, "mlp_ratio is 0.0"),
        ({"norm_eps": math.nan}, "norm_eps nan"),
    ],
)
def test_impossible_configs_are_refused(changes, message: str) -> None:
    with pytest.raises(SmaltiError, match=message):
        replace(TINY, **changes)


@pytest.mark.slow
def test_a_tiny_prior_recovers_a_known_distribution() -> None:
    """A coarse code that depends on the class, then two fine ones that depend on it. Chi-square."""
    coarse = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]])
    left = torch.tensor([[0.1, 0.8, 0.1], [0.5, 0.0, 0.5], [0.3, 0.3, 0.4]])
    right = torch.tensor([[0.6, 0.2, 0.2], [0.3, 0.6, 0.1], [0.0, 0.2, 0.8]])
    scales = ((1, 1), (1, 2))
    quantizer = MultiScaleConfig(
        codebook=CodebookConfig(3, 4, l2_normalise=False), scales=scales, convolutions=1
    )
    config = NextScaleConfig(
        spec=CodeSpec(3, scales),
        quantizer=quantizer,
        num_classes=2,
        depth=2,
        width=32,
        num_heads=2,
        drop_path=0.0,
        label_dropout=0.0,
    )
    torch.manual_seed(0)
    model, rng = NextScalePrior(config), torch.Generator().manual_seed(0)
    model.bind(make_quantizer(quantizer))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for step in range(500):
        labels = torch.randint(2, (512,), generator=rng)
        a = torch.multinomial(coarse[labels], 1, generator=rng)
        b = torch.multinomial(left[a.flatten()], 1, generator=rng)
        c = torch.multinomial(right[a.flatten()], 1, generator=rng)
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * (1 - step / 500)
        loss = model(torch.cat([a, b, c], 1), labels).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for label in (0, 1):
        sampled = model.sample(torch.full((8000,), label), generator=rng)
        counts = torch.bincount(sampled @ torch.tensor([9, 3, 1]), minlength=27).double()
        joint = coarse[label][:, None, None] * left[:, :, None] * right[:, None, :]
        expected = 8000 * joint.flatten().double()
        assert counts[expected == 0].sum() <= 16
        likely = expected > 0
        chi_square = ((counts - expected).square() / expected)[likely].sum()
        freedom = int(likely.sum()) - 1  # 20; the model is itself an estimate
        assert chi_square < freedom + 6 * math.sqrt(2 * freedom)
