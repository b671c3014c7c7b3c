"""LlamaGen's published priors: the original logits and greedy codes, from the names of its tensors
alone.

The reference is plain functions over a dict of tensors, written from the published key layout
(LlamaGen, `autoregressive/models/gpt.py`); no model of ours has a part in it.
"""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import smalti
from smalti.errors import SmaltiError
from smalti.pipelines.convert.convert import convert, export, read_published
from smalti.pipelines.convert.source import Options
from smalti.prior.conditions.text import TextCondition
from smalti.prior.next_token.model import NextTokenPrior
from smalti.tokenizer.conv import ConvConfig
from smalti.tokenizer.quantizers.codebook import CodebookConfig
from smalti.tokenizer.quantizers.nearest import NearestConfig
from smalti.tokenizer.vq import VQConfig, VQTokenizer

State = dict[str, Tensor]


@dataclass(frozen=True)
class Sizes:
    width: int = 32
    heads: int = 4
    kv_heads: int = 4
    depth: int = 2
    hidden: int = 48
    vocab: int = 24
    classes: int = 5
    grid: int = 4
    captions: tuple[int, int] | None = None  # (tokens, features)

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def prefix(self) -> int:
        return self.captions[0] if self.captions else 1


CLASSES = Sizes()
UNLIKE = Sizes(width=48, heads=2, kv_heads=1, depth=3, hidden=40, vocab=17, classes=2, grid=3)
CAPTIONS = Sizes(captions=(6, 10), depth=3, hidden=72)


def published(s: Sizes) -> State:
    g = torch.Generator().manual_seed(0)

    def matrix(out: int, into: int) -> Tensor:
        return torch.randn(out, into, generator=g) / into**0.5

    def gain() -> Tensor:
        return 1 + 0.3 * torch.randn(s.width, generator=g)

    state = {}
    if s.captions:
        state["cls_embedding.cap_proj.fc1.weight"] = matrix(s.width, s.captions[1])
        state["cls_embedding.cap_proj.fc2.weight"] = matrix(s.width, s.width)
        state["cls_embedding.uncond_embedding"] = torch.randn(s.captions, generator=g)
    else:
        table = torch.randn(s.classes + 1, s.width, generator=g)
        state["cls_embedding.embedding_table.weight"] = table
    state["tok_embeddings.weight"] = torch.randn(s.vocab, s.width, generator=g)
    for i in range(s.depth):
        rows = (s.heads + 2 * s.kv_heads) * s.head_dim
        state[f"layers.{i}.attention.wqkv.weight"] = 2 * matrix(rows, s.width)
        state[f"layers.{i}.attention.wo.weight"] = matrix(s.width, s.width)
        state[f"layers.{i}.feed_forward.w1.weight"] = matrix(s.hidden, s.width)
        state[f"layers.{i}.feed_forward.w3.weight"] = matrix(s.hidden, s.width)
        state[f"layers.{i}.feed_forward.w2.weight"] = matrix(s.width, s.hidden)
        state[f"layers.{i}.attention_norm.weight"] = gain()
        state[f"layers.{i}.ffn_norm.weight"] = gain()
    state["norm.weight"] = gain()
    state["output.weight"] = 2 * matrix(s.vocab, s.width)
    return state


# -- the original forward pass --------------------------------------------------------------------


def rotary(s: Sizes) -> Tensor:
    """(prefix + grid^2, head_dim / 2, 2): cosines and sines, zeros for the prefix."""
    half = s.head_dim // 2
    frequencies = 1.0 / 10000 ** (torch.arange(0, half, 2)[: half // 2].float() / half)
    angles = torch.outer(torch.arange(s.grid).float(), frequencies)  # (grid, head_dim / 4)
    rows = angles[:, None].expand(-1, s.grid, -1)
    columns = angles[None].expand(s.grid, -1, -1)
    both = torch.cat([rows, columns], -1).reshape(s.grid**2, half)
    return torch.cat([torch.zeros(s.prefix, half, 2), torch.stack([both.cos(), both.sin()], -1)])


def turn(x: Tensor, table: Tensor) -> Tensor:
    """x (B, T, heads, head_dim), table (T, head_dim / 2, 2)."""
    x0, x1 = x[..., 0::2], x[..., 1::2]
    cos, sin = table[None, :, None, :, 0], table[None, :, None, :, 1]
    return torch.stack([x0 * cos - x1 * sin, x1 * cos + x0 * sin], -1).flatten(3)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight


def original(t: State, s: Sizes, prefix: Tensor, codes: Tensor, valid: Tensor | None) -> Tensor:
    """Logits (B, n + 1, V) of codes (B, n) and the next; prefix (B, P, width); valid (B, P)."""
    x = torch.cat([prefix, t["tok_embeddings.weight"][codes]], 1)
    b, length = x.shape[:2]
    table = rotary(s)[:length]
    seen = torch.ones(length, length).tril().expand(b, -1, -1).clone()
    if valid is not None:
        seen[:, :, : s.prefix] *= valid[:, None].float()
        eye = torch.eye(length)
        seen = seen * (1 - eye) + eye
    for i in range(s.depth):
        h = norm(x, t[f"layers.{i}.attention_norm.weight"])
        kv = s.kv_heads * s.head_dim
        qkv = h @ t[f"layers.{i}.attention.wqkv.weight"].T
        q, k, v = qkv.split([s.width, kv, kv], -1)
        q = turn(q.view(b, length, s.heads, -1), table)
        k = turn(k.view(b, length, s.kv_heads, -1), table)
        repeats = s.heads // s.kv_heads
        k = k.repeat_interleave(repeats, 2)
        v = v.view(b, length, s.kv_heads, -1).repeat_interleave(repeats, 2)
        scores = torch.einsum("bihd,bjhd->bhij", q, k) * s.head_dim**-0.5
        weights = scores.masked_fill(seen[:, None] == 0, -torch.inf).softmax(-1)
        mixed = torch.einsum("bhij,bjhd->bihd", weights, v).reshape(b, length, s.width)
        x = x + mixed @ t[f"layers.{i}.attention.wo.weight"].T
        h = norm(x, t[f"layers.{i}.ffn_norm.weight"])
        gate = F.silu(h @ t[f"layers.{i}.feed_forward.w1.weight"].T)
        up = h @ t[f"layers.{i}.feed_forward.w3.weight"].T
        x = x + (gate * up) @ t[f"layers.{i}.feed_forward.w2.weight"].T
    return (norm(x, t["norm.weight"]) @ t["output.weight"].T)[:, s.prefix - 1 :]


def caption_tokens(t: State, features: Tensor) -> Tensor:
    hidden = F.gelu(features @ t["cls_embedding.cap_proj.fc1.weight"].T, approximate="tanh")
    return hidden @ t["cls_embedding.cap_proj.fc2.weight"].T


def greedy(t: State, s: Sizes, told: Tensor, null: Tensor, valid: Tensor | None, scale: float):
    """Codes (B, L) with guidance, without any cache."""
    codes = torch.empty(len(told), 0, dtype=torch.int64)
    for _ in range(s.grid**2):
        conditional = original(t, s, told, codes, valid)[:, -1]
        unconditional = original(t, s, null, codes, valid)[:, -1]
        best = (unconditional + scale * (conditional - unconditional)).argmax(-1)
        codes = torch.cat([codes, best[:, None]], 1)
    return codes


# -- helpers --------------------------------------------------------------------------------------


def close(found: Tensor, expected: Tensor) -> None:
    """Within 2e-4, relative to the largest number."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 2e-4 * expected.abs().max()


def options(s: Sizes, **more) -> Options:
    return Options(heads=s.heads, scales=(s.grid,), **more)


def read(content: object, folder: Path, given: Options | None = None) -> NextTokenPrior:
    torch.save(content, folder / "published.pt")
    model, _ = read_published("llamagen-prior", folder / "published.pt", given)
    assert isinstance(model, NextTokenPrior)
    return model


def refuse(content: object, folder: Path, given: Options) -> str:
    """The error message for a file that cannot be converted: one line, and nothing is written."""
    torch.save(content, folder / "published.pt")
    with pytest.raises(SmaltiError) as error:
        convert("llamagen-prior", folder / "published.pt", folder / "out", given)
    assert "\n" not in str(error.value)
    assert [path.name for path in folder.iterdir()] == ["published.pt"]
    return str(error.value)


def vq_tokenizer(vocab: int = CLASSES.vocab, side: int = CLASSES.grid) -> VQTokenizer:
    conv = ConvConfig(8, (1, 2), num_res_blocks=1, attention_levels=(1,), z_channels=8)
    quantizer = NearestConfig(codebook=CodebookConfig(vocab, 4))
    return VQTokenizer(VQConfig(image_size=2 * side, conv=conv, quantizer=quantizer)).eval()


# -- the same numbers -----------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("s", [CLASSES, UNLIKE], ids=["plain", "grouped-queries"])
def test_class_priors_give_the_original_logits_and_greedy_codes(s: Sizes, tmp_path: Path) -> None:
    state = published(s)
    model = read(state, tmp_path, options(s))
    labels = torch.tensor([0, s.classes - 1, s.classes])  # the last is no class
    table = state["cls_embedding.embedding_table.weight"]
    g = torch.Generator().manual_seed(1)
    codes = torch.randint(s.vocab, (3, s.grid**2), generator=g)
    close(model.logits(codes, labels), original(state, s, table[labels, None], codes[:, :-1], None))
    told, null = table[labels[:2], None], table[[-1, -1], None]
    expected = greedy(state, s, told, null, None, scale=1.7)
    assert expected.unique().numel() > 3
    sampled = model.sample(labels[:2], guidance_scale=1.7, temperature=0)
    assert torch.equal(sampled, expected)


@torch.no_grad()
def test_caption_priors_give_the_original_logits_and_greedy_codes(tmp_path: Path) -> None:
    s = CAPTIONS
    assert s.captions is not None
    state = published(s)
    model = read({"model": state}, tmp_path, options(s))
    assert model.config.condition == "text" and model.num_classes == 0
    g = torch.Generator().manual_seed(1)
    features = torch.randn(3, *s.captions, generator=g)
    valid = torch.arange(s.prefix) >= torch.tensor([[0], [2], [5]])  # padding on the left
    codes = torch.randint(s.vocab, (3, s.grid**2), generator=g)
    told = caption_tokens(state, features * valid[..., None])
    null = caption_tokens(state, state["cls_embedding.uncond_embedding"].expand(3, -1, -1))
    condition = TextCondition(features, valid)
    close(model.logits(codes, condition), original(state, s, told, codes[:, :-1], valid))
    expected = greedy(state, s, told, null, valid, scale=2.5)
    sampled = model.sample(condition, guidance_scale=2.5, temperature=0)
    assert torch.equal(sampled, expected)


@pytest.mark.parametrize("s", [CLASSES, UNLIKE, CAPTIONS], ids=["plain", "grouped", "captions"])
def test_an_export_holds_exactly_what_was_published(s: Sizes, tmp_path: Path) -> None:
    state = published(s)
    model = read(state, tmp_path, options(s))
    lines = export(model, tmp_path / "back.pt")
    assert lines[1].endswith(f"FOLDER --heads {s.heads} --scales {s.grid}")
    back = torch.load(tmp_path / "back.pt", weights_only=True)["model"]
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())
    again = read({"model": back}, tmp_path, options(s))
    assert again.checksum == model.checksum


# -- what shapes do not tell ----------------------------------------------------------------------


def test_heads_and_grid_have_the_published_defaults(tmp_path: Path) -> None:
    s = Sizes(width=128, heads=2, kv_heads=2, depth=1)
    config = read(published(s), tmp_path).config
    assert (config.num_heads, config.spec.grids) == (2, ((16, 16),))
    assert "give the number of heads with --heads" in refuse(
        published(CLASSES), tmp_path, Options()
    )


def test_the_published_sizes_with_wide_heads_are_known(tmp_path: Path) -> None:
    from smalti.pipelines.convert.llamagen import PUBLISHED_HEADS
    from smalti.pipelines.convert.source import head_count
    from smalti.prior.next_token.model import PRESETS

    for config in PRESETS.values():
        if config.width >= 768:
            assert head_count(Options(), config.width, PUBLISHED_HEADS)[0] == config.num_heads


@pytest.mark.parametrize("wrapper", ["model", "module", "ema", "state_dict"])
def test_every_wrapper_is_opened(wrapper: str, tmp_path: Path) -> None:
    state = published(CLASSES)
    content = {wrapper: state, "steps": 7, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}}
    assert read(content, tmp_path, options(CLASSES)).checksum == (
        read(state, tmp_path, options(CLASSES)).checksum
    )


def test_the_weights_are_taken_that_the_authors_sampler_takes(tmp_path: Path) -> None:
    state = published(CLASSES)
    other = {name: tensor + 1 for name, tensor in state.items()}
    for taken, beside in (("model", "module"), ("module", "state_dict"), ("state_dict", "ema")):
        torch.save({beside: other, taken: state}, tmp_path / "both.pt")
        model, lines = read_published("llamagen-prior", tmp_path / "both.pt", options(CLASSES))
        assert torch.equal(model.state_dict()["norm.weight"], state["norm.weight"])
        assert lines[0].endswith(f'(its "{taken}"; not used: "{beside}")')


def test_names_of_compiled_and_wrapped_models_are_understood(tmp_path: Path) -> None:
    state = published(CLASSES)
    content = {"model": {f"module._orig_mod.{name}": t for name, t in state.items()}}
    assert read(content, tmp_path, options(CLASSES)).checksum == (
        read(state, tmp_path, options(CLASSES)).checksum
    )


def test_half_precision_weights_are_read_as_they_are(tmp_path: Path) -> None:
    state = {name: tensor.bfloat16() for name, tensor in published(CLASSES).items()}
    state["freqs_cis"] = rotary(CLASSES).bfloat16()
    model = read(state, tmp_path, options(CLASSES))
    assert torch.equal(model.output.weight.data, state["output.weight"].float())


# -- with a tokenizer -----------------------------------------------------------------------------


def test_prior_and_tokenizer_become_a_pipeline(tmp_path: Path) -> None:
    s, tokenizer = Sizes(classes=1000), vq_tokenizer()
    torch.save({"model": published(s)}, tmp_path / "c2i.pt")
    given = Options(heads=s.heads, tokenizer=tokenizer)
    lines = convert("llamagen-prior", tmp_path / "c2i.pt", tmp_path / "out", given)
    assert any("4 x 4, the tokenizer's" in line for line in lines)
    pipe = smalti.Pipeline.from_pretrained(tmp_path / "out")
    assert pipe.prior.tokenizer_fingerprint == tokenizer.fingerprint
    images = pipe(["goldfish", 3], temperature=0, output_type="pt").images
    assert images.shape == (2, 3, 8, 8)


def test_a_prior_of_captions_becomes_a_pipeline_of_text(tmp_path: Path) -> None:
    s, tokenizer = CAPTIONS, vq_tokenizer()
    assert s.captions is not None
    torch.save(published(s), tmp_path / "t2i.pt")
    given = Options(heads=s.heads, tokenizer=tokenizer)
    convert("llamagen-prior", tmp_path / "t2i.pt", tmp_path / "out", given)
    pipe = smalti.Pipeline.from_pretrained(tmp_path / "out")
    assert pipe.classes == () and pipe.prior.tokenizer_fingerprint == tokenizer.fingerprint
    features = torch.randn(2, *s.captions)
    images = pipe(prompt_embeds=features, temperature=0, output_type="pt").images
    assert images.shape == (2, 3, 8, 8)


def test_other_tokenizers_are_refused(tmp_path: Path) -> None:
    state, s = published(CLASSES), CLASSES
    said = refuse(state, tmp_path, Options(heads=s.heads, tokenizer=vq_tokenizer(vocab=25)))
    assert "they do not belong together" in said
    said = refuse(state, tmp_path, options(s, tokenizer=vq_tokenizer(side=8)))
    assert "they do not belong together" in said


# -- what old code left in the file ---------------------------------------------------------------


def leftovers(s: Sizes) -> State:
    t = 24
    return {
        "freqs_cis": rotary(s),
        "causal_mask": torch.ones(2, t, t, dtype=torch.bool).tril(),
        "mask_cache": torch.full((1, 1, t, t), -torch.inf).triu(1),
    } | {
        f"layers.{i}.attention.kv_cache.{part}_cache": torch.randn(2, s.heads, t, s.head_dim)
        for i in range(s.depth)
        for part in "kv"
    }


def test_leftovers_are_checked_dropped_and_tell_heads_and_grid(tmp_path: Path) -> None:
    extra = leftovers(CLASSES)
    model = read(published(CLASSES) | extra, tmp_path)  # without any flag
    assert model.checksum == read(published(CLASSES), tmp_path, options(CLASSES)).checksum
    del extra["freqs_cis"]
    model = read(published(CLASSES) | extra, tmp_path, Options(scales=(4,)))
    assert model.config.num_heads == 4


def test_a_mask_of_captions_hides_their_padding(tmp_path: Path) -> None:
    mask = torch.ones(1, 24, 24).tril()
    mask[:, :, :2] = 0
    padded = published(CAPTIONS) | {"causal_mask": torch.maximum(mask, torch.eye(24))}
    read(padded, tmp_path, options(CAPTIONS))
    assert "is not a causal mask" in refuse(
        published(CLASSES) | {"causal_mask": mask}, tmp_path, options(CLASSES)
    )


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("freqs_cis", rotary(CLASSES) * 1.01, "freqs_cis is not the table"),
        ("freqs_cis", rotary(Sizes(grid=5)), "freqs_cis is not the table"),
        ("freqs_cis", rotary(CLASSES)[:, :3], "heads of width 6"),
        ("freqs_cis", rotary(CLASSES)[..., 0], "expected 3 dimensions"),
        ("causal_mask", torch.ones(24, 24), "causal_mask is not a causal mask"),
        ("causal_mask", torch.ones(24, 25).tril(), "causal_mask is not a causal mask"),
        ("mask_cache", torch.zeros(1, 1, 9, 9).tril(), "mask_cache is not a causal mask"),
        ("layers.1.attention.kv_cache.v_cache", torch.ones(2, 3, 24, 8), "has shape (2, 3, 24, 8)"),
        ("layers.1.attention.kv_cache.v_cache", torch.ones(2, 4, 24), "expected 4 dimensions"),
        ("layers.0.attention.kv_cache.k_cache", torch.ones(2, 4, 24, 9), "heads of width 9"),
    ],
)
def test_wrong_leftovers_are_refused(name: str, value: Tensor, words: str, tmp_path: Path) -> None:
    given = Options(scales=(CLASSES.grid,))
    if name != "layers.0.attention.kv_cache.k_cache":
        given = options(CLASSES)
    assert words in refuse(published(CLASSES) | {name: value}, tmp_path, given)


# -- faults ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("s", [CLASSES, CAPTIONS], ids=["classes", "captions"])
def test_every_missing_tensor_is_named(s: Sizes, tmp_path: Path) -> None:
    for name in list(state := published(s))[:: 3 if s.captions else 1]:
        rest = {other: tensor for other, tensor in state.items() if other != name}
        assert f"lacks the tensor {name}" in refuse(rest, tmp_path, options(s))


def test_every_misshaped_tensor_is_refused(tmp_path: Path) -> None:
    state = published(Sizes(depth=1))
    for number, (name, tensor) in enumerate(state.items()):
        for wrong in (tensor[..., :-1], (tensor[None], tensor.flatten()[:0])[number % 2]):
            assert refuse(state | {name: wrong}, tmp_path, options(CLASSES))
        assert "torch.int64 values; expected floating-point" in refuse(
            state | {name: tensor.long()}, tmp_path, options(CLASSES)
        )


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (Options(heads=3), "--heads is 3, which does not divide width 32"),
        (Options(heads=16), "each head must be a multiple of 4"),
        (Options(heads=4, scales=(2, 4)), "--scales is 2, 4; this prior has one grid"),
        (Options(heads=4, image_size=8), "--image_size does not apply to a LlamaGen prior"),
    ],
)
def test_wrong_flags_are_refused(given: Options, words: str, tmp_path: Path) -> None:
    assert words in refuse(published(CLASSES), tmp_path, given)


def test_flags_that_contradict_the_file_are_refused(tmp_path: Path) -> None:
    state = published(CLASSES) | {"freqs_cis": rotary(CLASSES)}
    assert "--heads is 2, but the file has 4" in refuse(state, tmp_path, Options(heads=2))
    assert "freqs_cis is not the table" in refuse(state, tmp_path, Options(scales=(5,)))
    grouped = published(UNLIKE)
    assert "give the number of heads with --heads" in refuse(grouped, tmp_path, Options(heads=3))


def test_surplus_tensors_and_other_models_are_refused(tmp_path: Path) -> None:
    extra = {"layers.0.attention.wq.weight": torch.ones(2, 2)}
    said = refuse(published(CLASSES) | extra, tmp_path, options(CLASSES))
    assert "layers.0.attention.wq.weight that no LlamaGen prior" in said
    with pytest.raises(SmaltiError, match=r"is no VAR prior: it looks like llamagen-prior"):
        read_published("var-prior", tmp_path / "published.pt")


def test_a_prior_with_other_parts_is_not_exported_as_llamagen(prior, tmp_path: Path) -> None:
    why = "for a LlamaGen prior, prefix_rotary is identity instead of zero"
    with pytest.raises(SmaltiError, match=f"no published layout fits this prior: {why}"):
        export(prior, tmp_path / "out.pt")
