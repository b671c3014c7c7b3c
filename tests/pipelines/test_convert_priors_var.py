"""VAR's published priors: the original logits and greedy codes, from the names of tensors alone.

The reference is plain functions over a dict of tensors, written from the published key layout (VAR,
`models/var.py`, `basic_var.py`, `quant.py`); of our models only the tokenizer's weights are used.
"""

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import smalti
from smalti.errors import SmaltiError
from smalti.pipelines.convert.convert import convert, export, read_published
from smalti.pipelines.convert.source import Options
from smalti.prior.next_scale.model import NextScalePrior
from smalti.tokenizer.conv import ConvConfig
from smalti.tokenizer.quantizers.codebook import CodebookConfig
from smalti.tokenizer.quantizers.multi_scale import MultiScaleConfig
from smalti.tokenizer.quantizers.nearest import NearestConfig
from smalti.tokenizer.vq import VQConfig, VQTokenizer

State = dict[str, Tensor]
MASK = "attn_bias_for_masking"


@dataclass(frozen=True)
class Sizes:
    width: int = 32
    heads: int = 4
    depth: int = 2
    hidden: int = 128
    classes: int = 5
    vocab: int = 20
    code_dim: int = 6
    scales: tuple[int, ...] = (1, 2, 3, 4)
    convolutions: int = 2
    shared: bool = False
    l2_norm: bool = True

    @property
    def length(self) -> int:
        return sum(side * side for side in self.scales)


KINDS = {
    "own-adaln": Sizes(),
    "shared-adaln": Sizes(shared=True, depth=3),
    "unused-convolutions": Sizes(scales=(1, 2, 4), convolutions=5, depth=1),
    "plain-attention": Sizes(l2_norm=False, heads=2),
    "unlike": Sizes(width=48, heads=3, hidden=80, classes=2, scales=(2, 3, 6), convolutions=1),
}
PLAIN = KINDS["own-adaln"]


@cache
def tokenizer_of(s: Sizes) -> VQTokenizer:
    torch.manual_seed(0)
    conv = ConvConfig(8, (1, 2), num_res_blocks=1, attention_levels=(1,), z_channels=s.code_dim)
    ticks = torch.linspace(0.5 / s.convolutions, 1 - 0.5 / s.convolutions, s.convolutions)
    quantizer = MultiScaleConfig(
        codebook=CodebookConfig(s.vocab, s.code_dim, l2_normalise=False),
        scales=tuple((side, side) for side in s.scales),
        convolutions=s.convolutions,
        sharing=tuple(
            int((ticks - k / (len(s.scales) - 1)).abs().argmin()) for k in range(len(s.scales))
        ),
    )
    config = VQConfig(image_size=2 * s.scales[-1], conv=conv, quantizer=quantizer)
    tokenizer = VQTokenizer(config).eval()
    torch.nn.init.normal_(tokenizer.quantizer.codebook.weight)
    return tokenizer


def published(s: Sizes) -> State:
    g = torch.Generator().manual_seed(0)
    state: State = {}

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    def linear(name: str, out: int, into: int, gain: float = 1.0) -> None:
        state[f"{name}.weight"] = gain * randn(out, into) / into**0.5
        state[f"{name}.bias"] = 0.3 * randn(out)

    c = s.width
    state["pos_start"] = randn(1, s.scales[0] ** 2, c)
    state["pos_1LC"] = randn(1, s.length, c)
    levels = torch.cat([torch.full((side**2,), k) for k, side in enumerate(s.scales)])
    state["lvl_1L"] = levels[None]
    hidden = levels[:, None] < levels[None]
    state["attn_bias_for_masking"] = torch.where(hidden, -torch.inf, 0.0)[None, None]
    linear("word_embed", c, s.code_dim)
    state["class_emb.weight"] = randn(s.classes + 1, c)
    state["lvl_embed.weight"] = randn(len(s.scales), c)
    if s.shared:
        linear("shared_ada_lin.1", 6 * c, c, 0.5)
    for i in range(s.depth):
        block = f"blocks.{i}"
        if s.l2_norm:
            scales = 1 + randn(1, s.heads, 1, 1)
            scales[0, 0] = 5.2  # beyond ln 100, where it is held
            state[f"{block}.attn.scale_mul_1H11"] = scales
        state[f"{block}.attn.q_bias"] = 0.5 * randn(c)
        state[f"{block}.attn.v_bias"] = 0.5 * randn(c)
        state[f"{block}.attn.zero_k_bias"] = torch.zeros(c)
        state[f"{block}.attn.mat_qkv.weight"] = 2 * randn(3 * c, c) / c**0.5
        linear(f"{block}.attn.proj", c, c)
        linear(f"{block}.ffn.fc1", s.hidden, c)
        linear(f"{block}.ffn.fc2", c, s.hidden)
        if s.shared:
            state[f"{block}.ada_gss"] = 0.5 * randn(1, 1, 6, c)
        else:
            linear(f"{block}.ada_lin.1", 6 * c, c, 0.5)
    linear("head_nm.ada_lin.1", 2 * c, c, 0.5)
    linear("head", s.vocab, c, 2.0)
    return state


# -- the original forward pass --------------------------------------------------------------------


def linear(t: State, name: str, x: Tensor) -> Tensor:
    return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def norm(x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).square().mean(-1, keepdim=True)
    return (x - mean) / (variance + 1e-6).sqrt()


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def attention(t: State, s: Sizes, name: str, x: Tensor, bias: Tensor) -> Tensor:
    b, length, c = x.shape
    qkv = x @ t[f"{name}.mat_qkv.weight"].T
    qkv = qkv + torch.cat([t[f"{name}.q_bias"], torch.zeros(c), t[f"{name}.v_bias"]])
    q, k, v = qkv.view(b, length, 3, s.heads, c // s.heads).permute(2, 0, 3, 1, 4)
    scale = 0.25 / math.sqrt(c // s.heads)
    if s.l2_norm:
        q = unit(q) * t[f"{name}.scale_mul_1H11"].clamp(max=math.log(100)).exp()
        k, scale = unit(k), 1.0
    weights = (q @ k.transpose(-1, -2) * scale + bias).softmax(-1)
    return linear(t, f"{name}.proj", (weights @ v).transpose(1, 2).reshape(b, length, c))


def inputs(tokenizer: VQTokenizer, s: Sizes, codes: list[Tensor]) -> Tensor:
    """Inputs of scales 1, 2, ..., from the codes of the scales before, (B, n, code_dim)."""
    weights = tokenizer.quantizer.state_dict()
    ticks = torch.linspace(0.5 / s.convolutions, 1 - 0.5 / s.convolutions, s.convolutions)
    last, seen = s.scales[-1], [torch.empty(len(codes[0]), 0, s.code_dim)]
    total = torch.zeros(len(codes[0]), s.code_dim, last, last)
    for k, part in enumerate(codes[: len(s.scales) - 1]):
        side = s.scales[k]
        maps = weights["codebook.weight"][part].transpose(1, 2).unflatten(2, (side, side))
        maps = F.interpolate(maps, (last, last), mode="bicubic")
        i = int((ticks - k / (len(s.scales) - 1)).abs().argmin())
        kernel, bias = (weights[f"residual_convs.{i}.conv.{n}"] for n in ("weight", "bias"))
        total = total + 0.5 * maps + 0.5 * F.conv2d(maps, kernel, bias, padding=1)
        after = s.scales[k + 1]
        seen.append(F.interpolate(total, (after, after), mode="area").flatten(2).transpose(1, 2))
    return torch.cat(seen, 1)


def original(t: State, s: Sizes, tokenizer: VQTokenizer, codes: list[Tensor], labels: Tensor):
    """Logits (B, n, V) of the scales in `codes` and of the next one, if there is one."""
    told = t["class_emb.weight"][labels]
    first = told[:, None] + t["pos_start"]
    x = torch.cat([first, linear(t, "word_embed", inputs(tokenizer, s, codes))], 1)
    length = x.shape[1]
    x = x + t["lvl_embed.weight"][t["lvl_1L"][:, :length]] + t["pos_1LC"][:, :length]
    bias = t["attn_bias_for_masking"][:, :, :length, :length]
    for i in range(s.depth):
        block = f"blocks.{i}"
        if s.shared:
            parts = linear(t, "shared_ada_lin.1", silu(told)).view(-1, 1, 6, s.width)
            parts = parts + t[f"{block}.ada_gss"]
        else:
            parts = linear(t, f"{block}.ada_lin.1", silu(told)).view(-1, 1, 6, s.width)
        gamma1, gamma2, scale1, scale2, shift1, shift2 = parts.unbind(2)
        h = norm(x) * (scale1 + 1) + shift1
        x = x + attention(t, s, f"{block}.attn", h, bias) * gamma1
        h = linear(t, f"{block}.ffn.fc1", norm(x) * (scale2 + 1) + shift2)
        h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        x = x + linear(t, f"{block}.ffn.fc2", h) * gamma2
    scale, shift = linear(t, "head_nm.ada_lin.1", silu(told)).view(-1, 1, 2, s.width).unbind(2)
    return linear(t, "head", norm(x) * (scale + 1) + shift)


def greedy(t: State, s: Sizes, tokenizer: VQTokenizer, labels: Tensor, cfg: float) -> Tensor:
    """Codes (B, L); VAR's guidance grows from 0 at the first scale to cfg at the last."""
    codes: list[Tensor] = []
    null = torch.full_like(labels, s.classes)
    for k, side in enumerate(s.scales):
        shown = codes or [torch.empty(len(labels), 0, dtype=torch.int64)]
        if not codes:  # the first scale knows the class alone
            conditional, unconditional = (first_logits(t, s, c) for c in (labels, null))
        else:
            conditional = original(t, s, tokenizer, shown, labels)[:, -(side**2) :]
            unconditional = original(t, s, tokenizer, shown, null)[:, -(side**2) :]
        ratio = cfg * k / (len(s.scales) - 1)
        codes.append(((1 + ratio) * conditional - ratio * unconditional).argmax(-1))
    return torch.cat(codes, 1)


def first_logits(t: State, s: Sizes, labels: Tensor) -> Tensor:
    """The logits of a scale do not depend on later scales, so any codes will do for those."""
    side = s.scales[0]
    any_codes = [torch.zeros(len(labels), side**2, dtype=torch.int64)]
    return original(t, s, tokenizer_of(s), any_codes, labels)[:, : side**2]


# -- helpers --------------------------------------------------------------------------------------


def close(found: Tensor, expected: Tensor) -> None:
    """Within 2e-4, relative to the largest number."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 2e-4 * expected.abs().max()


def options(s: Sizes, **more) -> Options:
    return Options(tokenizer=tokenizer_of(s), heads=None if s.l2_norm else s.heads, **more)


def read(content: object, folder: Path, given: Options) -> NextScalePrior:
    torch.save(content, folder / "published.pth")
    pipe, _ = read_published("var-prior", folder / "published.pth", given)
    assert isinstance(pipe, smalti.Pipeline) and isinstance(pipe.prior, NextScalePrior)
    return pipe.prior


def refuse(content: object, folder: Path, given: Options) -> str:
    """The error message for a file that cannot be converted: one line, and nothing is written."""
    torch.save(content, folder / "published.pth")
    with pytest.raises(SmaltiError) as error:
        convert("var-prior", folder / "published.pth", folder / "out", given)
    assert "\n" not in str(error.value)
    assert [path.name for path in folder.iterdir()] == ["published.pth"]
    return str(error.value)


# -- the same numbers -----------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_priors_give_the_original_logits_and_greedy_codes(kind: str, tmp_path: Path) -> None:
    s = KINDS[kind]
    state, tokenizer = published(s), tokenizer_of(s)
    model = read(state, tmp_path, options(s))
    labels = torch.tensor([0, s.classes - 1, s.classes])  # the last is no class
    g = torch.Generator().manual_seed(1)
    codes = torch.randint(s.vocab, (3, s.length), generator=g)
    parts = list(codes.split([side**2 for side in s.scales], 1))
    close(model.logits(codes, labels), original(state, s, tokenizer, parts, labels))
    expected = greedy(state, s, tokenizer, labels[:2], cfg=1.5)
    assert expected.unique().numel() > 3
    sampled = model.sample(labels[:2], guidance_scale=2.5, temperature=0)
    assert torch.equal(sampled, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_holds_exactly_what_was_published(kind: str, tmp_path: Path) -> None:
    s = KINDS[kind]
    state = published(s)
    model = read(state, tmp_path, options(s))
    export(model, tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())
    assert all(back[name].dtype == tensor.dtype for name, tensor in state.items())
    assert read(back, tmp_path, options(s)).checksum == model.checksum


def test_checkpoints_of_the_trainer_are_opened(tmp_path: Path) -> None:
    state = published(PLAIN)
    content = {
        "epoch": 3,
        "iter": 0,
        "trainer": {
            "config": {"depth": 2},
            "var_wo_ddp": state,
            "vae_local": {"x": state["head.bias"]},
        },
        "args": {"tblr": 1e-4},
    }
    assert read(content, tmp_path, options(PLAIN)).checksum == (
        read(state, tmp_path, options(PLAIN)).checksum
    )


def test_a_pipeline_is_written_with_the_quantizer_in_its_prior(tmp_path: Path) -> None:
    s = Sizes(classes=1000)
    torch.save(published(s), tmp_path / "var.pth")
    lines = convert("var-prior", tmp_path / "var.pth", tmp_path / "out", options(s))
    assert any(line.strip() == "heads: 4" for line in lines)
    assert any(line.startswith("4 buffers checked: attn_bias") for line in lines)
    pipe = smalti.Pipeline.from_pretrained(tmp_path / "out")
    assert pipe.prior.tokenizer_fingerprint == tokenizer_of(s).fingerprint
    assert pipe(["goldfish", 7], temperature=0, output_type="pt").images.shape == (2, 3, 8, 8)


# -- buffers --------------------------------------------------------------------------------------


def changed(name: str, place: tuple[int, ...], value: float) -> Tensor:
    tensor = published(PLAIN)[name].clone()
    tensor[place] = value
    return tensor


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("lvl_1L", torch.zeros(1, 25, dtype=torch.int64), "the prior has the scales 5, the token"),
        ("lvl_1L", changed("lvl_1L", (0, 0), 1), "does not number the codes of square grids"),
        ("lvl_1L", changed("lvl_1L", (0, 29), 9), "does not number the codes of square grids"),
        ("attn_bias_for_masking", changed("attn_bias_for_masking", (0, 0, 0, 5), 0.0), "1 of 900"),
        ("attn_bias_for_masking", torch.zeros(1, 1, 29, 29), "has shape (1, 1, 29, 29)"),
        ("blocks.1.attn.zero_k_bias", changed("blocks.1.attn.zero_k_bias", (3,), 1e-4), "1 of 32"),
    ],
)
def test_wrong_buffers_are_refused(name: str, value: Tensor, words: str, tmp_path: Path) -> None:
    assert words in refuse(published(PLAIN) | {name: value}, tmp_path, options(PLAIN))


def test_files_without_buffers_are_read(tmp_path: Path) -> None:
    state = published(PLAIN)
    bare = {n: t for n, t in state.items() if "zero_k" not in n and n not in ("lvl_1L", MASK)}
    expected = read(state, tmp_path, options(PLAIN)).checksum
    assert read(bare, tmp_path, options(PLAIN)).checksum == expected
    assert read(bare, tmp_path, options(PLAIN, scales=PLAIN.scales)).checksum == expected
    said = refuse(bare, tmp_path, options(PLAIN, scales=(1, 2, 4)))
    assert "the prior has the scales 1, 2, 4, the tokenizer 1, 2, 3, 4" in said


# -- faults ---------------------------------------------------------------------------------------


def test_a_tokenizer_is_needed(tmp_path: Path) -> None:
    assert "give its folder with --tokenizer" in refuse(published(PLAIN), tmp_path, Options())


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (Sizes(scales=(1, 2, 4)), "the prior has the scales 1, 2, 3, 4, the tokenizer 1, 2, 4"),
        (Sizes(vocab=21), "has 20 codes of 6 numbers, the tokenizer has 21 of 6"),
        (Sizes(code_dim=5), "has 20 codes of 6 numbers, the tokenizer has 20 of 5"),
    ],
)
def test_tokenizers_of_other_priors_are_refused(other: Sizes, words: str, tmp_path: Path) -> None:
    given = Options(tokenizer=tokenizer_of(other))
    assert words in refuse(published(PLAIN), tmp_path, given)
    if "scales" in words:
        bare = {n: t for n, t in published(PLAIN).items() if n not in ("lvl_1L", MASK)}
        said = refuse(bare, tmp_path, given)
        assert "has 30 codes in 4 scales, the tokenizer 21 in 3, 1, 2, 4" in said


def test_a_tokenizer_with_one_scale_is_refused(tmp_path: Path) -> None:
    conv = ConvConfig(8, (1, 2), num_res_blocks=1, attention_levels=(1,), z_channels=6)
    quantizer = NearestConfig(codebook=CodebookConfig(20, 6))
    tokenizer = VQTokenizer(VQConfig(image_size=8, conv=conv, quantizer=quantizer))
    said = refuse(published(PLAIN), tmp_path, Options(tokenizer=tokenizer))
    assert "a VAR prior needs codes of several scales" in said


def test_flags_that_contradict_the_file_are_refused(tmp_path: Path) -> None:
    given = Options(tokenizer=tokenizer_of(PLAIN), heads=2)
    assert "--heads is 2, but the file has 4" in refuse(published(PLAIN), tmp_path, given)
    said = refuse(published(PLAIN), tmp_path, options(PLAIN, scales=(1, 2, 4)))
    assert "--scales is 1, 2, 4, but lvl_1L in the file has 1, 2, 3, 4" in said
    plain = KINDS["plain-attention"]
    given = Options(tokenizer=tokenizer_of(plain), heads=5)
    assert "--heads is 5, which does not divide width 32" in refuse(
        published(plain), tmp_path, given
    )


@pytest.mark.parametrize("kind", ["own-adaln", "shared-adaln"])
def test_every_missing_tensor_is_named(kind: str, tmp_path: Path) -> None:
    s = KINDS[kind]
    state = published(s)
    for name in list(state)[::3]:
        if name not in ("lvl_1L", MASK) and "zero_k" not in name:
            rest = {other: tensor for other, tensor in state.items() if other != name}
            assert f"lacks the tensor {name}" in refuse(rest, tmp_path, options(s))


def test_every_misshaped_tensor_is_refused(tmp_path: Path) -> None:
    state = published(PLAIN)
    for number, (name, tensor) in enumerate(state.items()):
        if "zero_k" not in name:
            wrong = (tensor[..., :-1], tensor[None], tensor.bool())[number % 3]
            assert refuse(state | {name: wrong}, tmp_path, options(PLAIN))


def test_surplus_tensors_and_other_models_are_refused(tmp_path: Path) -> None:
    extra = {"blocks.0.attn.k_bias": torch.ones(32)}
    said = refuse(published(PLAIN) | extra, tmp_path, options(PLAIN))
    assert "blocks.0.attn.k_bias that no VAR prior" in said
    with pytest.raises(SmaltiError, match=r"is no DiT: it looks like var-prior"):
        read_published("dit", tmp_path / "published.pth")
