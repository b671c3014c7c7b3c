"""Published convolutional tokenizers give the codes and pictures of the original code.

The references are plain functions over a dict of tensors, written from the published key layouts
(taming-transformers, LlamaGen, VAR, latent-diffusion); no model of ours has a part in them.
"""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from smalti.errors import SmaltiError
from smalti.pipelines.convert import PUBLISHED_SOURCES
from smalti.pipelines.convert.convert import convert, export, read_published
from smalti.pipelines.convert.source import Options
from smalti.pipelines.convert.var import sharing
from smalti.tokenizer.base import Tokenizer
from smalti.tokenizer.presets import PRESETS

# -- weights in the published layouts ------------------------------------------------------------


@dataclass
class Weights:
    """Random tensors under the names that are asked for; norms and biases are random, too."""

    seed: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def conv(self, name: str, out: int, into: int, side: int) -> None:
        self.tensors[f"{name}.weight"] = self.randn(out, into, side, side) / (into * side**2) ** 0.5
        self.tensors[f"{name}.bias"] = 0.2 * self.randn(out)

    def norm(self, name: str, width: int) -> None:
        self.tensors[f"{name}.weight"] = 1 + 0.3 * self.randn(width)
        self.tensors[f"{name}.bias"] = 0.3 * self.randn(width)

    def block(self, name: str, into: int, out: int) -> None:
        self.norm(f"{name}.norm1", into)
        self.conv(f"{name}.conv1", out, into, 3)
        self.norm(f"{name}.norm2", out)
        self.conv(f"{name}.conv2", out, out, 3)
        if into != out:
            self.conv(f"{name}.nin_shortcut", out, into, 1)

    def attention(self, name: str, width: int, fused: bool) -> None:
        self.norm(f"{name}.norm", width)
        for part, factor in (("qkv", 3),) if fused else (("q", 1), ("k", 1), ("v", 1)):
            self.conv(f"{name}.{part}", factor * width, width, 1)
        self.conv(f"{name}.proj_out", width, width, 1)


@dataclass(frozen=True)
class Sizes:
    """Of an encoder and decoder; all normalisations have 32 groups."""

    width: int = 32
    mult: tuple[int, ...] = (1, 2, 2)
    blocks: int = 2
    attention: tuple[int, ...] = (2,)
    middle: bool = True
    z: int = 12
    double: bool = False
    fused: bool = False
    llamagen: bool = False

    @property
    def levels(self) -> int:
        return len(self.mult)

    def down(self, level: int) -> str:
        return f"encoder.{'conv_blocks' if self.llamagen else 'down'}.{level}"

    def up(self, level: int) -> str:
        """Level 0 has the highest resolution; LlamaGen numbers them as they run."""
        if self.llamagen:
            return f"decoder.conv_blocks.{self.levels - 1 - level}"
        return f"decoder.up.{level}"

    @property
    def block(self) -> str:
        return "res" if self.llamagen else "block"

    @property
    def mid(self) -> tuple[str, str, str]:
        return ("mid.0", "mid.1", "mid.2") if self.llamagen else MID


MID = ("mid.block_1", "mid.attn_1", "mid.block_2")


def add_convolutions(w: Weights, s: Sizes) -> None:
    widths = [s.width * m for m in s.mult]
    w.conv("encoder.conv_in", s.width, 3, 3)
    before = s.width
    for level, width in enumerate(widths):
        for i in range(s.blocks):
            w.block(f"{s.down(level)}.{s.block}.{i}", before, width)
            before = width
            if level in s.attention:
                w.attention(f"{s.down(level)}.attn.{i}", width, s.fused)
        if level < s.levels - 1:
            w.conv(f"{s.down(level)}.downsample.conv", width, width, 3)
    for side, first, last in (
        ("encoder", None, (2 * s.z if s.double else s.z, widths[-1])),
        ("decoder", (widths[-1], s.z), (3, widths[0])),
    ):
        if first:
            w.conv(f"{side}.conv_in", *first, 3)
        w.block(f"{side}.{s.mid[0]}", widths[-1], widths[-1])
        if s.middle:
            w.attention(f"{side}.{s.mid[1]}", widths[-1], s.fused)
        w.block(f"{side}.{s.mid[2]}", widths[-1], widths[-1])
        w.norm(f"{side}.norm_out", last[1])
        w.conv(f"{side}.conv_out", *last, 3)
    before = widths[-1]
    for level in reversed(range(s.levels)):
        for i in range(s.blocks + 1):
            w.block(f"{s.up(level)}.{s.block}.{i}", before, widths[level])
            before = widths[level]
            if level in s.attention:
                w.attention(f"{s.up(level)}.attn.{i}", widths[level], s.fused)
        if level > 0:
            w.conv(f"{s.up(level)}.upsample.conv", before, before, 3)


# -- the original forward passes ------------------------------------------------------------------

State = dict[str, Tensor]


def conv(t: State, name: str, x: Tensor, **options) -> Tensor:
    weight = t[f"{name}.weight"]
    options.setdefault("padding", weight.shape[-1] // 2)
    return F.conv2d(x, weight, t[f"{name}.bias"], **options)


def norm(t: State, name: str, x: Tensor) -> Tensor:
    return F.group_norm(x, 32, t[f"{name}.weight"], t[f"{name}.bias"], eps=1e-6)


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def block(t: State, name: str, x: Tensor) -> Tensor:
    h = conv(t, f"{name}.conv1", swish(norm(t, f"{name}.norm1", x)))
    h = conv(t, f"{name}.conv2", swish(norm(t, f"{name}.norm2", h)))
    if f"{name}.nin_shortcut.weight" in t:
        x = conv(t, f"{name}.nin_shortcut", x)
    return x + h


def attention(t: State, name: str, x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    normed = norm(t, f"{name}.norm", x)
    if f"{name}.qkv.weight" in t:
        q, k, v = conv(t, f"{name}.qkv", normed).reshape(b, 3, c, h * w).unbind(1)
    else:
        q, k, v = (conv(t, f"{name}.{part}", normed).reshape(b, c, h * w) for part in "qkv")
    weights = torch.softmax(torch.einsum("bci,bcj->bij", q, k) * c**-0.5, dim=2)
    mixed = torch.einsum("bcj,bij->bci", v, weights).reshape(b, c, h, w)
    return x + conv(t, f"{name}.proj_out", mixed)


def middle(t: State, side: str, s: Sizes, x: Tensor) -> Tensor:
    x = block(t, f"{side}.{s.mid[0]}", x)
    if s.middle:
        x = attention(t, f"{side}.{s.mid[1]}", x)
    x = block(t, f"{side}.{s.mid[2]}", x)
    return x


def finish(t: State, side: str, x: Tensor) -> Tensor:
    return conv(t, f"{side}.conv_out", swish(norm(t, f"{side}.norm_out", x)))


def encode(t: State, s: Sizes, images: Tensor) -> Tensor:
    x = conv(t, "encoder.conv_in", images)
    for level in range(s.levels):
        for i in range(s.blocks):
            x = block(t, f"{s.down(level)}.{s.block}.{i}", x)
            if level in s.attention:
                x = attention(t, f"{s.down(level)}.attn.{i}", x)
        if level < s.levels - 1:
            padded = F.pad(x, (0, 1, 0, 1))
            x = conv(t, f"{s.down(level)}.downsample.conv", padded, stride=2, padding=0)
    return conv(t, "quant_conv", finish(t, "encoder", middle(t, "encoder", s, x)))


def decode(t: State, s: Sizes, features: Tensor) -> Tensor:
    x = conv(t, "decoder.conv_in", conv(t, "post_quant_conv", features))
    x = middle(t, "decoder", s, x)
    for level in reversed(range(s.levels)):
        for i in range(s.blocks + 1):
            x = block(t, f"{s.up(level)}.{s.block}.{i}", x)
            if level in s.attention:
                x = attention(t, f"{s.up(level)}.attn.{i}", x)
        if level > 0:
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
            x = conv(t, f"{s.up(level)}.upsample.conv", x)
    return finish(t, "decoder", x)


def rows(features: Tensor) -> Tensor:
    return features.permute(0, 2, 3, 1).reshape(-1, features.shape[1])


def nearest(features: Tensor, table: Tensor) -> Tensor:
    """(B, d, h, w) -> codes (B, h w), by plain distances."""
    distances = (rows(features)[:, None] - table[None]).square().sum(-1)
    return distances.argmin(1).view(len(features), -1)


def vectors(codes: Tensor, table: Tensor, height: int, width: int) -> Tensor:
    return table[codes].view(len(codes), height, width, -1).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    ("source", "preset", "tensors"),
    [
        ("llamagen-tokenizer", "vq-f16", 344),
        ("llamagen-tokenizer", "vq-f8", 300),
        ("var-tokenizer", "var-f16", 324),
        ("taming-vqgan", "vqgan-f16-1024", 343),
        ("diffusers-kl", "kl-f8", 248),
    ],
)
def test_published_sizes_have_the_published_number_of_tensors(source, preset, tensors) -> None:
    writer = PUBLISHED_SOURCES.resolve(source)()
    layout = writer.layout(PRESETS[preset])
    assert writer.fits(PRESETS[preset])
    assert sum(len(link.theirs) for link in layout.links) + len(layout.buffers) == tensors


# -- helpers --------------------------------------------------------------------------------------


def pictures(side: int) -> Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(9)) * 2 - 1


def close(found: Tensor, expected: Tensor) -> None:
    """Within 2e-4, relative to the largest number."""
    assert (found - expected).abs().max() <= 2e-4 * expected.abs().max()


def converted(source: str, content: object, folder: Path, **options) -> Tokenizer:
    file = folder / "published.pt"
    torch.save(content, file)
    convert(source, file, folder / "ours", Options(**options))
    return Tokenizer.from_pretrained(folder / "ours")


def assert_round_trip(model: Tokenizer, state: State, folder: Path, source: str, **options) -> None:
    """Exported, the file has exactly the published tensors; read again, the model is the same."""
    export(model, folder / "back.safetensors", source)
    export(model, folder / "back.pt")
    content = torch.load(folder / "back.pt", weights_only=True)
    inner = content.get("model", content.get("state_dict", content))
    assert inner.keys() == state.keys()
    assert all(torch.equal(inner[name], tensor) for name, tensor in state.items())
    for name in ("back.pt", "back.safetensors"):
        again, _ = read_published(source, folder / name, Options(**options))
        assert isinstance(again, Tokenizer)
        assert again.config == model.config and again.checksum == model.checksum


def quantizer_weights(w: Weights, s: Sizes, codes: int, dim: int, kernel: int = 1) -> None:
    w.tensors["quantize.embedding.weight"] = w.randn(codes, dim)
    w.conv("quant_conv", dim, s.z, kernel)
    w.conv("post_quant_conv", s.z, dim, kernel)


# -- LlamaGen -------------------------------------------------------------------------------------

LLAMAGEN = [
    Sizes(llamagen=True),
    Sizes(llamagen=True, width=64, mult=(1, 2), blocks=1, attention=(1,), z=20),
]


def llamagen_state(s: Sizes) -> State:
    w = Weights()
    add_convolutions(w, s)
    quantizer_weights(w, s, codes=48, dim=6)
    w.tensors["quantize.codebook_used"] = torch.zeros(65536)
    return w.tensors


@torch.no_grad()
@pytest.mark.parametrize("s", LLAMAGEN, ids=["three-levels", "two-levels"])
def test_llamagen_tokenizers_give_the_original_codes_and_pictures(s: Sizes, tmp_path: Path) -> None:
    state, images = llamagen_state(s), pictures(16)
    model = converted("llamagen-tokenizer", {"model": state}, tmp_path, image_size=16)
    side = 16 // 2 ** (s.levels - 1)
    table = F.normalize(state["quantize.embedding.weight"], dim=-1)
    codes = nearest(F.normalize(encode(state, s, images), dim=1), table)
    assert codes.unique().numel() > 5
    assert torch.equal(model.encode(images), codes)
    close(model.decode(codes), decode(state, s, vectors(codes, table, side, side)))
    assert_round_trip(model, state, tmp_path, "llamagen-tokenizer", image_size=16)


def test_the_codes_of_a_published_codebook_count_as_used(tmp_path: Path) -> None:
    s = LLAMAGEN[1]
    model = converted("llamagen-tokenizer", llamagen_state(s), tmp_path, image_size=16)
    before = model.quantizer.codebook.weight.clone()
    model.train()
    model(pictures(16))
    model.after_step(torch.Generator().manual_seed(0))
    assert torch.equal(model.quantizer.codebook.weight, before)


# -- taming-transformers and latent-diffusion with codes ------------------------------------------

TAMING = {
    "taming-vqgan": (Sizes(attention=(1, 2)), 12),
    "ldm-vq": (Sizes(mult=(1, 2), blocks=1, attention=(), z=3), 3),
    "ldm-vq-unlike": (Sizes(mult=(2, 1, 3), blocks=1, attention=(1,), middle=False, z=5), 4),
}


def training_junk() -> State:
    return {
        "loss.discriminator.main.0.weight": torch.randn(4, 3, 4, 4),
        "loss.perceptual_loss.lin0.model.1.weight": torch.randn(1, 4, 1, 1),
        "model_ema.num_updates": torch.tensor(3),
        "model_ema.decay": torch.tensor(0.9),
        "model_ema.encoderconv_inweight": torch.randn(32, 3, 3, 3),
    }


@torch.no_grad()
@pytest.mark.parametrize("name", TAMING)
def test_vqgans_give_the_original_codes_and_pictures(name: str, tmp_path: Path) -> None:
    s, dim = TAMING[name]
    source = name.removesuffix("-unlike")
    w, images = Weights(), pictures(16)
    add_convolutions(w, s)
    quantizer_weights(w, s, codes=40, dim=dim)
    content = {"state_dict": w.tensors | training_junk(), "epoch": 3, "callbacks": {}}
    model = converted(source, content, tmp_path, image_size=16)
    side = 16 // 2 ** (s.levels - 1)
    table = w.tensors["quantize.embedding.weight"]
    codes = nearest(encode(w.tensors, s, images), table)
    assert codes.unique().numel() > 5
    assert torch.equal(model.encode(images), codes)
    close(model.decode(codes), decode(w.tensors, s, vectors(codes, table, side, side)))
    assert_round_trip(model, w.tensors, tmp_path, source, image_size=16)


def vqgan() -> Weights:
    w, s = Weights(), Sizes(mult=(1, 2), blocks=1, attention=(1,), z=4)
    add_convolutions(w, s)
    quantizer_weights(w, s, codes=40, dim=4)
    return w


@pytest.mark.parametrize("source", ["taming-vqgan", "ldm-vq"])
def test_the_first_stage_of_a_whole_transformer_is_taken(source: str, tmp_path: Path) -> None:
    """taming-transformers' Net2Net: a condition may have an autoencoder of its own."""
    w = vqgan()
    rest = {
        "transformer.tok_emb.weight": torch.ones(3),
        "transformer.blocks.0.attn.mask": torch.ones(1, 1, 2, 2),
        "cond_stage_model.encoder.down.0.block.0.conv1.weight": torch.ones(3),
        "cond_stage_model.quantize.embedding.weight": torch.ones(3, 2),
    }
    whole = {f"first_stage_model.{name}": tensor for name, tensor in w.tensors.items()} | rest
    torch.save({"state_dict": whole}, tmp_path / "net2net.ckpt")
    model, lines = read_published(source, tmp_path / "net2net.ckpt", Options(image_size=16))
    assert "4 dropped, not needed: cond_stage_model, transformer" in lines
    torch.save({"state_dict": w.tensors}, tmp_path / "alone.ckpt")
    alone, _ = read_published(source, tmp_path / "alone.ckpt", Options(image_size=16))
    assert model.checksum == alone.checksum
    del whole["first_stage_model.decoder.conv_out.bias"]
    torch.save({"state_dict": whole}, tmp_path / "net2net.ckpt")
    with pytest.raises(SmaltiError, match=r"lacks the tensor decoder\.conv_out\.bias"):
        read_published(source, tmp_path / "net2net.ckpt")


@pytest.mark.parametrize("source", ["taming-vqgan", "ldm-vq"])
def test_a_missing_codebook_is_named_and_not_taken_for_a_gaussian(source, tmp_path: Path) -> None:
    w = vqgan()
    del w.tensors["quantize.embedding.weight"]
    torch.save(w.tensors, tmp_path / "vq.ckpt")
    with pytest.raises(SmaltiError, match=r"lacks the tensor quantize\.embedding\.weight"):
        read_published(source, tmp_path / "vq.ckpt")
    with pytest.raises(SmaltiError, match="it looks like taming-vqgan or ldm-vq"):
        read_published("ldm-kl", tmp_path / "vq.ckpt")


@torch.no_grad()
def test_the_gumbel_variant_takes_the_best_scores(tmp_path: Path) -> None:
    s = Sizes(mult=(1, 2), blocks=1, attention=(1,), z=8)
    w, images = Weights(), pictures(16)
    add_convolutions(w, s)
    w.conv("quant_conv", 8, 8, 1)
    w.conv("post_quant_conv", 8, 8, 1)
    w.conv("quantize.proj", 24, 8, 1)
    w.tensors["quantize.embed.weight"] = w.randn(24, 8)
    model = converted("taming-vqgan", {"state_dict": w.tensors}, tmp_path, image_size=16)
    scores = conv(w.tensors, "quantize.proj", encode(w.tensors, s, images))  # (B, V, h, w)
    codes = scores.argmax(1).flatten(1)
    assert codes.unique().numel() > 5
    assert torch.equal(model.encode(images), codes)
    maps = vectors(codes, w.tensors["quantize.embed.weight"], 8, 8)
    close(model.decode(codes), decode(w.tensors, s, maps))
    assert_round_trip(model, w.tensors, tmp_path, "taming-vqgan", image_size=16)


# -- latent-diffusion with a posterior ------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    ("s", "channels"),
    [
        (Sizes(mult=(1, 2, 2, 1), blocks=1, attention=(), z=4, double=True), 4),
        (Sizes(mult=(1, 1, 2), attention=(1, 2), z=3, double=True), 3),
        (Sizes(mult=(1, 2), attention=(1,), z=6, double=True), 5),
    ],
    ids=["f8", "f4-attention", "fewer-channels"],
)
def test_kl_autoencoders_give_the_original_posterior_and_pictures(s, channels, tmp_path) -> None:
    w, images = Weights(), pictures(32)
    add_convolutions(w, s)
    w.conv("quant_conv", 2 * channels, 2 * s.z, 1)
    w.conv("post_quant_conv", s.z, channels, 1)
    content = {"state_dict": w.tensors | training_junk() | {"loss.logvar": torch.zeros(())}}
    model = converted("ldm-kl", content, tmp_path, image_size=32)
    moments = encode(w.tensors, s, images)
    mean, logvar = model.posterior(images)
    close(mean, moments[:, :channels])
    close(logvar, moments[:, channels:].clamp(-30, 20))
    scaling = 0.18215 if (s.levels, channels) == (4, 4) else 1.0
    close(model.encode(images), moments[:, :channels] * scaling)
    close(model.decode(model.encode(images)), decode(w.tensors, s, moments[:, :channels]))
    export(model, tmp_path / "back.ckpt", "ldm-kl")
    content = torch.load(tmp_path / "back.ckpt", weights_only=True)["state_dict"]
    assert content.keys() == w.tensors.keys()
    assert all(torch.equal(content[name], tensor) for name, tensor in w.tensors.items())


@pytest.mark.parametrize("measured", [None, 0.7])
def test_the_autoencoder_of_a_whole_diffusion_model_is_taken(measured, tmp_path: Path) -> None:
    s = Sizes(mult=(1, 2), blocks=1, attention=(), z=4, double=True)
    w = Weights()
    add_convolutions(w, s)
    w.conv("quant_conv", 8, 8, 1)
    w.conv("post_quant_conv", 4, 4, 1)
    rest = {
        "model.diffusion_model.out.0.weight": torch.ones(3),
        "cond_stage_model.transformer.weight": torch.ones(3),
        "model_ema.decay": torch.tensor(0.9),
        "betas": torch.ones(5),
        "scale_factor": torch.tensor(measured or 0.0),
    }
    if measured is None:
        del rest["scale_factor"]
    whole = {f"first_stage_model.{name}": tensor for name, tensor in w.tensors.items()} | rest
    torch.save({"state_dict": whole}, tmp_path / "sd.ckpt")
    model, lines = read_published("ldm-kl", tmp_path / "sd.ckpt", Options(image_size=16))
    told = [line for line in lines if "dropped" in line]
    assert told[0].startswith(f"{len(rest)} dropped, not needed: betas, cond_stage_model, model")
    assert any(line == "  scaling_factor: 0.699999988079071" for line in lines) == bool(measured)
    images = pictures(16)
    close(model.posterior(images)[0], encode(w.tensors, s, images)[:, :4])
    close(model.encode(images), model.posterior(images)[0] * (measured or 1.0))
    whole["scale_factor"] = torch.tensor(0.0)
    torch.save({"state_dict": whole}, tmp_path / "sd.ckpt")
    with pytest.raises(SmaltiError, match=r"scale_factor is 0\.0; it must be positive"):
        read_published("ldm-kl", tmp_path / "sd.ckpt", Options(image_size=16))


# -- VAR ------------------------------------------------------------------------------------------


def test_var_shares_its_convolutions_as_published() -> None:
    assert sharing(10, 4) == (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)
    assert sharing(5, 1) == (0,) * 5
    assert all(sharing(n, n) == tuple(range(n)) for n in range(2, 13))
    assert sharing(3, 2) == (0, 0, 1)  # the middle lies between both: the first wins


def var_names(convolutions: int, own: bool) -> list[str]:
    if own:
        return [f"quantize.quant_resi.{k}" for k in range(convolutions)]
    if convolutions == 1:
        return ["quantize.quant_resi.qresi"]
    return [f"quantize.quant_resi.qresi_ls.{k}" for k in range(convolutions)]


VAR = {
    "two-of-five": ((1, 2, 3, 5, 8), 2, False),
    "four-of-ten": ((1, 2, 3, 4, 5, 5, 6, 6, 7, 8), 4, False),
    "one": ((1, 3, 8), 1, False),
    "four-of-three": ((1, 3, 8), 4, False),
    "own": ((1, 2, 4, 8), 4, True),
}


def var_state(s: Sizes, scales: tuple[int, ...], names: list[str]) -> State:
    w = Weights(seed=2)
    add_convolutions(w, s)
    quantizer_weights(w, s, codes=40, dim=s.z, kernel=3)
    for name in names:
        w.conv(name, s.z, s.z, 3)
    w.tensors["quantize.ema_vocab_hit_SV"] = torch.zeros(len(scales), 40)
    return w.tensors


def var_scale(t: State, names: list[str], scales: tuple[int, ...], k: int, codes: Tensor) -> Tensor:
    """What the codes of one scale add; ticks as in VAR, in double precision."""
    count = len(names)
    inset = 1 / 3 / count if count == 4 else 1 / 2 / count
    ticks = torch.linspace(inset, 1 - inset, count, dtype=torch.float64)
    chosen = int((ticks - k / (len(scales) - 1)).abs().argmin())
    if (len(scales), count) == (10, 4):
        chosen = (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)[k]
    maps = vectors(codes, t["quantize.embedding.weight"], scales[k], scales[k])
    if k < len(scales) - 1:
        maps = F.interpolate(maps, (scales[-1], scales[-1]), mode="bicubic")
    return 0.5 * maps + 0.5 * conv(t, names[chosen], maps)


@torch.no_grad()
@pytest.mark.parametrize("name", VAR)
def test_var_tokenizers_give_the_original_codes_and_pictures(name: str, tmp_path: Path) -> None:
    scales, convolutions, own = VAR[name]
    names = var_names(convolutions, own)
    s = Sizes(mult=(1, 2), blocks=1, attention=(1,), z=7, fused=True)
    state, images = var_state(s, scales, names), pictures(16)
    model = converted("var-tokenizer", state, tmp_path, scales=scales)
    rest, total, codes = encode(state, s, images), 0, []
    for k, side in enumerate(scales):
        seen = F.interpolate(rest, (side, side), mode="area") if side < scales[-1] else rest
        codes.append(nearest(seen, state["quantize.embedding.weight"]))
        added = var_scale(state, names, scales, k, codes[-1])
        rest, total = rest - added, total + added
    assert torch.equal(model.encode(images), torch.cat(codes, 1))
    close(model.decode(torch.cat(codes, 1)), decode(state, s, total))
    if not own:  # which is exported as shared by as many as there are
        assert_round_trip(model, state, tmp_path, "var-tokenizer", scales=scales)


def test_the_tokenizer_beside_a_var_prior_in_training_is_taken(tmp_path: Path) -> None:
    s = Sizes(mult=(1, 2), blocks=1, attention=(1,), z=7, fused=True)
    state = var_state(s, (1, 4, 8), var_names(2, False))
    prior = {"pos_start": torch.ones(1, 1, 8)}
    content = {"trainer": {"var_wo_ddp": prior, "vae_local": state}, "args": {"depth": 2}}
    model = converted("var-tokenizer", content, tmp_path, scales=(1, 4, 8))
    (tmp_path / "bare").mkdir()
    bare = converted("var-tokenizer", state, tmp_path / "bare", scales=(1, 4, 8))
    assert model.checksum == bare.checksum


def test_var_scales_are_checked_against_the_file(tmp_path: Path) -> None:
    s = Sizes(mult=(1, 2), blocks=1, attention=(1,), z=7, fused=True)
    torch.save(var_state(s, (1, 4, 8), var_names(2, False)), tmp_path / "var.pth")
    with pytest.raises(ValueError, match=r"trained with 3 scales, not with the 2"):
        convert("var-tokenizer", tmp_path / "var.pth", tmp_path / "out", Options(scales=(1, 8)))
    with pytest.raises(ValueError, match=r"no scales were published for grids of 128 x 128"):
        convert("var-tokenizer", tmp_path / "var.pth", tmp_path / "out")
    assert not (tmp_path / "out").exists()
